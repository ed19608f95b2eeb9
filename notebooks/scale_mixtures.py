# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Scale mixtures: how high must the drone fly?
#
# A survey drone crosses squares of about two kilometres. Before it starts it gets a handful of
# ground heights in the square, *soundings*, and has to choose a flight height that clears the
# ground everywhere in the square, but wastes little battery on climbing. A Gaussian process can
# interpolate the heights. Its weak point is the *scale*: how rough is this square? Eight soundings
# hardly say, and a model that was tuned in a valley is badly wrong about the mountains next to it.
#
# A scale mixture treats the variance $\sigma^2$ as unknown and integrates it out. The price is
# nothing, the predictions get heavier tails, and this tutorial shows what these are worth: for
# small samples, for a shift from valley to mountains, and what they do *not* do, which is to
# forgive one wrong sounding.

# %%
# %matplotlib inline

# %%
import gpytorch
import numpy as np
import pandas as pd
import torch
from matplotlib.cbook import get_sample_data
from matplotlib.patches import Rectangle

import probkit as pk
from probkit import plots
from probkit.inference import MAP, Direct
from probkit.kernels import NNGPKernel
from probkit.models import BurrXII, InverseGamma, PointMass, ScaleMixtureNNGP, sample_paths

# %% [markdown]
# ## Data
#
# Real terrain comes with matplotlib: heights around the Jacksboro fault in Tennessee, about 90
# metres from point to point. We cut it into squares of 24 x 24 points. The five columns of squares
# in the east are mostly valley; from 40 of these squares we know twelve soundings each, and learn
# from them. Ten columns in the west are mountains, where nobody has been.

# %%
SIDE = 24
height = get_sample_data("jacksboro_fault_dem.npz")["elevation"].astype(float)
line = np.linspace(-1, 1, SIDE)
points = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
dice = np.random.default_rng(0)


def ground(square):
    """Return the true heights of a square, in units of 100 m around 500 m."""
    row, column = square
    block = height[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
    return (block.reshape(-1) - 500) / 100


valley = [(row, column) for row in range(14) for column in range(11, 16)]
mountains = [(row, column) for row in range(14) for column in range(10)]
dice.shuffle(valley)
dice.shuffle(mountains)
known, valley, mountains = valley[:40], valley[40:], mountains[:60]

where = [dice.choice(SIDE**2, 12, replace=False) for _ in known]
x = np.concatenate([points[at] for at in where])
y = np.concatenate([ground(square)[at] for square, at in zip(known, where, strict=True)])
names = [f"{row}/{column}" for row, column in known for _ in range(12)]

fig, axes = plots.figure(1, 2, size=(10, 4.4))
ax = axes[0, 0]
ax.grid(False)
picture = ax.imshow(height, cmap="gist_earth", vmin=150, vmax=1150)
for row, column in known:
    corner = (column * SIDE, row * SIDE)
    ax.add_patch(Rectangle(corner, SIDE, SIDE, fill=False, ec="k", lw=0.8))
ax.set_title("Height in metres; squares we learn from")
fig.colorbar(picture, ax=ax, shrink=0.8)
ax = axes[0, 1]
bins = np.linspace(0, 170, 18)
for label, squares in {"valley": valley + known, "mountains": mountains}.items():
    ax.hist([100 * ground(s).std() for s in squares], bins, alpha=0.6, label=label)
ax.set_xlabel("standard deviation of the heights in a square, metres")
ax.set_ylabel("squares")
ax.set_title("Roughness differs from square to square")
ax.legend()
fig

# %% [markdown]
# ## One kernel, a scale for each square
#
# Squares share the *shape* of the ground: how far a height reaches, which is the kernel's length
# scale. They do not share its size. `scale_per="group"` says so: each square has its own function
# $f_g \sim \mathcal{GP}(0, \sigma_g^2 K)$ with $\sigma_g^2$ from one law, whose scale is learned
# from all squares together with the kernel, by marginal likelihood. A point mass as the law is the
# plain Gaussian process: the same roughness everywhere.
#
# The kernel of an infinitely wide network is one choice, and any GPyTorch kernel may take its
# place. Which one, and which law, is a question that the evidence answers. A constant with a wide
# prior stands for the unknown level of a square; soundings have next to no noise.


# %%
def with_level(kernel):
    """Add an unknown level: a constant whose variance is wide and fixed."""
    level = gpytorch.kernels.ConstantKernel().double()
    level.constant = torch.tensor(100.0, dtype=torch.float64)
    level.raw_constant.requires_grad_(False)
    return kernel.double() + level


kernels = {
    "Matern 3/2": (gpytorch.kernels.MaternKernel(1.5), ("lengthscale",)),
    "network, erf": (NNGPKernel(2, "erf", w_std=4.0, b_std=1.0), ("w_std", "b_std")),
    "network, ReLU": (NNGPKernel(2, "relu"), ("w_std", "b_std")),
}
laws = {
    "point mass": (PointMass(0.2), "value"),
    "inverse gamma": (InverseGamma(2.0, 0.4), "rate"),
    "Burr XII": (BurrXII(2.0, 1.0, 0.2), "scale"),
}


def learn(kernel, law):
    """Fit the kernel's parameters and the law's scale to the forty squares."""
    shape, free = kernels[kernel]
    prior, scale = laws[law]
    names_of_free = [f"kernel.kernels.0.{name}" for name in free]
    model = ScaleMixtureNNGP(
        with_level(shape),
        prior,
        noise_var=1e-4,
        scale_per="group",
        learn=(*names_of_free, f"scale.{scale}"),
    )
    return pk.infer(model, (x, y, names), Direct(hyper=MAP(restarts=1)), rng=0)


learned = {(kernel, law): learn(kernel, law) for kernel in kernels for law in laws}
log_evidence = pd.Series(
    {key: float(post.log_evidence.value) for key, post in learned.items()}
).unstack()
log_evidence.round(1)

# %% [markdown]
# Two findings. Terrain is rough, and the Matern kernel knows: it beats the smooth networks. And
# whatever the kernel, a law of the scale beats the point mass by tens of nats; the two laws are
# hardly apart. We go on with the Matern kernel and the inverse gamma law, whose posterior is a
# Student-t process in closed form.

# %%
mixture, plain = learned["Matern 3/2", "inverse gamma"], learned["Matern 3/2", "point mass"]
gain = float(mixture.log_evidence.value - plain.log_evidence.value)
rate = float(mixture.draws["scale.rate"])
reach = mixture.draws["kernel.kernels.0.lengthscale"][0, 0]
law = InverseGamma(2.0, rate)
print(f"the mixture is ahead by {gain:.1f} nats; sigma^2 ~ InverseGamma(2, {rate:.2f})")

fig, axes = plots.figure(1, 1, size=(6.4, 3.4))
ax = axes[0, 0]
sigma2 = mixture.analytic["scale_var"]
middle, low, high = (
    sigma2.icdf(torch.tensor(level, dtype=torch.float64)).flatten().sqrt()
    for level in (0.5, 0.05, 0.95)
)
order = middle.argsort()
ax.vlines(range(40), 100 * low[order], 100 * high[order], color=plots.PALETTE[0], lw=2, alpha=0.5)
ax.plot(range(40), 100 * middle[order], ".", color=plots.PALETTE[0])
one = 100 * float(plain.draws["scale.value"]) ** 0.5
ax.axhline(one, color=plots.PALETTE[1], ls="--")
ax.text(0, one * 1.08, "one scale for all", color=plots.PALETTE[1])
ax.set_yscale("log")
ax.set_yticks([20, 40, 80, 160], labels=["20", "40", "80", "160"])
ax.minorticks_off()
ax.set_xlabel("known squares, in order")
ax.set_ylabel("sigma, metres (median, 90 %)")
ax.set_title("Twelve soundings leave each scale uncertain by a factor of two")
fig

# %% [markdown]
# ## A square in the mountains
#
# Now the drone reaches a new square with eight soundings. Three ways to treat its scale:
#
# - *plain*: the one scale that was learned in the valley;
# - *plug-in*: the scale that fits the eight soundings best, as if it were known;
# - *mixture*: its posterior, which weighs the eight soundings against all squares seen before.


# %%
def fit(square, count, *, seed=0, spoil=None):
    """Condition the three models on ``count`` soundings of a square."""
    generator = np.random.default_rng([seed, *square, count])
    at = generator.choice(SIDE**2, count, replace=False)
    heights = ground(square)[at]
    if spoil is not None:
        heights[0] += spoil
    data = points[at], heights

    def model(scale, lengthscale):
        kernel = with_level(gpytorch.kernels.MaternKernel(1.5))
        kernel.kernels[0].lengthscale = lengthscale
        return pk.infer(ScaleMixtureNNGP(kernel, scale, noise_var=1e-4), data, rng=0)

    mixed = model(law, reach)
    # The rate of the posterior is that of the prior plus half the quadratic form of the data.
    best = 2 * (float(mixed.analytic["scale_var"].rate) - rate) / count
    posts = {
        "plain": model(PointMass(float(plain.draws["scale.value"])),
                       plain.draws["kernel.kernels.0.lengthscale"][0, 0]),
        "plug-in": model(PointMass(best), reach),
        "mixture": mixed,
    }  # fmt: skip
    return posts, at


def metres(value):
    return 500 + 100 * np.asarray(value)


example = (7, 7)
posts, at = fit(example, 8)
scenes = {
    "ground": ground(example),
    "mean": posts["mixture"].predict(points).mean,
    "95 % bound, plain": posts["plain"].predict(points, site="f").quantile(0.95),
    "95 % bound, mixture": posts["mixture"].predict(points, site="f").quantile(0.95),
}
fig, axes = plots.figure(1, 4, size=(11, 3.1))
for ax, (title, values) in zip(axes[0], scenes.items(), strict=True):
    ax.grid(False)
    ax.imshow(metres(values).reshape(SIDE, SIDE), cmap="gist_earth", vmin=150, vmax=1150)
    ax.plot(at % SIDE, at // SIDE, "wo", mec="k", ms=5)
    ax.set_title(title)
    ax.set_xticks([])
    ax.set_yticks([])
fig

# %% [markdown]
# All three have (nearly) the same mean: mixing over the scale never moves it. What differs is how
# far the ground may rise between the soundings. Along the middle row of the square, with paths
# drawn by Matheron's rule (`sample_paths`), each of which has a $\sigma$ of its own:

# %%
row = np.arange(SIDE) + SIDE * (SIDE // 2)
fig, axes = plots.figure(1, 2, size=(10, 3.8), sharey=True)
for ax, name in zip(axes[0], ("plain", "mixture"), strict=True):
    bounds = posts[name].predict(points[row], site="f")
    low, high = metres(bounds.quantile([0.05, 0.95]))
    ax.fill_between(line, low, high, color=plots.PALETTE[0], alpha=0.2, label="90 %")
    paths = sample_paths(posts[name], 12, rng=1)
    for path in metres(paths(points[row])):
        ax.plot(line, path, color=plots.PALETTE[0], lw=0.6, alpha=0.7)
    ax.plot(line, metres(ground(example))[row], "k", lw=1.8, label="ground")
    ax.set_title(name)
    ax.set_xlabel("west to east")
axes[0, 0].set_ylabel("metres")
axes[0, 0].legend(loc="lower left")
fig

# %% [markdown]
# ## The decision
#
# The flight height must clear the *highest* point of the square with probability 95 %. That is a
# question about all points together, so the prediction is joint: one $\sigma$ for each draw, under
# which the whole square is rough or smooth. The height is the 95 % quantile of the maximum.


# %%
def flight_height(post):
    """Return the height that clears the whole square with probability 95 %."""
    draws = post.predict(points, site="f", joint=True).sample(200, rng=0)
    return float(draws.amax(1).quantile(0.95))


def fly(squares, count=8):
    """Fly over squares: density of the heights, share within 90 % bounds, crashes, clearance."""
    rows = []
    for square in squares:
        truth = torch.tensor(ground(square))
        posts, at = fit(square, count)
        rest = np.setdiff1d(np.arange(SIDE**2), at)
        for name, post in posts.items():
            heights = post.predict(points[rest], site="f")
            low, high = heights.quantile([0.05, 0.95])
            inside = ((truth[rest] >= low) & (truth[rest] <= high)).double().mean()
            clear = 100 * (flight_height(post) - float(truth.max()))
            nll = float(-heights.log_prob(truth[rest]).mean())
            rows.append((name, nll, float(inside), clear < 0, clear))
    columns = ["model", "NLL", "within 90 %", "crashes", "clearance"]
    return pd.DataFrame(rows, columns=columns)


flights = {"valley": fly(valley), "mountains": fly(mountains)}
table = pd.concat({k: v.groupby("model").mean() for k, v in flights.items()})
table.round(2)

# %% [markdown]
# In the valley, where it was tuned, the plain process does as well as the mixture, and the plug-in
# pays for knowing nothing of the usual: with few soundings it is sometimes sure of a scale that is
# far too small. In the mountains the plain process is a disaster: its height was too low in more
# than half of the squares. The mixture was never told about mountains either. It had learned that
# squares differ, so it let eight soundings overrule what is usual; it is the only one of the three
# that is near the best in both places.
#
# All of them crash more often than the one time in twenty that we asked for: real ground has
# ridges, which no Matern process draws. The mixture mends a wrong *scale*, not a wrong shape.
# Before anybody flies, the level of the quantile should be set on squares whose ground is known.

# %%
crashes = {name: float(table.loc["mountains", name]["crashes"]) for name in posts}
nll = {name: float(table.loc["mountains", name]["NLL"]) for name in posts}
valley_nll = {name: float(table.loc["valley", name]["NLL"]) for name in posts}
plain_crashes, mixture_crashes = crashes["plain"], crashes["mixture"]
plain_nll, mixture_nll = nll["plain"], nll["mixture"]
valley_gain = valley_nll["plain"] - valley_nll["mixture"]
fig, axes = plots.figure(1, 2, size=(10, 3.6), sharey=True)
for ax, (place, flown) in zip(axes[0], flights.items(), strict=True):
    for number, name in enumerate(("plain", "plug-in", "mixture")):
        clear = np.sort(flown.loc[flown["model"] == name, "clearance"])
        share = (np.arange(len(clear)) + 0.5) / len(clear)
        ax.plot(clear, share, color=plots.PALETTE[number], label=name)
    ax.axvline(0, color="k", lw=0.8)
    ax.axhline(0.05, color="k", lw=0.8, ls=":")
    ax.set_title(place)
    ax.set_xlabel("metres above the highest point (left of 0: a crash)")
axes[0, 0].set_ylabel("share of squares")
axes[0, 1].legend(loc="lower right")
fig

# %% [markdown]
# ## How many soundings until it does not matter?
#
# The scale is one number. With many soundings its posterior is a point, and the mixture and the
# plug-in agree; the Student-t law has $2\alpha + n$ degrees of freedom. Heavy tails are for small
# samples.

# %%
counts = (3, 5, 8, 16, 48)
scores = {name: [] for name in posts}
for count in counts:
    total = {name: [] for name in posts}
    for square in [*valley[:15], *mountains[:15]]:
        fitted, at = fit(square, count)
        rest = np.setdiff1d(np.arange(SIDE**2), at)
        truth = torch.tensor(ground(square)[rest])
        for name, post in fitted.items():
            density = post.predict(points[rest], site="f").log_prob(truth)
            total[name].append(float(-density.mean()))
    for name in posts:
        scores[name].append(np.mean(total[name]))
small_gain = scores["plug-in"][0] - scores["mixture"][0]
large_gain = scores["plug-in"][-1] - scores["mixture"][-1]

fig, axes = plots.figure(1, 1, size=(6.4, 3.4))
ax = axes[0, 0]
for number, name in enumerate(("plain", "plug-in", "mixture")):
    ax.plot(counts, scores[name], "o-", color=plots.PALETTE[number], label=name)
ax.set_xscale("log")
ax.set_xticks(counts, labels=[str(c) for c in counts])
ax.minorticks_off()
ax.set_xlabel("soundings in a square (15 of valley, 15 of mountains)")
ax.set_ylabel("NLL of the other heights")
ax.legend()
fig

# %% [markdown]
# ## A square without any sounding
#
# `predict` takes the label of each row. A label that it has not seen is a new square, drawn from
# the prior: a Student-t law with $2\alpha = 4$ degrees of freedom. The height difference of two
# points that are far apart then has these quantiles, beside those of a Gaussian of equal variance.

# %%
ends = np.array([[-1.0, -1.0], [1.0, 1.0]])
new = mixture.predict(ends, site="f", joint=True, groups={"group": ["unknown"] * 2})
difference = 100 * new.sample(200_000, rng=0).diff(dim=1)[:, 0]
levels = torch.tensor([0.9, 0.99, 0.999], dtype=torch.float64)
spread = float(difference.std())
tails = pd.DataFrame(
    {
        "Student-t": difference.quantile(levels),
        "Gaussian": spread * torch.special.ndtri(levels),
    },
    index=[f"{float(level):.1%}" for level in levels],
)
tail_ratio = float(tails.loc["99.9%", "Student-t"] / tails.loc["99.9%", "Gaussian"])
tails.round(0)

# %% [markdown]
# ## What the mixture does not do
#
# One altimeter reads 400 metres too much. It is tempting to hope that heavy tails forgive it. They
# do not: *one* $\sigma^2$ is shared by all soundings, so the whole square is taken for rough, and
# the mean is exactly that of the plain Gaussian process with the same kernel. Forgiving single
# outliers takes heavy tails for each observation (a Student-t likelihood), which is another model.

# %%
right, _ = fit(example, 12)
wrong, spoiled = fit(example, 12, spoil=4.0)
same_mean = float(
    (wrong["mixture"].predict(points).mean - wrong["plug-in"].predict(points).mean).abs().max()
)
moved = 100 * float(
    (wrong["mixture"].predict(points).mean - right["mixture"].predict(points).mean).abs().max()
)
sigmas = [float(fitted["mixture"].analytic["scale_var"].mean ** 0.5) for fitted in (right, wrong)]
print(
    f"the mean moves by {moved:.0f} m, in the mixture as in the plain process (difference "
    f"{same_mean:.1g} m); sigma grows from {100 * sigmas[0]:.0f} to {100 * sigmas[1]:.0f} m"
)

# %% [markdown]
# What helps is to look: predict each sounding from the others. The bad one stands out, and because
# the prediction is a Student-t law, its tail probability is an honest one.

# %%
heights = ground(example)[spoiled]
heights[0] += 4.0
tail_probability = []
for left_out in range(12):
    keep = np.arange(12) != left_out
    kernel = with_level(gpytorch.kernels.MaternKernel(1.5))
    kernel.kernels[0].lengthscale = reach
    others = pk.infer(
        ScaleMixtureNNGP(kernel, law, noise_var=1e-4),
        (points[spoiled[keep]], heights[keep]),
        rng=0,
    )
    below = float(others.predict(points[spoiled[[left_out]]]).cdf(heights[[left_out]]))
    tail_probability.append(2 * min(below, 1 - below))
suspect = int(np.argmin(tail_probability))
smallest = min(tail_probability)
fig, axes = plots.figure(1, 2, size=(9.4, 3.4))
ax = axes[0, 0]
ax.grid(False)
change = wrong["mixture"].predict(points).mean - right["mixture"].predict(points).mean
picture = ax.imshow(100 * change.reshape(SIDE, SIDE), cmap="RdBu_r", vmin=-400, vmax=400)
ax.plot(spoiled % SIDE, spoiled // SIDE, "wo", mec="k", ms=5)
ax.plot(spoiled[0] % SIDE, spoiled[0] // SIDE, "kx", ms=9)
ax.set_title("What one wrong sounding does to the mean, metres")
ax.set_xticks([])
ax.set_yticks([])
fig.colorbar(picture, ax=ax, shrink=0.85)
ax = axes[0, 1]
ax.bar(range(12), tail_probability, color=plots.PALETTE[0])
ax.bar([suspect], tail_probability[suspect], color=plots.PALETTE[1])
ax.set_yscale("log")
ax.set_xlabel("sounding")
ax.set_title("Tail probability given the others")
fig

# %% [markdown]
# ## What can go wrong
#
# A law with a very heavy tail has no variance. Quantiles always exist, and are what a decision
# needs; `variance` is infinite and says so.

# %%
import warnings

heavy = ScaleMixtureNNGP(
    with_level(gpytorch.kernels.MaternKernel(1.5)), InverseGamma(0.5, 0.1), scale_per="group"
)
unknown = pk.infer(heavy, (x[:12], y[:12], names[:12]), rng=0).predict(
    ends, groups={"group": ["unknown"] * 2}
)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    infinite = bool(torch.isinf(unknown.variance).all())
print(caught[0].message)
unknown.quantile([0.05, 0.95])

# %% [markdown]
# With a scale for each group, a prediction needs to know the group.

# %%
try:
    mixture.predict(ends)
except pk.DataError as error:
    complaint = str(error)
complaint

# %% [markdown]
# And one that no program can catch: a kernel with an output scale of its own, and a law whose scale
# is learned, multiply each other. Only their product is known. Leave one of them out of `learn`.

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
# # Tensors with continuous indexes: how few readings will do?
#
# A fluorometer reads the intensity of a reacting sample for a pair of wavelengths (the light that
# goes in and the light that comes out) at a moment in time. A full scan of twelve emissions, ten
# excitations and sixty moments is 7,200 readings, and the reaction does not wait. This tutorial
# takes one reading in twenty, fills in the rest with error bars, chooses the structure of the model
# by withheld readings, and decides at which wavelengths the next experiment should look. Then it
# breaks things: a stretch of time without readings shows what the error bars are worth, and what
# they are not.

# %%
# %matplotlib inline

# %%
import warnings

import numpy as np
import pandas as pd
import torch
from botorch.acquisition import qUpperConfidenceBound
from botorch.optim import optimize_acqf
from botorch.sampling import SobolQMCNormalSampler
from tensorly.datasets import load_kinetic

import probkit as pk
from probkit import plots
from probkit.inference.passing import MessagePassing
from probkit.kernels.state_space import Matern
from probkit.models.funbat import (
    FunBaT,
    TensorData,
    additive,
    choose_structure,
    score_predictions,
)

# fits that are stopped early, on purpose, say so
warnings.simplefilter("ignore", pk.ConvergenceWarning)

# %% [markdown]
# ## Data
#
# Real ones, which come with tensorly: the fluorescence of mixtures during an enzymatic reaction.
# We take one mixture, divide by its standard deviation, and pretend that the instrument had time
# for 5 % of the readings. Coordinates stay what they are, nanometres and minutes: `TensorData`
# takes any real-valued index, and a reading need not lie on a grid.

# %%
stored = load_kinetic()
sample = np.asarray(stored["tensor"])[10]
ticks = [np.asarray(tick, dtype=float) for tick in stored["ticks"][1:]]
grid = np.stack([axis.ravel() for axis in np.meshgrid(*ticks, indexing="ij")], -1)
names = ("emission", "excitation", "time")
y = sample.ravel() / np.nanstd(sample)
known = np.isfinite(y)
rng = np.random.default_rng(0)
seen = known & (rng.random(len(y)) < 0.05)
rest = known & ~seen
data = TensorData(grid[seen], y[seen], names)
readings = len(data)
print(f"{readings} readings of {known.sum()}; {data.sizes} different coordinates")

# %% [markdown]
# ## A model
#
# The surface is a sum of a few products, one function of each coordinate in each product:
#
# $$f(x) = \sum_r u^1_r(x_1)\,u^2_r(x_2)\,u^3_r(x_3) .$$
#
# For a mixture of dyes that is chemistry: a dye has an emission spectrum, an excitation spectrum
# and a concentration that changes in time. Each function is a Gaussian process, smooth along its
# own axis, and message passing updates one after the other by a Kalman smoother. Length scales and
# variances are learned by the evidence bound. `chains=3` are three fits from different starts whose
# predictions are averaged.

# %%
smooth = Matern(2.5, lengthscale=0.5)
options = MessagePassing(sweeps=30)
model = FunBaT(3, kind="cp", kernels=smooth)
post = pk.infer(model, data, options, rng=0, chains=3)
scores = score_predictions(post.predict(grid[rest]), torch.as_tensor(y[rest]))
rmse, coverage = scores["rmse"], scores["coverage"]
print(pd.Series(scores).round(3).to_string())

# %% [markdown]
# The other 95 % of the readings are predicted to within a tenth of the signal's standard deviation,
# and nine in ten of them lie in their 90 % intervals. A completion that treats wavelengths and
# moments as unrelated cells has little to go by: a plain nearest reading is several times worse.

# %%
scaled = (grid - grid.min(0)) / np.ptp(grid, axis=0)
distance = ((scaled[rest][:, None] - scaled[seen]) ** 2).sum(-1)
nearest = y[seen][distance.argmin(1)]
nearest_rmse = float(np.sqrt(np.mean((nearest - y[rest]) ** 2)))
print(f"nearest reading: {nearest_rmse:.3f}")

# %%
fig, panels = plots.figure(1, 3, size=(13.0, 3.6))
for panel, name, axis in zip(panels[0], names, ticks, strict=True):
    fine = np.linspace(axis[0], axis[-1], 100)
    factor = model.factor(post, name, fine)
    for component in range(3):
        mean = factor.mean[0, :, component].numpy()
        half = 1.645 * factor.variance[0, :, component].sqrt().numpy()
        band = [(mean - half, mean + half)]
        plots.band_plot(panel, fine, mean, band, colour=plots.PALETTE[component])
    panel.set(title=name)
fig

# %% [markdown]
# The factors of the first fit, with 90 % bands. Do not read too much into a single curve: signs and
# scales may be traded between the factors of a product, and another start may find the components
# in another order. Predictions are what is identified.

# %% [markdown]
# ## Which structure?
#
# Rank three was a guess. `choose_structure` withholds a fifth of the readings (of ours, not of the
# ones we pretend not to have), fits every candidate to the others, and scores them by the density
# that they give to what was withheld. Candidates may differ in anything: rank, masks that let a
# component vary along some modes only, kernels, noise.

# %%
candidates = {
    "CP, rank 1": FunBaT(1, kind="cp", kernels=smooth),
    "CP, rank 2": FunBaT(2, kind="cp", kernels=smooth),
    "CP, rank 3": model,
    "CP, rank 3, rough": FunBaT(3, kind="cp", kernels=Matern(0.5, lengthscale=0.5)),
    "effects, pairs, product": FunBaT(kind="cp", masks=additive(3), kernels=smooth),
}
choice = choose_structure(data, candidates, rng=0, sampler=options, seeds=1, refit=False)
chosen = choice.name
print(choice.scores.round(3).to_string())

# %% [markdown]
# ## A decision
#
# The next sample will be watched at one pair of wavelengths only, fifteen minutes after the start:
# at which? The fitted surface is a BoTorch model, so any of its acquisition functions can be
# maximised over the continuous wavelengths; here the mean plus a small reward for uncertainty.
# (Three fits make a mixture, for which BoTorch's Monte Carlo acquisition functions are made.)

# %%
surface = post.to_botorch()
bounds = torch.tensor([[ticks[0][0], ticks[1][0], 15.0], [ticks[0][-1], ticks[1][-1], 15.0]])
sampler = SobolQMCNormalSampler(torch.Size([32]), seed=0)
with pk.scope(rng=0):
    best, value = optimize_acqf(
        qUpperConfidenceBound(surface, beta=0.1, sampler=sampler),
        bounds.double(),
        q=1,
        num_restarts=2,
        raw_samples=16,
        options={"maxiter": 12},
        fixed_features={2: 15.0},
    )
emission, excitation = float(best[0, 0]), float(best[0, 1])
moment = np.abs(ticks[2] - 15.0).argmin()
true_slice = sample[:, :, moment] / np.nanstd(sample)
top = np.unravel_index(np.nanargmax(true_slice), true_slice.shape)
print(f"look at emission {emission:.0f} nm, excitation {excitation:.0f} nm: {float(value):.2f}")
true_best = (ticks[0][top[0]], ticks[1][top[1]])
print("all readings: {:.0f} nm, {:.0f} nm:".format(*true_best), np.nanmax(true_slice).round(2))

# %%
fine = [np.linspace(axis[0], axis[-1], 40) for axis in ticks[:2]]
mesh = np.stack([a.ravel() for a in np.meshgrid(*fine, [15.0], indexing="ij")], -1)
prediction = post.predict(mesh, site="f")
fig, panels = plots.figure(1, 3, size=(13.0, 3.8))
extent = (ticks[1][0], ticks[1][-1], ticks[0][0], ticks[0][-1])
pictures = (
    (true_slice, "All readings at 15 minutes"),
    (prediction.mean.reshape(40, 40), f"Predicted from {readings} readings"),
    (prediction.variance.sqrt().reshape(40, 40), "Standard deviation"),
)
with plots.style():
    for panel, (picture, title) in zip(panels[0], pictures, strict=True):
        image = panel.imshow(picture, origin="lower", aspect="auto", extent=extent)
        fig.colorbar(image, ax=panel)
        panel.plot(excitation, emission, "rx")
        panel.set(title=title, xlabel="excitation, nm", ylabel="emission, nm")
        panel.grid(visible=False)
fig

# %% [markdown]
# ## What can go wrong: a gap
#
# Scattered readings are the easy case, for each one has neighbours in every mode. Suppose the lamp
# failed from minute 6 to minute 9. We drop these readings and ask for that stretch, once with
# hyper-parameters learned and once fixed at a guess that is much too rough.

# %%
stopped = (grid[:, 2] > 6.0) & (grid[:, 2] < 9.0)
outside = TensorData(grid[seen & ~stopped], y[seen & ~stopped], names)
inside = known & stopped
rows, gap_posts = {}, {}
for name, kernel, learn in (
    ("learned", smooth, True),
    ("fixed, too rough", Matern(0.5, lengthscale=0.02), False),
):
    gapped = FunBaT(3, kind="cp", kernels=kernel, learn_hyperparameters=learn)
    gap_posts[name] = pk.infer(gapped, outside, options, rng=0, chains=2)
    rows[name] = score_predictions(
        gap_posts[name].predict(grid[inside]), torch.as_tensor(y[inside])
    )
gap_scores = pd.DataFrame(rows).T
gap_learned, gap_rough = gap_scores["rmse"]
print(gap_scores.round(3).to_string())

# %%
fig, panels = plots.figure(1, 2, size=(12.0, 3.8))
near = (grid[:, 0] == ticks[0][7]) & (grid[:, 1] == ticks[1][7]) & known
at = np.linspace(ticks[2][0], ticks[2][-1], 150)
line = np.stack([np.full(150, ticks[0][7]), np.full(150, ticks[1][7]), at], -1)
for panel, (name, fitted) in zip(panels[0], gap_posts.items(), strict=True):
    low, middle, high = fitted.predict(line).quantile([0.05, 0.5, 0.95]).numpy()
    plots.band_plot(panel, at, middle, [(low, high)], label="predicted")
    with plots.style():
        panel.plot(grid[near, 2], y[near], ".", label="true readings")
        panel.axvspan(6.0, 9.0, color="0.9", zorder=0)
        panel.set(title=name, xlabel="minutes", ylabel="intensity")
        panel.legend()
fig

# %% [markdown]
# With a length scale that is far too short the trajectories fall back to their prior mean inside
# of the gap, and the prediction with them. Three things are worth remembering:
#
# - **Learn the hyper-parameters**, or choose kernels with `choose_structure(..., withhold="time")`,
#   which withholds whole stretches rather than single readings. Fixed guesses are cheap to make and
#   expensive to trust.
# - **The bound does not choose among starts.** Message passing keeps the factors independent of
#   each other, which makes it fast and its intervals a little narrow, and it has local optima. The
#   fit with the best bound is not always the one that predicts best: average several.
# - **Mind the units.** Coordinates are scaled to [0, 1] along each mode before the fit, and length
#   scales are in these units; add a reading far away and they mean something else.

# %%
fits = {}
for seed in range(3):
    one = pk.infer(model, data, options, rng=seed)
    error = score_predictions(one.predict(grid[rest]), torch.as_tensor(y[rest]))["rmse"]
    fits[f"start {seed}"] = {"bound": float(one.log_evidence.value[0]), "rmse": error}
print(pd.DataFrame(fits).T.round(3).to_string())

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
# # Particles: how nervous is this share?
#
# A clearing house asks for a margin every evening: an amount that covers tomorrow's loss on a
# share on 19 days of 20. A fixed margin is too low in a crisis and too dear in calm times, so it
# should follow the *volatility* of the returns, which nobody observes. This tutorial learns a
# stochastic-volatility model from one year, sets margins with a particle filter in the next, and
# then looks back on that year in three ways: by traced paths of the filter, by particle Gibbs, and
# by PaRIS. The filter is cheap and honest about today; about last spring it is not, and the
# pictures show why.

# %%
# %matplotlib inline

# %%
import numpy as np
import pandas as pd
import torch
from matplotlib.cbook import get_sample_data
from torch.distributions import LogNormal

import probkit as pk
from probkit import plots
from probkit.inference.smc import (
    PPG,
    PaRIS,
    ParticleFilter,
    ParticleGibbs,
    ParticleMarginalMH,
    degeneracy,
    evidence,
    filter_step,
    resample,
    score,
    spawn,
)
from probkit.models.state_space import StochasticVolatility

# %% [markdown]
# ## Data
#
# Real ones: daily prices of the Google share, 2004 to October 2008, which come with matplotlib.
# Returns are differences of log prices, in percent. We learn from the last 200 days of 2007 and
# work with the days of 2008, until the week after the worst of the crash.

# %%
table = get_sample_data("goog.npz")["price_data"]
price = pd.Series(table["adj_close"], index=pd.DatetimeIndex(table["date"]), name="price")
returns = 100 * np.log(price).diff().dropna()
past, y = returns.loc[:"2007"].iloc[-200:], returns.loc["2008":]
days = len(y)
print(f"{len(past)} days before 2008, sd {past.std():.2f} %; {days} in 2008, sd {y.std():.2f} %")

# %% [markdown]
# ## A model, and its parameters from last year
#
# The log variance is an autoregression, and a return is Gaussian given it:
#
# $$x_t = a\,x_{t-1} + s\,\varepsilon_t, \qquad y_t = b\,e^{x_t/2} u_t .$$
#
# Two hundred days say little about the persistence, so we fix $a = 0.95$: a shock to the log
# variance has faded by half after 14 days. The other two parameters have a prior that says what
# daily returns of shares are like, and a likelihood that is an integral over 200 volatilities. A
# particle filter estimates that integral without bias, and Metropolis-Hastings with such an
# estimate still has the exact posterior of the parameters as its target. That is
# `ParticleMarginalMH`.

# %%


def number(value):
    return torch.tensor(value, dtype=torch.float64)


prior = {
    "volatility": LogNormal(number(0.3).log(), number(0.3)),
    "scale": LogNormal(number(2.0).log(), number(0.4)),
}
unknown = StochasticVolatility(persistence=0.95, prior=prior)
learned = pk.infer(unknown, past, ParticleMarginalMH(n=200, draws=150, warmup=50), rng=0, chains=2)
summary = learned.summary()
summary

# %% [markdown]
# Two short chains: the column `ess_bulk` says how few independent draws they are worth, and
# `mcse_mean` by how much the mean may be off. A report would run them ten times longer; for this
# tutorial it will do. We go on with the posterior mean, and check it with the *score*, the gradient
# of the log likelihood: PaRIS estimates it by Fisher's identity. With the gradient of the log prior
# added it would be zero at the posterior's mode; at the mean, a slope times the standard deviation
# of its parameter should be about one at most.

# %%
values = {name: number(float(summary.loc[name, "mean"])) for name in prior}
volatility, scale = (float(value) for value in values.values())
likelihood_slope = score(unknown, values, past, n=100, rng=0).gradient
point = {name: value.clone().requires_grad_() for name, value in values.items()}
prior_slope = torch.autograd.grad(unknown.log_prior(point), list(point.values()))
slopes = {
    name: float(likelihood_slope[name] + slope) * float(summary.loc[name, "sd"])
    for name, slope in zip(prior, prior_slope, strict=True)
}
largest_slope = max(abs(slope) for slope in slopes.values())
slopes

# %% [markdown]
# ## Track: a margin for every evening
#
# The particle filter is a loop over three words: `spawn` particles, take a `filter_step` (resample
# where needed, move, reweight), and look at the cloud. After the step of today we move every
# particle on by one day, simulate its return, and read the margin off the 5 % quantile. Nothing
# here has seen tomorrow.

# %%
model = StochasticVolatility(0.95, **values)
observed = torch.tensor(y.to_numpy())


def evening_margins(model, observed, n, seed):
    """Return the filtered volatility and tomorrow's margin after each day, [day] each."""
    rng = torch.Generator().manual_seed(seed)
    cloud = spawn(model, n, observed, rng=rng)
    volatility, margin = [], []
    for t in range(len(observed)):
        cloud, _ = filter_step(model, t, cloud, observed, rng=rng)
        volatility.append((cloud.weights * (0.5 * cloud.particles).exp()).sum() * model.scale)
        even, _ = resample(cloud, "systematic", rng=rng)
        tomorrow = model.sample_observation(model.sample_next(even.particles, rng=rng), rng=rng)
        margin.append(-tomorrow.quantile(0.05))
    return torch.stack(volatility), torch.stack(margin)


filtered, margin = evening_margins(model, observed, 5000, seed=0)
fixed_margin = 1.645 * past.std()
losses = -observed[1:]
exceeded = int((losses > margin[:-1]).sum())
fixed_exceeded = int((losses > fixed_margin).sum())
expected_days = 0.05 * len(losses)
print(
    f"days with a loss above the margin, {expected_days:.0f} expected: "
    f"{exceeded} with the filter, {fixed_exceeded} with a margin fixed on last year's returns"
)

# %%
fig, axes = plots.figure(1, 1, size=(10, 3.6))
with plots.style():
    ax = axes[0, 0]
    ax.vlines(y.index, 0, y, color="#9a9a9a", linewidth=1.1, label="return")
    ax.plot(
        y.index[1:], -margin[:-1], color=plots.PALETTE[1], label="margin set the evening before"
    )
    ax.axhline(-fixed_margin, color=plots.PALETTE[0], linestyle="--", label="fixed margin")
    hit = (losses > margin[:-1]).numpy()
    ax.plot(y.index[1:][hit], y.iloc[1:][hit], "kx", label="loss above the margin")
    ax.set_ylabel("return (%)")
    ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.66, 1.0))
fig

# %% [markdown]
# ## Can the filter be trusted? ESS, and evidence with an error bar
#
# `infer` with `chains=10` runs ten independent groups of particles. Their evidence estimates are
# unbiased, so their spread gives an error bar: `relative_error`, also that of the logarithm. It can
# be believed where `spread`, the standard deviation of the log estimates, is about one or less.
# With ten particles it is not: most groups are far too low, and the mean hangs on the luckiest.

# %%
rows = {}
for n in (10, 50, 250, 1000):
    groups = pk.infer(model, y, ParticleFilter(n), rng=n, chains=10)
    rows[n] = evidence(groups)._asdict()
log_evidence = rows[1000]["log_mean"]
spread = {n: row["spread"] for n, row in rows.items()}
pd.DataFrame(rows).T.rename_axis("particles")

# %% [markdown]
# The effective sample size falls on days that surprise: the particles that foresaw them are few.

# %%
health = degeneracy(groups)
worst = health["ess"].idxmin()
fig, axes = plots.figure(1, 2, size=(10, 3.3))
with plots.style():
    axes[0, 0].plot(y.index, health["ess"])
    axes[0, 0].annotate(
        f"{y.index[worst]:%d %B}: {y.iloc[worst]:+.1f} %",
        (y.index[worst], health["ess"].iloc[worst]),
        xytext=(-6, 1),
        textcoords="offset points",
        ha="right",
    )
    axes[0, 0].set(ylabel="effective sample size of 1000", ylim=(0, 1000))
    axes[0, 0].tick_params(axis="x", rotation=30)
    counts = list(rows)
    means = [rows[n]["log_mean"] for n in counts]
    errors = [2 * rows[n]["relative_error"] for n in counts]
    axes[0, 1].errorbar(counts, means, errors, fmt="o", capsize=3)
    axes[0, 1].set(xscale="log", xlabel="particles of a group", ylabel="log evidence (± 2 s.e.)")
fig

# %% [markdown]
# ## Smooth, the first way: trace the filter's paths back (and why not to)
#
# `paths=True` returns the whole trajectories of the particles. They are weighted draws of the
# smoothing law, on paper. But every resampling kills lines, so that all survivors share their
# early ancestors: *path degeneracy*.

# %%
traced = pk.infer(model, y, ParticleFilter(200, paths=True), rng=0, chains=5)
trail = traced.sample_stats["unique_ancestors"][0]
first_day_ancestors = int(trail[0])
print(f"200 particles at the end descend from {first_day_ancestors} on the first day")

# %% [markdown]
# ## The second way: particle Gibbs with ancestor sampling
#
# A sweep runs a few particles of which one follows the last path, and draws the next path. The
# paths are a Markov chain with the exact smoothing law, for two particles already. Ancestor
# sampling lets the early days move, too: `renewed` is the share of days that changed in a sweep.

# %%
gibbs = pk.infer(model, y, ParticleGibbs(12, draws=20, warmup=4), rng=0, chains=3)
renewed = gibbs.sample_stats["renewed"].double().mean((0, 1))
renewed_first_month = float(renewed[:20].mean())
print(f"a sweep renews {renewed_first_month:.0%} of the first month")

# %%
fig, axes = plots.figure(1, 3, size=(12.6, 3.4))
with plots.style():
    for ax, draws, title in (
        (axes[0, 0], traced.draws["path"][0], "Traced paths of 200 particles"),
        (axes[0, 1], gibbs.draws["path"].flatten(0, 1), "60 paths of particle Gibbs"),
    ):
        ax.plot(y.index, draws.T, color=plots.PALETTE[0], linewidth=0.5, alpha=0.25)
        ax.set(title=title, ylabel="log variance x", ylim=(-2, 4))
        ax.tick_params(axis="x", rotation=30)
    axes[0, 2].plot(y.index, trail, color=plots.PALETTE[1])
    axes[0, 2].set(title="Distinct ancestors of the last cloud", yscale="log", ylabel="particles")
    axes[0, 2].tick_params(axis="x", rotation=30)
fig

# %% [markdown]
# ## The third way: PaRIS
#
# Often a path is more than one needs: a mean and a variance of every day's log variance are sums
# over the series. Such an *additive functional* is carried along by PaRIS: every particle keeps an
# estimate, updated by two backward draws a step, and no path is stored. The functional below puts
# $x_t$ and $x_t^2$ into the slots of day $t$.


# %%
def moments(t, old, new, data):
    """x_t and x_t^2 in the columns of step t, [particle, 2, step]."""
    out = torch.zeros(len(new), 2, len(data), dtype=new.dtype)
    out[:, 0, t], out[:, 1, t] = new, new.square()
    return out


paris = pk.infer(model, y, PaRIS(200, moments), rng=0, chains=5)
ppg = pk.infer(model, y, PPG(25, moments, sweeps=12, warmup=3), rng=0)


def mean_and_sd(smoothed):
    """Split smoothed moments [*, 2, step] into mean and standard deviation, [*, step] each."""
    mean, square = smoothed.unbind(-2)
    return mean, (square - mean.square()).clamp_min(0).sqrt()


# %% [markdown]
# `PPG`, the Parisian particle Gibbs sampler, repeats PaRIS around a reference path. It needs few
# particles, since every sweep removes a share of the bias that few particles bring.
#
# How far do independent runs of a method lie apart? That is its Monte Carlo error, day by day. The
# traced paths lose most on the early days, where all of them are one or two lines. The error of
# particle Gibbs falls with more sweeps; here it has few.

# %%
log_weights = traced.log_weights.unsqueeze(-1)
runs = {
    "traced paths, n = 200": (log_weights.exp() * traced.draws["path"]).sum(1),
    "particle Gibbs, 20 paths of n = 12": gibbs.draws["path"].mean(1),
    "PaRIS, n = 200": mean_and_sd(paris.sample_stats["smoothed"])[0],
}
apart = pd.DataFrame(
    {
        name: {
            "first month": float(mean[:, :20].std(0).square().mean().sqrt()),
            "last month": float(mean[:, -20:].std(0).square().mean().sqrt()),
        }
        for name, mean in runs.items()
    }
).T
traced_error = float(apart.loc["traced paths, n = 200", "first month"])
paris_error = float(apart.loc["PaRIS, n = 200", "first month"])
apart.rename_axis("sd between runs of E[x_t | y]")

# %%
mean, sd = mean_and_sd(paris.sample_stats["smoothed"].mean(0))
ppg_mean, _ = mean_and_sd(ppg.sample_stats["smoothed"][0])
gibbs_mean = gibbs.draws["path"].mean((0, 1))
gibbs_gap = float((gibbs_mean - mean).square().mean().sqrt())
ppg_gap = float((ppg_mean - mean).square().mean().sqrt())
smoothing_sd = float(sd.mean())
print(
    f"root mean square distance to PaRIS: Gibbs {gibbs_gap:.3f}, PPG {ppg_gap:.3f}; "
    f"posterior sd of a day {smoothing_sd:.2f}"
)

# %%


def to_volatility(log_variance):
    return model.scale * (0.5 * log_variance).exp()


fig, axes = plots.figure(1, 1, size=(10, 3.6))
ax = axes[0, 0]
at = np.arange(days)
band = [(to_volatility(mean - z * sd), to_volatility(mean + z * sd)) for z in (0.674, 1.645)]
plots.band_plot(ax, at, to_volatility(mean), band, label="PaRIS: median, 50 % and 90 %")
with plots.style():
    ax.plot(at, to_volatility(gibbs_mean), ":", color="k", label="particle Gibbs")
    ax.plot(at, filtered, color=plots.PALETTE[1], linewidth=1.0, label="filter: what the day knew")
    ax.plot(at, np.abs(y), "|", color="#8a8a8a", markersize=5, label="absolute return")
    ticks = [i for i in range(1, days) if y.index[i].month != y.index[i - 1].month]
    ax.set_xticks(ticks, [f"{y.index[i]:%b}" for i in ticks])
    ax.set(ylabel="daily volatility (%)", ylim=(0, 19))
    ax.legend(ncols=2, loc="upper right")
fig

# %% [markdown]
# The filter jumps on the day of a shock and knows nothing before; the smoother, which has seen the
# days after, rises ahead of it. Use the first for decisions and the second for explanations.
#
# Nearly twice as many misses as expected also say what the model lacks. It learned in a calm year,
# it holds its parameters for certain, and on the days of quarterly results a share jumps by more
# than a Gaussian law allows, however well its volatility is tracked.
#
# ## Is it right? A series whose truth is known
#
# Of real returns nobody knows the volatility. So we simulate eight years from the model, smooth
# each, and count how many days lie in their 90 % band. Neighbouring days go together, so that the
# share varies by several points from year to year; on average it should be 90 %.

# %%
states, series = model.simulate_path(200, n=8, rng=7)
smoothed = torch.stack(
    [
        pk.infer(model, one, PaRIS(150, moments), rng=i).sample_stats["smoothed"][0]
        for i, one in enumerate(series)
    ]
)
check_mean, check_sd = mean_and_sd(smoothed)
inside = ((states - check_mean).abs() < 1.645 * check_sd).double().mean(1)
coverage = float(inside.mean())
print(f"{coverage:.0%} of the days inside, from {inside.min():.0%} to {inside.max():.0%} a year")

fig, axes = plots.figure(1, 1, size=(10, 3.0))
ax = axes[0, 0]
centre, width = check_mean[0], check_sd[0]
edges = [(centre - q * width, centre + q * width) for q in (0.674, 1.645)]
plots.band_plot(ax, np.arange(200), centre, edges, label="smoothed: mean, 50 % and 90 %")
with plots.style():
    ax.plot(states[0], color="k", linewidth=1.0, label=f"truth (simulated), {inside[0]:.0%} inside")
    ax.set(xlabel="day of the first year", ylabel="log variance x")
    ax.legend(ncols=2)
fig

# %% [markdown]
# ## What can go wrong
#
# **All particles die.** Suppose that returns cannot exceed four standard deviations. The price
# jumped by 18 % on one day of April: with few particles none has a volatility that allows it,
# every weight is zero, and the error names the step.


# %%
class Limited(StochasticVolatility):
    """Returns are never further out than four conditional standard deviations."""

    def log_observation(self, y, state):
        inside = y.abs() < 4 * self.scale * (0.5 * state).exp()
        return super().log_observation(y, state).where(inside, -torch.inf)


try:
    pk.infer(Limited(0.95, **values), y, ParticleFilter(20), rng=0)
except pk.DataError as error:
    death = error
dead_step = death.step
print(f"{y.index[dead_step]:%d %B}, {y.iloc[dead_step]:+.1f} %: {death}")

# %% [markdown]
# More particles, a proposal that looks at the observation, or an observation law with tails are
# the three ways out. The Gaussian law has tails, if thin ones: its filter survives the day.

# %%
alive = pk.infer(model, y, ParticleFilter(20), rng=0)
survived = bool(torch.isfinite(alive.log_evidence.value).all())
survived

# %% [markdown]
# **One backward draw.** PaRIS with `draws=1` is no better than tracing ancestors. It works, with a
# warning.

# %%
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pk.infer(model, y.iloc[:5], PaRIS(50, moments, draws=1), rng=0)
caution = str(caught[0].message)
caution

# %% [markdown]
# **A model without a transition density** can be filtered, but not smoothed by PaRIS or by
# ancestor sampling, and says so before any work.


# %%
class Simulator(StochasticVolatility):
    log_transition = None


try:
    pk.infer(Simulator(0.95, **values), y, PaRIS(50, moments), rng=0)
except pk.CapabilityError as error:
    refusal = str(error)
refusal

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
# # Sampling a posterior, and knowing when not to believe it
#
# A clinic on wheels can visit five rural counties. It should go where women die of breast cancer
# more often than elsewhere, and whoever pays asks how many deaths that could prevent. The raw
# counts answer both questions badly: in a county of 450 women one death more or less moves the
# rate by half, and the highest of many noisy rates promises far too much. This tutorial goes from
# the counts to five counties and an honest promise, with a hierarchical model, and stops on the way
# at what can go wrong: a posterior shaped like a funnel, chains that disagree, an approximation
# that is too narrow, a comparison of models that hangs on single observations.

# %%
# %matplotlib inline

# %%
import warnings

import numpy as np
import pandas as pd
import statsmodels.api as sm
import torch
from torch.distributions import constraints

import probkit as pk
from probkit import plots
from probkit.diagnostics import bfmi, diagnose, loo
from probkit.inference import HMC, SGHMC, SVI, MeanField

# %% [markdown]
# ## Data
#
# Real ones, which come with statsmodels: deaths from breast cancer and number of women in 301
# counties of the southern United States (Rice, *Mathematical Statistics and Data Analysis*). The
# counties have no names there, so we number them by size. The clinic is for the small ones, with
# fewer than 2000 women. `expected` is what a county would count at the rate of all 301 together.

# %%
table = sm.datasets.cancer.load_pandas().data
overall = table["cancer"].sum() / table["population"].sum()
small = table[table["population"] < 2000].copy()
small.index = pd.Index([f"no. {i + 1}" for i in range(len(small))], name="county")
small["expected"] = overall * small["population"]
small["ratio"] = small["cancer"] / small["expected"]
counties = len(small)
deaths, norm = small["cancer"].sum(), small["expected"].sum()
print(f"{counties} counties, {deaths:.0f} deaths, {norm:.0f} expected")
naive = list(small["ratio"].nlargest(5).index)
small.loc[naive].round(2)

# %% [markdown]
# These are the five highest ratios of observed to expected deaths. Plotted against the size of the
# county, highest *and* lowest ratios sit at the left end, where a Poisson count says least: the
# grey band is where 95 % of counties would lie if all had the same risk.

# %%
from scipy.stats import poisson

fig, axes = plots.figure(1, 1, size=(8.6, 3.4))
with plots.style():
    ax = axes[0, 0]
    at = np.linspace(small["expected"].min(), small["expected"].max(), 200)
    ax.fill_between(
        at, poisson.ppf(0.025, at) / at, poisson.ppf(0.975, at) / at, color="#d9d9d9", alpha=0.7
    )
    ax.plot(small["expected"], small["ratio"], "o", markersize=4.5)
    for name in naive:
        ax.annotate(
            name, small.loc[name, ["expected", "ratio"]], xytext=(5, 3), textcoords="offset points"
        )
    ax.axhline(1, color="k", linewidth=0.8)
    ax.set(xlabel="expected deaths", ylabel="observed / expected")
fig

# %% [markdown]
# ## A model
#
# Deaths of county $i$ are Poisson with mean $E_i e^{b_i}$, and log risks scatter around a mean:
#
# $$y_i \sim \mathrm{Poisson}(E_i\,e^{b_i}), \qquad b_i \sim N(\mu, \tau^2), \qquad
# \mu \sim N(0, 0.5^2), \qquad \tau \sim N^+(0, 0.5^2) .$$
#
# The data decide through $\tau$ how far counties are pulled together: *partial pooling*. A model
# for probkit states its sites and a log joint density. `batched = True` says that the density
# carries leading dims through, so that all chains go through one call.
#
# The same model can be written in two ways: with the log risks as sites (*centred*), or with
# standardised ones, $b_i = \mu + \tau z_i$ (*non-centred*). On paper it makes no difference.


# %%
class Counties(pk.Model):
    """Counts with log risks from a common normal law."""

    batched = True

    def __init__(self, centred=False):
        self.centred = centred

    def sites(self, data):
        return {
            "mu": pk.Site((), constraints.real),
            "tau": pk.Site((), constraints.positive),
            "effect": pk.Site((len(data["deaths"]),), constraints.real, ("county",)),
        }

    def data_dims(self, data):
        return {"deaths": ("county",), "expected": ("county",)}

    def log_risk(self, values):
        """The log risks b [*, county]."""
        effect = values["effect"]
        if self.centred:
            return effect
        return values["mu"][..., None] + values["tau"][..., None] * effect

    def log_joint(self, values, data, *, scale=1.0):
        mu, tau, effect = values["mu"], values["tau"], values["effect"]
        prior = -2.0 * (mu.square() + tau.square())
        if self.centred:
            z = (effect - mu[..., None]) / tau[..., None]
            prior = prior - 0.5 * z.square().sum(-1) - effect.shape[-1] * tau.log()
        else:
            prior = prior - 0.5 * effect.square().sum(-1)
        return prior + scale * self.pointwise_log_likelihood(values, data)["deaths"].sum(-1)

    def pointwise_log_likelihood(self, values, data):
        log_mean = self.log_risk(values) + data["expected"].log()
        deaths = data["deaths"]
        return {"deaths": deaths * log_mean - log_mean.exp() - (deaths + 1).lgamma()}

    def plate_size(self, data):
        return len(data["deaths"])

    def initial_values(self, data, n, *, rng):
        noise = torch.randn(n, 2 + len(data["deaths"]), generator=rng, dtype=torch.float64)
        return {
            "mu": 0.3 * noise[:, 0],
            "tau": 0.3 * (0.5 * noise[:, 1]).exp(),
            "effect": 0.3 * noise[:, 2:],
        }


data = {"deaths": small["cancer"], "expected": small["expected"]}

# %% [markdown]
# ## What can go wrong: the funnel
#
# The centred form first, by Hamiltonian Monte Carlo. (`NUTS`, the default for a model like this,
# chooses a length for every path and meets the same difficulty.) Warnings are collected, so that
# they can be read below.


# %%
def sample(model, data, sampler, seed, chains=4, **options):
    """Return the posterior and the warnings of its run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        post = pk.infer(model, data, sampler, rng=seed, chains=chains, **options)
    return post, [str(w.message) for w in caught]


settings = HMC(200, warmup=200)
centred, complaints = sample(Counties(centred=True), data, settings, seed=2, chains=8)
for line in complaints:
    print("*", line)

# %% [markdown]
# The non-centred form of the same posterior, with the same sampler and seed:

# %%
noncentred, remarks = sample(Counties(), data, settings, seed=2, chains=8)
for line in remarks:
    print("*", line)


def health(post):
    """The numbers that tell whether chains can be believed."""
    table = post.summary().loc["tau"]
    return {
        "R-hat of tau": table["r_hat"],
        "bulk ESS of tau": table["ess_bulk"],
        "tail ESS of tau": table["ess_tail"],
        "divergences": int(post.sample_stats["diverging"].sum()),
        "smallest E-BFMI": float(bfmi(post).min()),
    }


compared = pd.DataFrame({"centred": health(centred), "non-centred": health(noncentred)}).T
ess_centred, ess_tau = compared["bulk ESS of tau"]
rhat_centred, rhat_tau = compared["R-hat of tau"]
bfmi_centred, bfmi_tau = compared["smallest E-BFMI"]
compared.round(3)

# %% [markdown]
# Why? Where $\tau$ is small the log risks have to lie close together: the posterior of the centred
# form is a funnel, whose neck is too narrow for a step size that suits its mouth. Chains stick
# above the neck or stop short of it, and the small values of $\tau$ are visited too rarely. In the
# coordinates of the non-centred form the same draws fill a shape without a neck.

# %%
fig, axes = plots.figure(1, 3, size=(12.6, 3.5))
with plots.style():
    for ax, run, title in (
        (axes[0, 0], centred, "Centred: log risk of a county"),
        (axes[0, 1], noncentred, "Non-centred: its standardised effect"),
    ):
        flat = {name: value.flatten(0, 1) for name, value in run.draws.items()}
        ax.plot(flat["effect"][:, 0], flat["tau"].log(), ".", markersize=2.5, alpha=0.4)
        wild = run.sample_stats["diverging"].flatten()
        ax.plot(flat["effect"][wild, 0], flat["tau"][wild].log(), "x", color="k", label="divergent")
        ax.set(title=title, xlabel=f"effect[{small.index[0]}]", ylabel="log tau", ylim=(-6, 0.2))
        if bool(wild.any()):
            ax.legend(loc="lower right")
    for k, (run, name) in enumerate(((centred, "centred"), (noncentred, "non-centred"))):
        axes[0, 2].plot(run.draws["tau"][0].log() - 3.5 * k, linewidth=0.7, label=name)
    axes[0, 2].set(title="One chain of log tau (shifted)", xlabel="draw", yticks=[])
    axes[0, 2].legend(loc="lower right")
fig

# %% [markdown]
# ### Ranks say more than traces
#
# Rank all draws of $\tau$ over all chains. Chains that explore the same law have level rank
# histograms; one that hangs in a corner shows.

# %%
fig, axes = plots.figure(2, 4, size=(12.6, 4.2), sharey=True)
for row, (run, name) in enumerate(((centred, "centred"), (noncentred, "non-centred"))):
    tau = run.draws["tau"]
    ranks = tau.flatten().argsort().argsort().reshape(tau.shape)
    for chain in range(4):
        ax = axes[row, chain]
        plots.rank_plot(ax, ranks[chain], tau.numel() - 1, bins=10, label=f"{name}, chain {chain}")
        ax.set(xlabel="rank of the draw" if row else "", ylabel="" if chain else "draws")
fig

# %% [markdown]
# The grey bands are those of independent draws; correlated ones leave them now and then.
#
# ### Many chains are cheap
#
# For the answer we want more draws. All chains go through one tensor program, so that sixteen cost
# little more than eight, and `HMC` adapts one length of path for all of them. `diagnose` collects
# the diagnostics in one report, with what to do where something is not as it should be.

# %%
post, remarks = sample(Counties(), data, HMC(800, warmup=400), seed=2, chains=16)
report = diagnose(post)
rhat_final = float(report.table["r_hat"].max())
report

# %% [markdown]
# ## A quick answer, and how wrong it is: variational inference
#
# `SVI` fits a normal law in the unconstrained space instead of drawing. It gives a lower bound on
# the log evidence with its standard error, and the Pareto shape $\hat k$ of the importance weights:
# above 0.7 it is not to be trusted. Its rule of convergence ends the run when the bound no longer
# rises by more than its Monte Carlo error.

# %%
vi = SVI(steps=1200, lr=0.05, window=150)
fit, cautions = sample(Counties(), data, vi, seed=0, chains=1, guide=MeanField())
bound = float(fit.log_evidence.value)
shape = float(fit.sample_stats["pareto_k"])
print(f"bound {bound:.1f} ± {float(fit.sample_stats['bound_se']):.2f}, Pareto k {shape:.2f}")
for line in cautions:
    print("*", line)

approximate = fit.sample(4000, rng=1)["tau"]
exact = post.draws["tau"].flatten()
low_tau = {
    "HMC": float((exact < 0.1).double().mean()),
    "SVI, mean field": float((approximate < 0.1).double().mean()),
}
low_hmc, low_svi = low_tau.values()
pd.Series(low_tau, name="probability that tau < 0.1").to_frame().round(3)

# %% [markdown]
# A mean-field law of $\log\tau$ has no long left tail: it all but rules out that the counties are
# alike, which HMC does not. For a first look it is fine; for a statement about $\tau$ it is not.
#
# ## Which model? Leave one county out
#
# Is partial pooling worth it? The alternatives: all counties alike ($\tau = 0$), or every county
# for itself (a fixed, large $\tau$). `compare` ranks them by how well they predict a county that
# was left out, with Pareto-smoothed importance sampling instead of refitting.


# %%
class Fixed(Counties):
    """The same model with a given spread of the log risks."""

    def __init__(self, tau):
        super().__init__()
        self.tau = torch.tensor(tau, dtype=torch.float64)

    def sites(self, data):
        return {name: site for name, site in super().sites(data).items() if name != "tau"}

    def log_joint(self, values, data, *, scale=1.0):
        tau = self.tau.expand(values["mu"].shape)
        return super().log_joint({**values, "tau": tau}, data, scale=scale)

    def pointwise_log_likelihood(self, values, data):
        tau = self.tau.expand(values["mu"].shape)
        return super().pointwise_log_likelihood({**values, "tau": tau}, data)

    def initial_values(self, data, n, *, rng):
        found = super().initial_values(data, n, rng=rng)
        return {name: found[name] for name in ("mu", "effect")}


quick = HMC(150, warmup=200)
alike, _ = sample(Fixed(0.0), data, quick, seed=0, chains=8)
alone, _ = sample(Fixed(2.0), data, quick, seed=0, chains=8)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # The table has a column for what the warning says.
    ranking = pk.compare({"alike": alike, "partial pooling": post, "every county alone": alone})
undecided = float(ranking["elpd_loo"]["partial pooling"] - ranking["elpd_loo"]["alike"])
margin = float(ranking.loc["every county alone", "elpd_diff"])
margin_se = float(ranking.loc["every county alone", "dse"])
ranking.round(2)

# %% [markdown]
# Two things to read here. The first two models differ by less than the standard error of the
# difference (`dse`): these data do not say whether small counties differ at all, and a posterior
# of $\tau$ that reaches down to zero says the same. And `bad_k` counts counties whose own count
# moves their risk so far that leaving it out cannot be imitated by weights. For "every county
# alone" these are most, so that its score is not to be believed, low as it is. Partial pooling
# keeps them tame.

# %%
influence = loo(post).pareto_k
bad_partial, bad_alone = loo(post).bad, loo(alone).bad
print(f"influential counties: {bad_partial} with partial pooling, {bad_alone} without")

# %% [markdown]
# ## The decision
#
# A visit saves, say, a fifth of the deaths above the norm. What county $i$ is worth is then the
# posterior mean of its excess, $E_i\,\max(e^{b_i} - 1, 0)$: risk, size and uncertainty in one
# number. No test of significance and no threshold is needed.

# %%
with torch.no_grad():
    log_risk = post.model.log_risk(post.draws).flatten(0, 1)
expected = torch.tensor(small["expected"].to_numpy())
excess = (expected * (log_risk.exp() - 1).clamp(min=0)).mean(0)
small["excess"] = excess.numpy()
small["risk"] = log_risk.exp().mean(0).numpy()
chosen = list(small["excess"].nlargest(5).index)
gain = float(small.loc[chosen, "excess"].sum())
promised = float((small["cancer"] - small["expected"])[naive].sum())
overlap = len(set(chosen) & set(naive))
print(f"excess deaths in the five chosen: {gain:.1f} expected")
print(f"raw counts promise {promised:.0f}, in a list that shares {overlap} counties with ours")
small.loc[chosen, ["population", "cancer", "expected", "ratio", "risk", "excess"]].round(2)

# %%
fig, axes = plots.figure(1, 1, size=(8.6, 4.6))
with plots.style():
    ax = axes[0, 0]
    shown = list(dict.fromkeys(chosen + naive))
    place = [list(small.index).index(name) for name in shown]
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    q = log_risk.exp()[:, place].quantile(levels, dim=0)
    labels = [name + (" ← visit" if name in chosen else "") for name in shown]
    plots.interval_plot(ax, labels, q[2], q[0], q[4], inner=(q[1], q[3]), label="posterior risk")
    ax.plot(small.loc[shown, "ratio"], range(len(shown)), "x", color="k", label="observed ratio")
    ax.axvline(1, color="k", linewidth=0.8)
    ax.set(xlabel="risk relative to all counties")
    ax.legend(loc="lower right")
fig

# %% [markdown]
# The lists differ little, the promises much. Selection is why: among many noisy ratios the highest
# are those that were lucky upwards. Partial pooling takes that back; the risks in the picture lie
# far to the left of the crosses. To see that it is right to do so, draw new counts from the
# posterior, choose by their raw ratios, and compare the promise with the excess that is there.

# %%
rng = torch.Generator().manual_seed(1)
risk = log_risk.exp()
replicated = torch.poisson(expected * risk, generator=rng)
lucky = (replicated / expected).topk(5, dim=1).indices
raw_promise = (replicated - expected).gather(1, lucky).sum(1).mean()
kept = (expected * (risk - 1).clamp(min=0)).gather(1, lucky).sum(1).mean()
inflation = float(raw_promise / kept)
perfect = float((expected * (risk - 1).clamp(min=0)).topk(5, dim=1).values.sum(1).mean())
share = gain / perfect
print(f"in replicated worlds raw ratios promise {inflation:.1f} times what they keep")
print(f"our list is worth {share:.0%} of what knowing every risk would be worth")

# %% [markdown]
# The last number prices a better register of deaths: with it, the five visits could save half as
# much again.
#
# ## Is it right? Data whose truth is known
#
# Simulate counts from known risks, infer, and count how often 90 % intervals hold the truth. (For a
# full check over many simulated data sets see `probkit.calibration.sbc`.)

# %%
rng = torch.Generator().manual_seed(5)
truth = 0.3 * torch.randn(counties, generator=rng, dtype=torch.float64)
counts = torch.poisson(expected * truth.exp(), generator=rng)
check, _ = sample(Counties(), {"deaths": counts, "expected": expected}, quick, seed=3, chains=8)
with torch.no_grad():
    drawn = check.model.log_risk(check.draws).flatten(0, 1)
ends = drawn.quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)
coverage = float(((truth > ends[0]) & (truth < ends[1])).double().mean())
print(f"{coverage:.0%} of the counties inside their 90 % interval")

# %% [markdown]
# ## When the data do not fit into one gradient
#
# With millions of units one takes gradients on minibatches. `SGHMC` draws with them, without an
# accept step: its error is of the order of the step size. A model needs two methods for it, the
# number of units and how to take some. Here it is only a check that the third way leads to the
# same place.


# %%
class Minibatched(Counties):
    """The counties' model, with effects local to a plate that may be subsampled."""

    def sites(self, data):
        sites = dict(super().sites(data))
        sites["effect"] = pk.Site(sites["effect"].shape, constraints.real, ("county",), "county")
        return sites

    def log_joint(self, values, data, *, scale=1.0):
        mu, tau, effect = values["mu"], values["tau"], values["effect"]
        local = -0.5 * effect.square().sum(-1)
        local = local + self.pointwise_log_likelihood(values, data)["deaths"].sum(-1)
        return -2.0 * (mu.square() + tau.square()) + scale * local

    def minibatch(self, data, index):
        size = self.plate_size(data)
        return pk.Batch(pk.data.take(data, index, size), index, size / len(index))


batches = {"batch_size": counties // 2, "step_size": 0.1}
stochastic, _ = sample(
    Minibatched(), data, SGHMC(200, warmup=400, friction=0.1, thin=6, **batches), seed=1, chains=8
)
tau_hmc = float(exact.mean())
tau_sghmc = float(stochastic.draws["tau"].mean())
print(f"posterior mean of tau: HMC {tau_hmc:.3f}, SGHMC on half-batches {tau_sghmc:.3f}")

# %% [markdown]
# Noise in the gradients heats the chains, and friction cools them. With too little friction for the
# step size, draws are too wide. Nothing in the draws would tell; the sampler knows, and warns:

# %%
hot, heat = sample(
    Minibatched(), data, SGHMC(80, warmup=200, friction=0.03, thin=6, **batches), seed=1, chains=8
)
tau_hot = float(hot.draws["tau"].mean())
print(f"posterior mean of tau: {tau_hot:.3f}")
for line in heat:
    print("*", line)

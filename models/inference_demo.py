"""Demo view: gradient-based samplers on eight schools and on a hierarchical model of counties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.distributions import constraints

from probkit.demo import DemoContext, DemoView, register_view
from probkit.model import Model, Site

if TYPE_CHECKING:
    from probkit.posterior import Posterior

__all__: list[str] = []

_SIMULATED = "60 **simulated** counties (the real counts come with statsmodels, not installed here)"
_REAL = (
    "deaths from breast cancer in the counties with fewer than 2500 women of three southern states "
    "of the US: real counts that come with statsmodels"
)


class Hierarchy(Model):
    """Groups with effects from a common normal law; the likelihood is what subclasses add.

    Args:
        centred: Whether the sites are the effects themselves, or standardised ones.
    """

    batched = True

    def __init__(self, centred: bool) -> None:
        self.centred = centred

    @property
    def scales(self) -> tuple[float, float]:
        """Prior standard deviations of the mean and of the spread."""
        return 5.0, 5.0

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Mean, spread and one effect a group."""
        groups = len(next(iter(data.values())))
        return {
            "mean": Site((), constraints.real),
            "spread": Site((), constraints.positive),
            "effect": Site((groups,), constraints.real, ("group",)),
        }

    def data_dims(self, data: Any) -> Any:
        """All data run along the groups."""
        return dict.fromkeys(data, ("group",))

    def effects(self, values: Mapping[str, Tensor]) -> Tensor:
        """Effects of the groups [*, group], whichever way they are written."""
        effect = values["effect"]
        if self.centred:
            return effect
        return values["mean"][..., None] + values["spread"][..., None] * effect

    def log_joint(self, values: Mapping[str, Tensor], data: Any, *, scale: float = 1.0) -> Tensor:
        """Log density of all sites and the data, up to constants."""
        mean, spread, effect = values["mean"], values["spread"], values["effect"]
        wide, narrow = self.scales
        prior = -0.5 * ((mean / wide).square() + (spread / narrow).square())
        if self.centred:
            z = (effect - mean[..., None]) / spread[..., None]
            prior = prior - 0.5 * z.square().sum(-1) - effect.shape[-1] * spread.log()
        else:
            prior = prior - 0.5 * effect.square().sum(-1)
        pointwise = self.pointwise_log_likelihood(values, data)
        return prior + scale * sum(part.sum(-1) for part in pointwise.values())

    def pointwise_log_likelihood(
        self, values: Mapping[str, Tensor], data: Any
    ) -> dict[str, Tensor]:
        """Log density of every observation [*, group]."""
        return {}

    def initial_values(self, data: Any, n: int, *, rng: torch.Generator) -> dict[str, Tensor]:
        """Start near the prior's centre."""
        groups = len(next(iter(data.values())))
        noise = torch.randn(n, 2 + groups, generator=rng, dtype=torch.float64)
        wide, narrow = self.scales
        return {
            "mean": 0.3 * wide * noise[:, 0],
            "spread": narrow * (0.3 * noise[:, 1]).exp(),
            "effect": 0.3 * narrow * noise[:, 2:],
        }


class Schools(Hierarchy):
    """Normal observations with known standard errors."""

    def pointwise_log_likelihood(
        self, values: Mapping[str, Tensor], data: Any
    ) -> dict[str, Tensor]:
        """Log density of every school's estimate."""
        gap = (data["effect"] - self.effects(values)) / data["standard_error"]
        return {"effect": -0.5 * gap.square() - (2.5066282746 * data["standard_error"]).log()}


class Counties(Hierarchy):
    """Poisson counts with expected values times log-normal risks."""

    @property
    def scales(self) -> tuple[float, float]:
        """Risks differ by tens of percent."""
        return 0.5, 0.5

    def pointwise_log_likelihood(
        self, values: Mapping[str, Tensor], data: Any
    ) -> dict[str, Tensor]:
        """Log density of every county's count."""
        log_mean = self.effects(values) + data["expected"].log()
        deaths = data["deaths"]
        return {"deaths": deaths * log_mean - log_mean.exp() - (deaths + 1.0).lgamma()}


def _counties(seed: int) -> tuple[pd.DataFrame, bool]:
    """Deaths and expected deaths of small counties, real where statsmodels is installed."""
    try:
        from statsmodels.api import datasets
    except ImportError:
        generator = torch.Generator().manual_seed(seed)
        expected = 2.0 + 7.0 * torch.rand(60, generator=generator, dtype=torch.float64)
        risk = (0.25 * torch.randn(60, generator=generator, dtype=torch.float64)).exp()
        deaths = torch.poisson(expected * risk, generator=generator)
        table = pd.DataFrame({"deaths": deaths.numpy(), "expected": expected.numpy()})
        real = False
    else:
        whole = datasets.cancer.load_pandas().data
        rate = whole["cancer"].sum() / whole["population"].sum()
        small = whole[whole["population"] < 2500]
        table = pd.DataFrame({"deaths": small["cancer"], "expected": rate * small["population"]})
        real = True
    table.index = pd.Index([f"no. {i + 1}" for i in range(len(table))], name="group")
    return table, real


def _health(post: Posterior, seconds: float) -> dict[str, Any]:
    """The numbers that tell whether chains can be believed."""
    from probkit.diagnostics import bfmi

    table = post.summary()
    return {
        "chains x draws": f"{post.chains} x {post.draws['spread'].shape[1]}",
        "largest R-hat": table["r_hat"].max(),
        "bulk ESS of spread": table.loc["spread", "ess_bulk"],
        "tail ESS of spread": table.loc["spread", "ess_tail"],
        "divergences": int(post.sample_stats["diverging"].sum()),
        "smallest E-BFMI": float(bfmi(post).min()),
        "seconds": seconds,
    }


def _sample(model: Any, data: Any, sampler: Any, ctx: DemoContext, chains: int) -> Posterior:
    """Draw; what the sampler would warn of is shown in the tables of the view."""
    import warnings

    import probkit as pk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pk.ConvergenceWarning)
        return pk.infer(model, data, sampler, rng=ctx.rng_seed, chains=chains)


def run(ctx: DemoContext) -> None:
    """Sample both models in both forms, and show what the diagnostics see."""
    _schools(ctx)
    _risks(ctx)


def _compare(ctx: DemoContext, runs: Mapping[str, tuple[Any, Any]], data: Any) -> list[Posterior]:
    """Draw from each (model, sampler) with 8 chains, and add a table of diagnostics."""
    found, rows = [], {}
    for name in ctx.track(list(runs), "sampling"):
        model, sampler = runs[name]
        post = _sample(model, data, sampler, ctx, 8)
        found.append(post)
        rows[name] = _health(post, post.attrs["seconds"])
    ctx.table(
        pd.DataFrame(rows).T,
        "Diagnostics; seconds are those of this machine, warm-up included",
        digits=3,
    )
    return found


def _schools(ctx: DemoContext) -> None:
    """Eight schools: the funnel, and ranks that show it."""
    from probkit import plots
    from probkit.datasets import eight_schools
    from probkit.inference import HMC, NUTS

    frame = eight_schools()
    data = {"effect": frame["effect"], "standard_error": frame["standard_error"]}
    ctx.text(
        """
        **Eight schools** (Rubin 1981): effects of coaching with known standard errors, drawn from a
        common normal law of unknown spread. Written in the effects themselves (centred) the
        posterior is a funnel: where the spread is small the effects lie close together, in a neck
        that no step size fits. Written in standardised effects (non-centred) it has no neck.
        """
    )
    draws, warmup = (1000, 1000) if ctx.full else (150, 150)
    hmc = HMC(draws, warmup=warmup, max_steps=48)
    runs = {
        "centred, HMC": (Schools(True), hmc),
        "non-centred, HMC": (Schools(False), hmc),
        "non-centred, NUTS": (Schools(False), NUTS(draws // 2, warmup=warmup // 2)),
    }
    centred, best, _ = _compare(ctx, runs, data)
    pair = {"centred": centred, "non-centred": best}
    _funnel(ctx, pair, "schools", str(frame.index[0]))
    _ranks(ctx, pair, "schools")
    effects = best.model.effects(best.draws).flatten(0, 1)
    q = effects.quantile(effects.new_tensor([0.05, 0.25, 0.5, 0.75, 0.95]), dim=0)
    fig, axes = plots.figure(1, 1, size=(7.4, 3.6))
    ax = axes[0, 0]
    plots.interval_plot(
        ax,
        list(frame.index),
        q[2],
        q[0],
        q[4],
        inner=(q[1], q[3]),
        label="posterior, 50 % and 90 %",
    )
    with plots.style():
        ax.plot(frame["effect"], np.arange(len(frame)), "x", color="k", label="estimate alone")
        ax.set(xlabel="effect (score points)", ylabel="school")
        ax.legend(loc="lower right")
    ctx.figure(fig, "effects", "Partial pooling draws the schools together")
    ctx.arviz(best.to_arviz(), "schools")


def _risks(ctx: DemoContext) -> None:
    """Counties: many groups, few counts, a list of those with the highest risk."""
    from probkit import plots
    from probkit.inference import HMC

    table, real = _counties(ctx.rng_seed)
    data = {"deaths": table["deaths"], "expected": table["expected"]}
    ctx.text(
        f"""
        **A hierarchical model of {len(table)} counties**: {_REAL if real else _SIMULATED}. Counts
        are Poisson around expected deaths times a risk, and log risks come from one normal law.
        """
    )
    draws, warmup = (1000, 1000) if ctx.full else (200, 150)
    hmc = HMC(draws, warmup=warmup, max_steps=48)
    runs = {"centred, HMC": (Counties(True), hmc), "non-centred, HMC": (Counties(False), hmc)}
    centred, best = _compare(ctx, runs, data)
    _ranks(ctx, {"centred": centred, "non-centred": best}, "counties")
    risks = best.model.effects(best.draws).flatten(0, 1).exp()
    ratio = (table["deaths"] / table["expected"]).to_numpy()
    q = risks.quantile(risks.new_tensor([0.05, 0.25, 0.5, 0.75, 0.95]), dim=0)
    shown = np.argsort(-risks.mean(0).numpy())[:12]
    fig, axes = plots.figure(1, 2, size=(11.6, 4.2))
    ax = axes[0, 0]
    plots.interval_plot(
        ax,
        [str(table.index[i]) for i in shown],
        q[2, shown],
        q[0, shown],
        q[4, shown],
        inner=(q[1, shown], q[3, shown]),
        label="posterior, 50 % and 90 %",
    )
    with plots.style():
        ax.plot(ratio[shown], np.arange(len(shown)), "x", color="k", label="observed / expected")
        ax.axvline(1.0, color="k", linewidth=0.8)
        ax.set(xlabel="relative risk", title="The twelve highest risks")
        ax.legend(loc="lower right")
        ax = axes[0, 1]
        ax.plot(table["expected"], ratio, "x", color="k", label="observed / expected")
        ax.plot(table["expected"], risks.mean(0), "o", markersize=4, label="posterior mean")
        ax.axhline(1.0, color="k", linewidth=0.8)
        ax.set(xlabel="expected deaths", ylabel="relative risk", title="All counties")
        ax.legend(loc="upper left")
    ctx.figure(
        fig, "risks", "Raw ratios scatter most where counts are small; posterior risks do not"
    )
    ctx.arviz(best.to_arviz(), "counties")


def _funnel(ctx: DemoContext, found: Mapping[str, Posterior], name: str, group: str) -> None:
    """Draws of the first effect against the log spread, in both forms."""
    from probkit import plots

    fig, axes = plots.figure(1, 2, size=(9.4, 3.5), sharey=True)
    for ax, (key, post) in zip(axes[0], found.items(), strict=True):
        effect, spread = (post.draws[site].flatten(0, 1) for site in ("effect", "spread"))
        wild = post.sample_stats["diverging"].flatten()
        with plots.style():
            ax.plot(effect[:, 0], spread.log(), ".", markersize=2.5, alpha=0.45)
            ax.plot(effect[wild, 0], spread[wild].log(), "x", color="k", label="divergent")
            ax.set(title=f"{key}: {int(wild.sum())} divergent", xlabel=f"effect[{group}]")
            if bool(wild.any()):
                ax.legend(loc="lower right")
    axes[0, 0].set_ylabel("log spread")
    ctx.figure(
        fig, f"funnel-{name}", "The centred form stops short of the neck; the other has none"
    )


def _ranks(ctx: DemoContext, found: Mapping[str, Posterior], name: str) -> None:
    """Ranks of the spread's draws over all chains, for the first four chains of each run."""
    from probkit import plots

    fig, axes = plots.figure(2, 4, size=(12.4, 4.4), sharey="row")
    for row, (key, post) in enumerate(found.items()):
        ranks = _rank_of(post.draws["spread"])
        for chain in range(4):
            ax = axes[row, chain]
            plots.rank_plot(
                ax, ranks[chain], ranks.numel() - 1, bins=10, label=f"{key}, chain {chain}"
            )
            ax.set(xlabel="rank of the draw" if row else "", ylabel="" if chain else "draws")
    ctx.figure(
        fig,
        f"ranks-{name}",
        "Ranks of the spread among all chains: level where chains explore the same law",
    )


def _rank_of(draws: Tensor) -> Tensor:
    """Rank [chain, draw] of every draw among those of all chains."""
    return draws.flatten().argsort().argsort().reshape(draws.shape)


register_view(DemoView("inference", "Gradient-based sampling and its diagnostics", run, order=25))

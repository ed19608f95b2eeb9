"""Demo view: filtering, ancestry and evidence of a stochastic-volatility model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from probkit.models.state_space import StochasticVolatility

__all__: list[str] = []

_ORIGIN = {
    True: "daily returns of the Google share in 2008, in percent: real prices that come with "
    "matplotlib",
    False: "200 **simulated** returns (the sample prices of matplotlib are not installed here)",
}


def _returns(seed: int) -> tuple[pd.Series, bool]:
    """Real returns of 2008 where matplotlib brings its sample data, else simulated ones."""
    from matplotlib.cbook import get_sample_data

    from probkit.models.state_space import StochasticVolatility

    try:
        archive: Any = get_sample_data("goog.npz")
    except FileNotFoundError:
        series = StochasticVolatility(0.95, 0.3, 2.0).simulate_path(200, rng=seed)[1][0]
        return pd.Series(series.numpy(), index=pd.bdate_range("2001-01-01", periods=200)), False
    table = archive["price_data"]
    price = pd.Series(table["adj_close"], index=pd.DatetimeIndex(table["date"]))
    return (100 * price.apply(np.log).diff()).loc["2008":].dropna(), True


def _unknown() -> StochasticVolatility:
    """The model with a fixed persistence and priors of the other two parameters."""
    import torch
    from torch.distributions import LogNormal

    from probkit.models.state_space import StochasticVolatility

    def number(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float64)

    return StochasticVolatility(
        persistence=0.95,
        prior={
            "volatility": LogNormal(number(0.3).log(), number(0.3)),
            "scale": LogNormal(number(2.0).log(), number(0.4)),
        },
    )


def _moments(t: int, old: Tensor, new: Tensor, data: Tensor) -> Tensor:
    """x_t and x_t^2 in the columns of step ``t``, [particle, 2, step]."""
    out = new.new_zeros(len(new), 2, len(data))
    out[:, 0, t], out[:, 1, t] = new, new.square()
    return out


def _smoothed(post: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [step] of the log variance, averaged over chains."""
    mean, square = post.sample_stats["smoothed"].mean(0)
    return mean, (square - mean.square()).clamp_min(0).sqrt()


def run(ctx: DemoContext) -> None:
    """Learn the parameters, filter and smooth, show who descends from whom, weigh the evidence."""
    import probkit as pk
    from probkit.inference.smc import ParticleMarginalMH
    from probkit.models.state_space import StochasticVolatility

    y, real = _returns(ctx.rng_seed)
    unknown = _unknown()
    draws, warmup = (2000, 500) if ctx.full else (80, 30)
    learned = pk.infer(
        unknown, y, ParticleMarginalMH(100, draws=draws, warmup=warmup), rng=ctx.rng_seed, chains=2
    )
    summary = learned.summary()
    means: dict[str, Any] = {name: summary["mean"][name] for name in unknown.prior}
    model = StochasticVolatility(unknown.persistence, **means)
    ctx.text(
        f"""
        Stochastic volatility: the log variance x of a day is an autoregression that nobody
        observes, and the return is Gaussian given it. The data are {_ORIGIN[real]}. The
        persistence is set to 0.95; the size of the shocks to x (volatility) and of a typical
        return (scale) are drawn by particle marginal Metropolis-Hastings, with a particle
        filter's unbiased estimate in place of the likelihood. The rest of the view uses their
        posterior means.
        """
    )
    ctx.table(
        summary,
        f"Parameters: two chains of {draws} draws"
        + ("" if ctx.full else ", short ones for a quick look (see ess_bulk and r_hat)"),
        digits=3,
    )
    ctx.arviz(learned.to_arviz(rng=ctx.rng_seed), "parameters")
    _volatility(ctx, model, y)
    _ancestry(ctx, model, y)
    _evidence(ctx, model, y)


def _volatility(ctx: DemoContext, model: StochasticVolatility, y: pd.Series) -> None:
    """Filtered and smoothed volatility."""
    import torch

    import probkit as pk
    from probkit import plots
    from probkit.inference.smc import PaRIS, filter_step, spawn

    smoother = PaRIS(1000 if ctx.full else 200, _moments)
    paris = pk.infer(model, y, smoother, rng=ctx.rng_seed, chains=2)
    mean, sd = _smoothed(paris)
    observed = torch.tensor(y.to_numpy())
    rng = pk.stream(ctx.rng_seed, "filter")
    cloud = spawn(model, 2000, observed, rng=rng)
    filtered = []
    for t in range(len(observed)):
        cloud, _ = filter_step(model, t, cloud, observed, rng=rng)
        filtered.append(float((cloud.weights * (0.5 * cloud.particles).exp()).sum() * model.scale))

    def volatility(log_variance: Tensor) -> Any:
        return (model.scale * (0.5 * log_variance).exp()).numpy()

    fig, axes = plots.figure(1, 1, size=(10.0, 3.8))
    ax, days = axes[0, 0], np.arange(len(y))
    bands = [(volatility(mean - z * sd), volatility(mean + z * sd)) for z in (0.674, 1.645)]
    plots.band_plot(ax, days, volatility(mean), bands, label="smoothed (PaRIS), 50 % and 90 %")
    with plots.style():
        ax.plot(days, filtered, color=plots.PALETTE[1], linewidth=1.0, label="filtered")
        ax.plot(days, y.abs(), "|", color="#8a8a8a", markersize=5, label="absolute return")
        ax.set(ylabel="daily volatility (%)", ylim=(0, None))
        ax.legend(ncols=3, loc="lower left", bbox_to_anchor=(0.0, 1.0))
    _months(ax, y)
    ctx.figure(
        fig,
        "volatility",
        "Volatility as each day knew it (filter) and as the whole series tells it (smoother)",
    )


def _ancestry(ctx: DemoContext, model: StochasticVolatility, y: pd.Series) -> None:
    """Traced paths, which degenerate, beside paths of particle Gibbs, which do not."""
    import probkit as pk
    from probkit import plots
    from probkit.inference.smc import ParticleFilter, ParticleGibbs

    traced = pk.infer(model, y, ParticleFilter(200, paths=True), rng=ctx.rng_seed)
    sweeps = ParticleGibbs(12, draws=200 if ctx.full else 30, warmup=3)
    gibbs = pk.infer(model, y, sweeps, rng=ctx.rng_seed)
    alive = traced.sample_stats["unique_ancestors"][0]
    ctx.text(
        f"""
        Who descends from whom? All 200 particles of the last day share {int(alive[0])} ancestors
        on the first: the filter's own paths say little about the early days. Particle
        Gibbs with ancestor sampling runs 12 particles around its last path, again and again, and
        its paths keep apart.
        """
    )
    fig, axes = plots.figure(1, 3, size=(12.6, 3.5))
    panels = ((traced, "Traced paths of the filter"), (gibbs, "Paths of particle Gibbs"))
    lines = [post.draws["path"][0].numpy() for post, _ in panels]
    low, high = min(x.min() for x in lines) - 0.2, max(x.max() for x in lines) + 0.2
    with plots.style():
        for ax, paths, (_, title) in zip(axes[0], lines, panels, strict=False):
            ax.plot(paths.T, color=plots.PALETTE[0], linewidth=0.5, alpha=0.25)
            ax.set(title=title, ylabel="log variance x", ylim=(low, high))
        axes[0, 2].plot(alive, color=plots.PALETTE[1])
        axes[0, 2].set(
            title="Distinct ancestors of the last cloud", yscale="log", ylabel="particles"
        )
    for ax in axes[0]:
        _months(ax, y)
    ctx.figure(fig, "ancestry", "Traced paths coincide before the last weeks; Gibbs paths do not")
    ctx.arviz(traced.to_arviz(rng=ctx.rng_seed), "filter")


def _evidence(ctx: DemoContext, model: StochasticVolatility, y: pd.Series) -> None:
    """Effective sample size by day, and evidence from independent groups."""
    import probkit as pk
    from probkit import plots
    from probkit.inference.smc import ParticleFilter, degeneracy, evidence

    counts = (30, 100, 300, 1000, *((10_000,) if ctx.full else ()))
    rows, post = {}, None
    for n in ctx.track(counts, "evidence"):
        post = pk.infer(model, y, ParticleFilter(n), rng=ctx.rng_seed, chains=10)
        rows[n] = evidence(post)._asdict()
    table = pd.DataFrame(rows).T.rename_axis("particles")
    table["chains"] = table["chains"].astype(int)
    ctx.table(
        table.rename(columns={"chains": "groups"}),
        "Log evidence from independent groups; where the spread exceeds about 1, the error bar "
        "itself is too small",
        digits=5,
    )
    health = degeneracy(post)
    fig, axes = plots.figure(1, 2, size=(10.0, 3.4))
    with plots.style():
        axes[0, 0].plot(health["ess"] / counts[-1])
        axes[0, 0].set(ylabel="effective share of the particles", ylim=(0, 1))
        axes[0, 1].errorbar(
            counts, table["log_mean"], 2 * table["relative_error"], fmt="o", capsize=3
        )
        axes[0, 1].set(
            xscale="log", xlabel="particles of a group", ylabel="log evidence (± 2 s.e.)"
        )
    _months(axes[0, 0], y)
    ctx.figure(
        fig,
        "evidence",
        "Days that surprise leave few effective particles; evidence estimates of ten groups each",
    )


def _months(ax: Any, y: pd.Series) -> None:
    """Name the months on an axis of days."""
    dates = pd.DatetimeIndex(y.index)
    first = [i for i in range(1, len(dates)) if dates[i].month != dates[i - 1].month]
    ax.set_xticks(first, [f"{dates[i]:%b}" for i in first])


register_view(DemoView("smc", "Stochastic volatility by particle methods", run, order=30))

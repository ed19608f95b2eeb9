"""Demo view: eight schools, as a Pyro program."""

from __future__ import annotations

from typing import Any

from probkit.demo import DemoContext, DemoView, register_view

__all__: list[str] = []


def schools_program(standard_error: Any, effect: Any = None) -> None:
    """The hierarchical model of eight schools, written for Pyro (non-centred)."""
    import pyro
    import pyro.distributions as dist
    import torch

    zero = torch.zeros((), dtype=torch.float64)
    mean = pyro.sample("mean", dist.Normal(zero, 20.0))
    spread = pyro.sample("spread", dist.HalfCauchy(zero + 10.0))
    with pyro.plate("school", len(standard_error)):
        offset = pyro.sample("offset", dist.Normal(zero, 1.0))
        school = pyro.deterministic("school_effect", mean + spread * offset)
        pyro.sample("effect", dist.Normal(school, standard_error), obs=effect)


def run(ctx: DemoContext) -> None:
    """Fit by SVI with two guides, check by importance sampling, and show the shrinkage."""
    import pandas as pd
    import torch
    from pyro.infer.autoguide import AutoMultivariateNormal

    import probkit as pk
    from probkit import plots
    from probkit.datasets import eight_schools
    from probkit.inference import SVI, Fixed, ImportanceSampling, MeanField
    from probkit.sources import Fitted

    data = eight_schools()
    model = pk.FromPyro(schools_program, observed=("effect",))
    given = {"standard_error": data["standard_error"], "effect": data["effect"]}
    steps = 6000 if ctx.full else 1500
    ctx.text(
        """
        The effect of coaching on test scores, estimated in eight schools (Rubin 1981). The model is
        an ordinary Pyro program; `FromPyro` makes it a probkit model, and school names travel from
        the pandas index to the coordinates of the posterior.
        """
    )
    fits = {
        "mean field": pk.infer(model, given, SVI(steps=steps), guide=MeanField(), rng=ctx.rng_seed),
        "AutoMultivariateNormal (Pyro)": pk.infer(
            model, given, SVI(steps=steps), guide=AutoMultivariateNormal, rng=ctx.rng_seed
        ),
    }
    best = fits["AutoMultivariateNormal (Pyro)"]
    assert isinstance(best.source, Fitted)
    proposal = Fixed(best.source.guide, best.source.params[0])
    exact = pk.infer(
        model,
        given,
        ImportanceSampling(20_000 if ctx.full else 5_000),
        guide=proposal,
        rng=ctx.rng_seed,
    )
    posteriors = {**fits, "importance sampling from it": exact}
    rows = {n: float(p.log_evidence.value) for n, p in posteriors.items() if p.log_evidence}
    ctx.table(
        pd.DataFrame({"log evidence (bound or estimate)": rows}),
        f"Two guides and the evidence; importance sampling kept {exact.attrs['ess']:.0f} effective "
        "draws",
    )
    draws = exact.sample(4000, rng=ctx.rng_seed)
    effects = draws["mean"][:, None] + draws["spread"][:, None] * draws["offset"]
    levels = torch.tensor([0.025, 0.25, 0.75, 0.975], dtype=torch.float64)
    low, q25, q75, high = torch.quantile(effects, levels, dim=0)
    fig, axes = plots.figure(1, 2, size=(10.0, 3.8))
    plots.interval_plot(
        axes[0, 0],
        list(data.index),
        effects.mean(0),
        low,
        high,
        inner=(q25, q75),
        label="posterior",
    )
    with plots.style():
        axes[0, 0].plot(data["effect"], range(len(data)), "kx", label="estimate of the school")
        axes[0, 0].legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2)
        axes[0, 0].set_xlabel("effect of coaching (50 % and 95 % intervals)")
        axes[0, 0].set_ylabel("school")
    plots.density_plot(
        axes[0, 1],
        {"mean": draws["mean"].numpy(), "spread": draws["spread"].numpy()},
    )
    ctx.figure(fig, "schools", "School effects shrunk towards each other, and the population")
    ctx.table(exact.summary(), "Posterior summary (weighted draws)")
    ctx.arviz(exact.to_arviz(rng=ctx.rng_seed), "eight-schools")


register_view(DemoView("pyro", "Eight schools, as a Pyro program", run, order=20))

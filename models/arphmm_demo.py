"""Demo view: growth regimes of the US economy, and the remaining life of simulated machines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view
from probkit.extras import require

__all__: list[str] = []


def growth() -> pd.Series:
    """Quarterly growth of US real GDP, 1959 to 2009, in percent (data that statsmodels carries)."""
    macro = require("statsmodels.datasets.macrodata", extra="demo").load_pandas().data
    when = [
        f"{year:.0f}Q{part:.0f}" for year, part in zip(macro["year"], macro["quarter"], strict=True)
    ]
    quarter = pd.PeriodIndex(when, freq="Q")
    return (100 * np.log(macro["realgdp"]).diff()).set_axis(quarter).dropna()


def run(ctx: DemoContext) -> None:
    """Write the view."""
    _regimes(ctx)
    _lives(ctx)


def _regimes(ctx: DemoContext) -> None:
    """Two regimes of growth, their probability by quarter, and a forecast."""
    import probkit as pk
    from probkit import plots
    from probkit.inference import EM, Gibbs
    from probkit.models import ARPHMM, SwitchingPrior
    from probkit.models.arphmm.relabel import relabel
    from probkit.models.arphmm.selection import bic

    y = growth()
    prior = SwitchingPrior.for_data(y.to_numpy(), order=2, sticky=8.0)
    scores = {}
    for states in (1, 2, 3):
        candidate = ARPHMM(states=states, order=2, prior=prior)
        fit = pk.infer(candidate, y, EM(restarts=8), rng=ctx.rng_seed)
        scores[states] = float(bic(candidate, fit))
    model = ARPHMM(states=2, order=2, prior=prior)
    draws = 1000 if ctx.full else 250
    post = relabel(pk.infer(model, y, Gibbs(draws=draws, warmup=100), rng=ctx.rng_seed))
    variance = post.draws["covariance"][0, :, :, 0, 0]
    turbulent = int(variance.mean(0).argmax())
    probs = post.predict(y, site="state").probs[:, turbulent].numpy()
    quarters = pd.PeriodIndex(y.index)[model.order :]
    summary = pd.DataFrame(
        {
            "sd of the noise": variance.sqrt().mean(0).numpy(),
            "probability of staying": post.draws["transition"][0].diagonal(dim1=1, dim2=2).mean(0),
            "share of quarters": [
                float(np.mean(probs if k == turbulent else 1 - probs)) for k in (0, 1)
            ],
        },
        index=pd.Index(["turbulent" if k == turbulent else "calm" for k in (0, 1)], name="regime"),
    )
    ctx.text(
        f"""
        ## Growth regimes

        A second-order autoregression that switches between two hidden regimes, fitted to
        {len(y)} quarters of US growth by blocked Gibbs sampling. By BIC (lower is better) one, two
        and three regimes score {scores[1]:.0f}, {scores[2]:.0f} and {scores[3]:.0f}.
        """
    )
    ctx.table(summary, "Posterior means of the two regimes")
    ahead = model.forecast(post, y, horizon=12, paths=4000, rng=ctx.rng_seed)
    low, middle, high = (q[:, 0].numpy() for q in ahead.quantile([0.05, 0.5, 0.95]))
    fig, axes = plots.figure(1, 2, size=(11.5, 3.5))
    with plots.style():
        time = quarters.to_timestamp()
        axes[0, 0].plot(time, y.to_numpy()[model.order :], color="0.35", linewidth=0.8)
        axes[0, 0].set(ylabel="growth, % a quarter")
        right = axes[0, 0].twinx()
        right.fill_between(time, probs, color=plots.PALETTE[1], alpha=0.3, step="mid")
        right.set(ylim=(0, 1), ylabel="P(turbulent)")
        last = y.to_numpy()[-24:]
        axes[0, 1].plot(range(-23, 1), last, color="0.35")
        steps = range(1, 13)
        axes[0, 1].fill_between(steps, low, high, color=plots.PALETTE[0], alpha=0.25)
        axes[0, 1].plot(steps, middle, color=plots.PALETTE[0])
        axes[0, 1].set(xlabel="quarters from the end of the data", ylabel="growth, % a quarter")
    ctx.figure(
        fig,
        "growth",
        "Left: growth, and the probability that the economy is in its turbulent regime. Right: "
        "forecast of three years, median and 90 % interval",
    )
    ctx.arviz(post.to_arviz(rng=ctx.rng_seed), "growth")


def _lives(ctx: DemoContext) -> None:
    """Soft labels, a health indicator, and calibrated remaining lives of simulated machines."""
    import torch

    from probkit import plots
    from probkit.models.arphmm.rul import coverage_by_band, life_scores, plan_maintenance

    study = wear_study(n_train=90, n_calibration=40, n_test=60, seed=ctx.rng_seed)
    calibrated, truth = study["calibrated"], study["truth"]
    scores = life_scores(calibrated.mean, truth)
    constant = life_scores(torch.full_like(truth, float(study["train_mean"])), truth)
    ctx.text(
        f"""
        ## Remaining life

        Simulated machines wear out through four hidden stages. An expert's stage labels, one
        cycle in ten and wrong now and then, are given as plausibilities; a left-to-right ARPHMM on
        a health indicator learns the stages, a regression in each stage predicts the cycles left,
        and held-out machines calibrate the intervals. The error (RMSE) on {len(truth)} new machines
        is {scores["rmse"]:.1f} cycles, against {constant["rmse"]:.1f} for the training mean.
        """
    )
    ctx.table(
        coverage_by_band(calibrated, truth, edges=(0, 20, 40, 60, float("inf"))),
        "Coverage of 90 % intervals by the true remaining life",
    )
    plan = plan_maintenance(calibrated, cost_early=1.0, cost_late=5.0, cost_failure=100.0)
    order = torch.argsort(truth)
    low, middle, high = calibrated.quantile([0.05, 0.5, 0.95])
    fig, axes = plots.figure(1, 2, size=(11.5, 3.6))
    with plots.style():
        steps = range(len(truth))
        axes[0, 0].fill_between(steps, low[order], high[order], color=plots.PALETTE[0], alpha=0.25)
        axes[0, 0].plot(steps, middle[order], color=plots.PALETTE[0], label="median, 90 %")
        axes[0, 0].plot(steps, truth[order], ".", color="0.2", label="truth")
        axes[0, 0].set(xlabel="machine, by true life", ylabel="cycles left")
        axes[0, 0].legend()
        axes[0, 1].plot(truth, plan.time, ".", color=plots.PALETTE[2])
        top = float(truth.max())
        axes[0, 1].plot([0, top], [0, top], color="0.6", linewidth=0.8)
        axes[0, 1].set(xlabel="true life", ylabel="planned maintenance, cycles from now")
    failed = float((plan.time > truth).double().mean())
    ctx.figure(
        fig,
        "lives",
        "Left: predicted and true lives. Right: maintenance times when a failure costs as much as "
        f"100 unused cycles; {100 * failed:.0f} % of the machines fail before theirs",
    )


def wear_study(*, n_train: int, n_calibration: int, n_test: int, seed: int) -> dict[str, Any]:
    """Fit, calibrate and predict simulated machines.

    Returns:
        ``model``, ``posterior``, ``regression``, predictives ``raw`` and ``calibrated`` over the
        test machines, their ``truth``, and the ``train_mean`` of the training lives.
    """
    import torch

    import probkit as pk
    from probkit.inference import EM
    from probkit.models import ARPHMM, Sequences, SwitchingPrior
    from probkit.models.arphmm.plausibility import from_labels
    from probkit.models.arphmm.rul import (
        ConformalLife,
        HealthIndicator,
        LifeRegression,
        TrailingFeatures,
        simulate_degradation,
    )

    everything = simulate_degradation(n_train + n_calibration + n_test, rng=seed)
    generator = torch.Generator().manual_seed(seed)
    train = range(n_train)
    held = range(n_train, n_train + n_calibration)
    new = range(n_train + n_calibration, n_train + n_calibration + n_test)
    cap = 100.0
    indicator = HealthIndicator.fit([everything.sensors[i] for i in train], cap=cap)
    labels = []
    for i in train:
        stage = everything.stages[i].clone()
        wrong = torch.rand(len(stage), generator=generator) < 0.1
        stage[wrong] = torch.randint(4, (int(wrong.sum()),), generator=generator)
        stage[torch.arange(len(stage)) % 10 != 0] = -1
        labels.append(from_labels(stage, 4, nonspecificity=0.1))
    health = [indicator(everything.sensors[i]) for i in train]
    model = ARPHMM(4, 1, transition="left_right", prior=SwitchingPrior(scale=0.01))
    posterior = pk.infer(model, Sequences(health, labels), EM(), rng=seed)
    regression = LifeRegression.fit(
        posterior,
        Sequences(health),
        [everything.lives[i] for i in train],
        features=TrailingFeatures((1, 5, 15, 40), age=False),
        cap=cap,
    )

    def stopped(units: range) -> tuple[Sequences, torch.Tensor]:
        """Stop each machine at a random cycle; what was seen, and what is left."""
        seen, left = [], []
        for i in units:
            steps = len(everything.lives[i])
            t = int(torch.randint(10, steps - 1, (1,), generator=generator))
            seen.append(indicator(everything.sensors[i][: t + 1]))
            left.append(everything.lives[i][t].clamp_max(cap))
        return Sequences(seen), torch.stack(left)

    calibration, known = stopped(held)
    conformal = ConformalLife.fit(regression.predict(calibration), known)
    test, truth = stopped(new)
    raw = regression.predict(test)
    lives = torch.cat([everything.lives[i] for i in train]).clamp_max(cap)
    return {
        "model": model,
        "posterior": posterior,
        "regression": regression,
        "raw": raw,
        "calibrated": conformal(raw),
        "truth": truth,
        "train_mean": lives.mean(),
    }


register_view(DemoView("arphmm", "Regimes and remaining life by ARPHMM", run, order=40))

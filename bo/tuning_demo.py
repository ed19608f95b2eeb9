"""Demo view: a support vector regression tuned by three surrogates, interrupted and resumed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view

__all__: list[str] = []

_SURROGATES = {
    "gp": "Gaussian process",
    "ibnn": "infinite network",
    "ibnn-erf": "infinite network, erf",
}


def run(ctx: DemoContext) -> None:
    """Tune with each surrogate, stop half-way, go on from the file, and compare."""
    from probkit import plots
    from probkit.bo.plots import importance_plot, regret_plot, surrogate_calibration_plot
    from probkit.bo.problems import SklearnTuning

    trials, seeds = (30, 5) if ctx.full else (16, 1)
    problem = SklearnTuning("svm", "diabetes")
    traces: dict[str, Any] = {"random": [_random(problem, ctx, trials, s) for s in range(seeds)]}
    studies = {}
    for name, label in ctx.track(_SURROGATES.items(), "tuning"):
        runs = [_tune(problem, name, trials, ctx.rng_seed + s) for s in range(seeds)]
        traces[label] = [study.trace().to_numpy() for study in runs]
        studies[label] = runs[0]
    ctx.text(
        f"""
        A support vector regression predicts how diabetes will progress. Its cost, its kernel and,
        where the kernel is a Gaussian one, its width are to be chosen so that the cross-validated
        squared error is smallest: a space with a category and a condition, {trials} evaluations,
        the first six of them spread evenly. Each study was **killed half-way** and opened again
        from its SQLite file; what it asks for next does not depend on that.
        """
    )
    fig, axes = plots.figure(1, 3, size=(13.0, 3.8))
    ax = regret_plot(axes[0, 0], traces)
    curves = np.concatenate([np.atleast_2d(trace) for trace in traces.values()])
    low, high = curves.min(), curves[:, 2].max()  # the first points would hide all differences
    ax.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
    ax.axvline(trials / 2, color="#8a8a8a", linewidth=0.8, linestyle=":")
    ax.set(title="Best so far; opened again at the dotted line", ylabel="squared error / variance")
    calibrations = {label: study.calibration(folds=4) for label, study in studies.items()}
    surrogate_calibration_plot(axes[0, 1], calibrations).set_title("Predictions of trials left out")
    importance_plot(axes[0, 2], studies["Gaussian process"], n=256).set_title("What matters")
    ctx.figure(fig, "tuning", "Best error, calibration and importance of parameters")
    rows = {label: _row(study) for label, study in studies.items()}
    ctx.table(pd.DataFrame(rows).T, "The best point that each surrogate found", digits=3)


def _tune(problem: Any, surrogate: str, trials: int, seed: int) -> Any:
    """Run half of a study, drop it, and run the rest from its file."""
    from probkit.bo import Study

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.db"
        first = Study(
            problem.space, problem.outcomes.objectives, surrogate=surrogate, noise="none",
            initial=6, rng=seed, storage=path,
        )  # fmt: skip
        first.optimize(problem, trials // 2)
        lost = first.ask()  # killed in mid-trial
        del first
        again = Study.load(path)
        assert [t.number for t in again.pending] == [lost.number]
        again.optimize(problem, trials - trials // 2, pending="rerun")
        kept = Study(
            problem.space, problem.outcomes.objectives, surrogate=surrogate, noise="none",
            initial=6, rng=seed,
        )  # fmt: skip
        for trial in again.trials:  # a copy in memory outlives the file
            kept.attach(trial.params, trial.values)
        return kept


def _random(problem: Any, ctx: DemoContext, trials: int, seed: int) -> Any:
    """Best so far of a random search."""
    from probkit.rng import stream

    rng = stream(ctx.rng_seed, "random search", seed)
    points = problem.space.from_codes(problem.space.random_codes(trials, rng=rng))
    return np.minimum.accumulate([problem(point)["loss"] for point in points])


def _row(study: Any) -> dict[str, Any]:
    best = study.best()
    return {"error": best.value, "trial": best.number, **best.params}


register_view(DemoView("bo", "A regression tuned by Bayesian optimisation", run, order=70))

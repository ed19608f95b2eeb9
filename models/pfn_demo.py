"""Demo view: networks trained on the spot, extrapolated as they train, left when hopeless."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view

if TYPE_CHECKING:
    from probkit.datasets import MLPRun

__all__: list[str] = []


def run(ctx: DemoContext) -> None:
    """Train a random search twice over: once to the end, once with the stopping rule."""
    from probkit.datasets import random_mlp_runs

    epochs, count = (60, 16) if ctx.full else (30, 8)
    runs = random_mlp_runs(count, epochs=epochs, rng=ctx.rng_seed)
    ctx.text(
        f"""
        ## Training runs that are worth their time

        {count} small networks on scikit-learn's digits, with random learning rates, widths and
        label noise: {epochs} epochs each if nobody stops them. After every epoch a network trained
        on simulated learning curves says in one forward pass where the validation accuracy is
        going, and a run is left as soon as no later epoch has a 5 % chance of beating the best
        accuracy so far.
        """
    )
    table, curves = _search(ctx, runs)
    used, full = int(table["epochs"].sum()), epochs * count
    best_stopped = float(table["best seen"].max())
    best_full = float(table["best if trained on"].max())
    ctx.figure(
        _bands(runs, curves),
        "bands",
        "One run as it grows: 50 % and 90 % bands after 3, 8 and 15 epochs, and what came (dots)",
    )
    ctx.figure(_stops(curves, table), "stops", "All runs; a cross is where a run was left")
    ctx.text(
        f"""
        **{full - used} of {full} epochs saved ({(full - used) / full:.0%})**; best accuracy
        {best_stopped:.3f} with the rule, {best_full:.3f} without. Here the runs were trained on
        behind its back, to show what it missed.
        """
    )
    ctx.table(table, "The runs in their order", digits=3)


def _search(ctx: DemoContext, runs: list[MLPRun]) -> tuple[pd.DataFrame, list[np.ndarray]]:
    """Train every run to its end, and note where the rule would have left it."""
    from probkit.models.pfn import CurveNormalizer, LearningCurvePFN, RunWatch

    lc = LearningCurvePFN.load()
    best: float | None = None
    rows, curves = [], []
    for run in ctx.track(runs, "networks"):
        watch = RunWatch(lc, CurveNormalizer.accuracy(), run.epochs, best=best)
        values: list[float] = []
        for metrics in run:
            values.append(metrics.accuracy)
            if watch.stopped_at is None and best is not None:
                watch.observe(metrics.epoch, metrics.accuracy)
        used = watch.stopped_at or len(values)
        seen = max(values[:used])
        best = seen if best is None else max(best, seen)
        curves.append(np.array(values))
        rows.append(
            {
                "learning rate": run.lr,
                "hidden": run.hidden,
                "label noise": run.label_noise,
                "epochs": used,
                "best seen": seen,
                "best if trained on": max(values),
            }
        )
    return pd.DataFrame(rows), curves


def _bands(runs: list[MLPRun], curves: list[np.ndarray]) -> Any:
    """The run whose accuracy rises most, extrapolated at three moments."""
    import torch

    from probkit import plots
    from probkit.models.pfn import CurveNormalizer, LearningCurvePFN

    lc = LearningCurvePFN.load(out_of_prior="ignore")
    y = max(curves, key=lambda one: one[-1] - one[0])
    t = np.arange(1, len(y) + 1)
    fig, axes = plots.figure(1, 3, size=(12.0, 3.4))
    for ax, cut in zip(axes[0], (3, 8, 15), strict=True):
        law = lc.predict(
            torch.from_numpy(y[:cut]), normalizer=CurveNormalizer.accuracy(), horizon=len(y)
        )
        low, q1, middle, q3, high = law.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).numpy()
        plots.band_plot(ax, t[cut:], middle, [(q1, q3), (low, high)], label="median")
        with plots.style():
            ax.plot(t[:cut], y[:cut], "o", color="k", markersize=4, label="observed")
            ax.plot(t[cut:], y[cut:], ".", color="#8a8a8a", label="what came")
            ax.set(title=f"after {cut} epochs", xlabel="epoch", ylim=(0, 1))
    with plots.style():
        axes[0, 0].set(ylabel="validation accuracy")
        axes[0, 0].legend(loc="lower right")
    return fig


def _stops(curves: list[np.ndarray], table: pd.DataFrame) -> Any:
    """All curves, bold as far as they were trained."""
    from probkit import plots

    fig, axes = plots.figure(1, 1, size=(8.0, 3.8))
    ax = axes[0, 0]
    with plots.style():
        for k, (y, used) in enumerate(zip(curves, table["epochs"], strict=True)):
            colour = plots.PALETTE[k % len(plots.PALETTE)]
            t = np.arange(1, len(y) + 1)
            ax.plot(t, y, ":", color=colour, linewidth=0.8)
            ax.plot(t[:used], y[:used], color=colour, linewidth=1.6)
            if used < len(y):
                ax.plot(used, y[used - 1], "x", color=colour, markersize=8, markeredgewidth=2)
        ax.set(xlabel="epoch", ylabel="validation accuracy", ylim=(0, 1))
    return fig


register_view(DemoView("pfn", "Learning curves, extrapolated as they grow", run, order=80))

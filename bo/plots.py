"""Pictures of studies, in the style of ``probkit.plots``: each draws on axes and returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from probkit.errors import DataError, ShapeError
from probkit.plots import PALETTE, calibration_plot, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from probkit.bo.calibration import Calibration
    from probkit.bo.study import Study

__all__ = [
    "importance_plot",
    "pareto_plot",
    "regret_plot",
    "slice_plot",
    "surrogate_calibration_plot",
]


@style()
def regret_plot(
    ax: Axes,
    traces: Mapping[str, ArrayLike],
    *,
    best: float | None = None,
    direction: str = "min",
) -> Axes:
    """Draw the best value so far against the number of trials, or its distance to the optimum.

    Args:
        ax: Where to draw.
        traces: By name, values best so far ``[trial]``, such as ``study.trace()``, or ``[run,
            trial]``, whose median and quartiles are drawn.
        best: The optimum, where it is known: then regrets are drawn, on a log scale.
        direction: ``"min"`` or ``"max"``, where regrets are drawn.

    Returns:
        The axes.

    Raises:
        ShapeError: A trace is neither ``[trial]`` nor ``[run, trial]``.

    Example:
        >>> from probkit.plots import figure
        >>> fig, axes = figure()
        >>> _ = regret_plot(axes[0, 0], {"random": [3.0, 2.0, 2.0]}, best=0.0)
    """
    sign = 1.0 if direction == "min" else -1.0
    for (name, trace), colour in zip(traces.items(), _colours(len(traces)), strict=True):
        runs = np.atleast_2d(np.asarray(trace, dtype=float))
        if runs.ndim != 2 or runs.shape[1] == 0:
            raise ShapeError(f"trace {name!r}: expected [trial] or [run, trial], got {runs.shape}")
        if best is not None:
            runs = np.maximum(sign * (runs - best), 1e-12)
        trials = np.arange(1, runs.shape[1] + 1)
        ax.plot(trials, np.nanmedian(runs, 0), label=name, color=colour)
        if len(runs) > 1:
            low, high = np.nanquantile(runs, [0.25, 0.75], axis=0)
            ax.fill_between(trials, low, high, color=colour, alpha=0.18)
    if best is not None:
        ax.set_yscale("log")
    ax.set_xlabel("trials")
    ax.set_ylabel("best value so far" if best is None else "regret")
    ax.legend()
    return ax


@style()
def slice_plot(
    ax: Axes, study: Study, parameter: str, *, at: Mapping[str, Any] | None = None, n: int = 101
) -> Axes:
    """Draw the surrogate along one parameter, the others fixed, with all told values as dots.

    Args:
        ax: Where to draw.
        study: With at least two complete trials.
        parameter: Name of the parameter that varies.
        at: Point whose other parameters are kept; the best trial's by default.
        n: Points of the curve, for a parameter with more values.

    Returns:
        The axes.

    Raises:
        DataError: An unknown parameter, or one that is not active at the point.
    """
    space = study.space
    if parameter not in space.names:
        raise DataError(
            f"slice_plot: unknown parameter {parameter!r}; the space has {', '.join(space.names)}"
        )
    point = dict(study.best().params if at is None else space.check(at))
    if parameter not in point:
        raise DataError(f"slice_plot: {parameter!r} is not active at {point}; pass another at=")
    values = _grid(study, parameter, n)
    outcome = study.outcomes.names[0]
    base = space.codes(point)[0]
    codes = base.repeat(len(values), 1)
    column = space.names.index(parameter)
    codes[:, column] = torch.tensor(
        [space.parameters[parameter].to_code(v) for v in values], dtype=torch.float64
    )
    frame = study.predict(space.from_codes(space.canonical(codes)))
    mean, sd = frame[outcome].to_numpy(), frame[f"{outcome}_sd"].to_numpy()
    told = [t for t in study.trials if t.status == "complete" and parameter in t.params]
    heights = [(t.values or {})[outcome] for t in told]
    log = getattr(space.parameters[parameter], "log", False)
    if hasattr(space.parameters[parameter], "choices"):
        labels = [str(v) for v in values]
        ax.errorbar(labels, mean, 2 * sd, fmt="o", color=PALETTE[0], capsize=3)
        ax.plot([str(t[parameter]) for t in told], heights, ".", color=PALETTE[6], alpha=0.6)
    else:
        ax.plot(values, mean, color=PALETTE[0], label="surrogate")
        ax.fill_between(values, mean - 2 * sd, mean + 2 * sd, color=PALETTE[0], alpha=0.18)
        ax.plot([t[parameter] for t in told], heights, ".", color=PALETTE[6], alpha=0.6)
        ax.axvline(point[parameter], color=PALETTE[1], linewidth=0.8, linestyle="--")
    if log:
        ax.set_xscale("log")
    ax.set_xlabel(parameter)
    ax.set_ylabel(outcome)
    return ax


def _grid(study: Study, parameter: str, n: int) -> list[Any]:
    chosen = study.space.parameters[parameter]
    if hasattr(chosen, "choices"):
        return list(chosen.choices)
    if chosen.levels is not None and chosen.levels <= n:
        return [chosen.low + k for k in range(chosen.levels)]  # type: ignore[attr-defined]
    codes = np.linspace(0.0, chosen.top, n)
    return list(dict.fromkeys(chosen.from_code(code) for code in codes))


@style()
def importance_plot(ax: Axes, study: Study, *, n: int = 1024) -> Axes:
    """Draw the importance of each parameter: alone, and together with interactions.

    Args:
        ax: Where to draw.
        study: With at least two complete trials.
        n: Points of each sample, see :func:`~probkit.bo.importance.sobol_indices`.

    Returns:
        The axes.
    """
    found = study.importance(n).reset_index()
    if "outcome" in found:
        found = found[found["outcome"] == study.outcomes.names[0]]
    frame = found.sort_values("total")
    rows = np.arange(len(frame))
    ax.barh(rows, frame["total"], color=PALETTE[5], label="with interactions")
    ax.barh(rows, frame["first"], height=0.4, color=PALETTE[0], label="alone")
    ax.set_yticks(rows, [str(name) for name in frame["parameter"]])
    ax.set_xlabel("share of the surrogate's variance")
    ax.set_xlim(right=1.25 * max(0.1, float(frame["total"].max())))
    ax.legend(loc="lower right")
    return ax


def surrogate_calibration_plot(ax: Axes, found: Mapping[str, Calibration] | Calibration) -> Axes:
    """Draw empirical against nominal coverage of predictions of trials left out.

    Args:
        ax: Where to draw.
        found: What ``study.calibration()`` returned, or several of them by name.

    Returns:
        The axes.
    """
    several = found if isinstance(found, Mapping) else {"surrogate": found}
    pits = {}
    for name, one in several.items():
        for k, outcome in enumerate(one.names):
            label = name if len(one.names) == 1 else f"{name}, {outcome}"
            pits[label] = one.pit[:, k].numpy()
    return calibration_plot(ax, pits)


@style()
def pareto_plot(ax: Axes, study: Study) -> Axes:
    """Draw two objectives of all complete trials, the Pareto front among them marked.

    Args:
        ax: Where to draw.
        study: With two objectives or more; the first two are drawn.

    Returns:
        The axes.

    Raises:
        DataError: There is one objective only.
    """
    names = list(study.outcomes.objectives)
    if len(names) < 2:
        raise DataError(f"pareto_plot: expected two objectives, got {names[0]!r} only")
    front = {t.number for t in study.pareto()}
    told = [t for t in study.trials if t.status == "complete" and t.values]
    for among, colour, label in ((False, PALETTE[6], "dominated"), (True, PALETTE[1], "front")):
        chosen: Sequence[Any] = [t.values for t in told if (t.number in front) == among]
        ax.plot(
            [v[names[0]] for v in chosen], [v[names[1]] for v in chosen], "o",
            color=colour, markersize=4, label=label,
        )  # fmt: skip
    ax.set(xlabel=names[0], ylabel=names[1])
    ax.legend()
    return ax


def _colours(count: int) -> list[str]:
    return [PALETTE[k % len(PALETTE)] for k in range(count)]

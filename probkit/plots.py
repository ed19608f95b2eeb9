"""Pictures of posteriors and predictions in one quiet style.

Every function draws on a matplotlib ``Axes`` and returns it. Figures are made by :func:`figure`,
without pyplot, so that no global back end or figure list is touched. Calls of your own on the axes,
such as titles and legends, get the same style inside ``with style():``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probkit.errors import DataError, ShapeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "PALETTE",
    "band_plot",
    "calibration_plot",
    "central_coverage",
    "coverage_plot",
    "density_plot",
    "ecdf_difference_plot",
    "figure",
    "interval_plot",
    "rank_plot",
    "style",
    "trace_plot",
]

#: Eight colours that stay apart for colour-blind readers (Okabe and Ito, 2008), darkest uses first.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#5F5F5F",
    "#F0E442",
)

_RC: dict[Any, Any] = {  # the keys are literals in matplotlib's annotations
    "axes.axisbelow": True,
    "axes.edgecolor": "#8a8a8a",
    "axes.grid": True,
    "axes.labelcolor": "#333333",
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "figure.dpi": 110,
    "figure.facecolor": "white",
    "font.size": 9.5,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "patch.linewidth": 0.0,
    "savefig.dpi": 150,
    "text.color": "#222222",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
}


@contextmanager
def style() -> Iterator[None]:
    """Use probkit's matplotlib style inside the block; the settings are as before afterwards."""
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context({**_RC, "axes.prop_cycle": cycler(color=PALETTE)}):
        yield


def figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] | None = None, **options: Any
) -> tuple[Figure, NDArray[np.object_]]:
    """Make a figure with a grid of axes, in probkit's style and without pyplot.

    Args:
        rows: Number of rows of axes.
        columns: Number of columns of axes.
        size: Width and height in inches; by default 4.2 x 3 for each pair of axes.
        options: Passed on to ``Figure.subplots`` (``sharex=True`` and the like).

    Returns:
        The figure, and its axes as an array ``[rows, columns]``.

    Example:
        >>> fig, axes = figure(1, 2, sharey=True)
        >>> axes.shape
        (1, 2)
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style():
        made = Figure(figsize=size or (4.2 * columns, 3.0 * rows), layout="constrained")
        FigureCanvasAgg(made)
        axes = made.subplots(rows, columns, squeeze=False, **options)
    return made, axes


@style()
def interval_plot(
    ax: Axes,
    labels: Sequence[str],
    centre: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    *,
    inner: tuple[ArrayLike, ArrayLike] | None = None,
    colour: str = PALETTE[0],
    label: str | None = None,
    offset: float = 0.0,
) -> Axes:
    """Draw one horizontal interval a row: a dot, a thin line, and a thick inner line if given.

    Args:
        ax: Where to draw.
        labels: Names of the rows, top to bottom, ``[row]``.
        centre: Dots ``[row]``.
        low: Lower ends ``[row]``.
        high: Upper ends ``[row]``.
        inner: Lower and upper ends of the thick lines, each ``[row]``.
        colour: Colour of the intervals.
        label: Name in the legend.
        offset: Vertical shift of the intervals, to set several side by side.

    Returns:
        The axes.

    Raises:
        ShapeError: The arrays are not all ``[row]``.

    Example:
        >>> fig, axes = figure()
        >>> ax = interval_plot(axes[0, 0], ["a", "b"], [0.0, 1.0], [-1.0, 0.5], [1.0, 1.5])
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['a', 'b']
    """
    rows = len(labels)
    middle, lower, upper = (_vector(v, rows, "row") for v in (centre, low, high))
    y = np.arange(rows) + offset
    ax.hlines(y, lower, upper, color=colour, linewidth=1.2, alpha=0.9)
    if inner is not None:
        thick_lower, thick_upper = (_vector(v, rows, "row") for v in inner)
        ax.hlines(y, thick_lower, thick_upper, color=colour, linewidth=3.4)
    ax.plot(middle, y, "o", color=colour, markersize=4.5, markeredgecolor="white", label=label)
    ax.set_yticks(np.arange(rows), list(labels))
    ax.set_ylim(rows - 0.5, -0.5)
    ax.grid(visible=False, axis="y")
    return ax


def central_coverage(pit: ArrayLike, levels: ArrayLike) -> NDArray[np.float64]:
    """Share of observations inside the central intervals of each nominal level.

    An observation lies inside the central interval of level ``c`` when its probability integral
    transform ``u = F(y)`` satisfies ``|u - 1/2| <= c / 2``.

    Args:
        pit: Probability integral transforms ``[obs]``, between 0 and 1.
        levels: Nominal levels ``[level]``, between 0 and 1.

    Returns:
        Empirical coverage ``[level]``.

    Raises:
        DataError: A value lies outside [0, 1] or there is none.

    Example:
        >>> central_coverage([0.05, 0.5, 0.8], [0.5, 0.8]).round(3).tolist()
        [0.333, 0.667]
    """
    u = _unit_interval(pit, "pit")
    c = _unit_interval(levels, "levels")
    # the tolerance keeps an observation that sits exactly on the edge inside it
    inside = np.abs(u[None, :] - 0.5) <= c[:, None] / 2 + 1e-12
    return inside.mean(axis=1)


@style()
def calibration_plot(
    ax: Axes,
    pits: Mapping[str, ArrayLike],
    *,
    levels: ArrayLike | None = None,
    band: float = 0.95,
) -> Axes:
    """Draw empirical against nominal coverage of central intervals, one line a model.

    A calibrated model follows the diagonal. The grey band holds each point of a calibrated model
    of independent observations with probability ``band`` (binomial quantiles for the smallest
    number of observations among the models).

    Args:
        ax: Where to draw.
        pits: Probability integral transforms ``[obs]`` of each model, by name.
        levels: Nominal levels ``[level]``; 19 between 0.05 and 0.95 by default.
        band: Pointwise probability of the grey band.

    Returns:
        The axes.

    Raises:
        DataError: ``pits`` is empty, or a value lies outside [0, 1].

    Example:
        >>> fig, axes = figure()
        >>> u = (np.arange(100) + 0.5) / 100
        >>> calibration_plot(axes[0, 0], {"exact": u}).get_xlabel()
        'nominal coverage'
    """
    from scipy.stats import binom

    if not pits:
        raise DataError("expected at least one model's pit values [obs], got none")
    grid = _unit_interval(np.linspace(0.05, 0.95, 19) if levels is None else levels, "levels")
    curves = {name: central_coverage(u, grid) for name, u in pits.items()}
    count = min(np.asarray(u).size for u in pits.values())
    low, high = (binom.ppf(q, count, grid) / count for q in (0.5 - band / 2, 0.5 + band / 2))
    ax.fill_between(grid, low, high, color="#d9d9d9", alpha=0.6, label=f"{band:.0%} if calibrated")
    ax.plot([0, 1], [0, 1], color="#8a8a8a", linewidth=0.9, linestyle="--")
    for (name, curve), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        ax.plot(grid, curve, color=colour, marker="o", markersize=2.5, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="empirical coverage")
    ax.set_aspect("equal")
    ax.legend(loc="upper left")
    return ax


@style()
def coverage_plot(ax: Axes, pits: Mapping[str, ArrayLike], *, band: float = 0.95) -> Axes:
    """Draw empirical against nominal coverage of central intervals, entries grouped by units.

    As :func:`calibration_plot`, for transforms whose entries within a unit depend on each other:
    the grey band is that of the number of units, which is too wide rather than too narrow.

    Args:
        ax: Where to draw.
        pits: Probability integral transforms ``[unit, entry]``, by name.
        band: Pointwise probability of the grey band.

    Returns:
        The axes.

    Raises:
        DataError: ``pits`` is empty, or a value lies outside [0, 1].

    Example:
        >>> fig, axes = figure()
        >>> u = (np.arange(100)[:, None] + 0.5) / 100
        >>> len(coverage_plot(axes[0, 0], {"mu": u, "y": u}).get_lines())
        3
    """
    from scipy.stats import binom

    if not pits:
        raise DataError("expected at least one name with pit values [unit, entry], got none")
    grid = np.linspace(0.05, 0.95, 19)
    units = min(len(np.asarray(u)) for u in pits.values())
    low, high = (binom.ppf(q, units, grid) / units for q in (0.5 - band / 2, 0.5 + band / 2))
    ax.fill_between(grid, low, high, color="#d9d9d9", alpha=0.6, label=f"{band:.0%} if calibrated")
    ax.plot([0, 1], [0, 1], color="#8a8a8a", linewidth=0.9, linestyle="--")
    for (name, u), colour in zip(pits.items(), _colours(len(pits)), strict=True):
        curve = central_coverage(u, grid)
        ax.plot(grid, curve, color=colour, marker="o", markersize=2.5, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal coverage", ylabel="empirical coverage")
    ax.set_aspect("equal")
    ax.legend(loc="upper left")
    return ax


@style()
def rank_plot(
    ax: Axes,
    ranks: ArrayLike,
    draws: int,
    *,
    bins: int | None = None,
    band: float = 0.95,
    label: str | None = None,
) -> Axes:
    """Draw a histogram of ranks, whose bars are level where the ranks are uniform.

    A hump in the middle means posteriors that are too wide, high ends ones that are too narrow, a
    slope ones that lie to one side. The grey band holds each bar of uniform ranks with probability
    ``band`` (binomial quantiles); the test of all ranks together is :func:`ecdf_difference_plot`.

    Args:
        ax: Where to draw.
        ranks: Ranks ``[replicate]``, whole numbers from 0 to ``draws``.
        draws: Number of draws that each rank was taken among.
        bins: Number of bars; by default 20, or fewer where they would hold less than five.
        band: Pointwise probability of the grey band.
        label: Title.

    Returns:
        The axes.

    Raises:
        DataError: There is no rank, or one outside of 0, ..., draws.

    Example:
        >>> fig, axes = figure()
        >>> len(rank_plot(axes[0, 0], np.arange(100), 99).patches)
        20
    """
    from scipy.stats import binom

    found = np.asarray(ranks)
    if found.size == 0 or found.min() < 0 or found.max() > draws:
        raise DataError(
            f"expected ranks [replicate] from 0 to draws={draws}, got {found.size} of range "
            f"{_range(found.astype(float))}"
        )
    count = bins or max(2, min(20, draws + 1, found.size // 5))
    edges = np.linspace(0, draws + 1, min(count, draws + 1) + 1).round()
    share = np.diff(edges) / (draws + 1)
    observed = np.histogram(found, edges)[0]
    low, high = (
        np.asarray(binom.ppf(q, found.size, share)) for q in (0.5 - band / 2, 0.5 + band / 2)
    )
    ax.fill_between(
        edges, np.append(low, low[-1]), np.append(high, high[-1]), step="post", color="#d9d9d9",
        alpha=0.6,
    )  # fmt: skip
    ax.bar(edges[:-1], observed, np.diff(edges), align="edge", color=PALETTE[0], alpha=0.75,
           edgecolor="white", linewidth=0.6)  # fmt: skip
    ax.step(edges, np.append(share, share[-1]) * found.size, where="post", color="#5f5f5f",
            linewidth=0.9, linestyle="--")  # fmt: skip
    ax.set(xlim=(0, draws + 1), xlabel="rank of the truth", ylabel="data sets")
    if label is not None:
        ax.set_title(label)
    return ax


@style()
def ecdf_difference_plot(
    ax: Axes, ranks: Mapping[str, ArrayLike], draws: int, *, level: float = 0.95
) -> Axes:
    """Draw empirical minus uniform distribution function of ranks, with simultaneous bands.

    A line of uniform ranks stays inside the grey band everywhere with probability ``level``, which
    is exact (:func:`probkit.calibration.ecdf_band`).

    Args:
        ax: Where to draw.
        ranks: Ranks ``[replicate]`` by name, equally many each.
        draws: Number of draws that each rank was taken among.
        level: Simultaneous probability of the band.

    Returns:
        The axes.

    Raises:
        DataError: No ranks, or other numbers of them from name to name.

    Example:
        >>> fig, axes = figure()
        >>> len(ecdf_difference_plot(axes[0, 0], {"mu": np.arange(100)}, 99).get_lines())
        2
    """
    from probkit.calibration.uniformity import ecdf_band

    found = {name: np.sort(np.asarray(values).ravel()) for name, values in ranks.items()}
    sizes = {len(values) for values in found.values()}
    if len(sizes) != 1:
        raise DataError(
            f"expected equally many ranks [replicate] for each name, got {sorted(sizes)}"
        )
    replicates = sizes.pop()
    band = ecdf_band(replicates, draws, level)
    ax.fill_between(
        band.uniform, band.low - band.uniform, band.high - band.uniform, color="#d9d9d9",
        alpha=0.6, label=f"{level:.0%} if uniform",
    )  # fmt: skip
    ax.axhline(0.0, color="#8a8a8a", linewidth=0.9, linestyle="--")
    for (name, values), colour in zip(found.items(), _colours(len(found)), strict=True):
        share = np.searchsorted(values, band.rank, side="right") / replicates
        ax.plot(band.uniform, share - band.uniform, color=colour, label=name)
    ax.set(xlim=(0, 1), xlabel="rank / draws", ylabel="ECDF - uniform")
    if len(found) > 1:
        ax.legend()
    return ax


@style()
def density_plot(
    ax: Axes,
    draws: Mapping[str, ArrayLike],
    *,
    points: int = 256,
    log_density: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
) -> Axes:
    """Compare one-dimensional densities: kernel estimates of draws, and exact ones as dashes.

    Args:
        ax: Where to draw.
        draws: Draws of each density, by name; flattened to ``[draw]``.
        points: Number of points of each curve.
        log_density: Exact log densities by name, each a pair ``(x [point], log p(x) [point])``.

    Returns:
        The axes.

    Raises:
        DataError: A set of draws is constant, not finite or has fewer than two values.

    Example:
        >>> fig, axes = figure()
        >>> draws = np.random.default_rng(0).normal(size=500)
        >>> len(density_plot(axes[0, 0], {"draws": draws}).lines)
        1
    """
    from scipy.stats import gaussian_kde

    exact = log_density or {}
    colours = _colours(len(draws) + len(exact))
    for (name, values), colour in zip(draws.items(), colours, strict=False):
        x = np.asarray(values, dtype=float).ravel()
        if x.size < 2 or not np.isfinite(x).all() or np.ptp(x) == 0:
            raise DataError(
                f"expected at least two different finite draws of {name!r} [draw], "
                f"got {x.size} with range {np.ptp(x) if x.size else 0}"
            )
        spread = 0.15 * np.ptp(x)
        grid = np.linspace(x.min() - spread, x.max() + spread, points)
        curve = gaussian_kde(x)(grid)
        ax.plot(grid, curve, color=colour, label=name)
        ax.fill_between(grid, curve, color=colour, alpha=0.12)
    for (name, (at, log_p)), colour in zip(exact.items(), colours[len(draws) :], strict=True):
        ax.plot(np.asarray(at), np.exp(np.asarray(log_p)), color=colour, linestyle="--", label=name)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("density")
    ax.legend()
    return ax


@style()
def band_plot(
    ax: Axes,
    x: ArrayLike,
    mean: ArrayLike,
    bands: Sequence[tuple[ArrayLike, ArrayLike]],
    *,
    colour: str = PALETTE[0],
    label: str | None = None,
) -> Axes:
    """Draw a prediction along one input: a line, and nested shaded bands.

    Args:
        ax: Where to draw.
        x: Inputs ``[point]``, in any order.
        mean: Centre line ``[point]``.
        bands: Pairs of lower and upper edges, each ``[point]``, widest first or last.
        colour: Colour of line and bands.
        label: Name in the legend.

    Returns:
        The axes.

    Raises:
        ShapeError: The arrays are not all ``[point]``.

    Example:
        >>> fig, axes = figure()
        >>> x = np.linspace(0, 1, 5)
        >>> ax = band_plot(axes[0, 0], x, x, [(x - 1, x + 1), (x - 2, x + 2)])
        >>> len(ax.collections)
        2
    """
    inputs = np.asarray(x, dtype=float).ravel()
    order = np.argsort(inputs, kind="stable")
    centre = _vector(mean, inputs.size, "point")
    for low, high in bands:
        lower, upper = (_vector(v, inputs.size, "point") for v in (low, high))
        ax.fill_between(inputs[order], lower[order], upper[order], color=colour, alpha=0.16)
    ax.plot(inputs[order], centre[order], color=colour, label=label)
    return ax


@style()
def trace_plot(ax: Axes, draws: ArrayLike, *, label: str | None = None) -> Axes:
    """Draw the draws of one scalar in order, one line a chain.

    Args:
        ax: Where to draw.
        draws: Draws ``[chain, draw]``.
        label: Name on the vertical axis.

    Returns:
        The axes.

    Raises:
        ShapeError: ``draws`` is not ``[chain, draw]``.

    Example:
        >>> fig, axes = figure()
        >>> len(trace_plot(axes[0, 0], np.zeros((3, 10)), label="mu").lines)
        3
    """
    values = np.asarray(draws, dtype=float)
    if values.ndim != 2:
        raise ShapeError(f"expected draws [chain, draw], got {list(values.shape)}")
    for chain, colour in zip(values, _colours(len(values)), strict=True):
        ax.plot(chain, color=colour, linewidth=0.7, alpha=0.85)
    ax.set_xlabel("draw")
    if label is not None:
        ax.set_ylabel(label)
    return ax


def _colours(count: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _vector(values: ArrayLike, length: int, dim: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (length,):
        raise ShapeError(f"expected [{dim}] = [{length}], got {list(array.shape)}")
    return array


def _unit_interval(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    if array.size == 0 or not ((array >= 0) & (array <= 1)).all():
        raise DataError(
            f"expected {name} between 0 and 1, at least one; got {array.size} values, "
            f"range {_range(array)}"
        )
    return array


def _range(array: NDArray[np.float64]) -> str:
    return f"{array.min():.4g} to {array.max():.4g}" if array.size else "empty"

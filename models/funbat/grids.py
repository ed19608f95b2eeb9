"""The distinct coordinates of a mode, and where observations lie on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Grid", "insert_points", "locate", "make_grid"]

MERGE = 1e-9
"""Coordinates closer than this, relative to the range of the mode, count as one."""


class Grid(NamedTuple):
    """Sorted points of one mode.

    Attributes:
        points: Distinct coordinates [point], increasing.
        index: Position of each entry on the grid [entry].
        gaps: The distinct distances between neighbours [gap].
        gap_index: Which of them lies after each point but the last [point - 1].
    """

    points: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    gaps: Tensor
    gap_index: Tensor


def make_grid(coordinates: Tensor, *, width: float | None = None) -> Grid:
    """Sort, merge and number the coordinates [entry] of one mode.

    Args:
        coordinates: [entry].
        width: Neighbours up to this distance count as one; by default MERGE times the range.
    """
    ordered, order = coordinates.sort()
    if width is None:
        width = MERGE * float(ordered[-1] - ordered[0])
    begins = torch.ones(len(ordered), dtype=torch.bool, device=ordered.device)
    begins[1:] = ordered.diff() > width
    number = begins.cumsum(0) - 1
    index = torch.empty_like(number)
    index[order] = number
    points = ordered[begins]
    return Grid(points, index, *_distinct(points.diff()))


def insert_points(grid: Grid, coordinates: Tensor) -> tuple[Grid, Tensor]:
    """Add coordinates to a grid.

    Returns:
        The grid of both, whose ``index`` places ``coordinates``, and the positions of the old
        points on it [point].
    """
    width = MERGE * float(grid.points[-1] - grid.points[0])
    joined = make_grid(torch.cat((grid.points, coordinates.to(grid.points))), width=width)
    old = len(grid.points)
    return joined._replace(index=joined.index[old:]), joined.index[:old]


def locate(grid: Grid, points: Tensor) -> Tensor:
    """Return the positions [point] on the grid that are nearest to ``points``."""
    if len(grid.points) == 1:
        return torch.zeros(len(points), dtype=torch.long, device=points.device)
    right = torch.searchsorted(grid.points, points.contiguous()).clamp(1, len(grid.points) - 1)
    is_left = points - grid.points[right - 1] < grid.points[right] - points
    return right - is_left.long()


def _distinct(gaps: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct gaps up to rounding (1e-9 of their size), and which one each gap is.

    The gaps of a regular axis differ by rounding alone.
    """
    if len(gaps) == 0:
        return gaps, torch.zeros(0, dtype=torch.long, device=gaps.device)
    ordered, order = gaps.sort()
    apart = ordered.diff() > 1e-9 * ordered[1:]
    number = torch.zeros_like(order)
    number[1:] = apart.cumsum(0)
    index = torch.empty_like(number)
    index[order] = number
    count = int(number[-1]) + 1
    total = torch.zeros(count, dtype=gaps.dtype, device=gaps.device).index_add_(0, number, ordered)
    return total / torch.bincount(number, minlength=count), index

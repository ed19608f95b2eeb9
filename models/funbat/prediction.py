"""Moments of f at any index: trajectories at points that were not seen are smoothed in.

New points are put on the grid of each mode with sites of no information, and the chain is smoothed
again from the stored sites. That is the exact conditional law of the Gaussian processes given the
sites, between points and outside of them; far outside, factors return to their prior.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from probkit.models.funbat.contraction import Core, function_moments
from probkit.models.funbat.grids import Grid, insert_points
from probkit.models.funbat.smoothing import Smoothed, make_chain, smooth
from probkit.models.funbat.sweeps import Layout, full_table
from probkit.tree import Tree

__all__ = ["latent_moments", "smooth_at"]


def smooth_at(
    layout: Layout, mode: dict[str, Any], k: int, points: Tensor
) -> tuple[Smoothed, Grid]:
    """Smooth mode k with scaled points [entry] put in.

    Returns:
        The law on the joint grid, and that grid, whose ``index`` places the points.
    """
    grid, old = insert_points(layout.grids[k], points)
    copies, _, r = mode["eta"].shape
    steps = len(grid.points)
    eta = mode["eta"].new_zeros(copies, steps, r).index_add_(1, old, mode["eta"])
    lam = mode["precision"]
    lam = lam.new_zeros(copies, steps, lam.shape[-1]).index_add_(1, old, lam)
    return smooth(make_chain(layout.spaces[k], grid, mode["hyper"]), eta, lam), grid


def latent_moments(layout: Layout, state: Tree, points: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of f [copy, entry] at scaled points [entry, mode].

    f is a sum of products of independent normals; its first two moments are exact.
    """
    tables, index = [], []
    for k, mode in enumerate(state["modes"]):
        result, grid = smooth_at(layout, mode, k, points[:, k])
        moved = {"mean": result.mean, "cov": result.cov}
        tables.append(full_table(moved, layout.free[k]))
        index.append(grid.index)
    core = state["core"]
    moments = None if core is None else Core.of(core["mean"], core["cov"], layout.ranks)
    mean, second = function_moments(tables, index, moments, layout.ranks)
    return mean, (second - mean.square()).clamp_min(0)

"""New entries for an old fit: extend its state, then sweep a few times from there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probkit.models.funbat.contraction import function_moments
from probkit.models.funbat.grids import locate
from probkit.models.funbat.smoothing import make_chain, smooth
from probkit.models.funbat.sweeps import Layout, core_moments, full_table
from probkit.tree import Tree

__all__ = ["extend", "sweep_order"]


def extend(state: Tree, old: Layout, new: Layout) -> Tree:
    """Bring a state [copy] from the entries it was fitted to, to those and more.

    The sites that were found stay at their points. Where a mode has points it did not have, its
    trajectory is what the sites say there; the noise's factors of single entries start from what
    the old fit predicts of them.

    Args:
        state: A fit to ``old``.
        old: Layout of the entries before.
        new: Layout of these and further ones, which come last.
    """
    modes = []
    for k, mode in enumerate(state["modes"]):
        place = locate(new.grids[k], old.grids[k].points)
        steps = len(new.grids[k].points)
        sites = {name: _moved(mode[name], place, steps) for name in ("eta", "precision")}
        chain = make_chain(new.spaces[k], new.grids[k], mode["hyper"])
        result = smooth(chain, sites["eta"], sites["precision"], cross=False)
        moments = {"mean": result.mean, "cov": result.cov, "log_z": result.log_z}
        modes.append({**mode, **sites, **moments, "slopes": None})
    tables = [full_table(mode, free) for mode, free in zip(modes, new.free, strict=True)]
    core = core_moments(state["core"], new.ranks)
    mean, second = function_moments(tables, new.index, core, new.ranks)
    copies = len(mean)
    noise = _carried(state["noise"], new.noise.start(new.y, copies), len(old.y))
    noise, _ = new.noise.absorb(noise, new.y, mean, second, hold=True)
    return {**state, "modes": modes, "noise": noise}


def sweep_order(old: Layout, new: Layout) -> list[int]:
    """Modes by their share of points that are new, largest first.

    A trajectory at a point without sites is uncertain, and messages through it pull the other
    modes towards zero; so it is the first to be updated.
    """
    shares = [
        1 - len(before.points) / len(after.points)
        for before, after in zip(old.grids, new.grids, strict=True)
    ]
    return sorted(range(len(shares)), key=lambda k: -shares[k])


def _moved(sites: Tensor, place: Tensor, steps: int) -> Tensor:
    """Sites [copy, point, *] on a finer grid."""
    empty = sites.new_zeros(sites.shape[0], steps, *sites.shape[2:])
    return empty.index_add_(1, place, sites)


def _carried(old: Any, fresh: Any, entries: int) -> Any:
    """The old state of the noise, continued by a fresh one where it is entry by entry."""
    if isinstance(fresh, dict):
        return {key: _carried(old[key], fresh[key], entries) for key in fresh}
    if isinstance(fresh, Tensor) and fresh.ndim > 1 and fresh.shape != old.shape:
        return torch.cat((old, fresh[..., entries:]), -1)
    return old

"""Who descends from whom: ancestries and paths, pruned to the lines that survive.

The surviving lines of ``n`` particles over ``T`` steps form a tree of about ``T + n log n`` nodes
(Jacob, Murray & Rubenthaler 2015), so dead branches are cut whenever the record has grown large.

A genealogy is a list of generations, oldest first; each is a dict with ``parents`` (int32 [k],
positions in the previous generation; None where every particle follows itself), ``values`` (the
particles [k], or None where only the ancestry is kept), ``size`` (k) and ``steps`` (how many steps
in a row it stands for). It is a tree in the sense of :mod:`probkit.tree`, so that samplers can
carry it in their state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probkit.inference.smc.particles import Particles, stack, take
from probkit.tree import leaves

__all__ = ["Genealogy", "paths", "record", "survivors"]

Genealogy = Sequence[Mapping[str, Any]]

_SMALLEST = 2**23  # records below this many entries are never pruned


def record(
    genealogy: Genealogy, n: int, ancestors: Tensor | None, values: Particles | None
) -> list[Mapping[str, Any]]:
    """Append a generation of ``n`` particles, and prune when the record has grown.

    Args:
        genealogy: The generations so far.
        n: Number of particles of the new one.
        ancestors: [particle] positions in the last generation; None where each follows itself.
        values: Particles to remember; None keeps the ancestry alone.
    """
    if genealogy and ancestors is None and values is None:
        last = genealogy[-1]
        return [*genealogy[:-1], {**last, "steps": last["steps"] + 1}]
    parents = None if ancestors is None or not genealogy else ancestors.to(torch.int32)
    stored = _entries(parents, values) + (genealogy[-1]["stored"] if genealogy else 0)
    generation = {"parents": parents, "values": values, "size": n, "steps": 1, "stored": stored}
    grown = [*genealogy, generation]
    return _prune(grown) if stored > max(_SMALLEST, 16 * n) else grown


def _entries(parents: Tensor | None, values: Particles | None) -> int:
    """Size of a generation, in entries of four bytes."""
    if values is None:
        return 0 if parents is None else len(parents)
    tensors = [leaf for leaf in leaves(values) if isinstance(leaf, Tensor)]
    bytes_ = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return (0 if parents is None else len(parents)) + bytes_ // 4


def _prune(genealogy: Genealogy) -> list[Mapping[str, Any]]:
    """Drop particles without offspring in the last generation."""
    kept: list[dict[str, Any]] = []
    alive: Tensor | None = None  # positions that survive, sorted; None for all
    for number in reversed(range(len(genealogy))):
        entry = dict(genealogy[number])
        if alive is not None:
            entry["size"] = len(alive)
            if entry["parents"] is not None:
                entry["parents"] = entry["parents"].index_select(0, alive)
            if entry["values"] is not None:
                entry["values"] = take(entry["values"], alive)
        if entry["parents"] is not None:
            alive, entry["parents"] = _distinct(entry["parents"], genealogy[number - 1]["size"])
        kept.append(entry)
    kept.reverse()
    # Counting restarts at half of what is left, so that the record must grow to be pruned again.
    kept[-1]["stored"] = sum(_entries(g["parents"], g["values"]) for g in kept) // 2
    return list(kept)


def _distinct(parents: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the distinct parents, sorted, and each parent's position among them."""
    used = torch.zeros(size, dtype=torch.bool, device=parents.device)
    used[parents] = True
    position = used.cumsum(0, dtype=torch.int32) - 1
    return used.nonzero().squeeze(1), position.index_select(0, parents)


def survivors(genealogy: Genealogy) -> Tensor:
    """Count, for each step, the particles with offspring in the last one: [step]."""
    counts = []
    alive: np.ndarray[Any, Any] | None = None
    for number in reversed(range(len(genealogy))):
        generation = genealogy[number]
        count = generation["size"] if alive is None else len(alive)
        counts += [count] * generation["steps"]
        if generation["parents"] is not None:
            parents = generation["parents"].cpu().numpy()
            used = np.zeros(genealogy[number - 1]["size"], dtype=bool)
            used[parents if alive is None else parents[alive]] = True
            alive = np.flatnonzero(used)
    return torch.tensor(counts[::-1], dtype=torch.int64)


def paths(genealogy: Genealogy, index: Tensor | None = None) -> Particles:
    """Trace the values back from particles of the last generation.

    Args:
        genealogy: Generations with tensor values.
        index: [m] positions in the last generation; None for all.

    Returns:
        Trajectories [m, generation, *].
    """
    columns = []
    for generation in reversed(genealogy):
        values, parents = generation["values"], generation["parents"]
        columns.append(values if index is None else take(values, index))
        if parents is not None:
            index = parents if index is None else parents.index_select(0, index)
    return stack(columns[::-1])

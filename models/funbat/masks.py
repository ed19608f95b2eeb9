"""Which components vary along which modes: main effects, interactions and full products in one CP.

A mask is a boolean table [component, mode]. Component r is a function of the modes where row r is
True; along the others its factor is the constant one. A row with one True is a main effect, with
two an interaction of two modes, with all a full CP term.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = ["additive", "full_terms", "interactions", "main_effects", "masked_terms"]


def main_effects(modes: int) -> Tensor:
    """One function of each mode, [mode, mode].

    Example:
        >>> main_effects(2).tolist()
        [[True, False], [False, True]]
    """
    return torch.eye(_count(modes, "modes"), dtype=torch.bool)


def interactions(modes: int, order: int = 2, rank: int = 1) -> Tensor:
    """Products of ``order`` modes, ``rank`` for each choice of modes, [component, mode].

    Example:
        >>> interactions(3).long().tolist()
        [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    """
    rows = []
    for chosen in itertools.combinations(range(_count(modes, "modes")), _count(order, "order")):
        row = torch.zeros(modes, dtype=torch.bool)
        row[list(chosen)] = True
        rows += [row] * _count(rank, "rank")
    if not rows:
        raise DataError(f"interactions: expected order <= {modes} modes, got {order}")
    return torch.stack(rows)


def full_terms(modes: int, rank: int) -> Tensor:
    """``rank`` products of all modes, [component, mode]."""
    return torch.ones(_count(rank, "rank"), _count(modes, "modes"), dtype=torch.bool)


def masked_terms(*tables: Tensor) -> Tensor:
    """Put terms together, [component, mode].

    Example:
        >>> masked_terms(main_effects(3), interactions(3), full_terms(3, rank=1)).shape
        torch.Size([7, 3])
    """
    if len({t.shape[1] for t in tables}) != 1:
        raise DataError(
            f"masked_terms: expected tables of one number of modes, got "
            f"{[tuple(t.shape) for t in tables]}"
        )
    return torch.cat(tables)


def additive(modes: int, *, pairs: bool = True, rank: int = 1) -> Tensor:
    """Main effects, all interactions of two modes (if ``pairs``), and ``rank`` full terms.

    With two modes an interaction is a full term already.

    Example:
        >>> additive(3).long().sum(1).tolist()
        [1, 1, 1, 2, 2, 2, 3]
    """
    tables = [main_effects(modes)]
    if pairs and modes > 2:
        tables.append(interactions(modes))
    if rank:
        tables.append(full_terms(modes, rank))
    return masked_terms(*tables)


def _count(value: int, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"expected a whole number of {name} >= 1, got {value!r}")
    return value


def read_mask(masks: Tensor | Sequence[Sequence[bool]], modes: int | None) -> Tensor:
    """Check a mask [component, mode] given as a table.

    Raises:
        DataError: Not such a table, or a component that varies along no mode.
    """
    table = torch.as_tensor(masks)
    if table.ndim != 2 or (modes is not None and table.shape[1] != modes) or table.numel() == 0:
        raise DataError(
            f"masks: expected a table [component, mode{'' if modes is None else f'={modes}'}], got "
            f"{tuple(table.shape)}"
        )
    table = table != 0
    fixed = (~table.any(1)).nonzero().flatten().tolist()
    if fixed:
        raise DataError(
            f"masks: component {fixed[0]} varies along no mode; leave it out, y is centred"
        )
    still = (~table.any(0)).nonzero().flatten().tolist()
    if still:
        raise DataError(f"masks: no component varies along mode {still[0]}; leave the mode out")
    return table

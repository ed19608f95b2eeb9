"""Pruned weights: prior variances that are exactly zero, and the small problem that is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Reduction", "prune", "reduce"]

FLOOR = 1e-12
"""Relative size below which a prior variance is zero: it would only cost digits."""


def prune(variances: Sequence[Tensor], threshold: float) -> list[Tensor]:
    """Set entries below ``threshold`` times the largest of their factor to zero.

    Args:
        variances: g_i [*batch, N_i].
        threshold: Relative threshold >= 0.
    """
    level = max(threshold, FLOOR)
    return [
        torch.where(part < level * part.amax(-1, keepdim=True), 0.0, part) for part in variances
    ]


@dataclass(frozen=True)
class Reduction:
    """The indices that some row of a batch still uses.

    Attributes:
        kept: For each mode, positions of the columns that are used; None where all are.
        sizes: N_1, ..., N_I.
    """

    kept: list[Tensor | None]
    sizes: tuple[int, ...]

    def columns(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Keep the columns (last dim) of one tensor for each mode."""
        return [
            t if keep is None else t.index_select(-1, keep)
            for t, keep in zip(tensors, self.kept, strict=True)
        ]

    def spread(self, variances: Sequence[Tensor]) -> list[Tensor]:
        """Put variances of the kept columns back to their places, zero elsewhere."""
        full = []
        for part, keep, size in zip(variances, self.kept, self.sizes, strict=True):
            if keep is None:
                full.append(part)
            else:
                whole = part.new_zeros(*part.shape[:-1], size)
                full.append(whole.index_copy(-1, keep, part))
        return full


def reduce(variances: Sequence[Tensor]) -> Reduction:
    """Find the columns that any row uses: g_i [row, N_i]. At least one is kept."""
    kept: list[Tensor | None] = []
    for part in variances:
        used = (part > 0).reshape(-1, part.shape[-1]).any(0)
        if bool(used.all()):
            kept.append(None)
        else:
            places = used.nonzero().flatten()
            kept.append(places if len(places) else places.new_zeros(1))
    return Reduction(kept, tuple(part.shape[-1] for part in variances))

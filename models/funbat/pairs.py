"""Symmetric matrices [r, r] as vectors [r (r + 1) / 2] of their upper triangle."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

__all__ = ["Pairs", "fold", "outer_pairs", "pack", "pairs_of", "unfold", "unpack"]


class Pairs:
    """The pairs i <= j of r numbers.

    Attributes:
        first: i of each pair [pair].
        second: j of each pair [pair].
        place: Number of the pair (i, j) or (j, i) [r, r].
        weight: How often a pair occurs in the full matrix, 1 or 2 [pair].
    """

    def __init__(self, r: int) -> None:
        self.first, self.second = torch.triu_indices(r, r)
        self.count = len(self.first)
        self.place = torch.empty(r, r, dtype=torch.long)
        numbers = torch.arange(self.count)
        self.place[self.first, self.second] = numbers
        self.place[self.second, self.first] = numbers
        self.weight = torch.where(self.first == self.second, 1.0, 2.0).double()


@functools.cache
def pairs_of(r: int) -> Pairs:
    """Return the pairs of r numbers, made once."""
    return Pairs(r)


def pack(M: Tensor) -> Tensor:
    """[*, r, r] -> [*, pair], reading the upper triangle."""
    pairs = pairs_of(M.shape[-1])
    return M[..., pairs.first, pairs.second]


def unpack(packed: Tensor, r: int) -> Tensor:
    """[*, pair] -> [*, r, r]."""
    return packed[..., pairs_of(r).place]


def outer_pairs(v: Tensor) -> Tensor:
    """V v' packed, [*, r] -> [*, pair]."""
    pairs = pairs_of(v.shape[-1])
    return v[..., pairs.first] * v[..., pairs.second]


def fold(M: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """Add up the entries of M that meet the same products of pairs.

    For M [*, D, D] over D = r_1 ... r_K, returns G [*, pair_1, ..., pair_K] with
    z' M z = sum G prod_k S^k for every symmetric S^k in place of z z' = (x)_k S^k.
    """
    lead, modes = M.ndim - 2, len(ranks)
    G = M.reshape(*M.shape[:lead], *ranks, *ranks)
    order = [lead + side * modes + k for k in range(modes) for side in (0, 1)]
    G = G.permute(*range(lead), *order)
    for k, r in enumerate(ranks):
        pairs = pairs_of(r)
        flat = G.flatten(lead + k, lead + k + 1)
        shape = list(flat.shape)
        shape[lead + k] = pairs.count
        place = pairs.place.flatten().to(M.device)
        G = flat.new_zeros(shape).index_add_(lead + k, place, flat)
    return G


def unfold(Z: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """The matrix (x)_k S^k in full: [*, pair_1, ..., pair_K] -> [*, D, D], linear in Z."""
    modes = len(ranks)
    lead = Z.ndim - modes
    for k, r in enumerate(ranks):
        place = pairs_of(r).place.flatten().to(Z.device)
        Z = Z.index_select(lead + k, place)
    Z = Z.reshape(*Z.shape[:lead], *(r for r in ranks for _ in (0, 1)))
    order = [lead + 2 * k + side for side in (0, 1) for k in range(modes)]
    D = torch.Size(ranks).numel()
    return Z.permute(*range(lead), *order).reshape(*Z.shape[:lead], D, D)

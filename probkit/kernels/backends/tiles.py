"""Tiles of a matrix, and what every tiled kernel does with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["element", "tiles", "write_mirrored"]

_Tensors = TypeVar("_Tensors", bound=NamedTuple)


def tiles(
    n: int, m: int, shape: tuple[int, int], symmetric: bool
) -> Iterator[tuple[int, int, int, int]]:
    """Bounds (row start, row stop, column start, column stop); from the diagonal if symmetric.

    Example:
        >>> list(tiles(3, 3, (2, 2), True))
        [(0, 2, 0, 2), (0, 2, 2, 3), (2, 3, 2, 3)]
    """
    rows, columns = shape
    for i0 in range(0, n, rows):
        i1 = min(i0 + rows, n)
        # the first tile of a symmetric block of rows holds its square on the diagonal whole
        j0 = i0 if symmetric else 0
        while j0 < m:
            j1 = min(j0 + max(columns, rows if symmetric and j0 == i0 else 0), m)
            yield i0, i1, j0, j1
            j0 = j1


def write_mirrored(out: Tensor, tile: Tensor, i0: int, i1: int, j0: int, j1: int) -> None:
    """Write a tile on or above the diagonal to both triangles of ``out`` [n, n].

    Nothing is written to the diagonal but zeros.
    """
    if j0 == i0:
        square = torch.triu(tile[:, : i1 - i0], 1)
        out[i0:i1, i0:i1] = square + square.T
        tile, j0 = tile[:, i1 - i0 :], i1
    out[i0:i1, j0:j1] = tile
    out[j0:j1, i0:i1] = tile.T


def element(given: _Tensors, index: tuple[int, ...]) -> _Tensors:
    """One batch element of every tensor in a named tuple."""
    return type(given)._make(None if t is None else t[index] for t in given)

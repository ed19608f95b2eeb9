"""Tiles of a matrix, and what every tiled kernel does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

__all__ = ["Tile", "element", "fill", "multiply", "tile_shape", "tiles", "write_mirrored"]

Tile = Callable[[int, int, int, int], Tensor]
"""Computes rows i0 to i1 and columns j0 to j1 of a matrix; the caller may overwrite the result."""

_CPU = (128, 512)  # rows for each thread, columns: a float64 buffer of 512 KiB
_GPU = (4096, 4096)
_MAX_THREADS = 8  # more threads share the tiles of this many

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


def tile_shape(x: Tensor) -> tuple[int, int]:
    """Rows and columns of the tiles of a matrix between rows of ``x``, by its device.

    Example:
        >>> tile_shape(torch.zeros(3, 2))[1]
        512
    """
    if x.device.type == "cpu":
        rows, columns = _CPU
        return rows * min(torch.get_num_threads(), _MAX_THREADS), columns
    return _GPU


def fill(out: Tensor, tile: Tile, diagonal: Tensor | None) -> None:
    """Write a matrix [n, m] tile by tile.

    Args:
        out: The matrix, overwritten.
        tile: Computes its tiles.
        diagonal: Its diagonal [n], where it is symmetric: then each pair of rows is visited once,
            and the result is exactly symmetric with exactly this diagonal.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> out = torch.empty(2, 2)
        >>> fill(out, lambda i0, i1, j0, j1: torch.outer(x[i0:i1], x[j0:j1]), x.square())
        >>> out.tolist()
        [[1.0, 2.0], [2.0, 4.0]]
    """
    symmetric = diagonal is not None
    for i0, i1, j0, j1 in tiles(out.shape[0], out.shape[1], tile_shape(out), symmetric):
        if symmetric:
            write_mirrored(out, tile(i0, i1, j0, j1), i0, i1, j0, j1)
        else:
            out[i0:i1, j0:j1] = tile(i0, i1, j0, j1)
    if diagonal is not None:
        out.diagonal().copy_(diagonal)


def multiply(out: Tensor, tile: Tile, diagonal: Tensor | None, vectors: Tensor) -> None:
    """Write the product [n, r] of a matrix [n, m] with vectors [m, r], tile by tile.

    Args:
        out: The product, overwritten.
        tile: Computes the tiles of the matrix.
        diagonal: As for :func:`fill`.
        vectors: What the matrix is multiplied with.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> out = torch.empty(2, 1)
        >>> tile = lambda i0, i1, j0, j1: torch.outer(x[i0:i1], x[j0:j1])
        >>> multiply(out, tile, x.square(), torch.ones(2, 1))
        >>> out.flatten().tolist()
        [3.0, 6.0]
    """
    symmetric = diagonal is not None
    out.zero_()
    for i0, i1, j0, j1 in tiles(len(out), len(vectors), tile_shape(out), symmetric):
        part = tile(i0, i1, j0, j1)
        if symmetric:
            if j0 == i0:
                part.triu_(1)
            out[j0:j1].addmm_(part.T, vectors[i0:i1])
        out[i0:i1].addmm_(part, vectors[j0:j1])
    if diagonal is not None:
        out.addcmul_(diagonal[:, None], vectors)


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

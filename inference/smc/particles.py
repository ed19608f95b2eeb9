"""Particles of any kind: tensors, trees of tensors, or lists of objects.

A population of ``n`` particles is a tensor [n, *], a mapping or tuple of populations, or a list of
``n`` objects (token sequences, trees, anything). Objects are treated as values: a resampled list
holds the same object twice, so models must return new objects and never change old ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probkit.errors import ShapeError

__all__ = ["Particles", "count", "is_tensors", "join", "put_last", "stack", "take"]

Particles = Any


def count(particles: Particles) -> int:
    """Return the number of particles of an ungrouped population.

    Raises:
        ShapeError: Parts of a tree hold different numbers, or there is nothing to count.

    Example:
        >>> count({"x": torch.zeros(3, 2), "words": ["a", "b", "c"]})
        3
    """
    sizes = {len(column) for column in _columns(particles)}
    if len(sizes) != 1:
        raise ShapeError(
            "expected particles with one common leading dim [particle], got sizes "
            f"{sorted(sizes)}; return tensors [n, *] or lists of n objects"
        )
    return sizes.pop()


def is_tensors(particles: Particles) -> bool:
    """Tell whether all parts of a population are tensors."""
    return all(isinstance(column, Tensor) for column in _columns(particles))


def take(particles: Particles, index: Tensor) -> Particles:
    """Select particles.

    Args:
        particles: A population; tensors [particle, *], or [group, particle, *] for a grouped index.
        index: [m], or [group, m] positions within each group (tensors only).

    Returns:
        The population of the m particles (of each group), repeated where the index repeats.

    Example:
        >>> take(["a", "b"], torch.tensor([1, 1, 0]))
        ['b', 'b', 'a']
    """
    return _map(lambda column: _take_column(column, index), particles)


def put_last(particles: Particles, one: Particles) -> Particles:
    """Replace the last particle by the population ``one`` of size 1."""

    def replace(column: Any, single: Any) -> Any:
        if isinstance(column, Tensor):
            return torch.cat([column[:-1], single])
        return [*column[:-1], *single]

    return _zip(replace, [particles, one])


def join(populations: Sequence[Particles]) -> Particles:
    """Append populations of one structure."""

    def append(*columns: Any) -> Any:
        if isinstance(columns[0], Tensor):
            return torch.cat(columns)
        return [item for column in columns for item in column]

    return _zip(append, populations)


def stack(populations: Sequence[Particles]) -> Particles:
    """Stack tensor populations of equal size along a new second dim: T x [n, *] -> [n, T, *]."""
    return _zip(lambda *columns: torch.stack(columns, dim=1), populations)


def _take_column(column: Any, index: Tensor) -> Any:
    if not isinstance(column, Tensor):
        return [column[i] for i in index.tolist()]
    index = index.to(column.device)
    if index.ndim > 1:
        groups = index.numel() // index.shape[-1]
        n = column.shape[index.ndim - 1]
        offset = n * torch.arange(groups, device=index.device).reshape(*index.shape[:-1], 1)
        flat = column.flatten(0, index.ndim - 1).index_select(0, (index + offset).flatten())
        return flat.reshape(*index.shape, *column.shape[index.ndim :])
    if column.ndim == 2 and column.shape[1] == 1:
        # The kernel for one-dimensional tensors is several times faster.
        return column.flatten().index_select(0, index).unsqueeze(1)
    return column.index_select(0, index)


def _columns(particles: Particles) -> list[Any]:
    """The tensors and lists that a population consists of."""
    if isinstance(particles, Mapping):
        return [column for part in particles.values() for column in _columns(part)]
    if isinstance(particles, tuple):
        return [column for part in particles for column in _columns(part)]
    if isinstance(particles, Tensor | list):
        return [particles]
    raise ShapeError(
        "expected particles as a tensor, a mapping or tuple of tensors, or a list of objects, got "
        f"{type(particles).__name__}"
    )


def _map(function: Callable[[Any], Any], particles: Particles) -> Particles:
    return _zip(function, [particles])


def _zip(function: Callable[..., Any], populations: Sequence[Particles]) -> Particles:
    """Apply ``function`` to corresponding columns of populations of one structure."""
    first = populations[0]
    if isinstance(first, Mapping):
        return {key: _zip(function, [p[key] for p in populations]) for key in first}
    if isinstance(first, tuple):
        parts = [_zip(function, list(column)) for column in zip(*populations, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return function(*populations)

"""Trees: nested dicts, lists and tuples whose leaves are tensors, scalars, strings or storables.

Sampler states, parameters and kept draws are trees. These few functions are all that the drivers
need of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tree", "concatenate", "leaves", "map_tensors"]

Tree = Any


def map_tensors(function: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """Apply ``function`` to every tensor of ``tree``; other leaves stay as they are.

    Example:
        >>> map_tensors(lambda t: t + 1, {"a": [torch.tensor(1)], "b": "text"})
        {'a': [tensor(2)], 'b': 'text'}
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree


def leaves(tree: Tree) -> list[Any]:
    """List the leaves of ``tree`` in depth-first order."""
    if isinstance(tree, Mapping):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list | tuple):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def concatenate(trees: Sequence[Tree], *, dim: int) -> Tree:
    """Join trees of one structure along ``dim`` of their tensors.

    Leaves other than tensors are taken from the first tree.
    """
    first = trees[0]
    if isinstance(first, Tensor):
        return torch.cat(list(trees), dim=dim)
    if isinstance(first, Mapping):
        return {key: concatenate([tree[key] for tree in trees], dim=dim) for key in first}
    if isinstance(first, list | tuple):
        joined = [concatenate(list(column), dim=dim) for column in zip(*trees, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
    return first

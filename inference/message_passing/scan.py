"""All prefix or suffix products of a sequence under an associative operation, in log depth.

The odd-even recursion (Blelloch 1990, "Prefix sums and their applications", section 1.2): combine
neighbours, scan the half-length sequence, then fill in the elements between. It calls ``combine``
2 log2(T) times on batches and does about 2 T combinations in all, so it pays where one combination
of many elements is much cheaper than many single ones: long sequences, and GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from probkit.errors import ShapeError

__all__ = ["associative_scan"]

Elements = TypeVar("Elements", bound=Tensor | tuple[Tensor, ...])


def associative_scan(
    combine: Callable[[Elements, Elements], Elements],
    elements: Elements,
    *,
    reverse: bool = False,
    dim: int = 0,
) -> Elements:
    """Combine a sequence with itself from one end up to every element.

    With ``*`` for ``combine``, the result at t is e_1 * e_2 * ... * e_t or, with ``reverse``,
    e_t * ... * e_(T-1) * e_T: the left operand is the earlier one in both cases. Differentiable
    wherever ``combine`` is.

    Args:
        combine: Associative operation on batches: receives two elements whose tensors hold the same
            number of steps along ``dim`` and returns one of the same form.
        elements: A tensor, or a tuple (or NamedTuple) of tensors, with T steps along ``dim``.
        reverse: Suffixes instead of prefixes.
        dim: The dimension of the steps; a negative one is counted in each tensor by itself.

    Returns:
        Elements of the same form and shape as ``elements``.

    Raises:
        ShapeError: there is no step, or the tensors disagree on the number of steps.

    Example:
        >>> associative_scan(torch.add, torch.arange(5)).tolist()
        [0, 1, 3, 6, 10]
        >>> associative_scan(torch.add, torch.arange(5), reverse=True).tolist()
        [10, 10, 9, 7, 4]
    """
    leaves = _leaves(elements)
    sizes = {leaf.shape[dim] for leaf in leaves}
    if len(sizes) != 1:
        raise ShapeError(
            f"expected the same number of steps along dim {dim} in every tensor, "
            f"got {sorted(sizes)}"
        )
    steps = sizes.pop()
    if steps == 0:
        raise ShapeError(f"expected at least one step along dim {dim}, got none")

    def rebuild(tensors: list[Tensor]) -> Elements:
        if isinstance(elements, Tensor):
            return tensors[0]  # type: ignore[return-value]
        kind = type(elements)
        return kind(*tensors) if hasattr(kind, "_fields") else kind(tensors)

    def operation(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
        return _leaves(combine(rebuild(left), rebuild(right)))

    if not reverse:
        return rebuild(_scan(operation, leaves, dim))
    flipped = [leaf.flip(dim) for leaf in leaves]
    scanned = _scan(lambda left, right: operation(right, left), flipped, dim)
    return rebuild([leaf.flip(dim) for leaf in scanned])


def _leaves(elements: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [elements] if isinstance(elements, Tensor) else list(elements)


def _scan(
    combine: Callable[[list[Tensor], list[Tensor]], list[Tensor]], leaves: list[Tensor], dim: int
) -> list[Tensor]:
    """Prefix products of ``leaves`` along ``dim``."""
    steps = leaves[0].shape[dim]
    if steps == 1:
        return leaves
    pairs = combine(_every_second(leaves, 0, steps - 1, dim), _every_second(leaves, 1, steps, dim))
    odd = _scan(combine, pairs, dim)  # the results at 1, 3, 5, ...
    first = [leaf.narrow(dim, 0, 1) for leaf in leaves]
    if steps == 2:
        return [torch.cat(both, dim) for both in zip(first, odd, strict=True)]
    later = _every_second(leaves, 2, steps, dim)
    before = [leaf.narrow(dim, 0, later[0].shape[dim]) for leaf in odd]
    even = combine(before, later)  # the results at 2, 4, 6, ...
    return [
        _interleave(torch.cat((head, rest), dim), other, dim)
        for head, rest, other in zip(first, even, odd, strict=True)
    ]


def _every_second(leaves: list[Tensor], start: int, stop: int, dim: int) -> list[Tensor]:
    def pick(leaf: Tensor) -> Tensor:
        return leaf[(slice(None),) * (dim % leaf.ndim) + (slice(start, stop, 2),)]

    return [pick(leaf) for leaf in leaves]


def _interleave(even: Tensor, odd: Tensor, dim: int) -> Tensor:
    """Merge results at 0, 2, 4, ... and at 1, 3, 5, ... along ``dim``."""
    dim = dim % even.ndim
    pairs = odd.shape[dim]
    merged = torch.stack((even.narrow(dim, 0, pairs), odd), dim + 1).flatten(dim, dim + 1)
    if even.shape[dim] == pairs:
        return merged
    return torch.cat((merged, even.narrow(dim, pairs, 1)), dim)

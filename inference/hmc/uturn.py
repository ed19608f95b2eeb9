"""The generalised U-turn criterion on spans of a trajectory.

A span with momenta p_a, ..., p_b, summed to rho, has turned when p_a . rho <= 0 or p_b . rho <= 0
(Betancourt 2017, appendix A.4.2, in whitened momenta). Where two spans are joined, the first with
the nearest momentum of the second, and the other way about, are checked as well: without this,
trajectories whose length is near a period go unnoticed.

Every number in question is linear in the dot products of a few vectors, so one Gram matrix and one
product with a fixed matrix of zeros and ones answer all questions of a whole block of leaves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Span", "block_turns", "join", "joint_turns"]


class Span(NamedTuple):
    """A stretch of a trajectory.

    Attributes:
        first: Momentum at the end that comes first [chain, D].
        last: Momentum at the other end [chain, D].
        total: Sum of all momenta [chain, D].
    """

    first: Tensor
    last: Tensor
    total: Tensor


def join(a: Span, b: Span) -> Span:
    """Join a span with the one that follows it."""
    return Span(a.first, b.last, a.total + b.total)


@functools.cache
def _block_questions(leaves: int) -> Tensor:
    """Return the questions about a block [leaves * leaves, question], for its Gram matrix."""
    columns = []
    size = 2
    while size <= leaves:
        for start in range(0, leaves, size):
            stop, middle = start + size, start + size // 2
            spans = [(start, stop)]
            if size > 2:
                spans += [(start, middle + 1), (middle - 1, stop)]
            for begin, end in spans:
                for edge in (begin, end - 1):
                    question = torch.zeros(leaves, leaves, dtype=torch.float64)
                    question[edge, begin:end] = 1.0
                    columns.append(question.flatten())
        size *= 2
    return torch.stack(columns, dim=1)


def block_turns(momenta: Tensor) -> Tensor:
    """Tell for each chain whether any aligned span of a block has turned.

    Args:
        momenta: [chain, leaf, D] in the order of the trajectory; a power of two of leaves.

    Returns:
        [chain] booleans: all 2, 4, 8, ... leaves that a recursive tree would have joined.

    Example:
        >>> ahead = torch.ones(1, 2, 1, dtype=torch.float64)
        >>> back = torch.tensor([[[1.0], [-2.0]]], dtype=torch.float64)
        >>> block_turns(ahead), block_turns(back)
        (tensor([False]), tensor([True]))
    """
    chains, leaves, _ = momenta.shape
    if leaves == 1:
        return torch.zeros(chains, dtype=torch.bool, device=momenta.device)
    questions = _block_questions(leaves).to(momenta)
    return _any_turned(momenta, questions)


@functools.cache
def _joint_questions() -> Tensor:
    """Return the questions [36, 6] for the Gram matrix of both spans' first, last and total."""
    first_a, last_a, total_a, first_b, last_b, total_b = range(6)
    asked = [
        (first_a, (total_a, total_b)),
        (last_b, (total_a, total_b)),
        (first_a, (total_a, first_b)),
        (first_b, (total_a, first_b)),
        (last_a, (last_a, total_b)),
        (last_b, (last_a, total_b)),
    ]
    columns = []
    for edge, parts in asked:
        question = torch.zeros(6, 6, dtype=torch.float64)
        question[edge, list(parts)] = 1.0
        columns.append(question.flatten())
    return torch.stack(columns, dim=1)


def joint_turns(a: Span, b: Span) -> Tensor:
    """Tell for each chain [chain] whether ``a``, joined with ``b`` that follows, has turned."""
    vectors = torch.stack([*a, *b], dim=1)
    return _any_turned(vectors, _joint_questions().to(vectors))


def _any_turned(vectors: Tensor, questions: Tensor) -> Tensor:
    """Whether any question about vectors [chain, k, D] has an answer that is not positive."""
    gram = torch.bmm(vectors, vectors.mT).flatten(1)
    turned: Tensor = ~((gram @ questions) > 0.0).all(-1)
    return turned

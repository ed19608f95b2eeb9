"""The proposal of HMC: a path of given length, and its acceptance; pieces that can be compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.inference.hmc.leapfrog import Phase, Point, kinetic
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.tree import MAX_ENERGY_ERROR

__all__ = ["BlockedPath", "Settled", "leaps", "pieces", "settle"]

_LONG = 4  # Leapfrog steps of the longer piece.


class Settled(NamedTuple):
    """What came of a proposal.

    Attributes:
        point: The next point of each chain.
        acceptance: Acceptance probabilities [chain].
        error: Energy error [chain] of the proposal; infinite where it diverged.
        energy: Total energy [chain] of the next point with its momentum.
        diverging: [chain].
    """

    point: Point
    acceptance: Tensor
    error: Tensor
    energy: Tensor
    diverging: Tensor


def settle(start: Phase, end: Phase, uniform: Tensor) -> Settled:
    """Accept or refuse (Metropolis) the end of each chain's path.

    Args:
        start: Where the paths began.
        end: Where they end.
        uniform: Uniform numbers [chain].
    """
    start_energy = start.point.energy + kinetic(start.momentum)
    error = end.point.energy + kinetic(end.momentum) - start_energy
    diverging = ~(error <= MAX_ENERGY_ERROR)
    error = error.masked_fill(diverging, torch.inf)
    acceptance = error.clamp(min=0.0).neg().exp()
    take = uniform < acceptance
    energy = start_energy + torch.where(take, error, 0.0)
    return Settled(end.point.where(take, start.point), acceptance, error, energy, diverging)


def leaps(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    root: Tensor,
    point: Point,
    momentum: Tensor,
    step: Tensor,
    count: int,
) -> tuple[Point, Tensor]:
    """Take ``count`` leapfrog steps with positions, gradients and momenta [D, chain].

    The numbers are those of :func:`~probkit.inference.hmc.leapfrog.trajectory`.

    Args:
        evaluate: Potential [chain] and gradient [chain, D] at positions [chain, D].
        root: Square root of the inverse mass matrix, [D] or triangular [D, D].
        point: Where the chains are.
        momentum: Whitened momenta.
        step: Signed step sizes [chain].
        count: Number of steps.
    """

    def velocity(momentum: Tensor) -> Tensor:
        return root @ momentum if root.ndim == 2 else root[:, None] * momentum

    def force(gradient: Tensor) -> Tensor:
        return root.T @ gradient if root.ndim == 2 else root[:, None] * gradient

    position, energy, gradient = point
    half = 0.5 * step
    momentum = momentum - half * force(gradient)
    for done in range(1, count + 1):
        position = position + step * velocity(momentum)
        energy, slope = evaluate(position.T)
        gradient = slope.T
        momentum = momentum - (half if done == count else step) * force(gradient)
    return Point(position, energy, gradient), momentum


def pieces(
    evaluate: Callable[..., tuple[Tensor, Tensor]],
) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Return the pieces of a transition as functions of tensors alone.

    Args:
        evaluate: ``evaluate(position, *constants)``: potential [chain] and gradient [chain, D].
    """

    def path(count: int) -> Callable[..., tuple[Tensor, ...]]:
        def piece(
            position: Tensor,
            energy: Tensor,
            gradient: Tensor,
            momentum: Tensor,
            step: Tensor,
            root: Tensor,
            *constants: Tensor,
        ) -> tuple[Tensor, ...]:
            start = Point(position, energy, gradient)
            point, momentum = leaps(
                lambda q: evaluate(q, *constants), root, start, momentum, step, count
            )
            return tuple(part.contiguous() for part in (*point, momentum))

        return piece

    def accept(*tensors: Tensor) -> tuple[Tensor, ...]:
        start = Phase(Point(*tensors[:3]), tensors[3])
        position, energy, gradient, momentum = tensors[4:8]
        end = Phase(Point(position.T, energy, gradient.T), momentum.T)
        settled = settle(start, end, tensors[8])
        parts = (*settled.point, *settled[1:], end.point.position, end.momentum)
        return tuple(part.contiguous() for part in parts)

    return {"leaps 1": path(1), f"leaps {_LONG}": path(_LONG), "accept": accept}


class BlockedPath:
    """Paths put together from compiled pieces.

    Args:
        pieces: As :func:`pieces` returns them, or programs made of them.
    """

    def __init__(self, pieces: dict[str, Callable[..., tuple[Tensor, ...]]]) -> None:
        self._one, self._long = pieces["leaps 1"], pieces[f"leaps {_LONG}"]
        self._accept = pieces["accept"]

    def propose(
        self, metric: Metric, start: Phase, step: Tensor, steps: int, uniform: Tensor
    ) -> tuple[Phase, Settled]:
        """Return the end of each chain's path of ``steps`` steps, and what came of it."""
        (position, energy, gradient), momentum = start
        phase: tuple[Tensor, ...] = (position.T, energy, gradient.T, momentum.T)
        for _ in range(steps // _LONG):
            phase = self._long(*phase, step, metric.root)
        for _ in range(steps % _LONG):
            phase = self._one(*phase, step, metric.root)
        *found, position, momentum = self._accept(
            position, energy, gradient, momentum, *phase, uniform
        )
        settled = Settled(Point(*found[:3]), *found[3:])
        # Nobody asks for the gradient at the end of a path that was refused.
        return Phase(Point(position, phase[1], phase[2].T), momentum), settled

"""Stationary laws of the discretised dynamics on quadratic potentials, in closed form."""

from __future__ import annotations

import itertools

import torch

F64 = torch.float64


def solve_lyapunov(step, spread):
    """The covariance S with S = A S A^T + Q."""
    size = len(step)
    system = torch.eye(size * size, dtype=F64) - torch.kron(step, step)
    return torch.linalg.solve(system, spread.flatten()).reshape(size, size)


def langevin(precision, size, scale):
    """Matrices (A, B, Q) of q - mean -> A (q - mean) + B n + noise(Q), n the gradient's error."""
    m = torch.diag(scale)
    eye = torch.eye(len(precision), dtype=F64)
    return eye - 0.5 * size * m @ precision, -0.5 * size * m, size * m


def underdamped(precision, size, scale, friction):
    """The same for the state (q, r) of Springenberg et al. (2016)."""
    m, eye = torch.diag(scale), torch.eye(len(precision), dtype=F64)
    push = -(size**2) * m @ precision
    top = torch.cat([eye + push, (1 - friction) * eye], 1)
    bottom = torch.cat([push, (1 - friction) * eye], 1)
    kick = torch.cat([-(size**2) * m] * 2)
    noise = 2 * size**2 * friction * m - size**4 * eye
    noise = torch.kron(torch.ones(2, 2, dtype=F64), noise)
    return torch.cat([top, bottom]), kick, noise


def on_passes(step, kick, spread, error, batches):
    """Mean covariance over a pass of ``batches`` batches that add up to all data.

    ``error`` is the covariance of one batch's gradient error; the errors of a pass sum to zero and
    are exchangeable, so that two of them have covariance -error / (batches - 1).
    """
    powers = [torch.linalg.matrix_power(step, k) for k in range(batches + 1)]

    def added(count):
        """Covariance that the first ``count`` steps of a pass add."""
        total = torch.zeros_like(spread)
        for i, j in itertools.product(range(count), repeat=2):
            shared = error if i == j else -error / (batches - 1)
            both = kick @ shared @ kick.T + (spread if i == j else 0.0)
            total = total + powers[count - 1 - i] @ both @ powers[count - 1 - j].T
        return total

    start = solve_lyapunov(powers[batches], added(batches))
    inside = [powers[k] @ start @ powers[k].T + added(k) for k in range(1, batches + 1)]
    return torch.stack(inside).mean(0)

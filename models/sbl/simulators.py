"""Simulated problems with Kronecker-structured sparsity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.sbl.mode_products import mode_products, outer
from probkit.models.sbl.moments import abs_square
from probkit.rng import Rng, stream

__all__ = ["IRSChannel", "SparseData", "simulate_irs_channel", "simulate_kronecker"]


@dataclass(frozen=True)
class SparseData:
    """Simulated problems.

    Attributes:
        factors: H_i [problem, M_i, N_i].
        weights: The truth [problem, N_1, ..., N_I].
        y: Data [problem, M_1, ..., M_I].
        noise_var: E|n|^2 [problem].
    """

    factors: list[Tensor]
    weights: Tensor
    y: Tensor
    noise_var: Tensor


def simulate_kronecker(
    n: int = 1,
    *,
    sizes: Sequence[int] = (15, 15, 15),
    data_sizes: Sequence[int] = (8, 12, 15),
    nonzeros: int = 3,
    snr_db: float = 25.0,
    rank_one: bool = True,
    is_complex: bool = False,
    rng: Rng,
) -> SparseData:
    """Draw problems with i.i.d. standard normal factors and a Kronecker support.

    Args:
        n: Number of problems.
        sizes: N_1, ..., N_I.
        data_sizes: M_1, ..., M_I.
        nonzeros: Indices in use in each mode, K.
        snr_db: mean |H x|^2 / noise_var in decibels, exactly, for each problem.
        rank_one: Whether x is x_1 kron ... kron x_I with N(0, 1) entries; else only the support is
            a Kronecker product and its entries are independent N(0, 0.05).
        is_complex: Circular complex factors, weights and noise.
        rng: Seed or generator.

    Example:
        >>> data = simulate_kronecker(2, nonzeros=2, rng=0)
        >>> data.weights.shape, int((data.weights[0] != 0).sum())
        (torch.Size([2, 15, 15, 15]), 8)
    """
    if len(sizes) != len(data_sizes) or not sizes:
        raise DataError(
            f"sizes and data_sizes: expected one number for each mode, got {tuple(sizes)} and "
            f"{tuple(data_sizes)}"
        )
    if not 1 <= nonzeros <= min(sizes):
        raise DataError(f"nonzeros: expected 1 to {min(sizes)}, got {nonzeros}")
    dtype = torch.complex128 if is_complex else torch.float64
    g = stream(rng, "kronecker")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    factors = [normal(n, m, k) for m, k in zip(data_sizes, sizes, strict=True)]
    masks, entries = [], []
    for size in sizes:
        order = torch.rand(n, size, generator=g, dtype=torch.float64).argsort(-1)
        mask = torch.zeros(n, size, dtype=torch.float64).scatter(-1, order[:, :nonzeros], 1.0)
        masks.append(mask)
        entries.append(mask * normal(n, size))
    weights = outer(entries)
    if not rank_one:
        weights = outer(masks) * math.sqrt(0.05) * normal(n, *sizes)
    return _observed(factors, weights, snr_db, g)


def _observed(
    factors: list[Tensor], weights: Tensor, snr_db: float, g: torch.Generator
) -> SparseData:
    """Add noise at the stated signal-to-noise ratio."""
    field = mode_products(weights, factors)
    dims = tuple(range(1, field.ndim))
    noise_var = abs_square(field).mean(dims) / 10 ** (snr_db / 10)
    white = torch.randn(field.shape, generator=g, dtype=field.dtype)
    scale = noise_var.sqrt().reshape(-1, *[1] * (field.ndim - 1))
    return SparseData(factors, weights, field + scale * white, noise_var)


@dataclass(frozen=True)
class IRSChannel:
    """Channels through an intelligent reflecting surface (IRS).

    Attributes:
        data: The estimation problems: modes are IRS angle differences, user angles, base angles.
        base: Steering dictionary of the base station [16, 18].
        user: Steering dictionary of the user [6, 18].
    """

    data: SparseData
    base: Tensor
    user: Tensor

    def cascaded(self, weights: Tensor) -> Tensor:
        """Channels user -> IRS -> base under each reflection pattern.

        Args:
            weights: [problem, 18, 18, 18].

        Returns:
            [problem, pattern, base antenna, user antenna].
        """
        reflected = self.data.factors[0]
        mixed = mode_products(
            weights, [reflected, self.user.conj()[None], self.base[None]]
        )  # [problem, pattern, user antenna, base antenna]
        return mixed.mT

    def channel_nmse(self, weights: Tensor) -> Tensor:
        """NMSE of the cascaded channels, averaged over patterns [problem]."""
        truth = self.cascaded(self.data.weights)
        error = abs_square(self.cascaded(weights) - truth).sum((-2, -1))
        return (error / abs_square(truth).sum((-2, -1))).mean(-1)


def _steering(antennas: int, angles: int) -> Tensor:
    """a_d[k] = exp(i pi k (2 n / angles - 1)) / sqrt(d), [antenna, angle]."""
    k = torch.arange(antennas, dtype=torch.float64)[:, None]
    cosine = 2 * torch.arange(angles, dtype=torch.float64) / angles - 1
    phase = math.pi * k * cosine
    return torch.complex(phase.cos(), phase.sin()) / math.sqrt(antennas)


def simulate_irs_channel(
    n: int = 1,
    *,
    snr_db: float = 20.0,
    pilots: int = 3,
    patterns: int = 6,
    spread: int = 3,
    rng: Rng,
) -> IRSChannel:
    """Draw IRS-aided MIMO channels and their training data (He & Joseph, 2024).

    6 user antennas, 16 base antennas, 256 reflectors, 18 angles. One departure angle at the user
    and one at the IRS; ``spread`` adjacent arrival angles at the IRS and at the base, with CN(0, 1)
    gains. Pilots are QPSK / sqrt(6), reflection patterns are +-1/16. Only 18 of the 18^2 columns of
    the reflected dictionary differ, as they depend on differences of angles.

    Args:
        n: Number of problems.
        snr_db: mean |H x|^2 / noise_var in decibels.
        pilots: Pilot vectors K_1.
        patterns: Reflection patterns K_2.
        spread: Adjacent arrival angles.
        rng: Seed or generator.

    Returns:
        Problems with H = H_1 [6, 18] kron H_2 [3, 18] kron H_3 [16, 18]: 288 data, 5832 unknowns.

    Example:
        >>> channel = simulate_irs_channel(2, rng=0)
        >>> channel.data.y.shape, channel.cascaded(channel.data.weights).shape
        (torch.Size([2, 6, 3, 16]), torch.Size([2, 6, 16, 6]))
    """
    angles, reflectors = 18, 256
    user, base = _steering(6, angles), _steering(16, angles)
    surface = _steering(reflectors, angles)
    g = stream(rng, "irs")

    def gains(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.complex128)

    def pick(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=g)

    quarter = torch.randint(4, (n, 6, pilots), generator=g) * (math.pi / 2) + math.pi / 4
    sent = torch.complex(quarter.cos(), quarter.sin()).to(torch.complex128) / math.sqrt(6)
    signs = torch.randint(2, (n, reflectors, patterns), generator=g) * 2.0 - 1.0
    omega = signs.to(torch.complex128) / 16
    distinct = surface[:, :1] * surface.conj()  # columns (0, m) of the row-wise Khatri-Rao product
    factors = [
        omega.mT @ distinct,
        sent.mT @ user.conj(),
        base.expand(n, -1, -1),
    ]
    arrival = pick(angles - spread + 1)[:, None] + torch.arange(spread)
    departure = pick(angles)[:, None]
    difference = (departure - arrival) % angles
    first = torch.zeros(n, angles, dtype=torch.complex128)
    first.scatter_(-1, difference, gains(n, spread))
    second = torch.zeros(n, angles, dtype=torch.complex128)
    second.scatter_(-1, pick(angles)[:, None], torch.ones(n, 1, dtype=torch.complex128))
    third = torch.zeros(n, angles, dtype=torch.complex128)
    at_base = pick(angles - spread + 1)[:, None] + torch.arange(spread)
    third.scatter_(-1, at_base, gains(n, spread))
    data = _observed(factors, outer([first, second, third]), snr_db, g)
    return IRSChannel(data, base, user)

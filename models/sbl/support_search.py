"""Revise a Kronecker support by the evidence: bring pruned indices back, drop idle ones.

Pruning by a threshold is irreversible and blind: an index whose weights are small may be well
above the noise. The evidence tells. An index is added, or kept, where it raises the log evidence
by more than half the log of the number of data, the price of one more free variance in the
Bayesian information criterion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from probkit.models.sbl.kronecker_e_step import kronecker_spectrum
from probkit.models.sbl.kronecker_updates import alternating_step, fix_scale
from probkit.models.sbl.mode_products import contract_all_but, mode_products, outer
from probkit.models.sbl.moments import abs_square
from probkit.models.sbl.problem import moments_of
from probkit.models.sbl.pruning import reduce

__all__ = ["leave_one_out_loss", "price_of_an_index", "revise_support"]

_CANDIDATES = 16  # weakest indices of a mode that are tried for deletion at a time
_POLISH = 3  # monotone EM steps after each round of deletions


def price_of_an_index(data_size: int) -> float:
    """Half the log of the number of data."""
    return 0.5 * math.log(data_size)


def leave_one_out_loss(
    factors: Sequence[Tensor],
    variances: Sequence[Tensor],
    noise_var: Tensor,
    y: Tensor,
    mode: int,
    candidates: Tensor,
) -> Tensor:
    """Loss of log evidence when one index of a mode is dropped, all else as it is.

    Args:
        factors: H_i [*row, M_i, N_i].
        variances: g_i [row, N_i].
        noise_var: s2 [row].
        y: [row, snapshot, M_1, ..., M_I].
        mode: The mode.
        candidates: Indices to try [row, k].

    Returns:
        [row, k]. The other modes are diagonalised once; each index costs one small spectrum.
    """
    spectrum = kronecker_spectrum(factors, variances, noise_var)
    size = spectrum.vectors[mode].shape[-1]
    eye = torch.eye(size, dtype=y.dtype, device=y.device)
    turns = [vector.mH.unsqueeze(-3) for vector in spectrum.vectors]
    turns[mode] = eye
    turned = mode_products(y, turns).movedim(2 + mode, 2).flatten(3)  # [row, snapshot, M_i, rest]
    others = [
        (factor.unsqueeze(-3), variance)
        for k, (factor, variance) in enumerate(zip(factors, variances, strict=True))
        if k != mode
    ]
    levels = [
        torch.linalg.eigvalsh((h.squeeze(-3) * v.unsqueeze(-2)) @ h.squeeze(-3).mH).clamp_min(0)
        for h, v in others
    ]
    rest = outer(levels).flatten(1) if levels else torch.ones_like(noise_var)[:, None]
    variance = variances[mode]
    without = variance[:, None].expand(-1, candidates.shape[1], -1)
    without = without.scatter(-1, candidates[..., None], 0.0)
    trials = torch.cat([variance[:, None], without], 1)  # the first one drops nothing
    factor = factors[mode].unsqueeze(-3)
    level, vector = torch.linalg.eigh((factor * trials.unsqueeze(-2)) @ factor.mH)
    values = level.clamp_min(0)[..., None] * rest[:, None, None] + noise_var[:, None, None, None]
    power = abs_square(vector.mH.unsqueeze(2) @ turned.unsqueeze(1)).sum(2)
    cost = y.shape[1] * values.log().sum((-2, -1)) + (power / values).sum((-2, -1))
    weight = 1.0 if y.is_complex() else 0.5
    return weight * (cost[:, 1:] - cost[:, :1])


def revise_support(
    factors: Sequence[Tensor],
    variances: Sequence[Tensor],
    noise_var: Tensor,
    y: Tensor,
    *,
    rounds: int = 40,
) -> list[Tensor]:
    """Bring back what pays, climb, drop what does not pay.

    Args:
        factors: H_i [*row, M_i, N_i].
        variances: g_i [row, N_i], zero where pruned.
        noise_var: s2 [row], kept.
        y: [row, snapshot, M_1, ..., M_I].
        rounds: Largest number of rounds of deletions.

    Returns:
        New g_i [row, N_i].
    """
    price = price_of_an_index(y[0].numel())
    parts = _revive(factors, variances, noise_var, y, price)
    parts = _climb(factors, parts, noise_var, y, steps=10)
    for _ in range(rounds):
        parts, dropped = _drop_idle(factors, parts, noise_var, y, price)
        if not dropped:
            break
        parts = _climb(factors, parts, noise_var, y, steps=_POLISH)
    return parts


def _climb(
    factors: Sequence[Tensor], variances: Sequence[Tensor], noise_var: Tensor, y: Tensor, steps: int
) -> list[Tensor]:
    """A few monotone EM steps on the columns in use."""
    reduction = reduce(variances)
    small, parts = reduction.columns(factors), reduction.columns(variances)
    for _ in range(steps):
        parts = alternating_step(moments_of(small, parts, noise_var, y).second_moment(), parts)
    return reduction.spread(parts)


def _drop_idle(
    factors: Sequence[Tensor],
    variances: Sequence[Tensor],
    noise_var: Tensor,
    y: Tensor,
    price: float,
) -> tuple[list[Tensor], bool]:
    """Drop, in each mode of each row, the index that is missed least, if it is cheap to miss."""
    parts, dropped = list(variances), False
    for mode in range(len(parts)):
        reduction = reduce(parts)
        small, kept = reduction.columns(factors), reduction.columns(parts)
        variance = kept[mode]
        active = variance > 0
        ranked = torch.where(active, variance, torch.inf)
        candidates = ranked.argsort(-1)[:, :_CANDIDATES]
        loss = leave_one_out_loss(small, kept, noise_var, y, mode, candidates)
        allowed = active.gather(-1, candidates) & (active.sum(-1, keepdim=True) > 1)
        least, place = torch.where(allowed, loss, torch.inf).min(-1)
        chosen = candidates.gather(-1, place[:, None])
        cheap = (least < price)[:, None]
        kept[mode] = torch.where(cheap, variance.scatter(-1, chosen, 0.0), variance)
        dropped = dropped or bool(cheap.any())
        parts = reduction.spread(kept)
    return parts, dropped


def _revive(
    factors: Sequence[Tensor],
    variances: Sequence[Tensor],
    noise_var: Tensor,
    y: Tensor,
    price: float,
) -> list[Tensor]:
    """Give pruned indices a variance where that would pay, judged one index at a time.

    A slice of new weights, with prior variances t prod_k g_k, gains about
    sum [|Q|^2 v / (1 + v S) - log(1 + v S)] (exact where its columns do not overlap); t is the mean
    of what each weight alone would ask for, (|Q|^2 - S) / S^2, in units of prod_k g_k.
    """
    moments = moments_of(factors, variances, noise_var, y)
    power, leverage = moments.projection_square(), moments.leverage
    tiny = torch.finfo(leverage.dtype).tiny
    wanted = (power - leverage).clamp_min(0) / leverage.square().clamp_min(tiny)
    shares = [_shares(part) for part in variances]
    weight = (1.0 if y.is_complex() else 0.5) * y.shape[1]
    revived = []
    for mode, part in enumerate(variances):
        scale = contract_all_but(wanted, shares, mode)
        new = outer([scale if k == mode else other for k, other in enumerate(variances)])
        gains = power * new / (1 + new * leverage) - torch.log1p(new * leverage)
        gain = weight * gains.movedim(1 + mode, 1).flatten(2).sum(-1)
        revived.append(torch.where((part == 0) & (gain > price), scale, part))
    return fix_scale(revived)


def _shares(variance: Tensor) -> Tensor:
    """1 / g over the number of active entries; zero where pruned."""
    active = variance > 0
    inverse = torch.where(active, 1 / torch.where(active, variance, 1.0), 0.0)
    return inverse / active.sum(-1, keepdim=True).clamp_min(1)

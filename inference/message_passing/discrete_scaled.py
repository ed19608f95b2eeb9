"""Forward and backward messages of a discrete chain by scaled matrix products, both in one loop.

With r_t = b_t * beta_t (b_t the emission probabilities, beta_t the backward message) the backward
recursion r_t = b_t * (A r_(t+1)) has the form of the forward one, a_t = b_t * (A' a_(t-1)). Both
are therefore one batched product a step. Emissions are divided by their largest entry at each step,
the messages by theirs every few steps.

Scaled messages lose entries below the smallest float. A loss at step t changes the result by at
most about that float relative to the overlap sum_k a_t[k] beta_t[k], so the overlap, which is
computed anyway, certifies the result; see `ScaledPosterior.reliable`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.inference.message_passing.chain import Chain

__all__ = ["ScaledPosterior", "scaled_posterior"]

_RESCALE_EVERY = 8  # measured: 1 costs 40 % more, beyond 8 nothing is gained


class ScaledPosterior(NamedTuple):
    """What the scaled messages give; nothing of an unreliable sequence may be used.

    Attributes:
        forward: Proportional to p(y_1, ..., y_t, z_t = k) [*batch, T, K]; None if not asked for.
        smoothed: p(z_t = k | y_1, ..., y_T) [*batch, T, K]; 0 on padding; None if not asked for.
        leaving: p(y_1, ..., y_t, z_t = k) [*batch, T - 1, K] and
        arriving: p(y_(t+1), ..., y_T | z_(t+1) = k) [*batch, T - 1, K], in such units that
            leaving_t[k] A[k, l] arriving_t[l] = p(z_t = k, z_(t+1) = l | y_1, ..., y_T);
            ``leaving`` is 0 on padding; None if not asked for.
        log_increment: log p(y_t | y_1, ..., y_(t-1)) [*batch, T]; 0 on padding.
        reliable: Whether no digit was lost [*batch]; for the filter, whether moreover every
            filtered probability is far from underflow.
    """

    forward: Tensor | None
    smoothed: Tensor | None
    leaving: Tensor | None
    arriving: Tensor | None
    log_increment: Tensor
    reliable: Tensor


def scaled_posterior(chain: Chain, *, smooth: bool) -> ScaledPosterior:
    """Compute the messages of all sequences and what follows from them; no gradients.

    Sequences with the same transition matrix form a group [G] of members [M]; one product of
    [K, K] by [K, M] serves the group. All work is done in the layout [T, G, K, M].

    Args:
        chain: The inputs.
        smooth: Return what the smoother needs; otherwise what the filter needs.
    """
    with torch.no_grad():
        groups, members = _grouping(chain)
        G, M = math.prod(groups), math.prod(members)
        steps, states = chain.log_emission.shape[-2:]
        lengths = None if chain.lengths is None else chain.lengths.reshape(G, M)
        log_emission = chain.log_emission.reshape(G, M, steps, states).permute(2, 0, 3, 1)
        lowest = torch.finfo(log_emission.dtype).min
        peak = log_emission.amax(-2, keepdim=True).clamp_min(lowest)  # [T, G, 1, M]
        transition = _group_transition(chain, groups)  # [G, K, K] or [T - 1, G, K, K]
        initial = chain.log_initial.exp().expand(*chain.batch, states)
        initial = initial.reshape(G, M, states).transpose(-1, -2)
        emission = (log_emission - peak).exp_()
        messages, increment = _loop(initial, transition, emission, lengths)
        forward, weighted = messages[:, :G], _reverse(messages[:, G:], lengths)
        backward = torch.empty_like(forward)
        backward[-1] = 1.0
        torch.matmul(transition, weighted[1:], out=backward[:-1])
        increment += peak.squeeze(-2)
        valid = None
        if lengths is not None:
            step = torch.arange(steps, device=lengths.device)[:, None, None]
            backward = torch.where((step < lengths - 1).unsqueeze(-2), backward, 1.0)
            valid = step < lengths  # [T, G, M]
            increment = torch.where(valid, increment, 0.0)
        joint = forward * backward
        overlap = joint.sum(-2, keepdim=True)
        reliable = _certify(forward, backward, overlap, valid, filtering=not smooth)

        def back(x: Tensor) -> Tensor:  # [T, G, K, M] -> [*batch, T, K]
            return x.permute(1, 3, 0, 2).reshape(*chain.batch, len(x), states)

        log_increment = increment.permute(1, 2, 0).reshape(*chain.batch, steps)
        if not smooth:
            return ScaledPosterior(
                back(forward), None, None, None, log_increment, reliable.reshape(chain.batch)
            )
        scale = overlap.reciprocal()
        if valid is not None:
            scale = torch.where(valid.unsqueeze(-2), scale, 0.0)
        leaving = forward[:-1] * scale[:-1]
        if valid is not None:  # the last step leads nowhere
            leaving *= valid[1:].unsqueeze(-2)
        return ScaledPosterior(
            None,
            back(joint.mul_(scale)),
            back(leaving),
            back(weighted[1:]),
            log_increment,
            reliable.reshape(chain.batch),
        )


def _grouping(chain: Chain) -> tuple[torch.Size, torch.Size]:
    """Split the batch into leading dims of groups and trailing dims that share a transition."""
    batch = chain.batch
    if chain.varying and chain.lengths is not None:
        return batch, torch.Size()  # reversed sequences of several lengths share no transition
    own = chain.log_transition.shape[: len(batch)]
    split = max((i + 1 for i, size in enumerate(own) if size != 1), default=0)
    return batch[:split], batch[split:]


def _group_transition(chain: Chain, groups: torch.Size) -> Tensor:
    core = chain.log_transition.shape[len(chain.batch) :]
    own = chain.log_transition.exp()
    own = own.reshape(own.shape[: len(groups)] + core).expand(*groups, *core)
    own = own.reshape(math.prod(groups), *core)
    return own.transpose(0, 1).contiguous() if chain.varying else own.contiguous()


def _reverse(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Reverse each sequence of [T, G, K, M] within its length; the padding stays behind it."""
    if lengths is None:
        return x.flip(0)
    steps = torch.arange(len(x), device=x.device)[:, None, None]
    index = (lengths - 1 - steps).clamp_min(0)  # [T, G, M]
    return x.gather(0, index.unsqueeze(-2).expand(x.shape))


def _loop(
    initial: Tensor, transition: Tensor, emission: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run both recursions; returns messages [T, 2 G, K, M] and forward increments [T, G, M]."""
    steps, G, _, _ = emission.shape
    matrices = _both_transitions(transition, lengths, steps)
    weights = torch.cat((emission, _reverse(emission, lengths)), 1).contiguous()
    messages = torch.empty_like(weights)
    torch.mul(initial, weights[0, :G], out=messages[0, :G])
    messages[0, G:] = weights[0, G:]
    scales = []
    rows, factors = messages.unbind(0), weights.unbind(0)
    for t in range(steps):
        row = rows[t]
        if t > 0:
            torch.bmm(matrices[t - 1], rows[t - 1], out=row)
            row.mul_(factors[t])
        if t % _RESCALE_EVERY == 0:
            scale = row.amax(-2, keepdim=True)
            row.div_(scale)
            scales.append(scale)
    after = messages[:, :G].sum(-2)  # [T, G, M], after rescaling
    before = after.clone()
    before[::_RESCALE_EVERY] *= torch.stack(scales)[:, :G, 0]
    before[1:] /= after[:-1]
    return messages, before.log()


def _both_transitions(transition: Tensor, lengths: Tensor | None, steps: int) -> list[Tensor]:
    """Matrices of each step [2 G, K, K]: transposed for forward, plain for backward messages."""
    if transition.ndim == 3:
        return [torch.cat((transition.transpose(-1, -2), transition))] * (steps - 1)
    if lengths is None:
        backward = transition.flip(0)
    else:  # one sequence a group; the step from position s to s + 1 of the reversed sequence
        position = torch.arange(steps - 1, device=transition.device).unsqueeze(-1)
        index = (lengths.squeeze(-1) - 2 - position).clamp_min(0)  # [T - 1, G]
        backward = transition.gather(0, index[..., None, None].expand(transition.shape))
    return list(torch.cat((transition.transpose(-1, -2), backward), 1).unbind(0))


def _certify(
    forward: Tensor, backward: Tensor, overlap: Tensor, valid: Tensor | None, *, filtering: bool
) -> Tensor:
    """Bound the loss by underflow [G, M]; NaN (a sequence that died) counts as unreliable."""
    info = torch.finfo(forward.dtype)
    floor = 1e4 * info.tiny / info.eps  # losses stay below 1e-4 eps
    peak, peak_backward = forward.amax(-2, keepdim=True), backward.amax(-2, keepdim=True)
    largest = peak.clamp_min(1.0) * peak_backward.clamp_min(1.0)
    fine = (overlap > floor * largest) & (largest < 1 / floor)
    if filtering:
        fine &= forward.amin(-2, keepdim=True) > floor * peak.clamp_min(1.0)
    if valid is not None:
        fine |= ~valid.unsqueeze(-2)
    return fine.squeeze(-2).all(0)

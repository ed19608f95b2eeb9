"""Forward and backward messages of a discrete chain in the log domain.

The reference: exact for any range of the inputs, zeros included, and differentiable by plain
autograd. The scaled passes are faster and fall back to this one where they would lose digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.inference.message_passing.chain import Chain
from probkit.inference.message_passing.scan import associative_scan

__all__ = [
    "LogMessages",
    "exact_log_matmul",
    "log_matmul",
    "logsumexp",
    "loop_messages",
    "scan_messages",
    "scan_messages_by",
]


class LogMessages(NamedTuple):
    """Log messages of a chain; not meaningful on padding.

    Attributes:
        forward: log p(y_1, ..., y_t, z_t = k) [*batch, T, K].
        backward: log p(y_(t+1), ..., y_T | z_t = k) [*batch, T, K].
    """

    forward: Tensor
    backward: Tensor


def logsumexp(x: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """Log sum exp x along ``dim``, with gradient zero (not NaN) where every term is zero."""
    peak = x.detach().amax(dim, keepdim=True).clamp_min(torch.finfo(x.dtype).min)
    total = (x - peak).exp().sum(dim, keepdim=True)
    none = total == 0
    value = torch.where(none, -torch.inf, torch.where(none, 1.0, total).log() + peak)
    return value if keepdim else value.squeeze(dim)


def log_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Log of the product exp(left) exp(right) of matrices [*batch, K, K] given by their logs.

    Each row of the product loses terms below the smallest float relative to its largest entry;
    `exact_log_matmul` does not, and costs several times as much.
    """
    lowest = torch.finfo(left.dtype).min
    row = right.detach().amax(-1).clamp_min(lowest)  # [*batch, K]
    weighted = left + row.unsqueeze(-2)
    peak = weighted.detach().amax(-1, keepdim=True).clamp_min(lowest)
    product = (weighted - peak).exp() @ (right - row.unsqueeze(-1)).exp()
    none = product == 0
    return torch.where(none, -torch.inf, torch.where(none, 1.0, product).log() + peak)


def exact_log_matmul(left: Tensor, right: Tensor) -> Tensor:
    """The same product without loss, by a log-sum-exp for each entry."""
    return logsumexp(left.unsqueeze(-1) + right.unsqueeze(-3), -2)


def loop_messages(chain: Chain) -> LogMessages:
    """Compute the messages step by step: a_t = e_t + log(exp(a_(t-1)) A), b_t likewise."""
    emission = chain.log_emission.unbind(-2)
    steps = len(emission)
    if chain.varying:
        transitions = list(chain.log_transition.unbind(-3))
    else:
        transitions = [chain.log_transition] * (steps - 1)
    forward = [chain.log_initial + emission[0]]
    for t in range(1, steps):
        step = logsumexp(forward[-1].unsqueeze(-1) + transitions[t - 1], -2)
        forward.append(step + emission[t])
    backward = [torch.zeros_like(emission[-1])]
    for t in range(steps - 2, -1, -1):
        message = (emission[t + 1] + backward[-1]).unsqueeze(-2)
        step = logsumexp(message + transitions[t], -1)
        if chain.lengths is not None:
            step = torch.where((t < chain.lengths - 1).unsqueeze(-1), step, 0.0)
        backward.append(step)
    return LogMessages(torch.stack(forward, -2), torch.stack(backward[::-1], -2))


def scan_messages(chain: Chain, *, filtering: bool = False) -> LogMessages:
    """Compute the messages by two associative scans, again and exactly where digits were lost."""
    messages = scan_messages_by(log_matmul, chain)
    if _nothing_lost(chain, messages, filtering):
        return messages
    return scan_messages_by(exact_log_matmul, chain)


def _nothing_lost(chain: Chain, messages: LogMessages, filtering: bool) -> bool:
    """The certificate of the scaled messages (see there), for messages in the log domain."""
    forward, backward = messages.forward.detach(), messages.backward.detach()
    info = torch.finfo(forward.dtype)
    floor = math.log(1e4 * info.tiny / info.eps)
    peak = forward.amax(-1)
    fine = logsumexp(forward + backward, -1) - peak - backward.amax(-1) > floor
    if filtering:
        fine = fine & (forward.amin(-1) - peak > floor)
    return bool((fine | ~chain.valid()).all())


def scan_messages_by(product: Callable[[Tensor, Tensor], Tensor], chain: Chain) -> LogMessages:
    """Compute the messages by two associative scans over matrices log(A diag(exp e_t)) [T, K, K].

    Saerkkae & Garcia-Fernandez (2021), "Temporal parallelization of Bayesian smoothers", and
    Hassan, Saerkkae & Garcia-Fernandez (2021), "Temporal parallelization of inference in hidden
    Markov models", section IV.
    """
    *batch, steps, states = chain.log_emission.shape
    start = (chain.log_initial + chain.log_emission[..., 0, :]).unsqueeze(-2)  # [*batch, 1, K]
    if steps == 1:
        return LogMessages(start, torch.zeros_like(start))
    transition = chain.log_transition if chain.varying else chain.log_transition.unsqueeze(-3)
    elements = transition + chain.log_emission[..., 1:, :].unsqueeze(-2)  # [*batch, T-1, K, K]
    if chain.lengths is not None:
        identity = torch.eye(states, dtype=elements.dtype, device=elements.device).log()
        elements = torch.where(chain.valid()[..., 1:, None, None], elements, identity)
    # Rows of the first element are all the start, so that those of every prefix are a_t.
    first = start.unsqueeze(-2).expand(*batch, 1, states, states)
    prefixes = associative_scan(product, torch.cat((first, elements), -3), dim=-3)
    suffixes = associative_scan(product, elements, dim=-3, reverse=True)
    last = torch.zeros_like(start)
    return LogMessages(prefixes[..., 0, :], torch.cat((logsumexp(suffixes, -1), last), -2))

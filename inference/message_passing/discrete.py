"""Exact inference in discrete chains (hidden Markov models): filter, smooth, decode, draw paths.

Pure functions of log probabilities. States z_t in 1..K follow a Markov chain and y_t depends on z_t
alone; ``log_emission`` holds log p(y_t | z_t = k), so any likelihood can be used, and partial
knowledge of the states is simply added to it. Zeros are written as minus infinity and stay exact:
left-to-right chains, impossible states, impossible sequences (evidence minus infinity; see
`check_evidence`). A missing observation is ``log_emission = 0``; padding is marked by ``lengths``.

Four ways to the same messages (they agree to 1e-9 in float64):

* scaled products in a loop, without gradients, certified against underflow and repaired by
* a loop in the log domain, which autograd differentiates;
* two associative scans of depth log T, ``method="scan"``;
* the same scaled products in sqrt(T) blocks at once, for few long sequences without gradients.

``method="auto"`` chooses by shape. With n = (number of sequences) K^2, on one CPU core: without
gradients, blocks from 512 steps on while n <= 256, where they apply (smoother and evidence, equal
lengths, constant transition), else the scan from 1024 steps on while n <= 16; with gradients, the
scan from 32 steps on while n <= 256; otherwise a loop. At the borders the two sides were measured
to be equal within 30 %. On a GPU, where a loop waits for every step to be launched, the scan is
taken from 64 steps on.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.inference.message_passing.chain import Chain, canonical
from probkit.inference.message_passing.discrete_blocks import blocked_smoother
from probkit.inference.message_passing.discrete_log import (
    LogMessages,
    exact_log_matmul,
    logsumexp,
    loop_messages,
    scan_messages,
    scan_messages_by,
)
from probkit.inference.message_passing.discrete_scaled import (
    ScaledSmoother,
    scaled_filter,
    scaled_smoother,
)
from probkit.rng import Rng, stream

__all__ = [
    "HMMFilter",
    "HMMPath",
    "HMMSmoother",
    "hmm_filter",
    "hmm_log_evidence",
    "hmm_sample_paths",
    "hmm_smoother",
    "hmm_viterbi",
]

Method = Literal["auto", "loop", "scan"]
Route = Literal["loop", "log loop", "scan", "blocks"]


class HMMFilter(NamedTuple):
    """What the past says about each state. Zero, or minus infinity, on padding and after death.

    Attributes:
        log_evidence: log p(y_1, ..., y_T) [*batch].
        log_increment: log p(y_t | y_1, ..., y_(t-1)) [*batch, T]; 0 on padding, minus infinity from
            the first impossible step on.
        filtered: p(z_t = k | y_1, ..., y_t) [*batch, T, K]; 0 on padding and from an impossible
            step on.
        predicted: p(z_t = k | y_1, ..., y_(t-1)) [*batch, T, K]; 0 on padding and after an
            impossible step.
    """

    log_evidence: Tensor
    log_increment: Tensor
    filtered: Tensor
    predicted: Tensor


class HMMSmoother(NamedTuple):
    """What the whole sequence says about each state; all zero for an impossible sequence.

    Attributes:
        log_evidence: log p(y_1, ..., y_T) [*batch].
        log_increment: log p(y_t | y_1, ..., y_(t-1)) [*batch, T]; 0 on padding, minus infinity from
            the first impossible step on.
        smoothed: p(z_t = k | y_1, ..., y_T) [*batch, T, K]; 0 on padding.
        pair_sum: sum_t p(z_t = k, z_(t+1) = l | y_1, ..., y_T) [*batch, K, K], the expected numbers
            of transitions.
        pairs: p(z_t = k, z_(t+1) = l | y_1, ..., y_T) [*batch, T - 1, K, K] if asked for.
    """

    log_evidence: Tensor
    log_increment: Tensor
    smoothed: Tensor
    pair_sum: Tensor
    pairs: Tensor | None


class HMMPath(NamedTuple):
    """The most probable path.

    Attributes:
        path: argmax over z_1, ..., z_T of p(z_1, ..., z_T, y_1, ..., y_T) [*batch, T]; -1 on
            padding and for an impossible sequence.
        log_joint: The maximum, log p(path, y) [*batch].
    """

    path: Tensor
    log_joint: Tensor


# --------------------------------------------------------------------------- public functions


def hmm_filter(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    method: Method = "auto",
) -> HMMFilter:
    """Filter: the law of each state given the observations so far.

    Args:
        log_initial: log p(z_1 = k) [*batch, K].
        log_transition: log p(z_(t+1) = l | z_t = k) [*batch, K, K]; or, with exactly one dimension
            more than ``log_emission``, [*batch, T - 1, K, K]. Row k is the state that is left.
        log_emission: log p(y_t | z_t = k) [*batch, T, K]. It carries all batch dims, to which the
            other two broadcast.
        lengths: Number of steps of each sequence [*batch]; None where all have T. What lies on the
            padding is never read.
        method: "loop", "scan", or "auto", by shape (rule in the module introduction).

    Returns:
        An `HMMFilter`, differentiable.

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a length is outside 1..T.

    Example:
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> seen = torch.tensor([[0.9, 0.1], [0.9, 0.1]], dtype=torch.float64)
        >>> result = hmm_filter(half.log(), half.log().expand(2, 2), seen.log())
        >>> [round(p, 6) for p in result.filtered[1].tolist()]
        [0.9, 0.1]
    """
    chain = canonical(log_initial, log_transition, log_emission, lengths)
    route = _route(chain, method)
    if route != "loop":
        messages = scan_messages(chain, filtering=True) if route == "scan" else loop_messages(chain)
        return _filter_log(chain, messages)
    scaled = scaled_filter(chain)
    increment = scaled.log_increment
    result = HMMFilter(increment.sum(-1), increment, scaled.filtered, scaled.predicted)
    return _repair(
        chain, scaled.reliable, result, lambda part: _filter_log(part, loop_messages(part))
    )


def hmm_smoother(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    pairs: bool = False,
    method: Method = "auto",
) -> HMMSmoother:
    """Forward-backward: marginals of states and of neighbouring pairs given all observations.

    Args:
        log_initial: log p(z_1 = k) [*batch, K].
        log_transition: [*batch, K, K], or [*batch, T - 1, K, K]; see `hmm_filter`.
        log_emission: log p(y_t | z_t = k) [*batch, T, K].
        lengths: Number of steps of each sequence [*batch]; None where all have T.
        pairs: Return the marginals of every pair as well, not only their sum.
        method: "loop", "scan", or "auto", by shape (rule in the module introduction).

    Returns:
        An `HMMSmoother`, differentiable.

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a length is outside 1..T.

    Example:
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> sticky = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
        >>> seen = torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> result = hmm_smoother(half.log(), sticky.log(), seen.log())
        >>> [round(p, 6) for p in result.smoothed[0].tolist()]
        [0.9, 0.1]
    """
    chain = canonical(log_initial, log_transition, log_emission, lengths)
    route = _route(chain, method, smooth=True)
    if route in ("scan", "log loop"):
        messages = scan_messages(chain) if route == "scan" else loop_messages(chain)
        return _smooth_log(chain, messages, pairs)
    scaled = (blocked_smoother if route == "blocks" else scaled_smoother)(chain)
    result = _smooth_scaled(chain, scaled, pairs)
    return _repair(chain, scaled.reliable, result, lambda part: _smooth_exactly(part, pairs))


def hmm_log_evidence(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    method: Method = "auto",
) -> Tensor:
    """Return log p(y_1, ..., y_T) [*batch], with gradients by Fisher's identity.

    The gradient with respect to ``log_emission`` is the smoothed law of the states, that with
    respect to ``log_transition`` the expected numbers of transitions, that with respect to
    ``log_initial`` the law of z_1. They come from one backward sweep instead of a graph through the
    loop; second derivatives and reverse-mode ``torch.func`` transforms
    (``vmap``, ``grad``, ``jacrev``) work too.

    Args:
        log_initial: log p(z_1 = k) [*batch, K].
        log_transition: [*batch, K, K], or [*batch, T - 1, K, K]; see `hmm_filter`.
        log_emission: log p(y_t | z_t = k) [*batch, T, K].
        lengths: Number of steps of each sequence [*batch]; None where all have T.
        method: "loop", "scan", or "auto", by shape (rule in the module introduction).

    Returns:
        Log evidence [*batch]; minus infinity for an impossible sequence (gradient zero).

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a length is outside 1..T.

    Example:
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> seen = torch.tensor([[0.3, 0.1], [0.2, 0.4]], dtype=torch.float64)
        >>> value = hmm_log_evidence(half.log(), half.log().expand(2, 2), seen.log())
        >>> round(value.exp().item(), 9)  # (0.3 + 0.1) / 2 * (0.2 + 0.4) / 2
        0.06
    """
    chain = canonical(log_initial, log_transition, log_emission, lengths)
    value, *_ = _Evidence.apply(
        chain.log_initial, chain.log_transition, chain.log_emission, lengths, method
    )
    return value


def hmm_viterbi(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
) -> HMMPath:
    """Find the most probable path of states (Viterbi, max-product).

    Args:
        log_initial: log p(z_1 = k) [*batch, K].
        log_transition: [*batch, K, K], or [*batch, T - 1, K, K]; see `hmm_filter`.
        log_emission: log p(y_t | z_t = k) [*batch, T, K].
        lengths: Number of steps of each sequence [*batch]; None where all have T.

    Returns:
        An `HMMPath`; among equally probable paths any one.

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a length is outside 1..T.

    Example:
        >>> half = torch.tensor([0.5, 0.5]).log()
        >>> sticky = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()
        >>> seen = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.9, 0.1]]).log()
        >>> hmm_viterbi(half, sticky, seen).path.tolist()
        [0, 0, 0]
    """
    chain = canonical(log_initial, log_transition, log_emission, lengths)
    steps, states = chain.log_emission.shape[-2:]
    into = chain.log_transition.transpose(-1, -2)  # [..., to, from]
    matrices = into.unbind(-3) if chain.varying else [into] * (steps - 1)
    emission = chain.log_emission.unbind(-2)
    scores, pointers = [chain.log_initial + emission[0]], []
    for matrix, term in zip(matrices, emission[1:], strict=True):
        best, pointer = (scores[-1].unsqueeze(-2) + matrix).max(-1)
        scores.append(best + term)
        pointers.append(pointer)
    valid = chain.valid().expand(*chain.batch, steps)
    final = _at_end(torch.stack(scores, -2), chain)  # [*batch, K]
    log_joint, state = final.max(-1)
    if pointers:  # on padding every state points to itself, so the last one is carried back
        table = torch.stack(pointers, -2)
        own = torch.arange(states, device=table.device)
        pointers = list(torch.where(valid[..., 1:, None], table, own).unbind(-2))
    path = [state.unsqueeze(-1)]
    for pointer in reversed(pointers):
        path.append(pointer.gather(-1, path[-1]))
    states_found = torch.cat(path[::-1], -1)
    kept = valid & (log_joint > -torch.inf).unsqueeze(-1)
    return HMMPath(torch.where(kept, states_found, -1), log_joint)


def hmm_sample_paths(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    n: int,
    *,
    rng: Rng,
    lengths: Tensor | None = None,
) -> Tensor:
    """Draw paths from p(z_1, ..., z_T | y_1, ..., y_T): filter forward, sample backward.

    z_T is drawn from the filtered law, then z_t with probability proportional to
    p(z_t = k | y_1, ..., y_t) p(z_(t+1) | z_t = k).

    Args:
        log_initial: log p(z_1 = k) [*batch, K].
        log_transition: [*batch, K, K], or [*batch, T - 1, K, K]; see `hmm_filter`.
        log_emission: log p(y_t | z_t = k) [*batch, T, K].
        n: Number of paths for each sequence.
        rng: Seed or generator.
        lengths: Number of steps of each sequence [*batch]; None where all have T.

    Returns:
        Paths [n, *batch, T], independent draws; -1 on padding.

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a length is outside 1..T, ``n`` is below 1, or a sequence is impossible.

    Example:
        >>> left_right = torch.tensor([[0.5, 0.5], [0.0, 1.0]]).log()
        >>> start = torch.tensor([1.0, 0.0]).log()
        >>> hmm_sample_paths(start, left_right, torch.zeros(4, 2), 2, rng=0).diff().min() >= 0
        tensor(True)
    """
    if n < 1:
        raise DataError(f"expected n >= 1 paths, got {n}")
    with torch.no_grad():
        chain = canonical(log_initial, log_transition, log_emission, lengths)
        log_forward = _log_forward(chain)
        dead = ~torch.isfinite(_at_end(log_forward, chain).amax(-1))
        if bool(dead.any()):
            where = tuple(dead.nonzero()[0].tolist())
            raise DataError(
                f"sequence {where or ''} has probability zero, so it has no paths; "
                "use check_evidence(hmm_filter(...).log_increment) to see the step"
            )
        return _backward_sample(chain, log_forward, n, rng)


# --------------------------------------------------------------------------- the choice of a path


def _route(chain: Chain, method: Method, *, smooth: bool = False) -> Route:
    """Choose how to compute the messages, by the rule in the module's introduction."""
    if method not in ("auto", "loop", "scan"):
        raise DataError(f"method must be 'auto', 'loop' or 'scan', got {method!r}")
    log_domain = _differentiated(chain)
    if method == "scan":
        return "scan"
    if method == "auto":
        *batch, steps, states = chain.log_emission.shape
        entries = torch.Size(batch).numel() * states**2
        if chain.log_emission.device.type != "cpu":
            return "scan" if steps >= 64 else "log loop" if log_domain else "loop"
        if log_domain and steps >= 32 and entries <= 256:
            return "scan"
        plain = smooth and chain.lengths is None and not chain.varying
        if not log_domain and plain and steps >= 512 and entries <= 256:
            return "blocks"
        if not log_domain and steps >= 1024 and entries <= 16:
            return "scan"
    return "log loop" if log_domain else "loop"


def _differentiated(chain: Chain) -> bool:
    inputs = (chain.log_initial, chain.log_transition, chain.log_emission)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def _select(chain: Chain, chosen: Tensor) -> Chain:
    """The sequences where ``chosen`` [*batch] is True, as one batch dimension."""

    def pick(tensor: Tensor) -> Tensor:
        core = tensor.shape[len(chain.batch) :]
        return tensor.expand(*chain.batch, *core)[chosen]

    lengths = None if chain.lengths is None else chain.lengths[chosen]
    return Chain(
        pick(chain.log_initial),
        pick(chain.log_transition),
        pick(chain.log_emission),
        lengths,
        chain.varying,
    )


def _repair(chain: Chain, reliable: Tensor, result: Any, exactly: Any) -> Any:
    """Recompute the sequences whose scaled messages underflowed; usually there are none."""
    if bool(reliable.all()):
        return result
    exact = exactly(_select(chain, ~reliable))

    def put(into: Tensor | None, values: Tensor | None) -> Tensor | None:
        if into is None or values is None:
            return None
        merged = into.clone()
        merged[~reliable] = values
        return merged

    return type(result)(*(put(a, b) for a, b in zip(result, exact, strict=True)))


# --------------------------------------------------------------------------- results from messages


def _at_end(values: Tensor, chain: Chain) -> Tensor:
    """Values [*batch, T, K] at the last step of each sequence [*batch, K]."""
    if chain.lengths is None:
        return values[..., -1, :]
    index = (chain.lengths - 1)[..., None, None].expand(*chain.batch, 1, values.shape[-1])
    return values.gather(-2, index).squeeze(-2)


def _normalise(log_weights: Tensor) -> Tensor:
    """Probabilities along the last dim; all zero where every weight is."""
    total = logsumexp(log_weights, -1, keepdim=True)
    alive = total > -torch.inf
    return torch.where(alive, log_weights - torch.where(alive, total, 0.0), -torch.inf).exp()


def _log_increment(log_forward: Tensor, chain: Chain) -> Tensor:
    prefix = logsumexp(log_forward, -1)  # log p(y_1, ..., y_t)
    dead = prefix == -torch.inf
    safe = torch.where(dead, 0.0, prefix)
    first = torch.zeros_like(safe[..., :1])
    increment = torch.where(dead, -torch.inf, safe.diff(dim=-1, prepend=first))
    return torch.where(chain.valid(), increment, 0.0)


def _filter_log(chain: Chain, messages: LogMessages) -> HMMFilter:
    forward = messages.forward
    valid = chain.valid().unsqueeze(-1)
    filtered = torch.where(valid, _normalise(forward), 0.0)
    initial = chain.log_initial.exp().unsqueeze(-2).expand(filtered[..., :1, :].shape)
    before, transition = filtered[..., :-1, :], chain.log_transition.exp()
    if chain.varying:
        later = (before.unsqueeze(-2) @ transition).squeeze(-2)
    else:
        later = before @ transition
    predicted = torch.where(valid, torch.cat((initial, later), -2), 0.0)
    log_evidence = logsumexp(_at_end(forward, chain), -1)
    return HMMFilter(log_evidence, _log_increment(forward, chain), filtered, predicted)


def _log_forward(chain: Chain) -> Tensor:
    """Log of the filtered laws up to a constant [*batch, T, K], exact however small they are."""
    if _route(chain, "auto") == "scan":
        return scan_messages(chain, filtering=True).forward
    scaled = scaled_filter(chain)
    if bool(scaled.reliable.all()):
        return scaled.filtered.log()
    return loop_messages(chain).forward


def _smooth_exactly(chain: Chain, pairs: bool) -> HMMSmoother:
    return _smooth_log(chain, loop_messages(chain), pairs)


def _smooth_log(chain: Chain, messages: LogMessages, pairs: bool) -> HMMSmoother:
    forward, backward = messages
    log_evidence = logsumexp(_at_end(forward, chain), -1)
    alive = log_evidence > -torch.inf
    norm = torch.where(alive, log_evidence, 0.0)
    valid = (chain.valid() & alive.unsqueeze(-1)).expand(*chain.batch, forward.shape[-2])
    smoothed = torch.where(valid.unsqueeze(-1), _normalise(forward + backward), 0.0)
    transition = chain.log_transition if chain.varying else chain.log_transition.unsqueeze(-3)
    arriving = (chain.log_emission + backward)[..., 1:, :].unsqueeze(-2)
    leaving = (forward[..., :-1, :] - norm[..., None, None]).unsqueeze(-1)
    each = (leaving + (transition + arriving)).exp()
    each = torch.where(valid[..., 1:, None, None], each, 0.0)
    increment = _log_increment(forward, chain)
    return HMMSmoother(log_evidence, increment, smoothed, each.sum(-3), each if pairs else None)


def _smooth_scaled(chain: Chain, scaled: ScaledSmoother, pairs: bool) -> HMMSmoother:
    smoothed, leaving, arriving = scaled.smoothed, scaled.leaving, scaled.arriving
    transition = chain.log_transition.exp()
    log_evidence = scaled.log_increment.sum(-1)
    each = None
    if pairs or chain.varying:
        matrices = transition if chain.varying else transition.unsqueeze(-3)
        each = leaving.unsqueeze(-1) * matrices * arriving.unsqueeze(-2)
        pair_sum = each.sum(-3)
    else:
        pair_sum = (leaving.transpose(-1, -2) @ arriving) * transition
    each = each if pairs else None
    return HMMSmoother(log_evidence, scaled.log_increment, smoothed, pair_sum, each)


def _backward_sample(chain: Chain, log_forward: Tensor, n: int, rng: Rng) -> Tensor:
    *batch, steps, states = log_forward.shape
    device, dtype = log_forward.device, log_forward.dtype
    generator = stream(rng, "hmm_sample_paths")
    uniform = torch.rand(steps, n, *batch, generator=generator, dtype=dtype).to(device)
    valid = chain.valid().expand(*batch, steps)
    last = _normalise(_at_end(log_forward, chain))
    path = [_invert(last.cumsum(-1).expand(n, *batch, states), uniform[-1])]
    if steps > 1:
        into = chain.log_transition.transpose(-1, -2)  # [..., to, from]
        into = into if chain.varying else into.unsqueeze(-3)
        kernel = _normalise(log_forward[..., :-1, None, :] + into)  # [*batch, T-1, to, from]
        identity = torch.eye(states, dtype=dtype, device=device)
        kernel = torch.where(valid[..., 1:, None, None], kernel, identity)
        tables = kernel.cumsum(-1).unbind(-3)
        for t in range(steps - 2, -1, -1):
            table = tables[t].expand(n, *batch, states, states)
            index = path[-1][..., None, None].expand(n, *batch, 1, states)
            path.append(_invert(table.gather(-2, index).squeeze(-2), uniform[t]))
    drawn = torch.stack(path[::-1], -1)
    return torch.where(valid, drawn, -1)


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Draw indexes by inverting cumulative sums [..., K]; steps of height zero are never drawn."""
    threshold = (uniform * cumulative[..., -1]).unsqueeze(-1)
    return (cumulative <= threshold).sum(-1).clamp_max(cumulative.shape[-1] - 1)


# --------------------------------------------------------------------------- gradients of evidence


def _counts(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    lengths: Tensor | None,
    method: Method,
) -> tuple[Tensor, Tensor, Tensor]:
    """Expected statistics in full batch shape: law of z_1, transition counts, law of every state.

    Without any choice that depends on values, so that ``torch.func.vmap`` can go through.
    """
    varying = log_transition.ndim == log_emission.ndim + 1
    chain = Chain(log_initial, log_transition, log_emission, lengths, varying)
    if _route(chain, method) == "scan":
        messages = scan_messages_by(exact_log_matmul, chain)
    else:
        messages = loop_messages(chain)
    result = _smooth_log(chain, messages, varying)
    counts = result.pairs if result.pairs is not None else result.pair_sum
    return result.smoothed[..., 0, :], counts, result.smoothed


class _Evidence(torch.autograd.Function):
    """Log evidence with its gradient, the expected statistics, computed in the same sweep."""

    @staticmethod
    def forward(
        log_initial: Tensor,
        log_transition: Tensor,
        log_emission: Tensor,
        lengths: Tensor | None,
        method: Method,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        varying = log_transition.ndim == log_emission.ndim + 1
        result = hmm_smoother(
            log_initial, log_transition, log_emission, lengths=lengths, pairs=varying, method=method
        )
        counts = result.pairs if result.pairs is not None else result.pair_sum
        return result.log_evidence, result.smoothed[..., 0, :].clone(), counts, result.smoothed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        log_initial, log_transition, log_emission, lengths, method = inputs
        _, first, counts, smoothed = output
        ctx.mark_non_differentiable(first, counts, smoothed)
        ctx.save_for_backward(
            log_initial, log_transition, log_emission, lengths, first, counts, smoothed
        )
        ctx.method = method

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        log_initial, log_transition, log_emission, lengths, *saved = ctx.saved_tensors
        first, counts, smoothed = _Statistics.apply(
            log_initial, log_transition, log_emission, lengths, ctx.method, *saved
        )
        weight = gradients[0]
        pairs = counts * weight.reshape(weight.shape + (1,) * (counts.ndim - weight.ndim))
        return (
            (first * weight.unsqueeze(-1)).sum_to_size(log_initial.shape),
            pairs.sum_to_size(log_transition.shape),
            (smoothed * weight[..., None, None]).sum_to_size(log_emission.shape),
            None,
            None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _Evidence.apply(*_batched(info.batch_size, in_dims, inputs)), (0, 0, 0, 0)


class _Statistics(torch.autograd.Function):
    """Statistics that are already known; their derivative is found only if it is asked for."""

    @staticmethod
    def forward(
        log_initial: Tensor,
        log_transition: Tensor,
        log_emission: Tensor,
        lengths: Tensor | None,
        method: Method,
        first: Tensor,
        counts: Tensor,
        smoothed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return first.clone(), counts.clone(), smoothed.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.method = inputs[4]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lengths = ctx.saved_tensors

        def counts(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return _counts(a, b, c, lengths, ctx.method)

        pull = torch.func.vjp(counts, *inputs)[1]
        return (*pull(tuple(gradients)), None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        return _Statistics.apply(*_batched(info.batch_size, in_dims, inputs)), (0, 0, 0)


def _batched(size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...]) -> list[Any]:
    """Bring the dimension of ``torch.func.vmap`` to the front of every tensor.

    Initial and transition probabilities (the first two) that do not depend on it keep size 1 there.
    """
    moved = []
    for position, (dim, value) in enumerate(zip(in_dims, inputs, strict=True)):
        if not isinstance(value, Tensor):
            moved.append(value)
        elif dim is not None:
            moved.append(value.movedim(dim, 0))
        elif position < 2:
            moved.append(value.unsqueeze(0))
        else:
            moved.append(value.unsqueeze(0).expand(size, *value.shape))
    return moved

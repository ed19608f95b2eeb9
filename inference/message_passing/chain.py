"""The inputs of a discrete chain: one canonical form, and checks that name what is wrong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError

__all__ = ["Chain", "canonical", "check_chain", "check_evidence", "lengths_from_mask"]


class Chain(NamedTuple):
    """Inputs in canonical form: all batch dimensions present, broadcast ones of size 1.

    Attributes:
        log_initial: log p(z_1 = k) [*batch or 1, K].
        log_transition: log p(z_(t+1) = l | z_t = k) [*batch or 1, K, K], or
            [*batch or 1, T - 1, K, K] where it varies.
        log_emission: log p(y_t | z_t = k) [*batch, T, K]; 0 on padding.
        lengths: Number of steps of each sequence [*batch]; None where all have T.
        varying: Whether the transition varies with time.
    """

    log_initial: Tensor
    log_transition: Tensor
    log_emission: Tensor
    lengths: Tensor | None
    varying: bool

    @property
    def batch(self) -> torch.Size:
        """Shape of the batch of sequences."""
        return self.log_emission.shape[:-2]

    def valid(self) -> Tensor:
        """Whether step t belongs to the sequence [*batch, T]; [T] without lengths."""
        steps = torch.arange(self.log_emission.shape[-2], device=self.log_emission.device)
        if self.lengths is None:
            return torch.ones_like(steps, dtype=torch.bool)
        return steps < self.lengths.unsqueeze(-1)


def canonical(
    log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, lengths: Tensor | None
) -> Chain:
    """Check shapes and bring the inputs of a chain into canonical form.

    Args:
        log_initial: [*batch, K].
        log_transition: [*batch, K, K], or [*batch, T - 1, K, K] when it has exactly one dimension
            more than ``log_emission``.
        log_emission: [*batch, T, K]; it carries all batch dims, to which the others broadcast.
        lengths: [*batch] integers in 1..T, or None.

    Raises:
        ShapeError: the shapes do not fit together, or T is 0.
        DataError: a length is outside 1..T or not an integer.
    """
    if log_emission.ndim < 2 or log_emission.shape[-1] == 0:
        raise ShapeError(f"expected log_emission [*batch, T, K], got {tuple(log_emission.shape)}")
    *batch, steps, states = log_emission.shape
    if steps == 0:
        raise ShapeError(
            f"expected at least one step in log_emission [*batch, T, K], got T = 0 in "
            f"{tuple(log_emission.shape)}; drop empty sequences"
        )
    varying = log_transition.ndim == log_emission.ndim + 1
    square = (steps - 1, states, states) if varying else (states, states)
    name = "[*batch, T - 1, K, K]" if varying else "[*batch, K, K]"
    initial = _broadcastable(log_initial, (states,), batch, "log_initial [*batch, K]")
    transition = _broadcastable(log_transition, square, batch, f"log_transition {name}")
    if lengths is not None:
        lengths = _check_lengths(lengths, batch, steps)
        steps_left = torch.arange(steps, device=log_emission.device) < lengths.unsqueeze(-1)
        log_emission = torch.where(steps_left.unsqueeze(-1), log_emission, 0.0)
    return Chain(initial, transition, log_emission, lengths, varying)


def _broadcastable(tensor: Tensor, core: tuple[int, ...], batch: list[int], name: str) -> Tensor:
    """Return ``tensor`` with all batch dimensions, missing ones of size 1."""
    lead = tensor.shape[: max(tensor.ndim - len(core), 0)]
    fits = tensor.shape[len(lead) :] == core and len(lead) <= len(batch)
    full = (1,) * (len(batch) - len(lead)) + tuple(lead)
    if not fits or any(have not in (1, want) for have, want in zip(full, batch, strict=True)):
        raise ShapeError(
            f"expected {name} with {', '.join(map(str, core))} last and batch dims that broadcast "
            f"to {tuple(batch)} of log_emission, got {tuple(tensor.shape)}"
        )
    return tensor.reshape(full + core)


def _check_lengths(lengths: Tensor, batch: list[int], steps: int) -> Tensor:
    if list(lengths.shape) != batch:
        raise ShapeError(
            f"expected lengths [*batch] = {tuple(batch)} to match log_emission, "
            f"got {tuple(lengths.shape)}"
        )
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise DataError(f"expected integer lengths, got {lengths.dtype}; use lengths_from_mask")
    bad = (lengths < 1) | (lengths > steps)
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise DataError(
            f"lengths must be in 1..{steps}, got {int(lengths[where])} for sequence {_index(where)}"
        )
    return lengths


def lengths_from_mask(mask: Tensor) -> Tensor:
    """Count the leading steps that a mask keeps.

    Args:
        mask: True for steps that exist [*batch, T]: first all the true ones, then the padding.

    Returns:
        Lengths [*batch].

    Raises:
        DataError: the mask is not boolean, has a gap, or keeps no step of a sequence.

    Example:
        >>> lengths_from_mask(torch.tensor([[True, True, False], [True, True, True]])).tolist()
        [2, 3]
    """
    if mask.dtype != torch.bool or mask.ndim < 1:
        raise DataError(
            f"expected a boolean mask [*batch, T], got {mask.dtype} {tuple(mask.shape)}"
        )
    lengths = mask.sum(-1)
    expected = torch.arange(mask.shape[-1], device=mask.device) < lengths.unsqueeze(-1)
    wrong = (expected != mask).any(-1) | (lengths == 0)
    if bool(wrong.any()):
        where = _index(tuple(wrong.nonzero()[0].tolist()))
        raise DataError(
            f"expected a mask [*batch, T] that is True on leading steps and False after, sequence "
            f"{where} is not; give a missing step log_emission = 0 instead"
        )
    return lengths


def check_chain(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    tolerance: float = 1e-6,
) -> None:
    """Check that the inputs are log probabilities; the algorithms themselves check only shapes.

    Args:
        log_initial: [*batch, K].
        log_transition: [*batch, K, K] or [*batch, T - 1, K, K].
        log_emission: [*batch, T, K].
        lengths: [*batch] or None.
        tolerance: Largest deviation of a row sum from 1.

    Raises:
        ShapeError: the shapes do not fit together.
        DataError: a value is NaN or plus infinity, or a row of the initial or the transition
            probabilities does not sum to one.

    Example:
        >>> rows = torch.tensor([[0.5, 0.5], [0.9, 0.3]]).log()
        >>> try:
        ...     check_chain(torch.tensor([0.5, 0.5]).log(), rows, torch.zeros(3, 2))
        ... except DataError as error:
        ...     print(error)
        rows of exp(log_transition) must sum to 1, row 1 sums to 1.2; normalise it
    """
    chain = canonical(log_initial, log_transition, log_emission, lengths)
    for name in ("log_initial", "log_transition", "log_emission"):
        value = getattr(chain, name).detach()
        bad = value.isnan() | (value == torch.inf)
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            raise DataError(
                f"{name} must be a log probability (minus infinity is allowed), got "
                f"{value[where].item()} at index {_index(where)}"
            )
    _check_rows(log_initial.detach(), "log_initial", tolerance)
    _check_rows(log_transition.detach(), "log_transition", tolerance)


def _check_rows(log_rows: Tensor, name: str, tolerance: float) -> None:
    total = log_rows.exp().sum(-1)
    bad = (total - 1).abs() > tolerance
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        row = f"row {_index(where)} sums" if where else "it sums"
        raise DataError(
            f"{'rows of ' if where else ''}exp({name}) must sum to 1, {row} to "
            f"{total[where].item():.6g}; normalise it"
        )


def check_evidence(log_increment: Tensor, *, lengths: Tensor | None = None) -> None:
    """Raise where a sequence has probability zero, naming the sequence and the step.

    Args:
        log_increment: log p(y_t | y_1, ..., y_(t-1)) [*batch, T], a field of the results.
        lengths: Number of steps of each sequence [*batch]; None where all have T.

    Raises:
        DataError: a sequence is impossible, or its evidence is NaN.

    Example:
        >>> try:
        ...     check_evidence(torch.tensor([[-1.0, -2.0], [-1.0, -torch.inf]]))
        ... except DataError as error:
        ...     print(error)  # doctest: +ELLIPSIS
        sequence 1 has probability zero: no state is possible at step 1...
    """
    bad = ~torch.isfinite(log_increment.detach())
    if lengths is not None:
        steps = torch.arange(log_increment.shape[-1], device=log_increment.device)
        bad = bad & (steps < lengths.unsqueeze(-1))
    if not bool(bad.any()):
        return
    *sequence, step = bad.nonzero()[0].tolist()
    name = f"sequence {_index(tuple(sequence))}" if sequence else "the sequence"
    if bool(log_increment[tuple(sequence)][step].isnan()):
        raise DataError(f"{name} has a NaN likelihood at step {step}; check its log_emission")
    raise DataError(
        f"{name} has probability zero: no state is possible at step {step} given the steps before; "
        "check its log_emission against the zeros of log_transition"
    )


def _index(where: tuple[int, ...]) -> str:
    return str(where[0]) if len(where) == 1 else str(where)

"""Plausibilities of states from labels, intervals and probabilities.

A plausibility pl[t, k] in [0, 1] multiplies the emission density of state k at time t (Ramasso and
Denoeux 2014, "Making use of partial knowledge about hidden states in HMMs"): the likelihood of a
model is that of an ordinary one that also emits, at each time, a sign that is seen with
probability pl[t, z_t].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError

__all__ = ["from_intervals", "from_labels", "from_probabilities", "unknown"]


def unknown(steps: int, states: int) -> Tensor:
    """Return ones [time, state]: nothing is known.

    Example:
        >>> unknown(1, 2)
        tensor([[1., 1.]], dtype=torch.float64)
    """
    return torch.ones(steps, states, dtype=torch.float64)


def from_labels(labels: Any, states: int, *, nonspecificity: float | Any = 0.0) -> Tensor:
    """Return 1 for the labelled state and ``nonspecificity`` for every other one.

    Zero makes the labels certain, one makes them worthless, values between weigh them: a state
    other than the labelled one needs an emission density 1 / nonspecificity times as large to be
    taken instead.

    Args:
        labels: State numbers 0 to states - 1 [time]; a negative number where there is no label.
        states: Number of states K.
        nonspecificity: A number in [0, 1], or one for each time [time].

    Returns:
        Plausibilities [time, state].

    Raises:
        DataError: A label or the nonspecificity is out of range.

    Example:
        >>> from_labels([0, -1], 2, nonspecificity=0.1)
        tensor([[1.0000, 0.1000],
                [1.0000, 1.0000]], dtype=torch.float64)
    """
    z = as_tensor(labels, name="labels")
    if z.ndim != 1:
        raise ShapeError(f"labels: expected state numbers [time], got {tuple(z.shape)}")
    whole = z.long()
    bad = (whole != z) | (whole >= states)
    if bool(bad.any()):
        t = int(bad.nonzero()[0])
        raise DataError(
            f"labels: expected whole numbers 0..{states - 1} (negative for none), got {z[t]} at "
            f"time {t}"
        )
    nu = as_tensor(nonspecificity, name="nonspecificity").double()
    if nu.ndim > 1 or (nu.ndim == 1 and len(nu) != len(z)):
        raise ShapeError(
            f"nonspecificity: expected a number or [time={len(z)}], got {tuple(nu.shape)}"
        )
    if not bool(((nu >= 0) & (nu <= 1)).all()):
        raise DataError(f"nonspecificity: expected values in [0, 1], got {nonspecificity}")
    result = nu.expand(len(z))[:, None].repeat(1, states)
    result[torch.arange(len(z)), whole.clamp_min(0)] = 1.0
    result[whole < 0] = 1.0
    return result


def from_intervals(
    steps: int,
    states: int,
    intervals: Sequence[tuple[int, int, int | Sequence[int]]],
    *,
    nonspecificity: float = 0.0,
) -> Tensor:
    """Return plausibilities from statements "between start and stop the state is one of these".

    Args:
        steps: Number of time steps.
        states: Number of states K.
        intervals: (start, stop, state or states): from time start up to, not including, stop.
            Statements about the same time are combined by their product.
        nonspecificity: Plausibility of the states that a statement excludes, in [0, 1].

    Returns:
        Plausibilities [time, state].

    Raises:
        DataError: An interval or a state is out of range, or statements contradict each other.

    Example:
        >>> from_intervals(3, 3, [(0, 2, 0), (2, 3, [1, 2])])
        tensor([[1., 0., 0.],
                [1., 0., 0.],
                [0., 1., 1.]], dtype=torch.float64)
    """
    if not 0 <= nonspecificity <= 1:
        raise DataError(f"nonspecificity: expected a value in [0, 1], got {nonspecificity}")
    result = unknown(steps, states)
    for start, stop, which in intervals:
        chosen = [which] if isinstance(which, int) else list(which)
        inside = 0 <= start < stop <= steps and chosen and all(0 <= k < states for k in chosen)
        if not inside:
            raise DataError(
                f"intervals: expected 0 <= start < stop <= {steps} and states 0..{states - 1}, got "
                f"({start}, {stop}, {which})"
            )
        row = torch.full((states,), float(nonspecificity), dtype=torch.float64)
        row[chosen] = 1.0
        result[start:stop] *= row
    empty = (result.amax(1) <= 0).nonzero()
    if len(empty):
        raise DataError(
            f"intervals: the statements about time {int(empty[0])} exclude every state; raise "
            "nonspecificity or drop one"
        )
    return result


def from_probabilities(probs: Any) -> Tensor:
    """Return rows of probabilities divided by their largest entry.

    A factor common to a row changes no posterior, only the log likelihood by its logarithm.

    Args:
        probs: Probabilities, or any non-negative weights [time, state].

    Raises:
        DataError: A weight is negative or not finite, or a row is all zero.

    Example:
        >>> from_probabilities([[0.25, 0.5, 0.25]])
        tensor([[0.5000, 1.0000, 0.5000]], dtype=torch.float64)
    """
    q = as_tensor(probs, name="probs").double()
    if q.ndim != 2:
        raise ShapeError(f"probs: expected [time, state], got {tuple(q.shape)}")
    bad = ~(torch.isfinite(q) & (q >= 0)).all(1) | (q.amax(1) <= 0)
    if bool(bad.any()):
        t = int(bad.nonzero()[0])
        raise DataError(
            f"probs: expected non-negative weights, not all zero, got {q[t].tolist()} at time {t}"
        )
    return q / q.amax(1, keepdim=True)

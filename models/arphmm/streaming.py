"""Filtering a stream of values with constant memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.model import Values
from probkit.models.arphmm.emission import whitener

__all__ = ["FilterState", "advance", "begin"]


class FilterState(NamedTuple):
    """What a filter carries from one value to the next.

    Attributes:
        log_probs: log p(z_t = k | y_1, ..., y_t) [*batch, K]; the initial law before the first.
        history: The last L values [lag, feature], oldest first.
        log_evidence: log p(y_1, ..., y_t) [*batch].
        seen: Number of values that were filtered (those of the first history apart).
        whitened: [-C^-1 W, C^-1] [*batch, K, D, P + D].
        log_constant: log det C + D / 2 log 2 pi [*batch, K].
        log_transition: [*batch, K, K].
    """

    log_probs: Tensor
    history: Tensor
    log_evidence: Tensor
    seen: int
    whitened: Tensor
    log_constant: Tensor
    log_transition: Tensor

    @property
    def probs(self) -> Tensor:
        """p(z_t = k | y_1, ..., y_t) [*batch, K]."""
        return self.log_probs.exp()


def begin(values: Values, history: Tensor) -> FilterState:
    """Return the state before the first value.

    Args:
        values: [*batch, *site].
        history: The L values before it [lag, feature], oldest first.
    """
    whitened, log_det = whitener(values["weights"], values["covariance"])
    features = whitened.shape[-2]
    log_probs = values["initial"].log()
    return FilterState(
        log_probs=log_probs,
        history=history,
        log_evidence=log_probs.new_zeros(log_probs.shape[:-1]),
        seen=0,
        whitened=whitened,
        log_constant=log_det + 0.5 * features * math.log(2 * math.pi),
        log_transition=values["transition"].log(),
    )


def advance(state: FilterState, y: Tensor, log_plausibility: Tensor | None) -> FilterState:
    """Return the state after one more value.

    Args:
        state: The state before.
        y: The value [feature]; NaN entries make the step count through its plausibility only, and
            so do the next L steps, whose lags it is.
        log_plausibility: What is known of the new state [state]; None for nothing.

    Raises:
        ShapeError: ``y`` has another number of features.
        DataError: No state can have produced the value.
    """
    features = state.whitened.shape[-2]
    if tuple(y.shape) != (features,):
        raise ShapeError(f"filter_step: expected y_t [feature={features}], got {tuple(y.shape)}")
    if bool(y.isinf().any()):
        raise DataError(f"filter_step: expected finite values or NaN, got {y.tolist()}")
    log_probs = state.log_probs
    if state.seen:
        log_probs = torch.logsumexp(log_probs[..., :, None] + state.log_transition, -2)
    row = torch.cat([y.new_ones(1), state.history.flip(0).flatten(), y])
    if not bool(row.isnan().any()):
        squares = (state.whitened @ row).square().sum(-1)
        log_probs = log_probs - 0.5 * squares - state.log_constant
    if log_plausibility is not None:
        log_probs = log_probs + log_plausibility
    total = torch.logsumexp(log_probs, -1)
    if bool((total == -torch.inf).any()):
        raise DataError(
            f"filter_step: no state is possible after value {state.seen + 1}; its plausibility "
            "contradicts the transitions"
        )
    return state._replace(
        log_probs=log_probs - total[..., None],
        history=torch.cat([state.history, y[None]])[1:] if len(state.history) else state.history,
        log_evidence=state.log_evidence + total,
        seen=state.seen + 1,
    )

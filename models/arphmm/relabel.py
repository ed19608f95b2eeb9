"""Undoing label switching: states of every draw are renumbered to agree with one reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from probkit.errors import DataError
from probkit.model import Values
from probkit.sources import Draws

__all__ = ["permute_states", "relabel"]


def relabel(posterior: Any, *, reference: Values | None = None) -> Any:
    """Renumber the states of every draw so that they match a reference.

    The likelihood does not know the numbers of the states, so chains (and draws within a chain) may
    number them differently. Each draw is matched to the reference by the permutation that maximises
    the agreement of its smoothed state probabilities, an assignment problem (Stephens 2000 matches
    to a moving reference; here it is fixed, by default the draw of highest log joint). A model
    whose transitions have an order, or data with informative labels, needs none of this.

    Args:
        posterior: Draws of an :class:`~probkit.models.ARPHMM`.
        reference: Values [*site] that number the states.

    Returns:
        The posterior with renumbered draws.

    Raises:
        DataError: The transition mask is not the same for all numberings.
    """
    model, rows = posterior.model, posterior.context.data
    if not bool(model.mask.all()):
        raise DataError(
            "relabel: states with structural zeros in their transitions are told apart already; "
            "there is nothing to renumber"
        )
    draws = {name: value.flatten(0, 1) for name, value in posterior.draws.items()}
    lead = next(iter(posterior.draws.values())).shape[:2]
    if reference is None:
        best = int(model.log_joint(draws, rows).argmax())
        reference = {name: value[best] for name, value in draws.items()}
    target = model.smooth(reference, rows).smoothed.flatten(0, 1)
    order = torch.stack(
        [
            _matching(target, model.smooth({k: v[s] for k, v in draws.items()}, rows).smoothed)
            for s in range(lead.numel())
        ]
    )
    moved = {
        name: value.reshape(*lead, *value.shape[1:])
        for name, value in permute_states(draws, order).items()
    }
    return replace(posterior, source=Draws(moved))


def _matching(target: Tensor, smoothed: Tensor) -> Tensor:
    """Which state of a draw takes each number of the reference [K]."""
    agreement = target.mT @ smoothed.flatten(0, 1)
    _, columns = linear_sum_assignment(agreement.cpu().numpy(), maximize=True)
    return torch.as_tensor(columns, device=target.device)


def permute_states(values: Values, order: Tensor) -> dict[str, Tensor]:
    """Renumber states: the new state k is the old ``order[..., k]``.

    Args:
        values: Values [draw, *site].
        order: [draw, K].
    """
    draw = torch.arange(len(order), device=order.device)[:, None]
    transition = values["transition"][draw[..., None], order[:, :, None], order[:, None, :]]
    return {
        "initial": values["initial"].gather(-1, order),
        "transition": transition,
        "weights": values["weights"][draw, order],
        "covariance": values["covariance"][draw, order],
    }

"""Predictions: probabilities of clicks on slates, averaged over the posterior or plugged in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.nngp_classification.labels import LabelLaw
from probkit.models.slates.draws import (
    ParameterDraws,
    draw_parameters,
    plug_in_parameters,
    users_in_fit,
)
from probkit.models.slates.ids import FIRST_ITEM, NO_CLICK, PAD
from probkit.predictive import Empirical, Mixture, Predictive
from probkit.rng import Rng, require_rng

if TYPE_CHECKING:
    from probkit.models.slates.log import SlateLog
    from probkit.models.slates.model import SlateGRU
    from probkit.posterior import Posterior

__all__ = ["click_log_probs", "click_probs", "predict_clicks"]

_CELLS = 1 << 24


def click_probs(
    post: Posterior,
    history: SlateLog,
    slate: Any,
    *,
    draws: int | None = 200,
    users: Tensor | None = None,
    rng: Rng | None = None,
) -> Tensor:
    """Return the probability of clicking each slot of a slate, after a history.

    Args:
        post: Posterior of a SlateGRU.
        history: What each user saw and clicked so far.
        slate: Ids [user, slot], slot 0 for no click (1), unused slots 0.
        draws: Draws to average over; None plugs in the centre of the posterior, which is more
            confident than it should be.
        users: Numbers of the users in the fit, see :meth:`ParameterDraws.first_states`.
        rng: Needed with ``draws``.

    Returns:
        [user, slot]; 0 for unused slots and unknown items.
    """
    shown = as_tensor(slate, name="slate").long().to(history.device)
    _check_slate(post.model, history, shown)
    users = users_in_fit(post, history, users)
    with torch.no_grad():
        drawn = _parameters(post, draws, rng)
        return torch.cat(
            [
                drawn.log_probs(
                    drawn.states(history[part], users=None if users is None else users[part]).read[
                        :, :, -1
                    ],
                    shown[part],
                )
                .exp()
                .mean(0)
                for part in _parts(drawn, history, shown.shape[1])
            ]
        )


def click_log_probs(
    post: Posterior,
    log: SlateLog,
    *,
    draws: int | None = 200,
    users: Tensor | None = None,
    rng: Rng | None = None,
) -> Tensor:
    """Return the predictive log probability of every logged click [user, step].

    The state before a step knows the clicks before it, held-out ones too; first states know those
    of training steps alone. Steps with click 0 or 2 have 0.

    Args:
        post: Posterior of a SlateGRU.
        log: Slates and clicks.
        draws: Draws to average the probabilities over; None plugs in the centre.
        users: Numbers of the users in the fit.
        rng: Needed with ``draws``.
    """
    post.model.prepare(log)
    users = users_in_fit(post, log, users)
    found = []
    with torch.no_grad():
        drawn = _parameters(post, draws, rng)
        for part in _parts(drawn, log, log.steps * log.slots):
            some = log[part]
            own = None if users is None else users[part]
            read = drawn.states(some, users=own).read[:, :, :-1]
            log_probs = drawn.log_probs(read, _filled(some.slate))
            slot = some.click_idx.long().expand(drawn.n, -1, -1)[..., None]
            each = log_probs.gather(-1, slot)[..., 0]
            mean = torch.logsumexp(each, 0) - torch.log(each.new_tensor(float(drawn.n)))
            found.append(torch.where(some.observed, mean, 0.0))
    return torch.cat(found)


def predict_clicks(
    model: SlateGRU,
    post: Posterior,
    x: SlateLog,
    *,
    site: str | None = None,
    groups: Mapping[str, Sequence[Any]] | None = None,
    rng: Rng | None = None,
) -> Predictive:
    """Return the predictive law of the slot clicked [user, step], or of users' states.

    Args:
        model: The model.
        post: Its posterior.
        x: The slates, and the clicks so far: the state before a step knows those before it.
        site: None for the slot clicked; "state" for z [user, step + 1, dim], the last after all.
        groups: {"user": labels} name the users of ``x`` where its labels do not.
        rng: Seed or generator.
    """
    x = model.prepare(x)
    if site not in (None, "state"):
        raise CapabilityError(
            f"SlateGRU predicts site=None (the slot clicked) or 'state', got {site!r}; "
            "post.marginals holds the sites"
        )
    if groups is not None:
        from dataclasses import replace

        extra = [name for name in groups if name != "user"]
        if extra or len(groups["user"]) != len(x):
            raise DataError(
                f"groups: expected {{'user': one label for each of {len(x)} users}}, got "
                f"{list(groups)}"
            )
        x = replace(x, labels={**x.labels, "user": list(groups["user"])}, check=False)
    with torch.no_grad():
        rng = require_rng(rng, "predict")
        drawn = draw_parameters(post, model.predictive_draws, rng=rng)
        read = drawn.states(x).read
        if site == "state":
            return Empirical(read)
        log_probs = drawn.log_probs(read[:, :, :-1], _filled(x.slate))
    weights = torch.zeros(drawn.n, dtype=model.dtype, device=log_probs.device)
    return Mixture(LabelLaw(logits=log_probs, validate_args=False), weights, ("user", "step"))


def _parameters(post: Posterior, draws: int | None, rng: Rng | None) -> ParameterDraws:
    if draws is None:
        return plug_in_parameters(post)
    return draw_parameters(post, draws, rng=require_rng(rng, "the average over the posterior"))


def _parts(drawn: ParameterDraws, log: SlateLog, width: int) -> list[slice]:
    """Cut the users so that the largest tensor [n, user, width, dim] stays small."""
    each = drawn.n * max(width, log.steps) * drawn.model.dim
    size = max(_CELLS // each, 1)
    return [slice(first, first + size) for first in range(0, len(log), size)]


def _filled(slate: Tensor) -> Tensor:
    """Slates [user, step, slot] whose empty steps offer no click, so that a law is defined."""
    slate = slate.long().clone()
    slate[..., 0] = torch.where(slate[..., 0] == PAD, NO_CLICK, slate[..., 0])
    return slate


def _check_slate(model: SlateGRU, history: SlateLog, slate: Tensor) -> None:
    if slate.ndim != 2 or len(slate) != len(history):
        raise ShapeError(
            f"click_probs: expected slate [user={len(history)}, slot], got {tuple(slate.shape)}"
        )
    bad = (slate < 0) | (slate >= model.n_items)
    if bool(bad.any()):
        user, slot = (int(i) for i in bad.nonzero()[0])
        raise DataError(
            f"click_probs: expected ids in [0, n_items={model.n_items}), got "
            f"{int(slate[user, slot])} for user {user}, slot {slot}"
        )
    bad = (slate[:, 0] != NO_CLICK)[:, None] | (slate[:, 1:] == NO_CLICK)
    if bool(bad.any()):
        user = int(bad.nonzero()[0][0])
        raise DataError(
            f"click_probs: expected 1 (no click) in slot 0 alone, got {slate[user].tolist()} for "
            f"user {user}"
        )
    ordered = slate.sort(-1).values
    repeats = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= FIRST_ITEM)
    if bool(repeats.any()):
        user = int(repeats.nonzero()[0][0])
        raise DataError(f"click_probs: user {user} has an item twice in the slate; keep one")

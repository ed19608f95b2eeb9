"""Online learning: the last posterior becomes the prior of the next log."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from probkit.driver import infer
from probkit.errors import CapabilityError
from probkit.inference import SVI
from probkit.models.slates.guide import SlateMeanField
from probkit.models.slates.item_law import UNKNOWN
from probkit.models.slates.log import SlateLog
from probkit.models.slates.model import Carried, SlateGRU
from probkit.rng import Rng
from probkit.sampler import Sampler
from probkit.sources import Fitted
from probkit.tree import map_tensors

if TYPE_CHECKING:
    from probkit.posterior import Posterior

__all__ = ["carried_model", "update_posterior"]

_GROUPS = ("group_mean", "group_scale")


def carried_model(post: Posterior) -> SlateGRU:
    """Return the model whose prior is a fitted posterior.

    Sites other than items and their groups take their fitted normals as priors. Items keep their
    hierarchical prior, times the factors of the fit: what the old data said of each item. So groups
    still learn from their items, and unseen items from their groups; where nothing new comes in,
    items stay what they were. The factors have no normaliser, hence neither has the bound of an
    update.

    Raises:
        CapabilityError: The posterior is not one mean-field fit of a SlateGRU.
    """
    model, guide, params = _fit_of(post)
    del guide
    laws = model.laws(post.context.data)
    sites = {
        name: {"loc": params[name]["loc"], "scale": params[name]["log_scale"].exp()}
        for name in laws
        if name not in _GROUPS
    }
    items = params["items"]
    precision = (-2 * items["log_scale"]).exp()
    known = items["log_scale"] < UNKNOWN - 1
    precision = torch.where(known, precision, 0.0)
    carried = Carried(sites, precision, precision * items["loc"])
    return replace(model, carried=carried)


def update_posterior(
    post: Posterior, data: SlateLog, sampler: Sampler | None = None, *, rng: Rng
) -> Posterior:
    """Return the posterior given the old data and a new log.

    The prior is that of :func:`carried_model`, the fit starts from the old one. Under a guide with
    a table of users, those of the new log with a label of the old one begin with their fitted law.
    A user who goes on should come with his earlier steps, ``train`` false, so that his state moves
    with them: each row of a log begins at the user's first state.

    Args:
        post: A mean-field fit of a SlateGRU.
        data: The new log; what the old one said is in ``post``.
        sampler: Options of the fit; None for 500 steps of SVI on 512 users, or all.
        rng: Seed or generator.

    Returns:
        A posterior that can be updated again; ``attrs["updates"]`` counts.
    """
    _, guide, params = _fit_of(post)
    model = carried_model(post)
    start = {name: own for name, own in params.items() if name != "exposure"}
    if guide.users == "table" and "user_init" in start:
        data, start["user_init"] = _carried_users(post, data, params["user_init"], model)
    start = map_tensors(lambda t: t.detach().clone(), start)
    if sampler is None:
        size = min(512, len(data))
        sampler = SVI(steps=500, lr=0.01, particles=1, batch_size=size)
    begun = replace(guide, start=start, freeze=())
    found = infer(model, data, sampler, guide=begun, rng=rng)
    source = found.source
    if isinstance(source, Fitted) and isinstance(source.guide, SlateMeanField):
        # The starting point has done its work; it need not be stored.
        source = replace(source, guide=replace(source.guide, start=None))
    count = int(post.attrs.get("updates", 0)) + 1
    return replace(found, source=source, attrs={**found.attrs, "updates": count})


def _fit_of(post: Posterior) -> tuple[SlateGRU, SlateMeanField, Any]:
    source = post.source
    if not isinstance(source, Fitted) or not isinstance(source.guide, SlateMeanField):
        raise CapabilityError(
            "update: expected a fit with SlateMeanField, whose normals can be a prior, got "
            f"{type(source).__name__}; infer on all logs together instead"
        )
    if source.chains != 1:
        raise CapabilityError(
            f"update: expected one chain, got {source.chains}; infer(..., chains=1)"
        )
    return post.model, source.guide, source.params[0]


def _carried_users(
    post: Posterior, data: SlateLog, table: Any, model: SlateGRU
) -> tuple[SlateLog, dict[str, torch.Tensor]]:
    """The log with each user's prior beside it, and the table to start from."""
    known, asked = post.context.data.labels.get("user"), data.labels.get("user")
    like = table["loc"]
    loc = like.new_zeros(len(data), model.memory)
    log_scale = torch.full_like(loc, math.log(model.prior.user))
    if known is not None and asked is not None:
        number = {label: i for i, label in enumerate(known)}
        pairs = [(new, number[label]) for new, label in enumerate(asked) if label in number]
        if pairs:
            new, old = torch.tensor(pairs, device=like.device).unbind(1)
            loc[new], log_scale[new] = like[old], table["log_scale"][old]
    extra = {**data.extra, "prior_loc": loc, "prior_scale": log_scale.exp()}
    return replace(data, extra=extra, check=False), {"loc": loc, "log_scale": log_scale}

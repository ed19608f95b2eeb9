"""The slate model as a Pyro program, in Pyro's own words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import SigmoidTransform

from probkit.models.slates.ids import FIRST_ITEM
from probkit.models.slates.priors import Law

if TYPE_CHECKING:
    from probkit.models.slates.log import SlateLog
    from probkit.models.slates.model import SlateGRU

__all__ = ["pyro_program"]


def pyro_program(model: SlateGRU) -> Callable[..., dict[str, Tensor]]:
    """Return ``program(log, users=None)``, whose sites and log joint are those of the model.

    It works in ``pyro.infer`` with any guide. ``users`` is the number of all users where ``log``
    is a minibatch of them; first states and clicks both lie in the plate "user", so that both are
    scaled. Sampled likelihoods count as what they estimate, the choice among all items.

    Example:
        >>> from probkit.models.slates import SlateGRU, SlateLog
        >>> log = SlateLog([[[1, 3, 4], [1, 4, 5]]] * 3, [[4, 1]] * 3)
        >>> program = pyro_program(SlateGRU(log.n_items, transition="linear", dim=2))
        >>> sorted(poutine.trace(program).get_trace(log).stochastic_nodes)[:3]
        ['gamma', 'group_mean', 'group_scale']
    """

    def program(log: SlateLog, users: int | None = None) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, law in model.laws(log).items():
            values[name] = pyro.sample(name, _prior(law))
        mean, spread = model.item_moments(values)
        values["items"] = pyro.sample("items", dist.Normal(mean, spread).to_event(2))
        if model.carried is not None:
            pyro.factor("carried", model.carried.log_factor(values["items"]))
        total = len(log) if users is None else users
        with pyro.plate("user", total, subsample=torch.arange(len(log), device=log.device)):
            if model.user_init == "normal":
                law = model.user_law(log)
                own = dist.Normal(law.loc.expand(law.shape), law.scale.expand(law.shape))
                values["user_init"] = pyro.sample("user_init", own.to_event(1))
            _clicks(model, values, log)
        return values

    return program


def _prior(law: Law) -> dist.TorchDistribution:
    """A prior in Pyro's distributions, all its entries one event."""
    found: dist.TorchDistribution
    if law.half:
        found = dist.HalfNormal(law.scale)
    elif law.space == "positive":
        found = dist.LogNormal(law.loc, law.scale)
    elif law.space == "unit":
        found = dist.TransformedDistribution(dist.Normal(law.loc, law.scale), [SigmoidTransform()])
    else:
        found = dist.Normal(law.loc, law.scale)
    return found.expand(torch.Size(law.shape)).to_event(len(law.shape))


def _clicks(model: SlateGRU, values: dict[str, Tensor], log: SlateLog) -> None:
    """Observe the clicks of the users, those of each kind of likelihood apart."""
    counted = log.mask("train")
    read = model.states(values, log).read[..., :-1, :]
    tempered = poutine.scale(scale=1 / model.temperature)
    for kind in ("slate", "full"):
        types = [
            i for i, name in enumerate(model.by_type) if (name == "slate") == (kind == "slate")
        ]
        mine = counted & torch.isin(log.interaction_type, torch.tensor(types, device=log.device))
        if not bool(mine.any()):
            continue
        if kind == "slate":
            logits = model.slate_logits(values, read, log.slate)
            chosen = log.click_idx.long()
        else:
            logits = model.catalogue_logits(values, read, log.slate_lengths.long())
            chosen = (log.click.long() - FIRST_ITEM + 1).clamp_min(0)
        law = dist.Categorical(logits=_proper(logits)).mask(mine).to_event(1)
        with tempered if model.temperature != 1 else contextlib.nullcontext():
            pyro.sample(f"click_{kind}", law, obs=chosen)


def _proper(logits: Tensor) -> Tensor:
    """Logits of slots that are not there as the least finite number: Pyro's checks refuse -inf."""
    return logits.clamp_min(torch.finfo(logits.dtype).min)

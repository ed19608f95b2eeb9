"""What a minibatch needs of the item table: its choices, the rows they touch, and their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probkit.models.slates.choices import Choices, Likelihood, sampled_choices, slate_choices
from probkit.models.slates.ids import FIRST_ITEM, NO_CLICK

if TYPE_CHECKING:
    from probkit.models.slates.log import SlateLog
    from probkit.models.slates.model import SlateGRU

__all__ = ["BatchPlan", "inclusion", "plan_batch", "users_of_items"]

_CELLS = 1 << 24


@dataclass(frozen=True)
class BatchPlan:
    """The choices of a batch and the rows of the item table that its bound needs.

    Attributes:
        choices: (likelihood, choices) for each kind of likelihood with any.
        clicks: Id clicked [user, step], a real one everywhere; see ``moves``.
        moves: Whether a real item was clicked [user, step].
        trained: Whether that click was at a training step [user, step].
        rows: Ids needed [row], in ascending order; None for all.
        weight: Weight of each row's divergence [row]; None for 1.
    """

    choices: list[tuple[Likelihood, Choices]]
    clicks: Tensor
    moves: Tensor
    trained: Tensor
    rows: Tensor | None = None
    weight: Tensor | None = None

    @property
    def touched(self) -> list[Tensor]:
        """Ids in the likelihood, drawn ones included."""
        return [self.clicks, *(choice.ids for _, choice in self.choices)]


def plan_batch(model: SlateGRU, log: SlateLog, rng: torch.Generator) -> BatchPlan:
    """Collect the choices of a batch; items of sampled likelihoods are drawn here.

    Args:
        model: The model.
        log: The users of the batch.
        rng: Stream of the drawn items.
    """
    counted = log.mask("train")
    click = log.click.long()
    moves = click >= FIRST_ITEM
    found: list[tuple[Likelihood, Choices]] = []
    for kind in ("slate", "sampled", "full"):
        types = [i for i, name in enumerate(model.by_type) if name == kind]
        if not types:
            continue
        mine = counted
        if len(types) < 3:
            mine = counted & sum(log.interaction_type == i for i in types).bool()
        if kind == "sampled":
            choices = sampled_choices(log, mine, model.negatives, model.log_q, model.dtype, rng)
        else:
            choices = slate_choices(log, mine, model.dtype)
        if kind == "full":  # Only states, lengths and clicks count; the items are all.
            user, step = choices.user, choices.step
            clicked = log.click[user, step].long()
            chosen = torch.where(clicked == NO_CLICK, 0, clicked - FIRST_ITEM + 1)
            choices = choices._replace(chosen=chosen, ids=choices.ids[:, :0])
        if len(choices.user):
            found.append((kind, choices))
    return BatchPlan(found, click.masked_fill(~moves, FIRST_ITEM), moves, moves & log.train)


def distinct(ids: list[Tensor], size: int) -> Tensor:
    """Return the distinct values [row] of ids below ``size``, in ascending order.

    A mark for each id is cheaper than sorting: one byte an item.
    """
    mark = torch.zeros(size, dtype=torch.bool, device=ids[0].device)
    for part in ids:
        mark[part.flatten()] = True
    return mark.nonzero()[:, 0]


class Places:
    """Where ids stand among the rows at hand."""

    def __init__(self, rows: Tensor | None, size: int) -> None:
        self._place: Tensor | None = None
        if rows is not None:
            # Only the entries of rows are ever read.
            self._place = torch.empty(size, dtype=torch.int64, device=rows.device)
            self._place[rows] = torch.arange(len(rows), device=rows.device)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the position of each id [*ids]."""
        if self._place is None:
            return ids
        return self._place.index_select(0, ids.flatten()).view(ids.shape)


def surely_touched(model: SlateGRU, plan: BatchPlan) -> Tensor:
    """Return the ids [row] that a batch touches whatever items are drawn."""
    shown = [c.ids[c.offset == 0] for kind, c in plan.choices if kind == "slate"]
    return distinct([plan.clicks[plan.moves], *shown], model.n_items)


def users_of_items(model: SlateGRU, log: SlateLog) -> Tensor:
    """Return by how many users' batches each id is surely touched [item].

    An item in slates that count, or clicked, of n users is in a batch of B of U users with
    probability :func:`inclusion`.
    """
    counts = torch.zeros(model.n_items, dtype=torch.int64, device=log.device)
    size = max(_CELLS // (log.steps * (log.slots + 1)), 1)
    slate_types = torch.tensor([kind == "slate" for kind in model.by_type], device=log.device)
    for first in range(0, len(log), size):
        part = log[first : first + size]
        shown = part.mask("train") & slate_types[part.interaction_type.long()]
        ids = torch.where(shown[..., None], part.slate, 0).flatten(1)
        ids = torch.cat([ids, part.click], 1).sort(1).values
        first_time = torch.ones_like(ids, dtype=torch.bool)
        first_time[:, 1:] = ids[:, 1:] != ids[:, :-1]
        counts += torch.bincount(ids[first_time & (ids >= FIRST_ITEM)], minlength=model.n_items)
    return counts


def inclusion(users_of: Tensor, users: int, batch: int) -> Tensor:
    """Return the probability [row] that a batch holds one of an item's users.

    1 - C(U - n, B) / C(U, B) for n users of U and a batch of B drawn without replacement.

    Args:
        users_of: n [row].
        users: U.
        batch: B.

    Example:
        >>> inclusion(torch.tensor([0, 1, 4]), 4, 2)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
    """
    others = (users - users_of).double()
    whole = torch.lgamma(torch.tensor([users + 1.0, users - batch + 1.0], dtype=torch.float64))
    possible = others >= batch
    rest = (others - batch).clamp_min(0)
    log_none = torch.lgamma(others + 1) - torch.lgamma(rest + 1) - (whole[0] - whole[1])
    return torch.where(possible, torch.expm1(log_none.clamp_max(0)).abs(), 1.0)

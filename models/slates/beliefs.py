"""What a posterior believes of items and users, in the form that recommending needs.

Draws are functions of (seed, row): a row is one draw for one user, and its noise does not depend
on which other rows are drawn with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.model import Batch
from probkit.models.slates.guide import SlateMeanField
from probkit.models.slates.ids import FIRST_ITEM, NO_CLICK, PAD
from probkit.models.slates.log import SlateLog
from probkit.models.slates.model import SlateGRU
from probkit.models.slates.noise import row_noise
from probkit.models.slates.search import Catalogue, Known, TopItems, top_drawn, top_of_means
from probkit.models.slates.transitions import unroll
from probkit.sources import Fitted

if TYPE_CHECKING:
    from probkit.posterior import Posterior

__all__ = ["Beliefs", "History", "as_history", "beliefs_of"]

_ITEMS, _USERS, _SITES, _CHOICE = 0, 101, 202, 303  # keep kinds of noise apart
_KEPT = 256  # draws that stand for a posterior without a guide of ours


class History(NamedTuple):
    """What users did before.

    Attributes:
        log: Their steps.
        users: Number of each user in the log that was fitted [user]; None where no user has a law
            of their own.
    """

    log: SlateLog
    users: Tensor | None


class Beliefs(Protocol):
    """What is believed of items and users."""

    @property
    def model(self) -> SlateGRU:
        """The model."""
        ...

    def best(self, history: History, pool: Tensor, size: int, exclude: Tensor) -> TopItems:
        """Return the best items [user, rank] at the posterior mean."""
        ...

    def drawn(
        self,
        history: History,
        row: Tensor,
        pool: Tensor,
        size: int,
        exclude: Tensor,
        seed: int,
        temperature: float,
    ) -> TopItems:
        """Return the best items [user, draw, rank] in draws of the posterior.

        Args:
            history: Users.
            row: Number of each draw [user, draw], what its noise belongs to.
            pool: Ids of the candidates, in rising order.
            size: Items for each draw.
            exclude: Ids that a user must not have [user, excluded]; 0 for none.
            seed: Names the draws.
            temperature: The posterior is raised to the power 1 / temperature.
        """
        ...


def as_history(history: Any, model: SlateGRU) -> SlateLog:
    """Return a history as a log: a log as it is, or the ids clicked by each user.

    Args:
        history: A SlateLog, or ids clicked [user, step] (1 for no click, 0 for no step), or a list
            of lists of them; an empty list is a user without history.
        model: The model, for the number of ids.
    """
    if isinstance(history, SlateLog):
        if history.n_items > model.n_items:
            raise DataError(
                f"recommend: the history has ids below {history.n_items}, the model knows "
                f"{model.n_items}"
            )
        return history
    rows = history.tolist() if isinstance(history, Tensor) else history
    if not isinstance(rows, Sequence) or len(rows) == 0 or not all(_is_row(row) for row in rows):
        raise DataError(
            "recommend: expected history as a SlateLog or the ids clicked by each user, as in "
            "[[3, 7], []]"
        )
    steps = max([len(row) for row in rows] + [1])
    click = torch.tensor([[*row, *[PAD] * (steps - len(row))] for row in rows])
    bad = (click < 0) | (click >= model.n_items)
    if bool(bad.any()):
        user, step = bad.nonzero()[0].tolist()
        raise DataError(
            f"recommend: expected ids in [0, n_items={model.n_items}), got "
            f"{int(click[user, step])} for user {user} at step {step}"
        )
    shown = torch.where(click == PAD, PAD, NO_CLICK)
    second = torch.where(click > NO_CLICK, click, PAD)
    slot = (click > NO_CLICK).long()
    slate = torch.stack([shown, second], -1)
    return SlateLog(slate, click, slot, n_items=model.n_items, check=False)


def _is_row(row: Any) -> bool:
    return isinstance(row, Sequence | Tensor) and not isinstance(row, str)


def beliefs_of(post: Posterior) -> Beliefs:
    """Return what a posterior of a :class:`SlateGRU` believes.

    A mean-field fit gives its tables; of any other posterior 256 draws are kept.
    """
    model = post.model
    if not isinstance(model, SlateGRU):
        raise CapabilityError(
            f"recommend: expected a posterior of SlateGRU, got one of {type(model).__name__}"
        )
    source = post.source
    if isinstance(source, Fitted) and isinstance(source.guide, SlateMeanField):
        laws = model.laws(_shapes_of(post))
        return _FittedBeliefs(model, source.guide, source.params[0], laws)
    values = post.sample(_KEPT, rng=0)
    return _DrawnBeliefs(model, {name: value for name, value in values.items()})


def _shapes_of(post: Posterior) -> SlateLog:
    """A log with as many slots as the one that was fitted."""
    data = post.context.data
    example = getattr(data, "example", data)
    if not isinstance(example, SlateLog):
        raise CapabilityError(
            "recommend: expected a posterior that holds the log it was fitted to, got "
            f"{type(example).__name__}"
        )
    return example


def _moves(log: SlateLog) -> tuple[Tensor, Tensor]:
    """Ids clicked [user, step], and which of them move a state."""
    click = log.click.long()
    return click, click >= FIRST_ITEM


def _blocks(users: int, entries: int) -> list[slice]:
    size = max((1 << 22) // max(entries, 1), 1)
    return [slice(first, min(first + size, users)) for first in range(0, users, size)]


# ---------------------------------------------------------------- a mean-field fit


@dataclass(frozen=True, eq=False)
class _FittedBeliefs:
    """Beliefs from the tables of a mean-field fit."""

    model: SlateGRU
    guide: SlateMeanField
    params: Mapping[str, Any]
    laws: Mapping[str, Any]

    def _catalogue(self, pool: Tensor, temperature: float) -> Catalogue:
        items = self.params["items"]
        scale = items["log_scale"].exp() * math.sqrt(temperature)
        return Catalogue(self.model.score, items["loc"], scale, pool.to(scale.device))

    def _first_states(self, history: History) -> tuple[Tensor, Tensor]:
        """Means and standard deviations [user, hidden] of first states."""
        model, log = self.model, history.log
        like = self.params["items"]["loc"]
        if model.user_init == "zero":
            zero = like.new_zeros(len(log), model.memory)
            return zero, zero
        return self.guide.user_laws(self.params, model, Batch(log, history.users))

    def best(self, history: History, pool: Tensor, size: int, exclude: Tensor) -> TopItems:
        cat = self._catalogue(pool, 1.0)
        values = {name: law.constrain(self.params[name]["loc"]) for name, law in self.laws.items()}
        parts = []
        for part in _blocks(len(history.log), history.log.steps * self.model.dim):
            mine = _part(history, part)
            click, moves = _moves(mine.log)
            start, _ = self._first_states(mine)
            state = unroll(self.model.transition, values, cat.loc[click], moves, start)
            parts.append(top_of_means(cat, state.read[:, -1], size, exclude[part]))
        return TopItems(*(torch.cat(found) for found in zip(*parts, strict=True)))

    def drawn(
        self,
        history: History,
        row: Tensor,
        pool: Tensor,
        size: int,
        exclude: Tensor,
        seed: int,
        temperature: float,
    ) -> TopItems:
        cat = self._catalogue(pool, temperature)
        cat.check(size, exclude)
        wide = row.shape[1] * (history.log.steps * self.model.dim + self._site_entries())
        parts = []
        for part in _blocks(len(row), wide):
            mine = _part(history, part)
            click, _ = _moves(mine.log)
            state, vectors = self._states(mine, row[part], cat, seed, temperature)
            known = Known(torch.where(click >= FIRST_ITEM, click, PAD), vectors)
            parts.append(
                top_drawn(cat, state, row[part], size, exclude[part], known, seed + _ITEMS)
            )
        return TopItems(*(torch.cat(found) for found in zip(*parts, strict=True)))

    def _states(
        self, history: History, row: Tensor, cat: Catalogue, seed: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Drawn states [user, draw, dim], and vectors [user, draw, step, dim] of clicked items."""
        users, draws = row.shape
        click, moves = _moves(history.log)
        ids = click.repeat_interleave(draws, 0)
        rows = row.flatten()
        counter = rows[:, None] * self.model.n_items + ids
        noise = row_noise(seed + _ITEMS, counter.flatten(), self.model.dim, dtype=cat.loc.dtype)
        vectors = cat.loc[ids] + cat.scale[ids] * noise.unflatten(0, tuple(ids.shape))
        mean, scale = self._first_states(history)
        noise = row_noise(seed + _USERS, rows, self.model.memory, dtype=mean.dtype)
        spread = math.sqrt(temperature) * scale.repeat_interleave(draws, 0) * noise
        start = mean.repeat_interleave(draws, 0) + spread
        read = unroll(
            self.model.transition,
            self._sites(rows, seed, temperature),
            vectors[:, None],
            moves.repeat_interleave(draws, 0)[:, None],
            start[:, None],
        ).read
        return read[:, 0, -1].unflatten(0, (users, draws)), vectors.unflatten(0, (users, draws))

    def _moving(self) -> list[str]:
        """The sites that move states."""
        return [name for name in self.laws if name == "gamma" or name.startswith("W_")]

    def _site_entries(self) -> int:
        return sum(self.params[name]["loc"].numel() for name in self._moving())

    def _sites(self, rows: Tensor, seed: int, temperature: float) -> dict[str, Tensor]:
        """Draws [row, *site] of the sites that move states."""
        names = self._moving()
        sizes = [self.params[name]["loc"].numel() for name in names]
        if not names:
            return {}
        like = self.params["items"]["loc"]
        noise = row_noise(seed + _SITES, rows, sum(sizes), dtype=like.dtype)
        found = {}
        for name, own in zip(names, noise.split(sizes, 1), strict=True):
            loc, log_scale = self.params[name]["loc"], self.params[name]["log_scale"]
            spread = math.sqrt(temperature) * log_scale.exp()
            found[name] = self.laws[name].constrain(loc + spread * own.reshape(-1, *loc.shape))
        return found


def _part(history: History, part: slice) -> History:
    """A block of users."""
    if part.start == 0 and part.stop >= len(history.log):
        return history
    users = None if history.users is None else history.users[part]
    return History(history.log[part], users)


# ---------------------------------------------------------------- any other posterior


@dataclass(frozen=True, eq=False)
class _DrawnBeliefs:
    """Beliefs from draws of all sites: each row takes one of them."""

    model: SlateGRU
    values: Mapping[str, Tensor]

    def best(self, history: History, pool: Tensor, size: int, exclude: Tensor) -> TopItems:
        mean = {name: value.mean(0, keepdim=True) for name, value in self.values.items()}
        state = self._states(history, torch.zeros(len(history.log), 1).long(), mean)
        cat = self._catalogue(mean["items"][0], pool)
        return top_of_means(cat, state[:, 0], size, exclude)

    def drawn(
        self,
        history: History,
        row: Tensor,
        pool: Tensor,
        size: int,
        exclude: Tensor,
        seed: int,
        temperature: float,
    ) -> TopItems:
        if temperature != 1.0:
            raise CapabilityError(
                "recommend: draws of a posterior cannot be tempered; expected temperature=1, or a "
                "mean-field fit"
            )
        count = len(self.values["items"])
        noise = row_noise(seed + _CHOICE, row.flatten(), 1, dtype=torch.float64)[:, 0]
        choice = (torch.special.ndtr(noise) * count).long().clamp_max(count - 1).reshape(row.shape)
        state = self._states(history, choice, self.values)
        flat_state, flat = state.flatten(0, 1), choice.flatten()
        wide = exclude.repeat_interleave(row.shape[1], 0)
        ids = torch.zeros(len(flat), size, dtype=torch.int64)
        found = flat_state.new_zeros(len(flat), size)
        for draw in flat.unique().tolist():
            mine = flat == draw
            cat = self._catalogue(self.values["items"][draw], pool)
            top = top_of_means(cat, flat_state[mine], size, wide[mine])
            ids[mine], found[mine] = top.ids, top.scores
        return TopItems(ids.unflatten(0, row.shape), found.unflatten(0, row.shape))

    def _catalogue(self, items: Tensor, pool: Tensor) -> Catalogue:
        return Catalogue(self.model.score, items, torch.zeros_like(items), pool)

    def _states(self, history: History, choice: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """States [user, draw, dim] in the draws ``choice`` [user, draw]."""
        click, moves = _moves(history.log)
        draws, flat = choice.shape[1], choice.flatten()
        vectors = values["items"][flat[:, None], click.repeat_interleave(draws, 0)]
        if self.model.user_init == "zero":
            start = vectors.new_zeros(len(flat), self.model.memory)
        else:
            numbers = history.users
            if numbers is None:  # All users of the log that was fitted.
                numbers = torch.arange(len(click), device=click.device)
            start = values["user_init"][flat, numbers.repeat_interleave(draws)]
        sites = {
            name: value[flat]
            for name, value in values.items()
            if name == "gamma" or name.startswith("W_")
        }
        read = unroll(
            self.model.transition,
            sites,
            vectors[:, None],
            moves.repeat_interleave(draws, 0)[:, None],
            start[:, None],
        ).read
        return read[:, 0, -1].unflatten(0, choice.shape)

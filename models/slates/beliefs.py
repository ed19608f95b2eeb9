"""The best items for users: at the posterior mean, and in draws of the posterior.

A row is one draw for one user: what it finds does not depend on which other rows are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from probkit.models.slates.draws import (
    FitDraws,
    RowDraws,
    StoredDraws,
    best_chain,
    chain_of,
    model_of,
    moving_sites,
    row_draws,
    states_by_row,
)
from probkit.models.slates.history import History
from probkit.models.slates.ids import FIRST_ITEM, PAD
from probkit.models.slates.item_law import conditional_moments
from probkit.models.slates.search import (
    Catalogue,
    Followed,
    Known,
    TopItems,
    top_drawn,
    top_of_means,
)

if TYPE_CHECKING:
    from probkit.models.slates.model import SlateGRU
    from probkit.posterior import Posterior

__all__ = ["Beliefs"]

_ENTRIES = 1 << 22  # of what is held of a block of users
_NAMES = ("group_mean", "group_scale")


@dataclass(frozen=True, eq=False)
class Beliefs:
    """What a posterior of a SlateGRU believes of items and users.

    Attributes:
        post: The posterior.
    """

    post: Posterior

    @property
    def model(self) -> SlateGRU:
        """The model."""
        return model_of(self.post)

    def best(self, history: History, pool: Tensor, size: int, exclude: Tensor) -> TopItems:
        """Return the best items [user, rank] at the posterior mean.

        Of several fits the one with the highest bound is taken.

        Args:
            history: Users.
            pool: Ids of the candidates, in rising order.
            size: Items for each user.
            exclude: Ids that a user must not have [user, excluded]; 0 for none.
        """
        draws = row_draws(self.post, None)
        own = draws[best_chain(self.post)] if len(draws) > 1 else draws[0]
        cat = _fixed(self.model, own, pool, torch.zeros((), dtype=torch.int64))
        parts = []
        for part in _blocks(len(history.log), history.log.steps * self.model.dim):
            mine = history.part(part)
            rows = torch.zeros(len(mine.log), dtype=torch.int64, device=pool.device)
            state, _ = _states(self.model, own, mine, rows, cat)
            parts.append(top_of_means(cat, state, size, exclude[part]))
        return _joined(parts)

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
            temperature: Standard deviations of draws are multiplied by its root.
        """
        chains = row_draws(self.post, seed, temperature=temperature)
        owner = chain_of(row.flatten(), seed, len(chains)).view(row.shape)
        if len(chains) == 1:
            return self._of_chain(chains[0], history, row, pool, size, exclude, seed)
        ids = torch.zeros(*row.shape, size, dtype=torch.int64, device=pool.device)
        scores = torch.zeros(*row.shape, size, dtype=self.model.dtype, device=pool.device)
        for k, own in enumerate(chains):
            user, draw = (owner == k).nonzero(as_tuple=True)
            if not len(user):
                continue
            numbers = None if history.users is None else history.users[user]
            mine = History(history.log.take(user), numbers)
            asked = (row[user, draw][:, None], pool, size, exclude[user], seed)
            found = self._of_chain(own, mine, *asked)
            ids[user, draw], scores[user, draw] = found.ids[:, 0], found.scores[:, 0]
        return TopItems(ids, scores)

    def _of_chain(
        self,
        own: FitDraws | StoredDraws,
        history: History,
        row: Tensor,
        pool: Tensor,
        size: int,
        exclude: Tensor,
        seed: int,
    ) -> TopItems:
        """The best items in draws of one fit, or in stored draws."""
        if isinstance(own, StoredDraws):
            return self._of_stored(own, history, row, pool, size, exclude)
        cat = _centred(self.model, own, pool)
        cat.check(size, exclude)
        parts = []
        for part in _blocks(len(row), row.shape[1] * self._entries(own, history)):
            mine, rows = history.part(part), row[part].flatten()
            held = _following(self.model, own, cat, rows)
            state, vectors = _states(self.model, own, mine, rows, held)
            click = mine.log.click.long()
            shape = row[part].shape
            known = Known(torch.where(click >= FIRST_ITEM, click, PAD), vectors.unflatten(0, shape))
            asked = (row[part], size, exclude[part], known, seed)
            parts.append(top_drawn(held, state.unflatten(0, shape), *asked))
        return _joined(parts)

    def _entries(self, own: FitDraws, history: History) -> int:
        """Numbers that a row draws before it looks at the catalogue."""
        names = [*moving_sites(list(own.laws)), *(n for n in _NAMES if n in own.laws)]
        sites = sum(own.params[name]["loc"].numel() for name in names)
        return history.log.steps * self.model.dim + sites

    def _of_stored(
        self,
        own: StoredDraws,
        history: History,
        row: Tensor,
        pool: Tensor,
        size: int,
        exclude: Tensor,
    ) -> TopItems:
        """The best items in the stored draw of each row, draw by draw."""
        rows = row.flatten()
        user = torch.arange(len(row), device=rows.device).repeat_interleave(row.shape[1])
        ids = torch.zeros(len(rows), size, dtype=torch.int64, device=pool.device)
        scores = torch.zeros(len(rows), size, dtype=self.model.dtype, device=pool.device)
        choice = own.choice(rows)
        for draw in choice.unique():
            mine = (choice == draw).nonzero()[:, 0]
            who = user[mine]
            numbers = None if history.users is None else history.users[who]
            cat = _fixed(self.model, own, pool, rows[mine[0]])
            asked = History(history.log.take(who), numbers)
            state, _ = _states(self.model, own, asked, rows[mine], cat)
            ids[mine], scores[mine] = top_of_means(cat, state, size, exclude[who])
        return TopItems(ids.unflatten(0, row.shape), scores.unflatten(0, row.shape))


# ---------------------------------------------------------------- catalogues


def _fixed(model: SlateGRU, own: RowDraws, pool: Tensor, row: Tensor) -> Catalogue:
    """The catalogue at one row's vectors."""
    ids = torch.arange(model.n_items, device=pool.device)
    vectors = own.items(row.to(pool.device)[None], ids[None])[0]
    return Catalogue(model.score, vectors, torch.zeros_like(vectors), pool)


def _centred(model: SlateGRU, own: FitDraws, pool: Tensor) -> Catalogue:
    """The catalogue of a fit at the centre of the groups."""
    items = own.params["items"]
    ids = torch.arange(model.n_items, device=pool.device)
    groups = model.group_moments(own.guide.group_centres(own.params, model), ids)
    loc, scale = conditional_moments(
        items["loc"], items["log_scale"], groups.mean[groups.group], groups.spread[groups.group]
    )
    return Catalogue(model.score, loc, own.widening * scale, pool)


def _following(model: SlateGRU, own: FitDraws, cat: Catalogue, rows: Tensor) -> Catalogue:
    """The catalogue with the groups of each row drawn; under the flat prior there are none."""
    if model.item_prior == "flat":
        return cat
    items = own.params["items"]
    ids = torch.arange(model.n_items, device=rows.device)
    usual = model.group_moments(own.guide.group_centres(own.params, model), ids)
    drawn = own.groups(rows, ids)
    followed = Followed(
        items["loc"],
        items["log_scale"],
        usual.group,
        (usual.mean, usual.spread),
        drawn.mean,
        drawn.spread,
        own.widening,
    )
    return Catalogue(cat.kind, cat.loc, cat.scale, cat.pool, followed)


# ---------------------------------------------------------------- states


def _states(
    model: SlateGRU, own: RowDraws, history: History, rows: Tensor, cat: Catalogue
) -> tuple[Tensor, Tensor]:
    """States [row, dim] after all steps, and vectors [row, step, dim] of the items clicked.

    Rows come user after user, equally many for each.
    """
    log, numbers = history
    copies = len(rows) // len(log)
    click = log.click.long().repeat_interleave(copies, 0)
    vectors = own.items(rows, click)
    if isinstance(own, FitDraws):
        mean, scale = own.user_laws(log, numbers)
        wide = (table.repeat_interleave(copies, 0) for table in (mean, scale))
        start = own.users_given(rows, *wide)
    else:
        start = own.users(rows, log, _numbers(numbers, len(rows), rows.device))
    names = list(own.laws) if isinstance(own, FitDraws) else list(own.values)  # type: ignore[attr-defined]
    sites = own.sites(rows, moving_sites(names))
    moves = click >= FIRST_ITEM
    return states_by_row(model, sites, vectors, moves, start), vectors


def _numbers(numbers: Tensor | None, users: int, device: torch.device) -> Tensor:
    """Users' numbers in the fit; all of them in order where nothing is said."""
    return torch.arange(users, device=device) if numbers is None else numbers


def _blocks(users: int, entries: int) -> Iterator[slice]:
    size = max(_ENTRIES // max(entries, 1), 1)
    for first in range(0, users, size):
        yield slice(first, min(first + size, users))


def _joined(parts: list[TopItems]) -> TopItems:
    return TopItems(*(torch.cat(found) for found in zip(*parts, strict=True)))

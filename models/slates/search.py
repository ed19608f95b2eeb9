"""The best items of a large catalogue: for fixed vectors, and for draws of uncertain ones.

A catalogue of a million items is never drawn whole. For a state z and an item with vector
v ~ N(m, diag(s^2)) only the part of v - m along one direction can raise the score: along z for dot
scores, towards z for l2 scores, where |z - v| >= |z - m| - u.(v - m) with u the unit vector from m
to z. That part is one standard normal e times at most max(s) (times |z|). So

1. which items have e above a quantile c is drawn first (a few in ten thousand, found by the gaps
   between them);
2. all others have a score of at most score(m) + c max(s): one matrix product tells which of them
   can still beat the best of a few promising items that are scored at the outset;
3. for these e is drawn below c, for what is left then the other directions, given e.

Where items follow their groups, m and s belong to a row: its groups are drawn first. The product
then takes m at the centre of the groups, and a bound on how far the draws of a block of rows move
it (:class:`Followed`).

This is exact: the items found have the law that they have when all vectors are drawn. All noise
is a function of (seed, row, item), so that it does not matter how the work is cut into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.slates.item_law import conditional_moments
from probkit.models.slates.noise import row_noise
from probkit.models.slates.scoring import Score, scores

__all__ = ["Catalogue", "Followed", "Known", "TopItems", "top_drawn", "top_of_means"]

_EXHAUSTIVE = 4096  # candidates up to which all vectors are drawn
_TAIL = 5e-4  # share of items with e above the quantile c
_PROMISING = 64  # items scored at the outset
_SLACK = 8  # more items than asked for are scored exactly, against rounding of the products
_BLOCK = 1 << 22  # entries of a block


class TopItems(NamedTuple):
    """The best items, best first.

    Attributes:
        ids: [*batch, rank].
        scores: [*batch, rank].
    """

    ids: Tensor
    scores: Tensor


class Known(NamedTuple):
    """Items whose vectors in a user's draws are known already, such as those that made a state.

    Attributes:
        ids: [user, known]; 0 for none.
        vectors: [user, draw, known, dim].
    """

    ids: Tensor
    vectors: Tensor


@dataclass(frozen=True, eq=False)
class Followed:
    """Items that follow their groups, and a draw of the groups for each row.

    Attributes:
        loc: t of each item's factor by id [item, dim].
        log_scale: Its log r [item, dim].
        group: Group of each id [item].
        centre: mu and kappa at the centre of their laws, each [group, dim].
        mean: mu in the draw of each row [row, group, dim].
        spread: kappa [row, group, dim].
        widening: Factor of the standard deviations.
    """

    loc: Tensor
    log_scale: Tensor
    group: Tensor
    centre: tuple[Tensor, Tensor]
    mean: Tensor
    spread: Tensor
    widening: float

    def moments(self, row: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations [*pair, dim] of ids in the draws of rows, both [*pair]."""
        group = self.group[ids]
        mean, spread = self.mean[row, group], self.spread[row, group]
        loc, scale = conditional_moments(self.loc[ids], self.log_scale[ids], mean, spread)
        return loc, scale * self.widening

    def bounds(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return what holds in the draws of all rows, for each id [item].

        With w = kappa^2 / r^2, a = 1 / (1 + w) and b = 1 - a, an item's mean is a mu + b t, and
        |db / d log kappa| = 2 a b.

        Returns:
            The distance by which the mean moves from its centre at most, and the largest standard
            deviation.
        """
        group, (middle, usual) = self.group[ids], self.centre
        low = self.spread.amin((0, 2)).minimum(usual.amin(1))[group]
        high = self.spread.amax((0, 2)).maximum(usual.amax(1))[group]
        moved = (self.mean - middle).norm(dim=2).amax(0)[group]
        stretched = (self.spread / usual).log().abs().amax((0, 2))[group]
        told = (-2 * self.log_scale[ids]).exp()
        least, most = told.amin(1), told.amax(1)
        kept = 1 / (1 + least * low.square())
        given = 1 - 1 / (1 + most * high.square())
        turned = (2 * kept * given).clamp_max(0.5) * stretched
        apart = (self.loc[ids] - middle[group]).norm(dim=1)
        widest = (least + high.square().reciprocal()).rsqrt()
        return kept * moved + turned * apart, widest * self.widening

    def part(self, rows: slice) -> Followed:
        """Keep some rows."""
        return replace(self, mean=self.mean[rows], spread=self.spread[rows])


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Candidates and what is believed of their vectors.

    Attributes:
        kind: "l2" or "dot".
        loc: Means of item vectors by id [item, dim].
        scale: Standard deviations [item, dim].
        pool: Ids of the candidates, in rising order [candidate].
        followed: The groups of each row, where items follow them: means and standard deviations
            then differ by row, and ``loc`` and ``scale`` are those at the centre of the groups.
    """

    kind: Score
    loc: Tensor
    scale: Tensor
    pool: Tensor
    followed: Followed | None = None

    def moments(self, row: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Means and standard deviations [*pair, dim] of ids in the draws of rows, both [*pair]."""
        if self.followed is None:
            return self.loc[ids], self.scale[ids]
        return self.followed.moments(row, ids)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Most that means move from ``loc``, and largest standard deviations [candidate]."""
        if self.followed is None:
            widest = self.scale[self.pool].amax(1)
            return torch.zeros_like(widest), widest
        return self.followed.bounds(self.pool)

    def part(self, rows: slice) -> Self:
        """Keep some rows."""
        if self.followed is None:
            return self
        return replace(self, followed=self.followed.part(rows))

    def check(self, size: int, exclude: Tensor) -> None:
        """See that there are enough candidates for every row."""
        most = _count_excluded(self.pool, exclude)
        if size > len(self.pool) - most:
            raise DataError(
                f"recommend: expected size <= number of candidates, got size={size} with "
                f"{len(self.pool)} candidates"
                + (f", {most} of them excluded for one user" if most else "")
            )


def top_of_means(cat: Catalogue, state: Tensor, size: int, exclude: Tensor) -> TopItems:
    """Return the items with the best scores at their mean vectors.

    Args:
        cat: The catalogue.
        state: States z [row, dim].
        size: Items for each row.
        exclude: Ids that a row must not have [row, excluded]; 0 for none.
    """
    cat.check(size, exclude)
    wide = min(size + _SLACK, len(cat.pool))
    parts = [
        _top_rows(cat, state[rows], wide, exclude[rows]) for rows in _row_blocks(len(state), cat)
    ]
    ids = torch.cat(parts)
    exact = scores(cat.kind, state[:, None], cat.loc[ids])
    exact = exact.masked_fill(_is_excluded(ids, exclude), -math.inf)
    best = exact.sort(stable=True, dim=1, descending=True)
    return TopItems(ids.gather(1, best.indices[:, :size]), best.values[:, :size])


def top_drawn(
    cat: Catalogue,
    state: Tensor,
    row: Tensor,
    size: int,
    exclude: Tensor,
    known: Known,
    seed: int,
    *,
    exhaustive: bool | None = None,
) -> TopItems:
    """Return the items with the best scores in draws of all item vectors.

    Args:
        cat: The catalogue.
        state: States z [user, draw, dim].
        row: Number of each draw [user, draw], what its noise belongs to.
        size: Items for each draw.
        exclude: Ids that a user must not have [user, excluded]; 0 for none.
        known: Items whose vectors are given.
        seed: Seed of the noise.
        exhaustive: Whether to draw all vectors; None does so for up to 4,096 candidates.

    Returns:
        [user, draw, rank].
    """
    cat.check(size, exclude)
    if exhaustive is None:
        exhaustive = len(cat.pool) <= _EXHAUSTIVE
    users, draws = row.shape
    wide = draws * (len(cat.pool) * cat.loc.shape[1] if exhaustive else 1 << 14)
    index = None if exhaustive else _Index.of(cat)
    found = []
    for part in _blocks(users, max(_BLOCK // wide, 1)):
        mine = Known(known.ids[part], known.vectors[part])
        block = (state[part], row[part], size, exclude[part], mine, seed)
        held = cat.part(slice(part.start * draws, part.stop * draws))
        if index is None:
            found.append(_all_drawn(held, *block))
        else:
            found.append(_pruned(index.of_rows(held), *block))
    return TopItems(*(torch.cat(parts) for parts in zip(*found, strict=True)))


# ---------------------------------------------------------------- blocks and exclusions


def _blocks(count: int, size: int) -> Iterator[slice]:
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


def _row_blocks(rows: int, cat: Catalogue) -> Iterator[slice]:
    return _blocks(rows, max(_BLOCK // min(len(cat.pool), 1 << 14), 1))


def _places(pool: Tensor, ids: Tensor) -> Tensor:
    """Position of each id in the pool; -1 where it is not there."""
    at = torch.searchsorted(pool, ids).clamp_max(len(pool) - 1)
    return torch.where(pool[at] == ids, at, -1)


def _count_excluded(pool: Tensor, exclude: Tensor) -> int:
    """Most candidates that are excluded for one row."""
    if exclude.numel() == 0:
        return 0
    at = _places(pool, exclude).sort(1).values
    new = torch.ones_like(at, dtype=torch.bool)
    new[:, 1:] = at[:, 1:] != at[:, :-1]
    return int((new & (at >= 0)).sum(1).max())


def _is_excluded(ids: Tensor, exclude: Tensor) -> Tensor:
    """Whether ids [row, rank] are among those excluded [row, excluded]."""
    if exclude.shape[1] == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    return (ids[:, :, None] == exclude[:, None, :]).any(-1)


def _drop(block: Tensor, at: Tensor, part: slice, fill: float) -> None:
    """Put ``fill`` at the excluded positions ``at`` [row, excluded] of a block of candidates."""
    if at.shape[1]:
        row, column = ((at >= part.start) & (at < part.stop)).nonzero(as_tuple=True)
        block[row, at[row, column] - part.start] = fill


# ---------------------------------------------------------------- fixed vectors


def _top_rows(cat: Catalogue, state: Tensor, size: int, exclude: Tensor) -> Tensor:
    """Ids [row, rank] of the best items by matrix products, block of candidates by block."""
    at = _places(cat.pool, exclude)
    best_ids = torch.zeros(len(state), 0, dtype=torch.int64, device=state.device)
    best = state.new_zeros(len(state), 0)
    for part in _blocks(len(cat.pool), 1 << 14):
        ids = cat.pool[part]
        vectors = cat.loc[ids]
        found = state @ vectors.mT
        if cat.kind == "l2":  # |z - v|^2 falls with 2 z.v - |v|^2.
            found = found.mul_(2).sub_(vectors.square().sum(1))
        _drop(found, at, part, -math.inf)
        top = found.topk(min(size, len(ids)), 1)
        best_ids = torch.cat([best_ids, ids[top.indices]], 1)
        best = torch.cat([best, top.values], 1)
        if best.shape[1] > size:
            kept = best.topk(size, 1)
            best, best_ids = kept.values, best_ids.gather(1, kept.indices)
    return best_ids


# ---------------------------------------------------------------- draws: all vectors


def item_draws(cat: Catalogue, row: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Return the vectors [row, item, dim] of ids [row, item] in the draws numbered ``row``."""
    items, dim = cat.loc.shape
    counter = row[:, None] * items + ids
    noise = row_noise(seed, counter.flatten(), dim, dtype=cat.loc.dtype)
    loc, scale = cat.moments(torch.arange(len(row), device=row.device)[:, None], ids)
    return loc + scale * noise.reshape(*ids.shape, dim)


def _all_drawn(
    cat: Catalogue,
    state: Tensor,
    row: Tensor,
    size: int,
    exclude: Tensor,
    known: Known,
    seed: int,
) -> TopItems:
    users, draws, dim = state.shape
    ids = cat.pool.expand(users * draws, -1)
    vectors = item_draws(cat, row.flatten(), ids, seed).unflatten(0, (users, draws))
    user, k = (_places(cat.pool, known.ids) >= 0).nonzero(as_tuple=True)
    at = _places(cat.pool, known.ids)[user, k]
    vectors[user, :, at] = known.vectors[user, :, k]
    found = scores(cat.kind, state[:, :, None], vectors)
    user, k = (_places(cat.pool, exclude) >= 0).nonzero(as_tuple=True)
    found[user, :, _places(cat.pool, exclude)[user, k]] = -math.inf
    best = found.topk(size, 2)
    return TopItems(cat.pool[best.indices], best.values)


# ---------------------------------------------------------------- draws: only what can win


class _Pairs(NamedTuple):
    """Pairs of a row and a candidate, with the score in the row's draw."""

    row: Tensor
    at: Tensor
    score: Tensor


@dataclass(frozen=True, eq=False)
class _Index:
    """A catalogue, and what tells of its candidates how high their scores can rise.

    Attributes:
        cat: The catalogue.
        centre: Mean vector, taken off for l2 scores against rounding [dim].
        loc: Means at the centre of the groups, less ``centre`` [candidate, dim].
        square: |loc|^2 [candidate].
        widest: Largest standard deviation s at the centre of the groups [candidate].
        reach: What the means move in the rows' draws, plus c s, at most [candidate].
        quantile: c.
    """

    cat: Catalogue
    centre: Tensor
    loc: Tensor
    square: Tensor
    widest: Tensor
    reach: Tensor
    quantile: float

    @classmethod
    def of(cls, cat: Catalogue) -> _Index:
        c = float(torch.special.ndtri(torch.tensor(1 - _TAIL, dtype=torch.float64)))
        loc, widest = cat.loc[cat.pool], cat.scale[cat.pool].amax(1)
        centre = loc.mean(0) if cat.kind == "l2" else torch.zeros_like(loc[0])
        loc = loc - centre
        return cls(cat, centre, loc, loc.square().sum(1), widest, c * widest, c)

    def of_rows(self, cat: Catalogue) -> _Index:
        """The index for the draws of a block of rows."""
        if cat.followed is None:
            return self
        moved, widest = cat.bounds()
        return replace(self, cat=cat, reach=moved + self.quantile * widest)

    def hopeful(self, state: Tensor, size: int) -> Tensor:
        """Positions [user, rank] of candidates whose score one deviation up is best."""
        best, places = state.new_zeros(len(state), 0), torch.zeros(len(state), 0).long()
        state = state - self.centre
        for part in _blocks(len(self.widest), 1 << 14):
            found = state @ self.loc[part].mT
            widest = self.widest[part]
            if self.cat.kind == "l2":
                distance = self.square[part] - 2 * found + state.square().sum(1, keepdim=True)
                found = widest - distance.clamp_min(0).sqrt()
            else:
                found = found + widest * state.norm(dim=1, keepdim=True)
            top = found.topk(min(size, found.shape[1]), 1)
            best = torch.cat([best, top.values], 1)
            places = torch.cat([places.to(state.device), top.indices + part.start], 1)
            if best.shape[1] > size:
                kept = best.topk(size, 1)
                best, places = kept.values, places.gather(1, kept.indices)
        return places


def _pruned(
    index: _Index,
    state: Tensor,
    row: Tensor,
    size: int,
    exclude: Tensor,
    known: Known,
    seed: int,
) -> TopItems:
    """Draw the few items that lie in a tail, and those of the others that can still win."""
    draws = row.shape[1]
    draw = _Draw(
        index,
        state.flatten(0, 1),
        row.flatten(),
        exclude.repeat_interleave(draws, 0),
        Known(known.ids.repeat_interleave(draws, 0), known.vectors.flatten(0, 1)),
        seed,
    )
    places = index.hopeful(state.mean(1), min(max(_PROMISING, 4 * size), draw.count))
    places = places.repeat_interleave(draws, 0)
    rows = torch.arange(len(places), device=state.device)[:, None].expand_as(places)
    outset = draw.scored(rows.flatten(), places.flatten())
    given = draw.given()
    floor = _floor(outset, given, len(places), size)
    tail = draw.tail.div(draw.count, rounding_mode="floor"), draw.tail % draw.count
    found = [outset, given, draw.scored(*tail, floor)]
    found.extend(draw.scored(*pairs, floor) for pairs in draw.able(floor))
    best = draw.best(_Pairs(*(torch.cat(parts) for parts in zip(*found, strict=True))), size)
    return TopItems(*(part.unflatten(0, row.shape) for part in best))


def _floor(outset: _Pairs, given: _Pairs, rows: int, size: int) -> Tensor:
    """A score [row] that the ``size``-th best item of each row has at least."""
    row, score = torch.cat([outset.row, given.row]), torch.cat([outset.score, given.score])
    order = _ranked(row, score)
    counts = torch.bincount(row, minlength=rows)
    enough = counts >= size
    last = counts.cumsum(0) - counts + size - 1
    floor = score.new_full((rows,), -math.inf)
    floor[enough] = score[order][last[enough]]
    return floor


def _ranked(row: Tensor, score: Tensor) -> Tensor:
    """Order of pairs by row, and by falling score within a row."""
    order = score.argsort(descending=True, stable=True)
    return order[row[order].argsort(stable=True)]


class _Draw:
    """One draw of all vectors for each row of a block, evaluated where it is asked for."""

    def __init__(
        self,
        index: _Index,
        state: Tensor,
        row: Tensor,
        exclude: Tensor,
        known: Known,
        seed: int,
    ) -> None:
        self.index, self.cat, self.count = index, index.cat, len(index.widest)
        self.state, self.row, self.known, self.seed = state, row, known, seed
        self.base = torch.arange(len(row), device=row.device)[:, None] * self.count
        self.tail = self._tail()
        known_at = _places(self.cat.pool, known.ids)
        self.out = torch.cat([_places(self.cat.pool, exclude), known_at], 1)
        self.known_at = torch.where(_is_excluded(known.ids, exclude), -1, known_at)
        self.skipped = (self.base + self.out)[self.out >= 0].unique()

    def _uniform(self, purpose: int, counter: Tensor) -> Tensor:
        """Uniform numbers on (0, 1) that belong to a counter."""
        noise = row_noise(self.seed + purpose, counter, 1, dtype=torch.float64)[:, 0]
        return torch.special.ndtr(noise).clamp(1e-15, 1 - 1e-15)

    def _tail(self) -> Tensor:
        """Pairs (as row * count + candidate, in rising order) whose e is above the quantile.

        Each candidate is in the tail independently, so that the gaps between them are geometric.
        """
        mean = self.count * _TAIL
        gaps = int(mean + 12 * math.sqrt(mean) + 40)  # Fewer would be a twelve-sigma event.
        counter = self.row[:, None] * gaps + torch.arange(gaps, device=self.row.device)
        uniform = self._uniform(1, counter.flatten()).reshape(counter.shape)
        at = ((uniform.log() / math.log1p(-_TAIL)).floor().long() + 1).cumsum(1) - 1
        return (self.base + at)[at < self.count]

    def given(self) -> _Pairs:
        """Pairs of rows with the items whose vectors are known."""
        row, k = (self.known_at >= 0).nonzero(as_tuple=True)
        score = scores(self.cat.kind, self.state[row], self.known.vectors[row, k])
        return _Pairs(row, self.known_at[row, k], score)

    def able(self, floor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs outside the tail whose score can reach the floor of their row."""
        index, l2 = self.index, self.cat.kind == "l2"
        state = self.state - index.centre
        norm = state.norm(dim=1, keepdim=True)
        low = floor.clamp_min(-1e18)[:, None]
        if l2:  # |z - m| <= reach - floor, both sides squared.
            query = torch.cat([2 * state, torch.ones_like(low), -2 * low], 1)
            least = norm.square() - low.square()
        else:
            query, least = torch.cat([state, norm], 1), low
        least = least - 1e-4 * (1 + norm.square())  # Rounding of the products.
        least[floor == -math.inf] = -math.inf
        for part in _blocks(self.count, 1 << 14):
            reach = index.reach[part, None]
            features = [index.loc[part], reach]
            if l2:
                features.insert(1, reach.square() - index.square[part, None])
            able = query @ torch.cat(features, 1).mT >= least
            row, at = able.nonzero(as_tuple=True)
            at = at + part.start
            keep = ~_member(row * self.count + at, self.tail)
            yield row[keep], at[keep]

    def scored(self, row: Tensor, at: Tensor, floor: Tensor | None = None) -> _Pairs:
        """Score pairs in their rows' draws, leaving out those that end below the floor."""
        keep = ~_member(row * self.count + at, self.skipped)
        row, at = row[keep], at[keep]
        counter = self.row[row] * len(self.cat.loc) + self.cat.pool[at]
        e = self._along(row * self.count + at, counter)
        state = self.state[row]
        loc, scale = self.cat.moments(row, self.cat.pool[at])
        if floor is not None:
            highest = self._highest(state, loc, scale, e)
            keep = highest >= floor[row] - 1e-4 * (1 + floor[row].abs())
            row, at, counter, e = row[keep], at[keep], counter[keep], e[keep]
            state, loc, scale = state[keep], loc[keep], scale[keep]
        direction = state if self.cat.kind == "dot" else state - loc
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-12)
        along = (scale * direction).norm(dim=1, keepdim=True).clamp_min(1e-20)
        noise = row_noise(self.seed + 3, counter, loc.shape[1], dtype=loc.dtype) * scale
        # Given that direction.(v - m) is along * e, the rest of v - m is its normal law corrected.
        short = along * e[:, None] - (direction * noise).sum(1, keepdim=True)
        vectors = loc + noise + scale.square() * direction / along.square() * short
        return _Pairs(row, at, scores(self.cat.kind, state, vectors))

    def _along(self, key: Tensor, counter: Tensor) -> Tensor:
        """The standard normal e of each pair, above the quantile in the tail and below it else."""
        uniform = self._uniform(2, counter)
        level = torch.where(_member(key, self.tail), _TAIL * uniform, 1 - (1 - _TAIL) * uniform)
        return -torch.special.ndtri(level).to(self.state.dtype)

    def _highest(self, state: Tensor, loc: Tensor, scale: Tensor, e: Tensor) -> Tensor:
        """The highest score that pairs can have given e."""
        middle = scores(self.cat.kind, state, loc)
        lift = scale.amax(1) * e.clamp_min(0)
        return middle + (lift if self.cat.kind == "l2" else lift * state.norm(dim=1))

    def best(self, pairs: _Pairs, size: int) -> TopItems:
        """The best items of each row; a pair may be there twice."""
        order = (pairs.row * self.count + pairs.at).argsort(stable=True)
        key = (pairs.row * self.count + pairs.at)[order]
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = key[1:] != key[:-1]
        kept = order[first]
        row, score = pairs.row[kept], pairs.score[kept]
        counts = torch.bincount(row, minlength=len(self.row))
        starts = counts.cumsum(0) - counts
        place = starts[:, None] + torch.arange(size, device=row.device)
        chosen = _ranked(row, score)[place]
        return TopItems(self.cat.pool[pairs.at[kept][chosen]], score[chosen])


def _member(keys: Tensor, ordered: Tensor) -> Tensor:
    """Whether keys are among ``ordered``, which rise."""
    if len(ordered) == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    at = torch.searchsorted(ordered, keys).clamp_max(len(ordered) - 1)
    return ordered[at] == keys

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

This is exact: the items found have the law that they have when all vectors are drawn. All noise
is a function of (seed, row, item), so that it does not matter how the work is cut into blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.slates.noise import row_noise
from probkit.models.slates.scoring import Score, scores

__all__ = ["Catalogue", "Known", "TopItems", "top_drawn", "top_of_means"]

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
class Catalogue:
    """Candidates and what is believed of their vectors.

    Attributes:
        kind: "l2" or "dot".
        loc: Means of item vectors by id [item, dim].
        scale: Standard deviations [item, dim].
        pool: Ids of the candidates, in rising order [candidate].
    """

    kind: Score
    loc: Tensor
    scale: Tensor
    pool: Tensor

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
        found.append(_all_drawn(cat, *block) if index is None else _pruned(index, *block))
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
    """Return the vectors [row, item, dim] of ids [row, item] in the draws of rows."""
    items, dim = cat.loc.shape
    counter = row[:, None] * items + ids
    noise = row_noise(seed, counter.flatten(), dim, dtype=cat.loc.dtype)
    return cat.loc[ids] + cat.scale[ids] * noise.reshape(*ids.shape, dim)


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
        features: For l2 scores m, (c s)^2 - |m|^2 and s; for dot scores m and s, where s is the
            largest standard deviation of the item [candidate, feature].
        widest: s [candidate].
        quantile: c.
    """

    cat: Catalogue
    centre: Tensor
    features: Tensor
    widest: Tensor
    quantile: float

    @classmethod
    def of(cls, cat: Catalogue) -> _Index:
        c = float(torch.special.ndtri(torch.tensor(1 - _TAIL, dtype=torch.float64)))
        loc, widest = cat.loc[cat.pool], cat.scale[cat.pool].amax(1)
        centre = loc.mean(0) if cat.kind == "l2" else torch.zeros_like(loc[0])
        features = [loc - centre, widest[:, None]]
        if cat.kind == "l2":
            bend = (c * widest).square() - features[0].square().sum(1)
            features.insert(1, bend[:, None])
        return cls(cat, centre, torch.cat(features, 1), widest, c)

    def hopeful(self, state: Tensor, size: int) -> Tensor:
        """Positions [user, rank] of candidates whose score one deviation up is best."""
        best, places = state.new_zeros(len(state), 0), torch.zeros(len(state), 0).long()
        dim = state.shape[1]
        state = state - self.centre
        for part in _blocks(len(self.widest), 1 << 14):
            found = state @ self.features[part, :dim].mT
            widest = self.widest[part]
            if self.cat.kind == "l2":
                square = (self.quantile * widest).square() - self.features[part, dim]
                distance = square - 2 * found + state.square().sum(1, keepdim=True)
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
        c, l2 = self.index.quantile, self.cat.kind == "l2"
        state = self.state - self.index.centre
        norm = state.norm(dim=1, keepdim=True)
        low = floor.clamp_min(-1e18)[:, None]
        if l2:  # |z - m| <= c s - floor, both sides squared.
            query = torch.cat([2 * state, torch.ones_like(low), -2 * c * low], 1)
            least = norm.square() - low.square()
        else:
            query, least = torch.cat([state, c * norm], 1), low
        least = least - 1e-4 * (1 + norm.square())  # Rounding of the products.
        least[floor == -math.inf] = -math.inf
        for part in _blocks(self.count, 1 << 14):
            able = query @ self.index.features[part].mT >= least
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
        if floor is not None:
            keep = self._reach(row, at, e) >= floor[row] - 1e-4 * (1 + floor[row].abs())
            row, at, counter, e = row[keep], at[keep], counter[keep], e[keep]
        state, ids = self.state[row], self.cat.pool[at]
        loc, scale = self.cat.loc[ids], self.cat.scale[ids]
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

    def _reach(self, row: Tensor, at: Tensor, e: Tensor) -> Tensor:
        """The highest score that a pair can have given e."""
        state = self.state[row]
        middle = scores(self.cat.kind, state, self.cat.loc[self.cat.pool[at]])
        lift = self.index.widest[at] * e.clamp_min(0)
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

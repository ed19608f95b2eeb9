"""A simulated market place: items in groups, users whose taste moves with their clicks.

Group centres lie at random distances and angles in the plane, items around their group's centre.
A user begins at the centre of a random group and moves towards what is clicked; the score of an
item is minus its distance. That is the truth of the slate model with the linear transition and l2
scores, so what a fit misses is due to data and approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.slates.ids import FIRST_ITEM, NO_CLICK, PAD, UNK
from probkit.models.slates.log import SlateLog
from probkit.rng import Rng, stream

__all__ = ["MarketPlace", "draw_market_place"]


@dataclass(frozen=True, eq=False)
class MarketPlace:
    """Items and users of a simulated market place.

    Attributes:
        items: Vectors by id [item, 2]; zero for the ids 0, 1, 2.
        groups: Group by id [item]; 0, 1, 2 for the ids 0, 1, 2, then 3, 4, ...
        start: Users' first states [user, 2].
        gamma: Share of a user's state that a click leaves.
        bias: Score of no click.
    """

    items: Tensor
    groups: Tensor
    start: Tensor
    gamma: float
    bias: float

    @property
    def n_items(self) -> int:
        """Number of ids, the three special ones included."""
        return len(self.items)

    @property
    def users(self) -> int:
        """Number of users."""
        return len(self.start)

    @property
    def real_items(self) -> Tensor:
        """Ids of the real items."""
        return torch.arange(FIRST_ITEM, self.n_items)

    def scores(self, state: Tensor, ids: Tensor) -> Tensor:
        """Return -|z - v| [user, item] of states [user, 2] and ids [user, item]."""
        return -(state[:, None] - self.items[ids]).square().sum(-1).sqrt()

    def choice_probs(self, state: Tensor, slate: Tensor) -> Tensor:
        """Return the probability of no click and of each item shown [user, 1 + slot].

        Args:
            state: [user, 2].
            slate: Item ids without slot 0 [user, slot].
        """
        bias = torch.full((len(slate), 1), self.bias, dtype=state.dtype)
        return torch.softmax(torch.cat([bias, self.scores(state, slate)], 1), 1)

    def click_probability(self, state: Tensor, slate: Tensor) -> Tensor:
        """Return the probability that something is clicked [user]."""
        return 1 - self.choice_probs(state, slate)[:, 0]

    def best(self, state: Tensor, size: int, candidates: Tensor | None = None) -> Tensor:
        """Return the slate [user, slot] with the highest click probability.

        Args:
            state: [user, 2].
            size: Items in a slate.
            candidates: Ids [candidate], or a mask [item]; None for all.
        """
        pool = self.real_items if candidates is None else torch.as_tensor(candidates)
        if pool.dtype == torch.bool:
            pool = pool.nonzero()[:, 0]
        return pool[self.scores(state, pool.expand(len(state), -1)).topk(size, 1).indices]

    def arrivals(
        self, first: int, rounds: int, *, by_group: bool = False, rng: Rng
    ) -> Callable[[int], Tensor]:
        """Return which items are on offer in each round, as a function of its number.

        ``first`` random items are there at the beginning; equal shares of the others join them in
        the rounds after the first, the last share in the last round.

        Args:
            first: Items at the beginning.
            rounds: Rounds until all are there.
            by_group: Whether items come group after group, as where a market place opens new
                categories; else all groups grow.
            rng: Source of randomness.

        Example:
            >>> place = draw_market_place(users=4, items=10, groups=3, rng=0)
            >>> offered = place.arrivals(4, 3, rng=0)
            >>> [len(offered(k)) for k in range(3)]
            [4, 7, 10]
        """
        if not 1 <= first <= len(self.real_items) or rounds < 1:
            raise DataError(
                f"MarketPlace.arrivals: expected 1 <= first <= {len(self.real_items)} items and "
                f"rounds >= 1, got {first}, {rounds}"
            )
        generator = stream(rng, "arrivals")
        order = self.real_items[torch.randperm(len(self.real_items), generator=generator)]
        if by_group:
            group = self.groups[order]
            turn = torch.randperm(int(self.groups.max()) + 1, generator=generator)
            order = order[turn[group].argsort(stable=True)]

        def offered(number: int) -> Tensor:
            share = min(max(number, 0) / max(rounds - 1, 1), 1.0)
            return order[: first + round(share * (len(order) - first))].sort().values

        return offered

    def random(self, users: int, size: int, *, rng: torch.Generator) -> Tensor:
        """Return uniformly drawn slates without repeats [user, slot]."""
        keys = torch.rand(users, self.n_items - FIRST_ITEM, generator=rng)
        return keys.topk(size, 1).indices + FIRST_ITEM

    def respond(self, state: Tensor, slate: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw the slot clicked [user]: 0 for no click, k for the k-th item shown."""
        probs = self.choice_probs(state, slate)
        return torch.multinomial(probs, 1, generator=rng)[:, 0]

    def moved(self, state: Tensor, slate: Tensor, slot: Tensor) -> Tensor:
        """Return the states [user, 2] after the clicks on slots [user]."""
        chosen = slate.gather(1, (slot - 1).clamp_min(0)[:, None])[:, 0]
        towards = self.gamma * state + (1 - self.gamma) * self.items[chosen]
        return torch.where((slot > 0)[:, None], towards, state)

    def states(self, click: Tensor) -> Tensor:
        """Return the states before each step, and after the last, from the clicks.

        Args:
            click: Ids clicked [user, step] of all users.

        Returns:
            [user, step + 1, 2].
        """
        state, path = self.start, [self.start]
        for ids in click.unbind(1):
            towards = self.gamma * state + (1 - self.gamma) * self.items[ids]
            state = torch.where((ids >= FIRST_ITEM)[:, None], towards, state)
            path.append(state)
        return torch.stack(path, 1)

    def log(self, steps: int, size: int, *, optimal: float = 0.3, rng: Rng) -> SlateLog:
        """Simulate a log whose policy shows the best slate now and then, else a random one.

        Args:
            steps: Steps T of each user.
            size: Items in a slate.
            optimal: Probability, for each user and step, of the best slate.
            rng: Source of randomness.
        """
        if steps < 1 or not 1 <= size <= self.n_items - FIRST_ITEM or not 0 <= optimal <= 1:
            raise DataError(
                f"MarketPlace.log: expected steps >= 1, 1 <= size <= {self.n_items - FIRST_ITEM} "
                f"items and optimal in [0, 1], got {steps}, {size}, {optimal}"
            )
        generator = stream(rng, "log")
        state, shown, slots = self.start, [], []
        for _ in range(steps):
            good = torch.rand(self.users, generator=generator) < optimal
            random = self.random(self.users, size, rng=generator)
            slate = torch.where(good[:, None], self.best(state, size), random)
            slot = self.respond(state, slate, rng=generator)
            state = self.moved(state, slate, slot)
            shown.append(slate)
            slots.append(slot)
        return self.as_log(torch.stack(shown, 1), torch.stack(slots, 1))

    def as_log(self, slates: Tensor, slots: Tensor) -> SlateLog:
        """Return the log of slates [user, step, slot] (without slot 0) and slots clicked."""
        first = torch.full_like(slates[..., :1], NO_CLICK)
        full = torch.cat([first, slates], -1)
        click = full.gather(-1, slots[..., None])[..., 0]
        return SlateLog(full, click, slots, groups=self.groups, n_items=self.n_items)


def draw_market_place(
    *,
    users: int = 300,
    items: int = 300,
    groups: int = 20,
    gamma: float = 0.9,
    bias: float = 1.0,
    extent: float = 5.0,
    spread: float = 0.5,
    rng: Rng,
) -> MarketPlace:
    """Draw a market place.

    Args:
        users: Number of users.
        items: Number of real items; each falls in a random group.
        groups: Number of groups; their centres lie at radius U(0.1, 0.8) * extent, at any angle.
        gamma: Share of a user's state that a click leaves.
        bias: Score of no click; items score minus their distance.
        extent: Size of the plane.
        spread: Standard deviation of items around the centre of their group.
        rng: Source of randomness.

    Example:
        >>> place = draw_market_place(users=4, items=10, groups=3, rng=0)
        >>> place.log(5, 2, rng=1)
        SlateLog(users=4, steps=5, slots=3, n_items=13, groups=6)
    """
    if min(users, items, groups) < 1 or not 0 <= gamma <= 1 or not (extent > 0 and spread >= 0):
        raise DataError(
            "draw_market_place: expected users, items, groups >= 1, gamma in [0, 1], extent > 0 "
            f"and spread >= 0, got {users}, {items}, {groups}, {gamma}, {extent}, {spread}"
        )
    generator = stream(rng, "market place")

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float32)

    radius = extent * (0.1 + 0.7 * uniform(groups))
    angle = 2 * math.pi * uniform(groups)
    centres = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    member = torch.randint(groups, (items,), generator=generator)
    noise = torch.randn(items, 2, generator=generator, dtype=torch.float32)
    vectors = torch.zeros(items + FIRST_ITEM, 2)
    vectors[FIRST_ITEM:] = centres[member] + spread * noise
    of_id = torch.cat([torch.tensor([PAD, NO_CLICK, UNK]), member + FIRST_ITEM])
    start = centres[torch.randint(groups, (users,), generator=generator)]
    return MarketPlace(vectors, of_id, start, gamma, bias)

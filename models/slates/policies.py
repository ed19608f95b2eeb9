"""Which items to show: policies from a posterior, with the probabilities of what they chose.

**The unit of randomisation** is one draw of the posterior for each user (for in-slate Thompson
sampling one for each user and slot): item vectors, transition and first state. Users never share a
draw, and what a user is shown depends on ``rng``, the place in ``history`` and the user's own past
alone, not on how the work was cut into blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.models.slates.beliefs import Beliefs
from probkit.models.slates.checks import check_temperature
from probkit.models.slates.draws import users_in_fit
from probkit.models.slates.history import History, as_history
from probkit.models.slates.ids import FIRST_ITEM, PAD
from probkit.models.slates.log import SlateLog
from probkit.models.slates.noise import row_noise
from probkit.rng import Rng, seed_of, stream

if TYPE_CHECKING:
    from probkit.posterior import Posterior

__all__ = [
    "EpsilonGreedy",
    "Greedy",
    "InSlateThompson",
    "Popularity",
    "Random",
    "Recommendation",
    "SlatePolicy",
    "Thompson",
    "recommend",
    "slate_propensities",
    "slot_marginals",
]

_BLOCK = 1 << 22
_FEW = 4096  # candidates up to which all are ranked at random
_MANY_USERS = 4096  # copies of users that are served together


@dataclass(frozen=True, eq=False)
class Request:
    """What a policy is asked for.

    Attributes:
        beliefs: What is believed.
        history: Users.
        pool: Ids of the candidates, in rising order.
        size: Items K in a slate.
        exclude: Ids that a user must not have [user, excluded]; 0 for none.
        counts: How often each id was clicked in the log that was fitted [item].
    """

    beliefs: Beliefs
    history: History
    pool: Tensor
    size: int
    exclude: Tensor
    counts: Tensor

    @property
    def users(self) -> int:
        """Number of users."""
        return len(self.history.log)

    def part(self, users: slice) -> Request:
        """Return the request for a block of users."""
        mine = self.history.part(users)
        return Request(self.beliefs, mine, self.pool, self.size, self.exclude[users], self.counts)

    def repeated(self, copies: int) -> Request:
        """Return the request for ``copies`` copies of all users, one copy after the other."""
        log, numbers = self.history
        index = torch.arange(len(log), device=log.device).repeat(copies)
        mine = History(log.take(index), None if numbers is None else numbers.repeat(copies))
        out = self.exclude.repeat(copies, 1)
        return Request(self.beliefs, mine, self.pool, self.size, out, self.counts)


class SlatePolicy(Protocol):
    """A way to choose slates."""

    def choose(self, request: Request, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return ids and scores [user, slot].

        Args:
            request: What is asked for.
            seed: Names the draws.
            first: Number of the first user.
        """
        ...

    def conditional(
        self, request: Request, slates: Tensor, draws: int, seed: int, own: bool
    ) -> Tensor:
        """Return P(item of slot k | items of the slots above) of given slates [user, slot].

        Args:
            request: What is asked for.
            slates: Ids [user, slot].
            draws: Draws of the posterior for each user, where there is no closed form.
            seed: Names the draws.
            own: Whether the slates came from this policy, so that they count as one draw more.
        """
        ...


@dataclass(frozen=True)
class Greedy:
    """The best items at the posterior mean."""

    def choose(self, request: Request, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return ids and scores [user, slot]; see :class:`SlatePolicy`."""
        best = request.beliefs.best(request.history, request.pool, request.size, request.exclude)
        return best.ids, best.scores

    def conditional(
        self, request: Request, slates: Tensor, draws: int, seed: int, own: bool
    ) -> Tensor:
        """Return 1 for what it would show, else 0 [user, slot]; see :class:`SlatePolicy`."""
        return (self.choose(request, seed)[0] == slates).double()


@dataclass(frozen=True)
class Thompson:
    """Thompson sampling: the best items in one draw of the posterior.

    Args:
        temperature: Standard deviations of the posterior are multiplied by its root.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature, "Thompson")

    def choose(self, request: Request, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return ids and scores [user, slot]; see :class:`SlatePolicy`."""
        ids, scores = _draws(request, 1, seed, first, self.temperature)
        return ids[:, 0], scores[:, 0]

    def conditional(
        self, request: Request, slates: Tensor, draws: int, seed: int, own: bool
    ) -> Tensor:
        """Return the share of draws with the slots so far that go on so [user, slot]."""

        def matches(users: slice) -> Tensor:
            ids, _ = _draws(request.part(users), draws, seed, users.start, self.temperature)
            return _shares_of_prefixes(ids, slates[users], own)

        return _by_users(request, draws, matches)


@dataclass(frozen=True)
class InSlateThompson:
    """In-slate Thompson sampling: a draw for every slot, so that slates are diverse.

    Slot k shows the best item in the k-th draw that is not in the slate yet.

    Args:
        variant: "independent" is as above. "rank_major" draws K lists of K items, and shows the
            first K distinct of all first items, then all second items, and so on, as the reference
            implementation does; for K <= 2 the two have the same law.
        temperature: Standard deviations of the posterior are multiplied by its root.
    """

    variant: Literal["independent", "rank_major"] = "independent"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature, "InSlateThompson")
        if self.variant not in ("independent", "rank_major"):
            raise DataError(
                "InSlateThompson: expected variant 'independent' or 'rank_major', got "
                f"{self.variant!r}"
            )

    def choose(self, request: Request, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return ids and scores [user, slot]; see :class:`SlatePolicy`."""
        ids, scores = _draws(request, request.size, seed, first, self.temperature)
        return self._merged(ids, scores)

    def _merged(self, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """One slate from K lists [user, draw, rank]."""
        if self.variant == "rank_major":
            return _first_distinct(ids.mT.flatten(1), scores.mT.flatten(1), ids.shape[1])
        return _best_not_shown(ids, scores)

    def conditional(
        self, request: Request, slates: Tensor, draws: int, seed: int, own: bool
    ) -> Tensor:
        """Return the estimated P(slot | slots above) [user, slot]; see :class:`SlatePolicy`.

        Slots are independent draws given the slots above, so that every draw tells of every slot
        (of rank-major slates, whole slates are drawn instead).
        """
        size = request.size

        def matches(users: slice) -> Tensor:
            mine = request.part(users)
            if self.variant == "independent":
                ids, _ = _draws(mine, draws, seed, users.start, self.temperature)
                return _shares_of_slots(ids, slates[users], own)
            ids, scores = _draws(mine, draws * size, seed, users.start, self.temperature)
            lists = ids.unflatten(1, (draws, size)).flatten(0, 1)
            whole, _ = self._merged(lists, scores.unflatten(1, (draws, size)).flatten(0, 1))
            return _shares_of_prefixes(whole.unflatten(0, (-1, draws)), slates[users], own)

        return _by_users(request, draws * (size if self.variant == "rank_major" else 1), matches)


@dataclass(frozen=True)
class EpsilonGreedy:
    """The best items at the posterior mean, but each slot is random with probability epsilon.

    Args:
        epsilon: Probability that a slot is filled uniformly from the candidates that are left.
    """

    epsilon: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise DataError(f"EpsilonGreedy: expected epsilon in [0, 1], got {self.epsilon}")

    def choose(self, request: Request, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return ids and scores [user, slot]; see :class:`SlatePolicy`.

        Scores of random items are NaN.
        """
        best, score = Greedy().choose(request, seed)
        random, _ = Random().choose(request, seed, first)
        row = torch.arange(first, first + request.users)
        noise = row_noise(seed + 11, row, request.size, dtype=torch.float64)
        explore = torch.special.ndtr(noise) < self.epsilon
        # A slot takes the next of its list that is not shown yet: the lists have K items each.
        lists = torch.where(explore[..., None].to(best.device), random[:, None], best[:, None])
        values = torch.where(
            explore[..., None].to(best.device),
            torch.full_like(score, torch.nan)[:, None],
            score[:, None],
        )
        return _best_not_shown(lists, values)

    def conditional(
        self, request: Request, slates: Tensor, draws: int, seed: int, own: bool
    ) -> Tensor:
        """Return the exact probability of each slot given those above [user, slot]."""
        best, _ = Greedy().choose(request, seed)
        greedy = _shares_of_slots(best[:, None], slates, False)
        left = _count_left(request)[:, None] - torch.arange(request.size, device=slates.device)
        return (1 - self.epsilon) * greedy + self.epsilon / left


@dataclass(frozen=True)
class Popularity:
    """The items with the most clicks in the log that was fitted."""

    def choose(self, request: Request, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return ids and click counts [user, slot]; see :class:`SlatePolicy`."""
        order = request.pool[request.counts[request.pool].argsort(descending=True, stable=True)]
        width = min(request.size + request.exclude.shape[1], len(order))
        lists = order[:width].expand(request.users, -1)
        kept = ~(lists[:, :, None] == request.exclude[:, None, :]).any(-1)
        place = kept.sort(stable=True, dim=1, descending=True).indices[:, : request.size]
        ids = lists.gather(1, place)
        return ids, request.counts[ids].double()

    def conditional(
        self, request: Request, slates: Tensor, draws: int, seed: int, own: bool
    ) -> Tensor:
        """Return 1 for what it would show, else 0 [user, slot]; see :class:`SlatePolicy`."""
        return (self.choose(request, seed)[0] == slates).double()


@dataclass(frozen=True)
class Random:
    """Items drawn uniformly without replacement."""

    def choose(self, request: Request, seed: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return ids [user, slot], and zeros as scores; see :class:`SlatePolicy`."""
        count, device = len(request.pool), request.pool.device
        if count <= _FEW:  # The candidates with the largest of as many random numbers.
            row = torch.arange(first, first + request.users, device=device)
            counter = row[:, None] * count + torch.arange(count, device=device)
            keys = row_noise(seed + 13, counter.flatten(), 1, dtype=torch.float64)
            keys = keys.reshape(counter.shape)
            for one in request.exclude.unbind(1):
                keys.masked_fill_(request.pool == one[:, None], -torch.inf)
            ids = request.pool[keys.topk(request.size, 1).indices]
        else:
            ids = self._from_many(request, seed, first)
        return ids, torch.zeros(ids.shape, device=device)

    def _from_many(self, request: Request, seed: int, first: int) -> Tensor:
        """Draw and reject: few of millions are repeated or excluded."""
        found = []
        for user in range(request.users):
            generator = stream(seed, "random", first + user)
            out = request.exclude[user].cpu()
            picked = torch.zeros(0, dtype=torch.int64)
            while len(picked) < request.size:
                more = request.size + len(out) + 8
                place = torch.randint(len(request.pool), (more,), generator=generator)
                ids = request.pool[place.to(request.pool.device)].cpu()
                picked = _in_order(torch.cat([picked, ids[~torch.isin(ids, out)]]))
            found.append(picked[: request.size])
        return torch.stack(found).to(request.pool.device)

    def conditional(
        self, request: Request, slates: Tensor, draws: int, seed: int, own: bool
    ) -> Tensor:
        """Return one over the candidates left [user, slot]."""
        left = _count_left(request)[:, None] - torch.arange(request.size, device=slates.device)
        return 1.0 / left.double()


@dataclass(frozen=True, eq=False)
class Recommendation:
    """Slates for users.

    Attributes:
        ids: Items [user, slot], without slot 0 (no click).
        scores: Score of each item in the draw that chose it [user, slot]; click counts of
            :class:`Popularity`, NaN where chance chose.
        propensity: P(item of slot k | items of the slots above) [user, slot]; their product is the
            probability of the slate. Log it: off-policy evaluation needs it. None where it was not
            asked for.
        policy: The policy.
    """

    ids: Tensor
    scores: Tensor
    propensity: Tensor | None
    policy: SlatePolicy


def recommend(
    post: Posterior,
    history: Any,
    size: int = 10,
    policy: SlatePolicy | None = None,
    *,
    candidates: Any = None,
    exclude: Any = None,
    users: Any = None,
    propensity_draws: int = 100,
    rng: Rng,
) -> Recommendation:
    """Choose a slate for each user.

    Args:
        post: A posterior of :class:`~probkit.models.slates.SlateGRU`.
        history: What users did before: a :class:`SlateLog`, or the ids clicked by each user. Every
            click moves the user's state; only those of training steps tell of the first state.
        size: Items K in a slate.
        policy: :class:`InSlateThompson` by default.
        candidates: Items that may be shown: ids [candidate], or a mask [item]. None for all.
        exclude: Items that must not be shown: "clicked" for those of the history, ids [excluded]
            for all users, or [user, excluded]; 0 for none.
        users: Number of each user in the log that was fitted [user], where the guide has a table
            of users. None takes the labels of users that both logs carry.
        propensity_draws: Draws for each user from which propensities of Thompson sampling are
            estimated, the draw that chose the slate counting as one more; 0 leaves them out.
            Millions of candidates make them costly.
        rng: Seed or generator.

    Returns:
        Ids, scores and propensities.

    Raises:
        DataError: There are fewer candidates than slots, or a user is not known to the guide.

    Example:
        >>> import probkit as pk
        >>> from probkit.inference import SVI
        >>> from probkit.models import SlateGRU
        >>> log = SlateLog([[[1, 3, 4], [1, 4, 5]]] * 3, [[4, 1]] * 3)
        >>> model = SlateGRU(log.n_items, transition="linear", dim=2)
        >>> post = pk.infer(model, log, SVI(steps=5), rng=0)
        >>> recommend(post, [[4], []], size=2, rng=1).ids.shape
        torch.Size([2, 2])
    """
    chosen = InSlateThompson() if policy is None else policy
    request = _request(post, history, size, candidates, exclude, users)
    if isinstance(propensity_draws, bool) or propensity_draws < 0:
        raise DataError(f"recommend: expected propensity_draws >= 0, got {propensity_draws}")
    seed = seed_of(rng) % (1 << 62)
    ids, scores = chosen.choose(request, seed)
    propensity = None
    if propensity_draws or not isinstance(chosen, Thompson | InSlateThompson):
        propensity = chosen.conditional(request, ids, propensity_draws, seed + 5000, True)
    return Recommendation(ids, scores, propensity, chosen)


def slate_propensities(
    post: Posterior,
    history: Any,
    slates: Any,
    policy: SlatePolicy,
    *,
    candidates: Any = None,
    exclude: Any = None,
    users: Any = None,
    draws: int = 1000,
    rng: Rng,
) -> Tensor:
    """Return P(item of slot k | items of the slots above) under a policy [user, slot].

    For slates that another policy logged: with their logging propensities these give the weights
    of :mod:`probkit.models.slates.off_policy`.

    Args:
        post: The posterior that the policy uses.
        history: As for :func:`recommend`.
        slates: Ids shown [user, slot], without slot 0.
        policy: The policy to be evaluated.
        candidates: As for :func:`recommend`.
        exclude: As for :func:`recommend`.
        users: As for :func:`recommend`.
        draws: Draws of the posterior for each user, where there is no closed form.
        rng: Seed or generator.
    """
    shown = as_tensor(slates, name="slates").long()
    if shown.ndim != 2 or 0 in shown.shape:
        raise ShapeError(
            f"slate_propensities: expected slates [user, slot], got {tuple(shown.shape)}"
        )
    request = _request(post, history, shown.shape[1], candidates, exclude, users)
    if len(shown) != request.users:
        raise ShapeError(
            f"slate_propensities: expected slates [user={request.users}, slot] as in history, got "
            f"{tuple(shown.shape)}"
        )
    if draws < 1:
        raise DataError(f"slate_propensities: expected draws >= 1, got {draws}")
    seed = seed_of(rng) % (1 << 62)
    return policy.conditional(request, shown.to(request.pool.device), draws, seed, False)


def slot_marginals(
    post: Posterior,
    history: Any,
    size: int,
    policy: SlatePolicy,
    *,
    candidates: Any = None,
    exclude: Any = None,
    users: Any = None,
    draws: int = 1000,
    rng: Rng,
) -> Tensor:
    """Return the share of slates that show each item in each slot [user, slot, item].

    For small catalogues: the independent and the pseudo-inverse estimators need them.

    Args:
        post: The posterior that the policy uses.
        history: As for :func:`recommend`.
        size: Items in a slate.
        policy: The policy.
        candidates: As for :func:`recommend`.
        exclude: As for :func:`recommend`.
        users: As for :func:`recommend`.
        draws: Slates drawn for each user.
        rng: Seed or generator.
    """
    request = _request(post, history, size, candidates, exclude, users)
    seed = seed_of(rng) % (1 << 62)
    users, items = request.users, request.beliefs.model.n_items
    counts = torch.zeros(users, size * items, dtype=torch.float64)
    slot = torch.arange(size) * items
    repeats = 1 if isinstance(policy, Greedy | Popularity) else draws
    block = max(_MANY_USERS // users, 1)
    for first in range(0, repeats, block):
        copies = min(block, repeats - first)
        ids, _ = policy.choose(request.repeated(copies), seed, first * users)
        each = (ids.cpu() + slot).unflatten(0, (copies, users)).movedim(0, 1).flatten(1)
        counts.scatter_add_(1, each, torch.ones(each.shape, dtype=torch.float64))
    return counts.unflatten(1, (size, items)) / repeats


# ---------------------------------------------------------------- the request


def _request(
    post: Posterior, history: Any, size: int, candidates: Any, exclude: Any, users: Any
) -> Request:
    beliefs = Beliefs(post)
    model = beliefs.model
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(f"recommend: expected a whole number size >= 1, got {size!r}")
    log = as_history(history, model)
    pool = _pool(candidates, model.n_items).to(log.device)
    out = _exclusions(exclude, log, model.n_items).to(log.device)
    _check_size(pool, out, size)
    data = post.context.data
    counts = torch.zeros(model.n_items, dtype=torch.int64)
    if isinstance(data, SlateLog):
        counts[: data.n_items] = data.clicks().cpu()
    return Request(
        beliefs,
        History(log, users_in_fit(post, log, None if users is None else torch.as_tensor(users))),
        pool,
        size,
        out,
        counts.to(log.device),
    )


def _pool(candidates: Any, n_items: int) -> Tensor:
    """Ids of the candidates in rising order."""
    if candidates is None:
        return torch.arange(FIRST_ITEM, n_items)
    given = as_tensor(candidates, name="candidates")
    if given.dtype == torch.bool:
        if tuple(given.shape) != (n_items,):
            raise ShapeError(
                f"recommend: expected a mask candidates [item={n_items}], got {tuple(given.shape)}"
            )
        given = given.nonzero()[:, 0]
        given = given[given >= FIRST_ITEM]
    ids = given.long().flatten().unique()
    if len(ids) == 0:
        raise DataError("recommend: expected at least one candidate, got none")
    if int(ids[0]) < FIRST_ITEM or int(ids[-1]) >= n_items:
        wrong = int(ids[0]) if int(ids[0]) < FIRST_ITEM else int(ids[-1])
        raise DataError(
            f"recommend: expected candidates among the item ids {FIRST_ITEM}..{n_items - 1}, got "
            f"{wrong}"
        )
    return ids


def _exclusions(exclude: Any, log: SlateLog, n_items: int) -> Tensor:
    """Ids that each user must not have [user, excluded], 0 for none."""
    if exclude is None:
        return torch.zeros(len(log), 0, dtype=torch.int64)
    if isinstance(exclude, str):
        if exclude != "clicked":
            raise DataError(f"recommend: expected exclude 'clicked' or ids, got {exclude!r}")
        click = log.click.long()
        return torch.where(click >= FIRST_ITEM, click, PAD)
    ids = as_tensor(exclude, name="exclude").long()
    ids = ids.repeat(len(log), 1) if ids.ndim == 1 else ids
    if ids.ndim != 2 or len(ids) != len(log):
        raise ShapeError(
            f"recommend: expected exclude [excluded] or [user={len(log)}, excluded], got "
            f"{tuple(ids.shape)}"
        )
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= n_items):
        raise DataError(f"recommend: expected excluded ids in [0, n_items={n_items})")
    return ids


def _check_size(pool: Tensor, exclude: Tensor, size: int) -> None:
    left = int(_left(pool, exclude).min()) if exclude.shape[1] else len(pool)
    if size > left:
        raise DataError(
            f"recommend: expected size <= number of candidates, got size={size} and {left} "
            "candidates" + (" after exclusions" if left < len(pool) else "")
        )


def _left(pool: Tensor, exclude: Tensor) -> Tensor:
    """Candidates that are not excluded [user]."""
    place = torch.searchsorted(pool, exclude).clamp_max(len(pool) - 1)
    hit = torch.where(pool[place] == exclude, exclude, PAD).sort(1).values
    new = torch.ones_like(hit, dtype=torch.bool)
    new[:, 1:] = hit[:, 1:] != hit[:, :-1]
    return len(pool) - (new & (hit != PAD)).sum(1)


def _count_left(request: Request) -> Tensor:
    if request.exclude.shape[1] == 0:
        return torch.full((request.users,), len(request.pool), device=request.pool.device)
    return _left(request.pool, request.exclude)


# ---------------------------------------------------------------- draws, slates and shares


def _draws(
    request: Request, draws: int, seed: int, first: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """Ids and scores [user, draw, rank] of the best items in draws of the posterior."""
    number = torch.arange(first, first + request.users, device=request.pool.device)
    row = number[:, None] * draws + torch.arange(draws, device=request.pool.device)
    top = request.beliefs.drawn(
        request.history, row, request.pool, request.size, request.exclude, seed, temperature
    )
    return top.ids, top.scores


def _by_users(request: Request, draws: int, work: Any) -> Tensor:
    """Propensities [user, slot], block of users by block."""
    size = max(_BLOCK // max(draws * request.size * request.size, 1), 1)
    starts = range(0, request.users, size)
    return torch.cat([work(slice(u, min(u + size, request.users))) for u in starts])


def _best_not_shown(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Slot k takes the first of list k [user, draw, rank] that is not in the slots above."""
    size = ids.shape[1]
    chosen, values = ids[:, 0, :1], scores[:, 0, :1]
    for k in range(1, size):
        taken = (ids[:, k, :, None] == chosen[:, None, :]).any(-1)
        first = (~taken).int().argmax(1, keepdim=True)
        chosen = torch.cat([chosen, ids[:, k].gather(1, first)], 1)
        values = torch.cat([values, scores[:, k].gather(1, first)], 1)
    return chosen, values


def _first_distinct(ids: Tensor, scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first ``size`` distinct ids of each row [user, entry], with their scores."""
    order = ids.argsort(stable=True, dim=1)
    ranked = ids.gather(1, order)
    repeat = torch.zeros_like(ranked, dtype=torch.bool)
    repeat[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    new = torch.zeros_like(repeat).scatter_(1, order, ~repeat)
    place = new.sort(stable=True, dim=1, descending=True).indices[:, :size]
    return ids.gather(1, place), scores.gather(1, place)


def _shares_of_slots(ids: Tensor, slates: Tensor, own: bool) -> Tensor:
    """Share of draws [user, slot] whose best item that is not in the slots above is the slot's.

    Args:
        ids: Best items of each draw [user, draw, rank].
        slates: Slates [user, slot].
        own: Whether the slate's own draw counts as one more.
    """
    shares = []
    for k in range(slates.shape[1]):
        above = slates[:, None, None, :k]
        taken = (ids[..., None] == above).any(-1)
        first = (~taken).int().argmax(2, keepdim=True)
        hit = ids.gather(2, first)[..., 0] == slates[:, k, None]
        shares.append((hit.sum(1) + own) / (ids.shape[1] + own))
    return torch.stack(shares, 1).double()


def _shares_of_prefixes(ids: Tensor, slates: Tensor, own: bool) -> Tensor:
    """Share of drawn slates with the slots above that agree in the next slot, too [user, slot].

    Zero where no drawn slate has the slots above.
    """
    agree = (ids == slates[:, None]).cumprod(2).sum(1) + int(own)
    above = torch.cat([torch.full_like(agree[:, :1], ids.shape[1] + int(own)), agree[:, :-1]], 1)
    return agree.double() / above.clamp_min(1)


def _in_order(ids: Tensor) -> Tensor:
    """Drop repeats, keeping the first of each."""
    ordered, inverse = ids.unique(return_inverse=True)
    place = torch.full_like(ordered, len(ids))
    place.scatter_reduce_(0, inverse, torch.arange(len(ids)), "amin")
    return ids[place.sort().values]

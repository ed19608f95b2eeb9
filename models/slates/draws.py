"""Draws of the parameters of a fitted slate model: the one place where they are made.

A draw is a number, its *row*: what it says of a site, an item or a user is a function of a seed and
the row alone, whichever other rows, items or users are asked for. So nothing of the size of the
catalogue is ever held, blocks of ids can be evaluated in any order, and all of them belong to one
draw. :class:`FitDraws` and :class:`StoredDraws` make draws of a mean-field fit and of stored draws;
:class:`ParameterDraws` is a handful of them for predictions.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.model import Batch, Values
from probkit.models.slates.guide import SlateMeanField
from probkit.models.slates.ids import FIRST_ITEM
from probkit.models.slates.item_law import GroupMoments, conditional_moments
from probkit.models.slates.log import SlateLog
from probkit.models.slates.noise import row_noise
from probkit.models.slates.transitions import States, unroll
from probkit.rng import Rng, draw_count, seed_of, stream
from probkit.sources import Fitted

if TYPE_CHECKING:
    from probkit.models.slates.model import SlateGRU
    from probkit.posterior import Posterior

__all__ = [
    "FitDraws",
    "ParameterDraws",
    "RowDraws",
    "StoredDraws",
    "draw_parameters",
    "plug_in_parameters",
    "row_draws",
    "users_in_fit",
]

_ITEMS, _USERS, _CHOICE, _SITES = 0, 101, 303, 1000  # keep kinds of noise apart
_KEPT = 256  # draws that stand for a posterior without a guide of ours
_GROUPS = ("group_mean", "group_scale")


class RowDraws(Protocol):
    """Draws by row."""

    def sites(self, rows: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return values of global sites, none of them the items, {name: [row, *site]}."""
        ...

    def items(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return vectors [row, item, dim] of ids [row, item]."""
        ...

    def users(self, rows: Tensor, log: SlateLog, numbers: Tensor | None) -> Tensor:
        """Return first states [row, hidden] of one user of a log for each row.

        Args:
            rows: Rows [row].
            log: The users, one for each row.
            numbers: Their numbers in the fit [row], see :func:`users_in_fit`.
        """
        ...


# ---------------------------------------------------------------- a mean-field fit


@dataclass(frozen=True, eq=False)
class FitDraws:
    """Draws of the guide of one fit, or its centre.

    Attributes:
        model: The model.
        guide: The guide.
        params: Its parameters.
        laws: Priors of the global sites other than the items.
        seed: Names the draws; None for the centre, which is the same in every row: medians of
            sites, means of item vectors and first states.
        temperature: Standard deviations are multiplied by its root.
    """

    model: SlateGRU
    guide: SlateMeanField
    params: Mapping[str, Any]
    laws: Mapping[str, Any]
    seed: int | None
    temperature: float = 1.0

    @property
    def widening(self) -> float:
        """Factor of all standard deviations."""
        return 0.0 if self.seed is None else math.sqrt(self.temperature)

    def _noise(self, kind: int, rows: Tensor, width: int, like: Tensor) -> Tensor:
        if self.seed is None:
            return like.new_zeros(len(rows), width)
        return row_noise(self.seed + kind, rows, width, dtype=like.dtype)

    def sites(self, rows: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return values of sites; see :class:`RowDraws`."""
        found = {}
        for name in names:
            loc, log_scale = self.params[name]["loc"], self.params[name]["log_scale"]
            noise = self._noise(_SITES + zlib.crc32(name.encode()), rows, loc.numel(), loc)
            spread = self.widening * log_scale.exp()
            found[name] = self.laws[name].constrain(loc + spread * noise.reshape(-1, *loc.shape))
        return found

    def groups(self, rows: Tensor, ids: Tensor) -> GroupMoments:
        """Return mu and kappa [row, group, dim] in the draws of rows, and the group of each id."""
        names = _GROUPS if self.model.item_prior == "hier" else ()
        found = self.model.group_moments(self.sites(rows, names), ids)
        if names:
            return found
        return found._replace(
            mean=found.mean.expand(len(rows), -1, -1), spread=found.spread.expand(len(rows), -1, -1)
        )

    def items(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return item vectors; see :class:`RowDraws`."""
        own = self.params["items"]
        if self.seed is None:
            mean, _ = self.guide.item_moments(self.params, self.model, ids.flatten())
            return mean.view(*ids.shape, self.model.dim)
        groups = self.groups(rows, ids.flatten())
        at = torch.arange(len(rows), device=ids.device)[:, None]
        group = groups.group.view(ids.shape)
        loc, scale = conditional_moments(
            own["loc"][ids], own["log_scale"][ids], groups.mean[at, group], groups.spread[at, group]
        )
        counter = rows[:, None] * self.model.n_items + ids
        noise = self._noise(_ITEMS, counter.flatten(), self.model.dim, loc)
        return loc + self.widening * scale * noise.view(loc.shape)

    def user_laws(self, log: SlateLog, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations [user, hidden] of first states."""
        if self.model.user_init == "zero":
            zero = self.params["items"]["loc"].new_zeros(len(log), self.model.memory)
            return zero, zero
        return self.guide.user_laws(self.params, self.model, Batch(log, numbers))

    def users(self, rows: Tensor, log: SlateLog, numbers: Tensor | None) -> Tensor:
        """Return first states; see :class:`RowDraws`."""
        return self.users_given(rows, *self.user_laws(log, numbers))

    def users_given(self, rows: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        """Return first states [row, hidden] from their means and standard deviations."""
        noise = self._noise(_USERS, rows, self.model.memory, mean)
        return mean + self.widening * scale * noise


@dataclass(frozen=True, eq=False)
class StoredDraws:
    """Stored draws of all sites: each row takes one of them.

    Attributes:
        model: The model.
        values: Draws [n, *site] of all sites.
        seed: Names the choices; None where row k takes draw k.
    """

    model: SlateGRU
    values: Mapping[str, Tensor]
    seed: int | None

    def choice(self, rows: Tensor) -> Tensor:
        """Return the stored draw of each row [row]."""
        if self.seed is None:
            return rows
        count = len(self.values["items"])
        noise = row_noise(self.seed + _CHOICE, rows, 1, dtype=torch.float64)[:, 0]
        return (torch.special.ndtr(noise) * count).long().clamp_max(count - 1)

    def sites(self, rows: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Return values of sites; see :class:`RowDraws`."""
        chosen = self.choice(rows)
        return {name: self.values[name][chosen] for name in names}

    def items(self, rows: Tensor, ids: Tensor) -> Tensor:
        """Return item vectors; see :class:`RowDraws`."""
        return self.values["items"][self.choice(rows)[:, None], ids]

    def users(self, rows: Tensor, log: SlateLog, numbers: Tensor | None) -> Tensor:
        """Return first states; see :class:`RowDraws`."""
        chosen = self.choice(rows)
        if self.model.user_init == "zero":
            return self.values["items"].new_zeros(len(rows), self.model.memory)
        if numbers is None:
            raise DataError("stored draws hold a state for each user of the fit: who are these?")
        return self.values["user_init"][chosen, numbers]


def row_draws(
    post: Posterior, seed: int | None, *, temperature: float = 1.0
) -> list[FitDraws | StoredDraws]:
    """Return the draws of each chain of a posterior; those of all chains are equally likely.

    A mean-field fit gives its tables; of any other posterior 256 draws are kept.

    Args:
        post: The posterior.
        seed: Names the draws; None for the centre of a fit, or the means of draws.
        temperature: Standard deviations of a fit's draws are multiplied by its root.
    """
    model = model_of(post)
    source = post.source
    if isinstance(source, Fitted) and isinstance(source.guide, SlateMeanField):
        laws = model.laws(_log_of(post))
        return [
            FitDraws(model, source.guide, own, laws, seed, temperature) for own in source.params
        ]
    if temperature != 1.0:
        raise CapabilityError(
            "recommend: draws of a posterior cannot be tempered; expected temperature=1, or a "
            "mean-field fit"
        )
    values = dict(post.sample(_KEPT, rng=0))
    if seed is None:
        values = {name: value.mean(0, keepdim=True) for name, value in values.items()}
    return [StoredDraws(model, values, seed)]


def chain_of(rows: Tensor, seed: int, chains: int) -> Tensor:
    """Return the chain of each row [row]: a draw of a posterior of several fits is of one."""
    if chains == 1:
        return torch.zeros_like(rows)
    noise = row_noise(seed + _CHOICE, rows, 1, dtype=torch.float64)[:, 0]
    return (torch.special.ndtr(noise) * chains).long().clamp_max(chains - 1)


def model_of(post: Posterior) -> SlateGRU:
    """Return the model of a posterior, which must be one of slates."""
    from probkit.models.slates.model import SlateGRU

    if not isinstance(post.model, SlateGRU):
        raise CapabilityError(
            f"expected the posterior of a SlateGRU, got that of {type(post.model).__name__}"
        )
    return post.model


def _log_of(post: Posterior) -> SlateLog:
    """A log with as many slots as the one that was fitted."""
    data = post.context.data
    example = getattr(data, "example", data)
    if not isinstance(example, SlateLog):
        raise CapabilityError(
            "expected a posterior that holds the log it was fitted to, got "
            f"{type(example).__name__}"
        )
    return example


def moving_sites(names: Sequence[str]) -> list[str]:
    """Return those of the sites that move states."""
    return [name for name in names if name == "gamma" or name.startswith("W_")]


def states_by_row(
    model: SlateGRU, sites: Values, clicked: Tensor, moves: Tensor, start: Tensor
) -> Tensor:
    """Return the state after all steps [row, dim], each row with sites and vectors of its own.

    Args:
        model: The model.
        sites: Sites that move states {name: [row, *site]}.
        clicked: Vectors of the items clicked [row, step, dim].
        moves: Whether a real item was clicked [row, step].
        start: First states [row, hidden].
    """
    found = unroll(model.transition, sites, clicked[:, None], moves[:, None], start[:, None])
    return found.read[:, 0, -1]


# ---------------------------------------------------------------- a handful of draws


@dataclass(frozen=True, eq=False)
class ParameterDraws:
    """``n`` joint draws of a posterior, or one point estimate.

    Attributes:
        model: The model.
        values: Global sites other than the items [n, *site].
        n: Number of draws.
    """

    model: SlateGRU
    values: Values
    n: int
    _post: Posterior
    _draws: Sequence[FitDraws | StoredDraws]
    _chains: Tensor

    def _by_chain(self) -> Iterator[tuple[FitDraws | StoredDraws, Tensor]]:
        """Each chain's draws, and which rows are its own."""
        for k, draws in enumerate(self._draws):
            rows = (self._chains == k).nonzero()[:, 0]
            if len(rows):
                yield draws, rows

    def items(self, ids: Tensor) -> Tensor:
        """Return item vectors [n, item, dim] of ids [item]; the same ids give the same vectors."""
        parts = [
            (rows, draws.items(rows.to(ids.device), ids.expand(len(rows), -1)))
            for draws, rows in self._by_chain()
        ]
        return _in_order(parts, self.n)

    def first_states(self, log: SlateLog, *, users: Tensor | None = None) -> Tensor:
        """Return first states [n, user, hidden] of the users of a log.

        Args:
            log: Under amortised states, clicks at its training steps tell about its users.
            users: Their numbers among the users of the fit [user], where each of these has a law
                of its own; see :func:`users_in_fit`.
        """
        if self.model.user_init == "zero":
            like = self.items(torch.tensor([FIRST_ITEM], device=log.device))
            return like.new_zeros(self.n, len(log), self.model.memory)
        numbers = users_in_fit(self._post, log, users)
        parts = []
        for draws, rows in self._by_chain():
            each = rows.to(log.device)[:, None] * len(log) + torch.arange(len(log)).to(log.device)
            if isinstance(draws, FitDraws):
                mean, scale = draws.user_laws(log, numbers)
                wide = (table.repeat(len(rows), 1) for table in (mean, scale))
                found = draws.users_given(each.flatten(), *wide)
                parts.append((rows, found.unflatten(0, (len(rows), len(log)))))
            else:
                parts.append((rows, draws.values["user_init"][draws.choice(rows)][:, numbers]))
        return _in_order(parts, self.n)

    def states(self, log: SlateLog, *, users: Tensor | None = None) -> States:
        """Return states z [n, user, step + 1, dim] along a log, and the memories after it."""
        click = log.click.long()
        moves = click >= FIRST_ITEM
        ids, place = torch.unique(click.masked_fill(~moves, FIRST_ITEM), return_inverse=True)
        clicked = self.items(ids)[:, place]
        start = self.first_states(log, users=users)
        return unroll(self.model.transition, self.values, clicked, moves, start)

    def log_probs(self, state: Tensor, slate: Tensor) -> Tensor:
        """Return log probabilities [n, *user, slot] of clicking each slot of a slate.

        Args:
            state: States z [n, *user, dim].
            slate: Ids [*user, slot], slot 0 for no click.
        """
        ids, place = torch.unique(slate.clamp_min(FIRST_ITEM), return_inverse=True)
        vectors = self.items(ids)
        # Ids become places; the first three stay special and are never scored.
        padded = torch.cat([vectors[:, :1].expand(-1, FIRST_ITEM, -1), vectors], 1)
        shown = torch.where(slate >= FIRST_ITEM, place + FIRST_ITEM, slate)
        logits = self.model.slate_logits({**self.values, "items": padded}, state, shown)
        return torch.log_softmax(logits, -1)


def draw_parameters(post: Posterior, n: int, *, rng: Rng) -> ParameterDraws:
    """Return ``n`` joint draws of the posterior of a slate model.

    Args:
        post: The posterior.
        n: Number of draws.
        rng: Seed or generator.
    """
    n, model = draw_count(n), model_of(post)
    generator = stream(rng, "parameters")
    if not _is_fit(post):
        drawn = StoredDraws(model, dict(post.sample(n, rng=generator)), None)
        return _handful(post, [drawn], n, 0)
    seed = seed_of(generator) % (1 << 62)
    return _handful(post, row_draws(post, seed), n, seed)


def plug_in_parameters(post: Posterior) -> ParameterDraws:
    """Return one point: the centre of a mean-field fit, else the mean of the stored draws.

    Item vectors and first states stand at their means, positive sites and those on (0, 1) of a fit
    at their medians. Of several fits the one with the highest bound is taken.

    Raises:
        CapabilityError: There is neither a fit nor a draw.
    """
    model = model_of(post)
    if _is_fit(post):
        return _handful(post, [row_draws(post, None)[best_chain(post)]], 1, 0)
    if not post.draws:
        raise CapabilityError(
            "the plug-in estimate needs a mean-field fit or stored draws; "
            f"{type(post.source).__name__} has neither: average over draws instead"
        )
    means = {name: value.flatten(0, 1).mean(0, keepdim=True) for name, value in post.draws.items()}
    return _handful(post, [StoredDraws(model, means, None)], 1, 0)


def best_chain(post: Posterior) -> int:
    """Return the chain with the highest bound; the first where there is none."""
    if post.log_evidence is None:
        return 0
    return int(torch.as_tensor(post.log_evidence.value).flatten().argmax())


def _handful(
    post: Posterior, draws: Sequence[FitDraws | StoredDraws], n: int, seed: int
) -> ParameterDraws:
    model, rows = model_of(post), torch.arange(n)
    chains = chain_of(rows, seed, len(draws))
    first = draws[0]
    names = list(first.laws) if isinstance(first, FitDraws) else _global_names(first.values)
    values = {}
    for name in names:
        parts = []
        for k, own in enumerate(draws):
            mine = (chains == k).nonzero()[:, 0]
            if len(mine):
                parts.append((mine, own.sites(mine, [name])[name]))
        values[name] = _in_order(parts, n)
    return ParameterDraws(model, values, n, post, draws, chains)


def _global_names(values: Values) -> list[str]:
    return [name for name in values if name not in ("items", "user_init")]


def _in_order(parts: Sequence[tuple[Tensor, Tensor]], n: int) -> Tensor:
    """Put the rows of chains in their places."""
    if len(parts) == 1:
        return parts[0][1]
    like = parts[0][1]
    found = like.new_empty(n, *like.shape[1:])
    for rows, values in parts:
        found[rows.to(like.device)] = values
    return found


# ---------------------------------------------------------------- who is who


def users_in_fit(post: Posterior, log: SlateLog, users: Tensor | None) -> Tensor | None:
    """Return the numbers [user] of a log's users in the fit; None where no user has his own law.

    Args:
        post: The posterior.
        log: The log.
        users: The numbers, where the caller knows them; None matches labels "user" of both logs.

    Raises:
        DataError: A user was not in the fit, or it cannot be told who is who.
    """
    amortised = _is_fit(post) and post.source.guide.users == "amortised"  # type: ignore[attr-defined]
    if post.model.user_init == "zero" or amortised:
        return None
    fitted = post.context.data
    if users is not None:
        return _checked_numbers(users, len(log), len(fitted))
    if log is fitted:
        return torch.arange(len(log), device=log.device)
    known, asked = fitted.labels.get("user"), log.labels.get("user")
    if known is None or asked is None:
        raise DataError(
            "the posterior holds a law for each user of the fit, and the log does not say who its "
            "users are: expected users=<numbers in the fit>, or labels 'user' in both logs"
        )
    number = {label: i for i, label in enumerate(known)}
    unseen = [label for label in asked if label not in number]
    if unseen:
        raise DataError(
            f"user {unseen[0]!r} was not in the fit, which holds a law for each user; use "
            "SlateMeanField(users='amortised') for new users"
        )
    return torch.tensor([number[label] for label in asked], device=log.device)


def _checked_numbers(users: Tensor, expected: int, fitted: int) -> Tensor:
    if tuple(users.shape) != (expected,):
        raise DataError(f"users: expected one number for each of {expected} users, got {users}")
    bad = (users < 0) | (users >= fitted)
    if bool(bad.any()):
        raise DataError(
            f"user {int(users[bad][0])} was not in the fit of {fitted} users, which holds a law "
            "for each user; use SlateMeanField(users='amortised') for new users"
        )
    return users.long()


def _is_fit(post: Posterior) -> bool:
    return isinstance(post.source, Fitted) and isinstance(post.source.guide, SlateMeanField)

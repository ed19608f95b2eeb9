"""Joint draws of the parameters of a fitted slate model, item vectors made on demand.

A draw of the item table is a function: any block of ids can be evaluated, in any order, and all
blocks belong to one draw. Nothing of the size of the catalogue is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.model import Batch, Values
from probkit.models.slates.guide import SlateMeanField
from probkit.models.slates.ids import FIRST_ITEM
from probkit.models.slates.noise import row_noise
from probkit.models.slates.transitions import States, unroll
from probkit.rng import Rng, draw_count, stream
from probkit.sources import Fitted

if TYPE_CHECKING:
    from probkit.models.slates.log import SlateLog
    from probkit.models.slates.model import SlateGRU
    from probkit.posterior import Posterior

__all__ = ["ParameterDraws", "draw_parameters", "plug_in_parameters", "users_in_fit"]


class _Tables(Protocol):
    """Where item vectors and first states of some draws come from."""

    def items(self, ids: Tensor) -> Tensor:
        """Vectors [n, item, dim]."""
        ...

    def users(self, log: SlateLog, users: Tensor | None) -> Tensor:
        """First states [n, user, hidden]."""
        ...


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
    _tables: _Tables

    def items(self, ids: Tensor) -> Tensor:
        """Return item vectors [n, item, dim] of ids [item]; the same ids give the same vectors."""
        return self._tables.items(ids)

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
        return self._tables.users(log, users)

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
    n, model = draw_count(n), _model_of(post)
    generator = stream(rng, "parameters")
    if _is_fit(post):
        owners = torch.randint(post.chains, (n,), generator=generator).tolist()
        seeds = torch.randint(2**62, (n,), generator=generator).tolist()
        fitted = _FittedTables(model, post, owners, seeds)
        return ParameterDraws(model, fitted.globals(), n, fitted)
    drawn = post.sample(n, rng=generator)
    return ParameterDraws(model, _globals_of(drawn), n, _DrawnTables(post, drawn))


def plug_in_parameters(post: Posterior) -> ParameterDraws:
    """Return one point: the centre of a mean-field fit, else the mean of the stored draws.

    Positive sites and those on (0, 1) of a fit stand at their median.

    Raises:
        CapabilityError: There is neither a fit nor a draw.
    """
    model = _model_of(post)
    if _is_fit(post):
        fitted = _FittedTables(model, post, [0], [None])
        return ParameterDraws(model, fitted.globals(), 1, fitted)
    if not post.draws:
        raise CapabilityError(
            "the plug-in estimate needs a mean-field fit or stored draws; "
            f"{type(post.source).__name__} has neither: average over draws instead"
        )
    means = {name: value.flatten(0, 1).mean(0, keepdim=True) for name, value in post.draws.items()}
    return ParameterDraws(model, _globals_of(means), 1, _DrawnTables(post, means))


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


def _model_of(post: Posterior) -> SlateGRU:
    from probkit.models.slates.model import SlateGRU

    if not isinstance(post.model, SlateGRU):
        raise CapabilityError(
            f"expected the posterior of a SlateGRU, got that of {type(post.model).__name__}"
        )
    return post.model


def _is_fit(post: Posterior) -> bool:
    return isinstance(post.source, Fitted) and isinstance(post.source.guide, SlateMeanField)


def _globals_of(values: Values) -> Values:
    return {k: v for k, v in values.items() if k not in ("items", "user_init")}


@dataclass(frozen=True, eq=False)
class _FittedTables:
    """Draws of a SlateMeanField; a seed of None stands for the centre."""

    model: SlateGRU
    post: Posterior
    owners: list[int]
    seeds: list[int | None]

    def _params(self, k: int) -> Any:
        return self.post.source.params[self.owners[k]]  # type: ignore[attr-defined]

    def globals(self) -> dict[str, Tensor]:
        """Values of the sites other than items and users [n, *site]."""
        laws = self.model.laws(self.post.context.data)
        found: dict[str, list[Tensor]] = {name: [] for name in laws}
        for k, seed in enumerate(self.seeds):
            params = self._params(k)
            generator = None if seed is None else torch.Generator().manual_seed(seed)
            for name, law in laws.items():
                free = params[name]["loc"]
                if generator is not None:
                    noise = torch.randn(free.shape, generator=generator, dtype=free.dtype)
                    free = free + params[name]["log_scale"].exp() * noise.to(free.device)
                found[name].append(law.constrain(free))
        return {name: torch.stack(values) for name, values in found.items()}

    def items(self, ids: Tensor) -> Tensor:
        found = []
        for k, seed in enumerate(self.seeds):
            own = self._params(k)["items"]
            vectors = own["loc"].index_select(0, ids)
            if seed is not None:
                noise = row_noise(seed, ids, self.model.dim, dtype=vectors.dtype)
                vectors = vectors + own["log_scale"].index_select(0, ids).exp() * noise
            found.append(vectors)
        return torch.stack(found)

    def users(self, log: SlateLog, users: Tensor | None) -> Tensor:
        guide = self.post.source.guide  # type: ignore[attr-defined]
        batch = Batch(log, users_in_fit(self.post, log, users))
        found = []
        for k, seed in enumerate(self.seeds):
            mean, scale = guide.user_laws(self._params(k), self.model, batch)
            if seed is not None:
                generator = torch.Generator().manual_seed(seed + 1)
                noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype)
                mean = mean + scale * noise.to(mean.device)
            found.append(mean)
        return torch.stack(found)


@dataclass(frozen=True, eq=False)
class _DrawnTables:
    """Draws [n, *site] of all sites."""

    post: Posterior
    drawn: Values

    def items(self, ids: Tensor) -> Tensor:
        return self.drawn["items"][:, ids]

    def users(self, log: SlateLog, users: Tensor | None) -> Tensor:
        return self.drawn["user_init"][:, users_in_fit(self.post, log, users)]

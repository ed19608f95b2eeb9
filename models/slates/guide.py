"""Guide of the slate model, with its evidence lower bound in its fastest form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from probkit.errors import DataError
from probkit.files import storable
from probkit.guide import Guide, LogQ, Params
from probkit.loader import Sized
from probkit.model import Batch, Values
from probkit.models.slates.amortise import amortised_moments
from probkit.models.slates.batch_plan import (
    BatchPlan,
    Places,
    distinct,
    inclusion,
    plan_batch,
    surely_touched,
    users_of_items,
)
from probkit.models.slates.choices import Choices, Likelihood
from probkit.models.slates.ids import FIRST_ITEM
from probkit.models.slates.item_law import (
    UNKNOWN,
    GroupMoments,
    conditional_moments,
    draw_items,
    marginal_moments,
)
from probkit.models.slates.noise import row_noise
from probkit.models.slates.scoring import catalogue_log_prob, choice_log_prob
from probkit.models.slates.transitions import unroll
from probkit.rng import Rng, seed_of, stream
from probkit.tree import map_tensors

if TYPE_CHECKING:
    from probkit.models.slates.log import SlateLog
    from probkit.models.slates.model import Carried, SlateGRU

__all__ = ["BoundTerms", "SlateMeanField"]

_LOG_2PI = math.log(2 * math.pi)
_MANY_ITEMS = 20_000
_USER_NOISE = 0x5EED  # keeps the noise of users apart from that of items
_SHARP, _WIDE = 0.3, 2.0  # r over kappa at the start of a fit, and of items that join one later


class BoundTerms(NamedTuple):
    """The parts of one draw of the bound on a batch, each a scalar.

    Attributes:
        log_likelihood: Of the batch, not tempered.
        users: KL(q(h_0) || p), summed over the batch.
        items: KL(q(v) || p(v | groups)), estimated for the whole table.
        globals: KL of all other sites.
    """

    log_likelihood: Tensor
    users: Tensor
    items: Tensor
    globals: Tensor

    def bound(self, scale: float, temperature: float) -> Tensor:
        """Return scale * (log likelihood / temperature - users) - items - globals."""
        local = self.log_likelihood / temperature - self.users
        return scale * local - self.items - self.globals


@storable
@dataclass(frozen=True, eq=False)
class SlateMeanField(Guide):
    """Independent normals in the unconstrained space, and items that follow their groups.

    The spread of a group is log-normal. An item's vector is normal *given its group*: the prior
    times a normal factor of its own, which stands for the item's clicks
    (:mod:`probkit.models.slates.item_law`). Items that nobody saw keep their prior: they are
    uncertain by all that is not known of their group, and tell nothing of it.

    All divergences are in closed form (that of the items given a draw of their groups), and the
    items a step does not need are not touched.

    **Many processes.** ``SVI(..., distributed=True)`` in a script that calls
    ``torch.distributed.init_process_group("gloo")`` shares the users among the processes, and the
    rows of the tables: process k holds the items k, k + count, ... with their moments. Launch the
    script on one machine, or on each of several with the same ``--rdzv-endpoint``::

        torchrun --nproc-per-node 2 fit.py
        torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint HOST:29500 fit.py

    The result is that of a single process that takes the users of all processes in each step.
    See :func:`~probkit.models.slates.fit_bytes` for the memory that it takes.

    Args:
        users: "amortised": the law of a user's first state is a function of the items clicked at
            training steps (:func:`~probkit.models.slates.amortise.amortised_moments`), and new
            users need no fit; or "table", a mean and a scale for each user.
        init_scale: Standard deviations to start from; items start near their prior.
        pseudo_clicks: See :func:`~probkit.models.slates.amortise.amortised_moments`.
        divergence: How the items' divergence is found in a minibatch. "all": all items, for small
            tables. "uniform": those of a uniform subset of ``subset`` items, times I / subset.
            "inclusion": those in the batch, each over the probability of being in a batch, and of
            the items that only drawn slates or an earlier log show a uniform subset. None: "all" up
            to 20,000 items, else "inclusion", or "uniform" where batches come from a Loader or
            several processes.
        subset: Items of the uniform subset.
        freeze: Sites whose parameters stay as they are.
        start: Parameters to start from, for the sites that it names.

    Example:
        >>> SlateMeanField(users="table").users
        'table'
    """

    users: Literal["amortised", "table"] = "amortised"
    init_scale: float = 0.1
    pseudo_clicks: float = 1.0
    divergence: Literal["all", "uniform", "inclusion"] | None = None
    subset: int = 2000
    freeze: tuple[str, ...] = ()
    start: Params | None = None

    def __post_init__(self) -> None:
        if self.users not in ("amortised", "table"):
            raise DataError(
                f"SlateMeanField: expected users 'amortised' or 'table', got {self.users!r}"
            )
        if self.divergence not in (None, "all", "uniform", "inclusion"):
            raise DataError(
                "SlateMeanField: expected divergence 'all', 'uniform', 'inclusion' or None, got "
                f"{self.divergence!r}"
            )
        if not 0 < self.init_scale < math.inf or not 0 <= self.pseudo_clicks < math.inf:
            raise DataError(
                "SlateMeanField: expected init_scale > 0 and pseudo_clicks >= 0, got "
                f"{self.init_scale}, {self.pseudo_clicks}"
            )
        if not isinstance(self.subset, int) or self.subset < 1:
            raise DataError(f"SlateMeanField: expected subset >= 1, got {self.subset!r}")
        object.__setattr__(self, "freeze", tuple(self.freeze))

    # ---------------------------------------------------------------- parameters

    def init(self, model: SlateGRU, data: SlateLog, *, rng: Rng) -> Params:
        """Return {site: {"loc", "log_scale"}}, and what amortises users.

        Those of "items" are t and log r of each item's factor. Under "inclusion" divergences
        ``exposure`` holds how many users touch each item, and the other items that count.
        """
        generator = stream(rng, "guide", device=data.device)
        sites = model.sites(data)
        start = model.starting_points(data, 1, rng=generator)
        laws = model.laws(data)
        params: dict[str, Any] = {}
        for name, value in start.items():
            free = laws[name].free(value[0]) if name in laws else value[0]
            scale = math.log(self.init_scale * (model.prior.user if name == "user_init" else 1.0))
            params[name] = {"loc": free, "log_scale": torch.full_like(free, scale)}
        if "user_init" in sites:
            params["user_init"] = self._user_params(model, sites, params["user_init"])
        noise = params["items"]["loc"]
        params["items"] = _fresh_items(model, params, noise, _SHARP)
        for name, given in (self.start or {}).items():
            if name in params and name != "exposure":
                _check_start(name, params[name], given)
                params[name] = map_tensors(lambda t: t.to(data.device), given)
        if not isinstance(model, Sized):
            counts = users_of_items(model, data)
            if "items" not in self.freeze:
                known = _known_items(model, counts)
                joining = _fresh_items(model, params, noise, _WIDE)
                params["items"] = _with_unknown(params["items"], joining, known)
            if self._divergence(model) == "inclusion":
                told = (params["items"]["log_scale"] < UNKNOWN - 1).any(1)
                others = (told & (counts == 0)).nonzero()[:, 0]
                params["exposure"] = {"users": counts.int(), "unseen": others}
        return params

    def _user_params(self, model: SlateGRU, sites: Any, table: dict[str, Tensor]) -> Any:
        if self.users == "table":
            users, start = sites["user_init"].shape[0], table["loc"]
            if len(start) == users:
                return table
            grown = {k: v[:1].expand(users, -1).clone() for k, v in table.items()}
            return {**grown, "loc": torch.zeros_like(grown["loc"])}
        like = table["loc"]
        found = {"log_factor": like.new_zeros(())}
        if model.memory != model.dim:
            found["map"] = torch.eye(model.memory, model.dim, dtype=like.dtype, device=like.device)
        return found

    def _divergence(self, model: SlateGRU) -> str:
        if self.divergence is not None:
            return self.divergence
        return "all" if model.n_items <= _MANY_ITEMS else "inclusion"

    # ---------------------------------------------------------------- tables, read by rows

    def tables(self, params: Params, model: SlateGRU) -> tuple[str, ...]:
        """Name the tables of which a step needs some rows only."""
        found = () if self._divergence(model) == "all" else ("items",)
        has_table = self.users == "table" and model.user_init == "normal"
        return (*found, "user_init") if has_table else found

    def rows(
        self,
        params: Params,
        model: SlateGRU,
        batch: Batch,
        *,
        rng: Rng,
        part: tuple[int, int] = (0, 1),
    ) -> dict[str, dict[str, Any]]:
        """Return the rows of each table that the bound on a batch needs, and the batch's plan.

        Args:
            params: Parameters; of the tables only ``exposure`` is read.
            model: The model.
            batch: The batch.
            rng: Stream of the drawn items.
            part: (number, count) of this process: it adds its share of a uniform subset.
        """
        found: dict[str, dict[str, Any]] = {}
        names = self.tables(params, model)
        if "items" in names:
            plan = self.plan(params, model, batch, rng=rng, part=part)
            found["items"] = {"rows": plan.rows, "plan": plan}
        if "user_init" in names:
            found["user_init"] = {"rows": _user_numbers(batch)}
        return found

    def plan(
        self,
        params: Params,
        model: SlateGRU,
        batch: Batch,
        *,
        rng: Rng,
        part: tuple[int, int] = (0, 1),
    ) -> BatchPlan:
        """Return the choices of a batch, the items it needs and the weight of their divergences."""
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "plan")
        plan = plan_batch(model, batch.data, generator)
        way = self._divergence(model)
        if way == "all":
            return plan
        touched = plan.touched
        if any(kind == "full" for kind, _ in plan.choices):
            touched = [*touched, torch.arange(FIRST_ITEM, model.n_items, device=plan.clicks.device)]
        if way == "inclusion" and "exposure" in params and part[1] == 1:
            chosen, weight = self._by_inclusion(params["exposure"], model, batch, plan, generator)
        else:
            chosen, weight = self._uniform(model.n_items, generator, part, plan.clicks.device)
        rows = distinct([*touched, chosen], model.n_items)
        place = Places(rows, model.n_items)(chosen)
        weights = torch.zeros(len(rows), dtype=model.dtype, device=rows.device)
        weights[place] = weight.to(weights)
        return replace(plan, rows=rows, weight=weights)

    def _uniform(
        self, size: int, rng: torch.Generator, part: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """A uniform subset without replacement (our share of it), each item's weight I / |M|."""
        count = min(self.subset, size)
        chosen = _subset(size, count, rng).to(device)[part[0] :: part[1]]
        # The mean over processes of what each adds is the sum over the subset.
        return chosen, torch.full((len(chosen),), part[1] * size / count, device=device)

    def _by_inclusion(
        self,
        exposure: Mapping[str, Tensor],
        model: SlateGRU,
        batch: Batch,
        plan: BatchPlan,
        rng: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """The items in the batch over their probability of being there, and some of the others.

        Items of which nothing is known have a divergence of zero and are left out.
        """
        seen = surely_touched(model, plan)
        size = len(batch.data)
        units = round(batch.scale * size)
        weight = 1 / inclusion(exposure["users"][seen], units, size)
        unseen = exposure["unseen"]
        if not len(unseen):
            return seen, weight
        count = min(self.subset, len(unseen))
        more = unseen[_subset(len(unseen), count, rng).to(unseen.device)]
        others = weight.new_full((count,), len(unseen) / count)
        return torch.cat([seen, more]), torch.cat([weight, others])

    # ---------------------------------------------------------------- the bound

    def elbo(self, params: Params, model: SlateGRU, batch: Batch, n: int, *, rng: Rng) -> Tensor:
        """Return ``n`` estimates [n] of the bound on all data, each from one draw."""
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "draw")
        plan = params["items"].get("plan")
        if plan is None:
            plan = self.plan(params, model, batch, rng=generator)
        found = [
            self.terms(params, model, batch, plan, seed_of(generator)).bound(
                batch.scale, model.temperature
            )
            for _ in range(n)
        ]
        return torch.stack(found)

    def terms(
        self, params: Params, model: SlateGRU, batch: Batch, plan: BatchPlan, seed: int
    ) -> BoundTerms:
        """Return the parts of the bound for the draw that belongs to ``seed``.

        The noise of an item or user depends on its number and the seed alone, so that batches,
        subsets and processes see one draw of the tables.

        Args:
            params: Parameters; the tables as a whole, or the rows of ``plan`` with their numbers
                under "rows".
            model: The model.
            batch: The batch.
            plan: Its plan, see :meth:`plan`.
            seed: Names the draw.
        """
        params = self._with_frozen(params)
        laws = model.laws(batch.data)
        values, divergence = _draw_globals(laws, params, seed)
        items, rows = params["items"], plan.rows
        loc, log_scale = items["loc"], items["log_scale"]
        if rows is None:
            rows = torch.arange(model.n_items, device=loc.device)
        elif "rows" not in items:
            loc, log_scale = loc.index_select(0, rows), log_scale.index_select(0, rows)
        groups = model.group_moments(values, rows)
        vectors, divergence_of_items = draw_items(loc, log_scale, groups, plan.weight, seed, rows)
        if model.carried is not None:
            moments = conditional_moments(loc, log_scale, *_of_rows(groups))
            divergence_of_items = divergence_of_items - _carried_factor(
                model.carried, rows, *moments, plan.weight
            )
        places = Places(plan.rows, model.n_items)
        clicked = places(plan.clicks)
        centres = self._centres(params, model, plan, loc, log_scale, clicked)
        start, users = self._draw_users(params, model, batch, plan, centres, seed)
        read = unroll(model.transition, values, _taken(vectors, clicked), plan.moves, start).read
        terms = [
            _log_likelihood(model, values, kind, choices, vectors, places, read).sum()
            for kind, choices in plan.choices
        ]
        return BoundTerms(
            torch.stack([read.sum() * 0, *terms]).sum(),
            users,
            divergence_of_items,
            divergence,
        )

    def _with_frozen(self, params: Params) -> Params:
        if not self.freeze:
            return params
        return {
            name: map_tensors(Tensor.detach, own) if name in self.freeze else own
            for name, own in params.items()
        }

    def _centres(
        self,
        params: Params,
        model: SlateGRU,
        plan: BatchPlan,
        loc: Tensor,
        log_scale: Tensor,
        clicked: Tensor,
    ) -> Tensor:
        """Centres [user, step, dim] of the items clicked, at the places ``clicked`` of the rows."""
        if model.user_init == "zero" or self.users == "table":
            return loc.new_zeros(*clicked.shape, model.dim)  # Nobody asks.
        groups = model.group_moments(self.group_centres(params, model), plan.clicks.flatten())
        own = [_taken(table, clicked).flatten(0, 1) for table in (loc, log_scale)]
        centre, _ = conditional_moments(own[0], own[1], *_of_rows(groups))
        return centre.view(*clicked.shape, model.dim)

    def group_centres(self, params: Params, model: SlateGRU) -> dict[str, Tensor]:
        """Return the sites of groups at the medians of their laws; none under the flat prior."""
        if model.item_prior == "flat":
            return {}
        mean, spread = params["group_mean"]["loc"], params["group_scale"]["loc"].exp()
        return {"group_mean": mean, "group_scale": spread}

    def item_moments(
        self, params: Params, model: SlateGRU, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations [row, dim] of item vectors.

        Args:
            params: Parameters.
            model: The model.
            rows: Ids [row]; None for all.
        """
        loc, log_scale = params["items"]["loc"], params["items"]["log_scale"]
        if rows is None:
            rows = torch.arange(model.n_items, device=loc.device)
        else:
            loc, log_scale = loc[rows], log_scale[rows]
        if model.item_prior == "flat":
            groups = model.group_moments({}, rows)
            return conditional_moments(loc, log_scale, *_of_rows(groups))
        mean, spread = ((own["loc"], own["log_scale"].exp()) for own in _group_params(params))
        return marginal_moments(loc, log_scale, mean, spread, model.group_of(rows))

    def _draw_users(
        self,
        params: Params,
        model: SlateGRU,
        batch: Batch,
        plan: BatchPlan,
        clicked: Tensor,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        """First states [user, hidden] and their divergence from the prior."""
        if model.user_init == "zero":
            zero = clicked.new_zeros(len(batch.data), model.memory)
            return zero, clicked.new_zeros(())
        numbers = _user_numbers(batch)
        mean, scale = self.user_moments(params, model, batch, clicked, plan.trained)
        noise = row_noise(seed ^ _USER_NOISE, numbers, model.memory, dtype=mean.dtype)
        law = model.user_law(batch.data)
        return mean + scale * noise, law.divergence(mean, scale.log())

    def user_moments(
        self, params: Params, model: SlateGRU, batch: Batch, clicked: Tensor, trained: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations of users' first states [user, hidden].

        Args:
            params: Parameters.
            model: The model.
            batch: The users.
            clicked: Centres of the vectors of the items they clicked [user, step, dim].
            trained: Whether a real item was clicked at a training step [user, step].
        """
        own = params["user_init"]
        if self.users == "table":
            if "rows" in own or batch.index is None:
                return own["loc"], own["log_scale"].exp()
            index = batch.index.to(own["loc"].device)
            return own["loc"][index], own["log_scale"][index].exp()
        if "map" in own:
            clicked = clicked @ own["map"].mT
        factor = own["log_factor"].exp()
        return amortised_moments(clicked, trained, factor, model.prior.user, self.pseudo_clicks)

    # ---------------------------------------------------------------- draws

    def sample(
        self, params: Params, model: SlateGRU, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw all sites."""
        device = batch.data.device
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "draw", device=device)
        laws = model.laws(batch.data)
        values: dict[str, Tensor] = {}
        log_q = params["items"]["loc"].new_zeros(n)
        for name, law in laws.items():
            free, term = _draw(params[name]["loc"], params[name]["log_scale"], n, generator)
            values[name] = law.constrain(free)
            log_q = log_q + term - law.log_jacobian(values[name])
        own = params["items"]
        groups = model.group_moments(values, torch.arange(model.n_items, device=device))
        mean, scale = conditional_moments(own["loc"], own["log_scale"], *_of_rows(groups))
        shape = (n, model.n_items, model.dim)
        values["items"], term = _draw_each(mean.expand(shape), scale.log().expand(shape), generator)
        log_q = log_q + term
        local = torch.zeros_like(log_q)
        if model.user_init == "normal":
            mean, scale = self.user_laws(params, model, batch)
            values["user_init"], local = _draw(mean, scale.log(), n, generator)
        return values, LogQ(log_q, local)

    def user_laws(self, params: Params, model: SlateGRU, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations [user, hidden] of the first states of a batch."""
        log = batch.data
        if self.users == "table":
            return self.user_moments(params, model, batch, log.click, log.click)
        size = max((1 << 24) // (log.steps * model.dim), 1)
        means, scales = [], []
        for first in range(0, len(log), size):
            click = log.click[first : first + size].long()
            trained = (click >= FIRST_ITEM) & log.train[first : first + size]
            groups = model.group_moments(self.group_centres(params, model), click.flatten())
            own = [_taken(params["items"][k], click).flatten(0, 1) for k in ("loc", "log_scale")]
            clicked, _ = conditional_moments(own[0], own[1], *_of_rows(groups))
            clicked = clicked.view(*click.shape, model.dim)
            mean, scale = self.user_moments(params, model, batch, clicked, trained)
            means.append(mean)
            scales.append(scale)
        return torch.cat(means), torch.cat(scales)

    def marginals(self, params: Params, model: SlateGRU, data: Any) -> Mapping[str, Distribution]:
        """Return the law of each site; of items the normal law with its mean and deviation."""
        batch = data if isinstance(data, Batch) else Batch(data)
        found: dict[str, Distribution] = {}
        for name, law in model.laws(batch.data).items():
            found[name] = law.marginal(params[name]["loc"], params[name]["log_scale"].exp())
        found["items"] = Normal(*self.item_moments(params, model))
        if model.user_init == "normal":
            found["user_init"] = Normal(*self.user_laws(params, model, batch))
        return found


# -------------------------------------------------------------------- small steps


def _check_start(name: str, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    for key, value in own.items():
        if key not in given or given[key].shape != value.shape:
            found = tuple(given[key].shape) if key in given else "none"
            raise DataError(
                f"SlateMeanField: expected start[{name!r}][{key!r}] of shape "
                f"{tuple(value.shape)}, got {found}; leave the site out to start it afresh"
            )


def _subset(size: int, count: int, rng: torch.Generator) -> Tensor:
    """Draw ``count`` of ``size`` numbers uniformly without replacement, in time O(count)."""
    if 3 * count >= size:
        return torch.randperm(size, generator=rng, device=rng.device)[:count]
    found = torch.zeros(0, dtype=torch.int64, device=rng.device)
    while len(found) < count:  # Rejecting repeats one after another leaves a uniform subset.
        more = torch.randint(size, (2 * count,), generator=rng, device=rng.device)
        found = _in_order_of_arrival(torch.cat([found, more]))
    return found[:count]


def _in_order_of_arrival(numbers: Tensor) -> Tensor:
    """Drop repeats, keeping the order in which numbers first came."""
    distinct_, inverse = torch.unique(numbers, return_inverse=True)
    position = torch.arange(len(numbers), device=numbers.device)
    first = torch.full_like(distinct_, len(numbers)).scatter_reduce_(0, inverse, position, "amin")
    return numbers[first.sort().values]


def _user_numbers(batch: Batch) -> Tensor:
    if batch.index is None:
        return torch.arange(len(batch.data), device=batch.data.device)
    return batch.index.to(batch.data.device)


def _taken(table: Tensor, rows: Tensor) -> Tensor:
    """Rows [*, dim] of a table; ``index_select`` has the faster gradient."""
    return table.index_select(0, rows.flatten().long()).view(*rows.shape, table.shape[1])


def _draw(loc: Tensor, log_scale: Tensor, n: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw normals [n, *site] and their log density [n]."""
    shape = (n, *loc.shape)
    return _draw_each(loc.expand(shape), log_scale.expand(shape), rng)


def _draw_each(loc: Tensor, log_scale: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one value of each of n normals [n, *site], and their log density [n]."""
    noise = torch.randn(loc.shape, generator=rng, dtype=loc.dtype, device=rng.device)
    noise = noise.to(loc.device)
    terms = -0.5 * (noise.square() + _LOG_2PI) - log_scale
    return loc + log_scale.exp() * noise, terms.reshape(len(loc), -1).sum(1)


def _draw_globals(
    laws: Mapping[str, Any], params: Params, seed: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Values of the sites other than items and users, and their divergence from the prior."""
    device = params["items"]["loc"].device
    generator = torch.Generator(device).manual_seed(seed)
    values: dict[str, Tensor] = {}
    divergence = params["items"]["loc"].new_zeros(())
    for name, law in laws.items():
        loc, log_scale = params[name]["loc"], params[name]["log_scale"]
        noise = torch.randn(loc.shape, generator=generator, dtype=loc.dtype, device=device)
        values[name] = law.constrain(loc + log_scale.exp() * noise)
        divergence = divergence + law.divergence(loc, log_scale)
    return values, divergence


def _log_likelihood(
    model: SlateGRU,
    values: Values,
    kind: Likelihood,
    choices: Choices,
    vectors: Tensor,
    places: Places,
    read: Tensor,
) -> Tensor:
    """Log probabilities [choice]."""
    step = choices.user * read.shape[1] + choices.step
    state = _taken(read.flatten(0, 1), step)
    no_click = model.no_click(values, choices.length)
    multiplier = values.get("multiplier")
    if kind == "full":
        real = torch.arange(FIRST_ITEM, model.n_items, device=vectors.device)
        items = _taken(vectors, places(real))
        return catalogue_log_prob(model.score, state, items, no_click, choices.chosen, multiplier)
    return choice_log_prob(
        model.score,
        state,
        vectors,
        places(choices.ids),
        choices.offset,
        no_click,
        choices.chosen,
        multiplier,
    )


def _of_rows(groups: GroupMoments) -> tuple[Tensor, Tensor]:
    """Moments of the groups [*draw, row, dim] that the rows are in."""
    return groups.mean[..., groups.group, :], groups.spread[..., groups.group, :]


def _group_params(params: Params) -> tuple[Any, Any]:
    return params["group_mean"], params["group_scale"]


def _carried_factor(
    carried: Carried, rows: Tensor, mean: Tensor, scale: Tensor, weight: Tensor | None
) -> Tensor:
    """Weighted sum of E log of the factors that an earlier log left of each item."""
    precision, shift = carried.precision[rows], carried.shift[rows]
    each = (shift * mean - 0.5 * precision * (scale.square() + mean.square())).sum(1)
    return each.sum() if weight is None else (weight * each).sum()


# -------------------------------------------------------------------- where items start


def _fresh_items(model: SlateGRU, params: Params, noise: Tensor, width: float) -> dict[str, Tensor]:
    """Factors of items that are about to be learned: near their group, r = width * kappa."""
    rows = torch.arange(model.n_items, device=noise.device)
    values = {}
    if model.item_prior == "hier":
        mean, spread = _group_params(params)
        values = {"group_mean": mean["loc"], "group_scale": spread["loc"].exp()}
    mean, spread = _of_rows(model.group_moments(values, rows))
    return {"loc": mean + noise, "log_scale": spread.log() + math.log(width)}


def _known_items(model: SlateGRU, counts: Tensor) -> Tensor:
    """Whether anything tells of each item [item]: this log, drawn slates, or an earlier log."""
    if any(kind != "slate" for kind in model.by_type):
        return torch.arange(model.n_items, device=counts.device) >= FIRST_ITEM
    known = counts > 0
    if model.carried is not None:
        known = known | (model.carried.precision > 0).any(1).to(known.device)
    return known


def _with_unknown(
    own: Mapping[str, Tensor], fresh: Mapping[str, Tensor], known: Tensor
) -> dict[str, Tensor]:
    """Let items of which nothing is known have their prior, and those that become known start."""
    new = known[:, None] & (own["log_scale"] >= UNKNOWN - 1)
    loc = torch.where(new, fresh["loc"], own["loc"])
    log_scale = torch.where(new, fresh["log_scale"], own["log_scale"])
    return {"loc": loc, "log_scale": torch.where(known[:, None], log_scale, UNKNOWN)}

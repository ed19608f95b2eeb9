"""The slate model: items in groups, states of users that move with clicks, choices from slates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.model import Batch, Model, Site, Values
from probkit.models.slates.choices import Likelihood, by_type
from probkit.models.slates.ids import FIRST_ITEM
from probkit.models.slates.item_law import SMALLEST_SPREAD, GroupMoments
from probkit.models.slates.log import SlateLog
from probkit.models.slates.priors import Law, SlatePrior
from probkit.models.slates.scoring import Score, scores
from probkit.models.slates.transitions import States, Transition, unroll, weight_shapes
from probkit.rng import Rng, stream

if TYPE_CHECKING:
    from probkit.guide import Guide
    from probkit.posterior import Posterior
    from probkit.predictive import Predictive
    from probkit.sampler import Sampler

__all__ = ["Carried", "SlateGRU"]

_ENTRIES = 1 << 24  # of the largest tensor of the plain likelihood


@storable
@dataclass(frozen=True, eq=False)
class Carried:
    """What an earlier posterior says, in the place of the data it came from.

    Attributes:
        sites: Site name -> {"loc", "scale"}: normals in the unconstrained space that replace the
            priors of these sites.
        precision: Precisions of normal factors on the item vectors [item, dim], beside their prior.
        shift: Precision times mean of these factors [item, dim].
    """

    sites: Mapping[str, Mapping[str, Tensor]]
    precision: Tensor
    shift: Tensor

    def log_factor(self, items: Tensor) -> Tensor:
        """Return the log of the factors [*draw] at item vectors [*draw, item, dim]."""
        return (self.shift * items - 0.5 * self.precision * items.square()).sum((-2, -1))


@storable
@dataclass(frozen=True, eq=False)
class SlateGRU(Model):
    """Choices from slates by users whose state moves with their clicks.

    Items i of group g have vectors v_i ~ N(mu_g, kappa_g^2), users first states h_0 ~ N(0, c^2).
    The state z_t before step t depends on the clicks on real items before it, through the
    ``transition``. Of a slate the user chooses slot s with logit s(z_t, v_s), or no click with
    logit beta_L, L slots being in use (Eide, Leslie and Frigessi 2022).

    Sites: ``items`` [item, dim], ``group_mean`` and ``group_scale`` [group, dim] (hierarchical
    prior), ``no_click`` [length], the transition's ``gamma`` or weights, ``multiplier``, and
    ``user_init`` [user, hidden], local to the plate "user".

    Args:
        n_items: Number of ids I, padding, no click and unknown (0, 1, 2) included.
        groups: Group of each id [item]; None for one group.
        transition: "gru", "lstm", "linear", "markov", or "lingru", the mean of GRU and linear.
        score: "l2", -|z - v|, or "dot", z . v.
        dim: Length of item vectors.
        hidden: Length of the memory; None for ``dim``. Linear transitions need ``dim``.
        item_prior: "hier", or "flat": v_i ~ N(0, item^2).
        user_init: "normal", or "zero": all users start at zero.
        length_bias: A score of no click for each slate length, or one for all.
        likelihood: "slate" (choice among the slate), "full" (among all items), "sampled" ("full",
            estimated with drawn items in each step of a fit), or one by interaction type, for
            example {"search": "sampled", "recommendation": "slate"}.
        negatives: Items drawn for each choice of a sampled likelihood.
        log_q: Whether sampled likelihoods are corrected for drawing few of many items.
        temperature: The log likelihood is divided by it; 1 is the posterior. The reference
            implementation uses about 0.01, which counts each choice a hundred times.
            ``post.attrs["temperature"]`` reports it.
        prior: Scales of the priors.
        carried: What an earlier posterior says; set by ``post.update``.
        dtype: Of all parameters.

    Example:
        >>> log = SlateLog([[[1, 3, 4], [1, 4, 5]]] * 3, [[4, 1]] * 3)
        >>> model = SlateGRU(log.n_items, transition="linear", dim=2)
        >>> sorted(model.sites(log))
        ['gamma', 'group_mean', 'group_scale', 'items', 'no_click', 'user_init']
    """

    n_items: int
    groups: Tensor | None = None
    transition: Transition = "gru"
    score: Score = "l2"
    dim: int = 50
    hidden: int | None = None
    item_prior: Literal["hier", "flat"] = "hier"
    user_init: Literal["normal", "zero"] = "normal"
    length_bias: bool = True
    likelihood: Any = "slate"
    negatives: int = 50
    log_q: bool = True
    temperature: float = 1.0
    prior: SlatePrior = field(default_factory=SlatePrior)
    carried: Carried | None = None
    dtype: torch.dtype = torch.float32

    batched: ClassVar[bool] = True
    predictive_draws: ClassVar[int] = 100

    def __post_init__(self) -> None:
        known = {
            "transition": ("linear", "markov", "gru", "lstm", "lingru"),
            "score": ("l2", "dot"),
            "item_prior": ("hier", "flat"),
            "user_init": ("normal", "zero"),
        }
        for name, options in known.items():
            if getattr(self, name) not in options:
                raise DataError(
                    f"SlateGRU: expected {name} one of {', '.join(options)}, got "
                    f"{getattr(self, name)!r}"
                )
        if int(self.n_items) <= FIRST_ITEM:
            raise DataError(
                f"SlateGRU: expected n_items >= {FIRST_ITEM + 1} (ids 0, 1, 2 are padding, no "
                f"click and unknown), got {self.n_items}"
            )
        for name in ("dim", "hidden", "negatives"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise DataError(f"SlateGRU: expected a whole number {name} >= 1, got {value!r}")
        if self.transition in ("linear", "markov", "lingru") and self.memory != self.dim:
            raise DataError(
                f"SlateGRU: the {self.transition} transition keeps item vectors in memory: "
                f"expected hidden = dim = {self.dim}, got hidden={self.hidden}; leave hidden out"
            )
        if not 0 < self.temperature < math.inf:
            raise DataError(f"SlateGRU: expected temperature > 0, got {self.temperature}")
        if self.dtype not in (torch.float32, torch.float64):
            raise DataError(
                f"SlateGRU: expected dtype torch.float32 or torch.float64, got {self.dtype}"
            )
        object.__setattr__(self, "likelihood", by_type(self.likelihood))
        object.__setattr__(self, "groups", self._groups_given())

    def _groups_given(self) -> Tensor | None:
        if self.groups is None:
            return None
        groups = as_tensor(self.groups, name="groups")
        if tuple(groups.shape) != (self.n_items,):
            raise ShapeError(
                f"SlateGRU: expected groups [item={self.n_items}], one for each id (0, 1, 2 "
                f"included), got {tuple(groups.shape)}"
            )
        if groups.is_floating_point():
            bad = ~torch.isfinite(groups) | (groups != groups.round())
            if bool(bad.any()):
                i = int(bad.nonzero()[0])
                raise DataError(
                    f"SlateGRU: expected whole group numbers, got {groups[i].item():g} for id {i}"
                )
        groups = groups.long()
        if int(groups.min()) < 0:
            i = int((groups < 0).nonzero()[0])
            raise DataError(
                f"SlateGRU: expected group numbers >= 0, got {int(groups[i])} for id {i}"
            )
        return groups

    # ---------------------------------------------------------------- sizes

    @property
    def memory(self) -> int:
        """Length m of a user's memory."""
        return self.dim if self.hidden is None else self.hidden

    @property
    def n_groups(self) -> int:
        """Number of groups G."""
        return 1 if self.groups is None else int(self.groups.max()) + 1

    @property
    def by_type(self) -> tuple[Likelihood, Likelihood, Likelihood]:
        """The likelihood of interaction types 0, 1, 2."""
        return by_type(self.likelihood)

    def group_of(self, rows: Tensor) -> Tensor:
        """Return the group of each id [row]."""
        return torch.zeros_like(rows) if self.groups is None else self.groups.to(rows.device)[rows]

    def reported(self) -> Mapping[str, Any]:
        """Return choices that belong to every result: the temperature and the likelihood."""
        return {"temperature": float(self.temperature), "likelihood": list(self.by_type)}

    # ---------------------------------------------------------------- data

    def prepare(self, data: Any) -> Any:
        """Check that ``data`` is a log over this model's items."""
        if not isinstance(data, SlateLog):
            raise DataError(
                f"SlateGRU: expected a SlateLog, got {type(data).__name__}; make one with "
                "SlateLog(slate, click), SlateLog.from_frame or SlateLog.from_finn"
            )
        if data.n_items > self.n_items:
            raise DataError(
                f"SlateGRU: the log has ids below {data.n_items}, expected n_items="
                f"{self.n_items} at most; SlateGRU(log.n_items, ...)"
            )
        return data

    def plate_size(self, data: SlateLog) -> int:
        """Number of users."""
        return len(data)

    def minibatch(self, data: SlateLog, index: Tensor) -> Batch:
        """Return the users ``index``."""
        return Batch(data.take(index), index, scale=len(data) / len(index))

    # ---------------------------------------------------------------- sites and priors

    def sites(self, data: SlateLog) -> Mapping[str, Site]:
        """Return the sites."""
        found = {
            name: Site(law.shape, law.support, law.dims) for name, law in self.laws(data).items()
        }
        found["items"] = Site((self.n_items, self.dim), _REAL.support, ("item", "component"))
        if self.user_init == "normal":
            shape = (len(data), self.memory)
            found["user_init"] = Site(shape, _REAL.support, ("user", "memory"), plate="user")
        return found

    def laws(self, data: SlateLog) -> dict[str, Law]:
        """Return the priors of the global sites other than the items, by name."""
        prior, found = self.prior, {}
        if self.item_prior == "hier":
            groups = (self.n_groups, self.dim)
            dims = ("group", "component")
            found["group_mean"] = self._law(groups, dims, 0.0, prior.group_mean)
            if prior.log_group_scale is None:
                found["group_scale"] = self._law(
                    groups, dims, 0.0, prior.group_scale, "positive", half=True
                )
            else:
                found["group_scale"] = self._law(groups, dims, *prior.log_group_scale, "positive")
        lengths, named = ((data.slots + 1,), ("length",)) if self.length_bias else ((), ())
        found["no_click"] = self._law(lengths, named, 0.0, prior.no_click)
        if self.transition in ("linear", "lingru"):
            if prior.logit_gamma is None:
                found["gamma"] = self._law((), (), *prior.gamma)
            else:
                found["gamma"] = self._law((), (), *prior.logit_gamma, "unit")
        for name, shape in weight_shapes(self.transition, self.dim, self.memory).items():
            found[name] = self._law(shape, _weight_dims(name), 0.0, prior.weight)
        if prior.multiplier is not None:
            found["multiplier"] = self._law((), (), 1.0, prior.multiplier)
        return found if self.carried is None else _replaced(found, self.carried)

    def _law(
        self,
        shape: tuple[int, ...],
        dims: tuple[str, ...],
        loc: float,
        scale: float,
        space: Any = "real",
        half: bool = False,
    ) -> Law:
        device = None if self.groups is None else self.groups.device
        numbers = torch.tensor([loc, scale], dtype=self.dtype, device=device)
        return Law(shape, dims, numbers[0], numbers[1], space, half)

    def group_moments(self, values: Values, rows: Tensor) -> GroupMoments:
        """Return the prior's means and standard deviations of the items of each group.

        Args:
            values: Sites of the groups [*draw, group, dim], where the prior is hierarchical; under
                the flat prior all items are in one group, and nothing is read.
            rows: Ids [row].
        """
        if self.item_prior == "flat":
            mean = torch.zeros(1, self.dim, dtype=self.dtype, device=rows.device)
            return GroupMoments(mean, mean + self.prior.item, torch.zeros_like(rows))
        spread = values["group_scale"].clamp_min(SMALLEST_SPREAD)
        return GroupMoments(values["group_mean"], spread, self.group_of(rows))

    def item_moments(self, values: Values) -> tuple[Tensor, Tensor]:
        """Return the prior's means and standard deviations of all item vectors [*draw, item, dim].

        Args:
            values: As for :meth:`group_moments`.
        """
        device = next(iter(values.values())).device
        mean, spread, group = self.group_moments(values, torch.arange(self.n_items, device=device))
        return mean[..., group, :], spread[..., group, :]

    def user_law(self, data: SlateLog) -> Law:
        """Return the prior of users' first states [user, hidden].

        A log may bring each user's own, as ``extra["prior_loc"]`` and ``extra["prior_scale"]``.
        """
        shape = (len(data), self.memory)
        if "prior_loc" in data.extra:
            own = (data.extra["prior_loc"], data.extra["prior_scale"])
            return Law(shape, ("user", "memory"), *own)
        return self._law(shape, ("user", "memory"), 0.0, self.prior.user)

    def log_prior(self, values: Values, data: SlateLog, *, scale: float = 1.0) -> Tensor:
        """Return the log density [*draw] of all sites; that of users' states times ``scale``."""
        total = sum(law.log_prob(values[name]) for name, law in self.laws(data).items())
        items = values["items"]
        mean, spread = self.item_moments(values)
        normal = -0.5 * ((items - mean) / spread).square() - spread.log()
        normal = normal - 0.5 * math.log(2 * math.pi)
        total = total + normal.sum((-2, -1))
        if self.carried is not None:
            total = total + self.carried.log_factor(items)
        if self.user_init == "normal":
            total = total + scale * self.user_law(data).log_prob(values["user_init"])
        return total

    # ---------------------------------------------------------------- densities

    def log_joint(self, values: Values, data: SlateLog, *, scale: float = 1.0) -> Tensor:
        """Return log p(values) + log p(clicks | values) / temperature, [*draw]."""
        likelihood = self.log_likelihood(values, data) / self.temperature
        return self.log_prior(values, data, scale=scale) + scale * likelihood

    def log_likelihood(self, values: Values, data: SlateLog) -> Tensor:
        """Return the log probability of the clicks of training steps [*draw], not tempered.

        A sampled likelihood counts as what it estimates, the choice among all items.
        """
        lead = values["items"].shape[:-2]
        total = values["items"].new_zeros(lead)
        for users, part in self._blocks(data, lead):
            total = total + self._pointwise(_of_users(values, users), part).sum((-2, -1))
        return total

    def pointwise_log_likelihood(self, values: Values, data: SlateLog) -> Mapping[str, Tensor]:
        """Return {"click": [*draw, user, step]}, zero for steps that do not count."""
        lead = values["items"].shape[:-2]
        parts = [
            self._pointwise(_of_users(values, users), part)
            for users, part in self._blocks(data, lead)
        ]
        return {"click": torch.cat(parts, -2)}

    def _blocks(self, data: SlateLog, lead: Sequence[int]) -> Iterator[tuple[slice, SlateLog]]:
        """Blocks of users whose largest tensor is of bounded size."""
        wide = data.slots * self.dim
        if any(kind != "slate" for kind in self.by_type):
            wide = max(wide, self.n_items * (self.dim if self.score == "l2" else 1))
        size = max(_ENTRIES // max(math.prod(lead) * data.steps * wide, 1), 1)
        for first in range(0, len(data), size):
            users = slice(first, min(first + size, len(data)))
            yield users, data if size >= len(data) else data[users]

    def _pointwise(self, values: Values, data: SlateLog) -> Tensor:
        """Log probabilities [*draw, user, step] of the clicks that count."""
        counted = data.mask("train")
        read = self.states(values, data).read
        found = read.new_zeros(*read.shape[:-3], *counted.shape)
        for type_, kind in enumerate(self.by_type):
            mine = counted & (data.interaction_type == type_)
            if bool(mine.any()):
                found[..., mine] = self._choice_terms(values, data, read, mine, kind)
        return found

    def _choice_terms(
        self, values: Values, data: SlateLog, read: Tensor, mine: Tensor, kind: Likelihood
    ) -> Tensor:
        """Log probabilities [*draw, choice] of the choices at steps ``mine`` [user, step]."""
        user, step = mine.nonzero(as_tuple=True)
        state = read[..., user, step, :]
        if kind == "slate":
            logits = self.slate_logits(values, state, data.slate[user, step])
            chosen = data.click_idx[user, step].long()
        else:
            logits = self.catalogue_logits(values, state, data.slate_lengths[user, step].long())
            chosen = (data.click[user, step].long() - FIRST_ITEM + 1).clamp_min(0)
        picked = chosen.expand(logits.shape[:-1])[..., None]
        return torch.log_softmax(logits, -1).gather(-1, picked)[..., 0]

    def no_click(self, values: Values, length: Tensor) -> Tensor:
        """Return the logit of no click [*draw, *choice] of slates with ``length`` slots in use."""
        bias = values["no_click"]
        if not self.length_bias:
            return bias.reshape(*bias.shape, *(1,) * length.ndim).expand(*bias.shape, *length.shape)
        if length.numel() and int(length.max()) >= bias.shape[-1]:
            raise DataError(
                f"SlateGRU: expected slates with at most {bias.shape[-1] - 1} slots in use, as in "
                f"the log that was fitted, got {int(length.max())}; length_bias=False has no bound"
            )
        return bias[..., length]

    def states(self, values: Values, data: SlateLog) -> States:
        """Return users' states along the steps of a log.

        Args:
            values: Sites [*draw, ...]; ``user_init`` [*draw, user, hidden].
            data: The log; all its clicks move the states.
        """
        click = data.click.long()
        moves = click >= FIRST_ITEM
        clicked = values["items"][..., click, :]
        return unroll(self.transition, values, clicked, moves, self.first_states(values, data))

    def first_states(self, values: Values, data: SlateLog) -> Tensor:
        """Return users' first states [*draw, user, hidden]."""
        if self.user_init == "normal":
            return values["user_init"]
        lead = values["items"].shape[:-2]
        return values["items"].new_zeros(*lead, len(data), self.memory)

    def slate_logits(self, values: Values, read: Tensor, slate: Tensor) -> Tensor:
        """Return the logits of choosing each slot [*draw, *choice, slot], -inf for empty ones.

        Args:
            values: Sites [*draw, ...].
            read: States z [*draw, *choice, dim].
            slate: Ids [*choice, slot], slot 0 for no click.
        """
        shown = slate[..., 1:].long()
        items = values["items"][..., shown, :]
        multiplier = values.get("multiplier")
        factor = None
        if multiplier is not None:
            factor = multiplier.reshape(*multiplier.shape, *(1,) * shown.ndim)
        found = scores(self.score, read[..., None, :], items, factor)
        found = found.masked_fill(shown < FIRST_ITEM, -math.inf)
        no_click = self.no_click(values, (slate != 0).sum(-1))
        return torch.cat([no_click.expand(found.shape[:-1])[..., None], found], -1)

    def catalogue_logits(self, values: Values, read: Tensor, length: Tensor) -> Tensor:
        """Return the logits of no click and of each real item [*draw, *choice, 1 + item].

        Args:
            values: Sites [*draw, ...].
            read: States z [*draw, *choice, dim].
            length: Slots in use [*choice], for the logit of no click.
        """
        items = values["items"][..., FIRST_ITEM:, :]
        lead = items.shape[:-2]
        items = items.reshape(*lead, *(1,) * length.ndim, *items.shape[-2:])
        multiplier = values.get("multiplier")
        factor = None
        if multiplier is not None:
            factor = multiplier.reshape(*lead, *(1,) * (length.ndim + 1))
        found = scores(self.score, read[..., None, :], items, factor)
        return torch.cat([self.no_click(values, length)[..., None], found], -1)

    # ---------------------------------------------------------------- simulation

    def simulate(self, values: Values, x: SlateLog, *, rng: Rng) -> dict[str, Tensor]:
        """Draw the clicks on the slates of a log, step after step.

        Args:
            values: Sites [n, ...]; ``user_init`` for the users of the log.
            x: The slates; steps with click 0 stay empty.
            rng: Seed or generator.

        Returns:
            "click_idx" and "click" [n, user, step].
        """
        generator = stream(rng, "clicks", device=x.device)
        n = len(values["items"])
        active, slate = x.click != 0, x.slate.long()
        click = torch.zeros(n, *x.click.shape, dtype=torch.int64, device=x.device)
        slot = torch.zeros_like(click)
        start = self.first_states(values, x)
        vectors = values["items"]
        owner = torch.arange(n, device=x.device)[:, None, None]
        for t in range(x.steps):
            history = click[..., : max(t, 1)]  # Before the first step no click is drawn yet.
            clicked = vectors[owner, history]
            states = unroll(self.transition, values, clicked, history >= FIRST_ITEM, start)
            read = states.read[..., -1, :]
            logits = self.slate_logits(values, read, slate[:, t])
            uniform = torch.rand(
                logits.shape, generator=generator, dtype=torch.float64, device=x.device
            )
            gumbel = -(-uniform.clamp_min(1e-300).log()).log()
            slot[..., t] = torch.where(active[:, t], (logits + gumbel).argmax(-1), 0)
            chosen = slate[:, t].expand(n, -1, -1).gather(-1, slot[..., t, None])[..., 0]
            click[..., t] = torch.where(active[:, t], chosen, 0)
        return {"click_idx": slot, "click": click}

    # ---------------------------------------------------------------- defaults of inference

    def initial_values(self, data: SlateLog, n: int, *, rng: torch.Generator) -> dict[str, Tensor]:
        """Return starting points [n, *site]."""
        return self.starting_points(data, n, rng=rng)

    def starting_points(self, data: SlateLog, n: int, *, rng: torch.Generator) -> dict[str, Tensor]:
        """Return points [n, *site]: small random vectors, the priors' medians elsewhere."""
        device = data.device

        def noise(*shape: int) -> Tensor:
            drawn = torch.randn(n, *shape, generator=rng, dtype=self.dtype, device=rng.device)
            return drawn.to(device)

        found: dict[str, Tensor] = {}
        for name, law in self.laws(data).items():
            start = law.start().to(device)
            width = 0.1 if not name.startswith("W_") else law.shape[1] ** -0.5
            found[name] = law.constrain(start + width * noise(*law.shape))
        found["items"] = 0.1 * noise(self.n_items, self.dim)
        if self.user_init == "normal":
            found["user_init"] = 0.1 * self.prior.user * noise(len(data), self.memory)
        return found

    def sampler(self) -> Sampler:
        """SVI on minibatches of users."""
        from probkit.inference import SVI

        return SVI(batch_size=512, particles=1)

    def guide(self) -> Guide:
        """Mean field, users' first states amortised."""
        from probkit.models.slates.guide import SlateMeanField

        return SlateMeanField()

    def specialise(self, guide: Guide) -> Guide:
        """Return the model's own form of a guide: its bound in closed form where there is one."""
        from probkit.inference import MeanField
        from probkit.models.slates.guide import SlateMeanField

        if type(guide) is MeanField:
            return SlateMeanField(init_scale=guide.init_scale)
        return guide

    # ---------------------------------------------------------------- predictions

    def predict(
        self,
        post: Posterior,
        x: SlateLog,
        *,
        site: str | None = None,
        joint: bool = False,
        groups: Mapping[str, Sequence[Any]] | None = None,
        rng: Rng | None = None,
    ) -> Predictive:
        """Predict the slot clicked on each slate of a log; see :meth:`Posterior.predict`."""
        from probkit.models.slates.prediction import predict_clicks

        return predict_clicks(self, post, x, site=site, groups=groups, rng=rng)

    def update(self, post: Posterior, data: SlateLog, *, rng: Rng) -> Posterior:
        """Return the posterior given the old data and ``data``.

        See :func:`~probkit.models.slates.online.update_posterior`.
        """
        from probkit.models.slates.online import update_posterior

        return update_posterior(post, self.prepare(data), rng=rng)

    def to_pyro(self) -> Any:
        """Return the model as a Pyro program; see :func:`pyro_program`."""
        from probkit.models.slates.as_pyro import pyro_program

        return pyro_program(self)


_REAL = Law((), (), torch.zeros(()), torch.ones(()))


def _weight_dims(name: str) -> tuple[str, str]:
    if name == "W_z":
        return ("component", "memory")
    return ("memory", "component") if name[2] == "i" else ("memory", "memory_from")


def _replaced(laws: dict[str, Law], carried: Carried) -> dict[str, Law]:
    """Put the carried normals in the place of the priors they replace."""
    found = dict(laws)
    for name, normal in carried.sites.items():
        loc, scale = normal["loc"], normal["scale"]
        found[name] = replace(laws[name], shape=tuple(loc.shape), loc=loc, scale=scale, half=False)
    return found


def _of_users(values: Values, users: slice) -> Values:
    """Cut the local site to a block of users."""
    if "user_init" not in values:
        return values
    return {**values, "user_init": values["user_init"][..., users, :]}

"""Stochastic variational inference: fit a guide by maximising the evidence lower bound."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.density import check_log_joint, log_joint_of
from probkit.diagnostics import pareto_k
from probkit.errors import CapabilityError, ConvergenceWarning, DataError, NumericsWarning
from probkit.files import storable
from probkit.guide import Guide, HasBound, HasTables
from probkit.inference.elbo import bound, elbo, log_weights
from probkit.inference.guides import FullRank, MeanField
from probkit.inference.natural import antithetic, expected_derivatives, natural_step
from probkit.inference.ranks import Ranks, average, copy_from_first
from probkit.inference.row_adam import FetchedRows, RowAdam, gather_table, own_rows
from probkit.loader import Loader, Sized
from probkit.model import Batch, lacks
from probkit.posterior import Evidence, Posterior, make_posterior
from probkit.rng import scope, seed_of, stream
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws, Fitted
from probkit.tree import Tree, leaves, map_tensors
from probkit.unconstrained import Unconstrained

__all__ = ["SVI", "elbo"]

_HIGH_K = 0.7
_FEWEST_WEIGHTS = 100


@storable
@dataclass(frozen=True)
class SVI(Sampler):
    """Maximise a lower bound on the log evidence over a guide's parameters.

    The bound is E_q[log p(values, data) - log q(values)], estimated with reparameterised draws;
    on a minibatch, local terms of both densities are scaled by units / batch size. With
    ``importance`` K > 1 it is the tighter E[log mean of K weights p / q].

    **Convergence.** With ``window`` W given, the run ends early when it has converged: between two
    consecutive windows of W steps the mean of the bound's estimates rose by less than its Monte
    Carlo error (the standard error of the difference), twice in a row. ``attrs["converged"]`` tells
    whether all chains did; a ConvergenceWarning is given where ``steps`` ran out first.

    **The fit.** On full data ``log_evidence`` is the bound at the end, and ``sample_stats`` holds
    its standard error (``bound_se``) and the Pareto shape of p / q (``pareto_k``; Yao et al. 2018),
    each [chain]. Above 0.7 the guide is no good approximation, not even as a proposal, and a
    NumericsWarning says so.

    **Many processes.** With ``distributed`` each process of the ``torch.distributed`` group that
    the program has initialised takes the units rank, rank + count, ... and draws its batches from
    them; gradients are averaged, so that all processes hold the same parameters. Tables of a
    :class:`~probkit.guide.HasTables` guide lie row by row on different processes while the fit
    lasts, and are collected at its end. Call ``infer`` with the same arguments and seed everywhere
    (and a checkpoint folder each). A Loader's factory
    gives the batches of its own process, scaled as if they were drawn from all units.

    Args:
        steps: Gradient steps at most.
        lr: Learning rate at the start; it falls exponentially to ``lr * decay``.
        decay: Share of the learning rate that is left at the end.
        particles: Draws per gradient step (of groups, with ``importance``).
        batch_size: Units per step; None uses all data. Needs ``plate_size`` and ``minibatch``.
            A :class:`~probkit.loader.Loader` as data brings its own batches.
        chunk: Gradient steps between reports.
        evidence_draws: Draws for the final estimate of the bound (full data only).
        importance: Draws K inside the logarithm of the importance-weighted bound; full data only.
        gradient: "total", or "path": through the draws alone (doubly reparameterised for K > 1),
            with less noise near the optimum; see :func:`probkit.inference.elbo.bound`.
        update: "adam", or "natural": closed-form natural-gradient updates of the mean and
            precision of a :class:`FullRank` guide, with ``lr`` as their rate in (0, 1]. On a
            normal posterior ``lr=1`` converges in one step. It needs second derivatives.
        window: Steps W of the rule of convergence; None takes all steps.
        distributed: Share the work among the processes of the group.

    Example:
        >>> SVI(steps=500, batch_size=64).steps
        500
    """

    steps: int = 2000
    lr: float = 0.02
    decay: float = 0.1
    particles: int = 8
    batch_size: int | None = None
    chunk: int = 50
    evidence_draws: int = 1000
    importance: int = 1
    gradient: Literal["total", "path"] = "total"
    update: Literal["adam", "natural"] = "adam"
    window: int | None = None
    distributed: bool = False

    needs = ("sites", "log_joint")
    accepts_guide = True
    accepts_loader = True

    def __post_init__(self) -> None:
        batch = 1 if self.batch_size is None else self.batch_size
        window = 2 if self.window is None else self.window
        counts = (self.steps, self.particles, self.chunk, self.evidence_draws, batch)
        whole = all(isinstance(count, int) and count >= 1 for count in (*counts, self.importance))
        if not whole or not 0 < self.lr < math.inf or not 0 < self.decay <= 1:
            raise DataError(
                "SVI: expected whole steps, particles, chunk, evidence_draws, batch_size, "
                f"importance >= 1, 0 < lr < inf and 0 < decay <= 1, got {self}"
            )
        if not isinstance(window, int) or window < 2:
            raise DataError(f"SVI: expected window >= 2 steps or None, got {self.window}")
        if self.gradient not in ("total", "path") or self.update not in ("adam", "natural"):
            raise DataError(
                "SVI: expected gradient 'total' or 'path' and update 'adam' or 'natural', got "
                f"{self.gradient!r} and {self.update!r}"
            )
        if self.importance > 1 and self.batch_size is not None:
            raise DataError(
                f"SVI: importance={self.importance} is a bound on full data only; leave out "
                "batch_size= or importance="
            )
        natural = self.update == "natural"
        if natural and (self.lr > 1 or self.importance > 1 or self.gradient == "path"):
            raise DataError(
                "SVI: update='natural' expects lr <= 1 and neither importance= nor "
                f"gradient='path', got lr={self.lr:g}, {self.importance}, {self.gradient!r}"
            )

    def total(self) -> int:
        """Number of chunks at most."""
        return -(-self.steps // self.chunk)

    def _guide(self, problem: Problem) -> Guide:
        if problem.guide is not None:
            specialise = getattr(problem.model, "specialise", None)
            special: Guide = specialise(problem.guide) if callable(specialise) else problem.guide
            return special
        own = getattr(problem.model, "guide", None)
        chosen = own() if callable(own) else None
        if chosen is not None:
            return chosen
        return FullRank() if self.update == "natural" else MeanField()

    # ---------------------------------------------------------------- the first state

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Make the guide's parameters."""
        ranks = self._ranks()
        self._check_batches(problem)
        data, loader = problem.data, None
        if isinstance(data, Loader):
            data, loader = data.example, data
        guide = self._guide(problem)
        sites = problem.model.sites(data)
        local = any(site.plate is not None for site in sites.values())
        model = Sized(problem.model, loader.units, local) if loader else problem.model
        self._check_guide(guide, local)
        params = guide.init(model, data, rng=rngs[0])
        params = map_tensors(lambda t: t.detach().clone(), params)
        if not leaves(params):
            raise CapabilityError(f"SVI: {type(guide).__name__} has no parameters to fit")
        if ranks.world > 1:
            copy_from_first([t for t in leaves(params) if isinstance(t, Tensor)])
        # A shared run reads its stream as a single process does: its own orders take no draw.
        seed = seed_of(rngs[0]) if loader else rngs[0].initial_seed() if self.distributed else 0
        tables = _tables(guide, params, problem.model)
        if not tables:  # A table may be too large to be looked at whole; its first bound tells.
            batch = loader.next(problem.model, seed, 0, 0)[0] if loader else Batch(data)
            values, _ = guide.sample(params, problem.model, batch, 2, rng=rngs[0])
            values = map_tensors(Tensor.detach, values)
            check_log_joint(problem.model, values, batch.data, scale=batch.scale)
        if ranks.world > 1:
            params = {**params, **{name: own_rows(params[name], ranks) for name in tables}}
        return {
            "params": params,
            "optimizer": None,
            "tables": None,
            "taken": 0,
            "feed": {"seed": seed, "epoch": 0, "position": 0, "order": None},
            "recent": torch.zeros(0, dtype=torch.float64),
            "calm": 0,
        }

    def _ranks(self) -> Ranks:
        return Ranks.current() if self.distributed else Ranks()

    def _check_batches(self, problem: Problem) -> None:
        """See that the data can be cut as the options ask for."""
        model, loaded = problem.model, isinstance(problem.data, Loader)
        if loaded and self.batch_size is not None:
            raise DataError("SVI: a Loader makes its own batches; leave out batch_size=")
        if loaded and self.importance > 1:
            raise DataError(
                f"SVI: importance={self.importance} is a bound on full data only, not on the "
                "batches of a Loader; leave it out"
            )
        cut = self.batch_size is not None or (self.distributed and not loaded)
        missing = lacks(model, ("plate_size", "minibatch")) if cut else []
        if missing:
            option = "batch_size=" if self.batch_size is not None else "distributed=True"
            raise CapabilityError(
                f"SVI({option}) needs plate_size and minibatch; "
                f"{type(model).__name__} lacks {', '.join(missing)}. Leave it out"
            )
        if self.importance > 1 and self.distributed:
            raise DataError("SVI: importance= cannot be shared among processes; leave one out")

    def _check_guide(self, guide: Guide, local: bool) -> None:
        """See that the guide has what the options ask for."""
        name = type(guide).__name__
        if self.update == "natural" and (not isinstance(guide, FullRank) or local):
            raise CapabilityError(
                "SVI(update='natural') needs the guide FullRank and a model without local sites, "
                f"got {name}{' and local sites' if local else ''}; use update='adam'"
            )
        if self.gradient == "path" and lacks(guide, ("log_prob",)):
            raise CapabilityError(
                f"SVI(gradient='path') needs the guide's log_prob; {name} lacks it. Use MeanField, "
                "LowRank or FullRank, or gradient='total'"
            )
        if isinstance(guide, HasBound) and (self.importance > 1 or self.gradient == "path"):
            raise CapabilityError(
                f"{name} brings a bound of its own; leave out importance= and gradient="
            )

    # ---------------------------------------------------------------- steps

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take ``chunk`` gradient steps, or fewer where the run converges."""
        ranks = self._ranks()
        improve: _Adam | _Natural
        if self.update == "natural":
            improve = _Natural(self, problem, state, ranks)
        else:
            improve = _Adam(self, problem, self._guide(problem), state, ranks)
        feed, taken, calm = state["feed"], state["taken"], state["calm"]
        recent: list[float] = state["recent"].tolist()
        bounds: list[float] = []
        while len(bounds) < self.chunk and taken < self.steps and calm < 2:
            batch, feed = self._next_batch(problem, feed, rngs[0], ranks)
            rate = self.lr * self.decay ** (taken / self.steps)
            bounds.append(improve(batch, rate, rngs[0]))
            taken += 1
            if self.window is not None:
                recent = [*recent, bounds[-1]][-2 * self.window :]
                if taken % self.window == 0 and len(recent) == 2 * self.window:
                    calm = calm + 1 if _is_flat(torch.tensor(recent, dtype=torch.float64)) else 0
        mean = sum(bounds) / len(bounds)
        if not math.isfinite(mean):
            raise DataError(
                f"SVI: the bound became {mean} at step {taken}; lower lr={self.lr:g}, or check "
                "the log joint near the guide's draws"
            )
        new = {
            **improve.state(),
            "taken": taken,
            "feed": feed,
            "recent": torch.tensor(recent, dtype=torch.float64),
            "calm": calm,
        }
        return Step(new, taken >= self.steps or calm >= 2, info={"elbo": mean})

    def _next_batch(
        self, problem: Problem, feed: Mapping[str, Any], rng: torch.Generator, ranks: Ranks
    ) -> tuple[Batch, Mapping[str, Any]]:
        """Take the next batch; ``feed`` tells where the pass over the data is.

        Without a loader units are taken in a random order, drawn anew for each pass.
        """
        model, data = problem.model, problem.data
        if isinstance(data, Loader):
            batch, epoch, position = data.next(model, feed["seed"], feed["epoch"], feed["position"])
            return batch, {**feed, "epoch": epoch, "position": position + 1}
        if self.batch_size is None and not self.distributed:
            return Batch(data), feed
        size = model.plate_size(data)
        order, position, epoch = feed["order"], feed["position"], feed["epoch"]
        if order is None or position >= len(order):
            if self.distributed:  # Noise of the guide is shared, orders are not.
                own = stream(feed["seed"], "order", ranks.rank, epoch, device=rng.device)
                shard = ranks.shard(size).to(rng.device)
                order = shard[torch.randperm(len(shard), generator=own, device=rng.device)]
            else:
                order = torch.randperm(size, generator=rng, device=rng.device)
            position, epoch = 0, epoch + 1
        index = order[position : position + (self.batch_size or len(order))]
        batch = model.minibatch(data, index)
        if self.distributed:  # The mean over processes is the sum over shards.
            batch = replace(batch, scale=batch.scale * ranks.world * len(order) / size)
        return batch, {**feed, "order": order, "position": position + len(index), "epoch": epoch}

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Any state is a fit."""
        return True

    # ---------------------------------------------------------------- the posterior

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the fitted guide and, on full data, its bound.

        A guide that always draws the same values (AutoDelta) is a point estimate, not a posterior:
        it becomes one draw, marked so. Where some sites are points, there is no bound.
        """
        guide = self._guide(problem)
        params = map_tensors(lambda t: t.detach().contiguous(), state["params"])
        tables = _tables(guide, params, problem.model)
        if tables and self.distributed:
            whole = {name: gather_table(params[name], self._ranks()) for name in tables}
            params = {**params, **whole}
        source = Fitted(guide, [params])
        stats: dict[str, Tensor] = {}
        if self.window is not None:
            stats["converged"] = torch.tensor([state["calm"] >= 2])
        evidence = None
        from_loader = isinstance(problem.data, Loader)
        if from_loader:
            problem = replace(problem, data=problem.data.example)
        elif self.batch_size is None:
            evidence, fit = self._judge(problem, guide, params, rngs[0])
        if not from_loader and not isinstance(guide, HasBound):
            twice = source.sample(2, model=problem.model, data=problem.data, rng=rngs[0])
            points = [name for name, value in twice.items() if torch.equal(value[0], value[1])]
            if len(points) == len(twice):
                values = {name: value[:1][None] for name, value in twice.items()}
                return make_posterior(
                    problem, Draws(values), sample_stats=stats, attrs={"point_estimate": True}
                )
            if points:
                evidence = None  # The density of a point is no density of a continuous site.
        if evidence is not None:
            stats.update(fit)
        return make_posterior(
            problem,
            source,
            marginals=source.marginals(problem.model, problem.data),
            log_evidence=evidence,
            sample_stats=stats,
        )

    def _judge(
        self, problem: Problem, guide: Guide, params: Any, rng: torch.Generator
    ) -> tuple[Evidence, dict[str, Tensor]]:
        """Return the bound with its standard error, and the Pareto shape of the weights."""
        model, batch, n = problem.model, Batch(problem.data), self.evidence_draws
        with torch.no_grad():
            if isinstance(guide, HasBound):
                terms = elbo(model, guide, params, batch, n, rng)
                return Evidence(terms.mean(0, keepdim=True), "bound"), _error_of(terms)
            log_w = log_weights(model, guide, params, batch, n, rng)
        groups = max(n // self.importance, 1)
        size = n // groups
        terms = torch.logsumexp(log_w[: groups * size].reshape(groups, size), 1) - math.log(size)
        shape = _pareto_shape(log_w)
        return Evidence(terms.mean(0, keepdim=True), "bound"), {
            **_error_of(terms),
            **({} if shape is None else {"pareto_k": log_w.new_tensor([shape])}),
        }

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Warn of fits that have not converged, and of guides that do not fit the posterior."""
        stats = posterior.sample_stats
        worst = float(stats["pareto_k"].max()) if "pareto_k" in stats else 0.0
        if worst > _HIGH_K:
            warnings.warn(
                f"SVI: Pareto k of the guide is {worst:.2f}, above {_HIGH_K}: the weights p / q "
                "have too heavy a tail for it to stand for the posterior; take more steps, a "
                "richer guide (LowRank, FullRank), importance=, or NUTS",
                NumericsWarning,
                stacklevel=4,
            )
        if "converged" not in stats:
            return posterior
        converged = bool(stats["converged"].all())
        if not converged:
            warnings.warn(
                f"SVI: the bound still rose by more than its Monte Carlo error over windows of "
                f"{self.window} steps when steps={self.steps} ran out; raise steps, or lr",
                ConvergenceWarning,
                stacklevel=4,
            )
        return replace(posterior, attrs={**posterior.attrs, "converged": converged})


class _Adam:
    """Steps of Adam on the guide's parameters; tables of a HasTables guide row by row."""

    def __init__(
        self, options: SVI, problem: Problem, guide: Guide, state: Tree, ranks: Ranks
    ) -> None:
        self.options, self.model, self.guide, self.ranks = options, problem.model, guide, ranks
        names = _tables(guide, state["params"], problem.model)
        # Adam works in place; the old state must stay as it is.
        moments = state.get("tables") or {}
        self.tables = {
            name: RowAdam(state["params"][name], moments.get(name), ranks) for name in names
        }
        self.params = {
            name: own if name in names else map_tensors(_as_leaf, own)
            for name, own in state["params"].items()
        }
        shared = [own for name, own in self.params.items() if name not in names]
        self.tensors = [t for t in leaves(shared) if isinstance(t, Tensor) and t.requires_grad]
        self.optimizer = torch.optim.Adam(self.tensors, lr=options.lr) if self.tensors else None
        if self.optimizer is not None and state["optimizer"] is not None:
            self.optimizer.load_state_dict(map_tensors(Tensor.clone, state["optimizer"]))

    def __call__(self, batch: Batch, rate: float, rng: torch.Generator) -> float:
        """Take one step; returns the estimate of the bound before it."""
        options, ranks = self.options, self.ranks
        params, rows = self._needed(batch, rng)
        with torch.enable_grad():
            value = bound(
                self.model,
                self.guide,
                params,
                batch,
                options.particles,
                rng,
                importance=options.importance,
                path=options.gradient == "path",
            ).mean()
            (-value).backward()
        found = value.detach()
        if ranks.world > 1:
            slopes = [torch.zeros_like(t) if t.grad is None else t.grad for t in self.tensors]
            average([*slopes, found], ranks.world)
            for tensor, slope in zip(self.tensors, slopes, strict=True):
                tensor.grad = slope
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad()
        for name, table in self.tables.items():
            table.step(rows[name], rate)
        return float(found)

    def _needed(self, batch: Batch, rng: torch.Generator) -> tuple[Any, dict[str, FetchedRows]]:
        """The parameters that the batch needs, and the rows of tables among them."""
        if not self.tables or not isinstance(self.guide, HasTables):
            return self.params, {}
        shared = {name: own for name, own in self.params.items() if name not in self.tables}
        part = (self.ranks.rank, self.ranks.world)
        asked = self.guide.rows(shared, self.model, batch, rng=rng, part=part)
        rows = {name: table.fetch(asked[name]["rows"]) for name, table in self.tables.items()}
        held = {name: {**asked[name], **found.parts} for name, found in rows.items()}
        return {**shared, **held}, rows

    def state(self) -> dict[str, Any]:
        """Return what the next chunk starts from."""
        tables = {name: table.table() for name, table in self.tables.items()}
        return {
            "params": {**map_tensors(Tensor.detach, self.params), **tables},
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "tables": {name: table.moments() for name, table in self.tables.items()} or None,
        }


def _as_leaf(tensor: Tensor) -> Tensor:
    """A copy that asks for its gradient; counts and numbers are no parameters."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().clone().requires_grad_()


def _tables(guide: Guide, params: Any, model: Any) -> tuple[str, ...]:
    """Names of the guide's tables that are updated row by row."""
    return guide.tables(params, model) if isinstance(guide, HasTables) else ()


class _Natural:
    """Natural-gradient steps on the mean and precision of a FullRank guide."""

    def __init__(self, options: SVI, problem: Problem, state: Tree, ranks: Ranks) -> None:
        self.options, self.model, self.ranks = options, problem.model, ranks
        self.local = state["params"]["local"]
        self.loc: Tensor = state["params"]["loc"]
        self.factor = FullRank().factor(state["params"])

    def __call__(self, batch: Batch, rate: float, rng: torch.Generator) -> float:
        """Take one step; returns the estimate of the bound before it."""
        space = Unconstrained(self.model.sites(batch.data))

        def log_density(free: Tensor) -> Tensor:
            values, log_det = space.constrain(free)
            return log_joint_of(self.model, values, batch.data, scale=batch.scale) + log_det

        noise = antithetic(self.options.particles, self.loc, rng)
        draws = self.loc + noise @ self.factor.mT
        log_p, gradient, curvature = expected_derivatives(log_density, draws)
        spread = self.factor.diagonal().log().sum() + 0.5 * len(self.loc) * math.log(2 * math.pi)
        found = log_p.mean() + (0.5 * noise.square().sum(-1)).mean() + spread
        average([gradient, curvature, found], self.ranks.world)
        if bool(torch.isfinite(gradient.sum() + curvature.sum())):
            with scope(quiet=True):
                self.loc, self.factor = natural_step(
                    self.loc, self.factor, gradient, curvature, rate
                )
            return float(found)
        return math.nan

    def state(self) -> dict[str, Any]:
        """Return what the next chunk starts from."""
        params = {
            "loc": self.loc,
            "log_diagonal": self.factor.diagonal().log(),
            "below": torch.tril(self.factor, -1),
            "local": self.local,
        }
        return {"params": params, "optimizer": None, "tables": None}


def _is_flat(recent: Tensor) -> bool:
    """Whether the second half of ``recent`` is higher than the first by less than its error."""
    first, second = recent.chunk(2)
    rise = float(second.mean() - first.mean())
    error = float(((first.var() + second.var()) / len(first)).sqrt())
    return rise <= error + 1e-12 * abs(float(second.mean()))


def _error_of(terms: Tensor) -> dict[str, Tensor]:
    """The standard error of a mean of independent terms, as a statistic [chain]."""
    if len(terms) < 2:
        return {"bound_se": terms.new_full((1,), math.nan)}
    return {"bound_se": (terms.std() / len(terms) ** 0.5)[None]}


def _pareto_shape(log_w: Tensor) -> float | None:
    """Return the Pareto shape of importance weights; None below 100 weights.

    Args:
        log_w: Log weights [n].
    """
    if len(log_w) < _FEWEST_WEIGHTS:
        return None
    weights = log_w.detach().cpu().double()
    if not bool(torch.isfinite(weights).all()):
        return math.inf
    if float(weights.max() - weights.min()) < 1e-8:
        return -math.inf  # Equal weights have no tail.
    return pareto_k(weights)

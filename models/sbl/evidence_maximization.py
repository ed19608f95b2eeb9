"""Type-II maximum likelihood: prior variances and noise by maximising the evidence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.errors import ConvergenceWarning, DataError, NumericsWarning
from probkit.files import storable
from probkit.models.sbl.block import block_step
from probkit.models.sbl.fast_marginal import FastState, fast_passes
from probkit.models.sbl.kronecker_updates import (
    alternating_step,
    flat_variances,
    rank_one_step,
    relative_change,
)
from probkit.models.sbl.linear_algebra import hermitian_cholesky, solve_with_factor
from probkit.models.sbl.moments import Moments
from probkit.models.sbl.noise import COLLAPSE, em_noise, initial_noise, mackay_noise
from probkit.models.sbl.problem import SparseProblem
from probkit.models.sbl.pruning import Reduction, prune, reduce
from probkit.models.sbl.support_search import price_of_an_index, revise_support
from probkit.models.sbl.updates import em_update, mackay_update, mm_update
from probkit.posterior import Posterior
from probkit.rng import stream
from probkit.sampler import Problem, Sampler, Step
from probkit.tree import Tree

__all__ = ["EvidenceMaximization"]

Variances = list[Tensor]
Update = Callable[[Moments, Variances], Variances]

_STAGES: Mapping[str, tuple[str, ...]] = {"hybrid": ("svd", "revise", "am")}
# The published threshold of AM is 1e-2; it loses true weights in half of the trials at 25 dB.
_PRUNE = {"svd": 1e-3, "am": 1e-3, "ksbl": 1e-2, "block": 1e-2}
_PRUNE_PLAIN = 1e-3
_FAST_CHANGES = 25  # one-weight changes between fresh E-steps
_FAST_GAIN = 1e-6  # gain of log evidence at which one-weight changes end
_REVISIONS = 3


def _plain(update: Callable[[Moments, Tensor], Tensor]) -> Update:
    return lambda moments, parts: [update(moments, parts[0])]


_UPDATES: Mapping[str, Update] = {
    "em": _plain(em_update),
    "mackay": _plain(mackay_update),
    "mm": _plain(mm_update),
    "am": lambda moments, parts: alternating_step(moments.second_moment(), parts),
    "ksbl": lambda moments, parts: alternating_step(moments.second_moment(), parts, cycles=1),
    "svd": lambda moments, parts: rank_one_step(moments.second_moment(), parts),
}


@storable
@dataclass(frozen=True)
class EvidenceMaximization(Sampler):
    """Fit the prior variances (and the noise) of a sparse model by maximising the evidence.

    The model names its M-step. ``"hybrid"`` runs the SVD step to its end, then revises the
    support (:mod:`~probkit.models.sbl.support_search`) as long as the evidence, less the price of
    the indices in use, rises, and ends with the monotone AM step.

    All problems of a batch, and all starts, advance together; each stops on its own.

    Args:
        max_iter: Largest number of EM steps of each stage.
        tolerance: Stop when ||g_new - g|| / ||g|| falls below it.
        starts: Starting points of each chain: g = 1, then random ones. The one with the highest
            evidence is returned.
        prune: Relative threshold below which prior variances become zero; "auto" takes the
            1e-3, or 1e-2 for "ksbl" and coupled modes (5e-3 with unknown noise); None prunes
            nothing.
        prune_after: EM steps before the first pruning; early pruning costs weights that matter.
        revise: Whether "hybrid" revises the support.

    Returns (through ``infer``):
        A closed-form posterior given the fitted variances: marginals and joint law of the site
        ``weights``, and the variances as one draw for each chain. ``log_evidence`` is the sum over
        problems, ``sample_stats`` hold ``log_evidence`` [chain, *problem], ``iterations``,
        ``converged`` and ``freedom`` likewise; ``attrs["evidence_trace"]`` is the first chain's
        log evidence after each step, ``attrs["point_estimate"]`` is True: the variances have no
        uncertainty (``Direct(hyper=NUTS())`` gives them one).

    Raises:
        DataError: An option outside its range.

    Warns:
        ConvergenceWarning: Problems that did not converge, or whose weights are all zero.
        NumericsWarning: A learned noise variance collapsed.

    Example:
        >>> EvidenceMaximization(starts=3).max_iter
        500
    """

    max_iter: int = 500
    tolerance: float = 1e-4
    starts: int = 1
    prune: float | str | None = "auto"
    prune_after: int = 10
    revise: bool = True

    needs = ("sparse_problem", "condition")
    block = None

    def __post_init__(self) -> None:
        counts = (self.max_iter, self.starts)
        if not all(isinstance(count, int) and count >= 1 for count in counts):
            raise DataError(
                f"EvidenceMaximization: expected whole max_iter and starts >= 1, got "
                f"{self.max_iter!r} and {self.starts!r}"
            )
        if not 0 < self.tolerance < math.inf:
            raise DataError(
                f"EvidenceMaximization: expected 0 < tolerance < inf, got {self.tolerance!r}"
            )
        automatic = self.prune is None or self.prune == "auto"
        if not automatic and not (isinstance(self.prune, float | int) and 0 <= self.prune < 1):
            raise DataError(
                f"EvidenceMaximization: expected prune 'auto', None or in [0, 1), got "
                f"{self.prune!r}"
            )
        if not isinstance(self.prune_after, int) or self.prune_after < 0:
            raise DataError(
                f"EvidenceMaximization: expected a whole prune_after >= 0, got {self.prune_after!r}"
            )

    # ------------------------------------------------------------------ driver

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Make the starting points: rows [chain x start x problem]."""
        with torch.no_grad():
            sparse: SparseProblem = problem.model.sparse_problem(problem.data)
            variances = self._starting_points(sparse, rngs)
            rows = len(variances[0])
            if sparse.noise_var is None:
                noise = torch.maximum(initial_noise(sparse.y, sparse.modes), sparse.floor)
            else:
                noise = sparse.noise_var
            like = noise.repeat(rows // sparse.n)
            return {
                "variances": variances,
                "noise_var": like.clone(),
                "evidence": torch.full_like(like, -math.inf),
                "running": torch.ones_like(like, dtype=torch.bool),
                "converged": torch.ones_like(like, dtype=torch.bool),
                "iterations": torch.zeros_like(like, dtype=torch.long),
                "trace": [],
                "stage": 0,
                "count": 0,
                "chains": len(rngs),
            }

    def _starting_points(self, sparse: SparseProblem, rngs: Any) -> Variances:
        """The flat start once, then log-normal ones around it."""
        flat = flat_variances(sparse.sizes, sparse.floor)
        live = [part.expand(sparse.n, -1) for part in sparse.live_columns()]
        if sparse.update == "fast":
            flat = [torch.zeros_like(part) for part in flat]
        rows = []
        for chain, rng in enumerate(rngs):
            for start in range(self.starts):
                generator = stream(rng, "start", start, device=sparse.floor.device)
                parts = [part * keep for part, keep in zip(flat, live, strict=True)]
                if chain or start:
                    parts = [p * torch.exp(_normal_like(p, generator)) for p in parts]
                rows.append(parts)
        return [torch.cat(columns) for columns in zip(*rows, strict=True)]

    def _stages(self, sparse: SparseProblem) -> tuple[str, ...]:
        if sparse.coupling:
            return ("block",)
        stages = _STAGES.get(sparse.update, (sparse.update,))
        whole = sparse.observed is None and sparse.modes > 1
        if sparse.update == "hybrid" and not (whole and self.revise and self.prune is not None):
            stages = ("svd", "am")
        return stages

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one step of the current stage for every row that still moves."""
        with torch.no_grad():
            sparse: SparseProblem = problem.model.sparse_problem(problem.data)
            stages = self._stages(sparse)
            stage = stages[state["stage"]]
            new = dict(state)
            rows = state["running"].nonzero().flatten()
            if stage == "revise":
                self._revise(sparse, new, rows)
            elif stage == "fast":
                self._fast(sparse, new, rows)
            else:
                self._expect_and_maximise(sparse, new, rows, stage, state["stage"] == 0)
            new["trace"] = [*state["trace"], new["evidence"]]
            new["count"] = state["count"] + 1
            done = False
            if not bool(new["running"].any()) or new["count"] >= self._limit(stage):
                done = state["stage"] + 1 == len(stages)
                if not done:
                    fresh = torch.ones_like(new["running"])
                    new.update(stage=state["stage"] + 1, count=0, running=fresh)
        info = {"log_evidence": float(new["evidence"].mean()), "running": float(len(rows))}
        return Step(new, done, info=info)

    def _limit(self, stage: str) -> int:
        return {"revise": _REVISIONS}.get(stage, self.max_iter)

    # ------------------------------------------------------------------ stages

    def _threshold(self, sparse: SparseProblem, stage: str, first: bool) -> float | None:
        """Relative pruning threshold; none after the first stage, which is left to the evidence."""
        if self.prune is None or not first:
            return None
        if self.prune != "auto":
            return float(self.prune)
        if stage == "block" and sparse.noise_var is None:
            return 5e-3
        return _PRUNE.get(stage, _PRUNE_PLAIN)

    def _expect_and_maximise(
        self, sparse: SparseProblem, state: dict[str, Any], rows: Tensor, stage: str, first: bool
    ) -> None:
        """One EM step: prune, E-step on what is left, M-step."""
        old = [part[rows] for part in state["variances"]]
        threshold = self._threshold(sparse, stage, first)
        late = threshold is not None and state["count"] >= self.prune_after
        pruned = prune(old, threshold if late and threshold else 0.0)
        noise = state["noise_var"][rows]
        reduction = reduce(pruned)
        moments = sparse.moments(rows, pruned, noise, draft=True)
        new = reduction.spread(_maximised(sparse, stage, moments, pruned, reduction))
        state["evidence"] = state["evidence"].index_copy(0, rows, moments.log_evidence)
        state["variances"] = [
            part.index_copy(0, rows, piece)
            for part, piece in zip(state["variances"], new, strict=True)
        ]
        settled = relative_change(new, old) < self.tolerance
        settled = settled & (late or threshold is None)  # nothing ends before it was pruned
        if sparse.noise_var is None:
            noise_new = self._noise(sparse, stage, moments, noise, rows)
            settled = settled & ((noise_new / noise).log().abs() < 10 * self.tolerance)
            state["noise_var"] = state["noise_var"].index_copy(0, rows, noise_new)
        self._book(state, rows, settled)

    def _noise(
        self, sparse: SparseProblem, stage: str, moments: Moments, noise: Tensor, rows: Tensor
    ) -> Tensor:
        if stage == "mackay":
            new = mackay_noise(moments, sparse.data_counts(rows))
        else:
            new = em_noise(moments, noise, sparse.data_counts(rows))
        return torch.maximum(new, sparse.floor[rows % sparse.n])

    def _fast(self, sparse: SparseProblem, state: dict[str, Any], rows: Tensor) -> None:
        """A fresh E-step, the noise, then a run of one-weight changes."""
        (variance,) = (part[rows] for part in state["variances"])
        noise = state["noise_var"][rows]
        (dictionary,), y = sparse.rows(rows)
        settled_noise = torch.ones_like(noise, dtype=torch.bool)
        if sparse.noise_var is None and state["count"]:
            fresh_moments = sparse.moments(rows, [variance], noise)
            new_noise = mackay_noise(fresh_moments, sparse.data_counts(rows))
            new_noise = torch.maximum(new_noise, sparse.floor[rows % sparse.n])
            settled_noise = (new_noise / noise).log().abs() < 10 * self.tolerance
            noise = new_noise
        start = fast_start(dictionary, variance, noise, y)
        end, settled = fast_passes(
            dictionary,
            start,
            changes=_FAST_CHANGES,
            tolerance=_FAST_GAIN,
            weight=sparse.evidence_weight,
        )
        moments = sparse.moments(rows, [end.variance], noise)
        state["evidence"] = state["evidence"].index_copy(0, rows, moments.log_evidence)
        state["variances"] = [state["variances"][0].index_copy(0, rows, end.variance)]
        state["noise_var"] = state["noise_var"].index_copy(0, rows, noise)
        close = relative_change([end.variance], [variance]) < self.tolerance
        fresh = state["count"] == 0 and sparse.noise_var is None
        self._book(state, rows, (settled | close) & settled_noise & (not fresh))

    def _revise(self, sparse: SparseProblem, state: dict[str, Any], rows: Tensor) -> None:
        """One revision of the support, kept where evidence less the price of indices rises."""
        old = [part[rows] for part in state["variances"]]
        noise = state["noise_var"][rows]
        factors, y = sparse.rows(rows)
        new = revise_support(factors, old, noise, y)
        price = price_of_an_index(sparse.data_size)
        value_old = sparse.moments(rows, old, noise).log_evidence
        value_new = sparse.moments(rows, new, noise).log_evidence
        gain = value_new - value_old - price * (_in_use(new) - _in_use(old))
        accepted = gain > 1e-3
        state["variances"] = [
            part.index_copy(0, rows, torch.where(accepted[:, None], fresh, was))
            for part, fresh, was in zip(state["variances"], new, old, strict=True)
        ]
        evidence = torch.where(accepted, value_new, value_old)
        state["evidence"] = state["evidence"].index_copy(0, rows, evidence)
        self._book(state, rows, ~accepted)

    def _book(self, state: dict[str, Any], rows: Tensor, settled: Tensor) -> None:
        """Stop the rows that have settled."""
        state["running"] = state["running"].index_copy(0, rows, ~settled)
        state["converged"] = state["converged"].index_copy(0, rows, settled)
        ones = torch.ones_like(rows)
        state["iterations"] = state["iterations"].index_add(0, rows, ones)

    # ------------------------------------------------------------------ result

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Every iterate is an estimate."""
        return len(state["trace"]) > 0

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the best start of each problem, conditioned in closed form."""
        with torch.no_grad():
            return self._finish(problem, state)

    def _finish(self, problem: Problem, state: Tree) -> Posterior:
        model, sparse = problem.model, problem.model.sparse_problem(problem.data)
        chains, n = state["chains"], sparse.n
        parts = prune(state["variances"], 0.0)
        rows = torch.arange(len(parts[0]), device=parts[0].device)
        last = sparse.moments(rows, parts, state["noise_var"])
        evidence, freedom = last.log_evidence, last.freedom
        best = evidence.reshape(chains, self.starts, n).argmax(1)  # [chain, problem]
        place = torch.arange(chains, device=best.device)[:, None] * self.starts + best
        chosen = (place * n + torch.arange(n, device=best.device)).flatten()
        hyper = model.hyper_of(
            [part[chosen].reshape(chains, 1, n, -1) for part in parts],
            state["noise_var"][chosen].reshape(chains, 1, n),
            problem.data,
        )
        if chains == 1:
            hyper = {name: value[0, 0] for name, value in hyper.items()}
        posterior: Posterior = model.condition(problem.data, hyper)
        trace = torch.stack(state["trace"])[:, chosen].reshape(-1, chains, n)
        lead = model.problem_shape(problem.data)

        def shaped(values: Tensor) -> Tensor:
            return values[chosen].reshape(chains, *lead)

        stats = {
            "log_evidence": shaped(evidence),
            "iterations": shaped(state["iterations"]),
            "converged": shaped(state["converged"]),
            "freedom": shaped(freedom),
        }
        _warn_of_zeros(sparse, [part[chosen] for part in parts])
        if sparse.noise_var is None:
            _warn_of_collapse(sparse, freedom[chosen])
        total = [float(value) for value in trace[:, 0].sum(-1)]
        return replace(
            posterior,
            context=replace(
                posterior.context, coords={**posterior.context.coords, **problem.coords}
            ),
            sample_stats=stats,
            attrs={**posterior.attrs, "point_estimate": True, "evidence_trace": total},
        )

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Warn of problems that did not converge."""
        slow = int((~posterior.sample_stats["converged"]).sum())
        if slow:
            warnings.warn(
                f"{slow} of {posterior.sample_stats['converged'].numel()} problems did not "
                f"converge in max_iter={self.max_iter} steps; raise max_iter or tolerance",
                ConvergenceWarning,
                stacklevel=4,
            )
        return posterior


def _maximised(
    sparse: SparseProblem,
    stage: str,
    moments: Moments,
    pruned: Variances,
    reduction: Reduction,
) -> Variances:
    """The M-step of a stage, on the columns in use."""
    kept = reduction.columns(pruned)
    if stage != "block":
        return _UPDATES[stage](moments, kept)
    places = [torch.arange(size, device=kept[0].device) for size in sparse.sizes]
    return block_step(moments.second_moment(), kept, sparse.coupling, reduction.columns(places))


def fast_start(dictionary: Tensor, variance: Tensor, noise_var: Tensor, y: Tensor) -> FastState:
    """A fresh C^{-1} (or H^H C^{-1} H) from variances [problem, N]."""
    rows, columns = dictionary.shape[-2:]
    n = len(variance)
    eye = torch.eye(min(rows, columns), dtype=y.dtype, device=y.device)
    if columns <= rows:
        gram = dictionary.mH @ dictionary
        root = variance.sqrt()
        inner = root.unsqueeze(-1) * gram * root.unsqueeze(-2) + noise_var[:, None, None] * eye
        half = torch.linalg.solve_triangular(
            hermitian_cholesky(inner), root.unsqueeze(-1) * gram, upper=False
        )
        kernel = (gram - half.mH @ half) / noise_var[:, None, None]
        leverage = kernel.diagonal(dim1=-2, dim2=-1).real
        correlation = dictionary.mH @ y.mT
        fit = root.unsqueeze(-1) * solve_with_factor(
            hermitian_cholesky(inner), root.unsqueeze(-1) * correlation
        )
        projection = ((correlation - gram @ fit) / noise_var[:, None, None]).mT
    else:
        scaled = dictionary * variance.unsqueeze(-2)
        covariance = scaled @ dictionary.mH + noise_var[:, None, None] * eye
        factor = hermitian_cholesky(covariance)
        kernel = torch.cholesky_inverse(factor)
        solved = kernel @ dictionary
        leverage = (dictionary.conj() * solved).sum(-2).real
        projection = (solved.mH @ y.mT).mT
    infinite = torch.full((n,), math.inf, dtype=variance.dtype, device=variance.device)
    return FastState(variance, leverage.clamp_min(0), projection, kernel, infinite)


def _normal_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device=tensor.device)


def _in_use(variances: Variances) -> Tensor:
    """Number of indices in use, over all modes [row]."""
    counts = [(part > 0).sum(-1) for part in variances]
    return torch.stack(counts).sum(0)


def _warn_of_zeros(sparse: SparseProblem, variances: Variances) -> None:
    empty = torch.stack([(part == 0).all(-1) for part in variances]).any(0)
    if bool(empty.any()):
        warnings.warn(
            f"every weight was pruned in {int(empty.sum())} of {len(empty)} problems: no column "
            "rises above the noise, the posterior mean is zero. Check the noise variance",
            ConvergenceWarning,
            stacklevel=6,
        )


def _warn_of_collapse(sparse: SparseProblem, freedom: Tensor) -> None:
    rows = torch.arange(len(freedom), device=freedom.device)
    snapshots, size = sparse.y.shape[1], sparse.data_counts(rows)
    used = snapshots * freedom
    bad = used > COLLAPSE * size
    if bool(bad.any()):
        warnings.warn(
            f"the learned noise variance collapsed in {int(bad.sum())} of {len(bad)} problems: the "
            f"weights use {float(used[bad].max()):.0f} of {float(size.max()):.0f} degrees of "
            "freedom, and cannot be told from noise. Give noise_var, raise noise_floor, add "
            "snapshots, or use update='em' with prune='auto'",
            NumericsWarning,
            stacklevel=6,
        )

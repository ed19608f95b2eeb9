"""Acquisition functions of BoTorch, built for a surrogate, a goal and the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from botorch.acquisition import (
    AcquisitionFunction,
    LogExpectedImprovement,
    PosteriorMean,
    UpperConfidenceBound,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qMaxValueEntropy,
    qSimpleRegret,
    qUpperConfidenceBound,
)
from botorch.acquisition.analytic import (
    LogConstrainedExpectedImprovement,
    LogProbabilityOfFeasibility,
)
from botorch.acquisition.cost_aware import InverseCostWeightedUtility
from botorch.acquisition.knowledge_gradient import qMultiFidelityKnowledgeGradient
from botorch.acquisition.logei import qLogProbabilityOfFeasibility
from botorch.acquisition.max_value_entropy_search import (
    qLowerBoundMaxValueEntropy,
    qMultiFidelityMaxValueEntropy,
)
from botorch.acquisition.multi_objective.logei import (
    qLogExpectedHypervolumeImprovement,
    qLogNoisyExpectedHypervolumeImprovement,
)
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.multi_objective.parego import qLogNParEGO
from botorch.acquisition.objective import GenericMCObjective, MCAcquisitionObjective
from botorch.acquisition.utils import project_to_target_fidelity
from botorch.models.cost import AffineFidelityCostModel
from botorch.models.model import Model
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import get_sampler
from botorch.utils.multi_objective.box_decompositions import FastNondominatedPartitioning
from torch import Tensor

from probkit._botorch_ensemble import ExactEnsembleSampler
from probkit.bo.acquisition import LogStudentTExpectedImprovement, StudentTUpperConfidenceBound
from probkit.bo.domain import Domain, as_domain
from probkit.bo.policy.abilities import Abilities, abilities_of, check_allowed
from probkit.bo.policy.compiled import without_compiler
from probkit.bo.policy.goal import Goal
from probkit.bo.policy.thompson import ThompsonSample
from probkit.errors import DataError, ShapeError
from probkit.numerics import check_finite
from probkit.rng import Rng, scope, seed_of, stream

__all__ = ["acquisition_for", "choose_acquisition"]

_UCB = 2.0  # Standard deviations above the mean.
_QUANTILE = 0.9772  # The same for laws that are not normal.
_FANTASIES = 16
_CANDIDATES = 256


@dataclass(frozen=True, eq=False)
class _Case:
    """All that a builder may want.

    Attributes:
        model: The surrogate.
        goal: The goal.
        X: Inputs with outcomes [row, feature].
        Y: Outcomes [row, output].
        pending: Points without outcomes yet [pending, feature]; None for none.
        domain: The box.
        abilities: What the surrogate can do.
        samples: Monte Carlo samples.
        seed: Seed of everything random.
        exact: Whether outcomes are free of noise.
    """

    model: Model
    goal: Goal
    X: Tensor
    Y: Tensor
    pending: Tensor | None
    domain: Domain
    abilities: Abilities
    samples: int
    seed: int
    exact: bool

    @property
    def objective_model(self) -> Model:
        """The surrogate of the one objective alone."""
        if self.abilities.outputs == 1:
            return self.model
        return self.model.subset_output(list(self.goal.objectives))

    @property
    def objective(self) -> MCAcquisitionObjective | None:
        """The one objective as a function of samples of all outputs."""
        if self.abilities.outputs == 1:
            return None
        column = self.goal.objectives[0]
        return GenericMCObjective(lambda Y, X=None: Y[..., column])

    def best(self) -> Tensor:
        """Return the best value of the one objective so far.

        Where outcomes are noisy it is the best posterior mean at the points seen, which is no
        luckier than the surrogate itself. Infeasible points do not count; where none is feasible,
        the worst value is to be beaten, so that feasibility decides.
        """
        column = self.goal.objectives[0]
        with torch.no_grad():
            Y = self.Y if self.exact else self._means()
        values, good = Y[:, column], self.goal.feasible(self.Y)
        return values[good].max() if bool(good.any()) else values.min()

    def _means(self) -> Tensor:
        """Posterior means [row, output] at the points seen, each point for itself."""
        from botorch.posteriors.transformed import TransformedPosterior

        posterior = self.model.posterior(self.X[:, None])
        if isinstance(posterior, TransformedPosterior) and posterior._mean_transform is None:
            samples = self.sampler(posterior)(posterior)
            return samples.mean(0).squeeze(-2)
        mean: Tensor = posterior.mean.squeeze(-2)
        return mean

    def sampler(self, posterior: Any = None) -> MCSampler:
        """Return a sampler with a seed of its own; members of an ensemble are each taken once."""
        if self.abilities.posterior == "draws" and posterior is None:
            return ExactEnsembleSampler(seed=self.seed)
        if posterior is None:
            with torch.no_grad():
                posterior = self.model.posterior(self.X[:1])
        return get_sampler(posterior, torch.Size([self.samples]), seed=self.seed)

    def candidates(self) -> Tensor:
        """Points [candidate, feature] all over the box, and those seen."""
        return torch.cat([self.domain.sample(_CANDIDATES, seed=self.seed), self.X])


def choose_acquisition(
    abilities: Abilities,
    goal: Goal,
    *,
    batch: bool = False,
    exact: bool = False,
    fidelity: bool = False,
) -> str:
    """Name the acquisition function that "auto" stands for.

    Args:
        abilities: What the surrogate can do.
        goal: The goal.
        batch: Whether several points are wanted, or some are pending.
        exact: Whether outcomes are free of noise.
        fidelity: Whether the domain has a column of fidelity.
    """
    normal = abilities.posterior == "normal"
    if len(goal.objectives) > 1:
        return "q_log_ehvi" if exact or not normal else "q_log_nehvi"
    if fidelity and normal and abilities.fantasies and not goal.constraints:
        return "mf_kg"
    if batch:
        return "q_log_nei" if normal and not exact else "q_log_ei"
    if goal.constraints:
        return "log_cei" if normal else "q_log_ei"
    if normal:
        return "log_ei"
    return "t_log_ei" if abilities.posterior == "student" else "q_log_ei"


def acquisition_for(
    model: Model,
    goal: Goal | None = None,
    *,
    X: Tensor,
    Y: Tensor,
    acquisition: str = "auto",
    X_pending: Tensor | None = None,
    q: int = 1,
    bounds: Domain | Tensor | None = None,
    exact: bool = False,
    samples: int = 128,
    cost: Mapping[str, float] | None = None,
    rng: Rng,
) -> AcquisitionFunction:
    """Build the acquisition function that decides where to evaluate next.

    Args:
        model: A fitted BoTorch model, of probkit or not.
        goal: Which outputs are maximised, and which keep bounds; by default the first is.
        X: Inputs with outcomes [row, feature].
        Y: Outcomes [row, output], on the scale of the model's predictions.
        acquisition: A name out of :data:`ACQUISITIONS`, or "auto".
        X_pending: Points under evaluation [pending, feature].
        q: How many points are wanted.
        bounds: The box, as for :func:`~probkit.bo.surrogates.make_surrogate`.
        exact: Whether outcomes are free of noise; the incumbent is then the best outcome.
        samples: Monte Carlo samples, where the surrogate is no ensemble.
        cost: Of an evaluation at fidelity s, {"fixed": a, "slope": b} for a + b s.
        rng: Seed or generator.

    Returns:
        The acquisition function; pass it to :func:`maximise` or to ``optimize_acqf``.

    Raises:
        CapabilityError: The surrogate cannot do what the name asks for; the message lists the
            acquisition functions that are allowed.

    Example:
        >>> from probkit.bo.surrogates import make_surrogate
        >>> X = torch.rand(8, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> Y = X.sum(1, keepdim=True)
        >>> model = make_surrogate("gp", X, Y, rng=0)
        >>> type(acquisition_for(model, X=X, Y=Y, rng=0)).__name__
        'LogExpectedImprovement'
    """
    case = _case(model, goal, X, Y, X_pending, bounds, exact, samples, rng)
    if isinstance(q, bool) or not isinstance(q, int) or q < 1:
        raise DataError(f"q: expected a whole number of points >= 1, got {q!r}")
    batch = q > 1 or case.pending is not None
    fidelity = case.domain.fidelity is not None
    name = acquisition
    if name == "auto":
        name = choose_acquisition(
            case.abilities, case.goal, batch=batch, exact=exact, fidelity=fidelity
        )
    check_allowed(
        name,
        case.abilities,
        case.goal,
        surrogate=type(model).__name__,
        batch=batch,
        fidelity=fidelity,
    )
    with scope(rng=stream(case.seed, "acquisition")), without_compiler():
        if name in ("mf_kg", "mf_mes"):
            return _with_fidelity(name, case, cost)
        return _BUILDERS[name](case)


def _case(
    model: Model,
    goal: Goal | None,
    X: Tensor,
    Y: Tensor,
    pending: Tensor | None,
    bounds: Domain | Tensor | None,
    exact: bool,
    samples: int,
    rng: Rng,
) -> _Case:
    """Check the arguments and put them together."""
    goal = Goal() if goal is None else goal
    if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y) or len(X) == 0:
        raise ShapeError(
            "acquisition_for: expected X [row, feature] and Y [row, output] with equally many "
            f"rows, got {tuple(X.shape)} and {tuple(Y.shape)}"
        )
    X, Y = X.double(), Y.double()
    check_finite(Y, "Y", ("row", "output"))
    domain = as_domain(bounds, X.shape[1])
    domain.check(X)
    if pending is not None:
        pending = pending.double()
        domain.check(pending, "X_pending")
        pending = pending if len(pending) else None
    abilities = abilities_of(model, X)
    if Y.shape[1] != abilities.outputs:
        raise ShapeError(
            f"Y: expected [row, output={abilities.outputs}], as the surrogate predicts, got "
            f"{tuple(Y.shape)}"
        )
    goal.check(abilities.outputs)
    return _Case(model, goal, X, Y, pending, domain, abilities, samples, seed_of(rng), exact)


# ------------------------------------------------------------------------------- one objective


def _log_ei(case: _Case) -> AcquisitionFunction:
    return LogExpectedImprovement(case.objective_model, case.best())


def _ucb(case: _Case) -> AcquisitionFunction:
    return UpperConfidenceBound(case.objective_model, beta=_UCB**2)


def _posterior_mean(case: _Case) -> AcquisitionFunction:
    if case.abilities.posterior == "normal":
        return PosteriorMean(case.objective_model)
    return qSimpleRegret(case.model, sampler=case.sampler(), objective=case.objective)


def _log_cei(case: _Case) -> AcquisitionFunction:
    """Expected improvement times the probability of feasibility, which counts alone at first."""
    limits: dict[int, tuple[float | None, float | None]] = {}
    for column, sign, bound in case.goal.constraints:
        low, high = limits.get(column, (None, None))
        limits[column] = (low, bound / sign) if sign > 0 else (bound / sign, high)
    if not bool(case.goal.feasible(case.Y).any()):
        columns = sorted(limits)
        part = case.model.subset_output(columns) if len(columns) < case.Y.shape[1] else case.model
        return LogProbabilityOfFeasibility(part, {i: limits[k] for i, k in enumerate(columns)})
    return LogConstrainedExpectedImprovement(
        case.model, case.best(), case.goal.objectives[0], limits
    )


def _t_log_ei(case: _Case) -> AcquisitionFunction:
    return LogStudentTExpectedImprovement(case.objective_model, case.best())


def _t_ucb(case: _Case) -> AcquisitionFunction:
    return StudentTUpperConfidenceBound(case.objective_model, _QUANTILE)


def _feasibility(case: _Case) -> AcquisitionFunction | None:
    """Return the probability of feasibility where no point is feasible yet; else None."""
    if bool(case.goal.feasible(case.Y).any()):
        return None
    return qLogProbabilityOfFeasibility(
        case.model, case.goal.slacks(), sampler=case.sampler(), X_pending=case.pending
    )


def _q_log_ei(case: _Case) -> AcquisitionFunction:
    feasibility = _feasibility(case)
    if feasibility is not None:
        return feasibility
    return qLogExpectedImprovement(
        case.model,
        case.best(),
        sampler=case.sampler(),
        objective=case.objective,
        X_pending=case.pending,
        constraints=case.goal.slacks() or None,
    )


def _q_log_nei(case: _Case) -> AcquisitionFunction:
    feasibility = _feasibility(case)
    if feasibility is not None:
        return feasibility
    return qLogNoisyExpectedImprovement(
        case.model,
        case.X,
        sampler=case.sampler(),
        objective=case.objective,
        X_pending=case.pending,
        constraints=case.goal.slacks() or None,
        prune_baseline=case.abilities.posterior == "normal",
    )


def _q_ucb(case: _Case) -> AcquisitionFunction:
    return qUpperConfidenceBound(
        case.model,
        beta=_UCB**2,
        sampler=case.sampler(),
        objective=case.objective,
        X_pending=case.pending,
    )


def _q_simple_regret(case: _Case) -> AcquisitionFunction:
    return qSimpleRegret(
        case.model, sampler=case.sampler(), objective=case.objective, X_pending=case.pending
    )


def _thompson(case: _Case) -> AcquisitionFunction:
    return ThompsonSample(case.objective_model, seed=case.seed, pending=case.pending)


# ------------------------------------------------------------------------------- looking ahead


def _kg(case: _Case) -> AcquisitionFunction:
    model = case.objective_model
    with torch.no_grad():
        current = model.posterior(case.X[:, None]).mean.max()
    sampler = _fantasy_sampler(model, case)
    return qKnowledgeGradient(
        model,
        num_fantasies=_FANTASIES,
        sampler=sampler,
        X_pending=case.pending,
        current_value=current,
    )


def _fantasy_sampler(model: Model, case: _Case) -> MCSampler:
    with torch.no_grad():
        posterior = model.posterior(case.X[:1])
    return get_sampler(posterior, torch.Size([_FANTASIES]), seed=case.seed)


def _mes(case: _Case) -> AcquisitionFunction:
    return qMaxValueEntropy(
        case.objective_model,
        case.candidates(),
        num_fantasies=_FANTASIES,
        X_pending=case.pending,
        train_inputs=case.X,
    )


def _gibbon(case: _Case) -> AcquisitionFunction:
    return qLowerBoundMaxValueEntropy(
        case.objective_model, case.candidates(), X_pending=case.pending, train_inputs=case.X
    )


def _with_fidelity(name: str, case: _Case, cost: Mapping[str, float] | None) -> AcquisitionFunction:
    """Value information about the target fidelity by its cost."""
    column = case.domain.fidelity
    assert column is not None
    target = {column: float(case.domain.bounds[1, column])}
    utility = InverseCostWeightedUtility(cost_model=_cost_model(case, column, cost))
    model = case.objective_model

    def project(X: Tensor) -> Tensor:
        projected: Tensor = project_to_target_fidelity(X, target, case.domain.size)
        return projected

    if name == "mf_mes":
        return qMultiFidelityMaxValueEntropy(
            model,
            project(case.candidates()),
            num_fantasies=_FANTASIES,
            X_pending=case.pending,
            cost_aware_utility=utility,
            project=project,
        )
    with torch.no_grad():
        current = model.posterior(project(case.X)[:, None]).mean.max()
    return qMultiFidelityKnowledgeGradient(
        model,
        num_fantasies=_FANTASIES,
        sampler=_fantasy_sampler(model, case),
        X_pending=case.pending,
        current_value=current,
        cost_aware_utility=utility,
        project=project,
    )


def _cost_model(case: _Case, column: int, cost: Mapping[str, float] | None) -> Model:
    """Return a + b s; by default a tenth of the cost at the target fidelity is fixed."""
    low, high = case.domain.bounds[:, column].tolist()
    given = {"slope": 1.0, "fixed": 0.1 * max(abs(low), abs(high))} if cost is None else dict(cost)
    if set(given) != {"fixed", "slope"}:
        raise DataError(f"cost: expected 'fixed' and 'slope', got {sorted(given)}")
    if given["slope"] <= 0 or given["fixed"] + given["slope"] * low <= 0:
        raise DataError(
            f"cost: expected slope > 0 and a cost > 0 at the lowest fidelity {low:g}, got {given}"
        )
    return AffineFidelityCostModel(
        fidelity_weights={column: given["slope"]}, fixed_cost=given["fixed"]
    )


# --------------------------------------------------------------------------- several objectives


def _multi_objective(case: _Case) -> IdentityMCMultiOutputObjective:
    return IdentityMCMultiOutputObjective(outcomes=list(case.goal.objectives))


def _q_log_ehvi(case: _Case) -> AcquisitionFunction:
    with torch.no_grad():
        Y = case.Y if case.exact else case._means()
    reference = case.goal.reference_point(case.Y)
    values = case.goal.values(Y[case.goal.feasible(case.Y)])
    partitioning = FastNondominatedPartitioning(reference, Y=values)
    return qLogExpectedHypervolumeImprovement(
        case.model,
        reference,
        partitioning,
        sampler=case.sampler(),
        objective=_multi_objective(case),
        constraints=case.goal.slacks() or None,
        X_pending=case.pending,
    )


def _q_log_nehvi(case: _Case) -> AcquisitionFunction:
    return qLogNoisyExpectedHypervolumeImprovement(
        case.model,
        case.goal.reference_point(case.Y),
        case.X,
        sampler=case.sampler(),
        objective=_multi_objective(case),
        constraints=case.goal.slacks() or None,
        X_pending=case.pending,
        prune_baseline=case.abilities.posterior == "normal",
    )


def _parego(case: _Case) -> AcquisitionFunction:
    return qLogNParEGO(
        case.model,
        case.X,
        sampler=case.sampler(),
        objective=_multi_objective(case),
        constraints=case.goal.slacks() or None,
        X_pending=case.pending,
    )


_BUILDERS: Mapping[str, Callable[[_Case], AcquisitionFunction]] = {
    "log_ei": _log_ei,
    "ucb": _ucb,
    "posterior_mean": _posterior_mean,
    "log_cei": _log_cei,
    "t_log_ei": _t_log_ei,
    "t_ucb": _t_ucb,
    "q_log_ei": _q_log_ei,
    "q_log_nei": _q_log_nei,
    "q_ucb": _q_ucb,
    "q_simple_regret": _q_simple_regret,
    "thompson": _thompson,
    "kg": _kg,
    "mes": _mes,
    "gibbon": _gibbon,
    "q_log_ehvi": _q_log_ehvi,
    "q_log_nehvi": _q_log_nehvi,
    "parego": _parego,
}

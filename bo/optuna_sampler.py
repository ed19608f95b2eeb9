"""Search inside Optuna: its studies, storages and dashboard, our surrogates.

The extra ``bo`` brings ``optuna``; without it this module can be imported, and no sampler made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from probkit.bo.asking import StudySettings, next_points
from probkit.bo.outcomes import Constraint, Outcomes
from probkit.bo.parameters import Categorical, Float, Int, Parameter
from probkit.bo.space import Space
from probkit.bo.trials import Trial
from probkit.extras import available, require
from probkit.rng import Rng, seed_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial

_Base: Any = require("optuna.samplers", extra="bo").BaseSampler if available("optuna") else object

__all__ = ["ProbkitSampler"]

#: Where the params of a running trial are kept, for other processes: in pieces, as storages limit
#: the length of an attribute.
_SHARED = "probkit:params"
_PIECE = 2000


class ProbkitSampler(_Base):
    """An Optuna sampler that asks a surrogate of probkit.

    Parameters that all trials so far have in common are chosen together, with pending trials taken
    into account, also those of other processes; the others are left to ``independent``. Failed
    trials stand in the data with the worst value, pruned ones with their last intermediate value
    where that is worse than the median; constraints are those of ``trial.set_constraint``.

    Args:
        surrogate: As for :class:`~probkit.bo.Study`.
        acq: As for :class:`~probkit.bo.Study`.
        rng: Seed of everything random.
        noise: ``"none"`` where values are exact.
        initial: Number of trials before the first surrogate.
        failures: ``"worst"`` or ``"ignore"``.
        options: Options of the surrogate.
        independent: Optuna sampler of parameters that not all trials have; random by default.

    Example:
        >>> import optuna
        >>> study = optuna.create_study(sampler=ProbkitSampler(surrogate="gp", rng=0, initial=4))
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2, n_trials=5)
        >>> len(study.trials)
        5
    """

    def __init__(
        self,
        surrogate: Any = "auto",
        *,
        acq: str = "auto",
        rng: Rng,
        noise: str = "auto",
        initial: int = 10,
        failures: str = "worst",
        options: Mapping[str, Any] | None = None,
        independent: Any = None,
    ) -> None:
        optuna = require("optuna", extra="bo")
        self._settings = StudySettings(
            surrogate, acq, seed_of(rng), noise, initial, failures, options=dict(options or {})
        )
        seed = self._settings.seed % 2**32
        self._independent = independent or optuna.samplers.RandomSampler(seed=seed)
        self._common = optuna.search_space.IntersectionSearchSpace()
        self._state: Any = None
        self._state_space: Space | None = None

    def reseed_rng(self) -> None:
        """Reseed what is drawn independently; our own streams are keyed by the trial's number."""
        self._independent.reseed_rng()

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the parameters that all finished trials have in common."""
        common = self._common.calculate(study)
        return {name: d for name, d in common.items() if not d.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Choose values of the common parameters."""
        if not search_space:
            return {}
        axes = {name: _axis(distribution) for name, distribution in search_space.items()}
        space = Space({name: axis.parameter for name, axis in axes.items()})
        others = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        outcomes = _outcomes(study, others)
        known = [t for t in (_trial(t, axes, outcomes) for t in others) if t is not None]
        proposal = next_points(
            space,
            outcomes,
            known,
            1,
            settings=self._settings,
            state=self._state if space == self._state_space else None,
            number=trial.number,
        )
        if proposal.state is not None:
            self._state, self._state_space = proposal.state, space
        params = {name: axes[name].to_optuna(v) for name, v in proposal.params[0].items()}
        _share(study, trial, params)
        return params

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Draw a parameter that not all trials have."""
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


@dataclass(frozen=True)
class _Axis:
    """A parameter of Optuna as one of ours, and the maps between their values."""

    parameter: Parameter
    from_optuna: Callable[[Any], Any]
    to_optuna: Callable[[Any], Any]


def _axis(distribution: BaseDistribution) -> _Axis:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    d: Any = distribution
    if isinstance(distribution, CategoricalDistribution):
        index = distribution.to_internal_repr
        choices = list(distribution.choices)
        return _Axis(
            Categorical(list(range(len(choices)))),
            lambda value: int(index(value)),
            lambda code: choices[code],
        )
    whole = isinstance(distribution, IntDistribution)
    if isinstance(distribution, FloatDistribution) and d.step is None:
        return _Axis(Float(d.low, d.high, log=d.log), float, float)
    if whole and d.step == 1:
        return _Axis(Int(d.low, d.high, log=d.log), int, int)
    levels = round((d.high - d.low) / d.step)

    def from_level(level: int) -> Any:
        value = d.low + level * d.step
        return int(value) if whole else min(float(value), d.high)

    return _Axis(Int(0, levels), lambda value: round((value - d.low) / d.step), from_level)


def _outcomes(study: Study, trials: Sequence[FrozenTrial]) -> Outcomes:
    """Objectives by number, and the constraints that complete trials have: at most zero."""
    directions = {f"value_{k}": d.name[:3].lower() for k, d in enumerate(study.directions)}
    names = sorted({name for t in trials if t.state.name == "COMPLETE" for name in _bounds(t)})
    return Outcomes(directions, [Constraint(f"constraint {name}", upper=0.0) for name in names])


def _bounds(trial: FrozenTrial) -> Mapping[str, float]:
    found: Mapping[str, float] = getattr(trial, "constraints", None) or {}
    return found


def _trial(trial: FrozenTrial, axes: Mapping[str, _Axis], outcomes: Outcomes) -> Trial | None:
    """A trial of Optuna as one of ours; None where it lacks parameters or constraints."""
    params = trial.params if trial.state.is_finished() else {**_shared(trial), **trial.params}
    if not all(name in params for name in axes):
        return None
    point = {name: axis.from_optuna(params[name]) for name, axis in axes.items()}
    state = trial.state.name
    if state in ("RUNNING", "WAITING"):
        return Trial(trial.number, point)
    if state == "FAIL":
        return Trial(trial.number, point, "failed")
    bounds = {f"constraint {name}": value for name, value in _bounds(trial).items()}
    if state == "PRUNED":
        return Trial(trial.number, point, "pruned", _last_value(trial, outcomes))
    values = {f"value_{k}": value for k, value in enumerate(trial.values)} | bounds
    if not all(name in values for name in outcomes.names):
        return None
    return Trial(trial.number, point, "complete", {name: values[name] for name in outcomes.names})


def _last_value(trial: FrozenTrial, outcomes: Outcomes) -> dict[str, float] | None:
    """The last intermediate value of a pruned trial, where it says all there is to know."""
    reports = trial.intermediate_values
    if not reports or len(outcomes.names) > 1:
        return None
    last = reports[max(reports)]
    return {outcomes.names[0]: last} if last == last else None


def _share(study: Study, trial: FrozenTrial, params: Mapping[str, Any]) -> None:
    """Let other processes know the params of a trial that they see as running."""
    text = json.dumps(dict(params))
    for k in range(0, len(text), _PIECE):
        study._storage.set_trial_system_attr(
            trial._trial_id, f"{_SHARED}:{k // _PIECE}", text[k : k + _PIECE]
        )


def _shared(trial: FrozenTrial) -> dict[str, Any]:
    pieces: list[str] = []
    while (piece := trial.system_attrs.get(f"{_SHARED}:{len(pieces)}")) is not None:
        pieces.append(piece)
    return json.loads("".join(pieces)) if pieces else {}

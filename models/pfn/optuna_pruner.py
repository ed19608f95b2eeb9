"""Prune Optuna trials whose learning curve has no fair chance of becoming the best."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from probkit.errors import DataError
from probkit.models.pfn.late_base import LateBase
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.stopping import Check, RunWatch, check_delta, checked_steps

if TYPE_CHECKING:
    from probkit.models.pfn.learning_curve import LearningCurvePFN

__all__ = ["OptunaPruner"]


class OptunaPruner(LateBase):
    """A pruner for ``optuna.create_study(pruner=...)``.

    A trial is pruned when, given the values that it reported, no later step has more than ``delta``
    probability of beating the best value of any other trial. Nothing is pruned before another
    trial has a value, and never the trial that holds the best one.

    Trials report ``trial.report(value, step)`` after each epoch, the first being step ``first``.

    Args:
        horizon: Number of epochs of a full trial.
        normalizer: Map of the metric; its direction must be the study's. None takes accuracies or
            errors in [0, 1], by the direction of the study.
        delta: Largest probability of success at which a trial is pruned.
        model: The predictor; None loads the default weights on first use.
        check: Steps at which trials are judged; see :func:`~probkit.models.pfn.checked_steps`.
        first: Number that trials report with their first epoch, 0 or 1.
        warmup: Number of first trials of a study that are never pruned.

    Raises:
        MissingExtraError: Optuna is not installed.
        DataError: An option, or a reported step or value, is out of range.

    Example:
        >>> import optuna
        >>> study = optuna.create_study(direction="maximize", pruner=OptunaPruner(horizon=50))
        >>> isinstance(study.pruner, optuna.pruners.BasePruner)
        True
    """

    _module, _name = "optuna.pruners", "BasePruner"

    def __init__(
        self,
        horizon: int,
        *,
        normalizer: CurveNormalizer | None = None,
        delta: float = 0.05,
        model: LearningCurvePFN | None = None,
        check: Check = "fine",
        first: int = 0,
        warmup: int = 1,
    ) -> None:
        checked_steps(check, horizon)
        if first not in (0, 1) or isinstance(warmup, bool) or warmup < 0:
            raise DataError(
                f"OptunaPruner: expected first 0 or 1 and warmup >= 0, got {first!r} and {warmup!r}"
            )
        self.horizon, self.normalizer, self.delta = horizon, normalizer, check_delta(delta)
        self.model, self.check, self.first, self.warmup = model, check, first, warmup

    def prune(self, study: Any, trial: Any) -> bool:
        """Decide on a running trial; Optuna calls this from ``trial.should_prune()``."""
        if not trial.intermediate_values:
            return False
        minimize = _minimizes(study)
        normalizer = self._normalizer(minimize)
        best = _best_of_others(study, trial, minimize, self.warmup)
        reported = sorted(trial.intermediate_values.items())
        if best is None:
            return False
        model = self._loaded()
        watch = RunWatch(model, normalizer, self.horizon, self.delta, best, self.check)
        with torch.no_grad():
            # earlier steps were judged when they were reported
            for step, value in reported[:-1]:
                watch.steps.append(self._epoch(step))
                watch.values.append(value)
            step, value = reported[-1]
            own = [*watch.values, value]
            leads = min(own) < best if minimize else max(own) > best
            return watch.observe(self._epoch(step), value) and (not leads or value != value)

    def _epoch(self, step: int) -> int:
        epoch = int(step) + 1 - self.first
        if not 1 <= epoch <= self.horizon:
            raise DataError(
                f"OptunaPruner: a trial reported step {step}, which is epoch {epoch} of "
                f"horizon={self.horizon}; report steps {self.first} to "
                f"{self.horizon - 1 + self.first}, or raise the horizon"
            )
        return epoch

    def _normalizer(self, minimize: bool) -> CurveNormalizer:
        if self.normalizer is None:
            return CurveNormalizer.error() if minimize else CurveNormalizer.accuracy()
        if self.normalizer.minimize != minimize:
            words = {True: "minimize", False: "maximize"}
            raise DataError(
                f"OptunaPruner: the study's direction is {words[minimize]}, the normalizer's is "
                f"{words[not minimize]}; give both the same"
            )
        return self.normalizer

    def _loaded(self) -> LearningCurvePFN:
        if self.model is None:
            from probkit.models.pfn.learning_curve import LearningCurvePFN

            self.model = LearningCurvePFN.load()
        return self.model


def _minimizes(study: Any) -> bool:
    """Whether the study's one objective is minimised."""
    if len(study.directions) != 1:
        raise DataError(
            f"OptunaPruner: expected a study with one objective, got {len(study.directions)}; "
            "Optuna prunes none with several"
        )
    return str(study.directions[0].name) == "MINIMIZE"


def _best_of_others(study: Any, trial: Any, minimize: bool, warmup: int) -> float | None:
    """The best value that any other trial reported or returned; None while warming up."""
    if trial.number < warmup:
        return None
    found: list[float] = []
    for other in study.get_trials(deepcopy=False):
        if other.number == trial.number:
            continue
        values = list(other.intermediate_values.values())
        if other.state.name == "COMPLETE" and other.values:
            values.append(other.values[0])
        found.extend(value for value in values if value == value)  # NaN is no value to beat
    if not found:
        return None
    return min(found) if minimize else max(found)

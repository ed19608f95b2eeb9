"""Stop a Transformers ``Trainer`` when its learning curve has no fair chance left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probkit.errors import DataError
from probkit.models.pfn.late_base import LateBase
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.stopping import Check, RunWatch, check_delta

if TYPE_CHECKING:
    from probkit.models.pfn.learning_curve import LearningCurvePFN

__all__ = ["TransformersCallback"]


class TransformersCallback(LateBase):
    """A callback for ``transformers.Trainer(callbacks=[...])``.

    The k-th evaluation is step k of the curve. Training stops when no later evaluation has more
    than ``delta`` probability of beating ``best`` and the run's own best value, or when the metric
    becomes NaN or infinite.

    Args:
        metric: Name of the evaluated metric, with or without the prefix ``eval_``.
        normalizer: Map of the metric, which says whether smaller is better.
        best: Best value of earlier runs; None where this is the first.
        delta: Largest probability of success at which training stops.
        horizon: Evaluations of a full run; None works them out from the training arguments.
        model: The predictor; None loads the default weights when training starts.
        check: Evaluations at which the run is judged; see
            :func:`~probkit.models.pfn.checked_steps`.

    Attributes:
        watch: The record of the run; None before training.

    Raises:
        MissingExtraError: Transformers is not installed.
        DataError: An option is out of range, the training arguments evaluate fewer than two times,
            or the metric is not among those evaluated.
    """

    _module, _name, _extra = "transformers", "TrainerCallback", "training"

    def __init__(
        self,
        metric: str,
        normalizer: CurveNormalizer,
        *,
        best: float | None = None,
        delta: float = 0.05,
        horizon: int | None = None,
        model: LearningCurvePFN | None = None,
        check: Check = "fine",
    ) -> None:
        self.metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.normalizer, self.best, self.delta = normalizer, best, check_delta(delta)
        self.horizon, self.model, self.check = horizon, model, check
        self.watch: RunWatch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the record of the run, from the log of an interrupted one if it continues."""
        from probkit.models.pfn.learning_curve import LearningCurvePFN

        horizon = self.horizon if self.horizon is not None else _evaluations(args, state)
        if horizon < 2:
            raise DataError(
                "TransformersCallback: expected at least two evaluations in a full run, got "
                f"{horizon}; set eval_strategy to 'epoch' or 'steps', or pass horizon="
            )
        self.model = self.model or LearningCurvePFN.load()
        self.watch = RunWatch(
            self.model, self.normalizer, horizon, self.delta, self.best, self.check
        )
        past = [float(entry[self.metric]) for entry in state.log_history if self.metric in entry]
        self.watch.steps, self.watch.values = list(range(1, len(past) + 1)), past

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """Add an evaluation to the curve and decide."""
        if self.watch is None:  # Trainer.evaluate() outside training
            return
        if self.metric not in metrics:
            raise DataError(
                f"TransformersCallback: expected the metric {self.metric!r} to be evaluated, found "
                f"{', '.join(metrics)}; return it from compute_metrics"
            )
        step = len(self.watch.steps) + 1
        if step <= self.watch.horizon and self.watch.observe(step, float(metrics[self.metric])):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the record: evaluations after training do not belong to the curve."""
        self.closed, self.watch = self.watch, None


def _evaluations(args: Any, state: Any) -> int:
    """Evaluations in a full run, by the strategy of the training arguments."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "epoch":
        return int(round(float(args.num_train_epochs)))
    if strategy == "steps" and args.eval_steps:
        every = args.eval_steps
        if every < 1:  # a share of all steps
            every = max(1, round(every * state.max_steps))
        return int(state.max_steps // every)
    return 0

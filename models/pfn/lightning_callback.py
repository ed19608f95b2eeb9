"""Stop a Lightning training when its learning curve has no fair chance left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probkit.errors import DataError
from probkit.models.pfn.late_base import LateBase
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.stopping import Check, RunWatch, check_delta

if TYPE_CHECKING:
    from probkit.models.pfn.learning_curve import LearningCurvePFN

__all__ = ["LightningCallback"]


class LightningCallback(LateBase):
    """A callback for ``lightning.Trainer(callbacks=[...])``.

    After each validation (or training epoch, where there is none) the monitored metric joins the
    curve of the run; training stops when no epoch up to ``max_epochs`` has more than ``delta``
    probability of beating ``best`` and the run's own best value. A run whose metric becomes NaN or
    infinite is stopped.

    Args:
        monitor: Name of the logged metric.
        normalizer: Map of the metric, which says whether smaller is better.
        best: Best value of earlier runs; None where this is the first.
        delta: Largest probability of success at which training stops.
        horizon: Epochs of a full run; None takes the trainer's ``max_epochs``.
        model: The predictor; None loads the default weights when training starts.
        check: Epochs at which the run is judged; see :func:`~probkit.models.pfn.checked_steps`.

    Attributes:
        watch: The record of the run; None before training.

    Raises:
        MissingExtraError: Lightning is not installed.
        DataError: An option is out of range, the trainer has no ``max_epochs`` and no horizon was
            given, or the metric is not logged.
    """

    _module, _name = "lightning.pytorch.callbacks", "Callback"

    def __init__(
        self,
        monitor: str,
        normalizer: CurveNormalizer,
        *,
        best: float | None = None,
        delta: float = 0.05,
        horizon: int | None = None,
        model: LearningCurvePFN | None = None,
        check: Check = "fine",
    ) -> None:
        self.monitor, self.normalizer, self.best = monitor, normalizer, best
        self.delta, self.horizon, self.model, self.check = check_delta(delta), horizon, model, check
        self.watch: RunWatch | None = None
        self._restored: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Name of this callback's part of a checkpoint."""
        return f"LightningCallback[monitor={self.monitor}]"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin the record of the run."""
        from probkit.models.pfn.learning_curve import LearningCurvePFN

        horizon = self.horizon if self.horizon is not None else trainer.max_epochs
        if horizon is None or horizon < 2:
            raise DataError(
                "LightningCallback: expected horizon=, the epochs of a full run, or a trainer with "
                f"max_epochs >= 2; got {horizon}"
            )
        self.model = self.model or LearningCurvePFN.load()
        self.watch = RunWatch(
            self.model, self.normalizer, horizon, self.delta, self.best, self.check
        )
        if self._restored is not None:
            self.watch.load_state_dict(self._restored)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Read the metric after a validation inside training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._observe(trainer, required=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Read the metric after an epoch, where no validation has done so."""
        epoch = trainer.current_epoch + 1
        if self.watch is not None and (not self.watch.steps or self.watch.steps[-1] < epoch):
            validates = bool(trainer.num_val_batches) and trainer.check_val_every_n_epoch != 1
            self._observe(trainer, required=not validates)

    def _observe(self, trainer: Any, *, required: bool) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            if required:
                known = ", ".join(trainer.callback_metrics) or "none"
                raise DataError(
                    f"LightningCallback: expected the metric {self.monitor!r} to be logged, found "
                    f"{known}; call self.log({self.monitor!r}, value) each epoch"
                )
            return
        assert self.watch is not None
        epoch = trainer.current_epoch + 1
        stop = epoch <= self.watch.horizon and self.watch.observe(epoch, float(value))
        # every process of a distributed run must leave at the same epoch
        if trainer.strategy.reduce_boolean_decision(stop, all=False):
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        """What Lightning stores of the run."""
        return {} if self.watch is None else dict(self.watch.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the record of an interrupted run."""
        if state:
            self._restored = state
            if self.watch is not None:
                self.watch.load_state_dict(state)

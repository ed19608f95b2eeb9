"""When to give up on a run: the rule, and the running record that the integrations keep of it.

A run is stopped at step T when no later step has a fair chance of beating the best value known,

    P(y_t' > y_best | y_1, ..., y_T) <= delta    for every t' in (T, m].

Source: Adriaensen, Rakotoarison, Mueller and Hutter (2023), section 5.2. (Domhan, Springenberg and
Hutter, 2015, look at t' = m alone.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from probkit.errors import DataError

if TYPE_CHECKING:
    from probkit.models.pfn.learning_curve import LearningCurvePFN
    from probkit.models.pfn.normalizer import CurveNormalizer

__all__ = ["Check", "RunWatch", "StopDecision", "check_delta", "checked_steps"]

Check = Literal["fine", "coarse"] | Sequence[int]
_COARSE = (0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class StopDecision:
    """What the rule says of one run or of many.

    A decision on one run is its own truth value: ``if lc.should_stop(...): break``.

    Attributes:
        stop: [curve], or a scalar for one curve: whether to stop.
        chance: Of the same shape: the largest probability, over the steps to come, of being better
            than ``best``; 1 where there is nothing to beat yet.
        best: The value to beat; None where there is none.
        delta: The largest chance at which a run is stopped.
    """

    stop: Tensor
    chance: Tensor
    best: Tensor | None
    delta: float

    def __bool__(self) -> bool:
        """Whether to stop the one run.

        Raises:
            DataError: The decision is on several runs.
        """
        if self.stop.numel() != 1:
            raise DataError(
                f"a decision on {self.stop.numel()} runs has no one truth value; use .stop [curve]"
            )
        return bool(self.stop)


def check_delta(delta: float) -> float:
    """Return ``delta``, or say what it may be.

    Raises:
        DataError: It does not lie strictly between 0 and 1.
    """
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0 < delta < 1:
        raise DataError(
            f"delta: expected a probability strictly between 0 and 1, got {delta!r}; 0.05 is usual"
        )
    return float(delta)


def checked_steps(check: Check, horizon: int) -> frozenset[int]:
    """Return the steps T at which a run is judged.

    Args:
        check: "fine" judges after every step 1 < T < m; "coarse" at 10, 20, 40 and 80 % of m,
            rounded up; a sequence of whole numbers names the steps.
        horizon: The last step m.

    Example:
        >>> sorted(checked_steps("coarse", 50))
        [5, 10, 20, 40]
    """
    if isinstance(check, str):
        if check == "fine":
            return frozenset(range(2, horizon))
        if check == "coarse":
            steps = (math.ceil(round(share * horizon, 9)) for share in _COARSE)
            return frozenset(step for step in steps if 0 < step < horizon)
    elif all(isinstance(step, int) and 0 < step < horizon for step in check):
        return frozenset(check)
    raise DataError(
        f"check: expected 'fine', 'coarse' or whole steps between 1 and {horizon - 1}, got "
        f"{check!r}"
    )


@dataclass
class RunWatch:
    """The record of one run while it trains: what a callback knows, and when it stops.

    It decides after every step, so it does not warn of curves outside the prior.

    Attributes:
        model: The predictor.
        normalizer: The map of the metric.
        horizon: The last step of a full run.
        delta: See the rule.
        best: The best value of earlier runs; None where there are none.
        check: See :func:`checked_steps`.
        every: Steps between points that the predictor sees; None keeps at most 100 of them.
        steps: The steps seen so far.
        values: Their values.
        decision: The last decision; None before the first.
        stopped_at: The step at which the rule said to stop; None while it has not.

    Example:
        >>> from probkit.models import LearningCurvePFN
        >>> from probkit.models.pfn import CurveNormalizer
        >>> watch = RunWatch(LearningCurvePFN.load(), CurveNormalizer.accuracy(), 20, best=0.95)
        >>> [watch.observe(t, 0.3 + 0.01 * t) for t in (1, 2)]
        [False, True]
    """

    model: LearningCurvePFN
    normalizer: CurveNormalizer | None
    horizon: int
    delta: float = 0.05
    best: float | None = None
    check: Check = "fine"
    every: int | None = None

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if isinstance(self.horizon, bool) or not isinstance(self.horizon, int) or self.horizon < 2:
            raise DataError(
                f"horizon: expected the number of steps of a full run, at least 2, got "
                f"{self.horizon!r}"
            )
        self._quiet = replace(self.model, out_of_prior="ignore")
        self._judged = checked_steps(self.check, self.horizon)
        self._every = -(-self.horizon // 100) if self.every is None else self.every
        self.steps: list[int] = []
        self.values: list[float] = []
        self.decision: StopDecision | None = None
        self.stopped_at: int | None = None

    def observe(self, step: int, value: float) -> bool:
        """Record the value after ``step`` and return whether to stop now.

        A repeated step replaces its value. A value that is not finite stops the run: it diverged.
        """
        if not math.isfinite(value):
            self.stopped_at = step
            return True
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            self.values.pop()
        self.steps.append(step)
        self.values.append(value)
        if step not in self._judged or step % self._every:
            return False
        self.decision = self.judge()
        if bool(self.decision):
            self.stopped_at = step
        return bool(self.decision)

    def judge(self) -> StopDecision:
        """Apply the rule to what was recorded; the value to beat includes this run's own best."""
        return self._quiet.should_stop(
            self.clipped(),
            self.to_beat(),
            t=torch.tensor(self.steps, dtype=torch.float64),
            delta=self.delta,
            horizon=self.horizon,
            normalizer=self.normalizer,
            every=self._every,
        )

    def clipped(self) -> Tensor:
        """The values [step], put on the hard bounds where rounding has carried them beyond."""
        values = torch.tensor(self.values, dtype=torch.float64)
        if self.normalizer is None:
            return values.clamp(0.0, 1.0)
        low, high = float(self.normalizer.lower), float(self.normalizer.upper)
        slack = 1e-6 * (1.0 + values.abs())
        near = ((values < low) & (values > low - slack)) | (
            (values > high) & (values < high + slack)
        )
        return torch.where(near, values.clamp(low, high), values)

    def to_beat(self) -> float | None:
        """The best of the earlier runs and of this one."""
        minimize = self.normalizer is not None and self.normalizer.minimize
        best = min(self.values) if minimize else max(self.values)
        if self.best is None:
            return best
        return min(best, self.best) if minimize else max(best, self.best)

    def state_dict(self) -> dict[str, list[int] | list[float]]:
        """What a checkpoint of the run must hold."""
        return {"steps": list(self.steps), "values": list(self.values)}

    def load_state_dict(self, state: dict[str, list[int] | list[float]]) -> None:
        """Continue from :meth:`state_dict`."""
        self.steps = [int(step) for step in state["steps"]]
        self.values = [float(value) for value in state["values"]]

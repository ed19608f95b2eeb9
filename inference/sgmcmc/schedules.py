"""Step sizes over a run: constant, decaying, or in cycles that explore and then sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from probkit.errors import DataError
from probkit.files import storable

__all__ = ["Constant", "Cyclical", "Plan", "PolynomialDecay", "Schedule", "Stage", "as_schedule"]


class Plan(NamedTuple):
    """How many draws a run keeps, and how far they lie apart."""

    draws: int
    warmup: int
    thin: int


class Stage(NamedTuple):
    """What one step of the run does.

    Attributes:
        size: Step size.
        temperature: Variance of the injected noise, 1 for the posterior, 0 for plain descent.
        keep: Whether the position after the step is a draw.
    """

    size: float
    temperature: float
    keep: bool


class Schedule(Protocol):
    """A step size for every step of a run."""

    def steps(self, plan: Plan) -> int:
        """Number of steps of the run, warm-up included."""
        ...

    def stage(self, step: int, plan: Plan) -> Stage:
        """What step number ``step`` (from 0) does."""
        ...


def _check_size(name: str, size: float) -> None:
    if not 0.0 < size < math.inf:
        raise DataError(f"{name}: expected size > 0, got {size}")


def _evenly(step: int, plan: Plan) -> bool:
    """Whether a draw is kept where they lie ``thin`` steps apart after the warm-up."""
    after = step - plan.warmup + 1
    return after > 0 and after % plan.thin == 0


@storable
@dataclass(frozen=True)
class Constant:
    """The same step size throughout: draws never become exact, and never slow down.

    Args:
        size: The step size.

    Example:
        >>> Constant(0.01).stage(7, Plan(draws=10, warmup=5, thin=1))
        Stage(size=0.01, temperature=1.0, keep=True)
    """

    size: float

    def __post_init__(self) -> None:
        _check_size("Constant", self.size)

    def steps(self, plan: Plan) -> int:
        """Warm-up, then ``thin`` steps for each draw."""
        return plan.warmup + plan.draws * plan.thin

    def stage(self, step: int, plan: Plan) -> Stage:
        """Return the size, and keep every ``thin``-th position after the warm-up."""
        return Stage(self.size, 1.0, _evenly(step, plan))


@storable
@dataclass(frozen=True)
class PolynomialDecay:
    """size * (1 + t / delay)^-power at step t: the sizes of Welling and Teh (2011, section 4).

    Where power is in (1/2, 1] the bias of averages vanishes as the run grows.

    Args:
        size: Step size at the start.
        power: Exponent.
        delay: Steps after which the size has fallen to 2^-power of its start.

    Example:
        >>> PolynomialDecay(1.0, power=0.5, delay=1).stage(3, Plan(4, 0, 1)).size
        0.5
    """

    size: float
    power: float = 0.55
    delay: int = 1000

    def __post_init__(self) -> None:
        _check_size("PolynomialDecay", self.size)
        if not 0.0 < self.power <= 1.0 or self.delay < 1:
            raise DataError(
                "PolynomialDecay: expected 0 < power <= 1 and delay >= 1, got "
                f"{self.power}, {self.delay}"
            )

    def steps(self, plan: Plan) -> int:
        """Warm-up, then ``thin`` steps for each draw."""
        return plan.warmup + plan.draws * plan.thin

    def stage(self, step: int, plan: Plan) -> Stage:
        """Return the size, and keep every ``thin``-th position after the warm-up."""
        size = self.size * (1.0 + step / self.delay) ** -self.power
        return Stage(size, 1.0, _evenly(step, plan))


@storable
@dataclass(frozen=True)
class Cyclical:
    """Cosine cycles from ``size`` towards zero: large steps explore, small ones sample.

    At fraction r of a cycle the size is size / 2 * (cos(pi r) + 1) (Zhang et al. 2020, equation 1).
    While r < ``explore`` positions are dropped; after that they are draws. Draws are spread
    evenly over the cycles, which start after the warm-up.

    Args:
        size: Step size at the start of a cycle, and in the warm-up.
        cycles: Number of cycles; the number of draws is a multiple of it.
        explore: Share of each cycle that explores.
        temperature: Noise while exploring: 0 descends, as the paper does on minibatches; 1 injects
            the noise of the sampler, which full-batch gradients need to leave a mode.

    Example:
        >>> cyclical = Cyclical(0.1, cycles=2, explore=0.5)
        >>> plan = Plan(draws=4, warmup=0, thin=1)
        >>> [cyclical.stage(step, plan).keep for step in range(cyclical.steps(plan))]
        [False, False, True, True, False, False, True, True]
    """

    size: float
    cycles: int = 4
    explore: float = 0.5
    temperature: float = 0.0

    def __post_init__(self) -> None:
        _check_size("Cyclical", self.size)
        if self.cycles < 1 or not 0.0 <= self.explore < 1.0:
            raise DataError(
                f"Cyclical: expected cycles >= 1 and explore in [0, 1), got {self.cycles}, "
                f"{self.explore}"
            )
        if not 0.0 <= self.temperature < math.inf:
            raise DataError(f"Cyclical: expected temperature >= 0, got {self.temperature}")

    def _sampling(self, plan: Plan) -> int:
        """Steps of one cycle that sample."""
        if plan.draws % self.cycles:
            raise DataError(
                f"Cyclical: expected draws to be a multiple of cycles={self.cycles}, got "
                f"draws={plan.draws}"
            )
        return plan.draws // self.cycles * plan.thin

    def _length(self, plan: Plan) -> int:
        """Steps of one cycle."""
        return math.ceil(self._sampling(plan) / (1.0 - self.explore))

    def steps(self, plan: Plan) -> int:
        """Warm-up, then the cycles."""
        return plan.warmup + self.cycles * self._length(plan)

    def stage(self, step: int, plan: Plan) -> Stage:
        """Return the size in the cycle, the noise, and whether a draw is kept."""
        if step < plan.warmup:
            return Stage(self.size, 1.0, False)
        length = self._length(plan)
        place = (step - plan.warmup) % length
        size = 0.5 * self.size * (math.cos(math.pi * place / length) + 1.0)
        sampled = place - (length - self._sampling(plan)) + 1
        if sampled <= 0:
            return Stage(size, self.temperature, False)
        return Stage(size, 1.0, sampled % plan.thin == 0)


def as_schedule(step_size: float | Schedule) -> Schedule:
    """Read a number as a constant schedule."""
    return Constant(float(step_size)) if isinstance(step_size, int | float) else step_size

"""What a problem is: a space, outcomes, and a function of the params."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from probkit.bo.outcomes import Outcomes
from probkit.bo.space import Params, Space
from probkit.errors import DataError

__all__ = ["Problem"]


class Problem(ABC):
    """A function to optimise, with what is known of it. Calling it evaluates params.

    Attributes:
        space: The parameters.
        outcomes: Names and directions of what is measured; to be minimised unless it says else.
        best: Best value of the one objective, where it is known.
        reference: Value of each objective that is worth nothing, for hypervolume; None where
            there is one objective.
    """

    space: Space
    outcomes: Outcomes
    best: float | None = None
    reference: Mapping[str, float] | None = None

    @property
    def name(self) -> str:
        """Name of the problem."""
        return type(self).__name__

    @abstractmethod
    def evaluate(self, params: Params) -> dict[str, float]:
        """Return every outcome by name, free of noise."""

    def __call__(self, params: Params) -> dict[str, float]:
        """Check the params and evaluate them.

        Raises:
            DataError: Params that are missing, unknown or out of range.
        """
        return self.evaluate(self.space.check(params))

    def regret(self, value: float | Mapping[str, float]) -> float:
        """Return how far a value of the objective is from the best, at least 0 by definition.

        Raises:
            DataError: The best value is not known, or there are several objectives.
        """
        name = self.outcomes.only
        if self.best is None:
            raise DataError(f"{self.name}: its best value is not known")
        number = float(value[name]) if isinstance(value, Mapping) else float(value)
        sign = 1.0 if self.outcomes.objectives[name] == "min" else -1.0
        return sign * (number - self.best)

    def __repr__(self) -> str:
        """Name, size and outcomes."""
        parts: list[Any] = [f"{len(list(self.space))} parameters"]
        parts += [f"{name} ({how})" for name, how in self.outcomes.objectives.items()]
        parts += [f"{c.name} constrained" for c in self.outcomes.constraints]
        return f"{self.name}({', '.join(parts)})"

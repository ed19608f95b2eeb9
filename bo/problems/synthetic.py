"""BoTorch's test functions as problems of named parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probkit.bo.outcomes import Constraint, Outcomes
from probkit.bo.parameters import Categorical, Float, Int, Parameter
from probkit.bo.problems.base import Problem
from probkit.bo.space import Params, Space
from probkit.errors import DataError

__all__ = ["TestFunction"]


class TestFunction(Problem):
    """A function of ``botorch.test_functions``, to be minimised, noise left out.

    Several objectives are called f1, f2, ...; constraints c1, c2, ... must be at least zero.

    Args:
        function: An object such as ``Branin()``, or the name of its class, such as "Branin".
        **options: Arguments of the class, for a name.

    Raises:
        DataError: There is no function of that name, or it is maximised.

    Example:
        >>> problem = TestFunction("Branin")
        >>> abs(problem.regret(problem({"x1": 3.14159265, "x2": 2.275}))) < 1e-6
        True
    """

    __test__ = False  # Not a test, whatever pytest thinks of its name.

    def __init__(self, function: Any, **options: Any) -> None:
        if isinstance(function, str):
            function = _by_name(function)(**options)
        elif options:
            raise DataError(f"options {sorted(options)}: expected none with an object; pass a name")
        if getattr(function, "negate", False):
            raise DataError(
                f"{type(function).__name__}: expected a function to be minimised; leave negate out"
            )
        self.function = function
        self.space = Space(_parameters(function))
        objectives = int(getattr(function, "num_objectives", 1))
        names = ["value"] if objectives == 1 else [f"f{k + 1}" for k in range(objectives)]
        constraints = int(getattr(function, "num_constraints", 0) or 0)
        self.outcomes = Outcomes(
            dict.fromkeys(names, "min"),
            [Constraint(f"c{k + 1}", lower=0.0) for k in range(constraints)],
        )
        self._names, self._constrained = names, constraints
        if objectives == 1:
            self.best = _optimum(function)
        else:
            self.reference = dict(zip(names, function.ref_point.tolist(), strict=True))

    @property
    def name(self) -> str:
        """Name of the function."""
        return type(self.function).__name__

    def value(self, X: Tensor) -> Tensor:
        """Return the objectives [*batch] or [*batch, objective] at points [*batch, feature]."""
        values: Tensor = self.function.evaluate_true(X)
        return values

    def evaluate(self, params: Params) -> dict[str, float]:
        """Return objectives and slacks of constraints."""
        point = torch.tensor(
            [[float(params[name]) for name in self.space.names]], dtype=torch.float64
        )
        values = self.value(point).reshape(-1).tolist()
        found = dict(zip(self._names, values, strict=True))
        if self._constrained:
            slacks = self.function.evaluate_slack_true(point).reshape(-1).tolist()
            found.update({f"c{k + 1}": value for k, value in enumerate(slacks)})
        return found


def _by_name(name: str) -> Any:
    from botorch import test_functions

    found = getattr(test_functions, name, None)
    if found is None:
        raise DataError(f"botorch.test_functions has no {name!r}; names are such as 'Hartmann'")
    return found


def _parameters(function: Any) -> dict[str, Parameter]:
    """Name the variables x1, x2, ..., with their kinds."""
    bounds = function.bounds.double()
    discrete = set(getattr(function, "discrete_inds", []))
    categorical = set(getattr(function, "categorical_inds", []))
    parameters: dict[str, Parameter] = {}
    for k, (low, high) in enumerate(bounds.T.tolist()):
        name = f"x{k + 1}"
        if k in categorical:
            parameters[name] = Categorical(list(range(int(low), int(high) + 1)))
        elif k in discrete:
            parameters[name] = Int(int(low), int(high))
        else:
            parameters[name] = Float(low, high)
    return parameters


def _optimum(function: Any) -> float | None:
    try:
        return float(function.optimal_value)
    except (NotImplementedError, AttributeError):
        return None

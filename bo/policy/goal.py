"""What a search is after, in terms of the outputs of its surrogate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.numerics import check_finite

__all__ = ["Goal"]


@dataclass(frozen=True, eq=False)
class Goal:
    """Outputs to be maximised, and outputs that must keep bounds.

    Args:
        objectives: Columns of Y to be maximised; several are traded off.
        constraints: Triples (column, sign, bound): a point is feasible where sign * y <= bound.
        reference: Of several objectives, a value of each [objective] that is worth nothing:
            hypervolume is counted from there. None takes it from the data (a tenth of the
            range of the non-dominated outcomes below their worst).

    Raises:
        DataError: No objective, or a column named twice.

    Example:
        >>> goal = Goal((0,), [(1, 1.0, 2.5)])
        >>> goal.feasible(torch.tensor([[3.0, 1.0], [9.0, 4.0]])).tolist()
        [True, False]
    """

    objectives: Sequence[int] = (0,)
    constraints: Sequence[tuple[int, float, float]] = ()
    reference: Tensor | Sequence[float] | None = None

    def __post_init__(self) -> None:
        objectives = tuple(int(k) for k in self.objectives)
        if not objectives or len(set(objectives)) < len(objectives):
            raise DataError(f"objectives: expected distinct columns, got {list(self.objectives)}")
        object.__setattr__(self, "objectives", objectives)
        constraints = tuple((int(k), float(s), float(b)) for k, s, b in self.constraints)
        object.__setattr__(self, "constraints", constraints)
        if self.reference is not None:
            point = torch.as_tensor(self.reference, dtype=torch.float64)
            if point.shape != (len(objectives),):
                raise ShapeError(
                    f"reference: expected [objective={len(objectives)}], got {tuple(point.shape)}"
                )
            check_finite(point, "reference", ("objective",))
            object.__setattr__(self, "reference", point)

    def check(self, outputs: int) -> None:
        """Refuse columns that a model of ``outputs`` outputs does not have.

        Raises:
            DataError: One does not exist.
        """
        columns = [*self.objectives, *(k for k, _, _ in self.constraints)]
        if not all(0 <= k < outputs for k in columns):
            raise DataError(
                f"goal: expected columns in [0, {outputs}), the outputs of the surrogate, got "
                f"{columns}"
            )

    def values(self, Y: Tensor) -> Tensor:
        """Return the objectives [*, objective] of outcomes [*, output]."""
        return Y[..., list(self.objectives)]

    def feasible(self, Y: Tensor) -> Tensor:
        """Tell which outcomes [*, output] keep all bounds."""
        good = torch.ones(Y.shape[:-1], dtype=torch.bool, device=Y.device)
        for column, sign, bound in self.constraints:
            good = good & (sign * Y[..., column] <= bound)
        return good

    def slacks(self) -> list[Callable[[Tensor], Tensor]]:
        """Return functions of outcomes [*, output] that are <= 0 where a bound is kept."""
        return [_slack(*triple) for triple in self.constraints]

    def reference_point(self, Y: Tensor) -> Tensor:
        """Return the point that hypervolume is counted from, given outcomes [row, output].

        Feasible outcomes decide, or all where none is.
        """
        if self.reference is not None:
            return torch.as_tensor(self.reference, dtype=Y.dtype, device=Y.device)
        from botorch.utils.multi_objective.hypervolume import infer_reference_point
        from botorch.utils.multi_objective.pareto import is_non_dominated

        good = self.feasible(Y)
        values = self.values(Y[good] if bool(good.any()) else Y)
        front = values[is_non_dominated(values)]
        point: Tensor = infer_reference_point(front, scale=0.1)
        return point


def _slack(column: int, sign: float, bound: float) -> Callable[[Tensor], Tensor]:
    def slack(Y: Tensor) -> Tensor:
        return sign * Y[..., column] - bound

    return slack

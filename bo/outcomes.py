"""What is measured in a study: objectives with a direction, and constraints with bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError

__all__ = ["Constraint", "Outcomes"]

_SENTENCE = re.compile(r"^\s*([A-Za-z_]\w*)\s*(<=|>=)\s*(\S+)\s*$")


@dataclass(frozen=True)
class Constraint:
    """An outcome that must keep bounds, and is measured as objectives are.

    Args:
        name: Name of the outcome.
        lower: Smallest value allowed; None for no bound.
        upper: Largest value allowed; None for no bound.

    Raises:
        DataError: No bound at all, or bounds that are reversed or not finite.

    Example:
        >>> Constraint.parse("memory <= 4.5")
        Constraint(name='memory', lower=None, upper=4.5)
    """

    name: str
    lower: float | None = None
    upper: float | None = None

    def __post_init__(self) -> None:
        """Check the bounds."""
        given = [b for b in (self.lower, self.upper) if b is not None]
        if not given or not all(math.isfinite(b) for b in given):
            raise DataError(
                f"constraint {self.name!r}: expected a finite lower or upper bound, got "
                f"lower={self.lower!r}, upper={self.upper!r}"
            )
        if len(given) == 2 and given[0] > given[1]:
            raise DataError(
                f"constraint {self.name!r}: bounds are reversed: lower={self.lower:g} > "
                f"upper={self.upper:g}; swap them"
            )

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """Read ``"name <= number"`` or ``"name >= number"``.

        Raises:
            DataError: The text has another form.
        """
        match = _SENTENCE.match(text)
        try:
            if match is None:
                raise ValueError
            bound = float(match[3])
        except ValueError:
            raise DataError(
                f"expected a constraint such as 'memory <= 4', got {text!r}; or pass a Constraint"
            ) from None
        return cls(match[1], **{"upper" if match[2] == "<=" else "lower": bound})

    def holds(self, value: float) -> bool:
        """Tell whether a value keeps the bounds."""
        return (self.lower is None or value >= self.lower) and (
            self.upper is None or value <= self.upper
        )


class Outcomes:
    """Names and meaning of the measured numbers, objectives first.

    Args:
        objectives: Each name with ``"min"`` or ``"max"``.
        constraints: :class:`Constraint` objects, or sentences such as ``"memory <= 4"``.

    Raises:
        DataError: No objective, an unknown direction, or a name that comes twice.
    """

    def __init__(
        self, objectives: Mapping[str, str], constraints: Iterable[Constraint | str] = ()
    ) -> None:
        if not isinstance(objectives, Mapping) or not objectives:
            raise DataError(
                'expected objectives as names with directions, such as {"loss": "min"}, got '
                f"{objectives!r}"
            )
        for name, direction in objectives.items():
            if direction not in ("min", "max"):
                raise DataError(f"objective {name!r}: expected 'min' or 'max', got {direction!r}")
        if isinstance(constraints, str):
            constraints = [constraints]
        self.objectives = dict(objectives)
        self.constraints = tuple(
            Constraint.parse(c) if isinstance(c, str) else c for c in constraints
        )
        both = set(self.objectives) & {c.name for c in self.constraints}
        if both:
            raise DataError(f"{', '.join(sorted(both))}: an objective and a constraint at once")
        self.names: tuple[str, ...] = tuple(
            dict.fromkeys([*self.objectives, *(c.name for c in self.constraints)])
        )

    @property
    def only(self) -> str:
        """The one objective.

        Raises:
            DataError: There are several.
        """
        if len(self.objectives) > 1:
            raise DataError(
                f"there are {len(self.objectives)} objectives ({', '.join(self.objectives)}), so "
                "no single best trial; ask for pareto()"
            )
        return next(iter(self.objectives))

    @property
    def signs(self) -> Tensor:
        """What turns each outcome into one to be maximised, ``[outcome]``; 1 for constraints."""
        signs = [-1.0 if self.objectives.get(name) == "min" else 1.0 for name in self.names]
        return torch.tensor(signs, dtype=torch.float64)

    @property
    def bounds(self) -> list[tuple[int, float, float]]:
        """Constraints as (column, sign, bound): feasible where sign * value <= bound."""
        found = []
        for constraint in self.constraints:
            column = self.names.index(constraint.name)
            if constraint.upper is not None:
                found.append((column, 1.0, float(constraint.upper)))
            if constraint.lower is not None:
                found.append((column, -1.0, -float(constraint.lower)))
        return found

    def read(self, value: Any, what: str = "value") -> dict[str, float]:
        """Name what was measured.

        Args:
            value: A number for a single outcome; a mapping by name; or a sequence in the order of
                :attr:`names`.
            what: Word for error messages.

        Raises:
            ShapeError: A wrong number of outcomes.
            DataError: A name that is missing or unknown, or a number that is not finite.
        """
        named = self._named(value, what)
        found = {}
        for name in self.names:
            number = named[name]
            number = number.item() if hasattr(number, "item") and _size(number) == 1 else number
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise DataError(f"{what} of {name!r}: expected a number, got {number!r}")
            if not math.isfinite(number):
                raise DataError(
                    f"{what} of {name!r}: expected a finite number, got {number!r}; for a trial "
                    "without result: tell(trial, status='failed')"
                )
            found[name] = float(number)
        return found

    def _named(self, value: Any, what: str) -> dict[str, Any]:
        if isinstance(value, Mapping):
            missing = [name for name in self.names if name not in value]
            unknown = [str(name) for name in value if name not in self.names]
            if missing or unknown:
                raise DataError(
                    f"{what}: expected the outcomes {', '.join(self.names)}, got "
                    f"{', '.join(map(str, value)) or 'none'}"
                )
            return dict(value)
        several = list(value) if _is_sequence(value) else [value]
        if len(several) != len(self.names):
            raise ShapeError(
                f"{what}: expected [outcome={len(self.names)}] ({', '.join(self.names)}), got "
                f"{len(several)}; pass a mapping of names to numbers"
            )
        return dict(zip(self.names, several, strict=True))

    def is_feasible(self, values: Mapping[str, float]) -> bool:
        """Tell whether every constraint holds."""
        return all(c.holds(values[c.name]) for c in self.constraints)

    def to_json(self) -> dict[str, Any]:
        """Return the outcomes as JSON values."""
        rows = [{"name": c.name, "lower": c.lower, "upper": c.upper} for c in self.constraints]
        return {"objectives": self.objectives, "constraints": rows}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Outcomes:
        """Rebuild outcomes from what :meth:`to_json` returned."""
        return cls(tree["objectives"], [Constraint(**row) for row in tree["constraints"]])

    def __eq__(self, other: object) -> bool:
        """Whether the other outcomes mean the same."""
        return isinstance(other, Outcomes) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        """Hash of the names."""
        return hash(self.names)


def _size(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel()
    return int(getattr(value, "size", 1))


def _is_sequence(value: Any) -> bool:
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return _size(value) != 1 or getattr(value, "ndim", 0) > 0
    return isinstance(value, Sequence) and not isinstance(value, str)

"""Parameters of a search space: what one may be, and its place in the unit interval.

Each parameter has a *code*, the number that optimisers move and surrogates see (a position in
[0, 1], or the index of a level), and *features*, columns in [0, 1]: one for a number, one for each
choice of an unordered :class:`Categorical`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = ["Categorical", "Float", "Int", "Parameter"]

#: Values a choice may have: what JSON can hold.
_SCALARS = (str, int, float, bool, type(None))


def _plain(value: Any) -> Any:
    """NumPy and torch scalars as Python numbers; anything else as it is."""
    return value.item() if hasattr(value, "item") and not isinstance(value, str) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


class Parameter(ABC):
    """One named coordinate of a :class:`~probkit.bo.Space`."""

    #: When this parameter is active: the parent's name and its values; empty for always.
    when: Mapping[str, Any]

    @property
    @abstractmethod
    def levels(self) -> int | None:
        """Number of values; None for a continuum."""

    @property
    @abstractmethod
    def top(self) -> float:
        """Largest code; the smallest is 0."""

    @property
    def stepped(self) -> bool:
        """Whether codes are the whole numbers from 0 to :attr:`top`."""
        return self.levels is not None and self.top == self.levels - 1

    @property
    @abstractmethod
    def columns(self) -> int:
        """Number of feature columns."""

    @abstractmethod
    def check(self, value: Any) -> Any:
        """Return the value in its plain form.

        Raises:
            DataError: It is not a value of this parameter.
        """

    @abstractmethod
    def to_code(self, value: Any) -> float:
        """Return the code of a checked value."""

    @abstractmethod
    def from_code(self, code: float) -> Any:
        """Return the value whose code is nearest."""

    @abstractmethod
    def features(self, codes: Tensor) -> Tensor:
        """Map codes ``[...]`` to features ``[..., column]``; differentiable for floats."""

    @abstractmethod
    def code_of_features(self, features: Tensor) -> float:
        """Return the code nearest to features ``[column]``."""

    @property
    @abstractmethod
    def inactive(self) -> float:
        """What every feature column shows while the parameter is inactive."""

    @property
    def inactive_code(self) -> float:
        """The code while the parameter is inactive: in the middle, or the first choice."""
        return 0.5

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the parameter as JSON values."""


def _log_position(value: float, low: float, high: float) -> float:
    return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))


def _check_bounds(low: Any, high: Any, log: bool, kind: str) -> None:
    if not (_is_number(low) and _is_number(high)):
        raise DataError(f"{kind}: expected finite bounds, got low={low!r}, high={high!r}")
    if low == high:
        raise DataError(f"{kind}: bounds are equal ({low!r}); leave a fixed value out of the space")
    if low > high:
        raise DataError(f"{kind}: bounds are reversed: low={low!r} > high={high!r}; swap them")
    if log and low <= 0:
        raise DataError(f"{kind}: a log scale needs low > 0, got low={low!r}")


@dataclass(frozen=True)
class Float(Parameter):
    """A real number between two bounds.

    Args:
        low: Lower bound.
        high: Upper bound.
        log: Search the logarithm, for values that span orders of magnitude.
        when: Parent parameter and the value, or values, for which this one is active.

    Raises:
        DataError: Bounds that are reversed, equal, not finite, or not positive on a log scale.

    Example:
        >>> Float(1e-4, 1.0, log=True).to_code(1e-2)
        0.5
    """

    low: float
    high: float
    log: bool = False
    when: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the bounds."""
        _check_bounds(_plain(self.low), _plain(self.high), self.log, "Float")
        object.__setattr__(self, "low", float(self.low))
        object.__setattr__(self, "high", float(self.high))

    @property
    def levels(self) -> None:
        """None: a continuum."""

    @property
    def top(self) -> float:
        """One."""
        return 1.0

    @property
    def columns(self) -> int:
        """One column."""
        return 1

    @property
    def inactive(self) -> float:
        """The middle."""
        return 0.5

    def check(self, value: Any) -> float:
        """Return the value as a float inside the bounds."""
        value = _plain(value)
        if not _is_number(value) or not self.low <= value <= self.high:
            raise DataError(f"expected a number in [{self.low:g}, {self.high:g}], got {value!r}")
        return float(value)

    def to_code(self, value: Any) -> float:
        """Return the position between the bounds."""
        if self.log:
            return _log_position(value, self.low, self.high)
        return (value - self.low) / (self.high - self.low)

    def from_code(self, code: float) -> float:
        """Return the number at a position between the bounds."""
        code = min(max(float(code), 0.0), 1.0)
        if self.log:
            span = math.log(self.high) - math.log(self.low)
            value = math.exp(math.log(self.low) + code * span)
        else:
            value = self.low + code * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def features(self, codes: Tensor) -> Tensor:
        """The code itself."""
        return codes[..., None]

    def code_of_features(self, features: Tensor) -> float:
        """The column, clipped to the unit interval."""
        return min(max(float(features[0]), 0.0), 1.0)

    def to_json(self) -> dict[str, Any]:
        """Return the parameter as JSON values."""
        return {"kind": "float", "low": self.low, "high": self.high, "log": self.log}


@dataclass(frozen=True)
class Int(Parameter):
    """A whole number between two bounds, both included.

    Args:
        low: Smallest value.
        high: Largest value.
        log: Search the logarithm; the code is then the position between the bounds.
        when: Parent parameter and the value, or values, for which this one is active.

    Raises:
        DataError: Bounds that are reversed, equal, not whole, or not positive on a log scale.

    Example:
        >>> Int(1, 8).from_code(2.2)
        3
    """

    low: int
    high: int
    log: bool = False
    when: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the bounds."""
        low, high = _plain(self.low), _plain(self.high)
        _check_bounds(low, high, self.log, "Int")
        if int(low) != low or int(high) != high:
            raise DataError(f"Int: expected whole bounds, got low={low!r}, high={high!r}")
        object.__setattr__(self, "low", int(low))
        object.__setattr__(self, "high", int(high))

    @property
    def levels(self) -> int:
        """Number of values."""
        return self.high - self.low + 1

    @property
    def top(self) -> float:
        """The number of steps between the bounds; one on a log scale."""
        return 1.0 if self.log else float(self.high - self.low)

    @property
    def stepped(self) -> bool:
        """Whether codes are levels: not on a log scale."""
        return not self.log

    @property
    def inactive_code(self) -> float:
        """The level in the middle."""
        return 0.5 if self.log else float((self.high - self.low) // 2)

    @property
    def columns(self) -> int:
        """One column."""
        return 1

    @property
    def inactive(self) -> float:
        """The middle."""
        return 0.5

    def check(self, value: Any) -> int:
        """Return the value as an int inside the bounds."""
        value = _plain(value)
        if not _is_number(value) or int(value) != value or not self.low <= value <= self.high:
            raise DataError(f"expected a whole number in [{self.low}, {self.high}], got {value!r}")
        return int(value)

    def to_code(self, value: Any) -> float:
        """Return the distance to the smallest value, or the position on the log scale."""
        return _log_position(value, self.low, self.high) if self.log else float(value - self.low)

    def from_code(self, code: float) -> int:
        """Return the number whose code is nearest."""
        code = min(max(float(code), 0.0), self.top)
        if not self.log:
            return self.low + round(code)
        value = math.exp(math.log(self.low) + code * (math.log(self.high) - math.log(self.low)))
        near = {min(max(k, self.low), self.high) for k in (math.floor(value), math.ceil(value))}
        return min(sorted(near), key=lambda k: abs(self.to_code(k) - code))

    def features(self, codes: Tensor) -> Tensor:
        """The position between the bounds."""
        return codes[..., None] / self.top

    def code_of_features(self, features: Tensor) -> float:
        """The code of the nearest number."""
        return self.to_code(self.from_code(float(features[0]) * self.top))

    def to_json(self) -> dict[str, Any]:
        """Return the parameter as JSON values."""
        return {"kind": "int", "low": self.low, "high": self.high, "log": self.log}


@dataclass(frozen=True)
class Categorical(Parameter):
    """One of several choices.

    Args:
        choices: Two or more different strings, numbers, booleans or None.
        ordered: The order of the choices means something, such as sizes: models then see one
            column instead of one for each choice.
        when: Parent parameter and the value, or values, for which this one is active.

    Raises:
        DataError: No choice or one, equal choices, or choices that a file cannot hold.

    Example:
        >>> Categorical(["relu", "tanh"]).features(torch.tensor(1)).tolist()
        [0.0, 1.0]
    """

    choices: Sequence[Any]
    ordered: bool = False
    when: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the choices."""
        if isinstance(self.choices, str):
            raise DataError(f"Categorical: expected a list of choices, got {self.choices!r}")
        choices = tuple(_plain(choice) for choice in self.choices)
        if not choices:
            raise DataError("Categorical: expected two or more choices, got none")
        if len(choices) == 1:
            raise DataError(f"Categorical: only one choice ({choices[0]!r}); leave it out instead")
        for choice in choices:
            if not isinstance(choice, _SCALARS) or choice != choice:
                raise DataError(
                    "Categorical: expected choices that are strings, numbers, booleans or None, "
                    f"got {choice!r}; choose a name for it and look the object up by that"
                )
        if len({(type(choice), choice) for choice in choices}) < len(choices):
            raise DataError(f"Categorical: expected different choices, got {list(choices)!r}")
        object.__setattr__(self, "choices", choices)

    @property
    def levels(self) -> int:
        """Number of choices."""
        return len(self.choices)

    @property
    def top(self) -> float:
        """Index of the last choice."""
        return len(self.choices) - 1.0

    @property
    def inactive_code(self) -> float:
        """The choice in the middle of an order; the first choice otherwise."""
        return float((self.levels - 1) // 2) if self.ordered else 0.0

    @property
    def columns(self) -> int:
        """One column for each choice; one in all for ordered choices."""
        return 1 if self.ordered else self.levels

    @property
    def inactive(self) -> float:
        """The middle of ordered choices; no choice at all otherwise."""
        return 0.5 if self.ordered else 0.0

    def check(self, value: Any) -> Any:
        """Return the choice that equals the value."""
        value = _plain(value)
        exact = [c for c in self.choices if type(c) is type(value) and c == value]
        near = [c for c in self.choices if c == value]
        if not exact and len(near) != 1:
            raise DataError(f"expected one of {list(self.choices)!r}, got {value!r}")
        return exact[0] if exact else near[0]

    def to_code(self, value: Any) -> float:
        """Return the index of a choice."""
        same = [type(c) is type(value) and c == value for c in self.choices]
        return float(same.index(True))

    def from_code(self, code: float) -> Any:
        """Return the choice whose index is nearest."""
        return self.choices[min(max(round(float(code)), 0), self.levels - 1)]

    def features(self, codes: Tensor) -> Tensor:
        """One column in order, or the indicator of each choice."""
        if self.ordered:
            return codes[..., None] / (self.levels - 1)
        index = torch.arange(self.levels, device=codes.device)
        return (codes[..., None].round() == index).to(
            codes.dtype if codes.is_floating_point() else torch.get_default_dtype()
        )

    def code_of_features(self, features: Tensor) -> float:
        """The nearest level, or the choice with the largest indicator."""
        if self.ordered:
            position = min(max(float(features[0]), 0.0), 1.0)
            return float(round(position * (self.levels - 1)))
        return float(features.argmax())

    def to_json(self) -> dict[str, Any]:
        """Return the parameter as JSON values."""
        return {"kind": "categorical", "choices": list(self.choices), "ordered": self.ordered}

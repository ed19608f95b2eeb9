"""Where one step of an answer ends, and where the answer does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations

from probkit.errors import DataError
from probkit.files import storable
from probkit.models.language.protocol import Continuation

__all__ = ["Steps"]

_LONGEST = 1024  # tokens of a step that only a delimiter ends


@storable
@dataclass(frozen=True)
class Steps:
    r"""How answers are cut into steps.

    A step ends with the first of: a delimiter, its number of tokens, the end of the sequence. The
    answer ends with the end of the sequence or a final string.

    Args:
        stop: Delimiters; they belong to the step that they end. One string stands for itself.
        max_tokens: Tokens of a step; None leaves it to the delimiter (1,024 at most).
        max_steps: Steps of an answer. An answer that is not finished after them stays marked so.
        final: Strings that end the answer, not only the step.

    Raises:
        DataError: No delimiter and no number of tokens; an empty delimiter; one inside another,
            which could then never be reached; a number below 1.

    Example:
        >>> Steps(stop="\n", max_tokens=None).limit
        1024
    """

    stop: tuple[str, ...] = ("\n",)
    max_tokens: int | None = 64
    max_steps: int = 20
    final: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "final", _strings("final", self.final))
        if not self.stops and self.max_tokens is None:
            raise DataError(
                "Steps: expected a delimiter or a number of tokens, got stop=() and "
                "max_tokens=None: a step would never end; give one of them"
            )
        for inner, outer in permutations(self.stops, 2):
            if inner in outer:
                raise DataError(
                    f"Steps: the stop string {inner!r} lies inside {outer!r}, which therefore "
                    "never ends a step; leave one of them out"
                )
        for name in ("max_tokens", "max_steps"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not whole and not (name == "max_tokens" and value is None):
                raise DataError(f"Steps: expected a whole {name} >= 1, got {value!r}")

    def __call__(self, data: object) -> int:
        """Return the number of steps: what makes ``model.steps(data)`` a model's method."""
        return self.max_steps

    @property
    def stops(self) -> tuple[str, ...]:
        """All strings that end a step."""
        return tuple(dict.fromkeys((*self.stop, *self.final)))

    @property
    def limit(self) -> int:
        """Largest number of tokens of a step."""
        return _LONGEST if self.max_tokens is None else self.max_tokens

    def ends_answer(self, step: Continuation) -> bool:
        """Tell whether the answer ends with this step."""
        return step.reason == "end" or (bool(self.final) and step.text.endswith(self.final))


def _strings(name: str, value: object) -> tuple[str, ...]:
    parts = (value,) if isinstance(value, str) else value
    if not isinstance(parts, Iterable):
        raise DataError(f"Steps: expected {name} as strings, got {value!r}")
    found = tuple(parts)
    if not all(isinstance(part, str) and part for part in found):
        raise DataError(f"Steps: expected {name} as strings that are not empty, got {value!r}")
    return found

"""Running sums for a small language model: the problems, the prompt, and the check of a line."""

from __future__ import annotations

import random
from typing import NamedTuple

__all__ = ["END", "SHOWN", "Sum", "line_is_right", "problems", "prompt_of"]

TERMS = 4
END = "Done"


class Sum(NamedTuple):
    """Numbers to be added one by one."""

    terms: tuple[int, ...]

    @property
    def lines(self) -> tuple[str, ...]:
        """The right lines."""
        total, lines = self.terms[0], []
        for term in self.terms[1:]:
            lines.append(f"{total}+{term}={total + term}")
            total += term
        return tuple(lines)

    @property
    def total(self) -> int:
        """The right answer."""
        return sum(self.terms)


#: Worked examples of the prompt.
SHOWN = (Sum((3, 4, 1, 6)), Sum((5, 2, 7, 3)))


def problems(count: int, seed: int = 0) -> list[Sum]:
    """Return distinct problems of numbers from 1 to 9, none of them a worked example."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        one = Sum(tuple(rng.randint(1, 9) for _ in range(TERMS)))
        if one not in found and one not in SHOWN:
            found.append(one)
    return found


def _header(one: Sum) -> str:
    return f"Numbers: {', '.join(map(str, one.terms))}\n"


def prompt_of(one: Sum) -> str:
    """Return the few-shot prompt."""
    shown = "\n\n".join(_header(s) + "\n".join((*s.lines, END)) for s in SHOWN)
    return f"Add the numbers one by one.\n\n{shown}\n\n{_header(one)}"


def line_is_right(one: Sum, text: str) -> bool:
    r"""Tell whether the last line of an answer is the right one at its place.

    Example:
        >>> line_is_right(Sum((3, 4, 1, 6)), "3+4=7\n7+1=8\n")
        True
    """
    lines, right = text.splitlines(), (*one.lines, END)
    return 0 < len(lines) <= len(right) and lines[-1].strip() == right[len(lines) - 1]

"""The windows of the warm-up."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Windows", "windows_of"]

_EARLY = (5, 15, 30, 50, 75)
_LAST, _BASE = 50, 25


class Windows(NamedTuple):
    """Transitions, counted from one, at which the mass matrix is estimated from a window.

    Attributes:
        begin: The first window begins after this many transitions.
        early: Ends of short windows that find the order of the scales. Paths are kept short here.
        regular: Ends of windows that double in length; each estimate replaces the one before.
    """

    begin: int
    early: tuple[int, ...]
    regular: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """All ends."""
        return self.early + self.regular

    def holds(self, draw: int) -> bool:
        """Tell whether transition ``draw`` (from one) belongs to a window."""
        return bool(self.ends) and self.begin < draw <= self.ends[-1]

    def is_early(self, draw: int) -> bool:
        """Tell whether transition ``draw`` comes before the scales are known."""
        return bool(self.ends) and draw <= self.scaled_at

    @property
    def scaled_at(self) -> int:
        """The end of the window after which the order of the scales is known."""
        return self.early[-1] if self.early else self.regular[0]


def windows_of(warmup: int) -> Windows:
    """Lay out the warm-up.

    As Stan does, windows that double in length estimate the mass matrix, each afresh, and a last
    stretch without one settles the step size. In place of Stan's first stretch with the unit matrix
    a few short windows approach the scales, because with unit masses and scales that differ by
    orders of magnitude every path would be as long as paths can be.

    Args:
        warmup: Number of transitions; under 20 there is no window, only step sizes are adapted.

    Example:
        >>> windows_of(1000)
        Windows(begin=5, early=(15, 30, 50, 75), regular=(100, 150, 250, 450, 950))
        >>> windows_of(100)
        Windows(begin=20, early=(), regular=(70,))
    """
    if warmup < 20:
        return Windows(warmup, (), ())
    if _EARLY[-1] + _BASE + _LAST > warmup:
        # The search for step sizes needs some ten transitions to forget where it began.
        return Windows(int(0.2 * warmup), (), (int(0.7 * warmup),))
    ends = []
    end, size, last = _EARLY[-1], _BASE, warmup - _LAST
    while end < last:
        end += size
        size *= 2
        # A window that would leave no room for the next takes all that is left.
        if end + size > last:
            end = last
        ends.append(end)
    return Windows(_EARLY[0], _EARLY[1:], tuple(ends))

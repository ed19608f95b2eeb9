"""The windows of the warm-up."""

from __future__ import annotations

__all__ = ["window_ends"]

_FIRST, _LAST, _BASE = 75, 50, 25


def window_ends(warmup: int) -> tuple[int, tuple[int, ...]]:
    """Lay out the warm-up as Stan does.

    A first stretch finds the bulk of the posterior; windows that double in length then estimate
    the mass matrix, each afresh; a last stretch settles the step size.

    Args:
        warmup: Number of transitions.

    Returns:
        (start of the first window, ends of the windows). Under 20 transitions there is no window:
        only the step size is adapted.

    Example:
        >>> window_ends(1000)
        (75, (100, 150, 250, 450, 950))
        >>> window_ends(100)
        (15, (90,))
    """
    if warmup < 20:
        return warmup, ()
    first, last, size = _FIRST, _LAST, _BASE
    if first + size + last > warmup:
        first, last = int(0.15 * warmup), int(0.1 * warmup)
        return first, (warmup - last,)
    ends = []
    end = first
    while end < warmup - last:
        end += size
        size *= 2
        # A window that would leave no room for the next takes all that is left.
        if end + size > warmup - last:
            end = warmup - last
        ends.append(end)
    return first, tuple(ends)

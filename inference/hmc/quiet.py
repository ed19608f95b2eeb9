"""Silence about the numerics of trial points."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator

from probkit.errors import NumericsWarning

__all__ = ["quiet_trials"]

_LOCK = threading.Lock()
_INSIDE = 0
_FILTERS = contextlib.ExitStack()


@contextlib.contextmanager
def quiet_trials() -> Iterator[None]:
    """Ignore :class:`~probkit.errors.NumericsWarning` inside.

    Paths try points far outside of the posterior, where a model's jitter is large and does not
    matter, because such points are rejected. Blocks of chains may run in threads at once: the first
    to enter changes the filters and the last to leave restores them.

    Example:
        >>> with quiet_trials():
        ...     warnings.warn("jitter", NumericsWarning)
    """
    global _INSIDE
    with _LOCK:
        _INSIDE += 1
        if _INSIDE == 1:
            _FILTERS.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", NumericsWarning)
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE -= 1
            if _INSIDE == 0:
                _FILTERS.close()

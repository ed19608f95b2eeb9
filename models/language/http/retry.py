"""When a request is sent again, and how long to wait before."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from probkit.errors import DataError
from probkit.files import storable

__all__ = ["Retries", "retry_after"]


@storable
@dataclass(frozen=True)
class Retries:
    """Exponential backoff with full jitter.

    Before repeat k the wait is uniform on [0, min(``longest``, ``first`` * 2 ** (k - 1))], and
    never shorter than a server asks for with ``Retry-After``. The jitter comes from the system, not
    from a random stream of the run: it changes times, never results.

    Args:
        most: Repeats of one request at most.
        first: Longest wait before the first repeat, in seconds.
        longest: Longest wait of all, in seconds.

    Raises:
        DataError: A negative or non-finite number.
    """

    most: int = 6
    first: float = 0.5
    longest: float = 30.0

    def __post_init__(self) -> None:
        for name in ("most", "first", "longest"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value < math.inf:
                raise DataError(f"Retries: expected a finite {name} >= 0, got {value!r}")

    def pause(self, repeat: int, asked: float = 0.0) -> float:
        """Return the wait in seconds before a repeat.

        Args:
            repeat: 1 for the first.
            asked: What the server asked for.
        """
        ceiling = min(self.longest, self.first * 2.0 ** min(repeat - 1, 60))
        return max(asked, random.SystemRandom().uniform(0.0, ceiling))


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float:
    """Return the seconds that ``Retry-After`` asks for; 0 where it is absent or unreadable.

    Args:
        headers: Of the response; names in lower case.
        now: Unix time that dates are compared with; None for the clock.

    Example:
        >>> retry_after({"retry-after": "3"}), retry_after({"retry-after-ms": "250"})
        (3.0, 0.25)
        >>> retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, now=50.0)
        10.0
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        try:
            seconds = float(value) * unit
        except ValueError:
            continue
        return seconds if 0.0 <= seconds < math.inf else 0.0
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - (time.time() if now is None else now))
    except (TypeError, ValueError, OverflowError):
        return 0.0

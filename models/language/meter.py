"""Counting what calls cost, also from several threads."""

from __future__ import annotations

import threading
from typing import Any

from probkit.models.language.protocol import Usage

__all__ = ["Meter"]


class Meter:
    """A running total of usage.

    Example:
        >>> meter = Meter()
        >>> meter.add(Usage(calls=1, completion_tokens=5))
        >>> meter.total.completion_tokens
        5
    """

    def __init__(self) -> None:
        self._total = Usage()
        self._lock = threading.Lock()

    @property
    def total(self) -> Usage:
        """What was added so far."""
        return self._total

    def add(self, usage: Usage) -> None:
        """Add the usage of a call."""
        with self._lock:
            self._total += usage

    def __getstate__(self) -> dict[str, Any]:
        return {"_total": self._total}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._total, self._lock = state["_total"], threading.Lock()

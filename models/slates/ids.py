"""The special ids of a slate log."""

from __future__ import annotations

__all__ = ["FIRST_ITEM", "NO_CLICK", "PAD", "UNK"]

PAD = 0
"""An unused slot, or a step after a user's last."""

NO_CLICK = 1
"""Slot 0 of every slate: nothing was clicked."""

UNK = 2
"""An item that is not known; it is never scored."""

FIRST_ITEM = 3
"""The first real item."""

"""The command ``probkit``."""

from __future__ import annotations

from probkit.cli.app import app, main

__all__ = ["app", "main"]

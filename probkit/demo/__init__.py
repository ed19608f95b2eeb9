"""The demo: views of the families on real data, gathered in one report.

A family adds one file and changes none: a module ``models/<family>_demo.py`` (or ``demo.py``
inside the family's folder; likewise below ``bo/``) that calls :func:`register_view` at import.
"""

from __future__ import annotations

from probkit.demo.context import DemoContext
from probkit.demo.registry import DemoView, Registry, discover, register_view
from probkit.demo.report import write_report
from probkit.demo.runner import Outcome, run_views

__all__ = [
    "DemoContext",
    "DemoView",
    "Outcome",
    "Registry",
    "discover",
    "register_view",
    "run_views",
    "write_report",
]

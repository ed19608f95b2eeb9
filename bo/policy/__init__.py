"""Decisions: which acquisition function fits a surrogate and a goal, and where it is largest."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from probkit.bo.policy.goal import Goal

if TYPE_CHECKING:
    from probkit.bo.policy.abilities import allowed_acquisitions
    from probkit.bo.policy.builders import acquisition_for
    from probkit.bo.policy.compiled import load_fused_kernel
    from probkit.bo.policy.search import maximise
    from probkit.bo.policy.thompson import ThompsonSample

_HOME = {
    "ThompsonSample": "thompson",
    "acquisition_for": "builders",
    "allowed_acquisitions": "abilities",
    "load_fused_kernel": "compiled",
    "maximise": "search",
}

__all__ = [
    "Goal",
    "ThompsonSample",
    "acquisition_for",
    "allowed_acquisitions",
    "load_fused_kernel",
    "maximise",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"probkit.bo.policy.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Errors and warnings that every part of probkit raises.

Each message says what was expected (with named dimensions), what arrived, and how to mend it.
"""

from __future__ import annotations

__all__ = [
    "CapabilityError",
    "ConvergenceWarning",
    "DataError",
    "MissingExtraError",
    "NumericsWarning",
    "ShapeError",
]


class ShapeError(ValueError):
    """A tensor has another shape than the named dimensions ask for."""


class DataError(ValueError):
    """Data, options or a file hold a value that cannot be used."""


class CapabilityError(TypeError):
    """A model, guide or sampler lacks the methods that the request needs."""


class MissingExtraError(ImportError):
    """An optional package is absent; the message names the extra that brings it."""


class ConvergenceWarning(UserWarning):
    """An algorithm stopped before, or without, meeting its own convergence rule."""


class NumericsWarning(UserWarning):
    """A result was obtained at reduced numerical quality (jitter, few effective samples, ...)."""

"""Pyro and probkit, both ways.

* :class:`FromPyro` makes any Pyro program a probkit model.
* :class:`PyroGuide` makes any Pyro guide function, guide module or AutoGuide a probkit guide.
* :func:`to_pyro` and :func:`native_sites` run a probkit model inside Pyro.

Every call of foreign code happens with random streams, validation flags, settings, parameter store
and effect handlers of its own; those of the caller stay as they were.
"""

from __future__ import annotations

from probkit.pyro_adapter.guide import PyroGuide, as_guide
from probkit.pyro_adapter.model import FromPyro
from probkit.pyro_adapter.native import native_sites, to_pyro

__all__ = ["FromPyro", "PyroGuide", "as_guide", "native_sites", "to_pyro"]

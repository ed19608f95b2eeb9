"""probkit: Bayesian-first modelling on PyTorch.

A model states what it can do, a guide proposes latents, a sampler turns model, guide and data into
a posterior, and a posterior predicts::

    import probkit as pk

    post = pk.infer(model, data, sampler, rng=0)
    post.predict(x).quantile([0.05, 0.95])

Names load on first use, so ``import probkit`` costs little more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from probkit._version import __version__

if TYPE_CHECKING:
    from probkit.calibration import coverage, coverage_on, geweke, sbc
    from probkit.checkpoint import Checkpoint
    from probkit.compare import compare
    from probkit.diagnostics import diagnose, loo
    from probkit.driver import infer
    from probkit.errors import (
        CapabilityError,
        ConvergenceWarning,
        DataError,
        MissingExtraError,
        NumericsWarning,
        ShapeError,
    )
    from probkit.guide import Guide, LogQ
    from probkit.loader import Loader
    from probkit.marginal import Marginal
    from probkit.model import Batch, Model, Site
    from probkit.posterior import Evidence, Posterior, load
    from probkit.predictive import Analytic, Empirical, Mixture, Predictive
    from probkit.progress import Progress
    from probkit.pyro_adapter import FromPyro, to_pyro
    from probkit.rng import scope, stream
    from probkit.sampler import Info, Problem, Sampler, Step
    from probkit.unconstrained import Unconstrained

_HOME = {
    "Analytic": "predictive",
    "Batch": "model",
    "CapabilityError": "errors",
    "Checkpoint": "checkpoint",
    "ConvergenceWarning": "errors",
    "DataError": "errors",
    "Empirical": "predictive",
    "Evidence": "posterior",
    "FromPyro": "pyro_adapter",
    "Guide": "guide",
    "Info": "sampler",
    "Loader": "loader",
    "LogQ": "guide",
    "Marginal": "marginal",
    "MissingExtraError": "errors",
    "Mixture": "predictive",
    "Model": "model",
    "NumericsWarning": "errors",
    "Posterior": "posterior",
    "Predictive": "predictive",
    "Problem": "sampler",
    "Progress": "progress",
    "Sampler": "sampler",
    "ShapeError": "errors",
    "Site": "model",
    "Step": "sampler",
    "Unconstrained": "unconstrained",
    "compare": "compare",
    "coverage": "calibration",
    "coverage_on": "calibration",
    "diagnose": "diagnostics",
    "geweke": "calibration",
    "infer": "driver",
    "load": "posterior",
    "loo": "diagnostics",
    "sbc": "calibration",
    "scope": "rng",
    "stream": "rng",
    "to_pyro": "pyro_adapter",
}
_PACKAGES = ("bo", "inference", "kernels", "models")

__all__ = [
    "Analytic",
    "Batch",
    "CapabilityError",
    "Checkpoint",
    "ConvergenceWarning",
    "DataError",
    "Empirical",
    "Evidence",
    "FromPyro",
    "Guide",
    "Info",
    "Loader",
    "LogQ",
    "Marginal",
    "MissingExtraError",
    "Mixture",
    "Model",
    "NumericsWarning",
    "Posterior",
    "Predictive",
    "Problem",
    "Progress",
    "Sampler",
    "ShapeError",
    "Site",
    "Step",
    "Unconstrained",
    "__version__",
    "compare",
    "coverage",
    "coverage_on",
    "diagnose",
    "geweke",
    "infer",
    "load",
    "loo",
    "sbc",
    "scope",
    "stream",
    "to_pyro",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"probkit.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"probkit.{name}")
    raise AttributeError(f"module 'probkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])

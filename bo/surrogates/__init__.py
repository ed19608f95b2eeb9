"""Surrogates: models of an expensive function, each a real BoTorch model.

Options are frozen objects such as :class:`GPSurrogate` or :class:`HMCSurrogate`;
:func:`make_surrogate` fits any of them. Names load on first use, as BoTorch itself does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probkit._botorch_ensemble import ExactEnsembleSampler
    from probkit.bo.surrogates.any_model import ModelSurrogate
    from probkit.bo.surrogates.auto import AutoSurrogate, StackedSurrogate
    from probkit.bo.surrogates.base import Surrogate
    from probkit.bo.surrogates.deep_ensemble import EnsembleSurrogate
    from probkit.bo.surrogates.dense_gp import DenseGP
    from probkit.bo.surrogates.dkl import DKLSurrogate
    from probkit.bo.surrogates.gaussian import GaussianSurrogate
    from probkit.bo.surrogates.gp import GPSurrogate
    from probkit.bo.surrogates.hmc import HMCSurrogate
    from probkit.bo.surrogates.ibnn import IBNNSurrogate
    from probkit.bo.surrogates.laplace import LaplaceSurrogate
    from probkit.bo.surrogates.loo import loo_log_density
    from probkit.bo.surrogates.outcomes import RankGaussian, Winsorize
    from probkit.bo.surrogates.pfn import PFNSurrogate
    from probkit.bo.surrogates.posterior_surrogate import PosteriorSurrogate
    from probkit.bo.surrogates.registry import make_surrogate, warm_state
    from probkit.bo.surrogates.scale_mixture import NNGPSurrogate
    from probkit.bo.surrogates.sghmc import SGHMCSurrogate

_HOME = {
    "AutoSurrogate": "probkit.bo.surrogates.auto",
    "DKLSurrogate": "probkit.bo.surrogates.dkl",
    "DenseGP": "probkit.bo.surrogates.dense_gp",
    "EnsembleSurrogate": "probkit.bo.surrogates.deep_ensemble",
    "ExactEnsembleSampler": "probkit._botorch_ensemble",
    "GPSurrogate": "probkit.bo.surrogates.gp",
    "GaussianSurrogate": "probkit.bo.surrogates.gaussian",
    "HMCSurrogate": "probkit.bo.surrogates.hmc",
    "IBNNSurrogate": "probkit.bo.surrogates.ibnn",
    "LaplaceSurrogate": "probkit.bo.surrogates.laplace",
    "ModelSurrogate": "probkit.bo.surrogates.any_model",
    "NNGPSurrogate": "probkit.bo.surrogates.scale_mixture",
    "PFNSurrogate": "probkit.bo.surrogates.pfn",
    "PosteriorSurrogate": "probkit.bo.surrogates.posterior_surrogate",
    "RankGaussian": "probkit.bo.surrogates.outcomes",
    "SGHMCSurrogate": "probkit.bo.surrogates.sghmc",
    "StackedSurrogate": "probkit.bo.surrogates.auto",
    "Surrogate": "probkit.bo.surrogates.base",
    "Winsorize": "probkit.bo.surrogates.outcomes",
    "loo_log_density": "probkit.bo.surrogates.loo",
    "make_surrogate": "probkit.bo.surrogates.registry",
    "warm_state": "probkit.bo.surrogates.registry",
}

__all__ = [
    "AutoSurrogate",
    "DKLSurrogate",
    "DenseGP",
    "EnsembleSurrogate",
    "ExactEnsembleSampler",
    "GPSurrogate",
    "GaussianSurrogate",
    "HMCSurrogate",
    "IBNNSurrogate",
    "LaplaceSurrogate",
    "ModelSurrogate",
    "NNGPSurrogate",
    "PFNSurrogate",
    "PosteriorSurrogate",
    "RankGaussian",
    "SGHMCSurrogate",
    "StackedSurrogate",
    "Surrogate",
    "Winsorize",
    "loo_log_density",
    "make_surrogate",
    "warm_state",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

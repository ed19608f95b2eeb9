"""Surrogates: models of an expensive function, each a real BoTorch model.

Options are frozen objects such as :class:`GPSurrogate` or :class:`HMCSurrogate`;
:func:`make_surrogate` fits any of them. Names load on first use, as BoTorch itself does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probkit._botorch_ensemble import ExactEnsembleSampler
    from probkit.bo.surrogates.base import Surrogate
    from probkit.bo.surrogates.gp import GPSurrogate
    from probkit.bo.surrogates.ibnn import IBNNSurrogate
    from probkit.bo.surrogates.outcomes import RankGaussian, Winsorize
    from probkit.bo.surrogates.posterior_surrogate import PosteriorSurrogate
    from probkit.bo.surrogates.registry import make_surrogate, warm_state

_HOME = {
    "ExactEnsembleSampler": "probkit._botorch_ensemble",
    "GPSurrogate": "probkit.bo.surrogates.gp",
    "IBNNSurrogate": "probkit.bo.surrogates.ibnn",
    "PosteriorSurrogate": "probkit.bo.surrogates.posterior_surrogate",
    "RankGaussian": "probkit.bo.surrogates.outcomes",
    "Surrogate": "probkit.bo.surrogates.base",
    "Winsorize": "probkit.bo.surrogates.outcomes",
    "make_surrogate": "probkit.bo.surrogates.registry",
    "warm_state": "probkit.bo.surrogates.registry",
}

__all__ = [
    "ExactEnsembleSampler",
    "GPSurrogate",
    "IBNNSurrogate",
    "PosteriorSurrogate",
    "RankGaussian",
    "Surrogate",
    "Winsorize",
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

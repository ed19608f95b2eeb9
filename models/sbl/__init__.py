"""Sparse Bayesian learning: plain, Kronecker-structured, block, complex.

:class:`SparseRegression` and :class:`KroneckerSBL` are the models; :class:`EvidenceMaximization`
fits them. The four estimators speak scikit-learn's language. Simulators, greedy baselines and
metrics are there for comparisons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probkit.models.sbl.evidence_maximization import EvidenceMaximization
from probkit.models.sbl.greedy import kronecker_omp, omp
from probkit.models.sbl.kronecker_sbl import KroneckerSBL
from probkit.models.sbl.laws import ComplexNormal, WeightLaw
from probkit.models.sbl.metrics import nmse, support_recovery_rate
from probkit.models.sbl.simulators import (
    IRSChannel,
    SparseData,
    simulate_irs_channel,
    simulate_kronecker,
)
from probkit.models.sbl.sparse_regression import SparseRegression
from probkit.models.sbl.support import support_mask, support_probability

if TYPE_CHECKING:
    from probkit.models.sbl.estimators import (
        KroneckerSparseBayes,
        RVMClassifier,
        RVMRegressor,
        SparseBayesRegressor,
    )

__all__ = [
    "ComplexNormal",
    "EvidenceMaximization",
    "IRSChannel",
    "KroneckerSBL",
    "KroneckerSparseBayes",
    "RVMClassifier",
    "RVMRegressor",
    "SparseBayesRegressor",
    "SparseData",
    "SparseRegression",
    "WeightLaw",
    "kronecker_omp",
    "nmse",
    "omp",
    "simulate_irs_channel",
    "simulate_kronecker",
    "support_mask",
    "support_probability",
    "support_recovery_rate",
]

_ESTIMATORS = ("KroneckerSparseBayes", "RVMClassifier", "RVMRegressor", "SparseBayesRegressor")


def __getattr__(name: str) -> Any:
    """Load the estimators, and with them scikit-learn, on first use."""
    if name in _ESTIMATORS:
        from probkit.models.sbl import estimators

        return getattr(estimators, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

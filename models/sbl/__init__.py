"""Sparse Bayesian learning: plain, Kronecker-structured, block, complex.

:class:`SparseRegression` and :class:`KroneckerSBL` are the models; :class:`EvidenceMaximization`
fits them.
"""

from __future__ import annotations

from probkit.models.sbl.evidence_maximization import EvidenceMaximization
from probkit.models.sbl.kronecker_sbl import KroneckerSBL
from probkit.models.sbl.laws import ComplexNormal
from probkit.models.sbl.sparse_regression import SparseRegression

__all__ = ["ComplexNormal", "EvidenceMaximization", "KroneckerSBL", "SparseRegression"]

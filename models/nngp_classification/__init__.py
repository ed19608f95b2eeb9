"""Classification with scale mixtures of Gaussian processes."""

from __future__ import annotations

from probkit.models.nngp_classification.data import LabelledData
from probkit.models.nngp_classification.guide import SparseScaleGuide
from probkit.models.nngp_classification.model import ScaleMixtureClassifier

__all__ = ["LabelledData", "ScaleMixtureClassifier", "SparseScaleGuide"]

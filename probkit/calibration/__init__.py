"""Whether posteriors and samplers can be believed: calibration on simulated and held-out data.

* :func:`sbc`: simulation-based calibration of a sampler for a model;
* :func:`coverage`, :func:`coverage_on`: how often intervals hold latents and observations;
* :func:`geweke`: the joint-distribution test of a transition kernel;
* :func:`ecdf_band`, :func:`ecdf_p_value`, :func:`chi_square_p_value`: tests of uniform ranks.

What the draws of one posterior say of themselves is in :mod:`probkit.diagnostics`.
"""

from __future__ import annotations

from probkit.calibration.interval_coverage import (
    Coverage,
    clopper_pearson,
    coverage,
    coverage_on,
    wilson,
)
from probkit.calibration.joint_distribution import Geweke, geweke, transition_of
from probkit.calibration.simulation_based import SBC, sbc
from probkit.calibration.uniformity import Band, chi_square_p_value, ecdf_band, ecdf_p_value

__all__ = [
    "SBC",
    "Band",
    "Coverage",
    "Geweke",
    "chi_square_p_value",
    "clopper_pearson",
    "coverage",
    "coverage_on",
    "ecdf_band",
    "ecdf_p_value",
    "geweke",
    "sbc",
    "transition_of",
    "wilson",
]

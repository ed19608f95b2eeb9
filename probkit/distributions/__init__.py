"""Distributions and free functions that torch and Pyro lack for predictive work.

* :class:`StudentT`, :class:`MultivariateStudentT`, :class:`MultiOutputStudentT` and
  :class:`MultiOutputNormal`: laws with one scale shared by all coordinates, accurate at any df.
* :func:`cdf`, :func:`icdf`, :func:`marginals`, :func:`sample`, :func:`select` and
  :func:`flatten_batch` for any distribution.
* :class:`FiniteMixture` and :class:`IndependentBlocks`: laws made of laws.
* ``mixture_*``: finite mixtures whose components lie along the leading batch dim.
"""

from __future__ import annotations

from probkit.distributions._roots import find_quantile
from probkit.distributions.blocks import FiniteMixture, IndependentBlocks
from probkit.distributions.joint_normal import JointNormal
from probkit.distributions.mixture import (
    mixture_cdf,
    mixture_icdf,
    mixture_log_prob,
    mixture_mean,
    mixture_variance,
)
from probkit.distributions.multivariate import (
    MultiOutputNormal,
    MultiOutputStudentT,
    MultivariateStudentT,
    ScaledMultivariateNormal,
)
from probkit.distributions.parameters import (
    constructor_arguments,
    flatten_batch,
    map_batch,
    register_storables,
    select,
)
from probkit.distributions.quantiles import cdf, icdf, marginals, support_bounds
from probkit.distributions.sampling import sample
from probkit.distributions.student_t import StudentT, student_t_cdf

__all__ = [
    "FiniteMixture",
    "IndependentBlocks",
    "JointNormal",
    "MultiOutputNormal",
    "MultiOutputStudentT",
    "MultivariateStudentT",
    "ScaledMultivariateNormal",
    "StudentT",
    "cdf",
    "constructor_arguments",
    "find_quantile",
    "flatten_batch",
    "map_batch",
    "icdf",
    "marginals",
    "mixture_cdf",
    "mixture_icdf",
    "mixture_log_prob",
    "mixture_mean",
    "mixture_variance",
    "register_storables",
    "sample",
    "select",
    "student_t_cdf",
    "support_bounds",
]

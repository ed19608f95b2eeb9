"""Message passing in chains, as pure batched functions of tensors.

Discrete states: ``hmm_*``. Linear-Gaussian states: ``kalman_*``. Both run as a loop or as an
associative scan, chosen by shape, with leading batch dimensions everywhere.
"""

from __future__ import annotations

from probkit.inference.message_passing.chain import (
    check_chain,
    check_evidence,
    lengths_from_mask,
)
from probkit.inference.message_passing.discrete import (
    HMMFilter,
    HMMPath,
    HMMSmoother,
    hmm_filter,
    hmm_log_evidence,
    hmm_sample_paths,
    hmm_smoother,
    hmm_viterbi,
)
from probkit.inference.message_passing.gaussian_sites import (
    GaussianObservations,
    NaturalSites,
    collect_sites,
)
from probkit.inference.message_passing.kalman import (
    KalmanFilter,
    KalmanSmoother,
    kalman_filter,
    kalman_log_evidence,
    kalman_sample_paths,
    kalman_smoother,
    kalman_two_pass,
)
from probkit.inference.message_passing.kalman_banded import (
    MarkovPrecision,
    MarkovPrior,
    expected_log_transitions,
    join_components,
    markov_prior,
    smooth_sites,
    smoothed_covariances,
)
from probkit.inference.message_passing.scan import associative_scan

__all__ = [
    "GaussianObservations",
    "HMMFilter",
    "HMMPath",
    "HMMSmoother",
    "KalmanFilter",
    "KalmanSmoother",
    "MarkovPrecision",
    "MarkovPrior",
    "NaturalSites",
    "associative_scan",
    "check_chain",
    "check_evidence",
    "collect_sites",
    "expected_log_transitions",
    "hmm_filter",
    "hmm_log_evidence",
    "hmm_sample_paths",
    "hmm_smoother",
    "hmm_viterbi",
    "join_components",
    "kalman_filter",
    "kalman_log_evidence",
    "kalman_sample_paths",
    "kalman_smoother",
    "kalman_two_pass",
    "lengths_from_mask",
    "markov_prior",
    "smooth_sites",
    "smoothed_covariances",
]

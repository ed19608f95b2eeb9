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
from probkit.inference.message_passing.scan import associative_scan

__all__ = [
    "HMMFilter",
    "HMMPath",
    "HMMSmoother",
    "associative_scan",
    "check_chain",
    "check_evidence",
    "hmm_filter",
    "hmm_log_evidence",
    "hmm_sample_paths",
    "hmm_smoother",
    "hmm_viterbi",
    "lengths_from_mask",
]

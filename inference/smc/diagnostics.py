"""What a particle run tells about itself: evidence with an error bar, and degeneracy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from probkit.errors import CapabilityError, DataError
from probkit.numerics import logmeanexp

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EvidenceEstimate", "degeneracy", "evidence"]


class EvidenceEstimate(NamedTuple):
    """The evidence of all chains together.

    Attributes:
        log_mean: Log of the mean of the chains' estimates: the unbiased one, on the log scale.
        relative_error: Standard error of that mean, relative to it; also, to first order, the
            standard error of ``log_mean``.
        spread: Standard deviation of the chains' log estimates; above about 1 the error bar itself
            is unreliable, and more particles help more than more chains.
        chains: Number of chains.
    """

    log_mean: float
    relative_error: float
    spread: float
    chains: int


def evidence(posterior: Any) -> EvidenceEstimate:
    """Combine the evidence estimates of independent groups of particles.

    Args:
        posterior: Of a particle filter, tempered SMC or PaRIS, with at least two chains.

    Raises:
        CapabilityError: The posterior has no evidence estimate.
        DataError: There is one chain only.

    Example:
        >>> import torch
        >>> from probkit import infer
        >>> from probkit.inference.smc import ParticleFilter
        >>> from probkit.models.state_space import StochasticVolatility
        >>> y = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
        >>> post = infer(StochasticVolatility(), y, ParticleFilter(200), rng=0, chains=8)
        >>> evidence(post).relative_error < 0.05
        True
    """
    found = posterior.log_evidence
    if found is None or found.kind != "estimate":
        raise CapabilityError(
            "evidence: expected a posterior with an evidence estimate (ParticleFilter, SMC, PaRIS, "
            f"ImportanceSampling), got {'none' if found is None else found.kind}"
        )
    values = found.value.double()
    chains = len(values)
    if chains < 2:
        raise DataError("evidence: an error bar needs at least 2 chains, got 1; use chains=10")
    log_mean = logmeanexp(values, 0)
    relative = (values - log_mean).exp()
    return EvidenceEstimate(
        log_mean=float(log_mean),
        relative_error=float(relative.std() / math.sqrt(chains)),
        spread=float(values.std()),
        chains=chains,
    )


def degeneracy(posterior: Any) -> pd.DataFrame:
    """Tabulate the health of a particle filter by step, averaged over chains.

    Returns:
        One row a step: ``ess``, ``resampled`` (share of chains), ``log_evidence`` (so far) and,
        where the ancestry was kept, ``unique_ancestors`` (particles of this step with descendants
        in the last one; a handful means that smoothed paths coincide there).

    Raises:
        CapabilityError: The posterior is not one of a particle filter.
    """
    import pandas as pd

    stats = posterior.sample_stats
    names = {
        "ess": "ess",
        "resampled": "resampled",
        "log_evidence": "log_evidence_trace",
        "unique_ancestors": "unique_ancestors",
    }
    if "log_evidence_trace" not in stats:
        raise CapabilityError(
            "degeneracy: expected the posterior of a ParticleFilter or PaRIS, got one without "
            "traces"
        )
    columns = {
        column: stats[name].double().mean(0).cpu().numpy()
        for column, name in names.items()
        if name in stats
    }
    frame = pd.DataFrame(columns)
    frame.index.name = "step"
    return frame

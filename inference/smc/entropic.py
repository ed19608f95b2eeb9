"""Entropic resampling: gentler selection in early steps, without changing what is estimated.

A potential that is sure of itself too early leaves a handful of ancestors. Resampling by weights to
the power 1/temperature keeps more of them; what the power left out stays with the offspring as
their weights. The temperatures are those of Giannone et al. (2025) as its-hub 1.2.0 computes them.
There the remainder is dropped, and with it the target; here it is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from probkit.errors import DataError
from probkit.files import storable
from probkit.inference.smc.cloud import Cloud
from probkit.inference.smc.particles import take
from probkit.inference.smc.resampling import Resampler, Streams, resolve

__all__ = ["Entropic", "tempered_resample"]

_HOTTEST = 1e6


@storable
@dataclass(frozen=True)
class Entropic:
    """When and how much resampling is softened.

    With n particles, effective sample size ESS, entropy h of the weights over log n, and progress
    s, the share of the steps that is done, the temperature is at least 1 and

    - "ess": (1 - s) n / ESS,
    - "entropy": 1 / (h + (1 - h) s),
    - "base": 2 - s.

    Args:
        mode: Which of them.
        ess_threshold: Softened resampling happens below this share of ``n``.
        until: And before this share of the steps; afterwards the filter resamples as usual.

    Raises:
        DataError: An option out of range.

    Example:
        >>> cloud = Cloud(["a", "b"], torch.tensor([0.9, 0.1]).double().log(), torch.tensor(0.0))
        >>> round(Entropic("base").temperature(cloud, 0.25), 2)
        1.75
    """

    mode: Literal["ess", "entropy", "base"] = "ess"
    ess_threshold: float = 0.5
    until: float = 0.5

    def __post_init__(self) -> None:
        if self.mode not in ("ess", "entropy", "base"):
            raise DataError(
                f"Entropic: expected mode 'ess', 'entropy' or 'base', got {self.mode!r}"
            )
        for name in ("ess_threshold", "until"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise DataError(f"Entropic: expected 0 <= {name} <= 1, got {getattr(self, name)!r}")

    def applies(self, cloud: Cloud, progress: float) -> bool:
        """Tell whether resampling is due, and to be softened."""
        return progress < self.until and float(cloud.ess) < self.ess_threshold * cloud.n

    def temperature(self, cloud: Cloud, progress: float) -> float:
        """Return the temperature, at least 1."""
        if self.mode == "base":
            return max(1.0, 2.0 - progress)
        if self.mode == "ess":
            return max(1.0, (1.0 - progress) * cloud.n / float(cloud.ess))
        weights = cloud.weights
        entropy = float(torch.special.entr(weights).sum()) / math.log(max(cloud.n, 2))
        coldness = entropy + (1.0 - entropy) * progress
        return min(_HOTTEST, max(1.0, 1.0 / max(coldness, 1.0 / _HOTTEST)))


def tempered_resample(
    cloud: Cloud, scheme: str | Resampler, temperature: float, *, rng: Streams
) -> tuple[Cloud, torch.Tensor]:
    """Resample by the weights to the power 1/temperature, and keep the rest of them.

    With v the tempered, normalised weights, offspring of particle i carry w_i / (n v_i), whose sum
    has expectation one and is booked as evidence: every estimate stays unbiased.

    Returns:
        The cloud and the ancestors [particle].

    Example:
        >>> cloud = Cloud(["a", "b"], torch.tensor([0.9, 0.1]).double().log(), torch.tensor(0.0))
        >>> softer, index = tempered_resample(
        ...     cloud, "systematic", 1e6, rng=torch.Generator().manual_seed(0))
        >>> softer.particles, softer.weights
        (['a', 'b'], tensor([0.9000, 0.1000], dtype=torch.float64))
    """
    log_tempered = torch.log_softmax(cloud.log_weights / temperature, -1)
    ancestors = resolve(scheme)(log_tempered.exp(), cloud.n, rng)
    left = (cloud.log_weights - log_tempered)[ancestors] - math.log(cloud.n)
    total = left.logsumexp(-1)
    particles = take(cloud.particles, ancestors)
    return Cloud(particles, left - total, cloud.log_evidence + total), ancestors

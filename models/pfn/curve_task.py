"""Training on learning curves: prefixes of simulated curves and what follows them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from probkit.models.pfn.curve_prior import CurvePrior
from probkit.rng import Rng, stream

__all__ = [
    "EPOCH_FEATURES",
    "METRIC_FEATURES",
    "CurveTask",
    "curve_borders",
    "encode_epochs",
    "encode_metric",
]

_UNIT = math.sqrt(12.0)  # a uniform law on [0, 1] times this has variance 1
_FREQUENCIES = 6
EPOCH_FEATURES = 2
METRIC_FEATURES = 1 + 2 * _FREQUENCIES


def encode_epochs(t: Tensor, horizon: int = 100) -> Tensor:
    """Return the features [*, 2] of epochs: linear and logarithmic time, both about unit scale.

    The logarithm is ours: two of the three families of the prior are smooth in it.
    """
    linear = (t / (horizon + 1) - 0.5) * _UNIT
    return torch.stack([linear, (t.log() / math.log(horizon) - 0.5) * _UNIT], -1)


def encode_metric(y: Tensor) -> Tensor:
    """Return the features [*, METRIC_FEATURES] of metric values on the scale [0, 1].

    The value itself, about unit scale, and sines and cosines of it down to a wavelength of 0.02:
    the noise of a curve may be that fine, and a small network resolves it only with them. They are
    ours, and worth 0.2 nats at late cuts after a short training.
    """
    z = ((y - 0.5) * _UNIT).unsqueeze(-1)
    angle = z * (math.pi * 2.0 ** torch.arange(_FREQUENCIES, dtype=z.dtype, device=z.device))
    return torch.cat([z, angle.sin(), angle.cos()], -1)


def curve_borders(prior: CurvePrior, bars: int, *, rng: Rng, curves: int = 30_000) -> Tensor:
    """Return the borders [bar + 1] for the curves of ``prior``, from ``curves`` of them."""
    from probkit.models.pfn.bars import borders_from_sample

    generator = stream(rng, "borders")
    _, (_, y) = prior.sample_dataset(curves, rng=generator)
    return borders_from_sample(y, bars)


@dataclass(frozen=True)
class CurveTask:
    """Predict epochs T + 1, ..., m of a curve from its first T, for T uniform on 0, ..., m - 1.

    Each batch is cut twice, half of its curves at T and half at m - 1 - T, so that every step sees
    early and late cuts and costs the same.

    Attributes:
        borders: [bar + 1] borders of the network's bars.
        prior: Where curves come from.
        queries: Random future epochs asked for in each curve.
    """

    borders: Tensor
    prior: CurvePrior = field(default_factory=CurvePrior)
    queries: int = 24

    @property
    def version(self) -> str:
        """Name of the prior and of the cuts."""
        return f"{self.prior.version}, {self.queries} queries"

    def block(self, n: int, *, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Simulate ``n`` curves y [n, epoch]."""
        return (self.prior.sample_dataset(n, rng=rng)[1][1],)

    def loss(
        self, network: Callable[..., Tensor], rows: tuple[Tensor, ...], *, rng: torch.Generator
    ) -> Tensor:
        """Return the mean of -log P(bar of y_t) over the queries, in nats."""
        (y,) = rows
        first = int(torch.randint(self.prior.horizon, (), generator=rng))
        halves = y.chunk(2)
        cuts = (first, self.prior.horizon - 1 - first)
        losses = [
            self._loss_at(network, half, cut, rng) * len(half)
            for half, cut in zip(halves, cuts, strict=False)
        ]
        return torch.stack(losses).sum() / len(y)

    def _loss_at(
        self, network: Callable[..., Tensor], y: Tensor, cut: int, rng: torch.Generator
    ) -> Tensor:
        n, horizon = y.shape
        features = encode_epochs(self.prior.epochs, horizon).to(y)
        ahead = torch.randint(horizon - cut, (n, self.queries), generator=rng).to(y.device) + cut
        target = y.gather(1, ahead)
        inner = self.borders.to(y)[1:-1].contiguous()
        bar = torch.searchsorted(inner, target.contiguous(), right=True)
        logits = network(
            features[:cut].expand(n, -1, -1), encode_metric(y[:, :cut]), features[ahead]
        )
        return functional.cross_entropy(logits.float().flatten(0, 1), bar.flatten())

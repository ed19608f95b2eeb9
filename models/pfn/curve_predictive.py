"""Predictions of learning curves, in the metric that the user reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.pfn.bars import BarDistribution, bar_log_density
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.rng import Rng, draw_count, stream

__all__ = ["CurvePredictive"]

_NODES = 10  # Gauss-Legendre points in a bar


@dataclass(frozen=True)
class CurvePredictive:
    """Laws of the metric at future steps, [step] of one curve or [curve, step] of several.

    The network's law lives on its own scale. With a normaliser it is conditioned on the hard bounds
    of the metric and carried over by the change of variables: quantiles are mapped, densities gain
    the Jacobian, moments are integrals over the bars. The laws of the steps are marginal; their
    dependence is not known.

    Attributes:
        bars: The network's law, batch shape [curve, step].
        normalizer: The map of the metric; None where the network's scale is the metric.
        t: [curve, step] the steps, in the user's units.
        single: Whether the curve dim is left out of what is returned.
        dtype: Precision of what is returned.
    """

    bars: BarDistribution
    normalizer: CurveNormalizer | None
    t: Tensor
    single: bool = False
    dtype: torch.dtype = torch.float64

    # ---------------------------------------------------------------- the interface of Predictive

    @property
    def mean(self) -> Tensor:
        """Mean [*obs]."""
        return self._out(self._moments()[0])

    @property
    def variance(self) -> Tensor:
        """Variance [*obs]."""
        return self._out(self._moments()[1])

    @property
    def median(self) -> Tensor:
        """Median [*obs]."""
        return self.quantile(0.5)

    @property
    def probs(self) -> Tensor:
        """Refuse: a metric has no classes."""
        raise CapabilityError(
            "probs exist for categorical predictives only; use cdf or log_prob here"
        )

    def quantile(self, q: Tensor | float | Sequence[float]) -> Tensor:
        """Quantiles [*q, *obs] at the levels ``q`` in (0, 1)."""
        levels = torch.as_tensor(q, dtype=torch.float64, device=self.bars.logits.device)
        if not bool(((levels > 0) & (levels < 1)).all()):
            raise DataError(
                f"quantile: expected levels strictly between 0 and 1, got {levels.tolist()}"
            )
        return self._at_levels(levels[..., None, None].expand(*levels.shape, *self.t.shape))

    def cdf(self, y: Tensor | float) -> Tensor:
        """P(Y <= y) for each entry; ``y`` broadcasts against [*obs]."""
        value = self._in(y)
        if self.normalizer is None:
            return self._out(self.bars.cdf(value))
        floor, mass = self._reach()
        share = ((self.bars.cdf(self._g(value)) - floor) / mass).clamp(0, 1)
        return self._out(1 - share if self.normalizer.minimize else share)

    def log_prob(self, y: Tensor | float) -> Tensor:
        """Log density of the metric at ``y`` for each entry; -inf outside its hard bounds."""
        value = self._in(y)
        if self.normalizer is None:
            return self._out(self.bars.log_prob(value))
        _, mass = self._reach()
        inside = self.normalizer.outside(value) == 0
        density = self.bars.log_prob(self._g(value)) + self.normalizer.log_jacobian(value)
        return self._out(torch.where(inside, density - mass.log(), -math.inf))

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """Draw [n, *obs], each entry on its own."""
        count = draw_count(n)
        device = self.bars.logits.device
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "curves")
        unit = torch.rand(
            (count, *self.t.shape),
            generator=generator,
            dtype=torch.float64,
            device=generator.device,
        )
        return self._at_levels(unit.to(device).clamp(1e-12, 1 - 1e-12))

    # ---------------------------------------------------------------- decisions

    def prob_above(self, y: Tensor | float) -> Tensor:
        """P(Y > y) for each entry, whichever direction is better."""
        return 1 - self.cdf(y)

    def prob_better(self, y: Tensor | float) -> Tensor:
        """Probability that the metric is better than ``y``: above, or below where minimised."""
        return self.cdf(y) if self._minimize else self.prob_above(y)

    def ei(self, best: Tensor | float) -> Tensor:
        """Expected improvement on ``best`` in units of the metric: E max(0, Y - best).

        Where the normaliser minimises, E max(0, best - Y).
        """
        value = self._in(best)
        if self.normalizer is None:
            return self._out(self.bars.expected_improvement(value))
        if value.dim() > 2:
            raise ShapeError(
                f"ei: expected best as a number or [*obs], got {tuple(torch.as_tensor(best).shape)}"
            )
        metric, weight = self._bar_nodes()
        gain = metric[:, None] - value[..., None, None]
        if self._minimize:
            gain = -gain
        per_bar = (gain.clamp_min(0) * weight).sum(-1)
        return self._out((self._bar_probs() * per_bar).sum(-1))

    # ---------------------------------------------------------------- inside

    @property
    def _minimize(self) -> bool:
        return self.normalizer is not None and self.normalizer.minimize

    def _in(self, y: Tensor | float) -> Tensor:
        """Values of the metric as [*sample, curve, step]."""
        value = as_tensor(y, name="y").to(self.t.device, torch.float64)
        if value.dim() and value.shape[-1] not in (1, self.t.shape[1]):
            obs = tuple(self.t.shape[1:]) if self.single else tuple(self.t.shape)
            raise ShapeError(f"y: expected [*, *obs] with obs = {obs}, got {tuple(value.shape)}")
        if self.single and value.dim():
            value = value.unsqueeze(-2)
        if value.dim() > 1 and value.shape[-2] not in (1, self.t.shape[0]):
            raise ShapeError(
                f"y: expected [*, *obs] with obs = {tuple(self.t.shape)}, got {tuple(value.shape)}"
            )
        lead = value.shape[:-2] if value.dim() > 2 else ()
        return value.expand(*lead, *self.t.shape)

    def _out(self, value: Tensor) -> Tensor:
        value = value.to(self.dtype)
        return value.squeeze(-2) if self.single else value

    def _g(self, y: Tensor) -> Tensor:
        """The metric on the network's scale; values beyond a hard bound are put on it."""
        assert self.normalizer is not None
        return self.normalizer.normalize(y).clamp(0.0, 1.0)

    def _reach(self) -> tuple[Tensor, Tensor]:
        """P(Y < 0) and P(0 <= Y <= 1) on the network's scale, each [curve, step]."""
        zero = torch.zeros((), dtype=self.bars.logits.dtype, device=self.bars.logits.device)
        floor = self.bars.cdf(zero)
        return floor, (self.bars.cdf(zero + 1) - floor).clamp_min(1e-30)

    def _at_levels(self, levels: Tensor) -> Tensor:
        """Quantiles at levels [*q, curve, step]."""
        if self.normalizer is None:
            return self._out(self.bars.icdf(levels))
        floor, mass = self._reach()
        levels = 1 - levels if self._minimize else levels
        inside = self.bars.icdf((floor + levels * mass).clamp(0, 1)).double().clamp(0, 1)
        tiny = 1e-9  # an infinite bound is never reached
        return self._out(self.normalizer.denormalize(inside.clamp(tiny, 1 - tiny)))

    def _bar_probs(self) -> Tensor:
        """[curve, step, bar] probabilities, divided by what the hard bounds leave."""
        _, mass = self._reach()
        return self.bars.probs.double() / mass.double().unsqueeze(-1)

    def _bar_nodes(self) -> tuple[Tensor, Tensor]:
        """Metric at quadrature nodes [curve or 1, bar, node], and their weights [bar, node].

        The weights of a bar sum to the share of it that lies in [0, 1].
        """
        assert self.normalizer is not None
        borders = self.bars.borders.double()
        left, right = borders[:-1].clone(), borders[1:].clone()
        left[0], right[-1] = 0.0, 1.0  # the tails, as far as the bounds let them
        left, right = left.clamp(0, 1), right.clamp(0, 1)
        width = (right - left).clamp_min(0)
        node, share = (
            torch.from_numpy(a).to(borders) for a in np.polynomial.legendre.leggauss(_NODES)
        )
        # nodes gather at the ends of a bar: at an infinite bound the metric goes as a logarithm
        s = (node + 1) / 2
        y = left[:, None] + width[:, None] * s * s * (3 - 2 * s)
        share = share / 2 * 6 * s * (1 - s)
        bar = torch.arange(len(left), device=y.device)[:, None].expand_as(y)
        weight = bar_log_density(borders, y, bar).exp() * share * width[:, None]
        flat = y.reshape(1, -1).expand(self.normalizer.curves or 1, -1)
        metric = self.normalizer.denormalize(flat.clamp(1e-9, 1 - 1e-9))
        return metric.unflatten(-1, y.shape), weight

    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance [curve, step]."""
        if self.normalizer is None:
            return self.bars.mean, self.bars.variance
        metric, weight = self._bar_nodes()
        probs = self._bar_probs()
        first = (probs * (metric * weight).sum(-1)[:, None]).sum(-1)
        origin = metric.mean()
        centred = ((metric - origin).square() * weight).sum(-1)
        second = (probs * centred[:, None]).sum(-1)
        return first, (second - (first - origin).square()).clamp_min(0)

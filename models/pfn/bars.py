"""The bar (Riemann) distribution: a histogram with half-normal tails, as the head of a network.

Borders b_0 < ... < b_K cut the line into K bars of widths w_k; probabilities are softmax(logits).
Inner bars are uniform. The first bar is a half-normal going down from b_1 and the last one a
half-normal going up from b_{K-1}, each with half its mass inside its bar: scale s = w / 0.67449.

Source: Mueller, Hollmann, Pineda Arango, Grabocka and Hutter (2022), "Transformers can do Bayesian
inference", section 4 (Riemann distribution, full-support variant).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit.errors import DataError, ShapeError

__all__ = ["BarDistribution", "borders_from_sample", "check_borders"]

Shape = torch.Size | list[int] | tuple[int, ...]
HALF_NORMAL_MEDIAN = 0.6744897501960817  # the median of |Normal(0, 1)|
_MEAN_OF_HALF = math.sqrt(2.0 / math.pi)  # E|Normal(0, 1)|


def check_borders(borders: Tensor) -> Tensor:
    """Return borders [bar + 1], or explain what is wrong with them.

    Raises:
        ShapeError: They are not a vector of at least four numbers.
        DataError: They are not finite or do not increase.
    """
    if borders.dim() != 1 or len(borders) < 4:
        raise ShapeError(
            f"borders: expected [bar + 1] with at least three bars, got {tuple(borders.shape)}"
        )
    if not bool(borders.isfinite().all()) or not bool((borders.diff() > 0).all()):
        raise DataError("borders: expected finite, strictly increasing numbers; drop duplicates")
    return borders


def borders_from_sample(y: Tensor, bars: int, *, floor: float = 0.25, tail: float = 1e-3) -> Tensor:
    """Choose the borders [bar + 1] of ``bars`` bars from a sample of the prior predictive.

    Inner borders are quantiles of a mixture: weight 1 - ``floor`` on the sample and ``floor`` on
    the uniform law between its two ``tail`` quantiles. The uniform part bounds the widths where
    the prior is thin, where a curve that hardly moves would otherwise lie within one bar. The outer
    widths are set by quantiles too, never by the extremes of the sample, which no seed repeats:
    half of each tail's mass lies inside its bar.

    Args:
        y: Any shape; a million numbers or more are usual.
        bars: Number of bars K, tails included.
        floor: Weight of the uniform law, in [0, 1).
        tail: Probability beyond each inner end, in (0, 0.1).

    Example:
        >>> y = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
        >>> borders_from_sample(y, 8).shape
        torch.Size([9])
    """
    if bars < 3 or not 0 <= floor < 1 or not 0 < tail < 0.1:
        raise DataError(
            f"expected bars >= 3, 0 <= floor < 1 and 0 < tail < 0.1, got {bars}, {floor} and {tail}"
        )
    values = y.detach().flatten().double()
    if len(values) < 10 / tail or not bool(values.isfinite().all()):
        raise DataError(
            f"expected at least {math.ceil(10 / tail)} finite numbers, got {len(values)}; "
            "draw more data sets from the prior"
        )
    values = values.sort().values
    n = len(values)

    def quantile(q: Tensor) -> Tensor:
        place = q * (n - 1)
        low = place.floor().long().clamp(0, n - 2)
        return torch.lerp(values[low], values[low + 1], place - low)

    ends = quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    # the distribution function of the mixture on a fine grid of the sample's own quantiles
    q = torch.linspace(tail, 1 - tail, 20 * bars + 1, dtype=torch.float64)
    even = torch.linspace(float(ends[0]), float(ends[1]), 20 * bars + 1)
    grid = torch.cat([quantile(q), even.double()])
    grid = grid.sort().values
    below = torch.searchsorted(values, grid) / n
    uniform = (grid - ends[0]) / (ends[1] - ends[0])
    mass = (1 - floor) * (below - tail) / (1 - 2 * tail) + floor * uniform
    mass = mass.clamp(0, 1).cummax(0).values
    inner = _interpolate(torch.linspace(0, 1, bars - 1, dtype=torch.float64), mass, grid)
    inner[0], inner[-1] = ends
    # half of what lies beyond an end lies inside the outer bar
    half = quantile(torch.tensor([tail / 2, 1 - tail / 2], dtype=torch.float64))
    spread = (ends[1] - ends[0]) / bars
    low = torch.minimum(half[:1], ends[:1] - 1e-3 * spread)
    high = torch.maximum(half[1:], ends[1:] + 1e-3 * spread)
    borders = torch.cat([low, inner, high])
    return check_borders(_separate(borders, 1e-4 * float(spread)).to(torch.float32))


def _interpolate(q: Tensor, mass: Tensor, grid: Tensor) -> Tensor:
    """Invert a piecewise linear, non-decreasing distribution function."""
    right = torch.searchsorted(mass, q).clamp(1, len(mass) - 1)
    rise = (mass[right] - mass[right - 1]).clamp_min(1e-300)
    share = ((q - mass[right - 1]) / rise).clamp(0, 1)
    return torch.lerp(grid[right - 1], grid[right], share)


def _separate(borders: Tensor, least: float) -> Tensor:
    """Push borders apart that ties in the sample have put on one another."""
    steps = least * torch.arange(len(borders), dtype=borders.dtype)
    return (borders - steps).cummax(0).values + steps


class BarDistribution(Distribution):
    """Histograms over common borders, with half-normal tails.

    Args:
        borders: [bar + 1], strictly increasing.
        logits: [*batch, bar]; computed on in float32 at least.

    Example:
        >>> law = BarDistribution(torch.linspace(-2, 2, 9), torch.zeros(8))
        >>> float(law.cdf(torch.tensor(0.0)))
        0.5
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.real
    has_rsample = False

    def __init__(
        self, borders: Tensor, logits: Tensor, *, validate_args: bool | None = None
    ) -> None:
        if logits.shape[-1:] != (len(borders) - 1,):
            raise ShapeError(
                f"logits: expected [..., bar] with {len(borders) - 1} bars, "
                f"got {tuple(logits.shape)}"
            )
        dtype = torch.promote_types(logits.dtype, torch.float32)
        self.logits = logits.to(dtype)
        self.borders = borders.to(self.logits)
        super().__init__(logits.shape[:-1], torch.Size(), validate_args=validate_args)

    @property
    def log_probs(self) -> Tensor:
        """[*batch, bar] log probability of each bar."""
        return self.logits.log_softmax(-1)

    @property
    def probs(self) -> Tensor:
        """[*batch, bar] probability of each bar."""
        return self.logits.softmax(-1)

    @property
    def widths(self) -> Tensor:
        """[bar] width of each bar."""
        return self.borders.diff()

    @property
    def tail_scales(self) -> Tensor:
        """[2] scales of the lower and upper half-normal."""
        return self.widths[[0, -1]] / HALF_NORMAL_MEDIAN

    @property
    def tail_anchors(self) -> Tensor:
        """[2] where the tails begin: b_1 and b_{K-1}."""
        return self.borders[[1, -2]]

    def expand(self, batch_shape: Shape, _instance: object = None) -> BarDistribution:
        """Return the law with more leading dims."""
        logits = self.logits.expand(*batch_shape, self.logits.shape[-1])
        return BarDistribution(self.borders, logits, validate_args=False)

    def reshaped(self, batch_shape: tuple[int, ...]) -> BarDistribution:
        """Return the same laws with the leading dims ``batch_shape``."""
        logits = self.logits.reshape(*batch_shape, self.logits.shape[-1])
        return BarDistribution(self.borders, logits, validate_args=False)

    def bar_of(self, y: Tensor) -> Tensor:
        """Return the number of the bar that holds ``y``; beyond the ends, of the outer bars."""
        return torch.searchsorted(self.borders[1:-1].contiguous(), y.contiguous(), right=True)

    def log_prob(self, y: Tensor) -> Tensor:
        """Return the log density at ``y`` [*sample, *batch]."""
        y = torch.as_tensor(y, dtype=self.logits.dtype, device=self.logits.device)
        shape = torch.broadcast_shapes(y.shape, self.batch_shape)
        y = y.expand(shape)
        bar = self.bar_of(y)
        logits = self.logits.expand(*shape, self.logits.shape[-1])
        log_p = logits.gather(-1, bar.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
        return log_p + bar_log_density(self.borders, y, bar)

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(Y <= value)."""
        y = torch.as_tensor(value, dtype=self.logits.dtype, device=self.logits.device)
        shape = torch.broadcast_shapes(y.shape, self.batch_shape)
        y = y.expand(shape)
        bar = self.bar_of(y)
        probs = self.probs.expand(*shape, self.logits.shape[-1])
        below = (probs.cumsum(-1) - probs).gather(-1, bar.unsqueeze(-1)).squeeze(-1)
        inside = probs.gather(-1, bar.unsqueeze(-1)).squeeze(-1)
        left, right = self.borders[bar], self.borders[bar + 1]
        s_low, s_high = self.tail_scales
        b_low, b_high = self.tail_anchors
        share = ((y - left) / (right - left)).clamp(0, 1)
        lower = torch.erfc((b_low - y) / (s_low * math.sqrt(2.0)))
        upper = torch.erf((y - b_high) / (s_high * math.sqrt(2.0)))
        share = torch.where(bar == 0, lower, share)
        share = torch.where(bar == len(self.borders) - 2, upper, share)
        return (below + inside * share).clamp(0, 1)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantile at probabilities ``value`` [*sample, *batch].

        Raises:
            DataError: A probability lies outside [0, 1].
        """
        q = torch.as_tensor(value, dtype=self.logits.dtype, device=self.logits.device)
        if not bool(((q >= 0) & (q <= 1)).all()):
            raise DataError("icdf: expected probabilities in [0, 1]")
        shape = torch.broadcast_shapes(q.shape, self.batch_shape)
        q = q.expand(shape).contiguous()
        probs = self.probs
        cumulative = probs.cumsum(-1)
        cumulative = cumulative / cumulative[..., -1:]
        cumulative = cumulative.expand(*shape, -1).contiguous()
        bar = torch.searchsorted(cumulative, q.unsqueeze(-1)).clamp(0, probs.shape[-1] - 1)
        above = cumulative.gather(-1, bar).squeeze(-1)
        inside = probs.expand(*shape, -1).gather(-1, bar).squeeze(-1)
        bar = bar.squeeze(-1)
        share = ((q - (above - inside)) / inside.clamp_min(1e-38)).clamp(0, 1)
        left, right = self.borders[bar], self.borders[bar + 1]
        s_low, s_high = self.tail_scales
        b_low, b_high = self.tail_anchors
        first, last = bar == 0, bar == probs.shape[-1] - 1
        # |Normal| has quantile sqrt(2) erfinv(share); the lower tail counts from its far end. Other
        # bars see a half, for the slope of erfinv at 1 is infinite and would spoil gradients.
        lower = b_low - s_low * math.sqrt(2.0) * torch.erfinv(torch.where(first, 1 - share, 0.5))
        upper = b_high + s_high * math.sqrt(2.0) * torch.erfinv(torch.where(last, share, 0.5))
        y = torch.lerp(left, right, share)
        return torch.where(last, upper, torch.where(first, lower, y))

    def quantile(self, q: float | Tensor) -> Tensor:
        """Return quantiles [*q, *batch]."""
        levels = torch.as_tensor(q, dtype=self.logits.dtype, device=self.logits.device)
        ones = (1,) * len(self.batch_shape)
        return self.icdf(
            levels.reshape(*levels.shape, *ones).expand(*levels.shape, *self._batch_shape)
        )

    @property
    def median(self) -> Tensor:
        """[*batch] median."""
        return self.icdf(torch.full(self.batch_shape, 0.5).to(self.logits))

    @property
    def mean(self) -> Tensor:
        """[*batch] mean, the tails at their half-normal centres."""
        return self.probs @ self._first_moments()

    @property
    def variance(self) -> Tensor:
        """[*batch] variance; centred on the median border, so that float32 does not cancel."""
        origin = self.borders[len(self.borders) // 2]
        shifted = BarDistribution(self.borders - origin, self.logits, validate_args=False)
        probs = self.probs
        first = probs @ shifted._first_moments()
        return (probs @ shifted._second_moments() - first.square()).clamp_min(0)

    def _first_moments(self) -> Tensor:
        centres = (self.borders[1:] + self.borders[:-1]) / 2
        shift = self.tail_scales * _MEAN_OF_HALF
        low, high = self.tail_anchors[0] - shift[0], self.tail_anchors[1] + shift[1]
        return torch.cat([low[None], centres[1:-1], high[None]])

    def _second_moments(self) -> Tensor:
        left, right = self.borders[:-1], self.borders[1:]
        inner = (left.square() + left * right + right.square()) / 3
        (a, b), (s, r) = self.tail_anchors, self.tail_scales
        low = a.square() - 2 * a * s * _MEAN_OF_HALF + s.square()
        high = b.square() + 2 * b * r * _MEAN_OF_HALF + r.square()
        return torch.cat([low[None], inner[1:-1], high[None]])

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Draw from torch's global stream; see :meth:`draw` for a stream of your own."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.icdf(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))

    def draw(self, n: int, *, rng: torch.Generator) -> Tensor:
        """Draw [n, *batch] from ``rng``."""
        shape = (n, *self.batch_shape)
        unit = torch.rand(shape, generator=rng, dtype=self.logits.dtype, device=rng.device)
        return self.icdf(unit.to(self.logits.device))

    def prob_above(self, threshold: float | Tensor) -> Tensor:
        """Return P(Y > threshold), the probability of improvement when maximising."""
        return self._upper(threshold, self._shares_above)

    def expected_improvement(self, threshold: float | Tensor) -> Tensor:
        """Return E max(Y - threshold, 0), in closed form."""
        return self._upper(threshold, self._excess_above)

    def _upper(self, threshold: float | Tensor, per_bar: object) -> Tensor:
        f = torch.as_tensor(threshold, dtype=self.logits.dtype, device=self.logits.device)
        shape = torch.broadcast_shapes(f.shape, self.batch_shape)
        values = per_bar(f.expand(shape).unsqueeze(-1))  # type: ignore[operator]
        return (self.probs * values).sum(-1)

    def _shares_above(self, f: Tensor) -> Tensor:
        """[*batch, bar] share of each bar above ``f`` [*batch, 1]."""
        left, right = self.borders[:-1], self.borders[1:]
        inner = ((right - f) / (right - left)).clamp(0, 1)
        s, r = self.tail_scales * math.sqrt(2.0)
        a, b = self.tail_anchors
        low = torch.erf(((a - f) / s).clamp_min(0))
        high = torch.erfc(((f - b) / r).clamp_min(0))
        return torch.cat([low, inner[..., 1:-1], high], -1)

    def _excess_above(self, f: Tensor) -> Tensor:
        """[*batch, bar] mean of max(Y - f, 0) within each bar."""
        left, right = self.borders[:-1], self.borders[1:]
        start = torch.maximum(left, f)
        inner = (right - start).clamp_min(0) * ((right + start) / 2 - f) / (right - left)
        (s, r), (a, b) = self.tail_scales, self.tail_anchors
        # lower tail: Y = a - D; E max(a - f - D, 0) for D half-normal of scale s
        d = (a - f).clamp_min(0)
        low = d * torch.erf(d / (s * math.sqrt(2.0))) + s * _MEAN_OF_HALF * torch.expm1(
            -(d / s).square() / 2
        )
        # upper tail: Y = b + D; a threshold below b adds its distance, one above cuts D at e
        e = (f - b).clamp_min(0)
        high = r * _MEAN_OF_HALF * (-(e / r).square() / 2).exp() - e * torch.erfc(
            e / (r * math.sqrt(2.0))
        )
        high = high + (b - f).clamp_min(0)
        return torch.cat([low, inner[..., 1:-1], high], -1)


def bar_log_density(borders: Tensor, y: Tensor, bar: Tensor) -> Tensor:
    """Return the log density of ``y`` within its bar (the part that no network learns)."""
    widths = borders.diff()
    scales = widths / HALF_NORMAL_MEDIAN
    inner = -widths[bar].log()
    last = len(borders) - 2
    distance = torch.where(bar == 0, borders[1] - y, y - borders[-2])
    scale = scales[bar]
    tail = 0.5 * math.log(2 / math.pi) - scale.log() - 0.5 * (distance / scale).square()
    return torch.where((bar == 0) | (bar == last), tail, inner)

"""The prior over learning curves: a noisy sum of three saturating families, kept if it learns.

With epochs t = 1, ..., m and weights w in [0, 1] that need not sum to one,

    f(t) = w_1 (c - a t^-alpha) + w_2 (c' - a' / ln(t + 1)) + w_3 (A - (A - B) exp(-kappa t^delta))
    y_t  = f(t) + sigma e_t,   e_t ~ Normal(0, 1)

(pow3, ilog2, janoschek). A curve is kept when f(m) > f(1) and f stays inside [0, 1]; the noise may
leave that interval. Laws: w, c', A ~ U(0, 1); c ~ U(0, 1.25); a ~ U(-0.6, 0.6); a' ~ U(-0.5, 0.5);
B ~ U(0, 2); ln alpha ~ N(0, 2); ln kappa ~ N(-2, 1); ln delta ~ N(0, 0.5); ln sigma ~ N(-4, 1),
where the second argument is a standard deviation.

Source: Adriaensen, Rakotoarison, Mueller and Hutter (2023), "Efficient Bayesian learning curve
extrapolation using prior-data fitted networks", appendix A. Its table lists variances and misprints
the law of the noise; the numbers here are those of the released code, which its authors confirm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, Uniform, constraints

from probkit.errors import DataError, ShapeError
from probkit.files import register
from probkit.model import Model, Site, Values
from probkit.numerics import check_finite
from probkit.rng import Rng, draw_count, stream

__all__ = ["CurvePrior", "mean_curve"]

VERSION = "learning-curves-1"
Curve = tuple[Tensor, Tensor]
ACCEPTANCE = 0.205  # share of draws that pass the rejection rule; only the size of blocks uses it

# name -> (kind, first, second argument), one entry for each of the thirteen coordinates
_LAWS: Mapping[str, tuple[str, tuple[int, ...], float, float]] = {
    "weight": ("uniform", (3,), 0.0, 1.0),
    "power_limit": ("uniform", (), 0.0, 1.25),
    "power_scale": ("uniform", (), -0.6, 0.6),
    "power_log_rate": ("normal", (), 0.0, 2.0),
    "log_limit": ("uniform", (), 0.0, 1.0),
    "log_scale": ("uniform", (), -0.5, 0.5),
    "growth_limit": ("uniform", (), 0.0, 1.0),
    "growth_start": ("uniform", (), 0.0, 2.0),
    "growth_log_rate": ("normal", (), -2.0, 1.0),
    "growth_log_shape": ("normal", (), 0.0, 0.5),
    "log_noise": ("normal", (), -4.0, 1.0),
}


def mean_curve(values: Values, t: Tensor) -> Tensor:
    """Return the noise-free curve f [*batch, epoch].

    Args:
        values: The thirteen parameters under the names of :meth:`CurvePrior.sites`, with any
            leading dims [*batch].
        t: [epoch] or [*batch, epoch] epochs, at least 1.

    Returns:
        [*batch, epoch]. Rates that overflow reach the limit of their family.

    Example:
        >>> values, _ = CurvePrior().sample_dataset(2, rng=0)
        >>> mean_curve(values, torch.arange(1.0, 6.0)).shape
        torch.Size([2, 5])
    """
    at = {name: value.unsqueeze(-1) for name, value in values.items() if name != "weight"}
    w1, w2, w3 = (values["weight"][..., k, None] for k in range(3))
    log_t = t.log()
    power = at["power_limit"] - at["power_scale"] * (-at["power_log_rate"].exp() * log_t).exp()
    logarithm = at["log_limit"] - at["log_scale"] / torch.log1p(t)
    # kappa t^delta in logs, so that nothing but the outermost exponential can overflow
    decay = (at["growth_log_rate"] + at["growth_log_shape"].exp() * log_t).exp()
    growth = at["growth_limit"] - (at["growth_limit"] - at["growth_start"]) * (-decay).exp()
    return w1 * power + w2 * logarithm + w3 * growth


@dataclass(frozen=True)
class CurvePrior(Model):
    """Learning curves y [epoch] at epochs t = 1, ..., horizon, as a generative model.

    Data are pairs ``(t, y)``: t [epoch] (or [n, epoch]) and y [n, epoch] or [epoch].

    Attributes:
        horizon: Last epoch m, at which the curve must stand above its first value.
        dtype: Precision of what is drawn.

    Example:
        >>> prior = CurvePrior()
        >>> values, (t, y) = prior.sample_dataset(5, rng=0)
        >>> t.shape, y.shape
        (torch.Size([100]), torch.Size([5, 100]))
    """

    horizon: int = 100
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if not isinstance(self.horizon, int) or self.horizon < 2:
            raise DataError(f"horizon: expected a whole number of epochs >= 2, got {self.horizon}")

    @property
    def version(self) -> str:
        """Name of this prior as weight files record it."""
        return f"{VERSION}/{self.horizon}"

    @property
    def epochs(self) -> Tensor:
        """[epoch] the epochs 1, ..., horizon."""
        return torch.arange(1, self.horizon + 1, dtype=self.dtype)

    def sites(self, data: Any = None) -> Mapping[str, Site]:
        """Return the weights [family] and ten scalar parameters."""
        found = {}
        for name, (kind, shape, low, high) in _LAWS.items():
            support = constraints.interval(low, high) if kind == "uniform" else constraints.real
            found[name] = Site(shape, support, ("family",) if shape else ())
        return found

    def laws(self, dtype: torch.dtype | None = None) -> Mapping[str, Distribution]:
        """Return the law of every site before the rejection rule."""
        kind_of = {"uniform": Uniform, "normal": Normal}
        dtype = dtype or self.dtype
        return {
            name: kind_of[kind](
                torch.full(shape, first, dtype=dtype),
                torch.full(shape, second, dtype=dtype),
                validate_args=False,
            )
            for name, (kind, shape, first, second) in _LAWS.items()
        }

    def propose(self, n: int, *, rng: torch.Generator) -> dict[str, Tensor]:
        """Draw ``n`` values [n, *site] before the rejection rule."""
        drawn = {}
        for name, (kind, shape, first, second) in _LAWS.items():
            size = (n, *shape)
            if kind == "uniform":
                unit = torch.rand(size, generator=rng, dtype=self.dtype, device=rng.device)
                drawn[name] = first + (second - first) * unit
            else:
                unit = torch.randn(size, generator=rng, dtype=self.dtype, device=rng.device)
                drawn[name] = first + second * unit
        return drawn

    def accepts(self, values: Values) -> Tensor:
        """Return [*batch] whether the mean curve ends above its start and stays in [0, 1]."""
        t = self.epochs.to(values["weight"])
        ends = mean_curve(values, t[[0, -1]])
        f = mean_curve(values, t)
        inside = ((f >= 0) & (f <= 1)).all(-1)  # False for NaN
        return inside & (ends[..., 1] > ends[..., 0])

    def sample_prior(self, n: int, *, rng: Rng) -> dict[str, Tensor]:
        """Draw ``n`` values [n, *site] that pass the rejection rule."""
        wanted = draw_count(n)
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "curve prior")
        kept: list[dict[str, Tensor]] = []
        have = 0
        while have < wanted:
            block = self.propose(int(1.1 * (wanted - have) / ACCEPTANCE) + 32, rng=generator)
            # three epochs reject most draws before the whole curve is worked out
            t = self.epochs.to(block["weight"])
            rough = mean_curve(block, t[[0, (self.horizon - 1) // 8, -1]])
            likely = ((rough >= 0) & (rough <= 1)).all(-1) & (rough[:, -1] > rough[:, 0])
            block = {name: value[likely] for name, value in block.items()}
            passed = self.accepts(block)
            block = {name: value[passed] for name, value in block.items()}
            kept.append(block)
            have += int(passed.sum())
        return {name: torch.cat([block[name] for block in kept])[:wanted] for name in _LAWS}

    def simulate(self, values: Values, x: Any, *, rng: Rng) -> Tensor:
        """Draw one noisy curve y [*batch, epoch] for each leading element of ``values``.

        Args:
            values: Parameters [*batch, *site].
            x: Epochs t [epoch]; None takes 1, ..., horizon.
            rng: Seed or generator.
        """
        t = self.epochs.to(values["weight"]) if x is None else x
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "curve noise")
        f = mean_curve(values, t)
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=generator.device)
        return f + values["log_noise"].exp().unsqueeze(-1) * noise.to(f.device)

    def sample_dataset(self, n: int, *, rng: Rng) -> tuple[dict[str, Tensor], Curve]:
        """Draw ``n`` values and their noisy curves: t [epoch] and y [n, epoch]."""
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "curve prior")
        values = self.sample_prior(n, rng=generator)
        y = self.simulate(values, None, rng=generator)
        return values, (self.epochs.to(y), y)

    def log_prior(self, values: Values) -> Tensor:
        """Return [*batch] the log density up to the constant of rejection; -inf where rejected.

        The constant is -ln of the share of draws accepted, about 1.58.
        """
        total = torch.zeros((), dtype=values["weight"].dtype)
        sites = self.sites()
        for name, law in self.laws(values["weight"].dtype).items():
            value = values[name]
            inside = sites[name].support.check(value)
            safe = torch.where(inside, value, law.mean)
            term = torch.where(inside, law.log_prob(safe), -math.inf)
            total = total + (term.sum(-1) if _LAWS[name][1] else term)
        return torch.where(self.accepts(values), total, -math.inf)

    def pointwise_log_likelihood(self, values: Values, data: Curve) -> dict[str, Tensor]:
        """Return {"y": [*batch, epoch]} the log density of every observation."""
        t, y = data
        f = mean_curve(values, t)
        log_sigma = values["log_noise"].unsqueeze(-1)
        z = (y - f) * (-log_sigma).exp()
        return {"y": -0.5 * z.square() - log_sigma - 0.5 * math.log(2 * math.pi)}

    def log_likelihood(self, values: Values, data: Curve) -> Tensor:
        """Return [*batch] the log density of the observations (t, y) given ``values``."""
        return self.pointwise_log_likelihood(values, data)["y"].sum(-1)

    batched = True

    def log_joint(self, values: Values, data: Curve, *, scale: float = 1.0) -> Tensor:
        """Return [*batch] log p(values) + scale log p(y | values), up to a constant."""
        return self.log_prior(values) + scale * self.log_likelihood(values, data)

    def prepare(self, data: Any) -> Curve:
        """Check one curve (t [epoch], y [epoch]).

        Raises:
            ShapeError: The two do not match.
            DataError: A value is NaN or infinite.
        """
        if not isinstance(data, tuple) or len(data) != 2:
            raise DataError("expected one curve as a pair (t [epoch], y [epoch]) of tensors")
        t, y = (torch.as_tensor(part) for part in data)
        if t.dim() != 1 or t.shape != y.shape:
            raise ShapeError(
                f"expected t [epoch] and y [epoch] of equal length, got {tuple(t.shape)} and "
                f"{tuple(y.shape)}; pass one curve at a time"
            )
        check_finite(t, "t", ("epoch",))
        check_finite(y, "y", ("epoch",))
        if not bool((t >= 1).all()):
            raise DataError(f"t: expected epochs >= 1, got {float(t.min()):g}")
        dtype = y.dtype if y.dtype.is_floating_point else torch.float64
        return t.to(dtype), y.to(dtype)


register(
    CurvePrior,
    "CurvePrior",
    lambda prior: {"horizon": prior.horizon, "dtype": str(prior.dtype).removeprefix("torch.")},
    lambda tree: CurvePrior(tree["horizon"], getattr(torch, tree["dtype"])),
)

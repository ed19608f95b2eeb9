"""The benchmark models as Pyro programs, written as :mod:`benchmarks.hmc._jax` has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch

__all__ = ["PROGRAMS"]


def _normal_site(name: str, scale: float, shape: tuple[int, ...], like: Any) -> Any:
    law = dist.Normal(like.new_zeros(shape), like.new_full(shape, scale))
    return pyro.sample(name, law.to_event(len(shape)))


def _schools(y: Any, sigma: Any) -> None:
    mu = _normal_site("mu", 5.0, (), y)
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    z = _normal_site("z", 1.0, (8,), y)
    pyro.sample("y", dist.Normal(mu + tau * z, sigma).to_event(1), obs=y)


def _logistic(x: Any, y: Any) -> None:
    weights = _normal_site("weights", 1.0, (x.shape[1],), x)
    pyro.sample("y", dist.Bernoulli(logits=x @ weights).to_event(1), obs=y)


def _normal(precision: Any, sd: Any) -> None:
    zero = precision.new_zeros(len(precision))
    # flat: the mask takes the density of this normal law out again
    x = pyro.sample("x", dist.Normal(zero, zero + 1).to_event(1).mask(False))
    pyro.factor("density", -0.5 * (x @ precision) @ x)


def _radon(county: Any, floor: Any, y: Any) -> None:
    mean = _normal_site("mean", 5.0, (), y)
    slope = _normal_site("slope", 5.0, (), y)
    spread = pyro.sample("spread", dist.HalfNormal(y.new_tensor(1.0)))
    noise = pyro.sample("noise", dist.HalfNormal(y.new_tensor(1.0)))
    z = _normal_site("z", 1.0, (85,), y)
    fitted = mean + spread * z[county] + slope * floor
    pyro.sample("y", dist.Normal(fitted, noise).to_event(1), obs=y)


def _network(x: Any, y: Any) -> None:
    width, root = 50, math.sqrt(50)
    w1 = _normal_site("w1", 1.0, (x.shape[1], width), x)
    b1 = _normal_site("b1", 1.0, (width,), x)
    w2 = _normal_site("w2", 1.0, (width, width), x)
    b2 = _normal_site("b2", 1.0, (width,), x)
    w3 = _normal_site("w3", 1.0, (width,), x)
    b3 = _normal_site("b3", 1.0, (), x)
    hidden = torch.tanh(torch.tanh(x @ w1 + b1) @ w2 / root + b2)
    law = dist.Normal(hidden @ w3 / root + b3, x.new_tensor(0.1))
    pyro.sample("y", law.to_event(1), obs=y)


PROGRAMS: dict[str, Callable[..., None]] = {
    "eight schools": _schools,
    "logistic": _logistic,
    "normal 100": _normal,
    "radon": _radon,
    "BNN 2x50": _network,
}

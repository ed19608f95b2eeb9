"""The benchmark models as NumPyro programs; BlackJAX takes their densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

from benchmarks.hmc._data import DATA

__all__ = ["arguments", "program"]


def arguments(name: str) -> dict[str, Any]:
    """Return the data of a model as JAX arrays."""
    return {key: jnp.asarray(value) for key, value in DATA[name]().items()}


def _schools(y: Any, sigma: Any) -> None:
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
    numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def _logistic(x: Any, y: Any) -> None:
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)


def _normal(precision: Any, sd: Any) -> None:
    real = dist.constraints.real_vector
    x = numpyro.sample("x", dist.ImproperUniform(real, (), (len(precision),)))
    numpyro.factor("density", -0.5 * (x @ precision) @ x)


def _radon(county: Any, floor: Any, y: Any) -> None:
    mean = numpyro.sample("mean", dist.Normal(0.0, 5.0))
    slope = numpyro.sample("slope", dist.Normal(0.0, 5.0))
    spread = numpyro.sample("spread", dist.HalfNormal(1.0))
    noise = numpyro.sample("noise", dist.HalfNormal(1.0))
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([85]).to_event(1))
    fitted = mean + spread * z[county] + slope * floor
    numpyro.sample("y", dist.Normal(fitted, noise), obs=y)


def _network(x: Any, y: Any) -> None:
    def normal(name: str, *shape: int) -> Any:
        return numpyro.sample(name, dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))

    width, root = 50, math.sqrt(50)
    hidden = jax.nn.tanh(x @ normal("w1", x.shape[1], width) + normal("b1", width))
    hidden = jax.nn.tanh(hidden @ normal("w2", width, width) / root + normal("b2", width))
    outputs = hidden @ normal("w3", width) / root + normal("b3")
    numpyro.sample("y", dist.Normal(outputs, 0.1), obs=y)


_PROGRAMS: dict[str, Callable[..., None]] = {
    "eight schools": _schools,
    "logistic": _logistic,
    "normal 100": _normal,
    "radon": _radon,
    "BNN 2x50": _network,
}


def program(name: str) -> Callable[..., None]:
    """Return the program of a model."""
    return _PROGRAMS[name]

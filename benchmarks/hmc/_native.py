"""The benchmark models as native log joints, with leading dims for chains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional

from benchmarks.hmc._data import DATA
from probkit.model import Model, Site

__all__ = ["NATIVE", "data_of"]

Values = Mapping[str, Tensor]
_REAL, _POSITIVE = constraints.real, constraints.positive


def data_of(name: str) -> dict[str, Tensor]:
    """Return the data of a model as tensors."""
    return {key: torch.as_tensor(value) for key, value in DATA[name]().items()}


def _half_normal(x: Tensor, scale: float) -> Tensor:
    """Log density up to a constant."""
    return -0.5 * (x / scale).square()


@dataclass(frozen=True)
class Schools(Model):
    """mu ~ N(0, 5), tau ~ HalfCauchy(5), z_j ~ N(0, 1), y_j ~ N(mu + tau z_j, sigma_j)."""

    batched: ClassVar[bool] = True

    def sites(self, data: Any) -> dict[str, Site]:
        return {
            "mu": Site((), _REAL),
            "tau": Site((), _POSITIVE),
            "z": Site((8,), _REAL, ("school",)),
        }

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        mu, tau, z = values["mu"], values["tau"], values["z"]
        residual = (data["y"] - mu[..., None] - tau[..., None] * z) / data["sigma"]
        prior = -0.5 * (mu / 5.0).square() - (tau / 5.0).square().log1p()
        return prior - 0.5 * (z.square() + residual.square()).sum(-1)


@dataclass(frozen=True)
class Logistic(Model):
    """weights ~ N(0, 1), y ~ Bernoulli(logit = x weights)."""

    batched: ClassVar[bool] = True

    def sites(self, data: Any) -> dict[str, Site]:
        return {"weights": Site((data["x"].shape[1],), _REAL, ("predictor",))}

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        weights = values["weights"]
        logits = weights @ data["x"].T
        likelihood = (data["y"] * logits - functional.softplus(logits)).sum(-1)
        return likelihood - 0.5 * weights.square().sum(-1)


@dataclass(frozen=True)
class Normal100(Model):
    """x ~ N(0, precision^-1) in 100 dimensions."""

    batched: ClassVar[bool] = True

    def sites(self, data: Any) -> dict[str, Site]:
        return {"x": Site((len(data["precision"]),), _REAL, ("coordinate",))}

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        x = values["x"]
        return -0.5 * ((x @ data["precision"]) * x).sum(-1)


@dataclass(frozen=True)
class Radon(Model):
    """Varying intercepts, non-centred.

    mean ~ N(0, 5), slope ~ N(0, 5), spread ~ HalfNormal(1), noise ~ HalfNormal(1),
    z_c ~ N(0, 1), y_i ~ N(mean + spread z_{c(i)} + slope floor_i, noise).
    """

    batched: ClassVar[bool] = True

    def sites(self, data: Any) -> dict[str, Site]:
        return {
            "mean": Site((), _REAL),
            "slope": Site((), _REAL),
            "spread": Site((), _POSITIVE),
            "noise": Site((), _POSITIVE),
            "z": Site((85,), _REAL, ("county",)),
        }

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        mean, slope, spread, noise, z = (
            values[name] for name in ("mean", "slope", "spread", "noise", "z")
        )
        intercept = mean[..., None] + spread[..., None] * z
        fitted = intercept[..., data["county"]] + slope[..., None] * data["floor"]
        residual = (data["y"] - fitted) / noise[..., None]
        likelihood = -0.5 * residual.square().sum(-1) - len(data["y"]) * noise.log()
        prior = -0.5 * ((mean / 5.0).square() + (slope / 5.0).square() + z.square().sum(-1))
        return likelihood + prior + _half_normal(spread, 1.0) + _half_normal(noise, 1.0)


@dataclass(frozen=True)
class Network(Model):
    """Two tanh layers of 50, weights ~ N(0, 1 / fan-in), biases ~ N(0, 1), noise 0.1."""

    batched: ClassVar[bool] = True
    width: ClassVar[int] = 50

    def sites(self, data: Any) -> dict[str, Site]:
        inputs, width = data["x"].shape[1], self.width
        return {
            "w1": Site((inputs, width), _REAL, ("input", "first")),
            "b1": Site((width,), _REAL, ("first",)),
            "w2": Site((width, width), _REAL, ("first", "second")),
            "b2": Site((width,), _REAL, ("second",)),
            "w3": Site((width,), _REAL, ("second",)),
            "b3": Site((), _REAL),
        }

    def outputs(self, values: Values, x: Tensor) -> Tensor:
        """Return the function [*batch, row] at inputs [row, input]; weights are whitened."""
        w1, b1, w2, b2, w3, b3 = (values[n] for n in ("w1", "b1", "w2", "b2", "w3", "b3"))
        root = math.sqrt(self.width)
        hidden = torch.tanh(x @ w1 + b1[..., None, :])
        hidden = torch.tanh(hidden @ w2 / root + b2[..., None, :])
        return (hidden @ w3[..., None])[..., 0] / root + b3[..., None]

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        error = (data["y"] - self.outputs(values, data["x"])) / 0.1
        total = -0.5 * error.square().sum(-1)
        matrices = values["w1"].square().sum((-2, -1)) + values["w2"].square().sum((-2, -1))
        vectors = sum(values[name].square().sum(-1) for name in ("b1", "b2", "w3"))
        return total - 0.5 * (matrices + vectors + values["b3"].square())


NATIVE: dict[str, Model] = {
    "eight schools": Schools(),
    "logistic": Logistic(),
    "normal 100": Normal100(),
    "radon": Radon(),
    "BNN 2x50": Network(),
}

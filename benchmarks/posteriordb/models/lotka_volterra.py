"""Lynx and hare: u' = (th1 - th2 v) u, v' = (-th3 + th4 u) v from z_init at time 0.

th1, th3 ~ half-N(1, 0.5); th2, th4 ~ half-N(0.05, 0.05); sigma ~ LogN(-1, 1);
z_init ~ LogN(log 10, 1); y_init_k ~ LogN(log z_init_k, sigma_k); y_tk ~ LogN(log z_k(t), sigma_k).

Both forms take classical Runge-Kutta steps of fixed size: the native one for the logarithms of the
populations, whose equations do not leave the reals, the program for the populations themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import LogNormal, Normal, constraints

from benchmarks.posteriordb.models.case import Case, double
from probkit.model import Model, Site, Values

_STEPS = 4  # a year: errors of log populations near 1e-4, against a noise of 0.25


def _log_path(theta: Tensor, log_start: Tensor, years: int, steps: int) -> Tensor:
    """Solve for log u and log v at years 1, 2, ...: [*batch, years, 2].

    With s = (log u, log v): s' = rate + effect exp(s swapped).
    """
    rate = torch.stack([theta[..., 0], -theta[..., 2]], -1) / steps
    effect = torch.stack([-theta[..., 1], theta[..., 3]], -1) / steps

    def slope(state: Tensor) -> Tensor:
        return torch.addcmul(rate, effect, state.flip(-1).exp())

    state, path = log_start, []
    for _ in range(years):
        for _ in range(steps):
            one = slope(state)
            two = slope(state + 0.5 * one)
            three = slope(state + 0.5 * two)
            four = slope(state + three)
            state = state + (one + 2.0 * (two + three) + four) / 6.0
        path.append(state)
    return torch.stack(path, -2)


class LotkaVolterra(Model):
    """The log joint of rates, starting populations and noise."""

    batched = True

    def sites(self, data: Any) -> dict[str, Site]:
        """Return the latents."""
        return {
            "theta": Site((4,), constraints.positive, ("rate",)),
            "z_init": Site((2,), constraints.positive, ("animal",)),
            "sigma": Site((2,), constraints.positive, ("animal",)),
        }

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the log joint [*batch]."""
        theta, z_init, sigma = values["theta"], values["z_init"], values["sigma"]
        means, widths = double([1.0, 0.05, 1.0, 0.05]), double([0.5, 0.05, 0.5, 0.05])
        prior = Normal(means, widths).log_prob(theta).sum(-1)
        prior = prior + LogNormal(double(-1.0), 1.0).log_prob(sigma).sum(-1)
        prior = prior + LogNormal(double(10.0).log(), 1.0).log_prob(z_init).sum(-1)
        path = _log_path(theta, z_init.log(), len(data["y"]), _STEPS)
        first = LogNormal(z_init.log(), sigma).log_prob(data["y_init"]).sum(-1)
        rest = LogNormal(path, sigma[..., None, :]).log_prob(data["y"]).sum((-2, -1))
        return prior + first + rest


def program(y_init: Tensor, y: Tensor) -> None:
    positive = dist.ImproperUniform(constraints.independent(constraints.positive, 1), (), (4,))
    theta = pyro.sample("theta", positive)
    means, widths = y.new_tensor([1.0, 0.05, 1.0, 0.05]), y.new_tensor([0.5, 0.05, 0.5, 0.05])
    pyro.factor("theta prior", dist.Normal(means, widths).log_prob(theta).sum(-1))
    with pyro.plate("animal", 2):
        z_init = pyro.sample("z_init", dist.LogNormal(y.new_tensor(10.0).log(), 1.0))
        sigma = pyro.sample("sigma", dist.LogNormal(y.new_tensor(-1.0), 1.0))
        pyro.sample("first", dist.LogNormal(z_init.log(), sigma), obs=y_init)
        z, years = z_init, []
        for _ in range(len(y)):
            z = _year(z, theta)
            years.append(z)
        with pyro.plate("year", len(y)):
            pyro.sample("y", dist.LogNormal(torch.stack(years).log(), sigma), obs=y)


def _year(z: Tensor, theta: Tensor) -> Tensor:
    """Follow the populations z [2] for a year."""
    h = 1.0 / _STEPS
    growth = torch.stack([theta[0], -theta[2]])
    meeting = torch.stack([-theta[1], theta[3]])

    def slope(state: Tensor) -> Tensor:
        return state * (growth + meeting * state.flip(-1))

    for _ in range(_STEPS):
        one = slope(z)
        two = slope(z + 0.5 * h * one)
        three = slope(z + 0.5 * h * two)
        four = slope(z + h * three)
        z = z + h / 6.0 * (one + 2.0 * two + 2.0 * three + four)
    return z


def _data(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {"y_init": double(stored["y_init"]), "y": double(stored["y"])}


LOTKA_VOLTERRA = Case(
    "hudson_lynx_hare",
    LotkaVolterra(),
    program,
    _data,
    # 64 chains wait for the longest path among them; 2^6 - 1 steps are the most of one
    options={"chains": 64, "draws": 100, "warmup": 250, "max_depth": 6},
    observed=("y", "y_init"),
    from_mode=True,
)

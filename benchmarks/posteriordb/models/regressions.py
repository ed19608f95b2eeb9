"""Six linear regressions y ~ N(X b, sigma), which differ in design and priors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import HalfCauchy, HalfNormal, Normal, constraints

from benchmarks.posteriordb.models.case import Case, double
from probkit.model import Model, Site, Values

Stored = Mapping[str, Any]
_DENSE = {"dense": True}  # columns that are not centred are strongly correlated


def _flat(beta: Tensor, sigma: Tensor) -> Tensor:
    return sigma.new_zeros(sigma.shape)


@dataclass(frozen=True)
class Regression(Model):
    """The log joint of coefficients and noise, by the sums that are sufficient for them.

    Attributes:
        log_prior: Log prior density of coefficients [*batch, K] and noise [*batch].
    """

    log_prior: Callable[[Tensor, Tensor], Tensor] = _flat
    batched: ClassVar[bool] = True

    def sites(self, data: Any) -> dict[str, Site]:
        """Return the latents."""
        columns = data["x"].shape[1]
        return {
            "beta": Site((columns,), constraints.real, ("column",)),
            "sigma": Site((), constraints.positive),
        }

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the log joint [*batch]."""
        beta, sigma = values["beta"], values["sigma"]
        away = ((beta - data["fit"]) @ data["root"].mT).square().sum(-1)
        loss = 0.5 * (data["rest"] + away) / sigma.square() + len(data["y"]) * sigma.log()
        return self.log_prior(beta, sigma) - loss


def _design(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Return the data with |y - X b|^2 = rest + |root (b - fit)|^2, where nothing cancels."""
    fit = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    rest = (y - x @ fit).square().sum()
    return {"x": x, "y": y, "fit": fit, "rest": rest, "root": torch.linalg.qr(x).R}


def _improper(event: tuple[int, ...] = ()) -> dist.ImproperUniform:
    support = constraints.independent(constraints.real, 1) if event else constraints.positive
    return dist.ImproperUniform(support, (), event)


def _observe(x: Tensor, y: Tensor, beta: Tensor, sigma: Tensor) -> None:
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def flat(x: Tensor, y: Tensor, **sums: Tensor) -> None:
    """Flat priors on coefficients and noise."""
    beta = pyro.sample("beta", _improper((x.shape[1],)))
    sigma = pyro.sample("sigma", _improper())
    _observe(x, y, beta, sigma)


# ------------------------------------------------------------------------------- autoregression


def _ten_and_cauchy(beta: Tensor, sigma: Tensor) -> Tensor:
    normal = Normal(double(0.0), 10.0).log_prob(beta).sum(-1)
    return normal + HalfCauchy(double(2.5)).log_prob(sigma)


def autoregression(x: Tensor, y: Tensor, **sums: Tensor) -> None:
    zero = x.new_zeros(())
    alpha = pyro.sample("alpha", dist.Normal(zero, 10.0))
    with pyro.plate("lag", x.shape[1] - 1):
        beta = pyro.sample("beta", dist.Normal(zero, 10.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(zero + 2.5))
    _observe(x[:, 1:], y - alpha, beta, sigma)


def _lags(stored: Stored) -> dict[str, Any]:
    y, order = double(stored["y"]), int(stored["K"])
    lags = [y[order - k : len(y) - k] for k in range(1, order + 1)]
    return _design(torch.stack([torch.ones_like(lags[0]), *lags], 1), y[order:])


def _alpha_first(draws: Values) -> dict[str, Tensor]:
    if "alpha" in draws:
        return dict(draws)
    beta = draws["beta"]
    return {"alpha": beta[..., 0], "beta": beta[..., 1:], "sigma": draws["sigma"]}


AUTOREGRESSION = Case(
    "arK", Regression(_ten_and_cauchy), autoregression, _lags, _alpha_first, _DENSE
)


# ------------------------------------------------------------------------------ children's scores


def _half_cauchy(beta: Tensor, sigma: Tensor) -> Tensor:
    return HalfCauchy(double(2.5)).log_prob(sigma)


def kids(x: Tensor, y: Tensor, **sums: Tensor) -> None:
    beta = pyro.sample("beta", _improper((x.shape[1],)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(x.new_tensor(2.5)))
    _observe(x, y, beta, sigma)


def _kids(stored: Stored) -> dict[str, Any]:
    school, iq = double(stored["mom_hs"]), double(stored["mom_iq"])
    columns = [torch.ones_like(iq), school, iq, school * iq]
    return _design(torch.stack(columns, 1), double(stored["kid_score"]))


KIDS = Case("kidiq", Regression(_half_cauchy), kids, _kids, options=_DENSE)


# ------------------------------------------------------------------------------- flat regressions


def _mesquite(stored: Stored) -> dict[str, Any]:
    names = ("diam1", "diam2", "canopy_height", "total_height", "density", "group", "weight")
    d1, d2, canopy, total, density, group, weight = (double(stored[name]) for name in names)
    columns = [
        torch.ones_like(d1),
        (d1 * d2 * canopy).log(),
        (d1 * d2).log(),
        (d1 / d2).log(),
        total.log(),
        density.log(),
        group,
    ]
    return _design(torch.stack(columns, 1), weight.log())


def _earnings(stored: Stored) -> dict[str, Any]:
    height = double(stored["height"])
    return _design(torch.stack([torch.ones_like(height), height], 1), double(stored["earn"]))


def _election(stored: Stored) -> dict[str, Any]:
    age = torch.as_tensor(stored["age_discrete"])
    names = ("real_ideo", "race_adj", "educ1", "gender", "income", "partyid7")
    ideology, race, education, gender, income, party = (double(stored[name]) for name in names)
    ages = [(age == group).double() for group in (2, 3, 4)]
    columns = [torch.ones_like(race), ideology, race, *ages, education, gender, income]
    return _design(torch.stack(columns, 1), party)


MESQUITE = Case("mesquite", Regression(), flat, _mesquite, options=_DENSE)
# Scales of 1e5: until they are known, longer paths than this are no better.
EARNINGS = Case(
    "earnings",
    Regression(),
    flat,
    _earnings,
    options={**_DENSE, "max_depth": 6, "draws": 500},
)
ELECTION = Case("nes1976", Regression(), flat, _election, options=_DENSE)


# ----------------------------------------------------------------------------- correlated columns


def _tens(beta: Tensor, sigma: Tensor) -> Tensor:
    normal = Normal(double(0.0), 10.0).log_prob(beta).sum(-1)
    return normal + HalfNormal(double(10.0)).log_prob(sigma)


def correlated(x: Tensor, y: Tensor, **sums: Tensor) -> None:
    ten = x.new_tensor(10.0)
    beta = pyro.sample("beta", dist.Normal(0.0, ten.expand(x.shape[1])).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(ten))
    _observe(x, y, beta, sigma)


def _correlated(stored: Stored) -> dict[str, Any]:
    return _design(double(stored["X"]), double(stored["y"]))


CORRELATED = Case("sblrc", Regression(_tens), correlated, _correlated, options=_DENSE)

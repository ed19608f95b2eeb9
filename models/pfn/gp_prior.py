"""Gaussian processes as a prior over data sets, and their exact predictions to compare with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Gamma, Normal, constraints

from probkit.errors import DataError
from probkit.files import storable
from probkit.model import Model, Site, Values
from probkit.numerics import safe_cholesky
from probkit.rng import Rng, draw_count, scope, seed_of, stream

__all__ = ["SURROGATE_PRIOR", "GPPrior", "process_scores"]

_MATERN = math.sqrt(5.0)


@storable
@dataclass(frozen=True)
class GPPrior(Model):
    """Noisy draws of a Gaussian process at inputs uniform on [0, 1]^d.

    Data are pairs (x [data set, row, feature], y [data set, row]).

    Attributes:
        rows: Rows of a data set.
        features: Number d of inputs. With ``fewest_features`` below it, each data set uses a random
            number of them and the others stay at zero.
        fewest_features: See ``features``; None uses all of them.
        kernel: "rbf" or "matern52".
        lengthscale: A number, or (low, high) between which its logarithm is uniform; None draws one
            for each feature from Gamma(3, 6).
        noise_var: Variance of the noise, where the process has 1; or (low, high) between which its
            logarithm is uniform.

    Example:
        >>> values, (x, y) = GPPrior(rows=10, features=2).sample_dataset(4, rng=0)
        >>> x.shape, y.shape
        (torch.Size([4, 10, 2]), torch.Size([4, 10]))
    """

    rows: int = 32
    features: int = 1
    fewest_features: int | None = None
    kernel: Literal["rbf", "matern52"] = "rbf"
    lengthscale: float | tuple[float, float] | None = 0.6
    noise_var: float | tuple[float, float] = 1e-2

    def __post_init__(self) -> None:
        for name in ("rows", "features"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise DataError(f"{name}: expected a whole number >= 1, got {value!r}")
        if self.fewest_features is not None and not 1 <= self.fewest_features <= self.features:
            raise DataError(
                f"fewest_features: expected 1 to {self.features}, got {self.fewest_features}"
            )
        if self.kernel not in ("rbf", "matern52"):
            raise DataError(f"kernel: expected 'rbf' or 'matern52', got {self.kernel!r}")
        for name in ("lengthscale", "noise_var"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
            numbers = value if isinstance(value, list | tuple) else (value,)
            if value is not None and (
                not all(v > 0 for v in numbers) or list(numbers) != sorted(numbers)
            ):
                raise DataError(f"{name}: expected positive numbers in order, got {value!r}")

    @property
    def version(self) -> str:
        """Name of this prior as weight files record it."""
        return (
            f"gaussian-process-1/{self.kernel}/{self.fewest_features or self.features}-"
            f"{self.features} features/lengthscale {self.lengthscale}/noise {self.noise_var}"
        )

    def sites(self, data: Any = None) -> Mapping[str, Site]:
        """Return the hyper-parameters; the process itself is summed out."""
        return {
            "lengthscale": Site((self.features,), constraints.positive, ("feature",)),
            "noise_var": Site((), constraints.positive),
        }

    def sample_prior(self, n: int, *, rng: Rng) -> dict[str, Tensor]:
        """Draw lengthscales [n, feature] and noise variances [n]."""
        n = draw_count(n)
        generator = stream(seed_of(rng), "hyper")
        if self.lengthscale is None:
            with scope(rng=generator):
                lengthscale = Gamma(torch.tensor(3.0), torch.tensor(6.0)).sample(
                    torch.Size([n, self.features])
                )
        else:
            lengthscale = _between(self.lengthscale, n, generator)[:, None]
        noise = _between(self.noise_var, n, generator)
        return {
            "lengthscale": lengthscale.expand(n, self.features).clamp_min(1e-3).clone(),
            "noise_var": noise,
        }

    def sample_inputs(self, n: int, *, rng: Rng) -> Tensor:
        """Draw inputs [n, row, feature], unused features at zero."""
        generator = stream(seed_of(rng), "inputs")
        x = torch.rand(n, self.rows, self.features, generator=generator)
        if self.fewest_features is not None:
            used = torch.randint(self.fewest_features, self.features + 1, (n,), generator=generator)
            x = x * (torch.arange(self.features) < used[:, None])[:, None, :]
        return x

    def simulate(self, values: Values, x: Any, *, rng: Rng) -> tuple[Tensor, Tensor]:
        """Draw y [*batch, row] at x [row, feature] or [*batch, row, feature]."""
        gram = self.gram(values, x, x).double()
        noise = values["noise_var"][..., None].double()
        root, _ = safe_cholesky(gram + torch.diag_embed(noise.expand(gram.shape[:-1])))
        generator = stream(seed_of(rng), "process")
        unit = torch.randn(root.shape[:-1], generator=generator, dtype=root.dtype)
        y = (root @ unit.unsqueeze(-1)).squeeze(-1)
        return x, y.to(values["noise_var"].dtype)

    def sample_dataset(
        self, n: int, *, rng: Rng
    ) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """Draw ``n`` hyper-parameters and data sets x [n, row, feature], y [n, row]."""
        seed = seed_of(rng)
        values = self.sample_prior(n, rng=seed)
        x = self.sample_inputs(n, rng=seed)
        return values, self.simulate(values, x, rng=seed)

    def gram(self, values: Values, x: Tensor, other: Tensor) -> Tensor:
        """Return the kernel [*batch, row, row'] of unit variance."""
        scale = values["lengthscale"].to(x)[..., None, :]
        distance = torch.cdist(x / scale, other / scale)
        if self.kernel == "rbf":
            return (-0.5 * distance.square()).exp()
        r = _MATERN * distance
        return (1 + r + r.square() / 3) * (-r).exp()

    def exact(self, values: Values, x: Tensor, y: Tensor, new: Tensor) -> Normal:
        """Return the exact predictive laws [*batch, query] of observations at ``new``.

        Args:
            values: Hyper-parameters [*batch, *site].
            x: [*batch, row, feature].
            y: [*batch, row].
            new: [*batch, query, feature].
        """
        values = {name: value.double() for name, value in values.items()}
        x, y, new = x.double(), y.double(), new.double()
        noise = values["noise_var"][..., None]
        variance = (1 + noise).expand(*new.shape[:-1])
        if x.shape[-2] == 0:
            return Normal(torch.zeros_like(variance), variance.sqrt())
        gram = self.gram(values, x, x)
        root, _ = safe_cholesky(gram + torch.diag_embed(noise.expand(gram.shape[:-1])))
        cross = torch.linalg.solve_triangular(root, self.gram(values, x, new), upper=False)
        white = torch.linalg.solve_triangular(root, y.unsqueeze(-1), upper=False)
        mean = (cross.transpose(-1, -2) @ white).squeeze(-1)
        return Normal(mean, (variance - cross.square().sum(-2)).sqrt())


def _between(value: float | tuple[float, float], n: int, generator: torch.Generator) -> Tensor:
    """Draw [n] numbers whose logarithm is uniform, or repeat the one given."""
    if not isinstance(value, tuple):
        return torch.full((n,), float(value))
    low, high = (math.log(v) for v in value)
    return (low + (high - low) * torch.rand(n, generator=generator)).exp()


SURROGATE_PRIOR = GPPrior(
    rows=48,
    features=6,
    fewest_features=1,
    kernel="matern52",
    lengthscale=None,
    noise_var=(1e-4, 1e-1),
)
"""The prior of a surrogate for the unit cube with one to six inputs; see ``pfn.train``."""


@torch.no_grad()
def process_scores(
    net: Any,
    prior: GPPrior,
    *,
    rng: Rng,
    observed: Sequence[int] = (2, 5, 10, 20, 40),
    sets: int = 2000,
) -> dict[str, dict[str, float]]:
    """Score a network beside exact predictions that know the hyper-parameters.

    No network can reach those where the hyper-parameters vary, for it has to infer them.

    Args:
        net: A :class:`~probkit.models.pfn.PFN`.
        prior: Where data sets come from.
        rng: Seed of the data sets.
        observed: Rows observed.
        sets: Number of data sets.

    Returns:
        By rows observed the mean log density of the other rows under the network ("network") and
        under the exact process ("known hyper-parameters"), and the coverage of 90 % intervals.
    """
    values, (x, y) = prior.sample_dataset(sets, rng=rng)
    found: dict[str, dict[str, float]] = {
        name: {} for name in ("network", "known hyper-parameters", "coverage 0.9")
    }
    for n in observed:
        law = net.predict_sets(x[:, :n], y[:, :n], x[:, n:])
        exact = prior.exact(values, x[:, :n], y[:, :n], x[:, n:])
        inside = ((law.cdf(y[:, n:]) - 0.5).abs() <= 0.45).double().mean()
        found["network"][str(n)] = round(float(law.log_prob(y[:, n:]).double().mean()), 4)
        known = exact.log_prob(y[:, n:].double()).mean()
        found["known hyper-parameters"][str(n)] = round(float(known), 4)
        found["coverage 0.9"][str(n)] = round(float(inside), 4)
    return found

"""Gaussian guides in the unconstrained space: mean field, low rank, full rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    LogNormal,
    Normal,
    TransformedDistribution,
    constraints,
)

from probkit.bijections import bijection
from probkit.data import device_of
from probkit.density import initial_values
from probkit.errors import DataError
from probkit.files import storable
from probkit.guide import Guide, LogQ, Params
from probkit.model import Batch, Site, Values
from probkit.rng import Rng, stream
from probkit.unconstrained import Unconstrained

__all__ = ["Fixed", "FullRank", "LowRank", "MeanField"]

_LOG_2PI = math.log(2 * math.pi)


def _check_scale(name: str, scale: float) -> None:
    if not 0 < scale < math.inf:
        raise DataError(f"{name}: expected init_scale > 0, got {scale}")


def _split(sites: Mapping[str, Site]) -> tuple[dict[str, Site], dict[str, Site]]:
    """Separate global sites from those local to a minibatched plate."""
    local = {name: site for name, site in sites.items() if site.plate is not None}
    return {name: site for name, site in sites.items() if name not in local}, local


def _centre(model: Any, data: Any, sites: Mapping[str, Site], rng: Rng) -> dict[str, Tensor]:
    """Choose the unconstrained location of each site, [*free site].

    Where the model has starting values of its own, these; else near zero.
    """
    generator = stream(rng, "guide", device=device_of(data))
    start = initial_values(model, data, sites, 1, rng=generator)
    shrink = 1.0 if callable(getattr(model, "initial_values", None)) else 0.1
    return {
        name: shrink * bijection(site.support).inv(start[name][0]) for name, site in sites.items()
    }


def _standard_normal(like: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw noise [n, *like] on the generator's device and bring it to that of ``like``."""
    device = generator.device
    noise = torch.randn(n, *like.shape, generator=generator, dtype=like.dtype, device=device)
    return noise.to(like.device)


def _per_draw(terms: Tensor) -> Tensor:
    """Sum [n, *] to [n]; the dims may be of size zero."""
    return terms.sum(tuple(range(1, terms.ndim))) if terms.ndim > 1 else terms


def _generator(rng: Rng) -> torch.Generator:
    return rng if isinstance(rng, torch.Generator) else stream(rng, "draw")


def _log_standard_normal(noise: Tensor) -> Tensor:
    """Log density [n] of noise [n, *]."""
    return -0.5 * _per_draw(noise.square() + _LOG_2PI)


def _constrain(site: Site, free: Tensor) -> tuple[Tensor, Tensor]:
    """Map [n, *free site] to values [n, *site] and the log Jacobian [n]."""
    transform = bijection(site.support)
    value: Tensor = transform(free)
    log_det: Tensor = transform.log_abs_det_jacobian(free, value)
    return value, _per_draw(log_det)


def _draw_mean_field(
    sites: Mapping[str, Site], params: Params, n: int, index: Tensor | None, rng: torch.Generator
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Draw sites independently; local parameters are taken at ``index``.

    The log density [n] is None where there are no sites.
    """
    values: dict[str, Tensor] = {}
    log_q: Tensor | None = None
    for name, site in sites.items():
        loc, log_scale = params[name]["loc"], params[name]["log_scale"]
        if site.plate is not None and index is not None:
            loc, log_scale = loc[index], log_scale[index]
        noise = _standard_normal(loc, n, rng)
        values[name], log_det = _constrain(site, loc + log_scale.exp() * noise)
        term = _log_standard_normal(noise) - log_scale.sum() - log_det
        log_q = term if log_q is None else log_q + term
    return values, log_q


def _density_mean_field(
    sites: Mapping[str, Site], params: Params, values: Values, index: Tensor | None
) -> Tensor | None:
    """Log density [n] of values [n, *site]; None where there are no sites."""
    log_q: Tensor | None = None
    for name, site in sites.items():
        loc, log_scale = params[name]["loc"], params[name]["log_scale"]
        if site.plate is not None and index is not None:
            loc, log_scale = loc[index], log_scale[index]
        transform = bijection(site.support)
        free = transform.inv(values[name])
        log_det = _per_draw(transform.log_abs_det_jacobian(free, values[name]))
        term = _log_standard_normal((free - loc) / log_scale.exp()) - log_scale.sum() - log_det
        log_q = term if log_q is None else log_q + term
    return log_q


def _log_q(global_: Tensor | None, local: Tensor | None, n: int) -> LogQ:
    """Pair the two parts; an absent one is zero, as the other is in dtype and device."""
    like = global_ if global_ is not None else local
    zero = torch.zeros(n, dtype=torch.float64) if like is None else torch.zeros_like(like)
    return LogQ(zero if global_ is None else global_, zero if local is None else local)


def _mean_field_params(centre: Mapping[str, Tensor], scale: float) -> dict[str, Any]:
    return {
        name: {"loc": loc, "log_scale": torch.full_like(loc, math.log(scale))}
        for name, loc in centre.items()
    }


_POSITIVE = (type(constraints.positive), type(constraints.nonnegative))


def _is_zero(bound: Any) -> bool:
    return bool((torch.as_tensor(bound) == 0).all())


def _marginal(site: Site, loc: Tensor, scale: Tensor) -> Distribution:
    """The law of one site under a Gaussian in the unconstrained space."""
    return _marginal_on(site.support, loc, scale)


def _marginal_on(support: Any, loc: Tensor, scale: Tensor) -> Distribution:
    if isinstance(support, constraints.independent):  # as ``to_event`` makes it
        inner = _marginal_on(support.base_constraint, loc, scale)
        return Independent(inner, support.reinterpreted_batch_ndims)
    transform = bijection(support)
    if isinstance(support, type(constraints.real)):
        return Normal(loc, scale)
    if isinstance(support, _POSITIVE) and _is_zero(support.lower_bound):
        return LogNormal(loc, scale)  # The bijection to (0, inf) is exp.
    event = transform.domain.event_dim
    base: Distribution = Normal(loc, scale)
    return TransformedDistribution(Independent(base, event) if event else base, [transform])


@storable
@dataclass(frozen=True)
class MeanField(Guide):
    """Independent normals in the unconstrained space of every site.

    Args:
        init_scale: Standard deviation to start from.

    Example:
        >>> MeanField(init_scale=0.05)
        MeanField(init_scale=0.05)
    """

    init_scale: float = 0.1

    def __post_init__(self) -> None:
        _check_scale("MeanField", self.init_scale)

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Return {site: {"loc", "log_scale"}}."""
        return _mean_field_params(_centre(model, data, model.sites(data), rng), self.init_scale)

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw all sites."""
        generator = _generator(rng)
        shared, local = _split(model.sites(batch.data))
        values, log_global = _draw_mean_field(shared, params, n, None, generator)
        more, log_local = _draw_mean_field(local, params, n, batch.index, generator)
        return {**values, **more}, _log_q(log_global, log_local, n)

    def log_prob(self, params: Params, model: Any, batch: Batch, values: Values) -> LogQ:
        """Return the log density [n] of given values [n, *site] of the batch."""
        shared, local = _split(model.sites(batch.data))
        log_global = _density_mean_field(shared, params, values, None)
        log_local = _density_mean_field(local, params, values, batch.index)
        return _log_q(log_global, log_local, len(next(iter(values.values()))))

    def marginals(self, params: Params, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return the law of each site."""
        data = data.data if isinstance(data, Batch) else data
        return {
            name: _marginal(site, params[name]["loc"], params[name]["log_scale"].exp())
            for name, site in model.sites(data).items()
        }


class _Joint:
    """What FullRank and LowRank share: one Gaussian over all global sites, local ones apart."""

    def _init_local(self, model: Any, data: Any, rng: Rng, scale: float) -> tuple[Tensor, Any]:
        sites = model.sites(data)
        shared, local = _split(sites)
        centre = _centre(model, data, sites, rng)
        parts = [centre[name].flatten() for name in shared]
        loc = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        return loc, _mean_field_params({name: centre[name] for name in local}, scale)

    def _sample(
        self,
        params: Params,
        model: Any,
        batch: Batch,
        n: int,
        free: Tensor,
        log_base: Tensor,
        generator: torch.Generator,
    ) -> tuple[Values, LogQ]:
        shared, local = _split(model.sites(batch.data))
        values, log_det = Unconstrained(shared).constrain(free)
        more, log_local = _draw_mean_field(local, params["local"], n, batch.index, generator)
        return {**values, **more}, _log_q(log_base - log_det if shared else None, log_local, n)

    def _log_base(self, params: Params, free: Tensor) -> Tensor:
        """Log density [n] of the unconstrained global vector [n, D]."""
        raise AssertionError  # Each family has its own.

    def log_prob(self, params: Params, model: Any, batch: Batch, values: Values) -> LogQ:
        """Return the log density [n] of given values [n, *site] of the batch."""
        shared, local = _split(model.sites(batch.data))
        n = len(next(iter(values.values())))
        log_global = None
        if shared:
            space = Unconstrained(shared)
            free = space.flatten(values)
            log_global = self._log_base(params, free) - space.constrain(free)[1]
        log_local = _density_mean_field(local, params["local"], values, batch.index)
        return _log_q(log_global, log_local, n)

    def _marginals(
        self, params: Params, model: Any, data: Any, variance: Tensor
    ) -> Mapping[str, Distribution]:
        data = data.data if isinstance(data, Batch) else data
        sites = model.sites(data)
        shared, local = _split(sites)
        laws: dict[str, Distribution] = {}
        start = 0
        for name, site in shared.items():
            shape = bijection(site.support).inverse_shape(torch.Size(site.shape))
            part = slice(start, start + shape.numel())
            start += shape.numel()
            scale = variance[part].sqrt().reshape(shape)
            laws[name] = _marginal(site, params["loc"][part].reshape(shape), scale)
        for name, site in local.items():
            own = params["local"][name]
            laws[name] = _marginal(site, own["loc"], own["log_scale"].exp())
        return laws


@storable
@dataclass(frozen=True)
class FullRank(_Joint, Guide):
    """One normal with a full covariance over all global sites; local sites independent.

    Args:
        init_scale: Standard deviation to start from.
    """

    init_scale: float = 0.1

    def __post_init__(self) -> None:
        _check_scale("FullRank", self.init_scale)

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Return {"loc" [D], "log_diagonal" [D], "below" [D, D], "local"}."""
        loc, local = self._init_local(model, data, rng, self.init_scale)
        return {
            "loc": loc,
            "log_diagonal": torch.full_like(loc, math.log(self.init_scale)),
            "below": loc.new_zeros(len(loc), len(loc)),
            "local": local,
        }

    def _log_base(self, params: Params, free: Tensor) -> Tensor:
        centred = (free - params["loc"]).mT
        noise = torch.linalg.solve_triangular(self.factor(params), centred, upper=False).mT
        return _log_standard_normal(noise) - params["log_diagonal"].sum()

    def factor(self, params: Params) -> Tensor:
        """Return the Cholesky factor [D, D] of the covariance of the global sites."""
        return torch.tril(params["below"], -1) + torch.diag(params["log_diagonal"].exp())

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw all sites."""
        generator = _generator(rng)
        noise = _standard_normal(params["loc"], n, generator)
        free = params["loc"] + noise @ self.factor(params).T
        log_base = _log_standard_normal(noise) - params["log_diagonal"].sum()
        return self._sample(params, model, batch, n, free, log_base, generator)

    def marginals(self, params: Params, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return the law of each site."""
        variance = self.factor(params).square().sum(1)
        return self._marginals(params, model, data, variance)


@storable
@dataclass(frozen=True)
class LowRank(_Joint, Guide):
    """One normal with covariance diag + low rank over all global sites; local sites independent.

    Args:
        rank: Rank of the off-diagonal part.
        init_scale: Standard deviation to start from.
    """

    rank: int = 8
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        _check_scale("LowRank", self.init_scale)
        if self.rank < 1:
            raise DataError(f"LowRank: expected rank >= 1, got {self.rank}")

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Return {"loc" [D], "log_diagonal" [D], "factor" [D, rank], "local"}."""
        generator = stream(rng, "factor")
        loc, local = self._init_local(model, data, rng, self.init_scale)
        rank = max(1, min(self.rank, len(loc)))
        noise = torch.randn(len(loc), rank, generator=generator, dtype=loc.dtype)
        return {
            "loc": loc,
            "log_diagonal": torch.full_like(loc, math.log(self.init_scale)),
            "factor": (0.1 * self.init_scale * noise).to(loc.device),
            "local": local,
        }

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw all sites."""
        generator = _generator(rng)
        loc, factor, diagonal = params["loc"], params["factor"], params["log_diagonal"].exp()
        noise = _standard_normal(loc, n, generator)
        shared = _standard_normal(factor[0], n, generator) if len(loc) else noise
        centred = noise * diagonal + (shared @ factor.T if len(loc) else 0.0)
        log_base = self._log_base(params, loc + centred)
        return self._sample(params, model, batch, n, loc + centred, log_base, generator)

    def _log_base(self, params: Params, free: Tensor) -> Tensor:
        loc, factor, diagonal = params["loc"], params["factor"], params["log_diagonal"].exp()
        if not len(loc):
            return free.new_zeros(len(free))
        law = torch.distributions.LowRankMultivariateNormal(
            loc, factor, diagonal.square(), validate_args=False
        )
        return law.log_prob(free)

    def marginals(self, params: Params, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return the law of each site."""
        variance = params["factor"].square().sum(1) + (2 * params["log_diagonal"]).exp()
        return self._marginals(params, model, data, variance)


@storable
@dataclass(frozen=True)
class Fixed(Guide):
    """A guide with given parameters, for example those of an earlier fit, used as a proposal.

    Args:
        guide: The family.
        params: Its parameters.

    Example:
        >>> Fixed(MeanField(), {"mu": {}}).guide
        MeanField(init_scale=0.1)
    """

    guide: Guide
    params: Any

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Return the given parameters."""
        return self.params

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw from the family at the given parameters."""
        return self.guide.sample(params, model, batch, n, rng=rng)

"""Predictive distributions: the one thing that decisions see of a posterior.

Three final forms share one interface: :class:`Analytic` wraps a distribution, :class:`Mixture` a
weighted family of them, :class:`Empirical` weighted draws. Values have the shape [*obs] of the
predicted quantity; nothing is squeezed or padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit import distributions as D
from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.numerics import log_softmax_weights
from probkit.rng import Rng, draw_count, require_rng, scope, stream
from probkit.tree import map_tensors

if TYPE_CHECKING:
    from probkit.posterior import Posterior

__all__ = ["Analytic", "Empirical", "Mixture", "Predictive"]


class Predictive(Protocol):
    """A distribution of the predicted quantity, of shape [*obs].

    ``mean``, ``variance``, ``quantile`` and ``cdf`` are those of each entry. ``log_prob`` is that
    of each entry, or one number where the predictive is joint over some dims.
    """

    @property
    def mean(self) -> Tensor:
        """Mean [*obs]."""
        ...

    @property
    def variance(self) -> Tensor:
        """Variance [*obs]; inf where it does not exist."""
        ...

    @property
    def probs(self) -> Tensor:
        """Class probabilities [*obs, class] of a categorical predictive."""
        ...

    def quantile(self, q: Tensor | float | Sequence[float]) -> Tensor:
        """Quantiles [*q, *obs] at the levels ``q`` in (0, 1)."""
        ...

    def cdf(self, y: Tensor | float) -> Tensor:
        """P(Y <= y) for each entry; ``y`` broadcasts against [*obs]."""
        ...

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density or log probability of ``y``."""
        ...

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """Draw [n, *obs]."""
        ...


def _levels(q: Tensor | float | Sequence[float], like: Tensor) -> Tensor:
    levels = torch.as_tensor(q, dtype=like.dtype, device=like.device)
    if not bool(((levels > 0) & (levels < 1)).all()):
        raise DataError(
            f"quantile: expected levels strictly between 0 and 1, got {levels.tolist()}"
        )
    return levels


def _linear_quantile(ordered: Tensor, levels: Tensor) -> Tensor:
    """Quantiles [level, entry] of sorted draws [draw, entry]; torch.quantile has a size limit."""
    place = levels * (len(ordered) - 1)
    below = place.floor().long()
    above = (below + 1).clamp_max(len(ordered) - 1)
    return torch.lerp(ordered[below], ordered[above], (place - below)[:, None])


def _no_probs() -> CapabilityError:
    return CapabilityError("probs exist for categorical predictives only; use cdf or log_prob here")


@dataclass(frozen=True)
class Analytic:
    """A predictive in closed form.

    Attributes:
        dist: Its distribution; batch_shape + event_shape = [*obs]. Event dims are joint.
        dims: Names of the dims of [*obs], where known.
        coords: Labels along them.

    Example:
        >>> p = Analytic(torch.distributions.Normal(torch.zeros(2), torch.ones(2)))
        >>> p.quantile([0.5, 0.975])[0]
        tensor([0., 0.])
    """

    dist: Distribution
    dims: tuple[str, ...] = ()
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """Mean [*obs]."""
        return self.dist.mean

    @property
    def variance(self) -> Tensor:
        """Variance [*obs]."""
        return self.dist.variance

    @property
    def probs(self) -> Tensor:
        """Class probabilities [*obs, class]."""
        probs = getattr(self.dist, "probs", None)
        if probs is None:
            raise _no_probs()
        return torch.as_tensor(probs)

    def quantile(self, q: Tensor | float | Sequence[float]) -> Tensor:
        """Quantiles [*q, *obs] of each entry."""
        marginal = D.marginals(self.dist)
        levels = _levels(q, _sample_like(marginal))
        return D.icdf(marginal, levels.reshape(levels.shape + (1,) * len(marginal.batch_shape)))

    def cdf(self, y: Tensor | float) -> Tensor:
        """P(Y <= y) of each entry."""
        marginal = D.marginals(self.dist)
        return D.cdf(marginal, _values_of(y, _sample_like(marginal)))

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density [*batch_shape] of the distribution."""
        obs = self.dist.batch_shape + self.dist.event_shape
        return self.dist.log_prob(_fitting(_values_of(y, _sample_like(self.dist)), obs))

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """Draw [n, *obs]."""
        with scope(rng=rng):
            return self.dist.sample(torch.Size([draw_count(n)]))


@dataclass(frozen=True)
class Mixture:
    """A weighted mixture of one distribution family.

    Attributes:
        dist: Components along the LEADING dim of the batch shape: [component, *obs].
        log_weights: [component] log weights, or [component, *obs] where each entry of the batch
            shape is a mixture of its own, independent of the others.
        dims: Names of the dims of [*obs], where known.
        coords: Labels along them.
    """

    dist: Distribution
    log_weights: Tensor
    dims: tuple[str, ...] = ()
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        batch = self.dist.batch_shape
        if self.log_weights.ndim < 1 or self.log_weights.shape not in (batch[:1], batch):
            raise ShapeError(
                "Mixture: expected components [component, *obs] and log_weights [component] or "
                f"[component, *obs], got batch_shape {tuple(batch)} and "
                f"{tuple(self.log_weights.shape)}"
            )
        object.__setattr__(self, "log_weights", log_softmax_weights(self.log_weights, dim=0))

    @property
    def mean(self) -> Tensor:
        """Mean [*obs]."""
        return D.mixture_mean(self.dist, self.log_weights)

    @property
    def variance(self) -> Tensor:
        """Variance [*obs]."""
        return D.mixture_variance(self.dist, self.log_weights)

    @property
    def probs(self) -> Tensor:
        """Class probabilities [*obs, class], averaged over components."""
        probs = getattr(self.dist, "probs", None)
        if probs is None:
            raise _no_probs()
        if self.log_weights.ndim == 1:
            return torch.tensordot(self.log_weights.exp(), probs, dims=1)
        return (self.log_weights.exp()[..., None] * probs).sum(0)

    def quantile(self, q: Tensor | float | Sequence[float]) -> Tensor:
        """Quantiles [*q, *obs] of each entry."""
        marginal = D.marginals(self.dist)
        levels = _levels(q, _sample_like(marginal))
        entries = len(marginal.batch_shape) - 1
        return D.mixture_icdf(
            marginal, self.log_weights, levels.reshape(levels.shape + (1,) * entries)
        )

    def cdf(self, y: Tensor | float) -> Tensor:
        """P(Y <= y) of each entry."""
        marginal = D.marginals(self.dist)
        return D.mixture_cdf(marginal, self.log_weights, _values_of(y, self.log_weights))

    def log_prob(self, y: Tensor) -> Tensor:
        """Log density of the mixture."""
        obs = self.dist.batch_shape[1:] + self.dist.event_shape
        value = _fitting(_values_of(y, _sample_like(self.dist)), obs)
        return D.mixture_log_prob(self.dist, self.log_weights, value)

    def sample(self, n: int, *, rng: Rng) -> Tensor:
        """Draw [n, *obs]; under one set of weights the entries of a draw share their component."""
        seed = stream(rng, "component", device=self.log_weights.device)
        count, obs = draw_count(n), self.log_weights.shape[1:]
        weights = self.log_weights.exp().flatten(1).T if obs else self.log_weights.exp()
        index = torch.multinomial(weights, count, replacement=True, generator=seed)
        components = self.dist
        if obs:  # one index a draw and entry, into the components of all entries
            entries = torch.arange(obs.numel(), device=index.device)
            index = (index.T * obs.numel() + entries).flatten()
            components = D.flatten_batch(self.dist, len(self.dist.batch_shape))
        with scope(rng=stream(seed, "value", device=self.log_weights.device)):
            drawn = D.select(components, index).sample()
        return drawn.reshape(count, *obs, *drawn.shape[1:]) if obs else drawn


@dataclass(frozen=True)
class Empirical:
    """Weighted draws of the predicted quantity.

    Attributes:
        values: [draw, *obs], a tensor, or a sequence of any objects.
        log_weights: [draw] log weights; None for equal ones.
        dims: Names of the dims of [*obs], where known.
        coords: Labels along them.
    """

    values: Tensor | Sequence[Any]
    log_weights: Tensor | None = None
    dims: tuple[str, ...] = ()
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.values) == 0:
            raise ShapeError("Empirical: expected at least one draw [draw, ...], got none")
        if self.log_weights is not None and self.log_weights.shape != (len(self.values),):
            raise ShapeError(
                f"Empirical: expected log_weights [draw={len(self.values)}], "
                f"got {tuple(self.log_weights.shape)}"
            )

    def _tensor(self) -> Tensor:
        if not isinstance(self.values, Tensor):
            raise CapabilityError("this predictive holds objects, not numbers; use sample")
        values = self.values
        return values if values.is_floating_point() else values.to(torch.get_default_dtype())

    @property
    def weights(self) -> Tensor:
        """Normalised weights [draw]."""
        if self.log_weights is None:
            n = len(self.values)
            like = self.values if isinstance(self.values, Tensor) else torch.ones(())
            return torch.full((n,), 1.0 / n, dtype=torch.float64, device=like.device)
        return torch.softmax(self.log_weights, dim=0)

    @property
    def mean(self) -> Tensor:
        """Weighted mean [*obs]."""
        values = self._tensor()
        return torch.tensordot(self.weights.to(values.dtype), values, dims=1)

    @property
    def variance(self) -> Tensor:
        """Weighted variance [*obs], without a small-sample correction."""
        values = self._tensor()
        deviation = values - self.mean
        return torch.tensordot(self.weights.to(values.dtype), deviation.square(), dims=1)

    @property
    def probs(self) -> Tensor:
        """Weighted frequencies [*obs, class] of integer values 0, 1, ..., maximum."""
        if not isinstance(self.values, Tensor) or self.values.is_floating_point():
            raise _no_probs()
        onehot = torch.nn.functional.one_hot(self.values.long()).to(self.weights.dtype)
        return torch.tensordot(self.weights, onehot, dims=1)

    def quantile(self, q: Tensor | float | Sequence[float]) -> Tensor:
        """Quantiles [*q, *obs] of each entry.

        Equal weights: the usual linear rule (Hyndman and Fan 1996, type 7). Other weights: the
        smallest draw whose weighted empirical cdf reaches the level; nothing is interpolated, so
        that a draw of negligible weight does not matter, wherever it lies.
        """
        values = self._tensor()
        levels = _levels(q, values)
        flat = values.reshape(len(values), -1)
        ordered, order = flat.sort(dim=0)
        if self.log_weights is None:
            result = _linear_quantile(ordered, levels.flatten())
        else:
            share = self.weights.to(values.dtype)[order].cumsum(0).T.contiguous()
            wanted = levels.flatten().expand(len(share), -1).contiguous()
            position = torch.searchsorted(share, wanted).clamp_max(len(values) - 1)
            result = ordered.gather(0, position.T)
        return result.reshape(levels.shape + values.shape[1:])

    def cdf(self, y: Tensor | float) -> Tensor:
        """Weighted share of draws at or below ``y``."""
        values = self._tensor()
        below = (values <= _values_of(y, values)).to(values.dtype)
        return torch.tensordot(self.weights.to(values.dtype), below, dims=1)

    def log_prob(self, y: Tensor) -> Tensor:
        """Log frequency of ``y`` (integers); draws of real numbers have no density."""
        if not isinstance(self.values, Tensor) or self.values.is_floating_point():
            raise CapabilityError(
                "draws of real numbers have no density; use cdf or quantile, or a model whose "
                "predictive is Analytic or Mixture"
            )
        equal = (self.values == _values_of(y, self.weights)).to(self.weights.dtype)
        return torch.tensordot(self.weights, equal, dims=1).log()

    def sample(self, n: int, *, rng: Rng) -> Any:
        """Draw ``n`` of the values with replacement."""
        generator = stream(rng, "empirical")
        weights = self.weights.cpu()
        index = torch.multinomial(weights, draw_count(n), replacement=True, generator=generator)
        if isinstance(self.values, Tensor):
            return self.values[index.to(self.values.device)]
        return [self.values[i] for i in index.tolist()]


def _sample_like(dist: Distribution) -> Tensor:
    """A tensor with the dtype and device of the distribution's parameters, at any depth."""
    while isinstance(dist, D.FiniteMixture | D.IndependentBlocks):
        dist = dist.components if isinstance(dist, D.FiniteMixture) else dist.parts[0]
    for name in dist.arg_constraints:
        value = dist.__dict__.get(name, getattr(dist, name, None))
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    return torch.zeros((), dtype=torch.get_default_dtype())


def _values_of(y: Any, like: Tensor) -> Tensor:
    """Read observed values, arrays and frames included, in the precision of the predictive."""
    value = as_tensor(y, name="y").to(like.device)
    return value.to(like.dtype) if value.is_floating_point() else value


def _fitting(value: Tensor, obs: torch.Size) -> Tensor:
    """Refuse values that would broadcast the predicted dims: [row, 1] against [row], say."""
    shape = tuple(value.shape)
    lead = max(0, len(shape) - len(obs))
    if lead:
        fits = shape[lead:] == tuple(obs)
    else:
        padded = (1,) * (len(obs) - len(shape)) + shape
        fits = all(size in (1, wanted) for size, wanted in zip(padded, obs, strict=True))
    if not fits:
        raise ShapeError(f"log_prob: expected y [*, *obs] with obs = {tuple(obs)}, got {shape}")
    return value


def predict_by_simulation(
    model: Any,
    post: Posterior,
    x: Any,
    *,
    site: str | None,
    groups: Mapping[str, Sequence[Any]] | None,
    rng: Rng | None,
    draws: int = 1000,
) -> Empirical:
    """Predict with any Generative model: simulate one data set per posterior draw.

    Raises:
        CapabilityError: The model cannot simulate, or ``site`` or ``groups`` were asked for.
    """
    if not callable(getattr(model, "simulate", None)):
        raise CapabilityError(
            f"predict needs simulate (or a predict of its own); {type(model).__name__} lacks it"
        )
    if site is not None or groups is not None:
        what = "site=" if site is not None else "groups="
        raise CapabilityError(f"{type(model).__name__}.predict has no {what}; leave it out")
    root = seed_stream(rng)
    values = post.sample(draws, rng=stream(root, "values"))
    simulated = model.simulate(values, x, rng=stream(root, "noise"))
    if isinstance(simulated, Mapping) and len(simulated) == 1:
        simulated = next(iter(simulated.values()))
    return Empirical(map_tensors(lambda t: t, simulated))


def seed_stream(rng: Rng | None) -> torch.Generator:
    """Return a generator for a prediction, asking for ``rng`` when there is none."""
    return stream(require_rng(rng, "this prediction"), "predict")

"""Finite mixtures whose components lie along the leading dim of the batch shape."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.distributions._roots import chandrupatla, implicit_derivative, interior
from probkit.distributions.quantiles import (
    cdf,
    icdf,
    require_probability,
    require_univariate,
    support_bounds,
)
from probkit.errors import ShapeError

__all__ = [
    "mixture_cdf",
    "mixture_icdf",
    "mixture_log_prob",
    "mixture_mean",
    "mixture_variance",
]


def _split(components: Distribution) -> tuple[int, int]:
    """Numbers of dims after the component dim: all of them, and the event dims among them."""
    if len(components.batch_shape) == 0:
        raise ShapeError("expected components with batch shape [component, *obs], got none")
    event = len(components.event_shape)
    return len(components.batch_shape) - 1 + event, event


def _aligned(log_weights: Tensor, rank: int) -> Tensor:
    """Weights [component] or [component, *obs] with ``rank`` dims after the component dim."""
    missing = rank + 1 - log_weights.ndim
    if missing < 0:
        raise ShapeError(
            f"expected log weights [component, *obs] with at most {rank + 1} dims, got "
            f"{tuple(log_weights.shape)}"
        )
    normal = log_weights - torch.logsumexp(log_weights, 0)
    return normal.reshape(normal.shape + (1,) * missing)


def mixture_log_prob(components: Distribution, log_weights: Tensor, value: Tensor) -> Tensor:
    """Log density of a mixture whose components lie along the leading batch dimension.

    Args:
        components: A distribution with batch shape [component, *obs] and event shape [*event].
        log_weights: Log weights [component] or [component, *obs]; normalised here.
        value: Points [*sample, *obs, *event].

    Returns:
        Log densities [*sample, *obs].

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> two = td.Normal(torch.tensor([-1.0, 1.0]), 1.0)
        >>> x = mixture_log_prob(two, torch.zeros(2), torch.tensor(0.0))
        >>> bool(torch.isclose(x, two.log_prob(torch.tensor(0.0))[0]))
        True
    """
    rank, event = _split(components)
    log_prob = components.log_prob(value.unsqueeze(value.ndim - rank))
    return torch.logsumexp(log_prob + _aligned(log_weights, rank - event), -(rank - event) - 1)


def mixture_cdf(components: Distribution, log_weights: Tensor, value: Tensor) -> Tensor:
    """Distribution function of a mixture of one-dimensional laws.

    Args:
        components: A distribution with batch shape [component, *obs] and no event dimensions.
        log_weights: Log weights [component] or [component, *obs]; normalised here.
        value: Points [*sample, *obs].

    Returns:
        Probabilities [*sample, *obs].

    Raises:
        CapabilityError: the components have event dimensions or no distribution function.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> two = td.Normal(torch.tensor([-1.0, 1.0]), 1.0)
        >>> mixture_cdf(two, torch.zeros(2), torch.tensor(0.0)).item()
        0.5
    """
    require_univariate(components, "cdf")
    rank, _ = _split(components)
    value = value.expand(torch.broadcast_shapes(value.shape, components.batch_shape[1:]))
    probability = cdf(components, value.unsqueeze(value.ndim - rank))
    return (_aligned(log_weights, rank).exp() * probability).sum(-rank - 1)


def mixture_icdf(components: Distribution, log_weights: Tensor, q: Tensor) -> Tensor:
    """Quantile function of a mixture of one-dimensional laws.

    The extreme quantiles of the components bracket the mixture's one; the root is found by
    :func:`find_quantile`.

    Args:
        components: A distribution with batch shape [component, *obs] and no event dimensions.
        log_weights: Log weights [component] or [component, *obs]; normalised here.
        q: Probabilities [*sample, *obs], broadcast with [*obs].

    Returns:
        Quantiles [*sample, *obs].

    Raises:
        DataError: ``q`` lies outside [0, 1].
        CapabilityError: the components have event dimensions or no distribution function.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> two = td.Normal(torch.tensor([-1.0, 1.0]).double(), 1.0)
        >>> round(mixture_icdf(two, torch.zeros(2).double(), torch.tensor(0.5).double()).item(), 9)
        0.0
    """
    require_univariate(components, "icdf")
    require_probability(q)
    rank, _ = _split(components)
    obs = components.batch_shape[1:]
    target = q.expand(torch.broadcast_shapes(q.shape, obs))
    with torch.no_grad():
        inner = interior(target)
        parts = icdf(components, inner.unsqueeze(target.ndim - rank))
        # The quantile lies between the extreme ones of the components that have weight.
        weight = _aligned(log_weights, rank).exp().expand(parts.shape)
        low = torch.where(weight > 0, parts, torch.inf).amin(-rank - 1)
        high = torch.where(weight > 0, parts, -torch.inf).amax(-rank - 1)

        def excess(x: Tensor) -> Tensor:
            return mixture_cdf(components, log_weights, x) - inner

        root = chandrupatla(excess, *_narrow(excess, low, high, parts, weight, -rank - 1))
    result = root
    if torch.is_grad_enabled():
        residual = mixture_cdf(components, log_weights, root) - target
        if residual.requires_grad:
            density = mixture_log_prob(components, log_weights, root).detach().exp()
            result = implicit_derivative(root, residual, density)
    if bool(((target > 0) & (target < 1)).all()):
        return result
    first, last = _mixture_ends(components, root)
    return torch.where(target <= 0, first, torch.where(target >= 1, last, result))


def _narrow(
    excess: Callable[[Tensor], Tensor],
    low: Tensor,
    high: Tensor,
    parts: Tensor,
    weight: Tensor,
    dim: int,
) -> tuple[Tensor, Tensor]:
    """Shrink the bracket [low, high] around the weighted mean of the components' quantiles.

    Far components with little weight make it many orders of magnitude wider than the answer.
    """
    slack = 4 * torch.finfo(low.dtype).eps
    low, high = low - slack * low.abs(), high + slack * high.abs()
    used = torch.where(weight > 0, parts, 0.0)
    centre = torch.clamp((weight * used).sum(dim), low, high)
    reach = (weight * (used - centre.unsqueeze(dim)).abs()).sum(dim) + slack * centre.abs()
    a, b = centre - reach, centre + reach
    for _ in range(64):
        a, b = torch.maximum(a, low), torch.minimum(b, high)
        grow_a, grow_b = (excess(a) > 0) & (a > low), (excess(b) < 0) & (b < high)
        if not bool((grow_a | grow_b).any()):
            return a, b
        reach = 8 * reach
        a, b = torch.where(grow_a, centre - reach, a), torch.where(grow_b, centre + reach, b)
    return low, high


def _mixture_ends(components: Distribution, like: Tensor) -> tuple[Tensor, Tensor]:
    lower, upper = (torch.as_tensor(e, dtype=like.dtype) for e in support_bounds(components))
    first = lower.amin(0) if lower.ndim else lower
    last = upper.amax(0) if upper.ndim else upper
    return first.to(like.device).expand(like.shape), last.to(like.device).expand(like.shape)


def _weighted_sum(weight: Tensor, term: Tensor) -> Tensor:
    """Sum over components; a term without weight counts zero even when it is infinite."""
    return torch.where(weight > 0, weight * term, 0.0).sum(0)


def mixture_mean(components: Distribution, log_weights: Tensor) -> Tensor:
    """Mean of a mixture, of shape [*obs, *event].

    Args:
        components: A distribution with batch shape [component, *obs] and event shape [*event].
        log_weights: Log weights [component] or [component, *obs]; normalised here.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> mixture_mean(td.Normal(torch.tensor([0.0, 4.0]), 1.0), torch.zeros(2)).item()
        2.0
    """
    weight = _event_weights(components, log_weights)
    return _weighted_sum(weight, components.mean)


def mixture_variance(components: Distribution, log_weights: Tensor) -> Tensor:
    """Variance of a mixture, elementwise, of shape [*obs, *event].

    Args:
        components: A distribution with batch shape [component, *obs] and event shape [*event].
        log_weights: Log weights [component] or [component, *obs]; normalised here.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> mixture_variance(td.Normal(torch.tensor([0.0, 4.0]), 1.0), torch.zeros(2)).item()
        5.0
    """
    weight = _event_weights(components, log_weights)
    mean = components.mean
    centre = _weighted_sum(weight, mean)
    return _weighted_sum(weight, components.variance + (mean - centre).square())


def _event_weights(components: Distribution, log_weights: Tensor) -> Tensor:
    rank, event = _split(components)
    weight = _aligned(log_weights, rank - event).exp()
    return weight.reshape(weight.shape + (1,) * event)

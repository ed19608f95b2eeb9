"""Laws made of laws: finite mixtures as one distribution, and independent blocks of entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit.distributions.mixture import (
    mixture_cdf,
    mixture_icdf,
    mixture_log_prob,
    mixture_mean,
    mixture_variance,
)
from probkit.distributions.parameters import constructor_arguments, map_batch, select
from probkit.distributions.quantiles import cdf, icdf, marginals
from probkit.errors import CapabilityError, ShapeError

__all__ = ["FiniteMixture", "IndependentBlocks"]


class FiniteMixture(TorchDistribution):
    """A mixture whose components lie along the leading batch dim, as one distribution.

    Unlike torch's ``MixtureSameFamily`` its weights may differ between batch elements, and its
    components may be joint laws, whose entries then share their component.

    Args:
        components: A law with batch shape [component, *batch].
        log_weights: [component, *batch], or with batch dims of size 1; normalised here.

    Raises:
        ShapeError: The shapes do not fit.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> two = td.Normal(torch.tensor([-1.0, 1.0]), 1.0)
        >>> FiniteMixture(two, torch.zeros(2)).mean
        tensor(0.)
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(
        self, components: Distribution, log_weights: Tensor, validate_args: bool | None = None
    ) -> None:
        full = components.batch_shape
        try:
            weights = log_weights.expand(full)
        except RuntimeError:
            raise ShapeError(
                f"FiniteMixture: expected log_weights [component, *batch] = {tuple(full)}, got "
                f"{tuple(log_weights.shape)}"
            ) from None
        self.components = components
        self.log_weights = weights - torch.logsumexp(weights, 0)
        super().__init__(full[1:], components.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """Support of the components."""
        return self.components.support

    @property
    def mean(self) -> Tensor:
        """Mean [*batch, *event]."""
        return mixture_mean(self.components, self.log_weights)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry [*batch, *event]."""
        return mixture_variance(self.components, self.log_weights)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density [*sample, *batch] at ``value`` [*sample, *batch, *event]."""
        return mixture_log_prob(self.components, self.log_weights, value)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function, where there are no event dims."""
        return mixture_cdf(self.components, self.log_weights, value)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile function, where there are no event dims."""
        return mixture_icdf(self.components, self.log_weights, value)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, *event] from the global stream: a component, then a value."""
        shape, batch = torch.Size(sample_shape), self.batch_shape
        with torch.no_grad():
            weights = self.log_weights.exp().reshape(len(self.log_weights), -1)
            count = shape.numel()
            if count == 0 or batch.numel() == 0:
                return self.log_weights.new_zeros(self._extended_shape(shape))
            index = torch.multinomial(weights.mT, count, replacement=True).mT  # [count, batch]
            values = _pick(self.components, index).sample()
        return values.reshape(self._extended_shape(shape))

    def select_batch(self, index: Tensor | int) -> FiniteMixture:
        """Index the leading batch dim (after that of the components)."""
        components = map_batch(self.components, lambda value: value[:, index])
        return FiniteMixture(components, self.log_weights[:, index])


def _pick(components: Distribution, index: Tensor) -> Distribution:
    """Take component ``index`` [draw, element] of each batch element, flattened."""
    batch = components.batch_shape
    elements = torch.arange(index.shape[1], device=index.device)
    picked: dict[str, Any] = {}
    for name, value in constructor_arguments(components).items():
        own = value.ndim - len(batch)
        event = value.shape[len(batch) :] if own > 0 else torch.Size()
        first = value.shape[:1]
        flat = value.expand(first + batch[1:] + event).reshape(*first, -1, *event)
        # A parameter that all components share is broadcast over the draws, not copied.
        picked[name] = flat if len(flat) == 1 else flat[index, elements]
    return type(components)(**picked, validate_args=False)


@marginals.register(FiniteMixture)
def _marginals_of_mixture(dist: FiniteMixture) -> Distribution:
    if len(dist.event_shape) == 0:
        return dist
    weights = dist.log_weights.reshape(dist.log_weights.shape + (1,) * len(dist.event_shape))
    return FiniteMixture(marginals(dist.components), weights)


class IndependentBlocks(TorchDistribution):
    """Independent laws, each of some positions along one dim.

    Args:
        parts: Laws of equal batch shape, but for the positions where they have no event dims.
            Either none of them has event dims, or all are joint over their entries; the whole is
            then joint, too.
        positions: For each part its positions [k] along ``axis``; together 0, 1, ....
        axis: The dim of the value, counted from the end.
        stacked: Whether ``axis`` is a new dim: each part is the law of ONE position, without it.

    Raises:
        ShapeError: There are no parts, or the positions do not add up.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> parts = [td.Normal(torch.zeros(2), 1.0), td.StudentT(torch.full((1,), 5.0))]
        >>> law = IndependentBlocks(parts, [torch.tensor([0, 2]), torch.tensor([1])], axis=-1)
        >>> law.variance
        tensor([1.0000, 1.6667, 1.0000])
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real

    def __init__(
        self,
        parts: Sequence[Distribution],
        positions: Sequence[Tensor],
        *,
        axis: int,
        stacked: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        order = torch.cat([torch.as_tensor(p) for p in positions]) if positions else None
        if order is None or not bool((order.sort().values == torch.arange(len(order))).all()):
            raise ShapeError(
                "IndependentBlocks: expected positions that are together 0, 1, ..., each once, "
                f"got {None if order is None else order.tolist()}"
            )
        self.parts, self.positions = tuple(parts), tuple(positions)
        self.axis, self.stacked = axis, stacked
        self._inverse = order.argsort()
        first = self.parts[0]
        shape = list(first.batch_shape + first.event_shape)
        if stacked:
            shape.insert(len(shape) + 1 + axis, len(order))
        else:
            shape[axis] = len(order)
        joint = len(first.event_shape) > 0
        lead = len(first.batch_shape) if joint else len(shape)
        super().__init__(torch.Size(shape[:lead]), torch.Size(shape[lead:]), validate_args=False)

    @property
    def is_joint(self) -> bool:
        """Whether the parts, and so the whole, have event dims."""
        return len(self.event_shape) > 0

    def _join(self, values: Sequence[Tensor]) -> Tensor:
        if self.stacked:
            values = [value.unsqueeze(self.axis) for value in values]
        inverse = self._inverse.to(values[0].device)
        return torch.cat(list(values), self.axis).index_select(self.axis, inverse)

    def _split(self, value: Tensor) -> list[Tensor]:
        pieces = [value.index_select(self.axis, p.to(value.device)) for p in self.positions]
        return [piece.squeeze(self.axis) for piece in pieces] if self.stacked else pieces

    def _wide(self, value: Tensor) -> Tensor:
        full = self.batch_shape + self.event_shape
        return value.expand(torch.broadcast_shapes(value.shape, full))

    @property
    def mean(self) -> Tensor:
        """Mean of each entry."""
        return self._join([part.mean for part in self.parts])

    @property
    def variance(self) -> Tensor:
        """Variance of each entry."""
        return self._join([part.variance for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density [*sample, *batch]: of each entry, or of all where the parts are joint."""
        pieces = self._split(self._wide(value))
        terms = [p.log_prob(v) for p, v in zip(self.parts, pieces, strict=True)]
        if not self.is_joint:
            return self._join(terms)
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def cdf(self, value: Tensor) -> Tensor:
        """Distribution function of each entry."""
        pieces = self._split(self._wide(value))
        return self._join([cdf(p, v) for p, v in zip(self.parts, pieces, strict=True)])

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile of each entry."""
        pieces = self._split(self._wide(value))
        return self._join([icdf(p, v) for p, v in zip(self.parts, pieces, strict=True)])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw [*sample, *batch, *event] from the global stream."""
        return self._join([part.sample(torch.Size(sample_shape)) for part in self.parts])

    def select_batch(self, index: Tensor | int) -> IndependentBlocks:
        """Index the leading batch dim."""
        return self._rebuilt([select(part, index) for part in self.parts])

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> IndependentBlocks:
        """Apply ``change`` to the leading batch dims of every part."""
        return self._rebuilt([map_batch(part, change) for part in self.parts])

    def part_at(self, position: int) -> Distribution:
        """Return the law of one position of a stacked dim.

        Raises:
            CapabilityError: The blocks are not stacked.
        """
        if not self.stacked:
            raise CapabilityError("part_at: expected blocks that are stacked along a dim of theirs")
        return next(
            part
            for part, where in zip(self.parts, self.positions, strict=True)
            if position in where.tolist()
        )

    def _rebuilt(self, parts: Sequence[Distribution]) -> IndependentBlocks:
        return IndependentBlocks(parts, self.positions, axis=self.axis, stacked=self.stacked)


@marginals.register(IndependentBlocks)
def _marginals_of_blocks(dist: IndependentBlocks) -> Distribution:
    if not dist.is_joint:
        return dist
    return dist._rebuilt([marginals(part) for part in dist.parts])

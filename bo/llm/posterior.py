"""A BoTorch posterior over a finite set of values for each point."""

from __future__ import annotations

from typing import Any

import torch
from botorch.posteriors.posterior import Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import IIDNormalSampler, SobolQMCNormalSampler
from torch import Tensor
from torch.quasirandom import SobolEngine

from probkit.errors import DataError, ShapeError

__all__ = ["DiscretePosterior"]


class DiscretePosterior(Posterior):
    """Discrete laws of q points and m outputs, independent of each other.

    Args:
        values: Values [*batch, q, m, value], in any order.
        probs: Their probabilities, of the same shape; zeros fill up.

    Raises:
        ShapeError: The shapes differ.
        DataError: Probabilities that are negative or do not sum to one.

    Example:
        >>> post = DiscretePosterior(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[0.25, 0.75]]]))
        >>> post.mean.item(), post.variance.item()
        (0.75, 0.1875)
    """

    def __init__(self, values: Tensor, probs: Tensor) -> None:
        if values.shape != probs.shape or values.ndim < 3:
            raise ShapeError(
                "DiscretePosterior: expected values and probs [*batch, q, m, value], got "
                f"{tuple(values.shape)} and {tuple(probs.shape)}"
            )
        total = probs.sum(-1)
        if not bool((probs >= 0).all()) or not bool(((total - 1).abs() < 1e-6).all()):
            raise DataError("DiscretePosterior: expected probabilities >= 0 that sum to 1")
        self.values, order = values.sort(-1)
        self.probs = probs.gather(-1, order)

    @property
    def device(self) -> torch.device:
        """Device of the values."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.values.dtype

    @property
    def mean(self) -> Tensor:
        """Mean [*batch, q, m]."""
        return (self.probs * self.values).sum(-1)

    @property
    def variance(self) -> Tensor:
        """Variance [*batch, q, m]."""
        return (self.probs * (self.values - self.mean[..., None]).square()).sum(-1)

    @property
    def batch_shape(self) -> torch.Size:
        """The t-batch."""
        return self.values.shape[:-3]

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return sample_shape + self.values.shape[:-1]

    @property
    def base_sample_shape(self) -> torch.Size:
        """Shape [*batch, q, m] of the normals behind one draw."""
        return self.values.shape[:-1]

    @property
    def batch_range(self) -> tuple[int, int]:
        """Dims of ``base_sample_shape`` along which base samples are shared."""
        return (0, -2)

    def quantile(self, value: Tensor) -> Tensor:
        """Smallest values with cumulative probability ``value`` or more, [*value, *batch, q, m]."""
        levels = value.reshape(*value.shape, *[1] * (self.values.ndim - 1))
        return self._invert(levels.expand(*value.shape, *self.values.shape[:-1]))

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Draw [*sample, *batch, q, m] from torch's global stream; there are no gradients."""
        shape = torch.Size([1]) if sample_shape is None else torch.Size(sample_shape)
        normals = torch.randn(shape + self.base_sample_shape, dtype=self.dtype, device=self.device)
        return self.rsample_from_base_samples(shape, normals)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Map normals [*sample, *batch, q, m] to draws by inverting the distribution function."""
        if base_samples.shape != sample_shape + self.base_sample_shape:
            raise ShapeError(
                "expected base samples [*sample, *batch, q, m] = "
                f"{tuple(sample_shape + self.base_sample_shape)}, got {tuple(base_samples.shape)}"
            )
        return self._invert(torch.special.ndtr(base_samples.detach().double()))

    def _invert(self, levels: Tensor) -> Tensor:
        """Quantiles at levels [*sample, *batch, q, m]."""
        cumulative = self.probs.double().cumsum(-1)
        lead = levels.ndim - (cumulative.ndim - 1)
        laid = levels.movedim(tuple(range(lead)), tuple(range(-lead, 0))) if lead else levels
        flat = laid.reshape(*cumulative.shape[:-1], -1).double().contiguous()
        # Rounding may leave the last sum below one; the last value with weight takes the rest.
        last = (self.probs > 0).cumsum(-1).argmax(-1, keepdim=True)
        index = torch.searchsorted(cumulative, flat).minimum(last)
        drawn = self.values.gather(-1, index).reshape(laid.shape)
        return drawn.movedim(tuple(range(-lead, 0)), tuple(range(lead))) if lead else drawn


@GetSampler.register(DiscretePosterior)
def _get_sampler(
    posterior: DiscretePosterior, sample_shape: torch.Size, *, seed: int | None = None, **_: Any
) -> MCSampler:
    """Sobol base samples, or independent ones where there are too many dims for Sobol."""
    dims = posterior.base_sample_shape[-2:].numel()
    kind = SobolQMCNormalSampler if dims <= SobolEngine.MAXDIM else IIDNormalSampler
    return kind(sample_shape=sample_shape, seed=seed)

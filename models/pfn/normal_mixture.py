"""Mixtures of multivariate normals, the priors and posteriors of the Distribution Transformer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import register
from probkit.models.pfn.bars import Shape

__all__ = ["NormalMixture"]


class NormalMixture(Distribution):
    """Finite mixtures of multivariate normals.

    Args:
        logits: [*batch, component] log weights, up to a constant.
        loc: [*batch, component, coordinate] means.
        scale_tril: [*batch, component, coordinate, coordinate] lower factors.

    Raises:
        ShapeError: The shapes do not match.

    Example:
        >>> law = NormalMixture.univariate([0.3, 0.7], [-1.0, 1.0], [0.5, 0.2])
        >>> law.mean
        tensor([0.4000])
    """

    arg_constraints = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale_tril": constraints.independent(constraints.lower_cholesky, 1),
    }
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        scale_tril: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        d = loc.shape[-1]
        if loc.shape[:-1] != logits.shape or scale_tril.shape != (*loc.shape, d):
            raise ShapeError(
                "NormalMixture: expected logits [*batch, component], loc [*batch, component, "
                "coordinate] and scale_tril [*batch, component, coordinate, coordinate], got "
                f"{tuple(logits.shape)}, {tuple(loc.shape)} and {tuple(scale_tril.shape)}"
            )
        self.logits, self.loc, self.scale_tril = logits, loc, scale_tril
        super().__init__(logits.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    @classmethod
    def univariate(cls, weights: Any, means: Any, scales: Any) -> NormalMixture:
        """Return a mixture of normals on the line from three sequences of numbers [component].

        Raises:
            DataError: A weight or a scale is not positive.
        """
        weights, means, scales = (
            torch.as_tensor(part, dtype=torch.get_default_dtype())
            for part in (weights, means, scales)
        )
        if not bool((weights > 0).all()) or not bool((scales > 0).all()):
            raise DataError("NormalMixture: expected positive weights and scales")
        return cls(weights.log(), means.unsqueeze(-1), scales[..., None, None])

    @classmethod
    def fitted(cls, sample: Tensor, components: int, *, sweeps: int = 60) -> NormalMixture:
        """Fit a mixture on the line to a sample [draw] by EM from its quantiles.

        A way to hand any univariate prior to a network that takes mixtures.

        Args:
            sample: Draws of the prior, a few thousand.
            components: Number of components.
            sweeps: Steps of EM.
        """
        y = sample.flatten().double().sort().values
        parts = torch.tensor_split(y, components)
        loc = torch.stack([part.mean() for part in parts])
        var = torch.stack([part.var() for part in parts]).clamp_min(1e-8) + y.var() * 1e-3
        weight = torch.full((components,), 1 / components, dtype=y.dtype)
        for _ in range(sweeps):
            log_p = weight.log() - 0.5 * (var.log() + (y[:, None] - loc).square() / var)
            share = log_p.softmax(-1)
            total = share.sum(0).clamp_min(1e-12)
            weight = total / total.sum()
            loc = (share * y[:, None]).sum(0) / total
            var = (share * (y[:, None] - loc).square()).sum(0) / total + y.var() * 1e-6
        parts_ = (part.to(torch.float32) for part in (weight.clamp_min(1e-12), loc, var.sqrt()))
        return cls.univariate(*parts_)

    def expand(self, batch_shape: Shape, _instance: object = None) -> NormalMixture:
        """Return the law with more leading dims."""
        shape = torch.Size(batch_shape)
        k, d = self.loc.shape[-2:]
        return NormalMixture(
            self.logits.expand(*shape, k),
            self.loc.expand(*shape, k, d),
            self.scale_tril.expand(*shape, k, d, d),
            validate_args=False,
        )

    @property
    def log_weights(self) -> Tensor:
        """[*batch, component] logarithms of the weights."""
        return self.logits.log_softmax(-1)

    @property
    def weights(self) -> Tensor:
        """[*batch, component] weights."""
        return self.logits.softmax(-1)

    @property
    def mean(self) -> Tensor:
        """[*batch, coordinate] mean."""
        return (self.weights.unsqueeze(-1) * self.loc).sum(-2)

    @property
    def variance(self) -> Tensor:
        """[*batch, coordinate] variance."""
        within = self.scale_tril.square().sum(-1)
        between = (self.loc - self.mean.unsqueeze(-2)).square()
        return (self.weights.unsqueeze(-1) * (within + between)).sum(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density [*sample, *batch] at ``value`` [*sample, *batch, coordinate]."""
        d = self.loc.shape[-1]
        offset = (value.unsqueeze(-2) - self.loc).unsqueeze(-1)
        white = torch.linalg.solve_triangular(
            self.scale_tril.expand(*offset.shape[:-2], d, d), offset, upper=False
        )
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        each = -0.5 * white.square().sum((-2, -1)) - log_det - 0.5 * d * math.log(2 * math.pi)
        return (self.log_weights + each).logsumexp(-1)

    def cdf(self, value: Tensor) -> Tensor:
        """Return P(Y <= value) for a law on the line.

        Raises:
            CapabilityError: There are several coordinates.
        """
        if self.loc.shape[-1] != 1:
            raise CapabilityError("cdf: expected a law on the line (one coordinate)")
        z = (value - self.loc[..., 0]) / self.scale_tril[..., 0, 0]
        return (self.weights * torch.special.ndtr(z)).sum(-1, keepdim=True)

    def sample(self, sample_shape: Shape = torch.Size()) -> Tensor:  # noqa: B008
        """Draw [*sample, *batch, coordinate] from torch's global stream."""
        shape = torch.Size(sample_shape) + self.batch_shape
        k, d = self.loc.shape[-2:]
        weights = self.weights.expand(*shape, k).reshape(-1, k)
        pick = torch.multinomial(weights, 1).reshape(*shape, 1, 1)
        loc = self.loc.expand(*shape, k, d).gather(-2, pick.expand(*shape, 1, d)).squeeze(-2)
        root = self.scale_tril.expand(*shape, k, d, d)
        root = root.gather(-3, pick.unsqueeze(-1).expand(*shape, 1, d, d)).squeeze(-3)
        noise = torch.randn(*shape, d, 1, dtype=loc.dtype, device=loc.device)
        return loc + (root @ noise).squeeze(-1)


register(
    NormalMixture,
    "NormalMixture",
    lambda law: {"logits": law.logits, "loc": law.loc, "scale_tril": law.scale_tril},
    lambda tree: NormalMixture(**tree),
)

"""Surrogates with a joint normal posterior: exact conditioning, and with it looking ahead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior as BotorchPosterior
from botorch.sampling.base import MCSampler
from gpytorch.distributions import MultivariateNormal
from linear_operator import to_linear_operator
from torch import Tensor

from probkit.bo.surrogates.posterior_surrogate import PosteriorSurrogate
from probkit.errors import CapabilityError, ShapeError
from probkit.numerics import safe_cholesky
from probkit.rng import scope

__all__ = ["ConditionedGaussian", "GaussianSurrogate"]


class GaussianSurrogate(PosteriorSurrogate):
    """A surrogate whose predictions are jointly normal; as ``PosteriorSurrogate`` otherwise.

    A function with a joint normal law is a Gaussian process, whatever made it: conditioning on
    more data is linear algebra on its mean and covariance. So knowledge gradients and entropy
    searches work.
    """

    can_fantasize = True

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Any:
        """Return the surrogate given more data; ``X`` [*batch, new, feature].

        Args:
            X: Inputs.
            Y: Observations [*sample, *batch, new, 1], on the scale of the user's data.
            **kwargs: ``noise``: their variances; by default the noise of the model.
        """
        return ConditionedGaussian(self, X, Y, kwargs.get("noise"))

    def fantasize(self, X: Tensor, sampler: MCSampler, **kwargs: Any) -> Any:
        """Return the surrogate given outcomes drawn from itself at ``X`` [*batch, new, feature]."""
        return ConditionedGaussian.imagine(self, X, sampler)

    def _like(self, post: Any) -> GaussianSurrogate:
        model = super()._like(post)
        model.__class__ = GaussianSurrogate
        assert isinstance(model, GaussianSurrogate)
        return model


class ConditionedGaussian(Model):
    """A model with a joint normal posterior of one output, given more data.

    mean(x) + C(x, z) (C(z, z) + R)^-1 (y - mean(z)) and C(x, x) - C(x, z) (C(z, z) + R)^-1 C(z, x),
    with mean and C those of the model at points x and at the new inputs z.

    Args:
        model: The model before.
        X: New inputs [*batch, new, feature].
        Y: Observations [*sample, *batch, new, 1].
        noise: Their variances, broadcast against ``Y``; None takes the noise of the model.

    Raises:
        CapabilityError: The model has several outputs, or its posterior is not normal.
    """

    can_fantasize = True

    def __init__(self, model: Any, X: Tensor, Y: Tensor, noise: Tensor | None = None) -> None:
        super().__init__()
        if model.num_outputs != 1 or Y.shape[-1] != 1:
            raise CapabilityError(
                "conditioning on new observations: expected one output, got "
                f"{model.num_outputs}; take subset_output([k]) first"
            )
        if X.ndim < 2 or Y.ndim < X.ndim or Y.shape[-2] != X.shape[-2]:
            raise ShapeError(
                "expected X [*batch, new, feature] and Y [*sample, *batch, new, 1], got "
                f"{tuple(X.shape)} and {tuple(Y.shape)}"
            )
        self.inner, self.X, self.Y = model, X, Y
        self.noise = self._noise_at(X) if noise is None else noise.expand(Y.shape).squeeze(-1)

    def _noise_at(self, X: Tensor) -> Tensor:
        with torch.no_grad():
            noisy = self.inner.posterior(X, observation_noise=True).variance
            clean = self.inner.posterior(X).variance
        return (noisy - clean).squeeze(-1).clamp_min(0.0)

    @classmethod
    def imagine(cls, model: Any, X: Tensor, sampler: MCSampler) -> ConditionedGaussian:
        """Condition ``model`` on outcomes that it draws itself at ``X`` [*batch, new, feature]."""
        outcomes = sampler(model.posterior(X, observation_noise=True))
        return cls(model, X, outcomes)

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dims of the observations."""
        return self.Y.shape[:-2]

    def subset_output(self, idcs: Sequence[int]) -> ConditionedGaussian:
        """Return the model: there is only one output."""
        if list(idcs) not in ([0], [-1]):
            raise CapabilityError(f"subset_output: expected [0], the only output, got {list(idcs)}")
        return self

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **_: Any,
    ) -> BotorchPosterior:
        """Predict jointly at the q points of each t-batch ``X`` [*batch, q, feature]."""
        q, new = X.shape[-2], self.X.shape[-2]
        lead = torch.broadcast_shapes(X.shape[:-2], self.X.shape[:-2])
        points = torch.cat(
            [X.expand(*lead, *X.shape[-2:]), self.X.expand(*lead, *self.X.shape[-2:])], -2
        )
        law = self.inner.posterior(points)
        if not isinstance(law, GPyTorchPosterior):
            raise CapabilityError(
                f"conditioning is exact for normal posteriors, got {type(law).__name__}"
            )
        mean = law.distribution.mean
        covariance = law.distribution.covariance_matrix
        among, cross, seen = (
            covariance[..., :q, :q],
            covariance[..., :q, q:],
            covariance[..., q:, q:],
        )
        with scope(quiet=True):
            root, _jitter = safe_cholesky(
                seen + torch.diag_embed(self.noise.expand(*seen.shape[:-2], new)),
                unit=among.diagonal(dim1=-2, dim2=-1).mean(-1),
            )
        white = torch.linalg.solve_triangular(root, cross.mT, upper=False)
        surprise = (self.Y.squeeze(-1) - mean[..., q:]).unsqueeze(-1)
        scaled = torch.linalg.solve_triangular(root, surprise, upper=False)
        shifted = mean[..., :q] + (white.mT @ scaled).squeeze(-1)
        left = among - white.mT @ white
        if observation_noise is not False:
            extra = self.noise.mean() if observation_noise is True else observation_noise
            left = left + torch.diag_embed(extra.expand(left.shape[:-1]))
        left = left.expand(*shifted.shape[:-1], q, q)
        result = GPyTorchPosterior(MultivariateNormal(shifted, to_linear_operator(left)))
        if posterior_transform is not None:
            return posterior_transform(posterior=result, X=X)
        return result

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Any:
        """Condition once more."""
        return ConditionedGaussian(self, X, Y, kwargs.get("noise"))

    def fantasize(self, X: Tensor, sampler: MCSampler, **kwargs: Any) -> Any:
        """Return the model given outcomes drawn from itself at ``X`` [*batch, new, feature]."""
        return ConditionedGaussian.imagine(self, X, sampler)

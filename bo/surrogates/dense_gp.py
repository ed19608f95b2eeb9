"""A ``SingleTaskGP`` that predicts by dense algebra on cached factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models import SingleTaskGP
from botorch.models.transforms.outcome import Standardize
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior
from gpytorch import settings
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import Kernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood
from linear_operator import to_linear_operator
from torch import Tensor

from probkit.errors import DataError
from probkit.numerics import safe_cholesky
from probkit.rng import scope

__all__ = ["DenseGP", "covariance"]


def covariance(kernel: Kernel, x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """Return k(x1, x2) [*batch, n1, n2] at once; x2 is x1 where it is not given.

    GPyTorch puts evaluation off until it knows which entries are wanted. For small matrices that
    are wanted whole, the bookkeeping took some tenth of the time of a prediction.
    """
    with settings.lazily_evaluate_kernels(False):
        found: Tensor = kernel(x1, x2).to_dense()
    return found


class DenseGP(SingleTaskGP):
    """A ``botorch`` GP for studies: the same posterior, several times faster.

    Predictions of one output without batch dims are K_* K^-1 (y - m) and K_** - K_* K^-1 K_*' on
    dense tensors, with the factor of K and the weights kept until the model is trained again.
    Everything else (batches of models, several outputs, fantasies) is ``SingleTaskGP``.

    Attributes:
        warm_state: Raw hyper-parameters, which the fit of the next round starts from.
    """

    warm_state: dict[str, Any] | None = None

    def train(self, mode: bool = True) -> DenseGP:
        """Change the mode; whatever was cached is dropped when training begins."""
        if mode:
            self._factors: tuple[Tensor, Tensor] | None = None
        super().train(mode)
        return self

    def _factorised(self) -> tuple[Tensor, Tensor]:
        """Return L^-1 [row, row] and the weights K^-1 (y - m) [row, 1]."""
        if self._factors is None:
            x, y = self.train_inputs[0], self.train_targets
            with torch.no_grad(), scope(quiet=True):
                K = covariance(self.covar_module, x)
                noise = self.likelihood.noise.expand(len(y))
                L, _ = safe_cholesky(K + torch.diag_embed(noise))
                inverse = torch.linalg.solve_triangular(
                    L, torch.eye(len(y), dtype=L.dtype, device=L.device), upper=False
                )
                weights = inverse.mT @ (inverse @ (y - self.mean_module(x))[:, None])
            self._factors = (inverse, weights)
        return self._factors

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Predict jointly at the q points of each t-batch ``X`` [*batch, q, feature]."""
        self.eval()
        transform = getattr(self, "outcome_transform", None)
        plain = (
            self.train_targets is not None
            and self.train_targets.ndim == 1
            and output_indices in (None, [0])
            and not isinstance(observation_noise, Tensor)
            and (transform is None or isinstance(transform, Standardize))
        )
        if not plain:
            return super().posterior(
                X, output_indices, observation_noise, posterior_transform, **kwargs
            )
        x = self.transform_inputs(X)
        inverse, weights = self._factorised()
        cross = covariance(self.covar_module, x, self.train_inputs[0])
        mean = self.mean_module(x) + (cross @ weights).squeeze(-1)
        white = cross @ inverse.mT
        if x.shape[-2] == 1:
            prior = self.covar_module(x, diag=True)
            variance = (prior - white.square().sum(-1)).clamp_min(1e-14)
            joint = variance.unsqueeze(-1)
        else:
            joint = covariance(self.covar_module, x) - white @ white.mT
        if observation_noise:
            noise = self.likelihood.noise.mean()
            joint = joint + noise * torch.eye(x.shape[-2]).to(joint)
        if transform is not None:
            offset, scale = transform.means.reshape(()), transform.stdvs.reshape(())
            mean, joint = offset + scale * mean, scale.square() * joint
        result = GPyTorchPosterior(MultivariateNormal(mean, to_linear_operator(joint)))
        if posterior_transform is not None:
            return posterior_transform(posterior=result, X=X)
        return result

    def subset_output(self, idcs: list[int]) -> SingleTaskGP:
        """Return the model of some outputs; of a single one, the model itself.

        Raises:
            DataError: An output does not exist.
        """
        if self.num_outputs > 1:
            return super().subset_output(idcs)
        if list(idcs) not in ([0], [-1]):
            raise DataError(f"subset_output: expected [0], the only output, got {list(idcs)}")
        return self

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> SingleTaskGP:
        """Return the model given more data, exactly.

        Args:
            X: Inputs [*batch, new, feature].
            Y: Observations [*batch, new, output].
            noise: Their variances, in units of the transformed outcomes; by default those of the
                training data on average, where these are known.
            **kwargs: For ``get_fantasy_model``.
        """
        if noise is None and isinstance(self.likelihood, FixedNoiseGaussianLikelihood):
            noise = self.likelihood.noise.mean().expand(Y.shape)
        if self.prediction_strategy is None:  # GPyTorch extends the factor that it keeps itself.
            with torch.no_grad():
                first = X[..., :1, :].reshape(-1, X.shape[-1])[:1]
                super().posterior(first).mean  # noqa: B018
        return super().condition_on_observations(X, Y, noise=noise, **kwargs)

    def get_fantasy_model(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model given fantasies, without the factor of this one."""
        model = super().get_fantasy_model(*args, **kwargs)
        model._factors = None
        return model

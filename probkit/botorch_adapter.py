"""Posteriors as BoTorch models.

BoTorch is imported on the first call; the classes live in ``_botorch_model`` and
``_botorch_posterior``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probkit._botorch_model import PosteriorModel
    from probkit.posterior import Posterior

__all__ = ["to_botorch"]


def to_botorch(post: Posterior, outputs: Sequence[int] | None = None) -> PosteriorModel:
    """Wrap a posterior as a ``botorch.models.model.Model``.

    ``posterior(X)`` takes ``X`` [*batch, q, d] and returns the joint predictive of the latent
    function at the q points, or of new observations with ``observation_noise=True``. The form of
    the predictive decides its class:

    * Gaussian: ``GPyTorchPosterior``, good for every acquisition function;
    * Student-t, and mixtures of Gaussians or t: ``PredictivePosterior``, for all Monte Carlo
      acquisition functions (analytic ones assume Gaussians and are refused);
    * draws: ``EnsemblePosterior``, of which samplers take each member once.

    Args:
        post: The posterior; its model's ``predict`` must accept leading batch dims in ``x`` and
            ``joint=True``.
        outputs: Which outputs to keep, by position; None keeps all.

    Returns:
        The model. Predictions that draw random numbers use one fixed stream, so that the
        acquisition surface is the same at every call.

    Example:
        >>> from probkit.inference import Direct
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.models import ScaleMixtureNNGP
        >>> import probkit as pk, torch
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> post = pk.infer(ScaleMixtureNNGP(NNGPKernel()), (x, x[:, 0].sin()), Direct(), rng=0)
        >>> to_botorch(post).posterior(x[:3]).rsample(torch.Size([5])).shape
        torch.Size([5, 3, 1])
    """
    from probkit._botorch_model import PosteriorModel

    return PosteriorModel(post, outputs)

"""Thompson sampling as an acquisition function: one draw of the whole function."""

from __future__ import annotations

from typing import Any

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.models.model import Model
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.sampling.pathwise import draw_matheron_paths
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor

from probkit.errors import CapabilityError
from probkit.rng import scope, stream

__all__ = ["ThompsonSample"]


class ThompsonSample(AcquisitionFunction):
    """The value of one function drawn from the surrogate.

    Of an ensemble it is a member, of a Gaussian process of GPyTorch a pathwise sample. Each point
    that is pending moves on to another draw, so that a batch is made of maximisers of different
    functions.

    Args:
        model: A surrogate of one output.
        seed: Which draws.
        pending: Points under evaluation [pending, feature].

    Raises:
        CapabilityError: The surrogate cannot draw functions.
    """

    def __init__(self, model: Model, seed: int = 0, pending: Tensor | None = None) -> None:
        super().__init__(model)
        self.seed = seed
        self.set_X_pending(pending)

    def set_X_pending(self, X_pending: Tensor | None = None) -> None:
        """Take note of pending points [pending, feature], and draw another function."""
        self.X_pending = X_pending
        self._draw(0 if X_pending is None else len(X_pending))

    def _draw(self, number: int) -> None:
        self.path: Any = None
        generator = stream(self.seed, "thompson", number)
        self.level = torch.rand((), generator=generator, dtype=torch.float64)
        if hasattr(self.model, "train_inputs") and hasattr(self.model, "likelihood"):
            try:
                with scope(rng=generator):
                    self.path = draw_matheron_paths(self.model, sample_shape=torch.Size([1]))
            except (NotImplementedError, RuntimeError) as error:
                raise CapabilityError(
                    "thompson: expected a kernel with random features (RBF or Matern over numbers),"
                    f" got {type(self.model.covar_module).__name__}; use q_log_ei"
                ) from error

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """Return the drawn function [*batch] at ``X`` [*batch, 1, feature]."""
        if self.path is not None:
            values: Tensor = self.path(X)
            return values.reshape(X.shape[:-2])
        posterior = self.model.posterior(X)
        if not isinstance(posterior, EnsemblePosterior):
            raise CapabilityError(
                "thompson: expected an ensemble or a GPyTorch model, got "
                f"{type(posterior).__name__}; use q_log_ei"
            )
        member = int(torch.searchsorted(posterior.weights.double().cumsum(-1), self.level))
        member = min(member, posterior.ensemble_size - 1)
        return posterior.values[..., member, 0, 0]

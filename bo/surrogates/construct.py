"""A surrogate in the form that platforms construct: data in, a fitted BoTorch model out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.posteriors.posterior import Posterior as BotorchPosterior
from botorch.utils.datasets import SupervisedDataset
from torch import Tensor

from probkit.bo.surrogates.registry import make_surrogate

__all__ = ["FittedSurrogate"]


class FittedSurrogate(Model):
    """A surrogate fitted when it is constructed, with the signature of BoTorch's own models.

    What platforms such as Ax, and loops written for ``SingleTaskGP``, construct.

    Args:
        train_X: Inputs [row, feature].
        train_Y: Outcomes [row, output].
        train_Yvar: Known variances [row, output].
        surrogate: A name or object, as for :func:`make_surrogate`.
        bounds: The box of the inputs; None for the unit cube.
        outcome: Outcome transform.
        options: Fields of the surrogate to change.
        seed: Of everything random in the fit.

    Example:
        >>> x = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        >>> FittedSurrogate(x, x.sin(), surrogate="ibnn").posterior(x).mean.shape
        torch.Size([8, 1])
    """

    def __init__(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        train_Yvar: Tensor | None = None,
        *,
        surrogate: Any = "gp",
        bounds: Any = None,
        outcome: Any = "standardize",
        options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.fitted = make_surrogate(
            surrogate,
            train_X,
            train_Y,
            train_Yvar,
            bounds=bounds,
            outcome=outcome,
            options=options,
            rng=seed,
        )
        self.train_inputs = (train_X,)
        self.train_targets = train_Y.squeeze(-1) if train_Y.shape[-1] == 1 else train_Y

    @classmethod
    def construct_inputs(cls, training_data: SupervisedDataset, **options: Any) -> dict[str, Any]:
        """Return the arguments of the constructor for a BoTorch data set.

        Args:
            training_data: Inputs, outcomes and, if known, their variances.
            **options: Further arguments, such as ``surrogate`` and ``bounds``.
        """
        inputs = {"train_X": training_data.X, "train_Y": training_data.Y, **options}
        if training_data.Yvar is not None:
            inputs["train_Yvar"] = training_data.Yvar
        return inputs

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        return int(self.fitted.num_outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """Empty."""
        return torch.Size()

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **kwargs: Any,
    ) -> BotorchPosterior:
        """Predict jointly at the q points of each t-batch ``X`` [*batch, q, feature]."""
        return self.fitted.posterior(
            X,
            output_indices=output_indices,
            observation_noise=observation_noise,
            posterior_transform=posterior_transform,
            **kwargs,
        )

    def subset_output(self, idcs: Sequence[int]) -> Model:
        """Return the fitted model of some outputs."""
        return self.fitted.subset_output(list(idcs))

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Model:
        """Return the fitted model given more data, where that is exact."""
        return self.fitted.condition_on_observations(X, Y, **kwargs)

    def fantasize(self, X: Tensor, sampler: Any, **kwargs: Any) -> Model:
        """Return the fitted model given outcomes drawn from itself."""
        return self.fitted.fantasize(X, sampler, **kwargs)

"""Any posterior as a surrogate: with input and outcome transforms, and exact conditioning."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior as BotorchPosterior
from botorch.posteriors.transformed import TransformedPosterior
from torch import Tensor

from probkit._botorch_ensemble import MemberPosterior
from probkit._botorch_model import (
    PosteriorModel,
    _compose,
    _refuse_analytic_caller,
    _transform,
)
from probkit._botorch_posterior import PredictivePosterior
from probkit.errors import CapabilityError, ShapeError
from probkit.posterior import Posterior
from probkit.sources import Draws

__all__ = ["PosteriorSurrogate", "reweight", "untransformed"]


class PosteriorSurrogate(PosteriorModel):
    """A posterior given transformed data, predicting on the scale of the user's data.

    Args:
        post: A posterior whose data is (X, Y) after both transforms.
        input_transform: Applied to the points of every prediction; None for none.
        outcome_transform: Undone on every prediction; None for none.
        outputs: Positions of the outputs to keep; None keeps all.
        warm_state: What the fit of the next round starts from.
        diagnostics: What the fit reports of itself.
    """

    def __init__(
        self,
        post: Posterior,
        input_transform: InputTransform | None = None,
        outcome_transform: OutcomeTransform | None = None,
        outputs: Sequence[int] | None = None,
        *,
        warm_state: Mapping[str, Any] | None = None,
        diagnostics: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(post, outputs)
        if input_transform is not None:
            self.input_transform = input_transform
        if outcome_transform is not None:
            self.outcome_transform = outcome_transform
        self.warm_state = warm_state
        self.diagnostics = dict(diagnostics or {})
        self.eval()

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **_: Any,
    ) -> BotorchPosterior:
        """Predict jointly at the q points of each t-batch ``X`` [*batch, q, feature].

        Args:
            X: Points as the user has them.
            output_indices: Outputs to predict, counted among those kept.
            observation_noise: True predicts new observations, False the latent function.
            posterior_transform: Applied to the result.
        """
        self.eval()
        if X.ndim < 2:
            raise ShapeError(f"posterior: expected X [*batch, q, d], got {tuple(X.shape)}")
        inner = super().posterior(self.transform_inputs(X), None, observation_noise)
        transform: OutcomeTransform | None = getattr(self, "outcome_transform", None)
        kept = list(range(inner._extended_shape()[-1]))
        if transform is not None:
            part = transform if self._outputs is None else transform.subset_output(self._outputs)
            inner = untransformed(inner, part, X)
        if output_indices is not None:
            chosen = _compose(kept, list(output_indices))
            if chosen != kept:
                return self.subset_output(chosen).posterior(
                    X, None, observation_noise, posterior_transform
                )
        if not isinstance(inner, GPyTorchPosterior):
            _refuse_analytic_caller(sys._getframe(1), type(inner).__name__)
        return inner if posterior_transform is None else _transform(inner, posterior_transform)

    def subset_output(self, idcs: Sequence[int]) -> PosteriorSurrogate:
        """Return the surrogate of some outputs, counted among those kept."""
        model = self._like(self.source)
        model._outputs = _compose(self._outputs, list(idcs))
        return model

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> PosteriorSurrogate:
        """Return the surrogate given more data, where that is exact.

        Draws are reweighted by the likelihood of the new data; closed forms with one set of
        hyper-parameters are computed anew.

        Args:
            X: Inputs [new, feature].
            Y: Observations [new, output].
            **kwargs: None are supported.

        Raises:
            CapabilityError: Conditioning would not be exact, or ``X`` has batch dims.
        """
        if kwargs or X.ndim != 2 or Y.ndim != 2 or self._outputs is not None:
            # The adapter's own refusals say what is expected.
            super().condition_on_observations(X, Y, **kwargs)
        x = self.transform_inputs(X)
        if hasattr(self, "outcome_transform"):
            Y = self.outcome_transform(Y)[0]
        if isinstance(self.source.source, Draws):
            return self._like(reweight(self.source, x, Y))
        return self._like(super().condition_on_observations(x, Y).source)

    def _set_transformed_inputs(self) -> None:
        """Nothing to do: the posterior holds its data, transformed already."""

    def _revert_to_original_inputs(self) -> None:
        """Nothing to do, as for :meth:`_set_transformed_inputs`."""

    def _like(self, post: Posterior) -> PosteriorSurrogate:
        """Return the same surrogate with another posterior."""
        model = PosteriorSurrogate(
            post,
            getattr(self, "input_transform", None),
            getattr(self, "outcome_transform", None),
            self._outputs,
            warm_state=self.warm_state,
            diagnostics=self.diagnostics,
        )
        model._total = self._total
        return model


def reweight(post: Posterior, x: Tensor, y: Tensor) -> Posterior:
    """Weight the draws of a posterior by the likelihood of more data: exact in the limit of draws.

    Args:
        post: A posterior with draws, of a model with ``log_likelihood`` and data (X, Y).
        x: New inputs [new, feature], in the units of the model.
        y: New observations [new, output].

    Raises:
        CapabilityError: The model has no ``log_likelihood``.
    """
    likelihood = getattr(post.model, "log_likelihood", None)
    if likelihood is None or not isinstance(post.source, Draws):
        raise CapabilityError(
            "condition_on_observations: expected draws of a model with log_likelihood, got "
            f"{type(post.source).__name__} of {type(post.model).__name__}; run infer on old and "
            "new data together"
        )
    old_x, old_y = post.context.data
    y = y[:, 0] if old_y.ndim == 1 else y
    with torch.no_grad():
        gain = likelihood(post.source.values, (x, y))
    before = post.source.log_weights
    weights = gain if before is None else before + gain
    source = Draws(post.source.values, weights.reshape(gain.shape))
    data = (torch.cat([old_x, x]), torch.cat([old_y, y]))
    context = replace(post.context, data=data)
    return replace(post, source=source, context=context)


def untransformed(
    posterior: BotorchPosterior, transform: OutcomeTransform, X: Tensor
) -> BotorchPosterior:
    """Undo an outcome transform, keeping closed forms where they exist.

    Args:
        posterior: On the transformed scale, [*batch, q, m].
        transform: The transform of those m outputs.
        X: The points, as the user has them.
    """
    if isinstance(posterior, MemberPosterior):
        values = transform.untransform(posterior.values)[0]
        return MemberPosterior(values, posterior._weights)
    if isinstance(posterior, PredictivePosterior) and transform._is_linear:
        zero = torch.zeros_like(posterior.loc)
        offset = transform.untransform(zero)[0]
        scale = transform.untransform(zero + 1)[0] - offset
        loc = offset + scale * posterior.loc
        root = scale.flatten(-2).unsqueeze(-1) * posterior.scale_tril
        weights = posterior.predictive.log_weights
        return PredictivePosterior(loc, root, weights, posterior.df, posterior.amplitude)
    if isinstance(posterior, PredictivePosterior):
        return TransformedPosterior(posterior, lambda draws: transform.untransform(draws)[0])
    result: BotorchPosterior = transform.untransform_posterior(posterior, X=X)
    return result

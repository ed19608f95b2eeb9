"""Surrogates that data choose between, or mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior as BotorchPosterior
from torch import Tensor

from probkit._botorch_model import _transform
from probkit._botorch_posterior import PredictivePosterior
from probkit.bo.surrogates.base import Surrogate
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.loo import loo_log_density, stacking_weights
from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.numerics import safe_cholesky
from probkit.rng import Rng, scope, stream

__all__ = ["AutoSurrogate", "StackedSurrogate"]

_NEGLIGIBLE = 0.01


@storable
@dataclass(frozen=True)
class AutoSurrogate(Surrogate):
    """Fit several surrogates, and let leave-one-out predictions choose between them.

    "select" takes the one with the largest leave-one-out log density; "stack" mixes them with the
    weights that predict left-out outcomes best. The choice is made anew in every round.

    Args:
        candidates: Names of surrogates of one output with leave-one-out densities: Gaussian
            processes of all kinds, "hmc", "sghmc".
        method: "select" or "stack".
    """

    candidates: tuple[str, ...] = ("gp", "gp-paper", "ibnn")
    method: Literal["select", "stack"] = "select"

    def __post_init__(self) -> None:
        from probkit.bo.surrogates.registry import surrogate_of

        object.__setattr__(self, "candidates", tuple(self.candidates))
        if not self.candidates or len(set(self.candidates)) < len(self.candidates):
            raise DataError(f"candidates: expected distinct names, got {list(self.candidates)}")
        if "auto" in self.candidates:
            raise DataError("candidates: 'auto' cannot choose itself; name surrogates")
        if self.method not in ("select", "stack"):
            raise DataError(f"method: expected 'select' or 'stack', got {self.method!r}")
        for name in self.candidates:
            surrogate_of(name)

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> Model:
        """Fit all candidates, then choose or mix."""
        from probkit.bo.surrogates.registry import surrogate_of

        old = {} if previous is None else previous.get("candidates", {})
        models: list[Any] = [
            surrogate_of(name).fit(data, previous=old.get(name), rng=stream(rng, "auto", name))
            for name in self.candidates
        ]
        with torch.no_grad():
            densities = torch.stack([loo_log_density(model) for model in models])
        state = {
            "candidates": {
                name: model.warm_state
                for name, model in zip(self.candidates, models, strict=True)
                if model.warm_state is not None
            }
        }
        report = dict(zip(self.candidates, densities.sum(1).tolist(), strict=True))
        chosen: Any
        if self.method == "select":
            chosen = models[int(densities.sum(1).argmax())]
        else:
            weights = stacking_weights(densities)
            keep = (weights >= _NEGLIGIBLE).nonzero()[:, 0].tolist()
            chosen = StackedSurrogate([models[k] for k in keep], weights[keep])
            report = dict(zip(self.candidates, weights.tolist(), strict=True))
        chosen.warm_state = state
        chosen.diagnostics = report
        chosen.eval()
        return chosen


class StackedSurrogate(Model):
    """A mixture of surrogates of one output: with probability w_k, the function is that of k.

    Args:
        models: BoTorch models with normal posteriors, or ensembles.
        weights: [model], normalised here.

    Raises:
        DataError: Weights that are negative, or do not match the models.
        CapabilityError: A model of several outputs.
    """

    def __init__(self, models: Sequence[Model], weights: Tensor) -> None:
        super().__init__()
        if weights.shape != (len(models),) or not bool((weights >= 0).all()) or not weights.sum():
            raise DataError(f"weights: expected [model={len(models)}] >= 0, got {weights.tolist()}")
        if any(model.num_outputs != 1 for model in models):
            raise CapabilityError("StackedSurrogate: expected models of one output each")
        self.models = torch.nn.ModuleList(models)
        self.weights = weights / weights.sum()
        self.warm_state: dict[str, Any] | None = None
        self.diagnostics: dict[str, float] = {}

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        """Empty."""
        return torch.Size()

    def subset_output(self, idcs: Sequence[int]) -> StackedSurrogate:
        """Return the model: there is only one output."""
        if list(idcs) not in ([0], [-1]):
            raise DataError(f"subset_output: expected [0], the only output, got {list(idcs)}")
        return self

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **_: Any,
    ) -> BotorchPosterior:
        """Predict jointly at the q points of each t-batch ``X`` [*batch, q, feature].

        Returns:
            A mixture of normals; members of ensembles are components without spread.
        """
        models: Any = self.models
        parts = [
            _components(model.posterior(X, observation_noise=observation_noise), weight)
            for model, weight in zip(models, self.weights, strict=True)
        ]
        loc, root, log_weights = (torch.cat(column) for column in zip(*parts, strict=True))
        result = PredictivePosterior(loc, root, log_weights)
        return result if posterior_transform is None else _transform(result, posterior_transform)

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> StackedSurrogate:
        """Refuse: weights would have to change, too.

        Raises:
            CapabilityError: Always.
        """
        raise CapabilityError(
            "a stack of surrogates cannot be conditioned, because its weights come from "
            "leave-one-out predictions; use q_log_ei, or AutoSurrogate(method='select')"
        )

    def fantasize(self, X: Tensor, sampler: Any, **kwargs: Any) -> StackedSurrogate:
        """Refuse, as :meth:`condition_on_observations` does.

        Raises:
            CapabilityError: Always.
        """
        return self.condition_on_observations(X, X)


def _components(posterior: BotorchPosterior, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return locations, factors and log weights of a posterior as a mixture of normals."""
    if isinstance(posterior, GPyTorchPosterior):
        law = posterior.distribution
        covariance = law.covariance_matrix
        with scope(quiet=True):
            root, _ = safe_cholesky(covariance)
        return posterior.mean[None], root[None], weight.log().reshape(1)
    if isinstance(posterior, EnsemblePosterior):
        values = posterior.values.movedim(-3, 0)
        q = values.shape[-2]
        root = values.new_zeros(*values.shape[:-2], q, q)
        return values, root, weight.log() + posterior.weights.log()
    if isinstance(posterior, PredictivePosterior) and posterior.df is None:
        full = posterior.amplitude.shape
        loc = posterior.loc.expand(*full, *posterior.loc.shape[-2:])
        root = posterior.scale_tril.expand(*full, *posterior.scale_tril.shape[-2:])
        log_weights = weight.log() + posterior.predictive.log_weights
        return loc, posterior.amplitude[..., None, None] * root, log_weights
    raise CapabilityError(
        f"StackedSurrogate: expected normal posteriors and ensembles, got "
        f"{type(posterior).__name__}"
    )

"""Any probkit model of (X, y) as a surrogate, inferred by any sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from probkit.bo.surrogates.base import Surrogate, quiet_fit, transformed_data
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.posterior_surrogate import PosteriorSurrogate
from probkit.driver import infer
from probkit.model import Model
from probkit.rng import Rng
from probkit.sampler import Sampler

__all__ = ["ModelSurrogate"]


@dataclass(frozen=True)
class ModelSurrogate(Surrogate):
    """A model of data (X [row, feature], y [row]) and how to infer it.

    Inputs reach the model in the unit cube, categories as columns of their own; outcomes reach it
    standardised. Leave ``standardize`` of the model itself off.

    Args:
        model: Any probkit model whose ``predict`` takes inputs [*batch, q, feature], ``joint=True``
            and ``site="f"``.
        sampler: How to infer it; None for the model's own.
        chains: Independent repeats.

    Example:
        >>> import torch
        >>> from probkit.bo.surrogates import make_surrogate
        >>> from probkit.inference import DeepEnsemble
        >>> from probkit.models import BNN
        >>> x = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
        >>> spec = ModelSurrogate(BNN(hidden=(8,)), DeepEnsemble(members=3, steps=50))
        >>> make_surrogate(spec, x, x.sin(), rng=0).posterior(x[:2]).values.shape
        torch.Size([3, 2, 1])
    """

    model: Model
    sampler: Sampler | None = None
    chains: int = 1
    center: bool = field(default=False, kw_only=True)

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> PosteriorSurrogate:
        """Infer the model; nothing is carried over from the last round."""
        x, y, encode, transform = transformed_data(data, center=self.center)
        with quiet_fit() as caught:
            post = infer(self.model, (x, y[:, 0]), self.sampler, rng=rng, chains=self.chains)
        return PosteriorSurrogate(
            post, encode, transform, diagnostics={"warnings": float(len(caught))}
        )

"""Linearised Laplace approximations of networks as surrogates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from probkit.bo.surrogates.base import quiet_fit, transformed_data
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.gaussian import GaussianSurrogate
from probkit.bo.surrogates.networks import NetworkSurrogate, ascend, fitting_values
from probkit.driver import infer
from probkit.errors import DataError
from probkit.files import storable
from probkit.inference import Laplace
from probkit.rng import Rng, seed_of, stream

__all__ = ["LaplaceSurrogate"]


@storable
@dataclass(frozen=True)
class LaplaceSurrogate(NetworkSurrogate):
    """A trained network linearised in its weights: a Gaussian process around its function.

    Kristiadi et al., "Promises and pitfalls of the linearized Laplace in Bayesian optimization",
    AABI 2023. The generalised Gauss-Newton matrix of all weights gives the covariance; the prior
    precision, and the noise if it is learned, maximise the evidence. Later rounds train on from the
    last network.

    Args:
        structure: "kron", "full", "diag" or "last_layer", as for
            :class:`~probkit.inference.Laplace`.
        steps: Adam steps of the first round; a third of them later.
        lr: First learning rate.
        tune: Whether the evidence sets prior precision and noise.
    """

    structure: Literal["kron", "full", "diag", "last_layer"] = "kron"
    steps: int = 1000
    lr: float = 0.02
    tune: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.steps, int) or self.steps < 1:
            raise DataError(f"steps: expected a whole number >= 1, got {self.steps!r}")
        Laplace(self.structure)

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> GaussianSurrogate:
        """Train the network and put a Gaussian around its weights."""
        x, y, encode, transform = transformed_data(data)
        pair = (x, y[:, 0] if data.outputs == 1 else y)
        model, seed = self.network_for(data, transform), seed_of(rng)
        start = fitting_values(model, pair, previous)
        steps = self.steps
        if start is None:
            start = model.initial_values(pair, 1, rng=stream(seed, "start"))
        else:
            steps = max(1, steps // 3)
        mode = {
            name: value[0]
            for name, value in ascend(model, pair, start, steps=steps, lr=self.lr).items()
        }
        tune: tuple[str, ...] = ()
        if self.tune:
            learned = self.noise == "learned" and data.Yvar is None
            tune = ("prior", "noise") if learned else ("prior",)
        with quiet_fit() as caught:
            sampler = Laplace(self.structure, mode=mode, tune=tune)
            post = infer(model, pair, sampler, rng=stream(seed, "laplace"))
        state = {"values": {name: value[None] for name, value in mode.items()}}
        assert post.log_evidence is not None
        report = {
            "warnings": float(len(caught)),
            "log_evidence": float(post.log_evidence.value[0]),
        }
        return GaussianSurrogate(post, encode, transform, warm_state=state, diagnostics=report)

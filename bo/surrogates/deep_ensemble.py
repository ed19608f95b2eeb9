"""Deep ensembles as surrogates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.bo.surrogates.base import quiet_fit, transformed_data
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.networks import NetworkSurrogate, fitting_values
from probkit.bo.surrogates.posterior_surrogate import PosteriorSurrogate
from probkit.driver import infer
from probkit.files import storable
from probkit.inference import DeepEnsemble
from probkit.model import Values
from probkit.models import BNN
from probkit.rng import Rng

__all__ = ["EnsembleSurrogate"]


@storable
@dataclass(frozen=True)
class EnsembleSurrogate(NetworkSurrogate):
    """Networks trained to the maximum of the posterior, each on its own part of the data.

    Lakshminarayanan, Pritzel and Blundell, NeurIPS 2017; the parts (a random 80 %) as in the
    comparison of Li, Rudner and Wilson (2024), where ensembles came out over-confident. Later
    rounds train the members of the last one further, on new parts.

    Args:
        members: Networks.
        steps: Adam steps of the first round.
        warm_steps: Of later rounds.
        lr: First learning rate.
        fraction: Share of the rows that a member sees.
    """

    members: int = 10
    steps: int = 600
    warm_steps: int = 200
    lr: float = 0.02
    fraction: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._sampler(warm=True)
        self._sampler(warm=False)

    def _sampler(self, *, warm: bool) -> DeepEnsemble:
        return DeepEnsemble(
            members=self.members,
            steps=self.warm_steps if warm else self.steps,
            lr=0.5 * self.lr if warm else self.lr,
            fraction=self.fraction,
        )

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> PosteriorSurrogate:
        """Train the members."""
        x, y, encode, transform = transformed_data(data)
        pair = (x, y[:, 0] if data.outputs == 1 else y)
        model = self.network_for(data, transform)
        old = fitting_values(model, pair, previous)
        warm = old is not None and len(next(iter(old.values()))) == self.members
        start: Any = _Continued(model, old) if warm and old is not None else model
        with quiet_fit() as caught:
            post = infer(start, pair, self._sampler(warm=warm), rng=rng)
        post = replace(post, model=model)
        values = {name: value[0] for name, value in post.draws.items()}
        report = {"warnings": float(len(caught)), "members": float(self.members)}
        return PosteriorSurrogate(
            post, encode, transform, warm_state={"values": values}, diagnostics=report
        )


class _Continued:
    """A network whose starting points are those of earlier members, one after another."""

    def __init__(self, model: BNN, values: Values) -> None:
        self._model, self._values, self._next = model, values, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def initial_values(self, data: Any, n: int, *, rng: torch.Generator) -> dict[str, Tensor]:
        """Return the next ``n`` members; random starts where one of them has failed."""
        total = len(next(iter(self._values.values())))
        if self._next + n > total:
            return self._model.initial_values(data, n, rng=rng)
        part = slice(self._next, self._next + n)
        self._next += n
        return {name: value[part].clone() for name, value in self._values.items()}

"""What a surrogate is before it has seen data: frozen options with one method, ``fit``."""

from __future__ import annotations

import contextlib
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from botorch.models.model import Model as BotorchModel
from botorch.models.transforms.outcome import OutcomeTransform
from torch import Tensor

from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.encoding import Encode
from probkit.bo.surrogates.outcomes import outcome_transform
from probkit.errors import ConvergenceWarning, NumericsWarning
from probkit.rng import Rng

__all__ = ["Surrogate", "transformed_data"]


class Surrogate(ABC):
    """Options of a surrogate; ``fit`` turns them and the data into a BoTorch model.

    Attributes:
        joint: Whether one model predicts all outputs; else each output gets a model of its own.
        interpolates: Whether a study whose outcomes are exact should say so to the surrogate, by
            its option ``noise``. One that cannot pass through every point learns a noise even then:
            by how much it misses them.
    """

    joint: ClassVar[bool] = False
    interpolates: ClassVar[bool] = True

    @abstractmethod
    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> BotorchModel:
        """Fit to data.

        Args:
            data: One output, unless ``joint``.
            previous: ``warm_state`` of the model of the last round; None starts afresh.
            rng: Seed or generator.

        Returns:
            A model in eval mode, with an attribute ``warm_state``: a tree of tensors, numbers and
            strings that ``previous`` takes, or None.
        """


def transformed_data(
    data: TrainingData, *, center: bool = False
) -> tuple[Tensor, Tensor, Encode, OutcomeTransform | None]:
    """Return features, transformed outcomes, and the two transforms (in eval mode).

    Args:
        data: The training data.
        center: Map ordinal columns to [-1, 1] in place of [0, 1].
    """
    encode = Encode(data.domain, one_hot=True, center=center)
    transform = outcome_transform(data.outcome, data.outputs)
    y = data.Y
    if transform is not None:
        transform.train()
        y = transform(y, X=data.X)[0].detach()
        transform.eval()
    with torch.no_grad():
        x = encode(data.X)
    return x, y, encode.eval(), transform


@contextlib.contextmanager
def quiet_fit() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the warnings of samplers, which a surrogate reports as its diagnostics."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", ConvergenceWarning)
        warnings.simplefilter("always", NumericsWarning)
        yield caught

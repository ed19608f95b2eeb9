"""Prior-data fitted networks as surrogates: a Gaussian-process prior compiled into a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probkit.bo.surrogates.base import Surrogate
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.encoding import Encode
from probkit.errors import DataError
from probkit.models import pfn
from probkit.models.pfn import PFN
from probkit.models.pfn.botorch_model import PFNBotorchModel
from probkit.rng import Rng

__all__ = ["PFNSurrogate"]

#: Of ``python -m probkit.models.pfn.train processes``.
SHIPPED = Path(pfn.__file__).parent / "weights" / "processes.safetensors"


@dataclass(frozen=True)
class PFNSurrogate(Surrogate):
    """A network trained on draws of a prior; conditioning is one forward pass, nothing is fitted.

    Müller, Feurer, Hollmann and Hutter, "PFNs4BO: In-context learning for Bayesian optimization",
    ICML 2023. Predictions are bar distributions.

    Args:
        network: A trained :class:`~probkit.models.pfn.PFN` for inputs in the unit cube; None takes
            ``path``.
        path: A weight file that ``PFN.save`` wrote; None takes the network that comes with the
            package, trained on Gaussian processes of one to six inputs.

    Example:
        >>> from probkit.bo.surrogates import make_surrogate
        >>> from probkit.models.pfn import GPPrior, amortize
        >>> net = amortize(GPPrior(rows=12), "tiny", steps=2, bars=20, rng=0)
        >>> x = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        >>> model = make_surrogate(PFNSurrogate(net), x, x.sin(), rng=0)
        >>> model.posterior(x[:, None]).mean.shape
        torch.Size([6, 1, 1])
    """

    network: PFN | None = field(default=None, repr=False)
    path: str | None = None

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> PFNBotorchModel:
        """Condition the network on the data.

        Raises:
            DataError: The file is no weight file.
            ShapeError: The data has more features than the network was trained for.
        """
        if data.outcome not in ("standardize", "none"):
            raise DataError(
                "outcome: a PFN standardises by itself; expected 'standardize', got "
                f"{data.outcome!r}"
            )
        model = _EncodedPFN(self._load(), data.X, data.Y, Encode(data.domain, one_hot=True))
        model.eval()
        return model

    def _load(self) -> PFN:
        if self.network is not None:
            return self.network
        if self.path is not None:
            return PFN.load(Path(self.path))
        return PFN.load(SHIPPED)


class _EncodedPFN(PFNBotorchModel):
    """A conditioned network that maps the user's inputs to the unit cube itself."""

    def __init__(self, net: PFN, x: Tensor, y: Tensor, encode: Encode) -> None:
        self.__dict__["_encode"] = encode  # Before torch allows modules as attributes.
        super().__init__(net, x, y)

    def _padded(self, x: Tensor) -> Tensor:
        encode: Encode = self.__dict__["_encode"]
        return super()._padded(encode(x))

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> PFNBotorchModel:
        """Return the model given more rows ``X`` [row, feature], ``Y`` [row, 1]."""
        if kwargs or X.ndim != 2:
            return super().condition_on_observations(X, Y, **kwargs)  # Says what is expected.
        y = Y.squeeze(-1) if Y.ndim == 2 else Y
        both = torch.cat([self.train_inputs[0], X]), torch.cat([self.train_targets, y])
        return _EncodedPFN(self.net, *both, self.__dict__["_encode"])

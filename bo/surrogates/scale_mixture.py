"""Scale mixtures of network Gaussian processes as surrogates: heavy-tailed, in closed form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probkit.bo.surrogates.base import Surrogate, quiet_fit, transformed_data
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.posterior_surrogate import PosteriorSurrogate
from probkit.driver import infer
from probkit.errors import DataError
from probkit.files import storable
from probkit.inference import MAP, Direct
from probkit.kernels import NNGPKernel
from probkit.models import InverseGamma, ScaleMixtureNNGP
from probkit.rng import Rng

__all__ = ["NNGPSurrogate"]


@storable
@dataclass(frozen=True)
class NNGPSurrogate(Surrogate):
    """A scale mixture of NNGPs: the wide limit of a network whose last layer's scale is random.

    Lee, Yun, Yang and Lee, ICLR 2022. An inverse gamma law of the variance makes predictions
    Student-t: expected improvement has a closed form, and surprise widens every interval.

    Args:
        depth: Hidden layers.
        activation: "relu", "erf" or "tanh".
        concentration: Of the inverse gamma law of the variance; its mean is one times the
            variance of the kernel.
        noise_var: Noise variance, relative to the scale; where a fit starts if ``learn``.
        learn: Whether hyper-parameters are set by maximising their posterior.
        iterations: Most iterations of that.

    Example:
        >>> import torch
        >>> from probkit.bo.surrogates import make_surrogate
        >>> x = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None]
        >>> model = make_surrogate(NNGPSurrogate(learn=False), x, x.sin(), rng=0)
        >>> type(model.posterior(x)).__name__
        'PredictivePosterior'
    """

    depth: int = 3
    activation: str = "relu"
    concentration: float = 2.0
    noise_var: float = 1e-3
    learn: bool = True
    iterations: int = 50

    def __post_init__(self) -> None:
        if not 1.0 < self.concentration < float("inf"):
            raise DataError(
                f"concentration: expected a finite number > 1, got {self.concentration!r}"
            )
        self.model()

    def model(self) -> ScaleMixtureNNGP:
        """Return the model."""
        kernel = NNGPKernel(self.depth, self.activation, w_std=1.5, b_std=0.3, last_w_std=1.0)
        scale = InverseGamma(self.concentration, self.concentration - 1.0)
        learn = ("kernel.w_std", "kernel.b_std", "noise_var")
        return ScaleMixtureNNGP(kernel, scale, noise_var=self.noise_var, learn=learn)

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> PosteriorSurrogate:
        """Condition on the data, hyper-parameters at their maximum if they are learned."""
        x, y, encode, transform = transformed_data(data, center=True)
        hyper: Any = None
        if self.learn:
            hyper = MAP(max_iter=self.iterations)
        with quiet_fit() as caught:
            post = infer(self.model(), (x, y[:, 0]), Direct(hyper=hyper), rng=rng)
        return PosteriorSurrogate(
            post, encode, transform, diagnostics={"warnings": float(len(caught))}
        )

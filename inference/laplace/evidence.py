"""The Laplace evidence of a network, and its maximisation over prior and noise.

log p(y) is approximated by log p(y | w) + log N(w; 0, prior) + (A / 2) log 2 pi - 1/2 log det of
the posterior precision at the mode w (MacKay 1992; Immer et al. 2021, "Scalable marginal likelihood
estimation for model selection in deep learning").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.inference.laplace.curvature import Curvature

__all__ = ["NetworkEvidence", "Tuned", "maximise"]


@dataclass(frozen=True)
class NetworkEvidence:
    """What the evidence depends on, at a fixed mode.

    Attributes:
        curvature: Curvature of the likelihood in prior units.
        log_likelihood: At the mode, a scalar.
        squares: Sum of squared weights in prior units of each layer [layer].
        sizes: Number of weights of each layer [layer].
        residual: Sum of squared weighted residuals; None unless the noise can be changed.
        observations: Number of observed values.
    """

    curvature: Curvature
    log_likelihood: Tensor
    squares: Tensor
    sizes: Tensor
    residual: Tensor | None
    observations: int

    def __call__(self, log_precision: Tensor, log_noise: Tensor) -> Tensor:
        """Return the log evidence, a scalar.

        Args:
            log_precision: [layer] logarithms of factors on the prior precision.
            log_noise: Logarithm of the factor on the noise variance, a scalar.
        """
        precision, noise = log_precision.exp(), log_noise.exp()
        fit = self.log_likelihood
        if self.residual is not None:
            fit = fit + 0.5 * self.residual * (1 - 1 / noise) - 0.5 * self.observations * log_noise
        prior = 0.5 * (self.sizes * log_precision - precision * self.squares).sum()
        return fit + prior - 0.5 * self.curvature.log_det(precision, noise)


@dataclass(frozen=True)
class Tuned:
    """Factors that maximise the evidence.

    Attributes:
        precision: [layer], on the prior precision.
        noise: Scalar, on the noise variance.
        log_evidence: Scalar.
    """

    precision: Tensor
    noise: Tensor
    log_evidence: Tensor


def maximise(evidence: NetworkEvidence, tune: Sequence[str], steps: int) -> Tuned:
    """Maximise the evidence by L-BFGS over the logarithms of the factors.

    Args:
        evidence: The evidence.
        tune: Names out of "layers" (one prior factor a layer), "prior" (one for all), "noise".
        steps: Most iterations.

    Raises:
        DataError: The evidence became infinite or NaN.
    """
    like = evidence.squares
    free = [like.new_zeros(len(like) if "layers" in tune else 1), like.new_zeros(())]
    moves = ["layers" in tune or "prior" in tune, "noise" in tune]
    chosen = [tensor.requires_grad_() for tensor, moving in zip(free, moves, strict=True) if moving]

    def value() -> Tensor:
        return evidence(free[0].expand_as(like), free[1])

    if chosen:
        optimizer = torch.optim.LBFGS(
            chosen, max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-8
        )

        def closure() -> Any:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = -value()
                loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        result = Tuned(free[0].detach().exp().expand_as(like), free[1].detach().exp(), value())
    if not bool(torch.isfinite(result.log_evidence)):
        raise DataError(
            "Laplace: the evidence is not finite at prior factors "
            f"{result.precision.tolist()} and noise factor {float(result.noise):.3g}; tune less, "
            "or fix the noise"
        )
    return result

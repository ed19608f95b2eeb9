"""Expected improvement for normal and for discrete predictions, exact in double precision."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.analytic import _log_ei_helper
from botorch.models.model import Model
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor

from probkit.bo.llm.posterior import DiscretePosterior
from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError

__all__ = ["DiscreteExpectedImprovement", "Improvement", "expected_improvement"]

#: Below this standardised improvement the closed form cancels, and the logarithm is used.
_CANCELS = -6.0


class Improvement(NamedTuple):
    """Expected improvement of candidates.

    Attributes:
        value: EI, [candidate].
        log: Its logarithm, exact where EI itself underflows, [candidate].
    """

    value: Tensor
    log: Tensor


def expected_improvement(
    mean: Any, sd: Any, best: float, direction: Literal["min", "max"] = "min"
) -> Improvement:
    """Return E[max(0, improvement on ``best``)] of normal predictions.

    EI = sd (z Phi(z) + phi(z)) with z = (best - mean) / sd for minimisation (Jones, Schonlau and
    Welch 1998, equation 15).

    Args:
        mean: Means, [candidate].
        sd: Standard deviations above 0, [candidate].
        best: Best value so far.
        direction: ``"min"`` or ``"max"``.

    Raises:
        DataError: A standard deviation that is not above 0, or another direction.

    Example:
        >>> ei = expected_improvement([0.0, 40.0], [1.0, 1.0], 0.0)
        >>> round(float(ei.value[0]), 6), round(float(ei.log[1]), 1)
        (0.398942, -808.3)
    """
    if direction not in ("min", "max"):
        raise DataError(f"direction: expected 'min' or 'max', got {direction!r}")
    mu, sigma = as_tensor(mean, name="mean").double(), as_tensor(sd, name="sd").double()
    if not bool((sigma > 0).all()):
        raise DataError(f"sd: expected standard deviations > 0, got {float(sigma.min())!r}")
    z = (best - mu) / sigma if direction == "min" else (mu - best) / sigma
    log = _log_ei_helper(z) + sigma.log()
    density = torch.exp(-0.5 * z.square()) / (2 * torch.pi) ** 0.5
    closed = sigma * (density + z * torch.special.ndtr(z))
    return Improvement(torch.where(z < _CANCELS, log.exp(), closed), log)


class DiscreteExpectedImprovement(AcquisitionFunction):
    """Expected improvement under discrete predictive densities: a sum, without a normal law.

    Args:
        model: Its posterior is a :class:`DiscretePosterior`, as that of
            ``LLMSurrogate(mode="logprob")``.
        best_f: Best value so far.
        maximize: Whether larger is better.
    """

    def __init__(self, model: Model, best_f: float | Tensor, maximize: bool = True) -> None:
        super().__init__(model=model)
        self.register_buffer("best_f", torch.as_tensor(best_f, dtype=torch.float64))
        self.maximize = maximize

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """Return EI of points ``X`` [*batch, 1, parameter], [*batch]."""
        posterior = self.model.posterior(X)
        if not isinstance(posterior, DiscretePosterior):
            raise CapabilityError(
                "DiscreteExpectedImprovement needs a DiscretePosterior, got "
                f"{type(posterior).__name__}; use LogExpectedImprovement"
            )
        gain = posterior.values - self.best_f if self.maximize else self.best_f - posterior.values
        return (posterior.probs * gain.clamp_min(0.0)).sum(-1)[..., 0, 0]

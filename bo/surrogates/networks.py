"""What the surrogates made of networks share: the network, its ascent, and its warm state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from botorch.models.transforms.outcome import OutcomeTransform
from torch import Tensor

from probkit.bo.surrogates.base import Surrogate
from probkit.bo.surrogates.data import TrainingData
from probkit.density import log_joint_of
from probkit.errors import DataError
from probkit.model import Values
from probkit.models import BNN, LogNormal
from probkit.numerics import ess_from_log_weights
from probkit.unconstrained import Unconstrained

__all__ = ["NetworkSurrogate", "ascend", "fitting_values", "tempered"]

_NOISE_SPREAD = 1.0
_EXACT = 0.1


@dataclass(frozen=True)
class NetworkSurrogate(Surrogate):
    """Options of the network, for every surrogate made of one.

    Inputs are in the unit cube and outcomes standardised; one network predicts all outputs.

    Args:
        hidden: Widths of the hidden layers.
        activation: As for :class:`~probkit.models.BNN`.
        prior: "iid", the same normal prior for every weight, or "fan_in", whose functions keep
            their size as layers widen.
        prior_std: Standard deviation of every weight and bias ("iid"), of the biases ("fan_in").
        gains: Of the first and of the later layers ("fan_in").
        learn_gains: Spread of the logarithms of the gains, as for ``BNN``; None keeps them.
        noise_var: Noise variance, outcomes having variance one.
        noise: "learned": ``noise_var`` is the median of a log-normal prior; "fixed" keeps it;
            "none", for outcomes that are exact, keeps a tenth of it, which chains can still follow.
            Known variances win over all three: their mean is the noise.
    """

    hidden: tuple[int, ...] = (50,)
    activation: str = "tanh"
    prior: Literal["iid", "fan_in"] = "fan_in"
    prior_std: float = 2.0
    gains: tuple[float, float] = (5.0, 1.5)
    learn_gains: float | None = 0.5
    noise_var: float = 1e-3
    noise: Literal["learned", "fixed", "none"] = "learned"

    joint = True

    def __post_init__(self) -> None:
        if self.noise not in ("learned", "fixed", "none"):
            raise DataError(f"noise: expected 'learned', 'fixed' or 'none', got {self.noise!r}")
        if not 0.0 < self.noise_var < math.inf:
            raise DataError(f"noise_var: expected a finite number > 0, got {self.noise_var!r}")
        object.__setattr__(self, "hidden", tuple(self.hidden))
        object.__setattr__(self, "gains", tuple(self.gains))
        self.network()  # Checks the rest.

    def network_for(self, data: TrainingData, transform: OutcomeTransform | None) -> BNN:
        """Return the model of the network for data whose noise may be known."""
        if data.Yvar is None:
            return self.network()
        variance = data.Yvar
        if transform is not None:
            variance = transform(data.Y, data.Yvar, data.X)[1]
        return self.network(max(float(variance.mean()), _EXACT * self.noise_var))

    def network(self, noise_var: float | None = None) -> BNN:
        """Return the model of the network, its noise as the options or ``noise_var`` say."""
        noise: Any = noise_var
        if noise_var is None and self.noise == "learned":
            noise = LogNormal(math.log(self.noise_var), _NOISE_SPREAD)
        elif noise_var is None:
            noise = self.noise_var if self.noise == "fixed" else _EXACT * self.noise_var
        return BNN(
            hidden=self.hidden,
            activation=self.activation,
            prior=self.prior,
            prior_std=self.prior_std,
            gains=self.gains,
            learn_gains=self.learn_gains,
            noise_var=noise,
        )


def ascend(model: BNN, data: Any, values: Values, *, steps: int, lr: float) -> dict[str, Tensor]:
    """Climb the log posterior density by Adam, many networks at once, the rate falling to zero.

    Args:
        model: The network.
        data: Its data.
        values: Starting points [point, *site].
        steps: Adam steps.
        lr: First learning rate.

    Returns:
        Values [point, *site]; a point that left the finite numbers is where it started.
    """
    free = Unconstrained(model.sites(data))
    start = free.flatten(values)
    flat = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([flat], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        with torch.enable_grad():
            inner, log_det = free.constrain(flat)
            loss = -(log_joint_of(model, inner, data) + log_det).sum()
            loss.backward()
        optimizer.step()
    found = flat.detach()
    return free.values(torch.where(torch.isfinite(found).all(-1, keepdim=True), found, start))


def fitting_values(model: BNN, data: Any, state: Mapping[str, Any] | None) -> Values | None:
    """Return the draws [draw, *site] of a warm state; None where they are of another network."""
    values = None if state is None else state.get("values")
    if not isinstance(values, Mapping):
        return None
    sites = model.sites(data)
    if set(values) != set(sites):
        return None
    if any(tuple(values[name].shape[1:]) != tuple(site.shape) for name, site in sites.items()):
        return None
    return {name: value.to(data[0]) for name, value in values.items()}


def tempered(log_weights: Tensor, effective: float) -> Tensor:
    """Raise weights to the largest power <= 1 that leaves ``effective`` draws.

    Args:
        log_weights: [draw]; infinite ones are never chosen.
        effective: Effective sample size to keep, at most the number of draws of finite weight.
    """
    log_weights = log_weights.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    finite = torch.isfinite(log_weights)
    if not bool(finite.any()):
        return torch.zeros_like(log_weights)
    log_weights = torch.where(finite, log_weights - log_weights[finite].max(), -torch.inf)
    effective = min(effective, float(finite.sum()))
    if float(ess_from_log_weights(log_weights, 0)) >= effective:
        return log_weights
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        scaled = torch.where(finite, middle * log_weights, -torch.inf)
        if float(ess_from_log_weights(scaled, 0)) >= effective:
            low = middle
        else:
            high = middle
    return torch.where(finite, low * log_weights, -torch.inf)

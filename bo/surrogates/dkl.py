"""Deep kernel learning: a Gaussian process on features that a network learns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import Kernel as _Kernel
from torch import Tensor, nn

from probkit.bo.surrogates.base import Surrogate
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.dense_gp import DenseGP
from probkit.bo.surrogates.encoding import Encode
from probkit.bo.surrogates.gp import dense_model, finished
from probkit.bo.surrogates.gp_fit import fit_map, log_posterior
from probkit.bo.surrogates.hamming import smooth_kernel
from probkit.errors import DataError
from probkit.files import storable
from probkit.rng import Rng, scope, stream

__all__ = ["DKLSurrogate", "FeatureKernel"]


class FeatureKernel(_Kernel):
    """k(g(x), g(x')): a kernel on the features of a network (Wilson et al., AISTATS 2016).

    Args:
        network: g, from inputs [*, feature] to features [*, latent].
        base: The kernel on the features.
    """

    has_lengthscale = False

    def __init__(self, network: nn.Module, base: _Kernel) -> None:
        super().__init__()
        self.network, self.base = network, base

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Any:
        """Return [*batch, n1, n2], or the diagonal [*batch, n]."""
        left = self.network(x1)
        right = left if x1 is x2 or torch.equal(x1, x2) else self.network(x2)
        return self.base.forward(left, right, diag=diag, **params)


def feature_network(features: int, hidden: Sequence[int], latent: int) -> nn.Module:
    """Return a tanh network in double precision; the identity without hidden layers.

    Its outputs pass a tanh, too, so that features stay in the box that the prior of the length
    scales is made for.
    """
    if not hidden:
        return nn.Identity()
    widths = [features, *hidden, latent]
    layers: list[nn.Module] = []
    for wide, narrow in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(wide, narrow, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*layers)


@storable
@dataclass(frozen=True)
class DKLSurrogate(Surrogate):
    """A Matern 5/2 process on features of a tanh network, trained together.

    The network first learns to predict the outcomes by least squares, under a linear head that is
    thrown away; then all parameters climb the exact marginal likelihood. Later rounds go on from
    the last network. Over-fitting is the known risk: the marginal likelihood does not guard many
    weights (Ober, Rasmussen and van der Wilk, UAI 2021).

    Args:
        hidden: Widths of the hidden layers; () makes the features the inputs, a plain Gaussian
            process.
        latent: Number of features.
        pretraining: Least-squares steps.
        steps: Adam steps on the marginal likelihood in the first round; a fifth of them later.
        lr: Learning rate.
        weight_decay: Of the network.
        noise: "learned" or "none", as for :class:`GPSurrogate`.
    """

    hidden: tuple[int, ...] = (64, 64)
    latent: int = 4
    pretraining: int = 300
    steps: int = 400
    lr: float = 0.005
    weight_decay: float = 1e-3
    noise: str = "learned"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        widths = (*self.hidden, self.latent)
        if not all(isinstance(n, int) and n >= 1 for n in widths):
            raise DataError(f"hidden and latent: expected whole widths >= 1, got {widths}")
        if self.noise not in ("learned", "none"):
            raise DataError(f"noise: expected 'learned' or 'none', got {self.noise!r}")
        if min(self.pretraining, self.steps) < 0 or not 0 < self.lr < math.inf:
            raise DataError(
                "expected pretraining and steps >= 0 and lr > 0, got "
                f"{self.pretraining}, {self.steps}, {self.lr}"
            )

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> DenseGP:
        """Train network and process."""
        encode = Encode(data.domain, one_hot=True)
        exact = self.noise == "none"
        if not self.hidden:
            kernel: _Kernel = smooth_kernel(encode.features, (), "matern")
            model = dense_model(data, FeatureKernel(nn.Identity(), kernel), encode, exact=exact)
            fit_map(model, [] if previous is None else [previous])
            return finished(model)
        with scope(rng=stream(rng, "network")):
            network = feature_network(encode.features, self.hidden, self.latent)
        base = smooth_kernel(self.latent, (), "matern")
        model = dense_model(data, FeatureKernel(network, base), encode, exact=exact)
        steps = self.steps
        if _continues(model, previous):
            steps = max(1, steps // 5)
        else:
            self._pretrain(network, model, stream(rng, "head"))
        self._climb(model, steps)
        return finished(model)

    def _pretrain(self, network: nn.Module, model: DenseGP, rng: torch.Generator) -> None:
        """Fit the network and a linear head by least squares."""
        x = model.transform_inputs(model.train_inputs[0]).detach()
        y = model.train_targets[:, None]
        with scope(rng=rng):
            head = nn.Linear(self.latent, 1, dtype=torch.float64)
        parameters = [*network.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=self.lr, weight_decay=self.weight_decay)
        for _ in range(self.pretraining):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = (head(network(x)) - y).square().mean()
                loss.backward()
            optimizer.step()

    def _climb(self, model: DenseGP, steps: int) -> None:
        """Climb the log posterior of everything; constraints are kept by clamping."""
        model.train()
        network = [p for name, p in model.named_parameters() if ".network." in name]
        others = [
            (name, p)
            for name, p in model.named_parameters()
            if ".network." not in name and p.requires_grad
        ]
        groups: list[dict[str, Any]] = [
            {"params": network, "weight_decay": self.weight_decay},
            {"params": [p for _, p in others], "lr": 5 * self.lr},
        ]
        optimizer = torch.optim.Adam(groups, lr=self.lr)
        for _ in range(steps):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = -log_posterior(model) / len(model.train_targets)
                loss.backward()
            optimizer.step()
            _clamp(model, others)


def _clamp(model: DenseGP, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Bring parameters back inside constraints that are bounds alone."""
    for name, value in parameters:
        constraint = model.constraint_for_parameter_name(name)
        if constraint is not None and not constraint.enforced:
            value.data.clamp_(float(constraint.lower_bound), float(constraint.upper_bound))


def _continues(model: DenseGP, previous: Mapping[str, Any] | None) -> bool:
    """Load the parameters of the last round, where they fit."""
    if previous is None:
        return False
    own = dict(model.named_parameters())
    if set(own) != set(previous) or any(previous[k].shape != v.shape for k, v in own.items()):
        return False
    for name, value in own.items():
        value.data.copy_(previous[name])
    return True

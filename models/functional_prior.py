"""Priors of finite networks tuned to a process: what functions they give, not what weights.

The standard deviations of the weights and biases of every layer are moved so that the functions of
the network at random inputs have nearly the law of a Gaussian process there, in the 1-Wasserstein
distance (Tran, Rossi, Milios and Filippone, "All you need is a good functional prior for Bayesian
deep learning", JMLR 2022, sections 4.1 to 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import gpytorch
import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.kernels import functional
from probkit.models.bnn import BNN
from probkit.models.bnn.network import activation_of, forward
from probkit.numerics import check_finite, safe_cholesky
from probkit.rng import Rng, scope, stream

__all__ = [
    "LayerwiseBNN",
    "MatchedPrior",
    "PriorMatch",
    "ProcessPrior",
    "sliced_wasserstein",
]


@storable
@dataclass(frozen=True, eq=False)
class LayerwiseBNN(BNN):
    """A :class:`BNN` whose layers have standard deviations of their own.

    The weights that act in layer k are ``w_std[k] / sqrt(fan_in)`` times standard normal numbers,
    its biases ``b_std[k]`` times; sites keep them without the root of the fan-in.

    Args:
        w_std: One number a layer, last layer included; one number in all serves every layer.
        b_std: The same for the biases.

    The other arguments are those of :class:`BNN`, with ``prior="fan_in"`` and no gains.

    Example:
        >>> LayerwiseBNN(hidden=(8,), w_std=(1.0, 2.0), b_std=(0.5, 0.1)).weight_sd()["weight_1"]
        2.0
    """

    prior: Literal["iid", "fan_in"] = "fan_in"
    w_std: tuple[float, ...] = (1.0,)
    b_std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prior != "fan_in" or self.gains != (1.0, 1.0) or self.learn_gains is not None:
            raise DataError(
                "LayerwiseBNN: expected prior='fan_in', gains=(1.0, 1.0) and learn_gains=None; "
                "give w_std and b_std instead"
            )
        layers = len(self.hidden) + 1
        for name in ("w_std", "b_std"):
            given = tuple(float(value) for value in getattr(self, name))
            given = given * layers if len(given) == 1 else given
            if len(given) != layers or not all(0 < value < math.inf for value in given):
                raise DataError(
                    f"{name}: expected {layers} finite numbers > 0, one a layer, got "
                    f"{getattr(self, name)}"
                )
            object.__setattr__(self, name, given)

    def weight_sd(self) -> dict[str, float]:
        """Return the prior standard deviation of the entries of every weight and bias."""
        return {
            name: std
            for pair, stds in zip(
                self.layer_names(), zip(self.w_std, self.b_std, strict=True), strict=True
            )
            for name, std in zip(pair, stds, strict=True)
        }


@dataclass(frozen=True, eq=False)
class ProcessPrior:
    """A Gaussian process, or a mixture of them over laws of its hyper-parameters.

    Args:
        kernel: Covariance, a GPyTorch kernel.
        laws: Laws of hyper-parameters by their names in
            :func:`probkit.kernels.functional.hyperparameters`.
        scale: Law of a variance that multiplies the covariance; None for one.

    Raises:
        DataError: A name that the kernel does not have.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
        >>> ProcessPrior(RBFKernel()).sample(3, x, rng=0).shape
        torch.Size([3, 5])
    """

    kernel: gpytorch.kernels.Kernel
    laws: Mapping[str, Distribution] = field(default_factory=dict)
    scale: Distribution | None = None

    def __post_init__(self) -> None:
        known = functional.hyperparameters(self.kernel)
        unknown = [name for name in self.laws if name not in known]
        if unknown:
            raise DataError(
                f"laws: expected names out of {', '.join(known)}, got {', '.join(unknown)}"
            )

    def factors(self, n: int, x: Tensor, *, rng: Rng) -> Tensor:
        """Draw hyper-parameters and return factors of the covariances [n or 1, row, row].

        Args:
            n: Draws; without laws there is one covariance.
            x: Inputs [row, feature].
            rng: Seed or generator.
        """
        known = functional.hyperparameters(self.kernel)
        params = {name: hyper.value.to(x.device) for name, hyper in known.items()}
        with scope(rng=stream(rng, "hyper")), torch.no_grad():
            for name, law in self.laws.items():
                drawn = law.sample(torch.Size([n])).to(x)
                shape = known[name].shape
                params[name] = drawn.reshape(n, *[1] * len(shape)).expand(n, *shape)
            gram = functional.evaluate(self.kernel, x.double(), params=params)
            gram = gram if gram.ndim == 3 else gram[None]
            if self.scale is not None:
                gram = self.scale.sample(torch.Size([n])).to(gram)[:, None, None] * gram
        # A smooth kernel at many inputs is singular to rounding.
        unit = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        jitter = 1e-6 * unit[:, None, None] * torch.eye(len(x), dtype=gram.dtype).to(gram)
        return safe_cholesky(gram + jitter)[0].to(x.dtype)

    def sample(self, n: int, x: Tensor, *, rng: Rng) -> Tensor:
        """Draw ``n`` functions at ``x`` [row, feature]: [n, row]."""
        generator = stream(rng, "functions", device=x.device)
        factors = self.factors(n, x, rng=stream(rng, "factors"))
        return _from_factors(factors, n, generator)


@dataclass(frozen=True, eq=False)
class MatchedPrior:
    """What :class:`PriorMatch` found.

    Attributes:
        model: The network with the tuned standard deviations.
        distance: Estimate of the 1-Wasserstein distance before each outer step [step].
        w_std: Standard deviations after each step [step + 1, layer].
        b_std: The same for the biases.
    """

    model: LayerwiseBNN
    distance: Tensor
    w_std: Tensor
    b_std: Tensor


@storable
@dataclass(frozen=True)
class PriorMatch:
    """Tune the standard deviations of a network's prior to a process.

    Each outer step draws measurement inputs, fits a critic phi from scratch to tell the functions
    of the two apart, max E_gp phi(f) - E_bnn phi(f) - penalty E (|grad phi| - 1)^2, and moves the
    standard deviations to lower the difference. Functions are drawn anew for every critic step.

    Args:
        steps: Outer steps (RMSprop).
        lr: Their rate, on the inverse softplus of the standard deviations.
        draws: Functions of each side.
        measurements: Inputs at which functions are compared.
        train_share: Share of them that are training inputs; the others are uniform in their box.
        critic_steps: Steps of each critic (Adagrad).
        critic_lr: Their rate.
        critic_width: Units of its two hidden layers (softplus).
        penalty: Weight of the gradient penalty.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> x = torch.linspace(-1, 1, 20)[:, None]
        >>> match = PriorMatch(steps=2, measurements=5, critic_steps=3, critic_width=8)
        >>> network = LayerwiseBNN(hidden=(8,), noise_var=0.1)
        >>> match.fit(network, ProcessPrior(RBFKernel()), x, rng=0).distance.shape
        torch.Size([2])
    """

    steps: int = 200
    lr: float = 0.05
    draws: int = 128
    measurements: int = 100
    train_share: float = 0.7
    critic_steps: int = 200
    critic_lr: float = 0.01
    critic_width: int = 200
    penalty: float = 10.0

    def __post_init__(self) -> None:
        counts = (self.steps, self.draws, self.measurements, self.critic_steps, self.critic_width)
        if not all(isinstance(count, int) and count >= 1 for count in counts):
            raise DataError(
                "PriorMatch: expected whole steps, draws, measurements, critic_steps and "
                f"critic_width >= 1, got {counts}"
            )
        positive = (self.lr, self.critic_lr, self.penalty)
        if not all(0 < value < math.inf for value in positive) or not 0 <= self.train_share <= 1:
            raise DataError(
                "PriorMatch: expected lr, critic_lr and penalty > 0 and 0 <= train_share <= 1, got "
                f"{positive} and {self.train_share}"
            )

    def fit(
        self,
        model: LayerwiseBNN,
        process: ProcessPrior,
        x: Any,
        *,
        rng: Rng,
        callback: Callable[[int, float], None] | None = None,
    ) -> MatchedPrior:
        """Return ``model`` with tuned standard deviations.

        Args:
            model: A network with one output; where the search starts.
            process: What its functions should be like, in the units of the network.
            x: Training inputs [row, feature], in the units of the network.
            rng: Seed or generator.
            callback: Called with each step and its distance.

        Raises:
            DataError: Inputs that are not finite.
            ShapeError: Inputs that are no table.
        """
        x = _inputs(x)
        raw = _inverse_softplus(torch.tensor([model.w_std, model.b_std], dtype=torch.float64))
        raw = raw.to(x).requires_grad_()
        optimizer = torch.optim.RMSprop([raw], lr=self.lr)
        distances, path = [], [_softplus(raw).detach()]
        root = stream(rng, "match")
        generator = torch.Generator(device=x.device).manual_seed(root.initial_seed())
        for step in range(self.steps):
            points = self._points(x, generator)
            factors = process.factors(self.draws, points, rng=stream(root, step))
            with torch.enable_grad():
                critic = self._critic(model, raw.detach(), points, factors, generator)
                optimizer.zero_grad()
                distance = self._distance(critic, model, raw, points, factors, generator)
                (gradient,) = torch.autograd.grad(distance, raw)
            raw.grad = gradient
            optimizer.step()
            distances.append(float(distance.detach()))
            path.append(_softplus(raw).detach())
            if callback is not None:
                callback(step, distances[-1])
        stds = torch.stack(path).cpu().double()
        tuned = replace(model, w_std=tuple(stds[-1, 0].tolist()), b_std=tuple(stds[-1, 1].tolist()))
        return MatchedPrior(tuned, torch.tensor(distances).double(), stds[:, 0], stds[:, 1])

    def _points(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Choose measurement inputs [measurement, feature]."""
        known = round(self.train_share * self.measurements)
        chosen = x[torch.randint(len(x), (known,), generator=generator, device=x.device)]
        low, high = x.min(0).values, x.max(0).values
        free = torch.rand(
            self.measurements - known,
            x.shape[1],
            dtype=x.dtype,
            generator=generator,
            device=x.device,
        )
        return torch.cat([chosen, low + (high - low) * free])

    def _critic(
        self,
        model: LayerwiseBNN,
        raw: Tensor,
        points: Tensor,
        factors: Tensor,
        generator: torch.Generator,
    ) -> _Critic:
        """Fit a new critic between the two laws."""
        critic = _Critic.start(len(points), self.critic_width, points, generator)
        optimizer = torch.optim.Adagrad(critic.tensors(), lr=self.critic_lr)
        for _ in range(self.critic_steps):
            with torch.no_grad():
                ours = network_functions(model, _softplus(raw), points, self.draws, generator)
                theirs = _from_factors(factors, self.draws, generator)
                share = torch.rand(self.draws, 1, generator=generator, device=points.device)
            between = (share.to(ours) * ours + (1 - share.to(ours)) * theirs).requires_grad_()
            (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
            excess = (slope.norm(dim=1) - 1).square().mean()
            loss = critic(ours).mean() - critic(theirs).mean() + self.penalty * excess
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return critic

    def _distance(
        self,
        critic: _Critic,
        model: LayerwiseBNN,
        raw: Tensor,
        points: Tensor,
        factors: Tensor,
        generator: torch.Generator,
    ) -> Tensor:
        """Estimate E_gp phi - E_bnn phi, differentiable in the standard deviations."""
        ours = network_functions(model, _softplus(raw), points, self.draws, generator)
        theirs = _from_factors(factors, self.draws, generator)
        return critic(theirs).mean() - critic(ours).mean()


def network_functions(
    model: LayerwiseBNN, stds: Tensor, x: Tensor, n: int, generator: torch.Generator
) -> Tensor:
    """Draw ``n`` functions [n, row] of a network's prior, differentiable in ``stds``.

    Args:
        model: The network.
        stds: Standard deviations of weights and biases [2, layer].
        x: Inputs [row, feature].
        n: Draws.
        generator: Source of randomness.
    """
    sizes = [x.shape[1], *model.hidden, 1]
    values = {}
    for k, pair in enumerate(model.layer_names()):
        for kind, (name, shape) in enumerate(
            zip(pair, ((sizes[k], sizes[k + 1]), (sizes[k + 1],)), strict=True)
        ):
            noise = torch.randn(n, *shape, generator=generator, dtype=x.dtype, device=x.device)
            values[name] = stds[kind, k] * noise
    dense = model._dense(values)
    return forward(x, dense, activation_of(model.activation)).squeeze(-1)


def sliced_wasserstein(a: Tensor, b: Tensor, *, directions: int = 200, rng: Rng) -> Tensor:
    """Return the 1-Wasserstein distance averaged over random directions.

    Along each unit direction it is the mean gap of the sorted projections. Two samples of one law
    have a distance of order 1 / sqrt(n), not zero.

    Args:
        a: Draws [n, dim].
        b: Draws [n, dim].
        directions: Number of directions.
        rng: Seed or generator.

    Raises:
        ShapeError: Samples of different shapes.

    Example:
        >>> x = torch.arange(6.0)[:, None]
        >>> round(sliced_wasserstein(x, x + 2, rng=0).item(), 6)
        2.0
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ShapeError(
            f"expected two samples [n, dim] of one shape, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    generator = stream(rng, "directions", device=a.device)
    ways = torch.randn(a.shape[1], directions, generator=generator, dtype=a.dtype, device=a.device)
    ways = ways / ways.norm(dim=0)
    return ((a @ ways).sort(0).values - (b @ ways).sort(0).values).abs().mean()


@dataclass(frozen=True)
class _Critic:
    """A network [row, measurement] -> [row] with two hidden softplus layers."""

    weights: list[Tensor]
    biases: list[Tensor]

    @classmethod
    def start(cls, inputs: int, width: int, like: Tensor, generator: torch.Generator) -> _Critic:
        sizes = [inputs, width, width, 1]
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for into, out in zip(sizes[:-1], sizes[1:], strict=True):
            bound = into**-0.5  # as torch.nn.Linear starts
            for group, shape in ((weights, (into, out)), (biases, (out,))):
                uniform = torch.rand(
                    *shape, generator=generator, dtype=like.dtype, device=like.device
                )
                group.append((bound * (2 * uniform - 1)).requires_grad_())
        return cls(weights, biases)

    def tensors(self) -> list[Tensor]:
        return [*self.weights, *self.biases]

    def __call__(self, f: Tensor) -> Tensor:
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            f = torch.nn.functional.softplus(f @ weight + bias)
        return (f @ self.weights[-1] + self.biases[-1]).squeeze(-1)


def _from_factors(factors: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw functions [n, row] from factors [n or 1, row, row]."""
    noise = torch.randn(
        n, factors.shape[-1], generator=generator, dtype=factors.dtype, device=factors.device
    )
    if len(factors) == 1:
        return noise @ factors[0].mT
    return (factors @ noise[..., None]).squeeze(-1)


def _softplus(raw: Tensor) -> Tensor:
    return torch.nn.functional.softplus(raw)


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))


def _inputs(value: Any) -> Tensor:
    x = as_tensor(value, name="x")
    if x.ndim != 2 or 0 in x.shape:
        raise ShapeError(f"x: expected [row, feature], got {tuple(x.shape)}; use x[:, None]")
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    check_finite(x, "x", ("row", "column"))
    return x

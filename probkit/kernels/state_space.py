"""Stationary kernels as linear stochastic differential equations: Matern, periodic, and sums.

A Gaussian process f with such a kernel is f(x) = H z(x), where the state z is a Markov process:
z(x + d) = A(d) z(x) + N(0, Q(d)), started from its stationary law N(0, P). Inference on a sorted
grid then costs a Kalman pass, linear in the number of points (Hartikainen & Saerkkae 2010).

States are scaled so that their entries have no units: for a Matern kernel with c = sqrt(2 nu) / l
they are f, f'/c, f''/c^2. Then P does not depend on the length scale, and Q is given by incomplete
gamma functions, which keep full relative accuracy for gaps of any size; the difference P - A P A'
would lose all digits where c d is small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import AdditiveKernel, MaternKernel, PeriodicKernel, ScaleKernel
from gpytorch.kernels import Kernel as _Kernel
from scipy.special import ive
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import storable

__all__ = ["Matern", "Periodic", "StateSpace", "StateSpacePart", "state_space"]

SMOOTHNESS = (0.5, 1.5, 2.5)
"""Every ``nu`` that :class:`Matern` accepts."""


# --------------------------------------------------------------------------- kernels


class _Stationary(_Kernel):
    """A stationary kernel with one length scale and one variance, kept in float64."""

    has_lengthscale = False  # GPyTorch's own would be float32

    def __init__(
        self,
        lengthscale: float | Tensor,
        variance: float | Tensor,
        batch_shape: torch.Size | None = None,
        active_dims: Sequence[int] | Tensor | None = None,
    ) -> None:
        columns = None if active_dims is None else tuple(int(i) for i in active_dims)
        super().__init__(batch_shape=torch.Size(batch_shape or ()), active_dims=columns)
        for name, value in (("lengthscale", lengthscale), ("variance", variance)):
            raw = Positive().inverse_transform(self._checked(name, value))
            self.register_parameter(f"raw_{name}", torch.nn.Parameter(raw))
            self.register_constraint(f"raw_{name}", Positive())

    def _checked(self, name: str, value: float | Tensor) -> Tensor:
        number = torch.as_tensor(value, dtype=torch.float64).detach()
        if not bool(((number > 0) & torch.isfinite(number)).all()):
            raise DataError(f"{type(self).__name__}: expected a finite {name} > 0, got {value!r}")
        batch = self._batch_shape
        if number.numel() == 1:
            return number.reshape(()).expand(*batch, 1, 1).clone()
        if tuple(number.shape) not in (tuple(batch), (*batch, 1, 1)):
            raise DataError(
                f"{type(self).__name__}: expected {name} [*batch_shape={tuple(batch)}], got "
                f"{tuple(number.shape)}"
            )
        return number.reshape(*batch, 1, 1).clone()

    @property
    def lengthscale(self) -> Tensor:
        """Length scale [*batch_shape, 1, 1]."""
        return self.raw_lengthscale_constraint.transform(self.raw_lengthscale)

    @lengthscale.setter
    def lengthscale(self, value: float | Tensor) -> None:
        self._set("lengthscale", value)

    @property
    def variance(self) -> Tensor:
        """Variance of the process [*batch_shape, 1, 1]."""
        return self.raw_variance_constraint.transform(self.raw_variance)

    @variance.setter
    def variance(self, value: float | Tensor) -> None:
        self._set("variance", value)

    def _set(self, name: str, value: float | Tensor) -> None:
        number = self._checked(name, value)
        constraint = getattr(self, f"raw_{name}_constraint")
        self.initialize(**{f"raw_{name}": constraint.inverse_transform(number)})

    def _distances(self, x1: Tensor, x2: Tensor, diag: bool) -> Tensor:
        if x1.shape[-1] != 1 or x2.shape[-1] != 1:
            raise DataError(
                f"{type(self).__name__}: expected one column, got {x1.shape[-1]}; choose it with "
                "active_dims=[0]"
            )
        a, b = x1.double(), x2.double()
        return (a - b).abs().squeeze(-1) if diag else (a - b.mT).abs()

    def _shaped(self, value: Tensor, diag: bool) -> Tensor:
        """A hyper-parameter that broadcasts against distances."""
        return value.squeeze(-1) if diag else value

    def state_space(self) -> StateSpace:
        """Return the kernel as a stochastic differential equation."""
        return state_space(self)


class Matern(_Stationary):
    """Matern kernel of one input, with its variance and its state-space form.

    k(d) = v e^{-x} p(x), x = sqrt(2 nu) d / l, p = 1, 1 + x, 1 + x + x^2/3 for nu = 1/2, 3/2, 5/2.

    Args:
        nu: Smoothness, 0.5, 1.5 or 2.5; f has nu - 1/2 derivatives.
        lengthscale: l, in the units of the input; a number or a tensor [*batch_shape].
        variance: v, likewise.
        batch_shape: One kernel for each element.
        active_dims: The one column of the data that the kernel sees; by default there is one.

    Raises:
        DataError: A value outside its range, or more than one input column.

    Example:
        >>> kernel = Matern(0.5, lengthscale=2.0, variance=3.0)
        >>> x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
        >>> [round(k, 6) for k in kernel(x).to_dense()[0].tolist()]
        [3.0, 1.103638]
        >>> kernel.state_space().size
        1
    """

    def __init__(
        self,
        nu: float = 1.5,
        lengthscale: float | Tensor = 1.0,
        variance: float | Tensor = 1.0,
        batch_shape: torch.Size | None = None,
        active_dims: Sequence[int] | Tensor | None = None,
    ) -> None:
        if nu not in SMOOTHNESS:
            raise DataError(f"Matern: expected nu 0.5, 1.5 or 2.5, got {nu!r}")
        super().__init__(lengthscale, variance, batch_shape, active_dims)
        self.nu = float(nu)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **options: Any) -> Tensor:
        """Return the covariance of all pairs, or of matching rows."""
        scale = self._shaped(self.lengthscale, diag)
        x = math.sqrt(2 * self.nu) * self._distances(x1, x2, diag) / scale
        polynomial = {0.5: torch.ones_like(x), 1.5: 1 + x, 2.5: 1 + x + x.square() / 3}[self.nu]
        return self._shaped(self.variance, diag) * polynomial * (-x).exp()


class Periodic(_Stationary):
    """Periodic kernel of one input: k(d) = v exp(-2 sin^2(pi d / period) / l^2).

    Its state-space form is a sum of ``harmonics`` oscillators and a constant (Solin & Saerkkae
    2014); what it leaves out of the variance is added to the last one.

    Args:
        period: The period, in the units of the input.
        lengthscale: l, a number without units.
        variance: v.
        harmonics: Number of oscillators in the state-space form.
        batch_shape: One kernel for each element.
        active_dims: The one column of the data that the kernel sees; by default there is one.

    Example:
        >>> kernel = Periodic(period=1.0, lengthscale=1.0)
        >>> x = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
        >>> [round(k, 6) for k in kernel(x).to_dense()[0].tolist()]
        [1.0, 0.135335, 1.0]
    """

    def __init__(
        self,
        period: float = 1.0,
        lengthscale: float | Tensor = 1.0,
        variance: float | Tensor = 1.0,
        harmonics: int = 6,
        batch_shape: torch.Size | None = None,
        active_dims: Sequence[int] | Tensor | None = None,
    ) -> None:
        if not 0 < float(period) < math.inf:
            raise DataError(f"Periodic: expected a finite period > 0, got {period!r}")
        if not isinstance(harmonics, int) or harmonics < 1:
            raise DataError(
                f"Periodic: expected a whole number of harmonics >= 1, got {harmonics!r}"
            )
        super().__init__(lengthscale, variance, batch_shape, active_dims)
        self.period = float(period)
        self.harmonics = harmonics

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **options: Any) -> Tensor:
        """Return the covariance of all pairs, or of matching rows."""
        phase = math.pi * self._distances(x1, x2, diag) / self.period
        scaled = phase.sin() / self._shaped(self.lengthscale, diag)
        return self._shaped(self.variance, diag) * (-2 * scaled.square()).exp()


# --------------------------------------------------------------------------- state spaces


@storable
@dataclass(frozen=True)
class StateSpacePart:
    """One kernel of a sum, with unit variance: the law of its state.

    Attributes:
        kind: "matern" or "periodic".
        nu: Smoothness of a Matern kernel.
        period: Period of a periodic kernel.
        harmonics: Oscillators of a periodic kernel.
    """

    kind: str
    nu: float = 1.5
    period: float = 1.0
    harmonics: int = 6

    @property
    def size(self) -> int:
        """Number of entries of the state."""
        return int(self.nu + 0.5) if self.kind == "matern" else 2 * self.harmonics + 1

    @property
    def is_noisy(self) -> bool:
        """Whether the state is driven by noise; a periodic one only turns."""
        return self.kind == "matern"

    def observation(self, like: Tensor) -> Tensor:
        """H [state]: f = H z."""
        row = torch.zeros(self.size, dtype=like.dtype, device=like.device)
        if self.kind == "matern":
            row[0] = 1.0
        else:
            row[0] = 1.0
            row[1::2] = 1.0
        return row

    def derivative(self, log_lengthscale: Tensor) -> Tensor:
        """D [*batch, state] with f' = D z.

        Raises:
            CapabilityError: f has no derivative.
        """
        row = log_lengthscale.new_zeros(*log_lengthscale.shape, self.size)
        if self.kind == "matern":
            if self.size == 1:
                raise CapabilityError("a Matern 1/2 factor has no derivative; take nu 1.5 or 2.5")
            row[..., 1] = math.sqrt(2 * self.nu) * (-log_lengthscale).exp()
            return row
        for j in range(1, self.harmonics + 1):
            row[..., 2 * j] = -2 * math.pi * j / self.period
        return row

    def stationary(self, log_lengthscale: Tensor) -> Tensor:
        """P [*batch, state, state]."""
        batch = log_lengthscale.shape
        if self.kind == "periodic":
            return torch.diag_embed(_harmonic_variances(log_lengthscale, self.harmonics))
        like = log_lengthscale
        P = torch.eye(self.size, dtype=like.dtype, device=like.device)
        if self.size == 3:
            P[1, 1] = 1 / 3
            P[0, 2] = P[2, 0] = -1 / 3
        return P.expand(*batch, self.size, self.size)

    def dynamics(self, gaps: Tensor, log_lengthscale: Tensor) -> tuple[Tensor, Tensor]:
        """A and Q [*batch, gap, state, state] over each of the gaps [gap]."""
        if self.kind == "periodic":
            A = _rotations(gaps, self.period, self.harmonics)
            A = A.expand(*log_lengthscale.shape, *A.shape)
            return A, torch.zeros_like(A)
        c = math.sqrt(2 * self.nu) * (-log_lengthscale).exp()
        return _matern_dynamics(c.unsqueeze(-1) * gaps, self.size)


@storable
@dataclass(frozen=True)
class StateSpace:
    """A sum of independent parts: z stacks their states, f adds them up.

    Hyper-parameters are tensors [*batch, part, 2] of log length scales and log variances.

    Attributes:
        parts: The kernels of the sum.
        log_hyper: Their hyper-parameters [part, 2] as the kernel has them.

    Example:
        >>> space = (Matern(1.5, 0.3) + Periodic(0.25)).kernels[0].state_space()
        >>> A, Q = space.dynamics(torch.tensor([0.1], dtype=torch.float64), space.log_hyper)
        >>> A.shape, space.size
        (torch.Size([1, 2, 2]), 2)
    """

    parts: tuple[StateSpacePart, ...]
    log_hyper: Tensor

    @property
    def size(self) -> int:
        """Number of entries of the state."""
        return sum(part.size for part in self.parts)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where the state of each part lies."""
        ends = torch.tensor([part.size for part in self.parts]).cumsum(0).tolist()
        return tuple(
            slice(end - part.size, end) for part, end in zip(self.parts, ends, strict=True)
        )

    def observation(self) -> Tensor:
        """H [state]: f = H z."""
        return torch.cat([part.observation(self.log_hyper) for part in self.parts])

    def derivative(self, log_hyper: Tensor) -> Tensor:
        """D [*batch, state] with f' = D z."""
        return torch.cat(
            [part.derivative(log_hyper[..., p, 0]) for p, part in enumerate(self.parts)], -1
        )

    def stationary(self, log_hyper: Tensor) -> Tensor:
        """P [*batch, state, state], the law of the state at the first point."""
        return block_diagonal(
            [
                log_hyper[..., p, 1].exp()[..., None, None] * part.stationary(log_hyper[..., p, 0])
                for p, part in enumerate(self.parts)
            ]
        )

    def dynamics(self, gaps: Tensor, log_hyper: Tensor) -> tuple[Tensor, Tensor]:
        """A and Q [*batch, gap, state, state] over each of the gaps [gap]."""
        transitions, noises = [], []
        for p, part in enumerate(self.parts):
            A, Q = part.dynamics(gaps, log_hyper[..., p, 0])
            transitions.append(A)
            noises.append(log_hyper[..., p, 1].exp()[..., None, None, None] * Q)
        return block_diagonal(transitions), block_diagonal(noises)


def block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    """Put matrices [*batch, n_i, n_i] of equal batch on one diagonal."""
    if len(blocks) == 1:
        return blocks[0]
    total = sum(block.shape[-1] for block in blocks)
    batch = torch.broadcast_shapes(*(block.shape[:-2] for block in blocks))
    result = blocks[0].new_zeros(*batch, total, total)
    at = 0
    for block in blocks:
        end = at + block.shape[-1]
        result[..., at:end, at:end] = block
        at = end
    return result


def state_space(kernel: _Kernel) -> StateSpace:
    """Read a stationary kernel of one input as a stochastic differential equation.

    Known are :class:`Matern` and :class:`Periodic`, their GPyTorch counterparts, ``ScaleKernel``
    around one, and sums.

    Raises:
        CapabilityError: Another kernel.

    Example:
        >>> from gpytorch.kernels import MaternKernel, ScaleKernel
        >>> space = state_space(ScaleKernel(MaternKernel(nu=2.5)) + Matern(0.5))
        >>> [part.nu for part in space.parts], space.size
        ([2.5, 0.5], 4)
    """
    if isinstance(kernel, AdditiveKernel):
        inner = [state_space(one) for one in kernel.kernels]
        parts = tuple(part for one in inner for part in one.parts)
        return StateSpace(parts, torch.cat([one.log_hyper for one in inner]))
    if isinstance(kernel, ScaleKernel):
        scaled = state_space(kernel.base_kernel)
        factor = torch.log(kernel.outputscale.detach().double().reshape(()))
        shift = torch.stack((torch.zeros_like(factor), factor))
        return StateSpace(scaled.parts, scaled.log_hyper + shift)
    if isinstance(kernel, _Stationary) and kernel.lengthscale.numel() > 1:
        raise CapabilityError(
            f"a batch of {type(kernel).__name__} kernels {tuple(kernel._batch_shape)} is not one "
            "process; pass them one by one"
        )
    if isinstance(kernel, Matern):
        part = StateSpacePart("matern", nu=kernel.nu)
    elif isinstance(kernel, Periodic):
        part = StateSpacePart("periodic", period=kernel.period, harmonics=kernel.harmonics)
    elif isinstance(kernel, MaternKernel) and kernel.lengthscale.numel() == 1:
        hyper = torch.stack((kernel.lengthscale.detach().double().log().reshape(()), _ZERO))
        return StateSpace((StateSpacePart("matern", nu=float(kernel.nu)),), hyper[None])
    elif isinstance(kernel, PeriodicKernel) and kernel.lengthscale.numel() == 1:
        period = float(kernel.period_length.detach())
        # GPyTorch's length scale is the square of ours.
        log_scale = kernel.lengthscale.detach().double().log().reshape(()) / 2
        only = StateSpacePart("periodic", period=period)
        return StateSpace((only,), torch.stack((log_scale, _ZERO))[None])
    else:
        raise CapabilityError(
            f"{type(kernel).__name__} has no state-space form here; take probkit.kernels.Matern, "
            "Periodic, or a sum of them"
        )
    values = torch.cat((kernel.lengthscale, kernel.variance), -1).detach()
    return StateSpace((part,), values.log())


_ZERO = torch.zeros((), dtype=torch.float64)


# --------------------------------------------------------------------------- Matern by formula


def _matern_dynamics(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A and Q [*, size, size] of scaled states over dimensionless gaps x = c d [*]."""
    decay = (-x).exp()
    if size == 1:
        return decay[..., None, None], -torch.expm1(-2 * x)[..., None, None]
    one = torch.ones_like(x)
    if size == 2:
        A = _matrix([[one + x, x], [-x, one - x]])
        I0, I1, I2 = (_gamma_integral(n, x) for n in range(3))
        # The noise enters by e^{-s} (s, 1 - s), with diffusion 4.
        cross = I1 - I2
        Q = 4 * _matrix([[I2, cross], [cross, I0 - 2 * I1 + I2]])
        return decay[..., None, None] * A, Q
    h = x.square() / 2
    A = _matrix(
        [
            [one + x + h, x + 2 * h, h],
            [-h, one + x - 2 * h, x - h],
            [h - x, 2 * h - 3 * x, one - 2 * x + h],
        ]
    )
    # The noise enters by e^{-s} (s^2/2, s - s^2/2, 1 - 2 s + s^2/2), with diffusion 16/3.
    columns = ((0.0, 0.0, 0.5), (0.0, 1.0, -0.5), (1.0, -2.0, 0.5))
    integrals = [_gamma_integral(n, x) for n in range(5)]
    rows = [
        [
            sum(
                (
                    a * b * integrals[i + j]
                    for i, a in enumerate(p)
                    for j, b in enumerate(q)
                    if a * b != 0
                ),
                torch.zeros_like(x),
            )
            for q in columns
        ]
        for p in columns
    ]
    return decay[..., None, None] * A, 16 / 3 * _matrix(rows)


def _gamma_integral(n: int, x: Tensor) -> Tensor:
    """The integral of s^n e^{-2 s} from 0 to x, accurate for small x too."""
    order = torch.full_like(x, n + 1)
    return math.factorial(n) / 2 ** (n + 1) * torch.special.gammainc(order, 2 * x)


def _matrix(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(list(row), -1) for row in rows], -2)


# --------------------------------------------------------------------------- periodic


def _harmonic_variances(log_lengthscale: Tensor, harmonics: int) -> Tensor:
    """Variances [*batch, state] of the constant and of both entries of each oscillator.

    Harmonic j of the kernel has the weight 2 e^{-a} I_j(a), a = 1 / l^2 (the constant half of it).
    """
    argument = (-2 * log_lengthscale).exp()
    weights = [_scaled_bessel(j, argument) * (1 if j == 0 else 2) for j in range(harmonics)]
    rest = 1 - torch.stack(weights).sum(0)
    variances = [*weights, rest]
    doubled = [variances[0]] + [v for v in variances[1:] for _ in range(2)]
    return torch.stack(doubled, -1).clamp_min(1e-12)


def _scaled_bessel(order: int, a: Tensor) -> Tensor:
    """e^{-a} I_order(a), with its first derivative."""
    at = a.detach().cpu().numpy()
    value = torch.as_tensor(ive(order, at)).to(a)
    slope = torch.as_tensor((ive(abs(order - 1), at) + ive(order + 1, at)) / 2).to(a) - value
    return value + slope * (a - a.detach())


def _rotations(gaps: Tensor, period: float, harmonics: int) -> Tensor:
    """A [gap, state, state]: oscillator j turns by 2 pi j gap / period."""
    blocks = [torch.ones(len(gaps), 1, 1, dtype=gaps.dtype, device=gaps.device)]
    for j in range(1, harmonics + 1):
        angle = 2 * math.pi * j / period * gaps
        cos, sin = angle.cos(), angle.sin()
        blocks.append(_matrix([[cos, -sin], [sin, cos]]))
    return block_diagonal(blocks)

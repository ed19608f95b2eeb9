r"""Expectations of activations under a bivariate normal law: what a hidden layer does to a kernel.

For a layer with activation :math:`\phi` and inputs :math:`(u, v) \sim N(0, [[k, K], [K, k']])`,

- variance: :math:`f(k) = E[\phi(u)^2]`,
- covariance: :math:`F(K, k, k') = E[\phi(u) \phi(v)]`,
- derivative: :math:`\dot F(K, k, k') = E[\phi'(u) \phi'(v)] = \partial F / \partial K`.

Each :class:`Activation` gives them twice: as differentiable functions of whole tensors, and as an
in-place function of one tile with buffers that the caller owns. The leading dims of a tile stand
for whatever has variances of its own, such as the pixels of an image.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from probkit.errors import DataError
from probkit.kernels.backends.erf_mixture import tanh_mixture

__all__ = ["ACTIVATIONS", "Activation", "Erf", "ReLU", "Tanh", "activation_of"]


class Activation(ABC):
    """Moments of one activation under normal inputs.

    Shapes: ``K`` [*batch, n, m]; ``k1`` [*batch, n, 1] and ``k2`` [*batch, 1, m] are the variances
    of rows and columns, with the same batch dims; ``k`` has any shape.
    """

    name: str

    @abstractmethod
    def variance(self, k: Tensor) -> Tensor:
        """Return E[phi(u)^2], u ~ N(0, k), differentiable."""

    @abstractmethod
    def derivative_variance(self, k: Tensor) -> Tensor:
        """Return E[phi'(u)^2], u ~ N(0, k), differentiable."""

    @abstractmethod
    def covariance(self, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """Return F [*batch, n, m], twice differentiable, with finite gradients everywhere."""

    @abstractmethod
    def derivative(self, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """Return dF/dK [*batch, n, m], differentiable, with finite gradients everywhere."""

    @abstractmethod
    def factors(self, k: Tensor) -> tuple[Tensor, ...]:
        """Return what :meth:`covariance_` needs from the variances [n], as vectors [n]."""

    @abstractmethod
    def covariance_(
        self,
        K: Tensor,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        gain: float,
        work: Tensor,
        derivative: Tensor,
        *,
        with_derivative: bool,
    ) -> None:
        """Replace the tile ``K`` [*lead, r, c] by gain * F, in place.

        Args:
            K: The tile, overwritten.
            rows: :meth:`factors` of the rows, each [*lead, r, 1].
            columns: :meth:`factors` of the columns, each [*lead, 1, c].
            gain: Factor of the result (the weight variance of the next layer).
            work: Scratch [*lead, r, c].
            derivative: Scratch [*lead, r, c]; holds dF/dK afterwards (no gain) if
                ``with_derivative``.
            with_derivative: Whether dF/dK is wanted.
        """


# --------------------------------------------------------------------------- ReLU


class ReLU(Activation):
    r"""phi(u) = max(u, 0): the arc-cosine kernel of order one (Cho and Saul, 2009, eq. 6).

    With :math:`c = K / \sqrt{k k'}`, :math:`\varphi = \pi - \arccos c` and
    :math:`s = \sqrt{1 - c^2}`: :math:`F = \sqrt{k k'} (s + \varphi c) / 2 \pi` and
    :math:`\dot F = \varphi / 2 \pi`. A row of zero variance has c = 0 by rule, hence F = 0.

    Example:
        >>> half = torch.tensor([[0.5]], dtype=torch.float64)
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> round(ReLU().covariance(half, one, one).item(), 12)
        0.304498890522
    """

    name = "relu"

    def variance(self, k: Tensor) -> Tensor:
        """Variance f(k) [*any]."""
        return k / 2

    def derivative_variance(self, k: Tensor) -> Tensor:
        """Variance of phi'(u) [*any]."""
        return torch.full_like(k, 0.5)

    def covariance(self, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """Covariance F [*batch, n, m]."""
        return _ReLUCovariance.apply(K, k1, k2)

    def derivative(self, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """Derivative dF/dK [*batch, n, m]."""
        _, angle, _ = _sine_and_angle(K, _inverse_root(k1), _inverse_root(k2))
        return angle / (2 * math.pi)

    def factors(self, k: Tensor) -> tuple[Tensor, ...]:
        """Root of the variance and its inverse [n]."""
        return k.sqrt(), _inverse_root(k)

    def covariance_(
        self,
        K: Tensor,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        gain: float,
        work: Tensor,
        derivative: Tensor,
        *,
        with_derivative: bool,
    ) -> None:
        """Replace the tile ``K`` [*lead, r, c] by gain * F, without allocating."""
        root1, inverse1 = rows
        root2, inverse2 = columns
        c, sine, angle = K, work, derivative
        # -c instead of c: atan2(s, -c) is pi - arccos(c), and cheaper than arccos
        c.mul_(-inverse1).mul_(inverse2).clamp_(-1.0, 1.0)
        torch.sub(torch.ones((), dtype=c.dtype, device=c.device), c, out=sine)
        # (1 - c)(1 + c) keeps full relative accuracy near |c| = 1, where 1 - c^2 does not
        torch.addcmul(sine, sine, c, out=sine).sqrt_()
        torch.atan2(sine, c, out=angle)
        torch.addcmul(sine, angle, c, value=-1.0, out=K)
        K.mul_(root1 * (gain / (2 * math.pi))).mul_(root2)
        if with_derivative:
            angle.mul_(1 / (2 * math.pi))


class _ReLUCovariance(torch.autograd.Function):
    """Closed-form backward: autograd through arccos and sqrt is NaN on the diagonal (c = 1)."""

    @staticmethod
    def forward(ctx: Any, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        sine, angle, c = _sine_and_angle(K, _inverse_root(k1), _inverse_root(k2))
        ctx.save_for_backward(K, k1, k2, sine, angle)
        return (c.mul_(angle).add_(sine)).mul_(k1.sqrt() / (2 * math.pi)).mul_(k2.sqrt())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (G,) = grads
        K, k1, k2, sine, angle = ctx.saved_tensors
        inverse1, inverse2 = _inverse_root(k1), _inverse_root(k2)
        if torch.is_grad_enabled():  # double backward: as functions of K, k1 and k2
            sine, angle, _ = _sine_and_angle(K, inverse1, inverse2)
        grad_K = grad_k1 = grad_k2 = None
        if ctx.needs_input_grad[0]:
            grad_K = G * angle / (2 * math.pi)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            weighted = G * sine
            grad_k1 = weighted @ (k2 * inverse2).mT * inverse1 / (4 * math.pi)
            grad_k2 = (k1 * inverse1).mT @ weighted * inverse2 / (4 * math.pi)
        return grad_K, grad_k1, grad_k2


def _inverse_root(k: Tensor) -> Tensor:
    """Return 1 / sqrt(k), and 0 with zero gradient where k = 0."""
    positive = k > 0
    return torch.where(positive, torch.where(positive, k, 1.0).rsqrt(), 0.0)


def _sine_and_angle(K: Tensor, inverse1: Tensor, inverse2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sqrt(1 - c^2), pi - arccos(c), c; gradients are zero by rule where |c| = 1."""
    c = (K * inverse1 * inverse2).clamp(-1.0, 1.0)
    square = (1 - c) * (1 + c)
    if square.requires_grad:
        inside = square > 0
        sine = torch.where(inside, torch.where(inside, square, 1.0).sqrt(), 0.0)
    else:
        sine = square.sqrt()
    return sine, torch.atan2(sine, -c), c


# --------------------------------------------------------------------------- erf


class Erf(Activation):
    r"""phi(u) = erf(u): the arcsine kernel (Williams, 1997, eq. 11).

    With :math:`p = 1 + 2 k` and :math:`c = 2 K / \sqrt{p p'}`:
    :math:`F = (2 / \pi) \arcsin c` and
    :math:`\dot F = (4 / \pi) / \sqrt{p p' - 4 K^2} = (4 / \pi) / \sqrt{p p' (1 - c^2)}`.

    Example:
        >>> half = torch.tensor([[0.5]], dtype=torch.float64)
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> round(Erf().covariance(half, one, one).item(), 12)
        0.216346895939
    """

    name = "erf"

    def variance(self, k: Tensor) -> Tensor:
        """Variance f(k) [*any]."""
        # arcsin(2k / (1 + 2k)), without the infinite slope of arcsin at large k
        return torch.atan2(2 * k, (1 + 4 * k).sqrt()) * (2 / math.pi)

    def derivative_variance(self, k: Tensor) -> Tensor:
        """Variance of phi'(u) [*any]."""
        return (4 / math.pi) / (1 + 4 * k).sqrt()

    def covariance(self, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """Covariance F [*batch, n, m]."""
        return _ErfCovariance.apply(K, k1, k2)

    def derivative(self, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """Derivative dF/dK [*batch, n, m]."""
        inverse1, inverse2 = (1 + 2 * k1).rsqrt(), (1 + 2 * k2).rsqrt()
        _, cosine = _arcsine_argument(K, inverse1, inverse2)
        return (4 / math.pi) * inverse1 * inverse2 / cosine

    def factors(self, k: Tensor) -> tuple[Tensor, ...]:
        """Inverse root of 1 + 2 k [n]."""
        return ((1 + 2 * k).rsqrt(),)

    def covariance_(
        self,
        K: Tensor,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        gain: float,
        work: Tensor,
        derivative: Tensor,
        *,
        with_derivative: bool,
    ) -> None:
        """Replace the tile ``K`` [*lead, r, c] by gain * F, without allocating."""
        (inverse1,), (inverse2,) = rows, columns
        K.mul_(2 * inverse1).mul_(inverse2).clamp_(-1.0, 1.0)
        if with_derivative:
            torch.sub(torch.ones((), dtype=K.dtype, device=K.device), K, out=work)
            torch.addcmul(work, work, K, out=derivative)
            derivative.clamp_(min=torch.finfo(K.dtype).eps).rsqrt_()
            derivative.mul_(inverse1 * (4 / math.pi)).mul_(inverse2)
        K.asin_().mul_(gain * 2 / math.pi)


class _ErfCovariance(torch.autograd.Function):
    """Closed-form backward, finite even where rounding makes c = 1 (huge variances)."""

    @staticmethod
    def forward(ctx: Any, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        ctx.save_for_backward(K, k1, k2)
        c, _ = _arcsine_argument(K, (1 + 2 * k1).rsqrt(), (1 + 2 * k2).rsqrt())
        return c.asin_().mul_(2 / math.pi)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (G,) = grads
        K, k1, k2 = ctx.saved_tensors
        inverse1, inverse2 = (1 + 2 * k1).rsqrt(), (1 + 2 * k2).rsqrt()
        c, cosine = _arcsine_argument(K, inverse1, inverse2)
        scaled = G * (2 / math.pi) / cosine
        grad_K = grad_k1 = grad_k2 = None
        if ctx.needs_input_grad[0]:
            grad_K = scaled * (2 * inverse1) * inverse2
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            scaled = scaled * c
            grad_k1 = -scaled.sum(-1, keepdim=True) * inverse1**2
            grad_k2 = -scaled.sum(-2, keepdim=True) * inverse2**2
        return grad_K, grad_k1, grad_k2


def _arcsine_argument(K: Tensor, inverse1: Tensor, inverse2: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation c = 2 K / sqrt(p p') and sqrt(1 - c^2) > 0."""
    c = (2 * K * inverse1 * inverse2).clamp(-1.0, 1.0)
    return c, ((1 - c) * (1 + c)).clamp(min=torch.finfo(c.dtype).eps).sqrt()


# --------------------------------------------------------------------------- tanh


class Tanh(Activation):
    r"""phi(u) = tanh(u), by quadrature: a sum of error functions, each pair in closed form.

    With the scales :math:`\tau_i` and weights :math:`w_i` of
    :func:`~probkit.kernels.backends.erf_mixture.tanh_mixture`,

    .. math:: F = \frac{2}{\pi} \sum_{ij} w_i w_j
              \arcsin \frac{K}{\sqrt{(\tau_i^2 + k) (\tau_j^2 + k')}}.

    The sum of error functions is within 1.4e-9 of tanh everywhere and at most 1 in modulus, so that
    F is within 3e-9 of its exact value whatever the variances and the correlation; its slope is
    within 7e-9 of that of tanh, so that dF/dK is within 1.5e-8. F is the exact kernel of that sum:
    positive semi-definite, and consistent with its derivatives.

    Example:
        >>> half = torch.tensor([[0.5]], dtype=torch.float64)
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> round(Tanh().covariance(half, one, one).item(), 8)
        0.18632441
    """

    name = "tanh"

    def variance(self, k: Tensor) -> Tensor:
        """Variance f(k) [*any]."""
        total = torch.zeros_like(k)
        for square1, square2, weight in _distinct_pairs():
            rest = (square1 * square2 + k * (square1 + square2)).sqrt()
            total = total + weight * torch.atan2(k, rest)
        return total * (2 / math.pi)

    def derivative_variance(self, k: Tensor) -> Tensor:
        """Variance of phi'(u) [*any]."""
        total = torch.zeros_like(k)
        for square1, square2, weight in _distinct_pairs():
            total = total + weight * (square1 * square2 + k * (square1 + square2)).rsqrt()
        return total * (2 / math.pi)

    def covariance(self, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """Covariance F [*batch, n, m]."""
        return _TanhCovariance.apply(K, k1, k2)

    def derivative(self, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """Derivative dF/dK [*batch, n, m]."""
        return _sum_of_pairs(_erf.derivative, K, k1, k2, power=1)

    def factors(self, k: Tensor) -> tuple[Tensor, ...]:
        """Inverse root of tau_i^2 + k, for each error function [n]."""
        scales, _ = tanh_mixture()
        return tuple((tau**2 + k).rsqrt() for tau in scales)

    def covariance_(
        self,
        K: Tensor,
        rows: tuple[Tensor, ...],
        columns: tuple[Tensor, ...],
        gain: float,
        work: Tensor,
        derivative: Tensor,
        *,
        with_derivative: bool,
    ) -> None:
        """Replace the tile ``K`` [*lead, r, c] by gain * F; three tiles are allocated."""
        _, weights = tanh_mixture()
        total, smallest = work.zero_(), torch.finfo(K.dtype).eps
        c, scaled, cosine = (torch.empty_like(K) for _ in range(3))
        one = torch.ones((), dtype=K.dtype, device=K.device)
        if with_derivative:
            derivative.zero_()
        for w1, row in zip(weights, rows, strict=True):
            torch.mul(K, row, out=scaled)
            for w2, column in zip(weights, columns, strict=True):
                torch.mul(scaled, column, out=c)
                c.clamp_(-1.0, 1.0)
                if with_derivative:
                    torch.addcmul(one, c, c, value=-1.0, out=cosine)
                    cosine.clamp_(min=smallest).rsqrt_().mul_(row)
                    derivative.addcmul_(cosine, column, value=w1 * w2 * 2 / math.pi)
                total.add_(c.asin_(), alpha=w1 * w2)
        torch.mul(total, gain * 2 / math.pi, out=K)


class _TanhCovariance(torch.autograd.Function):
    """Closed-form backward in place: autograd would walk back through every term."""

    @staticmethod
    def forward(ctx: Any, K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        ctx.save_for_backward(K, k1, k2)
        tanh, out = Tanh(), K.clone(memory_format=torch.contiguous_format)
        work, unused = torch.empty_like(out), torch.empty_like(out)
        rows, columns = tanh.factors(k1), tanh.factors(k2)
        tanh.covariance_(out, rows, columns, 1.0, work, unused, with_derivative=False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (G,) = grads
        K, k1, k2 = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _tanh_gradients(G, K, k1, k2)
        # double backward: new nodes, so that no gradient runs on from one tensor to another
        alias = [t.view_as(t) for t in (K, k1, k2)]
        total = _sum_of_pairs(_erf.covariance, alias[0], alias[1], alias[2], power=0)
        wanted = [t for t, need in zip(alias, ctx.needs_input_grad, strict=True) if need]
        found = iter(torch.autograd.grad(total, wanted, G, create_graph=True))
        return tuple(next(found) if need else None for need in ctx.needs_input_grad)


def _tanh_gradients(G: Tensor, K: Tensor, k1: Tensor, k2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum(G * F) in K, k1 and k2.

    With c the argument of a term's arcsine and s = 1 / sqrt(1 - c^2), the term w w' arcsin(c) has
    the slopes w w' s / sqrt((tau^2 + k) (tau'^2 + k')) in K and -w w' s c / 2 (tau^2 + k) in k.
    """
    _, weights = tanh_mixture()
    tanh, smallest = Tanh(), torch.finfo(K.dtype).eps
    one = torch.ones((), dtype=K.dtype, device=K.device)
    grad_K, grad_k1, grad_k2 = torch.zeros_like(G), torch.zeros_like(k1), torch.zeros_like(k2)
    scaled, c, s = (torch.empty_like(G) for _ in range(3))
    for w1, row in zip(weights, tanh.factors(k1), strict=True):
        torch.mul(K, row, out=scaled)
        for w2, column in zip(weights, tanh.factors(k2), strict=True):
            torch.mul(scaled, column, out=c).clamp_(-1.0, 1.0)
            torch.addcmul(one, c, c, value=-1.0, out=s).clamp_(min=smallest).rsqrt_().mul_(G)
            c.mul_(s)
            grad_K.addcmul_(s.mul_(row), column, value=w1 * w2 * 2 / math.pi)
            grad_k1.addcmul_(c.sum(-1, keepdim=True), row * row, value=-w1 * w2 / math.pi)
            grad_k2.addcmul_(c.sum(-2, keepdim=True), column * column, value=-w1 * w2 / math.pi)
    return grad_K, grad_k1, grad_k2


_erf = Erf()


def _distinct_pairs() -> Iterator[tuple[float, float, float]]:
    """Squared scales of each unordered pair of error functions, and the weight of the pair."""
    scales, weights = tanh_mixture()
    parts = list(zip(scales, weights, strict=True))
    for i, (tau1, w1) in enumerate(parts):
        for tau2, w2 in parts[i:]:
            yield tau1**2, tau2**2, w1 * w2 * (1.0 if tau1 == tau2 else 2.0)


def _sum_of_pairs(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    K: Tensor,
    k1: Tensor,
    k2: Tensor,
    *,
    power: int,
) -> Tensor:
    """Sum of w w' (s s')^power function(s s' K, s^2 k, s'^2 k') over pairs of error functions.

    Error function i is erf(s u) with s = 1 / (tau_i sqrt(2)). Autograd keeps nothing of the terms:
    they are computed again on the way back.
    """
    scales, weights = tanh_mixture()
    parts = [(1 / (tau * math.sqrt(2)), w) for tau, w in zip(scales, weights, strict=True)]
    # all partners of one error function at once, [nodes, *batch, n, m]
    s2, w2 = K.new_tensor(parts).T.reshape(2, -1, *(1,) * K.ndim)

    def terms_of(part: tuple[float, float], K: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        s1, w1 = part
        rows = (s1**2 * k1).expand(len(parts), *k1.shape)
        terms = function(s1 * s2 * K, rows, s2**2 * k2)
        return (w1 * w2 * (s1 * s2) ** power * terms).sum(0)

    keep_nothing = torch.is_grad_enabled() and any(t.requires_grad for t in (K, k1, k2))
    total = torch.zeros_like(K)
    for part in parts:
        if keep_nothing:
            terms = checkpoint(
                terms_of, part, K, k1, k2, use_reentrant=False, preserve_rng_state=False
            )
        else:
            terms = terms_of(part, K, k1, k2)
        total = total + terms
    return total


# --------------------------------------------------------------------------- by name

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {a.name: a for a in (ReLU(), Erf(), Tanh())}
)
"""Every activation that a kernel may name."""


def activation_of(name: str) -> Activation:
    """Look an activation up by name.

    Raises:
        DataError: The name is unknown.

    Example:
        >>> activation_of("erf").name
        'erf'
    """
    if name not in ACTIVATIONS:
        raise DataError(
            f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}"
        )
    return ACTIVATIONS[name]

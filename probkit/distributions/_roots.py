"""Elementwise root search, implicit derivatives and SciPy functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "apply_scipy",
    "chandrupatla",
    "find_quantile",
    "implicit_derivative",
    "interior",
]


def apply_scipy(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
    """Apply a SciPy ufunc to tensors, on the device and in the dtype of the last one."""
    last = tensors[-1]
    arrays = [t.detach().to("cpu", torch.float64).numpy() for t in tensors]
    return torch.as_tensor(function(*arrays), dtype=last.dtype, device=last.device)


def implicit_derivative(root: Tensor, residual: Tensor, slope: Tensor) -> Tensor:
    """Attach to a root of F(x; theta) = q the derivatives of the implicit function theorem.

    The value stays ``root``; the backward pass sees one Newton step.
    """
    step = (residual.detach() - residual) / slope.detach()
    return root + torch.where(torch.isfinite(root), step, 0.0)


def find_quantile(
    distribution_function: Callable[[Tensor], Tensor],
    log_density: Callable[[Tensor], Tensor],
    q: Tensor,
    batch_shape: torch.Size,
    lower: Tensor | float = -math.inf,
    upper: Tensor | float = math.inf,
) -> Tensor:
    """Invert a distribution function by Chandrupatla's bracketing root search, elementwise.

    Source: Chandrupatla, "A new hybrid quadratic/bisection algorithm" (Advances in Engineering
    Software 28, 1997). Derivatives follow from the implicit function theorem.

    Args:
        distribution_function: F on tensors of shape [*q broadcast with *batch].
        log_density: Log of its derivative.
        q: Probabilities, broadcast with [*batch].
        batch_shape: Batch shape of the law.
        lower: End of the search interval, -inf if open; broadcast with the result.
        upper: Other end, inf if open.

    Returns:
        Quantiles of the broadcast shape; some point of the flat part where F is flat.

    Example:
        >>> import torch
        >>> import torch.distributions as td
        >>> half = torch.tensor(0.5, dtype=torch.float64)
        >>> law = td.Laplace(torch.tensor(3.0).double(), 1.0)
        >>> x = find_quantile(law.cdf, law.log_prob, half, law.batch_shape)
        >>> round(x.item(), 12)
        3.0
    """
    shape = torch.broadcast_shapes(q.shape, batch_shape)
    target = q.expand(shape)
    with torch.no_grad():
        low, high = (
            torch.as_tensor(end, dtype=q.dtype, device=q.device).expand(shape)
            for end in (lower, upper)
        )
        inner = interior(target)
        a, b = _bracket(distribution_function, inner, low, high)
        root = chandrupatla(lambda x: distribution_function(x) - inner, a, b)
    result = root
    if torch.is_grad_enabled():
        residual = distribution_function(root) - target
        if residual.requires_grad:
            result = implicit_derivative(root, residual, log_density(root).detach().exp())
    return torch.where(target <= 0, low, torch.where(target >= 1, high, result))


def interior(q: Tensor) -> Tensor:
    """Probabilities moved off 0 and 1, where the search would walk to the end of the support."""
    return q.clamp(torch.finfo(q.dtype).tiny, 1 - torch.finfo(q.dtype).eps / 2)


def _bracket(
    f: Callable[[Tensor], Tensor], target: Tensor, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """Walk in growing steps from a point inside the support until F has passed the target."""
    start = torch.zeros_like(target)
    start = torch.where(torch.isfinite(lower), lower + 1, start)
    start = torch.where(torch.isfinite(upper), upper - 1, start)
    bounded = torch.isfinite(lower) & torch.isfinite(upper)
    start = torch.where(bounded, 0.5 * (lower + upper), start)
    upwards = f(start) < target
    end = torch.where(upwards, upper, lower)
    direction = torch.where(upwards, 1.0, -1.0).to(target.dtype)
    previous = current = start
    step = 1.0
    for _ in range(510):  # 4^510 is within the range of float64
        value = f(current)
        done = torch.where(upwards, value >= target, value <= target)
        if bool(done.all()):
            break
        # Towards a finite end the distance shrinks; towards an open one the step grows.
        onward = torch.where(
            torch.isfinite(end), end + (start - end) / (4 * step), start + direction * step
        )
        previous = torch.where(done, previous, current)
        current = torch.where(done, current, onward)
        step *= 4
    return torch.minimum(previous, current), torch.maximum(previous, current)


def chandrupatla(f: Callable[[Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Root of an increasing function between a and b, to the last digits of the dtype."""
    eps = torch.finfo(a.dtype).eps
    fa, fb = f(a), f(b)
    c, fc = a, fa
    t = torch.full_like(a, 0.5)
    best = torch.where(fa.abs() < fb.abs(), a, b)
    for _ in range(2 * 1100):
        x = a + t * (b - a)
        fx = f(x)
        same = torch.sign(fx) == torch.sign(fa)
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = x, fx
        best = torch.where(fa.abs() < fb.abs(), a, b)
        width = (b - a).abs()
        tolerance = 2 * eps * best.abs() + torch.finfo(a.dtype).tiny
        done = (width <= tolerance) | (fa == 0) | ~torch.isfinite(width)
        if bool(done.all()):
            break
        xi = (a - b) / (c - b)
        phi = (fa - fb) / (fc - fb)
        quadratic = (phi.square() < xi) & ((1 - phi).square() < 1 - xi)
        step = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        t = torch.where(quadratic & torch.isfinite(step), step, 0.5)
        edge = (0.5 * tolerance / width).clamp(max=0.5)
        t = torch.where(done, 0.0, torch.minimum(torch.maximum(t, edge), 1 - edge))
    return best

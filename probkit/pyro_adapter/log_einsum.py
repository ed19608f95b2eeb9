"""An einsum of log values, as a back end of opt_einsum that torch.func can map and differentiate.

Pyro's own (``pyro.ops.einsum.torch_log``) is built on an autograd function that vmap refuses, and
its gradient is cut off below the smallest float.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.ops.einsum.util import Tensordot
from torch import Tensor

__all__ = ["einsum", "tensordot", "transpose"]


def transpose(a: Tensor, axes: Sequence[int]) -> Tensor:
    """Permute dims."""
    return a.permute(*axes)


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """Return the logarithm of the einsum of the exponentials of ``operands``.

    Example:
        >>> a, b = torch.tensor([0.1, 0.9]), torch.tensor([[0.2, 0.8], [0.5, 0.5]])
        >>> torch.allclose(einsum("a,ab->b", a.log(), b.log()).exp(), a @ b)
        True
    """
    inputs, output = equation.split("->")
    names = inputs.split(",")
    summed = sorted(set("".join(names)) - set(output))
    order = [*output, *summed]
    total = operands[0].new_zeros(())
    for dims, operand in zip(names, operands, strict=True):
        present = sorted(range(len(dims)), key=lambda i, dims=dims: order.index(dims[i]))  # type: ignore[misc]
        aligned = operand.permute(*present) if present else operand
        for place, dim in enumerate(order):
            if dim not in dims:
                aligned = aligned.unsqueeze(place)
        total = total + aligned
    return _log_sum(total, len(summed)) if summed else total


def _log_sum(x: Tensor, dims: int) -> Tensor:
    """Logarithm of the sum of exponentials over the last ``dims`` dims; -inf where all are."""
    axes = tuple(range(-dims, 0))
    peak = x.detach().amax(axes, keepdim=True).clamp(min=torch.finfo(x.dtype).min)
    total = (x - peak).exp().sum(axes)
    # Where all are -inf the gradient is zero, not NaN.
    nothing = total == 0
    log_total = torch.where(nothing, 1.0, total).log().masked_fill(nothing, -torch.inf)
    return log_total + peak.reshape(log_total.shape)


tensordot = Tensordot(einsum)

r"""Dense kernels in plain differentiable PyTorch: the recursion as it is written on paper.

Step 0 is the input layer, :math:`K_0 = w_0 X X'^T / d + b_0`; step l = 1, ..., L is an activation
and a dense layer, :math:`K_l = w_l F(K_{l-1}, k_{l-1}, k'_{l-1}) + b_l`. The variances
:math:`k_l` of single rows follow the same map. The tangent kernel starts at
:math:`\Theta_0 = K_0` and follows :math:`\Theta_l = K_l + w_l \Theta_{l-1} \circ \dot F(K_{l-1})`
(Jacot, Gabriel and Hongler, 2018; Lee et al., 2019, eq. S7).

In a residual network the steps 1, ..., L - 1 are blocks: what they give is added to what they were
given, :math:`K_l = K_{l-1} + B_l` with :math:`B_l = w_l F(K_{l-1}) + b_l`. A sum of independent
parts adds their tangent kernels, so
:math:`\Theta_l = \Theta_{l-1} + B_l + w_l \Theta_{l-1} \circ \dot F(K_{l-1})`.

Every layer is kept for autograd, so this is for small matrices and for single tiles; any number of
leading batch dims, gradients of any order that the activation has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.kernels.backends.activations import Activation

__all__ = ["covariances", "mirror_upper", "paired", "tangent_variance", "variances"]


def variances(
    x: Tensor,
    weight_var: Tensor,
    bias_var: Tensor,
    activation: Activation,
    *,
    residual: bool = False,
) -> Tensor:
    """Variances of the pre-activations after each step.

    Args:
        x: Inputs [*batch, n, d].
        weight_var: Weight variances [*batch, steps].
        bias_var: Bias variances [*batch, steps].
        activation: What sits between the steps.
        residual: Whether all steps but the first and the last are residual blocks.

    Returns:
        k [*batch, steps, n].
    """
    w, b = weight_var.unsqueeze(-1), bias_var.unsqueeze(-1)
    k = w[..., 0, :] * (x * x).sum(-1) / x.shape[-1] + b[..., 0, :]
    found = [k]
    last = w.shape[-2] - 1
    for step in range(1, last + 1):
        branch = w[..., step, :] * activation.variance(k) + b[..., step, :]
        k = k + branch if residual and step < last else branch
        found.append(k)
    return torch.stack(found, dim=-2)


def tangent_variance(
    k: Tensor, weight_var: Tensor, activation: Activation, *, residual: bool = False
) -> Tensor:
    """Diagonal of the tangent kernel [*batch, n] from the variances [*batch, steps, n]."""
    theta = k[..., 0, :]
    last = k.shape[-2] - 1
    for step in range(1, last + 1):
        before, after = k[..., step - 1, :], k[..., step, :]
        passed = weight_var[..., step, None] * theta * activation.derivative_variance(before)
        if residual and step < last:
            theta = theta + (after - before) + passed
        else:
            theta = after + passed
    return theta


def covariances(
    x1: Tensor,
    x2: Tensor,
    weight_var: Tensor,
    bias_var: Tensor,
    k1: Tensor,
    k2: Tensor,
    activation: Activation,
    *,
    tangent: bool,
    residual: bool = False,
) -> Tensor:
    """Kernel or tangent kernel between all rows.

    Args:
        x1: [*batch, n, d].
        x2: [*batch, m, d].
        weight_var: [*batch, steps].
        bias_var: [*batch, steps].
        k1: :func:`variances` of ``x1`` [*batch, steps, n].
        k2: :func:`variances` of ``x2`` [*batch, steps, m].
        activation: What sits between the steps.
        tangent: Return the tangent kernel instead of the kernel.
        residual: Whether all steps but the first and the last are residual blocks.

    Returns:
        [*batch, n, m].
    """
    w, b = weight_var[..., None, None], bias_var[..., None, None]
    K = x1 @ (x2.mT * (w[..., 0, :, :] / x1.shape[-1])) + b[..., 0, :, :]
    k1, k2 = k1.unsqueeze(-1), k2.unsqueeze(-2)
    return _propagate(K, w, b, k1, k2, activation, tangent, residual, step_dim=-3)


def paired(
    x1: Tensor,
    x2: Tensor,
    weight_var: Tensor,
    bias_var: Tensor,
    k1: Tensor,
    k2: Tensor,
    activation: Activation,
    *,
    tangent: bool,
    residual: bool = False,
) -> Tensor:
    """Kernel or tangent kernel between row i of ``x1`` and row i of ``x2``: [*batch, n]."""
    w, b = weight_var[..., None, None, None], bias_var[..., None, None, None]
    # n matrices of one row and one column
    K = (x1 * x2).sum(-1)[..., None, None] * (w[..., 0, :, :, :] / x1.shape[-1])
    K = K + b[..., 0, :, :, :]
    k1, k2 = k1[..., None, None], k2[..., None, None]
    return _propagate(K, w, b, k1, k2, activation, tangent, residual, step_dim=-4)[..., 0, 0]


def _propagate(
    K: Tensor,
    w: Tensor,
    b: Tensor,
    k1: Tensor,
    k2: Tensor,
    activation: Activation,
    tangent: bool,
    residual: bool,
    *,
    step_dim: int,
) -> Tensor:
    """Steps 1, 2, ... of the recursion; ``step_dim`` is the step axis of w, b, k1 and k2."""
    theta = K
    last = w.shape[step_dim] - 1
    for step in range(1, last + 1):
        before1, before2 = k1.select(step_dim, step - 1), k2.select(step_dim, step - 1)
        gain, bias = w.select(step_dim, step), b.select(step_dim, step)
        slope = activation.derivative(K, before1, before2) if tangent else None
        branch = gain * activation.covariance(K, before1, before2) + bias
        block = residual and step < last
        K = K + branch if block else branch
        if slope is None:
            continue
        passed = gain * theta * slope
        theta = theta + branch + passed if block else branch + passed
    return theta if tangent else K


def mirror_upper(K: Tensor, diagonal: Tensor) -> Tensor:
    """Symmetric [*batch, n, n] of the upper triangle of K, and ``diagonal`` [*batch, n]."""
    upper = torch.triu(K, 1)
    return upper + upper.mT + torch.diag_embed(diagonal)

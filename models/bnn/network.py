"""Fully-connected networks as pure functions, many sets of weights at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = ["ACTIVATIONS", "Dense", "Layer", "activation_of", "forward", "run_layers"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "erf": torch.erf,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
    "sin": torch.sin,
}
"""Every activation that :class:`~probkit.models.BNN` accepts, by name."""


class Dense(NamedTuple):
    """One layer, output = scale * input @ weight + bias.

    Attributes:
        weight: [*batch, in, out].
        bias: [*batch, out].
        scale: A number, or a tensor [*batch].
    """

    weight: Tensor
    bias: Tensor
    scale: float | Tensor = 1.0


class Layer(NamedTuple):
    """What one layer saw and gave.

    Attributes:
        inputs: [*batch, *lead, row, in], what the weights multiply (scale included).
        outputs: [*batch, *lead, row, out], before the activation.
    """

    inputs: Tensor
    outputs: Tensor


def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """Return an activation by name.

    Raises:
        DataError: There is none of that name.
    """
    found = ACTIVATIONS.get(name) if isinstance(name, str) else None
    if found is None:
        accepted = ", ".join(map(repr, ACTIVATIONS))
        raise DataError(f"activation: expected one of {accepted}, got {name!r}")
    return found


def forward(x: Tensor, dense: Sequence[Dense], activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Evaluate networks [*batch] at inputs [*lead, row, feature].

    Returns:
        [*batch, *lead, row, output].

    Example:
        >>> layer = Dense(torch.ones(5, 3, 2), torch.zeros(5, 2))
        >>> forward(torch.ones(7, 3), [layer], torch.tanh).shape
        torch.Size([5, 7, 2])
    """
    return run_layers(x, dense, activation)[-1].outputs


def run_layers(
    x: Tensor, dense: Sequence[Dense], activation: Callable[[Tensor], Tensor]
) -> list[Layer]:
    """Evaluate networks as :func:`forward` does and keep every layer.

    One broadcast product a layer serves all networks: the leading dims of the weights and the rows
    of ``x`` are flattened to [network, row, unit].
    """
    batch = dense[0].weight.shape[:-2]
    lead = x.shape[:-1]
    hidden = x.reshape(-1, x.shape[-1])
    layers: list[tuple[Tensor, Tensor]] = []
    for layer in dense:
        if layers:
            hidden = activation(layers[-1][1])
        hidden = _scaled(hidden, layer.scale)
        layers.append((hidden, _dense(hidden, layer.weight, layer.bias)))
    return [Layer(_shaped(h, batch, lead), _shaped(o, batch, lead)) for h, o in layers]


def _scaled(hidden: Tensor, scale: float | Tensor) -> Tensor:
    """Multiply [network, row, unit] (or [row, unit]) by a number or by one number a network."""
    if isinstance(scale, Tensor):
        return hidden * scale.reshape(-1, 1, 1) if scale.ndim else hidden * scale
    return hidden if scale == 1.0 else hidden * scale


def _dense(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return hidden @ weight + bias with the leading dims of the weights as one."""
    if weight.ndim == 2:
        return torch.addmm(bias, hidden, weight)
    weight = weight.reshape(-1, *weight.shape[-2:])
    bias = bias.reshape(-1, 1, bias.shape[-1])
    return torch.baddbmm(bias, hidden.expand(len(weight), *hidden.shape[-2:]), weight)


def _shaped(value: Tensor, batch: torch.Size, lead: torch.Size) -> Tensor:
    """Bring [network, row, unit] back to [*batch, *lead, unit]."""
    wanted = batch + lead + value.shape[-1:]
    if value.shape == wanted:  # The very tensor, so that later layers are derived from it.
        return value
    return value.expand(math.prod(batch), *value.shape[-2:]).reshape(wanted)

"""Priors of the weights and biases of a network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["layer_sizes", "log_normal_sum", "weight_names"]


def layer_sizes(features: int, hidden: Sequence[int], outputs: int) -> list[tuple[int, int]]:
    """List (in, out) of every layer.

    Example:
        >>> layer_sizes(3, (50, 20), 1)
        [(3, 50), (50, 20), (20, 1)]
    """
    widths = [features, *hidden, outputs]
    return list(zip(widths[:-1], widths[1:], strict=True))


def weight_names(layers: int) -> list[tuple[str, str]]:
    """Name the weight and the bias of every layer.

    Example:
        >>> weight_names(2)
        [('weight_0', 'bias_0'), ('weight_1', 'bias_1')]
    """
    return [(f"weight_{k}", f"bias_{k}") for k in range(layers)]


def log_normal_sum(
    values: Mapping[str, Tensor], event: Mapping[str, int], sd: Mapping[str, float]
) -> Tensor:
    """Return the log density [*batch] of independent N(0, sd^2) entries, summed over all sites.

    Args:
        values: Site name -> [*batch, *site].
        event: Site name -> number of dims of the site.
        sd: Site name -> standard deviation of its entries.
    """
    total: Tensor | None = None
    constant = 0.0
    for name, dims in event.items():
        value = values[name]
        own = tuple(range(value.ndim - dims, value.ndim))
        term = (-0.5 / sd[name] ** 2) * value.square().sum(own)
        total = term if total is None else total + term
        size = math.prod(value.shape[value.ndim - dims :])
        constant -= size * (math.log(sd[name]) + 0.5 * math.log(2 * math.pi))
    return torch.zeros(()) if total is None else total + constant

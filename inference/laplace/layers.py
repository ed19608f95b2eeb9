"""What a network shows of its layers, and the Jacobian of its outputs in factored form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from probkit.model import Values

__all__ = [
    "LAYER_METHODS",
    "Factor",
    "HasLayers",
    "OutputCurvature",
    "jacobian_factors",
    "row_chunks",
]

LAYER_METHODS = (
    "layer_names",
    "layers",
    "network_inputs",
    "output_curvature",
    "weight_sd",
    "log_likelihood",
)
"""The methods of :class:`HasLayers`, for checks by name."""

_CHUNK_BYTES = 2**26


class OutputCurvature(NamedTuple):
    """The negative log likelihood around the network's outputs f [row, output].

    Attributes:
        root: [row, output, k] with root root' = - d^2 log p(y | f) / df^2 for each row.
        residual: Weighted residuals root' (y - f) [row, k] of a normal likelihood; None for others.
        noise_site: Site that holds the noise variance; None where it is fixed or there is none.
    """

    root: Tensor
    residual: Tensor | None = None
    noise_site: str | None = None


@runtime_checkable
class HasLayers(Protocol):
    """A network of dense layers with independent normal priors on its weights and biases."""

    def layer_names(self) -> Sequence[tuple[str, str]]:
        """Return the sites (weight [in, out], bias [out]) of every layer, first to last."""
        ...

    def layers(self, values: Values, x: Tensor) -> Sequence[Any]:
        """Return each layer's ``inputs`` [row, in] and ``outputs`` [row, out] at ``x`` [row, d].

        ``outputs = inputs @ weight + bias``, and later layers are computed from that very tensor;
        the last layer's outputs are those of the network.
        """
        ...

    def network_inputs(self, data: Any) -> Tensor:
        """Return the inputs [row, d] of ``data`` in the network's units."""
        ...

    def output_curvature(self, values: Values, data: Any) -> OutputCurvature:
        """Return the curvature of the likelihood in the network's outputs."""
        ...

    def weight_sd(self) -> Mapping[str, float]:
        """Return the prior standard deviation of the entries of every weight and bias."""
        ...

    def log_likelihood(self, values: Values, data: Any) -> Tensor:
        """Return log p(y | values)."""
        ...


class Factor(NamedTuple):
    """The Jacobian of the outputs with respect to one layer, a Kronecker product for each row.

    d f_k / d [weight; bias] = inputs (x) slopes_k, of shape [in + 1, out], the bias last.

    Attributes:
        inputs: [row, in + 1], a one appended.
        slopes: [row, output, out], d f_k / d layer output.
    """

    inputs: Tensor
    slopes: Tensor

    def dense(self) -> Tensor:
        """Return the Jacobian [row, output, (in + 1) out]."""
        return torch.einsum("ni,nko->nkio", self.inputs, self.slopes).flatten(-2)


def jacobian_factors(model: Any, values: Values, x: Tensor) -> tuple[Tensor, list[Factor]]:
    """Return the outputs f [row, output] at ``x`` [row, d] and the factors of every layer.

    One backward pass for each output; the rows do not see each other. Where ``x`` asks for
    gradients, so do the results.
    """
    create_graph = x.requires_grad and torch.is_grad_enabled()
    with torch.enable_grad():
        names = {name for pair in model.layer_names() for name in pair}
        own = {k: v.detach().requires_grad_(k in names) for k, v in values.items()}
        layers = model.layers(own, x)
        outputs = [layer.outputs for layer in layers]
        f = outputs[-1]
        slopes = [
            torch.autograd.grad(
                f[:, k].sum(), outputs, retain_graph=True, create_graph=create_graph
            )
            for k in range(f.shape[1])
        ]
    factors = []
    for number, layer in enumerate(layers):
        inputs = torch.cat([layer.inputs, layer.inputs.new_ones(len(x), 1)], -1)
        factors.append(Factor(inputs, torch.stack([s[number] for s in slopes], 1)))
    if create_graph:
        return f, factors
    return f.detach(), [Factor(a.detach(), g.detach()) for a, g in factors]


def row_chunks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Cut rows into parts that need at most 64 MiB each (at least one row)."""
    size = max(1, _CHUNK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, size):
        yield slice(start, start + size)

"""What one reference posterior needs to be checked."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probkit.model import Model, Values

__all__ = ["Case", "double", "entries"]


def double(value: Any) -> Tensor:
    """Return a float64 tensor of data."""
    return torch.as_tensor(value, dtype=torch.float64)


def entries(draws: Values) -> dict[str, Tensor]:
    """Name every scalar of draws [chain, draw, *site] as the references do, from one.

    Example:
        >>> list(entries({"mu": torch.zeros(1, 2), "beta": torch.zeros(1, 2, 2)}))
        ['mu', 'beta[1]', 'beta[2]']
    """
    named = {}
    for site, value in draws.items():
        for place in itertools.product(*(range(size) for size in value.shape[2:])):
            label = f"[{','.join(str(k + 1) for k in place)}]" if place else ""
            named[site + label] = value[(..., *place)]
    return named


@dataclass(frozen=True)
class Case:
    """A model in two forms, which see the same data.

    Attributes:
        name: Name of the case, and of its data file up to the first hyphen.
        native: The model with a batched log joint.
        program: The same as a Pyro program; its keyword arguments are those that ``data`` gives.
        data: Turns the stored data into tensors {argument: tensor}.
        quantities: Turns draws {site: [chain, draw, *site]} of either form into the parameters of
            the reference [chain, draw, *].
        options: Options of NUTS that differ from the common ones.
        observed: The observed arguments of the program.
        from_mode: Whether chains start at the best of several maxima rather than at random: where
            the posterior has far modes of no weight, in which chains would stay for good.
    """

    name: str
    native: Model
    program: Callable[..., Any]
    data: Callable[[Mapping[str, Any]], dict[str, Any]]
    quantities: Callable[[Values], Values] = dict
    options: Mapping[str, Any] = field(default_factory=dict)
    observed: tuple[str, ...] = ("y",)
    from_mode: bool = False

    def scalars(self, draws: Values) -> dict[str, Tensor]:
        """Return every scalar of the reference [chain, draw] by its name there."""
        return entries(self.quantities(draws))

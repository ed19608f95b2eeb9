"""The potential of all chains, each on its own minibatch, and its gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probkit.density import log_joint_of
from probkit.inference.hmc.potential import Potential
from probkit.model import Batch, Site, Values
from probkit.rng import scope
from probkit.tree import leaves
from probkit.unconstrained import Unconstrained

__all__ = ["OnBatch", "StochasticPotential", "units_of"]


def units_of(values: Values, sites: Mapping[str, Site], index: Tensor | None) -> dict[str, Tensor]:
    """Select the batch's units of local sites from values [*lead, *site].

    Sites without a plate, and all sites where ``index`` is None, stay whole.
    """
    if index is None:
        return dict(values)
    chosen = {}
    for name, value in values.items():
        site = sites[name]
        local = site.plate is not None
        chosen[name] = value.index_select(-len(site.shape), index) if local else value
    return chosen


class OnBatch:
    """A model whose log joint is the unbiased estimate on one batch, values of all units given.

    With it, whatever works on full data works on a batch.
    """

    def __init__(self, model: Any, batch: Batch, sites: Mapping[str, Site]) -> None:
        self._model, self._batch, self._sites = model, batch, sites

    @property
    def batched(self) -> bool:
        """Whether leading dims are carried through."""
        return bool(getattr(self._model, "batched", False))

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return the sites of all units."""
        return self._sites

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the estimate of the log joint."""
        batch = self._batch
        chosen = units_of(values, self._sites, batch.index)
        result: Tensor = self._model.log_joint(chosen, batch.data, scale=batch.scale)
        return result


class StochasticPotential(Potential):
    """U(q) = -log p^(values(q), batch) - log |d values / d q|, unbiased over the batches.

    log p^ weighs the terms of the minibatched plate by the batch's scale. Local sites of units
    outside the batch enter through their Jacobian only.

    Args:
        model: A HasLogJoint model.
        sites: Its sites, local ones with all units.

    Attributes:
        stacked: Whether the batches of different chains are evaluated in one tensor program, by
            vmap over values and data; else chain by chain.
    """

    def __init__(self, model: Any, sites: Mapping[str, Site], *, stacked: bool = True) -> None:
        self.model, self.data = model, None
        self.sites = sites
        self.free = Unconstrained(sites)
        self.stacked = stacked
        self._batches: Sequence[Batch] = ()

    def on(self, batches: Sequence[Batch], position: Tensor) -> tuple[Tensor, Tensor]:
        """Return potential [chain] and gradient [chain, D], finite or not.

        Args:
            batches: One for each chain, or one for all.
            position: [chain, D].
        """
        self._batches = batches
        return self.raw(position)

    def log_density(self, position: Tensor) -> Tensor:
        """Return the estimated log density [chain] at [chain, D], Jacobian included."""
        values, log_det = self.free.constrain(position)
        batches = self._batches
        if len(batches) == 1:
            return self._alone(values, batches[0]) + log_det
        if self.stacked and _alike(batches):
            return self._together(values, batches) + log_det
        rows = [
            self._alone({name: value[k : k + 1] for name, value in values.items()}, batch)
            for k, batch in enumerate(batches)
        ]
        return torch.cat(rows) + log_det

    def _alone(self, values: Values, batch: Batch) -> Tensor:
        """All chains on one batch."""
        chosen = units_of(values, self.sites, batch.index)
        return log_joint_of(self.model, chosen, batch.data, scale=batch.scale)

    def _together(self, values: Values, batches: Sequence[Batch]) -> Tensor:
        """Every chain on its own batch: tensors that differ between batches are mapped over."""
        columns = list(zip(*(leaves((batch.data, batch.index)) for batch in batches), strict=True))
        own = [
            k for k, column in enumerate(columns) if any(leaf is not column[0] for leaf in column)
        ]
        stacks = [torch.stack(columns[k]) for k in own]
        first = batches[0]

        def one(point: dict[str, Tensor], parts: list[Tensor]) -> Tensor:
            exchanged = dict(zip(own, parts, strict=True))
            data, index = _with_leaves((first.data, first.index), exchanged)
            chosen = units_of(point, self.sites, index)
            result: Tensor = self.model.log_joint(chosen, data, scale=first.scale)
            return result

        with scope(validate=False):
            mapped: Tensor = torch.func.vmap(one)(dict(values), stacks)
        return mapped


def _alike(batches: Sequence[Batch]) -> bool:
    """Whether batches differ in nothing but the entries of tensors of the same shapes."""
    first = batches[0]
    parts = [leaves((batch.data, batch.index)) for batch in batches]
    if any(batch.scale != first.scale for batch in batches) or len({len(p) for p in parts}) > 1:
        return False
    return all(
        all(leaf is column[0] for leaf in column)
        or all(isinstance(leaf, Tensor) and _form(leaf) == _form(column[0]) for leaf in column)
        for column in zip(*parts, strict=True)
    )


def _form(leaf: Any) -> tuple[Any, ...]:
    return (tuple(leaf.shape), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else ()


def _with_leaves(tree: Any, exchanged: Mapping[int, Tensor]) -> Any:
    """Return ``tree`` with some of its leaves, counted as ``leaves`` lists them, exchanged."""
    count = iter(range(len(leaves(tree))))

    def build(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: build(value) for key, value in part.items()}
        if isinstance(part, list | tuple):
            items = [build(value) for value in part]
            return type(part)(*items) if hasattr(part, "_fields") else type(part)(items)
        return exchanged.get(next(count), part)

    return build(tree)

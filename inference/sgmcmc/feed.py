"""Where each chain's minibatches come from: its own indexes, a loader, or all data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.loader import Loader
from probkit.model import Batch

__all__ = ["Feed"]


@dataclass(frozen=True)
class Feed:
    """The place of every chain in its passes over the data.

    Each chain has an order of its own, so that chains share no gradient noise. A pass takes every
    unit once, in a random order drawn anew for each pass.

    Attributes:
        seeds: One for each chain's loader; empty without a loader.
        epoch: Pass of the loader.
        position: Units (own indexes) or batches (loader) taken in this pass.
        order: [chain, unit] order of the pass; None before the first one and with a loader.
    """

    seeds: tuple[int, ...] = ()
    epoch: int = 0
    position: int = 0
    order: Tensor | None = None

    def tree(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {**vars(self), "seeds": list(self.seeds)}

    @classmethod
    def of(cls, tree: Any) -> Feed:
        """Read :meth:`tree` back."""
        return cls(**{**tree, "seeds": tuple(tree["seeds"])})

    def next(
        self, model: Any, data: Any, size: int | None, rngs: Sequence[torch.Generator]
    ) -> tuple[list[Batch], Feed]:
        """Return the next batch of every chain (one for all where it is all data)."""
        if isinstance(data, Loader):
            return self._from_loader(model, data)
        if size is None:
            return [Batch(data)], self
        return self._from_indexes(model, data, size, rngs)

    def _from_loader(self, model: Any, loader: Loader) -> tuple[list[Batch], Feed]:
        taken = [loader.next(model, seed, self.epoch, self.position) for seed in self.seeds]
        _, epoch, position = taken[0]
        return [batch for batch, _, _ in taken], replace(self, epoch=epoch, position=position + 1)

    def _from_indexes(
        self, model: Any, data: Any, size: int, rngs: Sequence[torch.Generator]
    ) -> tuple[list[Batch], Feed]:
        order, position = self.order, self.position
        if order is None or position >= order.shape[1]:
            units = model.plate_size(data)
            rows = [torch.randperm(units, generator=g, device=g.device) for g in rngs]
            order, position = torch.stack(rows), 0
        index = order[:, position : position + size]
        batches = [model.minibatch(data, row) for row in index]
        return batches, replace(self, order=order, position=position + index.shape[1])

"""Blocks of keys and values in the form in which models of transformers write and read them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

__all__ = ["BlockCache", "DynamicCache", "DynamicLayer"]


class _BlockLayer(CacheLayerMixin):
    """One layer that writes into buffers [row, head, column, dim] allocated beforehand."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        super().__init__()
        self.keys, self.values, self.filled = keys, values, filled
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the buffers are there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new columns; return all that are filled."""
        begin, self.filled = self.filled, self.filled + key_states.shape[-2]
        self.keys[:, :, begin : self.filled] = key_states
        self.values[:, :, begin : self.filled] = value_states
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of columns after a query, and offset of the first."""
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        """Number of filled columns."""
        return self.filled

    def get_max_length(self) -> int:
        """Number of columns there are."""
        return self.keys.shape[-2]


class BlockCache(Cache):
    """A view of the buffers of a block, [layer, row, head, column, dim]."""

    def __init__(self, keys: Tensor, values: Tensor, filled: int) -> None:
        pairs = zip(keys, values, strict=True)
        super().__init__(layers=[_BlockLayer(key, value, filled) for key, value in pairs])

"""Attention caches that are forked by index and found again by the tokens they stand for.

A prefix is a plain value; this module only remembers keys and values that were computed for token
sequences. A block holds several sequences (rows), each in contiguous columns. A new batch takes for
every sequence the longest known beginning, copies its columns, and computes the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError

__all__ = ["Block", "PrefixCache", "common_length"]

Ids = tuple[int, ...]

_SPARE = 32
"""Columns that are allocated beyond what is needed at once."""


def common_length(a: Ids, b: Ids, most: int) -> int:
    """Return the length of the common beginning of two sequences, at most ``most``.

    Example:
        >>> common_length((1, 2, 3), (1, 2, 4), 9), common_length((1, 2), (1, 2), 1)
        (2, 1)
    """
    high = min(len(a), len(b), most)
    if a[:high] == b[:high]:
        return high
    low = 0
    while low < high - 1:  # a and b agree to low, and differ before high.
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low


@dataclass
class Block:
    """Keys and values of some sequences.

    Attributes:
        keys: [layer, row, head, column, dim].
        values: [layer, row, head, column, dim].
        tokens: What each row stands for; its columns are contiguous.
        first: Column of each row's first token.
        filled: Number of columns in use.
    """

    keys: Tensor
    values: Tensor
    tokens: list[Ids]
    first: list[int]
    filled: int

    @property
    def nbytes(self) -> int:
        """Memory that the block takes."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def aligned(self) -> bool:
        """Whether every row ends in the last column in use."""
        ends = [first + len(row) for first, row in zip(self.first, self.tokens, strict=True)]
        return all(end == self.filled for end in ends)

    def reserve(self, columns: int) -> None:
        """Make room for so many columns in all."""
        have = self.keys.shape[-2]
        if columns > have:
            more = max(columns - have, _SPARE, have // 4)
            self.keys, self.values = _widened(self.keys, more), _widened(self.values, more)

    def mask(self, columns: int) -> Tensor | None:
        """Columns that rows may attend to, [row, column]; None where those are all."""
        if not any(self.first):
            return None
        first = torch.tensor(self.first, device=self.keys.device)
        mask = torch.arange(columns, device=self.keys.device) >= first[:, None]
        return mask.long()


def _widened(buffer: Tensor, more: int) -> Tensor:
    extra = buffer.new_empty((*buffer.shape[:3], more, buffer.shape[-1]))
    return torch.cat([buffer, extra], -2)


@dataclass(frozen=True)
class _Pick:
    """The first ``count`` columns of a row of a block."""

    block: Block | None
    row: int
    count: int


class PrefixCache:
    """Runs a causal model of transformers on batches of sequences that share beginnings.

    Args:
        model: A model whose layers all attend to everything before.
        context: Number of positions that the model knows.
        limit: Bytes of keys and values that are kept between calls.

    Attributes:
        computed: Tokens of given sequences that the model was run on; generated ones do not count.
    """

    def __init__(self, model: Any, context: int, limit: int) -> None:
        self._model, self._context, self._limit = model, context, limit
        self._blocks: list[Block] = []
        self.computed = 0
        keys, values = _probe(model)
        self._empty = (keys[:, :0, :, :0], values[:, :0, :, :0])

    # ---------------------------------------------------------------- public steps

    def read(
        self, sequences: Sequence[Ids], scored: Sequence[int], room: int = 0
    ) -> tuple[Block, list[Tensor]]:
        """Compute logits at the last tokens of sequences.

        Args:
            sequences: n non-empty sequences of token ids.
            scored: For each, of how many of its last positions logits are wanted, at least one.
            room: Columns that will be added to the block.

        Returns:
            (block with one row a sequence, every row ending in the last column; logits
            [scored, token] of each sequence).
        """
        wanted = list(dict.fromkeys(zip(sequences, scored, strict=True)))
        place = {want: k for k, want in enumerate(wanted)}
        self._share([(ids, len(ids) - count) for ids, count in wanted])
        picks = [self._find(ids, len(ids) - count) for ids, count in wanted]
        block = self._continued(wanted, picks, room)
        if block is not None:
            logits = list(self.feed(block, [ids[-1:] for ids, _ in wanted]))
            self.computed += len(wanted)
        else:
            block, logits = self._computed(wanted, picks, room)
        rows = [place[want] for want in zip(sequences, scored, strict=True)]
        if rows != list(range(len(block.tokens))):
            block = self.fork(block, rows, room)
        self.remember(block)
        return block, [logits[row] for row in rows]

    def feed(
        self,
        block: Block,
        new: Sequence[Ids],
        live: Sequence[bool] | None = None,
        *,
        keep: int = 1,
    ) -> Tensor:
        """Run the model on new tokens of every row of a block, which must be aligned.

        Args:
            block: Grows by as many columns as the longest row of ``new``; shorter ones are padded
                behind.
            new: New tokens of each row.
            live: Rows that are to grow; the others run along and keep what they stand for.
            keep: Number of columns whose logits are wanted.

        Returns:
            Logits [row, column, token] of the last ``keep`` of the new columns.
        """
        from probkit.models.language._hf_cache import BlockCache

        width = max(map(len, new))
        block.reserve(block.filled + width)
        device = block.keys.device
        ids = torch.tensor([(*row, *(0,) * (width - len(row))) for row in new], device=device)
        first = torch.tensor(block.first, device=device)
        columns = torch.arange(block.filled, block.filled + width, device=device)
        output = self._model(
            input_ids=ids,
            attention_mask=block.mask(block.filled + width),
            position_ids=(columns - first[:, None]).clamp_max(self._context - 1),  # of padding
            past_key_values=BlockCache(block.keys, block.values, block.filled),
            use_cache=True,
            logits_to_keep=keep,
        )
        block.filled += width
        for k, row in enumerate(new):
            if live is None or live[k]:
                block.tokens[k] += row
        return output.logits

    def fork(self, block: Block, rows: Sequence[int], room: int) -> Block:
        """Return copies of rows of a block, by index."""
        return self._assembled([_Pick(block, row, len(block.tokens[row])) for row in rows], room)

    def remember(self, block: Block) -> None:
        """Put a block last, and forget the oldest beyond the limit."""
        self._blocks = [other for other in self._blocks if other is not block]
        self._blocks.append(block)
        total = 0
        kept: list[Block] = []
        for other in reversed(self._blocks):
            total += other.nbytes
            if total > self._limit and kept:
                break
            kept.append(other)
        self._blocks = kept[::-1]

    def forget(self) -> None:
        """Forget all blocks."""
        self._blocks = []

    # ---------------------------------------------------------------- parts

    def _share(self, wanted: Sequence[tuple[Ids, int]]) -> None:
        """Compute once what all sequences begin with, where that is not known yet."""
        if len(wanted) < 2:
            return
        head, shared = wanted[0]
        for ids, most in wanted[1:]:
            shared = common_length(head, ids, min(shared, most))
        if shared > 1 and self._find(head, shared).count < shared - 1:
            self.read([head[:shared]], [1])

    def _find(self, ids: Ids, most: int) -> _Pick:
        """Find the longest known beginning of a sequence, at most ``most`` tokens."""
        best = _Pick(None, 0, 0)
        for block in reversed(self._blocks):
            for row, known in enumerate(block.tokens):
                if best.count == most:
                    return best
                count = common_length(ids, known, most)
                if count > best.count:
                    best = _Pick(block, row, count)
        return best

    def _continued(
        self, wanted: Sequence[tuple[Ids, int]], picks: Sequence[_Pick], room: int
    ) -> Block | None:
        """Return the block that can grow where it stands: all its rows, one token short."""
        block = picks[0].block
        if block is None or len(block.tokens) != len(wanted) or not block.aligned:
            return None
        for k, ((ids, count), pick) in enumerate(zip(wanted, picks, strict=True)):
            here = pick.block is block and pick.row == k
            if not here or count > 1 or block.tokens[k] != ids[:-1]:
                return None
        block.reserve(block.filled + 1 + room)
        return block

    def _computed(
        self, wanted: Sequence[tuple[Ids, int]], picks: Sequence[_Pick], room: int
    ) -> tuple[Block, list[Tensor]]:
        """Copy what is known and compute the rest, sequences with like rests together."""
        groups: dict[int, list[int]] = {}
        for k, ((ids, _), pick) in enumerate(zip(wanted, picks, strict=True)):
            groups.setdefault((len(ids) - pick.count - 1).bit_length(), []).append(k)
        blocks, found = [], {}
        order: list[int] = []
        for members in groups.values():
            rests = [wanted[k][0][picks[k].count :] for k in members]
            width = max(map(len, rests))
            begins = [len(rest) - wanted[k][1] for k, rest in zip(members, rests, strict=True)]
            block = self._assembled([picks[k] for k in members], width + room)
            skipped = min(begins)
            logits = self.feed(block, rests, keep=width - skipped)
            self.computed += sum(map(len, rests))
            for row, k in enumerate(members):
                begin = begins[row] - skipped
                found[k] = logits[row, begin : begin + wanted[k][1]]
            blocks.append(block)
            order += members
        whole = blocks[0]
        if len(blocks) > 1 or not whole.aligned or order != sorted(order):
            at = {
                k: (block, row)
                for block, members in zip(blocks, groups.values(), strict=True)
                for row, k in enumerate(members)
            }
            rows = [at[k] for k in range(len(wanted))]
            whole = self._assembled([_Pick(b, r, len(b.tokens[r])) for b, r in rows], room)
        return whole, [found[k] for k in range(len(wanted))]

    def _assembled(self, picks: Sequence[_Pick], room: int) -> Block:
        """Copy rows into a new block in which all of them end in the last column."""
        filled = max(pick.count for pick in picks)
        shape = (len(picks), filled + room)
        keys, values = (_allocated(empty, *shape) for empty in self._empty)
        first, tokens = [], []
        for row, pick in enumerate(picks):
            first.append(filled - pick.count)
            tokens.append(pick.block.tokens[pick.row][: pick.count] if pick.block else ())
            if first[-1]:  # Columns that nobody attends to must hold finite numbers.
                keys[:, row, :, : first[-1]] = 0.0
                values[:, row, :, : first[-1]] = 0.0
            if pick.block is not None:
                begin = pick.block.first[pick.row]
                source = slice(begin, begin + pick.count)
                keys[:, row, :, first[-1] : filled] = pick.block.keys[:, pick.row, :, source]
                values[:, row, :, first[-1] : filled] = pick.block.values[:, pick.row, :, source]
        return Block(keys, values, tokens, first, filled)


def _allocated(empty: Tensor, rows: int, columns: int) -> Tensor:
    layers, _, heads, _, dim = empty.shape
    return empty.new_empty(layers, rows, heads, columns, dim)


def _probe(model: Any) -> tuple[Tensor, Tensor]:
    """Return keys and values of one token, [layer, row, head, column, dim].

    Raises:
        CapabilityError: Layers that differ in size, or that do not attend to everything before.
    """
    from probkit.models.language._hf_cache import DynamicCache, DynamicLayer

    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise CapabilityError(
            f"TransformersLM: {type(model).__name__} has layers that forget (a sliding window, a "
            "recurrent state), whose caches cannot be forked here; serve it and use OpenAILM"
        )
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    if any(k.shape != layers[0][0].shape or v.shape != layers[0][1].shape for k, v in layers):
        raise CapabilityError(
            f"TransformersLM: the layers of {type(model).__name__} have keys of several sizes, "
            "whose caches cannot be forked here; serve it and use OpenAILM"
        )
    return torch.stack([k for k, _ in layers]), torch.stack([v for _, v in layers])

"""Expectations of a multilinear function f(x) under independent factors, mode by mode.

f = u^k . a, where a is the derivative of f with respect to the vector u^k of one mode. What
inference needs of the other modes are E[a] and E[a a']. Both follow from the first two moments of
each mode, kept as tables [point, copy, r + pair]: means, then second moments as packed symmetric
matrices. "Copies" are independent fits that are advanced together.

CP: f = sum_r prod_k u^k_r, so that E[a] and E[a a'] are entrywise products of tables.
Tucker: f = w' [u^1 (x) ... (x) u^K] with w the core in C order, so that E[a] contracts the other
means with E[w], and E[a a'] the other second moments with E[w w'] folded into pairs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.models.funbat.pairs import fold, outer_pairs, pairs_of, unfold

__all__ = ["Core", "cp_messages", "function_moments", "mode_messages", "table", "tucker_messages"]

_CHUNK_NUMBERS = 2**21  # entries of the largest temporary: 16 MiB in float64


@dataclass(frozen=True)
class Core:
    """First and second moments of the core as the messages need them.

    Attributes:
        mean: E[w] [copy, r_1, ..., r_K].
        pairs: E[w w'] folded into pairs [copy, pair_1, ..., pair_K].
    """

    mean: Tensor
    pairs: Tensor

    @classmethod
    def of(cls, mean: Tensor, cov: Tensor, ranks: tuple[int, ...]) -> Core:
        """Prepare a core with mean [copy, D] and covariance [copy, D, D]."""
        second = cov + mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return cls(mean.reshape(-1, *ranks), fold(second, ranks))


def table(mean: Tensor, cov: Tensor) -> Tensor:
    """Moments of one mode, [copy, point, r] and packed [copy, point, pair] -> [point, copy, *]."""
    return torch.cat((mean, cov + outer_pairs(mean)), -1).transpose(0, 1).contiguous()


def cp_messages(rows: Sequence[Tensor]) -> Tensor:
    """E[a] and packed E[a a'] [entry, copy, R + pair] from the other modes' rows."""
    return functools.reduce(operator.mul, rows)


def tucker_messages(rows: Sequence[Tensor], k: int, core: Core, ranks: tuple[int, ...]) -> Tensor:
    """E[a] and packed E[a a'] [entry, copy, r_k + pair_k] from the other modes' rows.

    Args:
        rows: Of each mode but k in increasing order, [entry, copy, r + pair].
        k: The mode.
        core: Moments of the core.
        ranks: r_1, ..., r_K.
    """
    others = [r for j, r in enumerate(ranks) if j != k]
    means = _products([row[..., :r] for row, r in zip(rows, others, strict=True)])
    seconds = _products([row[..., r:] for row, r in zip(rows, others, strict=True)])
    weights = core.mean.movedim(1 + k, -1).flatten(1, -2)
    pair_weights = core.pairs.movedim(1 + k, -1).flatten(1, -2)
    pair_weights = pair_weights / pairs_of(ranks[k]).weight.to(pair_weights)
    return torch.cat((_apply(means, weights), _apply(seconds, pair_weights)), -1)


def mode_messages(
    tables: Sequence[Tensor],
    index: Sequence[Tensor],
    k: int,
    core: Core | None,
    ranks: tuple[int, ...],
    precision: Tensor,
    linear: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add up what the observations say about mode k at each of its points.

    Args:
        tables: Moments of each mode [point, copy, r + pair].
        index: Position of each entry on the grid of each mode [entry].
        k: The mode.
        core: Moments of the core; None for CP.
        ranks: r_1, ..., r_K.
        precision: Precision of each entry [entry or 1, copy].
        linear: Precision times target of each entry [entry, copy].

    Returns:
        eta [copy, point, r_k], the sum of linear E[a], and Lam [copy, point, pair_k], that of
        precision E[a a'].
    """
    r = ranks[k]
    total = torch.zeros_like(tables[k])
    entries = len(index[k])
    for chunk in _chunks(entries, _width(ranks, k, core is not None) * linear.shape[1]):
        rows = [tables[j][index[j][chunk]] for j in range(len(ranks)) if j != k]
        sums = _messages(rows, k, core, ranks, linear, chunk)
        shared = precision if len(precision) == 1 else precision[chunk]
        weighted = torch.empty_like(sums)
        torch.mul(sums[..., :r], linear[chunk].unsqueeze(-1), out=weighted[..., :r])
        torch.mul(sums[..., r:], shared.unsqueeze(-1), out=weighted[..., r:])
        total.index_add_(0, index[k][chunk], weighted)
    total = total.transpose(0, 1)
    return total[..., :r].contiguous(), total[..., r:].contiguous()


def function_moments(
    tables: Sequence[Tensor],
    index: Sequence[Tensor],
    core: Core | None,
    ranks: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """E[f] and E[f^2] of each entry [copy, entry]."""
    last = len(ranks) - 1
    r = ranks[last]
    entries, copies = len(index[last]), tables[last].shape[1]
    mean = tables[last].new_empty(entries, copies)
    second = torch.empty_like(mean)
    weight = pairs_of(r).weight.to(mean)
    for chunk in _chunks(entries, _width(ranks, last, core is not None) * copies):
        rows = [tables[j][index[j][chunk]] for j in range(last)]
        own = tables[last][index[last][chunk]]
        sums = own * _messages(rows, last, core, ranks, own, slice(None))
        mean[chunk] = sums[..., :r].sum(-1)
        second[chunk] = sums[..., r:] @ weight
    return mean.T, second.T


def core_sums(
    tables: Sequence[Tensor],
    index: Sequence[Tensor],
    ranks: tuple[int, ...],
    precision: Tensor,
    linear: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sums of linear E[z] [copy, D] and of precision E[z z'] [copy, D, D], z the product of modes.

    E[z z'] is summed in pairs, r (r + 1) / 2 numbers a mode in place of r^2.
    """
    copies = linear.shape[1]
    means = linear.new_zeros(copies, torch.Size(ranks[:-1]).numel(), ranks[-1])
    counts = [pairs_of(r).count for r in ranks]
    seconds = linear.new_zeros(copies, torch.Size(counts[:-1]).numel(), counts[-1])
    for chunk in _chunks(len(linear), _width(ranks, len(ranks) - 1, True) * copies):
        rows = [t[i[chunk]] for t, i in zip(tables, index, strict=True)]
        firsts = [row[..., :r] for row, r in zip(rows, ranks, strict=True)]
        pairs = [row[..., r:] for row, r in zip(rows, ranks, strict=True)]
        shared = precision if len(precision) == 1 else precision[chunk]
        last, last_pairs = firsts.pop(), pairs.pop()
        one = [last.new_ones(*last.shape[:-1], 1)]
        means += _gram(_products(firsts or one), last * linear[chunk].unsqueeze(-1))
        seconds += _gram(_products(pairs or one), last_pairs * shared.unsqueeze(-1))
    return means.flatten(1), unfold(seconds.reshape(copies, *counts), ranks)


def _messages(
    rows: Sequence[Tensor],
    k: int,
    core: Core | None,
    ranks: tuple[int, ...],
    like: Tensor,
    chunk: slice,
) -> Tensor:
    """E[a], E[a a'] of some entries; without other modes, a is the core itself or ones."""
    if rows:
        return cp_messages(rows) if core is None else tucker_messages(rows, k, core, ranks)
    r, copies = ranks[k], like.shape[1]
    entries = len(like[chunk])
    if core is None:
        return like.new_ones(entries, copies, r + pairs_of(r).count)
    own = torch.cat((core.mean, core.pairs / pairs_of(r).weight.to(core.pairs)), -1)
    return own.expand(entries, *own.shape)


def _products(parts: Sequence[Tensor]) -> Tensor:
    """Kronecker products over the last dim, the first part slowest."""
    result = parts[0]
    for part in parts[1:]:
        result = (result.unsqueeze(-1) * part.unsqueeze(-2)).flatten(-2)
    return result


def _apply(vectors: Tensor, matrices: Tensor) -> Tensor:
    """[entry, copy, p] times [copy, p, q] -> [entry, copy, q]."""
    return (vectors.transpose(0, 1) @ matrices).transpose(0, 1)


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """Sum over entries of outer products, [entry, copy, p] and [entry, copy, q]."""
    return left.permute(1, 2, 0) @ right.transpose(0, 1)


def _width(ranks: tuple[int, ...], k: int, has_core: bool) -> int:
    """Numbers in the widest temporary of one entry."""
    counts = [pairs_of(r).count for r in ranks]
    if not has_core:
        return counts[k] + ranks[k]
    return torch.Size(counts[:k] + counts[k + 1 :]).numel()


def _chunks(entries: int, width: int) -> Iterator[slice]:
    size = max(1, _CHUNK_NUMBERS // max(width, 1))
    for start in range(0, entries, size):
        yield slice(start, start + size)

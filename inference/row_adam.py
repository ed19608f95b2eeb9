"""Adam on tables of which a step touches some rows: the work does not grow with the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probkit.inference.ranks import Ranks

__all__ = ["RowAdam", "gather_table", "own_rows"]

_BETAS = (0.9, 0.999)
_EPS = 1e-8


class RowAdam:
    """A table and the moments of its rows' gradients, advanced where a gradient comes in.

    Each row counts its own steps, so that its moments are unbiased from its first step on; where
    every step touches all rows this is Adam (Kingma and Ba 2015).

    With several processes each owns the rows rank, rank + count, ...; rows are fetched from their
    owners, and gradients go back to them to be averaged.

    Args:
        table: Name -> tensor [own row, *]; changed in place.
        moments: What :meth:`state` returned; None to begin.
        ranks: The processes that share the table.
    """

    def __init__(self, table: Mapping[str, Tensor], moments: Any, ranks: Ranks) -> None:
        self.table, self.ranks = dict(table), ranks
        first = next(iter(self.table.values()))
        if moments is None:
            moments = {
                "count": torch.zeros(len(first), dtype=torch.int32, device=first.device),
                "mean": {name: torch.zeros_like(value) for name, value in table.items()},
                "square": {name: torch.zeros_like(value) for name, value in table.items()},
            }
        self.count: Tensor = moments["count"]
        self.mean: dict[str, Tensor] = moments["mean"]
        self.square: dict[str, Tensor] = moments["square"]

    def state(self) -> dict[str, Any]:
        """Return the moments."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def fetch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return the rows [row, *] of every tensor, as leaves that take gradients."""
        if self.ranks.world == 1:
            found = {name: value.index_select(0, rows) for name, value in self.table.items()}
        else:
            route = _Route(rows, self.ranks)
            found = {name: route.fetch(value) for name, value in self.table.items()}
        return {name: value.requires_grad_() for name, value in found.items()}

    def step(self, rows: Tensor, gradients: Mapping[str, Tensor], lr: float) -> None:
        """Move the rows against their gradients.

        Args:
            rows: Distinct row numbers [row].
            gradients: Name -> [row, *]; with several processes, each its own.
            lr: Learning rate.
        """
        if self.ranks.world > 1:
            route = _Route(rows, self.ranks)
            rows, gradients = route.average(gradients)
        if not len(rows):
            return
        count = self.count.index_select(0, rows) + 1
        self.count.index_copy_(0, rows, count)
        first, second = (1 - b ** count.double() for b in _BETAS)
        for name, gradient in gradients.items():
            shape = (-1, *(1,) * (gradient.ndim - 1))
            mean = self.mean[name].index_select(0, rows).lerp_(gradient, 1 - _BETAS[0])
            square = self.square[name].index_select(0, rows).mul_(_BETAS[1])
            square.addcmul_(gradient, gradient, value=1 - _BETAS[1])
            self.mean[name].index_copy_(0, rows, mean)
            self.square[name].index_copy_(0, rows, square)
            root = square.sqrt_().div_(second.sqrt().to(square).reshape(shape)).add_(_EPS)
            move = mean.div_(first.to(mean).reshape(shape)).div_(root)
            self.table[name].index_add_(0, rows, move, alpha=-lr)


class _Route:
    """The way of rows between the processes that need them and the one that owns each."""

    def __init__(self, rows: Tensor, ranks: Ranks) -> None:
        self.world = ranks.world
        owner = rows % ranks.world
        self.order = owner.argsort(stable=True)
        self.asked = torch.bincount(owner, minlength=ranks.world)
        self.given = torch.empty_like(self.asked)
        torch.distributed.all_to_all_single(self.given, self.asked)
        wanted = rows[self.order] // ranks.world
        self.wanted = _exchange(wanted, self.asked, self.given)  # Own rows that others ask for.

    def fetch(self, own: Tensor) -> Tensor:
        """Return the rows asked for, in the order in which they were."""
        arrived = _exchange(own.index_select(0, self.wanted), self.given, self.asked)
        return torch.empty_like(arrived).index_copy_(0, self.order, arrived)

    def average(self, gradients: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the own rows that anyone needs, and the mean over processes of their gradients."""
        rows, place = torch.unique(self.wanted, return_inverse=True)
        found = {}
        for name, gradient in gradients.items():
            arrived = _exchange(gradient[self.order], self.asked, self.given)
            total = arrived.new_zeros(len(rows), *arrived.shape[1:])
            found[name] = total.index_add_(0, place, arrived) / self.world
        return rows, found


def _exchange(rows: Tensor, sent: Tensor, received: Tensor) -> Tensor:
    """Send ``sent[k]`` rows to process k and receive ``received[k]`` from it."""
    arrived = rows.new_empty(int(received.sum()), *rows.shape[1:])
    torch.distributed.all_to_all_single(
        arrived, rows.contiguous(), received.tolist(), sent.tolist()
    )
    return arrived


def own_rows(table: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return this process's rows of a whole table."""
    return {name: value[ranks.rank :: ranks.world].clone() for name, value in table.items()}


def gather_table(own: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return the whole table, its rows collected from all processes."""
    if ranks.world == 1:
        return dict(own)
    found = {}
    for name, value in own.items():
        sizes: list[Tensor] = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.world)]
        torch.distributed.all_gather(sizes, torch.tensor([len(value)]))
        longest = max(int(size) for size in sizes)
        padded = value.new_zeros(longest, *value.shape[1:])
        padded[: len(value)] = value
        parts: Sequence[Tensor] = [torch.empty_like(padded) for _ in range(ranks.world)]
        torch.distributed.all_gather(parts, padded)
        whole = value.new_empty(sum(int(size) for size in sizes), *value.shape[1:])
        for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            whole[rank :: ranks.world] = part[: int(size)]
        found[name] = whole
    return found

"""Adam on tables of which a step touches some rows: the work does not grow with the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.inference.ranks import Ranks

__all__ = ["FetchedRows", "RowAdam", "gather_table", "own_rows"]

_BETAS = (0.9, 0.999)
_EPS = 1e-8


class FetchedRows(NamedTuple):
    """Rows of a table, ready to be differentiated.

    Attributes:
        rows: Their distinct numbers [row].
        leaf: All tensors of the table side by side [row, width]; takes the gradient.
        parts: The tensors by name [row, *], views of the leaf.
    """

    rows: Tensor
    leaf: Tensor
    parts: dict[str, Tensor]


class RowAdam:
    """A table and the moments of its rows' gradients, advanced where a gradient comes in.

    Each row counts its own steps, so that its moments are unbiased from its first step on; where
    every step touches all rows this is Adam (Kingma and Ba 2015). The tensors of a table lie side
    by side: a row is then one stretch of memory, and reading one costs a single miss.

    With several processes each owns the rows rank, rank + count, ...; rows are fetched from their
    owners, and gradients go back to them to be averaged.

    Args:
        table: Name -> tensor [own row, *]; copied.
        moments: What :meth:`moments` returned, copied too; None to begin.
        ranks: The processes that share the table.
    """

    def __init__(self, table: Mapping[str, Tensor], moments: Any, ranks: Ranks) -> None:
        self._shapes = {name: tuple(value.shape[1:]) for name, value in table.items()}
        self._values = torch.cat([v.detach().reshape(len(v), -1) for v in table.values()], 1)
        self._ranks = ranks
        if moments is None:
            size = len(self._values)
            self._count = torch.zeros(size, dtype=torch.int32, device=self._values.device)
            self._mean = torch.zeros_like(self._values)
            self._square = torch.zeros_like(self._values)
        else:
            self._count = moments["count"].clone()
            self._mean = moments["mean"].clone()
            self._square = moments["square"].clone()

    def moments(self) -> dict[str, Tensor]:
        """Return the steps of each row, and its gradient's first and second moments."""
        return {"count": self._count, "mean": self._mean, "square": self._square}

    def table(self) -> dict[str, Tensor]:
        """Return the table as it was given, by name."""
        return self._cut(self._values)

    def _cut(self, values: Tensor) -> dict[str, Tensor]:
        found, start = {}, 0
        for name, shape in self._shapes.items():
            width = math.prod(shape)
            found[name] = values[:, start : start + width].reshape(len(values), *shape)
            start += width
        return found

    def fetch(self, rows: Tensor) -> FetchedRows:
        """Return rows [row], from wherever they are."""
        if self._ranks.world == 1:
            leaf = self._values.index_select(0, rows)
        else:
            leaf = _Route(rows, self._ranks).fetch(self._values)
        leaf.requires_grad_()
        return FetchedRows(rows, leaf, self._cut(leaf))

    def step(self, fetched: FetchedRows, lr: float) -> None:
        """Move the rows against the gradient of their leaf; without one they stay."""
        gradient, rows = fetched.leaf.grad, fetched.rows
        if gradient is None:
            return
        if self._ranks.world == 1:
            values = fetched.leaf.detach()
        else:
            rows, gradient = _Route(rows, self._ranks).average(gradient)
            values = self._values.index_select(0, rows)
        if not len(rows):
            return
        count = self._count.index_select(0, rows).add_(1)
        self._count.index_copy_(0, rows, count)
        first, second = (1 - beta ** count.double()[:, None] for beta in _BETAS)
        mean = self._mean.index_select(0, rows).lerp_(gradient, 1 - _BETAS[0])
        square = self._square.index_select(0, rows).mul_(_BETAS[1])
        square.addcmul_(gradient, gradient, value=1 - _BETAS[1])
        self._mean.index_copy_(0, rows, mean)
        self._square.index_copy_(0, rows, square)
        # mean / first / (sqrt(square / second) + eps), in place.
        root = square.sqrt_().add_((_EPS * second.sqrt()).to(square))
        factor = (lr * second.sqrt() / first).to(mean)
        self._values.index_copy_(0, rows, values.sub_(mean.mul_(factor).div_(root)))


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

    def average(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the own rows that anyone needs, and the mean over processes of their gradient."""
        rows, place = torch.unique(self.wanted, return_inverse=True)
        arrived = _exchange(gradient.index_select(0, self.order), self.asked, self.given)
        total = arrived.new_zeros(len(rows), arrived.shape[1])
        return rows, total.index_add_(0, place, arrived) / self.world


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
    return {name: _gathered(value, ranks) for name, value in own.items()}


def _gathered(own: Tensor, ranks: Ranks) -> Tensor:
    if ranks.world == 1:
        return own
    mine = torch.tensor([len(own)])
    sizes = [torch.zeros_like(mine) for _ in range(ranks.world)]
    torch.distributed.all_gather(sizes, mine)
    longest = max(int(size) for size in sizes)
    padded = own.new_zeros(longest, *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(ranks.world)]
    torch.distributed.all_gather(parts, padded)
    whole = own.new_empty(sum(int(size) for size in sizes), *own.shape[1:])
    for rank, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        whole[rank :: ranks.world] = part[: int(size)]
    return whole

"""What a guide is: a family of distributions over a model's sites, with parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.distributions import Distribution

from probkit.model import Batch, Values
from probkit.rng import Rng
from probkit.tree import Tree

__all__ = ["Guide", "HasBound", "HasMarginals", "HasTables", "LogQ", "Params"]

Params = Tree


@dataclass(frozen=True)
class LogQ:
    """Log density of guide draws, its two parts apart because a minibatch scales only one.

    Attributes:
        global_: [n] log density of the global sites.
        local: [n] log density of the local sites of the batch (zero where there are none).
    """

    global_: Tensor
    local: Tensor

    def total(self, scale: float = 1.0) -> Tensor:
        """Return [n], local terms multiplied by ``scale``."""
        return self.global_ + scale * self.local


@runtime_checkable
class Guide(Protocol):
    """A parametric proposal for the sites of a model.

    It is the variational family of SVI, the proposal of importance samplers and particle filters,
    and the amortised network of Direct. A guide holds options only; its parameters are arguments.
    """

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Return starting parameters, a tree of tensors; may be empty."""
        ...

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw ``n`` values and their log density, differentiable in ``params``.

        Returns:
            Values [n, *site] for the sites of the batch (constrained), and :class:`LogQ` with
            respect to them.
        """
        ...


@runtime_checkable
class HasMarginals(Protocol):
    """A guide whose marginals are known distributions."""

    def marginals(self, params: Params, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return {site: distribution}, constrained."""
        ...


@runtime_checkable
class HasBound(Protocol):
    """A guide that has part of the evidence lower bound in closed form."""

    def elbo(self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng) -> Tensor:
        """Return ``n`` estimates [n] of the bound on all data from a batch, each from one draw.

        Local terms are weighted by ``batch.scale``; the mean over batches and draws is the bound.
        """
        ...


@runtime_checkable
class HasTables(Protocol):
    """A guide with tables so large that a step should touch some of their rows only.

    A table is an entry ``params[name]`` whose tensors all have one leading dim of rows. A sampler
    asks for the rows that a batch needs, and calls the bound with parameters that hold these rows
    in the place of the table, beside what :meth:`rows` returned. Only they are updated.
    """

    def tables(self, params: Params, model: Any) -> tuple[str, ...]:
        """Name the tables."""
        ...

    def rows(
        self, params: Params, model: Any, batch: Batch, *, rng: Rng, part: tuple[int, int] = (0, 1)
    ) -> Mapping[str, Mapping[str, Any]]:
        """Return {table: {"rows": distinct numbers [row], ...}} for the bound on ``batch``.

        Args:
            params: Parameters; tables may be absent.
            model: The model.
            batch: The batch.
            rng: Stream of whatever is drawn along the way.
            part: (number, count) of this process among those that share a step.
        """
        ...

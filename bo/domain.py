"""The box in which inputs live, as surrogates and optimisers of acquisition functions see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.numerics import check_finite

__all__ = ["Domain", "as_domain"]


@dataclass(frozen=True, eq=False)
class Domain:
    """Bounds and kinds of the columns of X [row, feature].

    Columns are continuous unless named. Those of ``categorical`` hold category codes, the whole
    numbers from their lower to their upper bound, without an order; those of ``integer`` hold whole
    numbers with one.

    Args:
        bounds: [2, feature], lower over upper.
        categorical: Columns of category codes.
        integer: Columns of whole numbers.
        branches: Of a conditional space: one mapping {column: value} for each branch, which fixes
            the columns that select it and those that are not active in it. Empty where every
            column is always active.
        fidelity: Column that says how faithful an evaluation is, its upper bound the target;
            None for none.

    Raises:
        ShapeError: ``bounds`` is not [2, feature].
        DataError: Bounds that are not finite, equal or reversed; columns that do not exist, are
            named twice, or hold no whole numbers.

    Example:
        >>> domain = Domain(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), categorical=(1,))
        >>> domain.size, domain.ordinal, domain.choices(1)
        (2, (0,), (0.0, 1.0, 2.0))
    """

    bounds: Tensor
    categorical: tuple[int, ...] = ()
    integer: tuple[int, ...] = ()
    branches: tuple[Mapping[int, float], ...] = field(default=())
    fidelity: int | None = None

    def __post_init__(self) -> None:
        bounds = as_tensor(self.bounds, name="bounds").double()
        if bounds.ndim != 2 or bounds.shape[0] != 2 or bounds.shape[1] == 0:
            raise ShapeError(
                f"bounds: expected [2, feature], lower over upper, got {tuple(bounds.shape)}"
            )
        check_finite(bounds, "bounds", ("bound", "feature"))
        wrong = (bounds[0] >= bounds[1]).nonzero()
        if len(wrong):
            k = int(wrong[0])
            low, high = bounds[:, k].tolist()
            raise DataError(
                f"bounds: expected lower < upper for each feature, got [{low:g}, {high:g}] for "
                f"feature {k}; leave a constant out"
            )
        object.__setattr__(self, "bounds", bounds)
        for name in ("categorical", "integer"):
            object.__setattr__(self, name, self._columns(name))
        both = sorted(set(self.categorical) & set(self.integer))
        if both:
            raise DataError(f"expected columns categorical or integer, got both for {both}")
        for k in (*self.categorical, *self.integer):
            if not bool((bounds[:, k] == bounds[:, k].round()).all()):
                raise DataError(
                    f"bounds: expected whole numbers for feature {k}, got {bounds[:, k].tolist()}"
                )
        if self.fidelity is not None and not 0 <= self.fidelity < self.size:
            raise DataError(f"fidelity: expected a column in [0, {self.size}), got {self.fidelity}")
        object.__setattr__(self, "branches", tuple(dict(b) for b in self.branches))
        for branch in self.branches:
            if not all(0 <= k < self.size for k in branch):
                raise DataError(
                    f"branches: expected columns in [0, {self.size}), got {sorted(branch)}"
                )

    def _columns(self, name: str) -> tuple[int, ...]:
        given = tuple(int(k) for k in getattr(self, name))
        if len(set(given)) < len(given) or not all(0 <= k < self.size for k in given):
            raise DataError(
                f"{name}: expected distinct columns in [0, {self.size}), got {list(given)}"
            )
        return tuple(sorted(given))

    @property
    def size(self) -> int:
        """Number of columns."""
        return int(self.bounds.shape[1])

    @property
    def ordinal(self) -> tuple[int, ...]:
        """Columns with an order: continuous and whole numbers."""
        return tuple(k for k in range(self.size) if k not in self.categorical)

    def choices(self, column: int) -> tuple[float, ...]:
        """Return the values of a categorical or integer column."""
        low, high = self.bounds[:, column].tolist()
        return tuple(float(value) for value in range(int(low), int(high) + 1))

    def check(self, X: Tensor, name: str = "X") -> None:
        """Refuse points outside the box.

        Args:
            X: [*lead, feature].
            name: What to call it.

        Raises:
            ShapeError: Another number of columns.
            DataError: A value outside the bounds, or a code that is no whole number.
        """
        if X.ndim < 1 or X.shape[-1] != self.size:
            raise ShapeError(f"{name}: expected [row, feature={self.size}], got {tuple(X.shape)}")
        flat = X.reshape(-1, self.size)
        bounds = self.bounds.to(flat)
        slack = 1e-9 * (bounds[1] - bounds[0])
        outside = (flat < bounds[0] - slack) | (flat > bounds[1] + slack)
        if bool(outside.any()):
            row, k = (int(i) for i in outside.nonzero()[0])
            low, high = bounds[:, k].tolist()
            raise DataError(
                f"{name}: expected values within the bounds, got {flat[row, k].item():g} outside "
                f"[{low:g}, {high:g}] at row {row}, feature {k}"
            )
        codes = list(self.categorical)
        broken = flat[:, codes] != flat[:, codes].round()
        if bool(broken.any()):
            row, at = (int(i) for i in broken.nonzero()[0])
            raise DataError(
                f"{name}: expected whole category codes, got {flat[row, codes[at]].item():g} at "
                f"row {row}, feature {codes[at]}"
            )

    def rounded(self, X: Tensor) -> Tensor:
        """Return points [*lead, feature] with whole numbers where they belong, inside the box."""
        bounds = self.bounds.to(X)
        X = X.clone()
        whole = [*self.categorical, *self.integer]
        X[..., whole] = X[..., whole].round()
        return torch.minimum(torch.maximum(X, bounds[0]), bounds[1])

    def sample(self, n: int, *, seed: int) -> Tensor:
        """Draw ``n`` points [n, feature] by a scrambled Sobol sequence, within random branches."""
        engine = torch.quasirandom.SobolEngine(self.size, scramble=True, seed=seed)
        unit = engine.draw(n, dtype=torch.float64)
        low, high = self.bounds
        X = low + unit * (high - low)
        for k in (*self.categorical, *self.integer):
            # Equal shares for all values, the outer ones included.
            count = high[k] - low[k] + 1
            X[:, k] = low[k] + (unit[:, k] * count).floor().clamp(max=float(count) - 1)
        if self.branches:
            generator = torch.Generator().manual_seed(seed)
            which = torch.randint(len(self.branches), (n,), generator=generator)
            for number, branch in enumerate(self.branches):
                for k, value in branch.items():
                    X[which == number, k] = float(value)
        return X


def as_domain(bounds: Domain | Tensor | Sequence[Any] | None, features: int) -> Domain:
    """Read bounds as a domain; None is the unit cube.

    Example:
        >>> as_domain(None, 3).bounds.tolist()
        [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    if isinstance(bounds, Domain):
        return bounds
    if bounds is None:
        bounds = torch.stack([torch.zeros(features), torch.ones(features)]).double()
    return Domain(as_tensor(bounds, name="bounds"))

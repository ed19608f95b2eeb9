"""Inputs as surrogates see them: the unit cube, whole numbers rounded, categories as such."""

from __future__ import annotations

import torch
from botorch.models.transforms.input import InputTransform
from torch import Tensor
from torch.nn import Module

from probkit.bo.domain import Domain
from probkit.errors import ShapeError

__all__ = ["Encode"]


class Encode(InputTransform, Module):
    """Map points of a domain to features: ordinal columns to [0, 1], categories to codes or units.

    Whole numbers are rounded on the way in, so that a surrogate is constant between them. With
    ``one_hot`` each category has a column of its own, scaled by 1 / sqrt(2) so that two different
    categories are one apart; else codes stay in their place.

    Args:
        domain: Bounds and kinds of the columns.
        one_hot: Whether categories become columns of their own, after all others.
        center: Map ordinal columns to [-1, 1], as networks like their inputs.

    Example:
        >>> domain = Domain(torch.tensor([[0.0, 0.0], [10.0, 2.0]]), categorical=(1,))
        >>> Encode(domain, one_hot=True)(torch.tensor([[5.0, 2.0]])).tolist()
        [[0.5, 0.0, 0.0, 0.7071067690849304]]
    """

    transform_on_train = True
    transform_on_eval = True
    transform_on_fantasize = True
    is_one_to_many = False
    low: Tensor
    span: Tensor

    def __init__(self, domain: Domain, *, one_hot: bool = False, center: bool = False) -> None:
        super().__init__()
        self.domain, self.one_hot, self.center = domain, one_hot, center
        self.register_buffer("low", domain.bounds[0].clone())
        self.register_buffer("span", domain.bounds[1] - domain.bounds[0])

    @property
    def features(self) -> int:
        """Number of columns that come out."""
        if not self.one_hot:
            return self.domain.size
        extra = sum(len(self.domain.choices(k)) for k in self.domain.categorical)
        return len(self.domain.ordinal) + extra

    def transform(self, X: Tensor) -> Tensor:
        """Map points [*lead, row, feature]."""
        if X.shape[-1] != self.domain.size:
            raise ShapeError(
                f"X: expected [*lead, row, feature={self.domain.size}], got {tuple(X.shape)}"
            )
        low, span = self.low.to(X), self.span.to(X)
        if self.domain.integer:
            whole = list(self.domain.integer)
            X = X.clone()
            X[..., whole] = _round(X[..., whole])
        unit = (X - low) / span
        if self.center:
            unit = 2 * unit - 1
        if not self.domain.categorical:
            return unit
        if not self.one_hot:
            unit = unit.clone()
            codes = list(self.domain.categorical)
            unit[..., codes] = X[..., codes].round()
            return unit
        parts = [unit[..., list(self.domain.ordinal)]]
        for k in self.domain.categorical:
            choices = torch.tensor(self.domain.choices(k), dtype=X.dtype, device=X.device)
            parts.append((X[..., k : k + 1].round() == choices).to(X) * 0.5**0.5)
        return torch.cat(parts, -1)

    def equals(self, other: InputTransform) -> bool:
        """Whether another transform does the same."""
        return (
            isinstance(other, Encode)
            and super().equals(other)
            and (self.one_hot, self.center) == (other.one_hot, other.center)
            and self.domain.categorical == other.domain.categorical
            and self.domain.integer == other.domain.integer
        )


def _round(X: Tensor) -> Tensor:
    """Round, letting gradients through as if it were not done."""
    return X + (X.round() - X).detach()

"""Bring any learning-curve metric to [0, 1], larger is better, and bring predictions back.

With hard bounds l_h, u_h that the metric cannot cross (they may be infinite), finite soft bounds
l_s, u_s between which it usually lies, and the logistic function sigma,

    z(y) = 2 (y - l_s) / (u_s - l_s) - 1
    g(y) = (sigma(z(y)) - sigma(z(l_h))) / (sigma(z(u_h)) - sigma(z(l_h)))

and 1 - g(y) for a metric to minimise.

Source: Adriaensen, Rakotoarison, Mueller and Hutter (2023), appendix C. As printed there z
subtracts its offset, which does not map the soft bounds to -1 and 1; here it is added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable

__all__ = ["CurveNormalizer"]

Bound = Any  # a number, or one for each curve: Tensor [curve]

_BOUNDS = ("lower", "soft_lower", "soft_upper", "upper")


@storable
@dataclass(frozen=True)
class CurveNormalizer:
    """The map of a metric to [0, 1] in which larger is better.

    A bound may be one number, or a tensor [curve] where the curves of a batch differ.

    Args:
        minimize: Whether smaller values of the metric are better.
        lower: Hard lower bound l_h; -inf where there is none.
        soft_lower: Soft lower bound l_s.
        soft_upper: Soft upper bound u_s.
        upper: Hard upper bound u_h; inf where there is none.

    Raises:
        DataError: Soft bounds are infinite, equal, in the wrong order or outside the hard bounds.
        ShapeError: A bound is neither a number nor a tensor [curve].

    Example:
        >>> accuracy = CurveNormalizer.accuracy()
        >>> g = accuracy.normalize(torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
        >>> [round(v, 4) for v in g.tolist()]
        [0.0, 0.235, 1.0]
        >>> [round(v, 4) for v in accuracy.denormalize(g).tolist()]
        [0.0, 0.25, 1.0]
    """

    minimize: bool
    lower: Bound
    soft_lower: Bound
    soft_upper: Bound
    upper: Bound

    def __post_init__(self) -> None:
        for name in _BOUNDS:
            object.__setattr__(self, name, _bound(getattr(self, name), name))
        low, soft_low, soft_high, high = (_tensor(getattr(self, name)) for name in _BOUNDS)
        sizes = {len(b) for b in (low, soft_low, soft_high, high) if b.dim()}
        if len(sizes) > 1:
            raise ShapeError(
                f"CurveNormalizer: expected bounds [curve] of one length, got {sorted(sizes)}"
            )
        if not bool((soft_low.isfinite() & soft_high.isfinite()).all()):
            raise DataError(
                "CurveNormalizer: expected finite soft bounds, got "
                f"soft_lower={_show(soft_low)}, soft_upper={_show(soft_high)}; only the hard "
                "bounds may be infinite"
            )
        if not bool((soft_low < soft_high).all()):
            raise DataError(
                "CurveNormalizer: expected soft_lower < soft_upper, got "
                f"{_show(soft_low)} and {_show(soft_high)}; give the values between which the "
                "metric usually lies"
            )
        if not bool(((low <= soft_low) & (soft_high <= high)).all()):
            raise DataError(
                "CurveNormalizer: expected the soft bounds inside the hard ones, lower <= "
                f"soft_lower and soft_upper <= upper, got lower={_show(low)}, "
                f"soft_lower={_show(soft_low)}, soft_upper={_show(soft_high)}, upper={_show(high)}"
            )

    # ---------------------------------------------------------------- presets

    @classmethod
    def accuracy(cls) -> CurveNormalizer:
        """An accuracy or another share in [0, 1] to maximise."""
        return cls(False, 0.0, 0.0, 1.0, 1.0)

    @classmethod
    def error(cls) -> CurveNormalizer:
        """An error rate in [0, 1] to minimise."""
        return cls(True, 0.0, 0.0, 1.0, 1.0)

    @classmethod
    def log_loss(cls, y0: Bound = None, *, best: Bound = 0.0) -> CurveNormalizer:
        """A loss that is at least 0 and has no upper bound, to minimise.

        Args:
            y0: Loss of the untrained network, a number or one for each curve [curve]; of a
                classifier about the logarithm of the number of classes.
            best: The smallest loss that can be hoped for, where it is known not to be near 0.

        Raises:
            DataError: ``y0`` is not given, or not above ``best``.

        Example:
            >>> loss = CurveNormalizer.log_loss(y0=2.3)
            >>> round(float(loss.normalize(torch.tensor(0.0, dtype=torch.float64))), 4)
            1.0
        """
        if y0 is None:
            raise DataError(
                "CurveNormalizer.log_loss: expected y0, the loss of the untrained network, got "
                "none; evaluate before the first epoch, or pass the log of the number of classes"
            )
        return cls(True, 0.0, best, y0, math.inf)

    # ---------------------------------------------------------------- the map

    def normalize(self, y: Tensor) -> Tensor:
        """Map metric values to [0, 1].

        Args:
            y: [*batch] values; with bounds [curve], [*batch, curve, step].

        Returns:
            The same shape; outside [0, 1] where ``y`` is outside the hard bounds.
        """
        low, high, z = self._ends(y)
        z = z(y)
        return (
            _rise(high, z) / _rise(high, low) if self.minimize else _rise(z, low) / _rise(high, low)
        )

    def denormalize(self, g: Tensor) -> Tensor:
        """Map values on the scale of the network back to the metric, the inverse of ``normalize``.

        Args:
            g: [*batch] values in [0, 1]; with bounds [curve], [*batch, curve, step].

        Returns:
            The same shape; infinite where ``g`` reaches an infinite bound.
        """
        low, high, _ = self._ends(g)
        share = _rise(high, low)
        from_low, from_high = (1.0 - g, g) if self.minimize else (g, 1.0 - g)
        # sigma(z) and 1 - sigma(z), each summed from what is small at its end
        below = torch.sigmoid(low) + from_low * share
        above = torch.sigmoid(-high) + from_high * share
        z = below.clamp_min(0.0).log() - above.clamp_min(0.0).log()
        soft_low, soft_high = self._shaped("soft_lower", g), self._shaped("soft_upper", g)
        return soft_low + 0.5 * (z + 1.0) * (soft_high - soft_low)

    def log_jacobian(self, y: Tensor) -> Tensor:
        """Return log |g'(y)|, what a density on the network's scale gains on the metric's.

        Args:
            y: [*batch] values of the metric; with bounds [curve], [*batch, curve, step].
        """
        low, high, z = self._ends(y)
        z = z(y)
        width = self._shaped("soft_upper", y) - self._shaped("soft_lower", y)
        slope = torch.nn.functional.logsigmoid(z) + torch.nn.functional.logsigmoid(-z)
        return slope + (2.0 / width).log() - _rise(high, low).log()

    def select(self, index: Any) -> CurveNormalizer:
        """Return the normaliser of the curves ``index`` of a batch."""
        bounds = [getattr(self, name) for name in _BOUNDS]
        chosen = [b[index] if isinstance(b, Tensor) else b for b in bounds]
        return CurveNormalizer(self.minimize, *chosen)

    @property
    def curves(self) -> int | None:
        """Number of curves that the bounds are given for; None where they serve any number."""
        sizes = [len(b) for b in (getattr(self, n) for n in _BOUNDS) if isinstance(b, Tensor)]
        return sizes[0] if sizes else None

    def outside(self, y: Tensor) -> Tensor:
        """Return -1, 0 or 1 where ``y`` is below, inside or above the hard bounds, [*batch]."""
        below, above = y < self._shaped("lower", y), y > self._shaped("upper", y)
        return above.to(torch.int8) - below.to(torch.int8)

    def _shaped(self, name: str, like: Tensor) -> Tensor:
        """A bound that broadcasts with [*batch] or [*batch, curve, step]."""
        value = _tensor(getattr(self, name)).to(like)
        return value.unsqueeze(-1) if value.dim() else value

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Return z at the hard bounds, and z itself."""
        soft_low, soft_high = self._shaped("soft_lower", like), self._shaped("soft_upper", like)

        def z(y: Tensor) -> Tensor:
            return 2.0 * (y - soft_low) / (soft_high - soft_low) - 1.0

        return z(self._shaped("lower", like)), z(self._shaped("upper", like)), z


def _rise(high: Tensor, low: Tensor) -> Tensor:
    """sigma(high) - sigma(low) without cancellation; either may be infinite."""
    gap = torch.where(high == low, torch.zeros_like(high - low), low - high)
    return (0.0 - torch.expm1(gap)) * torch.sigmoid(high) * torch.sigmoid(-low)


def _bound(value: Any, name: str) -> float | Tensor:
    """A number, or a float64 tensor [curve]."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    else:
        if value is None or isinstance(value, str | bool):
            raise DataError(f"CurveNormalizer: expected a number for {name}, got {value!r}")
        given = value if isinstance(value, Sequence) else as_tensor(value, name=name)
        tensor = torch.as_tensor(given, dtype=torch.float64)
        if tensor.dim() == 1:
            if bool(tensor.isnan().any()):
                raise DataError(f"CurveNormalizer: {name} is NaN for a curve; give its bound")
            return tensor
        if tensor.dim() != 0:
            raise ShapeError(
                f"CurveNormalizer: expected {name} as a number or [curve], "
                f"got {tuple(tensor.shape)}"
            )
        number = float(tensor)
    if math.isnan(number):
        raise DataError(f"CurveNormalizer: expected a number for {name}, got nan")
    return number


def _tensor(bound: float | Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=torch.float64)


def _show(bound: Tensor) -> str:
    return f"{float(bound):g}" if bound.dim() == 0 else f"{bound.tolist()[:5]}"

"""Learning curves observed so far: ragged batches, checked and brought to one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import register
from probkit.models.pfn.normalizer import CurveNormalizer

__all__ = ["Curves", "describe_steps"]

GRID = 100  # steps of the longest curve that the prior knows


@dataclass(frozen=True)
class Curves:
    """The observed parts of one learning curve or of many.

    Curves are stored padded and sorted by step: ``t`` and ``y`` are [curve, step] tensors, of which
    the first ``lengths`` [curve] entries of each row count.

    Args:
        t: Steps (epochs, anchors), whole numbers from 1: [step] for one curve; for several
            [curve, step] or a list of arrays [step]. None numbers them 1, 2, 3, ...
        y: Metric values of the same form.
        normalizer: Map of the metric to [0, 1] where larger is better. None where ``y`` is on that
            scale already.
        horizon: The last step m that curves can reach.
        every: Keep every ``every``-th step only. The prior knows 100 steps; of curves with a longer
            horizon keep every k-th point with k = horizon / 100, rounded up.
        lengths: [curve] observed steps of each row, where ``t`` and ``y`` are padded already.
        allow_outside: Accept values outside [0, 1] without a normaliser, as the noise of simulated
            curves makes them.

    Raises:
        DataError: A value is NaN, infinite, or outside its bounds; a step is below 1, not whole,
            repeated, or beyond the horizon; the horizon is above 100 times ``every``.
        ShapeError: ``t`` and ``y`` do not match.

    Example:
        >>> one = Curves(None, [0.31, 0.52, 0.60], CurveNormalizer.accuracy())
        >>> many = Curves(None, [[0.31, 0.52, 0.60], [0.2, 0.3]], CurveNormalizer.accuracy())
        >>> one.single, len(many), many.lengths.tolist()
        (True, 2, [3, 2])
    """

    t: Any
    y: Any
    normalizer: CurveNormalizer | None = None
    horizon: int = GRID
    every: int = 1
    lengths: Any = None
    allow_outside: bool = False
    single: bool = False

    def __post_init__(self) -> None:
        _check_horizon(self.horizon, self.every)
        if self.lengths is None:
            t, y, lengths, single = _padded(self.t, self.y)
        else:
            t, y, lengths = _given(self.t, self.y, self.lengths)
            single = self.single
        valid = torch.arange(t.shape[1], device=t.device) < lengths[:, None]
        _check_steps(t, valid, self.horizon)
        _check_values(t, y, valid, self.normalizer, self.allow_outside)
        t, y, lengths = _sorted(t, y, valid, lengths, self.every)
        for name, value in (("t", t), ("y", y), ("lengths", lengths), ("single", single)):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """Number of curves."""
        return int(self.t.shape[0])

    def __getitem__(self, index: Any) -> Curves:
        """Select curves by number, slice, list or mask; a number keeps a batch of one."""
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        lengths = self.lengths[index]
        width = int(lengths.max()) if len(lengths) else 0
        chosen = None if self.normalizer is None else self.normalizer.select(index)
        return self._with(self.t[index, :width], self.y[index, :width], lengths, chosen)

    def until(self, step: float) -> Curves:
        """Return the curves as they were known after ``step``."""
        valid = self.valid & (self.t <= step)
        lengths = valid.sum(1)
        width = int(lengths.max()) if len(lengths) else 0
        return self._with(self.t[:, :width], self.y[:, :width], lengths, self.normalizer)

    def _with(
        self, t: Tensor, y: Tensor, lengths: Tensor, normalizer: CurveNormalizer | None
    ) -> Curves:
        return Curves(
            t, y, normalizer, self.horizon, self.every, lengths, self.allow_outside, self.single
        )

    @property
    def valid(self) -> Tensor:
        """[curve, step] which entries of the padded rows count."""
        mask: Tensor = torch.arange(self.t.shape[1], device=self.t.device) < self.lengths[:, None]
        return mask

    @property
    def last(self) -> Tensor:
        """[curve] the last observed step T; 0 of an empty curve."""
        steps: Tensor = torch.where(self.valid, self.t, torch.zeros_like(self.t))
        return steps.amax(1) if steps.shape[1] else steps.new_zeros(len(self))

    @property
    def device(self) -> torch.device:
        """Where the values are."""
        device: torch.device = self.y.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the values."""
        dtype: torch.dtype = self.y.dtype
        return dtype

    @property
    def minimize(self) -> bool:
        """Whether smaller values of the metric are better."""
        return self.normalizer is not None and self.normalizer.minimize

    @property
    def normalized(self) -> Tensor:
        """[curve, step] values on the scale of the network; 0 in the padding."""
        y = self.y if self.normalizer is None else self.normalizer.normalize(self.y)
        return torch.where(self.valid, y, torch.zeros_like(y))

    @property
    def grid_t(self) -> Tensor:
        """[curve, step] steps in units of the prior's grid; 1 in the padding."""
        return torch.where(self.valid, self.t / self.every, torch.ones_like(self.t))


register(
    Curves,
    "Curves",
    lambda c: {
        name: getattr(c, name)
        for name in (
            "t",
            "y",
            "normalizer",
            "horizon",
            "every",
            "lengths",
            "allow_outside",
            "single",
        )  # fmt: skip
    },
    lambda tree: Curves(**tree),
)


# ------------------------------------------------------------------ reading


def _padded(t: Any, y: Any) -> tuple[Tensor, Tensor, Tensor, bool]:
    """t, y [curve, step], lengths [curve], and whether one curve [step] was given."""
    rows, single = _rows(y, "y")
    if t is None:
        steps = [torch.arange(1, len(row) + 1, dtype=row.dtype, device=row.device) for row in rows]
    else:
        steps, t_single = _rows(t, "t")
        if t_single and not single and len({len(row) for row in rows} | {len(steps[0])}) == 1:
            steps = steps * len(rows)  # one grid for all curves
        elif len(steps) != len(rows):
            raise ShapeError(
                f"Curves: expected t and y of the same form, got {len(steps)} curves in t and "
                f"{len(rows)} in y"
            )
    for k, (s, row) in enumerate(zip(steps, rows, strict=True)):
        if len(s) != len(row):
            which = "" if single else f" of curve {k}"
            raise ShapeError(
                f"Curves: expected t and y{which} of equal length [step], got {len(s)} and "
                f"{len(row)}"
            )
    lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
    pad = torch.nn.utils.rnn.pad_sequence
    y_padded = pad(rows, batch_first=True)
    t_padded = pad([s.to(row) for s, row in zip(steps, rows, strict=True)], batch_first=True)
    return t_padded, y_padded, lengths, single


def _rows(value: Any, name: str) -> tuple[list[Tensor], bool]:
    """A list of floating tensors [step], and whether the value was one curve."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        numbers = all(isinstance(v, int | float) or getattr(v, "ndim", None) == 0 for v in value)
        if not numbers:
            rows = [_row(v, f"{name} of curve {k}") for k, v in enumerate(value)]
            return _same_dtype(rows), False
        value = torch.tensor([float(v) for v in value], dtype=torch.float64)
    tensor = _floating(as_tensor(value, name=name))
    if tensor.dim() == 1:
        return [tensor], True
    if tensor.dim() == 2 and len(tensor):
        return list(tensor), False
    raise ShapeError(
        f"Curves: expected {name} as [step], [curve, step] or a list of arrays [step], got shape "
        f"{tuple(tensor.shape)}"
    )


def _row(value: Any, name: str) -> Tensor:
    if isinstance(value, Sequence):
        value = torch.tensor([float(v) for v in value], dtype=torch.float64)
    row = _floating(as_tensor(value, name=name))
    if row.dim() != 1:
        raise ShapeError(f"Curves: expected {name} as [step], got shape {tuple(row.shape)}")
    return row


def _same_dtype(rows: list[Tensor]) -> list[Tensor]:
    widest = rows[0].dtype
    for row in rows[1:]:
        widest = torch.promote_types(widest, row.dtype)
    return [row.to(widest) for row in rows]


def _floating(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_floating_point() else tensor.to(torch.float64)


def _given(t: Any, y: Any, lengths: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Padded tensors as they were given."""
    y = _floating(as_tensor(y, name="y"))
    t = as_tensor(t, name="t").to(y)
    count = as_tensor(lengths, name="lengths").to(y.device).long()
    if y.dim() != 2 or t.shape != y.shape or count.shape != y.shape[:1]:
        raise ShapeError(
            "Curves: with lengths [curve], expected padded t and y [curve, step], got "
            f"t {tuple(t.shape)}, y {tuple(y.shape)}, lengths {tuple(count.shape)}"
        )
    if bool(((count < 0) | (count > y.shape[1])).any()):
        raise DataError(
            f"Curves: expected lengths between 0 and {y.shape[1]}, got {count.tolist()[:5]}"
        )
    return t, y, count


# ------------------------------------------------------------------ checks


def _check_horizon(horizon: int, every: int) -> None:
    for name, value in (("horizon", horizon), ("every", every)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"Curves: expected {name} as a whole number >= 1, got {value!r}")
    if horizon > GRID * every:
        needed = -(-horizon // GRID)
        raise DataError(
            f"Curves: the prior knows {GRID} steps, and horizon={horizon} goes beyond; keep every "
            f"{describe_steps(needed)} point with every={needed}"
        )


def describe_steps(every: int) -> str:
    """Write 2 as "2nd", and so on.

    Example:
        >>> describe_steps(2), describe_steps(13)
        ('2nd', '13th')
    """
    last = (
        "th" if every % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(every % 10, "th")
    )
    return f"{every}{last}"


def _where(mask: Tensor, t: Tensor) -> str:
    """Name the first marked entry."""
    curve, position = (int(v) for v in mask.nonzero()[0])
    among = f" of curve {curve}" if len(t) > 1 else ""
    return f"at step {float(t[curve, position]):g}{among}"


def _check_steps(t: Tensor, valid: Tensor, horizon: int) -> None:
    finite = t.isfinite() | ~valid
    if not bool(finite.all()):
        raise DataError("Curves: t must be finite; drop the entries that have no step")
    early = valid & (t < 1)
    if bool(early.any()):
        raise DataError(
            f"Curves: expected steps t >= 1, got {float(t[early][0]):g}; count epochs from 1, and "
            "give the value before training as y0 of the normaliser"
        )
    broken = valid & (t != t.round())
    if bool(broken.any()):
        raise DataError(f"Curves: expected whole steps t, got {float(t[broken][0]):g}")
    late = valid & (t > horizon)
    if bool(late.any()):
        raise DataError(
            f"Curves: step {float(t[late][0]):g} lies beyond horizon={horizon}; raise the horizon "
            f"(above {GRID} with every=)"
        )
    ordered = torch.where(valid, t, t.new_tensor(float("inf"))).sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & ordered[:, 1:].isfinite()
    if bool(twice.any()):
        curve, position = (int(v) for v in twice.nonzero()[0])
        among = f" in curve {curve}" if len(t) > 1 else ""
        raise DataError(
            f"Curves: step {float(ordered[curve, position]):g} appears twice{among}; average the "
            "repeated values first"
        )


def _check_values(
    t: Tensor, y: Tensor, valid: Tensor, normalizer: CurveNormalizer | None, allow_outside: bool
) -> None:
    bad = valid & ~y.isfinite()
    if bool(bad.any()):
        raise DataError(
            f"Curves: y must be finite; found {float(y[bad][0]):g} {_where(bad, t)}; drop it, or "
            "give a diverged run the worst value of its metric"
        )
    if normalizer is None:
        if allow_outside:
            return
        side = (y > 1).to(torch.int8) - (y < 0).to(torch.int8)
        advice = "pass normalizer=CurveNormalizer.accuracy(), .error() or .log_loss(y0)"
    else:
        if normalizer.curves not in (None, len(y)):
            raise ShapeError(
                f"Curves: expected bounds of the normaliser for {len(y)} curves, got "
                f"{normalizer.curves}"
            )
        side = normalizer.outside(y)
        advice = "widen the hard bound, or mend the value"
    wrong = valid & (side != 0)
    if bool(wrong.any()):
        value, above = float(y[wrong][0]), int(side[wrong][0]) > 0
        name = "upper" if above else "lower"
        curve = int(wrong.nonzero()[0][0])
        bound = (
            (1.0 if above else 0.0) if normalizer is None else _bound_of(normalizer, name, curve)
        )
        raise DataError(
            f"Curves: y = {value:g} {_where(wrong, t)} lies {'above' if above else 'below'} the "
            f"{name} bound {bound:g}; {advice}"
        )


def _bound_of(normalizer: CurveNormalizer, name: str, curve: int) -> float:
    bound = getattr(normalizer, name)
    return float(bound[curve]) if isinstance(bound, Tensor) else float(bound)


def _sorted(
    t: Tensor, y: Tensor, valid: Tensor, lengths: Tensor, every: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by step, thinned, padding last and zero."""
    kept = valid & (t.remainder(every) == 0) if every > 1 else valid
    key = torch.where(kept, t, t.new_tensor(float("inf")))
    ordered, order = key.sort(dim=1, stable=True)
    lengths = kept.sum(1) if every > 1 else lengths
    width = int(lengths.max()) if len(lengths) else 0
    inside = ordered[:, :width].isfinite()
    steps = torch.where(inside, ordered[:, :width], torch.zeros_like(ordered[:, :width]))
    values = y.gather(1, order)[:, :width]
    return steps, torch.where(inside, values, torch.zeros_like(values)), lengths

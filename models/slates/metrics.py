"""What a recommender is judged by: clicks, diversity, hits, and calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.calibration import wilson
from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.models.slates.ids import FIRST_ITEM
from probkit.models.slates.log import Part, SlateLog
from probkit.rng import Rng, stream

__all__ = [
    "ClickCalibration",
    "click_calibration",
    "click_rate",
    "distinct_groups",
    "hits",
]


def click_rate(log: SlateLog, part: Part = "train") -> float:
    """Return the share of slates with a click among the steps of a part of the log.

    Example:
        >>> click_rate(SlateLog([[[1, 3, 4], [1, 4, 5]]], [[4, 1]]))
        0.5
    """
    clicks = log.click[log.mask(part)]
    return float((clicks >= FIRST_ITEM).double().mean())


def distinct_groups(slates: Any, groups: Any) -> Tensor:
    """Count the groups that each slate shows [*batch].

    Args:
        slates: Ids [*batch, slot]; ids below 3 do not count.
        groups: Group of each id [item].

    Example:
        >>> distinct_groups([[3, 4, 5], [3, 6, 0]], [0, 1, 2, 7, 7, 8, 9])
        tensor([2, 2])
    """
    ids = as_tensor(slates, name="slates").long()
    of_id = as_tensor(groups, name="groups").long()
    real = ids >= FIRST_ITEM
    shown = torch.where(real, of_id[ids], -1).sort(-1).values
    new = torch.ones_like(shown, dtype=torch.bool)
    new[..., 1:] = shown[..., 1:] != shown[..., :-1]
    return (new & (shown >= 0)).sum(-1)


def hits(recommended: Any, log: SlateLog, *, first: int) -> Tensor:
    """Count the distinct items that each user clicks from step ``first`` on and was recommended.

    Its mean over users is "hits@k" of the FINN.no experiments; it is not bounded by 1.

    Args:
        recommended: Ids [user, rank].
        log: The users' steps, those before ``first`` included.
        first: First step that counts.

    Returns:
        [user].

    Example:
        >>> log = SlateLog([[[1, 3], [1, 4], [1, 4]]], [[3, 4, 4]])
        >>> hits([[4, 3]], log, first=1)
        tensor([1])
    """
    ids = as_tensor(recommended, name="recommended").long()
    if ids.ndim != 2 or len(ids) != log.users:
        raise ShapeError(
            f"hits: expected recommended [user={log.users}, rank], got {tuple(ids.shape)}"
        )
    if not 0 <= first < log.steps:
        raise DataError(f"hits: expected a first step in [0, {log.steps}), got {first}")
    later = log.click[:, first:]
    found = (ids[:, :, None] == later[:, None, :]).any(-1)
    return (found & (ids >= FIRST_ITEM)).sum(-1)


@dataclass(frozen=True)
class ClickCalibration:
    """How predicted click probabilities compare with what was clicked.

    Attributes:
        predicted: Mean probability of the predictions in each bin [bin].
        happened: Share of them that were clicked [bin].
        low: Lower end of the 95 % Wilson interval of that share [bin].
        high: Upper end [bin].
        count: Predictions in each bin [bin]; empty bins are left out.
        ece: Expected calibration error, the mean of |predicted - happened| weighted by ``count``.
        pit: Randomised probability integral transforms of the choices [choice]; uniform on (0, 1)
            where the probabilities are right.
        nll: Mean negative log probability of the choices.
    """

    predicted: Tensor
    happened: Tensor
    low: Tensor
    high: Tensor
    count: Tensor
    ece: float
    pit: Tensor
    nll: float


def click_calibration(probs: Any, chosen: Any, *, bins: int = 10, rng: Rng = 0) -> ClickCalibration:
    """Compare choice probabilities with choices.

    Every slot of every slate, slot 0 (no click) included, is one prediction of whether it is
    chosen. Bins hold equal numbers of predictions, so that small probabilities, of which there are
    many, are told apart.

    Args:
        probs: Probability of each slot [choice, slot]; 0 for slots that are not there.
        chosen: Slot chosen [choice].
        bins: Number of bins.
        rng: Randomness of the transforms: a slot's probability mass is entered at random.

    Example:
        >>> found = click_calibration([[0.5, 0.5]] * 4, [0, 1, 0, 1], bins=1)
        >>> found.ece, round(found.nll, 4)
        (0.0, 0.6931)
    """
    p = as_tensor(probs, name="probs").double()
    slot = as_tensor(chosen, name="chosen").long()
    if p.ndim != 2 or tuple(slot.shape) != (len(p),) or len(p) == 0:
        raise ShapeError(
            f"click_calibration: expected probs [choice, slot] and chosen [choice], got "
            f"{tuple(p.shape)} and {tuple(slot.shape)}"
        )
    if bool((p < 0).any()) or bool(((p.sum(1) - 1).abs() > 1e-3).any()):
        raise DataError("click_calibration: expected rows of probabilities that sum to 1")
    if bins < 1:
        raise DataError(f"click_calibration: expected bins >= 1, got {bins}")
    there = p > 0
    there[torch.arange(len(p)), slot] = True
    hit = torch.nn.functional.one_hot(slot, p.shape[1]).bool()
    order = p[there].argsort()
    parts = zip(p[there][order].chunk(bins), hit[there][order].chunk(bins), strict=True)
    rows = [(float(a.mean()), int(b.sum()), len(a)) for a, b in parts]
    predicted = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    count = torch.tensor([row[2] for row in rows])
    happened = torch.tensor([row[1] for row in rows], dtype=torch.float64) / count
    ends = torch.tensor([wilson(row[1], row[2]) for row in rows], dtype=torch.float64)
    mine = p.gather(1, slot[:, None])[:, 0]
    below = p.cumsum(1).gather(1, slot[:, None])[:, 0] - mine
    uniform = torch.rand(len(p), generator=stream(rng, "pit"), dtype=torch.float64)
    pit = below + mine * uniform
    return ClickCalibration(
        predicted,
        happened,
        ends[:, 0],
        ends[:, 1],
        count,
        float(((predicted - happened).abs() * count).sum() / count.sum()),
        pit.clamp(0, 1),
        float(-mine.clamp_min(1e-300).log().mean()),
    )

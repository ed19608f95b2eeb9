"""Checks of slate logs: what the ids, slots and lengths of a log must satisfy together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.models.slates.ids import NO_CLICK, PAD, UNK

if TYPE_CHECKING:
    from probkit.models.slates.log import SlateLog

__all__ = [
    "all_recommended",
    "check_log",
    "check_temperature",
    "count_slots",
    "find_clicks",
    "groups",
    "ids",
]

_BLOCK = 1 << 24  # ids looked at together


def ids(value: Any, name: str) -> Tensor:
    """Return whole numbers as an integer tensor; int32 stays as it is, so that maps stay maps.

    Raises:
        DataError: The values are not whole numbers.
    """
    found = as_tensor(value, name=name)
    if found.is_floating_point():
        bad = ~torch.isfinite(found) | (found != found.round())
        if bool(bad.any()):
            place = bad.nonzero()[0].tolist()
            raise DataError(
                f"SlateLog: expected whole numbers in {name}, got {found[tuple(place)].item():g} "
                f"at {place}"
            )
    elif found.dtype in (torch.int32, torch.int64):
        return found
    return found.long()


def groups(value: Any) -> Tensor:
    """Return the group of each id [item] as int64.

    Raises:
        DataError: A group is not a whole number of at least 0.
        ShapeError: There is more than one dim.
    """
    found = as_tensor(value, name="groups")
    if found.ndim != 1:
        raise ShapeError(f"SlateLog: expected groups [item], got {tuple(found.shape)}")
    if found.is_floating_point():
        bad = ~torch.isfinite(found) | (found != found.round())
        if bool(bad.any()):
            i = int(bad.nonzero()[0])
            raise DataError(
                f"SlateLog: expected whole group numbers, got {found[i].item():g} for id {i}; give "
                "items without a group a group of their own"
            )
    found = found.long()
    if len(found) and int(found.min()) < 0:
        i = int((found < 0).nonzero()[0])
        raise DataError(f"SlateLog: expected group numbers >= 0, got {int(found[i])} for id {i}")
    return found


def find_clicks(slate: Tensor, click: Tensor) -> Tensor:
    """Slot [user, step] of the first id that equals the click; 0 where there is none."""
    return (slate == click[..., None]).int().argmax(-1)


def count_slots(slate: Tensor, click: Tensor) -> Tensor:
    """Slots [user, step] that are not padding."""
    return (slate != PAD).sum(-1)


def all_recommended(slate: Tensor, click: Tensor) -> Tensor:
    """The interaction type "recommendation" for each step that is not padding."""
    return torch.where(click == PAD, 0, 2)


def check_temperature(value: float, what: str) -> None:
    """Raise where a temperature is not a finite number above zero."""
    if not 0 < value < float("inf"):
        raise DataError(f"{what}: expected a temperature > 0, got {value}")


def check_log(log: SlateLog, *, batch: bool = False) -> None:
    """Check every slate of a log, block of users by block.

    Args:
        log: The log.
        batch: Whether it is part of a log, so that all its steps may be held out.

    Raises:
        DataError: The first contradiction, with its user, step and slot.
    """
    for first, block in _blocks(log):
        _check_ids(log, block, first)
        _check_slots(block, first)
        _check_repeats(block, first)
        _check_clicks(block, first)
        _check_padding(block, first)
    if not batch and not bool(log.mask("train").any()):
        raise DataError(
            "SlateLog: no step is left for training; expected train true for at least one step "
            "with a click or a no-click"
        )


def _blocks(log: SlateLog) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Blocks of users as tensors, with the number of the first user."""
    size = max(_BLOCK // (log.steps * log.slots), 1)
    names = ("slate", "click", "click_idx", "slate_lengths", "interaction_type", "propensity")
    for first in range(0, log.users, size):
        yield (
            first,
            {
                name: getattr(log, name)[first : first + size]
                for name in names
                if getattr(log, name) is not None
            },
        )


def _place(bad: Tensor, first: int) -> tuple[tuple[int, ...], str]:
    """The first true entry of ``bad`` [user, step, (slot)], in words."""
    found = tuple(int(i) for i in bad.nonzero()[0])
    words = zip(("user", "step", "slot"), (found[0] + first, *found[1:]), strict=False)
    return found, ", ".join(f"{name} {i}" for name, i in words)


def _check_ids(log: SlateLog, block: dict[str, Tensor], first: int) -> None:
    for name in ("slate", "click"):
        bad = (block[name] < 0) | (block[name] >= log.n_items)
        if bool(bad.any()):
            at, where = _place(bad, first)
            raise DataError(
                f"SlateLog: expected ids in [0, n_items={log.n_items}), got "
                f"{int(block[name][at])} in {name} at {where}; raise n_items or map it to 2 "
                "(unknown)"
            )
    kinds = block["interaction_type"]
    bad = (kinds < 0) | (kinds > 2)
    if bool(bad.any()):
        at, where = _place(bad, first)
        raise DataError(
            "SlateLog: expected interaction_type 0 (unknown), 1 (search) or 2 (recommendation), "
            f"got {int(kinds[at])} at {where}"
        )
    if "propensity" in block:
        shown = (block["slate"] != PAD) & (block["click"] != PAD)[..., None]
        value = block["propensity"]
        bad = shown & ~((value > 0) & (value <= 1))
        if bool(bad.any()):
            at, where = _place(bad, first)
            raise DataError(
                f"SlateLog: expected propensity in (0, 1], got {value[at].item():g} at {where}; a "
                "slot that was filled had a positive probability"
            )


def _check_slots(block: dict[str, Tensor], first: int) -> None:
    """Slot 0 holds no click, other slots items; padding fills the end."""
    slate, active = block["slate"], block["click"] != PAD
    bad = active & (slate[..., 0] != NO_CLICK)
    if bool(bad.any()):
        at, where = _place(bad, first)
        raise DataError(
            f"SlateLog: expected slot 0 of every slate to be 1 (no click), got "
            f"{int(slate[at][0])} at {where}"
        )
    bad = active[..., None] & (slate == NO_CLICK)
    bad[..., 0] = False
    if bool(bad.any()):
        where = _place(bad, first)[1]
        raise DataError(
            f"SlateLog: expected 1 (no click) in slot 0 alone, found it at {where}; remove it"
        )
    bad = active[..., None] & (slate[..., 1:] != PAD) & (slate[..., :-1] == PAD)
    if bool(bad.any()):
        where = _place(bad, first)[1]
        raise DataError(
            f"SlateLog: expected 0 (padding) only at the end of a slate, found it inside at "
            f"{where}; close the gap"
        )
    lengths = block["slate_lengths"]
    counted = torch.where(active, (slate != PAD).sum(-1), lengths)
    bad = counted != lengths
    if bool(bad.any()):
        at, where = _place(bad, first)
        raise DataError(
            f"SlateLog: expected slate_lengths to count the slots in use (slot 0 included), got "
            f"{int(lengths[at])} for {int(counted[at])} slots at {where}"
        )


def _check_repeats(block: dict[str, Tensor], first: int) -> None:
    """No item twice in a slate; unknown ones may repeat."""
    ordered = block["slate"].sort(-1).values
    bad = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] > UNK)
    bad &= (block["click"] != PAD)[..., None]
    if bool(bad.any()):
        at, where = _place(bad, first)
        item = int(ordered[..., 1:][at])
        raise DataError(
            f"SlateLog: expected each item once in a slate, item {item} is there twice at "
            f"{where.rpartition(', slot')[0]}; keep the first"
        )


def _check_clicks(block: dict[str, Tensor], first: int) -> None:
    """The click stands in its slate, where click_idx says."""
    slate, click, slot = block["slate"], block["click"], block["click_idx"]
    active = click != PAD
    bad = active & ~(slate == click[..., None]).any(-1)
    if bool(bad.any()):
        at, where = _place(bad, first)
        raise DataError(
            f"SlateLog: expected the click to be in its slate, got id {int(click[at])} at {where}, "
            f"which shows {slate[at][slate[at] != PAD].tolist()}"
        )
    inside = (slot >= 0) & (slot < slate.shape[-1])
    safe = torch.where(inside, slot, 0).long()
    chosen = slate.gather(-1, safe[..., None])[..., 0]
    bad = active & (~inside | (chosen != click))
    if bool(bad.any()):
        at, where = _place(bad, first)
        raise DataError(
            f"SlateLog: expected click_idx to be the slot of the click, got slot {int(slot[at])} "
            f"for id {int(click[at])} at {where}; leave click_idx out to have it found"
        )


def _check_padding(block: dict[str, Tensor], first: int) -> None:
    """Padding steps follow a user's last step."""
    click = block["click"]
    bad = (click[:, 1:] != PAD) & (click[:, :-1] == PAD)
    if bool(bad.any()):
        where = _place(bad, first)[1]
        raise DataError(
            f"SlateLog: expected padding steps (click 0) only after a user's last step, found one "
            f"inside at {where}; close the gap"
        )

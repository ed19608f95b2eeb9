"""What users did before, as recommending needs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.slates.ids import NO_CLICK, PAD
from probkit.models.slates.log import SlateLog

if TYPE_CHECKING:
    from probkit.models.slates.model import SlateGRU

__all__ = ["History", "as_history"]


class History(NamedTuple):
    """What users did before.

    Attributes:
        log: Their steps.
        users: Number of each user in the log that was fitted [user]; None where no user has a law
            of their own.
    """

    log: SlateLog
    users: Tensor | None

    def part(self, users: slice) -> History:
        """Return a block of users."""
        if users.start == 0 and users.stop >= len(self.log):
            return self
        return History(self.log[users], None if self.users is None else self.users[users])


def as_history(history: Any, model: SlateGRU) -> SlateLog:
    """Return a history as a log: a log as it is, or the ids clicked by each user.

    Args:
        history: A SlateLog, or ids clicked [user, step] (1 for no click, 0 for no step), or a list
            of lists of them; an empty list is a user without history.
        model: The model, for the number of ids.
    """
    if isinstance(history, SlateLog):
        if history.n_items > model.n_items:
            raise DataError(
                f"recommend: the history has ids below {history.n_items}, the model knows "
                f"{model.n_items}"
            )
        return history
    rows = history.tolist() if isinstance(history, Tensor) else history
    if not isinstance(rows, Sequence) or len(rows) == 0 or not all(_is_row(row) for row in rows):
        raise DataError(
            "recommend: expected history as a SlateLog or the ids clicked by each user, as in "
            "[[3, 7], []]"
        )
    steps = max([len(row) for row in rows] + [1])
    click = torch.tensor([[*row, *[PAD] * (steps - len(row))] for row in rows])
    bad = (click < 0) | (click >= model.n_items)
    if bool(bad.any()):
        user, step = bad.nonzero()[0].tolist()
        raise DataError(
            f"recommend: expected ids in [0, n_items={model.n_items}), got "
            f"{int(click[user, step])} for user {user} at step {step}"
        )
    shown = torch.where(click == PAD, PAD, NO_CLICK)
    second = torch.where(click > NO_CLICK, click, PAD)
    slot = (click > NO_CLICK).long()
    slate = torch.stack([shown, second], -1)
    return SlateLog(slate, click, slot, n_items=model.n_items, check=False)


def _is_row(row: Any) -> bool:
    return isinstance(row, Sequence | Tensor) and not isinstance(row, str)

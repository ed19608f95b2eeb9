"""What was chosen from what: the terms of the three likelihoods, as one table of choices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.slates.ids import FIRST_ITEM, NO_CLICK

if TYPE_CHECKING:
    from probkit.models.slates.log import SlateLog

__all__ = ["Choices", "Likelihood", "by_type", "sampled_choices", "slate_choices"]

Likelihood = Literal["slate", "sampled", "full"]

_TYPES = ("unknown", "search", "recommendation")


class Choices(NamedTuple):
    """Choices among no click and some items.

    Attributes:
        user: User of the batch [choice].
        step: [choice].
        ids: Items to choose from [choice, slot]; a real id everywhere.
        offset: Added to their scores [choice, slot]; -inf where there is no item.
        chosen: 0 for no click, k for slot k - 1, [choice].
        length: Slots in use of the slate shown [choice].
    """

    user: Tensor
    step: Tensor
    ids: Tensor
    offset: Tensor
    chosen: Tensor
    length: Tensor


def by_type(
    likelihood: Likelihood
    | Mapping[str, Likelihood]
    | Mapping[int, Likelihood]
    | Sequence[Likelihood],
) -> tuple[Likelihood, Likelihood, Likelihood]:
    """Return the likelihood of interaction types 0 (unknown), 1 (search), 2 (recommendation).

    Args:
        likelihood: One for all, or one by type ("search" or 1, ...); types left out are "slate".

    Raises:
        DataError: An unknown type or likelihood.

    Example:
        >>> by_type({"search": "sampled"})
        ('slate', 'sampled', 'slate')
    """
    given: dict[int, str] = {}
    if isinstance(likelihood, Mapping):
        for key, value in likelihood.items():
            number = _TYPES.index(key) if key in _TYPES else key
            if number not in (0, 1, 2):
                raise DataError(
                    "likelihood: expected the interaction types 'unknown', 'search', "
                    f"'recommendation' (or 0, 1, 2), got {key!r}"
                )
            given[int(number)] = value
    elif not isinstance(likelihood, str) and len(likelihood) == 3:
        given = dict(enumerate(likelihood))
    else:
        given = dict.fromkeys(range(3), str(likelihood))
    found = tuple(given.get(number, "slate") for number in range(3))
    for name in found:
        if name not in ("slate", "sampled", "full"):
            raise DataError(f"likelihood: expected 'slate', 'sampled' or 'full', got {name!r}")
    return found  # type: ignore[return-value]


def slate_choices(log: SlateLog, counted: Tensor, dtype: torch.dtype) -> Choices:
    """Return the choices from the slates shown.

    Args:
        log: The log.
        counted: Steps that count [user, step].
        dtype: Of the offsets.
    """
    user, step = counted.nonzero(as_tuple=True)
    shown = log.slate[user, step, 1:].long()
    real = shown >= FIRST_ITEM
    offset = torch.zeros(shown.shape, dtype=dtype, device=shown.device)
    offset.masked_fill_(~real, -math.inf)
    return Choices(
        user,
        step,
        shown.masked_fill(~real, FIRST_ITEM),
        offset,
        log.click_idx[user, step].long(),
        log.slate_lengths[user, step].long(),
    )


def sampled_choices(
    log: SlateLog,
    counted: Tensor,
    negatives: int,
    corrected: bool,
    dtype: torch.dtype,
    rng: torch.Generator,
) -> Choices:
    """Return choices among no click, the item clicked, and items drawn uniformly.

    With the correction, each drawn item stands for (items that could be drawn) / (items drawn) of
    its kind: its score is raised by the logarithm, so that the expected normaliser is that of the
    softmax over all items (sampled softmax with log-Q correction; Bengio and Senecal 2008).

    Args:
        log: The log.
        counted: Steps that count [user, step].
        negatives: Items drawn for each choice.
        corrected: Whether to correct the scores; without, the published "all-item" likelihood.
        dtype: Of the offsets.
        rng: Stream of the draws.
    """
    user, step = counted.nonzero(as_tuple=True)
    click = log.click[user, step].long()
    real = log.n_items - FIRST_ITEM
    clicked = click != NO_CLICK
    others = real - clicked.long()
    uniform = torch.rand(
        len(click), negatives, generator=rng, dtype=torch.float64, device=rng.device
    )
    drawn = (uniform.to(click.device) * others[:, None]).long().clamp_(max=real - 1) + FIRST_ITEM
    # Draws at or above the clicked item move up by one, so that it is never drawn.
    drawn += (clicked[:, None] & (drawn >= click[:, None])).long()
    drawn.clamp_(max=log.n_items - 1)
    ids = torch.cat([torch.where(clicked, click, FIRST_ITEM)[:, None], drawn], 1)
    offset = torch.zeros(ids.shape, dtype=dtype, device=ids.device)
    if corrected:
        offset[:, 1:] = (others.to(dtype) / negatives).log()[:, None]
    offset[:, 0].masked_fill_(~clicked, -math.inf)
    return Choices(user, step, ids, offset, clicked.long(), log.slate_lengths[user, step].long())

"""Slate logs from tables with one row for each item shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from probkit.errors import DataError
from probkit.models.slates.ids import FIRST_ITEM, NO_CLICK, PAD, UNK
from probkit.models.slates.log import SlateLog

__all__ = ["read_frame"]

Ints = np.ndarray[Any, np.dtype[np.int64]]
_KINDS = {"search": 1, "rec": 2, "recommendation": 2}


def read_frame(
    frame: pd.DataFrame | str | Path,
    *,
    user: str = "user",
    time: str = "time",
    item: str = "item",
    click: str = "click",
    position: str | None = None,
    kind: str | None = None,
    propensity: str | None = None,
    groups: Mapping[Any, Any] | pd.Series | None = None,
    items: Sequence[Any] | None = None,
    min_count: int = 1,
    max_steps: int | None = None,
) -> SlateLog:
    """Turn a table of impressions into a slate log.

    Rows with the same user and time are one slate. A slate without a click is a no-click. Items
    get the ids 3, 4, ... in sorted order of their labels, which are kept in ``labels``.

    Args:
        frame: One row for each item shown, or the path of a Parquet file with them.
        user: Column that names the user.
        time: Column that orders a user's slates: a time, or a number.
        item: Column that names the item.
        click: Column that is true (or 1) for the item clicked.
        position: Column that orders the items of a slate; None takes the order of the rows.
        kind: Column with "search" or "rec" (anything else is unknown); None for all "rec".
        propensity: Column with the probability of the slot's choice; None where it is unknown.
        groups: Group of each item; items that are missing in it share one more group.
        items: Item labels in the order of their ids, for example those of an earlier log; other
            items become unknown. None takes the items of the table.
        min_count: Items shown less often become unknown.
        max_steps: Last slates of each user to keep; None keeps all.

    Raises:
        DataError: Columns are missing, labels are missing, or a slate has two clicks.

    Example:
        >>> table = pd.DataFrame({"user": "ann", "time": [1, 1, 2, 2], "item": list("abbc"),
        ...                       "click": [0, 1, 0, 0]})
        >>> log = read_frame(table)
        >>> log.slate.tolist(), log.click.tolist()
        ([[[1, 3, 4], [1, 4, 5]]], [[4, 1]])
    """
    table = _table(frame, [user, time, item, click, position, kind, propensity])
    if max_steps is not None and max_steps < 1:
        raise DataError(f"from_frame: expected max_steps >= 1 or None, got {max_steps}")
    keys = [user, time] if position is None else [user, time, position]
    table = table.sort_values(keys, kind="stable")
    users, names = pd.factorize(table[user], sort=False)
    labels = _item_labels(table[item], items, min_count)
    ids = pd.Index(labels).get_indexer(pd.Index(table[item])) + FIRST_ITEM
    ids[ids < FIRST_ITEM] = UNK

    rows = _places(users, table[time].to_numpy(), len(names), max_steps)
    shape = (len(names), int(rows.step.max()) + 1, int(rows.slot.max()) + 1)
    table, ids = table.iloc[rows.kept], ids[rows.kept]
    at = (rows.user, rows.step, rows.slot)
    slates = np.full(shape, PAD)
    slates[at[0], at[1], 0] = NO_CLICK
    slates[at] = ids
    clicked = table[click].to_numpy().astype(bool)
    _check_clicks(table, clicked, at, (user, time))
    chosen, slots = np.where(slates[..., 0] == NO_CLICK, NO_CLICK, PAD), np.zeros(shape[:2], int)
    hit = at[0][clicked], at[1][clicked]
    chosen[hit], slots[hit] = ids[clicked], rows.slot[clicked]
    return SlateLog(
        slates,
        chosen,
        slots,
        interaction_type=_kinds(table, kind, at[:2], shape[:2]),
        groups=_groups(labels, groups),
        n_items=len(labels) + FIRST_ITEM,
        propensity=_propensities(table, propensity, at, shape),
        labels={
            "user": list(names),
            "item": ["<pad>", "<no click>", "<unknown>", *labels],
        },
    )


class _Places(NamedTuple):
    """Where the rows of a table go.

    Attributes:
        kept: Rows that are used [row].
        user: User of each row that is used [used].
        step: Its step.
        slot: Its slot, from 1.
    """

    kept: Ints
    user: Ints
    step: Ints
    slot: Ints


def _places(users: Any, times: Any, count: int, max_steps: int | None) -> _Places:
    """Place rows that are sorted by user and time: a slate for each pair of them."""
    same = np.zeros(len(users), dtype=bool)
    same[1:] = (users[1:] == users[:-1]) & (times[1:] == times[:-1])
    slate, starts = np.cumsum(~same) - 1, np.flatnonzero(~same)
    slot = np.arange(len(users)) - starts[slate] + 1
    owner = users[starts]
    step = np.arange(len(starts)) - np.searchsorted(owner, np.arange(count))[owner]
    if max_steps is not None:
        step = step - np.maximum(np.bincount(owner, minlength=count) - max_steps, 0)[owner]
    kept = np.flatnonzero(step[slate] >= 0)
    return _Places(kept, users[kept], step[slate][kept], slot[kept])


def _check_clicks(
    table: pd.DataFrame, clicked: Any, at: tuple[Ints, ...], names: tuple[str, str]
) -> None:
    """See that no slate has two clicks."""
    hits = pd.DataFrame({"user": at[0][clicked], "step": at[1][clicked]})
    again = hits.duplicated().to_numpy()
    if again.any():
        row = table[clicked].iloc[int(again.argmax())]
        raise DataError(
            f"from_frame: expected at most one click in a slate, user {row[names[0]]!r} has more "
            f"at {names[1]} {row[names[1]]!r}; keep the first"
        )


def _table(frame: Any, columns: Sequence[str | None]) -> pd.DataFrame:
    """The table, read from Parquet if need be, its columns checked."""
    if isinstance(frame, str | Path):
        try:
            frame = pd.read_parquet(frame)
        except ImportError:
            raise DataError(
                "from_frame: reading Parquet needs pyarrow or fastparquet, neither is installed: "
                "pip install pyarrow, or pass the table"
            ) from None
    if not isinstance(frame, pd.DataFrame):
        raise DataError(
            f"from_frame: expected a DataFrame or the path of a Parquet file, got "
            f"{type(frame).__name__}"
        )
    needed = [name for name in columns if name is not None]
    missing = [name for name in needed if name not in frame.columns]
    if missing:
        raise DataError(
            f"from_frame: expected the columns {', '.join(needed)}; missing: {', '.join(missing)}, "
            f"found: {', '.join(map(str, frame.columns))}"
        )
    if len(frame) == 0:
        raise DataError("from_frame: expected at least one row, got none")
    for name in needed:
        absent = frame[name].isna().to_numpy()
        if absent.any():
            raise DataError(
                f"from_frame: column {name!r} has no value in row {int(absent.argmax())}; drop or "
                "fill it"
            )
    return frame


def _item_labels(column: pd.Series, items: Sequence[Any] | None, min_count: int) -> list[Any]:
    """Labels of the items that get an id, in the order of their ids."""
    counts = column.value_counts()
    if items is None:
        return sorted(counts.index[counts >= min_count])
    if len(set(items)) != len(items):
        raise DataError("from_frame: expected each of items= once")
    rare = set(counts.index[counts < min_count])
    return [label for label in items if label not in rare]


def _groups(labels: Sequence[Any], groups: Mapping[Any, Any] | pd.Series | None) -> Any:
    """Group number of each id; the special ids have the groups 0, 1 and 2."""
    if groups is None:
        return None
    known = dict(groups.items())
    found = [known.get(label, None) for label in labels]
    names = sorted({name for name in found if name is not None}, key=str)
    number = {name: k + FIRST_ITEM for k, name in enumerate(names)}
    rest = len(names) + FIRST_ITEM
    return np.array([PAD, NO_CLICK, UNK, *(number.get(name, rest) for name in found)])


def _kinds(table: pd.DataFrame, kind: str | None, at: Any, shape: tuple[int, ...]) -> Any:
    """Interaction type of each step, the same for all rows of a slate."""
    if kind is None:
        return None
    kinds = np.zeros(shape, dtype=np.int64)
    kinds[at] = table[kind].map(lambda name: _KINDS.get(str(name), 0)).to_numpy()
    return kinds


def _propensities(
    table: pd.DataFrame, propensity: str | None, at: Any, shape: tuple[int, ...]
) -> Any:
    """Probability of each slot; 1 for slot 0 and for padding."""
    if propensity is None:
        return None
    found = np.ones(shape)
    found[at] = table[propensity].to_numpy(dtype=np.float64)
    return found

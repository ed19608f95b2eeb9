"""Open Bandit data (ZOZOTOWN): one impression of one item at one of three positions a row.

Saito, Aihara, Matsutani, Narita: Open Bandit Dataset and Pipeline (2021). A row has no user id,
only features of the user, so that sequences cannot be had from it: each impression becomes a user
of one step, whose slate is {no click, item}.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from probkit.errors import DataError
from probkit.models.slates.ids import FIRST_ITEM, NO_CLICK, PAD, UNK
from probkit.models.slates.log import SlateLog

__all__ = ["read_open_bandit"]

_COLUMNS = ("item_id", "position", "click", "propensity_score")


def read_open_bandit(
    folder: Path, policy: str = "random", campaign: str = "all", *, group_by: str | None = None
) -> SlateLog:
    """Read the log of a policy on a campaign; see :meth:`SlateLog.from_open_bandit`.

    Raises:
        DataError: A file or a column is missing, or values are out of range.
    """
    rows = _read(folder, f"{policy}_{campaign}")
    missing = [name for name in _COLUMNS if name not in rows.columns]
    if missing:
        raise DataError(
            f"{policy}_{campaign}: expected the columns {', '.join(_COLUMNS)}; missing: "
            f"{', '.join(missing)}"
        )
    items = rows["item_id"].to_numpy(dtype=np.int64)
    position = rows["position"].to_numpy(dtype=np.int64) - 1
    if len(rows) == 0 or items.min() < 0 or not ((position >= 0) & (position <= 2)).all():
        raise DataError(
            f"{policy}_{campaign}: expected rows with item_id >= 0 and position 1, 2 or 3"
        )
    context = _read(folder, f"item_context_{campaign}").sort_values("item_id")
    count = max(len(context), int(items.max()) + 1)
    slate = np.stack([np.full(len(rows), NO_CLICK), items + FIRST_ITEM], axis=1)[:, None]
    clicked = rows["click"].to_numpy(dtype=np.int64)
    propensity = np.ones(slate.shape)
    propensity[:, 0, 1] = rows["propensity_score"].to_numpy(dtype=np.float64)
    return SlateLog(
        slate,
        np.where(clicked == 1, items + FIRST_ITEM, NO_CLICK)[:, None],
        clicked[:, None],
        groups=None if group_by is None else _groups(context, group_by, count),
        n_items=count + FIRST_ITEM,
        propensity=propensity,
        extra={"position": position},
    )


def _read(folder: Path, stem: str) -> pd.DataFrame:
    for name in (f"{stem}.csv", f"{stem}.csv.gz"):
        if (folder / name).is_file():
            return pd.read_csv(folder / name, index_col=0)
    raise DataError(f"from_open_bandit: expected {stem}.csv or {stem}.csv.gz in {folder.name}")


def _groups(
    context: pd.DataFrame, group_by: str, count: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Groups 3, 4, ... by the values of a column; items without context share one more."""
    if group_by not in context.columns:
        raise DataError(
            f"from_open_bandit: expected group_by to be one of "
            f"{', '.join(map(str, context.columns))}, got {group_by!r}"
        )
    codes, names = pd.factorize(context[group_by], sort=True)
    groups = np.full(count, len(names))
    groups[context["item_id"].to_numpy(dtype=np.int64)] = codes
    return np.concatenate([[PAD, NO_CLICK, UNK], groups + FIRST_ITEM])

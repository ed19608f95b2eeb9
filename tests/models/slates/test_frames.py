"""Logs from tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from probkit.errors import DataError
from probkit.models.slates import SlateLog

pytestmark = pytest.mark.usefixtures("unchanged_global_state")


def table():
    """Three slates of two users, rows out of order."""
    rows = [
        ("bo", 7, "kiwi", 1, "rec", 0.5, 1),
        ("ann", 2, "fig", 0, "search", 0.1, 2),
        ("ann", 1, "apple", 0, "rec", 0.2, 1),
        ("ann", 1, "kiwi", 1, "rec", 0.3, 2),
        ("ann", 2, "apple", 0, "search", 0.4, 1),
    ]
    return pd.DataFrame(rows, columns=["user", "time", "item", "click", "kind", "p", "place"])


def test_a_table_becomes_slates():
    log = SlateLog.from_frame(table(), position="place", kind="kind", propensity="p")
    assert log.labels["user"] == ["ann", "bo"]
    assert log.labels["item"][3:] == ["apple", "fig", "kiwi"]
    assert log.slate.tolist() == [[[1, 3, 5], [1, 3, 4]], [[1, 5, 0], [0, 0, 0]]]
    assert log.click.tolist() == [[5, 1], [5, 0]]
    assert log.click_idx.tolist() == [[2, 0], [1, 0]]
    assert log.interaction_type.tolist() == [[2, 1], [2, 0]]
    assert log.propensity[0].tolist() == [[1.0, 0.2, 0.3], [1.0, 0.4, 0.1]]


def test_without_positions_the_rows_give_the_order():
    log = SlateLog.from_frame(table())
    assert log.slate[0].tolist() == [[1, 3, 5], [1, 4, 3]]
    assert log.propensity is None
    assert log.interaction_type.max() == 2


def test_rare_and_foreign_items_are_unknown():
    log = SlateLog.from_frame(table(), min_count=2)
    assert log.labels["item"][3:] == ["apple", "kiwi"]
    assert log.slate[0, 1].tolist() == [1, 2, 3]
    log = SlateLog.from_frame(table(), items=["kiwi", "apple", "plum"])
    assert log.n_items == 6
    assert log.slate[0, 0].tolist() == [1, 4, 3]
    assert log.slate[0, 1].tolist() == [1, 2, 4]


def test_groups_by_label():
    log = SlateLog.from_frame(table(), groups={"apple": "tree", "fig": "tree"})
    assert log.groups.tolist() == [0, 1, 2, 3, 3, 4]
    series = pd.Series({"apple": "a", "fig": "b", "kiwi": "a"})
    assert SlateLog.from_frame(table(), groups=series).groups.tolist() == [0, 1, 2, 3, 4, 3]


def test_the_last_slates_are_kept():
    log = SlateLog.from_frame(table(), max_steps=1)
    assert log.slate.tolist() == [[[1, 4, 3]], [[1, 5, 0]]]
    assert log.click.tolist() == [[1], [5]]


def test_a_large_random_table_is_read_back():
    """Slates written as rows, in any order of the slates, come back."""
    rng = np.random.default_rng(0)
    rows, slates = [], {}
    for user in range(30):
        for time in range(int(rng.integers(1, 6))):
            shown = rng.permutation(20)[: rng.integers(1, 6)]
            hit = int(rng.integers(-1, len(shown)))
            slates[user, time] = (shown.tolist(), hit)
            rows.extend((user, time, item, k == hit, k) for k, item in enumerate(shown))
    frame = pd.DataFrame(rows, columns=["user", "time", "item", "click", "rank"])
    log = SlateLog.from_frame(frame.sample(frac=1, random_state=0), position="rank")
    labels = log.labels["item"]
    for row, user in enumerate(log.labels["user"]):
        for step in range(log.steps):
            ids = [int(i) for i in log.slate[row, step, 1:] if i > 0]
            if (user, step) not in slates:
                assert ids == []
                continue
            shown, hit = slates[user, step]
            assert [labels[i] for i in ids] == shown
            assert int(log.click_idx[row, step]) == hit + 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: SlateLog.from_frame(table().drop(columns="item")), "missing: item"),
        (lambda: SlateLog.from_frame(table().iloc[:0]), "at least one row"),
        (lambda: SlateLog.from_frame(table().assign(item=[None, "a", "b", "c", "d"])), "row 0"),
        (lambda: SlateLog.from_frame(table().assign(click=1)), "at most one click in a slate"),
        (lambda: SlateLog.from_frame(table().assign(item="fig")), "twice"),
        (lambda: SlateLog.from_frame(table(), max_steps=0), "max_steps >= 1"),
        (lambda: SlateLog.from_frame(table(), items=["fig", "fig"]), "each of items= once"),
        (lambda: SlateLog.from_frame(table().assign(p=0.0), propensity="p"), r"\(0, 1\]"),
        (lambda: SlateLog.from_frame([1, 2]), "expected a DataFrame"),
    ],
)
def test_bad_tables(call, text):
    with pytest.raises(DataError, match=text):
        call()


def test_parquet_files(tmp_path):
    """Read where pandas has an engine for it, else explained."""
    path = tmp_path / "log.parquet"
    try:
        table().to_parquet(path)
    except ImportError:
        with pytest.raises(DataError, match="pip install pyarrow"):
            SlateLog.from_frame(path)
        return
    assert SlateLog.from_frame(path).slate.tolist() == SlateLog.from_frame(table()).slate.tolist()

"""Slate logs: what is checked, selected, held out, joined and cut into batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.files import pack, unpack
from probkit.models.slates import SlateLog

pytestmark = pytest.mark.usefixtures("unchanged_global_state")


def small(**changes):
    """Two users, three steps, slates of up to two items."""
    arrays = {
        "slate": [[[1, 3, 4], [1, 5, 0], [1, 4, 6]], [[1, 2, 3], [1, 6, 5], [0, 0, 0]]],
        "click": [[4, 1, 6], [3, 5, 0]],
    }
    return SlateLog(**(arrays | changes))


def test_what_is_not_given_is_found():
    log = small()
    assert log.click_idx.tolist() == [[2, 0, 2], [2, 2, 0]]
    assert log.slate_lengths.tolist() == [[3, 2, 3], [3, 3, 0]]
    assert log.interaction_type.tolist() == [[2, 2, 2], [2, 2, 0]]
    assert (log.users, log.steps, log.slots, log.n_items, log.n_groups) == (2, 3, 3, 7, 1)
    assert log.mask("train").tolist() == [[True] * 3, [True, True, False]]
    assert repr(log) == "SlateLog(users=2, steps=3, slots=3, n_items=7, groups=1)"


def test_clicks_on_unknown_items_do_not_count():
    log = small(click=[[4, 1, 6], [2, 5, 0]])
    assert log.observed.tolist() == [[True] * 3, [False, True, False]]


def test_arrays_and_lists_are_one():
    log = small(slate=small().slate.numpy().astype(np.int16), groups=[0, 0, 0, 1.0, 1.0, 2.0, 2.0])
    assert log.slate.dtype == torch.int64
    assert log.groups.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert log.n_groups == 3


def test_selection_keeps_what_users_share():
    log = small(
        groups=[0, 0, 0, 1, 1, 2, 2],
        extra={"age": [30.0, 40.0]},
        labels={"user": ["ann", "bo"]},
        propensity=torch.full((2, 3, 3), 0.5),
    )
    for index in ([1], torch.tensor([False, True]), slice(1, 2), 1, -1):
        one = log[index]
        assert one.click.tolist() == [[3, 5, 0]]
        assert one.labels["user"] == ["bo"]
        assert one.extra["age"].tolist() == [40.0]
        assert one.n_items == 7
        assert torch.equal(one.groups, log.groups)
        assert one.propensity.shape == (1, 3, 3)
    assert len(log.before(2)) == 2
    assert log.before(2).click.tolist() == [[4, 1], [3, 5]]
    with pytest.raises(IndexError):
        log[2]


def test_the_official_split_is_reproduced():
    """5 % of users for validation, 5 % for the test, by the permutation of torch's seed 0."""
    log = SlateLog([[[1, 3, 4]] * 8] * 100, [[3] * 8] * 100).hold_out()
    state = torch.get_rng_state()
    torch.manual_seed(0)
    order = torch.randperm(100)
    torch.set_rng_state(state)
    assert torch.equal((log.part == 1).nonzero()[:, 0], order[:5].sort().values)
    assert torch.equal((log.part == 2).nonzero()[:, 0], order[5:10].sort().values)
    for part, users in (("valid", order[:5]), ("test", order[5:10])):
        mask = log.mask(part)
        assert mask.any(1).nonzero()[:, 0].tolist() == users.sort().values.tolist()
        assert mask[users].tolist() == [[False] * 5 + [True] * 3] * 5
    assert not (log.mask("train") & (log.mask("valid") | log.mask("test"))).any()
    assert int(log.mask("train").sum()) == 90 * 8 + 10 * 5


def test_counts():
    log = small(train=[[True, True, False], [True, True, True]])
    assert log.exposure().tolist() == [0, 4, 1, 2, 1, 2, 1]
    assert log.clicks().tolist() == [0, 1, 0, 1, 1, 1, 0]


def test_joined_logs_are_padded_alike():
    wide = SlateLog([[[1, 3, 4, 5]]], [[5]], n_items=7)
    both = small().joined(wide)
    assert both.slate.shape == (3, 3, 4)
    assert both.click.tolist() == [[4, 1, 6], [3, 5, 0], [5, 0, 0]]
    assert both.mask("train").sum() == 6
    SlateLog(both.slate, both.click, both.click_idx, both.slate_lengths)  # It is a valid log.
    with pytest.raises(DataError, match="the same 7 ids and groups, got 9 ids"):
        small().joined(SlateLog([[[1, 3]]], [[3]], n_items=9))


def test_batches_cover_all_users_once_and_are_reproducible():
    log = SlateLog([[[1, 3, 4]]] * 11, [[3]] * 11, extra={"number": torch.arange(11)})
    for block in (1, 2):
        loader = log.loader(4, block=block)
        passes = [
            list(loader.factory(0, torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)
        ]
        index = [torch.cat([batch.index for batch in batches]) for batches in passes]
        assert torch.equal(index[0], index[1])
        assert not torch.equal(index[0], index[2])
        for batches, order in zip(passes, index, strict=True):
            assert order.sort().values.tolist() == list(range(11))
            for batch in batches:
                assert batch.scale == pytest.approx(11 / len(batch.index))
                assert torch.equal(batch.data.extra["number"], batch.index)


def test_it_can_be_stored():
    log = small(groups=[0, 0, 0, 1, 1, 2, 2], labels={"item": list("abcdefg")})
    same = unpack(*pack(log))
    assert torch.equal(same.slate, log.slate)
    assert same.labels["item"] == list("abcdefg")
    assert torch.equal(same.groups, log.groups)


BAD = [
    ({"slate": [[1, 3]]}, ShapeError, r"slate \[user, step, slot\]"),
    ({"click": [[4, 1], [3, 5]]}, ShapeError, r"click \[user=2, step=3\]"),
    (
        {"click": [[4, 1, 5], [3, 5, 0]]},
        DataError,
        r"click to be in its slate, got id 5 at user 0, step 2",
    ),
    (
        {"click_idx": [[1, 0, 2], [2, 2, 0]]},
        DataError,
        r"click_idx to be the slot of the click, got slot 1 for id 4 at user 0, step 0",
    ),
    ({"click_idx": [[2, 0, 9], [2, 2, 0]]}, DataError, "got slot 9 for id 6"),
    (
        {"slate": [[[3, 4, 5]] * 3] * 2, "click": [[3] * 3] * 2},
        DataError,
        r"slot 0 of every slate to be 1 \(no click\), got 3",
    ),
    (
        {"slate": [[[1, 1, 4]] * 3] * 2, "click": [[1] * 3] * 2},
        DataError,
        r"1 \(no click\) in slot 0 alone, found it at user 0, step 0, slot 1",
    ),
    (
        {"slate": [[[1, 0, 4]] * 3] * 2, "click": [[1] * 3] * 2},
        DataError,
        r"0 \(padding\) only at the end of a slate",
    ),
    (
        {"slate": [[[1, 4, 4]] * 3] * 2, "click": [[1] * 3] * 2},
        DataError,
        "item 4 is there twice at user 0, step 0",
    ),
    (
        {"n_items": 6},
        DataError,
        r"ids in \[0, n_items=6\), got 6 in slate at user 0, step 2, slot 2",
    ),
    ({"slate": [[[1, -3, 4]] * 3] * 2, "click": [[1] * 3] * 2}, DataError, "got -3"),
    ({"n_items": 3}, DataError, "n_items >= 4"),
    ({"groups": [0, 0, 0, 1, 1]}, DataError, r"n_items=5\)"),
    ({"groups": [0, 0, 1], "n_items": 7}, ShapeError, r"groups \[item=7\]"),
    ({"groups": [0, 0, 0, 1.5, 1, 2, 2]}, DataError, "whole group numbers, got 1.5 for id 3"),
    ({"groups": [0, 0, 0, float("nan"), 1, 2, 2]}, DataError, "got nan for id 3"),
    ({"groups": [0, 0, 0, -1, 1, 2, 2]}, DataError, "group numbers >= 0, got -1 for id 3"),
    (
        {"slate": [[[1, 3, 4], [0, 0, 0], [1, 3, 4]]], "click": [[3, 0, 3]]},
        DataError,
        r"padding steps \(click 0\) only after a user's last step",
    ),
    ({"train": [[False] * 3] * 2}, DataError, "no step is left for training"),
    ({"train": [[True, True, 2], [1, 1, 1]]}, DataError, "train true or false"),
    ({"slate_lengths": [[3, 3, 3], [3, 3, 0]]}, DataError, "got 3 for 2 slots at user 0, step 1"),
    ({"interaction_type": [[2, 2, 5], [2, 2, 0]]}, DataError, "interaction_type 0"),
    ({"propensity": torch.zeros(2, 3, 3)}, DataError, r"propensity in \(0, 1\], got 0 at user 0"),
    ({"propensity": torch.full((2, 3, 3), 1.5)}, DataError, r"propensity in \(0, 1\], got 1.5"),
    ({"propensity": torch.ones(2, 3)}, ShapeError, r"propensity \[user, step, slot\]"),
    ({"part": [0, 3]}, DataError, r"part 0 \(train\), 1 \(valid\) or 2 \(test\)"),
    ({"part": [0]}, ShapeError, r"part \[user=2\]"),
    ({"extra": {"age": [1.0]}}, ShapeError, r"extra\['age'\] \[user=2"),
    (
        {"slate": [[[1, 3.5, 4]] * 3] * 2, "click": [[1] * 3] * 2},
        DataError,
        "whole numbers in slate",
    ),
    ({"click": [["a"] * 3] * 2}, DataError, "expected numbers"),
]


@pytest.mark.parametrize(("changes", "error", "text"), BAD)
def test_bad_logs(changes, error, text):
    with pytest.raises(error, match=text):
        small(**changes)


def test_bad_requests():
    log = small()
    for call, text in (
        (lambda: log.mask("all"), "'train', 'valid' or 'test'"),
        (lambda: log.before(4), "a step from 1 to 3"),
        (lambda: log.hold_out(valid=1.5), "shares valid and test"),
        (lambda: log.hold_out(order=[0, 0]), "permutation of 2 users"),
        (lambda: log.loader(5, block=2), "multiple of block"),
    ):
        with pytest.raises(DataError, match=text):
            call()

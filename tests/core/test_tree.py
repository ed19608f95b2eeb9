"""Trees of tensors."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from probkit.tree import concatenate, leaves, map_tensors

Pair = namedtuple("Pair", "x y")


def tree(value):
    return {"a": [torch.full((1, 2), value), "text"], "b": Pair(torch.full((1, 1), value), (3,))}


def test_map_keeps_the_structure():
    out = map_tensors(lambda t: t + 1, tree(1.0))
    assert out["a"][0].tolist() == [[2.0, 2.0]] and out["a"][1] == "text"
    assert isinstance(out["b"], Pair) and out["b"].y == (3,)


def test_leaves_in_depth_first_order():
    assert leaves({"a": [1, (2, 3)], "b": {"c": 4}}) == [1, 2, 3, 4]


def test_concatenate_along_a_dim():
    out = concatenate([tree(1.0), tree(2.0)], dim=1)
    assert out["a"][0].tolist() == [[1.0, 1.0, 2.0, 2.0]] and out["a"][1] == "text"
    assert isinstance(out["b"], Pair) and out["b"].x.tolist() == [[1.0, 2.0]]


def test_concatenate_wants_one_structure():
    with pytest.raises(ValueError, match="shorter"):
        concatenate([[torch.ones(1), torch.ones(1)], [torch.ones(1)]], dim=0)

"""Arrays, frames and lists become tensors, once, with their labels."""

from __future__ import annotations

from collections import namedtuple

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from probkit.data import as_tensor, convert, device_of, take
from probkit.errors import DataError

Pair = namedtuple("Pair", "x y")


@given(
    hnp.arrays(
        st.sampled_from(["f8", "f4", "i8", "i4", "u1", "bool", "c16", ">f8", ">i4"]),
        hnp.array_shapes(min_dims=0, max_dims=3, min_side=0),
        elements=None,
    )
)
def test_arrays_keep_their_values(array):
    tensor = as_tensor(array)
    assert tensor.shape == array.shape
    np.testing.assert_array_equal(tensor.numpy(), array)
    assert tensor.numpy().dtype == array.dtype.newbyteorder("=")


def test_arrays_are_copied():
    array = np.zeros(3)
    tensor = as_tensor(array[::-1])
    array[:] = 1.0
    assert tensor.tolist() == [0.0, 0.0, 0.0]


def test_tensors_pass():
    tensor = torch.ones(2)
    assert as_tensor(tensor) is tensor


def test_extended_precision_becomes_double():
    assert as_tensor(np.array([0.5], dtype=np.longdouble)).dtype == torch.float64


def test_frames_become_tables():
    frame = pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5], "c": [True, False]})
    tensor = as_tensor(frame)
    assert tensor.dtype == torch.float64 and tensor.tolist() == [[1.0, 0.5, 1.0], [2.0, 1.5, 0.0]]
    assert as_tensor(frame[["a"]]).dtype == torch.int64
    assert as_tensor(frame[["c"]]).shape == (2, 1)
    assert as_tensor(frame[[]]).shape == (2, 0)


def test_missing_entries_become_nan():
    nullable = pd.DataFrame({"a": pd.array([1, None], dtype="Int64")})
    for value in (nullable, nullable["a"]):
        assert bool(torch.isnan(as_tensor(value).flatten()[1]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (pd.DataFrame({"a": [1.0], "town": ["x"]}), r"^X: expected numeric columns, column 'town'"),
        (pd.Series(["x"]), r"^X: expected numbers, got dtype object"),
        (np.array(["2020"], dtype="M8[D]"), r"^X: expected numbers, got dtype datetime64"),
        (np.array([object()]), r"^X: expected numbers, got dtype object"),
        ([[1.0], [2.0, 3.0]], r"^X: expected numbers in a regular array"),
    ],
)
def test_other_things_are_refused_by_name(value, text):
    with pytest.raises(DataError, match=text) as caught:
        as_tensor(value, name="X")
    assert "\n" not in str(caught.value)


def test_nesting_is_kept():
    out = convert({"a": [np.ones(2), (np.zeros(1), "text", 3)], "b": Pair(np.ones(1), None)}).data
    assert isinstance(out["a"][0], torch.Tensor) and out["a"][1][1:] == ("text", 3)
    assert isinstance(out["b"], Pair) and isinstance(out["b"].x, torch.Tensor)


def test_labels_are_found_by_path():
    frame = pd.DataFrame(np.zeros((2, 2)), index=["r", "s"], columns=["a", "b"])
    labels = convert({"X": (frame, frame["a"])}).labels
    assert labels == {("X", 0): (["r", "s"], ["a", "b"]), ("X", 1): (["r", "s"],)}
    plain = pd.DataFrame(np.zeros((2, 2)))
    assert convert((plain, plain[0])).labels == {}


def test_errors_name_the_path():
    with pytest.raises(DataError, match=r"^data\['X'\]\[1\]: expected numbers"):
        convert({"X": [1.0, np.array(["a"])]})


def test_take_selects_units():
    data = {
        "y": torch.arange(5),
        "pair": Pair(torch.arange(10).reshape(5, 2), torch.ones(3)),
        "k": 2,
    }
    batch = take(data, torch.tensor([3, 1]), 5)
    assert batch["y"].tolist() == [3, 1] and batch["k"] == 2
    assert batch["pair"].x.tolist() == [[6, 7], [2, 3]]
    assert batch["pair"].y.tolist() == [1.0, 1.0, 1.0], "another length is shared by all units"
    assert take(torch.tensor(1.0), torch.tensor([0]), 1).ndim == 0


def test_device_is_that_of_the_tensors():
    class Container:
        device = torch.device("meta")

    meta = torch.empty(1, device="meta")
    assert device_of([torch.ones(1), {"x": meta}]).type == "meta"
    assert device_of(Container()).type == "meta"
    assert device_of(("text", 3)).type == "cpu"

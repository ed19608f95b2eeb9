"""Spaces: three forms of a point, conditions, Sobol points, and what is refused."""

from __future__ import annotations

import json
import math

import botorch  # noqa: F401  (its import changes settings of GPyTorch: before the tests)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probkit.bo import Categorical, Float, Int, Space
from probkit.errors import DataError, ShapeError


def network():
    return Space(
        lr=Float(1e-5, 1, log=True),
        x=Float(-2, 3),
        layers=Int(1, 4),
        units=Int(1, 512, log=True),
        act=Categorical(["relu", "leaky", None, 3, True]),
        size=Categorical(["s", "m", "l"], ordered=True),
        slope=Float(0, 1, when={"act": "leaky"}),
        second=Int(1, 9, when={"layers": [2, 3, 4]}),
        kind=Categorical(["a", "b"], when={"second": [1, 2]}),
    )


def random_params(seed, n=64):
    return network().sobol(n, rng=seed)


def test_codes_and_features_come_back_as_the_same_params():
    space, points = network(), random_params(0)
    assert space.from_codes(space.codes(points)) == points
    assert space.decode(space.encode(points)) == points
    assert {"slope" in p for p in points} == {True, False}
    assert all(("slope" in p) == (p["act"] == "leaky") for p in points)
    assert all(("kind" in p) == (p.get("second") in (1, 2)) for p in points)
    assert all(type(p["act"]) in (str, type(None), int, bool) for p in points)


def test_features_lie_in_the_unit_cube_and_categories_are_indicators():
    space = network()
    X = space.encode(random_params(1))
    assert X.dtype == torch.float64 and X.shape == (64, space.dim)
    assert bool(((X >= 0) & (X <= 1)).all())
    block = X[:, space.columns["act"]]
    assert torch.equal(block.sum(-1), torch.ones(64, dtype=torch.float64))


def test_values_sit_where_their_scale_puts_them():
    space = Space(lr=Float(1e-4, 1, log=True), k=Int(1, 5), w=Int(1, 100, log=True))
    assert space.encode({"lr": 1e-2, "k": 2, "w": 10}).tolist() == [[0.5, 0.25, 0.5]]
    assert space.from_codes(torch.tensor([[0.25, 2.4, 0.75]], dtype=torch.float64)) == [
        {"lr": pytest.approx(1e-3), "k": 3, "w": 32}
    ]


def test_points_that_differ_in_inactive_parameters_only_are_one():
    space = Space(act=Categorical(["relu", "leaky"]), slope=Float(0, 1, when={"act": "leaky"}))
    codes = torch.tensor([[0, 0.1], [0, 0.9], [1, 0.1], [1, 0.9]], dtype=torch.float64)
    features, canonical = space.features(codes), space.canonical(codes)
    for same in (features, canonical):
        assert torch.equal(same[0], same[1]) and not torch.equal(same[2], same[3])
    assert space.codes({"act": "relu"}).tolist() == [[0.0, 0.5]]


def test_gradients_pass_through_active_floats_only():
    space = Space(act=Categorical(["relu", "leaky"]), slope=Float(0, 1, when={"act": "leaky"}))
    codes = torch.tensor([[0, 0.3], [1, 0.3]], dtype=torch.float64, requires_grad=True)
    space.features(codes).sum().backward()
    assert codes.grad[:, 1].tolist() == [0.0, 1.0]


def test_domain_has_a_branch_for_each_combination_of_parents():
    space = network()
    domain = space.domain
    assert domain.categorical == (4, 8) and set(domain.integer) == {2, 5, 7}
    at = {name: k for k, name in enumerate(space.names)}
    for branch in domain.branches:
        leaky = branch[at["act"]] == 1.0
        assert (at["slope"] in branch) != leaky
    # 5 activations x (1 layer, or 3 with 9 seconds each)
    assert len(domain.branches) == 5 * (1 + 3 * 9)
    assert Space(x=Float(0, 1)).domain.branches == ()


def test_every_random_point_lies_in_a_branch():
    space = network()
    codes = space.codes(random_params(3))
    for row in codes:
        fits = [all(row[k] == v for k, v in branch.items()) for branch in space.domain.branches]
        assert sum(fits) == 1


def test_size_counts_points_with_conditions():
    space = Space(
        a=Categorical(["x", "y", "z"]),
        n=Int(1, 3, when={"a": ["y", "z"]}),
        m=Int(1, 4, when={"n": 2}),
    )
    assert space.size == 1 + 2 * (1 + 4 + 1)
    distinct = {json.dumps(p) for p in space.sobol(2048, rng=0)}
    assert len(distinct) == space.size
    assert Space(x=Float(0, 1), k=Int(1, 2)).size == math.inf


def test_sobol_points_continue_and_follow_the_seed():
    space = network()
    together = space.sobol(12, rng=5)
    assert together == space.sobol(7, rng=5) + space.sobol(5, rng=5, start=7)
    assert together != space.sobol(12, rng=6)


def test_sobol_gives_levels_equal_shares():
    # A scrambled Sobol sequence of 2^k points is a net: each of 4 levels gets exactly 2^k / 4.
    points = Space(k=Int(1, 4), c=Categorical(list("abcd"))).sobol(64, rng=0)
    for name in ("k", "c"):
        counts = np.unique([str(p[name]) for p in points], return_counts=True)[1]
        assert counts.tolist() == [16] * 4


def test_json_brings_the_same_space_back():
    space = network()
    again = Space.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space and again.names == space.names
    assert space != Space(x=Float(0, 1))


def test_numpy_and_torch_scalars_are_values():
    space = Space(x=Float(0, 1), k=Int(1, 3), c=Categorical(np.array([1, 2])))
    found = space.check({"x": torch.tensor(0.5), "k": np.int64(2), "c": np.int64(2)})
    assert found == {"x": 0.5, "k": 2, "c": 2}
    assert [type(v) for v in found.values()] == [float, int, int]


def test_true_and_one_are_different_choices():
    space = Space(c=Categorical([1, True, "1"]))
    for value in (1, True, "1"):
        back = space.from_codes(space.codes({"c": value}))[0]["c"]
        assert back == value and type(back) is type(value)


@settings(deadline=None, max_examples=50)
@given(
    low=st.floats(-1e6, 1e6),
    span=st.floats(1e-3, 1e6),
    u=st.floats(0, 1),
    log=st.booleans(),
)
def test_floats_stay_inside_their_bounds(low, span, u, log):
    low = abs(low) + 1e-3 if log else low
    parameter = Float(low, low + span, log=log)
    value = parameter.from_code(u)
    assert parameter.low <= value <= parameter.high
    assert parameter.to_code(value) == pytest.approx(u, abs=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(1, 0), r"Float: bounds are reversed: low=1 > high=0; swap them"),
        (lambda: Int(3, 3), r"Int: bounds are equal \(3\); leave a fixed value out of the space"),
        (lambda: Float(0, 1, log=True), r"Float: a log scale needs low > 0, got low=0"),
        (lambda: Float(0, math.inf), r"Float: expected finite bounds, got low=0, high=inf"),
        (lambda: Int(0.5, 2), r"Int: expected whole bounds, got low=0.5, high=2"),
        (lambda: Categorical([]), r"Categorical: expected two or more choices, got none"),
        (lambda: Categorical(["a"]), r"Categorical: only one choice \('a'\); leave it out"),
        (lambda: Categorical("ab"), r"Categorical: expected a list of choices, got 'ab'"),
        (lambda: Categorical(["a", "a"]), r"Categorical: expected different choices"),
        (lambda: Categorical(["a", print]), r"expected choices that are strings, numbers, boolea"),
        (lambda: Space(), r"a space needs a parameter, for example Space\(x=Float\(0, 1\)\)"),
        (lambda: Space(x=3), r"parameter 'x': expected Float, Int or Categorical, got 3"),
        (
            lambda: Space(x=Float(0, 1, when={"y": 1})),
            r"parameter 'x': its parent 'y' is not in the space",
        ),
        (
            lambda: Space(y=Float(0, 1), x=Float(0, 1, when={"y": 1})),
            r"its parent 'y' must be a Categorical, or an Int that is not on a log scale",
        ),
        (
            lambda: Space(y=Int(1, 3), x=Float(0, 1, when={"y": 4})),
            r"parameter 'x', when 'y': expected a whole number in \[1, 3\], got 4",
        ),
        (
            lambda: Space(a=Int(1, 2, when={"b": 1}), b=Int(1, 2, when={"a": 1})),
            r"conditions form a circle: a -> b -> a",
        ),
    ],
)
def test_impossible_spaces_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"x": 2.0, "act": "relu"}, r"parameter 'x': expected a number in \[0, 1\], got 2.0"),
        ({"x": math.nan, "act": "relu"}, r"parameter 'x': expected a number in \[0, 1\], got nan"),
        ({"x": "a", "act": "relu"}, r"parameter 'x': expected a number in \[0, 1\], got 'a'"),
        ({"x": 0.5}, r"parameter 'act' is missing"),
        ({"x": 0.5, "act": "elu"}, r"parameter 'act': expected one of \['relu', 'leaky'\], got"),
        ({"x": 0.5, "act": "relu", "z": 1}, r"unknown parameters: z; the space has x, act, slope"),
        (
            {"x": 0.5, "act": "relu", "slope": 0.1},
            r"parameter 'slope' is not active for act='relu'; leave it out",
        ),
        (7, r"expected params as a mapping of names to values, got 7"),
    ],
)
def test_params_outside_the_space_are_refused(params, message):
    space = Space(
        x=Float(0, 1),
        act=Categorical(["relu", "leaky"]),
        slope=Float(0, 1, when={"act": "leaky"}),
    )
    with pytest.raises(DataError, match=message):
        space.check(params)


def test_features_of_another_width_are_refused():
    with pytest.raises(ShapeError, match=r"expected features \[point, 1 columns\], got \(3, 2\)"):
        Space(x=Float(0, 1)).decode(torch.zeros(3, 2))


def test_too_many_branches_are_refused():
    many = {f"p{k}": Int(1, 12) for k in range(3)}
    below = {f"c{k}": Float(0, 1, when={f"p{k}": 1}) for k in range(3)}
    with pytest.raises(DataError, match="the conditions make more than 1000 branches"):
        Space({**many, **below}).domain  # noqa: B018

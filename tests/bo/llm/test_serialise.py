"""Configurations as text: round trips, and everything that is not accepted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probkit.bo import Categorical, Float, Int, Space
from probkit.bo.llm.formats import read_number
from probkit.bo.llm.serialise import Serialiser
from probkit.errors import DataError

from .conftest import SPACES


def unit(space: Space, name: str, value: float) -> float:
    """A value on the scale of its parameter."""
    parameter = space.parameters[name]
    return math.log(value) if getattr(parameter, "log", False) else value


@pytest.mark.parametrize(
    ("decimals", "warp", "n"), [("auto", False, 1000), ("auto", True, 300), ("bound", False, 300)]
)
@pytest.mark.parametrize("name", SPACES)
def test_round_trip_is_the_identity_to_printed_precision(name, decimals, warp, n):
    space = SPACES[name]
    text = Serialiser(space, decimals=decimals, warp=warp)
    codes = space.random_codes(n, rng=torch.Generator().manual_seed(1))
    corners = torch.stack([space.canonical(c) for c in space.code_bounds])
    for params in space.from_codes(torch.cat([codes, corners])):
        rounded = text.rounded(params)
        for read in (
            text.parse(text.answer(params)),
            text.parse_json(text.to_json(params)),
            text.parse_row(text.row(params)),
        ):
            assert read == (rounded, "")
        assert text.answer(rounded) == text.answer(params)
        assert space.check(rounded) == rounded


@pytest.mark.parametrize("name", SPACES)
def test_printing_moves_values_by_less_than_a_step(name):
    space = SPACES[name]
    text = Serialiser(space)
    for params in space.from_codes(space.random_codes(200, rng=torch.Generator().manual_seed(2))):
        for key, value in text.rounded(params).items():
            if isinstance(space.parameters[key], Float):
                low, high = (
                    unit(space, key, getattr(space.parameters[key], b)) for b in ("low", "high")
                )
                # a thousandth of the range; four digits of a logarithmic scale; one step at bounds
                allowed = 1e-3 * (high - low) if low != high else 0
                allowed = (
                    max(allowed, 1e-3) if getattr(space.parameters[key], "log", False) else allowed
                )
                assert abs(unit(space, key, value) - unit(space, key, params[key])) <= allowed
            else:
                assert value == params[key]


@pytest.mark.parametrize("warp", [False, True])
@pytest.mark.parametrize("name", SPACES)
def test_no_row_is_longer_than_the_longest(name, warp):
    space = SPACES[name]
    text = Serialiser(space, warp=warp)
    codes = space.random_codes(200, rng=torch.Generator().manual_seed(3))
    assert all(len(text.row(p)) <= len(text.longest()) for p in space.from_codes(codes))


def test_decimals_follow_the_lower_bound_or_what_is_given():
    space = Space(a=Float(0.01, 0.99), b=Float(0.5, 2.0))
    by_bound = Serialiser(space, decimals="bound")
    assert by_bound.row({"a": 0.123456, "b": 1.26}) == "a is 0.12, b is 1.3"
    assert Serialiser(space, decimals={"a": 1}).row({"a": 0.5, "b": 1.26}) == "a is 0.5, b is 1.260"


def test_rounding_does_not_leave_the_bounds():
    space = Space(a=Float(0.124, 0.876))
    text = Serialiser(space, decimals={"a": 2})
    assert text.row({"a": 0.876}) == "a is 0.87"
    assert text.row({"a": 0.124}) == "a is 0.13"


def test_warped_values_are_logarithms():
    space = Space(rate=Float(1e-5, 1e-1, log=True))
    text = Serialiser(space, warp=True)
    assert text.row({"rate": 1e-2}) == "rate is -2.000"
    assert text.parse("rate: -5 ##").params == {"rate": 1e-5}  # not below by rounding
    assert text.parse("rate: 0.01 ##").reason == "out of range"


def test_names_can_be_hidden():
    space = Space({"learning rate": Float(0, 1), "depth": Int(1, 3)})
    text = Serialiser(space, anonymous=True)
    params = {"learning rate": 0.5, "depth": 2}
    assert text.answer(params) == "## X1: 0.500, X2: 2 ##"
    assert text.parse(text.answer(params)).params == params
    assert text.parse("learning rate: 0.5, depth: 2 ##").reason == "unknown parameter"
    assert "learning" not in text.describe()


def test_the_listing_names_ranges_types_precision_and_conditions():
    text = Serialiser(SPACES["mixed"])
    assert text.describe().splitlines() == [
        "- width: whole number from 1 to 4096, on a logarithmic scale",
        "- size: one of 0.1 | 0.25 | 1.0 | 2.5, in this order",
        "- act: one of relu | tanh | leaky relu",
        "- slope: number from 1e-09 to 3e-09, 12 decimals; only if act is leaky relu",
        "- bias: one of true | false | null | 0.001 | 7",
        "- shift: number from -5 to 10000000, 0 decimals",
        "- narrow: number from 0.1 to 0.14, 5 decimals",
    ]


SPACE = Space(
    depth=Int(1, 15),
    rate=Float(0.01, 0.99),
    act=Categorical(["relu", "tanh"]),
    slope=Float(0, 1, when={"act": "relu"}),
    size=Categorical([0.001, 0.002, 0.004], ordered=True),
)
GOOD = {"depth": "3", "rate": "0.5", "act": "tanh", "size": "0.002"}


def answer(**changes: str | None) -> str:
    parts = {**GOOD, **changes}
    inside = ", ".join(f"{k}: {v}" for k, v in parts.items() if v is not None)
    return f" {inside} ##"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (answer(), ""),
        ("##" + answer(), ""),
        (answer() + " and ## more ##", ""),
        (answer(depth="3.0", rate="5e-1"), ""),
        (answer(rate="1e309"), "not finite"),
        (answer(rate="nan"), "not a number"),
        (answer(rate="inf"), "not a number"),
        (answer(rate="0.5.1"), "not a number"),
        (answer(rate="0,5"), "no name and value"),
        (answer(rate="1_0"), "not a number"),
        (answer(rate="0x1"), "not a number"),
        (answer(rate="\u0663"), "not a number"),
        (answer(rate="None"), "not a number"),
        (answer(rate="9" * 100), "not a number"),
        (answer(rate="__import__('os')"), "not a number"),
        (answer(rate="0.001"), "out of range"),
        (answer(depth="16"), "out of range"),
        (answer(depth="1e300"), "out of range"),
        (answer(depth="3.5"), "not whole"),
        (answer(act="ReLU"), "unknown choice"),
        (answer(size="0.0021"), "unknown choice"),
        (answer(size="0.0020000001"), "unknown choice"),
        (answer(depth=None), "missing parameter"),
        (answer(act="relu"), "missing parameter"),
        (answer(slope="0.5"), "inactive parameter"),
        (answer(act="relu", slope="0.5"), ""),
        (answer(momentum="0.5"), "unknown parameter"),
        (answer().replace("##", ", rate: 0.5 ##"), "repeated parameter"),
        (answer().removesuffix("##"), "no delimiter"),
        ("", "no delimiter"),
        ("##", "no delimiter"),
        ("## ##", "no name and value"),
        ("I cannot help with that. ##", "no name and value"),
        ("x" * 100_001, "too long"),
    ],
)
def test_what_is_between_delimiters_is_read_strictly(text, reason):
    read = Serialiser(SPACE).parse(text)
    assert read.reason == reason
    assert (read.params is None) == bool(reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"depth": 3, "rate": 0.5, "act": "tanh", "size": 0.002}', ""),
        ('Sure: {"depth": 3.0, "rate": 5e-1, "act": "tanh", "size": 2e-3} ok', ""),
        ('{"depth": 3, "rate": "0.5", "act": "tanh", "size": 0.002}', "not a number"),
        ('{"depth": true, "rate": 0.5, "act": "tanh", "size": 0.002}', "not a number"),
        ('{"depth": 3, "rate": null, "act": "tanh", "size": 0.002}', "not a number"),
        ('{"depth": 3, "rate": NaN, "act": "tanh", "size": 0.002}', "not finite"),
        ('{"depth": 3, "rate": 1e309, "act": "tanh", "size": 0.002}', "not finite"),
        ('{"depth": 3, "rate": [0.5], "act": "tanh", "size": 0.002}', "not a number"),
        ('{"depth": 3, "rate": 0.5, "act": ["tanh"], "size": 0.002}', "unknown choice"),
        ('{"depth": 3, "rate": 0.5, "act": "tanh", "size": "0.002"}', "unknown choice"),
        (
            '{"depth": 3, "depth": 3, "rate": 0.5, "act": "tanh", "size": 0.002}',
            "repeated parameter",
        ),
        ('{"depth": 3, "rate": 0.5, "act": "tanh"}', "missing parameter"),
        ('{"depth": 3, "foo": 1}', "unknown parameter"),
        ('{"depth": 3,', "not json"),
        ("{" * 50_000, "not json"),
        ("none", "not json"),
    ],
)
def test_json_is_read_strictly(text, reason):
    read = Serialiser(SPACE).parse_json(text)
    assert read.reason == reason
    assert (read.params is None) == bool(reason)


def test_a_list_that_was_cut_off_gives_what_stands_before():
    one = '{"depth": 3, "rate": 0.5, "act": "tanh", "size": 0.002}'
    read = Serialiser(SPACE).parse_json_list(f"Here: [{one}, 7, {one}, " + one[:20])
    assert [r.reason for r in read] == ["", "not an object", "", "not json"]
    for text in ("nothing", "[]", "[" * 50_000, "x" * 100_001):
        found = Serialiser(SPACE).parse_json_list(text)
        assert len(found) == 1 and found[0].params is None


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.sampled_from('##depth:rate,act0.5 \n{}[]"\\eE+-nN\u0663\x00'), max_size=60)
)
def test_no_text_raises(text):
    serialiser = Serialiser(SPACE)
    for read in (serialiser.parse(text), serialiser.parse_row(text), serialiser.parse_json(text)):
        assert (read.params is None) == bool(read.reason)
    assert serialiser.parse_json_list(text)
    number = read_number(text)
    assert number is None or math.isfinite(number)


@pytest.mark.parametrize(
    "name", ["a##b", "a,b", "a:b", "a\nb", 'a"b', "a\u2028b", " a", "x is y", "a\x00"]
)
def test_names_that_hold_delimiters_are_refused(name):
    with pytest.raises(DataError, match="parameter name: .*delimits answers.*anonymous=True"):
        Serialiser(Space({name: Float(0, 1)}))
    Serialiser(Space({name: Float(0, 1)}), anonymous=True)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Space({"n" * 65: Int(1, 2)}), "at most 64 characters, got 65"),
        (Space(c=Categorical(["a,b", "c"])), "choice of 'c': 'a,b' contains ,"),
        (Space(c=Categorical(["#", "c"])), "choice of 'c': '#' contains #"),
        (Space(c=Categorical(["1", 1])), "choices that print differently"),
    ],
)
def test_choices_and_long_names_that_cannot_be_told_apart_are_refused(space, message):
    with pytest.raises(DataError, match=message):
        Serialiser(space)


@pytest.mark.parametrize(
    ("decimals", "message"),
    [
        ("few", "expected 'auto', 'bound' or a mapping"),
        ({"z": 2}, "unknown parameters: z"),
        ({"depth": 1, "rate": -1}, "decimals of 'rate': expected a whole number >= 0"),
    ],
)
def test_other_precisions_are_refused(decimals, message):
    with pytest.raises(DataError, match=message):
        Serialiser(SPACE, decimals=decimals)


def test_params_of_another_space_are_refused():
    with pytest.raises(DataError, match="parameter 'rate' is missing"):
        Serialiser(SPACE).row({"depth": 3})


def test_spaces_refuse_what_no_prompt_could_mend():
    """Bounds, logarithms and levels are checked by the space itself."""
    for make, message in (
        (lambda: Float(1, 0), "bounds are reversed"),
        (lambda: Float(0, 1, log=True), "a log scale needs low > 0"),
        (lambda: Categorical([], ordered=True), "two or more choices, got none"),
    ):
        with pytest.raises(DataError, match=message):
            make()

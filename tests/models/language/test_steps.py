"""Where steps and answers end."""

from __future__ import annotations

import pytest

from probkit.errors import DataError
from probkit.models.language import Continuation, Steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": (), "max_tokens": None}, "a delimiter or a number of tokens, got stop=.. and"),
        ({"stop": ("\n", "\n\n")}, r"'\\n' lies inside '\\n\\n', which therefore never ends"),
        ({"stop": "\n", "final": "END\n"}, "lies inside 'END"),
        ({"stop": ("",)}, "expected stop as strings that are not empty"),
        ({"stop": (3,)}, "expected stop as strings that are not empty"),
        ({"final": 3}, "expected final as strings, got 3"),
        ({"max_tokens": 0}, "expected a whole max_tokens >= 1, got 0"),
        ({"max_steps": 2.5}, "expected a whole max_steps >= 1, got 2.5"),
        ({"max_steps": None}, "expected a whole max_steps >= 1, got None"),
    ],
)
def test_bad_steps(options, message):
    with pytest.raises(DataError, match=message):
        Steps(**options)


def test_strings_and_limits():
    steps = Steps(stop="\n", final=("###", "\n"))
    assert steps.stops == ("\n", "###")
    assert Steps(stop=";", max_tokens=None).limit == 1024
    assert Steps().limit == 64 and Steps(max_steps=7)("any prompt") == 7


def test_ends_of_answers():
    steps = Steps(stop="\n", final="###")
    step = Continuation((), "a\n", 0.0, 0.0, "stop", 2)
    assert not steps.ends_answer(step)
    assert steps.ends_answer(step._replace(text="a###"))
    assert steps.ends_answer(step._replace(text="a", reason="end"))
    assert not steps.ends_answer(step._replace(text="### a", reason="length"))

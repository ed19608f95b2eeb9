"""A function of one's own: what it sees, what its scores become, what it may not return."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.language.potentials import VerifierPotential, kind_of
from probkit.models.language.protocol import Continuation, Prefix


def step(text, reason="length"):
    return Continuation((), text, -1.0, -1.0, reason, len(text))


def test_what_is_seen():
    seen = []

    def watch(text):
        seen.append(text)
        return 1.0

    prefix = Prefix((("system", "Be brief."), ("user", "2+2?")), text="so ")
    for sees in ("answer", "step", "all"):
        VerifierPotential(watch, sees=sees).log_step([prefix], [step("4")])
    VerifierPotential(watch, kind="value", sees="all").log_value([prefix], [False])
    assert seen == ["so 4", "4", "Be brief.\n\n2+2?so 4", "Be brief.\n\n2+2?so "]


def test_scores_become_weights():
    texts = ["yes", "no", "half"]
    score = {"yes": True, "no": False, "half": 0.5}.get
    prefixes = [Prefix("?", text=text) for text in texts]
    hard = VerifierPotential(score, kind="value").log_value(prefixes, [False] * 3)
    soft = VerifierPotential(score, kind="value", high=0.98, low=0.02)
    assert hard.exp().tolist() == [1.0, 0.0, 0.5] and hard.dtype == torch.float64
    torch.testing.assert_close(
        soft.log_value(prefixes, [False] * 3).exp(), torch.tensor([0.98, 0.02, 0.5]).double()
    )
    logs = VerifierPotential(lambda text: -float(len(text)), kind="value", scale="log")
    assert logs.log_value(prefixes, [False] * 3).tolist() == [-3.0, -2.0, -4.0]
    never = VerifierPotential(lambda text: -math.inf, scale="log")
    assert never.log_step([Prefix("?")], [step("a")]).tolist() == [-math.inf]


def test_a_batch_is_rated_by_one_call():
    calls = []

    def rate(texts):
        calls.append(list(texts))
        return torch.tensor([len(text) / 10 for text in texts])

    potential = VerifierPotential(rate, batched=True)
    logs = potential.log_step([Prefix("?"), Prefix("?", text="a")], [step("b"), step("cd")])
    assert calls == [["b", "acd"]]
    torch.testing.assert_close(logs.exp(), torch.tensor([0.1, 0.3]).double(), rtol=1e-6, atol=0)


def test_the_end_alone_is_rated_by_final_only():
    prefix = Prefix("?", text="ab")
    no = VerifierPotential(lambda text: 0.25)
    assert no.log_step([prefix], [step("", "end")]).tolist() == [0.0]
    final = VerifierPotential(lambda text: 0.25, final=lambda text: 0.5)
    steps = [step("", "end"), step("c"), step("c", "end")]
    assert final.log_step([prefix] * 3, steps).exp().tolist() == [0.5, 0.25, 0.5]
    value = VerifierPotential(lambda text: 0.25, kind="value", final=lambda text: 0.5)
    assert value.log_value([prefix] * 2, [True, False]).exp().tolist() == [0.5, 0.25]


@pytest.mark.parametrize("kind", ["per_step", "value"])
def test_its_kind_is_what_it_says(kind):
    assert kind_of(VerifierPotential(lambda text: 1.0, kind=kind)) == kind


@pytest.mark.parametrize(
    ("score", "scale", "message"),
    [
        (1.5, "probability", r"expected scores in \[0, 1\], got 1.5 for the text 'ab'"),
        (-0.1, "probability", r"expected scores in \[0, 1\], got -0.1"),
        (math.nan, "probability", "expected a number for the text 'ab', got nan"),
        (math.inf, "log", r"finite log scores or -inf, got \+inf for the text 'ab'"),
        ("great", "probability", "expected a number for the text 'ab', got 'great'"),
        (None, "log", "expected a number for the text 'ab', got None"),
    ],
)
def test_bad_scores(score, scale, message):
    potential = VerifierPotential(lambda text: score, scale=scale)
    with pytest.raises(DataError, match=message):
        potential.log_step([Prefix("?")], [step("ab")])


def test_bad_numbers_of_scores():
    potential = VerifierPotential(lambda texts: [0.5], batched=True)
    with pytest.raises(ShapeError, match="expected 2 scores, one for each text, got 1"):
        potential.log_step([Prefix("?")] * 2, [step("a"), step("b")])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"function": "text"}, DataError, "expected a function of a text, got 'text'"),
        ({"kind": "both"}, DataError, "expected kind 'per_step' or 'value', got 'both'"),
        ({"sees": "none"}, DataError, "expected sees 'answer' or 'step' or 'all'"),
        ({"scale": "odds"}, DataError, "expected scale 'probability' or 'log', got 'odds'"),
        ({"low": 0.9, "high": 0.1}, DataError, "expected 0 <= low < high <= 1"),
        ({"scale": "log", "low": 0.1}, DataError, "low and high are for scale='probability'"),
        ({"kind": "value", "sees": "step"}, CapabilityError, "a value rates whole prefixes"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        VerifierPotential(**{"function": bool, **options})


class Both:
    def log_step(self, prefixes, steps): ...
    def log_value(self, prefixes, finished): ...


@pytest.mark.parametrize(
    ("potential", "message"),
    [
        (Both(), "Both has log_step.* and log_value"),
        (object(), "object has neither"),
    ],
)
def test_what_is_no_potential(potential, message):
    with pytest.raises(CapabilityError, match=message):
        kind_of(potential)


def test_a_kind_that_is_not_kept():
    class Claims(Both):
        kind = "sum"

    with pytest.raises(CapabilityError, match="and kind='sum'"):
        kind_of(Claims())

"""``Study(surrogate="llm")``: better with good advice, the same with bad advice, no failure."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from probkit.bo import Categorical, Float, Int, Space, Study
from probkit.bo.llm import GPScript, LLMSurrogate, ProblemCard
from probkit.bo.llm.tuning import LLMHybrid
from probkit.errors import CapabilityError, DataError
from probkit.models.language import Budget
from probkit.models.language.oracle import OracleLM
from probkit.models.language.replay import RecordingLM, ReplayLM

SPACE = Space(x=Float(-1, 1), y=Float(0.01, 10, log=True))
FEW = {"n_perm": 1, "k": 2, "candidates": 3, "pool": 2}


def loss(params: Any) -> float:
    return (params["x"] - 0.3) ** 2 + (torch.tensor(params["y"]).log10().item() - 0.4) ** 2


def oracle(**options: Any) -> OracleLM:
    script = {k: options.pop(k) for k in ("adversarial", "sd") if k in options}
    return OracleLM(GPScript(SPACE, truth=loss, **{"sd": 0.01, **script}), **options)


def study(lm: Any = None, *, n: int = 0, surrogate: Any = "llm", **options: Any) -> Study:
    keep = {k: options.pop(k) for k in ("storage", "rng", "acq", "initial") if k in options}
    given = {} if surrogate == "gp" else {**FEW, "warm_start": 0, "lm": lm, **options}
    made = Study(
        SPACE, {"loss": "min"}, surrogate=surrogate, options=given, noise="none",
        **{"rng": 3, "initial": 4, **keep},
    )  # fmt: skip
    return made.optimize(loss, n)


def points(of: Study) -> list[dict[str, Any]]:
    return [t.params for t in of.trials]


# ---------------------------------------------------------------------- the guard


def test_silent_language_model_is_the_plain_process_bit_for_bit() -> None:
    lm = oracle()
    silent = study(lm, trust="off", warm_start=None, n=7)
    plain = study(surrogate="gp", n=7)
    assert points(silent) == points(plain)
    assert points_of_batch(silent) == points_of_batch(plain)
    assert lm.usage.calls == 0 and silent.usage.calls == 0


def points_of_batch(of: Study) -> list[dict[str, Any]]:
    return [t.params for t in of.ask(2)]


def test_adversary_changes_nothing_once_it_is_known() -> None:
    lm = oracle(adversarial=True)
    guarded = study(lm, n=8)
    assert points(guarded) == points(study(surrogate="gp", n=8))
    assert guarded.advice["trusted"] is False and guarded.advice["weights"]["gp"] > 0.9
    assert lm.usage.calls > 0  # it was asked, and not believed


def test_helper_is_trusted() -> None:
    helped = study(oracle(), n=7)
    assert helped.advice["trusted"] is True
    assert helped.best().value < study(surrogate="gp", n=7).best().value
    assert points(helped)[:4] == points(study(surrogate="gp", n=4))


def test_lost_trust_comes_back() -> None:
    """A model that lies at first and then tells the truth is heard once the history doubles."""
    script = GPScript(SPACE, truth=loss, sd=0.01)
    liar = GPScript(SPACE, truth=loss, sd=0.01, adversarial=True)
    honest = False

    def answer(prompt: str, rng: torch.Generator) -> str:
        return (script if honest else liar).answer(prompt, rng)

    made = study(OracleLM(answer), n=6)
    assert made.advice["trusted"] is False
    honest = True
    made.optimize(loss, 2)
    assert made.advice["trusted"] is False  # four lies still stand against it
    made.optimize(loss, 1)  # eight rows: twice the first four, so all are asked about again
    assert made.advice["trusted"] is True


# ---------------------------------------------------------------------- never a failure


@pytest.mark.parametrize("kind", ["malformed", "refusals", "out_of_range", "timeouts"])
def test_broken_answers_never_raise(kind: str) -> None:
    broken = study(oracle(**{kind: 1.0}), n=6, warm_start=None)
    assert points(broken) == points(study(surrogate="gp", n=6))
    assert broken.advice["accepted"] == 0 and sum(broken.advice["reasons"].values()) > 0


def test_failing_back_end_is_noted() -> None:
    class Broken(OracleLM):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            raise OSError("the line is dead")

    broken = study(Broken(lambda prompt, rng: ""), n=6)
    assert points(broken) == points(study(surrogate="gp", n=6))
    assert broken.advice["note"].endswith("the line is dead")


def test_small_context_is_noted() -> None:
    tight = study(oracle(context=50), n=5)
    assert points(tight) == points(study(surrogate="gp", n=5))
    assert "holds no prompt at all" in tight.advice["note"]


@pytest.mark.parametrize("calls", [0, 5, 12, 20])
def test_spent_budget_leaves_the_plain_process(calls: int) -> None:
    spent = study(oracle(), n=8, budget=Budget(calls=calls))
    assert len(spent.trials) == 8 and spent.best().value is not None
    assert spent.usage.calls <= max(calls + 8, 8 * (calls > 0))  # one step: four rows, two answers
    assert spent.advice["note"].startswith("budget: calls: ")
    if not calls:
        assert points(spent) == points(study(surrogate="gp", n=8))


def test_budget_of_the_back_end_counts_too() -> None:
    spent = study(oracle(budget=Budget(calls=11)), n=7)
    assert len(spent.trials) == 7 and spent.usage.calls <= 11
    assert spent.advice["reasons"]["budget"] > 0


# ---------------------------------------------------------------------- warm start


def test_warm_start_gives_half_of_the_initial_points() -> None:
    lm = oracle()
    warm = study(lm, warm_start=None, n=4)
    assert [t.origin for t in warm.trials] == ["llm", "llm", "initial", "initial"]
    assert points(warm)[2:] == points(study(surrogate="gp", n=4))[2:]
    assert lm.usage.calls == 1  # once for all of them
    assert warm.usage.calls == 1
    together = study(oracle(), warm_start=None)
    assert [t.params for t in together.ask(4)] == points(warm)


# ---------------------------------------------------------------------- files


def test_resumed_study_asks_for_the_same(tmp_path: Path) -> None:
    whole = study(oracle(), warm_start=None, n=7)
    half = study(oracle(), warm_start=None, n=5, storage=tmp_path / "a.db")
    spent = half.usage
    del half
    again = Study.load(tmp_path / "a.db", options={"lm": oracle()})
    assert again.usage == spent
    again.optimize(loss, 2)
    assert points(again) == points(whole)
    assert again.usage.calls == whole.usage.calls
    assert again.advice == whole.advice


@pytest.mark.slow
def test_replayed_study_asks_for_the_same(tmp_path: Path) -> None:
    told = study(RecordingLM(oracle(), tmp_path / "run.jsonl"), warm_start=None, n=6)
    replay = ReplayLM(tmp_path / "run.jsonl")
    again = study(replay, warm_start=None, n=6)
    assert points(again) == points(told) and again.advice == told.advice
    assert replay.left == 0
    # A record that ends too early is one more way to fall silent.
    beyond = study(ReplayLM(tmp_path / "run.jsonl"), warm_start=None, n=7)
    assert points(beyond)[:6] == points(told) and "ReplayLM" in beyond.advice["note"]


def test_file_holds_no_language_model(tmp_path: Path) -> None:
    lm = oracle()
    lm.api_key = "secret-key-of-nobody"  # type: ignore[attr-defined]
    lm.model = "a-model"  # type: ignore[attr-defined]
    path = tmp_path / "a.db"
    study(lm, n=5, storage=path, budget=Budget(calls=500))
    assert b"secret-key-of-nobody" not in path.read_bytes()
    with sqlite3.connect(path) as file:
        settings = json.loads(file.execute("SELECT settings FROM probkit_studies").fetchone()[0])
    stored = settings["options"]["lm"]["__stored__"]
    assert stored["name"] == "a-model" and stored["language model"].endswith("OracleLM")
    with pytest.raises(
        DataError, match=r"option 'lm' of this study, .*OracleLM a-model, is not st"
    ):
        Study.load(path)
    loaded = Study.load(path, options={"lm": oracle()})
    assert loaded.settings.options["budget"] == Budget(calls=500)
    assert loaded.settings.options["n_perm"] == 1
    hybrid = LLMHybrid(lm=oracle(), trust="off")
    assert Study.load(path, surrogate=hybrid).ask().number == 5


# ---------------------------------------------------------------------- neighbours


def test_surrogate_object_is_wrapped_in_the_hybrid() -> None:
    lm = oracle()
    card = ProblemCard("a model", "loss", "min")
    spec = LLMSurrogate(lm, SPACE, card, n_perm=1, k=2)
    made = Study(SPACE, {"loss": "min"}, surrogate=spec, noise="none", rng=3, initial=4)
    made.optimize(loss, 6)
    assert set(made.advice["weights"]) == {"gp", "trust 0.5", "trust 1"}


def test_maximised_objective_is_told_as_it_is() -> None:
    prompts: list[str] = []
    script = GPScript(SPACE, direction="max", truth=lambda p: -loss(p), sd=0.01)

    def answer(prompt: str, rng: torch.Generator) -> str:
        prompts.append(prompt)
        return script.answer(prompt, rng)

    made = Study(
        SPACE, {"gain": "max"}, surrogate="llm", noise="none", rng=3, initial=4,
        options={**FEW, "warm_start": 0, "lm": OracleLM(answer)},
    )  # fmt: skip
    made.optimize(lambda p: -loss(p), 6)
    assert made.advice["trusted"] is True
    assert "higher is better" in prompts[0] and "Performance: ## -" in prompts[0]


@pytest.mark.slow
def test_batches_pending_points_and_acquisitions() -> None:
    made = study(oracle(), n=5, acq="log_ei")
    assert set(made.advice["weights"]) and made.advice["asked"] > 0
    several = study(oracle(), n=5).ask(3)
    assert len({tuple(t.params.values()) for t in several}) == 3


def test_mixed_spaces() -> None:
    space = Space(depth=Int(1, 5), act=Categorical(["relu", "tanh"]), lr=Float(1e-3, 1, log=True))

    def cost(p: Any) -> float:
        return abs(p["depth"] - 3) + (p["act"] == "relu") + p["lr"]

    made = Study(
        space, {"cost": "min"}, surrogate="llm", rng=0, initial=4,
        options={**FEW, "lm": OracleLM(GPScript(space, truth=cost))},
    )  # fmt: skip
    made.optimize(cost, 5)
    assert made.advice["asked"] > 0 and len(made.trials) == 5


def test_predictions_and_calibration_ask_nothing() -> None:
    lm = oracle()
    made = study(lm, n=6)
    made.ask()
    before = lm.usage.calls
    assert list(made.predict(points(made)[:2]).columns) == ["loss", "loss_sd"]
    assert 0 <= made.calibration(folds=3).coverage(0.9)["loss"] <= 1
    assert lm.usage.calls - before <= 2 * 2  # the last trial alone was not asked about before


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"lm": None}, DataError, "expected a language model, got none"),
        ({"lm": "gpt"}, CapabilityError, "expected a language model, got str"),
        ({"trust": "blind"}, DataError, "trust: expected 'learned' or 'off', got 'blind'"),
        ({"method": "vote"}, DataError, "method: expected 'trust' or 'stack'"),
        ({"mode": "classify"}, DataError, "mode: expected 'mc' or 'logprob'"),
        ({"candidates": -1}, DataError, "candidates: expected a whole number >= 0, got -1"),
        ({"prior": 0}, DataError, r"prior: expected a probability in \(0, 1\)"),
        ({"budget": 3}, DataError, "budget: expected a Budget, got 3"),
        ({"mode": "logprob"}, CapabilityError, "logits"),
        ({"colour": 1}, DataError, "surrogate options"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        study(options.pop("lm", oracle()), **options).ask()


def test_bad_studies() -> None:
    with pytest.raises(
        CapabilityError, match="expected one objective and no constraints, got a, b"
    ):
        Study(SPACE, {"a": "min", "b": "min"}, surrogate="llm", rng=0,
              options={"lm": oracle()}).ask()  # fmt: skip
    card = ProblemCard("a model", "loss", "max")
    with pytest.raises(DataError, match="card: its direction is 'max', but the study has"):
        study(oracle(), card=card).ask()
    other = LLMSurrogate(oracle(), Space(z=Float(0, 1)))
    with pytest.raises(DataError, match="its space is not that of the study: expected x, y, got z"):
        Study(SPACE, {"loss": "min"}, surrogate=other, rng=0).ask()

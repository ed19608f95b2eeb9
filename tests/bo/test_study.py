"""Studies: ask and tell in every order, resuming, failures, and what is refused."""

from __future__ import annotations

import math
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botorch  # noqa: F401  (its import changes settings of GPyTorch: before the tests)
import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP

from probkit.bo import Categorical, Float, Int, Measurement, Pruned, Space, Study
from probkit.bo.storage import SCHEMA, Storage
from probkit.errors import CapabilityError, DataError, ShapeError

OLD = Path(__file__).parents[1] / "data" / "bo" / "study-v1.db"


def plane():
    return Space(x=Float(-5, 10), y=Float(0, 15))


def branin(params):
    x, y = params["x"], params["y"]
    bent = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return bent**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


def study_of(storage=None, **options):
    settings = {"surrogate": "gp", "noise": "none", "initial": 4, "rng": 3, **options}
    return Study(plane(), {"loss": "min"}, storage=storage, **settings)


def unfitted(X, Y, Yvar, *, bounds, previous, rng):
    """A surrogate of the user's own: a GP with the hyper-parameters it comes with."""
    from botorch.models.transforms import Normalize, Standardize

    return SingleTaskGP(
        X,
        Y,
        outcome_transform=Standardize(m=Y.shape[1]),
        input_transform=Normalize(X.shape[1], bounds=bounds.bounds),
    ).eval()


# ------------------------------------------------------------------ ask and tell


def test_initial_points_are_those_of_the_sequence_then_the_model_asks():
    study = study_of()
    study.optimize(branin, 6)
    origins = [t.origin for t in study.trials]
    assert origins == ["initial"] * 4 + ["model"] * 2
    assert [dict(t.params) for t in study.trials[:4]] == plane().sobol(4, rng=3)


def test_asked_points_are_pairwise_distinct_and_pending_ones_change_the_next():
    study = study_of()
    study.optimize(branin, 6)
    alone = study_of()
    alone.optimize(branin, 6)
    batch = study.ask(4)
    codes = plane().codes(t.params for t in batch)
    gaps = torch.cdist(codes, codes) + torch.eye(4) * 9
    assert float(gaps.min()) > 1e-3
    assert [t.number for t in study.pending] == [6, 7, 8, 9]
    again = study.ask()  # with four pending points
    first = alone.ask()  # with none
    assert dict(again.params) != dict(first.params)
    near = torch.cdist(plane().codes(again.params), codes).min()
    assert float(near) > 1e-3


def test_tells_may_come_in_any_order():
    forward, backward = study_of(), study_of()
    for study, order in ((forward, 1), (backward, -1)):
        trials = study.ask(6)
        for trial in trials[::order]:
            study.tell(trial.number, branin(trial.params))
    assert dict(forward.ask().params) == dict(backward.ask().params)


@pytest.mark.parametrize("surrogate", ["gp", "ibnn"])
def test_a_study_opened_again_asks_for_the_same(tmp_path, surrogate):
    whole = study_of(surrogate=surrogate)
    whole.optimize(branin, 7)
    path = tmp_path / "run.db"
    study = study_of(path, surrogate=surrogate)
    for _ in range(7):
        trial = study.ask()
        study = Study.load(path)  # as after a kill, between ask and tell
        assert [t.number for t in study.pending] == [trial.number]
        study.tell(trial, branin(trial.params))
        study = Study.load(path)
    assert [dict(t.params) for t in study.trials] == [dict(t.params) for t in whole.trials]
    assert dict(study.ask().params) == dict(whole.ask().params)


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", ["hmc", "ensemble"])
def test_sampled_and_trained_surrogates_go_on_from_the_file(tmp_path, surrogate):
    options = {"surrogate": surrogate, "options": {"hidden": (8,)}}
    whole = study_of(**options)
    whole.optimize(branin, 6)
    path = tmp_path / "run.db"
    study_of(path, **options)
    for _ in range(6):
        trial = Study.load(path).ask()
        Study.load(path).tell(trial.number, branin(trial.params))
    assert [dict(t.params) for t in Study.load(path).trials] == [
        dict(t.params) for t in whole.trials
    ]


def test_the_warm_state_of_the_last_surrogate_is_in_the_file(tmp_path):
    path = tmp_path / "run.db"
    study_of(path).optimize(branin, 7)
    storage = Storage(path, "study")
    assert storage.settings()["surrogate"] == "gp"
    state = storage.state()
    assert set(state) == {"surrogate", "warm"} and state["warm"]
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT trials FROM probkit_states").fetchall() == [(6,)]


def test_script_run_again_continues_the_same_study(tmp_path):
    path = tmp_path / "run.db"
    study_of(path).optimize(branin, 3)
    again = study_of(path)
    again.optimize(branin, 3)
    assert len(again) == 6


def test_several_studies_share_a_file(tmp_path):
    path = tmp_path / "run.db"
    first, second = study_of(path, name="a"), study_of(path, name="b", rng=4)
    first.optimize(branin, 2)
    assert len(second) == 0
    assert dict(second.ask().params) != dict(first.trials[0].params)
    with pytest.raises(DataError, match=r"expected one study, or name=, got 'a', 'b'"):
        Study.load(path)
    assert len(Study.load(path, "a")) == 2


def test_an_ask_that_was_overtaken_takes_the_new_pending_trial_into_account(tmp_path, monkeypatch):
    path = tmp_path / "run.db"
    first, second = study_of(path), study_of(path)
    first.optimize(branin, 6)
    expected = study_of()
    expected.optimize(branin, 6)
    expected.ask()
    overtaken = []
    read = Storage.state

    def slow_read(self):
        if self is first._storage and not overtaken:
            overtaken.append(second.ask())  # between the read and the write of the first
        return read(self)

    monkeypatch.setattr(Storage, "state", slow_read)
    asked = first.ask()
    assert overtaken[0].number == 6 and asked.number == 7
    assert dict(asked.params) == dict(expected.ask().params)


def test_four_threads_tell_one_study(tmp_path):
    study = study_of(tmp_path / "run.db")
    with ThreadPoolExecutor(4) as pool:
        study.optimize(branin, 9, executor=pool)
    trials = study.trials
    assert [t.number for t in trials] == list(range(9))
    assert {t.status for t in trials} == {"complete"}
    assert all(t.values["loss"] == branin(t.params) for t in trials)
    assert len({tuple(t.params.values()) for t in trials}) == 9


# ------------------------------------------------------------------ failures


def test_failed_trials_never_count_as_a_value():
    study = study_of()
    for k, trial in enumerate(study.ask(6)):
        if k == 2:
            study.tell(trial, status="failed", error="diverged")
        elif k == 3:
            study.tell(trial, status="pruned", value=-1000.0)
        else:
            study.tell(trial, branin(trial.params))
    assert study.best().values["loss"] > 0
    told = [t.values["loss"] for t in study.trials if t.status == "complete"]
    seen = study.observations()
    assert float(-seen.Y[2, 0]) == max(told)
    assert float(-seen.Y[3, 0]) >= np.median(told)
    assert study.trials[2].error == "diverged" and study.trials[2].values is None
    assert list(study.trace()) == sorted(study.trace(), reverse=True)


def test_the_search_turns_away_from_where_evaluations_fail():
    # The optimum of the surrogate alone lies where every evaluation fails.
    space = Space(x=Float(0, 1))

    def objective(params):
        if params["x"] > 0.5:
            raise RuntimeError("out of memory")
        return -params["x"]

    study = Study(space, surrogate="gp", noise="none", initial=4, rng=0)
    study.optimize(objective, 12, catch=RuntimeError)
    failed = [t for t in study.trials[4:] if t.status == "failed"]
    assert len(failed) <= 4
    assert 0.4 < study.best()["x"] <= 0.5


def test_an_error_of_the_objective_is_told_and_raised():
    study = study_of()

    def broken(params):
        raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        study.optimize(broken, 3)
    assert [t.status for t in study.trials] == ["failed"]
    assert study.trials[0].error == "KeyError: 'typo'"


def test_a_value_that_is_none_is_a_failure():
    study = study_of()

    def diverges(params):
        return math.nan if params["x"] > 2.5 else branin(params)

    with pytest.raises(DataError, match=r"value of 'loss': expected a finite number, got nan"):
        study.optimize(diverges, 4)
    assert study.trials[-1].status == "failed" and "got nan" in study.trials[-1].error
    study.optimize(diverges, 3, catch=DataError)
    assert not study.pending and len(study) > 3


def test_objectives_may_prune_and_may_say_how_noisy_they_are():
    study = study_of(noise="auto")

    def objective(params):
        if params["x"] > 2.5:
            raise Pruned(branin(params))
        return Measurement(branin(params), var=0.1)

    study.optimize(objective, 6)
    assert {t.status for t in study.trials} == {"pruned", "complete"}
    complete = [t for t in study.trials if t.status == "complete"]
    assert all(t.variances == {"loss": 0.1} for t in complete)
    assert torch.equal(study.observations().Yvar, torch.full((6, 1), 0.1, dtype=torch.float64))


def test_cancelled_trials_leave_no_trace_in_the_data():
    study = study_of()
    study.optimize(branin, 5)
    before = study.observations()
    study.tell(study.ask(), status="cancelled")
    after = study.observations()
    for name in ("X", "Y", "visited", "pending"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def test_pending_trials_of_a_killed_process_are_run_again_when_asked(tmp_path):
    path = tmp_path / "run.db"
    study = study_of(path)
    lost = study.ask(2)
    again = Study.load(path)
    again.optimize(branin, 3, pending="rerun")
    assert len(again) == 3 and not again.pending
    assert dict(again.trials[0].params) == dict(lost[0].params)


def test_a_callback_ends_the_search():
    study = study_of()
    study.optimize(branin, 9, callback=lambda study, trial: trial.number == 2)
    assert len(study) == 3


# ------------------------------------------------------------------ results


def test_attached_trials_count_like_others():
    study = study_of()
    for k in range(6):
        study.attach({"x": float(k), "y": 1.0}, branin({"x": k, "y": 1}))
    asked = study.ask()
    assert asked.origin == "model" and asked.number == 6
    assert [t.origin for t in study.trials[:6]] == ["attached"] * 6


def test_constraints_decide_what_is_best():
    study = Study(plane(), {"loss": "min"}, constraints=["x <= 0"], surrogate="gp", rng=0)
    study.optimize(lambda p: {"loss": branin(p), "x": p["x"]}, 6)
    ok = [t for t in study.trials if t["x"] <= 0]
    assert study.best().number == min(ok, key=lambda t: t.values["loss"]).number
    assert all(t["x"] <= 0 for t in study.best(3))
    assert study.summary()["feasible"] == len(ok)
    frame = study.to_pandas()
    assert frame["feasible"].tolist() == [t["x"] <= 0 for t in study.trials]


def test_pareto_front_is_what_no_trial_beats():
    study = Study(plane(), {"loss": "min", "gain": "max"}, surrogate="gp", initial=8, rng=0)
    points = [(1, 1), (2, 2), (3, 3), (2, 1), (1, 0), (3, 3)]
    for k, value in enumerate(points):
        study.attach({"x": k, "y": 1.0}, value)
    assert [t.number for t in study.pareto()] == [0, 1, 2, 5]
    with pytest.raises(DataError, match=r"there are 2 objectives \(loss, gain\).*ask for pareto"):
        study.best()


def test_two_objectives_are_searched_together():
    study = Study(Space(x=Float(-2, 2)), {"a": "min", "b": "min"}, surrogate="gp", initial=4, rng=0)
    study.optimize(lambda p: {"a": p["x"] ** 2, "b": (p["x"] - 1) ** 2}, 7)
    later = [t["x"] for t in study.trials[4:]]
    assert sum(-0.1 <= x <= 1.1 for x in later) >= 2


def test_frames_show_every_trial():
    study = Study(
        Space(k=Int(1, 3), act=Categorical(["a", "b"]), s=Float(0, 1, when={"act": "b"})),
        {"loss": "max"},
        surrogate="gp",
        rng=0,
    )
    study.optimize(lambda p: p["k"], 5)
    frame = study.to_pandas()
    assert list(frame.columns[:5]) == ["status", "origin", "k", "act", "s"]
    assert frame["s"].isna().tolist() == [a == "a" for a in frame["act"]]
    assert bool((frame["finished"] >= frame["started"]).all())
    assert study.trace().iloc[-1] == frame["loss"].max()
    assert study.summary()["best trial"] == study.best().number


def test_an_empty_study_has_frames_too():
    study = study_of()
    assert len(study.to_pandas()) == 0 and len(study.trace()) == 0
    assert study.summary()["trials"] == 0 and study.pareto() == []


def test_small_spaces_are_used_up_before_anything_repeats():
    study = Study(
        Space(k=Int(1, 3), c=Categorical(["a", "b"])),
        surrogate="gp",
        noise="none",
        initial=2,
        rng=0,
    )
    study.optimize(lambda p: p["k"] + (p["c"] == "a"), 6)
    assert len({tuple(t.params.values()) for t in study.trials}) == 6
    repeated = study.ask(6)  # all points again, each once
    assert len({tuple(t.params.values()) for t in repeated}) == 6
    with pytest.raises(DataError, match=r"ask: all 6 points of the space are pending; tell some"):
        study.ask()


def test_a_function_is_a_surrogate(tmp_path):
    path = tmp_path / "run.db"
    study = study_of(path, surrogate=unfitted)
    study.optimize(branin, 6)
    assert isinstance(study.model(), SingleTaskGP)
    with pytest.raises(DataError, match=r"the surrogate of this study, .*unfitted, is not stored"):
        Study.load(path)
    again = Study.load(path, surrogate=unfitted)
    assert dict(again.ask().params) == dict(study_of(path, surrogate=unfitted).trials[-1].params)


def test_a_configured_surrogate_is_stored_with_the_study(tmp_path):
    from probkit.bo.surrogates import GPSurrogate

    path = tmp_path / "run.db"
    study_of(path, surrogate=GPSurrogate(preset="paper")).optimize(branin, 2)
    assert Study.load(path).settings.surrogate == GPSurrogate(preset="paper")


def test_predictions_are_in_the_users_orientation():
    study = study_of()
    for point in plane().sobol(16, rng=0):
        study.attach(point, branin(point))
    told = study.trials[:3]
    frame = study.predict([t.params for t in told])
    assert np.allclose(frame["loss"], [t.values["loss"] for t in told], atol=0.5)
    assert bool((frame["loss_sd"] < 1).all())


# ------------------------------------------------------------------ files


def test_an_old_file_is_opened_migrated_and_continued(tmp_path):
    path = tmp_path / "old.db"
    shutil.copy(OLD, path)
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version FROM probkit_format").fetchone() == (1,)
    study = Study.load(path)
    trials = study.trials
    assert [t.status for t in trials] == ["complete"] * 4 + ["failed", "running"]
    assert trials[4].error == "out of memory" and trials[0].started is None
    assert study.best().number == 1 and study.outcomes.constraints[0].upper == 4.0
    study.tell(5, [0.4, 2.0])
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version FROM probkit_format").fetchone() == (SCHEMA,)
    assert Study.load(path).trials[5].values == {"loss": 0.4, "memory": 2.0}


@pytest.mark.slow
def test_an_old_study_goes_on_with_its_surrogate(tmp_path):
    path = tmp_path / "old.db"
    shutil.copy(OLD, path)
    study = Study.load(path)
    study.tell(5, [0.4, 2.0])
    trial = study.ask()
    assert trial.number == 6 and trial.origin == "model"
    assert Study.load(path).space.check(trial.params) == trial.params


def test_files_of_a_newer_probkit_are_refused(tmp_path):
    path = tmp_path / "new.db"
    study_of(path)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE probkit_format SET version = 99")
    with pytest.raises(DataError, match=r"new.db has schema 99, this probkit knows up to 2; use a"):
        Study.load(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to look like one " * 40)
    with pytest.raises(DataError, match=r"storage: cannot open .*notes.txt: file is not a dat"):
        study_of(path)
    with pytest.raises(DataError, match=r"storage: there is no file '.*missing.db'"):
        Study.load(tmp_path / "missing.db")


def test_a_file_of_another_space_is_refused(tmp_path):
    path = tmp_path / "run.db"
    study_of(path)
    with pytest.raises(DataError, match=r"run.db holds another study called 'study': its space"):
        Study(Space(x=Float(0, 1)), {"loss": "min"}, storage=path, surrogate="gp", noise="none",
              initial=4, rng=3)  # fmt: skip
    with pytest.raises(DataError, match=r"its acq, rng differ; choose another name= or storage="):
        study_of(path, rng=4, acq="log_ei")


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("value", "options", "error", "message"),
    [
        (math.nan, {}, DataError, r"value of 'loss': expected a finite number, got nan; for a tr"),
        (math.inf, {}, DataError, r"value of 'loss': expected a finite number, got inf"),
        ([1, 2], {}, ShapeError, r"value: expected \[outcome=1\] \(loss\), got 2"),
        (
            None,
            {},
            DataError,
            r"tell: a value is missing; for none: tell\(trial, status='fai",
        ),
        (0.0, {"status": "failed"}, DataError, r"a failed trial has no value, got 0.0; leave it"),
        (1.0, {"status": "done"}, DataError, r"status: expected one of 'complete', 'failed', 'pr"),
        (1.0, {"var": -1.0}, DataError, r"var of 'loss': expected a variance >= 0, got -1.0"),
    ],
)
def test_tells_that_mean_nothing_are_refused(value, options, error, message):
    study = study_of(noise="auto")
    trial = study.ask()
    with pytest.raises(error, match=message):
        study.tell(trial, value, **options)
    assert [t.number for t in study.pending] == [0]


def test_tells_of_unknown_and_told_trials_are_refused():
    study = study_of()
    trial = study.ask()
    study.tell(trial, 1.0)
    with pytest.raises(DataError, match=r"trial 0 was told already: it is complete"):
        study.tell(trial, 2.0)
    with pytest.raises(DataError, match=r"trial 7 is unknown: the study has 1 trials, from 0; att"):
        study.tell(7, 1.0)
    with pytest.raises(DataError, match=r"tell: expected a Trial or its number, got 'x'"):
        study.tell("x", 1.0)
    assert study.best().values == {"loss": 1.0}


def test_noise_is_told_for_all_or_for_none():
    study = study_of(noise="auto")
    first, second = study.ask(2)
    study.tell(first, 1.0, var=0.1)
    with pytest.raises(DataError, match=r"var is told for all trials or for none: trial 0 came wi"):
        study.tell(second, 1.0)
    exact = study_of()
    with pytest.raises(DataError, match=r'var was told, but the study says noise="none"'):
        exact.tell(exact.ask(), 1.0, var=0.1)


def cliff(params):
    """Branin, on a third of the plane a hundred thousand times as large."""
    return branin(params) + (1e5 * (1 + params["y"]) if params["x"] < -1 else 0)


def test_outcomes_with_heavy_tails_are_clipped_on_request(tmp_path):
    found = {}
    for outcome in ("standardize", "winsorize"):
        study = study_of(tmp_path / f"{outcome}.db", outcome=outcome, initial=8)
        study.optimize(cliff, 12)
        inside = [t.params for t in study.trials if t.params["x"] >= -1]
        truth = np.array([branin(p) for p in inside])
        found[outcome] = float(np.abs(study.predict(inside)["loss"] - truth).mean())
        assert Study.load(tmp_path / f"{outcome}.db").settings.outcome == outcome
    # A scale of 1e5 leaves nothing of differences of 10 to a process that is not told of it.
    assert found["winsorize"] < 0.2 * found["standardize"]
    with pytest.raises(DataError, match=r"its outcome differs"):
        study_of(tmp_path / "winsorize.db", initial=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": "some"}, r"noise: expected 'auto' or 'none', got 'some'"),
        ({"failures": "zero"}, r"failures: expected 'worst' or 'ignore', got 'zero'"),
        ({"outcome": "log"}, r"outcome: expected one of 'standardize', .* got 'log'"),
        ({"outcome": "winsorize", "surrogate": unfitted}, r"outcome='winsorize': a surrogate th"),
        ({"initial": 1}, r"initial: expected a whole number of points >= 2, got 1"),
        ({"surrogate": "forest"}, r"surrogate: expected one of 'gp', .* got 'forest'"),
        ({"options": {"depth": 3}}, r"surrogate options: .*depth"),
        ({"acq": "nonsense"}, r"acq: expected 'auto' or one of 'log_ei', .* got 'nonsense'"),
        ({"rng": -1}, r"rng must be an integer"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        study_of(**options)


def test_other_bad_calls_are_refused():
    study = study_of()
    with pytest.raises(DataError, match=r"ask: expected a whole number of trials n >= 1, got 0"):
        study.ask(0)
    with pytest.raises(DataError, match=r"optimize: expected a whole number of evaluations n >= 0"):
        study.optimize(branin, -1)
    with pytest.raises(DataError, match=r"pending: expected 'leave' or 'rerun', got 'x'"):
        study.optimize(branin, 1, pending="x")
    with pytest.raises(DataError, match=r"best: there is no complete trial yet"):
        study.best()
    with pytest.raises(DataError, match=r"a surrogate needs at least 2 complete trials, got 0"):
        study.model()
    with pytest.raises(DataError, match=r"parameter 'x': expected a number in \[-5, 10\], got 11"):
        study.attach({"x": 11, "y": 0}, 1.0)
    with pytest.raises(DataError, match=r"expected a Space, got \{\}"):
        Study({}, rng=0)
    with pytest.raises(DataError, match=r"workers >= 1, got 0"), ThreadPoolExecutor(1) as pool:
        study.optimize(branin, 1, executor=pool, workers=0)


def test_acquisitions_that_the_surrogate_cannot_serve_are_named():
    study = study_of(acq="log_ei")
    study.optimize(branin, 4)
    with pytest.raises(CapabilityError, match="log_ei"):
        study.ask(2)  # values one point at a time
    assert len(study) == 4 and study.ask().origin == "model"


def test_constant_outcomes_warn_and_are_searched_on():
    from probkit.errors import NumericsWarning

    study = study_of()
    study.optimize(lambda p: 1.0, 4)
    with pytest.warns(NumericsWarning, match=r"all outcomes of output 0 are equal \(-1\)"):
        trial = study.ask()
    assert trial.origin == "model"

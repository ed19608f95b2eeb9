"""The cells of the comparison of optimisers: storing, and what the table makes of them."""

from __future__ import annotations

import botorch  # noqa: F401  (its import changes settings of GPyTorch: before the tests)
import pytest

from benchmarks.bo import regret
from benchmarks.bo._cells import Cell, Plan, load, path_of, plans, save, stored
from benchmarks.harness.spec import Unavailable


def cell(seed, last, **changes):
    return Cell(
        **{
            "problem": "Branin",
            "method": "gp",
            "seed": seed,
            "initial": 10,
            "quality": [3.0, last],
            "ask_cpu_s": [0.1],
            "calibration": {},
            "versions": {"torch": "2"},
            **changes,
        }
    )


def test_cells_come_back_from_their_files(tmp_path):
    made = cell(3, 1.0 / 3.0)
    path = save(made, tmp_path)
    assert path == path_of(Plan("Branin", "gp", 3), tmp_path)
    assert load(path).quality == [3.0, 0.3333333] and [c.seed for c in stored(tmp_path)] == [3]
    assert not list(tmp_path.glob("*.part"))


def test_every_cell_has_a_file_of_its_own():
    everything = list(plans())
    assert len({path_of(plan).name for plan in everything}) == len(everything) == 9 * 10 * 6 + 90


def test_the_table_holds_medians_against_their_bars(tmp_path, monkeypatch):
    for seed, last in enumerate([1e-4, 2e-4, 9e-4]):
        save(cell(seed, last), tmp_path)
        save(cell(seed, 10 * last, method="botorch"), tmp_path)
    monkeypatch.setattr(regret, "stored", lambda: stored(tmp_path))
    ours, peer = sorted(regret._evaluate(False), key=lambda v: "botorch" in v.name)
    assert ours.value == 2e-4 and ours.reference == 3e-4 and ours.met
    assert peer.value == 2e-3 and peer.reference is None
    monkeypatch.setattr(regret, "stored", lambda: [])
    with pytest.raises(Unavailable, match="no cells are stored: python -m benchmarks.bo runs them"):
        regret._evaluate(False)


def test_networks_are_compared_with_the_process_as_early_as_they_stop(tmp_path, monkeypatch):
    for seed, now in enumerate([0.5, 2.0, 1.0]):
        save(cell(seed, 1.0, quality=[3.0, 1.0, 1e-4]), tmp_path)
        save(cell(seed, now, method="hmc"), tmp_path)
    save(cell(7, 0.1, method="hmc"), tmp_path)  # no process has this seed
    monkeypatch.setattr(regret, "stored", lambda: stored(tmp_path))
    (found,) = (v for v in regret._evaluate(False) if "hmc" in v.name)
    assert found.note == "4 seeds, quartiles 0.4 to 1.25; below gp (1 by then) on 1, above on 1"


def test_methods_share_their_initial_points_and_agree_on_quality():
    from benchmarks.bo._methods import run_cell

    random, tpe = (run_cell(Plan("Branin", name, 1, 2)) for name in ("random", "tpe"))
    assert random.quality[:10] == tpe.quality[:10]
    assert random.quality == sorted(random.quality, reverse=True)
    assert len(tpe.ask_cpu_s) == 2 and tpe.quality[-1] >= 0


def test_tasks_know_their_optimum():
    from benchmarks.bo._problems import task

    branin, hartmann = task("Branin"), task("Hartmann6")
    best = [branin.evaluate({"x0": 9.42478, "x1": 2.475})]
    assert branin.quality(best) == pytest.approx(0, abs=1e-5)
    point = [0.20169, 0.150011, 0.476874, 0.275332, 0.311652, 0.6573]
    found = [hartmann.evaluate({f"x{k}": value for k, value in enumerate(point)})]
    assert hartmann.quality(found) == pytest.approx(0, abs=1e-4)
    two = task("BraninCurrin")
    assert 0 < two.quality([two.evaluate(p) for p in two.space.sobol(64, rng=0)]) < 1
    assert two.quality([two.evaluate({"x0": 0.5, "x1": 0.5})]) == 1  # beyond the reference point
    with pytest.raises(KeyError, match="no problem is called 'Sphere'"):
        task("Sphere")

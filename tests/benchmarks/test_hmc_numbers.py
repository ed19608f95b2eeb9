"""ESS and R-hat of the sampling benchmarks beside ArviZ; units, facts and notes of the harness."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.harness import results
from benchmarks.harness.report import page
from benchmarks.harness.spec import Benchmark, Contender, Task, Workload
from benchmarks.harness.worker import Worker
from benchmarks.hmc._ess import bulk_ess, r_hat


@pytest.mark.parametrize(
    ("chains", "draws", "slope"), [(4, 400, 0.9), (16, 101, 0.3), (4, 300, -0.5)]
)
def test_ess_and_r_hat_are_arvizs(chains: int, draws: int, slope: float) -> None:
    arviz = pytest.importorskip("arviz")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((chains, draws, 2))
    for t in range(1, draws):
        x[:, t] += slope * x[:, t - 1]
    x[:, :, 1] = np.round(x[:, :, 1], 1)  # Ties.
    columns = [x[:, :, k] for k in range(2)]
    assert bulk_ess(x) == pytest.approx(min(float(arviz.ess(c)) for c in columns), rel=0.01)
    assert r_hat(x) == pytest.approx(max(float(arviz.rhat(c)) for c in columns), abs=1e-4)


def test_chains_apart_have_a_high_r_hat() -> None:
    x = np.random.default_rng(0).standard_normal((4, 200, 1))
    x[0] += 1.0
    assert r_hat(x) > 1.05
    assert bulk_ess(x) < 50


def _prepare(workload: Workload, device: str) -> Task:
    def work() -> float:
        return float(sum(range(200_000)))

    return Task(work, lambda r: {"r": [r]}, lambda r: 50.0, lambda r: {"warm-up, CPU s": 1.5})


def test_times_are_per_unit_and_facts_come_along() -> None:
    declared = Benchmark("t", "q", ({"n": 1},), (Contender("a", _prepare),), ())
    counted, plain = Worker(declared, "a"), Worker(declared, "a")
    threads = torch.get_num_threads()
    for worker in (counted, plain):
        worker.prepare({"workload": {"n": 1}, "device": "cpu", "threads": threads})
    assert plain.task is not None
    plain.task = dataclasses.replace(plain.task, units=None)
    assert counted.fingerprint({})["facts"] == {"warm-up, CPU s": 1.5}
    one = min(counted.measure({"loops": 3})["cpu_s"] for _ in range(5))
    other = min(plain.measure({"loops": 1})["cpu_s"] for _ in range(5))
    # The same work of some milliseconds, divided by 50 or not; a busy machine may double it.
    assert 0.3 < 50.0 * one / other < 3.0


def test_facts_notes_and_units_are_stored_and_shown(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    stored = next(r for r in results.load_all() if isinstance(r, results.TimingResult))
    timing = dataclasses.replace(stored.timings[0], facts={"warm-up, CPU s": 1.5})
    changed = dataclasses.replace(
        stored,
        timings=[timing, *stored.timings[1:]],
        unit="effective draw",
        notes=["Half of the time goes to the gradient."],
    )
    path = results.save_result(changed, folder)
    assert results.load_result(path) == changed
    text = page([changed])
    assert "Times are per effective draw." in text
    assert "- Half of the time goes to the gradient." in text
    assert "| contender | warm-up, CPU s |" in text
    assert "contender |" not in page([dataclasses.replace(changed, timings=[])])

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import subprocess
import sys
import time

import pytest

from benchmarks.harness.client import ContenderFailed, WorkerProcess, _environment
from benchmarks.harness.registry import entries, load, select
from benchmarks.harness.results import Pair, TimingResult
from benchmarks.harness.runner import run_benchmark
from benchmarks.harness.spec import Benchmark, Comparison, Contender, Task, Unavailable
from benchmarks.harness.worker import Worker, clock


def _pairs(result: TimingResult, peer: str) -> list[Pair]:
    return [pair for pair in result.pairs if pair.peer == peer]


def test_agreeing_contenders_get_a_ratio_on_every_workload(sums: TimingResult) -> None:
    pairs = _pairs(sums, "numpy")
    assert [pair.workload for pair in pairs] == [{"n": 2000}, {"n": 20000}]
    for pair in pairs:
        assert pair.problem == "" and pair.met is True
        assert pair.low <= pair.q25 <= pair.median <= pair.q75 <= pair.high


def test_every_round_is_stored_raw_and_the_median_follows_from_it(sums: TimingResult) -> None:
    times = {t.contender: t for t in sums.timings if t.workload == {"n": 2000}}
    assert (
        len(times["torch"].cpu_s)
        == len(times["torch"].wall_s)
        == sums.repeats * sums.processes
        == 4
    )
    ratios = sorted(a / b for a, b in zip(times["torch"].cpu_s, times["numpy"].cpu_s, strict=True))
    assert _pairs(sums, "numpy")[0].median == pytest.approx((ratios[1] + ratios[2]) / 2)


def test_memory_is_that_of_each_process_alone(sums: TimingResult) -> None:
    peak = {t.contender: t.peak_mib for t in sums.timings}
    assert peak["torch"] > peak["numpy"] + 50  # PyTorch itself is larger than that


def test_short_work_is_repeated_inside_a_measurement(sums: TimingResult) -> None:
    assert all(1 < t.loops <= 200 for t in sums.timings)


def test_no_ratio_where_results_disagree(sums: TimingResult) -> None:
    for pair in _pairs(sums, "wrong"):
        assert pair.problem.startswith("results disagree: total[0]")
        assert pair.max_difference == pytest.approx(1e-3)
        assert {pair.median, pair.low, pair.high, pair.memory_ratio, pair.met} == {None}


@pytest.mark.parametrize(
    ("peer", "reason"),
    [
        ("raises", "raises: ArithmeticError: cannot add"),
        ("dies", "dies: the process ended (exit status 3) at 'fingerprint'"),
        ("unavailable", "unavailable: needs a machine that adds"),
        ("not installed", "not installed: needs the module a_package_that_is_not_installed"),
        ("no env", "environment missing: python -m benchmarks.envs create no_such_environment"),
    ],
)
def test_a_side_that_cannot_run_is_reported_with_its_reason(
    sums: TimingResult, peer: str, reason: str
) -> None:
    for pair in _pairs(sums, peer):
        assert pair.problem.endswith(reason) and pair.median is None


def test_versions_of_what_ran(sums: TimingResult) -> None:
    assert sums.versions["torch"]["torch"].split("+")[0]
    assert sums.versions["numpy"]["no-such-package"] == "not installed"


def test_quick_takes_the_smallest_workload_and_few_rounds() -> None:
    name = "tests.benchmarks.sums"
    declared = load(name)
    assert isinstance(declared, Benchmark)
    two = Benchmark(
        declared.title,
        declared.question,
        declared.workloads,
        declared.contenders[:2],
        declared.comparisons[:1],
        repeats=9,
        processes=2,
    )
    lines: list[str] = []
    result = run_benchmark(name, two, quick=True, say=lines.append)
    assert result.quick and (result.repeats, result.processes) == (3, 1)
    assert [pair.workload for pair in result.pairs] == [{"n": 2000}]
    assert lines == ["tests.benchmarks.sums n = 2000"]


def test_rounds_are_repeated_with_fresh_processes() -> None:
    name = "tests.benchmarks.sums"
    declared = load(name)
    assert isinstance(declared, Benchmark)
    cheap = dataclasses.replace(
        declared,
        workloads=declared.workloads[:1],
        contenders=declared.contenders[1:3],
        comparisons=(Comparison("wrong", "numpy", "one is wrong on purpose"),),
        repeats=2,
        processes=3,
    )
    result = run_benchmark(name, cheap, say=lambda line: None)
    assert [len(t.cpu_s) for t in result.timings] == [6, 6]
    assert result.pairs[0].median is not None and result.processes == 3


def test_no_gpu_path_is_a_reason() -> None:
    name = "tests.benchmarks.sums"
    declared = load(name)
    assert isinstance(declared, Benchmark)
    with pytest.raises(Unavailable, match="no GPU path"):
        run_benchmark(name, declared, device="cuda")


def test_a_worker_that_does_not_answer_is_killed() -> None:
    worker = WorkerProcess(sys.executable, "tests.benchmarks.sums", "numpy", timeout=0.01)
    started = time.monotonic()
    with worker, pytest.raises(ContenderFailed, match=r"no answer to 'prepare' within 0\.01 s"):
        worker.ask(do="prepare", workload={"n": 10}, device="cpu", threads=1)
    assert time.monotonic() - started < 10


def test_cpu_time_holds_the_children() -> None:
    code = "import time; t = time.process_time()\nwhile time.process_time() < t + 0.2: pass"
    _, passed = clock(lambda: subprocess.run([sys.executable, "-c", code]), 1, lambda: None)
    assert 0.2 <= passed.cpu_s and 0.2 <= passed.wall_s


def test_cpu_time_leaves_out_sleep() -> None:
    _, passed = clock(lambda: time.sleep(0.05), 2, lambda: None)
    assert passed.wall_s >= 0.05 and passed.cpu_s < 0.03


def test_fresh_memory_is_time_of_the_system() -> None:
    def touch() -> None:
        with mmap.mmap(-1, 200 * 1024**2) as pages:
            pages.write(zeros)

    zeros = bytes(200 * 1024**2)
    _, passed = clock(touch, 2, lambda: None)
    # the system samples its share at ticks, so it may exceed the precise total by a few of them
    assert 0 < passed.system_s < passed.cpu_s + 0.02


@pytest.mark.parametrize(
    ("module", "kind"), [("no_such_peer.part", "unavailable"), ("probkit.no_such_part", "error")]
)
def test_a_missing_peer_is_a_reason_and_a_missing_part_of_ours_a_failure(
    module: str, kind: str
) -> None:
    def prepare(workload: object, device: str) -> Task:
        raise ModuleNotFoundError(name=module)

    declared = Benchmark("t", "q", (), (Contender("c", prepare),), ())
    reply = Worker(declared, "c").answer({"do": "prepare", "workload": {}, "device": "cpu"})
    assert reply == {kind: f"needs the module {module}"}


def test_registry_names_and_loads_every_entry() -> None:
    assert {"core/import_time", "nngp/kernel"} <= set(entries())
    for name in entries():
        declared = load(name)
        assert declared.title and declared.question.endswith("?")
        json.dumps([dict(w) for w in getattr(declared, "workloads", ())])
        for comparison in getattr(declared, "comparisons", ()):
            assert declared.contender(comparison.ours) and declared.contender(comparison.peer)


def test_benchmark_files_need_only_the_standard_library_to_be_read() -> None:
    code = (
        "import sys; from benchmarks.harness.registry import entries, load\n"
        "[load(name) for name in entries()]\n"
        "foreign = {'torch', 'numpy', 'probkit', 'typer', 'rich'} & set(sys.modules)\n"
        "sys.exit(', '.join(foreign) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_select_takes_families_and_entries() -> None:
    known = ["core/import_time", "nngp/a", "nngp/b"]
    assert select([], known) == known
    assert select(["nngp/b", "nngp"], known) == ["nngp/b", "nngp/a"]
    with pytest.raises(KeyError, match="no benchmark is called 'nng'"):
        select(["nng"], known)


def test_times_are_per_run() -> None:
    def busy() -> None:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    _, passed = clock(busy, 4, lambda: None)
    assert 0.05 <= passed.cpu_s < 0.1 and 0.05 <= passed.wall_s


def _printed(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_environment(1)
    )
    return done.stdout.strip()


def test_numeric_libraries_get_one_thread() -> None:
    assert _printed("import torch; print(torch.get_num_threads())") == "1"
    assert _printed("import os; print(os.environ['OPENBLAS_NUM_THREADS'])") == "1"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no processor affinity here")
def test_a_worker_is_bound_to_as_many_processors_as_threads() -> None:
    code = "import os; from benchmarks.harness.worker import keep_to; keep_to(1)\n"
    assert _printed(code + "print(len(os.sched_getaffinity(0)))") == "1"

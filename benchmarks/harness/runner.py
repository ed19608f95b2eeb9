"""Run one benchmark: every contender in its own process, in turn, agreement before speed."""

from __future__ import annotations

import contextlib
import datetime
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks import envs
from benchmarks.harness.client import ContenderFailed, WorkerProcess
from benchmarks.harness.machine import commit, this_machine
from benchmarks.harness.ratios import disagreement, paired_ratio
from benchmarks.harness.registry import load, module_of
from benchmarks.harness.results import (
    FORMAT,
    Measured,
    Pair,
    QualityResult,
    Result,
    Timing,
    TimingResult,
)
from benchmarks.harness.spec import (
    Benchmark,
    Comparison,
    Contender,
    Quality,
    Unavailable,
    Workload,
)

__all__ = ["QUICK_REPEATS", "rotated", "run_benchmark", "run_entry", "run_quality"]

QUICK_REPEATS = 3
_MAX_LOOPS = 200

Say = Callable[[str], None]


@dataclass
class _Side:
    """One contender while a workload runs: its process and what it has answered so far."""

    worker: WorkerProcess
    fingerprint: dict[str, list[float]] = field(default_factory=dict)
    first_wall_s: float = 0.0
    loops: int = 1
    cpu_s: list[float] = field(default_factory=list)
    system_s: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)


@dataclass
class _Run:
    """What one workload gave: the sides that ran, and why the others did not."""

    sides: dict[str, _Side] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")


def run_entry(
    name: str, *, device: str = "cpu", quick: bool = False, gpu: str | None = None, say: Say = print
) -> Result:
    """Run the benchmark called `name`.

    Args:
        name: ``family/name``.
        device: ``"cpu"`` or ``"cuda"``.
        quick: Smallest workload and few rounds; for trying the harness, not for quoting.
        gpu: Name of the GPU, stored with the result.
        say: Receives progress lines.

    Raises:
        Unavailable: The entry cannot run here, with the reason.
        ContenderFailed: A quality entry failed.
    """
    declared = load(name)
    if isinstance(declared, Quality):
        if device != "cpu":
            raise Unavailable("no GPU path")
        return run_quality(name, declared, quick=quick)
    return run_benchmark(name, declared, device=device, quick=quick, gpu=gpu, say=say)


def run_quality(name: str, declared: Quality, *, quick: bool = False) -> QualityResult:
    """Compute the values of a quality entry in a process of its own.

    Raises:
        Unavailable: It cannot run here, with the reason.
        ContenderFailed: It raised or its process ended.
    """
    machine = this_machine()
    with WorkerProcess(
        sys.executable, module_of(name), threads=declared.threads, timeout=declared.timeout
    ) as worker:
        reply = worker.ask(do="evaluate", quick=quick)
    return QualityResult(
        format=FORMAT,
        kind="quality",
        benchmark=name,
        title=declared.title,
        question=declared.question,
        device="cpu",
        date=_now(),
        commit=commit(),
        quick=quick,
        threads=declared.threads,
        machine=machine,
        python=reply["python"],
        versions={"probkit": reply["versions"]},
        cpu_s=reply["cpu_s"],
        wall_s=reply["wall_s"],
        values=[Measured(**value) for value in reply["values"]],
    )


def run_benchmark(
    name: str,
    declared: Benchmark,
    *,
    device: str = "cpu",
    quick: bool = False,
    gpu: str | None = None,
    say: Say = print,
) -> TimingResult:
    """Time all contenders on all workloads.

    Raises:
        Unavailable: There is no workload, or no comparison, with a path for this device.
    """
    workloads = declared.workloads if device == "cpu" else declared.gpu_workloads
    able = {c.name for c in declared.contenders if device in c.devices}
    comparisons = [c for c in declared.comparisons if {c.ours, c.peer} <= able]
    if not workloads or not comparisons:
        raise Unavailable("no GPU path" if device == "cuda" else f"nothing to run on {device}")
    repeats = min(QUICK_REPEATS, declared.repeats) if quick else declared.repeats
    machine = this_machine(gpu)
    versions: dict[str, dict[str, str]] = {}
    timings: list[Timing] = []
    pairs: list[Pair] = []
    for workload in workloads[:1] if quick else workloads:
        say(f"{name} {_text(workload)}")
        run = _Run()
        for _ in range(1 if quick else declared.processes):
            _run_processes(
                run, name, declared, comparisons, workload, device, repeats, versions, say
            )
        timings += [_timing(side_name, workload, side) for side_name, side in run.sides.items()]
        pairs += [_pair(comparison, workload, run, device) for comparison in comparisons]
    return TimingResult(
        format=FORMAT,
        kind="timing",
        benchmark=name,
        title=declared.title,
        question=declared.question,
        device=device,
        date=_now(),
        commit=commit(),
        quick=quick,
        repeats=repeats,
        processes=1 if quick else declared.processes,
        threads=declared.threads,
        machine=machine,
        python=f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}",
        versions=versions,
        timings=timings,
        pairs=pairs,
        unit=declared.unit,
        notes=list(declared.notes),
    )


def _run_processes(
    run: _Run,
    name: str,
    declared: Benchmark,
    comparisons: list[Comparison],
    workload: Workload,
    device: str,
    repeats: int,
    versions: dict[str, dict[str, str]],
    say: Say,
) -> None:
    """Start every contender afresh and add their rounds on one workload, in turn, to `run`."""
    used = {side for c in comparisons for side in (c.ours, c.peer)} - run.absent.keys()
    with contextlib.ExitStack() as stack:
        for contender in (c for c in declared.contenders if c.name in used):
            try:
                side, reply = _start(stack, name, declared, contender, workload, device)
            except (Unavailable, ContenderFailed) as reason:
                run.sides.pop(contender.name, None)
                run.absent[contender.name] = str(reason)
                say(f"  {contender.name}: {reason}")
                continue
            if contender.name in run.sides:
                run.sides[contender.name].worker = side.worker
            else:
                run.sides[contender.name] = side
            versions[contender.name] = {"python": reply["python"], **reply["versions"]}
        _drop_pointless(run, comparisons)
        for number in range(repeats):
            for side_name in rotated(list(run.sides), number):
                _or_drop(run, side_name, _measure)
        for side_name in list(run.sides):
            _or_drop(run, side_name, _read_memory)


def rotated(names: list[str], number: int) -> list[str]:
    """Return the names in the order of round `number`, each side first equally often.

    Example:
        >>> rotated(["a", "b", "c"], 1)
        ['b', 'c', 'a']
    """
    first = number % len(names) if names else 0
    return names[first:] + names[:first]


def _start(
    stack: contextlib.ExitStack,
    name: str,
    declared: Benchmark,
    contender: Contender,
    workload: Workload,
    device: str,
) -> tuple[_Side, dict[str, Any]]:
    """Start one contender, take its fingerprint from a cold run and fix its number of loops."""
    worker = WorkerProcess(
        envs.python_of(contender.env),
        module_of(name),
        contender.name,
        threads=declared.threads,
        timeout=declared.timeout,
    )
    stack.enter_context(worker)
    reply = worker.ask(
        do="prepare", workload=dict(workload), device=device, threads=declared.threads
    )
    cold = worker.ask(do="fingerprint")
    warm = worker.ask(do="measure", loops=1)
    loops = math.ceil(declared.min_seconds / max(warm["wall_s"], 1e-9))
    side = _Side(worker, cold["fingerprint"], cold["wall_s"], min(max(loops, 1), _MAX_LOOPS))
    side.facts = cold["facts"]
    return side, reply


def _drop_pointless(run: _Run, comparisons: list[Comparison]) -> None:
    """Leave out contenders that have nobody to be compared with."""
    present = set(run.sides)
    wanted = {side for c in comparisons if {c.ours, c.peer} <= present for side in (c.ours, c.peer)}
    for side_name in present - wanted:
        run.absent[side_name] = "not measured: the other side did not run"
        del run.sides[side_name]


def _measure(side: _Side) -> None:
    reply = side.worker.ask(do="measure", loops=side.loops)
    side.cpu_s.append(reply["cpu_s"])
    side.system_s.append(reply["system_s"])
    side.wall_s.append(reply["wall_s"])


def _read_memory(side: _Side) -> None:
    side.peak_mib = max(side.peak_mib, side.worker.ask(do="memory")["peak_mib"])


def _or_drop(run: _Run, side_name: str, action: Callable[[_Side], None]) -> None:
    """Do one thing with a side; a failure takes the side out of the run with its reason."""
    try:
        action(run.sides[side_name])
    except ContenderFailed as reason:
        run.absent[side_name] = str(reason)
        del run.sides[side_name]


def _timing(name: str, workload: Workload, side: _Side) -> Timing:
    return Timing(
        contender=name,
        workload=dict(workload),
        cpu_s=side.cpu_s,
        system_s=side.system_s,
        wall_s=side.wall_s,
        loops=side.loops,
        first_wall_s=side.first_wall_s,
        peak_mib=round(side.peak_mib, 1),
        facts=side.facts,
    )


def _pair(comparison: Comparison, workload: Workload, run: _Run, device: str) -> Pair:
    """Compare two sides: first their results, and only then their times."""
    goal = comparison.goal if device == "cpu" else comparison.gpu_goal
    if callable(goal):
        goal = goal(workload)
    metric = comparison.metric if device == "cpu" else "wall"
    gap, problem = _check(comparison, run)
    spread = None
    memory = None
    if not problem:
        ours, peer = run.sides[comparison.ours], run.sides[comparison.peer]
        times = (ours.cpu_s, peer.cpu_s) if metric == "cpu" else (ours.wall_s, peer.wall_s)
        spread = paired_ratio(*times)
        memory = ours.peak_mib / peer.peak_mib if peer.peak_mib else None
    return Pair(
        ours=comparison.ours,
        peer=comparison.peer,
        workload=dict(workload),
        metric=metric,
        agreement=_rule_text(comparison),
        max_difference=gap if gap is not None and math.isfinite(gap) else None,
        problem=problem,
        median=spread.median if spread else None,
        q25=spread.q25 if spread else None,
        q75=spread.q75 if spread else None,
        low=spread.low if spread else None,
        high=spread.high if spread else None,
        memory_ratio=memory,
        goal=goal.text if goal else None,
        bound=goal.bound if goal else None,
        met=spread.meets(goal.bound) if spread and goal else None,
        decisive=spread.clear_of(goal.bound) if spread and goal else None,
    )


def _check(comparison: Comparison, run: _Run) -> tuple[float | None, str]:
    """Return the largest difference of the results and the reason why no ratio may be quoted."""
    for side in (comparison.ours, comparison.peer):
        if side not in run.sides:
            return None, f"{side}: {run.absent.get(side, 'did not run')}"
    if isinstance(comparison.agreement, str):
        return None, ""
    ours, peer = run.sides[comparison.ours], run.sides[comparison.peer]
    gap, violation = disagreement(ours.fingerprint, peer.fingerprint, comparison.agreement)
    return gap, f"results disagree: {violation}" if violation else ""


def _rule_text(comparison: Comparison) -> str:
    rule = comparison.agreement
    if isinstance(rule, str):
        return rule
    bounds = [f"{rule.rtol:g} relative"] * bool(rule.rtol) + [f"{rule.atol:g}"] * bool(rule.atol)
    return f"{', '.join(rule.keys)} equal within {' + '.join(bounds) or '0'}"


def _text(workload: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in workload.items()) or "-"

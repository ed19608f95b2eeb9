"""One contender in a process of its own, driven by JSON lines.

Started as ``python -m benchmarks.harness.worker THREADS MODULE [CONTENDER]``. Requests come on
standard input, one reply each goes to what was standard output; anything the contender prints goes
to standard error. Only the standard library is imported here: the interpreter may be a peer's.

Requests (``do``) and replies:
    prepare {workload, device, threads}  -> {versions, python, gpu}
    fingerprint                          -> {fingerprint, facts}, times of this first, cold run
    measure {loops}                      -> {cpu_s, system_s, wall_s} of one run, or of one unit
    memory                               -> {peak_mib}
    evaluate {quick}                     -> {values, versions, python} and times
A reply ``{unavailable}`` gives the reason why it cannot run here, ``{error}`` a failure.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness.registry import load
from benchmarks.harness.spec import Benchmark, Contender, Quality, Task, Unavailable

__all__ = ["Elapsed", "Worker", "clock", "keep_to", "own_peak_mib", "serve"]

_MIB_PER_RSS_UNIT = 1 / 1024 if sys.platform != "darwin" else 1 / 1024**2


class Elapsed(NamedTuple):
    """Seconds: CPU of all threads and finished children, the system's part of it, and wall."""

    cpu_s: float
    system_s: float
    wall_s: float


def _now() -> Elapsed:
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Elapsed(
        time.process_time() + children.ru_utime + children.ru_stime,
        own.ru_stime + children.ru_stime,
        time.perf_counter(),
    )


def clock(run: Callable[[], Any], loops: int, finish: Callable[[], None]) -> tuple[Any, Elapsed]:
    """Run the work `loops` times.

    Args:
        run: The work.
        loops: Number of runs.
        finish: Waits until work that was only queued (on a GPU) is done.

    Returns:
        The last result, and the time of one run.
    """
    gc.collect()
    finish()
    start = _now()
    result = None
    for _ in range(loops):
        result = None  # so that memory never holds two results
        result = run()
    finish()
    passed = (after - before for after, before in zip(_now(), start, strict=True))
    return result, Elapsed(*(seconds / loops for seconds in passed))


def own_peak_mib() -> float:
    """Return the largest resident memory of this process, in MiB.

    Linux hands the maximum in ``getrusage`` on from the process that started this one, so a large
    parent would show; ``VmHWM`` belongs to this program alone.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MIB_PER_RSS_UNIT


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


class Worker:
    """Answers the requests for one contender or one quality entry."""

    def __init__(self, declared: Benchmark | Quality, contender: str | None) -> None:
        """Keep the declaration.

        Args:
            declared: What the benchmark file declares.
            contender: Name of the contender; None for a quality entry.
        """
        self.declared = declared
        self.contender: Contender | None = None
        if isinstance(declared, Benchmark):
            self.contender = declared.contender(str(contender))
        self.device = "cpu"
        self.task: Task | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to one request; failures become replies too."""
        actions = {
            "prepare": self.prepare,
            "fingerprint": self.fingerprint,
            "measure": self.measure,
            "memory": self.memory,
            "evaluate": self.evaluate,
        }
        try:
            return actions[request["do"]](request)
        except Unavailable as reason:
            return {"unavailable": str(reason)}
        except ModuleNotFoundError as missing:
            package = (missing.name or "").partition(".")[0]
            kind = "error" if package in ("probkit", "benchmarks", "") else "unavailable"
            return {kind: f"needs the module {missing.name or missing}"}
        except Exception as error:  # the parent decides what a failure means
            traceback.print_exc(file=sys.stderr)
            text = (str(error).strip().splitlines() or [""])[0]
            return {"error": f"{type(error).__name__}: {text}"}

    def prepare(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Build the inputs of one workload."""
        assert self.contender is not None
        self.device = request["device"]
        self.task = self.contender.prepare(request["workload"], self.device)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(request["threads"])
        return {
            "versions": _versions(self.contender.packages),
            "python": platform.python_version(),
            "gpu": sys.modules["torch"].cuda.get_device_name() if self.device == "cuda" else None,
        }

    def fingerprint(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Run once, cold, and return a few numbers of the result."""
        assert self.task is not None
        result, elapsed = clock(self.task.run, 1, self.synchronize)
        numbers = {
            key: [float(v) for v in row] for key, row in self.task.fingerprint(result).items()
        }
        facts = {} if self.task.facts is None else dict(self.task.facts(result))
        return {"fingerprint": numbers, "facts": facts, **elapsed._asdict()}

    def measure(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Time the work; per unit where the task counts units."""
        assert self.task is not None
        loops = 1 if self.task.units else request["loops"]
        result, elapsed = clock(self.task.run, loops, self.synchronize)
        units = self.task.units(result) if self.task.units else 1.0
        return Elapsed(*(seconds / units for seconds in elapsed))._asdict()

    def memory(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the largest memory so far: of the GPU, or of this process and its children."""
        if self.device == "cuda":
            return {"peak_mib": sys.modules["torch"].cuda.max_memory_allocated() / 1024**2}
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _MIB_PER_RSS_UNIT
        return {"peak_mib": max(own_peak_mib(), children)}

    def evaluate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Compute the values of a quality entry."""
        assert isinstance(self.declared, Quality)
        declared = self.declared
        values, elapsed = clock(lambda: declared.evaluate(request["quick"]), 1, self.synchronize)
        return {
            "values": [{**dataclasses.asdict(v), "met": v.met} for v in values],
            **elapsed._asdict(),
            "versions": _versions(declared.packages),
            "python": platform.python_version(),
        }

    def synchronize(self) -> None:
        """Wait for the GPU; nothing to do on the CPU."""
        if self.device == "cuda":
            sys.modules["torch"].cuda.synchronize()


def keep_to(threads: int) -> None:
    """Bind this process to as many processors as it may use threads, where the system can.

    Thread counts in the environment do not reach every library; XLA sizes its pool by this.
    """
    if hasattr(os, "sched_setaffinity"):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, processors[-threads:])


def serve(threads: int, module: str, contender: str | None) -> None:
    """Answer requests until standard input closes."""
    keep_to(threads)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker(load(module), contender)
    for line in sys.stdin:
        replies.write(json.dumps(worker.answer(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None)

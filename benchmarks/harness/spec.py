"""What a benchmark file declares.

A file that measures time sets ``BENCHMARK = Benchmark(...)``; a file that sets measured values
beside reference figures sets ``BENCHMARK = Quality(...)``. Only the standard library may be
imported at the top of such a file: a contender imports its packages inside ``prepare``, because
the file is read in the environment of every peer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "Agreement",
    "Benchmark",
    "Comparison",
    "Contender",
    "Fingerprint",
    "Goal",
    "Metric",
    "Quality",
    "Task",
    "Unavailable",
    "Value",
    "Workload",
]

Workload = Mapping[str, int | float | str]
Fingerprint = Mapping[str, Sequence[float]]
Metric = Literal["cpu", "wall"]


class Unavailable(Exception):
    """A contender or an entry cannot run here; the message is the reason shown to the user."""


@dataclass(frozen=True)
class Task:
    """One contender on one workload, inputs already built.

    Args:
        run: The work that is timed. Takes nothing; what it returns goes to `fingerprint`.
        fingerprint: A few named numbers of the result, compared before any time is quoted.
        units: Units of work in a result, such as effective draws; times are then given per unit.
            None where every run does the same work.
        facts: Named numbers to store beside the times, such as the time of a warm-up; asked for
            once, after the fingerprint.
    """

    run: Callable[[], Any]
    fingerprint: Callable[[Any], Fingerprint]
    units: Callable[[Any], float] | None = None
    facts: Callable[[Any], Mapping[str, float]] | None = None


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Args:
        name: Short name shown in the tables.
        prepare: ``prepare(workload, device)`` imports the packages, builds the inputs and returns
            the `Task`. Raises `Unavailable` with a reason where it cannot run. Not timed.
        packages: Distributions whose versions are stored with the result.
        env: Name of an environment under ``benchmarks/envs``; None is the current one.
        devices: Devices it has a path for.
    """

    name: str
    prepare: Callable[[Workload, str], Task]
    packages: tuple[str, ...] = ()
    env: str | None = None
    devices: tuple[str, ...] = ("cpu",)


@dataclass(frozen=True)
class Goal:
    """An upper bound on the median of the ratio ours / peer."""

    text: str
    bound: float


@dataclass(frozen=True)
class Agreement:
    """Which fingerprints must be equal, and how closely.

    Two values agree where ``|ours - peer| <= atol + rtol * |peer|``.
    """

    keys: tuple[str, ...]
    rtol: float = 0.0
    atol: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """A pair of contenders.

    Args:
        ours: Name of the contender in the numerator.
        peer: Name of the contender in the denominator.
        agreement: The check made before a ratio is quoted, or one sentence on why the two have no
            numbers in common.
        goal: Goal on the CPU, or a function of the workload that returns it; None where the ratio
            is only reported.
        gpu_goal: Goal on the GPU, where wall time is compared.
        metric: Time compared on the CPU.
    """

    ours: str
    peer: str
    agreement: Agreement | str
    goal: Goal | Callable[[Workload], Goal | None] | None = None
    gpu_goal: Goal | None = None
    metric: Metric = "cpu"


@dataclass(frozen=True)
class Benchmark:
    """A timing benchmark.

    Args:
        title: A few words, the heading in the report.
        question: The one question that the numbers answer.
        workloads: Sizes, small to large; every contender receives them as plain JSON.
        contenders: All sides, ours and peers.
        comparisons: The pairs whose ratio is reported.
        repeats: Rounds; in each every contender is measured once, in turn (A B C, B C A, ...).
        processes: Times the rounds are repeated with freshly started processes.
        threads: Threads a contender may use.
        min_seconds: A measurement repeats short work until it lasts at least this long.
        gpu_workloads: Sizes for ``--gpu``; empty where there is no GPU path.
        unit: What times are given per, where tasks count units; empty for a time of one run.
        notes: Sentences for the report: conditions of the comparison, or a profile that shows
            where the time goes.
        timeout: Seconds after which a contender that does not answer is given up.
    """

    title: str
    question: str
    workloads: tuple[Workload, ...]
    contenders: tuple[Contender, ...]
    comparisons: tuple[Comparison, ...]
    repeats: int = 7
    processes: int = 1
    threads: int = 1
    min_seconds: float = 0.1
    gpu_workloads: tuple[Workload, ...] = ()
    unit: str = ""
    notes: tuple[str, ...] = ()
    timeout: float = 1800.0

    def contender(self, name: str) -> Contender:
        """Return the contender called `name`.

        Raises:
            KeyError: No contender has that name.
        """
        for contender in self.contenders:
            if contender.name == name:
                return contender
        known = ", ".join(c.name for c in self.contenders)
        raise KeyError(f"no contender is called {name!r}; there are: {known}")


@dataclass(frozen=True)
class Value:
    """One measured number, beside a figure from elsewhere where there is one.

    Args:
        name: What was measured.
        value: The number.
        reference: The figure it is held against; None for a number that is only reported.
        tolerance: Largest deviation allowed.
        rule: ``"near"``: ``|value - reference| <= tolerance``; ``"at most"``:
            ``value <= reference + tolerance``.
        note: Where the reference comes from, or what the value means.
    """

    name: str
    value: float
    reference: float | None = None
    tolerance: float = 0.0
    rule: Literal["near", "at most"] = "near"
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the value keeps its rule; None without a reference.

        Example:
            >>> Value("error", 0.31, reference=0.30, tolerance=0.02).met
            True
            >>> Value("error", 0.31).met is None
            True
        """
        if self.reference is None:
            return None
        excess = self.value - self.reference
        return bool((abs(excess) if self.rule == "near" else excess) <= self.tolerance)


@dataclass(frozen=True)
class Quality:
    """Measured values beside reference figures; no time is compared.

    Args:
        title: A few words, the heading in the report.
        question: The one question that the numbers answer.
        evaluate: ``evaluate(quick)`` returns the values. Raises `Unavailable` with a reason where
            it cannot run (for example without the data). Runs in a process of its own.
        packages: Distributions whose versions are stored with the result.
        threads: Threads it may use.
        timeout: Seconds after which it is given up.
    """

    title: str
    question: str
    evaluate: Callable[[bool], Sequence[Value]]
    packages: tuple[str, ...] = ()
    threads: int = 1
    timeout: float = 1800.0

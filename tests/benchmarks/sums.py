"""A tiny real benchmark: the sum of squares by NumPy, by PyTorch, and wrong on purpose."""

from __future__ import annotations

import os
from typing import Any

from benchmarks.harness.spec import (
    Agreement,
    Benchmark,
    Comparison,
    Contender,
    Goal,
    Task,
    Unavailable,
    Workload,
)


def _values(workload: Workload) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal(int(workload["n"]))


def _numpy(workload: Workload, device: str) -> Task:
    values = _values(workload)
    print("what a contender prints does not disturb the harness")
    return Task(lambda: (values**2).sum(), lambda total: {"total": [total]})


def _torch(workload: Workload, device: str) -> Task:
    import torch

    values = torch.as_tensor(_values(workload))
    return Task(lambda: (values**2).sum(), lambda total: {"total": [total.item()]})


def _wrong(workload: Workload, device: str) -> Task:
    values = _values(workload)
    return Task(lambda: (values**2).sum() + 1e-3, lambda total: {"total": [total]})


def _raises(workload: Workload, device: str) -> Task:
    def run() -> None:
        raise ArithmeticError("cannot add\nsecond line")

    return Task(run, lambda _: {})


def _dies(workload: Workload, device: str) -> Task:
    return Task(lambda: os._exit(3), lambda _: {})


def _unavailable(workload: Workload, device: str) -> Task:
    raise Unavailable("needs a machine that adds")


def _not_installed(workload: Workload, device: str) -> Task:
    import a_package_that_is_not_installed  # noqa: F401

    raise AssertionError("unreachable")


_SAME = Agreement(("total",), rtol=1e-12)
_LOOSE = Goal("at most a million times", 1e6)
_PEERS = ("wrong", "raises", "dies", "unavailable", "not installed", "no env")

BENCHMARK = Benchmark(
    title="Sum of squares",
    question="Is a sum a sum?",
    workloads=({"n": 2000}, {"n": 20000}),
    contenders=(
        Contender("torch", _torch, ("torch",)),
        Contender("numpy", _numpy, ("numpy", "no-such-package")),
        Contender("wrong", _wrong),
        Contender("raises", _raises),
        Contender("dies", _dies),
        Contender("unavailable", _unavailable),
        Contender("not installed", _not_installed),
        Contender("no env", _numpy, env="no_such_environment"),
    ),
    comparisons=(
        Comparison("torch", "numpy", _SAME, goal=_LOOSE),
        *(Comparison("torch", peer, _SAME, goal=_LOOSE) for peer in _PEERS),
    ),
    repeats=4,
    min_seconds=0.01,
)

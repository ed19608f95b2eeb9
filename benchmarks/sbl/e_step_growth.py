"""One E-step with a Kronecker dictionary of three modes: time and memory as it grows.

N_i unknowns and 0.8 N_i data a mode, real, float64, one thread. The cost grows with N^(I+1), by 16
for each doubling, where that of a dense form grows with N^(3I), by 512.
"""

from __future__ import annotations

import resource
import sys
import time
from functools import partial
from typing import Any

from benchmarks.harness.spec import Quality, Value

_SIDES = (15, 30, 60, 120)
_MILLISECONDS = 25.0  # goal at 60^3
_MEGABYTES = 500.0
_RUNS = 9


def _problem(side: int) -> tuple[list[Any], list[Any], Any, Any]:
    import torch

    g = torch.Generator().manual_seed(0)
    rows = (4 * side) // 5

    def normal(*shape: int) -> Any:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    factors = [normal(rows, side) for _ in range(3)]
    noise = torch.tensor(0.1, dtype=torch.float64)
    return factors, [normal(side).abs() for _ in range(3)], noise, normal(1, rows, rows, rows)


def _e_step(factors: list[Any], variances: list[Any], noise: Any, y: Any) -> Any:
    from probkit.models.sbl.kronecker_e_step import kronecker_moments, kronecker_spectrum

    return kronecker_moments(kronecker_spectrum(factors, variances, noise), variances, y)


def _milliseconds(run: Any) -> float:
    """Median CPU time of a run."""
    run()
    times = []
    for _ in range(_RUNS):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * sorted(times)[_RUNS // 2]


def _peak() -> float:
    """Largest resident size so far, in megabytes."""
    unit = 1024 if sys.platform != "darwin" else 1024**2
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def _evaluate(quick: bool) -> list[Value]:
    import torch

    from probkit.models.sbl.kronecker_updates import alternating_step, rank_one_step

    torch.linalg.eigh(torch.eye(2))  # loads the libraries
    values: list[Value] = []
    before, last = _peak(), None
    for side in _SIDES[:3] if quick else _SIDES:
        factors, variances, noise, y = _problem(side)

        step = partial(_e_step, factors, variances, noise, y)
        taken = _milliseconds(step)
        goal = _MILLISECONDS if side == 60 else None
        values.append(
            Value(f"{side}^3 unknowns, E-step, ms CPU", taken, reference=goal, rule="at most")
        )
        if last is not None:
            values.append(Value(f"{side}^3 over {side // 2}^3 unknowns, time", taken / last))
        last = taken
        moment = step().second_moment()
        for name, update in (("AM", alternating_step), ("SVD", rank_one_step)):
            taken_here = _milliseconds(partial(update, moment, variances))
            values.append(Value(f"{side}^3 unknowns, {name} M-step, ms CPU", taken_here))
        if side == 60:
            used = _peak() - before
            values.append(
                Value(
                    "60^3 unknowns, peak memory beyond imports, MB",
                    used,
                    reference=_MEGABYTES,
                    rule="at most",
                )
            )
    return values


BENCHMARK = Quality(
    title="Kronecker E-step: time and memory",
    question="What do an E-step and an M-step cost at 15^3, 30^3, 60^3 and 120^3 unknowns?",
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)

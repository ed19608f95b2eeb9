"""What a sweep costs on Beijing PM2.5: milliseconds, growth and memory."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

from benchmarks.funbat._pm25 import MODES, kernels, read
from benchmarks.harness.spec import Quality, Value


def _seconds(model: Any, data: Any, sweeps: int = 9) -> float:
    """Median processor seconds of a sweep, after one to warm up."""
    import torch

    prepared = model.prepare(data)
    times = []
    with torch.no_grad():
        state = model.start_messages(prepared, rngs=[torch.Generator().manual_seed(0)])
        for _ in range(sweeps + 1):
            start = time.process_time()
            state, _ = model.pass_messages(state, prepared)
            times.append(time.process_time() - start)
    return statistics.median(times[1:])


def _random(entries: int, points: int) -> Any:
    """Entries at random on a grid of ``points`` coordinates in each of three modes."""
    import torch

    from probkit.models.funbat import TensorData

    generator = torch.Generator().manual_seed(0)
    index = torch.randint(points, (entries, 3), generator=generator).double() / (points - 1)
    return TensorData(index, torch.randn(entries, generator=generator, dtype=torch.float64))


def _evaluate(quick: bool) -> list[Value]:
    import resource

    from probkit.kernels.state_space import Matern
    from probkit.models.funbat import FunBaT, TensorData, additive

    index, y, masks = read()
    data = TensorData(index[~masks[0]], y[~masks[0]], MODES)
    rough = [Matern(0.5, 0.1)] * 3
    fixed = {"learn_hyperparameters": False}
    goals = {
        "CP 2": (FunBaT(2, kind="cp", kernels=rough, **fixed), 40.0, "15 ms asked for"),
        "Tucker 2": (FunBaT(2, kernels=rough, **fixed), 150.0, "official code: about 1 s"),
    }
    values = [
        Value(
            f"{name}, nu 1/2, ms a sweep", 1e3 * _seconds(model, data), goal, 0.0, "at most", note
        )
        for name, (model, goal, note) in goals.items()
    ]
    others = {
        "CP 2, kernels per mode": FunBaT(2, kind="cp", kernels=kernels(), **fixed),
        "CP 3, kernels per mode": FunBaT(3, kind="cp", kernels=kernels(), **fixed),
        "CP 3, kernels per mode, learning": FunBaT(3, kind="cp", kernels=kernels(), learn_from=1),
        "main effects, pairs and CP 1": FunBaT(
            kind="cp", masks=additive(3), kernels=kernels(), **fixed
        ),
        "Tucker 5, nu 1/2": FunBaT(5, kernels=rough, **fixed),
    }
    for name, model in others.items():
        values.append(Value(f"{name}, ms a sweep", 1e3 * _seconds(model, data, 5)))
    print(f"  {[(v.name, round(v.value, 1)) for v in values]}", file=sys.stderr, flush=True)

    small, large = (10_000, 20_000) if quick else (50_000, 500_000)
    cp = FunBaT(2, kind="cp", kernels=rough, **fixed)
    growth = _seconds(cp, _random(large, 1000), 3) / _seconds(cp, _random(small, 1000), 3)
    values.append(
        Value(
            f"CP 2, time of a sweep, {large:,} entries over {small:,}",
            growth,
            large / small,
            0.2 * large / small,
            "at most",
            "linear, or less where the grid's own cost shows",
        )
    )
    few, many = (1_000, 2_000) if quick else (2_000, 20_000)
    growth = _seconds(cp, _random(20_000, many), 3) / _seconds(cp, _random(20_000, few), 3)
    values.append(
        Value(
            f"CP 2, time of a sweep, {many:,} points a mode over {few:,}",
            growth,
            many / few,
            0.2 * many / few,
            "at most",
            "linear, or less where the entries' own cost shows",
        )
    )
    if not quick:
        seconds = _seconds(FunBaT(7, kernels=rough, **fixed), data, 1)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        values += [
            Value("Tucker 7, nu 1/2, seconds a sweep", seconds),
            Value("Tucker 7, peak memory of the process, MiB", peak, 2048.0, 0.0, "at most"),
        ]
    return values


BENCHMARK = Quality(
    title="A sweep of message passing",
    question=(
        "How many milliseconds of one core does a sweep over 13,572 entries on a grid of 428, 501 "
        "and 1461 points take, how does it grow, and how much memory does a Tucker core of 7 x 7 x "
        "7 need?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
    timeout=1800.0,
)

"""Learning curves to time predictions on, equal in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.harness.spec import Task, Workload


def prefixes(count: int, longest: int) -> list[Any]:
    """Return ``count`` observed parts of 5 to ``longest`` epochs, of curves of the prior."""
    import torch

    from probkit.models.pfn import CurvePrior

    _, (_, y) = CurvePrior().sample_dataset(count, rng=5)
    lengths = torch.randint(5, longest + 1, (count,), generator=torch.Generator().manual_seed(5))
    return [row[:n].clamp(0, 1).double() for row, n in zip(y, lengths.tolist(), strict=True)]


def steps_asked(queries: int) -> Any:
    """The last ``queries`` of 100 epochs; 1 asks for the final value only."""
    import torch

    return torch.arange(101 - queries, 101, dtype=torch.float64)


def together(workload: Workload, device: str) -> Task:
    """All curves in one call."""
    return _task(
        workload, int(workload["B"]), lambda lc, seen, x: [lc.predict(seen, x).median], device
    )


def one_by_one(workload: Workload, device: str) -> Task:
    """The same network called once a curve, on 64 of the curves where there are more."""
    count = min(int(workload["B"]), 64)
    return _task(
        workload, count, lambda lc, seen, x: [lc.predict(y, x).median for y in seen], device
    )


def _task(workload: Workload, count: int, call: Callable[..., list[Any]], device: str) -> Task:
    from probkit.models.pfn import LearningCurvePFN

    lc = LearningCurvePFN.load(out_of_prior="ignore", device=device)
    seen = prefixes(int(workload["B"]), int(workload["longest"]))[:count]
    x = steps_asked(int(workload["queries"]))

    def fingerprint(medians: list[Any]) -> dict[str, list[float]]:
        first = medians[0][0] if medians[0].dim() == 2 else medians[0]
        return {"medians of the first curve": first.flatten()[:20].tolist()}

    return Task(lambda: call(lc, seen, x), fingerprint, units=lambda _: float(count))

"""The problems, by name: a space, a function of params, and how far a set of values is off."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.spec import Unavailable

__all__ = ["Task", "task"]

Values = Mapping[str, float]


@dataclass(frozen=True)
class Task:
    """A problem as methods get it.

    Attributes:
        space: The parameters, a ``probkit.bo.Space``.
        objectives: Names and directions.
        evaluate: Outcomes by name of some params.
        quality: How far a sequence of outcomes is off; 0 is best.
    """

    space: Any
    objectives: Mapping[str, str]
    evaluate: Callable[[Mapping[str, Any]], Values]
    quality: Callable[[Sequence[Values]], float]


def task(name: str) -> Task:
    """Return a problem.

    Raises:
        Unavailable: It needs data that is not here.
        KeyError: No problem has that name.
    """
    if name in _SYNTHETIC:
        return _SYNTHETIC[name]()
    return _from_library(name)


def _box(function: Any, bounds: Sequence[tuple[float, float]], best: float) -> Task:
    """A function of BoTorch with one objective to be minimised."""
    import torch

    from probkit.bo import Float, Space

    space = Space({f"x{k}": Float(low, high) for k, (low, high) in enumerate(bounds)})

    def evaluate(params: Mapping[str, Any]) -> Values:
        x = torch.tensor([[params[n] for n in space.names]], dtype=torch.float64)
        return {"loss": float(function(x))}

    return Task(space, {"loss": "min"}, evaluate, lambda seen: min(v["loss"] for v in seen) - best)


def _branin() -> Task:
    from botorch.test_functions import Branin

    return _box(Branin(), [(-5, 10), (0, 15)], Branin._optimal_value)


def _hartmann() -> Task:
    from botorch.test_functions import Hartmann

    return _box(Hartmann(6), [(0, 1)] * 6, Hartmann(6).optimal_value)


def _ackley() -> Task:
    from botorch.test_functions import Ackley

    return _box(Ackley(10), [(-32.768, 32.768)] * 10, 0.0)


def _branin_currin() -> Task:
    import torch
    from botorch.test_functions.multi_objective import BraninCurrin
    from botorch.utils.multi_objective.hypervolume import Hypervolume
    from botorch.utils.multi_objective.pareto import is_non_dominated

    from probkit.bo import Float, Space

    function = BraninCurrin(negate=True)
    space = Space(x0=Float(0, 1), x1=Float(0, 1))

    def evaluate(params: Mapping[str, Any]) -> Values:
        x = torch.tensor([[params["x0"], params["x1"]]], dtype=torch.float64)
        first, second = (-function(x)[0]).tolist()
        return {"branin": first, "currin": second}

    def missing(seen: Sequence[Values]) -> float:
        points = torch.tensor([[-v["branin"], -v["currin"]] for v in seen], dtype=torch.float64)
        front = points[is_non_dominated(points)]
        volume = Hypervolume(ref_point=function.ref_point.double()).compute(front)
        return 1 - volume / function._max_hv

    return Task(space, {"branin": "min", "currin": "min"}, evaluate, missing)


_SYNTHETIC: dict[str, Callable[[], Task]] = {
    "Branin": _branin,
    "Hartmann6": _hartmann,
    "Ackley10": _ackley,
    "BraninCurrin": _branin_currin,
}

_TABLES = {
    "phoneme": "hpobench_phoneme.npz",
    "parkinsons": "hpolib_parkinsons.npz",
    "nasbench201": "nasbench201_cifar10.npz",
}


def _from_library(name: str) -> Task:
    """A problem of ``probkit.bo.problems``."""
    from probkit.bo import problems

    made: Any
    if name in _TABLES:
        made = problems.TableProblem(_data() / _TABLES[name])
    elif name == "PestControl":
        made = problems.PestControl()
    elif name == "Polynomial200":
        made = problems.Polynomial()
    else:
        raise KeyError(f"no problem is called {name!r}")
    objective, direction = next(iter(made.outcomes.objectives.items()))
    sign = 1.0 if direction == "min" else -1.0
    best = 0.0 if made.best is None else sign * made.best

    def quality(seen: Sequence[Values]) -> float:
        return min(sign * v[objective] for v in seen) - best

    return Task(made.space, {objective: direction}, made.evaluate, quality)


def _data() -> Path:
    root = os.environ.get("PROBKIT_DATA")
    if not root or not (Path(root) / "bo").is_dir():
        raise Unavailable("PROBKIT_DATA does not name the folder that holds bo/")
    return Path(root) / "bo"

"""One cell: a method on a problem with a seed; what is stored of it, and which cells there are.

A cell is a file of its own, written when it is done, so that a matrix that takes hours is resumed
where it stopped and never run twice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "Cell", "Plan", "load", "path_of", "plans", "save", "stored"]

FOLDER = Path(__file__).resolve().parents[1] / "results" / "bo"

INITIAL = 10


@dataclass(frozen=True)
class Plan:
    """A cell that may be run.

    Attributes:
        problem: Name of the problem.
        method: Name of the method.
        seed: Seed of the initial points and of the method.
        evaluations: Evaluations after the initial ones.
    """

    problem: str
    method: str
    seed: int
    evaluations: int = 40


@dataclass(frozen=True)
class Cell:
    """What came of one.

    Attributes:
        problem: Name of the problem.
        method: Name of the method.
        seed: Its seed.
        initial: Number of initial points, the same ones for every method of a seed.
        quality: After each evaluation: regret of the best so far, or, of several objectives,
            the share of the largest known hypervolume that is missing.
        ask_cpu_s: CPU seconds of each ask after the initial points.
        calibration: Of predictions of trials left out at the end, where the method has a model of
            ours: coverage of central 50 % and 95 % intervals, and mean negative log density.
        versions: Of the packages at work.
    """

    problem: str
    method: str
    seed: int
    initial: int
    quality: list[float]
    ask_cpu_s: list[float]
    calibration: dict[str, float]
    versions: dict[str, str]


#: Problems of the main table, the cheapest and most telling first.
PROBLEMS = (
    "Branin",
    "Hartmann6",
    "phoneme",
    "parkinsons",
    "nasbench201",
    "Ackley10",
    "BraninCurrin",
    "PestControl",
    "Polynomial200",
)
METHODS = ("random", "tpe", "gp", "gpsampler", "ibnn", "botorch")

#: Sampled and trained networks: three problems, five seeds, half the evaluations.
NETWORK_PROBLEMS = ("Branin", "Hartmann6", "Polynomial200")
NETWORKS = ("hmc", "sghmc", "ensemble", "laplace", "dkl", "auto")


def plans(seeds: int = 10, network_seeds: int = 5) -> Iterator[Plan]:
    """Yield all cells, those of the main table first, a seed of every method at a time."""
    for problem in PROBLEMS:
        for seed in range(seeds):
            for method in METHODS:
                yield Plan(problem, method, seed)
    for problem in NETWORK_PROBLEMS:
        for seed in range(network_seeds):
            for method in NETWORKS:
                yield Plan(problem, method, seed, 20)


def path_of(plan: Plan | Cell, folder: Path = FOLDER) -> Path:
    """Return the file of a cell.

    Example:
        >>> path_of(Plan("Branin", "gp", 3)).name
        'Branin-gp-3.json'
    """
    return folder / f"{plan.problem}-{plan.method}-{plan.seed}.json"


def save(cell: Cell, folder: Path = FOLDER) -> Path:
    """Write a cell in one go."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(cell, folder)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(_rounded(asdict(cell)), indent=None) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def _rounded(value: Any) -> Any:
    """Floats to seven digits: what a table needs, in files that stay small."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return value


def load(path: Path) -> Cell:
    """Read one cell.

    Raises:
        TypeError: A field is missing or unknown.
    """
    return Cell(**json.loads(path.read_text(encoding="utf-8")))


def stored(folder: Path = FOLDER) -> list[Cell]:
    """Return all cells there are."""
    return [load(path) for path in sorted(folder.glob("*.json"))]

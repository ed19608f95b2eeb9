"""Cells of the benchmarks of language models in Bayesian optimisation: one file each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bo._cells import _rounded

__all__ = ["FOLDER", "Plan", "load", "path_of", "plans", "save", "stored"]

FOLDER = Path(__file__).resolve().parents[1] / "results" / "bo_llm"


class Plan(NamedTuple):
    """A cell that may be run.

    Attributes:
        kind: "recorded", "guard", "quality" or "cost".
        data: Data set or problem.
        model: Model that is tuned, or size of the case; "-" where there is no such thing.
        method: Method.
        seed: Seed.
    """

    kind: str
    data: str
    model: str
    method: str
    seed: int


#: Of the recorded runs: studies as a user gets them, noise learned. A score in cross-validation
#: is a step function of the parameters, which no smooth process should pass through exactly.
METHODS = ("random", "tpe", "gp", "ibnn")
#: The process told that outcomes are exact, to see what difference it makes.
VARIANTS = ("gp noise-free",)
#: On Branin: the plain process, and the hybrid with language models that are wrong on purpose or
#: helpful, the latter with broken answers at some rate; the same initial points but where said.
ADVISERS = ("gp", "adversarial", "adversarial from the start", "faults 0 %", "faults 10 %",
            "faults 30 %", "faults 60 %")  # fmt: skip
#: Of rows of the histories.
PREDICTORS = ("gp", "smollm2 samples", "smollm2 digits", "hybrid")
ROWS = (5, 20)


def plans(kind: str, seeds: int | None = None) -> Iterator[Plan]:
    """Yield the cells of a kind, the cheapest first.

    Args:
        kind: "recorded", "guard", "quality" or "cost".
        seeds: How many; None for all.
    """
    if kind == "recorded":
        from benchmarks.bo._llm_recorded import DATASETS, MODELS

        for model in MODELS:
            for method in METHODS + VARIANTS:
                for dataset in DATASETS:
                    for seed in range(seeds or 5):
                        yield Plan(kind, dataset, model, method, seed)
    elif kind == "guard":
        for seed in range(seeds or 20):
            for adviser in ADVISERS:
                # The comparison that is held to a bar has all seeds, the others half of them.
                if adviser.startswith(("faults", "adversarial from")) and seed >= 10:
                    continue
                yield Plan(kind, "Branin", "-", adviser, seed)
    elif kind == "quality":
        for seed in range(seeds or 1):
            for dataset, model in (("breast", "RandomForest"), ("wine", "SVM")):
                for n in ROWS:
                    for method in PREDICTORS:
                        yield Plan(kind, dataset, f"{model} {n}", method, seed)
    elif kind == "cost":
        for n in (5, 10, 20, 40):
            for reuse in ("reuse", "no reuse"):
                yield Plan(kind, "RandomForest", str(n), reuse, 0)
    else:
        raise ValueError(f"kind: expected recorded, guard, quality or cost, got {kind!r}")


def path_of(plan: Plan, folder: Path = FOLDER) -> Path:
    """Return the file of a cell.

    Example:
        >>> path_of(Plan("recorded", "wine", "SVM", "gp", 3)).name
        'recorded-wine-SVM-gp-3.json'
    """
    text = "-".join(str(part).replace(" ", "_").replace("%", "pc") for part in plan)
    return folder / f"{text}.json"


def save(plan: Plan, found: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Write a cell in one go."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(plan, folder)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    whole = {**plan._asdict(), **_rounded(found)}
    temporary.write_text(json.dumps(whole) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def load(path: Path) -> tuple[Plan, dict[str, Any]]:
    """Read one cell."""
    whole = json.loads(path.read_text(encoding="utf-8"))
    plan = Plan(*(whole.pop(name) for name in Plan._fields))
    return plan, whole


def stored(kind: str, folder: Path = FOLDER) -> list[tuple[Plan, dict[str, Any]]]:
    """Return all cells of a kind that there are."""
    return [load(path) for path in sorted(folder.glob(f"{kind}-*.json"))]

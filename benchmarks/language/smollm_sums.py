"""Running sums by SmolLM2 under a verifier: accuracy of every method at equal token budgets."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.spec import Quality, Unavailable, Value
from benchmarks.language._cells import load_all
from benchmarks.language._running_sums import COUNT, SIZES, TABLE
from benchmarks.language._tables import by_method

__all__: list[str] = []


def _evaluate(quick: bool) -> list[Value]:
    cells: list[Any] = load_all(TABLE)
    if not cells:
        raise Unavailable("no cells are stored: python -m benchmarks.language sums runs them")
    return by_method(cells, f"of {COUNT} problems")


BENCHMARK = Quality(
    title="Running sums, SmolLM2-135M",
    question=(
        "How often is the mode of the answers right, by method and number of answers N "
        f"({', '.join(map(str, SIZES))}) at equal token budgets (four numbers from 1 to 9, added "
        "one by one, one a line; a verifier weighs a right line 0.98 and a wrong one 0.02; "
        "temperature 0.8, two worked examples)?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "transformers"),
)

"""One cell: a running sum, solved by every method at N = 1, 4 and 16."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.language._cells import path_of, save
from benchmarks.language._methods import independent, run
from benchmarks.language._sums import END, Sum, line_is_right, problems, prompt_of

__all__ = ["COUNT", "SIZES", "TABLE", "cell", "fill"]

TABLE = "sums"
COUNT = 40
SIZES = (1, 4, 16)
_RIGHT, _WRONG, _TEMPERATURE = 0.98, 0.02, 0.8
_TOKENS = 12  # of a line
_GUIDED = ("PF", "PG", "beam")


def _model(lm: Any, one: Sum) -> Any:
    from probkit.models.language import GuidedGeneration, Law, Steps
    from probkit.models.language.potentials import VerifierPotential

    potential = VerifierPotential(lambda text: line_is_right(one, text), high=_RIGHT, low=_WRONG)
    lines = Steps(stop="\n", final=END, max_tokens=_TOKENS, max_steps=len(one.lines) + 1)
    return GuidedGeneration(lm, potential, steps=lines, law=Law(temperature=_TEMPERATURE))


def cell(lm: Any, one: Sum, seed: int) -> dict[str, Any]:
    """Return the outcomes of all methods on one problem."""
    from probkit.models.language.answers import last_number

    model, prompt = _model(lm, one), prompt_of(one)

    def whole(text: str) -> Any:
        """The last number of an answer that has all its lines of sums."""
        return last_number(text) if text.count("\n") >= len(one.lines) else None

    def one_of(method: str, n: int) -> Any:
        return run(model, prompt, whole, one.total, method, n, seed)

    outcomes = [
        one_of("greedy", 1),
        *independent(model, prompt, whole, one.total, SIZES, seed),
        *(one_of(method, n) for n in SIZES[1:] for method in _GUIDED),
    ]
    return {
        "terms": list(one.terms),
        "seed": seed,
        "outcomes": [outcome._asdict() for outcome in outcomes],
    }


def fill(load: Callable[[], Any], room: Callable[[], bool]) -> None:
    """Compute the missing cells while there is room; ``load`` returns the language model."""
    todo: Sequence[tuple[int, Sum]] = [
        (k, one) for k, one in enumerate(problems(COUNT)) if not path_of(TABLE, f"{k:03d}").exists()
    ]
    for k, one in todo:
        if not room():
            break
        begun = time.perf_counter()
        save(TABLE, f"{k:03d}", cell(load(), one, seed=k))
        print(f"{TABLE} {k}: {time.perf_counter() - begun:.0f} s", flush=True)

"""Studies of Branin with scripted language models: helpful, adversarial, or with broken answers."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.bo._llm_cells import Plan

__all__ = ["STARTS", "TRIALS", "run"]

STARTS, TRIALS = 5, 20
#: Error of the helpful model's answers, about one percent of Branin's range.
_SD = 3.0


def run(plan: Plan) -> dict[str, Any]:
    """Run a study of 5 + 15 evaluations, free of noise, all methods from the same Sobol points."""
    from probkit.bo import Study
    from probkit.bo.problems import TestFunction

    problem = TestFunction("Branin")
    options = {} if plan.method == "gp" else _options(problem, plan.method)
    study = Study(
        problem.space, {"value": "min"}, surrogate="llm" if options else "gp", noise="none",
        initial=STARTS, rng=plan.seed, options=options,
    )  # fmt: skip
    begin = time.process_time()
    study.optimize(lambda params: problem(params)["value"], TRIALS)
    spent = time.process_time() - begin
    trace = [float(value) - float(problem.best or 0.0) for value in study.trace()]
    usage = study.usage
    return {
        "regret": trace,
        "study_cpu_s": spent,
        "origins": [trial.origin for trial in study.trials],
        "advice": study.advice,
        "calls": usage.calls,
        "characters": usage.tokens,
    }


def _options(problem: Any, adviser: str) -> dict[str, Any]:
    from probkit.bo.llm import GPScript
    from probkit.models.language.oracle import OracleLM

    script = GPScript(
        problem.space,
        truth=lambda params: problem(params)["value"],
        sd=_SD,
        adversarial=adviser.startswith("adversarial"),
    )
    rate = float(adviser.split()[1]) / 100 if adviser.startswith("faults") else 0.0
    starts = {} if adviser.endswith("from the start") else {"warm_start": 0}
    return {"lm": OracleLM(script, malformed=rate), "n_perm": 2, "k": 2, **starts}

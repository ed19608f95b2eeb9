"""Evaluate trials, one after the other or on any ``concurrent.futures.Executor``.

What the objective raises travels back as a value, so that whatever the future of an executor raises
is the executor's own: a worker that died. Such an evaluation is given to the executor again.
"""

from __future__ import annotations

import logging
import os
import pickle
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from typing import Any

from probkit.bo.trials import Trial
from probkit.errors import DataError

__all__ = ["Measurement", "Pruned", "evaluations"]

_log = logging.getLogger("probkit.bo")

Objective = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Measurement:
    """What an objective may return instead of plain values, to say how noisy they are.

    Attributes:
        value: A number, or outcomes by name.
        var: Variances of their noise, in the same form; None where not known.
    """

    value: Any
    var: Any = None


class Pruned(Exception):
    """Raised by an objective that stops early because its trial would not be good.

    Args:
        value: What was measured until then; None for nothing.
    """

    def __init__(self, value: Any = None) -> None:
        super().__init__(value)
        self.value = value


@dataclass(frozen=True)
class Evaluated:
    """What came of one call: outcomes, or why there are none."""

    status: str
    value: Any = None
    var: Any = None
    error: str | None = None
    exception: BaseException | None = None


def call(objective: Objective, params: dict[str, Any]) -> Evaluated:
    """Call an objective, and return whatever it does."""
    try:
        found = objective(params)
    except Pruned as stopped:
        return Evaluated("pruned", stopped.value)
    except Exception as error:
        line = "".join(traceback.format_exception_only(error)).strip()
        return Evaluated("failed", error=line, exception=_if_picklable(error))
    if isinstance(found, Measurement):
        return Evaluated("complete", found.value, found.var)
    return Evaluated("complete", found)


def _if_picklable(error: Exception) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return error


def evaluations(
    objective: Objective,
    trials: Iterator[Trial],
    *,
    executor: Executor | None = None,
    workers: int | None = None,
    retries: int = 2,
) -> Iterator[tuple[Trial, Evaluated]]:
    """Evaluate trials and yield them as they are done.

    A trial is taken from ``trials`` when a worker is free for it, so the outcomes yielded before
    may have been told when the next trial is asked for.

    Args:
        objective: Called with the params of a trial.
        trials: The trials.
        executor: Where to call it; None for here.
        workers: Trials in flight at once; by default the executor's number of workers.
        retries: How often an evaluation lost with its worker is tried again.

    Raises:
        DataError: ``workers`` or ``retries`` out of range.
        Exception: Whatever an executor raises that takes no more work.
    """
    if executor is None:
        for trial in trials:
            yield trial, call(objective, dict(trial.params))
        return
    width = _workers(executor, workers)
    if retries < 0:
        raise DataError(f"expected retries >= 0, got {retries}")
    running: dict[Future[Evaluated], tuple[Trial, int]] = {}

    def submit(trial: Trial, attempt: int) -> None:
        running[executor.submit(call, objective, dict(trial.params))] = (trial, attempt)

    def fill() -> None:
        while len(running) < width:
            trial = next(trials, None)
            if trial is None:
                return
            submit(trial, 0)

    fill()
    while running:
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=lambda f: running[f][0].number):
            trial, attempt = running.pop(future)
            lost = future.exception()
            if lost is None:
                yield trial, future.result()
            elif attempt < retries:
                _log.warning("trial %d was lost with its worker, and starts again", trial.number)
                submit(trial, attempt + 1)
            else:
                yield trial, Evaluated("failed", error=f"lost {attempt + 1} times: {lost!r}")
        fill()


def _workers(executor: Executor, workers: int | None) -> int:
    if workers is None:
        workers = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
    if workers < 1:
        raise DataError(f"expected workers >= 1, got {workers}")
    return int(workers)

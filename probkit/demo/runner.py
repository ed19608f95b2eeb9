"""Running views one after the other, each timed, none able to stop the others."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from probkit.demo.context import Block, DemoContext, slug
from probkit.demo.registry import DemoView

__all__ = ["BUDGET", "Outcome", "run_views"]

#: Seconds that a view may take in its short form; more is pointed out, not refused.
BUDGET = 20.0


@dataclass(frozen=True)
class Outcome:
    """What came of one view.

    Attributes:
        view: The view.
        blocks: What it showed, up to its end or its failure.
        seconds: Wall time it took.
        budget: Seconds it should have taken at most; None in the long form.
        error: Traceback of its failure; None if there was none.
    """

    view: DemoView
    blocks: tuple[Block, ...]
    seconds: float
    budget: float | None
    error: str | None = None

    @property
    def over_budget(self) -> bool:
        """Whether the view took longer than it should."""
        return self.budget is not None and self.seconds > self.budget


def run_views(
    views: Iterable[DemoView],
    out: Path,
    *,
    full: bool = False,
    rng_seed: int = 0,
    on_start: Callable[[DemoView], None] = lambda view: None,
    on_end: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run views in order; a failing one is recorded and the next one runs.

    Args:
        views: The views.
        out: Folder for pictures and files; made if absent.
        full: Whether the views run in their long form.
        rng_seed: Seed handed to every view.
        on_start: Called with each view before it runs.
        on_end: Called with each outcome.

    Returns:
        One outcome a view, in order.

    Raises:
        KeyboardInterrupt: The run was interrupted.
    """
    out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for view in views:
        on_start(view)
        outcome = _run_one(view, out, full=full, rng_seed=rng_seed)
        outcomes.append(outcome)
        on_end(outcome)
    return outcomes


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to one thread, as it was before afterwards.

    The views' matrices are small, and on a busy machine threads that wait for each other cost ten
    times what they bring.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run_one(view: DemoView, out: Path, *, full: bool, rng_seed: int) -> Outcome:
    prefix = f"{slug(view.family)}-{slug(view.title)}"
    context = DemoContext(out=out, prefix=prefix, full=full, rng_seed=rng_seed)
    error = None
    begin = time.perf_counter()
    try:
        with _one_thread():
            view.run(context)
    except Exception as failure:  # whatever a view raises belongs in the report
        error = _short_traceback(failure)
    seconds = time.perf_counter() - begin
    return Outcome(view, tuple(context.blocks), seconds, None if full else BUDGET, error)


def _short_traceback(failure: Exception) -> str:
    """Write the traceback below this module, with file names instead of machine paths."""
    frames = traceback.extract_tb(failure.__traceback__)[1:]
    lines = [f"  {Path(f.filename).name}, line {f.lineno}, in {f.name}: {f.line}" for f in frames]
    return "\n".join([*lines, *traceback.format_exception_only(failure)]).rstrip()

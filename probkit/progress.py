"""A progress bar for long runs: in terminals and Jupyter, silent everywhere else."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from probkit.sampler import Info

__all__ = ["Progress", "interactive", "track"]

T = TypeVar("T")


def interactive() -> bool:
    """Tell whether somebody watches: stderr is a terminal, or the code runs inside Jupyter.

    The environment variable ``PROBKIT_PROGRESS=0`` makes the answer False everywhere.
    """
    if os.environ.get("PROBKIT_PROGRESS") == "0":
        return False
    if "IPython" in sys.modules:
        shell = sys.modules["IPython"].get_ipython()
        if type(shell).__name__ == "ZMQInteractiveShell":
            return True
    if os.environ.get("TERM") == "dumb":
        return False
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """Show the steps of a run as a bar, one line for each label.

    An object of this class is a callback: it is called with an :class:`~probkit.sampler.Info`
    after each step and never asks to stop. The line shows the label, the steps, the sampler's
    statistics, and the time gone and left; where the number of steps is unknown it shows a
    spinner. A line goes away when its run is done, and all of them on :meth:`close`, which
    whoever drives the run calls when it ends in any other way.

    Args:
        show: True or False to force it; None shows only where :func:`interactive` holds.
        refresh_per_second: How often the lines are drawn again.
        console: Where to draw; stderr by default.
        delay: Seconds that a run must have lasted before its line appears.

    Example:
        >>> from types import SimpleNamespace
        >>> progress = Progress(show=False)
        >>> info = SimpleNamespace(step=1, total=10, kept=0, seconds=2.0, stats={"loss": 3.5},
        ...                        done=False, label="SVI")
        >>> progress(info)      # silent: nothing is drawn, and the run is not stopped
        >>> progress.close()
    """

    def __init__(
        self,
        show: bool | None = None,
        refresh_per_second: float = 4,
        *,
        console: Console | None = None,
        delay: float = 0.5,
    ) -> None:
        self._show = interactive() if show is None else bool(show)
        self._refresh = refresh_per_second
        self._console = console
        self._delay = delay
        self._bars: RichProgress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, info: Info) -> None:
        """Draw the state of one run.

        Args:
            info: What the run reports after a step.
        """
        if not self._show:
            return
        if info.done:
            self._remove(info.label)
            return
        if info.seconds < self._delay:
            return
        if self._bars is None:
            self._bars = self._start()
            if self._bars is None:
                return
        facts: dict[str, Any] = {
            "total": info.total,
            "completed": info.step,
            "steps": _steps(info.step, info.total),
            "stats": _compact(info.stats),
        }
        if info.label in self._tasks:
            self._bars.update(self._tasks[info.label], **facts)
        else:
            self._tasks[info.label] = self._bars.add_task(info.label, **facts)

    def close(self) -> None:
        """Remove all lines and give the terminal back. Calling it again does nothing."""
        bars, self._bars = self._bars, None
        self._tasks.clear()
        if bars is not None:
            bars.stop()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _remove(self, label: str) -> None:
        task = self._tasks.pop(label, None)
        if self._bars is None or task is None:
            return
        if self._tasks:
            self._bars.remove_task(task)
        else:
            self.close()

    def _start(self) -> RichProgress | None:
        with _same_random_stream():
            from rich.console import Console
            from rich.errors import LiveError
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress
            from rich.progress import TimeRemainingColumn as Remaining

        bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[steps]}", markup=False),
            TextColumn("{task.fields[stats]}", markup=False, style="dim"),
            TimeElapsedColumn(),
            Remaining(),
            console=self._console or Console(stderr=True),
            refresh_per_second=self._refresh,
            transient=True,
        )
        try:
            bars.start()
        except LiveError:  # another display holds this console: leave it in peace
            self._show = False
            return None
        return bars


@contextmanager
def _same_random_stream() -> Iterator[None]:
    """Restore Python's random stream, from which the first import of rich draws."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _steps(step: int, total: int | None) -> str:
    return str(step) if total is None else f"{step}/{total}"


def _compact(stats: Mapping[str, float], most: int = 4) -> str:
    """Write the first few statistics on one line, each to four digits."""
    return "  ".join(f"{name} {value:.4g}" for name, value in list(stats.items())[:most])


def track(items: Iterable[T], description: str = "working") -> Iterator[T]:
    """Iterate with a bar where :func:`interactive` holds, and just iterate elsewhere.

    Args:
        items: What to iterate over.
        description: What the bar says.

    Example:
        >>> list(track(range(3), "counting"))
        [0, 1, 2]
    """
    if not interactive():
        yield from items
        return
    with _same_random_stream():
        from rich.console import Console
        from rich.progress import track as rich_track

    yield from rich_track(items, description, console=Console(stderr=True), transient=True)

"""The progress bar: where it shows, what it says, and that it leaves nothing behind."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from probkit.progress import Progress, interactive
from probkit.sampler import Info


def info(step=5, total=10, *, seconds=1.0, stats=None, done=False, label="SVI, Normal"):
    return Info(
        step=step, total=total, kept=0, seconds=seconds, stats=stats or {}, done=done, label=label
    )


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)


def alive_since(before, seconds=5.0):
    """Threads started after ``before`` that still run once they had time to see their end."""
    until = time.monotonic() + seconds
    while (left := set(threading.enumerate()) - before) and time.monotonic() < until:
        time.sleep(0.01)
    return left


def shown(screen):
    return screen.file.getvalue()


def test_line_says_label_steps_and_statistics(screen):
    with Progress(show=True, console=screen) as progress:
        assert progress(info(stats={"loss": 123.456789, "accept": 0.8})) is None
    assert "SVI, Normal" in shown(screen)
    assert "5/10" in shown(screen)
    assert "loss 123.5  accept 0.8" in shown(screen)


def test_unknown_total_shows_the_steps_alone(screen):
    with Progress(show=True, console=screen) as progress:
        progress(info(step=7, total=None))
    assert "SVI, Normal" in shown(screen)
    assert " 7 " in shown(screen) and "7/" not in shown(screen)


def test_short_runs_stay_silent(screen):
    progress = Progress(show=True, console=screen)
    progress(info(seconds=0.4))
    progress(info(step=10, seconds=0.45, done=True))
    assert shown(screen) == ""


def test_markup_in_labels_is_not_interpreted(screen):
    with Progress(show=True, console=screen) as progress:
        progress(info(label="[red]model[/red]"))
    assert "[red]model[/red]" in shown(screen)


def test_done_removes_the_line_and_stops_the_thread(screen):
    before = set(threading.enumerate())
    progress = Progress(show=True, console=screen)
    progress(info())
    assert set(threading.enumerate()) - before
    progress(info(step=10, done=True))
    assert not alive_since(before)
    # the cursor is shown again, and the line was erased
    assert "\x1b[?25h" in shown(screen) and "\x1b[2K" in shown(screen)


def test_nested_runs_have_a_line_each(screen):
    before = set(threading.enumerate())
    progress = Progress(show=True, console=screen)
    progress(info(label="outer"))
    progress(info(label="inner"))
    progress(info(label="inner", done=True))
    assert set(threading.enumerate()) - before  # the outer line is still there
    progress(info(step=6, label="outer"))
    progress(info(step=10, label="outer", done=True))
    assert "outer" in shown(screen) and "inner" in shown(screen) and "6/10" in shown(screen)


def test_exception_gives_the_terminal_back(screen):
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="boom"), Progress(show=True, console=screen) as progress:
        progress(info())
        raise ValueError("boom")
    assert not alive_since(before)
    progress.close()  # again: nothing happens


def test_can_be_used_again_after_the_end(screen):
    progress = Progress(show=True, console=screen)
    progress(info(label="first"))
    progress(info(label="first", done=True))
    progress(info(label="second"))
    progress.close()
    assert "second" in shown(screen)


def test_silent_where_nobody_watches(capsys, monkeypatch):
    monkeypatch.delenv("PROBKIT_PROGRESS", raising=False)
    assert not interactive()  # pytest captures stderr
    progress = Progress()
    progress(info())
    progress.close()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environment", "answer"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"PROBKIT_PROGRESS": "0"}, False)],
)
def test_terminal_and_environment_decide(monkeypatch, environment, answer):
    monkeypatch.delenv("PROBKIT_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert interactive() is answer


def test_rich_is_imported_only_when_a_bar_is_drawn():
    code = (
        "import sys\n"
        "before = 'rich' in sys.modules\n"
        "from probkit.progress import Progress\n"
        "Progress()\n"
        "sys.exit(not before and 'rich.progress' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_drawing_leaves_the_random_stream_alone():
    code = (
        "import random, sys, types\n"
        "from probkit.progress import Progress\n"
        "info = dict(step=1, total=9, kept=0, seconds=9.0, stats={}, done=False, label='x')\n"
        "before = random.getstate()\n"
        "with Progress(show=True) as progress: progress(types.SimpleNamespace(**info))\n"
        "assert 'rich.progress' in sys.modules\n"
        "sys.exit(random.getstate() != before)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Tables, numbers and pictures of the report."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from probkit import plots
from probkit.demo import DemoContext, DemoView, run_views, write_report
from probkit.demo.report import format_number
from probkit.errors import DataError


def page_of(tmp_path, run):
    outcomes = run_views([DemoView("toy", "View", run)], tmp_path)
    assert outcomes[0].error is None, outcomes[0].error
    return write_report(outcomes, tmp_path).read_text()


@given(st.floats(min_value=-1e300, max_value=1e300))
def test_number_keeps_four_digits(value):
    shown = float(format_number(value))
    assert abs(shown - value) <= max(6e-4 * abs(value), 1e-320)


@pytest.mark.parametrize(
    ("value", "text"),
    [(np.float32(0.5), "0.5"), (np.int64(3), "3"), (True, "True"), (float("inf"), "inf")],
)
def test_number_forms(value, text):
    assert format_number(value) == text


def test_index_is_shown_when_it_says_something(tmp_path):
    def run(ctx):
        ctx.table(pd.DataFrame({"rmse": [1.0]}, index=["plain"]), "strings")
        ctx.table(pd.DataFrame({"rmse": [2.0]}), "numbers only")
        named = pd.DataFrame({"n": [9], "rmse": [3.0]}).set_index("n")
        ctx.table(named, "named")

    page = page_of(tmp_path, run)
    assert '<td>plain</td><td class="number">1</td>' in page
    assert '<tr><td class="number">2</td></tr>' in page
    assert '<td class="number">9</td><td class="number">3</td>' in page


def test_table_is_copied_when_it_is_added(tmp_path):
    frame = pd.DataFrame({"value": [41]})

    def run(ctx):
        ctx.table(frame, "now")
        frame["value"] = 42

    assert '<td class="number">41</td>' in page_of(tmp_path, run)


def test_html_in_cells_and_captions_is_escaped(tmp_path):
    def run(ctx):
        ctx.table(pd.DataFrame({"<i>": ["<b>x</b>"]}), "a < b")
        ctx.note("<u>")

    page = page_of(tmp_path, run)
    assert "&lt;b&gt;x&lt;/b&gt;" in page and "a &lt; b" in page and "<u>" not in page


def test_one_name_for_two_files_is_refused(tmp_path):
    ctx = DemoContext(out=tmp_path, prefix="toy")
    ctx.figure(plots.figure()[0], "same", "first")
    with pytest.raises(DataError, match="expected a name of its own"):
        ctx.figure(plots.figure()[0], "same", "second")


def test_figures_leave_no_global_state(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    ctx = DemoContext(out=tmp_path, prefix="toy")
    fig, axes = plots.figure()
    axes[0, 0].plot([0, 1])
    ctx.figure(fig, "line", "a line")
    assert dict(matplotlib.rcParams) == before


def test_pyplot_figures_are_closed(tmp_path):
    # in a process of its own, since pyplot sets a back end for good
    code = (
        "import pathlib, sys, matplotlib; matplotlib.use('agg')\n"
        "from matplotlib import pyplot\n"
        "from probkit.demo import DemoContext\n"
        "fig, _ = pyplot.subplots()\n"
        "DemoContext(out=pathlib.Path('.'), prefix='toy').figure(fig, 'line', 'a line')\n"
        "sys.exit(len(pyplot.get_fignums()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert (tmp_path / "toy-line.png").exists()


def test_track_is_plain_iteration_off_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PROBKIT_PROGRESS", "0")
    ctx = DemoContext(out=tmp_path, prefix="toy")
    assert list(ctx.track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_old_page_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    old = page_of(tmp_path, lambda ctx: ctx.text("old"))

    def broken():
        raise RuntimeError("no environment")

    monkeypatch.setattr(sys.modules["probkit.demo.report"], "environment", broken)
    with pytest.raises(RuntimeError):
        write_report([], tmp_path)
    assert (tmp_path / "report.html").read_text() == old
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]

"""Each tutorial runs in a process of its own and arrives at the values written beside it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "notebooks" / "run.py"
TUTORIALS = sorted(p for p in RUN.parent.glob("*.py") if p != RUN)

pytestmark = pytest.mark.slow


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_tutorial_arrives_at_its_values(path):
    done = run(path)
    assert done.returncode == 0, done.stdout + done.stderr


TINY = """\
# %% [markdown]
# # A mean

# %%
import torch

y = torch.arange(4.0)
mean = y.mean()
low_high = y.aminmax()
y
"""
RIGHT = """{
 "mean": {"value": 1.5, "tolerance": 0, "reason": "exact in binary"},
 "low_high": {"value": [0, 3], "tolerance": 0, "reason": "exact in binary"}
}"""


@pytest.fixture
def tiny(tmp_path):
    def write(source=TINY, expected=RIGHT):
        path = tmp_path / "tiny.py"
        path.write_text(source)
        if expected is not None:
            path.with_suffix(".expected.json").write_text(expected)
        return path

    return write


def test_executed_notebook_is_written(tiny, tmp_path):
    import nbformat

    done = run(tiny(), "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    notebook = nbformat.read(tmp_path / "out" / "tiny.ipynb", as_version=4)
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code"]
    assert "tensor([0., 1., 2., 3.])" in notebook.cells[1].outputs[0]["data"]["text/plain"]


@pytest.mark.parametrize(
    ("source", "expected", "message"),
    [
        (
            TINY,
            RIGHT.replace("1.5", "1.6"),
            "mean: expected 1.6 within 0 (exact in binary), got 1.5",
        ),
        (TINY, RIGHT.replace("[0, 3]", "[0]"), "low_high: expected [0] within 0"),
        (TINY, RIGHT.replace('"mean"', '"average"'), "average: the tutorial has no variable"),
        (TINY, RIGHT.replace("exact in binary", ""), "mean needs value, tolerance and reason"),
        (TINY, None, "expected tiny.expected.json beside tiny.py"),
        (TINY + "raise RuntimeError('boom')\n", RIGHT, "RuntimeError: boom"),
        (TINY + "mean = mean * float('nan')\n", RIGHT, "got nan"),
    ],
)
def test_what_is_wrong_is_told(tiny, source, expected, message):
    done = run(tiny(source, expected))
    assert done.returncode == 1
    assert message in done.stdout.replace("NaN", "nan")


def test_long_tutorial_fails(tiny):
    done = run(tiny(), "--limit", "0.01")
    assert done.returncode == 1
    assert "s of processor time, expected at most 0 s" in done.stdout


def test_warnings_beside_the_report_do_not_hide_it():
    spec = importlib.util.spec_from_file_location("notebooks_run", RUN)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks its own module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    printed = [
        {"name": "stdout", "text": '{"values": {"a": 1}, '},
        {"name": "stderr", "text": "a warning of the kernel\n"},
        {"name": "stdout", "text": '"seconds": 2.0}\n'},
        {"name": "stderr", "text": "another\n"},
    ]
    assert module.reported(printed) == {"values": {"a": 1}, "seconds": 2.0}

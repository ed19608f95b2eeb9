"""Execute the tutorials, each in a process of its own, and check the values they arrive at.

A tutorial is a file ``notebooks/<name>.py`` in jupytext's percent format, its only source. Beside
it lies ``<name>.expected.json``: for each checked variable its value, a tolerance and the reason
for that tolerance::

    {"rmse": {"value": 54.1, "tolerance": 0.5, "reason": "two standard errors over the splits"}}

Usage: ``python notebooks/run.py [FILE ...] [--out FOLDER]``. The exit status is 1 when a
tutorial fails, takes too long, or arrives at another value.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import numpy as np
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

HERE = Path(__file__).resolve().parent

#: Processor seconds that a tutorial may take: not wall time, which a busy machine stretches.
#: The aim is 45; beside other work some have taken up to 50.
LIMIT = 60.0
#: Wall seconds after which a cell counts as stuck.
STUCK = 600

REPORT = """
import json as _json, time as _time
def _plain(value):
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
_names = _json.loads({names!r})
_values = {{name: _plain(globals()[name]) for name in _names if name in globals()}}
print(_json.dumps({{"values": _values, "seconds": _time.process_time()}}))
"""


@dataclass(frozen=True)
class Run:
    """What came of one tutorial: the executed notebook, checked values, processor seconds."""

    notebook: nbformat.NotebookNode
    values: dict[str, Any]
    seconds: float


def tutorials(folder: Path = HERE) -> list[Path]:
    """Paths of the tutorials of a folder, "start here" first, then by name."""
    found = [p for p in folder.glob("*.py") if p.name != Path(__file__).name]
    return sorted(found, key=lambda p: (p.stem != "start_here", p.stem))


def expectations(path: Path) -> dict[str, dict[str, Any]]:
    """Read what a tutorial must arrive at.

    Raises:
        ValueError: There is no such file, it is empty, or an entry lacks one of its three parts.
    """
    file = path.with_suffix(".expected.json")
    if not file.exists():
        raise ValueError(f"expected {file.name} beside {path.name}, with the values to check")
    entries = json.loads(file.read_text(encoding="utf-8"))
    if not entries:
        raise ValueError(f"{file.name}: expected at least one value to check, got none")
    for name, entry in entries.items():
        if set(entry) != {"value", "tolerance", "reason"} or not str(entry["reason"]).strip():
            raise ValueError(f"{file.name}: {name} needs value, tolerance and reason, got {entry}")
    return entries


def execute(path: Path, names: list[str]) -> Run:
    """Run one tutorial in a new kernel, in an empty folder, and read variables off its end."""
    notebook = jupytext.read(path, fmt="py:percent")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT.format(names=json.dumps(names))))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PROBKIT_PROGRESS": "0"}
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook, timeout=STUCK, resources={"metadata": {"path": folder}}, kernel_name="python3"
        )
        client.execute(env=environment)
    told = reported(notebook.cells.pop().outputs)
    return Run(notebook, told["values"], told["seconds"])


def reported(outputs: list[Any]) -> dict[str, Any]:
    """Read the report off the outputs of its cell; warnings may stand beside it, in any order."""
    printed = "".join(o["text"] for o in outputs if o.get("name") == "stdout")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def differences(expected: dict[str, dict[str, Any]], found: dict[str, Any]) -> list[str]:
    """One line for each value that is absent or not where it should be."""
    lines = []
    for name, entry in expected.items():
        if name not in found:
            lines.append(f"{name}: the tutorial has no variable of this name")
        elif not _close(entry["value"], found[name], entry["tolerance"]):
            lines.append(
                f"{name}: expected {entry['value']} within {entry['tolerance']} "
                f"({entry['reason']}), got {found[name]}"
            )
    return lines


def _close(expected: Any, found: Any, tolerance: float) -> bool:
    if isinstance(expected, str | bool) or expected is None:
        return expected == found
    try:
        wanted, got = np.asarray(expected, dtype=float), np.asarray(found, dtype=float)
    except (TypeError, ValueError):
        return False
    return wanted.shape == got.shape and np.allclose(got, wanted, rtol=0, atol=tolerance)


def check(path: Path, out: Path | None = None, limit: float = LIMIT) -> tuple[list[str], str]:
    """Run one tutorial and compare; write the executed notebook if a folder is given.

    Returns:
        What is wrong, one line each, and how long it took in words.
    """
    begin = time.perf_counter()
    try:
        expected = expectations(path)
        run = execute(path, list(expected))
    except (ValueError, CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return [re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()], ""  # without colours
    wrong = differences(expected, run.values)
    if run.seconds > limit:
        wrong.append(f"took {run.seconds:.1f} s of processor time, expected at most {limit:.0f} s")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        nbformat.write(run.notebook, out / f"{path.stem}.ipynb")
    return wrong, f"{run.seconds:.1f} s processor, {time.perf_counter() - begin:.1f} s wall"


def main() -> int:
    """Run the tutorials named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description="Execute the tutorials and check their values.")
    parser.add_argument("files", nargs="*", type=Path, help="tutorials; all of them by default")
    parser.add_argument("--out", type=Path, help="folder for the executed notebooks")
    parser.add_argument("--limit", type=float, default=LIMIT, help="processor seconds for each")
    options = parser.parse_args()
    failed = 0
    for path in options.files or tutorials():
        wrong, times = check(path, options.out, options.limit)
        failed += bool(wrong)
        print(f"{path.stem}: {'FAILED' if wrong else 'ok'} {times}".rstrip(), flush=True)
        for line in wrong:
            print(f"  {line}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

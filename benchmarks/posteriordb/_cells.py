"""One cell: a case in one form, a file of its own, so that an hour's run is resumed where it ended.

Remove a file to have its case run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.posteriordb._agreement import Row
from benchmarks.posteriordb._run import Form, Report, run_case

__all__ = ["FOLDER", "load", "report_of", "save"]

FOLDER = Path(__file__).resolve().parents[1] / "results" / "posteriordb"


def report_of(name: str, form: Form, stored: Mapping[str, Any], **options: Any) -> Report:
    """Return the stored report of a case, or run it and store it; arguments of ``run_case``."""
    path = FOLDER / f"{name}-{form}.json"
    if path.exists():
        return load(path)
    report = run_case(name, form, stored, **options)
    save(report, path)
    return report


def save(report: Report, path: Path) -> None:
    """Write a report in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = {**report._asdict(), "rows": [row._asdict() for row in report.rows]}
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def load(path: Path) -> Report:
    """Read a report."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    return Report(**{**tree, "rows": [Row(**row) for row in tree["rows"]]})

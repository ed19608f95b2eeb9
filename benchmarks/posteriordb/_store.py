"""Reading the stored data and reference statistics."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness.spec import Unavailable

__all__ = ["read", "stored"]

Stored = Mapping[str, Any]


def read(path: Path) -> Stored:
    """Read one file: name, model, data and reference {parameter: {statistic: value}}."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        found: Stored = json.load(file)
    return found


def stored(case: str) -> Stored:
    """Return the data and reference of a case.

    Raises:
        Unavailable: ``PROBKIT_DATA`` is not set, or holds no such file.
    """
    root = os.environ.get("PROBKIT_DATA")
    if not root:
        raise Unavailable("PROBKIT_DATA does not name the folder that holds posteriordb/")
    paths = sorted((Path(root) / "posteriordb").glob(f"{case}-*.json.gz"))
    if len(paths) != 1:
        raise Unavailable(f"PROBKIT_DATA holds no file posteriordb/{case}-*.json.gz")
    return read(paths[0])

"""Stored cells: one file each, written when it is done, so that a long run is resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "load_all", "path_of", "save"]

FOLDER = Path(__file__).resolve().parents[1] / "results" / "language"


def path_of(table: str, name: str, folder: Path = FOLDER) -> Path:
    """Return the file of a cell.

    Example:
        >>> path_of("sums", "007").name
        'sums-007.json'
    """
    return folder / f"{table}-{name}.json"


def save(table: str, name: str, content: Any, folder: Path = FOLDER) -> Path:
    """Write a cell in one go."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(table, name, folder)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def load_all(table: str, folder: Path = FOLDER) -> list[Any]:
    """Return all cells of a table, by name."""
    paths = sorted(folder.glob(f"{table}-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]

"""One self-contained page from the outcomes of the views."""

from __future__ import annotations

import base64
import datetime
import importlib.resources
import math
import numbers
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probkit.demo.context import Block, Download, Note, Picture, Table, Text, slug
from probkit.demo.runner import Outcome
from probkit.info import environment

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["format_number", "write_report"]


def write_report(
    outcomes: Iterable[Outcome], out: Path, *, full: bool = False, rng_seed: int = 0
) -> Path:
    """Write ``report.html`` into a folder, pictures inside the page.

    Args:
        outcomes: What came of the views, in the order of the page.
        out: Folder of the report.
        full: Whether the views ran in their long form.
        rng_seed: Seed they were given.

    Returns:
        Path of the page. It is written in one go: a reader sees the old page or the new one.
    """
    from jinja2 import Environment, StrictUndefined

    template = importlib.resources.files("probkit.demo").joinpath("report.html.j2")
    engine = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    sections = [_section(outcome) for outcome in outcomes]
    page = engine.from_string(template.read_text(encoding="utf-8")).render(
        sections=sections,
        seconds=sum(section["seconds"] for section in sections),
        failed=sum(section["error"] is not None for section in sections),
        full=full,
        seed=rng_seed,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        environment=environment(),
    )
    return _write(page, out / "report.html")


def format_number(value: Any, digits: int = 4) -> str:
    """Write a table cell: numbers to some significant digits, anything else as it is.

    Example:
        >>> format_number(0.123456), format_number(1234567.8), format_number(12), format_number("a")
        ('0.1235', '1234568', '12', 'a')
        >>> format_number(float("nan")), format_number(1.2e-7)
        ('–', '1.2e-07')
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return str(value)
    if isinstance(value, numbers.Integral):
        return str(int(value))
    number = float(value)
    if math.isnan(number):
        return "–"
    if 10 ** (digits - 1) <= abs(number) < 1e9:
        return f"{number:.0f}"
    return f"{number:.{digits}g}"


def _section(outcome: Outcome) -> dict[str, Any]:
    view = outcome.view
    return {
        "anchor": f"{slug(view.family)}-{slug(view.title)}",
        "family": view.family,
        "title": view.title,
        "seconds": outcome.seconds,
        "budget": outcome.budget,
        "over_budget": outcome.over_budget,
        "error": outcome.error,
        "blocks": [_block(block) for block in outcome.blocks],
    }


def _block(block: Block) -> dict[str, Any]:
    match block:
        case Text(source):
            return {"kind": "text", "html": _markdown(source)}
        case Note(message):
            return {"kind": "note", "message": message}
        case Picture(path, caption):
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            return {"kind": "picture", "data": data, "caption": caption}
        case Download(path, caption):
            return {"kind": "download", "name": path.name, "caption": caption}
        case Table(frame, caption, digits):
            return {"kind": "table", "caption": caption, **_cells(frame, digits)}


def _cells(frame: pd.DataFrame, digits: int) -> dict[str, Any]:
    if _index_tells(frame.index):
        frame = frame.reset_index(names=["" if n is None else str(n) for n in frame.index.names])
    columns = [str(column) for column in frame.columns]
    values: Sequence[Sequence[Any]] = list(frame.itertuples(index=False, name=None))
    rows = [
        [
            {
                "text": format_number(value, digits),
                "number": isinstance(value, numbers.Real) and not isinstance(value, bool),
            }
            for value in row
        ]
        for row in values
    ]
    numeric = [bool(rows) and all(row[j]["number"] for row in rows) for j in range(len(columns))]
    return {"columns": list(zip(columns, numeric, strict=True)), "rows": rows}


def _index_tells(index: pd.Index) -> bool:
    """Whether an index says more than the number of the row."""
    named = any(name is not None for name in index.names)
    return named or not all(isinstance(label, numbers.Integral) for label in index)


def _markdown(source: str) -> Any:
    from markdown_it import MarkdownIt
    from markupsafe import Markup

    return Markup(MarkdownIt("commonmark", {"html": False}).enable("table").render(source))


def _write(page: str, path: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".report-", suffix=".html")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(page)
    os.chmod(name, 0o644)
    os.replace(name, path)
    return path

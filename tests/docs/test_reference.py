"""What the site makes of docstrings and of ``__all__``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import botorch  # noqa: F401  (its import changes settings of GPyTorch: before the tests)
import pytest
import sklearn.metrics  # noqa: F401  (its import draws a random number)

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("docs_reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("docstring", "escaped"),
    [
        ("the norm |x| of *it", r"the norm \|x\| of \*it"),
        ("site f_ and a_b", r"site f\_ and a_b"),
        ("`a|b*`, ``c|*`` and :math:`|x|`", "`a|b*`, ``c|*`` and :math:`|x|`"),
        ("`over\ntwo|lines` |", "`over\ntwo|lines` \\|"),
        ("**strong** words", "**strong** words"),
        ("* item | one", r"* item \| one"),
        (">>> a | b\nc*\n\nend *", ">>> a | b\nc*\n\nend \\*"),
        ("as::\n\n    a | b\n\n    c*\n\nend *", "as::\n\n    a | b\n\n    c*\n\nend \\*"),
        (".. math::\n\n   |x|_2 *\n\nend *", ".. math::\n\n   |x|_2 *\n\nend \\*"),
        (r"already \* done", r"already \* done"),
    ],
)
def test_marks_are_escaped_outside_code_only(reference, docstring, escaped):
    assert reference.escape(docstring) == escaped


def test_every_public_name_is_on_exactly_one_page(reference, tmp_path):
    import probkit.errors
    import probkit.plots

    reference.write_api(tmp_path)
    pages = {p.stem: p.read_text().splitlines() for p in tmp_path.glob("*.rst")}
    lines = [line for page in pages.values() for line in page if line.startswith(".. auto")]
    assert len(lines) == len(set(lines))
    for module in (probkit.errors, probkit.plots):
        for name in module.__all__:
            assert sum(line.endswith(f".{name}") for line in lines) == 1, name
    assert set(pages["index"][6:]) - {""} == {f"   {name}" for name in pages if name != "index"}


def test_old_pages_go_and_same_pages_stay(reference, tmp_path):
    reference.write_api(tmp_path)
    (tmp_path / "probkit.gone.rst").write_text("old")
    stamp = (tmp_path / "index.rst").stat().st_mtime_ns
    reference.write_api(tmp_path)
    assert not (tmp_path / "probkit.gone.rst").exists()
    assert (tmp_path / "index.rst").stat().st_mtime_ns == stamp


def test_tutorials_begin_with_start_here(reference, tmp_path):
    reference.write_tutorials(tmp_path)
    assert "make notebooks" in (tmp_path / "index.md").read_text()
    for name in ("arphmm", "start_here", "zoo"):
        (tmp_path / f"{name}.ipynb").write_text("{}")
    reference.write_tutorials(tmp_path)
    listed = (tmp_path / "index.md").read_text().split("```")[1].splitlines()[1:]
    assert listed == ["start_here", "arphmm", "zoo"]

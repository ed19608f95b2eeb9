"""Finding and ordering views."""

from __future__ import annotations

import sys

import pytest

from probkit.demo import DemoView, Registry
from probkit.demo.registry import REGISTRY, discover
from probkit.errors import DataError


def nothing(ctx):
    return None


def another(ctx):
    return None


def test_order_then_family_then_title():
    registry = Registry()
    for family, title, order in [("b", "x", 0), ("a", "y", 0), ("c", "z", -1), ("a", "w", 0)]:
        registry.add(DemoView(family, title, nothing, order))
    assert [v.family + v.title for v in registry] == ["cz", "aw", "ay", "bx"]
    assert registry.families() == ["c", "a", "b"]


def test_same_function_may_register_again():
    registry = Registry()
    registry.add(DemoView("a", "x", nothing))
    registry.add(DemoView("a", "x", nothing, order=4))
    assert [v.order for v in registry] == [4]


def test_two_functions_under_one_title_are_refused():
    registry = Registry()
    registry.add(DemoView("a", "x", nothing))
    with pytest.raises(DataError, match="expected a title of its own for each view of 'a'"):
        registry.add(DemoView("a", "x", another))


def test_discovery_imports_demo_modules_only(tmp_path, monkeypatch):
    package = tmp_path / "zoo"
    (package / "cats").mkdir(parents=True)
    (package / "dogs").mkdir()
    for folder in (package, package / "cats", package / "dogs"):
        (folder / "__init__.py").write_text("")
    view = (
        "from probkit.demo import DemoView, register_view\n"
        "def run(ctx): ctx.text('hello')\n"
        "register_view(DemoView('{0}', 'Hello', run))\n"
    )
    (package / "birds_demo.py").write_text(view.format("birds"))
    (package / "birds.py").write_text("raise RuntimeError('must not be imported')")
    (package / "cats" / "demo.py").write_text(view.format("cats"))
    (package / "cats" / "claws.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(REGISTRY, "_views", {})
    try:
        assert [v.family for v in discover(["zoo", "no_such_package"])] == ["birds", "cats"]
        assert "zoo.dogs" not in sys.modules
    finally:
        for name in [m for m in sys.modules if m.partition(".")[0] == "zoo"]:
            del sys.modules[name]

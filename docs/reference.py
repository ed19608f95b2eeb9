"""Pages that follow from the code: the API from each ``__all__``, and the list of tutorials."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

#: What users import; everything below these that is public and not shown yet follows.
FIRST = ("probkit", "probkit.models", "probkit.inference", "probkit.bo", "probkit.kernels")
#: Modules without an interface of their own.
LEFT_OUT = re.compile(r"__main__|(^|[._])demo$|probkit\.cli|probkit\._|\._")

_CODE = re.compile(
    r"""
      (?P<keep>
          ^[ \t]*>>>.*\n?(?:^[ \t]*\S.*\n?)*                         # doctests
        | ::[ \t]*\n(?:[ \t]*\n)+(?P<in>[ \t]+)\S.*\n?
          (?:(?:(?P=in).*|[ \t]*)(?:\n|\Z))*?(?=^(?!(?P=in))[ \t]*\S|\Z)  # literal blocks
        | ^(?P<at>[ \t]*)\.\.[ ].*(?:\n(?:(?P=at)[ \t]+.*|[ \t]*))*  # directives
        | ``.+?`` | `[^`]+`                                          # code, roles
        | ^[ \t]*[*][ ]                                              # items of a list
        | (?<![\w*])[*]{2}[^*\s](?:[^*\n]*[^*\s])?[*]{2}(?!\w)       # strong
        | \\.                                                        # escaped already
      )
    | (?P<mark> [*|] | (?<=\w)_(?!\w) )
    """,
    re.VERBOSE | re.MULTILINE,
)


def escape(docstring: str) -> str:
    """Escape what reStructuredText would read as markup outside code.

    Docstrings here use code, doctests, lists and Google sections; a bar or an asterisk in a
    sentence is just that.

    Example:
        >>> print(escape("the norm |x| of `a|b`, sites_ and *args"))
        the norm \\|x\\| of `a|b`, sites\\_ and \\*args
    """
    return _CODE.sub(lambda m: f"\\{m['mark']}" if m["mark"] else m["keep"], docstring)


def shield(app, what, name, obj, options, lines: list[str]) -> None:
    """Apply :func:`escape` to a docstring that Sphinx is about to read."""
    lines[:] = escape("\n".join(lines)).split("\n")


def public_modules() -> list[ModuleType]:
    """Importable modules with an ``__all__``, what users import first."""
    import probkit

    found = {m.name for m in pkgutil.walk_packages(probkit.__path__, "probkit.")} | {"probkit"}
    names = [n for n in FIRST if n in found]
    names += sorted(n for n in found - set(FIRST) if not LEFT_OUT.search(n))
    modules = [importlib.import_module(name) for name in names]
    return [module for module in modules if getattr(module, "__all__", None)]


def write_api(folder: Path) -> None:
    """Write one page for each module, and an index; each object is shown once, where first met.

    Files that would not change are left alone, so that a second build is fast.
    """
    folder.mkdir(exist_ok=True)
    shown: set[int] = set()
    pages = {}
    for module in public_modules():
        directives = [
            text for name in sorted(module.__all__) if (text := _directive(module, name, shown))
        ]
        if directives:
            pages[module.__name__] = _page(module, directives)
    toctree = "\n".join(f"   {name}" for name in pages)
    pages["index"] = f"API reference\n=============\n\n.. toctree::\n   :maxdepth: 1\n\n{toctree}\n"
    for old in folder.glob("*.rst"):
        if old.stem not in pages:
            old.unlink()
    for name, text in pages.items():
        _write(folder / f"{name}.rst", text)


def write_tutorials(folder: Path) -> None:
    """List the executed notebooks that lie in a folder, "start here" first."""
    folder.mkdir(exist_ok=True)
    names = sorted(
        (path.stem for path in folder.glob("*.ipynb")), key=lambda n: (n != "start_here", n)
    )
    listed = ["```{toctree}", *names, "```"] if names else ["`make notebooks` brings them here."]
    promise = (
        "Each tutorial is executed, and the values it arrives at are checked, before it is shown."
    )
    lines = ["# Tutorials", "", promise, "", *listed]
    _write(folder / "index.md", "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _directive(module: ModuleType, name: str, shown: set[int]) -> str:
    value = getattr(module, name)
    ours = (getattr(value, "__module__", None) or "").startswith("probkit")
    if inspect.ismodule(value) or (callable(value) and not ours):
        return ""  # packages have pages of their own, and foreign objects theirs elsewhere
    path = f"{module.__name__}.{name}"
    if inspect.isclass(value) or inspect.isroutine(value):
        if id(value) in shown:
            return ""
        shown.add(id(value))
        return f".. auto{'class' if inspect.isclass(value) else 'function'}:: {path}\n"
    return f".. autodata:: {path}\n   :no-value:\n"


def _page(module: ModuleType, directives: list[str]) -> str:
    title = module.__name__
    summary = escape(inspect.getdoc(module) or "")
    return "\n".join([title, "=" * len(title), "", summary, "", *directives])

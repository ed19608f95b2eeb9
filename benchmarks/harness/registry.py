"""Find the benchmark files and load what they declare."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

from benchmarks.harness.spec import Benchmark, Quality

__all__ = ["entries", "load", "module_of", "select"]

_ROOT = Path(__file__).resolve().parents[1]
_NOT_FAMILIES = {"harness", "envs", "results"}


def entries() -> list[str]:
    """Return the names ``family/name`` of all benchmark files, sorted.

    Example:
        >>> "core/import_time" in entries()
        True
    """
    files = (p for p in _ROOT.glob("*/*.py") if not p.name.startswith("_"))
    return sorted(f"{p.parent.name}/{p.stem}" for p in files if p.parent.name not in _NOT_FAMILIES)


def module_of(name: str) -> str:
    """Return the import name of the benchmark called ``family/name``.

    A name that already is an import name comes back unchanged.

    Example:
        >>> module_of("nngp/kernel")
        'benchmarks.nngp.kernel'
    """
    return f"benchmarks.{name.replace('/', '.')}" if "/" in name else name


def load(name: str) -> Benchmark | Quality:
    """Import one benchmark file and return its declaration.

    Raises:
        TypeError: The file sets no ``BENCHMARK``.
    """
    declared = getattr(importlib.import_module(module_of(name)), "BENCHMARK", None)
    if not isinstance(declared, Benchmark | Quality):
        raise TypeError(f"{name} must set BENCHMARK to a Benchmark or a Quality")
    return declared


def select(wanted: Iterable[str], known: list[str] | None = None) -> list[str]:
    """Return the entries that the words on the command line ask for; all without any.

    A word is a family (``nngp``) or an entry (``nngp/kernel``).

    Raises:
        KeyError: A word matches no entry.

    Example:
        >>> select(["nngp"], ["core/import_time", "nngp/kernel"])
        ['nngp/kernel']
    """
    known = entries() if known is None else known
    words = list(wanted)
    if not words:
        return known
    chosen: list[str] = []
    for word in words:
        found = [name for name in known if word == name or name.startswith(f"{word}/")]
        if not found:
            raise KeyError(f"no benchmark is called {word!r}; there are: {', '.join(known)}")
        chosen += [name for name in found if name not in chosen]
    return chosen

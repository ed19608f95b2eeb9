"""Which views there are, and how they are found."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from probkit.demo.context import DemoContext
from probkit.errors import DataError

__all__ = ["REGISTRY", "DemoView", "Registry", "discover", "register_view"]

#: Packages whose ``*_demo`` modules and ``<folder>/demo.py`` files hold views.
SEARCHED = ("probkit.models", "probkit.bo")


@dataclass(frozen=True)
class DemoView:
    """One part of the report: a title and the function that fills it.

    Attributes:
        family: Short name of the family, as typed after ``probkit demo``.
        title: Heading in the report, unique within the family.
        run: Called with a :class:`~probkit.demo.context.DemoContext`; imports what is heavy
            inside, so that listing the views stays fast.
        order: Place among all views, smallest first; ties keep family and title order.
    """

    family: str
    title: str
    run: Callable[[DemoContext], None]
    order: int = 0


class Registry:
    """The views known so far, in the order of the report.

    Example:
        >>> registry = Registry()
        >>> view = registry.add(DemoView("toy", "A picture", lambda ctx: None))
        >>> registry.families(), [v.title for v in registry.select(["toy"])]
        (['toy'], ['A picture'])
    """

    def __init__(self) -> None:
        self._views: dict[tuple[str, str], DemoView] = {}

    def __iter__(self) -> Iterator[DemoView]:
        return iter(sorted(self._views.values(), key=lambda v: (v.order, v.family, v.title)))

    def __len__(self) -> int:
        return len(self._views)

    def add(self, view: DemoView) -> DemoView:
        """Add one view.

        Args:
            view: The view; adding the same function again replaces it.

        Returns:
            The view.

        Raises:
            DataError: Another function has this family and title already.
        """
        key = (view.family, view.title)
        known = self._views.get(key)
        if known is not None and _origin(known) != _origin(view):
            raise DataError(
                f"expected a title of its own for each view of {view.family!r}, "
                f"got {view.title!r} from {_origin(known)} and from {_origin(view)}"
            )
        self._views[key] = view
        return view

    def families(self) -> list[str]:
        """Names of the families that have views, in the order of the report."""
        return list(dict.fromkeys(view.family for view in self))

    def select(self, families: Iterable[str] = ()) -> list[DemoView]:
        """Views of some families, or all of them.

        Args:
            families: Names of families; none means all.

        Raises:
            DataError: A family has no view.
        """
        wanted = list(families)
        unknown = [name for name in wanted if name not in self.families()]
        if unknown:
            known = ", ".join(self.families()) or "none"
            raise DataError(f"expected families with a demo ({known}), got {', '.join(unknown)}")
        return [view for view in self if not wanted or view.family in wanted]


#: The registry that ``register_view`` fills and ``probkit demo`` reads.
REGISTRY = Registry()


def register_view(view: DemoView) -> DemoView:
    """Add a view to the demo; meant for the module level of a ``*_demo`` module.

    Raises:
        DataError: Another function has this family and title already.
    """
    return REGISTRY.add(view)


def discover(packages: Iterable[str] = SEARCHED) -> Registry:
    """Import the demo modules below some packages, and return the views they registered.

    Found are modules named ``<package>.<name>_demo`` and ``<package>.<folder>.demo``. They are
    found by their files: nothing else below the packages is imported for the search.

    Args:
        packages: Dotted names of packages.

    Returns:
        The registry of all views.
    """
    for package in packages:
        for name in _demo_modules(package):
            importlib.import_module(name)
    return REGISTRY


def _demo_modules(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    names = []
    for info in pkgutil.iter_modules(folders):
        if not info.ispkg and info.name.endswith("_demo"):
            names.append(f"{package}.{info.name}")
        elif info.ispkg and any((Path(f) / info.name / "demo.py").is_file() for f in folders):
            names.append(f"{package}.{info.name}.demo")
    return sorted(names)


def _origin(view: DemoView) -> str:
    return f"{view.run.__module__}.{view.run.__qualname__}"

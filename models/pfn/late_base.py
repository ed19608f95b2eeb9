"""Classes whose base class lives in an optional package, imported when the first one is made."""

from __future__ import annotations

from typing import Any, Self

from probkit.extras import require

__all__ = ["LateBase"]


class LateBase:
    """A class that becomes a subclass of ``_module:_name`` when it is instantiated.

    So it can be imported, documented and subclassed without the package, and its instances are
    what the package asks for: ``isinstance`` holds for both classes.
    """

    _module: str
    _name: str
    _extra: str = "training"

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an instance that has the late base as well."""
        instance: Self = object.__new__(_bound(cls))
        return instance

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle by the public class: the bound one has no name to import."""
        public = next(c for c in type(self).__mro__ if "_late" not in c.__dict__)
        return _rebuild, (public, self.__dict__)


_BOUND: dict[type[Any], type[Any]] = {}


def _bound(cls: type[Any]) -> type[Any]:
    """``cls`` joined with its late base, made once."""
    if cls in _BOUND:
        return _BOUND[cls]
    base = getattr(require(cls._module, extra=cls._extra), cls._name)
    if issubclass(cls, base):
        return cls
    body = {"_late": True, "__module__": cls.__module__, "__doc__": cls.__doc__}
    _BOUND[cls] = type(cls.__name__, (cls, base), body)
    return _BOUND[cls]


def _rebuild(cls: type[LateBase], state: dict[str, Any]) -> LateBase:
    instance = object.__new__(_bound(cls))
    instance.__dict__.update(state)
    return instance

"""Fingerprints: short strings that agree when two runs are the same run.

A checkpoint is resumed only by a run of the same model, options, data and seed. What an object
*is* is read from its content (fields, tensors, source of functions and what they enclose), never
from addresses, caches or the order of sets, so the fingerprint agrees between processes. Global
variables that a function reads are not part of it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import types
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probkit.files import class_name, packer_of

__all__ = ["digest", "fingerprint"]

_PLAIN = bool | int | float | complex | str | bytes | np.generic | torch.dtype | torch.device
_MODULE_INTERNALS = frozenset(vars(torch.nn.Module()))


def fingerprint(
    model: Any, sampler: Any, guide: Any, data: Any, seed: int, chains: int
) -> dict[str, str]:
    """Describe a run by short strings that must agree for a checkpoint to be resumed."""
    import probkit

    return {
        "model": _mark(model),
        "sampler": _mark(sampler),
        "guide": _mark(guide),
        "data": digest(data),
        "seed": str(seed),
        "chains": str(chains),
        "probkit": probkit.__version__,
        "torch": str(torch.__version__),
    }


def _mark(value: Any) -> str:
    if value is None:
        return "none"
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{name} {digest(value)[:16]}"


def digest(value: Any) -> str:
    """Return a hash of the content of ``value``.

    Example:
        >>> digest({"x": torch.ones(2)}) == digest({"x": torch.ones(2)})
        True
        >>> digest({"x": torch.ones(2)}) == digest({"x": torch.zeros(2)})
        False
    """
    walk = _Walk()
    walk.feed(value)
    return walk.hasher.hexdigest()


class _Walk:
    """One pass over an object graph. Whether parts are shared does not matter; cycles are cut."""

    def __init__(self) -> None:
        self.hasher = hashlib.sha256()
        self.open: dict[int, int] = {}  # Objects being fed, outermost first.

    def text(self, text: str) -> None:
        self.hasher.update(f"{len(text)}:{text};".encode())

    def feed(self, value: Any) -> None:
        """Feed one value and everything it holds."""
        if value is None or isinstance(value, _PLAIN):
            self.text(f"{type(value).__name__} {value!r}")
        elif isinstance(value, enum.Enum):
            self.text(f"{class_name(value)} {value.name}")
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            self.text(f"array {value.shape} {value.dtype}")
            self.hasher.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, tuple | range):  # Equal ones may or may not be one object.
            self._items(value)
        elif id(value) in self.open:
            self.text(f"around {self.open[id(value)]}")
        else:
            self.open[id(value)] = len(self.open)
            self._object(value)
            del self.open[id(value)]

    def _tensor(self, value: Tensor) -> None:
        flat = value.detach().cpu()
        flat = flat if flat.layout == torch.strided else flat.to_dense()
        flat = flat.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        self.text(f"tensor {tuple(flat.shape)} {flat.dtype}")
        if flat.numel():
            self.hasher.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())

    def _object(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self.text(f"mapping {len(value)}")
            for key, item in value.items():
                self.feed(key)
                self.feed(item)
        elif isinstance(value, Set):
            self.text("set " + " ".join(sorted(digest(item) for item in value)))
        elif isinstance(value, Sequence | np.ndarray):
            self._items(value)
        elif isinstance(value, functools.partial):
            self.text("partial")
            self.feed([value.func, value.args, value.keywords])
        elif isinstance(value, types.ModuleType | type):
            self.text(getattr(value, "__qualname__", value.__name__))
            self.text(_source(value) if isinstance(value, type) else "module")
        elif inspect.isroutine(value):
            self._function(value)
        elif isinstance(value, types.CodeType):
            self.feed([value.co_code, value.co_names, value.co_consts])
        else:
            self.text(class_name(value))
            self.feed(_content(value))

    def _items(self, value: Any) -> None:
        self.text(f"{type(value).__name__} {len(value)}")
        for item in value:
            self.feed(item)

    def _function(self, value: Any) -> None:
        """Name, source (or code), defaults, what it encloses, and what it is bound to."""
        module = getattr(value, "__module__", "")
        self.text(f"{module}.{getattr(value, '__qualname__', value)}")
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, types.ModuleType):
            self.feed(owner)
        function = getattr(value, "__func__", value)
        code = getattr(function, "__code__", None)
        if code is None:
            return
        source = _source(function)
        self.feed(source or code)
        self.feed([function.__defaults__, function.__kwdefaults__])
        for cell in function.__closure__ or ():
            try:
                self.feed(cell.cell_contents)
            except ValueError:  # The cell is still empty.
                self.text("empty")


def _content(value: Any) -> Any:
    """What defines an object: its stored form, its fields, or what a copy would be made of."""
    packer = packer_of(type(value))
    if packer is not None:
        return packer.to_tree(value)
    if isinstance(value, torch.nn.Module):
        own = {k: v for k, v in vars(value).items() if k not in _MODULE_INTERNALS}
        return [dict(value.state_dict()), list(value.children()), _without_caches(value, own)]
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    try:
        parts = value.__reduce_ex__(2)
    except Exception:
        return _without_caches(value, getattr(value, "__dict__", {}))
    if isinstance(parts, str):
        return parts
    _, arguments, *rest = parts
    state = rest[0] if rest else None
    if isinstance(state, dict):
        state = _without_caches(value, state)
    return [arguments, state, *(list(items) for items in rest[1:3] if items is not None)]


def _without_caches(value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by name, results of cached properties left out."""
    cls = type(value)
    return {
        name: field
        for name, field in sorted(fields.items())
        if not isinstance(inspect.getattr_static(cls, name, None), functools.cached_property)
    }


def _source(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return ""

"""Versioned, code-free files: trees and registered classes as JSON plus safetensors.

A saved object is one folder with ``posterior.json`` and ``tensors.safetensors``. Nothing is pickled
and loading never runs code from the file: classes are looked up in a registry of probkit (and of
packages that registered theirs), and an unknown name is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = [
    "FORMAT",
    "Packer",
    "can_pack",
    "class_name",
    "load_tree",
    "pack",
    "packer_of",
    "read_folder",
    "register",
    "save_tree",
    "storable",
    "unpack",
    "write_atomic",
    "write_folder",
]

FORMAT = 1
"""Version of the file format; files of this and every earlier version can be read."""

_T = TypeVar("_T")
_TAG = "__probkit__"


@dataclasses.dataclass(frozen=True)
class Packer:
    """How objects of one class are written and rebuilt.

    Attributes:
        name: Name in the file; never reused for another class.
        to_tree: Object -> tree of tensors, scalars, strings and storables.
        from_tree: The inverse.
    """

    name: str
    to_tree: Callable[[Any], Any]
    from_tree: Callable[[Any], Any]


_BY_CLASS: dict[type, Packer] = {}
_BY_NAME: dict[str, Packer] = {}
_LAZY: list[str] = [
    *("probkit.models", "probkit.models.language", "probkit.inference", "probkit.kernels"),
    "probkit.bo",
]


def register(
    cls: type,
    name: str,
    to_tree: Callable[[Any], Any],
    from_tree: Callable[[Any], Any],
) -> None:
    """Make objects of ``cls`` (not of its subclasses) storable under ``name``.

    Raises:
        DataError: The name belongs to another class.
    """
    known = _BY_NAME.get(name)
    if known is not None and _BY_CLASS.get(cls) is not known:
        raise DataError(f"register: the name {name!r} is taken by another class; choose another")
    packer = Packer(name, to_tree, from_tree)
    _BY_CLASS[cls] = packer
    _BY_NAME[name] = packer


def storable(cls: type[_T]) -> type[_T]:
    """Class decorator: a dataclass is stored by its init fields, under its class name.

    Example:
        >>> @storable
        ... @dataclasses.dataclass(frozen=True)
        ... class ExampleOptions:
        ...     steps: int = 3
        >>> unpack(*pack(ExampleOptions(5)))
        ExampleOptions(steps=5)
    """
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    register(
        cls,
        cls.__name__,
        lambda value: {name: getattr(value, name) for name in names},
        lambda tree: cls(**tree),
    )
    return cls


def pack(tree: Any, *, externals: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree into JSON-able structure and named tensors.

    Args:
        tree: What to write.
        externals: Objects, by name, that are not written but supplied again by :func:`unpack`.

    Returns:
        (structure, tensors by their place in the tree).

    Raises:
        DataError: A leaf is neither tensor, scalar, string, None nor of a registered class; the
            message names where it sits.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        for name, external in (externals or {}).items():
            if value is external:
                return {_TAG: "external", "name": name, "class": class_name(value)}
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int | np.integer):
            return int(value)
        if isinstance(value, float | np.floating):
            return _float_to_json(float(value))
        if isinstance(value, Tensor):
            key = path or "value"
            while key in tensors:  # {"a.b": x, "a": {"b": y}}
                key += "'"
            plain = value.detach().resolve_conj().resolve_neg()
            if plain.dtype == torch.complex128:  # safetensors has no such type: pairs of reals
                tensors[key] = torch.view_as_real(plain.contiguous()).clone()
                return {_TAG: "tensor", "key": key, "complex": True}
            tensors[key] = plain.contiguous().clone()
            return {_TAG: "tensor", "key": key}
        if isinstance(value, Mapping):
            if all(isinstance(k, str) for k in value) and _TAG not in value:
                return {k: walk(v, _join(path, k)) for k, v in value.items()}
            items = [[walk(k, ""), walk(v, _join(path, str(k)))] for k, v in value.items()]
            return {_TAG: "mapping", "items": items}
        if type(value) is list:
            return [walk(v, _join(path, str(i))) for i, v in enumerate(value)]
        # a named tuple may be registered as a class of its own
        if isinstance(value, tuple) and type(value) not in _BY_CLASS:
            kind = "size" if isinstance(value, torch.Size) else "tuple"
            return {
                _TAG: kind,
                "items": [walk(v, _join(path, str(i))) for i, v in enumerate(value)],
            }
        if isinstance(value, torch.dtype | torch.device):
            kind = "dtype" if isinstance(value, torch.dtype) else "device"
            return {_TAG: kind, "name": str(value).removeprefix("torch.")}
        packer = packer_of(type(value))
        if packer is None:
            raise DataError(
                f"cannot store {path or 'the object'}: {type(value).__module__}."
                f"{type(value).__qualname__} is not registered; register it with "
                "probkit.files.register, or pass the object again when loading"
            )
        return {_TAG: "object", "name": packer.name, "tree": walk(packer.to_tree(value), path)}

    return walk(tree, ""), tensors


def _join(path: str, part: str) -> str:
    return f"{path}.{part}" if path else part


def _float_to_json(value: float) -> Any:
    if np.isfinite(value):
        return value
    return {_TAG: "float", "value": repr(value)}


def packer_of(cls: type) -> Packer | None:
    """Return how objects of ``cls`` are stored; None for a class that is not registered."""
    packer = _BY_CLASS.get(cls)
    if packer is None and issubclass(cls, torch.distributions.Distribution):
        from probkit.distributions import register_storables

        register_storables()
        packer = _BY_CLASS.get(cls)
    return packer


def class_name(value: Any) -> str:
    """Return the qualified name of the class of ``value``."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def can_pack(value: Any) -> bool:
    """Tell whether :func:`pack` can write ``value``."""
    try:
        pack(value)
    except DataError:
        return False
    return True


def unpack(
    structure: Any, tensors: Mapping[str, Tensor], *, externals: Mapping[str, Any] | None = None
) -> Any:
    """Rebuild the tree that :func:`pack` split.

    Raises:
        DataError: The structure names a class that is not registered, an external object was not
            supplied or is of another class, or a tensor is missing.
    """

    def external(name: str, expected: str) -> Any:
        value = (externals or {}).get(name)
        if value is None:
            raise DataError(
                f"the {name} of this file, a {expected}, is not stored in it; pass {name}= to load"
            )
        if class_name(value) != expected:
            raise DataError(
                f"the file was written with {name} {expected}, got {class_name(value)}; "
                f"pass the same {name} to load"
            )
        return value

    def walk(value: Any) -> Any:
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, dict):
            return value
        if _TAG not in value:
            return {key: walk(item) for key, item in value.items()}
        kind = value[_TAG]
        if kind == "external":
            return external(value["name"], value["class"])
        if kind == "tensor":
            if value["key"] not in tensors:
                raise DataError(f"damaged file: tensor {value['key']!r} is missing; save it again")
            tensor = tensors[value["key"]]
            return torch.view_as_complex(tensor) if value.get("complex") else tensor
        if kind == "float":
            return float(value["value"])
        if kind == "tuple":
            return tuple(walk(item) for item in value["items"])
        if kind == "size":
            return torch.Size(walk(item) for item in value["items"])
        if kind == "mapping":
            return {walk(key): walk(item) for key, item in value["items"]}
        if kind == "dtype":
            return _DTYPES[value["name"]]
        if kind == "device":
            return torch.device(value["name"])
        if kind == "object":
            return _packer_named(value["name"]).from_tree(walk(value["tree"]))
        raise DataError(f"unknown entry {kind!r} in the file; it was written by a newer probkit")

    return walk(structure)


_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128),
        *(torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
        torch.bool,
    )
}


def _packer_named(name: str) -> Packer:
    if name not in _BY_NAME:
        import importlib

        from probkit.distributions import register_storables

        register_storables()
        for module in _LAZY:
            importlib.import_module(module)
    if name not in _BY_NAME:
        raise DataError(
            f"unknown class {name!r} in the file: expected one registered with probkit; import the "
            "package that registers it, or pass the object (model=, guide=) to load"
        )
    return _BY_NAME[name]


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that at every moment it holds the old content or the new."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_folder(
    folder: str | Path, kind: str, tree: Any, *, externals: Mapping[str, Any] | None = None
) -> None:
    """Write ``tree`` as ``<kind>.json`` and ``tensors.safetensors`` into ``folder``.

    The JSON file is written last and holds a digest of the tensor file, so an interrupted write
    never leaves a readable half, not even over an older save.
    """
    from safetensors.torch import save

    import probkit

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    structure, tensors = pack(tree, externals=externals)
    content = save(_on_cpu(tensors))
    write_atomic(folder / "tensors.safetensors", content)
    header = {
        "format": FORMAT,
        "kind": kind,
        "probkit": probkit.__version__,
        "torch": str(torch.__version__),
        "tensors": hashlib.sha256(content).hexdigest(),
        "content": structure,
    }
    text = json.dumps(header, indent=1, allow_nan=False)
    write_atomic(folder / f"{kind}.json", text.encode())


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.cpu() for key, value in tensors.items()}


def read_folder(
    folder: str | Path, kind: str, *, externals: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Read what :func:`write_folder` wrote.

    Args:
        folder: The folder.
        kind: Name of its JSON file without the ending.
        externals: Objects by name that stand in for those the file does not hold.

    Raises:
        DataError: Not such a folder, a newer format, an unknown class, or damaged content.
    """
    from safetensors.torch import load

    folder = Path(folder)
    path = folder / f"{kind}.json"
    if not path.is_file():
        raise DataError(f"expected a folder with {kind}.json, found none in {str(folder)!r}")
    try:
        header = json.loads(path.read_text())
        version = header["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{str(path)!r} is damaged ({error}); restore it from a copy") from None
    if not isinstance(version, int) or version > FORMAT:
        raise DataError(
            f"{str(folder)!r} has file format {version}, this probkit reads up to {FORMAT}; "
            "install a newer probkit"
        )
    if not {"content", "tensors"} <= header.keys():
        raise DataError(f"{str(path)!r} is damaged (no content); restore it from a copy")
    content, digest = header["content"], header["tensors"]
    try:
        stored = (folder / "tensors.safetensors").read_bytes()
        if hashlib.sha256(stored).hexdigest() != digest:
            raise ValueError(f"it is not the one that {kind}.json was written with")
        tensors = load(stored)
    except Exception as error:
        raise DataError(f"{str(folder)!r}: tensors.safetensors is damaged ({error})") from None
    tree: dict[str, Any] = unpack(content, tensors, externals=externals)
    return tree


def save_tree(path: Path, tree: Any) -> None:
    """Write one tree into one safetensors file, its structure in the header; atomic."""
    from safetensors.torch import save

    structure, tensors = pack(tree)
    header = {"format": str(FORMAT), "structure": json.dumps(structure, allow_nan=False)}
    write_atomic(path, save(_on_cpu(tensors), metadata=header))


def load_tree(path: Path) -> Any:
    """Read what :func:`save_tree` wrote.

    Raises:
        DataError: The file is missing or damaged.
    """
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            structure = json.loads(file.metadata()["structure"])
    except Exception as error:
        raise DataError(f"{str(path)!r} is missing or damaged ({error})") from None
    return unpack(structure, tensors)

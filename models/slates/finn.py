"""The FINN.no slate data: reading it from disk without holding it in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from probkit.errors import DataError, ShapeError
from probkit.loader import Loader
from probkit.model import Batch
from probkit.models.slates.checks import check_log
from probkit.models.slates.log import SlateLog
from probkit.models.slates.npz import Member, load_member, members, stream_members

__all__ = ["read_finn", "stream_finn"]

_ARRAYS = ("slate", "click", "click_idx", "slate_lengths", "interaction_type")
_ALIASES = {"action": "slate"}  # the name in version 1.0 of the data


def read_finn(folder: Path, *, cache: Path | None, check: bool) -> SlateLog:
    """Read ``data.npz``, ``itemattr.npz`` and ``ind2val.json``; see :meth:`SlateLog.from_finn`."""
    found = _log_members(folder)
    arrays = {name: load_member(found[name], cache=cache) for name in _ARRAYS}
    users = load_member(found["userId"]) if "userId" in found else None
    groups = _categories(folder)
    labels: dict[str, Any] = _group_names(folder, groups)
    if users is not None:
        _check_users(users, found["click"].shape[0])
        if not np.array_equal(users, np.arange(len(users))):
            labels["user"] = users.tolist()
    tensors: dict[str, Any] = {
        name: torch.from_numpy(_native(array)) for name, array in arrays.items()
    }
    return SlateLog(
        **tensors,
        groups=groups,
        labels=labels,
        n_items=None if groups is None else len(groups),
        check=check,
    )


def stream_finn(folder: str | Path, batch_size: int) -> Loader:
    """Return the users batch by batch in the order of the file, unpacked as they are needed.

    For compressed archives larger than memory, where there is no room on disk to unpack them:
    every pass decompresses the file once. Batches are neighbours in the file, so shuffle the users
    before writing it, or use ``SlateLog.from_finn(folder, cache=...).loader(...)``.

    Args:
        folder: The folder.
        batch_size: Users in a batch.

    Returns:
        Batches of :class:`SlateLog`, of the official split; every slate is checked.
    """
    folder = Path(folder)
    found = _log_members(folder)
    groups = _categories(folder)
    users, steps = found["click"].shape[:2]
    if groups is None:
        raise DataError(
            f"stream_finn: expected itemattr.npz in {folder.name}: the number of items cannot be "
            "read from one batch"
        )
    chosen = {name: found[name] for name in _ARRAYS}
    train, part = _official_split(users, steps)

    def batches() -> Iterator[tuple[torch.Tensor, SlateLog]]:
        start = 0
        for arrays in stream_members(chosen, batch_size):
            count = len(arrays["click"])
            index = torch.arange(start, start + count)
            tensors: dict[str, Any] = {
                name: torch.from_numpy(_native(a)).long() for name, a in arrays.items()
            }
            log = SlateLog(
                **tensors,
                groups=groups,
                n_items=len(groups),
                train=train[index],
                part=part[index],
                check=False,
            )
            check_log(log, batch=True)
            yield index, log
            start += count

    def factory(epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        for index, log in batches():
            yield Batch(log, index, scale=users / len(index))

    return Loader(factory, units=users, example=next(batches())[1])


def _official_split(users: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The published split: ``train`` [user, step] and ``part`` [user]; see :meth:`hold_out`."""
    order = torch.randperm(users, generator=torch.Generator().manual_seed(0))
    count = int(0.05 * users)
    part = torch.zeros(users, dtype=torch.int64)
    part[order[:count]] = 1
    part[order[count : 2 * count]] = 2
    return ~((part > 0)[:, None] & (torch.arange(steps) >= 5)), part


def _log_members(folder: Path) -> dict[str, Member]:
    """The arrays of ``data.npz`` under their present names, their shapes checked."""
    if not folder.is_dir():
        raise DataError(f"from_finn: expected a folder with data.npz, there is no {folder.name}")
    if not (folder / "data.npz").is_file():
        old = sorted(path.name for path in folder.glob("*.p*") if path.suffix in (".pt", ".pickle"))
        hint = f"; {', '.join(old)}: pickled formats are refused" if old else ""
        raise DataError(f"from_finn: expected data.npz in {folder.name}, there is none{hint}")
    found = {
        _ALIASES.get(name, name): member for name, member in members(folder / "data.npz").items()
    }
    missing = [name for name in _ARRAYS if name not in found]
    if missing:
        raise DataError(
            f"data.npz: expected the arrays {', '.join(_ARRAYS)}; missing: {', '.join(missing)}, "
            f"found: {', '.join(sorted(found))}"
        )
    shape = found["click"].shape
    for name in _ARRAYS:
        if found[name].dtype.kind not in "iu":
            raise DataError(
                f"data.npz[{name!r}]: expected whole numbers, got dtype {found[name].dtype}"
            )
        got = found[name].shape
        dims = "[user, step, slot]" if name == "slate" else "[user, step]"
        if got[:2] != shape or len(got) != dims.count(",") + 1:
            raise ShapeError(
                f"data.npz[{name!r}]: expected {dims} with [user, step] = {shape} as in click, "
                f"got {got}"
            )
    return found


def _native(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array in a dtype that torch has; 32 and 64 bit integers stay maps."""
    if array.dtype in (np.dtype("int32"), np.dtype("int64")):
        return np.asarray(array)
    return array.astype(np.int64)


def _check_users(users: np.ndarray[Any, Any], expected: int) -> None:
    if users.shape != (expected,):
        raise ShapeError(f"data.npz['userId']: expected [user={expected}], got {users.shape}")
    if len(np.unique(users)) != expected:
        raise DataError("data.npz['userId']: expected each user once; join their steps")


def _categories(folder: Path) -> np.ndarray[Any, Any] | None:
    """Group [item] of each id; None without ``itemattr.npz``."""
    path = folder / "itemattr.npz"
    if not path.is_file():
        return None
    found = members(path)
    if "category" not in found:
        raise DataError(
            f"itemattr.npz: expected the array category [item], found: {', '.join(sorted(found))}"
        )
    return np.array(load_member(found["category"]))


def _group_names(folder: Path, groups: np.ndarray[Any, Any] | None) -> dict[str, list[str]]:
    """Names of the groups by number, from ``ind2val.json``."""
    path = folder / "ind2val.json"
    if groups is None or not path.is_file():
        return {}
    names: Mapping[str, Mapping[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    known = {int(key): str(value) for key, value in names.get("category", {}).items()}
    count = int(np.nanmax(groups)) + 1 if len(groups) else 0
    return {"group": [known.get(g, str(g)) for g in range(count)]}

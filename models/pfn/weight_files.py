"""Weight files: one safetensors file with the network, its borders and what it was trained on.

The header says which prior the weights belong to, in which version, and carries the model card; a
file of another prior or version is refused before a tensor is read. Nothing in the file is code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probkit.errors import DataError
from probkit.files import write_atomic

__all__ = ["WeightFile", "load_weights", "save_weights"]

FORMAT = 1
KIND = "probkit prior-data fitted network"


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds.

    Attributes:
        prior: Name and version of the prior.
        network: Options that rebuild the network.
        weights: The state of the network, float32.
        borders: [bar + 1], float32; None for heads without bars.
        constants: Numbers of the encoding of inputs and outputs.
        card: The model card: training, measured quality, limits.
    """

    prior: str
    network: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    borders: Tensor | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)

    def fill(self, network: nn.Module) -> None:
        """Copy the weights into ``network``.

        Raises:
            DataError: Names or shapes differ.
        """
        state = network.state_dict()
        differing = [
            name
            for name in {**state, **self.weights}
            if name not in state
            or name not in self.weights
            or state[name].shape != self.weights[name].shape
        ]
        if differing:
            raise DataError(
                f"the file's weights do not fit the network it describes ({differing[0]!r}); "
                "restore it from a copy"
            )
        network.load_state_dict(dict(self.weights))


def save_weights(path: str | Path, file: WeightFile, *, half: bool = True) -> None:
    """Write a weight file; borders stay float32.

    Args:
        path: The file, named ``*.safetensors``.
        file: Its content.
        half: Store weights as float16, which costs less than 0.001 nats.
    """
    from safetensors.torch import save

    kept = torch.float16 if half else torch.float32
    tensors = {f"weights.{k}": v.detach().cpu().to(kept) for k, v in file.weights.items()}
    if file.borders is not None:
        tensors["borders"] = file.borders.detach().cpu().float()
    described = {
        "kind": KIND,
        "format": FORMAT,
        "prior": file.prior,
        "network": dict(file.network),
        "constants": dict(file.constants),
        "card": dict(file.card),
    }
    # one entry, for safetensors writes several in a random order
    header = {"content": json.dumps(described, allow_nan=False, sort_keys=True)}
    tensors = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    write_atomic(Path(path), save(tensors, metadata=header))


def load_weights(path: str | Path, *, prior: str | None = None) -> WeightFile:
    """Read a weight file.

    Args:
        path: The file.
        prior: Prior and version that the weights must belong to; None takes any.

    Raises:
        DataError: The file is missing, damaged, no weight file, of a newer format, or of another
            prior or version.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise DataError(f"expected a weight file (.safetensors), found none at {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as handle:
            header = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    except Exception as error:
        raise DataError(
            f"{str(path)!r} is no readable safetensors file ({error}); weights in pickles are "
            "not read, for they may hold code"
        ) from None
    try:
        content = json.loads(header.get("content", "{}"))
        kind, version = content.get("kind"), content.get("format")
    except (AttributeError, json.JSONDecodeError) as error:
        raise DataError(f"{str(path)!r} is damaged ({error}); restore it from a copy") from None
    if kind != KIND:
        raise DataError(f"{str(path)!r} is no {KIND}; expected a file of save_weights")
    if not isinstance(version, int) or version > FORMAT:
        raise DataError(
            f"{str(path)!r} has format {version!r}, this probkit reads up to {FORMAT}; "
            "install a newer probkit"
        )
    absent = {"prior", "network", "constants", "card"} - content.keys()
    if absent:
        raise DataError(
            f"{str(path)!r} is damaged (no {', '.join(sorted(absent))}); restore it from a copy"
        )
    found = content["prior"]
    if prior is not None and found != prior:
        raise DataError(
            f"{str(path)!r} was trained on the prior {found!r}, expected {prior!r}; "
            "load weights of this prior and version, or train some"
        )
    weights = {
        name.removeprefix("weights."): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith("weights.")
    }
    bad = next((name for name, value in weights.items() if not bool(value.isfinite().all())), None)
    if bad is not None:
        raise DataError(f"{str(path)!r}: the weights {bad!r} are not finite; restore a copy")
    return WeightFile(
        found,
        content["network"],
        weights,
        tensors.get("borders"),
        content["constants"],
        content["card"],
    )

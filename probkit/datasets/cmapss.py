"""The C-MAPSS turbofan engines of NASA: simulated runs to failure, read from the raw text files."""

from __future__ import annotations

import gzip
import hashlib
import io
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = ["CMAPSS", "download_cmapss", "load_cmapss"]

_SOURCE = (
    "https://phm-datasets.s3.amazonaws.com/NASA/"
    "6.+Turbofan+Engine+Degradation+Simulation+Data+Set.zip"
)
_SHA256 = {
    "train_FD001.txt": "963b5e22825b34d8b21c69e1aeb4af3e647050eb672ee8834ba4b5d91d2de0f8",
    "test_FD001.txt": "3cda7109ce17bafb5443f2ac926cfcf88154b941b8c4cf95eb55d1ddd6f52851",
    "RUL_FD001.txt": "a19c8ec94931949d0485bdc35118206e9c81c4547b422efb9cf86f4ceddbceca",
}
_COLUMNS = 26  # unit, cycle, 3 settings, 21 sensors


@dataclass(frozen=True)
class CMAPSS:
    """One of the four subsets.

    Attributes:
        train: Sensors [cycle, sensor=21] of units that ran to failure.
        test: Sensors [cycle, sensor=21] of units that were stopped before.
        remaining: Cycles that the test units had left [unit].
        train_settings: Operating settings [cycle, setting=3] of the training units.
        test_settings: Those of the test units.
    """

    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    remaining: Tensor
    train_settings: tuple[Tensor, ...]
    test_settings: tuple[Tensor, ...]

    @property
    def train_remaining(self) -> tuple[Tensor, ...]:
        """Cycles left [cycle] of each training unit, 0 at the last."""
        return tuple(torch.arange(len(one) - 1, -1, -1, dtype=torch.float64) for one in self.train)


def load_cmapss(folder: str | Path, subset: str = "FD001", *, verify: bool = True) -> CMAPSS:
    """Read a subset from ``train_FD00x.txt``, ``test_FD00x.txt`` and ``RUL_FD00x.txt``.

    Saxena, Goebel, Simon and Eklund (2008), "Damage propagation modeling for aircraft engine
    run-to-failure simulation". The files may be compressed by gzip (``.txt.gz``). Modified copies
    of FD001 circulate, so its content is checked.

    Args:
        folder: Where the files are.
        subset: "FD001" to "FD004".
        verify: Compare the content with the published one, where its sha256 is known (FD001).

    Raises:
        DataError: A file is missing, is not a table of 26 columns, or is a modified copy.
    """
    if subset not in ("FD001", "FD002", "FD003", "FD004"):
        raise DataError(f"subset: expected FD001, FD002, FD003 or FD004, got {subset!r}")
    root = Path(folder)
    train_settings, train = _units(root, f"train_{subset}.txt", verify)
    test_settings, test = _units(root, f"test_{subset}.txt", verify)
    name = f"RUL_{subset}.txt"
    remaining = torch.from_numpy(np.atleast_1d(_table(_read(root, name, verify), name, None)))
    if len(remaining) != len(test):
        raise DataError(
            f"{name}: expected one life for each of {len(test)} test units, got {len(remaining)}"
        )
    return CMAPSS(train, test, remaining, train_settings, test_settings)


def _units(root: Path, name: str, verify: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Settings and sensors of each unit of a file."""
    table = _table(_read(root, name, verify), name, _COLUMNS)
    numbers = table[:, 0]
    settings, sensors = [], []
    for unit in np.unique(numbers):
        rows = table[numbers == unit]
        if not np.array_equal(rows[:, 1], np.arange(1, len(rows) + 1)):
            raise DataError(f"{name}: the cycles of unit {unit:g} are not 1, 2, 3, ...")
        settings.append(torch.from_numpy(rows[:, 2:5].copy()))
        sensors.append(torch.from_numpy(rows[:, 5:].copy()))
    return tuple(settings), tuple(sensors)


def _read(root: Path, name: str, verify: bool) -> bytes:
    """Content of a file, plain or compressed."""
    plain, packed = root / name, root / f"{name}.gz"
    if plain.is_file():
        content = plain.read_bytes()
    elif packed.is_file():
        content = gzip.decompress(packed.read_bytes())
    else:
        raise DataError(
            f"{name}[.gz] is not in {root}; get the files with "
            "probkit.datasets.download_cmapss(folder), or from NASA's prognostics data repository"
        )
    if verify and name in _SHA256:
        _verify(content, name)
    return content


def _verify(content: bytes, name: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256[name]:
        raise DataError(
            f"{name}: sha256 {found[:12]}... is not the published {_SHA256[name][:12]}...; this is "
            "a modified or damaged copy (verify=False reads it all the same)"
        )


def _table(content: bytes, name: str, columns: int | None) -> np.ndarray:
    """Numbers [row, column] of a text table."""
    try:
        table = np.loadtxt(io.BytesIO(content))
    except ValueError as error:
        raise DataError(f"{name}: expected a table of numbers ({error})") from None
    if columns is not None and (table.ndim != 2 or table.shape[1] != columns):
        raise DataError(f"{name}: expected {columns} columns, got shape {table.shape}")
    return table


def download_cmapss(folder: str | Path, *, url: str = _SOURCE, timeout: float = 60.0) -> Path:
    """Download the data set of NASA and unpack its text files into ``folder``.

    The content of FD001 is checked against its published sha256 before anything is written.

    Args:
        folder: Where to put the files; made if needed.
        url: The archive; it may hold the text files, or an archive of them.
        timeout: Seconds without an answer after which to give up.

    Raises:
        DataError: The archive cannot be fetched, or does not hold the files.
    """
    try:
        with urllib.request.urlopen(url, timeout=timeout) as answer:
            archive = answer.read()
    except OSError as error:
        raise DataError(f"download_cmapss: {url} could not be fetched ({error})") from None
    texts = _texts(archive)
    missing = [name for name in _SHA256 if name not in texts]
    if missing:
        raise DataError(f"download_cmapss: {url} does not hold {', '.join(missing)}")
    for name in _SHA256:
        _verify(texts[name], name)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (target / name).write_bytes(content)
    return target


def _texts(archive: bytes) -> dict[str, bytes]:
    """Text files of an archive and of the archives inside it, by bare name."""
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as opened:
            for member in opened.namelist():
                name = Path(member).name
                if name.endswith(".zip"):
                    found.update(_texts(opened.read(member)))
                elif name.endswith(".txt"):
                    found[name] = opened.read(member)
    except zipfile.BadZipFile as error:
        raise DataError(f"download_cmapss: expected a zip archive ({error})") from None
    return found

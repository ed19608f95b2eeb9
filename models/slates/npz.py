"""Arrays of an ``.npz`` archive without loading all of them: mapped, unpacked or streamed."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from probkit.errors import DataError
from probkit.numerics import check_allocation

__all__ = ["Member", "load_member", "members", "stream_members"]

_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field, zip format 4.3.7
_BLOCK = 1 << 26  # bytes unpacked together


@dataclass(frozen=True)
class Member:
    """One array of an archive.

    Attributes:
        archive: The archive.
        name: Name of the array.
        shape: Its shape.
        dtype: Its dtype.
        offset: Where its values begin in the archive; None where they are compressed.
        header: Bytes of the ``.npy`` header before the values.
    """

    archive: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None
    header: int

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def members(archive: Path) -> dict[str, Member]:
    """Describe the arrays of an archive, reading their headers alone.

    Raises:
        DataError: It is no npz archive, or it holds pickled objects.
    """
    if not archive.is_file():
        raise DataError(f"expected the file {archive.name} in {archive.parent}, there is none")
    try:
        with zipfile.ZipFile(archive) as file:
            found = [_describe(archive, file, info) for info in file.infolist()]
    except zipfile.BadZipFile:
        raise DataError(
            f"{archive.name}: expected an .npz archive, got another format; .pt files and pickles "
            "are refused, write the arrays with numpy.savez"
        ) from None
    return {member.name: member for member in found}


def _describe(archive: Path, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    if not info.filename.endswith(".npy"):
        raise DataError(
            f"{archive.name}: expected arrays (.npy) alone, found {info.filename!r}; .pt files and "
            "pickles are refused, write the arrays with numpy.savez"
        )
    name = info.filename.removesuffix(".npy")
    with file.open(info) as stream:
        shape, fortran, dtype, header = _npy_header(stream, f"{archive.name}[{name!r}]")
    if fortran and len(shape) > 1:
        raise DataError(
            f"{archive.name}[{name!r}]: expected rows stored one after the other, got Fortran "
            "order; write it with numpy.ascontiguousarray"
        )
    offset = None
    if info.compress_type == zipfile.ZIP_STORED:
        with archive.open("rb") as raw:
            raw.seek(info.header_offset)
            name_length, extra_length = _LOCAL_HEADER.unpack(raw.read(_LOCAL_HEADER.size))
        offset = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length + header
    return Member(archive, name, shape, dtype, offset, header)


def _npy_header(stream: IO[bytes], what: str) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Read the header of an array: shape, Fortran order, dtype, and its length."""
    try:
        version = np.lib.format.read_magic(stream)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise DataError(f"{what}: expected an array ({error})") from None
    if dtype.hasobject:
        raise DataError(
            f"{what}: expected numbers, got pickled Python objects, which are refused: reading "
            "them can run any code; write the array with a number dtype"
        )
    return tuple(int(n) for n in shape), bool(fortran), dtype, stream.tell()


def load_member(member: Member, *, cache: Path | None = None) -> np.ndarray[Any, Any]:
    """Return the array: mapped where it lies uncompressed, else unpacked.

    A map is copy-on-write: nothing is read before it is used, and the file is never changed.

    Args:
        member: Which array.
        cache: Folder where a compressed array is unpacked, once, as ``.npy``, to be mapped from
            there; None reads it into memory.

    Raises:
        DataError: The array does not fit in memory.
    """
    if member.nbytes == 0:
        return np.zeros(member.shape, member.dtype)
    if member.offset is not None:
        return np.memmap(
            member.archive, member.dtype, mode="c", offset=member.offset, shape=member.shape
        )
    if cache is not None:
        return np.load(_unpacked(member, cache), mmap_mode="c")
    try:
        check_allocation(member.nbytes, f"{member.archive.name}[{member.name!r}]")
    except DataError as error:
        raise DataError(
            f"{member.archive.name}[{member.name!r}] is compressed and cannot be mapped, and it "
            f"does not fit in memory: {error}. Pass cache=<folder> to unpack it to disk"
        ) from None
    return next(stream_members({member.name: member}, max(member.shape[0], 1)))[member.name]


def _unpacked(member: Member, cache: Path) -> Path:
    """Unpack a compressed array to disk, block by block, unless it is there."""
    stat = member.archive.stat()
    stamp = f"{stat.st_size:x}-{stat.st_mtime_ns:x}"
    target = cache / f"{member.archive.stem}.{member.name}.{stamp}.npy"
    if target.is_file():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    with (
        zipfile.ZipFile(member.archive) as file,
        file.open(f"{member.name}.npy") as source,
        partial.open("wb") as out,
    ):
        while block := source.read(_BLOCK):
            out.write(block)
    partial.replace(target)
    return target


def stream_members(
    chosen: Mapping[str, Member], rows: int
) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yield blocks of rows of several arrays in step, unpacking as it goes.

    Args:
        chosen: Arrays of one archive with equal first dims.
        rows: Rows in a block; the last may have fewer.
    """
    first = next(iter(chosen.values()))
    total = first.shape[0]
    with zipfile.ZipFile(first.archive) as file:
        streams = {name: file.open(f"{one.name}.npy") for name, one in chosen.items()}
        try:
            for name, one in chosen.items():
                streams[name].read(one.header)
            for start in range(0, total, rows):
                count = min(rows, total - start)
                yield {name: _read_rows(streams[name], one, count) for name, one in chosen.items()}
        finally:
            for stream in streams.values():
                stream.close()


def _read_rows(stream: IO[bytes], member: Member, count: int) -> np.ndarray[Any, Any]:
    """The next ``count`` rows of an array."""
    array = np.empty((count, *member.shape[1:]), member.dtype)
    room = array.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(room):
        block = stream.read(min(_BLOCK, len(room) - done))
        if not block:
            raise DataError(f"{member.archive.name}[{member.name!r}]: the file ends too early")
        room[done : done + len(block)] = block
        done += len(block)
    return array

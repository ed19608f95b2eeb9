"""Reading the turbofan files: real layout, wrong files, and the download from an archive."""

from __future__ import annotations

import gzip
import hashlib
import zipfile

import numpy as np
import pytest
import torch

from probkit.datasets import cmapss, download_cmapss, load_cmapss
from probkit.errors import DataError


def table(lengths, rng):
    rows = []
    for unit, length in enumerate(lengths, start=1):
        for cycle in range(1, length + 1):
            rows.append([unit, cycle, *np.round(rng.standard_normal(24), 4)])
    return "\n".join(" ".join(f"{value:g}" for value in row) + "  " for row in rows) + "\n"


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return {
        "train_FD001.txt": table([5, 7], rng).encode(),
        "test_FD001.txt": table([3, 4, 2], rng).encode(),
        "RUL_FD001.txt": b"11 \n20 \n7 \n",
    }


def write(folder, texts, pack=False):
    for name, content in texts.items():
        if pack:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.mark.parametrize("pack", [False, True])
def test_units_are_told_apart(tmp_path, texts, pack):
    write(tmp_path, texts, pack)
    found = load_cmapss(tmp_path, verify=False)
    assert [len(one) for one in found.train] == [5, 7]
    assert [len(one) for one in found.test] == [3, 4, 2]
    assert found.train[0].shape == (5, 21) and found.train_settings[0].shape == (5, 3)
    assert found.remaining.tolist() == [11.0, 20.0, 7.0]
    assert found.train_remaining[1].tolist() == [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    first = np.fromstring(texts["test_FD001.txt"].decode().splitlines()[3], sep=" ")
    torch.testing.assert_close(found.test[1][0], torch.as_tensor(first[5:]))


def test_a_modified_copy_is_refused(tmp_path, texts):
    write(tmp_path, texts)
    with pytest.raises(DataError, match="modified or damaged copy"):
        load_cmapss(tmp_path)


def test_wrong_files(tmp_path, texts):
    with pytest.raises(DataError, match=r"train_FD001.txt\[.gz\] is not in"):
        load_cmapss(tmp_path)
    with pytest.raises(DataError, match="expected FD001, FD002"):
        load_cmapss(tmp_path, "FD005")
    write(tmp_path, {**texts, "RUL_FD001.txt": b"11\n20\n"})
    with pytest.raises(DataError, match="one life for each of 3 test units, got 2"):
        load_cmapss(tmp_path, verify=False)
    write(tmp_path, {"train_FD001.txt": b"1 2 3\n4 5 6\n"})
    with pytest.raises(DataError, match="expected 26 columns"):
        load_cmapss(tmp_path, verify=False)
    write(tmp_path, {"train_FD001.txt": b"1 2 x\n"})
    with pytest.raises(DataError, match="a table of numbers"):
        load_cmapss(tmp_path, verify=False)
    gap = texts["train_FD001.txt"].replace(b"\n1 3 ", b"\n1 9 ")
    write(tmp_path, {"train_FD001.txt": gap})
    with pytest.raises(DataError, match="cycles of unit 1 are not 1, 2, 3"):
        load_cmapss(tmp_path, verify=False)


class TestDownload:
    """From an archive of archives on this machine, as the real one is."""

    @pytest.fixture
    def archive(self, tmp_path, texts):
        inner = tmp_path / "CMAPSSData.zip"
        with zipfile.ZipFile(inner, "w") as out:
            for name, content in texts.items():
                out.writestr(name, content)
        outer = tmp_path / "outer.zip"
        with zipfile.ZipFile(outer, "w") as out:
            out.write(inner, "folder/CMAPSSData.zip")
        return outer.as_uri()

    def test_what_is_not_the_published_data_is_not_written(self, tmp_path, archive):
        with pytest.raises(DataError, match="modified or damaged"):
            download_cmapss(tmp_path / "got", url=archive)
        assert not (tmp_path / "got").exists()

    def test_files_are_unpacked(self, tmp_path, archive, texts, monkeypatch):
        marks = {name: hashlib.sha256(content).hexdigest() for name, content in texts.items()}
        monkeypatch.setattr(cmapss, "_SHA256", marks)
        folder = download_cmapss(tmp_path / "got", url=archive)
        assert [len(one) for one in load_cmapss(folder).train] == [5, 7]

    def test_failures_are_explained(self, tmp_path):
        with pytest.raises(DataError, match="could not be fetched"):
            download_cmapss(tmp_path, url=(tmp_path / "nothing.zip").as_uri())
        (tmp_path / "page.zip").write_bytes(b"not an archive")
        with pytest.raises(DataError, match="expected a zip archive"):
            download_cmapss(tmp_path, url=(tmp_path / "page.zip").as_uri())
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as out:
            out.writestr("readme.txt", "hello")
        with pytest.raises(DataError, match="does not hold train_FD001.txt"):
            download_cmapss(tmp_path, url=(tmp_path / "other.zip").as_uri())

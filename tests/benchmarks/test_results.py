from __future__ import annotations

import copy
import dataclasses
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.client import one_line
from benchmarks.harness.machine import this_machine
from benchmarks.harness.results import (
    RESULTS,
    Measured,
    QualityResult,
    TimingResult,
    file_name,
    load_all,
    load_result,
    parse,
    save_result,
)


@pytest.fixture
def quality() -> QualityResult:
    values = [
        Measured("yacht, NNGP, NLL", 0.31, 0.312, 0.02, "near", "", True),
        Measured("largest error", 3e-9, 0.0, 1e-8, "at most", "", True),
        Measured("yacht, Burr, NLL", 0.35, 0.316, 0.02, "near", "a | b", False),
        Measured("effective samples", 17.0, None, 0.0, "near", "", None),
    ]
    return QualityResult(
        1, "quality", "nngp/uci", "UCI sets", "Is it as good?", "cpu", "2026-01-01", None, False,
        1, this_machine(), "3.11.7", {"probkit": {"torch": "2"}}, 1.0, 1.0, values,
    )  # fmt: skip


def test_a_result_survives_its_file(
    sums: TimingResult, quality: QualityResult, tmp_path: Path
) -> None:
    for result in (sums, quality):
        assert load_result(save_result(result, tmp_path)) == result
    assert load_all(tmp_path) == [quality, sums]


def test_file_names() -> None:
    assert file_name("nngp/kernel", "cpu") == "nngp_kernel.json"
    assert file_name("nngp/kernel", "cuda") == "nngp_kernel_cuda.json"


def _raw(result: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(result)))


def _edit(raw: dict[str, Any], where: list[Any], value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    inner = raw
    for key in where[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[where[-1]]
    else:
        inner[where[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["format"], 2, "expected a result of format 1"),
        (["kind"], "poem", "expected kind timing or quality, got 'poem'"),
        (["date"], KeyError, "result lacks the fields: date"),
        (["hostname"], "x", "result has unknown fields: hostname"),
        (["repeats"], "7", "result.repeats does not fit"),
        (["repeats"], True, "result.repeats does not fit"),
        (["machine", "gpu"], 3, "result.machine.gpu does not fit"),
        (["timings", 0, "cpu_s", 1], None, r"result.timings\[0\].cpu_s\[1\] does not fit"),
        (["timings", 0, "workload", "n"], [1], r"result.timings\[0\].workload.n does not fit"),
        (["pairs", 0, "metric"], "gpu", r"result.pairs\[0\].metric does not fit"),
        (["pairs"], {}, "result.pairs does not fit"),
        (["machine"], "mine", "result.machine must be an object"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    sums: TimingResult, where: list[Any], value: Any, message: str
) -> None:
    assert parse(_raw(sums)) == sums
    with pytest.raises(ValueError, match=message):
        parse(_edit(_raw(sums), where, value))


def test_the_message_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^x\.json: expected a result of format 1"):
        load_all(tmp_path)


def test_committed_results_load_and_name_no_machine_or_folder() -> None:
    for path in RESULTS.glob("*.json"):
        result = load_result(path)
        text = path.read_text()
        assert path.name == file_name(result.benchmark, result.device)
        assert not result.quick
        for private in (socket.gethostname(), str(Path.home()) + "/", str(RESULTS.parents[1])):
            assert private not in text or len(private) < 4, f"{path.name} holds {private}"


def test_a_stored_message_is_one_line_without_folders() -> None:
    root = str(RESULTS.parents[1])
    assert one_line(f"cannot read {root}/data/x\nmore") == "cannot read .../data/x"

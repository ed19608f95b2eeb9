"""Result files: their dataclasses, and strict reading and writing as JSON.

`load_result` refuses a file with a missing, unknown or wrongly typed field, so that a report never
rests on a file that only looks right.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

__all__ = [
    "FORMAT",
    "Machine",
    "Measured",
    "Pair",
    "QualityResult",
    "Result",
    "Timing",
    "TimingResult",
    "file_name",
    "load_all",
    "load_result",
    "parse",
    "save_result",
]

FORMAT = 1
RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Machine:
    """The kind of machine: no host name, no folder."""

    cpu: str
    cores: int
    memory_gib: float
    system: str
    gpu: str | None
    load_1min: float


@dataclass(frozen=True)
class Timing:
    """All measurements of one contender on one workload, one entry per round.

    ``facts`` are further numbers that the contender gave once.
    """

    contender: str
    workload: dict[str, int | float | str]
    cpu_s: list[float]
    system_s: list[float]
    wall_s: list[float]
    loops: int
    first_wall_s: float
    peak_mib: float
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """One comparison on one workload.

    ``problem`` is empty, or says why there is no ratio: results that disagree, a contender that
    failed or cannot run here. Then every number of the ratio is None.
    """

    ours: str
    peer: str
    workload: dict[str, int | float | str]
    metric: Literal["cpu", "wall"]
    agreement: str
    max_difference: float | None
    problem: str
    median: float | None
    q25: float | None
    q75: float | None
    low: float | None
    high: float | None
    memory_ratio: float | None
    goal: str | None
    bound: float | None
    met: bool | None
    decisive: bool | None


@dataclass(frozen=True)
class Measured:
    """One value of a quality entry, beside its reference."""

    name: str
    value: float
    reference: float | None
    tolerance: float
    rule: Literal["near", "at most"]
    note: str
    met: bool | None


@dataclass(frozen=True)
class TimingResult:
    """Result of a timing benchmark; times are per ``unit`` where there is one."""

    format: int
    kind: Literal["timing"]
    benchmark: str
    title: str
    question: str
    device: str
    date: str
    commit: str | None
    quick: bool
    repeats: int
    processes: int
    threads: int
    machine: Machine
    python: str
    versions: dict[str, dict[str, str]]
    timings: list[Timing]
    pairs: list[Pair]
    unit: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class QualityResult:
    """Result of a quality entry."""

    format: int
    kind: Literal["quality"]
    benchmark: str
    title: str
    question: str
    device: str
    date: str
    commit: str | None
    quick: bool
    threads: int
    machine: Machine
    python: str
    versions: dict[str, dict[str, str]]
    cpu_s: float
    wall_s: float
    values: list[Measured]


Result = TimingResult | QualityResult
_KINDS: dict[str, type[Any]] = {"timing": TimingResult, "quality": QualityResult}


def file_name(benchmark: str, device: str) -> str:
    """Return the file a result is stored in.

    Example:
        >>> file_name("nngp/kernel", "cuda")
        'nngp_kernel_cuda.json'
    """
    return benchmark.replace("/", "_") + ("" if device == "cpu" else f"_{device}") + ".json"


def save_result(result: Result, folder: Path = RESULTS) -> Path:
    """Write one result, replacing the last one of the same benchmark and device."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(result.benchmark, result.device)
    text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def load_result(path: Path) -> Result:
    """Read one result file.

    Raises:
        ValueError: The file has another format version, or a field that does not fit.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def load_all(folder: Path = RESULTS) -> list[Result]:
    """Read all results of a folder, in order of file name."""
    return [load_result(path) for path in sorted(folder.glob("*.json"))]


def parse(raw: Any) -> Result:
    """Build a result from decoded JSON.

    Raises:
        ValueError: Another format version, an unknown kind, or a field that does not fit.
    """
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise ValueError(f"expected a result of format {FORMAT}")
    if raw.get("kind") not in _KINDS:
        raise ValueError(f"expected kind timing or quality, got {raw.get('kind')!r}")
    result: Result = _build(_KINDS[raw["kind"]], raw, "result")
    return result


def _build(expected: Any, raw: Any, where: str) -> Any:
    """Check `raw` against a type hint and build dataclasses on the way."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected) and isinstance(expected, type):
        return _build_dataclass(expected, raw, where)
    if origin is list and isinstance(raw, list):
        return [_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(raw)]
    if origin is dict and isinstance(raw, dict):
        return {key: _build(arguments[1], item, f"{where}.{key}") for key, item in raw.items()}
    if origin is Literal and raw in arguments:
        return raw
    if origin in (Union, types.UnionType) and any(_is_a(raw, option) for option in arguments):
        return raw
    if origin is None and _is_a(raw, expected):
        return raw
    raise ValueError(f"{where} does not fit {expected}: {raw!r}")


def _build_dataclass(expected: type[Any], raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} must be an object with the fields of {expected.__name__}")
    hints = typing.get_type_hints(expected)
    if unknown := sorted(raw.keys() - hints.keys()):
        raise ValueError(f"{where} has unknown fields: {', '.join(unknown)}")
    needed = {
        f.name
        for f in dataclasses.fields(expected)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(needed - raw.keys()):
        raise ValueError(f"{where} lacks the fields: {', '.join(missing)}")
    return expected(**{name: _build(hints[name], raw[name], f"{where}.{name}") for name in raw})


def _is_a(raw: Any, kind: Any) -> bool:
    """Whether a JSON scalar has this type; an int may be a float, a bool is only a bool."""
    if kind is type(None):
        return raw is None
    if isinstance(raw, bool):
        return kind is bool
    if kind is float:
        return isinstance(raw, int | float)
    return isinstance(kind, type) and isinstance(raw, kind)

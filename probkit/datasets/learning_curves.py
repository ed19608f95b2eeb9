"""Real learning curves: small collections in text or array files, and the formats of benchmarks.

None of the files come with the package. :func:`load_lcdb_curves` and :func:`load_mlp_curves` read
the two files of ``PROBKIT_DATA/pfn``; the other readers take files as their authors publish them.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = [
    "CurveSet",
    "load_lcbench",
    "load_lcdb_curves",
    "load_mlp_curves",
    "load_nasbench201",
    "load_pd1",
    "load_taskset",
]

Metric = Literal["accuracy", "error", "log loss"]


@dataclass(frozen=True)
class CurveSet:
    """Learning curves of many runs.

    Attributes:
        t: One tensor [step] of step numbers 1, 2, ... for each run.
        y: One tensor [step] of metric values for each run, float64.
        metric: "accuracy" (larger is better), "error" or "log loss".
        runs: One row for each run: data set, configuration, seed and the like.
        y0: [run] metric before training; None where it is not known.

    Example:
        >>> one = torch.tensor([0.2, 0.4], dtype=torch.float64)
        >>> known = pd.DataFrame({"seed": [0]})
        >>> curves = CurveSet((torch.arange(1, 3),), (one,), "accuracy", known)
        >>> len(curves), curves.lengths
        (1, (2,))
    """

    t: tuple[Tensor, ...]
    y: tuple[Tensor, ...]
    metric: Metric
    runs: pd.DataFrame
    y0: Tensor | None = None

    def __len__(self) -> int:
        """Number of runs."""
        return len(self.y)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of steps of each run."""
        return tuple(len(one) for one in self.y)

    def select(self, mask: Any) -> CurveSet:
        """Return the runs that a mask [run], a slice or a list of numbers picks."""
        index = np.arange(len(self))[mask]
        return CurveSet(
            tuple(self.t[i] for i in index),
            tuple(self.y[i] for i in index),
            self.metric,
            self.runs.iloc[index].reset_index(drop=True),
            None if self.y0 is None else self.y0[torch.from_numpy(index)],
        )


def _curve_set(
    rows: Sequence[tuple[Any, Mapping[str, Any]]],
    metric: Metric,
    where: str,
    y0: Sequence[float] | None = None,
) -> CurveSet:
    """Curves at steps 1, 2, ..., with what is known of each run."""
    if not rows:
        raise DataError(f"{where}: no curve found; check the names of data set and metric")
    y = tuple(torch.from_numpy(np.array(values, dtype=np.float64)) for values, _ in rows)
    t = tuple(torch.arange(1, len(one) + 1) for one in y)
    frame = pd.DataFrame([dict(known) for _, known in rows])
    start = None if y0 is None else torch.tensor(list(y0), dtype=torch.float64)
    return CurveSet(t, y, metric, frame, start)


def _existing(path: str | Path, what: str) -> Path:
    found = Path(path)
    if not found.exists():
        raise DataError(f"{what}: expected a file at {str(path)!r}, found none")
    return found


def _text(path: Path) -> str:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode("utf-8")
    return path.read_text(encoding="utf-8")


# ------------------------------------------------------------------ small collections


def load_lcdb_curves(path: str | Path, *, value: str = "test_mean") -> CurveSet:
    """Read sample-size curves of the Learning Curve Database (Mohr et al., 2022).

    Args:
        path: ``lcdb_accuracy_curves.csv.gz``, or the folder that holds it.
        value: "test_mean" or "valid_mean" (means over repetitions), or "valid_s0" (one repetition,
            with its noise; curves with gaps are left out).

    Returns:
        Accuracies at anchors 1, 2, 3, ..., sizes that grow by sqrt(2); ``runs`` holds ``openmlid``,
        ``learner`` and ``first_size``.

    Raises:
        DataError: The file is missing or lacks a column.
    """
    file = Path(path)
    file = _existing(file / "lcdb_accuracy_curves.csv.gz" if file.is_dir() else file, "LCDB")
    table = pd.read_csv(file)
    needed = ("openmlid", "learner", "size_train", value)
    missing = [name for name in needed if name not in table]
    if missing:
        raise DataError(f"{file.name}: expected the columns {', '.join(missing)}, found none such")
    rows = []
    for (task, learner), part in table.groupby(["openmlid", "learner"], sort=True):
        part = part.sort_values("size_train")
        if part[value].isna().any():
            continue
        first = int(part["size_train"].iloc[0])
        rows.append(
            (part[value].to_numpy(), {"openmlid": task, "learner": learner, "first_size": first})
        )
    return _curve_set(rows, "accuracy", file.name)


def load_mlp_curves(path: str | Path, *, metric: Literal["accuracy", "log loss"]) -> CurveSet:
    """Read the 180 MLP runs of 100 epochs on three small data sets.

    Args:
        path: ``mlp_epoch_curves.npz``, or the folder that holds it.
        metric: Which of the two validation metrics.

    Returns:
        Epochs 1 to 100, with the untrained network's value in ``y0``.

    Raises:
        DataError: The file is missing or lacks an array.
    """
    file = Path(path)
    file = _existing(file / "mlp_epoch_curves.npz" if file.is_dir() else file, "MLP curves")
    name = {"accuracy": "acc", "log loss": "loss"}.get(metric)
    if name is None:
        raise DataError(f"metric: expected 'accuracy' or 'log loss', got {metric!r}")
    with np.load(file, allow_pickle=False) as arrays:
        missing = [key for key in (name, "dataset", "config") if key not in arrays]
        if missing:
            raise DataError(f"{file.name}: expected the arrays {', '.join(missing)}")
        values, data, config = (arrays[key] for key in (name, "dataset", "config"))
    names = ("hidden", "batch", "lr", "momentum", "dropout", "label_noise", "decay", "init")
    rows = [
        (run[1:], {"dataset": str(of), **dict(zip(names, how.tolist(), strict=True))})
        for run, of, how in zip(values, data, config, strict=True)
    ]
    return _curve_set(rows, metric, file.name, values[:, 0].astype(float).tolist())


# ------------------------------------------------------------------ benchmarks


def load_lcbench(
    path: str | Path, *, dataset: str | None = None, tag: str = "Train/val_accuracy"
) -> CurveSet:
    """Read LCBench (Zimmer, Lindauer and Hutter, 2021) from its JSON file, gzipped or not.

    Args:
        path: A file ``{dataset: {configuration: {"config": ..., "log": {tag: [...]}}}}``.
        dataset: Only this data set; None reads all.
        tag: The logged quantity; a name with "accuracy" is in percent and divided by 100.

    Raises:
        DataError: The file is missing, is no such JSON, or does not log ``tag``.
    """
    file = _existing(path, "LCBench")
    try:
        content = json.loads(_text(file))
        tasks = content if dataset is None else {dataset: content[dataset]}
    except json.JSONDecodeError as error:
        raise DataError(f"{file.name}: expected JSON ({error})") from None
    except KeyError:
        raise DataError(
            f"{file.name}: has no data set {dataset!r}, but {', '.join(sorted(content)[:8])}"
        ) from None
    percent = "accuracy" in tag
    rows = []
    for name, configurations in tasks.items():
        for number, entry in configurations.items():
            log = entry.get("log", {}) if isinstance(entry, dict) else {}
            if tag not in log:
                raise DataError(
                    f"{file.name}: configuration {number} of {name} does not log {tag!r}, but "
                    f"{', '.join(sorted(log)[:8]) or 'nothing'}"
                )
            values = np.asarray(log[tag], dtype=np.float64) / (100.0 if percent else 1.0)
            known = entry.get("config", {})
            rows.append((values, {"dataset": name, "configuration": str(number), **known}))
    return _curve_set(rows, "accuracy" if percent else "log loss", file.name)


def load_nasbench201(
    path: str | Path,
    *,
    dataset: str = "cifar10-valid",
    split: str = "x-valid",
    budget: Literal["less", "full"] = "full",
    error: bool = True,
) -> CurveSet:
    """Read NAS-Bench-201 (Dong and Yang, 2020) from its ``.pth`` file.

    The file is a pickle. Only plain containers, numbers and tensors are read from it; anything that
    would run code is refused.

    Args:
        path: A file with ``arch2infos``: {number: {"less" | "full": {"arch_str", "all_results":
            {(dataset, seed): {"eval_acc1es": {"x-valid@0": percent, ...}}}}}}.
        dataset: Data set of the runs.
        split: Split that was evaluated after each epoch.
        budget: Runs of 12 ("less") or 200 ("full") epochs.
        error: Return error rates, else accuracies; both from 0 to 1.

    Raises:
        DataError: The file is missing, unsafe, or holds no such runs.
    """
    file = _existing(path, "NAS-Bench-201")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        archs = content["arch2infos"]
    except Exception as failure:
        raise DataError(
            f"{file.name}: expected the NAS-Bench-201 file with 'arch2infos', made of plain "
            f"containers ({str(failure).splitlines()[0]})"
        ) from None
    rows = []
    for number, budgets in archs.items():
        info = budgets.get(budget) or {}
        for (of, seed), result in info.get("all_results", {}).items():
            if of != dataset:
                continue
            found = {
                int(key.partition("@")[2]): float(value)
                for key, value in result["eval_acc1es"].items()
                if key.partition("@")[0] == split
            }
            if found:
                share = np.array([found[epoch] for epoch in sorted(found)]) / 100.0
                known = {"architecture": info.get("arch_str", str(number)), "seed": int(seed)}
                rows.append((1.0 - share if error else share, {"dataset": of, **known}))
    return _curve_set(rows, "error" if error else "accuracy", file.name)


def load_taskset(path: str | Path, *, channel: int = 1, replica: int | None = None) -> CurveSet:
    """Read one task of TaskSet (Metz et al., 2020) from its ``.npz`` file.

    Args:
        path: A file with ``optimizers`` [optimizer], ``xs`` [step] (training steps, the first
            before training) and ``ys`` [optimizer, replica, step, channel] (losses on train,
            inner and outer validation, and test).
        channel: Which of the losses.
        replica: Which repetition; None averages them.

    Returns:
        Losses after training began; those before are ``y0``. Values that are not finite are kept:
        the run diverged.

    Raises:
        DataError: The file is missing or has other arrays.
    """
    file = _existing(path, "TaskSet")
    with np.load(file, allow_pickle=False) as arrays:
        if "xs" not in arrays or "ys" not in arrays or arrays["ys"].ndim != 4:
            raise DataError(
                f"{file.name}: expected the arrays xs [step] and ys [optimizer, replica, step, "
                f"channel], found {', '.join(arrays)}"
            )
        ys, xs = arrays["ys"], arrays["xs"]
        names = arrays["optimizers"] if "optimizers" in arrays else np.arange(len(ys))
    if not -ys.shape[3] <= channel < ys.shape[3] or (
        replica is not None and not 0 <= replica < ys.shape[1]
    ):
        raise DataError(
            f"{file.name}: has {ys.shape[3]} channels and {ys.shape[1]} replicas, got "
            f"channel={channel}, replica={replica}"
        )
    if len(xs) != ys.shape[2] or float(xs[0]) != 0.0:
        raise DataError(
            f"{file.name}: expected xs [step={ys.shape[2]}] that begins before training, at 0"
        )
    losses = ys[..., channel].mean(1) if replica is None else ys[:, replica, :, channel]
    rows = [
        (run[1:], {"task": file.stem, "optimizer": _name(name)})
        for run, name in zip(losses, names, strict=True)
    ]
    return _curve_set(rows, "log loss", file.name, losses[:, 0].astype(float).tolist())


def _name(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def load_pd1(
    path: str | Path, *, metric: str = "valid/ce_loss", study: str | None = None
) -> CurveSet:
    """Read PD1 (Wang et al., 2021) from one of its ``.jsonl`` files, gzipped or not.

    Args:
        path: A file with one trial in a line: {"study_group": ..., "hps.*": ..., metric: [...]}.
        metric: The measured quantity; a name with "error" gives errors from 0 to 1.
        study: Only trials whose ``study_group`` is this.

    Returns:
        One curve for each trial that measured ``metric``. Trials without it, and measurements of
        null, are left out.

    Raises:
        DataError: The file is missing, no such JSON, or no trial measured ``metric``.
    """
    file = _existing(path, "PD1")
    rows = []
    for trial in _json_lines(file):
        values = trial.get(metric)
        other = study is not None and trial.get("study_group") != study
        if not isinstance(values, list) or other:
            continue
        numbers = [float(v) for v in values if v is not None]
        kept = [v for v in numbers if math.isfinite(v)]
        if kept:
            known = {k.removeprefix("hps."): v for k, v in trial.items() if k.startswith("hps.")}
            known = {k: v for k, v in known.items() if isinstance(v, str | int | float)}
            shared = {k: trial.get(k) for k in ("study_group", "dataset", "model", "status")}
            diverged = len(kept) < len(numbers)
            rows.append((kept, {**shared, "diverged": diverged, **known}))
    return _curve_set(rows, "error" if "error" in metric else "log loss", file.name)


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_text(file).splitlines(), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{file.name}, line {number}: expected JSON ({error})") from None

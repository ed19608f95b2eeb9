"""Tables of finished experiments as problems: every evaluation is a look-up."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from probkit.bo.outcomes import Outcomes
from probkit.bo.parameters import Categorical, Parameter
from probkit.bo.problems.base import Problem
from probkit.bo.space import Params, Space
from probkit.errors import DataError
from probkit.rng import Rng, seed_of, stream

__all__ = ["TABLES", "TableProblem"]

TABLES = {
    "phoneme": "hpobench_phoneme.npz",
    "parkinsons": "hpolib_parkinsons.npz",
    "cifar10": "nasbench201_cifar10.npz",
}
"""Short names of the tables in the folder ``bo`` of ``PROBKIT_DATA``."""


class TableProblem(Problem):
    """Hyper-parameters of neural networks, trained beforehand for every combination.

    A file holds ``values`` [configuration, seed], possibly with NaN for seeds that are missing, and
    ``meta``, a JSON text with ``names``, ``choices`` of each parameter, ``types``, ``metric`` and
    ``direction``; configurations run through the product of the choices, the last name fastest.
    What is maximised there keeps its direction here.

    Args:
        source: A file, or one of :data:`TABLES`, then looked for in the folder ``bo`` of the
            folder that the environment variable ``PROBKIT_DATA`` names.
        noise: Whether an evaluation is one random seed in place of their mean.
        rng: Chooses the seeds.
        size: Whether ``model_size``, where the file has it, is a second objective, minimised.

    Raises:
        DataError: There is no such file, or it is no such table.
    """

    def __init__(
        self, source: str | Path, *, noise: bool = False, rng: Rng = 0, size: bool = False
    ) -> None:
        self.path = _find(source)
        with np.load(self.path, allow_pickle=False) as archive:
            if not {"values", "meta"} <= set(archive):
                raise DataError(
                    f"{self.path.name}: expected arrays 'values' and 'meta', got {sorted(archive)}"
                )
            self._values = archive["values"].astype(np.float64)
            self.meta: dict[str, Any] = json.loads(str(archive["meta"]))
            sizes = archive["model_size"].astype(np.float64) if "model_size" in archive else None
        choices = {name: list(self.meta["choices"][name]) for name in self.meta["names"]}
        self._shape = tuple(len(values) for values in choices.values())
        if int(np.prod(self._shape)) != len(self._values):
            raise DataError(
                f"{self.path.name}: expected {int(np.prod(self._shape))} rows, the product of the "
                f"choices, got {len(self._values)}"
            )
        self._place = {
            name: {value: k for k, value in enumerate(values)} for name, values in choices.items()
        }
        self.space = Space(
            {name: _parameter(values, self.meta["types"][name]) for name, values in choices.items()}
        )
        self._metric = str(self.meta["metric"])
        direction = "max" if self.meta["direction"].startswith("max") else "min"
        objectives = {self._metric: direction}
        self._sizes: Any = None
        if size:
            if sizes is None:
                raise DataError(f"{self.path.name}: expected an array 'model_size' for size=True")
            self._sizes = sizes.reshape(len(self._values), -1).mean(1)
            objectives["model_size"] = "min"
        self.outcomes = Outcomes(objectives)
        self._means = np.nanmean(self._values, axis=1)
        self.noise, self._seed, self._count = noise, seed_of(rng), 0
        if not size:
            best = np.nanmax if direction == "max" else np.nanmin
            self.best = float(best(self._means))

    @property
    def name(self) -> str:
        """Name of the data set."""
        return str(self.meta.get("dataset", self.path.stem))

    def row(self, params: Params) -> int:
        """Return the row of a configuration."""
        index = [self._place[name][params[name]] for name in self.meta["names"]]
        return int(np.ravel_multi_index(index, self._shape))

    def mean(self, params: Params) -> float:
        """Return the mean over seeds, free of noise."""
        return float(self._means[self.row(self.space.check(params))])

    def evaluate(self, params: Params) -> dict[str, float]:
        """Look the outcomes up; with noise, of one seed."""
        row = self.row(params)
        value = float(self._means[row])
        if self.noise:
            known = self._values[row][~np.isnan(self._values[row])]
            # A counter in place of a stream, so that the k-th evaluation is the same again.
            pick = seed_of(stream(self._seed, "evaluation", self._count)) % len(known)
            value, self._count = float(known[pick]), self._count + 1
        found = {self._metric: value}
        if self._sizes is not None:
            found["model_size"] = float(self._sizes[row])
        return found


def _parameter(values: list[Any], kind: str) -> Parameter:
    """Numbers have an order, names have none."""
    return Categorical(values, ordered=kind in ("int", "float"))


def _find(source: str | Path) -> Path:
    """Return the file of a table.

    Raises:
        DataError: It is not there.
    """
    if isinstance(source, str) and source in TABLES:
        folder = os.environ.get("PROBKIT_DATA")
        if folder is None:
            raise DataError(
                f"table {source!r}: set the environment variable PROBKIT_DATA to the data folder, "
                "or pass the path of the file"
            )
        source = Path(folder) / "bo" / TABLES[source]
    path = Path(source)
    if not path.is_file():
        known = ", ".join(map(repr, TABLES))
        raise DataError(f"no table at {path}; expected a file, or one of {known}")
    return path

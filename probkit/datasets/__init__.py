"""Small real data sets that need no download, for demos, tutorials and tests."""

from __future__ import annotations

from probkit.datasets.cmapss import CMAPSS, download_cmapss, load_cmapss
from probkit.datasets.learning_curves import (
    CurveSet,
    load_lcbench,
    load_lcdb_curves,
    load_mlp_curves,
    load_nasbench201,
    load_pd1,
    load_taskset,
)
from probkit.datasets.mlp_runs import Epoch, MLPRun, random_mlp_runs
from probkit.datasets.regression import Regression, diabetes
from probkit.datasets.schools import eight_schools

__all__ = [
    "CMAPSS",
    "CurveSet",
    "Epoch",
    "MLPRun",
    "Regression",
    "diabetes",
    "download_cmapss",
    "eight_schools",
    "load_cmapss",
    "load_lcbench",
    "load_lcdb_curves",
    "load_mlp_curves",
    "load_nasbench201",
    "load_pd1",
    "load_taskset",
    "random_mlp_runs",
]

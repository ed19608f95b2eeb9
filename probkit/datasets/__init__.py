"""Small real data sets that need no download, for demos, tutorials and tests."""

from __future__ import annotations

from probkit.datasets.cmapss import CMAPSS, download_cmapss, load_cmapss
from probkit.datasets.regression import Regression, diabetes
from probkit.datasets.schools import eight_schools

__all__ = [
    "CMAPSS",
    "Regression",
    "diabetes",
    "download_cmapss",
    "eight_schools",
    "load_cmapss",
]

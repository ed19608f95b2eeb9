"""Problems to try studies on; minimised unless their data say else."""

from __future__ import annotations

from probkit.bo.problems.base import Problem
from probkit.bo.problems.pest_control import PestControl
from probkit.bo.problems.random_functions import BNNDraw, Polynomial
from probkit.bo.problems.sklearn_tuning import SklearnTuning
from probkit.bo.problems.synthetic import TestFunction
from probkit.bo.problems.tables import TableProblem

__all__ = [
    "BNNDraw",
    "PestControl",
    "Polynomial",
    "Problem",
    "SklearnTuning",
    "TableProblem",
    "TestFunction",
]

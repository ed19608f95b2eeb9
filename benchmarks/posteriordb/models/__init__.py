"""Thirteen models with reference posteriors, each as a native log joint and as a Pyro program."""

from __future__ import annotations

from benchmarks.posteriordb.models.case import Case
from benchmarks.posteriordb.models.diamonds import DIAMONDS
from benchmarks.posteriordb.models.eight_schools import EIGHT_SCHOOLS
from benchmarks.posteriordb.models.garch import GARCH
from benchmarks.posteriordb.models.gaussian_process import GAUSSIAN_PROCESS
from benchmarks.posteriordb.models.hidden_markov import HIDDEN_MARKOV
from benchmarks.posteriordb.models.lotka_volterra import LOTKA_VOLTERRA
from benchmarks.posteriordb.models.mixture import MIXTURE
from benchmarks.posteriordb.models.regressions import (
    AUTOREGRESSION,
    CORRELATED,
    EARNINGS,
    ELECTION,
    KIDS,
    MESQUITE,
)

__all__ = ["CASES", "Case"]

#: Name -> case; the name is that of the data file's first part.
CASES = {
    case.name: case
    for case in (
        EIGHT_SCHOOLS,
        GARCH,
        MIXTURE,
        HIDDEN_MARKOV,
        GAUSSIAN_PROCESS,
        AUTOREGRESSION,
        KIDS,
        MESQUITE,
        EARNINGS,
        ELECTION,
        CORRELATED,
        DIAMONDS,
        LOTKA_VOLTERRA,
    )
}

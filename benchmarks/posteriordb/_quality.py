"""The values that the two benchmark files report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

from benchmarks.harness.spec import Value

__all__ = ["evaluate", "z_bound"]

_QUICK = ("mesquite", "eight_schools")
# Tracing makes gradients of programs several times as dear as those of native log joints.
_OPTIONS: dict[str, dict[str, int]] = {"native": {}, "program": {"draws": 120, "warmup": 200}}


def z_bound(stored: Sequence[Any]) -> float:
    """Return the 99 % Bonferroni bound of |z| over all comparisons, in both forms."""
    from benchmarks.posteriordb._agreement import statistics

    parameters = sum(len(one["reference"]) for one in stored)
    comparisons = 2 * len(statistics()) * parameters
    return NormalDist().inv_cdf(1.0 - 0.01 / (2 * comparisons))


def evaluate(form: Literal["native", "program"], quick: bool) -> list[Value]:
    """Run NUTS on one form of every case (of two, where ``quick``).

    Raises:
        Unavailable: The data are not there.
    """
    from benchmarks.posteriordb._cells import report_of
    from benchmarks.posteriordb._store import stored
    from benchmarks.posteriordb.models import CASES

    files = {name: stored(name) for name in CASES}
    bound = z_bound(list(files.values()))
    values, largest, r_hat = [], 0.0, 0.0
    for name in _QUICK if quick else CASES:
        report = report_of(name, form, files[name], **_OPTIONS[form])
        worst = report.worst
        note = (
            f"{worst.statistic} of {worst.parameter}; {len(report.rows)} comparisons, R-hat "
            f"{report.r_hat:.4f}, ESS {report.ess:.0f}, {report.divergences} divergences"
        )
        print(f"  {name}, {form}: |z| {worst.z:.2f}, {note}", file=sys.stderr, flush=True)
        values.append(Value(f"{name}, largest z", worst.z, bound, rule="at most", note=note))
        largest, r_hat = max(largest, worst.z), max(r_hat, report.r_hat)
    return [
        *values,
        Value("all, largest z", largest, bound, rule="at most", note="99 % Bonferroni bound"),
        Value("all, largest R-hat", r_hat, note="short chains raise it, by 1 / (2 ESS) of one"),
    ]

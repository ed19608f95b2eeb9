"""NUTS against reference draws of others: means, standard deviations and quantiles.

Four posteriors of posteriordb; all thirteen are run by ``python -m benchmarks run posteriordb``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.posteriordb._agreement import compare
from benchmarks.posteriordb._run import run_case
from benchmarks.posteriordb._store import read
from benchmarks.posteriordb.models import CASES
from probkit import FromPyro
from probkit.density import log_joint_of
from probkit.inference.hmc.potential import Potential
from probkit.testing import z_bound

_FOLDER = Path(__file__).parents[1] / "data" / "posteriordb"
_FILES = {path.name.split("-")[0]: path for path in sorted(_FOLDER.glob("*.json.gz"))}
_LEVEL = 0.01
_SHORT = {"draws": 100, "warmup": 200, "chains": 32}


def slow(*arguments):
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("case", "form"),
    [
        ("eight_schools", "native"),
        slow("eight_schools", "program"),
        slow("garch", "native"),
        slow("garch", "program"),
        slow("low_dim_gauss_mix", "native"),
        slow("low_dim_gauss_mix", "program"),
        slow("hmm_example", "native"),
        slow("hmm_example", "program"),
    ],
)
def test_nuts_agrees_with_the_reference(case, form):
    stored = read(_FILES[case])
    report = run_case(case, form, stored, **_SHORT)
    assert len(report.rows) == 5 * len(stored["reference"])
    assert report.worst.z < z_bound(len(report.rows), _LEVEL), report.worst
    assert report.ess > 1000


# ------------------------------------------------------------------------ the two forms are equal

# Sites of the program as functions of those of the native form, and the log Jacobian between them.
SAME = {
    "eight_schools": lambda v: (v, 0.0),
    "garch": lambda v: (
        {
            "mu": v["mu"],
            "alpha0": v["alpha0"],
            "alpha1": v["shares"][..., 0],
            "share": v["shares"][..., 1] / (1 - v["shares"][..., 0]),
        },
        torch.log1p(-v["shares"][..., 0]),
    ),
    "low_dim_gauss_mix": lambda v: (
        {
            "mu": torch.stack([v["low"], v["low"] + v["gap"]], -1),
            "sigma": v["sigma"],
            "theta": v["theta"],
        },
        0.0,
    ),
    "hmm_example": lambda v: (
        {
            "theta1": v["theta"][..., 0, :],
            "theta2": v["theta"][..., 1, :],
            "mu": torch.stack([v["low"], v["low"] + v["gap"]], -1),
        },
        0.0,
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_native_form_and_program_have_one_density(case, generator):
    """Up to a constant, which improper priors leave open."""
    found = CASES[case]
    data = found.data(read(_FILES[case])["data"])
    free = Potential(found.native, data).free
    flat = torch.randn(6, free.size, generator=generator, dtype=torch.float64)
    values = free.values(flat)
    native = log_joint_of(found.native, values, data)
    others, jacobian = SAME[case](values)
    program = FromPyro(found.program, observed=found.observed)
    program.sites(data)
    gap = native - log_joint_of(program, others, data) + jacobian
    torch.testing.assert_close(gap, gap[:1].expand(6), rtol=1e-9, atol=1e-7)


# ---------------------------------------------------------------------------- the check can fail


def reference_of(draws):
    q05, q50, q95 = torch.quantile(draws, torch.tensor([0.05, 0.5, 0.95]).double()).tolist()
    mean, sd = float(draws.mean()), float(draws.std())
    return {"x": {"mean": mean, "sd": sd, "q05": q05, "q50": q50, "q95": q95, "n": len(draws)}}


def test_the_comparison_has_the_errors_it_states(generator):
    """Over independent pairs of draws z scores have variance one, whatever the statistic."""
    found = []
    for _ in range(150):
        ours = torch.randn(4, 200, generator=generator, dtype=torch.float64).mul(0.4).exp()
        theirs = torch.randn(1000, generator=generator, dtype=torch.float64).mul(0.4).exp()
        rows = compare({"x": ours}, reference_of(theirs))
        found.append([(row.value - row.reference) / row.error for row in rows])
    z = torch.tensor(found, dtype=torch.float64)
    # Four standard errors of the mean; for the variance, whose error is sqrt(2 / 150), as well.
    assert float(z.mean(0).abs().max()) < 4 / 150**0.5
    assert float((z.var(0) - 1).abs().max()) < 4 * (2 / 150) ** 0.5, z.var(0)


@pytest.mark.parametrize(
    ("change", "statistic"),
    [
        (lambda x: x + 0.15, "mean"),
        (lambda x: 1.15 * x, "sd"),
        (lambda x: torch.where(x > 1.4, 1.2 * x, x), "q95"),
    ],
)
def test_small_errors_are_seen(change, statistic, generator):
    theirs = torch.randn(10_000, generator=generator, dtype=torch.float64)
    ours = torch.randn(4, 1500, generator=generator, dtype=torch.float64)
    reference = reference_of(theirs)
    assert max(row.z for row in compare({"x": ours}, reference)) < z_bound(5, _LEVEL)
    rows = {row.statistic: row for row in compare({"x": change(ours)}, reference)}
    assert rows[statistic].z > z_bound(5, _LEVEL)

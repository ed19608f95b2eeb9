"""Run NUTS on one form of one case, and hold its draws against the reference."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from benchmarks.posteriordb._agreement import Row, compare
from benchmarks.posteriordb.models import CASES

__all__ = ["Report", "run_case"]

Form = Literal["native", "program"]
_COMMON: Mapping[str, Any] = {"chains": 32, "draws": 200, "warmup": 300}
_MAXIMA = 12


class Report(NamedTuple):
    """What came of one run.

    Attributes:
        case: Name of the case.
        form: "native" or "program".
        rows: Every comparison.
        r_hat: Largest rank-normalised R-hat.
        ess: Smallest bulk effective sample size.
        divergences: Divergent transitions after warm-up.
        seconds: Wall time of the run.
    """

    case: str
    form: Form
    rows: list[Row]
    r_hat: float
    ess: float
    divergences: int
    seconds: float

    @property
    def worst(self) -> Row:
        """The comparison with the largest |z|."""
        return max(self.rows, key=lambda row: row.z)


def run_case(
    name: str, form: Form, stored: Mapping[str, Any], *, rng: int | None = None, **options: Any
) -> Report:
    """Run NUTS on a case.

    Args:
        name: Name of the case.
        form: "native" for the log joint, "program" for the Pyro program.
        stored: Its file, as :func:`benchmarks.posteriordb._store.read` returns it.
        rng: Seed; None takes another for each form, lest equal densities give equal draws.
        options: Options of NUTS, and ``chains``, in place of those of the case.
    """
    import arviz

    from probkit import FromPyro, infer
    from probkit.errors import ConvergenceWarning
    from probkit.inference import MAP, NUTS

    case = CASES[name]
    rng = int(form == "program") if rng is None else rng
    settings = {**_COMMON, **dict(case.options), **options}
    chains = settings.pop("chains")
    data = case.data(stored["data"])
    model = case.native if form == "native" else FromPyro(case.program, observed=case.observed)
    began = time.perf_counter()
    with warnings.catch_warnings():
        # R-hat and divergences are part of the report.
        warnings.simplefilter("ignore", ConvergenceWarning)
        if case.from_mode:
            settings["start"] = infer(case.native, data, MAP(restarts=_MAXIMA), rng=rng)
        post = infer(model, data, NUTS(**settings), rng=rng, chains=chains)
    seconds = time.perf_counter() - began
    draws = case.scalars(post.draws)
    arrays = {k: draws[k].numpy() for k in stored["reference"]}
    return Report(
        case=name,
        form=form,
        rows=compare(draws, stored["reference"]),
        r_hat=max(float(arviz.rhat(x)) for x in arrays.values()),
        ess=min(float(arviz.ess(x)) for x in arrays.values()),
        divergences=int(post.sample_stats["diverging"].sum()),
        seconds=seconds,
    )

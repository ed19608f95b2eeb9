"""Memory of a fit at the size of the FINN.no data, computed from the sizes and checked on one."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.spec import Quality, Value


def _evaluate(quick: bool) -> Sequence[Value]:
    from probkit.models.slates import SlateGRU, SlateMeanField
    from probkit.models.slates.memory import fit_bytes

    users, items, touched = 2_277_645, 1_311_775, 50_000
    model = SlateGRU(items, dim=25)
    amortised = fit_bytes(model, SlateMeanField(), users=users, rows=touched)
    table = fit_bytes(model, SlateMeanField(users="table"), users=users, rows=touched)
    mib = 2.0**20
    return [
        Value("item table with Adam's moments, MiB", amortised["items"] / mib),
        Value("user table with Adam's moments, MiB", table["users"] / mib),
        Value("amortised users, MiB", amortised["users"] / mib),
        Value("a step with 50,000 rows, MiB", amortised["step"] / mib),
        Value("copy held while a chunk of steps runs, MiB", amortised["copy"] / mib),
        Value("slates as int32, mapped and not held, MiB", users * 20 * 25 * 4 / mib),
    ]


BENCHMARK = Quality(
    title="Slates: memory at the size of the FINN.no data",
    question="What does a fit of 1,311,775 items and 2,277,645 users (d = 25) hold in memory?",
    evaluate=_evaluate,
    packages=("probkit",),
)

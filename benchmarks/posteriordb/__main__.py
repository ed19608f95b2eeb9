"""``python -m benchmarks.posteriordb [CASE ...] [--form native|program]``: every comparison, shown.

The stored results come from ``python -m benchmarks run posteriordb``.
"""

from __future__ import annotations

from typing import Annotated

import typer

from benchmarks.harness.spec import Unavailable


def main(
    cases: Annotated[list[str] | None, typer.Argument(help="cases; all without any")] = None,
    form: Annotated[str, typer.Option(help="native, program or both")] = "both",
    rng: Annotated[int | None, typer.Option(help="seed; by default one for each form")] = None,
    rows: Annotated[int, typer.Option(help="comparisons to show of each")] = 3,
) -> None:
    """Run NUTS on reference posteriors and show the largest differences."""
    import torch

    from benchmarks.posteriordb._run import run_case
    from benchmarks.posteriordb._store import stored
    from benchmarks.posteriordb.models import CASES

    torch.set_num_threads(1)
    for name in cases or CASES:
        for kind in ("native", "program") if form == "both" else (form,):
            try:
                report = run_case(name, kind, stored(name), rng=rng)  # type: ignore[arg-type]
            except Unavailable as reason:
                raise typer.BadParameter(str(reason)) from reason
            print(
                f"{name} {kind}: worst |z| {report.worst.z:.2f}, R-hat {report.r_hat:.4f}, ESS "
                f"{report.ess:.0f}, {report.divergences} divergences, {report.seconds:.0f} s",
                flush=True,
            )
            for row in sorted(report.rows, key=lambda row: -row.z)[:rows]:
                print(
                    f"    {row.parameter} {row.statistic}: {row.value:.5g}, reference "
                    f"{row.reference:.5g}, error {row.error:.2g}, |z| {row.z:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    typer.run(main)

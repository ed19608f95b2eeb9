"""``python -m benchmarks.bo``: run the cells that are missing, and show how far the table is."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from benchmarks.bo._cells import path_of, plans, save
from benchmarks.harness.spec import Unavailable


def main(
    problems: Annotated[list[str] | None, typer.Option("--problem", help="only these")] = None,
    methods: Annotated[list[str] | None, typer.Option("--method", help="only these")] = None,
    seeds: Annotated[int, typer.Option(help="seeds of the main table")] = 10,
    minutes: Annotated[float, typer.Option(help="start no cell after this long")] = 60.0,
    status: Annotated[bool, typer.Option(help="only count")] = False,
) -> None:
    """Run missing cells one after another; each is stored when it is done."""
    chosen = [
        plan
        for plan in plans(seeds, min(5, seeds))
        if (not problems or plan.problem in problems) and (not methods or plan.method in methods)
    ]
    missing = [plan for plan in chosen if not path_of(plan).exists()]
    print(f"{len(chosen) - len(missing)} of {len(chosen)} cells are stored")
    if status:
        return
    import torch

    from benchmarks.bo._methods import run_cell

    torch.set_num_threads(1)
    end = time.monotonic() + 60 * minutes
    for plan in missing:
        if time.monotonic() > end:
            break
        if path_of(plan).exists():  # another process was faster
            continue
        try:
            cell = run_cell(plan)
        except Unavailable as reason:
            print(f"{plan.problem} {plan.method} {plan.seed}: {reason}", flush=True)
            continue
        save(cell)
        print(
            f"{plan.problem} {plan.method} {plan.seed}: {cell.quality[-1]:.3g}, "
            f"{sum(cell.ask_cpu_s) / len(cell.ask_cpu_s):.3f} CPU s an ask",
            flush=True,
        )


if __name__ == "__main__":
    typer.run(main)

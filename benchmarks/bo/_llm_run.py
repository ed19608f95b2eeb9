"""``python -m benchmarks.bo._llm_run KIND``: run the cells that are missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from typing import Annotated

import typer

from benchmarks.bo._llm_cells import path_of, plans, save
from benchmarks.harness.spec import Unavailable

_HOME = {
    "recorded": "_llm_recorded",
    "guard": "_llm_guard",
    "quality": "_llm_quality",
    "cost": "_llm_cost",
}
_PACKAGES = ("botorch", "gpytorch", "optuna", "scikit-learn", "torch")


def main(
    kind: Annotated[str, typer.Argument(help="recorded, guard, quality or cost")],
    models: Annotated[list[str] | None, typer.Option("--model", help="only these")] = None,
    methods: Annotated[list[str] | None, typer.Option("--method", help="only these")] = None,
    seeds: Annotated[int | None, typer.Option(help="how many seeds; all of the kind")] = None,
    minutes: Annotated[float, typer.Option(help="start no cell after this long")] = 60.0,
    status: Annotated[bool, typer.Option(help="only count")] = False,
) -> None:
    """Run missing cells one after another; each is stored when it is done."""
    chosen = [
        plan
        for plan in plans(kind, seeds)
        if (not models or plan.model in models) and (not methods or plan.method in methods)
    ]
    missing = [plan for plan in chosen if not path_of(plan).exists()]
    print(f"{len(chosen) - len(missing)} of {len(chosen)} cells are stored")
    if status:
        return
    import torch

    torch.set_num_threads(1)
    run = importlib.import_module(f"benchmarks.bo.{_HOME[kind]}").run
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    end = time.monotonic() + 60 * minutes
    for plan in missing:
        if time.monotonic() > end:
            break
        if path_of(plan).exists():  # another process was faster
            continue
        begin = time.process_time()
        try:
            found = run(plan)
        except Unavailable as reason:
            print(f"{plan}: {reason}", flush=True)
            break
        save(plan, {**found, "versions": versions})
        print(f"{' '.join(map(str, plan))}: {time.process_time() - begin:.1f} CPU s", flush=True)


if __name__ == "__main__":
    typer.run(main)

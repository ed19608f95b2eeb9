"""How long ``import probkit`` takes beside its own main dependencies, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from benchmarks.harness.spec import Benchmark, Comparison, Contender, Goal, Task, Workload

# What is loaded lazily must not only move the cost: this is everything up to the first model.
_FIRST_MODEL = """
import probkit as pk
from probkit.models import ScaleMixtureNNGP
pk.infer, pk.Posterior, pk.Predictive, pk.FromPyro
"""


def _importing(statement: str) -> Callable[[Workload, str], Task]:
    """Return a `prepare` whose task starts a fresh interpreter that runs `statement`."""

    def prepare(workload: Workload, device: str) -> Task:
        def run() -> None:
            status = subprocess.run([sys.executable, "-c", statement], check=False).returncode
            if status:
                raise RuntimeError(f"the fresh process ended with status {status}")

        return Task(run=run, fingerprint=lambda _: {})

    return prepare


BENCHMARK = Benchmark(
    title="Import time",
    question="Does `import probkit` stay close to the import of the packages it rests on?",
    workloads=({"process": "fresh"},),
    contenders=(
        Contender("import probkit", _importing("import probkit"), ("probkit",)),
        Contender("first model", _importing(_FIRST_MODEL), ("probkit",)),
        Contender(
            "import torch, pyro, gpytorch",
            _importing("import torch, pyro, gpytorch"),
            ("torch", "pyro-ppl", "gpytorch"),
        ),
    ),
    comparisons=tuple(
        Comparison(
            ours=ours,
            peer="import torch, pyro, gpytorch",
            agreement="nothing to compare; both processes must end with status 0",
            goal=Goal("below 1.5 times the dependencies' CPU time", 1.5),
        )
        for ours in ("import probkit", "first model")
    ),
    repeats=9,
)

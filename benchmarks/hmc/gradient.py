"""The potential's gradient for 64 chains at once beside that for one, eager."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.harness.spec import (
    Agreement,
    Benchmark,
    Comparison,
    Contender,
    Fingerprint,
    Goal,
    Task,
    Workload,
)


def _chains(count: int) -> Callable[[Workload, str], Task]:
    def prepare(workload: Workload, device: str) -> Task:
        import torch

        from benchmarks.hmc._native import NATIVE, data_of
        from probkit.inference.hmc.potential import Potential
        from probkit.tree import map_tensors

        name = str(workload["model"])
        data = map_tensors(lambda value: value.to(device), data_of(name))
        potential = Potential(NATIVE[name], data)
        generator = torch.Generator().manual_seed(0)
        point = 0.1 * torch.randn(potential.free.size, generator=generator, dtype=torch.float64)
        position = point.expand(count, -1).clone().to(device)

        def fingerprint(result: tuple[torch.Tensor, torch.Tensor]) -> Fingerprint:
            energy, gradient = result
            return {"first chain": [float(energy[0]), *gradient[0, :5].tolist()]}

        return Task(lambda: potential(position), fingerprint)

    return prepare


BENCHMARK = Benchmark(
    title="Gradients of many chains",
    question="How much dearer than the gradient of one chain is that of 64 chains together, eager?",
    workloads=tuple(
        {"model": name} for name in ("eight schools", "normal 100", "logistic", "radon")
    ),
    gpu_workloads=({"model": "logistic"}, {"model": "BNN 2x50"}),
    contenders=(
        Contender("64 chains", _chains(64), ("probkit", "torch"), devices=("cpu", "cuda")),
        Contender("1 chain", _chains(1), ("probkit", "torch"), devices=("cpu", "cuda")),
    ),
    comparisons=(
        Comparison(
            ours="64 chains",
            peer="1 chain",
            agreement=Agreement(("first chain",), rtol=1e-9, atol=1e-9),
            goal=Goal("at most twice one chain's CPU time", 2.0),
        ),
    ),
    notes=(
        "Eight schools and the normal are bound by dispatch, which all chains share. Logistic "
        "regression and radon are bound by arithmetic: 64 chains evaluate 64 times 1000 logistic "
        "functions, or gather and scatter 64 times 919 residuals.",
    ),
)

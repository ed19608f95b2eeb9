"""One EM iteration of switching autoregressions, one thread, beside dynamax (compiled)."""

from __future__ import annotations

from typing import Any

from benchmarks.arphmm._problem import dynamax_model, parameters, sequences, sizes
from benchmarks.harness.spec import (
    Agreement,
    Benchmark,
    Comparison,
    Contender,
    Goal,
    Task,
    Workload,
)


def _probkit(workload: Workload, device: str) -> Task:
    import torch

    from probkit.models import ARPHMM

    model = ARPHMM(int(workload["K"]), int(workload["L"]), start="zeros")
    rows = model.prepare(list(torch.as_tensor(sequences(workload)).to(device)))
    params = {k: torch.as_tensor(v).to(device) for k, v in parameters(workload).items()}

    def run() -> Any:
        with torch.no_grad():
            stats, log_likelihood = model.e_step(params, rows)
            model.m_step(stats, rows)
        return log_likelihood

    return Task(run, lambda log_likelihood: {"log likelihood": [float(log_likelihood)]})


def _dynamax(workload: Workload, device: str) -> Task:
    import jax

    model, params, props, y, inputs = dynamax_model(workload)
    m_state = model.initialize_m_step_state(params, props)

    @jax.jit
    def iteration(params: Any, m_state: Any) -> Any:
        stats, log_likelihood = jax.vmap(lambda a, b: model.e_step(params, a, b))(y, inputs)
        new, state = model.m_step(params, props, stats, m_state)
        return new, state, log_likelihood.sum()

    def run() -> Any:
        return jax.block_until_ready(iteration(params, m_state))[2]

    return Task(run, lambda log_likelihood: {"log likelihood": [float(log_likelihood)]})


def benchmark(features: int, goal: Goal) -> Benchmark:
    """The benchmark at one number of features."""
    return Benchmark(
        title=f"EM of switching autoregressions, one iteration, D = {features}",
        question=(
            "How long does one EM iteration take (E-step and M-step at the same parameters), "
            "against dynamax's LinearAutoregressiveHMM, its compilation left out?"
        ),
        workloads=sizes(features),
        gpu_workloads=sizes(features)[:2],
        contenders=(
            Contender("probkit", _probkit, ("probkit", "torch"), devices=("cpu", "cuda")),
            Contender("dynamax", _dynamax, ("dynamax", "jax", "jaxlib"), env="dynamax"),
        ),
        comparisons=(
            Comparison(
                ours="probkit",
                peer="dynamax",
                agreement=Agreement(("log likelihood",), rtol=1e-4),
                goal=goal,
            ),
        ),
        repeats=7,
    )

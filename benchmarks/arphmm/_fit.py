"""Fifty EM iterations end to end, compilation included, beside dynamax."""

from __future__ import annotations

from typing import Any

from benchmarks.arphmm._problem import dynamax_model, parameters, sequences, sizes
from benchmarks.harness.spec import Benchmark, Comparison, Contender, Goal, Task, Workload

_ITERATIONS = 50


def _probkit(workload: Workload, device: str) -> Task:
    import torch

    from probkit import infer
    from probkit.inference import EM
    from probkit.models import ARPHMM

    start = {k: torch.as_tensor(v).to(device) for k, v in parameters(workload).items()}

    class FromGivenStart(ARPHMM):
        def em_init(self, data: Any, *, rng: Any) -> Any:
            return start

    model = FromGivenStart(int(workload["K"]), int(workload["L"]), start="zeros")
    data = list(torch.as_tensor(sequences(workload)).to(device))

    def run() -> Any:
        import warnings

        with warnings.catch_warnings():  # fifty iterations are what is timed, converged or not
            warnings.simplefilter("ignore")
            return infer(model, data, EM(max_iter=_ITERATIONS, tolerance=0.0), rng=0)

    def fingerprint(posterior: Any) -> Any:
        trace = posterior.sample_stats["objective_trace"][0, 0]
        falls = (trace[:-1] - trace[1:]).max() / trace.abs().max()
        finite = bool(trace.isfinite().all())
        return {"finite": [float(finite)], "monotone": [float(falls <= 1e-5)]}

    return Task(run, fingerprint)


def _dynamax(workload: Workload, device: str) -> Task:
    import numpy as np

    model, params, props, y, inputs = dynamax_model(workload)

    def run() -> Any:
        return model.fit_em(params, props, y, inputs, num_iters=_ITERATIONS, verbose=False)[1]

    def fingerprint(trace: Any) -> Any:
        values = np.asarray(trace, dtype=float)
        return {"finite": [float(np.isfinite(values).all())]}

    return Task(run, fingerprint)


def benchmark(features: int, goal: Goal) -> Benchmark:
    """The benchmark at one number of features."""
    return Benchmark(
        title=f"EM of switching autoregressions, fifty iterations, D = {features}",
        question=(
            "How long do fifty EM iterations take from the call to the result, against dynamax, "
            "which compiles at every call?"
        ),
        workloads=sizes(features),
        contenders=(
            Contender("probkit", _probkit, ("probkit", "torch")),
            Contender("dynamax", _dynamax, ("dynamax", "jax", "jaxlib"), env="dynamax"),
        ),
        comparisons=(
            Comparison(
                ours="probkit",
                peer="dynamax",
                agreement=(
                    "the two maximise different objectives (ours has a matrix-normal "
                    "inverse-Wishart prior, the peer none on its emissions)"
                ),
                goal=goal,
            ),
        ),
        repeats=2,
    )

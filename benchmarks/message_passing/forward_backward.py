"""Forward-backward in hidden Markov models, float64, one thread, beside dynamax."""

from __future__ import annotations

from typing import Any

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


def _inputs(workload: Workload) -> tuple[Any, Any, Any]:
    """Initial [K], transition [K, K] probabilities and log emissions [N, T, K] as NumPy arrays."""
    import numpy as np

    rng = np.random.default_rng(0)
    n, steps, states = (int(workload[key]) for key in ("N", "T", "K"))
    transition = rng.random((states, states)) + np.eye(states)
    transition /= transition.sum(1, keepdims=True)
    return np.full(states, 1 / states), transition, 2 * rng.standard_normal((n, steps, states))


def _fingerprint(log_evidence: Any, smoothed: Any, counts: Any) -> Fingerprint:
    """A few numbers of evidence [N], marginals [N, T, K] and expected transitions [N, K, K]."""
    last = smoothed.shape[1] - 1
    return {
        "log evidence": [float(log_evidence[0]), float(log_evidence[-1])],
        "smoothed": [float(smoothed[-1, t, k]) for t in (0, last // 2, last) for k in (0, 1)],
        "transitions": [float(counts[0, k, j]) for k in (0, 1) for j in (0, 1)],
    }


def _probkit(method: str) -> Any:
    def prepare(workload: Workload, device: str) -> Task:
        import torch

        from probkit.inference.message_passing import hmm_smoother

        initial, transition, emission = (torch.as_tensor(x).to(device) for x in _inputs(workload))
        log_initial, log_transition = initial.log(), transition.log()

        def run() -> Any:
            return hmm_smoother(log_initial, log_transition, emission, method=method)  # type: ignore[arg-type]

        return Task(run, lambda r: _fingerprint(r.log_evidence, r.smoothed, r.pair_sum))

    return prepare


def _dynamax(parallel: bool) -> Any:
    def prepare(workload: Workload, device: str) -> Task:
        import jax

        jax.config.update("jax_enable_x64", True)
        from dynamax.hidden_markov_model import hmm_smoother, parallel_hmm_smoother

        initial, transition, emission = (jax.numpy.asarray(x) for x in _inputs(workload))
        smoother = parallel_hmm_smoother if parallel else hmm_smoother
        run_all = jax.jit(jax.vmap(lambda x: smoother(initial, transition, x)))

        def run() -> Any:
            return jax.block_until_ready(run_all(emission))

        def fingerprint(result: Any) -> Fingerprint:
            return _fingerprint(result.marginal_loglik, result.smoothed_probs, result.trans_probs)

        return Task(run, fingerprint)

    return prepare


_AGREE = Agreement(("log evidence", "smoothed", "transitions"), rtol=1e-8, atol=1e-8)
_PACKAGES = ("dynamax", "jax", "jaxlib")

BENCHMARK = Benchmark(
    title="Forward-backward",
    question=(
        "How long do state marginals and expected transitions of N sequences of T steps with K "
        "states take, against dynamax (jit, vmap)?"
    ),
    workloads=(
        {"N": 100, "T": 200, "K": 3},
        {"N": 100, "T": 200, "K": 8},
        {"N": 1, "T": 100_000, "K": 3},
        {"N": 1, "T": 100_000, "K": 8},
    ),
    gpu_workloads=(
        {"N": 100, "T": 200, "K": 8},
        {"N": 1, "T": 100_000, "K": 3},
        {"N": 1, "T": 100_000, "K": 8},
    ),
    contenders=(
        Contender("probkit", _probkit("auto"), ("probkit", "torch"), devices=("cpu", "cuda")),
        Contender("probkit, loop", _probkit("loop"), ("probkit", "torch"), devices=("cpu", "cuda")),
        Contender("probkit, scan", _probkit("scan"), ("probkit", "torch"), devices=("cpu", "cuda")),
        Contender("dynamax", _dynamax(False), _PACKAGES, env="dynamax"),
        Contender("dynamax, parallel", _dynamax(True), _PACKAGES, env="dynamax"),
    ),
    comparisons=(
        Comparison(
            ours="probkit",
            peer="dynamax",
            agreement=_AGREE,
            goal=Goal("at most 2.5 times dynamax's CPU time", 2.5),
        ),
        Comparison(ours="probkit, scan", peer="dynamax, parallel", agreement=_AGREE),
        Comparison(ours="probkit, loop", peer="probkit, scan", agreement=_AGREE),
    ),
    repeats=5,
)

"""Plain sparse regression beside scikit-learn's ARDRegression, noise unknown.

n rows, p columns i.i.d. N(0, 1), 15 non-zero weights N(0, 1), 20 dB. Neither side fits an
intercept. The fingerprint holds the error of the weights, NMSE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.harness.spec import (
    Benchmark,
    Comparison,
    Contender,
    Fingerprint,
    Goal,
    Task,
    Workload,
)

_NONZEROS, _SNR = 15, 20.0


def _data(workload: Workload) -> tuple[Any, Any, Any]:
    """Return H [n, p], the true weights and y as NumPy arrays."""
    import numpy as np

    n, p = int(workload["n"]), int(workload["p"])
    rng = np.random.default_rng(0)
    H, x = rng.standard_normal((n, p)), np.zeros(p)
    x[rng.choice(p, _NONZEROS, replace=False)] = rng.standard_normal(_NONZEROS)
    field = H @ x
    noise = np.sqrt(np.mean(field**2) / 10 ** (_SNR / 10))
    return H, x, field + noise * rng.standard_normal(n)


def _score(x: Any) -> Callable[[Any], Fingerprint]:
    import numpy as np

    def entries(found: Any) -> Fingerprint:
        weights = np.asarray(found)
        return {
            "NMSE": [float(((weights - x) ** 2).sum() / (x**2).sum())],
            "non-zeros": [float((np.abs(weights) > 1e-3 * np.abs(weights).max()).sum())],
        }

    return entries


def _probkit(**options: Any) -> Callable[[Workload, str], Task]:
    def prepare(workload: Workload, device: str) -> Task:
        import torch

        from probkit import infer
        from probkit.models import EvidenceMaximization, SparseRegression

        H, x, y = _data(workload)
        model = SparseRegression(torch.as_tensor(H), update=options.get("update", "em"))
        fit = EvidenceMaximization(prune_after=options.get("prune_after", 10))
        data = torch.as_tensor(y)

        def run() -> Any:
            return infer(model, data, fit, rng=0).analytic["weights"].mean

        return Task(run, _score(x))

    return prepare


def _sklearn(workload: Workload, device: str) -> Task:
    from sklearn.linear_model import ARDRegression

    H, x, y = _data(workload)
    return Task(lambda: ARDRegression(fit_intercept=False).fit(H, y).coef_, _score(x))


_OURS = ("probkit", "torch")
_NO_AGREEMENT = "the fits differ by design; their errors (NMSE) stand in the fingerprints"

BENCHMARK = Benchmark(
    title="Sparse regression, noise unknown",
    question=(
        "How long does a fit take against ARDRegression, and with what error of the weights: the "
        "default (EM, pruned after ten steps) and the quickest setting (MacKay, pruned after "
        "three)?"
    ),
    workloads=({"n": 200, "p": 500}, {"n": 300, "p": 3000}, {"n": 1200, "p": 1000}),
    contenders=(
        Contender("EM", _probkit(), _OURS),
        Contender("MacKay", _probkit(update="mackay", prune_after=3), _OURS),
        Contender("ARDRegression", _sklearn, ("scikit-learn", "numpy")),
    ),
    comparisons=(
        Comparison(ours="EM", peer="ARDRegression", agreement=_NO_AGREEMENT),
        Comparison(
            ours="MacKay",
            peer="ARDRegression",
            agreement=_NO_AGREEMENT,
            goal=Goal("at least 10 times faster than ARDRegression", 0.1),
        ),
    ),
    repeats=3,
    min_seconds=0.1,
)

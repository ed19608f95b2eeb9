"""The common problem and contenders of the relevance-vector benchmarks."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.spec import Fingerprint, Task, Workload


def problem(workload: Workload) -> tuple[Any, Any, Any]:
    """Inputs [n, 1], noisy values and true values [n] of a sinc on [-10, 10], noise 0.1."""
    import numpy as np

    n = int(workload["n"])
    x = np.linspace(-10, 10, n)[:, None]
    truth = np.sinc(x[:, 0] / np.pi)
    return x, truth + 0.1 * np.random.default_rng(0).standard_normal(n), truth


def task(make: Any, vectors: Any) -> Any:
    """A contender from an estimator factory and a way to count its vectors."""

    def prepare(workload: Workload, device: str) -> Task:
        import numpy as np

        x, y, truth = problem(workload)

        def run() -> Any:
            estimator = make()
            estimator.fit(x, y)  # one peer's fit returns None
            return estimator

        def fingerprint(fitted: Any) -> Fingerprint:
            error = float(np.sqrt(np.mean((np.ravel(fitted.predict(x)) - truth) ** 2)))
            return {"rmse": [error], "vectors": [float(vectors(fitted))]}

        return Task(run, fingerprint)

    return prepare


def probkit() -> Any:
    """Relevance vector regression of probkit."""
    from probkit.models import RVMRegressor

    return RVMRegressor(gamma=1 / 9)


def sklearn_rvm() -> Any:
    """The one of sklearn-rvm."""
    from sklearn_rvm import EMRVR

    return EMRVR(kernel="rbf", gamma=1 / 9)


def fastrvm() -> Any:
    """The one of fastrvm."""
    from fastrvm import RVR

    return RVR(kernel="rbf", gamma=1 / 9)

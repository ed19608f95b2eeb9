"""The one-dimensional integral over the scale: quadrature and importance sampling.

Given the Gram matrix, a scale mixture needs only q = y' K^-1 y, log|K| and n:
p(y) = int N(y; 0, v K) p(v) dv. The reference integrates this in u = log v on a million points,
with densities written out here, independently of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.harness.spec import Quality, Value

_POINTS = 1_000_000
_SMALL, _LARGE = 4, 60
_QUADRATURE_TOLERANCE = 1e-10
_SAMPLES = 10_000


class _Integral(NamedTuple):
    log_evidence: float
    scale_mean: float


def _log_burr(u: Any) -> Any:
    """Log density in v = exp(u) of Burr XII with c = 2, d = 1: 2 v / (1 + v^2)^2."""
    import numpy as np

    return math.log(2.0) + u - 2.0 * np.logaddexp(0.0, 2.0 * u)


def _log_half_cauchy(u: Any) -> Any:
    """Log density in v of sigma = sqrt(v) ~ HalfCauchy(1): 1 / (pi sqrt(v) (1 + v))."""
    import numpy as np

    return -math.log(math.pi) - 0.5 * u - np.logaddexp(0.0, u)


def _log_log_normal(u: Any) -> Any:
    """Log density in v of LogNormal(0, 1)."""
    return -0.5 * math.log(2.0 * math.pi) - u - 0.5 * u**2


_DENSITIES: dict[str, Callable[[Any], Any]] = {
    "Burr(2, 1)": _log_burr,
    "half Cauchy(1)": _log_half_cauchy,
    "log-normal(0, 1)": _log_log_normal,
}


def _reference(log_density: Callable[[Any], Any], gram: Any, y: Any) -> _Integral:
    """Integrate on a million trapezoid points around the mode."""
    import numpy as np

    factor = np.linalg.cholesky(gram)
    q = float(np.sum(np.linalg.solve(factor, y) ** 2))
    constant = -np.sum(np.log(np.diag(factor))) - 0.5 * len(y) * math.log(2.0 * math.pi)
    u, step = np.linspace(-60.0, 60.0, _POINTS, retstep=True)
    log_joint = constant - 0.5 * len(y) * u - 0.5 * q * np.exp(-u) + log_density(u) + u
    peak = log_joint.max()
    weights = np.exp(log_joint - peak)
    log_evidence = float(peak + np.log(weights.sum() * step))
    return _Integral(log_evidence, float((weights * np.exp(u)).sum() / weights.sum()))


def _problem(n: int) -> tuple[Any, Any]:
    """Return x [n, 3] and y [n] as float64 arrays, y at five times the kernel's own scale."""
    import numpy as np

    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 3))
    return x, 5.0 * (np.sin(2.0 * x[:, 0]) + 0.3 * rng.standard_normal(n))


def _law(name: str) -> Any:
    from probkit.models import BurrXII, HalfCauchy, LogNormal

    laws = {
        "Burr(2, 1)": lambda: BurrXII(2.0, 1.0),
        "half Cauchy(1)": lambda: HalfCauchy(1.0),
        "log-normal(0, 1)": lambda: LogNormal(0.0, 1.0),
    }
    return laws[name]()


def _compare(n: int, law: str) -> list[Value]:
    import torch

    from probkit import infer
    from probkit.kernels import NNGPKernel
    from probkit.models import ScaleMixtureNNGP

    noise = 0.1
    x, y = (torch.as_tensor(array) for array in _problem(n))
    kernel = NNGPKernel(depth=3, w_std=1.5, b_std=0.3, last_w_std=1.2).double()
    with torch.no_grad():
        gram = kernel(x).to_dense() + noise * torch.eye(n, dtype=x.dtype)
    exact = _reference(_DENSITIES[law], gram.numpy(), y.numpy())
    model = ScaleMixtureNNGP(kernel, scale=_law(law), noise_var=noise)
    quadrature = infer(model, (x, y), rng=0)
    case = f"{law}, n = {n}"
    return [
        Value(
            f"{case}: quadrature, error of log p(y)",
            abs(float(quadrature.log_evidence.value[0]) - exact.log_evidence),
            reference=0.0,
            tolerance=_QUADRATURE_TOLERANCE * abs(exact.log_evidence),
            rule="at most",
            note=f"log p(y) = {exact.log_evidence:.6f}",
        ),
        Value(
            f"{case}: quadrature, relative error of E[scale | y]",
            abs(float(quadrature.marginals["scale_var"].mean) / exact.scale_mean - 1.0),
            reference=0.0,
            tolerance=1e-8,
            rule="at most",
            note=f"E[scale | y] = {exact.scale_mean:.6f}",
        ),
        *(_sampled(case, model, (x, y), proposal, exact) for proposal in ("guide", "prior")),
    ]


def _sampled(case: str, model: Any, data: Any, proposal: str, exact: _Integral) -> Value:
    """Report the error of importance sampling; its noise is its own, so no bound is set."""
    import warnings

    from probkit import NumericsWarning, infer
    from probkit.inference import ImportanceSampling

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumericsWarning)  # few effective draws: the note says it
        posterior = infer(model, data, ImportanceSampling(_SAMPLES, proposal=proposal), rng=0)
    whose = "the likelihood of the scale" if proposal == "guide" else "the prior"
    return Value(
        f"{case}: {_SAMPLES} draws from {whose}, error of log p(y)",
        abs(float(posterior.log_evidence.value[0]) - exact.log_evidence),
        note=f"effective sample size {_effective_size(posterior):.1f}",
    )


def _effective_size(posterior: Any) -> float:
    """Return (sum w)^2 / sum w^2 of the importance weights of the first chain."""
    log_weights = posterior.log_weights[0]
    weights = (log_weights - log_weights.max()).exp()
    return float(weights.sum() ** 2 / (weights**2).sum())


def _evaluate(quick: bool) -> list[Value]:
    sizes = (_SMALL,) if quick else (_SMALL, _LARGE)
    return [value for n in sizes for law in _DENSITIES for value in _compare(n, law)]


BENCHMARK = Quality(
    title="Scale integral, quadrature and importance sampling",
    question=(
        "How far are the quadrature and self-normalised importance sampling from a reference "
        "on a million points?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)

"""Condition on n points and predict 500: a scale mixture beside a plain GP, at fixed values.

All sides use the same NNGP kernel object, the same noise and no optimisation, and return mean,
variance and three quantiles of a new observation. Ours also computes the log evidence; GPyTorch
computes the posterior only, so the comparison leans its way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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

_D, _TEST, _NOISE = 8, 500, 0.1
_LEVELS = (0.05, 0.5, 0.95)


class _Prediction(NamedTuple):
    mean: Any
    variance: Any
    quantiles: Any


def _data(n: int, device: str) -> tuple[Any, Any, Any]:
    """Return x [n, 8], y [n] and new x [500, 8] as float64 tensors."""
    import numpy as np
    import torch

    rng = np.random.default_rng(0)
    x, new = rng.standard_normal((n, _D)), rng.standard_normal((_TEST, _D))
    y = np.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] + _NOISE**0.5 * rng.standard_normal(n)
    return tuple(torch.as_tensor(a).to(device) for a in (x, y, new))


def _kernel(like: Any) -> Any:
    from probkit.kernels import NNGPKernel

    return NNGPKernel(depth=3, activation="relu", w_std=1.5, b_std=0.3, last_w_std=1.2).to(like)


def _numbers(prediction: _Prediction) -> Fingerprint:
    rows = prediction._asdict().items()
    return {key: value.flatten()[:10].tolist() for key, value in rows}


def _probkit(law: Callable[[], Any]) -> Callable[[Workload, str], Task]:
    """Return a `prepare` that conditions a `ScaleMixtureNNGP` with this law of the scale."""

    def prepare(workload: Workload, device: str) -> Task:
        import torch

        from probkit import infer
        from probkit.models import ScaleMixtureNNGP

        x, y, new = _data(int(workload["n"]), device)
        model = ScaleMixtureNNGP(_kernel(x), scale=law(), noise_var=_NOISE)
        levels = torch.tensor(_LEVELS).to(x)

        def run() -> _Prediction:
            with torch.no_grad():
                predictive = infer(model, (x, y), rng=0).predict(new)
                return _Prediction(
                    predictive.mean, predictive.variance, predictive.quantile(levels)
                )

        return Task(run, _numbers)

    return prepare


def _inverse_gamma() -> Any:
    from probkit.models import InverseGamma

    return InverseGamma(2.0, 2.0)


def _point_mass() -> Any:
    from probkit.models import PointMass

    return PointMass(1.0)


def _gpytorch(workload: Workload, device: str) -> Task:
    import gpytorch
    import torch

    x, y, new = _data(int(workload["n"]), device)
    covariance = _kernel(x)
    levels = torch.tensor(_LEVELS).to(x)

    class GP(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            likelihood = gpytorch.likelihoods.GaussianLikelihood().to(x)
            super().__init__(x, y, likelihood)
            likelihood.noise = _NOISE
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = covariance

        def forward(self, rows: Any) -> Any:
            mean = self.mean_module(rows)
            return gpytorch.distributions.MultivariateNormal(mean, self.covar_module(rows))

    settings = gpytorch.settings

    def run() -> _Prediction:
        exact = settings.fast_computations(
            covar_root_decomposition=False, log_prob=False, solves=False
        )
        with torch.no_grad(), exact:
            gp = GP().eval()
            predictive = gp.likelihood.eval()(gp(new))
            marginal = torch.distributions.Normal(predictive.mean, predictive.variance.sqrt())
            return _Prediction(predictive.mean, predictive.variance, marginal.icdf(levels[:, None]))

    return Task(run, _numbers)


_OURS = ("probkit", "torch", "gpytorch")
_BOTH = ("cpu", "cuda")

BENCHMARK = Benchmark(
    title="Fit and predict, scale mixture and plain GP",
    question=(
        "What does a random scale (inverse gamma, exact Student-t) add to conditioning and "
        "predicting 500 points with mean, variance and quantiles, and how does it stand beside a "
        "GPyTorch ExactGP with the same kernel, solved by Cholesky?"
    ),
    workloads=tuple({"n": n} for n in (500, 1000, 2000, 4000)),
    gpu_workloads=({"n": 4000}, {"n": 10000}),
    contenders=(
        Contender("mixture", _probkit(_inverse_gamma), _OURS, devices=_BOTH),
        Contender("plain", _probkit(_point_mass), _OURS, devices=_BOTH),
        Contender("GPyTorch", _gpytorch, ("gpytorch", "linear_operator", "torch"), devices=_BOTH),
    ),
    comparisons=(
        Comparison(
            ours="mixture",
            peer="plain",
            # the law of the scale changes variance and tails, never the mean
            agreement=Agreement(("mean",), rtol=1e-9, atol=1e-12),
            goal=Goal("at most 5 % above the plain NNGP", 1.05),
            gpu_goal=Goal("at most 5 % above the plain NNGP", 1.05),
        ),
        Comparison(
            ours="mixture",
            peer="GPyTorch",
            agreement=Agreement(("mean",), rtol=1e-6, atol=1e-9),
            goal=Goal("at most 5 % above GPyTorch", 1.05),
        ),
        Comparison(
            ours="plain",
            peer="GPyTorch",
            agreement=Agreement(("mean", "variance", "quantiles"), rtol=1e-6, atol=1e-9),
        ),
    ),
    repeats=5,
    processes=3,
    min_seconds=0.3,
)

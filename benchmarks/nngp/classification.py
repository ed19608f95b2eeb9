"""One epoch of the sparse classifier against GPyTorch's, at equal inducing points and draws."""

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

_BATCH, _DRAWS, _CLASSES = 100, 32, 10


def _parameters(inducing: int) -> tuple[Any, Any]:
    """Return whitened means [class, inducing] and one lower factor, away from the prior."""
    import numpy as np

    generator = np.random.default_rng(0)
    mean = generator.standard_normal((_CLASSES, inducing))
    factor = 0.05 * np.tril(generator.standard_normal((inducing, inducing)), -1)
    return mean, factor + 0.5 * np.eye(inducing)


def _laws(mean: Any, variance: Any, divergence: Any) -> Fingerprint:
    """Return a few marginal moments of the scores at the test rows, and the divergence."""
    return {
        "mean": [float(v) for v in mean[:3].flatten()],
        "variance": [float(v) for v in variance[:3].flatten()],
        "sums": [float(mean.sum()), float(variance.sum())],
        "divergence": [float(divergence)],
    }


def _probkit(law: str) -> Any:
    def prepare(workload: Workload, device: str) -> Task:
        import torch

        from benchmarks.nngp import _svgp
        from probkit.inference import SVI
        from probkit.model import Batch
        from probkit.models import InverseGamma, PointMass, ScaleMixtureClassifier
        from probkit.models.nngp_classification.bound import gaussian_divergence
        from probkit.sampler import Problem

        x, y, x_test, _ = _svgp.digits(int(workload["n"]))
        count = int(workload["inducing"])
        scale = PointMass(1.0) if law == "point mass" else InverseGamma(2.0, 2.0)
        model = ScaleMixtureClassifier(_svgp.kernel(), scale, count)
        data, guide = model.prepare((x, y)), model.guide()
        params = guide.init(model, data, rng=0)
        mean, factor = (torch.as_tensor(part) for part in _parameters(count))
        params["mean"] = mean
        params["log_diagonal"] = factor.diagonal().log().repeat(_CLASSES, 1)
        params["below"] = torch.tril(factor, -1).repeat(_CLASSES, 1, 1)
        epoch = len(x) // _BATCH
        sampler = SVI(steps=epoch, chunk=epoch, lr=0.01, batch_size=_BATCH, particles=_DRAWS)
        problem = Problem(model, data)
        state = sampler.init(problem, rngs=[torch.Generator().manual_seed(0)])
        state["params"] = params

        def run() -> Any:
            return sampler.step(problem, state, rngs=[torch.Generator().manual_seed(0)])

        def fingerprint(_: Any) -> Fingerprint:
            with torch.no_grad():
                scores = guide.scores(params, model, data, x_test)
                white = guide._law(params, guide._prior_factor(params, model, data))
                divergence = gaussian_divergence(white, torch.ones((), dtype=torch.float64))
                assert guide.elbo(params, model, Batch(data), 2, rng=0).shape == (2,)
            return _laws(scores.mean, scores.variance, divergence)

        return Task(run, fingerprint)

    return prepare


def _gpytorch(workload: Workload, device: str) -> Task:
    import copy

    import torch

    from benchmarks.nngp import _svgp
    from probkit.models.nngp_classification.data import stratified

    x, y, x_test, _ = _svgp.digits(int(workload["n"]))
    count = int(workload["inducing"])
    model, likelihood = _svgp.peer(x[stratified(y, count)], _CLASSES)
    mean, factor = (torch.as_tensor(part) for part in _parameters(count))
    strategy = model.variational_strategy.base_variational_strategy
    law = strategy._variational_distribution
    law.variational_mean.data = mean
    law.chol_variational_covar.data = factor.repeat(_CLASSES, 1, 1)
    strategy.variational_params_initialized.fill_(1)
    start = copy.deepcopy(model.state_dict())

    def run() -> Any:
        model.load_state_dict(start)
        _svgp.train_peer(
            model, likelihood, x, y,
            steps=len(x) // _BATCH, batch=_BATCH, draws=_DRAWS, lr=0.01,
        )  # fmt: skip
        return model

    def fingerprint(_: Any) -> Fingerprint:
        model.load_state_dict(start)
        model.train()
        with torch.no_grad():
            model(x_test)
            divergence = strategy.kl_divergence().sum()
            model.eval()
            there = model(x_test)
        return _laws(there.mean, there.variance, divergence)

    return Task(run, fingerprint)


_AGREEMENT = Agreement(("mean", "variance", "sums", "divergence"), rtol=1e-4, atol=1e-5)

BENCHMARK = Benchmark(
    title="Sparse classification, one epoch",
    question=(
        "How long does an epoch of Adam on batches of 100 digits take (10 classes, full S, "
        "32 draws, float64, one thread), against GPyTorch's SVGP with the same kernel, inducing "
        "points and starting parameters?"
    ),
    workloads=(
        {"n": 1000, "inducing": 50},
        {"n": 1000, "inducing": 100},
        {"n": 1000, "inducing": 200},
    ),
    contenders=(
        Contender("probkit", _probkit("inverse gamma"), ("probkit", "torch", "gpytorch")),
        Contender("probkit, fixed scale", _probkit("point mass"), ("probkit", "torch")),
        Contender("gpytorch", _gpytorch, ("gpytorch", "linear-operator", "torch")),
    ),
    comparisons=(
        Comparison("probkit", "gpytorch", _AGREEMENT, Goal("no slower than GPyTorch", 1.0)),
        Comparison("probkit", "probkit, fixed scale", _AGREEMENT),
    ),
    repeats=5,
    min_seconds=0.1,
)

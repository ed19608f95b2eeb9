"""Test log density and accuracy of sparse classifiers on digits, clean and corrupted.

1000 of scikit-learn's digits to learn from, 797 to test on, the same kernel (ReLU, three hidden
layers), inducing points, batches, draws and steps on both sides.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.harness.spec import Quality, Value

_INDUCING, _STEPS, _LR, _DRAWS, _BATCH = 100, 1500, 0.1, 16, 100
_PREDICT = 2000
_NOISE = 0.3


def _scores(probs: Any, y: Any) -> tuple[float, float]:
    """Mean negative log probability of the labels, and accuracy."""
    nll = -float(probs.gather(1, y[:, None]).log().mean())
    return nll, float((probs.argmax(-1) == y).double().mean())


def _ours(law: Any, data: tuple[Any, ...], tests: dict[str, Any], steps: int) -> dict[str, Any]:
    from benchmarks.nngp import _svgp
    from probkit import infer
    from probkit.inference import SVI
    from probkit.models import ScaleMixtureClassifier

    model = ScaleMixtureClassifier(_svgp.kernel(), law, _INDUCING, draws=_PREDICT)
    sampler = SVI(steps=steps, lr=_LR, batch_size=_BATCH, particles=_DRAWS)
    posterior = infer(model, data, sampler, rng=0)
    return {name: posterior.predict(x, rng=1).probs for name, x in tests.items()}


def _regression(data: tuple[Any, ...], tests: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.nngp import _svgp
    from probkit import infer
    from probkit.models import ScaleMixtureClassifier

    model = ScaleMixtureClassifier(_svgp.kernel(), likelihood="gaussian", noise_var=0.01)
    posterior = infer(model, data, rng=0)
    return {name: posterior.predict(x).probs for name, x in tests.items()}


def _peer(
    data: tuple[Any, ...], tests: dict[str, Any], steps: int, learn_scale: bool
) -> dict[str, Any]:
    from benchmarks.nngp import _svgp
    from probkit.models.nngp_classification.data import stratified
    from probkit.rng import scope

    x, y = data
    model, likelihood = _svgp.peer(x[stratified(y, _INDUCING)], 10, learn_scale=learn_scale)
    with scope(rng=0):
        _svgp.train_peer(
            model, likelihood, x, y, steps=steps, batch=_BATCH, draws=_DRAWS, lr=_LR
        )  # fmt: skip
        return {name: _svgp.probabilities(model, rows, _PREDICT) for name, rows in tests.items()}


def _evaluate(quick: bool) -> list[Value]:
    import torch

    from benchmarks.nngp import _svgp
    from probkit.models import InverseGamma, PointMass

    x, y, x_test, y_test = _svgp.digits(1000)
    noise = torch.randn(x_test.shape, generator=torch.Generator().manual_seed(1)).double()
    tests = {"clean": x_test, f"noise {_NOISE}": x_test + _NOISE * noise}
    steps = 20 if quick else _STEPS
    results = {
        "GPyTorch SVGP": _peer((x, y), tests, steps, False),
        "GPyTorch SVGP, learned scale": _peer((x, y), tests, steps, True),
        "fixed scale": _ours(PointMass(1.0), (x, y), tests, steps),
        "inverse gamma": _ours(InverseGamma(2.0, 2.0), (x, y), tests, steps),
        "Gaussian likelihood": _regression((x, y), tests),
    }
    values = []
    for test in tests:
        peer_nll, peer_accuracy = _scores(results["GPyTorch SVGP"][test], y_test)
        for name, probs in results.items():
            nll, accuracy = _scores(probs[test], y_test)
            print(f"  {test}, {name}: NLL {nll:.4f}, accuracy {accuracy:.4f}", file=sys.stderr)
            # The same model as the peer: one standard error of the difference is about 0.01.
            same = name == "fixed scale" and test == "clean" and not quick
            values.append(
                Value(
                    f"{test}, {name}, test NLL",
                    nll,
                    reference=peer_nll if same else None,
                    tolerance=0.02,
                    note="GPyTorch fitted alike" if same else "",
                )
            )
            values.append(
                Value(
                    f"{test}, {name}, accuracy",
                    accuracy,
                    reference=peer_accuracy if same else None,
                    tolerance=0.01,
                )
            )
    return values


BENCHMARK = Quality(
    title="Sparse classification, digits",
    question=(
        "Does the classifier with a fixed scale reach the test NLL (within 0.02) and accuracy "
        "(within 0.01) of GPyTorch's SVGP fitted alike, and what does a law of the scale change?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "gpytorch", "scikit-learn"),
)

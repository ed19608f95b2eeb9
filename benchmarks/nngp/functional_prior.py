"""Boston with a network whose prior was tuned to a process, beside the N(0, 1) prior.

One hidden layer of 100 tanh units, noise variance 0.1, everything standardised by training
statistics; splits are the common 90/10 ones, drawn one after another from NumPy's legacy generator
with seed 1. The process is an RBF kernel of lengthscale sqrt(2 d) with log-normal laws. The
reference figures are means and standard deviations over 10 splits of the authors' notebook, whose
SGHMC runs far longer than the chains here.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from benchmarks.harness.spec import Quality, Unavailable, Value

_SPLITS = 3
_REFERENCE = {"matched": (2.797, 0.915, 2.470, 0.146), "N(0, 1)": (3.132, 1.060, 2.567, 0.302)}


def _splits(count: int) -> list[tuple[Any, ...]]:
    """Return standardised training and test parts, and the standard deviation of y."""
    import numpy as np
    import torch

    path = Path(os.environ.get("PROBKIT_DATA") or "") / "nngp" / "boston.txt"
    if not os.environ.get("PROBKIT_DATA") or not path.exists():
        raise Unavailable("PROBKIT_DATA does not name the folder that holds nngp/boston.txt")
    table = np.loadtxt(path)
    legacy = np.random.RandomState(1)
    parts = []
    for _ in range(count):
        order = legacy.choice(range(len(table)), len(table), replace=False)
        cut = round(0.9 * len(table))
        train, test = table[order[:cut]], table[order[cut:]]
        mean, std = train.mean(0), train.std(0)
        a, b = (
            torch.as_tensor((part - mean) / np.where(std > 0, std, 1)) for part in (train, test)
        )
        parts.append((a[:, :-1], a[:, -1], b[:, :-1], b[:, -1], float(std[-1])))
    return parts


def _process(features: int) -> Any:
    from gpytorch.kernels import RBFKernel, ScaleKernel

    from probkit.models import LogNormal, ProcessPrior

    laws = {
        "base_kernel.lengthscale": LogNormal(0.5 * math.log(2 * features), 1.0),
        "outputscale": LogNormal(0.1, 1.0),
    }
    return ProcessPrior(ScaleKernel(RBFKernel()).double(), laws)


def _scores(model: Any, split: tuple[Any, ...], quick: bool) -> tuple[float, float]:
    """RMSE and mean negative log density on the scale of y."""
    from probkit import infer
    from probkit.errors import ConvergenceWarning
    from probkit.inference import SGHMC

    x, y, x_test, y_test, std = split
    draws, warmup, thin = (10, 200, 5) if quick else (30, 2000, 100)
    sampler = SGHMC(draws, warmup=warmup, step_size=0.01, batch_size=32, thin=thin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weights may change places
        posterior = infer(model, (x, y), sampler, rng=0, chains=4)
    law = posterior.predict(x_test)
    error = float((law.mean - y_test).square().mean().sqrt()) * std
    return error, -float(law.log_prob(y_test).mean()) + math.log(std)


def _evaluate(quick: bool) -> list[Value]:
    import torch

    from probkit.models import LayerwiseBNN, PriorMatch, sliced_wasserstein
    from probkit.models.bnn import BNN
    from probkit.models.functional_prior import network_functions
    from probkit.rng import stream

    start = LayerwiseBNN(hidden=(100,), noise_var=0.1)
    match = (
        PriorMatch(steps=5) if quick else PriorMatch(steps=100, measurements=50, critic_steps=60)
    )
    scores: dict[str, list[tuple[float, float]]] = {name: [] for name in _REFERENCE}
    gaps: list[tuple[float, float, float]] = []
    for split in _splits(1 if quick else _SPLITS):
        x = split[0].float()
        process = _process(x.shape[1])
        tuned = match.fit(start, process, x, rng=0).model
        rows = x[:20]
        theirs = process.sample(2000, rows, rng=1)
        # N(0, 1) weights, whatever the fan-in, as functions of this parameterisation
        plain = LayerwiseBNN(hidden=(100,), w_std=(x.shape[1] ** 0.5, 10.0), noise_var=0.1)
        found = []
        for model in (plain, tuned):
            stds = torch.tensor([model.w_std, model.b_std])
            functions = network_functions(model, stds, rows, 2000, stream(2, "f"))
            found.append(float(sliced_wasserstein(functions, theirs, rng=0)))
        other = process.sample(2000, rows, rng=3)
        gaps.append((found[0], found[1], float(sliced_wasserstein(other, theirs, rng=0))))
        print(f"  tuned w {tuned.w_std}, b {tuned.b_std}; distances {gaps[-1]}", file=sys.stderr)
        iid = BNN(hidden=(100,), noise_var=0.1)
        for name, model in (("matched", tuned), ("N(0, 1)", iid)):
            scores[name].append(_scores(model, split, quick))
            print(f"  {name}: RMSE, NLL {scores[name][-1]}", file=sys.stderr)
    count = len(gaps)
    values = []
    for name, found in scores.items():
        rmse, rmse_sd, nll, nll_sd = _REFERENCE[name]
        for column, (label, reference, sd) in enumerate(
            (("RMSE", rmse, rmse_sd), ("NLL", nll, nll_sd))
        ):
            values.append(
                Value(
                    f"boston, {name} prior, {label}",
                    sum(score[column] for score in found) / count,
                    reference=None if quick else reference,
                    tolerance=2 * sd / math.sqrt(count),
                    note=f"mean of splits 0-{count - 1}; two standard errors of theirs",
                )
            )
    for column, label in enumerate(("N(0, 1) prior", "matched prior", "the process itself")):
        mean = sum(gap[column] for gap in gaps) / count
        values.append(Value(f"sliced distance to the process, {label}", mean))
    return values


BENCHMARK = Quality(
    title="Functional priors, Boston",
    question=(
        "Does tuning the prior of a network to a process bring its functions closer, and do its "
        "predictions reach the figures published with the method?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "gpytorch"),
)

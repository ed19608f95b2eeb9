"""Predictions of recorded evaluations from n others: a process, SmolLM2 in two modes, a hybrid."""

from __future__ import annotations

import math
import time
from typing import Any

from benchmarks.bo._llm_cells import Plan
from benchmarks.bo._llm_recorded import recorded, space_of
from benchmarks.harness.spec import Unavailable

__all__ = ["QUERIES", "run"]

QUERIES = 20
_FLOOR = 1e-3
_cache: dict[str, Any] = {}


def run(plan: Plan) -> dict[str, Any]:
    """Predict 20 rows from n others, drawn from all runs of a task."""
    import torch

    from probkit.rng import stream

    _, dataset, task, method, seed = plan
    model, _, count = task.partition(" ")
    space, n = space_of(model), int(count)
    rows = [
        (params, score)
        for (data, name, _), runs in recorded().items()
        if (data, name) == (dataset, model)
        for params, score in zip(runs.params, runs.scores, strict=True)
    ]
    codes = space.codes([params for params, _ in rows])
    distinct: dict[tuple[float, ...], int] = {}
    for k, row in enumerate(codes.tolist()):
        distinct.setdefault(tuple(row), k)
    usable = torch.tensor(list(distinct.values()))
    order = usable[torch.randperm(len(usable), generator=stream(seed, "rows"))]
    # The first n of one order: a longer history holds the shorter ones, queries are the last 20.
    seen, asked = order[:n], order[-QUERIES:]
    scores = torch.tensor([score for _, score in rows], dtype=torch.float64)
    X, y, at, truth = codes[seen], scores[seen], codes[asked], scores[asked]
    begin = time.perf_counter()
    mean, sd, valid = _predict(method, space, dataset, model, X, y, at, seed)
    seconds = time.perf_counter() - begin
    # Of the scores that the method was shown: a prediction cannot be surer than that.
    sd = sd.clamp_min(_FLOOR * float(y.max() - y.min() or 1.0))
    z = (truth - mean) / sd
    return {
        "nrmse": float((truth - mean).square().mean().sqrt() / (truth.max() - truth.min())),
        "log_density": float((-0.5 * z.square() - sd.log() - 0.5 * math.log(2 * math.pi)).mean()),
        "coverage_68": float((z.abs() <= 0.9944579).double().mean()),
        "coverage_95": float((z.abs() <= 1.9599640).double().mean()),
        "valid": valid,
        "seconds": seconds,
    }


def _predict(
    method: str, space: Any, dataset: str, model: str, X: Any, y: Any, at: Any, seed: int
) -> tuple[Any, Any, float]:
    """Return means and standard deviations [query], and the share of valid answers."""
    import torch

    from probkit.bo.llm.hybrid import Said, fit_hybrid
    from probkit.bo.surrogates.data import training_data
    from probkit.bo.surrogates.gp import GPSurrogate

    data = training_data(X, y, bounds=space.domain)
    if method == "gp":
        posterior = GPSurrogate().fit(data, rng=0).posterior(at[:, None], observation_noise=True)
        return posterior.mean.flatten(), posterior.variance.flatten().sqrt(), 1.0
    speaker = _speaker(space, dataset, model, "logprob" if method.endswith("digits") else "mc")
    told = speaker.condition(X, y, rng=seed).predictions(space.from_codes(at))
    valid = float(told.valid.mean())
    if method != "hybrid":
        return told.mean, told.sd, valid
    rest = []
    for k in range(len(y)):
        keep = torch.arange(len(y)) != k
        one = speaker.condition(X[keep], y[keep], rng=seed)
        rest.append(one.predictions(space.from_codes(X[k : k + 1])))
    said = Said(X, torch.cat([r.mean for r in rest]), torch.cat([r.sd for r in rest]))
    hybrid = fit_hybrid(data, said)
    hybrid.hear(Said(at, told.mean, told.sd))
    with torch.no_grad():
        posterior = hybrid.model.posterior(at[:, None], observation_noise=True)
    return posterior.mean.flatten(), posterior.variance.flatten().sqrt(), valid


def _speaker(space: Any, dataset: str, model: str, mode: str) -> Any:
    from probkit.bo.llm import LLMSurrogate, ProblemCard
    from probkit.models.language import load_smollm2, smollm2_path

    if smollm2_path() is None:
        raise Unavailable("SmolLM2 is not here: probkit fetch smollm2")
    if "lm" not in _cache:
        _cache["lm"] = load_smollm2()
    card = ProblemCard(model, "accuracy", "max", task=f"classification, {dataset} data")
    return LLMSurrogate(
        _cache["lm"], space, card, mode=mode, n_perm=2, k=3, truncate="best", outcome="score"
    )

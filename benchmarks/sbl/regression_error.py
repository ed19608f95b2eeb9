"""Errors of the fits that the regression benchmark times, over ten draws."""

from __future__ import annotations

import warnings
from typing import Any

from benchmarks.harness.spec import Quality, Value

_DRAWS, _N, _P, _NONZEROS, _SNR = 10, 200, 500, 15, 20.0


def _draw(seed: int) -> tuple[Any, Any, Any, float]:
    """H, the true weights, y and the noise's standard deviation."""
    import numpy as np

    rng = np.random.default_rng(seed)
    H, x = rng.standard_normal((_N, _P)), np.zeros(_P)
    x[rng.choice(_P, _NONZEROS, replace=False)] = rng.standard_normal(_NONZEROS)
    field = H @ x
    noise = float(np.sqrt(np.mean(field**2) / 10 ** (_SNR / 10)))
    return H, x, field + noise * rng.standard_normal(_N), noise


def _fits(H: Any, y: Any) -> dict[str, tuple[Any, float]]:
    """Weights and noise standard deviation of every side."""
    import torch
    from sklearn.linear_model import ARDRegression

    from probkit import infer
    from probkit.models import EvidenceMaximization, SparseRegression

    found = {}
    for name, update, after in (("EM", "em", 10), ("MacKay", "mackay", 3), ("MM", "mm", 10)):
        model = SparseRegression(torch.as_tensor(H), update=update)
        post = infer(model, torch.as_tensor(y), EvidenceMaximization(prune_after=after), rng=0)
        noise = float(post.draws["noise_var"]) ** 0.5
        found[name] = (post.analytic["weights"].mean.numpy(), noise)
    peer = ARDRegression(fit_intercept=False).fit(H, y)
    found["ARDRegression"] = (peer.coef_, float(peer.alpha_) ** -0.5)
    return found


def _evaluate(quick: bool) -> list[Value]:
    import numpy as np

    rows: dict[str, list[tuple[float, float, float]]] = {}
    for seed in range(2 if quick else _DRAWS):
        H, x, y, noise = _draw(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fits = _fits(H, y)
        for name, (weights, sd) in fits.items():
            error = float(((weights - x) ** 2).sum() / (x**2).sum())
            kept = float((np.abs(weights) > 1e-3 * np.abs(weights).max()).sum())
            rows.setdefault(name, []).append((error, kept, sd / noise))
    middle = {name: np.median(np.array(found), axis=0) for name, found in rows.items()}
    values = []
    for name, (error, kept, ratio) in middle.items():
        own = name != "ARDRegression"
        values += [
            Value(
                f"{name}, median NMSE",
                float(error),
                reference=float(middle["ARDRegression"][0]) if own else None,
                rule="at most",
                note="ARDRegression on the same draws" if own else "",
            ),
            Value(f"{name}, median number of weights", float(kept), note="15 are not zero"),
            Value(f"{name}, learned over true noise deviation", float(ratio)),
        ]
    return values


BENCHMARK = Quality(
    title="Sparse regression, errors",
    question=(
        "With 200 rows, 500 columns, 15 non-zero weights, 20 dB and unknown noise: what error, "
        "how many weights and which noise does each fit find, beside ARDRegression?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch", "scikit-learn"),
)

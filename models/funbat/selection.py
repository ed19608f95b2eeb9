"""Choosing ranks, masks, kernels and noise by how well withheld entries are predicted."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from probkit.driver import infer
from probkit.errors import ConvergenceWarning, DataError
from probkit.inference.passing import MessagePassing
from probkit.models.funbat.data import TensorData
from probkit.models.funbat.model import FunBaT
from probkit.posterior import Posterior
from probkit.predictive import Predictive
from probkit.rng import Rng, seed_of, stream

__all__ = ["StructureChoice", "choose_structure", "score_predictions"]

Criterion = Literal["nlpd", "rmse", "mae", "bound"]


@dataclass(frozen=True)
class StructureChoice:
    """What was chosen, and why.

    Attributes:
        name: The best candidate.
        model: Its model.
        scores: Mean of each score over the withheld parts, a row for each candidate, best first;
            with ``criterion="bound"`` the evidence bound.
        posterior: The model fitted to all the data, several seeds averaged; None without ``refit``.
    """

    name: str
    model: FunBaT
    scores: pd.DataFrame
    posterior: Posterior | None


def choose_structure(
    data: Any,
    candidates: Mapping[str, FunBaT],
    *,
    rng: Rng,
    sampler: MessagePassing | None = None,
    criterion: Criterion = "nlpd",
    folds: int = 1,
    holdout: float = 0.2,
    seeds: int = 3,
    withhold: str | int | None = None,
    block: float = 0.01,
    refit: bool = True,
) -> StructureChoice:
    """Fit each candidate without part of the data, score it there, and fit the best one to all.

    Every fit averages the predictions of several seeds: the evidence bound does not tell which of
    them predicts best, and their average beats most of them.

    Args:
        data: ``TensorData``, or a pair (index, y).
        candidates: Models by name.
        rng: Seed or generator, of the splits and of all fits.
        sampler: Options of the fits; ``MessagePassing(sweeps=60)`` by default, which need not have
            converged.
        criterion: The score that decides: "nlpd", the mean negative log density of a withheld y;
            "rmse" or "mae" of predictive medians. "bound" withholds nothing: the evidence bound of
            all the data, the best of the seeds, decides. It learns what an inner split cannot see
            cheaply, such as the smoothness of a kernel or a rank, but takes the model at its word.
        folds: Number of random splits.
        holdout: Share of the data that a split withholds.
        seeds: Fits that are averaged, in the trials and in the final fit.
        withhold: None withholds single entries. A mode (name or number) withholds whole blocks of
            neighbouring coordinates along it: take it where predictions will be made in gaps.
        block: Length of such a block, as a share of the mode's range.
        refit: Whether to fit the best candidate to all the data.

    Raises:
        DataError: No candidate, an option outside its range, or an unknown mode.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> x = torch.rand(200, 2, generator=rng, dtype=torch.float64)
        >>> y = (6 * x[:, 0]).sin() + x[:, 1].square()
        >>> from probkit.models.funbat import main_effects
        >>> candidates = {
        ...     "sum": FunBaT(kind="cp", masks=main_effects(2)),
        ...     "product": FunBaT(1, kind="cp"),
        ... }
        >>> choose_structure((x, y), candidates, rng=0, seeds=1, refit=False).name
        'sum'
    """
    _check(candidates, criterion, folds, holdout, seeds)
    first = next(iter(candidates.values()))
    whole = first.prepare(data)
    options = MessagePassing(sweeps=60) if sampler is None else sampler
    root = seed_of(stream(rng, "choose_structure"))
    if criterion == "bound":
        return _by_bound(whole, candidates, options, seeds, root, refit)
    masks = [
        _withheld(whole, holdout, withhold, block, stream(root, "split", fold))
        for fold in range(folds)
    ]
    rows = {}
    for name, model in candidates.items():
        parts = []
        for fold, test in enumerate(masks):
            post = _fit(model, whole.take(~test), options, seeds, stream(root, "fit", fold))
            parts.append(score_predictions(post.predict(whole.index[test]), whole.y[test]))
        rows[name] = pd.DataFrame(parts).mean()
    scores = pd.DataFrame(rows).T.sort_values(criterion, kind="stable", na_position="last")
    best = str(scores.index[0])
    if not math.isfinite(float(scores[criterion].iloc[0])):
        raise DataError(f"choose_structure: no candidate has a finite {criterion}")
    if not refit:
        return StructureChoice(best, candidates[best], scores, None)
    final = _fit(candidates[best], whole, options, seeds, stream(root, "final"))
    return StructureChoice(best, candidates[best], scores, final)


def _by_bound(
    data: TensorData,
    candidates: Mapping[str, FunBaT],
    options: MessagePassing,
    seeds: int,
    root: int,
    refit: bool,
) -> StructureChoice:
    """Fit every candidate to all the data and take the one of the largest evidence bound."""
    fits = {
        name: _fit(model, data, options, seeds, stream(root, "final"))
        for name, model in candidates.items()
    }
    bounds = {name: _largest_bound(post) for name, post in fits.items()}
    scores = pd.DataFrame({"bound": bounds}).sort_values("bound", ascending=False, kind="stable")
    best = str(scores.index[0])
    return StructureChoice(best, candidates[best], scores, fits[best] if refit else None)


def _largest_bound(post: Posterior) -> float:
    """The evidence bound of the best chain."""
    assert post.log_evidence is not None
    return float(post.log_evidence.value.max())


def score_predictions(prediction: Predictive, y: Tensor) -> dict[str, float]:
    """RMSE and MAE of the medians, mean negative log density, and coverage of 90 % intervals.

    Medians, because they exist where means do not (a Student-t behind a logarithm), and because
    they go through a warp unchanged.

    Args:
        prediction: Of the entries [entry].
        y: What was seen there [entry].
    """
    low, median, high = prediction.quantile([0.05, 0.5, 0.95])
    error = median - y
    return {
        "rmse": float(error.square().mean().sqrt()),
        "mae": float(error.abs().mean()),
        "nlpd": float(-prediction.log_prob(y).mean()),
        "coverage": float(((low <= y) & (y <= high)).double().mean()),
    }


def _fit(
    model: FunBaT, data: TensorData, options: MessagePassing, seeds: int, rng: torch.Generator
) -> Posterior:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return infer(model, data, options, rng=rng, chains=seeds)


def _withheld(
    data: TensorData,
    share: float,
    mode: str | int | None,
    block: float,
    generator: torch.Generator,
) -> Tensor:
    """Which entries are withheld [entry], about ``share`` of them."""
    n = len(data)
    if mode is None:
        test = torch.zeros(n, dtype=torch.bool)
        test[torch.randperm(n, generator=generator)[: max(1, round(share * n))]] = True
        return test.to(data.device)
    k = data.names.index(mode) if mode in data.names else mode
    if not isinstance(k, int) or not 0 <= k < len(data.names):
        raise DataError(
            f"choose_structure: expected withhold=None, a mode 0..{len(data.names) - 1} or one of "
            f"{', '.join(data.names)}, got {mode!r}"
        )
    if not 0 < block < 1:
        raise DataError(f"choose_structure: expected block in (0, 1), got {block!r}")
    x = data.index[:, k]
    place = (x - x.min()) / (x.max() - x.min()).clamp_min(torch.finfo(x.dtype).tiny)
    number = (place / block).floor().long()
    blocks = number.unique()
    if len(blocks) < 2:
        raise DataError(
            f"choose_structure: mode {data.names[k]} has one block of length {block}; take a "
            "smaller block"
        )
    count = min(max(1, round(share * len(blocks))), len(blocks) - 1)
    chosen = blocks[torch.randperm(len(blocks), generator=generator)[:count].to(blocks.device)]
    return torch.isin(number, chosen)


def _check(
    candidates: Mapping[str, FunBaT], criterion: str, folds: int, holdout: float, seeds: int
) -> None:
    if not isinstance(candidates, Mapping) or not candidates:
        raise DataError("choose_structure: expected candidates {name: FunBaT(...)}, at least one")
    for name, model in candidates.items():
        if not isinstance(model, FunBaT):
            raise DataError(
                f"choose_structure: candidate {name!r} is a {type(model).__name__}, expected FunBaT"
            )
    if criterion not in ("nlpd", "rmse", "mae", "bound"):
        raise DataError(
            "choose_structure: expected criterion 'nlpd', 'rmse', 'mae' or 'bound', got "
            f"{criterion!r}"
        )
    for label, number in (("folds", folds), ("seeds", seeds)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise DataError(f"choose_structure: expected a whole {label} >= 1, got {number!r}")
    if not 0 < holdout < 1:
        raise DataError(f"choose_structure: expected holdout in (0, 1), got {holdout!r}")

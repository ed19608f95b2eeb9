"""Comparison of models by what their posteriors say of the same data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from probkit.arviz_export import data_leaves
from probkit.diagnostics import loo
from probkit.errors import CapabilityError, DataError, NumericsWarning
from probkit.sources import Draws

if TYPE_CHECKING:
    import pandas as pd

    from probkit.posterior import Evidence, Posterior

__all__ = ["compare"]

By = Literal["loo", "evidence"]


def compare(posteriors: Mapping[str, Posterior], *, by: By | None = None) -> pd.DataFrame:
    """Rank models, best first.

    ``by="loo"``: expected log predictive density by Pareto-smoothed importance sampling
    leave-one-out (ArviZ). Columns: rank, elpd_loo, se, p_loo, elpd_diff (best minus this one), dse
    (its standard error over observations), bad_k (observations whose Pareto k is too large for the
    estimate to be trusted) and observations.

    ``by="evidence"``: log marginal likelihood. Columns: rank, log_evidence, sd (over chains), kind,
    difference (best minus this one) and comparable. A lower bound and an exact value are not the
    same quantity, so ``comparable`` is False where the kind differs from that of the best, and a
    NumericsWarning says so. Chains are combined by kind: the largest bound, the logarithm of the
    mean of estimates, the mean of exact values.

    Args:
        posteriors: Name -> posterior, all of the same observations.
        by: The criterion; None takes "loo" where every posterior has equally weighted draws with a
            pointwise log likelihood, else "evidence".

    Raises:
        DataError: Fewer than two posteriors, an unknown criterion, or other observations.
        CapabilityError: A posterior lacks what the criterion (or, with None, every one) needs.

    Warns:
        NumericsWarning: A Pareto k is too large, or kinds of evidence are mixed.

    Example:
        >>> from probkit.posterior import Evidence, Posterior
        >>> from probkit.sources import Closed
        >>> def exact(value):
        ...     evidence = Evidence(torch.tensor([value]), "exact")
        ...     return Posterior(Closed(), model=None, log_evidence=evidence)
        >>> compare({"a": exact(-4.0), "b": exact(-2.5)})["difference"].to_dict()
        {'b': 0.0, 'a': 1.5}
    """
    if not isinstance(posteriors, Mapping):
        raise DataError(
            f"compare: expected a mapping name -> posterior, got {type(posteriors).__name__}"
        )
    if len(posteriors) < 2:
        raise DataError(f"compare: expected two or more posteriors, got {len(posteriors)}")
    if by not in (None, "loo", "evidence"):
        raise DataError(f"compare: expected by='loo' or by='evidence', got {by!r}")
    _check_same_data(posteriors)
    without_loo = [name for name, post in posteriors.items() if not _has_loo(post)]
    without_evidence = [name for name, post in posteriors.items() if post.log_evidence is None]
    if by is None:
        by = "loo" if not without_loo else "evidence"
        if without_loo and without_evidence:
            raise CapabilityError(
                "compare needs equally weighted draws with a pointwise log likelihood "
                f"({', '.join(without_loo)}: none) or a log evidence "
                f"({', '.join(without_evidence)}: none); infer with a sampler that gives one"
            )
    lacking = without_loo if by == "loo" else without_evidence
    if lacking:
        need = (
            "equally weighted draws and a pointwise log likelihood" if by == "loo" else "evidence"
        )
        raise CapabilityError(
            f"compare(by={by!r}) needs {need}, which {', '.join(lacking)} lacks; "
            f"try by={'evidence' if by == 'loo' else 'loo'!r}"
        )
    return _by_loo(posteriors) if by == "loo" else _by_evidence(posteriors)


# --------------------------------------------------------------------------- the same data


def _check_same_data(posteriors: Mapping[str, Posterior]) -> None:
    observed = {name: _observed(post) for name, post in posteriors.items()}
    (first, expected), *others = observed.items()
    for name, found in others:
        if not _equal(expected, found):
            raise DataError(
                f"compare: {name!r} and {first!r} were fitted to other observations; "
                "fit all models to the same data"
            )


def _observed(post: Posterior) -> Any:
    """Observed tensors without their names, or the whole data where it has no tensors."""
    leaves = data_leaves(post)
    if not leaves:
        return post.context.data
    return [leaf.value for leaf in leaves.values() if leaf.observed]


def _equal(a: Any, b: Any) -> bool:
    """Compare data containers field by field."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        same_kind = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape
        return same_kind and bool(torch.equal(a.double().cpu(), b.double().cpu()))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if hasattr(a, "__dict__") and type(a) is type(b):
        return _equal(vars(a), vars(b))
    return bool(a == b)


# --------------------------------------------------------------------------- leave-one-out


def _has_loo(post: Posterior) -> bool:
    draws = isinstance(post.source, Draws) and post.log_weights is None
    return draws and not post.is_point_estimate and bool(post.log_likelihood)


def _by_loo(posteriors: Mapping[str, Posterior]) -> pd.DataFrame:
    import pandas as pd

    results = {name: loo(post) for name, post in posteriors.items()}
    sizes = {name: len(result.pointwise) for name, result in results.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(
            f"compare: expected one log likelihood for each observation, got {sizes} of them"
        )
    names = sorted(results, key=lambda name: -results[name].elpd)
    best = results[names[0]].pointwise
    rows: list[dict[str, float]] = []
    for rank, name in enumerate(names):
        result = results[name]
        difference = best - result.pointwise
        rows.append(
            {
                "rank": rank,
                "elpd_loo": result.elpd,
                "se": result.se,
                "p_loo": result.p,
                "elpd_diff": float(difference.sum()),
                "dse": _standard_error(difference),
                "bad_k": result.bad,
                "observations": len(difference),
            }
        )
    bad = {row: r["bad_k"] for row, r in zip(names, rows, strict=True) if r["bad_k"]}
    if bad:
        warnings.warn(
            f"Pareto k is too large for {bad} observations; their leave-one-out densities are "
            "unreliable, so refit without them or compare by evidence",
            NumericsWarning,
            stacklevel=3,
        )
    return pd.DataFrame(rows, index=names)


def _standard_error(values: Tensor) -> float:
    """Standard error of a sum over observations."""
    return float(values.std(correction=0)) * len(values) ** 0.5


# --------------------------------------------------------------------------- evidence


def _by_evidence(posteriors: Mapping[str, Posterior]) -> pd.DataFrame:
    import pandas as pd

    found = {n: p.log_evidence for n, p in posteriors.items() if p.log_evidence is not None}
    values = {name: _combine(evidence) for name, evidence in found.items()}
    names = sorted(values, key=lambda name: -values[name])
    best = names[0]
    rows = [
        {
            "rank": rank,
            "log_evidence": values[name],
            "sd": _spread(found[name]),
            "kind": found[name].kind,
            "difference": values[best] - values[name],
            "comparable": found[name].kind == found[best].kind,
        }
        for rank, name in enumerate(names)
    ]
    kinds = sorted({evidence.kind for evidence in found.values()})
    if len(kinds) > 1:
        warnings.warn(
            f"compare mixes {' and '.join(kinds)} evidences: a bound lies below the evidence, so "
            "its difference may be the gap of the bound; see the columns kind and comparable",
            NumericsWarning,
            stacklevel=3,
        )
    return pd.DataFrame(rows, index=names)


def _combine(evidence: Evidence) -> float:
    value = evidence.value.detach().double()
    if evidence.kind == "bound":
        return float(value.max())
    if evidence.kind == "estimate":  # unbiased on the natural scale
        return float(torch.logsumexp(value, 0) - math.log(len(value)))
    return float(value.mean())


def _spread(evidence: Evidence) -> float:
    value = evidence.value.detach().double()
    return float(value.std()) if len(value) > 1 else math.nan

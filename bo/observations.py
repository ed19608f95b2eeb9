"""From the trials of a study to the data of a surrogate.

Outcomes are turned so that objectives are maximised. A failed trial has no outcome, and is never
given one such as zero: it stands in the data with the worst value of each outcome told so far, so
that the search turns away from where evaluations fail, or it is left out. A pruned trial was
stopped because it would not have been good: its own value counts where it is worse than the median,
which bounds it otherwise. Trials that run are pending, and cancelled ones do not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.bo.outcomes import Outcomes
from probkit.bo.space import Space
from probkit.bo.trials import Trial

__all__ = ["Observations", "observe"]


@dataclass(frozen=True, eq=False)
class Observations:
    """The trials of a study as tensors, in the order of their numbers.

    Attributes:
        X: Codes ``[row, parameter]`` of the trials with data.
        Y: Outcomes ``[row, outcome]``, objectives to be maximised.
        Yvar: Variances of the noise ``[row, outcome]``; zeros where there is none; None where they
            are not known.
        told: Whether a row was measured, ``[row]``; the others are stand-ins.
        pending: Codes ``[pending, parameter]`` of the trials that run.
        visited: Codes ``[trial, parameter]`` of all trials but the cancelled ones.
    """

    X: Tensor
    Y: Tensor
    Yvar: Tensor | None
    told: Tensor
    pending: Tensor
    visited: Tensor

    @property
    def complete(self) -> int:
        """Number of trials measured in full."""
        return int(self.told.sum())


def observe(
    trials: Iterable[Trial],
    space: Space,
    outcomes: Outcomes,
    *,
    noise: str = "auto",
    failures: str = "worst",
) -> Observations:
    """Collect what is known.

    Args:
        trials: The trials, in any order.
        space: The space of their params.
        outcomes: What was measured.
        noise: ``"none"`` where outcomes are exact; else ``"auto"``.
        failures: ``"worst"`` lets failed trials stand with the worst values; ``"ignore"`` leaves
            failed and pruned ones out.
    """
    ordered = sorted(trials, key=lambda t: t.number)
    complete = [t for t in ordered if t.status == "complete"]
    usable = [t for t in ordered if _has_row(t, bool(complete), failures)]
    told = torch.tensor([t.status == "complete" for t in usable], dtype=torch.bool)
    Y = _values(usable, outcomes)
    Y = _stand_in(Y, told, outcomes) if complete else Y
    return Observations(
        X=space.codes(t.params for t in usable),
        Y=Y,
        Yvar=_variances(usable, told, outcomes, noise),
        told=told,
        pending=space.codes(t.params for t in ordered if t.status == "running"),
        visited=space.codes(t.params for t in ordered if t.status != "cancelled"),
    )


def _has_row(trial: Trial, any_complete: bool, failures: str) -> bool:
    if trial.status == "complete":
        return True
    return trial.status in ("failed", "pruned") and failures == "worst" and any_complete


def _values(trials: Sequence[Trial], outcomes: Outcomes) -> Tensor:
    """Values to be maximised ``[row, outcome]``; NaN where nothing was measured."""
    nothing = dict.fromkeys(outcomes.names, float("nan"))
    rows = [[(t.values or nothing)[name] for name in outcomes.names] for t in trials]
    plain = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(outcomes.names))
    return plain * outcomes.signs


def _stand_in(Y: Tensor, told: Tensor, outcomes: Outcomes) -> Tensor:
    """Put the worst told values where there are none, and bound those of pruned trials."""
    badness = _badness(Y, outcomes)
    order = badness[told].argsort(0)
    measured = Y[told]
    worst = measured.gather(0, order[-1:])
    middle = measured.gather(0, order[len(order) // 2][None])
    too_good = badness < _badness(middle, outcomes)
    bounded = torch.where(too_good, middle.expand_as(Y), Y)
    filled = torch.where(Y.isnan(), worst.expand_as(Y), bounded)
    return torch.where(told[:, None], Y, filled)


def _badness(Y: Tensor, outcomes: Outcomes) -> Tensor:
    """How bad each value is, ``[row, outcome]``: of a constraint, how far beyond its bounds."""
    columns = list((-Y).unbind(-1))
    beyond: dict[int, Tensor] = {}
    for column, sign, bound in outcomes.bounds:
        excess = sign * Y[:, column] - bound
        beyond[column] = torch.maximum(beyond.get(column, excess), excess)
    return torch.stack([beyond.get(k, column) for k, column in enumerate(columns)], -1)


def _variances(
    trials: Sequence[Trial], told: Tensor, outcomes: Outcomes, noise: str
) -> Tensor | None:
    shape = (len(trials), len(outcomes.names))
    if noise == "none":
        return torch.zeros(shape, dtype=torch.float64)
    known = [t.variances for t in trials if t.status == "complete"]
    if not known or any(v is None for v in known):
        return None
    nothing = dict.fromkeys(outcomes.names, float("nan"))
    rows = [[(t.variances or nothing)[name] for name in outcomes.names] for t in trials]
    found = torch.tensor(rows, dtype=torch.float64).reshape(shape)
    return torch.where(found.isnan(), found[told].mean(0), found)

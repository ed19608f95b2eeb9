"""What a fitted surrogate can do, and which acquisition functions ask for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from botorch.models import ModelListGP
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import Model, ModelList
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior_list import PosteriorList
from torch import Tensor

from probkit._botorch_posterior import PredictivePosterior
from probkit.bo.policy.goal import Goal
from probkit.errors import CapabilityError

__all__ = ["ACQUISITIONS", "Abilities", "abilities_of", "allowed_acquisitions", "check_allowed"]


@dataclass(frozen=True)
class Need:
    """What an acquisition function asks of the surrogate and of the goal.

    Attributes:
        posterior: Form of posterior it needs: "any", "normal", "student" (normal, Student-t or a
            mixture of either), "draws" or "normal or draws".
        fantasies: Whether it conditions the surrogate on outcomes that it imagines.
        functions: Whether it draws whole functions.
        objectives: "one" or "several".
        constraints: Whether it can keep bounds: "no", "may" or "must" (there is one).
        batch: Whether it values several points together, and sees pending ones.
        fidelity: Whether it chooses how faithful an evaluation is.
    """

    posterior: str = "any"
    fantasies: bool = False
    functions: bool = False
    objectives: str = "one"
    constraints: str = "no"
    batch: bool = True
    fidelity: bool = False


ACQUISITIONS: Mapping[str, Need] = {
    "log_ei": Need("normal", batch=False),
    "ucb": Need("normal", batch=False),
    "posterior_mean": Need("normal or draws", batch=False),
    "log_cei": Need("normal", constraints="must", batch=False),
    "t_log_ei": Need("student", batch=False),
    "t_ucb": Need("student", batch=False),
    "q_log_ei": Need(constraints="may"),
    "q_log_nei": Need(constraints="may"),
    "q_ucb": Need(),
    "q_simple_regret": Need(),
    "thompson": Need("normal or draws", functions=True),
    "kg": Need("normal", fantasies=True),
    "mes": Need("normal", fantasies=True),
    "gibbon": Need("normal", fantasies=True),
    "q_log_ehvi": Need(objectives="several", constraints="may"),
    "q_log_nehvi": Need(objectives="several", constraints="may"),
    "parego": Need(objectives="several", constraints="may"),
    "mf_kg": Need("normal", fantasies=True, fidelity=True),
    "mf_mes": Need("normal", fantasies=True, fidelity=True),
}
"""Every acquisition function by name, with what it needs."""


@dataclass(frozen=True)
class Abilities:
    """What a surrogate offers.

    Attributes:
        posterior: "normal", "student", "draws" or "other".
        fantasies: Whether it can be conditioned on imagined outcomes.
        outputs: Number of outputs.
        functions: Whether draws of whole functions can be had.
    """

    posterior: str
    fantasies: bool
    outputs: int
    functions: bool = False


def abilities_of(model: Model, X: Tensor) -> Abilities:
    """Look at one prediction of a fitted model.

    Args:
        model: The model.
        X: Some points [row, feature]; the first is asked for.
    """
    with torch.no_grad():
        posterior = model.posterior(X[:1])
    forms = [posterior]
    if isinstance(posterior, PosteriorList):
        forms = posterior.posteriors
    kinds = {_form(part) for part in forms}
    form = kinds.pop() if len(kinds) == 1 else "other"
    return Abilities(
        posterior=form,
        fantasies=_has_fantasies(model),
        outputs=int(posterior._extended_shape()[-1]),
        functions=form == "draws" or isinstance(model, GPyTorchModel | ModelListGP),
    )


def _form(posterior: object) -> str:
    if isinstance(posterior, GPyTorchPosterior):
        return "normal"
    if isinstance(posterior, EnsemblePosterior):
        return "draws"
    return "student" if isinstance(posterior, PredictivePosterior) else "other"


def _has_fantasies(model: Model) -> bool:
    if isinstance(model, GPyTorchModel | ModelListGP):
        return True
    if isinstance(model, ModelList):
        return all(_has_fantasies(part) for part in model.models)
    return bool(getattr(model, "can_fantasize", False))


def allowed_acquisitions(
    abilities: Abilities, goal: Goal, *, batch: bool = False, fidelity: bool = False
) -> list[str]:
    """List the acquisition functions that fit a surrogate and a goal, simplest first.

    Args:
        abilities: What the surrogate can do.
        goal: The goal.
        batch: Whether several points are wanted, or some are pending.
        fidelity: Whether the space has a column of fidelity.
    """
    return [
        name
        for name, need in ACQUISITIONS.items()
        if not _obstacles(need, abilities, goal, batch=batch, fidelity=fidelity)
    ]


def _obstacles(
    need: Need, abilities: Abilities, goal: Goal, *, batch: bool, fidelity: bool
) -> list[str]:
    found = []
    forms: dict[str, Sequence[str]] = {
        "any": ("normal", "student", "draws", "other"),
        "normal": ("normal",),
        "student": ("normal", "student"),
        "draws": ("draws",),
        "normal or draws": ("normal", "draws"),
    }
    if abilities.posterior not in forms[need.posterior]:
        found.append(f"needs a posterior that is {need.posterior}, not {abilities.posterior}")
    if need.fantasies and not abilities.fantasies:
        found.append("needs a surrogate that can be conditioned on imagined outcomes")
    if need.functions and not abilities.functions:
        found.append("needs a surrogate that draws whole functions")
    several = len(goal.objectives) > 1
    if several != (need.objectives == "several"):
        found.append(f"takes {need.objectives} objective(s), not {len(goal.objectives)}")
    if goal.constraints and need.constraints == "no":
        found.append("cannot keep constraints")
    if not goal.constraints and need.constraints == "must":
        found.append("needs a constraint")
    if batch and not need.batch:
        found.append("takes one point at a time, with none pending")
    if need.fidelity and not fidelity:
        found.append("needs a domain with a column of fidelity")
    return found


def check_allowed(
    name: str,
    abilities: Abilities,
    goal: Goal,
    *,
    surrogate: str,
    batch: bool = False,
    fidelity: bool = False,
) -> None:
    """Refuse an acquisition function that does not fit, and name those that do.

    Raises:
        CapabilityError: With all reasons.
    """
    names = ", ".join(allowed_acquisitions(abilities, goal, batch=batch, fidelity=fidelity))
    if name not in ACQUISITIONS:
        raise CapabilityError(
            f"acquisition: expected 'auto' or one of {names} (which fit {surrogate} here), got "
            f"{name!r}"
        )
    obstacles = _obstacles(ACQUISITIONS[name], abilities, goal, batch=batch, fidelity=fidelity)
    if obstacles:
        raise CapabilityError(
            f"acquisition {name!r} does not fit {surrogate} here: it {'; it '.join(obstacles)}; "
            f"allowed are {names}"
        )

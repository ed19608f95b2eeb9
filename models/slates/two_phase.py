"""Training in two phases: items with a linear user model, then the transition with items fixed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference import SVI
from probkit.model import Batch
from probkit.models.slates.guide import SlateMeanField
from probkit.models.slates.log import SlateLog
from probkit.posterior import Posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.tree import Tree, map_tensors

if TYPE_CHECKING:
    from probkit.models.slates.model import SlateGRU

__all__ = ["TwoPhase", "held_out_loss"]

_KEPT = ("items", "group_mean", "group_scale", "no_click", "multiplier")


@storable
@dataclass(frozen=True)
class TwoPhase(Sampler):
    """SVI with a linear transition, then with the model's own while the items stay as they are.

    Each phase ends when its steps run out, or when the loss on the validation users has not fallen
    for ``patience`` chunks of steps; it leaves the parameters with the smallest loss. The second
    phase starts from these, with a fresh optimiser. Without validation users (see
    ``SlateLog.hold_out``) a phase takes all its steps.

    The divergence of frozen items still counts in the bound. ``attrs["valid_loss"]`` holds the
    least loss of each phase, ``attrs["phase_steps"]`` the gradient steps taken.

    Args:
        first: Options of the linear phase.
        second: Options of the second phase.
        patience: Chunks without a smaller loss; None for a tenth of a phase's chunks.
        freeze: Sites that keep their law in the second phase.

    Example:
        >>> short = SVI(steps=100, batch_size=64)
        >>> TwoPhase(first=short, second=short).total()
        4
    """

    first: SVI = field(default_factory=lambda: SVI(steps=2000, batch_size=512, particles=1))
    second: SVI = field(default_factory=lambda: SVI(steps=2000, batch_size=512, particles=1))
    patience: int | None = None
    freeze: tuple[str, ...] = ("items", "group_mean", "group_scale")

    needs = ("sites", "log_joint", "plate_size", "minibatch")
    accepts_guide = True

    def __post_init__(self) -> None:
        if self.patience is not None and (not isinstance(self.patience, int) or self.patience < 1):
            raise DataError(f"TwoPhase: expected patience >= 1 or None, got {self.patience!r}")
        for name in ("first", "second"):
            if not isinstance(getattr(self, name), SVI):
                raise DataError(f"TwoPhase: expected {name}=SVI(...), got {getattr(self, name)!r}")
        object.__setattr__(self, "freeze", tuple(self.freeze))

    def total(self) -> int:
        """Number of chunks at most."""
        return self.first.total() + self.second.total()

    # ---------------------------------------------------------------- the two problems

    def _guide(self, problem: Problem) -> SlateMeanField:
        model, guide = problem.model, problem.guide
        if not callable(getattr(model, "laws", None)):
            raise CapabilityError(f"TwoPhase fits a SlateGRU, got {type(model).__name__}; use SVI")
        found = model.guide() if guide is None else model.specialise(guide)
        if not isinstance(found, SlateMeanField):
            raise CapabilityError(
                f"TwoPhase needs the guide SlateMeanField, got {type(found).__name__}; use SVI"
            )
        return found

    def _problem(self, problem: Problem, phase: int, start: Any) -> tuple[Problem, SlateMeanField]:
        """The problem of a phase and its guide; ``start`` are parameters to begin with."""
        guide = self._guide(problem)
        if phase == 0:
            linear = replace(problem.model, transition="linear", hidden=None)
            return replace(problem, model=linear, guide=guide), guide
        given = {**(guide.start or {}), **(start or {})}
        guide = replace(guide, start=given, freeze=self.freeze)
        return replace(problem, guide=guide), guide

    def _svi(self, phase: int) -> SVI:
        return self.first if phase == 0 else self.second

    # ---------------------------------------------------------------- steps

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Start the linear phase."""
        inner = self.first.init(self._problem(problem, 0, None)[0], rngs=rngs)
        return {**_fresh(0, inner), "losses": [], "steps": []}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take one chunk of steps of the present phase."""
        phase = state["phase"]
        svi = self._svi(phase)
        own, guide = self._problem(problem, phase, state.get("start"))
        taken = svi.step(own, state["svi"], rngs=rngs)
        params = taken.state["params"]
        loss = held_out_loss(own.model, guide, params, problem.data)
        info = {**(taken.info or {}), "phase": phase + 1.0, "valid_loss": loss}
        better = not loss >= state["loss"]
        state = {
            **state,
            "svi": taken.state,
            "loss": loss if better else state["loss"],
            "best": params if better else state["best"],
            "stale": 0 if better else state["stale"] + 1,
        }
        patience = self.patience or max(svi.total() // 10, 1)
        if not taken.done and state["stale"] < patience:
            return Step(state, False, info=info)
        state["losses"] = [*state["losses"], state["loss"]]
        state["steps"] = [*state["steps"], taken.state["taken"]]
        if phase == 1:
            return Step(state, True, info=info)
        start = _shared(state["best"], problem.model)
        inner = self.second.init(self._problem(problem, 1, start)[0], rngs=rngs)
        kept = {"losses": state["losses"], "steps": state["steps"], "start": start}
        return Step({**_fresh(1, inner), **kept}, False, info=info)

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Only the second phase fits the model itself."""
        return bool(state["phase"] == 1)

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the fit with the smallest loss of the second phase."""
        own, guide = self._problem(problem, 1, state["start"])
        params = state["svi"]["params"] if state["best"] is None else state["best"]
        own = replace(own, guide=replace(guide, start=None))
        found = self.second.finish(own, {**state["svi"], "params": params}, kept, rngs=rngs)
        record = {"valid_loss": list(state["losses"]), "phase_steps": list(state["steps"])}
        return replace(found, attrs={**found.attrs, **record})


def _fresh(phase: int, inner: Tree) -> dict[str, Any]:
    return {"phase": phase, "svi": inner, "loss": math.inf, "best": None, "stale": 0}


def _shared(params: Mapping[str, Any], model: SlateGRU) -> dict[str, Any]:
    """Parameters of the linear fit that the model has as well."""
    found = {name: params[name] for name in _KEPT if name in params}
    own = params.get("user_init")
    if own is not None and model.memory == model.dim:
        found["user_init"] = own
    copied: dict[str, Any] = map_tensors(lambda t: t.detach().clone(), found)
    return copied


def held_out_loss(
    model: SlateGRU, guide: SlateMeanField, params: Any, log: SlateLog, part: str = "valid"
) -> float:
    """Return minus the mean log probability of held-out clicks, at the guide's centre.

    Args:
        model: The model.
        guide: Its guide.
        params: The guide's parameters.
        log: The log.
        part: "valid" or "test".

    Returns:
        The loss; -inf where no step of that part is held out, so that the last parameters count.
    """
    held = log.mask(part)  # type: ignore[arg-type]
    users = held.any(1).nonzero()[:, 0]
    if not len(users):
        return -math.inf
    total, count = 0.0, int(held.sum())
    with torch.no_grad():
        values: dict[str, Tensor] = {
            name: law.constrain(params[name]["loc"]) for name, law in model.laws(log).items()
        }
        values["items"] = guide.item_moments(params, model)[0]
        for some in users.split(4096):
            batch = Batch(log.take(some), some)
            if model.user_init == "normal":
                values["user_init"] = guide.user_laws(params, model, batch)[0]
            judged = replace(batch.data, train=held[some], check=False)
            total += float(model.log_likelihood(values, judged))
    return -total / count

"""What a sampler is, and how one is matched to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from probkit.errors import CapabilityError
from probkit.model import lacks
from probkit.tree import Tree

if TYPE_CHECKING:
    from probkit.guide import Guide
    from probkit.posterior import Posterior

__all__ = ["Callback", "Info", "Problem", "Sampler", "Step", "check_fit", "default_sampler"]

Rngs = Sequence[torch.Generator]


@dataclass(frozen=True)
class Problem:
    """What a sampler works on.

    Attributes:
        model: The model.
        data: The data, converted and checked by the model.
        guide: The guide given to ``infer``; None where none was.
        coords: Labels of the data and the model, for the posterior.
    """

    model: Any
    data: Any
    guide: Guide | None = None
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What one step of a sampler leaves.

    Attributes:
        state: The next state, a tree of tensors, scalars, strings and storables.
        done: Whether the run is complete.
        keep: A tree of tensors [chain, new draw, *] to append to what was kept; None for nothing.
        info: Scalars to report, for example {"elbo": -12.3}.
    """

    state: Tree
    done: bool
    keep: Tree = None
    info: Mapping[str, float] | None = None


class Sampler(Protocol):
    """A frozen dataclass of options; ``infer`` drives its three methods.

    Attributes:
        needs: Names of the model methods that it calls.
        block: Number of chains that one state carries. ``infer`` pads the chains to whole blocks
            and drops the padding, so that a chain's draws do not depend on how many others there
            are. None: one state carries all chains.
        accepts_guide: Whether ``infer(guide=)`` has a meaning for it.
        needs_with_guide: The model methods it calls when a guide is given, where they differ
            (optional).
        accepts_loader: Whether the data may be a :class:`~probkit.loader.Loader` (optional).
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the model methods that the sampler calls."""
        ...

    @property
    def block(self) -> int | None:
        """Chains per state; None for all."""
        return 1

    @property
    def accepts_guide(self) -> bool:
        """Whether a guide may be passed."""
        return False

    def total(self) -> int | None:
        """Return the number of steps when it is known beforehand (for progress bars)."""
        return None

    def init(self, problem: Problem, *, rngs: Rngs) -> Tree:
        """Return the first state; ``rngs`` holds one stream per chain."""
        ...

    def step(self, problem: Problem, state: Tree, *, rngs: Rngs) -> Step:
        """Advance every chain of ``state``; the old state stays valid."""
        ...

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Rngs) -> Posterior:
        """Make the posterior from the last state and all kept trees, joined along dim 1.

        ``kept`` is None when nothing was kept. After an interruption the state may be unfinished;
        ``infer`` then asks :meth:`can_finish` first.
        """
        ...

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Tell whether an interrupted run can give a posterior: by default, when it kept draws."""
        return kept is not None

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Work on the posterior of all chains together, after their blocks were joined."""
        return posterior


@dataclass(frozen=True)
class Info:
    """What callbacks of ``infer`` receive after each step.

    Attributes:
        step: Number of finished steps.
        total: Number of steps when known.
        kept: Draws kept so far in each chain.
        seconds: Time since the run (or its resumption) began.
        stats: Scalars of the sampler, averaged over blocks.
        done: Whether the run is complete.
        label: Name of the sampler and the model.
    """

    step: int
    total: int | None
    kept: int
    seconds: float
    stats: Mapping[str, float]
    done: bool
    label: str


class Callback(Protocol):
    """Called after each step; returning True stops the run early."""

    def __call__(self, info: Info) -> bool | None:
        """Observe one step."""
        ...


def check_fit(model: Any, sampler: Sampler, guide: Guide | None) -> None:
    """Check that ``sampler`` can work on ``model``, before any work.

    Raises:
        CapabilityError: The model lacks methods that the sampler needs (the message names the
            samplers that would fit), or a guide was given to a sampler that has no use for it.
    """
    name = type(sampler).__name__
    if isinstance(sampler, type):
        raise CapabilityError(
            f"expected a sampler, got the class {sampler.__name__}; make one: {sampler.__name__}()"
        )
    if not all(callable(getattr(sampler, part, None)) for part in ("init", "step", "finish")):
        raise CapabilityError(
            f"expected a sampler (an object with init, step and finish), got {sampler!r}; "
            "for example probkit.inference.SVI()"
        )
    needs = sampler.needs
    if guide is not None:
        needs = getattr(sampler, "needs_with_guide", needs)
    missing = lacks(model, needs)
    if missing:
        fitting = ", ".join(fitting_samplers(model)) or "none in probkit.inference"
        raise CapabilityError(
            f"{name} needs {', '.join(needs)}; {type(model).__name__} lacks "
            f"{', '.join(missing)}. Samplers that fit: {fitting}"
        )
    if guide is not None and not getattr(sampler, "accepts_guide", False):
        raise CapabilityError(f"{name} has no use for guide={type(guide).__name__}; leave it out")


def fitting_samplers(model: Any) -> list[str]:
    """Name the samplers of probkit.inference whose needs ``model`` meets, at default options."""
    from probkit import inference

    found = _samplers(inference)
    return [name for name, sampler in found.items() if not lacks(model, sampler.needs)]


def _samplers(package: Any) -> dict[str, Sampler]:
    """The sampler classes of a package at their default options."""
    found = {name: getattr(package, name) for name in package.__all__}
    is_sampler = {n: isinstance(cls, type) and hasattr(cls, "step") for n, cls in found.items()}
    return {name: cls() for name, cls in found.items() if is_sampler[name]}


def default_sampler(model: Any) -> Sampler:
    """Choose the sampler of a model that names none: Direct where exact, else EM, else NUTS.

    Raises:
        CapabilityError: None of them fits.
    """
    from probkit import inference

    samplers = _samplers(inference)
    for name in ("Direct", "EM", "NUTS", "SVI"):
        if name in samplers and not lacks(model, samplers[name].needs):
            return samplers[name]
    fitting = ", ".join(fitting_samplers(model)) or "none in probkit.inference"
    raise CapabilityError(
        f"{type(model).__name__} has no default sampler; samplers that fit: {fitting}"
    )

"""The two kinds of potentials, which are never mixed.

A step potential G_t rates the last step; the target is the product of all of them. A value V_t
rates the whole prefix; its weights are V_t / V_{t-1}, whose product telescopes to the last value,
however the earlier ones were chosen (twisted sequential Monte Carlo).

A class that can be either has both methods and says in its attribute ``kind`` which one it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from probkit.errors import CapabilityError
from probkit.models.language.protocol import Continuation, Prefix

__all__ = ["Kind", "Potential", "StepPotential", "ValuePotential", "kind_of"]


@runtime_checkable
class StepPotential(Protocol):
    """Rates each step on its own: the target is p_LM(x) prod_t G_t."""

    def log_step(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log G of each step, [n], float64; any real number or minus infinity.

        Args:
            prefixes: n prefixes before the step.
            steps: Their n steps.
        """
        ...


@runtime_checkable
class ValuePotential(Protocol):
    """Rates whole prefixes: the target is p_LM(x) V(x), with V of the empty prefix 1."""

    def log_value(self, prefixes: Sequence[Prefix], finished: Sequence[bool]) -> Tensor:
        """Return log V of each prefix, [n], float64; any real number or minus infinity.

        Args:
            prefixes: n prefixes after a step.
            finished: Whether the text of each ends there.
        """
        ...


Potential = StepPotential | ValuePotential
Kind = Literal["per_step", "value"]

_METHODS = {"per_step": "log_step(prefixes, steps)", "value": "log_value(prefixes, finished)"}


def kind_of(potential: Potential) -> Kind:
    """Return the kind of a potential: what its attribute ``kind`` says, else its one method.

    Raises:
        CapabilityError: It has no method of that kind, or says no kind and has both methods or
            neither.
    """
    methods = {
        "per_step": callable(getattr(potential, "log_step", None)),
        "value": callable(getattr(potential, "log_value", None)),
    }
    declared = getattr(potential, "kind", None)
    if declared in methods and methods[declared]:
        return "per_step" if declared == "per_step" else "value"
    if declared is not None or methods["per_step"] == methods["value"]:
        has = " and ".join(_METHODS[k] for k, there in methods.items() if there) or "neither"
        says = "" if declared is None else f", and kind={declared!r}"
        raise CapabilityError(
            f"potential: expected an object with either {_METHODS['per_step']} or "
            f"{_METHODS['value']} (or both and kind='per_step' or 'value'), "
            f"{type(potential).__name__} has {has}{says}"
        )
    return "per_step" if methods["per_step"] else "value"

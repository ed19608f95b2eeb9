"""The two kinds of potentials, which are never mixed.

A step potential G_t rates the last step; the target is the product of all of them. A value V_t
rates the whole prefix; its weights are V_t / V_{t-1}, whose product telescopes to the last value,
however the earlier ones were chosen (twisted sequential Monte Carlo).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from probkit.models.language.protocol import Continuation, Prefix

__all__ = ["Potential", "StepPotential", "ValuePotential", "kind_of"]


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


def kind_of(potential: Potential) -> Literal["per_step", "value"]:
    """Return the kind of a potential.

    Raises:
        CapabilityError: It is of both kinds, or of none.
    """
    from probkit.errors import CapabilityError

    step, value = isinstance(potential, StepPotential), isinstance(potential, ValuePotential)
    if step == value:
        raise CapabilityError(
            "potential: expected an object with either log_step(prefixes, steps) or "
            f"log_value(prefixes, finished), {type(potential).__name__} has "
            f"{'both' if step else 'neither'}"
        )
    return "per_step" if step else "value"

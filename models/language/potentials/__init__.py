"""What partial answers are rated by."""

from __future__ import annotations

from probkit.models.language.potentials.base import Potential, StepPotential, ValuePotential

__all__ = ["Potential", "StepPotential", "ValuePotential"]

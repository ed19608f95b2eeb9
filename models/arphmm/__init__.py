"""Switching autoregressions with partial knowledge of the states, and remaining useful life."""

from __future__ import annotations

from probkit.models.arphmm import plausibility
from probkit.models.arphmm.model import ARPHMM
from probkit.models.arphmm.prior import SwitchingPrior
from probkit.models.arphmm.sequences import Sequences

__all__ = ["ARPHMM", "Sequences", "SwitchingPrior", "plausibility"]

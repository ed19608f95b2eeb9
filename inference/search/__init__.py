"""Searches for good answers that are not draws from a posterior: the baselines of particle methods.

They take any ``Sequential`` model that also tells which particles are finished and what each is
worth (``finished``, ``reward``).
"""

from __future__ import annotations

from probkit.inference.search.beam import DVTS, BeamSearch
from probkit.inference.search.best_of_n import BestOfN, Greedy
from probkit.inference.search.self_consistency import SelfConsistency, leader_probability

__all__ = ["DVTS", "BeamSearch", "BestOfN", "Greedy", "SelfConsistency", "leader_probability"]

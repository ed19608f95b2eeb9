"""The rest of one answer put after the beginning of another.

Ancestor sampling (Lindsten, Jordan & Schoen 2014, section 6.2 for targets that remember their whole
past) draws which particle the rest of the reference answer continues, with probability proportional
to the particle's weight times

    prod_{s >= t}  p_LM(x'_s | prefix, x'_t:s-1)  G_s(prefix, x'_t:s),

where x' is the reference. Potentials that look at the prefix are evaluated again on the new one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probkit.models.language.partial import Partial, step_between
from probkit.models.language.protocol import Prefix
from probkit.models.language.scoring import joined_steps, score_under

__all__ = ["Grafting"]


class Grafting:
    """The steps of a path after time ``t``, to be put onto other partial answers.

    A step potential that declares ``local = True`` rates a step alike after every prefix; its
    values are taken over. All others are asked again.

    Args:
        model: A :class:`~probkit.models.language.GuidedGeneration`.
        path: Partial answers of one answer, the prompt first.
        t: Position in it.
    """

    def __init__(self, model: Any, path: Sequence[Partial], t: int) -> None:
        self.model, self.path, self.t = model, path, t
        pairs = zip(path[t:], path[t + 1 :], strict=False)
        self.rest = [step_between(old, new) for old, new in pairs if not old.idle]

    def log_future(self, particles: Sequence[Partial]) -> Tensor:
        """Return the log of the product above, [n]; equal prefixes are scored once.

        A finished answer can only be the beginning of itself: where the path ended by ``t``, the
        result is 0 for finished particles and minus infinity for all others, and the other way
        round where it did not.
        """
        if not self.rest:
            done = [p.finished and not p.dead for p in particles]
            return torch.tensor([0.0 if yes else -math.inf for yes in done], dtype=torch.float64)
        open_ = {p.prefix: p for p in particles if not p.idle}
        scores = dict(zip(open_, self._scores(list(open_.values())), strict=True))
        values = [-math.inf if p.idle else scores[p.prefix] for p in particles]
        return torch.tensor(values, dtype=torch.float64)

    def onto(self, particle: Partial) -> list[Partial]:
        """Return the path with its first ``t + 1`` entries replaced by those of ``particle``.

        Only the entry at ``t`` and those after it are of use: the earlier ones stay.
        """
        if particle is self.path[self.t]:
            return list(self.path)
        model, grown = self.model, [particle]
        for s, step in enumerate(self.rest, start=self.t):
            now = grown[-1]
            ratio = model.log_ratio_of(now.prefix, step)
            grown += model.rated(s, [now], [step], [ratio], [0])
        last = grown[-1]
        resting = last._replace(log_increment=0.0, log_ratio=0.0)
        missing = len(self.path) - self.t - len(grown)
        return [*self.path[: self.t], *grown, *[resting] * missing]

    def _scores(self, candidates: list[Partial]) -> list[float]:
        """Log likelihood and log potentials of the rest after each of n open answers."""
        if not candidates:
            return []
        prefixes: list[Prefix] = [p.prefix for p in candidates]
        rest = [joined_steps(self.rest)] * len(candidates)
        log_p = score_under(self.model.lm, self.model.law, prefixes, rest).tolist()
        gains = self._gains(candidates, log_p)
        return [p + g for p, g in zip(log_p, gains, strict=True)]

    def _gains(self, candidates: list[Partial], log_p: list[float]) -> list[float]:
        """Sum of the log potentials of the rest after each candidate, to the model's power."""
        power = self.model.power
        if self.model.kind == "per_step" and getattr(self.model.potential, "local", False):
            own = self.path[-1].log_potential - self.path[self.t].log_potential
            return [power * own] * len(candidates)
        gains = [0.0 if p > -math.inf else -math.inf for p in log_p]
        now = list(candidates)
        for s, step in enumerate(self.rest, start=self.t):
            alive = [k for k, gain in enumerate(gains) if gain > -math.inf]
            if not alive:
                break
            drawn = [step] * len(alive)
            after = self.model.rated(s, [now[k] for k in alive], drawn, None, alive)
            for k, new in zip(alive, after, strict=True):
                gains[k] += power * new.log_increment
                now[k] = new
        return gains

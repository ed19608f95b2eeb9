"""Proposals of guided filters, as guides."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from probkit.guide import LogQ, Params
from probkit.inference.smc.particles import Particles, stack
from probkit.model import Batch, Values
from probkit.rng import Rng, stream

__all__ = ["Proposal"]


class Proposal(Protocol):
    """Base class of proposals for ``Sequential`` models, given as ``infer(guide=)``.

    A subclass gives ``propose`` and ``log_proposal``. As a guide it stands for the law of the whole
    path: ``sample`` runs the proposal through all steps.

    Example:
        >>> from probkit.models.state_space import LinearGaussian
        >>> class Wide(Proposal):
        ...     def propose(self, t, particles, data, *, rng):
        ...         return torch.randn(particles.shape, generator=rng, dtype=torch.float64)
        ...     def log_proposal(self, t, old, new, data):
        ...         return torch.distributions.Normal(0.0, 1.0).log_prob(new).sum(-1)
        >>> from probkit import infer
        >>> from probkit.inference.smc import ParticleFilter
        >>> y = torch.zeros(3, 1, dtype=torch.float64)
        >>> model = LinearGaussian(0.9, 0.2, 1.0, 0.5)
        >>> infer(model, y, ParticleFilter(50), guide=Wide(), rng=0).log_weights.shape
        torch.Size([1, 50])
    """

    def propose(
        self, t: int, particles: Particles, data: Any, *, rng: torch.Generator
    ) -> Particles:
        """Draw the particles after step ``t``."""
        ...

    def log_proposal(self, t: int, old: Particles, new: Particles, data: Any) -> Tensor:
        """Return log q(new | old) [n] of pairs."""
        ...

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Return no parameters."""
        return {}

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw ``n`` paths {"path": [n, step, *]} and their log densities."""
        data = batch.data
        generator = stream(rng, "proposal")
        old = model.start(n, data, rng=generator)
        log_q = torch.zeros(n, dtype=torch.float64, device=generator.device)
        visited = []
        for t in range(model.steps(data)):
            new = self.propose(t, old, data, rng=generator)
            log_q = log_q + self.log_proposal(t, old, new, data)
            visited.append(new)
            old = new
        return {"path": stack(visited)}, LogQ(log_q, torch.zeros_like(log_q))

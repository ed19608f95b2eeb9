"""The hidden Markov model with discrete states and discrete observations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.models.state_space.base import StateSpaceModel

__all__ = ["DiscreteHMM", "check_stochastic"]


@storable
@dataclass(frozen=True)
class DiscreteHMM(StateSpaceModel):
    """States z_t in 0..K-1 with a transition matrix, symbols y_t in 0..V-1 given the state.

    Data: symbols y [step], -1 where missing. Particles are states [n]. For exact posteriors of
    such a chain use the message-passing functions; this model is for particle methods and for
    checking them.

    Args:
        initial: p(z_0 = k) [state].
        transition: p(z_(t+1) = l | z_t = k) [state, state], rows sum to one.
        emission: p(y_t = v | z_t = k) [state, symbol], rows sum to one.
        prior: Laws of the unknown parameters, by field name.

    Example:
        >>> model = DiscreteHMM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], [[0.7, 0.3], [0.1, 0.9]])
        >>> states, y = model.simulate_path(6, rng=0)
        >>> y.shape
        torch.Size([1, 6])
    """

    initial: Tensor
    transition: Tensor
    emission: Tensor
    prior: Mapping[str, Distribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("initial", "transition", "emission"):
            value = as_tensor(getattr(self, name), name=name).double()
            object.__setattr__(self, name, value)
        states = self.initial.shape[0] if self.initial.ndim == 1 else -1
        square = tuple(self.transition.shape) == (states, states)
        if not square or self.emission.ndim != 2 or self.emission.shape[0] != states:
            raise ShapeError(
                "DiscreteHMM: expected initial [state], transition [state, state] and emission "
                f"[state, symbol], got {tuple(self.initial.shape)}, "
                f"{tuple(self.transition.shape)}, {tuple(self.emission.shape)}"
            )
        check_stochastic(self.initial, "DiscreteHMM: initial")
        check_stochastic(self.transition, "DiscreteHMM: transition")
        check_stochastic(self.emission, "DiscreteHMM: emission")

    def prepare(self, data: Any) -> Tensor:
        """Take y as whole numbers [step]."""
        y = as_tensor(data, name="y")
        symbols = self.emission.shape[1]
        if y.ndim != 1:
            raise ShapeError(f"DiscreteHMM: expected y [step], got {tuple(y.shape)}")
        whole = y.long()
        bad = (whole != y) | (whole < -1) | (whole >= symbols)
        if bool(bad.any()):
            t = int(bad.nonzero()[0])
            raise DataError(
                f"DiscreteHMM: expected symbols 0..{symbols - 1} (-1 where missing), got "
                f"{y[t].item()} at step {t}"
            )
        return whole

    def sample_initial(self, n: int, *, like: Tensor, rng: torch.Generator) -> Tensor:
        """Draw z_0 [n]."""
        return _categorical(self.initial.to(rng.device).expand(n, -1), rng)

    def sample_next(self, old: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw z_(t+1) [n]."""
        return _categorical(self.transition.to(old.device)[old], rng)

    def sample_observation(self, state: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw y_t [n]."""
        return _categorical(self.emission.to(state.device)[state], rng)

    def log_initial(self, new: Tensor) -> Tensor:
        """Return log p(z_0) [n]."""
        return self.initial.to(new.device).log()[new]

    def log_next(self, old: Tensor, new: Tensor) -> Tensor:
        """Return log p(z_(t+1) | z_t) [n]."""
        return self.transition.to(new.device).log()[old, new]

    def log_observation(self, y: Tensor, state: Tensor) -> Tensor:
        """Return log p(y_t | z_t) [n]; zero where y_t is missing."""
        emission = self.emission.to(state.device)
        if int(y) < 0:
            return emission.new_zeros(len(state))
        return emission.log()[:, int(y)][state]

    def log_transition_bound(self, t: int, data: Tensor) -> Tensor:
        """Return the largest log transition probability of step ``t``."""
        return (self.initial if t == 0 else self.transition).max().log()


def check_stochastic(rows: Tensor, name: str) -> None:
    """Check that probabilities [*row, entry] are non-negative and sum to one.

    Raises:
        DataError: They are not; the message names the first such row.
    """
    bad = (rows < 0).any(-1) | ~((rows.sum(-1) - 1).abs() <= 1e-8)
    if bool(bad.any()):
        place = tuple(int(i) for i in bad.nonzero()[0])
        where = f"row {place[0]}" if place else "it"
        raise DataError(
            f"{name}: expected probabilities that sum to one, {where} sums to "
            f"{float(rows[place].sum()):.6g}; normalise the rows"
        )


def _categorical(probs: Tensor, rng: torch.Generator) -> Tensor:
    """Draw one category [n] from each row of probs [n, category], by inversion."""
    cumulative = probs.cumsum(-1)
    uniform = torch.rand(len(probs), 1, generator=rng, dtype=probs.dtype, device=probs.device)
    return (cumulative <= uniform * cumulative[:, -1:]).sum(-1)

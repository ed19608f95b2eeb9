"""State-space models as ``Sequential`` models: what every one of them shares."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError
from probkit.model import Model, Site, Values
from probkit.rng import Rng, scope, stream

__all__ = ["StateSpaceModel"]


class StateSpaceModel(Model):
    """A Markov process x_0, x_1, ... that is seen through y_t | x_t.

    A subclass is a frozen dataclass whose fields are parameters, and gives the five methods below
    (states without a time index: the process is homogeneous). Its data is y [step, *observation];
    NaN entries are missing observations where the subclass says so.

    ``prior`` names the parameters that are unknown: they become the model's sites, with the
    supports of their laws, and :meth:`at` returns the model with values put in.

    Attributes:
        local_weights: The weight of a step looks at the new state only, so that backward sampling
            needs the transition density alone.
    """

    local_weights: ClassVar[bool] = True
    prior: Mapping[str, Distribution]

    # ------------------------------------------------------------------ what a subclass gives

    def sample_initial(self, n: int, *, like: Tensor, rng: torch.Generator) -> Tensor:
        """Draw ``n`` states x_0 [n, *state], of the dtype and device of the data ``like``."""
        raise CapabilityError(f"{type(self).__name__} must define sample_initial")

    def sample_next(self, old: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw x_(t+1) [n, *state] given x_t [n, *state]."""
        raise CapabilityError(f"{type(self).__name__} must define sample_next")

    def log_initial(self, new: Tensor) -> Tensor:
        """Return log p(x_0) [n]."""
        raise CapabilityError(f"{type(self).__name__} must define log_initial")

    def log_next(self, old: Tensor, new: Tensor) -> Tensor:
        """Return log p(x_(t+1) | x_t) [n] of pairs."""
        raise CapabilityError(f"{type(self).__name__} must define log_next")

    def log_observation(self, y: Tensor, state: Tensor) -> Tensor:
        """Return log p(y_t | x_t) [n] of one observation y [*observation]."""
        raise CapabilityError(f"{type(self).__name__} must define log_observation")

    def sample_observation(self, state: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw y_t [n, *observation] given x_t [n, *state]."""
        raise CapabilityError(f"{type(self).__name__} must define sample_observation")

    # ------------------------------------------------------------------ Sequential

    def prepare(self, data: Any) -> Any:
        """Take y as a tensor."""
        return as_tensor(data, name="y")

    def data_dims(self, data: Any) -> Any:
        """Name the dims of y."""
        return ("step", "feature")[: data.ndim]

    def steps(self, data: Tensor) -> int:
        """Return the length of y."""
        return len(data)

    def start(self, n: int, data: Tensor, *, rng: torch.Generator) -> Tensor:
        """Return ``n`` placeholders; step 0 draws x_0 from its law, whatever they are."""
        return torch.zeros_like(self.sample_initial(n, like=data, rng=_unused(rng)))

    def extend(self, t: int, particles: Tensor, data: Tensor, *, rng: torch.Generator) -> Tensor:
        """Draw x_t."""
        if t == 0:
            return self.sample_initial(len(particles), like=data, rng=rng)
        return self.sample_next(particles, rng=rng)

    def log_weight(self, t: int, old: Tensor, new: Tensor, data: Tensor) -> Tensor:
        """Return log p(y_t | x_t) [n]."""
        return self.log_observation(data[t], new)

    def log_transition(self, t: int, old: Tensor, new: Tensor, data: Tensor) -> Tensor:
        """Return log p(x_t | x_(t-1)) [n] of pairs; of x_0 at step 0."""
        return self.log_initial(new) if t == 0 else self.log_next(old, new)

    # ------------------------------------------------------------------ parameters

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return the unknown parameters."""
        found = {}
        for name, law in self.prior.items():
            shape = law.batch_shape + law.event_shape
            dims = tuple(f"{name}_{axis}" for axis in range(len(shape)))
            assert law.support is not None  # every law of torch has one
            found[name] = Site(shape, law.support, dims)
        return found

    def at(self, values: Values) -> StateSpaceModel:
        """Return the model with the parameters ``values`` {name: [*site]} put in.

        Nothing is checked, so that values may be traced by ``torch.func``.
        """
        return _with(self, {**values, "prior": {}})

    def log_prior(self, values: Values) -> Tensor:
        """Return log p(values) [*batch]."""
        terms = [
            law.log_prob(values[name]).flatten(-len(law.batch_shape)).sum(-1)
            if law.batch_shape
            else law.log_prob(values[name])
            for name, law in self.prior.items()
        ]
        return sum(terms[1:], terms[0])

    def sample_prior(self, n: int, *, rng: Rng) -> Values:
        """Draw ``n`` parameter values [n, *site]."""
        with scope(rng=stream(rng, "prior")):
            return {name: law.sample(torch.Size([n])) for name, law in self.prior.items()}

    # ------------------------------------------------------------------ simulation

    def simulate_path(
        self, steps: int, n: int = 1, *, rng: Rng, dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` state paths [n, steps, *state] and their observations [n, steps, *obs]."""
        generator = stream(rng, "path")
        state = self.sample_initial(n, like=torch.zeros((), dtype=dtype), rng=generator)
        states, seen = [], []
        for t in range(steps):
            state = state if t == 0 else self.sample_next(state, rng=generator)
            states.append(state)
            seen.append(self.sample_observation(state, rng=generator))
        return torch.stack(states, dim=1), torch.stack(seen, dim=1)

    def simulate(self, values: Values, x: Any, *, rng: Rng) -> Tensor:
        """Draw one series y [*batch, x, *obs] of ``x`` steps for each value [*batch, *site]."""
        if not self.prior:
            return self.simulate_path(int(x), rng=rng)[1][0]
        name, law = next(iter(self.prior.items()))
        lead = values[name].shape[: values[name].ndim - len(law.batch_shape + law.event_shape)]
        flat = {key: value.reshape(-1, *value.shape[len(lead) :]) for key, value in values.items()}
        root = stream(rng, "simulate")
        series = [
            self.at({key: value[i] for key, value in flat.items()}).simulate_path(int(x), rng=root)[
                1
            ][0]
            for i in range(lead.numel())
        ]
        return torch.stack(series).reshape(*lead, *series[0].shape)


def _unused(rng: torch.Generator) -> torch.Generator:
    """A stream for draws whose values do not matter."""
    return torch.Generator(rng.device)


def _with(model: Any, values: Mapping[str, Any]) -> Any:
    """Copy a frozen model with fields replaced, without checks and without cached properties."""
    known = {field.name for field in fields(model)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise DataError(
            f"{type(model).__name__} has no parameter {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known - {'prior'}))}"
        )
    changed = copy.copy(model)
    for name in list(vars(changed)):
        if isinstance(getattr(type(changed), name, None), functools.cached_property):
            del changed.__dict__[name]
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed

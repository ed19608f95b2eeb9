"""Where a posterior's values come from: draws, a closed form, a fitted guide, or a population."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit import distributions as D
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import storable
from probkit.guide import Guide, HasMarginals
from probkit.model import Batch, Values
from probkit.rng import Rng, scope, stream
from probkit.tree import concatenate

__all__ = ["Closed", "Draws", "Fitted", "Population", "Source"]


class Source(Protocol):
    """What a posterior is made of."""

    @property
    def chains(self) -> int:
        """Number of independent repeats."""
        ...

    def sample(self, n: int, *, model: Any, data: Any, rng: Rng) -> Values:
        """Draw ``n`` values [n, *site], all sites jointly."""
        ...

    def arrays(self) -> Values:
        """Return the stored draws [chain, draw, *site]; empty where there are none."""
        ...

    def first_chains(self, n: int) -> Self:
        """Keep the first ``n`` chains."""
        ...

    def join(self, others: Sequence[Self]) -> Self:
        """Append the chains of ``others``."""
        ...


def _pick(log_weights: Tensor | None, shape: tuple[int, ...], n: int, rng: Rng) -> Tensor:
    """Draw ``n`` positions of the flattened [chain, draw] grid by weight."""
    generator = stream(rng, "pick")
    total = torch.Size(shape).numel()
    if log_weights is None:
        return torch.randint(total, (n,), generator=generator)
    weights = torch.softmax(log_weights.detach().flatten().cpu().double(), dim=0)
    return torch.multinomial(weights, n, replacement=True, generator=generator)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.flatten(0, 1)[index.to(tensor.device)]


@storable
@dataclass(frozen=True)
class Draws:
    """Draws from the posterior, possibly weighted.

    Attributes:
        values: Site name -> [chain, draw, *site].
        log_weights: [chain, draw]; None for equal weights.
    """

    values: Values
    log_weights: Tensor | None = None

    def __post_init__(self) -> None:
        shapes = {tuple(value.shape[:2]) for value in self.values.values()}
        if self.log_weights is not None:
            shapes.add(tuple(self.log_weights.shape))
        if len(shapes) != 1 or len(next(iter(shapes))) != 2:
            raise ShapeError(f"Draws: expected equal leading [chain, draw] dims, got {shapes}")

    @property
    def shape(self) -> tuple[int, int]:
        """(chains, draws)."""
        first = next(iter(self.values.values()))
        return int(first.shape[0]), int(first.shape[1])

    @property
    def chains(self) -> int:
        """Number of chains."""
        return self.shape[0]

    def sample(self, n: int, *, model: Any = None, data: Any = None, rng: Rng) -> Values:
        """Draw ``n`` stored values with replacement, by weight."""
        index = _pick(self.log_weights, self.shape, n, rng)
        return {name: _rows(value, index) for name, value in self.values.items()}

    def arrays(self) -> Values:
        """Return the draws."""
        return self.values

    def first_chains(self, n: int) -> Draws:
        """Keep the first ``n`` chains."""
        weights = None if self.log_weights is None else self.log_weights[:n]
        return Draws({name: value[:n] for name, value in self.values.items()}, weights)

    def join(self, others: Sequence[Draws]) -> Draws:
        """Append chains."""
        parts = (self, *others)
        weights = [p.log_weights for p in parts if p.log_weights is not None]
        return Draws(
            concatenate([dict(p.values) for p in parts], dim=0),
            torch.cat(weights) if weights else None,
        )


@storable
@dataclass(frozen=True)
class Closed:
    """A posterior in closed form, given hyper-parameters or mixed over draws of them.

    Attributes:
        joint: Site name -> distribution; the sites are independent of each other given the
            hyper-parameters. Batch shape [*site], or [chain, draw, *site] where ``hyper`` has
            more than one draw. Empty for a model without sites.
        hyper: Hyper-parameter draws [chain, draw, *site]; None where none were inferred.
        state: What the model's ``predict`` needs (a tree), for example a Cholesky factor.
        log_weights: [chain, draw] weights of the hyper-parameter draws; None for equal ones.
        repeats: Number of chains asked for; a closed form is the same in each.
    """

    joint: Mapping[str, Distribution] = field(default_factory=dict)
    hyper: Values | None = None
    state: Any = None
    log_weights: Tensor | None = None
    repeats: int = 1

    @property
    def chains(self) -> int:
        """Number of chains of hyper-parameter draws, or of repeats."""
        shape = self.hyper_shape
        return self.repeats if shape is None else shape[0]

    @property
    def hyper_shape(self) -> tuple[int, int] | None:
        """(chains, draws) of the hyper-parameters; None where none were inferred."""
        for value in (self.hyper or {}).values():
            return int(value.shape[0]), int(value.shape[1])
        return None

    @property
    def is_mixture(self) -> bool:
        """Whether several hyper-parameter draws are mixed."""
        return self.hyper_shape not in (None, (1, 1))

    def sample(self, n: int, *, model: Any = None, data: Any = None, rng: Rng) -> Values:
        """Draw the sites, and the hyper-parameters they belong to."""
        values: dict[str, Tensor] = {}
        index = None
        if self.hyper is not None and self.hyper_shape is not None:
            index = _pick(self.log_weights, self.hyper_shape, n, rng)
            values.update({name: _rows(value, index) for name, value in self.hyper.items()})
        with scope(rng=stream(rng, "sites")):
            for name, dist in self.joint.items():
                if index is not None and self.is_mixture:
                    values[name] = D.select(D.flatten_batch(dist, 2), index).sample()
                else:
                    values[name] = dist.sample(torch.Size([n]))
        return values

    def arrays(self) -> Values:
        """Return the hyper-parameter draws."""
        return self.hyper or {}

    def first_chains(self, n: int) -> Closed:
        """Refuse: a closed form carries all its chains in one state, so none is padding."""
        if n == self.chains:
            return self
        raise CapabilityError("a closed-form posterior has no chains to drop")

    def join(self, others: Sequence[Closed]) -> Closed:
        """Refuse, as :meth:`first_chains`."""
        if not others:
            return self
        raise CapabilityError("closed-form posteriors cannot be joined; mix their predictives")


@storable
@dataclass(frozen=True)
class Fitted:
    """A guide with fitted parameters, one set per chain.

    Attributes:
        guide: The guide.
        params: One parameter tree per chain.
    """

    guide: Guide
    params: list[Any]

    @property
    def chains(self) -> int:
        """Number of independent fits."""
        return len(self.params)

    def sample(self, n: int, *, model: Any, data: Any, rng: Rng) -> Values:
        """Draw from the fits in equal shares."""
        owner = torch.randint(self.chains, (n,), generator=stream(rng, "chain"))
        drawn = []
        for chain, params in enumerate(self.params):
            share = int((owner == chain).sum())
            if share:
                batch = data if isinstance(data, Batch) else Batch(data)
                source = stream(rng, "guide", chain)
                with torch.no_grad():
                    drawn.append(self.guide.sample(params, model, batch, share, rng=source)[0])
        joined: dict[str, Tensor] = concatenate([dict(values) for values in drawn], dim=0)
        # Draws of one chain lie together; put them back at the positions that chose the chain.
        place = torch.argsort(torch.argsort(owner, stable=True))
        return {name: value[place.to(value.device)] for name, value in joined.items()}

    def marginals(self, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return the guide's marginals where one fit has known ones, else nothing."""
        if self.chains == 1 and isinstance(self.guide, HasMarginals):
            return self.guide.marginals(self.params[0], model, data)
        return {}

    def arrays(self) -> Values:
        """Return nothing: a fit stores no draws."""
        return {}

    def first_chains(self, n: int) -> Fitted:
        """Keep the first ``n`` fits."""
        return Fitted(self.guide, self.params[:n])

    def join(self, others: Sequence[Fitted]) -> Fitted:
        """Append fits."""
        return Fitted(self.guide, [*self.params, *(p for o in others for p in o.params)])


@storable
@dataclass(frozen=True)
class Population:
    """Weighted particles, which may be any objects.

    Attributes:
        particles: One sequence of particles per chain. A tensor [particle, *] counts as one.
        log_weights: [chain, particle].
    """

    particles: list[Any]
    log_weights: Tensor

    def __post_init__(self) -> None:
        sizes = tuple(len(chain) for chain in self.particles)
        shape = tuple(self.log_weights.shape)
        if len(shape) != 2 or sizes != shape[1:] * shape[0]:
            raise ShapeError(
                f"Population: expected log_weights [chain={len(sizes)}, particle={list(sizes)}], "
                f"got {tuple(self.log_weights.shape)}"
            )

    @property
    def chains(self) -> int:
        """Number of independent populations."""
        return len(self.particles)

    def sample(self, n: int, *, model: Any = None, data: Any = None, rng: Rng) -> Any:
        """Draw ``n`` particles by weight, {"particle": tensor [n, *] or list of objects}."""
        shape = (int(self.log_weights.shape[0]), int(self.log_weights.shape[1]))
        index = _pick(self.log_weights, shape, n, rng)
        if all(isinstance(chain, Tensor) for chain in self.particles):
            return {"particle": torch.cat(self.particles)[index.to(self.particles[0].device)]}
        flat = [particle for chain in self.particles for particle in chain]
        return {"particle": [flat[i] for i in index.tolist()]}

    def best(self) -> Any:
        """Return the particle with the largest weight."""
        chain, position = divmod(int(self.log_weights.argmax()), int(self.log_weights.shape[1]))
        return self.particles[chain][position]

    def arrays(self) -> Values:
        """Return tensor particles as one site; nothing for other objects."""
        if all(isinstance(chain, Tensor) for chain in self.particles):
            return {"particle": torch.stack(self.particles)}
        return {}

    def first_chains(self, n: int) -> Population:
        """Keep the first ``n`` populations."""
        return Population(self.particles[:n], self.log_weights[:n])

    def join(self, others: Sequence[Population]) -> Population:
        """Append populations."""
        parts = (self, *others)
        sizes = {int(p.log_weights.shape[1]) for p in parts}
        if len(sizes) != 1:
            raise DataError(f"populations of one posterior need one size, got {sorted(sizes)}")
        return Population(
            [chain for p in parts for chain in p.particles],
            torch.cat([p.log_weights for p in parts]),
        )

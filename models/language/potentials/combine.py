"""Potentials made of potentials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import storable
from probkit.models.language.potentials.base import Kind, kind_of
from probkit.models.language.protocol import Continuation, Prefix, extended

__all__ = ["All", "AsSteps", "Power"]


@storable
@dataclass(frozen=True)
class Power:
    """A potential to a power: ``beta < 1`` trusts it less, ``beta > 1`` more.

    Args:
        potential: Of either kind, which is also the kind of the power.
        beta: Above 0.

    Raises:
        DataError: ``beta`` is not a finite number above 0.
        CapabilityError: Not a potential.
    """

    potential: Any
    beta: float

    def __post_init__(self) -> None:
        kind_of(self.potential)
        if not 0.0 < self.beta < float("inf"):
            raise DataError(f"Power: expected a finite beta > 0, got {self.beta!r}")

    @property
    def kind(self) -> Kind:
        """Kind of the potential."""
        return kind_of(self.potential)

    def log_step(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return beta log G of each step, [n]."""
        return self.beta * self.potential.log_step(prefixes, steps)

    def log_value(self, prefixes: Sequence[Prefix], finished: Sequence[bool]) -> Tensor:
        """Return beta log V of each prefix, [n]."""
        return self.beta * self.potential.log_value(prefixes, finished)


@storable
@dataclass(frozen=True)
class All:
    """The product of potentials of one kind; their logarithms add up.

    Later potentials are asked only about texts that the earlier ones left possible, so put cheap
    and hard ones first.

    Args:
        potentials: At least one, all of the same kind. A value joins step potentials as
            ``AsSteps(value)``.

    Raises:
        DataError: None given.
        CapabilityError: The kinds differ.

    Example:
        >>> from probkit.models.language.potentials import VerifierPotential
        >>> short = VerifierPotential(lambda text: len(text) < 3, low=0.1)
        >>> calm = VerifierPotential(lambda text: "!" not in text, low=0.5)
        >>> step = Continuation((), "ab!", -1.0, -1.0, "length", 3)
        >>> round(All([short, calm]).log_step([Prefix("go")], [step]).exp().item(), 3)
        0.05
    """

    potentials: Sequence[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "potentials", tuple(self.potentials))
        if not self.potentials:
            raise DataError("All: expected at least one potential, got none")
        kinds = [kind_of(potential) for potential in self.potentials]
        if len(set(kinds)) > 1:
            named = ", ".join(
                f"{type(p).__name__} is {k}" for p, k in zip(self.potentials, kinds, strict=True)
            )
            raise CapabilityError(
                f"All: expected potentials of one kind, got both: {named}. Wrap values as "
                "AsSteps(value)"
            )

    @property
    def kind(self) -> Kind:
        """Kind of all of them."""
        return kind_of(self.potentials[0])

    def log_step(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return the sum of log G of each step, [n]."""

        def one(potential: Any, keep: list[int]) -> Tensor:
            return potential.log_step([prefixes[k] for k in keep], [steps[k] for k in keep])

        return self._sum(one, len(prefixes))

    def log_value(self, prefixes: Sequence[Prefix], finished: Sequence[bool]) -> Tensor:
        """Return the sum of log V of each prefix, [n]."""

        def one(potential: Any, keep: list[int]) -> Tensor:
            return potential.log_value([prefixes[k] for k in keep], [finished[k] for k in keep])

        return self._sum(one, len(prefixes))

    def _sum(self, one: Callable[[Any, list[int]], Tensor], n: int) -> Tensor:
        total = torch.zeros(n, dtype=torch.float64)
        for potential in self.potentials:
            keep = [k for k, value in enumerate(total.tolist()) if value != -torch.inf]
            if not keep:
                break
            scores = one(potential, keep)
            if scores.shape != (len(keep),):
                raise ShapeError(
                    f"{type(potential).__name__}: expected one log score for each of "
                    f"{len(keep)} texts, got shape {list(scores.shape)}"
                )
            total[keep] += scores.to(total)
        return total


@storable
@dataclass(frozen=True)
class AsSteps:
    """A value as a step potential: G_t = V_t / V_{t-1}, so that the steps multiply to the value.

    It gives the same target as the value alone, and can be combined with step potentials in
    :class:`All`.

    Args:
        value: A value potential.
        final: Strings that end an answer, as in ``Steps(final=)``; the end of the sequence always
            does.

    Raises:
        CapabilityError: Not a value potential.

    Example:
        >>> from probkit.models.language.potentials import VerifierPotential
        >>> even = VerifierPotential(lambda text: len(text) % 2 == 0, kind="value", low=0.5)
        >>> step = Continuation((), "b", -1.0, -1.0, "length", 1)
        >>> AsSteps(even).log_step([Prefix("go", text="a")], [step]).exp().item()
        2.0
    """

    value: Any
    final: Sequence[str] = ()

    kind = "per_step"

    def __post_init__(self) -> None:
        final = (self.final,) if isinstance(self.final, str) else tuple(self.final)
        object.__setattr__(self, "final", final)
        if kind_of(self.value) != "value":
            raise CapabilityError(
                f"AsSteps: expected a value potential, {type(self.value).__name__} rates steps "
                "already; use it as it is"
            )

    def log_step(self, prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> Tensor:
        """Return log V after less log V before each step, [n]; minus infinity stays so."""
        after = [extended(p, step) for p, step in zip(prefixes, steps, strict=True)]
        ends = [
            step.reason == "end" or bool(self.final) and step.text.endswith(tuple(self.final))
            for step in steps
        ]
        new = self.value.log_value(after, ends)
        old = self.value.log_value(prefixes, [False] * len(prefixes))
        fresh = torch.tensor([not p.text for p in prefixes], dtype=torch.bool)
        old = torch.where(fresh, torch.zeros_like(old), old)  # V of the empty prefix is 1.
        dead = torch.isneginf(old) | torch.isneginf(new)
        return torch.where(dead, torch.full_like(new, -torch.inf), new - old)

"""Geweke's joint-distribution test of a transition kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probkit.calibration.replicates import Quantities, draw_pair, fit, run_all, scalars
from probkit.errors import CapabilityError, DataError
from probkit.model import Values, lacks
from probkit.posterior import Posterior
from probkit.rng import Rng, draw_count, seed_of, stream
from probkit.sources import Draws

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Geweke", "Transition", "geweke", "transition_of"]

#: (values {site: [*site]}, data, generator) -> values; leaves the posterior given data invariant.
Transition = Callable[[Values, Any, torch.Generator], Values]
#: (values {site: [*site]}, generator) -> data, drawn from the likelihood.
Redraw = Callable[[Values, torch.Generator], Any]


@dataclass(frozen=True, repr=False)
class Geweke:
    """How far chains of transitions have left the joint distribution.

    Attributes:
        drift: Quantity -> [chain] average over the steps of the chain, minus that over as many
            fresh pairs; its expectation is zero if the kernel is right.
        complete: False after an interruption.
    """

    drift: Mapping[str, Tensor]
    complete: bool = True

    def __repr__(self) -> str:
        """Say what drifts most."""
        z = self.z()
        worst = max(z, key=lambda name: abs(z[name]))
        return f"Geweke({len(z)} quantities, largest |z| {abs(z[worst]):.2f} of {worst})"

    def z(self) -> dict[str, float]:
        """Return each mean drift over its standard error."""
        found = {}
        for name, drift in self.drift.items():
            error = float(drift.std()) / len(drift) ** 0.5
            mean = float(drift.mean())
            found[name] = mean / error if error > 0 else (0.0 if mean == 0 else float("inf"))
        return found

    def p_values(self) -> dict[str, float]:
        """Return two-sided p-values of the drifts, by Student's t."""
        from scipy.stats import t

        chains = len(next(iter(self.drift.values())))
        return {name: float(2 * t.sf(abs(z), chains - 1)) for name, z in self.z().items()}

    def passed(self, level: float = 0.01) -> bool:
        """Whether no quantity is rejected, all tests together at ``level`` (Bonferroni)."""
        return min(self.p_values().values()) * len(self.drift) > level

    def summary(self) -> pd.DataFrame:
        """Tabulate drift, its standard error, z and p-value of each quantity."""
        import pandas as pd

        z, p = self.z(), self.p_values()
        rows = {
            name: {
                "drift": float(drift.mean()),
                "error": float(drift.std()) / len(drift) ** 0.5,
                "z": z[name],
                "p": p[name],
            }
            for name, drift in self.drift.items()
        }
        return pd.DataFrame.from_dict(rows, orient="index")


def transition_of(model: Any, sampler: Any) -> Transition:
    """Turn a sampler that can start at given values into a transition of one draw.

    For HMC, NUTS and samplers alike: dataclasses with ``draws``, ``warmup``, ``start`` and
    ``step_size``. The step size must be given, because one that is searched for at each point would
    itself break detailed balance.

    Raises:
        CapabilityError: The sampler lacks these options, or its step size is not given.
    """
    needed = ("draws", "warmup", "start", "step_size")
    options = {f.name for f in dataclasses.fields(sampler)} if _is_dataclass(sampler) else set()
    lacking = [name for name in needed if name not in options]
    if lacking:
        raise CapabilityError(
            f"geweke needs a sampler with the options {', '.join(needed)} (HMC, NUTS), or a "
            f"function (values, data, generator) -> values; {type(sampler).__name__} lacks "
            f"{', '.join(lacking)}"
        )
    if sampler.step_size is None:
        raise CapabilityError(
            f"geweke: expected {type(sampler).__name__}(step_size=<fixed>), got None; a step size "
            "that is searched for at each point breaks the balance that is tested"
        )

    def transition(values: Values, data: Any, rng: torch.Generator) -> Values:
        source = Draws({name: value[None, None] for name, value in values.items()})
        point = Posterior(source, model=model, attrs={"point_estimate": True})
        point = dataclasses.replace(point, context=dataclasses.replace(point.context, data=data))
        once = dataclasses.replace(sampler, draws=1, warmup=0, start=point)
        post = fit(model, data, once, rng, {})
        return {name: value[0, 0] for name, value in post.draws.items()}

    return transition


def _is_dataclass(sampler: Any) -> bool:
    return dataclasses.is_dataclass(sampler) and not isinstance(sampler, type)


@dataclass(frozen=True)
class _Chain:
    """One chain of alternating transitions and redrawn data."""

    model: Any
    transition: Any
    redraw: Redraw | None
    simulate: Any
    steps: int
    seed: int
    quantities: Quantities | None
    log_joint: bool

    def __call__(self, number: int) -> dict[str, float] | None:
        seed = seed_of(stream(self.seed, "chain", number))
        start, *fresh = (
            draw_pair(self.model, self.simulate, stream(seed, "pair", k))
            for k in range(self.steps + 1)
        )
        values, data = start
        move = self.transition
        if not callable(move):
            move = transition_of(self.model, self.transition)
        kernel, noise = stream(seed, "kernel"), stream(seed, "data")
        found = []
        for _ in range(self.steps):
            values = dict(move(values, data, kernel))
            data = self._redrawn(values, data, noise)
            found.append(self._measure(values, data))
        expected = [self._measure(*pair) for pair in fresh]
        return {
            name: sum(a[name] - b[name] for a, b in zip(found, expected, strict=True)) / self.steps
            for name in found[0]
        }

    def _redrawn(self, values: Values, data: Any, rng: torch.Generator) -> Any:
        if self.redraw is not None:
            return self.redraw(values, rng)
        lead = {name: value[None] for name, value in values.items()}
        return self.model.replace_observed(data, lead, rng=rng)

    def _measure(self, values: Values, data: Any) -> dict[str, float]:
        lead = {name: value[None] for name, value in values.items()}
        found = scalars(
            self.model, lead, data, quantities=self.quantities, log_joint=self.log_joint
        )
        numbers = {name: float(x) for name, x in found.items()}
        return {**numbers, **{f"{name}^2": x * x for name, x in numbers.items()}}


def geweke(
    model: Any,
    transition: Any,
    *,
    redraw: Redraw | None = None,
    simulate: Any = None,
    chains: int = 40,
    steps: int = 40,
    rng: Rng,
    quantities: Quantities | None = None,
    log_joint: bool = True,
    executor: Executor | None = None,
) -> Geweke:
    """Test a transition kernel against the joint distribution of values and data (Geweke 2004).

    Each chain starts at a pair drawn from the joint, values from the prior and data given them.
    Then it alternates: the kernel moves the values given the data, the likelihood redraws the data
    given the values. If the kernel leaves the posterior invariant, every pair of the chain still
    has the joint distribution, so that averages of any function over its steps have the expectation
    of averages over fresh pairs. Chains are independent, so that no autocorrelation has to be
    estimated. An error of the kernel drives the chains away from the prior step by step.

    Ctrl-C returns the chains so far, marked by ``complete=False``.

    Args:
        model: A model that can be simulated (``sample_dataset``), or any with ``simulate``.
        transition: A function (values {site: [*site]}, data, generator) -> values, or a sampler
            that :func:`transition_of` can turn into one: HMC or NUTS with a fixed ``step_size``.
        redraw: Function (values {site: [*site]}, generator) -> data; by default the model's own
            ``replace_observed`` (Pyro programs have it).
        simulate: Function (generator) -> (values, data), as for :func:`sbc`.
        chains: Independent chains.
        steps: Transitions of each.
        rng: Seed. Chain ``k`` has its own stream, whatever ``chains`` and the executor.
        quantities: Function (values {site: [n, *site]}, data) -> {name: [n]}; by default every
            entry of every site. Squares are added to each.
        log_joint: Add the log joint, where ``quantities`` is None and the model has one.
        executor: Any ``concurrent.futures.Executor``; chains run on it.

    Raises:
        CapabilityError: The model cannot be simulated, or the sampler cannot be used.
        DataError: Fewer than five chains.

    Example:
        A kernel that draws from the exact posterior of a normal mean:

        >>> from torch.distributions import constraints
        >>> from probkit.model import Model, Site
        >>> class Location(Model):
        ...     def sites(self, data):
        ...         return {"mu": Site((), constraints.real)}
        >>> def redraw(values, rng):
        ...     return values["mu"] + torch.randn(3, generator=rng, dtype=torch.float64)
        >>> def pair(rng):
        ...     values = {"mu": torch.randn((), generator=rng, dtype=torch.float64)}
        ...     return values, redraw(values, rng)
        >>> def gibbs(values, data, rng):
        ...     noise = torch.randn((), generator=rng, dtype=torch.float64)
        ...     return {"mu": data.sum() / 4 + 0.5 * noise}
        >>> result = geweke(Location(), gibbs, redraw=redraw, simulate=pair, rng=0)
        >>> result.passed()
        True
    """
    chains, steps = draw_count(chains, "geweke: chains"), draw_count(steps, "geweke: steps")
    if chains < 5:
        raise DataError(f"geweke: expected chains >= 5 to estimate a standard error, got {chains}")
    if redraw is None and lacks(model, ("replace_observed",)):
        raise CapabilityError(
            f"geweke: {type(model).__name__} lacks replace_observed; pass "
            "redraw=<function(values, generator) -> data>"
        )
    if not callable(transition):
        transition_of(model, transition)
    task = _Chain(model, transition, redraw, simulate, steps, seed_of(rng), quantities, log_joint)
    results, complete = run_all(task, chains, executor)
    names = results[0]
    drift = {
        name: torch.tensor([found[name] for found in results], dtype=torch.float64)
        for name in names
    }
    return Geweke(drift, complete)

"""Exact posteriors: condition in closed form (or by one forward pass of an amortised network)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from probkit.data import as_tensor, device_of
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import storable
from probkit.guide import Guide
from probkit.marginal import Marginal
from probkit.model import Batch, Values
from probkit.posterior import Posterior, make_posterior
from probkit.sampler import Problem, Sampler, Step, check_fit
from probkit.sources import Closed, Draws, Fitted
from probkit.tree import Tree

__all__ = ["Direct"]

_DRAWS_OF_A_FIT = 100  # each costs one factorisation


@storable
@dataclass(frozen=True)
class Direct(Sampler):
    """Condition a model in closed form.

    With ``infer(guide=)`` the guide is an amortised network: its parameters are trained already,
    and the posterior is what it proposes for the data. Where ``hyper`` is a sampler the guide is
    that sampler's, over the hyper-parameters.

    Args:
        hyper: How hyper-parameters are found. None keeps the values that the model holds; a
            mapping fixes them; a sampler (``MAP()``, ``NUTS()``, ...) infers them on
            ``Marginal(model)``, its draws giving a mixture of closed forms. Of a variational fit
            100 draws are taken for each chain.

    Raises:
        CapabilityError: ``hyper`` is a sampler and the model has no closed-form evidence.
        DataError: A value of ``hyper`` lies outside its support.
        ShapeError: A value of ``hyper`` has another shape than its site.

    Example:
        >>> from probkit import infer
        >>> from probkit.inference import MAP
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.models import ScaleMixtureNNGP
        >>> import torch
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> post = infer(
        ...     ScaleMixtureNNGP(NNGPKernel()), (x, x[:, 0].sin()), Direct(hyper=MAP()), rng=0
        ... )
        >>> post.is_point_estimate
        False
    """

    hyper: Any = None
    accepts_guide = True

    def __post_init__(self) -> None:
        if not (self.hyper is None or isinstance(self.hyper, dict) or self._nested is not None):
            raise DataError(
                f"Direct: expected hyper=None, a mapping of values or a sampler, got {self.hyper!r}"
            )

    @property
    def _nested(self) -> Sampler | None:
        """The sampler of the hyper-parameters, if there is one."""
        return self.hyper if callable(getattr(self.hyper, "step", None)) else None

    @property
    def needs(self) -> tuple[str, ...]:
        """``condition``, and the evidence where hyper-parameters are inferred."""
        if self._nested is not None:
            return ("condition", "hyper_sites", "log_hyperprior", "log_evidence")
        return ("condition",)

    @property
    def needs_with_guide(self) -> tuple[str, ...]:
        """Only the sites for an amortised guide; a nested sampler takes the guide for itself."""
        return ("sites",) if self._nested is None else self.needs

    @property
    def block(self) -> int | None:
        """As the hyper-parameter sampler has it; one state for all chains without one."""
        return None if self._nested is None else self._nested.block

    def total(self) -> int | None:
        """Steps of the hyper-parameter sampler; one without it."""
        return 1 if self._nested is None else self._nested.total()

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Start the hyper-parameter sampler."""
        if self._nested is None:
            _fixed(problem, self.hyper)
            return {"chains": len(rngs)}
        inner = _marginal_problem(problem)
        check_fit(inner.model, self._nested, inner.guide)
        return self._nested.init(inner, rngs=rngs)

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Advance the hyper-parameter sampler."""
        if self._nested is None:
            return Step(state, done=True)
        return self._nested.step(_marginal_problem(problem), state, rngs=rngs)

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """As the hyper-parameter sampler says."""
        return self._nested is not None and self._nested.can_finish(state, kept)

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Condition, or return the posterior of the hyper-parameters of this block of chains."""
        if self._nested is not None:
            found = self._nested.finish(_marginal_problem(problem), state, kept, rngs=rngs)
            return _as_draws(found, rngs)
        if problem.guide is not None:
            return _amortised(problem, problem.guide, rngs)
        posterior = problem.model.condition(problem.data, _fixed(problem, self.hyper))
        return _with_chains(problem, posterior, state["chains"])

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Condition the full model on the hyper-parameter draws of all chains."""
        if self._nested is None:
            return posterior
        posterior = self._nested.conclude(_marginal_problem(problem), posterior)
        source = posterior.source
        if not isinstance(source, Draws):
            raise CapabilityError(
                f"Direct(hyper={type(self._nested).__name__}()) needs a sampler that returns draws"
            )
        found = {k: v for k, v in posterior.attrs.items() if k != "point_estimate"}
        attrs = {**found, "hyper": type(self._nested).__name__}
        return condition_on_draws(problem, replace(posterior, attrs=attrs), source)


def _marginal_problem(problem: Problem) -> Problem:
    return replace(problem, model=Marginal(problem.model))


def _fixed(problem: Problem, hyper: Mapping[str, Any] | None) -> Values | None:
    """Turn given hyper-parameters, numbers and arrays included, into one checked value each."""
    if hyper is None:
        return None
    list_sites = getattr(problem.model, "hyper_sites", None)
    sites = list_sites(problem.data) if callable(list_sites) else {}
    values = {}
    for name, given in hyper.items():
        value = as_tensor(given, name=f"hyper[{name!r}]")
        site = sites.get(name)
        if site is not None and tuple(value.shape) != site.shape:
            raise ShapeError(
                f"Direct: hyper[{name!r}]: expected shape {site.shape}, got {tuple(value.shape)}"
            )
        if site is not None and not bool(site.support.check(value).all()):
            raise DataError(
                f"Direct: hyper[{name!r}]: expected a value in {site.support}, got {value.tolist()}"
            )
        values[name] = value.to(device_of(problem.data))
    return values


def _as_draws(posterior: Posterior, rngs: Any) -> Posterior:
    """Take draws, chain by chain, from a posterior that is a fitted guide."""
    source = posterior.source
    if not isinstance(source, Fitted):
        return posterior
    chains = [
        Fitted(source.guide, [params]).sample(
            _DRAWS_OF_A_FIT, model=posterior.model, data=posterior.context.data, rng=rng
        )
        for params, rng in zip(source.params, rngs, strict=True)
    ]
    return replace(
        posterior,
        source=Draws({k: torch.stack([c[k] for c in chains]) for k in chains[0]}),
        marginals={},
    )


def _with_chains(problem: Problem, posterior: Posterior, chains: int) -> Posterior:
    """Repeat the one closed form for every chain that was asked for."""
    source, evidence = posterior.source, posterior.log_evidence
    if isinstance(source, Closed):
        source = replace(source, repeats=chains)
    if evidence is not None and len(evidence.value) == 1:
        evidence = replace(evidence, value=evidence.value.expand(chains).clone())
    context = replace(posterior.context, coords={**posterior.context.coords, **problem.coords})
    return replace(posterior, source=source, log_evidence=evidence, context=context)


def _amortised(problem: Problem, guide: Guide, rngs: Any) -> Posterior:
    """The posterior of an amortised guide: its parameters are trained, nothing is fitted."""
    params = guide.init(problem.model, problem.data, rng=rngs[0])
    source = Fitted(guide, [params for _ in rngs])
    marginals = source.marginals(problem.model, Batch(problem.data))
    return make_posterior(problem, source, marginals=marginals)


def condition_on_draws(problem: Problem, hyper: Posterior, draws: Draws) -> Posterior:
    """Condition on hyper-parameter draws; a single draw keeps the closed form unmixed."""
    single = draws.shape == (1, 1)
    values: Values = {
        name: value[0, 0] if single else value for name, value in draws.values.items()
    }
    posterior: Posterior = problem.model.condition(problem.data, values)
    source = posterior.source
    if isinstance(source, Closed):
        source = replace(source, hyper=dict(draws.values), log_weights=draws.log_weights)
    dims = {**posterior.context.dims, **hyper.context.dims}
    coords = {**posterior.context.coords, **problem.coords}
    evidence = posterior.log_evidence
    if evidence is not None and not single:
        evidence = None  # The evidence given each draw is no evidence of the whole model.
    return replace(
        posterior,
        source=source,
        context=replace(posterior.context, dims=dims, coords=coords),
        marginals={} if not single else posterior.marginals,
        log_evidence=evidence,
        sample_stats=hyper.sample_stats,
        attrs={**posterior.attrs, **hyper.attrs},
    )

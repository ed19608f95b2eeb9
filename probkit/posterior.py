"""The posterior: one result type for draws, closed forms, fitted guides and particles."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import can_pack, class_name, read_folder, storable, write_folder
from probkit.model import Values
from probkit.predictive import Predictive
from probkit.rng import Rng, draw_count
from probkit.sampler import Problem
from probkit.sources import Fitted, Population, Source

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Context", "Evidence", "Posterior", "load", "make_posterior"]

Marginals = Mapping[str, Distribution | tuple[Distribution, ...]]


@storable
@dataclass(frozen=True)
class Evidence:
    """Log marginal likelihood, with what kind of number it is.

    Attributes:
        value: [chain].
        kind: "exact", "bound" (a lower bound) or "estimate" (of the evidence, unbiased).
    """

    value: Tensor
    kind: Literal["exact", "bound", "estimate"]

    def __post_init__(self) -> None:
        if self.value.ndim != 1:
            raise ShapeError(f"Evidence: expected value [chain], got {tuple(self.value.shape)}")
        if self.kind not in ("exact", "bound", "estimate"):
            raise DataError(f"Evidence: expected kind exact, bound or estimate, got {self.kind!r}")


@storable
@dataclass(frozen=True)
class Context:
    """What a posterior was computed from.

    Attributes:
        data: The data, as tensors.
        coords: Labels along named dims.
        dims: Site name -> dim names.
    """

    data: Any = None
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    dims: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Posterior:
    """The result of :func:`probkit.infer`.

    Attributes:
        source: Where values come from: Draws, Closed, Fitted or Population.
        model: The model.
        context: Data, coords and dims.
        marginals: Site name -> exact or variational marginal (a tuple for ragged sequences). They
            are marginals, not a joint: draws come from ``source`` alone.
        log_evidence: Log marginal likelihood; None where the sampler gives none.
        sample_stats: Name -> [chain, draw, ...] or [chain] statistics of the sampler.
        attrs: Algorithm, options, seed, versions, seconds, ``complete``, ``point_estimate``.
    """

    source: Source
    model: Any
    context: Context = field(default_factory=Context)
    marginals: Marginals = field(default_factory=dict)
    log_evidence: Evidence | None = None
    sample_stats: Mapping[str, Tensor] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Say in one line what it is; the numbers are in ``summary()``."""
        shapes = {name: tuple(value.shape) for name, value in self.draws.items()}
        parts = [f"model={type(self.model).__name__}", f"chains={self.chains}"]
        if shapes:
            parts.append(f"draws={shapes}")
        if self.marginals:
            parts.append(f"marginals=({', '.join(self.marginals)})")
        if self.is_point_estimate:
            parts.append("point_estimate=True")
        return f"Posterior({type(self.source).__name__}, {', '.join(parts)})"

    @property
    def draws(self) -> Values:
        """Stored draws, site name -> [chain, draw, *site]; empty where there are none."""
        return self.source.arrays()

    @property
    def analytic(self) -> Marginals:
        """Marginals in closed form, site name -> distribution."""
        return self.marginals

    @property
    def particles(self) -> Population | None:
        """The weighted particles of a particle method."""
        return self.source if isinstance(self.source, Population) else None

    @property
    def log_weights(self) -> Tensor | None:
        """Log weights [chain, draw] of the draws; None for equal weights."""
        weights: Tensor | None = getattr(self.source, "log_weights", None)
        return weights

    @property
    def chains(self) -> int:
        """Number of independent repeats."""
        return self.source.chains

    @property
    def is_point_estimate(self) -> bool:
        """Whether the draws are one optimum per chain, without uncertainty."""
        return bool(self.attrs.get("point_estimate", False))

    @functools.cached_property
    def log_likelihood(self) -> Mapping[str, Tensor]:
        """Pointwise log likelihood of the draws, {observed name: [chain, draw, *obs]}."""
        pointwise = getattr(self.model, "pointwise_log_likelihood", None)
        if pointwise is None or not self.draws:
            return {}
        try:
            with torch.no_grad():
                result: Mapping[str, Tensor] = pointwise(self.draws, self.context.data)
        except CapabilityError:  # For instance sites that a Pyro program sums out.
            return {}
        return result

    def sample(self, n: int, *, rng: Rng) -> Values:
        """Draw ``n`` joint values [n, *site] from the posterior."""
        return self.source.sample(draw_count(n), model=self.model, data=self.context.data, rng=rng)

    def predict(
        self,
        x: Any,
        *,
        site: str | None = None,
        joint: bool = False,
        groups: Mapping[str, Sequence[Any]] | None = None,
        rng: Rng | None = None,
    ) -> Predictive:
        """Predict at new inputs.

        Args:
            x: Inputs, in the form that the model's data has; arrays and frames are accepted.
            site: None predicts a new observation, noise included; a name predicts that latent.
            joint: Keep the dependence between the entries of ``x``.
            groups: Plate name -> the group label of each row of ``x``. Labels are matched by the
                posterior's coords; unseen ones are new groups, drawn from the prior.
            rng: Needed where the prediction draws random numbers; closed forms need none.

        Returns:
            The predictive distribution of shape [*obs].
        """
        from probkit.data import convert

        if not callable(getattr(self.model, "predict", None)):
            raise CapabilityError(
                f"{type(self.model).__name__} lacks predict; subclass probkit.Model, whose predict "
                "simulates from the draws, or use post.sample(n, rng=0)"
            )
        inputs = convert(_in_order(x, self.model, self.context)).data
        prediction: Predictive = self.model.predict(
            self, inputs, site=site, joint=joint, groups=groups, rng=rng
        )
        return prediction

    def update(self, more: Any, *, rng: Rng) -> Posterior:
        """Return the posterior given the old data and ``more``.

        Raises:
            CapabilityError: The model cannot update; fit all data with ``infer`` instead.
        """
        update = getattr(self.model, "update", None)
        if update is None:
            raise CapabilityError(
                f"{type(self.model).__name__} lacks update; run infer on old and new data together"
            )
        from probkit.data import convert

        result: Posterior = update(self, convert(more).data, rng=rng)
        return result

    def summary(self, *, draws: int = 1000, rng: Rng | None = None) -> pd.DataFrame:
        """Tabulate mean, sd, 5 % and 95 % quantile of each scalar, ESS and R-hat where defined.

        Args:
            draws: Draws to take from a fitted guide whose marginals are not known.
            rng: Needed in that case.
        """
        from probkit.summary import summarise

        return summarise(self, draws=draws, rng=rng)

    def to_arviz(self, *, draws: int = 1000, rng: Rng | None = None) -> Any:
        """Export for ArviZ: InferenceData under arviz 0.x, DataTree under 1.x.

        Args:
            draws: Draws per chain to take from a posterior that stores none or weighted ones.
            rng: Needed in that case.
        """
        from probkit.arviz_export import to_arviz

        return to_arviz(self, draws=draws, rng=rng)

    def to_datatree(self, *, draws: int = 1000, rng: Rng | None = None) -> Any:
        """Export as an xarray DataTree with the groups of the ArviZ schema."""
        from probkit.arviz_export import to_datatree

        return to_datatree(self, draws=draws, rng=rng)

    def to_botorch(self, outputs: Sequence[int] | None = None) -> Any:
        """Wrap as a BoTorch Model, with all outputs or those named.

        Its ``posterior(X)`` is of the latent function unless ``observation_noise=True``.
        """
        from probkit.botorch_adapter import to_botorch

        return to_botorch(self, outputs)

    def save(self, folder: str | Path) -> None:
        """Write into ``folder`` as ``posterior.json`` and ``tensors.safetensors``.

        A model or guide that is not of a registered class (a Pyro program, say) is named there but
        not stored; pass it to :func:`probkit.load`.
        """
        externals: dict[str, Any] = {}
        if not can_pack(self.model):
            externals["model"] = self.model
        if isinstance(self.source, Fitted) and not can_pack(self.source.guide):
            externals["guide"] = self.source.guide
        tree = {
            "source": self.source,
            "model": self.model,
            "context": self.context,
            "marginals": {k: v for k, v in self.marginals.items() if can_pack(v)},
            "log_evidence": self.log_evidence,
            "sample_stats": dict(self.sample_stats),
            "attrs": dict(self.attrs),
        }
        write_folder(folder, "posterior", tree, externals=externals)


def load(folder: str | Path, model: Any = None, guide: Any = None) -> Posterior:
    """Read a posterior that :meth:`Posterior.save` wrote.

    Args:
        folder: The folder.
        model: The model, where the file does not hold it.
        guide: The guide, where the file does not hold it.

    Raises:
        DataError: Not such a folder, a newer format, an unknown class, or a missing ``model``.
    """
    given = {"model": model, "guide": guide}
    externals = {name: value for name, value in given.items() if value is not None}
    tree = read_folder(folder, "posterior", externals=externals)
    if model is not None and tree["model"] is not model:
        if class_name(tree["model"]) != class_name(model):
            raise DataError(
                f"the file was written with model {class_name(tree['model'])}, got "
                f"{class_name(model)}; leave model= out, or pass the same"
            )
        tree["model"] = model
    if model is not None:
        _check_sites(model, tree["context"])
    return Posterior(**tree)


def _check_sites(model: Any, context: Context) -> None:
    """Refuse another program or user class than the one that the posterior was computed with."""
    if not context.dims or not callable(getattr(model, "sites", None)):
        return
    found = set(model.sites(context.data))
    if not found <= set(context.dims):
        raise DataError(
            f"the file holds the sites {', '.join(context.dims)}, the model given has "
            f"{', '.join(sorted(found))}; pass the model that it was written with"
        )


def make_posterior(
    problem: Problem,
    source: Source,
    *,
    marginals: Marginals | None = None,
    log_evidence: Evidence | None = None,
    sample_stats: Mapping[str, Tensor] | None = None,
    stat_dims: Mapping[str, tuple[str, ...]] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Posterior:
    """Build a posterior of ``problem``, dims taken from the model's sites.

    ``stat_dims`` names the dims after the chain of statistics that do not run along the draws,
    such as traces over the steps of a filter.
    """
    sites = problem.model.sites(problem.data)
    dims = {name: tuple(site.dims) for name, site in sites.items()} | dict(stat_dims or {})
    context = Context(problem.data, dict(problem.coords), dims)
    return Posterior(
        source=source,
        model=problem.model,
        context=context,
        marginals=marginals or {},
        log_evidence=log_evidence,
        sample_stats=sample_stats or {},
        attrs=attrs or {},
    )


def join_chains(parts: Sequence[Posterior]) -> Posterior:
    """Join posteriors of different chains of one run."""
    first = parts[0]
    if len(parts) == 1:
        return first
    evidence = None
    if all(p.log_evidence is not None for p in parts):
        values = [p.log_evidence.value for p in parts if p.log_evidence is not None]
        evidence = Evidence(torch.cat(values), first.log_evidence.kind)  # type: ignore[union-attr]
    stats = {k: torch.cat([p.sample_stats[k] for p in parts]) for k in first.sample_stats}
    return replace(
        first,
        source=first.source.join([p.source for p in parts[1:]]),
        marginals={},
        log_evidence=evidence,
        sample_stats=stats,
        attrs=_join_attrs(parts),
    )


def _join_attrs(parts: Sequence[Posterior]) -> dict[str, Any]:
    """The first chains' attributes; tuples with one entry for each chain are joined."""
    attrs = dict(parts[0].attrs)
    for name, value in parts[0].attrs.items():
        each = [(part.attrs.get(name), part.chains) for part in parts]
        tuples = [found for found, n in each if isinstance(found, tuple) and len(found) == n]
        if isinstance(value, tuple) and len(tuples) == len(parts):
            attrs[name] = tuple(entry for found in tuples for entry in found)
    return attrs


def first_chains(posterior: Posterior, n: int) -> Posterior:
    """Drop all chains but the first ``n`` (the padding of a block)."""
    evidence = posterior.log_evidence
    return replace(
        posterior,
        source=posterior.source.first_chains(n),
        log_evidence=None if evidence is None else Evidence(evidence.value[:n], evidence.kind),
        sample_stats={k: v[:n] for k, v in posterior.sample_stats.items()},
    )


def _in_order(x: Any, model: Any, context: Context) -> Any:
    """Bring the columns of a frame ``x`` into the order of the training frame, by their names.

    For models whose data is a tuple that begins with such a table; others pass unchanged.
    """
    import pandas as pd

    name_dims = getattr(model, "data_dims", None)
    if not isinstance(x, pd.DataFrame) or not callable(name_dims):
        return x
    named = name_dims(context.data)
    first = named[0] if isinstance(named, tuple) and named else None
    names = context.coords.get(first[1]) if isinstance(first, tuple) and len(first) == 2 else None
    found = list(x.columns)
    if names is None or found in (list(names), list(range(len(found)))):
        return x
    missing = [name for name in names if name not in found]
    extra = [name for name in found if name not in names]
    if missing or extra:
        raise DataError(
            f"x: expected the columns {', '.join(map(str, names))} as in training; missing: "
            f"{', '.join(map(str, missing)) or 'none'}, unknown: "
            f"{', '.join(map(str, extra)) or 'none'}"
        )
    return x[list(names)]

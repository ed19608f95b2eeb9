"""Any Pyro program as a probkit model."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.poutine import Trace
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor

from probkit.data import as_tensor
from probkit.density import site_dtype
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.model import Batch, Model, Site, Values
from probkit.predictive import Predictive
from probkit.pyro_adapter.enumeration import draw_enumerated, log_marginal
from probkit.pyro_adapter.handlers import Indices, LiftParams, Substitute, is_latent, is_observation
from probkit.pyro_adapter.layout import (
    Layout,
    batch_layout,
    check_nested,
    check_observations,
    check_same,
    has_row_bounds,
    layout_of,
    shuffles,
)
from probkit.pyro_adapter.runtime import (
    DataCache,
    DetachedData,
    isolated,
    name_of,
    outside_vmap,
    parameters_of,
    run_batched,
    stream_positions,
)
from probkit.rng import Rng, stream

__all__ = ["FromPyro"]


@dataclass
class _Memory:
    """What a model remembers about the data it has seen; no part of its value."""

    layouts: DataCache[Layout] = field(default_factory=DataCache)
    checked: DataCache[bool] = field(default_factory=DataCache)


_MEMORY: weakref.WeakKeyDictionary[FromPyro, _Memory] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class FromPyro(Model):
    """A Pyro program as a model: log joint, simulation, prediction and minibatches.

    Its data is a mapping of the program's keyword arguments. Plates become dims: a site in plates
    ``"school"`` and ``"class"`` has dims of these names, its other dims are ``<site>_dim_<i>``.

    Explicit ``pyro.param`` statements become sites with an improper flat prior on their constraint:
    MAP and SVI learn them, samplers treat them as any site, and the posterior is proper only if the
    likelihood makes it so. A program that has some cannot be drawn from its prior; nor can one with
    sites of law ``ImproperUniform``. Parameters of
    modules stay at the values that they have; give them priors with ``PyroSample`` to infer them.

    A factor belongs to the log joint, but not to the log likelihood.

    Sites get the dtype of the data, and the log joint that of the promoted terms. Numbers in a
    program, ``Gamma(2.0, 1.0)``, become tensors of torch's default dtype, float32; some laws (Gamma
    and its kin) then compute in float32. Write ``Gamma(x.new_tensor(2.0), 1.0)`` to keep float64.

    Args:
        program: A callable with Pyro statements; its structure must not depend on sampled values.
        observed: Names of the keyword arguments that are observed; they are None when predicting.
            A mapping {argument: site} also says which site each is the value of.
        minibatch_plate: Name of the plate that minibatches subsample. It is the leftmost dim of its
            sites, takes its ``size`` only, and the program indexes its data by what it yields
            (``with pyro.plate("data", len(x)) as i: ... x[i]``).
        coords: Dim name -> labels.
        dims: Site name -> names of its dims that are not plates.
        inputs: Keyword arguments to use where none are given: for ``sample_prior`` and
            ``sample_dataset``.
        enumerate_discrete: Sum discrete sites out of the log joint, exactly (Pyro's parallel
            enumeration): True for all, False for none, None for those that the program marks by
            ``infer={"enumerate": "parallel"}``. Each must have a finite support, and batch dims
            have to be declared as plates. :meth:`sample_discrete` draws them afterwards.
        allow_missing: Accept NaN and infinity in the data.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def schools(sigma, y=None):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        ...     tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        ...     with pyro.plate("school", len(sigma)):
        ...         theta = pyro.sample("theta", dist.Normal(mu, tau))
        ...         return pyro.sample("effect", dist.Normal(theta, sigma), obs=y)
        >>> data = {"sigma": torch.tensor([15.0, 10.0]), "y": torch.tensor([28.0, 8.0])}
        >>> {name: site.dims for name, site in FromPyro(schools).sites(data).items()}
        {'mu': (), 'tau': (), 'theta': ('school',)}
    """

    program: Callable[..., Any]
    observed: Sequence[str] | Mapping[str, str] = ("y",)
    minibatch_plate: str | None = None
    coords: Mapping[str, Sequence[Any]] | None = None  # type: ignore[assignment]
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    inputs: Mapping[str, Any] | None = None
    enumerate_discrete: bool | None = None
    allow_missing: bool = False

    def __post_init__(self) -> None:
        if not callable(self.program):
            raise DataError(f"FromPyro: expected a Pyro program (a callable), got {self.program!r}")
        if isinstance(self.observed, str):
            raise DataError(f"FromPyro: expected observed=({self.observed!r},), a tuple of names")
        names, anything = parameters_of(self.program)
        unknown = [name for name in self.observed if name not in names]
        if unknown and not anything:
            raise DataError(
                f"FromPyro: observed={tuple(self.observed)}: {name_of(self.program)} has no "
                f"keyword argument {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(names) or 'none'}"
            )
        object.__setattr__(self, "coords", dict(self.coords or {}))
        if self.minibatch_plate is None:
            # These methods are the capability; without a plate the model does not have it.
            object.__setattr__(self, "plate_size", None)
            object.__setattr__(self, "minibatch", None)

    # ---------------------------------------------------------------------------------- data

    def prepare(self, data: Any) -> dict[str, Any]:
        """Check the keyword arguments and turn observed ones into tensors.

        Raises:
            DataError: Not a mapping, an unknown or missing argument, or a non-finite entry.
        """
        kwargs = self._keywords(data)
        for name in self.observed:
            if kwargs.get(name) is None:
                raise DataError(
                    f"expected the observed argument {name!r} of {name_of(self.program)} in the "
                    "data, got none"
                )
            kwargs[name] = as_tensor(kwargs[name], name=name)
        if not self.allow_missing:
            for name, value in kwargs.items():
                _check_finite(name, value)
        return kwargs

    def _keywords(self, data: Any) -> dict[str, Any]:
        names, anything = parameters_of(self.program)
        title = name_of(self.program)
        if not isinstance(data, Mapping):
            raise DataError(
                f"expected data as a mapping of the keyword arguments of {title} "
                f"({', '.join(names)}), got {type(data).__name__}"
            )
        unknown = [str(k) for k in data if k not in names and k != self._index_key]
        if unknown and not anything:
            raise DataError(
                f"{title} has no keyword argument {', '.join(map(repr, unknown))}; "
                f"expected {', '.join(names)}"
            )
        needed = [n for n, required in names.items() if required and n not in self.observed]
        missing = [n for n in needed if n not in data]
        if missing:
            raise DataError(f"{title} needs {', '.join(map(repr, missing))} in the data")
        return dict(data)

    @property
    def _index_key(self) -> str:
        """Under which a batch carries its index: no keyword argument can be called this."""
        return f"{self.minibatch_plate}:index"

    def split_index(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Return the keyword arguments in ``data``, and the index if it is a batch."""
        return {k: v for k, v in data.items() if k != self._index_key}, data.get(self._index_key)

    def new_inputs(self, x: Any) -> dict[str, Any]:
        """Return keyword arguments for a prediction: ``x`` with the observed ones None."""
        source = self.inputs if x is None else x
        if source is None:
            names, _ = parameters_of(self.program)
            needed = [n for n, required in names.items() if required and n not in self.observed]
            if needed:
                raise CapabilityError(
                    f"{name_of(self.program)} needs inputs {', '.join(map(repr, needed))} here: "
                    "give FromPyro(..., inputs={...})"
                )
            source = {}
        kwargs = self._keywords(source)
        kwargs.pop(self._index_key, None)
        return {**kwargs, **dict.fromkeys(self.observed)}

    def data_dims(self, data: Any) -> dict[str, tuple[str, ...] | None]:
        """Name the dims of the observed arguments by the plates of their sites."""
        prepared = self.prepare(data)
        layout = self.layout(prepared)
        named: dict[str, tuple[str, ...] | None] = dict.fromkeys(data)
        for entry, site in layout.entries.items():
            named[entry] = layout.observed[site]
        return named

    # --------------------------------------------------------------------------------- traces

    def trace(
        self,
        kwargs: Mapping[str, Any],
        values: Values,
        *,
        strict: bool = True,
        mapped: bool = False,
        choose: Mapping[str, Any] | None = None,
        lenient: bool = False,
        enumerating: bool = False,
        enumerate_from: int | None = None,
    ) -> Trace:
        """Run the program on keyword arguments with latent values; call inside ``isolated``.

        ``enumerate_from`` gives sites that ask for it all their values, along dims from there to
        the left; ``enumerating`` alone leaves them to handlers further out.
        """
        arguments = dict(kwargs)
        index = arguments.pop(self._index_key, None)
        program = config_enumerate(self.program) if self.enumerate_discrete else self.program
        handlers: list[Any] = [
            Substitute(
                values,
                strict=strict,
                enumerating=enumerating or enumerate_from is not None,
                mapped=mapped,
                choose=choose,
            ),
            Indices(self.minibatch_plate, index, lenient=lenient),
            LiftParams(),
        ]
        if enumerate_from is not None:
            handlers.insert(0, poutine.enum(first_available_dim=enumerate_from))
        with contextlib.ExitStack() as stack:
            tracer = stack.enter_context(TraceMessenger())
            for handler in handlers:
                stack.enter_context(handler)
            program(**arguments)
        trace: Trace = tracer.trace
        return trace

    def layout(self, kwargs: Mapping[str, Any]) -> Layout:
        """Return the structure of the program for these arguments, traced once and remembered."""
        memory = _MEMORY.setdefault(self, _Memory())
        shared, index = self.split_index(kwargs)
        whole = memory.layouts.get(shared, lambda: self._look(shared))
        if index is None:
            return whole
        # The sites of a batch are those of all units, save for their number ...
        local = [site for site in whole.sites.values() if site.plate is not None]
        if any(has_row_bounds(site.support) for site in local):
            return self._look(kwargs)  # ... and for bounds that differ from unit to unit.
        return batch_layout(whole, len(index))

    def _look(self, kwargs: Mapping[str, Any]) -> Layout:
        traces = []
        for seed in (0, 1):
            with outside_vmap(), isolated(rng=stream(seed, "layout")), torch.no_grad():
                traces.append(self.trace(kwargs, {}, strict=False, lenient=True))
        check_same(*traces)
        check_observations(traces[0])
        layout = layout_of(
            traces[0],
            plate=self.minibatch_plate,
            named=self.dims,
            whole=self._index_key not in kwargs,
            data=kwargs,
            observed=tuple(self.observed),
            sum_out=self.enumerate_discrete,
        )
        self._check_stream(kwargs, traces[0], layout)
        return layout

    def _check_stream(self, kwargs: Mapping[str, Any], trace: Trace, layout: Layout) -> None:
        """Refuse programs that draw random numbers outside their sample statements."""
        if any(kwargs.get(name) is None for name in self.observed):
            return
        if shuffles(trace):
            return  # such a plate gets the index of a batch later
        values = {name: trace.nodes[name]["value"] for name in layout.sites}
        with outside_vmap(), isolated(rng=stream(0, "check")), torch.no_grad():
            before = stream_positions()
            self.trace(kwargs, values, lenient=True)
            moved = before != stream_positions()
        if moved:
            raise DataError(
                f"{name_of(self.program)} draws random numbers outside pyro.sample, so its log "
                "joint is not a function; make every draw a sample statement"
            )

    # ---------------------------------------------------------------------------------- sites

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return the latent sites; parameters of ``pyro.param`` are among them."""
        layout = self.layout(self._keywords(data))
        return {name: site for name, site in layout.sites.items() if name not in layout.summed}

    def initial_points(self, data: Any) -> Mapping[str, Tensor]:
        """Return the initial values of the ``pyro.param`` sites."""
        return self.layout(self._keywords(data)).starts

    def plate_size(self, data: Any) -> int:
        """Return the number of units of the minibatched plate."""
        return self.layout(self._keywords(data)).plates[str(self.minibatch_plate)]

    def minibatch(self, data: Any, index: Tensor) -> Batch:
        """Return the batch of the units ``index`` [unit]; the program does the indexing."""
        if index.ndim != 1 or len(index) == 0:
            raise ShapeError(f"minibatch: expected index [unit], got shape {tuple(index.shape)}")
        size = self.plate_size(data)
        return Batch({**data, self._index_key: index}, index, size / len(index))

    # -------------------------------------------------------------------------------- density

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the log density of one point: all sample sites and factors, masks respected.

        Args:
            values: Site name -> value.
            data: Keyword arguments; those of a batch carry its index.
            scale: Weight of everything inside the minibatched plate. The program's own weight of a
                subsampled plate is taken out, so that ``scale`` counts once.

        Raises:
            DataError: A site lacks its value or is unknown; at the first point also when a value
                or an observation lies outside the support of its distribution.
        """
        first = self._is_first(values, data)
        with isolated(validate=first):
            try:
                return self._log_joint(values, data, scale)
            except ValueError as error:
                if not first or isinstance(error, DataError | ShapeError):
                    raise
                raise DataError(f"{name_of(self.program)}: {_one_line(error)}") from error

    def _is_first(self, values: Values, data: Any) -> bool:
        """Whether this is the first concrete point for the data: it is validated."""
        if any(_is_mapped(value) for value in values.values()):
            return False
        checked = _MEMORY.setdefault(self, _Memory()).checked
        shared, _ = self.split_index(data)
        if checked.knows(shared):
            return False
        checked.put(shared, True)
        return True

    def _log_joint(self, values: Values, data: Any, scale: float) -> Tensor:
        nesting = self._plate_nesting(data)
        if nesting is None:
            trace = self.trace(data, values)
        else:
            with DetachedData():
                trace = self.trace(data, values, enumerate_from=-1 - nesting)
        unknown = [name for name in values if name not in trace.nodes]
        if unknown:
            raise DataError(
                f"{name_of(self.program)} has no site {', '.join(map(repr, unknown))}; "
                f"expected {', '.join(self.sites(data))}"
            )
        self._weigh(trace, scale)
        if nesting is not None:
            check_nested(trace)
            with DetachedData():
                total = log_marginal(trace)
        else:
            total = trace.log_prob_sum()
        if isinstance(total, Tensor):
            return total
        return torch.as_tensor(total, dtype=site_dtype(data))

    def _plate_nesting(self, data: Any) -> int | None:
        """Dims to leave to plates, where sites are summed out; None where there are none."""
        if self.enumerate_discrete is False or any(_is_mapped(x) for x in data.values()):
            return None
        layout = self.layout(data)
        if not layout.summed:
            return None
        return max((len(site.shape) for site in layout.sites.values()), default=0) + max(
            (len(shape) for shape in layout.shapes.values()), default=0
        )

    def _weigh(self, trace: Trace, scale: float) -> None:
        """Replace the weight that the minibatched plate gives to its sites by ``scale``."""
        for node in trace.nodes.values():
            if node["type"] != "sample":
                continue
            for frame in node["cond_indep_stack"]:
                if frame.name == self.minibatch_plate:
                    node["scale"] = node["scale"] * (scale * frame.size / frame.full_size)

    def pointwise_log_likelihood(self, values: Values, data: Any) -> dict[str, Tensor]:
        """Return {observed site: [*batch, *site batch]}; event dims are summed by the density."""
        lead, flat = self._flatten(values, data)

        def point(row: Values, mapped: bool) -> dict[str, Tensor]:
            trace = self.trace(data, row)
            self._weigh(trace, 1.0)
            trace.compute_log_prob(lambda _, node: is_observation(node))
            return {
                name: node["log_prob"]
                for name, node in trace.nodes.items()
                if node["type"] == "sample" and is_observation(node)
            }

        summed = self.layout(data).summed
        if summed:
            raise CapabilityError(
                f"the pointwise log likelihood needs values of {', '.join(map(repr, summed))}, "
                "which are summed out; use enumerate_discrete=False"
            )
        n = lead.numel()
        result = run_batched(point, flat, n, rng=None)
        return {name: value.reshape(*lead, *value.shape[1:]) for name, value in result.items()}

    def log_likelihood(self, values: Values, data: Any) -> Tensor:
        """Return the total log density [*batch] of the observed sites."""
        lead, _ = self._flatten(values, data)
        parts = self.pointwise_log_likelihood(values, data)
        sums = [part.reshape(*lead, -1).sum(-1) for part in parts.values()]
        return torch.stack(sums).sum(0) if sums else torch.zeros(lead)

    def _flatten(self, values: Values, data: Any) -> tuple[torch.Size, dict[str, Tensor]]:
        """Join the leading dims of values [*batch, *site] into one."""
        lead = torch.Size()
        sites = self.sites(data)
        for name, site in sites.items():
            lead = values[name].shape[: values[name].ndim - len(site.shape)]
        flat = {
            name: values[name].reshape(lead.numel(), *values[name].shape[len(lead) :])
            for name in sites
        }
        return lead, flat

    def sample_discrete(self, values: Values, data: Any, *, rng: Rng) -> dict[str, Tensor]:
        """Draw the sites that are summed out, given the others and the data.

        Exact draws of their joint conditional law (Pyro's ``infer_discrete``), one for each point,
        point after point.

        Args:
            values: Site name -> [*batch, *site], for example the draws of a posterior.
            data: Keyword arguments.
            rng: Stream of the draws.

        Returns:
            {site: [*batch, *site]} for every site that is summed out.

        Raises:
            CapabilityError: No site is summed out.
        """
        layout = self.layout(self._keywords(data))
        nesting = self._plate_nesting(data)
        if nesting is None:
            raise CapabilityError(
                f"{name_of(self.program)} has no site that is summed out; mark discrete ones by "
                'infer={"enumerate": "parallel"}, or say enumerate_discrete=True'
            )
        lead, flat = self._flatten(values, data)
        generator = stream(rng, "discrete")
        rows = []
        for i in range(lead.numel()):
            row = {name: value[i] for name, value in flat.items()}
            with isolated(rng=generator), torch.no_grad():
                trace = self.trace(data, row, enumerate_from=-1 - nesting)
                again = functools.partial(self.trace, data, row, enumerating=True)
                rows.append(draw_enumerated(trace, again, layout.summed))
        return {
            name: torch.stack([row[name] for row in rows]).reshape(*lead, *rows[0][name].shape)
            for name in layout.summed
        }

    # ----------------------------------------------------------------------------- simulation

    def sample_prior(self, n: int, *, rng: Rng, x: Any = None) -> dict[str, Tensor]:
        """Draw ``n`` values [n, *site] from the prior, at inputs ``x`` or ``inputs``.

        Raises:
            CapabilityError: Inputs are needed, a site has a flat prior, or it is not clear which
                sites are the observed ones.
        """
        kwargs = self.new_inputs(x)
        layout = self.layout(kwargs)
        if layout.points:
            raise CapabilityError(
                f"{name_of(self.program)} has no prior for pyro.param "
                f"{', '.join(map(repr, layout.points))}; make it a sample site to draw it"
            )
        if layout.flat:
            raise CapabilityError(
                f"{name_of(self.program)} has an improper prior (ImproperUniform) at "
                f"{', '.join(map(repr, layout.flat))}, which has no draws; give it a proper law"
            )
        hidden = self._observed_sites(x)
        dtype = site_dtype(kwargs)

        def point(row: Values, mapped: bool) -> dict[str, Tensor]:
            trace = self.trace(kwargs, row, strict=False, mapped=mapped)
            return {
                name: node["value"]
                for name, node in trace.nodes.items()
                if node["type"] == "sample" and is_latent(node) and name not in hidden
            }

        with torch.no_grad():
            drawn = run_batched(point, {}, n, rng=stream(rng, "prior"))
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in drawn.items()}

    def _observed_sites(self, x: Any) -> set[str]:
        """Names of the sites that are observations, though nothing is observed yet."""
        if isinstance(self.observed, Mapping):
            return set(self.observed.values())
        for source in (x, self.inputs):
            if source is not None and all(source.get(name) is not None for name in self.observed):
                return set(self.layout(self.prepare(source)).observed)
        kwargs = self.new_inputs(x)
        found = set(self.layout(kwargs).sites)
        if set(self.observed) <= found:
            return set(self.observed)
        pairs = ", ".join(f"{name!r}: <site>" for name in self.observed)
        raise CapabilityError(
            f"which of the sites {', '.join(sorted(found))} are observed? "
            f"Say FromPyro(..., observed={{{pairs}}}), or put an example into inputs"
        )

    def simulate(self, values: Values, x: Any, *, rng: Rng) -> dict[str, Tensor]:
        """Draw {observed site: [n, *obs]} at inputs ``x`` for values [n, *site]."""
        kwargs = self.new_inputs(x)
        sizes = {len(value) for value in values.values()} or {1}
        if len(sizes) != 1:
            raise ShapeError(f"simulate: expected values [n, *site] of one n, got {sorted(sizes)}")

        def point(row: Values, mapped: bool) -> dict[str, Tensor]:
            trace = self.trace(kwargs, row, strict=False, mapped=mapped)
            return {
                name: node["value"]
                for name, node in trace.nodes.items()
                if node["type"] == "sample" and is_latent(node) and name not in row
            }

        with torch.no_grad():
            return run_batched(point, values, sizes.pop(), rng=stream(rng, "simulate"))

    def sample_dataset(self, n: int, *, rng: Rng) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Draw ``n`` values and data sets: observed arguments are [n, *obs], others shared."""
        kwargs = self.new_inputs(None)
        values = self.sample_prior(n, rng=stream(rng, "values"))
        simulated = self.simulate(values, kwargs, rng=stream(rng, "data"))
        return values, {**kwargs, **self._as_entries(simulated)}

    def pick_dataset(self, data: Mapping[str, Any], index: int) -> dict[str, Any]:
        """Return data set ``index`` of what :meth:`sample_dataset` drew."""
        return {name: x[index] if name in self.observed else x for name, x in data.items()}

    def replace_observed(self, data: Any, values: Values, *, rng: Rng) -> dict[str, Any]:
        """Return ``data`` with its observed arguments drawn anew at values [1, *site]."""
        simulated = self._as_entries(self.simulate(values, data, rng=rng))
        return {**data, **{name: value[0] for name, value in simulated.items()}}

    def _as_entries(self, simulated: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Match simulated sites with the observed arguments."""
        if isinstance(self.observed, Mapping):
            pairs = dict(self.observed)
        elif len(self.observed) == 1 and len(simulated) == 1:
            pairs = {self.observed[0]: next(iter(simulated))}
        else:
            pairs = {name: name for name in self.observed}
        if not set(pairs.values()) <= set(simulated):
            raise CapabilityError(
                f"which observed argument is which site ({', '.join(simulated)})? "
                "Say FromPyro(..., observed={argument: site})"
            )
        return {entry: simulated[site] for entry, site in pairs.items()}

    # ----------------------------------------------------------------------------- prediction

    def predict(
        self,
        post: Any,
        x: Any,
        *,
        site: str | None = None,
        joint: bool = False,
        groups: Mapping[str, Sequence[Any]] | None = None,
        rng: Rng | None = None,
    ) -> Predictive:
        """Predict a new observation, a latent or a deterministic site at inputs ``x``.

        Latents have the values of the posterior's draws; they are matched with the plates at ``x``
        by the labels in ``groups``, or position by position where the plates have kept their size.
        Latents that the posterior does not have are drawn given the others.

        Args:
            post: The posterior.
            x: Keyword arguments; observed ones may be left out.
            site: Name of a site; None for the one observed site.
            joint: Make ``log_prob`` that of all entries together.
            groups: Plate name -> label of each of its units at ``x``. Units that the posterior's
                coords do not have are new: drawn given the global latents of each draw.
            rng: Needed where something is drawn: new units, and observations whose distribution
                has no closed form.

        Returns:
            A Mixture of the observation's distributions given each draw, where they can be
            combined; else draws (Empirical).
        """
        from probkit.pyro_adapter.prediction import predict

        return predict(self, post, x, site=site, joint=joint, groups=groups, rng=rng)


def _is_mapped(value: Any) -> bool:
    """Whether a tensor is inside a transformation of torch.func."""
    is_tensor = isinstance(value, Tensor)
    return is_tensor and bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def _check_finite(name: str, value: Any) -> None:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return
    bad = (~torch.isfinite(value)).nonzero()
    if len(bad):
        place = ", ".join(str(int(i)) for i in bad[0])
        raise DataError(
            f"data[{name!r}]: expected finite numbers, entry [{place}] is "
            f"{float(value[tuple(bad[0])])} ({len(bad)} such); remove or mask it, or pass "
            "FromPyro(..., allow_missing=True)"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]

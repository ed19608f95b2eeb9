"""Pyro guides as probkit guides: functions of their parameters, without a parameter store."""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.poutine import Trace
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to

from probkit.density import site_dtype
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.guide import Guide, LogQ
from probkit.loader import Sized
from probkit.model import Batch, Site
from probkit.pyro_adapter.flat import Flat
from probkit.pyro_adapter.handlers import FixParams, Indices, Substitute, is_latent
from probkit.pyro_adapter.model import FromPyro
from probkit.pyro_adapter.modules import (
    Slot,
    slots_near,
    slots_of,
    slots_of_statements,
    swapped,
)
from probkit.pyro_adapter.runtime import (
    DataCache,
    isolated,
    name_of,
    parameters_of,
    run_batched,
)
from probkit.rng import Rng, stream

__all__ = ["PyroGuide", "as_guide"]

Params = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class PyroGuide:
    """A Pyro guide as a probkit guide.

    Its parameters are a tree of unconstrained tensors: ``module`` (of AutoGuides and modules),
    ``param`` (of ``pyro.param`` statements) and ``point`` (the model's own ``pyro.param`` sites,
    which a Pyro guide leaves to point estimation). They have the dtype of the data.

    Draws are independent and made in one vectorised run where the guide allows it. An AutoGuide is
    set up on a copy; the user's own one stays as it is.

    Args:
        guide: One of

            * an AutoGuide class, or an AutoGuide made for the program of the model;
            * a function or module with the keyword arguments of the model's program (or some of
              them); for a native model it is called with the data alone;
            * with ``factory=True``, a function program -> guide.
        factory: Whether ``guide`` makes the guide.
        options: Options of the AutoGuide class, for example ``{"init_scale": 0.05}``.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> guide = PyroGuide(AutoNormal, options={"init_scale": 0.05})
    """

    guide: Any
    factory: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.guide):
            raise DataError(f"PyroGuide: expected a Pyro guide (a callable), got {self.guide!r}")
        makes = self.factory or _is_autoguide_class(self.guide)
        if self.options and not makes:
            raise DataError(
                "PyroGuide: options belong to an AutoGuide class; "
                f"{name_of(self.guide)} is a guide already"
            )

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Return the starting parameters."""
        batch = Batch(data)
        dtype = site_dtype(data)
        runner = _build(self, model, batch, stream(rng, "guide"))
        params: Params = {
            "module": {name: slot.read() for name, slot in runner.slots.items()},
            "param": {
                name: transform_to(constraint).inv(value)
                for name, (value, constraint) in runner.statements.items()
            },
            "point": {
                name: biject_to(model.sites(data)[name].support).inv(value)
                for name, value in runner.points.items()
            },
        }
        return {
            kind: {name: value.detach().to(dtype).clone() for name, value in group.items()}
            for kind, group in params.items()
            if group
        }

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[dict[str, Tensor], LogQ]:
        """Draw ``n`` values and their log density, differentiable in ``params``.

        Raises:
            CapabilityError: The guide cannot be differentiated through a draw, or cannot be
                subsampled.
            DataError: The guide's sites are not those of the model.
        """
        model = _unwrap(model)
        runner = _runner(self, model, batch)
        sites = model.sites(batch.data)
        runner.check_batch(batch, sites)
        needs_grad = torch.is_grad_enabled() and any(
            t.requires_grad for group in params.values() for t in group.values()
        )

        def point(row: Mapping[str, Tensor], mapped: bool) -> dict[str, Tensor]:
            trace = runner.trace(params, batch, mapped=mapped)
            _check_trace(trace, sites, runner, needs_grad)
            values = runner.values(trace, params, sites)
            return {**values, **_log_q(trace, sites, _plate_of(model, sites), values)}

        # Parameters of pyro.module ask for gradients that nobody may want.
        idle = torch.no_grad() if runner.registered and not needs_grad else nullcontext()
        with idle:
            drawn = run_batched(point, {}, n, rng=stream(rng, "guide"))
        log_q = LogQ(drawn.pop(_GLOBAL), drawn.pop(_LOCAL))
        return {name: drawn[name] for name in sites}, log_q


_GLOBAL, _LOCAL = "log q:global", "log q:local"


def as_guide(guide: Any) -> Any:
    """Return ``guide`` as a probkit guide: Pyro guides are wrapped, others pass unchanged.

    Args:
        guide: A probkit guide, a Pyro guide function or module, an AutoGuide or its class, or None.

    Raises:
        CapabilityError: None of these.

    Example:
        >>> from pyro.infer.autoguide import AutoNormal
        >>> type(as_guide(AutoNormal)).__name__
        'PyroGuide'
    """
    if isinstance(guide, type) and not _is_autoguide_class(guide):
        raise CapabilityError(f"expected a guide, got the class {guide.__name__}; make an instance")
    if guide is None or isinstance(guide, Guide):
        return guide
    if callable(guide):
        return PyroGuide(guide)
    raise CapabilityError(
        f"expected a guide (init and sample), a Pyro guide function or an AutoGuide, got {guide!r}"
    )


def _is_autoguide_class(guide: Any) -> bool:
    base = guide.func if isinstance(guide, functools.partial) else guide
    return isinstance(base, type) and issubclass(base, AutoGuide)


# ------------------------------------------------------------------------------------ programs


def _plate_of(model: Any, sites: Mapping[str, Site]) -> str | None:
    """Name of the minibatched plate."""
    if isinstance(model, FromPyro):
        return model.minibatch_plate
    return next((site.plate for site in sites.values() if site.plate is not None), None)


def _unwrap(model: Any) -> Any:
    """Return the model itself, where a loader lends it the number of its units."""
    return model._model if isinstance(model, Sized) else model


def _sees_program(model: Any, batch: Batch) -> bool:
    """Whether the program of a Pyro model can be run on the whole data.

    Not so where a loader brings only the rows of a batch.
    """
    if not isinstance(model, FromPyro):
        return False
    return batch.index is None or model.split_index(batch.data)[1] is not None


def _pyro_program(model: FromPyro) -> Callable[..., Any]:
    """The program with its parameters fixed at their initial values, for AutoGuides to look at."""

    def program(**kwargs: Any) -> Any:
        with Indices(model.minibatch_plate, None), FixParams(lambda name, constraint: None):
            return model.program(**kwargs)

    return program


def _native_program(sites: Mapping[str, Site], dtype: torch.dtype) -> Callable[..., Any]:
    """A program with the sites of a native model, for AutoGuides to look at."""

    def program(*args: Any, **kwargs: Any) -> None:
        for name, site in sites.items():
            if site.plate is None:
                law = Flat(_event(site.support, len(site.shape)), (), site.shape, dtype=dtype)
                pyro.sample(name, law)
            else:
                rest = site.shape[1:]
                law = Flat(_event(site.support, len(rest)), (), rest, dtype=dtype)
                with pyro.plate(site.plate, site.shape[0], dim=-1):
                    pyro.sample(name, law)

    return program


def _event(support: Any, dims: int) -> Any:
    extra = dims - support.event_dim
    return constraints.independent(support, extra) if extra > 0 else support


def _whole(sites: Mapping[str, Site], batch: Batch) -> dict[str, Site]:
    """The sites as they are for the whole data, told from those of a batch."""
    if batch.index is None:
        return dict(sites)
    units = round(batch.scale * len(batch.index))
    return {
        name: site
        if site.plate is None
        else Site((units, *site.shape[1:]), site.support, site.dims, site.plate, site.discrete)
        for name, site in sites.items()
    }


# -------------------------------------------------------------------------------------- runner


@dataclass
class _Runner:
    """A guide that is set up for one model and data, run with parameters from outside.

    Attributes:
        call: The guide.
        plate: Name of the minibatched plate.
        slots: Parameter name -> its place in a module.
        statements: Name of a ``pyro.param`` statement -> initial value and constraint.
        points: Parameters of the model that the guide does not sample -> initial values.
        registered: Those of the slots that ``pyro.module`` statements name.
    """

    call: Callable[..., Any]
    model: Any
    plate: str | None
    slots: dict[str, Slot] = field(default_factory=dict)
    statements: dict[str, tuple[Tensor, Any]] = field(default_factory=dict)
    points: dict[str, Tensor] = field(default_factory=dict)
    registered: dict[str, Slot] = field(default_factory=dict)

    def arguments(self, data: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what to call the guide with."""
        if not isinstance(self.model, FromPyro):
            return (data,), {}
        kwargs = self.model.split_index(data)[0]
        if isinstance(self.call, AutoGuide):
            return (), kwargs
        names, anything = parameters_of(self.call)
        return (), kwargs if anything else {k: v for k, v in kwargs.items() if k in names}

    def index_of(self, batch: Batch) -> Tensor | None:
        """Return what the plate of a guide function has to yield: it indexes whole data only."""
        return self.model.split_index(batch.data)[1] if isinstance(self.model, FromPyro) else None

    def trace(self, params: Params | None, batch: Batch, *, mapped: bool = False) -> Trace:
        """Run the guide; call inside ``isolated``. No parameters: at its initial ones."""
        given = params or {}
        store = given.get("param", {})

        def value(name: str, constraint: Any) -> Tensor | None:
            if name in store:
                return transform_to(constraint)(store[name])
            if params is not None:
                raise DataError(f"the guide's parameters lack {name!r}; initialise it anew")
            return None

        fix = FixParams(value)
        args, kwargs = self.arguments(batch.data)
        index = batch.index if isinstance(self.call, AutoGuide) else self.index_of(batch)
        module = {
            name: _trainable(value) if name in self.registered else value
            for name, value in given.get("module", {}).items()
        }
        with (
            swapped(self.slots, module),
            TraceMessenger() as tracer,
            Substitute({}, strict=False, mapped=mapped),
            Indices(self.plate, index),
            fix,
        ):
            self.call(*args, **kwargs)
        self.statements.update(fix.seen)
        trace: Trace = tracer.trace
        return trace

    def set_up(self, guide: AutoGuide, batch: Batch) -> None:
        """Let an AutoGuide look at its program; call inside ``isolated``."""
        args, kwargs = self.arguments(batch.data)
        fix = FixParams(lambda name, constraint: None)
        with torch.no_grad(), Substitute({}, strict=False), Indices(self.plate, batch.index), fix:
            guide._setup_prototype(*args, **kwargs)

    def values(self, trace: Trace, params: Params, sites: Mapping[str, Site]) -> dict[str, Tensor]:
        """Return the values of the model's sites, points included."""
        values = {}
        for name, site in sites.items():
            if name in self.points:
                value = biject_to(site.support)(params["point"][name])
            else:
                value = trace.nodes[name]["value"]
            if tuple(value.shape) != site.shape:
                raise ShapeError(
                    f"guide site {name!r}: expected shape {site.shape} "
                    f"[{', '.join(site.dims)}], got {tuple(value.shape)}"
                )
            values[name] = value
        return values

    def check_batch(self, batch: Batch, sites: Mapping[str, Site]) -> None:
        """Refuse joint AutoGuides of local sites on part of the data."""
        local = [name for name, site in sites.items() if site.plate is not None]
        if batch.index is not None and local and isinstance(self.call, AutoContinuous):
            raise CapabilityError(
                f"{type(self.call).__name__} has one joint density of all sites and cannot be "
                f"subsampled; local sites: {', '.join(local)}. Use AutoNormal, or the whole data"
            )


@dataclass
class _Memory:
    """Runners of one guide; no part of its value."""

    by_model: weakref.WeakKeyDictionary[Any, DataCache[_Runner]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    by_sites: dict[Any, _Runner] = field(default_factory=dict)


_MEMORY: weakref.WeakKeyDictionary[PyroGuide, _Memory] = weakref.WeakKeyDictionary()


def _runner(guide: PyroGuide, model: Any, batch: Batch) -> _Runner:
    """Return the runner for this model and data.

    It is set up from a fixed stream: what a guide draws for its structure (the permutation of an
    autoregressive network) is the same in every process; parameters come from outside.
    """
    memory = _MEMORY.setdefault(guide, _Memory())

    def make() -> _Runner:
        return _build(guide, model, batch, stream(0, "guide structure"))

    base = _unwrap(model)
    makes = guide.factory or _is_autoguide_class(guide.guide)
    automatic = makes or isinstance(guide.guide, AutoGuide)
    if isinstance(base, FromPyro) and (_sees_program(model, batch) or not automatic):
        cache = memory.by_model.setdefault(base, DataCache())
        return cache.get(base.split_index(batch.data)[0], make)
    sites = _whole(model.sites(batch.data), batch)
    key = (
        id(base) if isinstance(base, FromPyro) else type(base),
        site_dtype(batch.data),
        tuple((n, s.shape, s.plate, repr(s.support)) for n, s in sites.items()),
    )
    if key not in memory.by_sites:
        memory.by_sites[key] = make()
    return memory.by_sites[key]


def _build(guide: PyroGuide, model: Any, batch: Batch, rng: torch.Generator) -> _Runner:
    """Set a guide up: make it, let it see the model, find its parameters."""
    base = _unwrap(model)
    sites = _whole(model.sites(batch.data), batch)
    if _sees_program(model, batch):
        program = _pyro_program(base)
    else:
        program = _native_program(sites, site_dtype(batch.data))
    starts = base.initial_points(batch.data) if isinstance(base, FromPyro) else {}
    with isolated(rng=rng):
        call = _make(guide, program)
        automatic = isinstance(call, AutoGuide)
        runner = _Runner(call, base, _plate_of(base, sites))
        # AutoGuides look at all units; functions run on what there is.
        seen = Batch(batch.data) if automatic else batch
        dtype = site_dtype(batch.data)
        near = slots_near(call)
        cast = {name: _trainable(slot.read().detach().to(dtype)) for name, slot in near.items()}
        if isinstance(call, AutoGuide) and call.prototype_trace is None:
            # Layers that it makes (AutoStructured) have torch's default dtype: cast before it runs.
            runner.set_up(call, seen)
            call.to(dtype)
        with torch.no_grad(), swapped(near, cast):
            first = runner.trace(None, seen)
        modules = {name: v for name, (v, c) in runner.statements.items() if c is None}
        runner.statements = {n: s for n, s in runner.statements.items() if n not in modules}
        runner.registered = slots_of_statements(call, near, cast, modules)
        if isinstance(call, AutoGuide):
            call.to(dtype)
            _let_subsample(call, runner.plate)
        own = slots_of(call) if isinstance(call, torch.nn.Module) else {}
        runner.slots.update({**own, **runner.registered})
    runner.points = {name: start for name, start in starts.items() if name not in first.nodes}
    return runner


def _trainable(value: Tensor) -> Tensor:
    """A parameter that asks for a gradient: ``pyro.module`` passes over all others."""
    return value if value.requires_grad else value.detach().requires_grad_()


def _make(guide: PyroGuide, program: Callable[..., Any]) -> Callable[..., Any]:
    made = guide.guide
    if guide.factory or _is_autoguide_class(made):
        made = made(program, **guide.options)
        if not callable(made):
            raise DataError(
                f"PyroGuide: the factory {name_of(guide.guide)} returned {type(made).__name__}, "
                "expected a guide"
            )
        return made
    return _copied(made, program) if isinstance(made, AutoGuide) else made


def _copied(guide: AutoGuide, program: Callable[..., Any]) -> AutoGuide:
    """Copy an AutoGuide, so that the user's own one is not set up by us."""
    bound, master = guide._model, guide.master
    try:
        twin = copy.deepcopy(guide)
    finally:
        # Copying unbinds the original.
        guide._model, guide.master = bound, master
    if bound is None:
        raise CapabilityError(
            f"this {type(guide).__name__} is bound to no program; pass its class instead"
        )
    twin._model = bound
    return twin


def _let_subsample(guide: AutoGuide, plate: str | None) -> None:
    """Let an AutoGuide's plate take batches of any size."""
    frame = guide._prototype_frames.get(plate)
    if frame is None or guide.create_plates is not None:
        return
    size, dim = frame.full_size or frame.size, frame.dim
    guide.create_plates = lambda *args, **kwargs: pyro.plate(plate, size, dim=dim)


# ------------------------------------------------------------------------------------- density


def _check_trace(
    trace: Trace, sites: Mapping[str, Site], runner: _Runner, needs_grad: bool
) -> None:
    name = name_of(runner.call)
    drawn = {n: node for n, node in trace.nodes.items() if node["type"] == "sample"}
    missing = [n for n in sites if n not in drawn and n not in runner.points]
    if missing:
        raise DataError(
            f"guide {name} does not sample {', '.join(map(repr, missing))}, which the model has"
        )
    for site, node in drawn.items():
        if not is_latent(node):
            continue
        if site not in sites and not (node["infer"] or {}).get("is_auxiliary"):
            raise DataError(
                f"guide {name} samples {site!r}, which the model lacks; rename it, or mark it "
                'infer={"is_auxiliary": True}'
            )
        if needs_grad and not node["fn"].has_rsample:
            raise CapabilityError(
                f"guide site {site!r}: {type(node['fn']).__name__} has no reparameterised draw, "
                "so its gradient is unknown; use another family, or sum the site out"
            )


def _log_q(
    trace: Trace, sites: Mapping[str, Site], plate: str | None, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The log density of one draw, sites of the minibatched plate apart and unweighted."""
    like = next((v for v in values.values() if v.is_floating_point()), torch.zeros(()))
    total = {_GLOBAL: like.new_zeros(()), _LOCAL: like.new_zeros(())}
    for node in trace.nodes.values():
        if node["type"] != "sample":
            continue
        kind = _GLOBAL
        for frame in node["cond_indep_stack"]:
            if frame.name == plate:
                kind = _LOCAL
                node["scale"] = node["scale"] * (frame.size / frame.full_size)
    trace.compute_log_prob()
    for node in trace.nodes.values():
        if node["type"] == "sample":
            local = any(frame.name == plate for frame in node["cond_indep_stack"])
            kind = _LOCAL if local else _GLOBAL
            total[kind] = total[kind] + node["log_prob_sum"]
    return total

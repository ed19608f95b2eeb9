"""What one look at a Pyro program's trace tells: sites, plates, observations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.poutine import Trace
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions.constraints import Constraint

from probkit.errors import CapabilityError, DataError
from probkit.model import Site
from probkit.pyro_adapter.handlers import (
    is_annotated,
    is_flat,
    is_free,
    is_latent,
    is_observation,
)

__all__ = [
    "Layout",
    "batch_layout",
    "check_nested",
    "check_observations",
    "check_same",
    "has_row_bounds",
    "layout_of",
    "shuffles",
]


@dataclass(frozen=True)
class Layout:
    """The structure of a program, given its data.

    Attributes:
        sites: Latent sites, in the order of the program, parameters included.
        points: Names of those sites that are ``pyro.param`` statements.
        starts: Initial values of the points.
        flat: Names of the other sites with an improper uniform law.
        summed: Names of the discrete sites to sum out.
        observed: Observed sample sites -> their dim names (batch and event).
        shapes: Shapes of the observed values.
        deterministic: Names of deterministic sites.
        plates: Plate name -> number of units.
        entries: Observed keyword argument -> the site that it is the value of.
        order: Names of all sites in the order of the program.
    """

    sites: Mapping[str, Site]
    points: tuple[str, ...]
    starts: Mapping[str, Tensor]
    flat: tuple[str, ...]
    summed: tuple[str, ...]
    observed: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    deterministic: tuple[str, ...]
    plates: Mapping[str, int]
    entries: Mapping[str, str]
    order: tuple[str, ...]


def layout_of(
    trace: Trace,
    *,
    plate: str | None,
    named: Mapping[str, Sequence[str]],
    whole: bool,
    data: Mapping[str, Any],
    observed: Sequence[str],
    sum_out: bool | None,
) -> Layout:
    """Read the layout off a trace.

    Args:
        trace: Trace of the program, its parameters lifted to sites.
        plate: Name of the minibatched plate.
        named: Site name -> names of its dims that are not plates.
        whole: Whether local sites get the size of the whole plate (else that of the batch).
        data: The keyword arguments of the traced call.
        observed: Names of the observed ones.
        sum_out: Whether discrete sites are summed out; None for those that ask for enumeration.
    """
    plates = {
        name: int(node["fn"].size)
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and isinstance(node["fn"], _Subsample)
    }
    if plate is not None and plate not in plates:
        known = ", ".join(plates) or "none"
        raise DataError(
            f"minibatch_plate={plate!r}: expected a plate of the program, it has {known}"
        )
    sites, points, starts, flat, seen, shapes, deterministic = {}, [], {}, [], {}, {}, []
    summed = []
    for name, node in trace.nodes.items():
        if node["type"] != "sample":
            continue
        if is_latent(node):
            sites[name] = _site(name, node, plate, named, plates if whole else {})
            if "_param" in (node["infer"] or {}):
                points.append(name)
                starts[name] = node["value"].detach()
            elif is_flat(node):
                flat.append(name)
            if sites[name].discrete and (sum_out or (sum_out is None and is_annotated(node))):
                _check_enumerable(name, node)
                summed.append(name)
        elif is_observation(node):
            seen[name] = _dims(name, node, named)
            shapes[name] = tuple(node["value"].shape)
        elif (node["infer"] or {}).get("_deterministic"):
            deterministic.append(name)
    return Layout(
        sites=sites,
        points=tuple(points),
        starts=starts,
        flat=tuple(flat),
        summed=tuple(summed),
        observed=seen,
        shapes=shapes,
        deterministic=tuple(deterministic),
        plates=plates,
        entries=_entries(trace, seen, data, observed),
        order=tuple(name for name, node in trace.nodes.items() if node["type"] == "sample"),
    )


def batch_layout(whole: Layout, size: int) -> Layout:
    """Return the layout for a batch of ``size`` units."""
    sites = {
        name: site if site.plate is None else replace(site, shape=(size, *site.shape[1:]))
        for name, site in whole.sites.items()
    }
    return replace(whole, sites=sites)


def has_row_bounds(support: Constraint) -> bool:
    """Whether a support has bounds that differ from entry to entry."""
    bounds = [getattr(support, name, 0.0) for name in ("lower_bound", "upper_bound")]
    if any(torch.as_tensor(bound).unique().numel() > 1 for bound in bounds):
        return True
    inner = getattr(support, "base_constraint", None)
    return inner is not None and has_row_bounds(inner)


def _dims(name: str, node: Any, named: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Name the dims of a site: plates by their names, the rest ``<site>_dim_<position>``."""
    value, event = node["value"], node["fn"].event_dim
    batch = value.ndim - event
    frames = {f.dim: f.name for f in node["cond_indep_stack"] if f.vectorized}
    dims: list[str | None] = [frames.get(i - batch) for i in range(batch)] + [None] * event
    free = [i for i, dim in enumerate(dims) if dim is None]
    own = named.get(name)
    if own is not None and len(own) != len(free):
        raise DataError(
            f"dims={{{name!r}: {tuple(own)}}}: expected {len(free)} names for the dims of site "
            f"{name!r} that are not plates (its shape is {tuple(value.shape)})"
        )
    names = own if own is not None else [f"{name}_dim_{i}" for i in free]
    for i, dim in zip(free, names, strict=True):
        dims[i] = dim
    return tuple(str(dim) for dim in dims)


def _site(
    name: str,
    node: Any,
    plate: str | None,
    named: Mapping[str, Sequence[str]],
    full: Mapping[str, int],
) -> Site:
    dims = _dims(name, node, named)
    shape = list(node["value"].shape)
    local = plate is not None and any(f.name == plate for f in node["cond_indep_stack"])
    if local and dims[0] != plate:
        raise DataError(
            f"site {name!r} [{', '.join(dims)}]: expected the minibatch plate {plate!r} as its "
            f"leading dim; give that plate the leftmost dim, for example dim=-{len(dims)}"
        )
    if local:
        shape[0] = full.get(str(plate), shape[0])
    support = _support(name, node["fn"])
    return Site(
        shape=tuple(shape),
        support=support,
        dims=dims,
        plate=plate if local else None,
        discrete=bool(support.is_discrete),
    )


def _support(name: str, law: Any) -> Constraint:
    try:
        support: Constraint = law.support
    except (NotImplementedError, AttributeError):
        raise CapabilityError(
            f"site {name!r}: {type(law).__name__} does not say its support; "
            "give the distribution a support property"
        ) from None
    return support


def _check_enumerable(name: str, node: Any) -> None:
    law = node["fn"]
    if not law.has_enumerate_support:
        kind = type(getattr(law, "base_dist", law)).__name__
        raise CapabilityError(
            f"site {name!r}: {kind} has no finite support to sum over; bound it (a Categorical), "
            "sum it out in the program, or keep it as a site with enumerate_discrete=False"
        )


def _entries(
    trace: Trace, seen: Mapping[str, Any], data: Mapping[str, Any], observed: Sequence[str]
) -> dict[str, str]:
    """Match each observed keyword argument with the site that has it as its value."""
    entries = {}
    for entry in observed:
        value = data.get(entry)
        if not isinstance(value, Tensor):
            continue
        same = [s for s in seen if trace.nodes[s]["value"] is value]
        same = same or [s for s in seen if _equal(trace.nodes[s]["value"], value)]
        if len(same) == 1:
            entries[entry] = same[0]
    return entries


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.to(b.dtype), b))


def check_observations(trace: Trace) -> None:
    """Refuse observations that would be counted several times by broadcasting.

    Raises:
        DataError: Names the site and its shapes.
    """
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not is_observation(node):
            continue
        value, law = node["value"], node["fn"]
        if not isinstance(value, Tensor) or value.numel() <= 1:
            continue
        try:
            shape = torch.broadcast_shapes(value.shape, law.shape())
        except RuntimeError:
            shape = None
        if shape is None or shape.numel() > value.numel():
            raise DataError(
                f"observed site {name!r}: expected a value of shape {tuple(law.shape())}, as its "
                f"distribution has, got {tuple(value.shape)}; make the shapes equal"
            )


def check_nested(trace: Trace) -> None:
    """Refuse to enumerate in plates that cross: sums inside them do not factorise.

    Raises:
        CapabilityError: Names two plates that cross.
    """
    stacks = {
        frozenset(frame.name for frame in node["cond_indep_stack"])
        for node in trace.nodes.values()
        if node["type"] == "sample"
    }
    for stack in stacks:
        inside = sorted((other for other in stacks if other < stack), key=len)
        for small, large in itertools.pairwise(inside):
            if not small < large:
                names = ", ".join(sorted(small ^ large, reverse=True))
                raise CapabilityError(
                    f"enumerate_discrete needs nested plates, these cross: {names}; sample the "
                    "discrete sites, or sum them out in the program"
                )


def shuffles(trace: Trace) -> bool:
    """Whether a plate draws a random part of its units."""
    laws = [node["fn"] for node in trace.nodes.values() if node["type"] == "sample"]
    return any(
        isinstance(law, _Subsample) and (law.subsample_size or law.size) < law.size for law in laws
    )


def check_same(first: Trace, second: Trace) -> None:
    """Refuse programs whose structure depends on what they draw.

    Raises:
        DataError: Sites, shapes or supports differ between two runs.
    """
    a = {n: node for n, node in first.nodes.items() if node["type"] == "sample" and is_free(node)}
    b = {n: node for n, node in second.nodes.items() if node["type"] == "sample" and is_free(node)}
    if a.keys() != b.keys():
        raise DataError(
            "the Pyro program has other sites from run to run "
            f"({', '.join(sorted(a.keys() ^ b.keys()))}); probkit needs one fixed structure"
        )
    for name, node in a.items():
        other = b[name]
        if node["value"].shape != other["value"].shape:
            raise DataError(
                f"site {name!r} has shape {tuple(node['value'].shape)} in one run and "
                f"{tuple(other['value'].shape)} in another; probkit needs one fixed structure"
            )
        if is_latent(node) and not _same_bounds(
            _support(name, node["fn"]), _support(name, other["fn"])
        ):
            raise DataError(
                f"the support of site {name!r} depends on other sites; sample it on a fixed "
                "support (the unit interval, say) and transform it"
            )


def _same_bounds(a: Constraint, b: Constraint) -> bool:
    for attribute in ("lower_bound", "upper_bound"):
        x, y = getattr(a, attribute, None), getattr(b, attribute, None)
        if x is None or y is None:
            continue
        if not torch.equal(torch.as_tensor(x), torch.as_tensor(y)):
            return False
    inner, other = getattr(a, "base_constraint", None), getattr(b, "base_constraint", None)
    return inner is None or other is None or _same_bounds(inner, other)

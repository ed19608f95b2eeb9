"""Export of posteriors for ArviZ, through xarray.

Both ArviZ generations read xarray: 0.x wraps one Dataset per group in an ``InferenceData``, 1.x
works on a ``DataTree`` directly. The groups are therefore built once, here, with one set of rules
for dims and coords, and only the wrapping depends on the version.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError
from probkit.model import Values
from probkit.numerics import ess_from_log_weights
from probkit.rng import Rng, require_rng, scope, stream
from probkit.sources import Closed, Draws, Fitted, Population

if TYPE_CHECKING:
    import xarray as xr

    from probkit.posterior import Posterior

__all__ = ["DataLeaf", "data_leaves", "export_groups", "to_arviz", "to_datatree", "wrap_groups"]


def to_arviz(post: Posterior, *, draws: int = 1000, rng: Rng | None = None) -> Any:
    """Export a posterior for ArviZ.

    Stored draws are exported as they are. Closed forms and fitted guides are sampled, and weighted
    draws are resampled (ArviZ knows no weights); both need ``rng``. A closed form that is mixed
    over draws of hyper-parameters keeps these, with one draw of its sites for each. Complex sites
    become two variables, ``name_real`` and ``name_imag``. Particles that are other objects are
    exported by what the model's ``describe(particles)`` says of them: its numbers as draws, its
    texts and the ``log_weights`` of all particles among the ``sample_stats``.

    Args:
        post: The posterior.
        draws: Draws per chain to take where the posterior stores none or weighted ones.
        rng: Seed or generator, needed in that case.

    Returns:
        ``arviz.InferenceData`` under ArviZ 0.x, ``xarray.DataTree`` under 1.x, with the groups
        posterior, sample_stats, log_likelihood, observed_data and constant_data where they exist.

    Raises:
        DataError: ``rng`` is missing, or ``draws`` is below 1.
        CapabilityError: The particles are no tensors, and the model does not describe them.

    Example:
        >>> from probkit.posterior import Posterior
        >>> from probkit.sources import Draws
        >>> post = Posterior(Draws({"mu": torch.zeros(2, 10)}), model=None)
        >>> dict(to_datatree(post).posterior.sizes)
        {'chain': 2, 'draw': 10}
    """
    import arviz

    return wrap_groups(export_groups(post, draws=draws, rng=rng), str(arviz.__version__))


def to_datatree(post: Posterior, *, draws: int = 1000, rng: Rng | None = None) -> xr.DataTree:
    """Export a posterior as an ``xarray.DataTree``, without ArviZ; see :func:`to_arviz`."""
    return _tree(export_groups(post, draws=draws, rng=rng))


def wrap_groups(groups: Mapping[str, xr.Dataset], version: str) -> Any:
    """Wrap groups as the ArviZ release ``version`` expects them."""
    if int(version.split(".")[0]) >= 1:
        return _tree(groups)
    import arviz

    return arviz.InferenceData(attrs=dict(groups["posterior"].attrs), **groups)


def _tree(groups: Mapping[str, xr.Dataset]) -> xr.DataTree:
    import xarray as xr

    root = xr.Dataset(attrs=groups["posterior"].attrs)
    return xr.DataTree.from_dict({"/": root, **groups})


# --------------------------------------------------------------------------- groups


def export_groups(
    post: Posterior, *, draws: int = 1000, rng: Rng | None = None
) -> dict[str, xr.Dataset]:
    """Build the groups of the ArviZ schema, {group: Dataset}; empty ones are left out."""
    if draws < 1:
        raise DataError(f"export: expected draws >= 1, got {draws}")
    if isinstance(post.source, Population) and not post.draws:
        post = _described(post)
    taken = _take(post, draws, rng)
    coords = post.context.coords
    leaves = data_leaves(post)
    attrs = {**_attrs(post), **taken.attrs}
    chain_draw = ("chain", "draw")
    sites = {
        name: _Variable(value, chain_draw, post.context.dims.get(name))
        for name, value in taken.values.items()
    }
    named = {n: post.context.dims[n] for n in taken.stats if n in post.context.dims}
    stats = {
        name: _Variable(value, ("chain",), named[name])
        if name in named
        else _Variable(value, _shared_dims(value, taken.shape))
        for name, value in taken.stats.items()
    }
    pointwise = {
        name: _Variable(value, chain_draw, _observation_dims(leaves, name, value))
        for name, value in taken.log_likelihood.items()
    }
    observed = {n: _Variable(x.value, (), x.dims) for n, x in leaves.items() if x.observed}
    constant = {n: _Variable(x.value, (), x.dims) for n, x in leaves.items() if not x.observed}
    groups = {
        "posterior": sites,
        "sample_stats": stats,
        "log_likelihood": pointwise,
        "observed_data": observed,
        "constant_data": constant,
    }
    return {
        group: _dataset(variables, coords, attrs)
        for group, variables in groups.items()
        if variables or group == "posterior"
    }


@dataclass(frozen=True)
class _Taken:
    """What is exported: values and everything else that goes along [chain, draw]."""

    values: Values
    stats: Mapping[str, Tensor]
    log_likelihood: Mapping[str, Tensor]
    attrs: Mapping[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        for value in self.values.values():
            return tuple(value.shape[:2])
        return ()


def _take(post: Posterior, draws: int, rng: Rng | None) -> _Taken:
    source = post.source
    if isinstance(source, Closed | Fitted) or not post.draws:
        return _sampled(post, draws, rng)
    if post.log_weights is not None:
        return _resampled(post, post.log_weights, draws, rng)
    return _Taken(post.draws, post.sample_stats, post.log_likelihood, {})


def _described(post: Posterior) -> Posterior:
    """Replace particles that are no tensors by the numbers that describe them."""
    describe = getattr(post.model, "describe", None)
    population = post.particles
    if population is None or not callable(describe):
        raise CapabilityError(
            "ArviZ holds arrays, and these particles are other objects: expected tensors; use "
            "post.particles.particles and post.log_weights, post.particles.best() or post.sample(n)"
        )
    chains = [describe(chain) for chain in population.particles]
    names = {name: isinstance(column[0], str) for name, column in chains[0].items()}
    numbers = {
        name: torch.stack([as_tensor(chain[name]) for chain in chains])
        for name, is_text in names.items()
        if not is_text
    }
    texts = {
        name: np.array([chain[name] for chain in chains], dtype=str)
        for name, is_text in names.items()
        if is_text
    }
    weights = population.log_weights
    extra: dict[str, Any] = {"log_weights": weights, **texts}
    dims = {**post.context.dims, **dict.fromkeys(extra, ("particle",))}
    equal = bool((weights == weights[:, :1]).all())
    return replace(
        post,
        source=Draws(numbers, None if equal else weights),
        sample_stats={**post.sample_stats, **extra},
        context=replace(post.context, dims=dims),
    )


def _sampled(post: Posterior, draws: int, rng: Rng | None) -> _Taken:
    """Draw from a closed form or a fitted guide, one chain for each independent fit."""
    root = stream(require_rng(rng, "exporting a posterior without stored draws"), "export")
    if isinstance(post.source, Closed) and post.source.is_mixture and post.log_weights is None:
        return _one_for_each(post, post.source, root)
    source, data = post.source, post.context.data
    parts = [source]
    if isinstance(source, Fitted):
        parts = [Fitted(source.guide, [params]) for params in source.params]
    chains = [
        part.sample(draws, model=post.model, data=data, rng=stream(root, k))
        for k, part in enumerate(parts)
    ]
    values = {name: torch.stack([chain[name] for chain in chains]) for name in chains[0]}
    pointwise = getattr(post.model, "pointwise_log_likelihood", None)
    log_likelihood: Mapping[str, Tensor] = {}
    if callable(pointwise) and values:
        with torch.no_grad():
            log_likelihood = pointwise(values, data)
    note = {"sampled": f"{draws} draws per chain from a {type(source).__name__} posterior"}
    return _Taken(values, post.sample_stats, log_likelihood, note)


def _one_for_each(post: Posterior, source: Closed, root: torch.Generator) -> _Taken:
    """Draw the sites of a closed form once for each draw [chain, draw] of its hyper-parameters."""
    with scope(rng=stream(root, "sites")):
        sites = {name: law.sample() for name, law in source.joint.items()}
    note = {"sampled": "one draw of each site given every draw of the hyper-parameters"}
    return _Taken({**(source.hyper or {}), **sites}, post.sample_stats, {}, note)


def _resampled(post: Posterior, log_weights: Tensor, draws: int, rng: Rng | None) -> _Taken:
    """Turn weighted draws into equally weighted ones, chain by chain."""
    root = stream(require_rng(rng, "exporting weighted draws (ArviZ has no weights)"), "export")
    index = torch.stack(
        [_systematic(row, draws, stream(root, k)) for k, row in enumerate(log_weights)]
    )
    chain = torch.arange(len(index))[:, None]
    grid = tuple(log_weights.shape)

    def pick(tensor: Tensor) -> Tensor:
        return tensor[chain.to(tensor.device), index.to(tensor.device)]

    note = {
        "resampled": f"{draws} draws per chain, systematically, from {grid[1]} weighted ones",
        "kish_ess": ess_from_log_weights(log_weights.detach().double(), 1).cpu().tolist(),
    }
    along = {
        name: tuple(value.shape[:2]) == grid and name not in post.context.dims
        for name, value in post.sample_stats.items()
    }
    return _Taken(
        {name: pick(value) for name, value in post.draws.items()},
        {n: pick(v) if along[n] else v for n, v in post.sample_stats.items()},
        {name: pick(value) for name, value in post.log_likelihood.items()},
        note,
    )


def _systematic(log_weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Positions [n] of a systematic resample, in random order.

    One uniform places a comb of ``n`` teeth on the cumulative weights, so a draw of weight w
    appears floor(n w) or ceil(n w) times. The order is shuffled: a sorted one would look like an
    autocorrelated chain.
    """
    weights = torch.softmax(log_weights.detach().cpu().double(), dim=0)
    comb = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(n)) / n
    index = torch.searchsorted(weights.cumsum(0), comb).clamp_max(len(weights) - 1)
    return index[torch.randperm(n, generator=generator)]


# --------------------------------------------------------------------------- data


@dataclass(frozen=True)
class DataLeaf:
    """One tensor of the data.

    Attributes:
        value: The tensor.
        dims: Names that the model gives its dims; None where it gives none.
        observed: Whether it is what the likelihood describes (else an input).
    """

    value: Tensor
    dims: tuple[str, ...] | None
    observed: bool


def data_leaves(post: Posterior) -> dict[str, DataLeaf]:
    """Name the tensors of a posterior's data and tell observations from inputs.

    A pair is (X, y), a single tensor is y, a mapping keeps its keys. Observed are the names in the
    model's ``observed``, else those with a pointwise log likelihood, else ``y``, else the last.
    Data containers of other classes have no leaves.
    """
    data = post.context.data
    name_dims = getattr(post.model, "data_dims", None)
    dims = name_dims(data) if callable(name_dims) else None
    found = dict(_walk(data, dims, ""))
    observed = _observed_names(post, list(found))
    return {
        name: DataLeaf(value, names, name.split(".")[0] in observed)
        for name, (value, names) in found.items()
    }


def _walk(
    value: Any, dims: Any, path: str
) -> Iterator[tuple[str, tuple[Tensor, tuple[str, ...] | None]]]:
    if isinstance(value, Tensor):
        named = tuple(dims) if dims is not None and len(dims) == value.ndim else None
        yield path or "y", (value, named)
        return
    if isinstance(value, Mapping):
        items = [(str(key), item, key) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        pair = not path and len(value) == 2
        names_of = ("X", "y") if pair else tuple(f"data_{i}" for i in range(len(value)))
        items = [
            (name, item, i) for i, (name, item) in enumerate(zip(names_of, value, strict=True))
        ]
    else:
        return
    for name, item, key in items:
        inner = None if dims is None else dims[key]
        yield from _walk(item, inner, f"{path}.{name}" if path else name)


def _observed_names(post: Posterior, names: Sequence[str]) -> set[str]:
    tops = list(dict.fromkeys(name.split(".")[0] for name in names))
    stated = getattr(post.model, "observed", None)
    if isinstance(stated, tuple | list):
        return set(stated)
    known = set(post.log_likelihood) & set(tops)
    if known:
        return known
    return {"y"} if "y" in tops else set(tops[-1:])


# --------------------------------------------------------------------------- dims and coords


@dataclass(frozen=True)
class _Variable:
    """An array whose first dims are shared (chain, draw) and whose others may have names."""

    value: Tensor | np.ndarray[Any, Any]
    shared: tuple[str, ...]
    names: tuple[str, ...] | None = None


def _shared_dims(value: Tensor, grid: tuple[int, ...]) -> tuple[str, ...]:
    """Leading dims of a statistic that are those of the draws."""
    if grid and tuple(value.shape[:2]) == grid:
        return ("chain", "draw")
    return ("chain",) if grid and tuple(value.shape[:1]) == grid[:1] else ()


def _observation_dims(
    leaves: Mapping[str, DataLeaf], name: str, log_likelihood: Tensor
) -> tuple[str, ...] | None:
    leaf = leaves.get(name)
    if leaf is None or leaf.dims is None or leaf.value.shape != log_likelihood.shape[2:]:
        return None
    return leaf.dims


def _dataset(
    variables: Mapping[str, _Variable],
    coords: Mapping[str, Sequence[Any]],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """Build one group; every dim gets a name that is free and agrees in length."""
    import xarray as xr

    arrays = {name: part for raw, v in variables.items() for name, part in _real_parts(raw, v)}
    sizes: dict[str, int] = {}
    data: dict[str, tuple[list[str], np.ndarray[Any, Any]]] = {}
    labels: dict[str, Any] = {}
    for name, variable in arrays.items():
        array = _numpy(variable.value)
        dims = list(variable.shared)
        sizes.update(zip(dims, array.shape, strict=False))
        for axis, size in enumerate(array.shape[len(dims) :]):
            wanted = variable.names[axis] if variable.names else f"{name}_dim_{axis}"
            dim = _free_name(wanted, size, {*dims, *arrays, "chain", "draw"}, sizes)
            sizes[dim] = size
            labels[dim] = _labels(coords.get(wanted), size)
            dims.append(dim)
        data[name] = (dims, array)
    for dim in ("chain", "draw"):
        if dim in sizes:
            labels[dim] = np.arange(sizes[dim])
    return xr.Dataset(data, coords=labels, attrs=dict(attrs))


def _real_parts(name: str, variable: _Variable) -> list[tuple[str, _Variable]]:
    name = name.replace("/", ".")
    value = variable.value
    if isinstance(value, np.ndarray) or not value.is_complex():
        return [(name, variable)]
    return [
        (f"{name}_real", _Variable(value.real, variable.shared, variable.names)),
        (f"{name}_imag", _Variable(value.imag, variable.shared, variable.names)),
    ]


def _free_name(wanted: str, size: int, taken: set[str], sizes: Mapping[str, int]) -> str:
    """Return ``wanted``, or ``wanted_2``, ...: not yet used otherwise, and of one length."""
    for number in itertools.count(1):
        name = wanted if number == 1 else f"{wanted}_{number}"
        if name not in taken and sizes.get(name, size) == size:
            return name
    raise AssertionError("unreachable")


def _labels(labels: Sequence[Any] | None, size: int) -> np.ndarray[Any, Any]:
    """Coordinate values of a dim; positions where there is no label for each entry."""
    if labels is None or len(labels) != size:
        return np.arange(size)
    plain = all(isinstance(label, str | int | float | np.generic) for label in labels)
    return np.asarray(list(labels) if plain else [str(label) for label in labels])


def _numpy(tensor: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if isinstance(tensor, np.ndarray):
        return tensor
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.float16, torch.bfloat16):
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


# --------------------------------------------------------------------------- attributes


def _attrs(post: Posterior) -> dict[str, Any]:
    """Attributes of every group, in types that netCDF can hold."""
    import probkit

    attrs: dict[str, Any] = {name: _plain(value) for name, value in post.attrs.items()}
    attrs["point_estimate"] = int(post.is_point_estimate)
    if post.log_evidence is not None:
        attrs["log_evidence"] = post.log_evidence.value.detach().cpu().tolist()
        attrs["log_evidence_kind"] = post.log_evidence.kind
    return {
        **attrs,
        "creation_library": "probkit",
        "inference_library": "probkit",
        "inference_library_version": probkit.__version__,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int | float | str):
        return value
    return json.dumps(value, default=str)

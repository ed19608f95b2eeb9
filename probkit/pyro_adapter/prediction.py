"""Predictions of a Pyro program at new inputs, from the draws of a posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from probkit.distributions import map_batch
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.model import Values
from probkit.predictive import Empirical, Mixture, Predictive
from probkit.pyro_adapter.layout import Layout
from probkit.pyro_adapter.runtime import isolated, name_of, run_batched
from probkit.rng import Rng, require_rng, stream
from probkit.sources import Draws

if TYPE_CHECKING:
    from probkit.pyro_adapter.model import FromPyro

__all__ = ["predict"]

DRAWS = 1000
"""Draws to predict with, where the posterior stores none or more."""

Choose = Callable[[Tensor, Distribution], Tensor]


def predict(
    model: FromPyro,
    post: Any,
    x: Any,
    *,
    site: str | None,
    joint: bool,
    groups: Mapping[str, Sequence[Any]] | None,
    rng: Rng | None,
) -> Predictive:
    """Predict; see :meth:`FromPyro.predict`."""
    root = None if rng is None else stream(rng, "predict")
    draws, log_weights = _draws(post, root)
    kwargs = model.new_inputs(post.context.data if x is None else x)
    layout = model.layout(kwargs)
    target = _target(model, post, layout, draws, site)
    if target in draws and target not in layout.sites:
        return Empirical(draws[target], log_weights, tuple(post.context.dims.get(target, ())))
    matches = _matches(post, layout, draws, groups or {})
    task = _Task(model, kwargs, draws, log_weights, matches, root)
    dims, coords = _labels(post, layout, target, groups or {})
    if target in draws and not (target in matches and matches[target].new):
        return Empirical(task.gathered[target], log_weights, dims, coords)
    # A site depends on those before it; where none of these is drawn, it needs no stream.
    drawn = {name for name in layout.sites if name not in draws}
    drawn |= {name for name, match in matches.items() if match.new}
    certain = not drawn & set(layout.order[: layout.order.index(target)])
    if target in layout.sites and target not in draws:
        mixture = _mixture(task, target, certain)
        if mixture is not None:
            if joint and mixture.batch_shape[1:]:
                mixture = Independent(mixture, len(mixture.batch_shape) - 1)
            weights = torch.zeros(task.n) if log_weights is None else log_weights
            return Mixture(mixture, weights.to(_floating(draws)), dims, coords)
    values = _values(task, target, certain and target not in drawn)
    return Empirical(values, log_weights, dims, coords)


def _floating(draws: Values) -> torch.dtype:
    kinds = [v.dtype for v in draws.values() if v.is_floating_point()]
    return kinds[0] if kinds else torch.float64


def _draws(post: Any, rng: torch.Generator | None) -> tuple[dict[str, Tensor], Tensor | None]:
    """Return draws [n, *site] and their log weights [n]: those stored, or a sample of them."""
    if isinstance(post.source, Draws) and post.source.shape[0] * post.source.shape[1] <= DRAWS:
        weights = post.source.log_weights
        flat = {name: value.flatten(0, 1) for name, value in post.draws.items()}
        return flat, None if weights is None else weights.flatten()
    source = require_rng(rng, "a prediction from this posterior")
    return dict(post.sample(DRAWS, rng=stream(source, "values"))), None


def _target(model: FromPyro, post: Any, layout: Layout, draws: Values, site: str | None) -> str:
    """Return the name of the site to predict."""
    if site is not None:
        known = [*draws, *(n for n in layout.sites if n not in draws), *layout.deterministic]
        if site not in known:
            raise DataError(
                f"{name_of(model.program)} has no site {site!r} to predict; "
                f"expected one of {', '.join(known)}"
            )
        return site
    if isinstance(model.observed, Mapping):
        seen = set(model.observed.values())
    else:
        seen = set() if post.context.data is None else set(model.layout(post.context.data).observed)
    new = [name for name in layout.sites if name not in draws]
    candidates = [name for name in new if name in seen] or new
    if len(candidates) != 1:
        raise DataError(
            f"{name_of(model.program)} has {len(candidates)} observed sites to predict "
            f"({', '.join(candidates) or 'none'}); say site=<name>"
        )
    return candidates[0]


@dataclass(frozen=True)
class _Match:
    """Which units of the posterior a site at the new inputs has.

    Attributes:
        index: Axis -> position in the posterior of each unit (0 for a new one).
        known: Axis -> whether each unit is in the posterior.
        first: Axis -> position of the first unit of the same label.
    """

    index: Mapping[int, Tensor]
    known: Mapping[int, Tensor]
    first: Mapping[int, Tensor]

    @property
    def new(self) -> bool:
        """Whether some units are not in the posterior."""
        return any(not bool(known.all()) for known in self.known.values())

    def gather(self, value: Tensor, lead: int) -> Tensor:
        """Take the units of [*lead, *site] in the new order."""
        for axis, index in self.index.items():
            value = value.index_select(lead + axis, index.to(value.device))
        return value

    def choose(self, value: Tensor, law: Distribution) -> Tensor:
        """Keep known units of ``value``, draw the new ones, equal labels alike."""
        fresh = law.sample()
        keep = torch.ones((), dtype=torch.bool, device=value.device)
        for axis, known in self.known.items():
            fresh = fresh.index_select(axis, self.first[axis].to(value.device))
            shape = [1] * value.ndim
            shape[axis] = len(known)
            keep = keep & known.to(value.device).reshape(shape)
        return torch.where(keep, value, fresh.to(value.dtype))


def _matches(
    post: Any, layout: Layout, draws: Values, groups: Mapping[str, Sequence[Any]]
) -> dict[str, _Match]:
    """Match the plates of each latent at the new inputs with those of the posterior."""
    used: set[str] = set()
    matches = {}
    for name, site in layout.sites.items():
        if name not in draws:
            used.update(dim for dim in site.dims if dim in layout.plates)
            continue
        fitted = tuple(draws[name].shape[1:])
        if len(fitted) != len(site.shape):
            raise ShapeError(
                f"site {name!r}: expected shape {fitted} as in the posterior, "
                f"got {site.shape} at the new inputs"
            )
        axes: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for axis, dim in enumerate(site.dims):
            if dim in groups:
                used.add(dim)
                axes[axis] = _match_labels(post, dim, groups[dim], site.shape[axis])
            elif fitted[axis] != site.shape[axis]:
                raise _size_error(name, dim, layout, fitted[axis], site.shape[axis])
        if axes:
            matches[name] = _Match(
                {a: m[0] for a, m in axes.items()},
                {a: m[1] for a, m in axes.items()},
                {a: m[2] for a, m in axes.items()},
            )
    unknown = [plate for plate in groups if plate not in used]
    if unknown:
        raise DataError(
            f"groups: the program has no plate {', '.join(map(repr, unknown))} at these inputs; "
            f"expected one of {', '.join(layout.plates) or 'none'}"
        )
    return matches


def _size_error(name: str, dim: str, layout: Layout, fitted: int, new: int) -> Exception:
    if dim in layout.plates:
        return DataError(
            f"plate {dim!r} of site {name!r} has {fitted} units in the posterior and {new} at the "
            f"new inputs: pass groups={{{dim!r}: [one label per unit]}}; they are never matched by "
            "size"
        )
    return ShapeError(
        f"site {name!r}: expected {fitted} entries along {dim!r} as in the posterior, got {new}"
    )


def _match_labels(
    post: Any, plate: str, labels: Sequence[Any], size: int
) -> tuple[Tensor, Tensor, Tensor]:
    known = post.context.coords.get(plate)
    if known is None:
        raise DataError(
            f"groups={{{plate!r}: ...}}: the posterior has no labels for this plate; fit with "
            f"FromPyro(..., coords={{{plate!r}: [...]}}), or observe a pandas Series with labels"
        )
    wanted = [_plain(label) for label in labels]
    if len(wanted) != size:
        raise ShapeError(
            f"groups={{{plate!r}: ...}}: expected {size} labels, one per unit of the plate at the "
            f"new inputs, got {len(wanted)}"
        )
    place = {_plain(label): i for i, label in enumerate(known)}
    first: dict[Any, int] = {}
    for i, label in enumerate(wanted):
        first.setdefault(label, i)
    return (
        torch.tensor([place.get(label, 0) for label in wanted]),
        torch.tensor([label in place for label in wanted]),
        torch.tensor([first[label] for label in wanted]),
    )


def _plain(label: Any) -> Any:
    """Turn scalars of torch and NumPy into Python ones, which compare by value."""
    return label.item() if hasattr(label, "item") else label


def _labels(
    post: Any, layout: Layout, target: str, groups: Mapping[str, Sequence[Any]]
) -> tuple[tuple[str, ...], dict[str, Sequence[Any]]]:
    site = layout.sites.get(target)
    if site is None:
        return (), {}
    coords: dict[str, Sequence[Any]] = {}
    for dim, size in zip(site.dims, site.shape, strict=True):
        labels = groups.get(dim, post.context.coords.get(dim))
        if labels is not None and len(labels) == size:
            coords[dim] = list(labels)
    return site.dims, coords


@dataclass(frozen=True)
class _Task:
    """A run of the program at the new inputs, once per posterior draw."""

    model: FromPyro
    kwargs: Mapping[str, Any]
    draws: Values
    log_weights: Tensor | None
    matches: Mapping[str, _Match]
    rng: torch.Generator | None

    @property
    def n(self) -> int:
        return len(next(iter(self.draws.values()))) if self.draws else 1

    @property
    def gathered(self) -> dict[str, Tensor]:
        """Draws [n, *site at the new inputs]; new units hold any value."""
        return {
            name: self.matches[name].gather(value, 1) if name in self.matches else value
            for name, value in self.draws.items()
        }

    @property
    def choose(self) -> dict[str, Choose]:
        return {name: match.choose for name, match in self.matches.items() if match.new}

    def stream(self, certain: bool) -> torch.Generator:
        """Stream of the run; nothing that matters is drawn from it where all is ``certain``."""
        if certain:
            return stream(0, "unused")
        return stream(require_rng(self.rng, "this prediction"), "draw")

    def run(self, read: Callable[[Any], dict[str, Tensor]], certain: bool) -> dict[str, Tensor]:
        def point(row: Values, mapped: bool) -> dict[str, Tensor]:
            trace = self.model.trace(
                self.kwargs, row, strict=False, mapped=mapped, choose=self.choose
            )
            return read(trace)

        with torch.no_grad():
            return run_batched(point, self.gathered, self.n, rng=self.stream(certain))


def _values(task: _Task, target: str, certain: bool) -> Tensor:
    """Return the value [n, *site] of one site in every run."""
    return task.run(lambda trace: {"value": trace.nodes[target]["value"]}, certain)["value"]


def _mixture(task: _Task, target: str, certain: bool) -> Distribution | None:
    """Return the distributions of one site given each draw, as one with a leading dim [n].

    None where they cannot be joined: classes that do not list their arguments, or that a test at
    drawn values shows to differ when rebuilt.
    """
    first = {name: value[0] for name, value in task.gathered.items()}
    with torch.no_grad(), isolated(rng=stream(0, "template")):
        trace = task.model.trace(task.kwargs, first, strict=False, choose=task.choose)
    template: Distribution = trace.nodes[target]["fn"]
    try:
        map_batch(template, lambda value: value)
    except (CapabilityError, TypeError, RuntimeError, AttributeError):
        return None

    def read(run: Any) -> dict[str, Tensor]:
        node = run.nodes[target]
        parts: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            parts.append(value)
            return value

        map_batch(node["fn"], keep)
        found = {f"argument {i}": part for i, part in enumerate(parts)}
        return {**found, "value": node["value"], "log_prob": node["fn"].log_prob(node["value"])}

    read_out = task.run(read, certain)
    arguments = iter([v for k, v in read_out.items() if k.startswith("argument")])
    try:
        joined = map_batch(template, lambda value: next(arguments))
        repeated = joined.log_prob(read_out["value"])
    except (CapabilityError, TypeError, RuntimeError, ValueError):
        return None
    same = repeated.shape == read_out["log_prob"].shape and torch.allclose(
        repeated, read_out["log_prob"], rtol=1e-4, atol=1e-5, equal_nan=True
    )
    return joined if same else None

"""Where chains start: points of finite density, or an earlier posterior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from probkit.density import check_log_joint, initial_values
from probkit.errors import DataError, ShapeError
from probkit.files import storable
from probkit.inference.hmc.potential import FAILURES, Potential
from probkit.posterior import Posterior
from probkit.unconstrained import Unconstrained

__all__ = ["Start", "starting_points"]

_ATTEMPTS = 50
_MOST_POINTS = 1000
_PROBES = 32


@storable
@dataclass(frozen=True)
class Start:
    """What a warm start takes from an earlier posterior.

    Attributes:
        values: Site name -> [point, *site]; each chain starts at one of them, drawn by its stream.
        inverse_mass: Variances [D] or covariance [D, D] of the unconstrained vector; None where
            the posterior has no spread (an optimum).
        step_size: Step size of the earlier run; None where it had none.
    """

    values: Mapping[str, Tensor] = field(repr=False)
    inverse_mass: Tensor | None = field(default=None, repr=False)
    step_size: float | None = None

    @classmethod
    def of(cls, posterior: Posterior, *, dense: bool = False) -> Start:
        """Take points, scales and step size of ``posterior``, whatever it was made by."""
        values = _points(posterior)
        sites = posterior.model.sites(posterior.context.data)
        flat = Unconstrained(sites).flatten(values)
        spread = None
        if not posterior.is_point_estimate and len(flat) >= 10:
            spread = torch.cov(flat.T).reshape(2 * flat.shape[1:]) if dense else flat.var(0)
            share = len(flat) / (len(flat) + 5.0)
            floor = 1e-3 * (1.0 - share)
            diagonal = spread.diagonal() if dense else spread
            spread = share * spread
            (spread.diagonal() if dense else spread).add_(floor * diagonal.mean().clamp(min=1e-12))
        steps = posterior.sample_stats.get("step_size")
        step_size = None if steps is None else float(steps[:, -1].median())
        return cls(values, spread, step_size)


def _points(posterior: Posterior) -> dict[str, Tensor]:
    """Take at most 1000 points [point, *site] of a posterior, by weight where it has weights."""
    if posterior.draws and posterior.log_weights is None:
        flat = {name: value.flatten(0, 1) for name, value in posterior.draws.items()}
        many = len(next(iter(flat.values())))
        index = torch.linspace(0, many - 1, min(many, _MOST_POINTS)).round().long()
        return {name: value[index.to(value.device)].clone() for name, value in flat.items()}
    return dict(posterior.sample(_MOST_POINTS, rng=0))


def starting_points(
    potential: Potential, rngs: Sequence[torch.Generator], start: Start | None
) -> Tensor:
    """Choose a point of finite density and gradient for each chain.

    Without ``start``, chains draw initial values (the model's own, else uniform on [-2, 2] in the
    unconstrained space) from their own streams until one has a finite density and gradient.

    Returns:
        [chain, D].

    Raises:
        DataError: None was found; the message names the sites at fault.
        ShapeError: The log joint has the wrong shape.
    """
    model, data = potential.model, potential.data
    position = torch.cat([_propose(potential, rng, start) for rng in rngs])
    try:
        check_log_joint(model, potential.free.values(position), data)
    except ShapeError:
        raise
    except ValueError:
        pass  # A point that the model cannot take; another one may do.
    for attempt in range(_ATTEMPTS):
        energy, _ = potential(position)
        bad = ~torch.isfinite(energy)
        if not bool(bad.any()):
            check_log_joint(model, potential.free.values(position), data)
            return position
        if start is not None or attempt == _ATTEMPTS - 1:
            break
        rows = [
            _propose(potential, rng, None) if bad[k] else position[k : k + 1]
            for k, rng in enumerate(rngs)
        ]
        position = torch.cat(rows)
    chain = int(bad.nonzero()[0])
    raise DataError(_explain(potential, position[chain], chain, rngs[chain]))


def _propose(potential: Potential, rng: torch.Generator, start: Start | None) -> Tensor:
    """Draw one starting point [1, D]."""
    free = potential.free
    if start is None:
        values: Mapping[str, Tensor] = initial_values(
            potential.model, potential.data, free.sites, 1, rng=rng
        )
        return free.flatten(values)
    _check_start(start, free)
    many = len(next(iter(start.values.values())))
    index = int(torch.randint(many, (), generator=rng, device=rng.device))
    return free.flatten({name: start.values[name][index : index + 1] for name in free.sites})


def _check_start(start: Start, free: Unconstrained) -> None:
    for name, site in free.sites.items():
        found: Any = start.values.get(name)
        if found is None or tuple(found.shape[1:]) != site.shape:
            got = "nothing" if found is None else str(tuple(found.shape[1:]))
            raise ShapeError(
                f"start: expected site {name!r} of shape {site.shape}, got {got}; warm starts need "
                "a posterior over the same sites"
            )


def _explain(potential: Potential, position: Tensor, chain: int, rng: torch.Generator) -> str:
    """Say what is not finite at ``position`` [D], and because of which sites."""
    name = type(potential.model).__name__
    try:
        energy, gradient = potential.raw(position[None])
    except FAILURES as error:
        return (
            f"log_joint of {name} fails at the starting point of chain {chain} ({error}); check "
            "the data, or give the model initial_values"
        )
    parts = _slices(potential.free)
    if bool(torch.isfinite(energy)):
        sites = [n for n, part in parts.items() if not _finite(gradient[0, part])]
        return (
            f"the gradient of log_joint of {name} is not finite for {_listed(sites)} at the "
            f"starting point of chain {chain}; rewrite the density (a square root at zero, or "
            "where() around a NaN?) or give the model initial_values"
        )
    sites = [n for n, part in parts.items() if _cures(potential, position, part, rng)]
    return (
        f"log_joint of {name} is {float(-energy):g} at the starting point of chain {chain}, "
        f"because of {_listed(sites or list(parts))}; check the data and the priors, or give the "
        "model initial_values"
    )


def _cures(potential: Potential, position: Tensor, part: slice, rng: torch.Generator) -> bool:
    """Tell whether other values of one site alone make the density finite."""
    probes = position.repeat(_PROBES, 1)
    shape = probes[:, part].shape
    noise = torch.rand(shape, generator=rng, dtype=position.dtype, device=rng.device)
    probes[:, part] = 4.0 * noise - 2.0
    energy, _ = potential(probes)
    return bool(torch.isfinite(energy).any())


def _slices(free: Unconstrained) -> dict[str, slice]:
    """Where each site lies in the flat vector."""
    parts, begin = {}, 0
    for name, site in free.sites.items():
        end = begin + Unconstrained({name: site}).size
        parts[name], begin = slice(begin, end), end
    return parts


def _finite(part: Tensor) -> bool:
    return bool(torch.isfinite(part).all())


def _listed(sites: Sequence[str]) -> str:
    return ("site " if len(sites) == 1 else "sites ") + ", ".join(repr(s) for s in sites)

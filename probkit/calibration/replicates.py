"""Simulated data sets with known truths, each fitted anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, as_completed
from typing import Any, TypeVar

import torch
from torch import Tensor

from probkit.data import convert
from probkit.density import log_joint_of
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.model import Values, lacks, prepare
from probkit.posterior import Posterior
from probkit.progress import Progress
from probkit.rng import Rng, stream
from probkit.sources import Draws
from probkit.tree import map_tensors

__all__ = [
    "Quantities",
    "Simulate",
    "draw_pair",
    "fit",
    "run_all",
    "scalars",
    "smallest_ess",
    "thin",
]

#: (generator) -> (values {site: [*site]}, data): one truth and one data set drawn from it.
Simulate = Callable[[torch.Generator], tuple[Values, Any]]
#: (values {site: [n, *site]}, data) -> {name: [n]}.
Quantities = Callable[[Values, Any], Mapping[str, Tensor]]

T = TypeVar("T")


def draw_pair(model: Any, simulate: Simulate | None, rng: Rng) -> tuple[dict[str, Tensor], Any]:
    """Draw values {site: [*site]} from the prior, and a data set given them.

    Without ``simulate`` the model's ``sample_dataset`` is asked for one pair; the leading dim of
    every tensor of its data counts pairs, but for models that say otherwise by
    ``pick_dataset(data, index)``.

    Raises:
        CapabilityError: The model cannot be simulated.
        ShapeError: A value has not the shape of its site.
    """
    if simulate is not None:
        values, data = simulate(stream(rng, "pair"))
        values = dict(values)
    else:
        missing = lacks(model, ("sample_dataset",))
        if missing:
            raise CapabilityError(
                f"{type(model).__name__} lacks sample_dataset(n, rng=): subclass with one, or pass "
                "simulate=<function(generator) -> (values, data)>"
            )
        many, sets = model.sample_dataset(1, rng=stream(rng, "pair"))
        values = {name: value[0] for name, value in many.items()}
        pick = getattr(model, "pick_dataset", None)
        data = pick(sets, 0) if callable(pick) else map_tensors(lambda t: t[0], sets)
    ready = prepare(model, convert(data).data)
    for name, site in model.sites(ready).items():
        if name not in values or tuple(values[name].shape) != site.shape:
            got = tuple(values[name].shape) if name in values else "nothing"
            raise ShapeError(
                f"simulated truth: expected site {name!r} of shape {site.shape}, got {got}; return "
                "one value for each site, without a leading dim"
            )
    return values, data


def fit(model: Any, data: Any, sampler: Any, rng: Rng, options: Mapping[str, Any]) -> Posterior:
    """Fit one data set without a progress bar of its own."""
    from probkit.driver import infer

    return infer(model, data, sampler, rng=rng, callbacks=[Progress(show=False)], **options)


def thin(post: Posterior, draws: int, rng: Rng) -> dict[str, Tensor]:
    """Take ``draws`` values [draw, *site] from a posterior, as independent as can be.

    Stored draws of equal weight are taken at equal distances over all chains; everything else is
    sampled.

    Raises:
        CapabilityError: A point estimate has no uncertainty to calibrate.
        DataError: Fewer draws are stored than asked for.
    """
    if post.is_point_estimate:
        raise CapabilityError(
            f"{post.attrs.get('algorithm', 'this sampler')} gives a point estimate, whose "
            "calibration means nothing; use a sampler with draws"
        )
    if not isinstance(post.source, Draws) or post.log_weights is not None:
        return dict(post.sample(draws, rng=rng))
    chains, each = post.source.shape
    if chains * each < draws:
        raise DataError(
            f"expected at least draws={draws} posterior draws to rank a truth among, got {chains} "
            f"chains of {each}; raise the sampler's draws, or lower draws="
        )
    index = torch.linspace(0, chains * each - 1, draws).round().long()
    return {name: value.flatten(0, 1)[index] for name, value in post.draws.items()}


def scalars(
    model: Any,
    values: Values,
    data: Any,
    *,
    quantities: Quantities | None,
    log_joint: bool,
) -> dict[str, Tensor]:
    """Return every scalar to rank, {name: [n]}, of values [n, *site].

    By default each entry of each site; with ``log_joint`` also the log joint density, which depends
    on the data and so sees what the sites alone do not (Modrak et al. 2023).
    """
    if quantities is not None:
        found = {name: torch.as_tensor(x) for name, x in quantities(values, data).items()}
        n = len(next(iter(values.values())))
        for name, x in found.items():
            if tuple(x.shape) != (n,):
                raise ShapeError(f"quantities: expected {name!r} [n={n}], got {tuple(x.shape)}")
        return found
    found = {}
    for site, value in values.items():
        columns = value.flatten(1).unbind(1) if value.ndim > 1 else (value,)
        places = itertools.product(*(range(size) for size in value.shape[1:]))
        for place, column in zip(places, columns, strict=True):
            label = f"{site}[{', '.join(map(str, place))}]" if place else site
            found[label] = column
    if log_joint and callable(getattr(model, "log_joint", None)):
        with torch.no_grad():
            found["log_joint"] = log_joint_of(model, values, prepare(model, convert(data).data))
    return found


def run_all(
    task: Callable[[int], T | None], n: int, executor: Executor | None
) -> tuple[list[T], bool]:
    """Call ``task(k)`` for k = 0, ..., n - 1, here or on an executor.

    Results do not depend on where they were computed. Ctrl-C ends the work and keeps what has been
    finished; a task that was interrupted itself returns None.

    Returns:
        The results in the order of k, and whether all are there.

    Raises:
        KeyboardInterrupt: Interrupted before anything was finished.
    """
    results: dict[int, T] = {}
    futures = {} if executor is None else {executor.submit(task, k): k for k in range(n)}
    pairs: Any = (
        ((k, task(k)) for k in range(n))
        if executor is None
        else ((futures[future], future.result()) for future in as_completed(futures))
    )
    try:
        for k, result in pairs:
            if result is None:
                break
            results[k] = result
    except KeyboardInterrupt:
        pass
    finally:
        for future in futures:
            future.cancel()
    if not results:
        raise KeyboardInterrupt
    return [results[k] for k in sorted(results)], len(results) == n


def smallest_ess(post: Posterior, most: int = 50) -> float:
    """Return the smallest bulk effective sample size of up to ``most`` entries of the draws.

    Infinite for a posterior whose draws are independent by construction.
    """
    if not isinstance(post.source, Draws) or post.log_weights is not None:
        return float("inf")
    columns = [v.detach().cpu().double() for v in post.draws.values()]
    joined = torch.cat([c.reshape(*c.shape[:2], -1) for c in columns], dim=2)
    if joined.shape[1] < 4:
        return float("inf")
    import arviz

    every = max(1, -(-joined.shape[2] // most))
    found = [float(arviz.ess(x)) for x in joined[..., ::every].movedim(2, 0).numpy()]
    return min((x for x in found if x == x), default=float("inf"))

"""Compile a generative model into a network, once: for predictions or for its latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch

from probkit._version import __version__
from probkit.errors import CapabilityError, DataError
from probkit.model import Site, lacks
from probkit.models.pfn.bars import borders_from_sample
from probkit.models.pfn.data_sets import Encode, SetScaling, as_sets
from probkit.models.pfn.latent_guide import PFNGuide, continuous_sites
from probkit.models.pfn.network import SIZES, PFNNetwork, PFNSize
from probkit.models.pfn.predictor import PFN
from probkit.models.pfn.set_tasks import LatentTask, RowTask, latent_scaling, version_of
from probkit.models.pfn.training import TrainingPlan, train
from probkit.rng import Rng, seed_of, stream
from probkit.sampler import Info
from probkit.tree import map_tensors
from probkit.unconstrained import Unconstrained

__all__ = ["amortize"]

_PILOT = 2_000  # data sets that set scales and borders


@overload
def amortize(
    model: Any,
    network: str | PFNSize = ...,
    *,
    target: Literal["predictions"] = ...,
    steps: int = ...,
    rng: Rng,
    bars: int = ...,
    octaves: tuple[int, int] = ...,
    batch: int = ...,
    lr: float | None = ...,
    queries: int = ...,
    most: int | None = ...,
    fewest: int | None = ...,
    encode: Encode | None = ...,
    plan: TrainingPlan | None = ...,
    checkpoint: str | Path | None = ...,
    callbacks: Sequence[Callable[[Info], Any]] = ...,
) -> PFN: ...


@overload
def amortize(
    model: Any,
    network: str | PFNSize = ...,
    *,
    target: Literal["latents"],
    steps: int = ...,
    rng: Rng,
    bars: int = ...,
    octaves: tuple[int, int] = ...,
    batch: int = ...,
    lr: float | None = ...,
    queries: int = ...,
    most: int | None = ...,
    fewest: int | None = ...,
    encode: Encode | None = ...,
    plan: TrainingPlan | None = ...,
    checkpoint: str | Path | None = ...,
    callbacks: Sequence[Callable[[Info], Any]] = ...,
) -> PFNGuide: ...


def amortize(
    model: Any,
    network: str | PFNSize = "small",
    *,
    target: Literal["predictions", "latents"] = "predictions",
    steps: int = 3000,
    rng: Rng,
    bars: int = 300,
    octaves: tuple[int, int] = (3, 4),
    batch: int = 64,
    lr: float | None = None,
    queries: int = 24,
    most: int | None = None,
    fewest: int | None = None,
    encode: Encode | None = None,
    plan: TrainingPlan | None = None,
    checkpoint: str | Path | None = None,
    callbacks: Sequence[Callable[[Info], Any]] = (),
) -> PFN | PFNGuide:
    """Train a transformer on what ``model`` simulates, so that inference becomes a forward pass.

    Only ``sample_dataset(n, rng=) -> (values, data)`` of the model is used (and ``sites`` for
    latents). Rows of a data set must be exchangeable given the latents.

    Args:
        model: Any :class:`~probkit.model.Generative` model.
        network: A size, "tiny", "small", "medium" or "large", or a shape of your own, of which
            ``features`` and ``bars`` are replaced by what the model needs.
        target: "predictions": the law of new rows given observed ones, a model for
            ``infer(net, data, rng=0)``. "latents": the law of the model's sites given the data, a
            guide for ``infer(model, data, Direct(), guide=net, rng=0)``.
        steps: Gradient steps.
        rng: Seed of scales, borders, starting weights and data.
        bars: Bars of the head.
        octaves: Waves that describe inputs and outputs to the network beside their values; each
            octave halves the wavelength. (0, 0) gives the values alone.
        batch: Data sets in each step.
        lr: Highest learning rate; by default 2e-3 at width 128, less for wider networks.
        queries: Rows asked for in each data set (predictions).
        most: Largest number of rows observed (predictions); None for all but one.
        fewest: Smallest number of rows observed (latents); None always shows all of them.
        encode: Function from the model's data to (x, y), for data that are no such pair; it gets
            what ``sample_dataset`` returns in training, and one data set in inference.
        plan: Everything about the training; replaces ``steps``, ``batch`` and ``lr``.
        checkpoint: File (.safetensors) that the training saves to and resumes from.
        callbacks: Called with an ``Info`` after each block of steps.

    Returns:
        A :class:`PFN`, or a :class:`PFNGuide` for latents.

    Raises:
        CapabilityError: The model cannot be simulated, or its data have another form.
        DataError: An option is out of range.

    Example:
        >>> from probkit.models.pfn import GPPrior, amortize
        >>> net = amortize(GPPrior(rows=12), "tiny", steps=2, bars=20, rng=0)
        >>> net.sites(None)
        {}
    """
    if target not in ("predictions", "latents"):
        raise DataError(f"target: expected 'predictions' or 'latents', got {target!r}")
    missing = lacks(model, ("sample_dataset", "sites"))
    if missing:
        raise CapabilityError(
            f"amortize needs a generative model; {type(model).__name__} lacks {', '.join(missing)}"
        )
    seed = seed_of(rng)
    shape = _shape(network)
    values, data = model.sample_dataset(_PILOT, rng=stream(seed, "pilot"))
    x, y = as_sets(data, _PILOT, encode)
    scaling = SetScaling.of(x, y)
    if plan is None:
        rate = lr if lr is not None else 2e-3 * min(1.0, 128 / shape.width)
        plan = TrainingPlan(steps=steps, batch=batch, lr=rate)
    features, targets = x.shape[-1] * (1 + 2 * octaves[0]), 1 + 2 * octaves[1]
    task: RowTask | LatentTask
    sites: dict[str, Site] = {}
    if target == "predictions":
        sample = scaling.y(y)
        borders = borders_from_sample(sample, bars, tail=_tail(sample.numel()))
        shape = replace(shape, features=features, bars=bars, targets=targets)
        task = RowTask(model, borders, scaling, queries, most, octaves, encode)
    else:
        sites = continuous_sites(model, _first(model, data))
        transform = Unconstrained(sites)
        flat = transform.flatten(values)
        shift, scale = latent_scaling(flat)
        sample = (flat.float() - shift) / scale
        borders = borders_from_sample(sample, bars, tail=_tail(sample.numel()))
        shape = replace(shape, features=features + len(shift), bars=bars, targets=targets)
        if fewest is not None and not 0 <= fewest <= y.shape[1]:
            raise DataError(f"fewest: expected 0 to {y.shape[1]} rows, got {fewest}")
        task = LatentTask(model, transform, borders, scaling, shift, scale, fewest, octaves, encode)
    net = PFNNetwork(shape, generator=stream(seed, "weights"))
    run = train(net, task, plan, rng=seed, checkpoint=checkpoint, callbacks=callbacks)
    net.cpu().requires_grad_(False)
    card = {
        "training": {**asdict(plan), "seed": seed, "task": task.version},
        "data_sets": run.step * plan.batch,
        "losses": [round(loss, 4) for loss in run.losses[-5:]],
        "probkit": __version__,
        "torch": str(torch.__version__),
    }
    name = version_of(model)
    if isinstance(task, RowTask):
        count = y.shape[1] - 1 if most is None else most
        return PFN(net, task.borders, scaling, name, count, card, encode)
    names = tuple(sites)
    return PFNGuide(net, task.borders, scaling, task.shift, task.scale, names, name, card, encode)


def _first(model: Any, data: Any) -> Any:
    """Return the first of the pilot's data sets, for models whose sites depend on data."""
    pick = getattr(model, "pick_dataset", None)
    if callable(pick):
        return pick(data, 0)
    return map_tensors(lambda t: t[0] if t.dim() and len(t) == _PILOT else t, data)


def _shape(network: str | PFNSize) -> PFNSize:
    if isinstance(network, PFNSize):
        return network
    if not isinstance(network, str) or network not in SIZES:
        accepted = ", ".join(map(repr, SIZES))
        raise DataError(f"network: expected a PFNSize or one of {accepted}, got {network!r}")
    width, layers, heads = SIZES[network]
    return PFNSize(width, layers, heads)


def _tail(count: int) -> float:
    """Probability beyond the inner ends: a thousandth, or what ten draws can tell."""
    return min(0.05, max(1e-3, 20 / count))

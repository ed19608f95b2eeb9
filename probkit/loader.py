"""Minibatches that a program brings itself: streams from disk, augmentations, other samplers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from probkit.data import convert, device_of
from probkit.errors import DataError
from probkit.model import Batch, Site, prepare
from probkit.rng import stream

__all__ = ["Cursor", "Loader", "Sized"]

Factory = Callable[[int, torch.Generator], Iterator[Batch]]


@dataclass(frozen=True, eq=False)
class Loader:
    """Data that arrives batch by batch, one iterator for each pass over it; for SVI, SGLD, SGHMC.

    ``infer(model, Loader(...), SVI(...), rng=0)`` takes the batches in the order in which the
    factory gives them. A resumed run calls the factory again for the epoch that it was in and
    skips the batches it has used, so results are equal to the last bit if the factory draws all
    its randomness from the generator that it is given.

    Args:
        factory: ``factory(epoch, generator)`` returns an iterator of
            :class:`~probkit.model.Batch`; each states its ``scale`` (units over batch size), and
            its ``index`` where the model has local sites.
        units: Number of units in all; needed where the model has local sites. When it is given,
            the scales of batches with an index are checked against it.
        example: Data of one batch, from which the shapes of the sites are read.

    Example:
        >>> y = torch.linspace(-1, 1, 6, dtype=torch.float64)
        >>> def factory(epoch, generator):
        ...     for index in torch.randperm(6, generator=generator).split(2):
        ...         yield Batch(y[index], index, scale=3.0)
        >>> loader = Loader(factory, units=6, example=y[:2])
        >>> len(list(loader.factory(0, torch.Generator().manual_seed(0))))
        3
    """

    factory: Factory
    units: int | None = None
    example: Any = None
    _cursors: dict[int, Cursor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.factory):
            raise DataError(
                f"Loader: expected factory(epoch, generator), got {type(self.factory).__name__}"
            )
        if self.units is not None and self.units < 1:
            raise DataError(f"Loader: expected units >= 1, got {self.units}")
        if self.example is None:
            raise DataError("Loader: expected example=<data of one batch>, got none")

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open iterators behind; whoever unpickles replays."""
        return {**vars(self), "_cursors": {}}

    @property
    def device(self) -> torch.device:
        """Device of the example."""
        return device_of(self.example)

    def prepared(self, model: Any) -> Loader:
        """Return the loader with its example converted and checked by ``model``."""
        return replace(self, example=prepare(model, convert(self.example).data))

    def next(self, model: Any, seed: int, epoch: int, position: int) -> tuple[Batch, int, int]:
        """Return the batch at (epoch, position) of the pass with ``seed``, and where it was.

        Past the end of an epoch the next one begins.

        Raises:
            DataError: The factory gives no batch, or one that is not a valid Batch.
        """
        cursor = self._cursors.get(seed)
        if cursor is None or (cursor.epoch, cursor.position) != (epoch, position):
            cursor = Cursor(self.factory, seed, epoch, self.device)
            cursor.skip(position)
        batch = next(cursor, None)
        if batch is None:
            cursor = Cursor(self.factory, seed, epoch + 1, self.device)
            batch = next(cursor, None)
        if batch is None:
            raise DataError(f"Loader: the factory gave no batch in epoch {cursor.epoch}")
        self._cursors[seed] = cursor
        return self._checked(model, batch), cursor.epoch, cursor.position - 1

    def _checked(self, model: Any, batch: Any) -> Batch:
        if not isinstance(batch, Batch):
            raise DataError(
                f"Loader: expected the factory to give Batch(data, index, scale), got "
                f"{type(batch).__name__}"
            )
        if self.units is not None and batch.index is not None:
            expected = self.units / len(batch.index)
            if abs(batch.scale - expected) > 1e-6 * expected:
                raise DataError(
                    f"Loader: expected Batch.scale = units / batch size = {expected:g}, got "
                    f"{batch.scale:g}"
                )
        return replace(batch, data=prepare(model, convert(batch.data).data))


class Cursor:
    """An open iterator of one epoch, and how many of its batches were taken."""

    def __init__(self, factory: Factory, seed: int, epoch: int, device: torch.device) -> None:
        self.epoch = epoch
        self.position = 0
        self._batches = iter(factory(epoch, stream(seed, "epoch", epoch, device=device)))

    def __iter__(self) -> Cursor:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.position += 1
        return batch

    def skip(self, count: int) -> None:
        """Take ``count`` batches and drop them."""
        for _ in range(count):
            if next(self, None) is None:
                raise DataError(
                    f"Loader: epoch {self.epoch} had more than {self.position} batches when the "
                    "run was saved; the factory must depend on epoch and generator alone"
                )


class Sized:
    """A model of a :class:`Loader`: the data at hand is one batch, not all there is.

    Guides start their parameters on it. Local sites have all units, and no starting values: those
    would be of one batch.

    Args:
        model: The model.
        units: Number of units in all; needed where there are local sites.
        local: Whether there are any.
    """

    def __init__(self, model: Any, units: int | None, local: bool = True) -> None:
        self._model = model
        self._units = units
        self._local = local

    def sites(self, data: Any) -> dict[str, Site]:
        """Return the model's sites, the plate of local ones widened to all units."""
        return {name: self._widen(name, site) for name, site in self._model.sites(data).items()}

    def _widen(self, name: str, site: Site) -> Site:
        if site.plate is None:
            return site
        if self._units is None:
            raise DataError(
                f"Loader: site {name!r} is local to the plate {site.plate!r}; expected "
                "Loader(units=<number of units>)"
            )
        return replace(site, shape=(self._units, *site.shape[1:]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (name == "initial_values" and self._local):
            raise AttributeError(name)
        return getattr(self._model, name)

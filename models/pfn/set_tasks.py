"""Training tasks for any generative model: predict new rows, or the latents themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probkit.errors import DataError
from probkit.models.pfn.data_sets import Encode, SetScaling, as_sets, waves
from probkit.rng import seed_of
from probkit.unconstrained import Unconstrained

__all__ = ["LatentTask", "RowTask", "latent_scaling"]


def _bars_of(borders: Tensor, y: Tensor) -> Tensor:
    return torch.searchsorted(borders.to(y)[1:-1].contiguous(), y.contiguous(), right=True)


def _scaled_sets(
    model: Any, n: int, scaling: SetScaling, encode: Encode | None, rng: torch.Generator
) -> tuple[Any, Tensor, Tensor]:
    """Simulate on the CPU, whence models draw; return values and scaled sets on rng's device."""
    values, data = model.sample_dataset(n, rng=seed_of(rng))
    x, y = as_sets(data, n, encode)
    return values, scaling.x(x).to(rng.device), scaling.y(y).to(rng.device)


@dataclass(frozen=True)
class RowTask:
    """Predict rows of a data set from other rows of it.

    Each step puts the rows in a random order and cuts them twice, half of the data sets after n
    rows and half after N - 1 - n, with n uniform on 0, ..., N - 1 (or up to ``most``).

    Attributes:
        model: Source of data sets.
        borders: [bar + 1] borders for scaled outputs.
        scaling: Shifts and scales of inputs and outputs.
        queries: Rows asked for at most in each data set.
        most: Largest number of rows observed; None for all but one.
        octaves: Waves that describe an input and an output; see :func:`waves`.
        encode: How to read the model's data.
    """

    model: Any
    borders: Tensor
    scaling: SetScaling
    queries: int = 24
    most: int | None = None
    octaves: tuple[int, int] = (0, 0)
    encode: Encode | None = None

    @property
    def version(self) -> str:
        """Name of the model and the cuts."""
        return f"{version_of(self.model)}, rows, {self.queries} queries, most {self.most}"

    def block(self, n: int, *, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Simulate ``n`` data sets: x [n, row, feature] and y [n, row], scaled."""
        return _scaled_sets(self.model, n, self.scaling, self.encode, rng)[1:]

    def loss(
        self, network: Callable[..., Tensor], rows: tuple[Tensor, ...], *, rng: torch.Generator
    ) -> Tensor:
        """Return the mean of -log P(bar of y) over the rows asked for, in nats."""
        x, y = rows
        count = y.shape[1]
        order = torch.randperm(count, generator=rng).to(y.device)
        x, y = waves(x[:, order], self.octaves[0]), y[:, order]
        top = count - 1 if self.most is None else min(self.most, count - 1)
        first = int(torch.randint(top + 1, (), generator=rng))
        total = torch.zeros((), device=y.device)
        halves = zip(x.chunk(2), y.chunk(2), (first, top - first), strict=False)
        for x_part, y_part, cut in halves:
            end = min(count, cut + self.queries)
            seen = waves(y_part[:, :cut, None], self.octaves[1])
            logits = network(x_part[:, :cut], seen, x_part[:, cut:end])
            bar = _bars_of(self.borders, y_part[:, cut:end])
            loss = functional.cross_entropy(logits.float().flatten(0, 1), bar.flatten())
            total = total + loss * len(y_part)
        return total / len(y)


@dataclass(frozen=True)
class LatentTask:
    """Predict the latents of a model from its data, one coordinate after the other.

    Latents live in unconstrained space, scaled. Coordinate j is asked for given the data and the
    coordinates before j, which join the observed tokens; so the chain rule makes a joint law out of
    one-dimensional bars. Features of a token: those of x, then which coordinate it is (one-hot).

    Attributes:
        model: Source of values and data sets.
        transform: Map of the model's values to unconstrained coordinates.
        borders: [bar + 1] borders for scaled coordinates.
        scaling: Shifts and scales of the data.
        shift: [coordinate] shift of the unconstrained latents.
        scale: [coordinate] their scale.
        fewest: Smallest number of rows observed; half of the steps observe all.
        octaves: Waves that describe an input and an output; see :func:`waves`.
        encode: How to read the model's data.
    """

    model: Any
    transform: Unconstrained
    borders: Tensor
    scaling: SetScaling
    shift: Tensor
    scale: Tensor
    fewest: int | None = None
    octaves: tuple[int, int] = (0, 0)
    encode: Encode | None = None

    @property
    def version(self) -> str:
        """Name of the model and the target."""
        return f"{version_of(self.model)}, latents, fewest {self.fewest}"

    def block(self, n: int, *, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Simulate x [n, row, feature], y [n, row] and latents [n, coordinate], all scaled."""
        values, x, y = _scaled_sets(self.model, n, self.scaling, self.encode, rng)
        flat = self.transform.flatten(values)
        return x, y, ((flat.float() - self.shift) / self.scale).to(rng.device)

    def loss(
        self, network: Callable[..., Tensor], rows: tuple[Tensor, ...], *, rng: torch.Generator
    ) -> Tensor:
        """Return the mean of -log P(bar of a coordinate) over coordinates j, ..., D, in nats."""
        x, y, z = rows
        count, coordinates = y.shape[1], z.shape[1]
        known = int(torch.randint(coordinates, (), generator=rng))
        seen = count
        if self.fewest is not None and bool(torch.rand((), generator=rng) < 0.5):
            seen = int(torch.randint(self.fewest, count + 1, (), generator=rng))
            order = torch.randperm(count, generator=rng)[:seen].to(y.device)
            x, y = x[:, order], y[:, order]
        x = waves(x, self.octaves[0])
        x, y, query = latent_tokens(x, y, z[:, :known], coordinates)
        logits = network(x, waves(y.unsqueeze(-1), self.octaves[1]), query)
        bar = _bars_of(self.borders, z[:, known:])
        return functional.cross_entropy(logits.float().flatten(0, 1), bar.flatten())


def latent_tokens(
    x: Tensor, y: Tensor, known: Tensor, coordinates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Join data and known coordinates as tokens; ask for the other coordinates.

    Args:
        x: [data set, row, feature].
        y: [data set, row].
        known: [data set, j] coordinates before j.
        coordinates: Number D of them all.

    Returns:
        Inputs [data set, row + j, feature + D], outputs [data set, row + j] and queries
        [data set, D - j, feature + D].
    """
    n, j = known.shape
    which = torch.eye(coordinates, dtype=x.dtype, device=x.device).expand(n, -1, -1)
    blank = x.new_zeros(n, coordinates, x.shape[-1])
    latent = torch.cat([blank, which], -1)
    data = torch.cat([x, x.new_zeros(*x.shape[:2], coordinates)], -1)
    return torch.cat([data, latent[:, :j]], 1), torch.cat([y, known], 1), latent[:, j:]


def latent_scaling(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return the median and half the central 68 % width of each column of [draw, coordinate]."""
    low, middle, high = torch.quantile(
        flat[:16_000].double(), torch.tensor([0.1587, 0.5, 0.8413], dtype=torch.float64), dim=0
    )
    scale = (high - low) / 2
    if not bool((scale > 0).all()):
        raise DataError("a latent does not vary under the prior; fix it in the model instead")
    return middle.float(), scale.float()


def version_of(model: Any) -> str:
    """Return the name of a prior: the model's ``version``, else its class and options."""
    version = getattr(model, "version", None)
    return version if isinstance(version, str) else type(model).__name__

"""Where EM and Gibbs sampling start: from labels where they speak, else from clusters of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.models.arphmm.lagged import Lagged

__all__ = ["start_responsibilities"]

_ITERATIONS = 20
_FLOOR = 0.05  # share of every responsibility that is spread evenly, so that no state starts empty


def start_responsibilities(
    data: Lagged, states: int, *, ordered: bool, rng: torch.Generator
) -> Tensor:
    """Return responsibilities [N, T, K] to take a first M-step from.

    Rows with informative plausibilities take those, normalised. Elsewhere, states of an ordered
    (left-to-right) chain divide each sequence into consecutive parts at random cuts; states of a
    free chain are k-means clusters of the standardised rows (x_t, y_t), seeded by k-means++.
    """
    guess = _consecutive(data, states, rng) if ordered else _clusters(data, states, rng)
    n, steps = data.usable.shape
    result = torch.nn.functional.one_hot(guess, states).to(data.design)
    result = (1 - _FLOOR) * result + _FLOOR / states
    if data.log_plausibility is not None:
        known = data.log_plausibility.exp()
        informative = (known < known.amax(-1, keepdim=True)).any(-1, keepdim=True)
        agreeing = result * known
        total = agreeing.sum(-1, keepdim=True)
        known = known / known.sum(-1, keepdim=True)
        combined = torch.where(total > 0, agreeing / total.clamp_min(1e-300), known)
        result = torch.where(informative, 0.5 * (combined + known), result)
    valid = torch.arange(steps, device=data.device) < data.lengths[:, None]
    return torch.where(valid[..., None], result, 0.0)


def _consecutive(data: Lagged, states: int, rng: torch.Generator) -> Tensor:
    """Cut every sequence at the same random fractions; returns states [N, T]."""
    shares = -torch.rand(states, generator=rng, dtype=data.design.dtype, device=data.device).log()
    cuts = (0.5 / states + 0.5 * shares / shares.sum()).cumsum(0)[:-1]
    steps = data.usable.shape[1]
    position = torch.arange(steps, dtype=data.design.dtype, device=data.device) + 0.5
    fraction = position / data.lengths[:, None]
    return (fraction[..., None] > cuts).sum(-1)


def _clusters(data: Lagged, states: int, rng: torch.Generator) -> Tensor:
    """k-means clusters [N, T] of the standardised rows; rows that are not usable get cluster 0."""
    rows = data.design[data.usable][:, 1:]
    rows = (rows - rows.mean(0)) / rows.std(0).nan_to_num(1.0).clamp_min(1e-12)
    centres = _spread_out(rows, states, rng)
    cluster = torch.cdist(rows, centres).argmin(1)
    for _ in range(_ITERATIONS):
        onehot = torch.nn.functional.one_hot(cluster, len(centres)).to(rows)
        count = onehot.sum(0)
        centres = torch.where(count[:, None] > 0, onehot.mT @ rows / count[:, None], centres)
        new = torch.cdist(rows, centres).argmin(1)
        if bool((new == cluster).all()):
            break
        cluster = new
    result = torch.zeros(data.usable.shape, dtype=torch.long, device=data.device)
    result[data.usable] = cluster
    return result


def _spread_out(rows: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Choose centres by k-means++ (Arthur and Vassilvitskii 2007)."""
    if len(rows) == 0:
        return rows.new_zeros(count, rows.shape[1])
    first = torch.randint(len(rows), (1,), generator=rng, device=rows.device)
    centres = rows[first]
    while len(centres) < count:
        distance = torch.cdist(rows, centres).amin(1).square()
        if float(distance.sum()) <= 0:  # fewer different rows than centres
            distance = torch.ones_like(distance)
        chosen = torch.multinomial(distance, 1, generator=rng)
        centres = torch.cat([centres, rows[chosen]])
    return centres

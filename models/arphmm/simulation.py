"""Drawing sequences from a switching autoregression."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probkit.model import Values
from probkit.models.arphmm.sequences import Sequences
from probkit.numerics import safe_cholesky
from probkit.rng import Rng, stream

__all__ = ["continue_paths", "simulate_sequences"]


def simulate_sequences(
    values: Values,
    lengths: Sequence[int],
    *,
    order: int,
    history: Tensor | None = None,
    rng: Rng,
) -> tuple[Sequences, tuple[Tensor, ...]]:
    """Draw sequences, and the states behind them.

    Args:
        values: ``initial`` [K], ``transition`` [K, K], ``weights`` [K, D, P], ``covariance``
            [K, D, D].
        lengths: Number of time steps of each sequence, its ``order`` first values included.
        order: Number of lags L.
        history: The first ``order`` values [lag, feature], oldest first; None for zeros.
        rng: Seed or generator.

    Returns:
        The sequences, and their states [time - L] (none for the history).
    """
    generator = stream(rng, "sequences")
    like = values["weights"]
    features = like.shape[1]
    before = like.new_zeros(order, features) if history is None else history.to(like)
    count, longest = len(lengths), max(lengths) - order
    state = torch.multinomial(values["initial"], count, replacement=True, generator=generator)
    values_at, states = continue_paths(
        values, before.expand(count, order, features), state, longest, first=True, rng=generator
    )
    y = tuple(
        torch.cat([before, values_at[n, : length - order]]) for n, length in enumerate(lengths)
    )
    return Sequences(y), tuple(states[n, : length - order] for n, length in enumerate(lengths))


def continue_paths(
    values: Values,
    history: Tensor,
    state: Tensor,
    steps: int,
    *,
    first: bool = False,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw what follows, for many paths at once.

    Args:
        values: Values [*site], or [path, *site] with one set of parameters a path.
        history: The last L values of each path [path, lag, feature], oldest first.
        state: The present state of each path [path].
        steps: Number of steps to draw.
        first: Whether ``state`` is that of the first new step, rather than of the last old one.
        rng: Stream.

    Returns:
        New values [path, step, feature] and states [path, step].
    """
    own = values["weights"].ndim == 4
    factor, _ = safe_cholesky(values["covariance"])
    weights, transition = values["weights"], values["transition"]
    paths, order, features = history.shape
    index = torch.arange(paths, device=history.device)
    lags = history.flip(1).reshape(paths, order * features)
    one = history.new_ones(paths, 1)
    seen, visited = [], []
    for t in range(steps):
        if t > 0 or not first:
            rows = transition[index, state] if own else transition[state]
            state = torch.multinomial(rows, 1, generator=rng)[:, 0]
        noise = torch.randn(paths, features, 1, generator=rng, dtype=lags.dtype, device=lags.device)
        x = torch.cat([one, lags], 1)[..., None]
        w, c = (
            (weights[index, state], factor[index, state])
            if own
            else (weights[state], factor[state])
        )
        y = (w @ x + c @ noise)[..., 0]
        lags = torch.cat([y, lags], 1)[:, : order * features]
        seen.append(y)
        visited.append(state)
    return torch.stack(seen, 1), torch.stack(visited, 1)

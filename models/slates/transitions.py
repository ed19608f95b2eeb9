"""How a user's state moves with the clicks: linear, Markov, GRU, LSTM, and the mean of two.

The state before step t depends on the clicks before t alone; it moves at clicks on real items and
is carried unchanged otherwise. All functions take values with leading dims [*draw].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["States", "unroll", "weight_shapes"]

Transition = Literal["linear", "markov", "gru", "lstm", "lingru"]

_GRU = ("r", "d", "n")
_LSTM = ("i", "f", "g", "o")


class States(NamedTuple):
    """States of users along their steps.

    Attributes:
        read: What scores items, z [*draw, user, step + 1, dim]; the last is after all steps.
        last: The memory after all steps, h [*draw, user, hidden].
    """

    read: Tensor
    last: Tensor


def weight_shapes(kind: Transition, dim: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Return the shape of each weight matrix, gate by gate: from the item, from the memory."""
    gates = {"gru": _GRU, "lingru": _GRU, "lstm": _LSTM}.get(kind, ())
    shapes: dict[str, tuple[int, int]] = {}
    for gate in gates:
        shapes[f"W_i{gate}"] = (hidden, dim)
        shapes[f"W_h{gate}"] = (hidden, hidden)
    if gates:
        shapes["W_z"] = (dim, hidden)
    return shapes


def unroll(
    kind: Transition,
    values: Mapping[str, Tensor],
    clicked: Tensor,
    moves: Tensor,
    start: Tensor,
) -> States:
    """Return the states of users along their steps.

    Args:
        kind: The transition.
        values: Its weights [*draw, ...], or ``gamma`` [*draw].
        clicked: Vector of the item clicked at each step [*draw, user, step, dim]; any finite
            numbers where none was.
        moves: Whether a real item was clicked [*draw, user, step].
        start: Memory before the first step h_0 [*draw, user, hidden].
    """
    if kind == "lingru":
        gru = _gru(values, clicked, moves, start)
        linear = _linear(values, clicked, moves, start)
        return States(0.5 * (gru.read + linear.read), 0.5 * (gru.last + linear.last))
    run = {"linear": _linear, "markov": _markov, "gru": _gru, "lstm": _lstm}[kind]
    return run(values, clicked, moves, start)


def _linear(values: Mapping[str, Tensor], clicked: Tensor, moves: Tensor, start: Tensor) -> States:
    """H' = gamma h + (1 - gamma) v."""
    gamma = values["gamma"][..., None, None]
    state, path = start, [start]
    for t, move in enumerate(moves.unbind(-1)):
        moved = gamma * state + (1 - gamma) * clicked[..., t, :]
        state = torch.where(move[..., None], moved, state)
        path.append(state)
    return States(torch.stack(_alike(path), -2), state)


def _markov(values: Mapping[str, Tensor], clicked: Tensor, moves: Tensor, start: Tensor) -> States:
    """H' = v."""
    state, path = start, [start]
    for t, move in enumerate(moves.unbind(-1)):
        state = torch.where(move[..., None], clicked[..., t, :], state)
        path.append(state)
    return States(torch.stack(_alike(path), -2), state)


def _gru(values: Mapping[str, Tensor], clicked: Tensor, moves: Tensor, start: Tensor) -> States:
    """A gated recurrent unit without biases.

    r = sig(W_ir v + W_hr h); q = sig(W_id v + W_hd h); n = tanh(W_in v + r * (W_hn h));
    h' = (1 - q) * n + q * h; z = W_z h.
    """
    hidden = start.shape[-1]
    inputs = _product(clicked, _stacked(values, "W_i", _GRU))
    from_memory = _stacked(values, "W_h", _GRU)
    state, path = start, [start]
    for t, move in enumerate(moves.unbind(-1)):
        a, b = inputs[..., t, :], state @ from_memory
        gates = torch.sigmoid(a[..., : 2 * hidden] + b[..., : 2 * hidden])
        reset, keep = gates.chunk(2, -1)
        fresh = torch.tanh(a[..., 2 * hidden :] + reset * b[..., 2 * hidden :])
        state = torch.where(move[..., None], fresh + keep * (state - fresh), state)
        path.append(state)
    return States(_product(torch.stack(_alike(path), -2), values["W_z"].mT), state)


def _lstm(values: Mapping[str, Tensor], clicked: Tensor, moves: Tensor, start: Tensor) -> States:
    """A long short-term memory without biases; cell and output both begin at h_0.

    i, f, o = sig(W_i. v + W_h. h); g = tanh(W_ig v + W_hg h); c' = f * c + i * g;
    h' = o * tanh(c'); z = W_z h.
    """
    inputs = _product(clicked, _stacked(values, "W_i", _LSTM))
    from_memory = _stacked(values, "W_h", _LSTM)
    state, cell, path = start, start, [start]
    for t, move in enumerate(moves.unbind(-1)):
        gate_i, gate_f, gate_g, gate_o = (inputs[..., t, :] + state @ from_memory).chunk(4, -1)
        new = torch.sigmoid(gate_f) * cell + torch.sigmoid(gate_i) * torch.tanh(gate_g)
        out = torch.sigmoid(gate_o) * torch.tanh(new)
        cell = torch.where(move[..., None], new, cell)
        state = torch.where(move[..., None], out, state)
        path.append(state)
    return States(_product(torch.stack(_alike(path), -2), values["W_z"].mT), state)


def _stacked(values: Mapping[str, Tensor], prefix: str, gates: tuple[str, ...]) -> Tensor:
    """The matrices of all gates side by side [*draw, in, gate * out], to multiply by."""
    return torch.cat([values[prefix + gate] for gate in gates], -2).mT


def _product(along: Tensor, weight: Tensor) -> Tensor:
    """Vectors [*draw, user, step, in] times a matrix [*draw, in, out]."""
    flat = along.flatten(-3, -2) @ weight
    return flat.unflatten(-2, along.shape[-3:-1])


def _alike(path: list[Tensor]) -> list[Tensor]:
    """Give all states the leading dims of the last; h_0 may have fewer."""
    return [state.expand_as(path[-1]) for state in path]

"""Scores of items for states, and the log probability of the choice made on each slate.

:func:`choice_log_prob` is the fast form: it gathers, scores and normalises block by block and
never holds the vectors of all slots [choice, slot, dim] at once.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = ["catalogue_log_prob", "choice_log_prob", "scores"]

Score = Literal["l2", "dot"]

_CLOSEST = 1e-10  # of squared distances, whose root has no slope at zero
_BLOCK_ENTRIES = {"cpu": 1 << 18, "cuda": 1 << 26}


def scores(kind: Score, state: Tensor, item: Tensor, multiplier: Tensor | None = None) -> Tensor:
    """Return s(z, v) [*batch] of states and items [*batch, dim] that broadcast.

    Args:
        kind: "l2", -|z - v|, or "dot", z . v.
        state: z.
        item: v.
        multiplier: Factor of the scores, broadcast against [*batch]; its absolute value counts.
    """
    if kind == "dot":
        found = (state * item).sum(-1)
    else:
        found = -(state - item).square().sum(-1).clamp_min(_CLOSEST).sqrt()
    return found if multiplier is None else multiplier.abs() * found


def choice_log_prob(
    kind: Score,
    state: Tensor,
    items: Tensor,
    slots: Tensor,
    offset: Tensor,
    no_click: Tensor,
    chosen: Tensor,
    multiplier: Tensor | None = None,
) -> Tensor:
    """Return the log probability [choice] of each choice among no click and the items of slots.

    The logits are ``no_click`` and ``s(z, v) + offset``.

    Args:
        kind: "l2" or "dot".
        state: States z [choice, dim].
        items: Item vectors [row, dim].
        slots: Row of ``items`` in each slot [choice, slot].
        offset: Added to the scores [choice, slot]; -inf for a slot that is not there.
        no_click: Logit of no click [choice].
        chosen: 0 for no click, k for slot k - 1, [choice].
        multiplier: Factor of the scores [], its absolute value counts; None for none.
    """
    factor = state.new_ones(()) if multiplier is None else multiplier.abs()
    result: Tensor = _ChoiceLogProb.apply(
        state, items, no_click, factor, slots, offset, chosen, kind == "l2"
    )
    return result


class _ChoiceLogProb(torch.autograd.Function):
    """Gather, score, log-sum-exp; vectors of slots are gathered again for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        items: Tensor,
        no_click: Tensor,
        factor: Tensor,
        slots: Tensor,
        offset: Tensor,
        chosen: Tensor,
        l2: bool,
    ) -> Tensor:
        raw = torch.empty(slots.shape, dtype=state.dtype, device=state.device)
        for part in _blocks(slots, items.shape[1]):
            vectors = _gathered(items, slots[part])
            if l2:
                squares = vectors.sub_(state[part, None]).square_().sum(-1)
                raw[part] = squares.clamp_min_(_CLOSEST).sqrt_().neg_()
            else:
                raw[part] = (vectors @ state[part, :, None])[..., 0]
        logits = torch.cat([no_click[:, None], factor * raw + offset], 1)
        log_probs = torch.log_softmax(logits, 1)
        ctx.l2 = l2
        ctx.save_for_backward(state, items, factor, slots, raw, log_probs, chosen)
        return log_probs.gather(1, chosen[:, None])[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        state, items, factor, slots, raw, log_probs, chosen = ctx.saved_tensors
        slope = log_probs.exp().neg_()
        slope.scatter_add_(1, chosen[:, None], torch.ones_like(slope[:, :1]))
        slope *= gradient[:, None]
        to_no_click, to_scores = slope[:, 0], slope[:, 1:]
        to_factor = (to_scores * raw).sum()
        weight = to_scores * factor
        if not ctx.l2:
            to_state = _weighted_sum(items, slots, weight)
            to_items = _scattered(state, slots, weight, len(items))
            return to_state, to_items, to_no_click, to_factor, *_NONE
        # d(-|z - v|) / dv = (z - v) / |z - v|, and zero where the distance was raised.
        weight = torch.where(raw < -(_CLOSEST**0.5), weight / -raw, 0.0)
        to_state = _weighted_sum(items, slots, weight) - weight.sum(1, keepdim=True) * state
        ones = torch.ones_like(state[:, :1])
        pull = _scattered(torch.cat([state, ones], 1), slots, weight, len(items))
        to_items = pull[:, :-1] - pull[:, -1:] * items
        return to_state, to_items, to_no_click, to_factor, *_NONE


_NONE = (None,) * 4  # slots, offset, chosen and l2 have no gradient


def _blocks(slots: Tensor, dim: int) -> list[slice]:
    """Cut the choices so that the vectors of a block stay in cache."""
    entries = _BLOCK_ENTRIES.get(slots.device.type, 1 << 26)
    size = max(entries // max(slots.shape[1] * dim, 1), 1)
    return [slice(first, first + size) for first in range(0, len(slots), size)]


def _gathered(items: Tensor, rows: Tensor) -> Tensor:
    """Vectors [choice, slot, dim] of rows [choice, slot]."""
    return items.index_select(0, rows.flatten()).view(*rows.shape, items.shape[1])


def _weighted_sum(items: Tensor, slots: Tensor, weight: Tensor) -> Tensor:
    """sum_s weight_s v_s [choice, dim]."""
    bag = torch.nn.functional.embedding_bag
    return bag(slots, items, per_sample_weights=weight, mode="sum")


def _scattered(state: Tensor, slots: Tensor, weight: Tensor, rows: int) -> Tensor:
    """Sum of weight * z over the slots that show each item [row, dim].

    Slots in the order of their items make it a weighted sum of states for each.
    """
    flat = slots.flatten()
    order = flat.argsort()
    count = torch.bincount(flat, minlength=rows)
    choice = torch.div(order, slots.shape[1], rounding_mode="floor")
    bag = torch.nn.functional.embedding_bag
    begin, weights = count.cumsum(0) - count, weight.flatten()[order]
    return bag(choice, state, begin, per_sample_weights=weights, mode="sum")


def catalogue_log_prob(
    kind: Score,
    state: Tensor,
    items: Tensor,
    no_click: Tensor,
    chosen: Tensor,
    multiplier: Tensor | None = None,
) -> Tensor:
    """Return the log probability [choice] of each choice among no click and all items.

    Args:
        kind: "l2" or "dot".
        state: States z [choice, dim].
        items: Vectors of all items [item, dim].
        no_click: Logit of no click [choice].
        chosen: 0 for no click, k for item k - 1, [choice].
        multiplier: Factor of the scores; None for none.
    """

    def block(state: Tensor, no_click: Tensor, chosen: Tensor) -> Tensor:
        if kind == "dot":
            raw = state @ items.mT
        else:
            mode = "donot_use_mm_for_euclid_dist"
            raw = -torch.cdist(state, items, compute_mode=mode).clamp_min(_CLOSEST**0.5)
        if multiplier is not None:
            raw = multiplier.abs() * raw
        logits = torch.cat([no_click[:, None], raw], 1)
        return torch.log_softmax(logits, 1).gather(1, chosen[:, None])[:, 0]

    size = max((1 << 22) // len(items), 1)
    if len(state) <= size:
        return block(state, no_click, chosen)
    parts = zip(state.split(size), no_click.split(size), chosen.split(size), strict=True)
    # Blocks are scored again for the gradient.
    return torch.cat([checkpoint(block, *part, use_reentrant=False) for part in parts])

"""From next-token log probabilities to drawn tokens, the same way in every back end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.models.language.protocol import Continuation, Law, Prefix
from probkit.rng import seed_of

__all__ = [
    "DEAD_END",
    "allowed_mask",
    "check_pairs",
    "check_request",
    "draw_tokens",
    "law_log_probs",
    "stop_end",
    "uniforms",
]

DEAD_END = Continuation((), "", -float("inf"), -float("inf"), "failed", 0)
"""What comes back where a law allows no token at all: the step cannot be drawn."""


def check_request(
    prefixes: Sequence[Prefix], stop: Sequence[str], max_tokens: int, rng: torch.Generator
) -> None:
    """Check the arguments of ``generate``.

    Raises:
        DataError: One of them cannot be used; the message says which.
    """
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise DataError(f"generate: expected max_tokens >= 1, a whole number, got {max_tokens!r}")
    if isinstance(stop, str) or any(not isinstance(s, str) or not s for s in stop):
        raise DataError(
            f"generate: expected stop to be a sequence of non-empty strings, got {stop!r}"
        )
    if not isinstance(rng, torch.Generator):
        raise DataError(
            f"generate: expected rng to be a torch.Generator, got {rng!r}; "
            "make one with torch.Generator().manual_seed(0)"
        )
    for k, prefix in enumerate(prefixes):
        if not isinstance(prefix, Prefix):
            raise DataError(
                f"generate: expected a Prefix at {k}, got {type(prefix).__name__}; "
                "make one of a prompt with lm.start(prompt)"
            )


def check_pairs(prefixes: Sequence[Prefix], steps: Sequence[Continuation]) -> None:
    """Check the arguments of ``score``.

    Raises:
        ShapeError: Not one step for each prefix.
    """
    if len(prefixes) != len(steps):
        raise ShapeError(
            f"score: expected one step for each prefix, got {len(prefixes)} prefixes and "
            f"{len(steps)} steps"
        )


def uniforms(rng: torch.Generator, n: int, count: int) -> Tensor:
    """Return uniform numbers [n, count], float64; row k is the same for every n > k."""
    if rng.device.type != "cpu":  # Elsewhere the rows of a larger draw are other numbers.
        rng = torch.Generator().manual_seed(seed_of(rng))
    return torch.rand(n, count, generator=rng, dtype=torch.float64)


def allowed_mask(law: Law, prefixes: Sequence[Prefix], size: int) -> Tensor | None:
    """Return which tokens a law allows after each prefix, [n, token]; None where it does not say.

    Raises:
        ShapeError: ``law.allowed`` returned another shape.
    """
    if law.allowed is None:
        return None
    rows = []
    for prefix in prefixes:
        row = torch.as_tensor(law.allowed(prefix), dtype=torch.bool)
        if row.shape != (size,):
            raise ShapeError(
                f"Law.allowed: expected a mask [token] of {size} booleans, one for each entry of "
                f"lm.vocabulary, got shape {list(row.shape)}"
            )
        rows.append(row)
    return torch.stack(rows) if rows else torch.ones(0, size, dtype=torch.bool)


def law_log_probs(log_probs: Tensor, law: Law, mask: Tensor | None = None) -> Tensor:
    """Return the log probabilities of tokens under a law, [..., token].

    Args:
        log_probs: Of the model, [..., token], float64; need not be normalised.
        law: Temperature and nucleus.
        mask: Allowed tokens, [..., token].

    Returns:
        Normalised log probabilities; all minus infinity where nothing is allowed.
    """
    if mask is not None:
        log_probs = log_probs.masked_fill(~mask.to(log_probs.device), -torch.inf)
    dead = (log_probs == -torch.inf).all(-1, keepdim=True)
    if law.temperature == 0.0:
        best = torch.zeros_like(log_probs, dtype=torch.bool)
        best.scatter_(-1, log_probs.argmax(-1, keepdim=True), True)  # The first of equals.
        return torch.zeros_like(log_probs).masked_fill(~best | dead, -torch.inf)
    scaled = torch.log_softmax(log_probs / law.temperature, -1)
    if law.top_p < 1.0:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        probs = ordered.exp()
        before = probs.cumsum(-1) - probs
        kept = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before < law.top_p)
        scaled = torch.log_softmax(scaled.masked_fill(~kept, -torch.inf), -1)
    return scaled.masked_fill(dead, -torch.inf)


def draw_tokens(log_probs: Tensor, u: Tensor) -> Tensor:
    """Invert the distribution function at uniform numbers.

    Args:
        log_probs: Normalised log probabilities [n, token], float64.
        u: In [0, 1), [n].

    Returns:
        Token ids [n]; never one of probability zero, unless all of a row are.
    """
    total = log_probs.exp().cumsum(-1)
    last = total[..., -1:]
    target = torch.minimum(u.to(total.device)[..., None] * last, torch.nextafter(last, 0 * last))
    index = torch.searchsorted(total, target, right=True)[..., 0]
    return index.clamp_max(total.shape[-1] - 1)


def stop_end(text: str, new: int, stop: Sequence[str]) -> bool:
    """Tell whether a stop string ends in the last ``new`` characters of a step's text.

    Example:
        >>> stop_end("one||two", 4, ["||"]), stop_end("one|", 1, ["||"])
        (True, False)
    """
    return any(text.find(s, max(0, len(text) - new - len(s) + 1)) >= 0 for s in stop)

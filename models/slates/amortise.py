"""The law of a user's first state as a function of the clicks: nothing is stored for a user."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["amortised_moments", "click_weights"]

_GUARD = 1e-5  # in both denominators of the published weights


def click_weights(moves: Tensor) -> Tensor:
    """Return the weight of each step's click in a user's first state [user, step].

    Proportional to 1 / (running count of clicks on real items)^4, so that the first click
    dominates; zero where no real item was clicked, and for users without any.

    Args:
        moves: Whether a real item was clicked [user, step].

    Example:
        >>> moves = torch.tensor([[False, True, True, False, True]])
        >>> click_weights(moves)
        tensor([[0.0000, 0.9304, 0.0581, 0.0000, 0.0115]], dtype=torch.float64)
    """
    count = moves.cumsum(-1).double()
    weights = moves / (count**4 + _GUARD)
    return weights / (weights.sum(-1, keepdim=True) + _GUARD)


def amortised_moments(
    clicked: Tensor,
    moves: Tensor,
    factor: Tensor,
    prior_scale: float,
    pseudo_clicks: float,
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation [user, dim] of users' first states.

    The mean is the weighted mean of the vectors of the clicked items (:func:`click_weights`), the
    standard deviation ``factor`` times the root of their variance along each coordinate, plus
    1e-6. Clicks are few, and the variance of one click is zero; so the variance is averaged with
    ``pseudo_clicks`` times the prior's. A user without clicks has the prior.

    Args:
        clicked: Vectors of the items clicked [user, step, dim].
        moves: Whether a real item was clicked [user, step].
        factor: phi [] > 0.
        prior_scale: Standard deviation of the prior.
        pseudo_clicks: Weight of the prior's variance; 0 leaves the variance of the clicks alone.
    """
    weights = click_weights(moves).to(clicked.dtype)
    mean = (weights[..., None] * clicked).sum(-2)
    inside = moves[..., None].to(clicked.dtype)
    count = inside.sum(-2)
    centre = (inside * clicked).sum(-2, keepdim=True) / count[..., None, :].clamp_min(1)
    squares = (inside * (clicked - centre).square()).sum(-2)
    variance = (squares + pseudo_clicks * prior_scale**2) / (count + pseudo_clicks).clamp_min(1e-30)
    scale = factor * (variance + 1e-6).sqrt()
    return mean, torch.where(count > 0, scale, prior_scale)

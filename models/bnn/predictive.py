"""Predictions of Bayesian neural networks: mixtures over draws of the weights."""

from __future__ import annotations

from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal

from probkit.predictive import Empirical, Mixture, Predictive

__all__ = ["mixture_of_categoricals", "mixture_of_functions", "mixture_of_normals"]


def mixture_of_functions(f: Tensor, log_weights: Tensor | None) -> Predictive:
    """Return draws of the network's output [draw, *obs] as they are."""
    return Empirical(f, log_weights)


def mixture_of_normals(
    f: Tensor, sd: Tensor, log_weights: Tensor | None, *, joint: int
) -> Predictive:
    """Return the law of new observations given draws of the network and of the noise.

    Args:
        f: [draw, *obs].
        sd: Noise standard deviation, broadcast against ``f``.
        log_weights: [draw]; None for equal weights.
        joint: How many trailing dims of [*obs] share their draw.
    """
    return _mixture(Normal(f, sd.expand_as(f), validate_args=False), f, log_weights, joint)


def mixture_of_categoricals(
    logits: Tensor, log_weights: Tensor | None, *, joint: int
) -> Predictive:
    """Return the law of new labels given draws of the logits [draw, *obs, class]."""
    laws = Categorical(logits=logits, validate_args=False)
    return _mixture(laws, logits, log_weights, joint)


def _mixture(
    components: Distribution, like: Tensor, log_weights: Tensor | None, joint: int
) -> Predictive:
    if joint:
        components = Independent(components, joint, validate_args=False)
    return Mixture(components, like.new_zeros(len(like)) if log_weights is None else log_weights)

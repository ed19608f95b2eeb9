"""Lower bounds on the log evidence, and their gradients: one draw, many draws, along the path."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from probkit.density import log_joint_of
from probkit.errors import CapabilityError
from probkit.guide import Guide, HasBound, LogQ
from probkit.model import Batch
from probkit.tree import map_tensors

__all__ = ["bound", "elbo", "log_weights"]


def log_weights(
    model: Any, guide: Guide, params: Any, batch: Batch, n: int, rng: torch.Generator
) -> Tensor:
    """Return log p(values, batch; scale) - log q(values) [n] of ``n`` draws from the guide.

    Local terms of both densities are multiplied by the scale of the batch.
    """
    values, log_q = guide.sample(params, model, batch, n, rng=rng)
    log_p = log_joint_of(model, values, batch.data, scale=batch.scale)
    return log_p - log_q.total(batch.scale)


def elbo(
    model: Any, guide: Guide, params: Any, batch: Batch, n: int, rng: torch.Generator
) -> Tensor:
    """Return ``n`` single-draw estimates [n] of the evidence lower bound on ``batch``.

    log p(values, batch; scale) - log q_global - scale * log q_local, values drawn from q. Its mean
    over random batches and draws is the bound on all data (Hoffman et al. 2013, section 2.4). A
    guide that has part of it in closed form gives its own, see
    :class:`~probkit.guide.HasBound`.
    """
    if isinstance(guide, HasBound):
        return guide.elbo(params, model, batch, n, rng=rng)
    return log_weights(model, guide, params, batch, n, rng)


def bound(
    model: Any,
    guide: Guide,
    params: Any,
    batch: Batch,
    n: int,
    rng: torch.Generator,
    *,
    importance: int = 1,
    path: bool = False,
) -> Tensor:
    """Return ``n`` estimates [n] of an evidence lower bound, differentiable in ``params``.

    With K = ``importance`` draws w_1, ..., w_K of p / q, each estimate is log mean_k w_k, whose
    expectation rises with K from the evidence lower bound to the log evidence (Burda, Grosse and
    Salakhutdinov 2016, equation 8). On a minibatch only K = 1 is a bound.

    Args:
        model: A HasLogJoint model.
        guide: The variational family.
        params: Its parameters.
        batch: The data.
        n: Number of estimates.
        rng: Stream of the draws.
        importance: K.
        path: Take the gradient through the draws alone, sum_k (w_k / sum w)^2 d log w_k / d z_k
            dz_k / d params: doubly reparameterised (Tucker et al. 2019, equation 8), and for K = 1
            that of Roeder, Wu and Duvenaud (2017), whose noise vanishes where q is the posterior.
            The guide needs ``log_prob``. The value is the same.

    Example:
        >>> from probkit.inference import MeanField
        >>> from torch.distributions import constraints
        >>> from probkit.model import Site
        >>> class Unit:
        ...     def sites(self, data):
        ...         return {"x": Site((), constraints.real)}
        ...     def log_joint(self, values, data, *, scale=1.0):
        ...         return -0.5 * values["x"].square()
        >>> params = MeanField().init(Unit(), None, rng=0)
        >>> rng = torch.Generator().manual_seed(0)
        >>> bound(Unit(), MeanField(), params, Batch(None), 3, rng, importance=8).shape
        torch.Size([3])
    """
    if path:
        return _path_bound(model, guide, params, batch, n, rng, importance)
    if importance == 1:
        return elbo(model, guide, params, batch, n, rng)
    log_w = log_weights(model, guide, params, batch, n * importance, rng)
    return _log_mean(log_w.reshape(n, importance))


def _log_mean(log_w: Tensor) -> Tensor:
    """Log of the mean weight [n] of log weights [n, K]."""
    return torch.logsumexp(log_w, 1) - math.log(log_w.shape[1])


def _path_bound(
    model: Any,
    guide: Guide,
    params: Any,
    batch: Batch,
    n: int,
    rng: torch.Generator,
    importance: int,
) -> Tensor:
    """The value of the bound, with the gradient through the draws."""
    density = getattr(guide, "log_prob", None)
    if not callable(density):
        raise CapabilityError(
            f"the path gradient needs the guide's log_prob; {type(guide).__name__} lacks it. "
            "Use gradient='total', or one of MeanField, LowRank, FullRank"
        )
    values, _ = guide.sample(params, model, batch, n * importance, rng=rng)
    fixed = map_tensors(Tensor.detach, params)
    log_q: LogQ = density(fixed, model, batch, values)
    log_p = log_joint_of(model, values, batch.data, scale=batch.scale)
    log_w = (log_p - log_q.total(batch.scale)).reshape(n, importance)
    share = torch.softmax(log_w.detach(), 1)
    carrier = (share.square() * log_w).sum(1)
    return _log_mean(log_w).detach() + carrier - carrier.detach()

"""Ensembles in BoTorch: a posterior of members, and the sampler that takes each of them once."""

from __future__ import annotations

from typing import Any

import torch
from botorch.posteriors.ensemble import EnsemblePosterior
from botorch.posteriors.posterior import Posterior
from botorch.posteriors.transformed import TransformedPosterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from torch import Tensor

from probkit.errors import CapabilityError

__all__ = ["ExactEnsembleSampler", "MemberPosterior"]


class MemberPosterior(EnsemblePosterior):
    """An ``EnsemblePosterior`` whose default sampler is :class:`ExactEnsembleSampler`.

    Its variance is that of the mixture of its members, without the small-sample correction: the
    members are the law, not draws of one.
    """

    @property
    def variance(self) -> Tensor:
        """Weighted variance of the members [*batch, q, m]."""
        deviation = self.values - self.mean.unsqueeze(-3)
        return (self.weights[..., None, None] * deviation.square()).sum(-3)


class ExactEnsembleSampler(MCSampler):
    """Take every member of an ensemble as one sample, the same ones everywhere.

    BoTorch's ``IndexSampler`` draws members at random and anew for each t-batch, so that equal
    points get unequal acquisition values. Members of equal weight are here each taken once: Monte
    Carlo acquisition functions become exact averages over the ensemble. Members of unequal weights
    are taken by systematic resampling (Kitagawa 1996), with the same indexes for all t-batches.

    Args:
        sample_shape: How many samples, [n]; None for as many as there are members. A multiple of
            the number of members takes each equally often, so that it stays exact.
        seed: Of the single uniform number that systematic resampling needs.

    Example:
        >>> posterior = MemberPosterior(torch.randn(5, 64, 2, 1))
        >>> ExactEnsembleSampler()(posterior).shape
        torch.Size([64, 5, 2, 1])
    """

    def __init__(self, sample_shape: torch.Size | None = None, seed: int = 0) -> None:
        super().__init__(torch.Size([1]) if sample_shape is None else sample_shape, seed=seed)
        self.exact = sample_shape is None

    def forward(self, posterior: Posterior) -> Tensor:
        """Return samples [*sample, *batch, q, m]."""
        members = _members(posterior)
        if self.exact:
            self.sample_shape = torch.Size([members.ensemble_size])
        index = self._index(members)
        return _take(posterior, index).reshape(
            self.sample_shape + members.batch_shape + members.values.shape[-2:]
        )

    def _index(self, members: EnsemblePosterior) -> Tensor:
        """Choose members [n]."""
        n, size = self.sample_shape.numel(), members.ensemble_size
        if members._weights is None and n % size == 0:
            return torch.arange(n, device=members.device) % size
        generator = torch.Generator().manual_seed(self.seed)
        uniform = torch.rand((), generator=generator, dtype=torch.float64)
        levels = (torch.arange(n, dtype=torch.float64) + uniform) / n
        shares = members.weights.detach().double().cpu().cumsum(-1)
        index = torch.searchsorted(shares, levels).clamp(max=size - 1)
        return index.to(members.device)

    def _update_base_samples(self, posterior: Posterior, base_sampler: MCSampler) -> None:
        """Nothing to do: members do not depend on the points."""


def _members(posterior: Posterior) -> EnsemblePosterior:
    """Find the ensemble below transformations of it."""
    while isinstance(posterior, TransformedPosterior):
        posterior = posterior._posterior
    if not isinstance(posterior, EnsemblePosterior):
        raise CapabilityError(
            f"ExactEnsembleSampler: expected an EnsemblePosterior, got {type(posterior).__name__}; "
            "use botorch's get_sampler"
        )
    return posterior


def _take(posterior: Posterior, index: Tensor) -> Tensor:
    """Return the members ``index`` [n] as [n, *batch, q, m]."""
    if isinstance(posterior, TransformedPosterior):
        transformed: Tensor = posterior._sample_transform(_take(posterior._posterior, index))
        return transformed
    members = _members(posterior).values.movedim(-3, 0)
    same = len(index) == len(members) and bool(
        (index == torch.arange(len(members), device=index.device)).all()
    )
    return members if same else members[index]


@GetSampler.register(MemberPosterior)
def _get_sampler(
    posterior: MemberPosterior, sample_shape: torch.Size, *, seed: int | None = None, **_: Any
) -> MCSampler:
    """Samplers of several outputs must agree in their number of samples: it is kept."""
    return ExactEnsembleSampler(sample_shape, seed=0 if seed is None else seed)

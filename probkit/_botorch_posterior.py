"""A BoTorch posterior for joint Student-t predictives and finite mixtures.

BoTorch optimises Monte Carlo acquisition functions on fixed base samples. Here they are one normal
for the scale and the component, followed by one normal for each point and output::

    s, z_1 ... z_n          n = q * m, all independent standard normals
    u = Phi(s)              picks the component c by inverting the cumulative weights
    v = (u - W_{c-1}) / w_c is uniform again given c, and independent of it
    y = loc_c + a_c sqrt(df_c / chi2_inverse(v; df_c)) L_c z     (no square root for normals)

The scale comes first so that base samples of q points begin those of q + 1 points, as BoTorch
assumes when it adds candidates one by one.
"""

from __future__ import annotations

from typing import Any

import scipy.special
import torch
from botorch.posteriors.posterior import Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import IIDNormalSampler, SobolQMCNormalSampler
from torch import Tensor
from torch.distributions import Distribution
from torch.quasirandom import SobolEngine

from probkit import distributions as D
from probkit.errors import ShapeError
from probkit.numerics import safe_cholesky
from probkit.predictive import Mixture

__all__ = ["PredictivePosterior"]


class PredictivePosterior(Posterior):
    """Joint law of q points and m outputs: a mixture of multivariate normals or Student-t laws.

    Args:
        loc: Locations [component, *batch, q, m].
        scale_tril: Lower factors [component, *batch, q * m, q * m], points before outputs.
        log_weights: [component].
        df: Degrees of freedom [component, *batch]; None for normals.
        amplitude: Factors on the scale [component, *batch]; None for ones. Where only they differ,
            ``loc`` and ``scale_tril`` may have a component dim of size 1.

    Raises:
        ShapeError: The shapes do not match.

    Example:
        >>> loc, one = torch.zeros(1, 3, 1), torch.eye(3)[None]
        >>> post = PredictivePosterior(loc, one, torch.zeros(1), df=torch.tensor([5.0]))
        >>> post.rsample(torch.Size([4])).shape
        torch.Size([4, 3, 1])
    """

    def __init__(
        self,
        loc: Tensor,
        scale_tril: Tensor,
        log_weights: Tensor,
        df: Tensor | None = None,
        amplitude: Tensor | None = None,
    ) -> None:
        entries, batch = loc.shape[-2:].numel(), loc.shape[1:-2]
        factor = (*batch, entries, entries)
        components = {len(loc), len(scale_tril)} - {1, len(log_weights)}
        if components or log_weights.ndim != 1 or scale_tril.shape[1:] != factor:
            raise ShapeError(
                "PredictivePosterior: expected loc [component, *batch, q, m], scale_tril "
                "[component, *batch, q * m, q * m] and log_weights [component], got "
                f"{tuple(loc.shape)}, {tuple(scale_tril.shape)} and {tuple(log_weights.shape)}"
            )
        full = (len(log_weights), *batch)
        one = torch.ones((), dtype=loc.dtype, device=loc.device)
        self.loc = loc
        self.scale_tril = scale_tril
        self.amplitude = (one if amplitude is None else amplitude).expand(full)
        self.df = None if df is None else df.expand(full)
        self.predictive = Mixture(self._components(), log_weights)

    def _components(self) -> Distribution:
        flat = self.loc.flatten(-2)
        if self.df is None:
            return D.ScaledMultivariateNormal(flat, self.scale_tril, self.amplitude)
        return D.MultivariateStudentT(self.df, flat, self.scale_tril, self.amplitude)

    @property
    def device(self) -> torch.device:
        """Device of the locations."""
        return self.loc.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the locations."""
        return self.loc.dtype

    @property
    def event_shape(self) -> torch.Size:
        """Shape (q, m) of one joint draw."""
        return self.loc.shape[-2:]

    @property
    def batch_shape(self) -> torch.Size:
        """The t-batch."""
        return self.loc.shape[1:-2]

    @property
    def mean(self) -> Tensor:
        """Mean [*batch, q, m]."""
        return self._unflatten(self.predictive.mean)

    @property
    def variance(self) -> Tensor:
        """Variance [*batch, q, m]; infinite, with a warning, where df <= 2."""
        return self._unflatten(self.predictive.variance)

    def quantile(self, value: Tensor) -> Tensor:
        """Quantiles [*value, *batch, q, m] of each entry at the levels ``value``."""
        return self._unflatten(self.predictive.quantile(value))

    def density(self, value: Tensor) -> Tensor:
        """Marginal densities [*value, *batch, q, m] of each entry at ``value``."""
        marginal = D.marginals(self.predictive.dist)
        points = value.reshape(*value.shape, *[1] * (len(marginal.batch_shape) - 1))
        points = points.expand(*value.shape, *marginal.batch_shape[1:])
        log_density = D.mixture_log_prob(marginal, self.predictive.log_weights, points)
        return self._unflatten(log_density.exp())

    def _unflatten(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, tuple(self.event_shape))

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return sample_shape + self.batch_shape + self.event_shape

    @property
    def base_sample_shape(self) -> torch.Size:
        """Shape [*batch, 1 + q * m] of the normals behind one draw."""
        return self.batch_shape + torch.Size([1 + self.event_shape.numel()])

    @property
    def batch_range(self) -> tuple[int, int]:
        """Dims of ``base_sample_shape`` along which base samples are shared."""
        return (0, -1)

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Draw [*sample, *batch, q, m] from torch's global stream, differentiably."""
        shape = torch.Size([1]) if sample_shape is None else torch.Size(sample_shape)
        normals = torch.randn(shape + self.base_sample_shape, dtype=self.dtype, device=self.device)
        return self.rsample_from_base_samples(shape, normals)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Map normals [*sample, *batch, 1 + q * m] to draws [*sample, *batch, q, m]."""
        expected = sample_shape + self.base_sample_shape
        if base_samples.shape != expected:
            raise ShapeError(
                f"expected base samples [*sample, *batch, 1 + q * m] = {tuple(expected)}, "
                f"got {tuple(base_samples.shape)}"
            )
        # Dims of the t-batch become one, and the samples another.
        normals = base_samples.reshape(sample_shape.numel(), -1, expected[-1])
        component, uniform = self._pick(normals[..., 0])
        loc = _select(self.loc.flatten(-2), component)
        root = _select(self.scale_tril, component, event_dims=2)
        scale = _select(self.amplitude, component, event_dims=0)
        if self.df is not None:
            df = _select(self.df, component, event_dims=0)
            scale = scale * _inverse_chi(df, uniform).to(scale)
        noise = scale[..., None] * (root @ normals[..., 1:, None]).squeeze(-1)
        return (loc + noise).reshape(self._extended_shape(sample_shape))

    def _pick(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """Turn normals into component numbers and independent uniforms, in double precision."""
        uniform = torch.special.ndtr(normal.detach().double())
        weights = self.predictive.log_weights.detach().double().exp()
        upper = weights.cumsum(0)
        component = torch.searchsorted(upper, uniform.contiguous(), right=True)
        # Rounding may leave the last sum below one; the last component with weight takes the rest.
        component = component.clamp_max(int(weights.nonzero()[-1]))
        rest = (uniform - (upper - weights)[component]) / weights[component]
        eps = torch.finfo(torch.float64).eps
        return component, rest.clamp(eps, 1 - eps)

    def scalarize(self, weights: Tensor, offset: float = 0.0) -> PredictivePosterior:
        """Law of ``offset + sum_k weights_k y_k`` over the outputs, with one output."""
        q, m = self.event_shape
        weights = weights.to(self.loc)
        if m == 1:
            root = weights.abs() * self.scale_tril
        else:
            project = torch.kron(torch.eye(q).to(weights), weights[None])
            covariance = project @ self.scale_tril @ self.scale_tril.mT @ project.mT
            root, _ = safe_cholesky(covariance)
        loc = offset + (self.loc @ weights).unsqueeze(-1)
        log_weights = self.predictive.log_weights
        return PredictivePosterior(loc, root, log_weights, self.df, self.amplitude)


def _select(tensor: Tensor, component: Tensor, event_dims: int = 1) -> Tensor:
    """Take from [component, *batch, *event] the rows ``component`` [sample, batch]."""
    event = tensor.shape[tensor.ndim - event_dims :]
    flat = tensor.reshape(tensor.shape[0], -1, *event)
    if len(flat) == 1:
        return flat
    return flat[component, torch.arange(flat.shape[1], device=tensor.device)]


def _inverse_chi(df: Tensor, uniform: Tensor) -> Tensor:
    """sqrt(df / chi-square quantile of ``uniform``); no derivative in df is needed."""
    half = 0.5 * df.detach().double().cpu()
    chi_square = 2 * scipy.special.gammaincinv(half.numpy(), uniform.cpu().numpy())
    ratio = 2 * half / torch.as_tensor(chi_square).clamp_min(torch.finfo(torch.float64).tiny)
    return ratio.sqrt().to(uniform.device)


@GetSampler.register(PredictivePosterior)
def _get_sampler(
    posterior: PredictivePosterior, sample_shape: torch.Size, *, seed: int | None = None, **_: Any
) -> MCSampler:
    """Sobol base samples, or independent ones where there are too many dims for Sobol."""
    dims = posterior.base_sample_shape[-1]
    kind = SobolQMCNormalSampler if dims <= SobolEngine.MAXDIM else IIDNormalSampler
    return kind(sample_shape=sample_shape, seed=seed)

"""The variational family of sparse scale-mixture classifiers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal

from probkit import distributions as D
from probkit.bijections import bijection
from probkit.files import storable
from probkit.guide import Guide, LogQ, Params
from probkit.kernels import functional
from probkit.model import Batch, Values
from probkit.models.nngp_classification.bound import (
    Whitened,
    gaussian_divergence,
    inducing_factor,
    marginals,
    project,
)
from probkit.models.nngp_classification.data import LabelledData
from probkit.models.nngp_classification.scales import (
    expected_precision,
    fitted_scale,
    scale_divergence,
    scale_nodes,
    start_scale,
)
from probkit.models.scale_laws import InverseGamma, LogNormal, PointMass, ScaleLaw
from probkit.rng import Rng, scope, stream

__all__ = ["FittedScores", "SparseScaleGuide", "score_draws"]

_LOG_2PI = math.log(2 * math.pi)
#: Numbers drawn at a time when a bound or a prediction uses many draws of many rows.
_CHUNK = 2**23


@dataclass(frozen=True)
class FittedScores:
    """Laws of function values ("scores") at some rows, given the shared sigma^2.

    Attributes:
        mean: [row, class].
        variance: [row, class] for sigma^2 = 1.
        scale: Law of sigma^2.
    """

    mean: Tensor
    variance: Tensor
    scale: ScaleLaw

    def components(self) -> tuple[Distribution, Tensor]:
        """Return marginal laws [component, row, class] and the components' weights [component].

        One Student-t law under an inverse gamma, one normal law under a point mass, and normal laws
        at the quadrature nodes of a log-normal sigma^2.
        """
        one = torch.ones(1, dtype=self.mean.dtype, device=self.mean.device)
        if isinstance(self.scale, InverseGamma):
            a, b = self.scale.concentration, self.scale.rate
            spread = (self.variance * b / a).sqrt()[None]
            df = (2 * a).expand_as(spread)
            return D.StudentT(df, self.mean[None], spread, validate_args=False), one
        if isinstance(self.scale, LogNormal):
            nodes, weights = scale_nodes(self.scale)
        else:
            nodes, weights = self.scale.mean[None], one
        spread = (nodes[:, None, None] * self.variance).sqrt()
        return Normal(self.mean.expand_as(spread), spread, validate_args=False), weights


@storable
@dataclass(frozen=True)
class SparseScaleGuide(Guide):
    """q(sigma^2) prod_c N(u_c; mu_c, sigma^2 S_c), the function values elsewhere from the prior.

    q(sigma^2) is an inverse gamma law where the prior is one, the point mass where the prior is
    one, and log-normal otherwise. Its bound on the evidence has the divergences in closed form, and
    draws marginal function values only: no matrix between the rows of a batch is factorised.

    Inducing inputs and kernel hyper-parameters that are learned are parameters of the bound. They
    start at those of the data and the kernel; the model's own ``log_joint`` keeps to these.

    Args:
        covariance: "full" or "diag" matrices S_c.
        whiten: Whether mu_c and S_c are kept in whitened coordinates, u_c = L v_c. A full
            covariance is the same family either way, and much easier to fit whitened; a diagonal
            one is diagonal in the coordinates named here.
        learn: What is learned besides the law itself: ``inducing_inputs``, ``kernel.<name>``.
    """

    covariance: Literal["full", "diag"] = "full"
    whiten: bool = True
    learn: tuple[str, ...] = ("inducing_inputs",)

    # ------------------------------------------------------------------------------ parameters

    def init(self, model: Any, data: LabelledData, *, rng: Rng) -> Params:
        """Return the prior as far as the family holds it; it needs no random numbers."""
        factor = inducing_factor(
            model.kernel, data.inducing, model.jitter, self.kernel_params({}, model)
        )
        count = len(factor)
        params: dict[str, Any] = {
            "scale": start_scale(model.scale, data.x),
            "mean": factor.new_zeros(data.classes, count),
            "log_diagonal": self._start_diagonal(factor).log().repeat(data.classes, 1),
        }
        if self.covariance == "full":
            params["below"] = factor.new_zeros(data.classes, count, count)
            if not self.whiten:
                params["below"] += torch.tril(factor, -1)
        if "inducing_inputs" in self.learn:
            params["inducing_inputs"] = data.inducing.clone()
        kernel = {
            name: bijection(hyper.support).inv(hyper.value.to(factor))
            for name, hyper in functional.hyperparameters(model.kernel).items()
            if f"kernel.{name}" in self.learn
        }
        return {**params, **({"kernel": kernel} if kernel else {})}

    def _start_diagonal(self, factor: Tensor) -> Tensor:
        if self.whiten:
            return torch.ones_like(factor[0])
        if self.covariance == "full":
            return factor.diagonal().clone()
        # Of all diagonal laws the nearest to N(0, K) has the precisions diag K^-1.
        return torch.cholesky_inverse(factor).diagonal().rsqrt()

    def kernel_params(self, params: Params, model: Any) -> dict[str, Tensor]:
        """Return the kernel's hyper-parameters, constrained: learned values, else its own."""
        free = params.get("kernel", {})
        return {
            name: bijection(hyper.support)(free[name]) if name in free else hyper.value
            for name, hyper in functional.hyperparameters(model.kernel).items()
        }

    def _inducing(self, params: Params, data: LabelledData) -> Tensor:
        inputs: Tensor = params.get("inducing_inputs", data.inducing)
        return inputs

    def _prior_factor(self, params: Params, model: Any, data: LabelledData) -> Tensor:
        """Factorise the prior covariance of the inducing values."""
        hyper = self.kernel_params(params, model)
        return inducing_factor(model.kernel, self._inducing(params, data), model.jitter, hyper)

    def _law(self, params: Params, factor: Tensor) -> Whitened:
        """Return the law of the whitened inducing values."""
        mean, diagonal = params["mean"], params["log_diagonal"].exp()
        root = diagonal
        if self.covariance == "full":
            root = torch.tril(params["below"], -1) + torch.diag_embed(diagonal)
        if self.whiten:
            return Whitened(mean, root)
        if self.covariance == "diag":
            root = torch.diag_embed(root)
        mean = torch.linalg.solve_triangular(factor, mean.mT, upper=False).mT
        return Whitened(mean, torch.linalg.solve_triangular(factor, root, upper=False))

    # ------------------------------------------------------------------------------- the bound

    def elbo(self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng) -> Tensor:
        """Return ``n`` estimates [n] of the bound.

        scale * sum_i log softmax(f_i)[y_i] - KL(q(u, sigma^2) || p(u, sigma^2)); each has one
        sigma^2 for all rows and classes.
        """
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "elbo")
        data: LabelledData = batch.data
        factor = self._prior_factor(params, model, data)
        law = self._law(params, factor)
        scores = self._scores(params, model, data, data.x, factor, law)
        divergence = gaussian_divergence(law, expected_precision(scores.scale))
        divergence = divergence + scale_divergence(scores.scale, model.scale)
        likelihood = [
            _log_likelihood(draws, data.labels) for draws in score_draws(scores, n, generator)
        ]
        return batch.scale * torch.cat(likelihood) - divergence

    def scores(self, params: Params, model: Any, data: LabelledData, x: Tensor) -> FittedScores:
        """Return the laws of the scores at ``x`` [row, feature] given sigma^2."""
        factor = self._prior_factor(params, model, data)
        return self._scores(params, model, data, x, factor, self._law(params, factor))

    def _scores(
        self,
        params: Params,
        model: Any,
        data: LabelledData,
        x: Tensor,
        factor: Tensor,
        law: Whitened,
    ) -> FittedScores:
        hyper = self.kernel_params(params, model)
        projection = project(model.kernel, factor, self._inducing(params, data), x, hyper)
        return FittedScores(*marginals(projection, law), fitted_scale(model.scale, params["scale"]))

    # ----------------------------------------------------------------------------------- draws

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw sigma^2, the inducing values, and the scores of the batch given both."""
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "draw")
        data: LabelledData = batch.data
        factor = self._prior_factor(params, model, data)
        law = self._law(params, factor)
        scale = fitted_scale(model.scale, params["scale"])
        variance = _draw_scale(scale, n, generator)
        noise = _normal((n, *law.mean.shape), law.mean, generator)
        if law.is_diagonal:
            step, log_det = law.factor * noise, law.factor.log().sum()
        else:
            step = (law.factor @ noise[..., None]).squeeze(-1)
            log_det = law.factor.diagonal(dim1=-2, dim2=-1).abs().log().sum()
        white = law.mean + variance.sqrt()[:, None, None] * step
        log_det = log_det + data.classes * factor.diagonal().log().sum()
        size = law.mean.numel()
        log_u = -0.5 * (noise.square().sum((-2, -1)) + size * (_LOG_2PI + variance.log())) - log_det
        projection = project(
            model.kernel, factor, self._inducing(params, data), data.x,
            self.kernel_params(params, model),
        )  # fmt: skip
        spread = (variance[:, None] * projection.residual).sqrt()[..., None]
        error = _normal((n, len(data), data.classes), law.mean, generator)
        values = {
            "inducing": (white @ factor.mT).mT,
            "f": (white @ projection.weights).mT + spread * error,
        }
        log_f = -0.5 * (error.square() + _LOG_2PI).sum((-2, -1))
        log_f = log_f - data.classes * spread.squeeze(-1).log().sum(-1)
        if isinstance(scale, PointMass):
            return values, LogQ(log_u, log_f)
        return {"scale_var": variance, **values}, LogQ(log_u + scale.log_prob(variance), log_f)

    def marginals(self, params: Params, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return the law of sigma^2, and under an inverse gamma law that of each inducing value."""
        data = data.data if isinstance(data, Batch) else data
        scale = fitted_scale(model.scale, params["scale"])
        if isinstance(scale, PointMass):
            return {}
        laws: dict[str, Distribution] = {"scale_var": scale}
        if isinstance(scale, InverseGamma):
            factor = self._prior_factor(params, model, data)
            law = self._law(params, factor)
            root = factor @ (torch.diag_embed(law.factor) if law.is_diagonal else law.factor)
            spread = (root.square().sum(-1) * scale.rate / scale.concentration).sqrt()
            df = (2 * scale.concentration).expand_as(spread.mT)
            laws["inducing"] = D.StudentT(df, factor @ law.mean.mT, spread.mT, validate_args=False)
        return laws


def score_draws(scores: FittedScores, n: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield scores [draw, row, class] in parts along the draws, ``n`` in all.

    Rows are independent given sigma^2, which all rows and classes of one draw share.
    """
    size = max(1, _CHUNK // max(1, scores.mean.numel()))
    for start in range(0, n, size):
        count = min(size, n - start)
        variance = _draw_scale(scores.scale, count, generator)[:, None, None]
        noise = _normal((count, *scores.mean.shape), scores.mean, generator)
        yield scores.mean + (variance * scores.variance).sqrt() * noise


def _log_likelihood(draws: Tensor, labels: Tensor) -> Tensor:
    """Return the sum over rows of log softmax(f)[label], [draw], for scores [draw, row, class]."""
    chosen = draws.gather(-1, labels.expand(draws.shape[:-1])[..., None]).squeeze(-1)
    return (chosen - draws.logsumexp(-1)).sum(-1)


def _draw_scale(law: ScaleLaw, n: int, generator: torch.Generator) -> Tensor:
    with scope(rng=generator):
        draws: Tensor = law.rsample(torch.Size([n]))
    return draws


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device)
    return noise.to(like.device)

"""A prior-data fitted network as a BoTorch surrogate whose posterior is the bar distribution."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from botorch.acquisition.acquisition import AcquisitionFunction
from botorch.acquisition.objective import PosteriorTransform, ScalarizedPosteriorTransform
from botorch.models.model import Model
from botorch.posteriors.posterior import Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.transforms import t_batch_mode_transform
from torch import Tensor

from probkit._botorch_model import _refuse_analytic_caller
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.pfn.bars import BarDistribution
from probkit.numerics import check_finite

if TYPE_CHECKING:
    from probkit.models.pfn.predictor import PFN

__all__ = ["BarExpectedImprovement", "BarPosterior", "PFNBotorchModel"]


class PFNBotorchModel(Model):
    """A network conditioned on a data set, as a ``botorch.models.model.Model``.

    Outputs are standardised inside, inputs are taken as they are: the shipped Gaussian-process
    network expects the unit cube. Inputs with fewer columns than the network's features are filled
    with zeros, as in training. The network predicts observations, so its posterior holds noise
    whether ``observation_noise`` is asked for or not.

    Args:
        net: The network.
        x: [row, feature] inputs.
        y: [row] or [row, 1] outputs.

    Raises:
        ShapeError: x has more columns than the network has features, or y does not match.
        DataError: A value is NaN or infinite, or there are no rows.

    Example:
        >>> from probkit.models.pfn import GPPrior, amortize
        >>> net = amortize(GPPrior(rows=12), "tiny", steps=2, bars=20, rng=0)
        >>> model = PFNBotorchModel(net, torch.rand(6, 1), torch.rand(6, 1))
        >>> model.posterior(torch.rand(5, 2, 1)).rsample(torch.Size([3])).shape
        torch.Size([3, 5, 2, 1])
    """

    def __init__(self, net: PFN, x: Tensor, y: Tensor) -> None:
        super().__init__()
        if y.dim() == 2 and y.shape[-1] == 1:
            y = y.squeeze(-1)
        if x.dim() != 2 or y.shape != x.shape[:1]:
            raise ShapeError(
                f"expected x [row, feature] and y [row] or [row, 1], got {tuple(x.shape)} and "
                f"{tuple(y.shape)}; several outputs need a ModelListGP of one model each"
            )
        if not len(y):
            raise DataError("expected at least one row; start from a space-filling design")
        check_finite(x, "x", ("row", "feature"))
        check_finite(y, "y", ("row",))
        self.net = net
        self.train_inputs = (x,)
        self.train_targets = y
        spread = y.std() if len(y) > 1 else torch.zeros_like(y[0])
        self._shift = y.mean()
        self._scale = torch.where(spread > 1e-12, spread, torch.ones_like(spread))
        self._x = self._padded(x)
        self._y = ((y - self._shift) / self._scale).float()

    def _padded(self, x: Tensor) -> Tensor:
        features = self.net.features
        if x.shape[-1] > features:
            raise ShapeError(
                f"the network takes up to {features} features, got {x.shape[-1]}; train one for "
                "more, or drop some"
            )
        blank = x.new_zeros(*x.shape[:-1], features - x.shape[-1])
        return torch.cat([x, blank], -1).float()

    @property
    def batch_shape(self) -> torch.Size:
        """Empty: there is one data set."""
        return torch.Size()

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    def law(self, X: Tensor) -> BarDistribution:
        """Return the marginal laws [*batch, q] at X [*batch, q, d], on the scale of y."""
        if X.dim() < 2 or X.shape[-1] != self.train_inputs[0].shape[-1]:
            raise ShapeError(
                f"posterior: expected X [*batch, q, d={self.train_inputs[0].shape[-1]}], "
                f"got {tuple(X.shape)}"
            )
        flat = X.reshape(-1, X.shape[-1])
        query = self._padded(flat)[None]
        law = self.net.predict_sets(self._x[None], self._y[None], query)
        borders = law.borders.to(X) * self._scale.to(X) + self._shift.to(X)
        logits = law.logits.to(X).reshape(*X.shape[:-1], -1)
        return BarDistribution(borders, logits, validate_args=False)

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **_: Any,
    ) -> BarPosterior:
        """Predict at X [*batch, q, d].

        Args:
            X: Inputs.
            output_indices: [0] or None.
            observation_noise: True or False; the network's law holds noise in any case.
            posterior_transform: A scalarisation, or None.

        Raises:
            CapabilityError: The caller is an analytic acquisition function for Gaussians, or the
                transform is no scalarisation.
        """
        if output_indices is not None and list(output_indices) not in ([0], [-1]):
            raise DataError(f"output_indices: expected [0], got {list(output_indices)}")
        if isinstance(observation_noise, Tensor):
            raise CapabilityError("observation_noise: expected True or False, got a tensor")
        _refuse_analytic_caller(sys._getframe(1), "BarPosterior")
        posterior = BarPosterior(self, X)
        if posterior_transform is None:
            return posterior
        if not isinstance(posterior_transform, ScalarizedPosteriorTransform):
            raise CapabilityError(
                f"{type(posterior_transform).__name__} needs a Gaussian posterior, got bars; use "
                "an MCAcquisitionObjective in its place"
            )
        weight = float(posterior_transform.weights)
        return BarPosterior(self, X, weight, float(posterior_transform.offset))

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> PFNBotorchModel:
        """Return the model given more rows X [row, d], Y [row, 1]; one forward pass, no fitting."""
        if kwargs or X.dim() != 2:
            raise CapabilityError(
                "condition_on_observations: expected X [row, d] and Y [row, 1] and nothing else, "
                f"got {tuple(X.shape)} and {sorted(kwargs)}"
            )
        y = Y.squeeze(-1) if Y.dim() == 2 else Y
        return PFNBotorchModel(
            self.net,
            torch.cat([self.train_inputs[0], X]),
            torch.cat([self.train_targets, y]),
        )

    def subset_output(self, idcs: Sequence[int]) -> PFNBotorchModel:
        """Return the model itself: there is one output."""
        if list(idcs) not in ([0], [-1]):
            raise DataError(f"subset_output: expected [0], got {list(idcs)}")
        return self

    def fantasize(self, X: Tensor, sampler: Any, **kwargs: Any) -> PFNBotorchModel:
        """Refuse: fantasies need a batch of data sets.

        Raises:
            CapabilityError: Always; the message names acquisition functions that do without.
        """
        raise CapabilityError(
            "fantasies (qKnowledgeGradient, multi-step look-ahead) need batched conditioning; use "
            "qLogExpectedImprovement, qLogNoisyExpectedImprovement or BarExpectedImprovement"
        )


class BarPosterior(Posterior):
    """Bar distributions at q points; joint draws by feeding each point's draw to the next.

    Args:
        model: The conditioned network.
        X: [*batch, q, d] the points.
        weight: Factor on the output.
        offset: Added to it.
    """

    def __init__(
        self, model: PFNBotorchModel, X: Tensor, weight: float = 1.0, offset: float = 0.0
    ) -> None:
        self._model = model
        self._x = X
        self._weight, self._offset = weight, offset
        self.law = model.law(X)

    @property
    def device(self) -> torch.device:
        """Device of the points."""
        return self._x.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the points."""
        return self._x.dtype

    @property
    def event_shape(self) -> torch.Size:
        """(q, 1)."""
        return torch.Size([self._x.shape[-2], 1])

    @property
    def batch_shape(self) -> torch.Size:
        """The t-batch."""
        return self._x.shape[:-2]

    @property
    def mean(self) -> Tensor:
        """Mean [*batch, q, 1]."""
        return (self._offset + self._weight * self.law.mean).unsqueeze(-1)

    @property
    def variance(self) -> Tensor:
        """Variance [*batch, q, 1]."""
        return (self._weight**2 * self.law.variance).unsqueeze(-1)

    def quantile(self, value: Tensor) -> Tensor:
        """Quantiles [*value, *batch, q, 1] at the levels ``value``."""
        levels = value if self._weight >= 0 else 1 - value
        return (self._offset + self._weight * self.law.quantile(levels)).unsqueeze(-1)

    def density(self, value: Tensor) -> Tensor:
        """Densities [*value, *batch, q, 1] at ``value``."""
        points = (value - self._offset) / self._weight
        points = points.reshape(*value.shape, *[1] * len(self.law.batch_shape))
        return (self.law.log_prob(points).exp() / abs(self._weight)).unsqueeze(-1)

    def _extended_shape(self, sample_shape: torch.Size = torch.Size()) -> torch.Size:  # noqa: B008
        return sample_shape + self.batch_shape + self.event_shape

    @property
    def base_sample_shape(self) -> torch.Size:
        """Shape [*batch, q, 1] of the normals behind one draw."""
        return self._extended_shape()

    @property
    def batch_range(self) -> tuple[int, int]:
        """Dims of ``base_sample_shape`` along which base samples are shared."""
        return (0, -2)

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Draw [*sample, *batch, q, 1] from torch's global stream, differentiably."""
        shape = torch.Size([1]) if sample_shape is None else torch.Size(sample_shape)
        normals = torch.randn(shape + self.base_sample_shape, dtype=self.dtype, device=self.device)
        return self.rsample_from_base_samples(shape, normals)

    def rsample_from_base_samples(self, sample_shape: torch.Size, base_samples: Tensor) -> Tensor:
        """Map normals [*sample, *batch, q, 1] to draws of the same shape."""
        expected = sample_shape + self.base_sample_shape
        if base_samples.shape != expected:
            raise ShapeError(
                f"expected base samples [*sample, *batch, q, 1] = {tuple(expected)}, "
                f"got {tuple(base_samples.shape)}"
            )
        unit = torch.special.ndtr(base_samples.squeeze(-1)).clamp(1e-6, 1 - 1e-6)
        q = self._x.shape[-2]
        drawn = self.law.icdf(unit) if q == 1 else self._chain(sample_shape, unit)
        return (self._offset + self._weight * drawn).unsqueeze(-1)

    def _chain(self, sample_shape: torch.Size, unit: Tensor) -> Tensor:
        """Draw q dependent points: one data set for each sample and element of the t-batch."""
        model, q = self._model, self._x.shape[-2]
        query = model._padded(self._x).expand(*sample_shape, *self._x.shape[:-1], -1)
        query = query.reshape(-1, q, query.shape[-1])
        n = len(query)
        x = model._x.expand(n, *model._x.shape)
        y = model._y.expand(n, -1)
        drawn = model.net.chain(x, y, query, unit.reshape(n, q).float()).to(self.dtype)
        drawn = drawn * model._scale.to(drawn) + model._shift.to(drawn)
        return drawn.reshape(unit.shape)


@GetSampler.register(BarPosterior)
def _get_sampler(
    posterior: BarPosterior, sample_shape: torch.Size, *, seed: int | None = None, **_: Any
) -> MCSampler:
    """Sobol base samples."""
    return SobolQMCNormalSampler(sample_shape=sample_shape, seed=seed)


class BarExpectedImprovement(AcquisitionFunction):
    """Expected improvement in closed form, from the bars themselves; no normal approximation.

    Args:
        model: The conditioned network.
        best_f: The value to improve on (maximising).

    Example:
        >>> from probkit.models.pfn import GPPrior, amortize
        >>> net = amortize(GPPrior(rows=12), "tiny", steps=2, bars=20, rng=0)
        >>> model = net.to_botorch(torch.rand(6, 1), torch.rand(6))
        >>> BarExpectedImprovement(model, best_f=0.9)(torch.rand(4, 1, 1)).shape
        torch.Size([4])
    """

    def __init__(self, model: PFNBotorchModel, best_f: float | Tensor) -> None:
        super().__init__(model=model)
        self.register_buffer("best_f", torch.as_tensor(best_f, dtype=torch.float64))

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X: Tensor) -> Tensor:
        """Return the expected improvement [*batch] at X [*batch, 1, d]."""
        law = self.model.law(X)
        return law.expected_improvement(self.best_f.to(X)).squeeze(-1)

"""A Gaussian process that leans on a language model as far as the data allow.

What a language model says about points becomes a prior mean: f(x) = a m(x) + g(x), with m the
model's predictions freed from the scatter of its answers, g a Gaussian process and a in [0, 1] the
trust. Each trust of a few is a model
of its own, a = 0 the plain Gaussian process among them; their posterior probabilities given the
data (marginal likelihoods at the modes of the hyper-parameters, times prior probabilities) mix
them. At points with outcomes, m is what was predicted without that outcome, so copying the history
earns no trust. Where the plain process is more probable than all others together, it stands alone:
the guard that keeps a wrong language model from costing more than a few evaluations.

The alternative, stacking (Yao, Vehtari, Simpson and Gelman 2018), mixes the process with the
calibrated language model itself, weighted by what predicts left-out outcomes best.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior as BotorchPosterior
from gpytorch.distributions import MultivariateNormal
from linear_operator import to_linear_operator
from torch import Tensor

from probkit.bo.llm.calibration import SigmaCalibration, fit_calibration
from probkit.bo.surrogates.auto import StackedSurrogate
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.dense_gp import DenseGP
from probkit.bo.surrogates.gp import GPSurrogate
from probkit.bo.surrogates.gp_fit import log_posterior
from probkit.bo.surrogates.loo import loo_log_density, stacking_weights
from probkit.errors import DataError, ShapeError
from probkit.numerics import check_finite
from probkit.rng import scope

__all__ = ["Hybrid", "LanguageModelAlone", "LeaningGP", "Said", "fit_hybrid"]

_SAME = 1e-9
_FLOOR = 1e-3  # Smallest scale of what is left of the outcomes, as a share of their own.
_NEGLIGIBLE = 0.01

Method = Literal["trust", "stack"]


class Said(NamedTuple):
    """What a language model said about points, on the scale of the outcomes.

    Attributes:
        X: Points [point, feature].
        mean: Its predictions [point].
        sd: Their standard deviations [point].
    """

    X: Tensor
    mean: Tensor
    sd: Tensor

    @classmethod
    def nothing(cls, features: int) -> Said:
        """Return no points."""
        empty = torch.empty(0, dtype=torch.float64)
        return cls(torch.empty(0, features, dtype=torch.float64), empty, empty.clone())

    def check(self) -> Said:
        """Return it in double precision.

        Raises:
            ShapeError: Shapes that do not match.
            DataError: Numbers that are not finite, or negative standard deviations.
        """
        X, mean, sd = (part.double() for part in self)
        if X.ndim != 2 or not mean.shape == sd.shape == X.shape[:1]:
            raise ShapeError(
                "said: expected X [point, feature], mean [point] and sd [point], got "
                f"{tuple(X.shape)}, {tuple(mean.shape)} and {tuple(sd.shape)}"
            )
        check_finite(X, "said.X", ("point", "feature"))
        check_finite(mean, "said.mean", ("point",))
        check_finite(sd, "said.sd", ("point",))
        if bool((sd < 0).any()):
            raise DataError(f"said.sd: expected standard deviations >= 0, got {float(sd.min()):g}")
        return Said(X, mean, sd)

    def __or__(self, other: Said) -> Said:
        """Return both; where both speak of a point, ``other`` counts."""
        old = ~(places(self.X, other.X) >= 0)
        return Said(*(torch.cat([a[old], b]) for a, b in zip(self, other, strict=True)))

    def at(self, X: Tensor) -> Said:
        """Return what was said about points [point, feature] among those known."""
        where = places(X, self.X)
        if bool((where < 0).any()):
            row = int((where < 0).nonzero()[0])
            raise DataError(f"nothing was said about point {row}: {X[row].tolist()}")
        return Said(X, self.mean[where], self.sd[where])


def places(X: Tensor, table: Tensor) -> Tensor:
    """Return the row of ``table`` that equals each point, [*lead]; -1 where none does."""
    if not len(table):
        return torch.full(X.shape[:-1], -1, dtype=torch.long)
    gap = (X.detach()[..., None, :] - table).abs().amax(-1)
    nearest = gap.min(-1)
    return torch.where(nearest.values < _SAME, nearest.indices, -1)


class _Mean:
    """The language model's mean as a smooth function.

    Answers scatter from question to question. A Gaussian process with learned noise through all
    that was said separates the function from the scatter, and carries it to points that were not
    asked about: predictions there cost no question and have gradients.
    """

    def __init__(self, said: Said, data: TrainingData) -> None:
        self.said, self._data = said, data
        self._carrier: DenseGP | None = None

    def add(self, said: Said) -> None:
        """Take note of more."""
        self.said, self._carrier = self.said | said, None

    def __call__(self, X: Tensor) -> Tensor:
        """Return the mean [*batch, q] at points [*batch, q, feature]."""
        if self._carrier is None:
            heard = replace(
                self._data, X=self.said.X, Y=self.said.mean[:, None], Yvar=None,
                outcome="standardize",
            )  # fmt: skip
            with torch.enable_grad():
                self._carrier = GPSurrogate().fit(heard, rng=0)
        mean: Tensor = self._carrier.posterior(X.unsqueeze(-2)).mean
        return mean[..., 0, 0]


class _NormalModel(Model):
    """A BoTorch model of one output whose predictions are jointly normal, given their law."""

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    @property
    def batch_shape(self) -> torch.Size:
        """Empty."""
        return torch.Size()

    @abstractmethod
    def _law(self, X: Tensor, observation_noise: bool | Tensor) -> MultivariateNormal:
        """The law of the q points of each t-batch ``X`` [*batch, q, feature]."""

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **_: Any,
    ) -> BotorchPosterior:
        """Predict jointly at the q points of each t-batch ``X`` [*batch, q, feature]."""
        result = GPyTorchPosterior(self._law(X, observation_noise))
        if posterior_transform is not None:
            return posterior_transform(posterior=result, X=X)
        return result


class LeaningGP(_NormalModel):
    """trust * m(x) + offset + scale * g(x), with g a Gaussian process fitted to what is left.

    Args:
        data: The history.
        mean: m.
        trust: Its factor.
        spec: Options of g.
        previous: Hyper-parameters of g to start from.
    """

    def __init__(
        self,
        data: TrainingData,
        mean: _Mean,
        trust: float,
        spec: GPSurrogate,
        previous: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._data, self._mean, self.trust, self._spec = data, mean, trust, spec
        self.offset, self.scale = 0.0, 1.0
        self.process: DenseGP = self._fitted(previous)

    def refresh(self) -> None:
        """Fit g again, after the mean has changed."""
        self.process = self._fitted(self.process.warm_state)

    def _fitted(self, previous: Mapping[str, Any] | None) -> DenseGP:
        with torch.no_grad():
            said = self._mean(self._data.X[:, None])[:, 0]
        rest, self.offset, self.scale = _rest(self._data, self.trust * said)
        with torch.enable_grad():
            return self._spec.fit(rest, previous=previous, rng=0)

    def _law(self, X: Tensor, observation_noise: bool | Tensor) -> MultivariateNormal:
        law = self.process.posterior(X, observation_noise=observation_noise).distribution
        mean = self.trust * self._mean(X) + self.offset + self.scale * law.mean
        covariance = to_linear_operator(self.scale**2 * law.covariance_matrix)
        return MultivariateNormal(mean, covariance)


def _rest(data: TrainingData, explained: Tensor) -> tuple[TrainingData, float, float]:
    """What is left of the outcomes in units of its own, and the offset and scale of those."""
    left = data.Y[:, 0] - explained
    offset = float(left.mean())
    scale = max(float(left.std()), _FLOOR * float(data.Y[:, 0].std())) or 1.0
    rest = replace(
        data,
        Y=((left - offset) / scale)[:, None],
        Yvar=None if data.Yvar is None else data.Yvar / scale**2,
        outcome="none",
    )
    return rest, offset, scale


class LanguageModelAlone(_NormalModel):
    """What the language model says, with calibrated standard deviations, points independent.

    Args:
        mean: The language model's mean.
        calibration: Of its standard deviations.
    """

    def __init__(self, mean: Any, calibration: SigmaCalibration) -> None:
        super().__init__()
        self._mean, self.calibration = mean, calibration

    def _law(self, X: Tensor, observation_noise: bool | Tensor) -> MultivariateNormal:
        """Points that it was not asked about take the middle of its standard deviations."""
        mean = self._mean(X)
        said: Said = self._mean.said
        where = places(X, said.X)
        sd = torch.where(where >= 0, said.sd[where.clamp_min(0)], said.sd.median())
        variance = self.calibration.sd(sd).square()
        covariance = to_linear_operator(torch.diag_embed(variance))
        return MultivariateNormal(mean, covariance)


@dataclass(eq=False)
class Hybrid:
    """A fitted hybrid.

    Attributes:
        base: The plain Gaussian process.
        model: What predicts: ``base`` itself where the language model is not trusted, else a
            mixture.
        weights: Posterior probabilities (or stacking weights) by member: ``"gp"``, then
            ``"trust 0.5"``, ... or ``"language model"``.
        warm_state: Hyper-parameters for the next fit, by member.
        calibration: Of the language model's standard deviations; None where it said nothing.
    """

    base: DenseGP
    model: Model
    weights: dict[str, float]
    warm_state: dict[str, Any]
    calibration: SigmaCalibration | None = None
    mean: Any = None

    @property
    def trusted(self) -> bool:
        """Whether the language model has any say."""
        return self.model is not self.base

    def hear(self, said: Said) -> None:
        """Take note of what the language model said about more points."""
        if self.mean is None or not len(said.mean):
            return
        self.mean.add(said.check())
        for member in self.model.modules():
            if isinstance(member, LeaningGP):
                member.refresh()


def fit_hybrid(
    data: TrainingData,
    said: Said | None,
    *,
    method: Method = "trust",
    trusts: Sequence[float] = (0.5, 1.0),
    prior: float = 0.9,
    noise: str = "learned",
    previous: Mapping[str, Any] | None = None,
) -> Hybrid:
    """Fit a Gaussian process with and without the language model, and weigh them.

    Args:
        data: One output.
        said: What the language model said about each row without having seen its outcome; more
            points may be among them. None, or rows that it said nothing about, leave the plain
            process.
        method: "trust" for a prior mean with a learned factor, "stack" for a mixture with the
            language model itself.
        trusts: Factors above 0 that are tried.
        prior: Prior probability of the plain process; the others share the rest. A language model
            is used once their probability exceeds its own.
        noise: "learned" or "none", as for :class:`~probkit.bo.surrogates.gp.GPSurrogate`.
        previous: ``warm_state`` of the last fit.

    Raises:
        DataError: Options out of range, several outputs.

    Example:
        >>> from probkit.bo.surrogates.data import training_data
        >>> X = torch.rand(8, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> y = (12 * X[:, 0]).sin()
        >>> told = Said(X, y + 0.01, torch.full_like(y, 0.1))
        >>> fit_hybrid(training_data(X, y), told).trusted
        True
        >>> fit_hybrid(training_data(X, y), told._replace(mean=-y)).trusted
        False
    """
    if data.outputs != 1:
        raise DataError(f"a hybrid predicts one output, got {data.outputs}; fit one for each")
    if method not in ("trust", "stack"):
        raise DataError(f"method: expected 'trust' or 'stack', got {method!r}")
    if not 0 < prior < 1:
        raise DataError(f"prior: expected a probability in (0, 1), got {prior!r}")
    if not all(0 < t <= 2 for t in trusts) or len(set(trusts)) < len(trusts) or not trusts:
        raise DataError(f"trusts: expected distinct factors in (0, 2], got {list(trusts)}")
    old = dict(previous or {})
    spec = GPSurrogate(noise=noise)  # type: ignore[arg-type]
    base = spec.fit(data, previous=old.get("gp"), rng=0)
    plain = Hybrid(base, base, {"gp": 1.0}, {"gp": base.warm_state})
    if said is None:
        return plain
    said = said.check()
    where = places(data.X, said.X)
    if bool((where < 0).any()):
        return plain
    own = said.at(data.X)
    plain.calibration = fit_calibration(own.mean, own.sd, data.Y[:, 0])
    plain.mean = _Mean(said, data)
    if method == "stack":
        return _stacked(plain, data, own, plain.calibration)
    return _leaning(plain, data, own, trusts, prior, spec, old)


def _leaning(
    plain: Hybrid,
    data: TrainingData,
    said: Said,
    trusts: Sequence[float],
    prior: float,
    spec: GPSurrogate,
    old: Mapping[str, Any],
) -> Hybrid:
    """Mix processes that lean on the mean by different factors, by their posterior probability.

    The evidence comes from what was said itself, whose scatter is a noise to be learned even where
    outcomes are exact; the plain process may take that freedom or leave it. Predictions come from
    the smooth mean.
    """
    names = ["gp", *(f"trust {trust:g}" for trust in trusts)]
    exact = spec.noise == "none" or (data.Yvar is not None and not bool(data.Yvar.any()))
    rough = GPSurrogate(kernel="matern" if exact else "auto")
    scores = []
    for name, trust in zip(names, (0.0, *trusts), strict=True):
        rest, _, scale = _rest(replace(data, Yvar=None), trust * said.mean)
        process = rough.fit(rest, previous=old.get(f"evidence {name}"), rng=0)
        plain.warm_state[f"evidence {name}"] = process.warm_state
        scores.append(_log_joint(process) - len(said.mean) * math.log(scale))
    own = plain.base.outcome_transform.stdvs.reshape(())
    scores[0] = max(scores[0], _log_joint(plain.base) - len(data.Y) * math.log(float(own)))
    for k in range(len(scores)):
        scores[k] += math.log(prior if k == 0 else (1 - prior) / len(trusts))
    weights = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
    plain.weights = dict(zip(names, weights.tolist(), strict=True))
    if not float(weights[0]) < 0.5:
        return plain
    members: list[Model] = []
    for name, trust, weight in zip(names, (0.0, *trusts), weights.tolist(), strict=True):
        if weight < _NEGLIGIBLE:
            continue
        if not trust:
            members.append(plain.base)
            continue
        member = LeaningGP(data, plain.mean, trust, spec, old.get(name))
        plain.warm_state[name] = member.process.warm_state
        members.append(member)
    return _mixed(plain, members, weights[weights >= _NEGLIGIBLE])


def _log_joint(process: DenseGP) -> float:
    """Log evidence at the mode of the hyper-parameters, their prior included, in units of fit."""
    process.train()
    try:
        with torch.no_grad(), scope(quiet=True):
            return float(log_posterior(process))
    finally:
        process.eval()


def _stacked(
    plain: Hybrid, data: TrainingData, said: Said, calibration: SigmaCalibration
) -> Hybrid:
    """Mix the process with the language model by the weights that predict left-out rows best."""
    y = data.Y[:, 0]
    own = plain.base.outcome_transform.stdvs.reshape(())
    with torch.no_grad():
        process = loo_log_density(plain.base) - own.log()
    rows = torch.arange(len(y))
    sds = [
        fit_calibration(said.mean[rows != k], said.sd[rows != k], y[rows != k]).sd(said.sd[k])
        for k in rows.tolist()
    ]
    sd = torch.stack(sds)
    z = (y - said.mean) / sd
    model = -0.5 * z.square() - sd.log() - 0.5 * math.log(2 * math.pi)
    weights = stacking_weights(torch.stack([process, model])).double()
    plain.weights = {"gp": float(weights[0]), "language model": float(weights[1])}
    if float(weights[1]) < _NEGLIGIBLE or not float(model.sum()) > float(process.sum()):
        return plain
    alone = LanguageModelAlone(plain.mean, calibration)
    return _mixed(plain, [plain.base, alone], weights)


def _mixed(plain: Hybrid, members: Sequence[Model], weights: Tensor) -> Hybrid:
    model = StackedSurrogate(members, weights)
    model.eval()
    return replace(plain, model=model)

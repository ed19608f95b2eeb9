"""Classification with a scale mixture of Gaussian processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar, Literal

import gpytorch
import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints

from probkit import distributions as D
from probkit.errors import CapabilityError, DataError
from probkit.files import register
from probkit.guide import Guide
from probkit.kernels import functional
from probkit.kernels.storing import kernel_config, kernel_from_config
from probkit.model import Batch, Model, Site, Values
from probkit.models.nngp import ScaleMixtureNNGP
from probkit.models.nngp_classification.bound import Projection, inducing_factor, project
from probkit.models.nngp_classification.data import LabelledData, check_inputs, labelled
from probkit.models.nngp_classification.guide import FittedScores, SparseScaleGuide, score_draws
from probkit.models.nngp_classification.labels import LabelLaw, largest_score, mean_log_softmax
from probkit.models.nngp_classification.scales import check_law
from probkit.models.scale_laws import InverseGamma, PointMass, ScaleLaw, as_scale_law
from probkit.posterior import Posterior
from probkit.predictive import Analytic, Mixture, Predictive
from probkit.rng import Rng, require_rng, stream
from probkit.sampler import Sampler
from probkit.sources import Draws, Fitted

__all__ = ["ScaleMixtureClassifier"]

_LOG_2PI = math.log(2 * math.pi)
_SCALE = "scale_var"
_INPUTS = "inducing_inputs"
_OPTIONS = (
    *("scale", "inducing", "covariance", "likelihood", "whiten", "learn", "jitter", "noise_var"),
    *("classes", "draws"),
)


@dataclass(frozen=True, eq=False)
class ScaleMixtureClassifier(Model):
    """Classification with class scores f_c | sigma^2 ~ GP(0, sigma^2 K), one sigma^2 for all.

    With the categorical likelihood, y_i ~ softmax(f(x_i)), the posterior is variational: inducing
    values at M inputs with q(u, sigma^2) = q(sigma^2) prod_c N(u_c; mu_c, sigma^2 S_c), fitted on
    minibatches by :class:`~probkit.inference.SVI` (Lee, Yun, Yang and Lee, "Scale Mixtures of
    Neural Network Gaussian Processes", ICLR 2022). The probabilities of a prediction are averages
    over ``draws`` draws of sigma^2 and the scores.

    With the Gaussian likelihood the scores are regressed on the one-hot labels minus 1 / C, exactly
    (see :class:`ScaleMixtureNNGP`), and the probability of a class is that of its score, noise
    included, to be the largest. It is quick, needs memory for the N x N Gram matrix, and is a
    likelihood of numbers where labels were observed: its ``log_evidence`` is that of the targets.

    Args:
        kernel: Covariance of the scores for sigma^2 = 1, a GPyTorch kernel.
        scale: Law of the VARIANCE sigma^2 (``HalfCauchy``: of sigma). ``PointMass(1.0)`` is the
            ordinary sparse variational classifier. A law that is neither gets a log-normal q.
        inducing: Number of inducing inputs, chosen among the rows, equally many of each class as
            far as there are; or the inputs themselves [inducing, feature].
        covariance: "full" or "diag" matrices S_c.
        likelihood: "categorical" or "gaussian".
        whiten: Keep mu_c and S_c in whitened coordinates; see :class:`SparseScaleGuide`.
        learn: What is fitted besides the posterior, out of ``inducing_inputs`` and the kernel's
            hyper-parameters ``kernel.<name>``. None: the inducing inputs. With the Gaussian
            likelihood the names of :meth:`ScaleMixtureNNGP.hyper_sites`; None: all of these, where
            ``Direct(hyper=...)`` asks for a fit.
        jitter: Added to the diagonal of K_zz in units of its mean, everywhere the same.
        noise_var: Noise of the Gaussian likelihood, relative to sigma^2.
        classes: Number of classes C; None for the largest label plus one.
        draws: Draws behind each predicted probability; its standard error is below
            0.5 / sqrt(draws).

    Data is a pair (X [row, feature], labels [row] from 0 to C - 1). ``infer(model, data, rng=0)``
    runs SVI on batches of 100 rows, or Direct for the Gaussian likelihood. A
    :class:`~probkit.loader.Loader` gives batches ``LabelledData.rows(index)`` of prepared data, so
    that all have the same inducing inputs and classes.

    Raises:
        DataError: A value outside its range; the message names it.

    Example:
        >>> import probkit as pk
        >>> from probkit.inference import SVI
        >>> from probkit.kernels import NNGPKernel
        >>> x = torch.linspace(-2, 2, 40, dtype=torch.float64)[:, None]
        >>> model = ScaleMixtureClassifier(NNGPKernel(), inducing=8)
        >>> post = pk.infer(model, (x, (x[:, 0] > 0).long()), SVI(steps=200), rng=0)
        >>> post.predict(x[[0, -1]], rng=1).probs.argmax(-1)
        tensor([0, 1])
    """

    kernel: gpytorch.kernels.Kernel
    scale: Distribution = field(default_factory=lambda: InverseGamma(2.0, 2.0))
    inducing: int | Tensor = 200
    covariance: Literal["full", "diag"] = "full"
    likelihood: Literal["categorical", "gaussian"] = "categorical"
    whiten: bool = True
    learn: tuple[str, ...] | None = None
    jitter: float = 1e-6
    noise_var: float = 0.1
    classes: int | None = None
    draws: int = 2000

    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, gpytorch.kernels.Kernel):
            raise DataError(
                f"kernel: expected a GPyTorch kernel such as NNGPKernel(), got "
                f"{type(self.kernel).__name__}"
            )
        object.__setattr__(self, "scale", as_scale_law(self.scale))
        for name, choices in (
            ("covariance", ("full", "diag")),
            ("likelihood", ("categorical", "gaussian")),
        ):
            if getattr(self, name) not in choices:
                raise DataError(
                    f"{name}: expected {' or '.join(map(repr, choices))}, got "
                    f"{getattr(self, name)!r}"
                )
        for name in ("jitter", "noise_var"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < float(value) < math.inf:
                raise DataError(f"{name}: expected a finite number > 0, got {value!r}")
        for name, least in (("draws", 1), ("classes", 2), ("inducing", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            if (
                not whole
                and not isinstance(value, Tensor)
                and not (name == "classes" and not value)
            ):
                raise DataError(f"{name}: expected a whole number >= {least}, got {value!r}")
        if self.is_gaussian:
            self._regression  # noqa: B018 (checks its options)
            return
        law: ScaleLaw = self.scale  # type: ignore[assignment]
        if law.batch_shape:
            raise DataError(
                f"scale: expected one law for all classes, got batch shape {tuple(law.batch_shape)}"
            )
        check_law(law)
        self._check_learn()

    def _check_learn(self) -> None:
        known = [_INPUTS, *(f"kernel.{name}" for name in functional.hyperparameters(self.kernel))]
        unknown = [name for name in self.learn or () if name not in known]
        if unknown:
            raise DataError(
                f"learn: expected names out of {', '.join(known)}, got {', '.join(unknown)}"
            )

    @property
    def is_gaussian(self) -> bool:
        """Whether the likelihood is Gaussian, and the posterior exact."""
        return self.likelihood == "gaussian"

    # ------------------------------------------------------------------------------ the data

    def prepare(self, data: Any) -> LabelledData:
        """Check (X, labels) and choose the inducing inputs.

        Raises:
            DataError: No rows, values that are not finite (row and column named), labels that are
                not whole numbers from 0 to C - 1, or a single class.
            ShapeError: Shapes that do not fit.
        """
        return labelled(
            data, classes=self.classes, inducing=0 if self.is_gaussian else self.inducing
        )

    def data_dims(self, data: Any) -> Any:
        """Rows and features."""
        return (("row", "feature"), ("row",))

    def sites(self, data: LabelledData) -> Mapping[str, Site]:
        """Return sigma^2; with the categorical likelihood also inducing values and scores."""
        scale = {} if isinstance(self.scale, PointMass) else {_SCALE: _positive_site()}
        if self.is_gaussian:
            return scale
        count = (len(data.inducing), data.classes)
        rows = (len(data), data.classes)
        return {
            **scale,
            "inducing": Site(count, constraints.real, ("inducing", "class")),
            "f": Site(rows, constraints.real, ("row", "class"), plate="row"),
        }

    def sampler(self) -> Sampler:
        """Return SVI on batches of 100 rows, or Direct for the Gaussian likelihood."""
        from probkit.inference import SVI, Direct

        if self.is_gaussian:
            return Direct()
        return SVI(steps=2000, lr=0.1, batch_size=100, particles=16)

    def guide(self) -> Guide | None:
        """Return the sparse variational family."""
        if self.is_gaussian:
            return self._regression.guide()
        learn = (_INPUTS,) if self.learn is None else self.learn
        return SparseScaleGuide(self.covariance, self.whiten, learn)

    # ------------------------------------------------------------------------- the log density

    def _variance(self, values: Values) -> Tensor:
        law = self.scale
        return law.mean if isinstance(law, PointMass) else values[_SCALE]

    def _prior(self, data: LabelledData, x: Tensor) -> tuple[Tensor, Projection]:
        """Factorise the prior of the inducing values, and project ``x`` [row, feature] on them."""
        hypers = functional.hyperparameters(self.kernel).items()
        params = {name: hyper.value for name, hyper in hypers}
        factor = inducing_factor(self.kernel, data.inducing, self.jitter, params)
        return factor, project(self.kernel, factor, data.inducing, x, params)

    def log_joint(self, values: Values, data: LabelledData, *, scale: float = 1.0) -> Tensor:
        """Return the log density of sigma^2, inducing values, scores and labels [*batch].

        log p(sigma^2) + log N(u; 0, sigma^2 K) + scale * sum_i [log p(f_i | u, sigma^2) + log
        softmax(f_i)[y_i]], the scores of different rows independent given u: the conditional that
        the variational family shares, at the inducing inputs of the data.
        """
        if self.is_gaussian:
            return self._regression.log_joint(values, self._targets(data), scale=scale)
        law: ScaleLaw = self.scale  # type: ignore[assignment]
        variance, u, f = self._variance(values), values["inducing"], values["f"]
        factor, projection = self._prior(data, data.x)
        white = torch.linalg.solve_triangular(factor, u, upper=False)
        total = _log_normal(white, variance, data.classes * factor.diagonal().log().sum())
        error = (f - projection.weights.mT @ white) / projection.residual.sqrt()[:, None]
        local = _log_normal(error, variance, 0.5 * data.classes * projection.residual.log().sum())
        local = local + self.log_likelihood(values, data)
        prior = 0.0 if isinstance(law, PointMass) else law.log_prob(variance)
        return prior + total + scale * local

    def log_likelihood(self, values: Values, data: LabelledData) -> Tensor:
        """Return log p(labels | scores) [*batch], or log p(targets | sigma^2) if Gaussian."""
        if self.is_gaussian:
            return self._regression.log_likelihood(values, self._targets(data))
        return _log_labels(values["f"], data.labels).sum(-1)

    # ------------------------------------------------ what only one of the likelihoods can do

    @property
    def pointwise_log_likelihood(self) -> Callable[..., Mapping[str, Tensor]] | None:
        """The log probability of each label, {"label": [*batch, row]}; None if Gaussian."""
        if self.is_gaussian:
            return None
        return lambda values, data: {"label": _log_labels(values["f"], data.labels)}

    @property
    def plate_size(self) -> Callable[[LabelledData], int] | None:
        """Number of rows, as a function of the data; None if Gaussian."""
        return None if self.is_gaussian else len

    @property
    def minibatch(self) -> Callable[[LabelledData, Tensor], Batch] | None:
        """The batch of some rows, as a function of data and row numbers; None if Gaussian."""
        if self.is_gaussian:
            return None
        return lambda data, index: Batch(data.rows(index), index, len(data) / len(index))

    @property
    def condition(self) -> Callable[[LabelledData, Values | None], Posterior] | None:
        """The exact posterior of the Gaussian likelihood; None if categorical."""
        return self._condition if self.is_gaussian else None

    @property
    def hyper_sites(self) -> Callable[[LabelledData], Mapping[str, Site]] | None:
        """Hyper-parameters of the regression; None if categorical."""
        return self._on_targets("hyper_sites")

    @property
    def hyper_values(self) -> Callable[[LabelledData], Values] | None:
        """Values that the model holds, where fits start; None if categorical."""
        return self._on_targets("hyper_values")

    @property
    def statistics(self) -> Callable[[LabelledData], Any] | None:
        """What the likelihood of sigma^2 needs of the data; None if categorical."""
        return self._on_targets("statistics")

    @property
    def log_hyperprior(self) -> Callable[[Values], Tensor] | None:
        """Log prior density of the hyper-parameters; None if categorical."""
        return self._regression.log_hyperprior if self.is_gaussian else None

    @property
    def log_evidence(self) -> Callable[[Values, LabelledData], Tensor] | None:
        """Log evidence of the targets given hyper-parameters; None if categorical."""
        if not self.is_gaussian:
            return None
        return lambda hyper, data: self._regression.log_evidence(hyper, self._targets(data))

    def _on_targets(self, name: str) -> Callable[[LabelledData], Any] | None:
        if not self.is_gaussian:
            return None
        return lambda data: getattr(self._regression, name)(self._targets(data))

    @property
    def _regression(self) -> ScaleMixtureNNGP:
        """The regression behind the Gaussian likelihood."""
        return ScaleMixtureNNGP(
            self.kernel, scale=self.scale, noise_var=self.noise_var, learn=self.learn
        )

    @staticmethod
    def _targets(data: LabelledData) -> tuple[Tensor, Tensor]:
        """One-hot labels minus 1 / C as targets [row, class]."""
        return data.x, data.one_hot() - 1 / data.classes

    def _condition(self, data: LabelledData, hyper: Values | None) -> Posterior:
        exact = self._regression.condition(self._targets(data), hyper)
        return replace(exact, model=self, context=replace(exact.context, data=data))

    # -------------------------------------------------------------------------------- predicting

    def predict(
        self,
        post: Posterior,
        x: Any,
        *,
        site: str | None = None,
        joint: bool = False,
        groups: Mapping[str, Sequence[Any]] | None = None,
        rng: Rng | None = None,
    ) -> Predictive:
        """Predict at ``x`` [*batch, row, feature].

        Args:
            post: A posterior of this model.
            x: Inputs.
            site: None for labels, whose ``probs`` are [*batch, row, class]; "f" for the scores.
            joint: Not offered: only marginal laws of the scores are formed.
            groups: Not used by this model.
            rng: Needed for labels under the categorical likelihood.

        Returns:
            A categorical law [*batch, row], or laws of the scores [*batch, row, class].
        """
        if groups is not None:
            raise CapabilityError(f"{type(self).__name__} has no plates; leave groups= out")
        if joint:
            raise CapabilityError(
                f"{type(self).__name__} predicts rows one by one; leave joint= out"
            )
        if site not in (None, "f"):
            raise DataError(f"site: expected None (labels) or 'f' (scores), got {site!r}")
        data: LabelledData = post.context.data
        x = check_inputs(x, "x", columns=data.x.shape[-1]).to(data.device)
        lead, flat = x.shape[:-1], x.reshape(-1, x.shape[-1])
        with torch.no_grad():
            if self.is_gaussian:
                return self._predict_gaussian(post, x, site, rng)
            if isinstance(post.source, Draws):
                return self._predict_draws(post, flat, lead, site, rng)
            if not isinstance(post.source, Fitted):
                raise CapabilityError("predict needs a fitted guide or draws; run infer with SVI()")
            fits = [
                post.source.guide.scores(params, self, data, flat)  # type: ignore[attr-defined]
                for params in post.source.params
            ]
            if site == "f":
                return _score_predictive(fits, lead)
            root = require_rng(rng, "a prediction of labels")
            count = -(-self.draws // len(fits))
            draws = (
                draw
                for chain, scores in enumerate(fits)
                for draw in score_draws(scores, count, stream(root, chain, device=x.device))
            )
            return _label_predictive(mean_log_softmax(draws), lead)

    def _predict_gaussian(
        self, post: Posterior, x: Tensor, site: str | None, rng: Rng | None
    ) -> Predictive:
        """Predict by the regression; labels by the largest score."""
        regression = self._regression
        context = replace(post.context, data=self._targets(post.context.data))
        exact = replace(post, model=regression, context=context)
        scores = regression.predict(exact, x, site=site, rng=rng)
        if site == "f":
            return scores
        return _label_predictive(largest_score(scores).log(), x.shape[:-1])

    def _predict_draws(
        self, post: Posterior, x: Tensor, lead: torch.Size, site: str | None, rng: Rng | None
    ) -> Predictive:
        """Predict from draws of sigma^2 and the inducing values."""
        data: LabelledData = post.context.data
        factor, projection = self._prior(data, x)
        source = post.source
        assert isinstance(source, Draws)
        if site == "f":
            values: Values = {name: value.flatten(0, 1) for name, value in source.values.items()}
            weights = source.log_weights
        else:
            root = require_rng(rng, "a prediction of labels")
            values, weights = post.sample(self.draws, rng=stream(root, "draws")), None
        white = torch.linalg.solve_triangular(factor, values["inducing"], upper=False)
        loc = projection.weights.mT @ white
        variance = self._variance(values).expand(len(loc))[:, None] * projection.residual
        law = Normal(loc, variance.sqrt()[..., None].expand_as(loc), validate_args=False)
        if site == "f":
            law = D.map_batch(law, lambda v: v.reshape(len(v), *lead, -1))
            equal = torch.zeros(len(loc)).to(loc)
            return Mixture(law, equal if weights is None else weights.flatten())
        noise = torch.randn(
            loc.shape, generator=stream(root, "scores", device=x.device), dtype=loc.dtype,
            device=x.device,
        )  # fmt: skip
        return _label_predictive(mean_log_softmax([law.loc + law.scale * noise]), lead)


def _positive_site() -> Site:
    return Site((), constraints.positive)


def _log_labels(f: Tensor, labels: Tensor) -> Tensor:
    """Return log softmax(f)[label] [*batch, row] for scores [*batch, row, class]."""
    index = labels.expand(f.shape[:-1])[..., None]
    return f.gather(-1, index).squeeze(-1) - f.logsumexp(-1)


def _log_normal(error: Tensor, variance: Tensor, log_det: Tensor) -> Tensor:
    """Log density [*batch] of values whose standardised form for sigma^2 = 1 is ``error``.

    Args:
        error: [*batch, row, class].
        variance: sigma^2 [*batch].
        log_det: Log of the product of all standard deviations for sigma^2 = 1.
    """
    size = error.shape[-2] * error.shape[-1]
    quadratic = error.square().sum((-2, -1)) / variance
    return -0.5 * (quadratic + size * (_LOG_2PI + variance.log())) - log_det


def _label_predictive(log_probability: Tensor, lead: torch.Size) -> Analytic:
    logits = log_probability.reshape(*lead, -1)
    return Analytic(LabelLaw(logits=logits, validate_args=False))


def _score_predictive(fits: Sequence[FittedScores], lead: torch.Size) -> Predictive:
    """Marginal laws of the scores [*lead, class], mixed over fits."""
    dists, weights = zip(*(scores.components() for scores in fits), strict=True)
    names = [name for name in ("df", "loc", "scale") if hasattr(dists[0], name)]
    joined = {name: torch.cat([getattr(dist, name) for dist in dists]) for name in names}
    joined = {name: value.reshape(len(value), *lead, -1) for name, value in joined.items()}
    law = type(dists[0])(**joined, validate_args=False)
    if len(joined["loc"]) == 1:
        return Analytic(D.map_batch(law, lambda v: v[0]))
    return Mixture(law, torch.cat(weights).log())


# --------------------------------------------------------------------------------------- files


def _to_tree(model: ScaleMixtureClassifier) -> dict[str, Any]:
    config, tensors = kernel_config(model.kernel)
    options = {name: getattr(model, name) for name in _OPTIONS}
    return {"kernel": {"config": config, "tensors": tensors}, **options}


def _from_tree(tree: dict[str, Any]) -> ScaleMixtureClassifier:
    kernel = kernel_from_config(tree["kernel"]["config"], tree["kernel"]["tensors"])
    return ScaleMixtureClassifier(kernel, **{k: v for k, v in tree.items() if k != "kernel"})


register(ScaleMixtureClassifier, "ScaleMixtureClassifier", _to_tree, _from_tree)

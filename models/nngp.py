"""Regression with scale mixtures of Gaussian processes, NNGPs in particular."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, ClassVar, Literal

import gpytorch
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit import distributions as D
from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import register, storable
from probkit.guide import Guide, LogQ, Params
from probkit.kernels import functional
from probkit.kernels.storing import kernel_config, kernel_from_config
from probkit.model import Batch, Model, Site, Values
from probkit.models import scale_mixture as mix
from probkit.models.scale_laws import (
    BurrXII,
    Gamma,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    PointMass,
    ScaleLaw,
    as_scale_law,
)
from probkit.models.standardise import Scaling, fit_scaling, no_scaling
from probkit.numerics import check_allocation, check_finite, safe_cholesky
from probkit.posterior import Context, Evidence, Posterior
from probkit.predictive import Analytic, Mixture, Predictive
from probkit.rng import Rng, require_rng, scope, stream
from probkit.sources import Closed, Draws
from probkit.tree import map_tensors

__all__ = ["ScaleMixtureNNGP", "ScaleProposal"]

# The argument of each law that multiplies sigma^2; it is learned with the hyper-parameters. The
# shape arguments stay fixed: one data set holds one draw of sigma^2 and says little about them.
_SCALE_ARGUMENT = {
    InverseGamma: "rate",
    BurrXII: "scale",
    LogNormal: "loc",
    HalfCauchy: "scale",
    Gamma: "rate",
    PointMass: "value",
}
_SITE = "scale_var"


@dataclass(frozen=True)
class _Settings:
    """Hyper-parameters of one evaluation: [*batch] leads everywhere.

    Attributes:
        kernel: Constrained kernel hyper-parameters to use in place of the kernel's own.
        noise_var: Noise variance [*batch].
        law: Law of sigma^2 with batch shape [*batch].
    """

    kernel: Mapping[str, Tensor]
    noise_var: Tensor
    law: ScaleLaw


@dataclass(frozen=True, eq=False)
class ScaleMixtureNNGP(Model):
    """Gaussian process regression with an unknown, shared scale: a heavy-tailed process.

    f | sigma^2 ~ GP(0, sigma^2 K), sigma^2 ~ ``scale``, one sigma^2 for all inputs and outputs, and
    y = f + noise. It is the wide limit of a network whose last-layer variance is random (Lee, Yun,
    Yang and Lee, "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022, theorem 3.1);
    any GPyTorch kernel may stand in for the NNGP kernel. An inverse gamma law gives a Student-t
    process in closed form, a point mass the plain Gaussian process, and every other law a
    one-dimensional integral that is computed by quadrature.

    The posterior mean is that of the Gaussian process with the same kernel and noise, so a single
    outlier is not down-weighted; that needs a Student-t likelihood.

    Args:
        kernel: Covariance for sigma^2 = 1, a GPyTorch kernel. Its parameters are standard
            deviations for :class:`~probkit.kernels.NNGPKernel`.
        scale: Law of the VARIANCE sigma^2 (``HalfCauchy``: of sigma); any torch distribution on the
            positive reals.
        noise_var: Noise variance, relative to sigma^2 where the noise is inside the scale.
        noise_in: "scale": y ~ N(0, sigma^2 (K + noise_var I)); "outside": N(0, sigma^2 K +
            noise_var I), never in closed form.
        standardize: Scale inputs and targets by the training means and standard deviations; results
            are on the original scale, ``log_evidence`` included.
        learn: Hyper-parameters that a fit may change, out of :meth:`hyper_sites`; None for all:
            those that the kernel learns, ``noise_var``, and the scale argument of the law.
        hyper_scale: Scale of the half-Cauchy prior of each positive hyper-parameter whose kernel
            gives it no prior of its own.

    Data is a pair (X [row, feature], y [row] or [row, output]). Several outputs share sigma^2.

    Raises:
        DataError: A value outside its range; the message names it.

    Example:
        >>> import probkit as pk
        >>> from probkit.kernels import NNGPKernel
        >>> x = torch.linspace(-1, 1, 12, dtype=torch.float64)[:, None]
        >>> post = pk.infer(ScaleMixtureNNGP(NNGPKernel()), (x, x[:, 0].sin()), rng=0)
        >>> post.predict(x[:2]).quantile([0.05, 0.5, 0.95]).shape
        torch.Size([3, 2])
        >>> post.analytic["scale_var"].concentration
        tensor(8., dtype=torch.float64)
    """

    kernel: gpytorch.kernels.Kernel
    scale: Distribution = field(default_factory=lambda: InverseGamma(2.0, 2.0))
    noise_var: float = 0.1
    noise_in: Literal["scale", "outside"] = "scale"
    standardize: bool = False
    learn: tuple[str, ...] | None = None
    hyper_scale: float = 2.5

    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, gpytorch.kernels.Kernel):
            raise DataError(
                f"kernel: expected a GPyTorch kernel such as NNGPKernel(), got "
                f"{type(self.kernel).__name__}"
            )
        object.__setattr__(self, "scale", as_scale_law(self.scale))
        for name in ("noise_var", "hyper_scale"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 < float(value) < math.inf:
                raise DataError(f"{name}: expected a finite number > 0, got {value!r}")
        if self.noise_in not in ("scale", "outside"):
            raise DataError(f"noise_in: expected 'scale' or 'outside', got {self.noise_in!r}")
        if self.learn is not None:
            known = self._learnable()
            unknown = [name for name in self.learn if name not in known]
            if unknown:
                raise DataError(
                    f"learn: expected names out of {', '.join(known)}, got {', '.join(unknown)}"
                )

    # ------------------------------------------------------------------------------ the data

    def prepare(self, data: Any) -> tuple[Tensor, Tensor]:
        """Check (X, y) and return them in float64 on one device.

        Raises:
            DataError: Not a pair, no rows or columns, or a value that is not finite (row and column
                named).
            ShapeError: Shapes that do not fit.
        """
        if not (isinstance(data, tuple | list) and len(data) == 2):
            raise DataError(
                f"expected data (X [row, feature], y [row] or [row, output]), got "
                f"{type(data).__name__}"
            )
        x = _inputs(data[0], "X")
        y = _floating(data[1], "y")
        if x.ndim != 2 or y.ndim not in (1, 2) or x.shape[0] != y.shape[0]:
            raise ShapeError(
                f"expected X [row, feature] and y [row] or [row, output] with equally many rows, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if x.shape[0] == 0 or y.shape[-1] == 0:
            raise DataError(
                f"expected at least one row and one output, got X {tuple(x.shape)} and y "
                f"{tuple(y.shape)}"
            )
        check_finite(y, "y", ("row", "output")[: y.ndim])
        return x, y.to(x.device)

    def data_dims(self, data: Any) -> Any:
        """Rows, features and outputs."""
        return (("row", "feature"), ("row", "output"))

    def _scaling(self, x: Tensor, y: Tensor) -> Scaling:
        return fit_scaling(x, y) if self.standardize else no_scaling(x, y)

    # ------------------------------------------------------------------- latents: sigma^2 only

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return the one latent, the variance ``scale_var``; none for a point mass."""
        if isinstance(self.scale, PointMass):
            return {}
        return {_SITE: Site((), constraints.positive)}

    def guide(self) -> Guide | None:
        """Return the likelihood of sigma^2 as a proposal, where it is one."""
        if isinstance(self.scale, PointMass) or self.noise_in == "outside":
            return None
        return ScaleProposal()

    def statistics(self, data: Any, hyper: Values | None = None) -> Any:
        """Reduce data to what the likelihood of sigma^2 needs; one factorisation of K.

        Args:
            data: (X, y), prepared.
            hyper: Hyper-parameters [*batch]; None for the model's own.

        Returns:
            :class:`~probkit.models.scale_mixture.SufficientStats`, or ``SpectralStats`` where the
            noise is outside the scale.
        """
        x, y = data
        scaling = self._scaling(x, y)
        return self._condition(scaling.x(x), _columns(scaling.y(y)), self._settings(hyper)).stats

    def log_likelihood(self, values: Values, data: Any) -> Tensor:
        """Return log p(y | sigma^2) [*batch] for ``scale_var`` [*batch]."""
        x, y = data
        stats = self.statistics(data)
        value: Tensor = stats.log_likelihood(values[_SITE].log())
        return value + self._scaling(x, y).log_jacobian(y)

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return log p(sigma^2) + log p(y | sigma^2), leading dims carried through."""
        law = self._settings(None).law
        return law.log_prob(values[_SITE]) + scale * self.log_likelihood(values, data)

    def sample_prior(self, n: int, *, rng: Rng) -> Values:
        """Draw sigma^2 [n]."""
        with scope(rng=stream(rng, "prior")):
            return {_SITE: self._settings(None).law.sample(torch.Size([n]))}

    def simulate(self, values: Values, x: Any, *, rng: Rng) -> Tensor:
        """Draw targets [*batch, row] of one output at ``x`` for each ``scale_var`` [*batch]."""
        x = _inputs(x, "X")
        settings = self._settings(None)
        variance = values[_SITE][..., None]
        gram = self._gram(settings, x)
        noise = settings.noise_var * torch.eye(len(x), dtype=x.dtype, device=x.device)
        factor, _ = safe_cholesky(gram + noise if self.noise_in == "scale" else gram)
        generator = stream(rng, "simulate", device=x.device)
        lead = values[_SITE].shape
        white = torch.randn(*lead, len(x), generator=generator, dtype=x.dtype, device=x.device)
        f = variance.sqrt() * (white @ factor.mT)
        if self.noise_in == "scale":
            return f
        white = torch.randn(*lead, len(x), generator=generator, dtype=x.dtype, device=x.device)
        return f + settings.noise_var.sqrt() * white

    # ------------------------------------------------------------------------ hyper-parameters

    def _learnable(self) -> dict[str, Any]:
        """Every hyper-parameter that a fit may change: its value and, for the kernel's, details."""
        known: dict[str, Any] = {
            f"kernel.{name}": hyper
            for name, hyper in functional.hyperparameters(self.kernel).items()
            if not hyper.fixed
        }
        known["noise_var"] = torch.tensor(float(self.noise_var), dtype=torch.float64)
        argument = _SCALE_ARGUMENT.get(type(self.scale))
        if argument is not None:
            known[f"scale.{argument}"] = getattr(self.scale, argument)
        return known

    def _learned(self) -> dict[str, Any]:
        known = self._learnable()
        return {name: known[name] for name in (known if self.learn is None else self.learn)}

    def hyper_sites(self, data: Any) -> Mapping[str, Site]:
        """Return the learned hyper-parameters: ``kernel.*``, ``noise_var``, ``scale.*``."""
        sites = {}
        for name, item in self._learned().items():
            if name.startswith("kernel."):
                dims = tuple(f"{name}_dim_{i}" for i in range(len(item.shape)))
                sites[name] = Site(tuple(item.shape), item.support, dims)
            else:
                real = name == "scale.loc"
                sites[name] = Site((), constraints.real if real else constraints.positive)
        return sites

    def hyper_values(self, data: Any) -> Values:
        """Return the hyper-parameter values that the model holds, where fits start."""
        x, _ = data
        return {
            name: (item.value if name.startswith("kernel.") else item).detach().to(x)
            for name, item in self._learned().items()
        }

    def log_hyperprior(self, hyper: Values) -> Tensor:
        """Return the log prior density [*batch] of the learned hyper-parameters.

        The kernel's own prior where it has one; else half-Cauchy(``hyper_scale``) on the positive
        reals, standard Cauchy on the reals, flat on an interval.
        """
        total: Tensor | None = None
        for name, item in self._learned().items():
            value = hyper[name]
            own = item.prior if name.startswith("kernel.") else None
            if own is not None:
                term = own.log_prob(value)
            else:
                support = item.support if name.startswith("kernel.") else None
                term = _weak_log_prior(value, support, self.hyper_scale, name == "scale.loc")
            event = len(item.shape) if name.startswith("kernel.") else 0
            term = term.sum(tuple(range(term.ndim - event, term.ndim))) if event else term
            total = term if total is None else total + term
        return torch.zeros((), dtype=torch.float64) if total is None else total

    def log_evidence(self, hyper: Values, data: Any) -> Tensor:
        """Return log p(y | hyper) [*batch], sigma^2 integrated out."""
        x, y = data
        scaling = self._scaling(x, y)
        settings = self._settings(hyper)
        given = self._condition(scaling.x(x), _columns(scaling.y(y)), settings)
        return mix.log_evidence(settings.law, given.stats) + scaling.log_jacobian(y)

    def _settings(self, hyper: Values | None) -> _Settings:
        """Fill in the model's own values where ``hyper`` has none."""
        hyper = hyper or {}
        unknown = [name for name in hyper if name not in self._learnable()]
        if unknown:
            raise DataError(
                f"hyper: expected names out of {', '.join(self._learnable())}, got "
                f"{', '.join(unknown)}"
            )
        kernel = {
            name.removeprefix("kernel."): value
            for name, value in hyper.items()
            if name.startswith("kernel.")
        }
        noise = hyper.get("noise_var", torch.tensor(float(self.noise_var), dtype=torch.float64))
        law: ScaleLaw = self.scale  # type: ignore[assignment]
        argument = _SCALE_ARGUMENT.get(type(law))
        if argument is not None and f"scale.{argument}" in hyper:
            given = D.constructor_arguments(law)
            law = type(law)(**{**given, argument: hyper[f"scale.{argument}"]}, validate_args=False)
        return _Settings(kernel, noise, law)

    # ----------------------------------------------------------------------------- conditioning

    def _gram(
        self, settings: _Settings, x: Tensor, x2: Tensor | None = None, *, diag: bool = False
    ) -> Tensor:
        return functional.evaluate(self.kernel, x, x2, params=settings.kernel or None, diag=diag)

    def _condition(self, x: Tensor, y: Tensor, settings: _Settings) -> _Conditioned:
        """Factorise K once. ``y`` is [row, output]."""
        n = x.shape[0]
        batch = settings.noise_var.shape
        check_allocation(
            3 * 8 * n * n * max(1, math.prod(batch)),
            f"a kernel matrix of {n} rows",
            device=x.device,
        )
        gram = self._gram(settings, x)
        if self.noise_in == "outside":
            return _Conditioned(None, mix.spectral_stats(gram, y, settings.noise_var.to(gram)))
        noise = settings.noise_var.to(gram)[..., None].expand(*batch, n)
        factor, _ = safe_cholesky(gram + torch.diag_embed(noise))
        return _Conditioned(factor, mix.sufficient_stats(factor, y))

    def condition(self, data: Any, hyper: Values | None) -> Posterior:
        """Return the exact posterior given hyper-parameters; see :class:`Direct`.

        Leading dims [*batch] of ``hyper`` carry through to the evidence, the marginal of
        ``scale_var`` and the predictions.
        """
        x, y = data
        scaling = self._scaling(x, y)
        settings = self._settings(hyper)
        with torch.no_grad():
            given = self._condition(scaling.x(x), _columns(scaling.y(y)), settings)
            law = mix.scale_posterior(settings.law, given.stats)
            evidence = mix.log_evidence(settings.law, given.stats) + scaling.log_jacobian(y)
        kept = {
            "factor": given.factor,
            "stats": given.stats,
            "law": law,
            "hyper": dict(hyper or {}),
        }
        # Files hold contiguous tensors; products with others may differ in the last bit.
        kept = map_tensors(Tensor.contiguous, kept)
        joint = {} if isinstance(law, PointMass) else {_SITE: law}
        return Posterior(
            source=Closed(joint=joint, state=kept),
            model=self,
            context=Context(data, {}, {_SITE: ()} if joint else {}),
            marginals=joint,
            log_evidence=Evidence(evidence.reshape(-1), "exact"),
        )

    def update(self, posterior: Posterior, data: Any, *, rng: Rng) -> Posterior:
        """Add rows to a closed-form posterior, hyper-parameters kept.

        Draws of hyper-parameters are reweighted by the evidence of the new rows given the old.
        With ``standardize=True`` the statistics are those of all rows.

        Raises:
            CapabilityError: The posterior is not a closed form.
            ShapeError: The new rows have other features or outputs.
        """
        source = posterior.source
        if not isinstance(source, Closed):
            raise CapabilityError(
                "update needs a posterior from Direct; run infer on old and new data together"
            )
        (x0, y0), (x1, y1) = posterior.context.data, self.prepare(data)
        if x0.shape[1:] != x1.shape[1:] or y0.shape[1:] != y1.shape[1:]:
            raise ShapeError(
                f"update: expected rows of X {tuple(x0.shape[1:])} [feature] and y "
                f"{tuple(y0.shape[1:])} [output] as before, got {tuple(x1.shape[1:])} and "
                f"{tuple(y1.shape[1:])}"
            )
        both = self.prepare((torch.cat([x0, x1]), torch.cat([y0, y1])))
        hyper = source.state["hyper"]
        new = self.condition(both, hyper or None)
        closed = new.source
        assert isinstance(closed, Closed)
        weights = source.log_weights
        if source.is_mixture:
            gain = self.log_evidence(hyper, both) - self.log_evidence(hyper, (x0, y0))
            weights = gain.detach() if weights is None else weights + gain.detach()
        closed = replace(closed, hyper=source.hyper, log_weights=weights, repeats=source.repeats)
        context = replace(posterior.context, data=both)
        evidence = None if source.is_mixture else new.log_evidence
        marginals = {} if source.is_mixture else new.marginals
        return replace(
            posterior, source=closed, context=context, log_evidence=evidence, marginals=marginals
        )

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
            site: None for new observations, "f" for the latent function.
            joint: Keep the dependence between rows (and outputs): one sigma^2 for each draw.
            groups: Not used by this model.
            rng: Needed only for a posterior that was fitted with SVI.

        Returns:
            Student-t, normal, or a mixture, of shape [*batch, row] or [*batch, row, output].
        """
        if groups is not None:
            raise CapabilityError(f"{type(self).__name__} has no plates; leave groups= out")
        if site not in (None, "f"):
            raise DataError(f"site: expected None (new observations) or 'f', got {site!r}")
        x_train, y_train = post.context.data
        scaling = self._scaling(x_train, y_train)
        x = _inputs(x, "x", columns=x_train.shape[1]).to(x_train.device)
        fitted = self._fitted(post, rng)
        parts = self._mixture(
            fitted,
            scaling.x(x_train),
            scaling.x(x).reshape(1, math.prod(x.shape[:-2]), *x.shape[-2:]),
            joint=joint,
            observation=site is None,
            squeeze=y_train.ndim == 1,
        )
        dist = _rescaled(parts.dist, scaling)
        return _as_predictive(dist, parts.log_weights, fitted.log_weights, x.shape[:-2])

    def _mixture(
        self,
        fitted: _Fitted,
        trained: Tensor,
        x: Tensor,
        *,
        joint: bool,
        observation: bool,
        squeeze: bool,
    ) -> mix.PredictiveParts:
        """Predict at ``x`` [1, batch, row, feature] for hyper-parameters [hyper, 1]."""
        settings, conditioned = fitted.settings, fitted.conditioned
        cross = self._gram(settings, trained.expand(*x.shape[:-2], *trained.shape), x)
        test = self._gram(settings, x, diag=not joint)
        noise = settings.noise_var.to(test)
        if self.noise_in == "outside":
            stats = conditioned.stats
            return mix.spectral_predictive(
                fitted.law,
                stats,
                cross,
                test,
                joint=joint,
                observation=observation,
                squeeze=squeeze,
            )
        if observation:
            rows = noise[..., None].expand(*noise.shape, x.shape[-2])
            test = test + (torch.diag_embed(rows) if joint else rows)
        assert conditioned.factor is not None
        given = mix.conditional(conditioned.factor, fitted.y, cross, test, joint=joint)
        return mix.predictive(fitted.law, given, squeeze=squeeze)

    def _fitted(self, post: Posterior, rng: Rng | None) -> _Fitted:
        """Bring any kind of posterior to hyper-parameters [hyper, 1] and a law [hyper, 1]."""
        x, y = post.context.data
        scaling = self._scaling(x, y)
        targets = _columns(scaling.y(y))
        source = post.source
        if isinstance(source, Closed):
            state = source.state
            settings = self._settings(state["hyper"])
            dims = len(settings.noise_var.shape)
            conditioned = _Conditioned(state["factor"], state["stats"])
            shape = _flat_column(dims)
            return _Fitted(
                settings=_detached(settings, self.kernel, shape),
                conditioned=conditioned.map_batch(settings.noise_var.shape, shape),
                law=D.map_batch(state["law"], shape),
                y=targets,
                log_weights=None if source.log_weights is None else source.log_weights.flatten(),
            )
        settings = self._settings(None)
        with torch.no_grad():
            conditioned = self._condition(scaling.x(x), targets, settings)
        shape = _flat_column(0)
        if isinstance(source, Draws):
            variance = source.values[_SITE].flatten()
            log_weights = None if source.log_weights is None else source.log_weights.flatten()
        else:
            draws = post.sample(1000, rng=require_rng(rng, "a prediction from a fitted guide"))
            variance, log_weights = draws[_SITE], None
        return _Fitted(
            settings=_detached(settings, self.kernel, shape),
            conditioned=conditioned.map_batch(torch.Size(), shape),
            law=PointMass(variance[:, None], validate_args=False),
            y=targets,
            log_weights=torch.zeros_like(variance) if log_weights is None else log_weights,
        )


# ------------------------------------------------------------------------------- conditioning


@dataclass(frozen=True)
class _Conditioned:
    """What K was reduced to.

    Attributes:
        factor: Lower factor of K + noise [*batch, row, row]; None where the noise is outside.
        stats: Statistics of the data for the likelihood of sigma^2.
    """

    factor: Tensor | None
    stats: Any

    def map_batch(self, batch: torch.Size, change: Any) -> _Conditioned:
        factor = self.factor
        if factor is not None:
            factor = change(factor.expand(*batch, *factor.shape[-2:]))
        return _Conditioned(factor, self.stats.map_batch(batch, change))


@dataclass(frozen=True)
class _Fitted:
    """A posterior in the form that predictions use, hyper-parameters and law over [hyper, 1]."""

    settings: _Settings
    conditioned: _Conditioned
    law: ScaleLaw
    y: Tensor
    log_weights: Tensor | None


def _flat_column(dims: int) -> Any:
    """Return the map of [*batch, ...] with ``dims`` batch dims to [prod(batch), 1, ...]."""

    def change(value: Tensor) -> Tensor:
        return value.reshape(-1, 1, *value.shape[dims:])

    return change


def _detached(settings: _Settings, kernel: gpytorch.kernels.Kernel, change: Any) -> _Settings:
    """Apply ``change`` to the batch dims of the hyper-parameters; the kernel's own lose gradients.

    Predictions are differentiated with respect to inputs, never to hyper-parameters.
    """
    own = {
        name: hyper.value
        for name, hyper in functional.hyperparameters(kernel).items()
        if name not in settings.kernel
    }
    given = {name: change(value.detach()) for name, value in settings.kernel.items()}
    return _Settings({**own, **given}, change(settings.noise_var.detach()), settings.law)


def _weak_log_prior(value: Tensor, support: Any, scale: float, real: bool) -> Tensor:
    """Half-Cauchy on the positive reals, Cauchy on the reals, flat on an interval."""
    bounded = support is not None and hasattr(support, "upper_bound")
    if bounded and math.isfinite(float(support.upper_bound)):
        return torch.zeros_like(value)
    free = real or (support is constraints.real)
    width = 1.0 if free else scale
    return -math.log(math.pi * width * (1.0 if free else 0.5)) - torch.log1p((value / width) ** 2)


# ---------------------------------------------------------------------------------- predicting


def _rescaled(dist: Distribution, scaling: Scaling) -> Distribution:
    """Map a predictive of standardised targets back to their original scale."""
    mean, sd = scaling.y_mean, scaling.y_sd
    if bool((sd == 1).all()) and bool((mean == 0).all()):
        return dist
    if isinstance(dist, D.StudentT):
        return D.StudentT(dist.df, dist.loc * sd + mean, dist.scale * sd, validate_args=False)
    if isinstance(dist, torch.distributions.Normal):
        return type(dist)(dist.loc * sd + mean, dist.scale * sd, validate_args=False)
    given = dict(dist.stored_arguments())  # type: ignore[attr-defined]
    given["loc"] = given["loc"] * sd + mean
    if sd.ndim == 0:
        given["amplitude"] = given["amplitude"] * sd
    else:
        given["output_scale"] = given["output_scale"] * sd
    rebuilt: Distribution = type(dist)(**given, validate_args=False)
    return rebuilt


def _as_predictive(
    dist: Distribution,
    node_weights: Tensor | None,
    hyper_weights: Tensor | None,
    lead: torch.Size,
) -> Predictive:
    """Turn a law over [(node,) hyper, batch, *obs] into a predictive over [*lead, *obs].

    Components are the hyper-parameter draws, times the quadrature nodes where there are any.
    """
    hyper, size = dist.batch_shape[:2] if node_weights is None else dist.batch_shape[1:3]
    weights = torch.zeros(hyper, dtype=torch.float64) if hyper_weights is None else hyper_weights
    if node_weights is not None:
        weights = weights.to(node_weights) + node_weights.expand(-1, hyper, size)[..., 0]
        weights = weights.flatten()
        dist = D.flatten_batch(dist, 2)
    if len(weights) == 1:
        return Analytic(D.map_batch(dist, lambda v: v.reshape(lead + v.shape[2:])))
    dist = D.map_batch(dist, lambda v: v.reshape(v.shape[:1] + lead + v.shape[2:]))
    return Mixture(dist, weights)


# --------------------------------------------------------------------------------------- data


def _floating(value: Any, name: str) -> Tensor:
    """Return float64 values; half precision is refused because its digits are lost already."""
    tensor = as_tensor(value, name=name)
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise DataError(f"{name}: expected float64 or float32, got {tensor.dtype}")
    if tensor.is_complex():
        raise DataError(f"{name}: expected real numbers, got {tensor.dtype}")
    return tensor.double().contiguous()


def _inputs(value: Any, name: str, *, columns: int | None = None) -> Tensor:
    """Check inputs [*batch, row, feature]."""
    x = _floating(value, name)
    if x.ndim < 2:
        raise ShapeError(
            f"{name}: expected [*batch, row, feature], got {tuple(x.shape)}; use {name}[:, None]"
        )
    if x.shape[-1] == 0:
        raise ShapeError(f"{name}: expected at least one feature column, got {tuple(x.shape)}")
    if columns is not None and x.shape[-1] != columns:
        raise ShapeError(
            f"{name}: expected {columns} feature columns as in training, got {x.shape[-1]}"
        )
    check_finite(x.reshape(-1, x.shape[-1]), name, ("row", "column"))
    return x


def _columns(y: Tensor) -> Tensor:
    """Give a single output its dim: [row] -> [row, 1]."""
    return y[:, None] if y.ndim == 1 else y


# --------------------------------------------------------------------------------------- guide


@storable
@dataclass(frozen=True)
class ScaleProposal(Guide):
    """The likelihood of sigma^2 as a proposal: InverseGamma(N / 2, q / 2).

    N is the number of observed values and q their quadratic form; importance weights under it are
    proportional to p(sigma^2) sigma^2.
    """

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Reduce the data to the two arguments."""
        law = mix.importance_proposal(model.statistics(data))
        return {"concentration": law.concentration, "rate": law.rate}

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw sigma^2 [n]."""
        law = InverseGamma(params["concentration"], params["rate"], validate_args=False)
        with scope(rng=rng):
            value = law.rsample(torch.Size([n]))
        log_q = law.log_prob(value)
        return {_SITE: value}, LogQ(log_q, torch.zeros_like(log_q))

    def marginals(self, params: Params, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return the proposal."""
        return {_SITE: InverseGamma(params["concentration"], params["rate"], validate_args=False)}


# --------------------------------------------------------------------------------------- files


def _to_tree(model: ScaleMixtureNNGP) -> dict[str, Any]:
    config, tensors = kernel_config(model.kernel)
    options = {
        name: getattr(model, name)
        for name in ("scale", "noise_var", "noise_in", "standardize", "learn", "hyper_scale")
    }
    return {"kernel": {"config": config, "tensors": tensors}, **options}


def _from_tree(tree: dict[str, Any]) -> ScaleMixtureNNGP:
    kernel = kernel_from_config(tree["kernel"]["config"], tree["kernel"]["tensors"])
    return ScaleMixtureNNGP(kernel, **{k: v for k, v in tree.items() if k != "kernel"})


register(ScaleMixtureNNGP, "ScaleMixtureNNGP", _to_tree, _from_tree)

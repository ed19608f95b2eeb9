"""Regression with a scale mixture of Gaussian processes, whatever its kernel and mean.

One class does the work of all scale-mixture regressions: it reduces data to a factor of the kernel
matrix and the statistics of sigma^2, and mixes the Gaussian conditional over the posterior of
sigma^2. What differs between models (where mean, kernel and noise come from) are its hooks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar, overload

import gpytorch
import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit import distributions as D
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import storable
from probkit.guide import Guide, LogQ, Params
from probkit.kernels import functional
from probkit.kernels.iterative import Iterative
from probkit.model import Batch, Model, Site, Values
from probkit.models import nngp_iterative
from probkit.models import scale_mixture as mix
from probkit.models.nngp_data import Groups, columns, group_labels, inputs, regression_data
from probkit.models.nngp_predictive import Part, assemble, rescaled, shifted
from probkit.models.scale_laws import (
    BurrXII,
    Gamma,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    PointMass,
    ScaleLaw,
)
from probkit.models.standardise import Scaling, no_scaling
from probkit.numerics import check_allocation, safe_cholesky
from probkit.posterior import Context, Evidence, Posterior
from probkit.predictive import Predictive
from probkit.rng import Rng, require_rng, scope, stream
from probkit.sources import Closed, Draws
from probkit.tree import map_tensors

__all__ = ["Learned", "ScaleMixtureProcess", "ScaleProposal", "Settings"]

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
SITE = "scale_var"

_T = TypeVar("_T")


class _OnlyWithOneScale(Generic[_T]):
    """A method that a model has only where one sigma^2 is shared by everything.

    With a scale for each group or output the number of scales is known from data alone, so nothing
    can be drawn without data; samplers that ask for the method then find none.
    """

    def __init__(self, method: Callable[..., _T]) -> None:
        self.method = method
        self.__doc__ = method.__doc__

    @overload
    def __get__(self, model: None, owner: type) -> Callable[..., _T]: ...

    @overload
    def __get__(self, model: object, owner: type) -> Callable[..., _T]: ...

    def __get__(self, model: Any, owner: type) -> Callable[..., _T]:
        if model is not None and model.scale_per is not None:
            name = self.method.__name__
            raise AttributeError(f"{owner.__name__} has no {name} with scale_per")
        bound: Callable[..., _T] = self.method.__get__(model, owner)
        return bound


@dataclass(frozen=True)
class Learned:
    """A hyper-parameter that a fit may change.

    Attributes:
        value: Its value now [*shape].
        shape: Its shape.
        support: Where it lives.
        prior: Its own prior, with ``log_prob``; None for a weak default.
    """

    value: Tensor
    shape: torch.Size = torch.Size()
    support: Any = constraints.positive
    prior: Any = None


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters of one evaluation: [*batch] leads everywhere.

    Attributes:
        kernel: Constrained kernel hyper-parameters to use in place of the kernel's own.
        mean: Hyper-parameters of the mean function, likewise.
        noise_var: Noise variance [*batch].
        law: Law of sigma^2 with batch shape [*batch] or ().
    """

    kernel: Mapping[str, Tensor]
    mean: Mapping[str, Tensor]
    noise_var: Tensor
    law: ScaleLaw

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape [*batch]."""
        return self.noise_var.shape

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> Settings:
        """Apply ``change`` to the leading batch dims of every value."""
        return Settings(
            {name: change(value) for name, value in self.kernel.items()},
            {name: change(value) for name, value in self.mean.items()},
            change(self.noise_var),
            D.map_batch(self.law.expand(self.batch_shape), change),
        )

    def detached(self) -> Settings:
        """Return the same values without gradients; the law is kept."""
        kernel = {name: value.detach() for name, value in self.kernel.items()}
        mean = {name: value.detach() for name, value in self.mean.items()}
        return Settings(kernel, mean, self.noise_var.detach(), self.law)


class ScaleMixtureProcess(Model):
    """What all scale-mixture regressions share; subclasses supply the hooks below.

    Attributes:
        kernel: Covariance for sigma^2 = 1.
        scale: Law of the variance sigma^2.
        noise_in: Whether sigma^2 multiplies the noise, too.
        scale_per: None for one sigma^2; "output" or "group" for one each.
        learn: Names of the hyper-parameters that a fit may change; None for all.
        hyper_scale: Scale of the weak priors of positive hyper-parameters.
        memory_limit: Bytes beyond which kernel matrices are not stored; None: they always are.
        solver: How matrices that are not stored are solved.
    """

    kernel: gpytorch.kernels.Kernel
    scale: Distribution
    noise_in: Literal["scale", "outside"]
    scale_per: Literal["output", "group"] | None
    learn: tuple[str, ...] | None
    hyper_scale: float
    memory_limit: float | None = None
    solver: Iterative = Iterative()

    batched: ClassVar[bool] = True

    # ------------------------------------------------------------------------- hooks of models

    def _scaling(self, x: Tensor, y: Tensor) -> Scaling:
        """Map of inputs and targets to the scale on which the model is stated."""
        return no_scaling(x, y)

    def _mean(self, settings: Settings, x: Tensor) -> Tensor | None:
        """Prior mean [*batch, row] at ``x`` [*batch, row, feature]; None for zero."""
        return None

    def _mean_parameters(self) -> Mapping[str, Learned]:
        """Hyper-parameters of the mean function."""
        return {}

    def _log_mean_prior(self, mean: Mapping[str, Tensor]) -> Tensor | None:
        """Log density [*batch] of priors that the mean function has of its own."""
        return None

    def _noise(self) -> Learned:
        """The noise variance."""
        raise AssertionError("every final class has a noise variance")

    # ------------------------------------------------------------------------------ the data

    def prepare(self, data: Any) -> tuple[Any, ...]:
        """Check (X, y), with ``scale_per="group"`` (X, y, groups), and return float64 tensors.

        Raises:
            DataError: Not such a tuple, no rows or columns, or a value that is not finite (row and
                column named).
            ShapeError: Shapes that do not fit.
        """
        return regression_data(data, grouped=self.scale_per == "group")

    def data_dims(self, data: Any) -> Any:
        """Rows, features and outputs."""
        dims: tuple[Any, ...] = (("row", "feature"), ("row", "output"))
        return (*dims, ("row",)) if self.scale_per == "group" else dims

    def _scales(self, data: Any) -> tuple[int, ...]:
        """Shape of ``scale_var``: how many scales there are."""
        if self.scale_per == "output":
            return (columns(data[1]).shape[1],)
        return () if self.scale_per is None else (len(data[2].labels),)

    # ------------------------------------------------------------------- latents: sigma^2 only

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return the one latent, the variance ``scale_var``; none for a point mass."""
        if isinstance(self.scale, PointMass):
            return {}
        dims = () if self.scale_per is None else (self.scale_per,)
        return {SITE: Site(self._scales(data), constraints.positive, dims)}

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
            Statistics of :mod:`~probkit.models.scale_mixture` with batch shape [*batch], followed
            by [output] or [group] where these have a scale each.
        """
        return self._condition(data, self._settings(hyper)).stats

    def log_likelihood(self, values: Values, data: Any) -> Tensor:
        """Return log p(y | sigma^2) [*batch] for ``scale_var`` [*batch]."""
        x, y = data[:2]
        term: Tensor = self.statistics(data).log_likelihood(values[SITE].log())
        return self._total(term) + self._scaling(x, y).log_jacobian(y)

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return log p(sigma^2) + log p(y | sigma^2), leading dims carried through."""
        prior = self._total(self._settings(None).law.log_prob(values[SITE]))
        return prior + scale * self.log_likelihood(values, data)

    def _total(self, terms: Tensor) -> Tensor:
        """Sum over the scales, where there are several."""
        return terms if self.scale_per is None else terms.sum(-1)

    @_OnlyWithOneScale
    def sample_prior(self, n: int, *, rng: Rng) -> Values:
        """Draw sigma^2 [n]."""
        with scope(rng=stream(rng, "prior")):
            return {SITE: self._settings(None).law.sample(torch.Size([n]))}

    @_OnlyWithOneScale
    def simulate(self, values: Values, x: Any, *, rng: Rng) -> Tensor:
        """Draw targets [*batch, row] of one output at ``x`` for each ``scale_var`` [*batch].

        On the scale on which the model is stated: nothing is mapped back by ``standardize``.
        """
        x = inputs(x, "X")
        settings = self._settings(None)
        variance = values[SITE][..., None]
        gram = self._gram(settings, x)
        noise = settings.noise_var * torch.eye(len(x), dtype=x.dtype, device=x.device)
        factor, _ = safe_cholesky(gram + noise if self.noise_in == "scale" else gram)
        generator = stream(rng, "simulate", device=x.device)
        lead = values[SITE].shape
        white = torch.randn(*lead, len(x), generator=generator, dtype=x.dtype, device=x.device)
        f = variance.sqrt() * (white @ factor.mT)
        mean = self._mean(settings, x)
        f = f if mean is None else f + mean
        if self.noise_in == "scale":
            return f
        white = torch.randn(*lead, len(x), generator=generator, dtype=x.dtype, device=x.device)
        return f + settings.noise_var.sqrt() * white

    # ------------------------------------------------------------------------ hyper-parameters

    def _learnable(self) -> dict[str, Learned]:
        """Every hyper-parameter that a fit may change."""
        known = {
            f"kernel.{name}": Learned(hyper.value, hyper.shape, hyper.support, hyper.prior)
            for name, hyper in functional.hyperparameters(self.kernel).items()
            if not hyper.fixed
        }
        known.update({f"mean.{name}": item for name, item in self._mean_parameters().items()})
        known["noise_var"] = self._noise()
        argument = _SCALE_ARGUMENT.get(type(self.scale))
        if argument is not None:
            support = constraints.real if argument == "loc" else constraints.positive
            known[f"scale.{argument}"] = Learned(getattr(self.scale, argument), support=support)
        return known

    @functools.cached_property
    def _structure(self) -> Mapping[str, Learned]:
        """Shapes, supports and priors of :meth:`_learnable`, read once; values may be stale."""
        return self._learnable()

    def _check_learn(self) -> None:
        """Refuse names in ``learn`` that are no hyper-parameters."""
        if self.learn is None:
            return
        known = self._structure
        unknown = [name for name in self.learn if name not in known]
        if unknown:
            raise DataError(
                f"learn: expected names out of {', '.join(known)}, got {', '.join(unknown)}"
            )

    def _learned(self, known: Mapping[str, Learned]) -> dict[str, Learned]:
        """Select those that ``learn`` names."""
        return {name: known[name] for name in (known if self.learn is None else self.learn)}

    def hyper_sites(self, data: Any) -> Mapping[str, Site]:
        """Return the learned hyper-parameters: ``kernel.*``, ``noise_var``, ``scale.*``."""
        return {
            name: Site(
                tuple(item.shape),
                item.support,
                tuple(f"{name}_dim_{i}" for i in range(len(item.shape))),
            )
            for name, item in self._learned(self._structure).items()
        }

    def hyper_values(self, data: Any) -> Values:
        """Return the hyper-parameter values that the model holds, where fits start."""
        current = self._learned(self._learnable())
        return {name: item.value.detach().to(data[0]) for name, item in current.items()}

    def log_hyperprior(self, hyper: Values) -> Tensor:
        """Return the log prior density [*batch] of the learned hyper-parameters.

        The kernel's own prior where it has one; else half-Cauchy(``hyper_scale``) on the positive
        reals, standard Cauchy on the reals, flat on an interval.
        """
        total = torch.zeros((), dtype=torch.float64)
        own = self._log_mean_prior(_under("mean.", hyper))
        for name, item in self._learned(self._structure).items():
            if name.startswith("mean.") and own is not None:
                continue
            value = hyper[name]
            if item.prior is not None:
                term = item.prior.log_prob(value)
            else:
                term = _weak_log_prior(value, item.support, self.hyper_scale)
            event = len(item.shape)
            term = term.sum(tuple(range(term.ndim - event, term.ndim))) if event else term
            total = total.to(term) + term
        return total if own is None else total + own

    def log_evidence(self, hyper: Values, data: Any) -> Tensor:
        """Return log p(y | hyper) [*batch], sigma^2 integrated out."""
        x, y = data[:2]
        settings = self._settings(hyper)
        stats = self._condition(data, settings).stats
        term = mix.log_evidence(self._law_of(settings), stats)
        return self._total(term) + self._scaling(x, y).log_jacobian(y)

    def _settings(self, hyper: Values | None) -> Settings:
        """Fill in the model's own values where ``hyper`` has none."""
        hyper = hyper or {}
        known = self._structure
        unknown = [name for name in hyper if name not in known]
        if unknown:
            raise DataError(
                f"hyper: expected names out of {', '.join(known)}, got {', '.join(unknown)}"
            )
        lead = torch.broadcast_shapes(
            *(value.shape[: value.ndim - len(known[name].shape)] for name, value in hyper.items())
        )
        full = {k: v.expand(lead + known[k].shape) for k, v in hyper.items()}
        noise = full.get("noise_var", self._noise().value.detach().double().expand(lead))
        law: ScaleLaw = self.scale  # type: ignore[assignment]
        argument = _SCALE_ARGUMENT.get(type(law))
        if argument is not None and f"scale.{argument}" in hyper:
            given = D.constructor_arguments(law)
            law = type(law)(**{**given, argument: full[f"scale.{argument}"]}, validate_args=False)
        return Settings(_under("kernel.", full), _under("mean.", full), noise, law)

    def _law_of(self, settings: Settings) -> ScaleLaw:
        """Law of sigma^2 with batch shape [*batch], followed by 1 where there are several scales.

        A law that does not vary between hyper-parameters has batch shape ().
        """
        law = settings.law
        if self.scale_per is None:
            return law
        return D.map_batch(law, lambda value: value.unsqueeze(len(law.batch_shape)))

    # ----------------------------------------------------------------------------- conditioning

    def _gram(
        self, settings: Settings, x: Tensor, x2: Tensor | None = None, *, diag: bool = False
    ) -> Tensor:
        return functional.evaluate(self.kernel, x, x2, params=settings.kernel or None, diag=diag)

    def _residual(self, settings: Settings, x: Tensor, y: Tensor) -> Tensor:
        """Targets less their prior mean, [*batch, row, output] or [row, output]."""
        mean = self._mean(settings, x)
        return columns(y) if mean is None else columns(y) - mean[..., None]

    def _condition(self, data: Any, settings: Settings) -> Conditioned:
        """Factorise K once, for all rows or for those of each group."""
        x, y = data[:2]
        scaling = self._scaling(x, y)
        x, y = scaling.x(x), scaling.y(y)
        residual = self._residual(settings, x, y)
        if self.scale_per == "group":
            return self._condition_groups(data[2], x, residual, settings)
        n, batch = x.shape[0], settings.batch_shape
        each = self.scale_per == "output"
        if nngp_iterative.is_beyond(self.memory_limit, n, math.prod(batch)):
            if self.noise_in == "outside":
                raise CapabilityError(
                    f"noise_in='outside' needs the eigenvalues of a kernel matrix of {n} rows, "
                    f"which memory_limit={self.memory_limit:g} bytes cannot hold; use "
                    "noise_in='scale' or raise the limit"
                )
            stats, alpha = nngp_iterative.reduce_rows(self, x, residual, settings)
            return Conditioned(None, stats, alpha)
        _check_room(n, math.prod(batch), x)
        gram = self._gram(settings, x)
        rows = residual.mT[..., None] if each else residual  # [*batch, output, row, 1]
        noise = settings.noise_var.to(gram)
        if self.noise_in == "outside":
            if each:
                gram, noise = gram.unsqueeze(-3), noise.unsqueeze(-1)
            return Conditioned(None, mix.spectral_stats(gram, rows, noise))
        full = noise[..., None].expand(*batch, n)
        factor, _ = safe_cholesky(gram + torch.diag_embed(full))
        stats = mix.sufficient_stats(factor.unsqueeze(-3) if each else factor, rows)
        return Conditioned(factor, stats)

    def _condition_groups(
        self, groups: Groups, x: Tensor, residual: Tensor, settings: Settings
    ) -> Conditioned:
        """Factorise K of each group, all filled up to the size of the largest one.

        A padding row has target zero and, with the noise inside, variance one: it changes neither
        the quadratic form nor the determinant. The law divides by the true number of rows.
        """
        index, real = _padded_rows(groups, x.device)
        size = index.shape[1]
        _check_room(size, math.prod(settings.batch_shape) * len(index), x)
        wide = settings.map_batch(lambda value: value.unsqueeze(len(settings.batch_shape)))
        both = (real.unsqueeze(-1) & real.unsqueeze(-2)).to(x)
        gram = self._gram(wide if settings.kernel else settings, x[index]) * both
        rows = residual[..., index, :] * real[..., None].to(x)  # [*batch, group, row, output]
        noise = wide.noise_var.to(gram)
        if self.noise_in == "outside":
            base = mix.spectral_stats(gram, rows, noise)
            padding = (~real).to(x).sum(-1).expand(base.batch_shape)
            return Conditioned(None, mix.PaddedStats(base, padding))
        diagonal = torch.where(real, noise[..., None], torch.ones_like(noise)[..., None])
        factor, _ = safe_cholesky(gram + torch.diag_embed(diagonal))
        stats = mix.sufficient_stats(factor, rows)
        return Conditioned(factor, replace(stats, n=real.to(x).sum(-1)))

    def condition(self, data: Any, hyper: Values | None) -> Posterior:
        """Return the exact posterior given hyper-parameters; see :class:`Direct`.

        Leading dims [*batch] of ``hyper`` carry through to the evidence, the marginal of
        ``scale_var`` and the predictions.
        """
        x, y = data[:2]
        settings = self._settings(hyper)
        with torch.no_grad():
            given = self._condition(data, settings)
            prior = self._law_of(settings)
            law = mix.scale_posterior(prior, given.stats)
            evidence = self._total(mix.log_evidence(prior, given.stats))
            evidence = evidence + self._scaling(x, y).log_jacobian(y)
        kept = {
            "factor": given.factor,
            "alpha": given.alpha,
            "stats": given.stats,
            "law": law,
            "hyper": dict(hyper or {}),
        }
        # Files hold contiguous tensors; products with others may differ in the last bit.
        kept = map_tensors(Tensor.contiguous, kept)
        joint = {} if isinstance(law, PointMass) else {SITE: law}
        coords = {"group": list(data[2].labels)} if self.scale_per == "group" else {}
        dims = {name: site.dims for name, site in self.sites(data).items()}
        return Posterior(
            source=Closed(joint=joint, state=kept),
            model=self,
            context=Context(data, coords, dims if joint else {}),
            marginals=joint,
            log_evidence=Evidence(
                evidence.reshape(-1), "exact" if given.alpha is None else "estimate"
            ),
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
        old, new_rows = posterior.context.data, self.prepare(data)
        (x0, y0), (x1, y1) = old[:2], new_rows[:2]
        if x0.shape[1:] != x1.shape[1:] or y0.shape[1:] != y1.shape[1:]:
            raise ShapeError(
                f"update: expected rows of X {tuple(x0.shape[1:])} [feature] and y "
                f"{tuple(y0.shape[1:])} [output] as before, got {tuple(x1.shape[1:])} and "
                f"{tuple(y1.shape[1:])}"
            )
        joined: tuple[Any, ...] = (torch.cat([x0, x1]), torch.cat([y0, y1]))
        if self.scale_per == "group":
            joined = (*joined, old[2].of_rows() + new_rows[2].of_rows())
        both = self.prepare(joined)
        hyper = source.state["hyper"]
        new = self.condition(both, hyper or None)
        closed = new.source
        assert isinstance(closed, Closed)
        weights = source.log_weights
        if source.is_mixture:
            gain = self.log_evidence(hyper, both) - self.log_evidence(hyper, old)
            weights = gain.detach() if weights is None else weights + gain.detach()
        closed = replace(closed, hyper=source.hyper, log_weights=weights, repeats=source.repeats)
        coords = {**posterior.context.coords, **new.context.coords}
        context = replace(posterior.context, data=both, coords=coords)
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
            groups: With ``scale_per="group"``: {"group": one label a row}. Groups without data are
                predicted from the prior, each with a sigma^2 of its own.
            rng: Needed only for a posterior that was fitted with SVI.

        Returns:
            Student-t, normal, or a mixture, of shape [*batch, row] or [*batch, row, output].
        """
        if site not in (None, "f"):
            raise DataError(f"site: expected None (new observations) or 'f', got {site!r}")
        x_train, y_train = post.context.data[:2]
        x = inputs(x, "x", columns=x_train.shape[1]).to(x_train.device)
        labels = self._labels_of(groups, x.shape[-2])
        scaling = self._scaling(x_train, y_train)
        asked = _Asked(
            scaling.x(x).reshape(1, math.prod(x.shape[:-2]), *x.shape[-2:]),
            lead=x.shape[:-2],
            joint=joint,
            observation=site is None,
            squeeze=y_train.ndim == 1,
        )
        fitted = self._fitted(post, rng)
        if self.scale_per == "output":
            parts = self._output_parts(fitted, asked)
            each = [scaling.output(k) for k in range(len(parts))]
        elif self.scale_per == "group":
            parts = self._group_parts(fitted, post.context.data[2], labels, asked)
            each = [scaling] * len(parts)
        else:
            parts = [self._part(fitted, asked, torch.arange(x.shape[-2]))]
            each = [scaling]
        back = [
            replace(part, dist=rescaled(part.dist, its))
            for part, its in zip(parts, each, strict=True)
        ]
        stacked = self.scale_per == "output"
        axis = -1 if stacked or asked.squeeze else -2
        return assemble(back, fitted.log_weights, asked.lead, axis=axis, stacked=stacked)

    def _labels_of(self, groups: Mapping[str, Sequence[Any]] | None, rows: int) -> Sequence[Any]:
        """Return the label of each row, where there are groups."""
        if self.scale_per != "group":
            if groups is not None:
                raise CapabilityError(f"{type(self).__name__} has no plates; leave groups= out")
            return ()
        if not isinstance(groups, Mapping) or set(groups) != {"group"}:
            got = sorted(groups) if isinstance(groups, Mapping) else groups
            raise DataError(
                f'predict: expected groups={{"group": labels [row]}} with scale_per="group", '
                f"got {got!r}"
            )
        return group_labels(groups["group"], rows, "groups['group']")

    def _part(self, fitted: Fitted, asked: _Asked, positions: Tensor) -> Part:
        """Predict rows that share one sigma^2."""
        settings = fitted.settings
        if self.noise_in == "outside":
            cross, test = self._test_grams(fitted, asked)
            found = mix.spectral_predictive(
                fitted.law,
                fitted.conditioned.stats,
                cross,
                test,
                joint=asked.joint,
                observation=asked.observation,
                squeeze=asked.squeeze,
            )
        else:
            given = self._conditional(fitted, asked)
            found = mix.predictive(fitted.law, given, squeeze=asked.squeeze)
        mean = self._mean(settings, asked.x)
        dist = shifted(found.dist, mean, wide=not asked.squeeze)
        return Part(dist, found.log_weights, positions)

    def _conditional(self, fitted: Fitted, asked: _Asked) -> mix.Conditional:
        """Condition the process with sigma^2 = 1 on data, the noise inside."""
        factor = fitted.conditioned.factor
        if factor is None:
            limit = math.inf if self.memory_limit is None else self.memory_limit
            return nngp_iterative.conditional(self, fitted, asked, min(limit, 2.0**30))
        cross, test = self._test_grams(fitted, asked)
        return mix.conditional(factor, fitted.residual, cross, test, joint=asked.joint)

    def _test_grams(self, fitted: Fitted, asked: _Asked) -> tuple[Tensor, Tensor]:
        """Kernel of training with test rows, and of test rows, with the noise that is inside."""
        settings, x = fitted.settings, asked.x
        trained = fitted.x.expand(*x.shape[:-2], *fitted.x.shape)
        cross = self._gram(settings, trained, x)
        test = self._gram(settings, x, diag=not asked.joint)
        if self.noise_in == "scale" and asked.observation:
            noise = settings.noise_var.to(test)
            rows = noise[..., None].expand(*noise.shape, x.shape[-2])
            test = test + (torch.diag_embed(rows) if asked.joint else rows)
        return cross, test

    def _output_parts(self, fitted: Fitted, asked: _Asked) -> list[Part]:
        """Predict each output with its own posterior of sigma^2."""
        mean = self._mean(fitted.settings, asked.x)
        stats, given = fitted.conditioned.stats, None
        if self.noise_in == "scale":
            given = self._conditional(fitted, asked)
        else:
            cross, test = self._test_grams(fitted, asked)
        parts = []
        for k in range(fitted.residual.shape[-1]):
            take = _taking(k)
            law = D.map_batch(fitted.law, take)
            if given is not None:
                column = replace(given, location=given.location[..., k : k + 1])
                found = mix.predictive(law, column, squeeze=True)
            else:
                found = mix.spectral_predictive(
                    law,
                    stats.map_batch(stats.batch_shape, take),
                    cross,
                    test,
                    joint=asked.joint,
                    observation=asked.observation,
                    squeeze=True,
                )
            dist = shifted(found.dist, mean, wide=False)
            parts.append(Part(dist, found.log_weights, torch.tensor([k])))
        return parts

    def _group_parts(
        self, fitted: Fitted, groups: Groups, labels: Sequence[Any], asked: _Asked
    ) -> list[Part]:
        """Predict the rows of each group from the data of that group alone."""
        known = {label: number for number, label in enumerate(groups.labels)}
        of_rows = Groups.of(labels)
        parts = []
        for number, label in enumerate(of_rows.labels):
            positions = of_rows.rows(number)
            its = replace(asked, x=asked.x[:, :, positions.to(asked.x.device)])
            one = self._one_group(fitted, groups, known.get(label))
            parts.append(self._part(one, its, positions))
        if not parts:  # no rows at all
            none = torch.zeros(0, dtype=torch.long)
            parts = [self._part(self._one_group(fitted, groups, 0), asked, none)]
        return parts

    def _one_group(self, fitted: Fitted, groups: Groups, number: int | None) -> Fitted:
        """Restrict to the data of one group; to none, and the prior, for a new one."""
        settings = fitted.settings
        if number is None:
            rows = torch.zeros(0, dtype=torch.long)
            law = None
        else:
            rows = groups.rows(number)
            law = D.map_batch(fitted.law, _taking(number))
        k, device = len(rows), fitted.x.device
        residual = fitted.residual[..., rows.to(device), :]
        which = 0 if number is None else number
        if self.noise_in == "outside":
            base = fitted.conditioned.stats.base
            gram, noise = base.gram[..., which, :k, :k], base.noise_var[..., which]
            conditioned = Conditioned(None, mix.spectral_stats(gram, residual, noise))
        else:
            factor = fitted.conditioned.factor
            assert factor is not None
            factor = factor[..., which, :k, :k]
            conditioned = Conditioned(factor, mix.sufficient_stats(factor, residual))
        if law is None:
            prior = settings.law.expand(fitted.law.batch_shape[:2])
            law = mix.scale_posterior(prior, conditioned.stats)
        return replace(
            fitted, conditioned=conditioned, law=law, x=fitted.x[rows.to(device)], residual=residual
        )

    def _fitted(self, post: Posterior, rng: Rng | None) -> Fitted:
        """Bring any kind of posterior to hyper-parameters [hyper, 1] and a law [hyper, 1]."""
        data, source = post.context.data, post.source
        log_weights = getattr(source, "log_weights", None)
        if isinstance(source, Closed):
            state = source.state
            settings = self._settings(state["hyper"])
            conditioned = Conditioned(state["factor"], state["stats"], state.get("alpha"))
            law = D.map_batch(state["law"], _flat_column(len(settings.batch_shape)))
        else:
            settings = self._settings(None)
            with torch.no_grad():
                conditioned = self._condition(data, settings)
            if isinstance(source, Draws):
                variance = source.values[SITE].flatten(0, 1)
            else:
                rng = require_rng(rng, "a prediction from a fitted guide")
                variance = post.sample(1000, rng=rng)[SITE]
            law = PointMass(variance[:, None], validate_args=False)
            if log_weights is None:
                log_weights = torch.zeros(len(variance), dtype=variance.dtype)
        fitted = self._given(data, settings, conditioned)
        weights = None if log_weights is None else log_weights.flatten()
        return replace(fitted, law=law, log_weights=weights)

    def _given(self, data: Any, settings: Settings, conditioned: Conditioned) -> Fitted:
        """Bring hyper-parameters [*batch] to the form that predictions use; sigma^2 has its prior.

        Gradients of hyper-parameters are cut.
        """
        x, y = data[:2]
        scaling, scales = self._scaling(x, y), self._scales(data)
        column = _flat_column(len(settings.batch_shape))
        with torch.no_grad():
            flat = self._with_own_values(settings).map_batch(column)
            rows = scaling.x(x)
            # The mean function is evaluated with as many leading dims as the predictions have.
            residual = self._residual(flat, rows[None, None] if flat.mean else rows, scaling.y(y))
            prior = self._law_of(flat).expand(flat.batch_shape + torch.Size(scales))
        return Fitted(
            settings=flat,
            conditioned=conditioned.map_batch(settings.batch_shape, scales, column),
            law=prior,
            x=rows,
            residual=residual,
            log_weights=None,
        )

    def _with_own_values(self, settings: Settings) -> Settings:
        """Detach, the kernel's own values included.

        Predictions are differentiated with respect to inputs, never to hyper-parameters.
        """
        own = {
            name: hyper.value.expand(settings.batch_shape + hyper.shape)
            for name, hyper in functional.hyperparameters(self.kernel).items()
            if name not in settings.kernel
        }
        found = settings.detached()
        return replace(found, kernel={**own, **found.kernel})


# ------------------------------------------------------------------------------- conditioning


@dataclass(frozen=True)
class Conditioned:
    """What K was reduced to.

    Attributes:
        factor: Lower factor of K + noise [*batch, row, row], or [*batch, group, row, row] filled
            up to the largest group; None where the noise is outside.
        stats: Statistics of the data for the likelihood of sigma^2.
        alpha: (K + noise)^-1 (y - mean) [*batch, row, output] where K is not stored; else None.
    """

    factor: Tensor | None
    stats: Any
    alpha: Tensor | None = None

    def map_batch(
        self, batch: torch.Size, scales: tuple[int, ...], change: Callable[[Tensor], Tensor]
    ) -> Conditioned:
        """Apply ``change`` to the batch dims, those of several scales left alone."""
        factor, alpha = (None if t is None else change(t) for t in (self.factor, self.alpha))
        return Conditioned(factor, self.stats.map_batch(batch + torch.Size(scales), change), alpha)


@dataclass(frozen=True)
class Fitted:
    """A posterior in the form that predictions use, hyper-parameters and law over [hyper, 1].

    Attributes:
        settings: Hyper-parameters [hyper, 1].
        conditioned: The factorised kernel matrix.
        law: Posterior of sigma^2 [hyper, 1], followed by [output] or [group].
        x: Training inputs [row, feature], standardised.
        residual: Targets less their prior mean [row, output] or [hyper, 1, row, output].
        log_weights: Log weights [hyper]; None for equal ones.
    """

    settings: Settings
    conditioned: Conditioned
    law: ScaleLaw
    x: Tensor
    residual: Tensor
    log_weights: Tensor | None


@dataclass(frozen=True)
class _Asked:
    """What is to be predicted: standardised inputs ``x`` [1, batch, row, feature], and how."""

    x: Tensor
    lead: torch.Size
    joint: bool
    observation: bool
    squeeze: bool


def _under(prefix: str, values: Values) -> dict[str, Tensor]:
    """Select the values whose names begin with ``prefix``, without it."""
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _check_room(rows: int, matrices: int, x: Tensor) -> None:
    check_allocation(
        3 * 8 * rows * rows * max(1, matrices), f"a kernel matrix of {rows} rows", device=x.device
    )


def _padded_rows(groups: Groups, device: torch.device) -> tuple[Tensor, Tensor]:
    """Row numbers [group, size] of each group, and which of them are real (the others are 0)."""
    rows = [groups.rows(number) for number in range(len(groups.labels))]
    index = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    counts = torch.tensor([len(r) for r in rows])
    real = torch.arange(index.shape[1]) < counts[:, None]
    return index.to(device), real.to(device)


def _flat_column(dims: int) -> Callable[[Tensor], Tensor]:
    """Return the map of [*batch, ...] with ``dims`` batch dims to [prod(batch), 1, ...]."""

    def change(value: Tensor) -> Tensor:
        return value.reshape(-1, 1, *value.shape[dims:])

    return change


def _taking(k: int) -> Callable[[Tensor], Tensor]:
    """Return the map of [hyper, 1, scale, ...] to scale ``k``, [hyper, 1, ...]."""

    def change(value: Tensor) -> Tensor:
        return value[:, :, k]

    return change


def _weak_log_prior(value: Tensor, support: Any, scale: float) -> Tensor:
    """Half-Cauchy on the positive reals, Cauchy on the reals, flat on an interval."""
    upper = getattr(support, "upper_bound", None)
    if upper is not None and bool(torch.isfinite(torch.as_tensor(upper)).all()):
        return torch.zeros_like(value)
    free = support is constraints.real
    width = 1.0 if free else scale
    return -math.log(math.pi * width * (1.0 if free else 0.5)) - torch.log1p((value / width) ** 2)


# --------------------------------------------------------------------------------------- guide


@storable
@dataclass(frozen=True)
class ScaleProposal(Guide):
    """The likelihood of sigma^2 as a proposal: InverseGamma(N / 2, q / 2).

    N is the number of observed values and q their quadratic form; importance weights under it are
    proportional to p(sigma^2) sigma^2. With several scales there is one such law for each.
    """

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Reduce the data to the two arguments."""
        law = mix.importance_proposal(model.statistics(data))
        return {"concentration": law.concentration, "rate": law.rate}

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw sigma^2 [n], or [n, scale]."""
        law = InverseGamma(params["concentration"], params["rate"], validate_args=False)
        with scope(rng=rng):
            value = law.rsample(torch.Size([n]))
        log_q = law.log_prob(value).reshape(n, -1).sum(-1)
        return {SITE: value}, LogQ(log_q, torch.zeros_like(log_q))

    def marginals(self, params: Params, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return the proposal."""
        return {SITE: InverseGamma(params["concentration"], params["rate"], validate_args=False)}

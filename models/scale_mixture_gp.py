"""A GPyTorch or BoTorch Gaussian process with an unknown scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import gpytorch
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from probkit.errors import CapabilityError
from probkit.kernels import functional
from probkit.models.nngp import check_options
from probkit.models.nngp_process import Learned, ScaleMixtureProcess, Settings
from probkit.models.scale_laws import InverseGamma, as_scale_law
from probkit.models.standardise import Scaling, no_scaling

__all__ = ["ScaleMixture"]


@dataclass(frozen=True, eq=False)
class ScaleMixture(ScaleMixtureProcess):
    """The Gaussian process of a GPyTorch model, its scale unknown.

    With the model's mean m, kernel K and noise variance r: y = m + sigma (g + e), g ~ GP(0, K),
    e ~ N(0, r I), sigma^2 ~ ``scale``. The mean is not scaled. A point mass at one gives the
    model's own posterior, an inverse gamma law a Student-t process. The GPyTorch model is read,
    never changed: hyper-parameters are its own values unless ``Direct(hyper=)`` finds others.

    Args:
        model: An exact GP with ``mean_module``, ``covar_module`` and a Gaussian likelihood of one
            noise variance: a subclass of ``gpytorch.models.ExactGP`` or ``SingleTaskGP``. Its input
            transform, and ``Standardize`` as its outcome transform, are applied as they are.
        scale: Law of the VARIANCE sigma^2; any torch distribution on the positive reals.
        noise_in: "scale": sigma^2 multiplies the noise, too; "outside": it does not.
        scale_per: As in :class:`~probkit.models.ScaleMixtureNNGP`.
        learn: Hyper-parameters that a fit may change: ``kernel.*``, ``mean.*``, ``noise_var`` and
            the scale argument of the law. None for all. An output scale of the kernel multiplies
            sigma^2, so that only their product is known: leave one of them out.
        hyper_scale: Scale of the half-Cauchy prior of each positive hyper-parameter to which the
            model gives no prior of its own.

    Data is a pair (X [row, feature], y [row]) on the original scale; :attr:`data` is what the model
    was built with.

    Raises:
        CapabilityError: The model is not of that form.

    Example:
        >>> import probkit as pk
        >>> from botorch.models import SingleTaskGP
        >>> x = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        >>> model = ScaleMixture(SingleTaskGP(x, x.sin()))
        >>> post = pk.infer(model, model.data, rng=0)
        >>> type(post.predict(x).dist).__name__
        'StudentT'
    """

    model: Any
    scale: Distribution = field(default_factory=lambda: InverseGamma(2.0, 2.0))
    noise_in: Literal["scale", "outside"] = "scale"
    scale_per: Literal["output", "group"] | None = None
    learn: tuple[str, ...] | None = None
    hyper_scale: float = 2.5

    def __post_init__(self) -> None:
        _check_form(self.model)
        object.__setattr__(self, "scale", as_scale_law(self.scale))
        check_options(self)
        _check_forward(self.model)

    @property
    def kernel(self) -> gpytorch.kernels.Kernel:
        """The model's kernel."""
        kernel: gpytorch.kernels.Kernel = self.model.covar_module
        return kernel

    @property
    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs [row, feature] and targets [row] that the model was built with, as given.

        Raises:
            CapabilityError: The model was built without data.
        """
        if self.model.train_inputs is None or self.model.train_targets is None:
            raise CapabilityError("the model holds no data; pass (X, y) to infer")
        x = self.model.train_inputs[0]
        original = getattr(self.model, "_original_train_inputs", None)
        if original is not None and getattr(self.model, "_has_transformed_inputs", False):
            x = original
        mean, sd = _outcome_scale(self.model, x)
        return x, self.model.train_targets * sd + mean

    # ------------------------------------------------------------------------------------ hooks

    def _scaling(self, x: Tensor, y: Tensor) -> Scaling:
        mean, sd = (value.to(y).expand(y.shape[1:]) for value in _outcome_scale(self.model, x))
        plain = no_scaling(x, y)
        transform = getattr(self.model, "input_transform", None)
        if transform is None:
            return Scaling(plain.x_mean, plain.x_sd, mean, sd)
        return _Transformed(plain.x_mean, plain.x_sd, mean, sd, transform)

    def _mean(self, settings: Settings, x: Tensor) -> Tensor | None:
        module = self.model.mean_module
        if isinstance(module, gpytorch.means.ZeroMean):
            return None
        if not settings.mean:
            own = {name: value.detach() for name, value in module.named_parameters()}
            value: Tensor = torch.func.functional_call(module, own, (x,))
            return value
        return _for_each_draw(
            module, settings.mean, settings.batch_shape, lambda one, at: one(at), x
        )

    def _mean_parameters(self) -> Mapping[str, Learned]:
        return {
            name: Learned(value.detach(), value.shape, support)
            for name, value, support in _mean_values(self.model.mean_module)
        }

    def _log_mean_prior(self, mean: Mapping[str, Tensor]) -> Tensor | None:
        module = self.model.mean_module
        if not mean or not list(module.named_priors()):
            return None
        shapes = {name: item.shape for name, item in self._mean_parameters().items()}
        lead = torch.broadcast_shapes(
            *(value.shape[: value.ndim - len(shapes[name])] for name, value in mean.items())
        )
        full = {name: value.expand(lead + shapes[name]) for name, value in mean.items()}
        return _for_each_draw(module, full, lead, lambda one, _: _log_priors(one), None)

    def _noise(self) -> Learned:
        noise = self.model.likelihood.noise_covar
        priors = [prior for _, _, prior, _, _ in noise.named_priors()]
        constraint = noise.raw_noise_constraint
        lower = float(constraint.lower_bound)
        support = constraints.greater_than(lower) if lower > 0 else constraints.positive
        return Learned(
            noise.noise.detach().double().reshape(()),
            support=support,
            prior=priors[0] if priors else None,
        )


class _Transformed(Scaling):
    """Outcome scaling, with a BoTorch input transform in place of means and deviations."""

    def __init__(
        self, x_mean: Tensor, x_sd: Tensor, y_mean: Tensor, y_sd: Tensor, transform: Any
    ) -> None:
        super().__init__(x_mean, x_sd, y_mean, y_sd)
        object.__setattr__(self, "transform", transform)

    def x(self, x: Tensor) -> Tensor:
        """Transform inputs [*, feature], with the parameters that the model has learned."""
        training = self.transform.training  # type: ignore[attr-defined]
        try:
            result: Tensor = self.transform.eval()(x)  # type: ignore[attr-defined]
        finally:
            self.transform.train(training)  # type: ignore[attr-defined]
        return result


# ---------------------------------------------------------------------------------- the checks


def _check_form(model: Any) -> None:
    """See that mean, kernel and one noise variance are where GPyTorch models have them."""
    if not isinstance(model, gpytorch.models.ExactGP):
        raise CapabilityError(
            f"ScaleMixture: expected a gpytorch ExactGP or a BoTorch SingleTaskGP, got "
            f"{type(model).__name__}"
        )
    for name in ("mean_module", "covar_module"):
        if not isinstance(getattr(model, name, None), nn.Module):
            raise CapabilityError(
                f"ScaleMixture: expected a model with {name}, {type(model).__name__} has none; "
                "name its mean and kernel so"
            )
    likelihood = model.likelihood
    if type(likelihood) is not gpytorch.likelihoods.GaussianLikelihood:
        raise CapabilityError(
            "ScaleMixture: expected a GaussianLikelihood with one noise variance, got "
            f"{type(likelihood).__name__}; noise that differs between rows is not supported"
        )
    batch = tuple(model.covar_module.batch_shape)
    if batch or likelihood.noise.numel() != 1:
        raise CapabilityError(
            f"ScaleMixture: expected a model of one output, got kernel batch shape {batch}; wrap a "
            "model for each output"
        )
    _outcome_scale(model, torch.zeros(1, 1))


def _check_forward(model: Any) -> None:
    """Refuse a model whose ``forward`` is not N(mean_module(x), covar_module(x))."""
    if model.train_inputs is None:
        return
    x = model.train_inputs[0][:3]
    with torch.no_grad():
        given = model.forward(x)
        if model.training and getattr(model, "input_transform", None) is not None:
            x = model.transform_inputs(x)  # forward does so, too
        mean, gram = model.mean_module(x), model.covar_module(x).to_dense()
        if not isinstance(given, gpytorch.distributions.MultivariateNormal):
            raise CapabilityError("ScaleMixture: expected forward to return a MultivariateNormal")
        matches = given.mean.shape == mean.shape and torch.allclose(given.mean, mean, atol=1e-6)
        covariance = given.covariance_matrix
        matches &= covariance.shape == gram.shape and torch.allclose(covariance, gram, atol=1e-6)
    if not matches:
        raise CapabilityError(
            f"ScaleMixture: forward of {type(model).__name__} is not N(mean_module(x), "
            "covar_module(x)) at its training inputs; put all of it into the two modules"
        )


def _outcome_scale(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by which the model standardises its targets."""
    transform = getattr(model, "outcome_transform", None)
    if transform is None:
        return x.new_zeros(()), x.new_ones(())
    if type(transform).__name__ != "Standardize" or transform.means.numel() != 1:
        raise CapabilityError(
            "ScaleMixture: expected no outcome transform, or Standardize of one output, got "
            f"{type(transform).__name__}; transform the targets yourself"
        )
    return transform.means.detach().reshape(()), transform.stdvs.detach().reshape(())


# ------------------------------------------------------------------------- the mean function


def _mean_values(module: nn.Module) -> Iterator[tuple[str, Tensor, Any]]:
    """Name, constrained value and support of each learnable parameter of a mean function."""
    for raw_name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        home, name = _home(module, raw_name)
        constraint = _constraint(home, raw_name)
        value = parameter if constraint is None else constraint.transform(parameter)
        yield name, value, functional._support(constraint)


def _home(module: nn.Module, raw_name: str) -> tuple[nn.Module, str]:
    path, _, attribute = raw_name.rpartition(".")
    name = f"{path}.{attribute.removeprefix('raw_')}".removeprefix(".")
    return module.get_submodule(path), name


def _constraint(home: nn.Module, raw_name: str) -> Any:
    known: Mapping[str, Any] = getattr(home, "_constraints", {})
    return known.get(f"{raw_name.rpartition('.')[2]}_constraint")


def _for_each_draw(
    module: nn.Module,
    values: Mapping[str, Tensor],
    batch: torch.Size,
    function: Any,
    x: Tensor | None,
) -> Tensor:
    """Evaluate ``function(module, x)`` for each of the draws [*batch] of the parameters.

    Args:
        module: The mean function.
        values: Constrained values [*batch, *shape] by name.
        batch: Their leading dims.
        function: Gives a tensor from the module with the values in place.
        x: Inputs [row, feature], or [1, points, row, feature] for draws [draw, 1]; None for none.
    """
    wrapped, count = _Function(module, function), len(batch)
    flat = {name: value.reshape(-1, *value.shape[count:]) for name, value in values.items()}
    results = []
    for draw in range(batch.numel()):
        raw = _raw_values(module, {name: value[draw] for name, value in flat.items()})
        given = {f"inner.{name}": value for name, value in raw.items()}
        results.append(torch.func.functional_call(wrapped, given, (x,)))
    stacked = torch.stack(results)
    if x is None or x.ndim == 2:
        return stacked.reshape(batch + stacked.shape[1:])
    # Draws [draw, 1] and inputs [1, points, row, feature]: the result is [draw, points, row].
    return stacked.reshape(len(stacked), *stacked.shape[2:])


class _Function(nn.Module):
    """A function of a module, in the form that ``functional_call`` takes."""

    def __init__(self, inner: nn.Module, function: Any) -> None:
        super().__init__()
        self.inner, self.function = inner, function

    def forward(self, x: Tensor | None) -> Any:
        """Evaluate it."""
        return self.function(self.inner, x)


def _raw_values(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Raw parameters, by their raw names, for constrained values."""
    raw = {}
    for raw_name, parameter in module.named_parameters():
        home, name = _home(module, raw_name)
        if name in values:
            constraint = _constraint(home, raw_name)
            value = values[name].to(parameter)
            raw[raw_name] = value if constraint is None else constraint.inverse_transform(value)
    return raw


def _log_priors(module: Any) -> Tensor:
    """Sum of the log densities of all priors of a GPyTorch module."""
    terms = [
        prior.log_prob(closure(own)).sum() for _, own, prior, closure, _ in module.named_priors()
    ]
    return torch.stack(terms).sum()

"""Sample paths of scale-mixture regressions by Matheron's rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.kernels import functional
from probkit.models import nngp_iterative
from probkit.models.nngp_data import inputs
from probkit.models.nngp_process import SITE, Fitted, ScaleMixtureProcess
from probkit.models.random_features import random_features
from probkit.numerics import safe_cholesky
from probkit.posterior import Posterior
from probkit.rng import Rng, draw_count, scope, stream
from probkit.sources import Closed

__all__ = ["SamplePaths", "sample_paths"]


def sample_paths(
    post: Posterior,
    n: int,
    *,
    rng: Rng,
    prior: Literal["exact", "features"] = "exact",
    features: int = 1024,
    group: Any = None,
) -> SamplePaths:
    """Draw functions from a posterior, each with a scale (and hyper-parameters) of its own.

    Matheron's rule turns a path of the prior into one of the posterior: with sigma^2 from its
    posterior, g a prior path for sigma^2 = 1 and e a draw of the noise, the path is
    f(x) = m(x) + sigma g(x) + K(x, X) (K + r I)^-1 (y - m(X) - sigma (g(X) + e))
    (Wilson et al., "Efficiently Sampling Functions from Gaussian Process Posteriors", ICML 2020,
    eq. 9; the scale is ours). With heavy-tailed laws of sigma^2 whole paths are heavy-tailed.

    Args:
        post: A posterior of a scale-mixture regression.
        n: Number of paths.
        rng: Seed or generator.
        prior: "exact": the prior is drawn jointly at the training points and at every point that
            was asked for so far, so paths have exactly the law of ``post.predict(site="f",
            joint=True)``; the cost grows with the cube of the number of distinct points, and there
            are no gradients. "features": the prior is a random network or a sum of waves, so paths
            are cheap, differentiable functions, with a prior covariance that is off by about
            1 / sqrt(features).
        features: Width of the network, or number of frequencies.
        group: With ``scale_per="group"``: the group whose function is drawn.

    Returns:
        A function of x.

    Raises:
        CapabilityError: Not such a posterior; or features that do not exist, or several sets of
            hyper-parameters, with ``prior="features"``.

    Example:
        >>> import probkit as pk
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.models import ScaleMixtureNNGP
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> post = pk.infer(ScaleMixtureNNGP(NNGPKernel()), (x, x[:, 0].sin()), rng=0)
        >>> paths = sample_paths(post, 5, rng=1)
        >>> paths(x[:3]).shape
        torch.Size([5, 3])
        >>> bool((paths(x[2:3])[:, 0] == paths(x[:3])[:, 2]).all())
        True
    """
    model = post.model
    if not isinstance(model, ScaleMixtureProcess):
        raise CapabilityError(
            f"sample_paths: expected a posterior of a scale-mixture regression, got one of "
            f"{type(model).__name__}; use predict(joint=True).sample"
        )
    if prior not in ("exact", "features"):
        raise DataError(f"prior: expected 'exact' or 'features', got {prior!r}")
    n = draw_count(n)
    x, y = post.context.data[:2]
    with torch.no_grad():
        fitted, scale_var = _draw_scales(post, n, group, stream(rng, "scales"))
        generator = stream(rng, "paths", device=x.device)
        if prior == "exact" and fitted.conditioned.alpha is not None:
            raise CapabilityError(
                "prior='exact' factorises the kernel matrix of all training rows, which the "
                "model's memory_limit rules out; use prior='features'"
            )
        if prior == "exact":
            ground: _Prior = _ExactPrior(model, fitted, n, y_columns(y), generator)
        else:
            ground = _FeaturePrior(model, fitted, n, y_columns(y), features, generator)
        coefficients = _coefficients(model, fitted, scale_var, ground, generator)
    return SamplePaths(post, fitted, scale_var, ground, coefficients)


def y_columns(y: Tensor) -> int:
    """Number of outputs of targets [row] or [row, output]."""
    return 1 if y.ndim == 1 else y.shape[1]


class SamplePaths:
    """Functions drawn from a posterior; made by :func:`sample_paths`.

    Calling it with x [*batch, row, feature] gives the latent function, noise left out, on the
    original scale: [path, *batch, row], or [path, *batch, row, output]. Equal rows always get equal
    values, whichever call they are in.

    Attributes:
        scale_var: sigma^2 of each path [path], or [path, output] with a scale for each output.
    """

    def __init__(
        self,
        post: Posterior,
        fitted: Fitted,
        scale_var: Tensor,
        ground: _Prior,
        coefficients: Tensor,
    ) -> None:
        self._post, self._fitted, self._ground = post, fitted, ground
        self._coefficients = coefficients
        self.scale_var = scale_var

    def __call__(self, x: Any) -> Tensor:
        """Evaluate every path at ``x`` [*batch, row, feature].

        Raises:
            ShapeError: Other columns than in training.
        """
        model, (x_train, y_train) = self._post.model, self._post.context.data[:2]
        x = inputs(x, "x", columns=x_train.shape[1]).to(x_train.device)
        lead = x.shape[:-1]
        scaling = model._scaling(x_train, y_train)
        rows = scaling.x(x).reshape(-1, x.shape[-1])
        values = self._latent(model, rows)
        if y_train.ndim == 1:
            values = values[..., 0] * scaling.y_sd + scaling.y_mean
            return values.reshape(len(values), *lead)
        values = values * scaling.y_sd + scaling.y_mean
        return values.reshape(len(values), *lead, values.shape[-1])

    def _latent(self, model: ScaleMixtureProcess, rows: Tensor) -> Tensor:
        """Values [path, row, output] on the standardised scale."""
        settings = self._fitted.settings
        prior = _root(self.scale_var, self._ground.outputs) * self._ground(rows)
        cross = model._gram(settings, rows[None, None], self._fitted.x[None, None])[:, 0]
        values = prior + cross @ self._coefficients
        mean = model._mean(settings, rows[None, None])
        return values if mean is None else values + mean[:, 0, :, None]


def _root(scale_var: Tensor, outputs: int) -> Tensor:
    """Standard deviations [path, 1, output or 1]."""
    columns = scale_var[:, None] if scale_var.ndim == 1 else scale_var
    if columns.shape[1] not in (1, outputs):
        raise ShapeError(f"expected scales for {outputs} outputs, got {columns.shape[1]}")
    return columns.sqrt()[:, None, :]


# ----------------------------------------------------------------------------------- the draws


def _draw_scales(
    post: Posterior, n: int, group: Any, generator: torch.Generator
) -> tuple[Fitted, Tensor]:
    """Draw sigma^2 and the hyper-parameters that go with it.

    Returns:
        The data, conditioned on hyper-parameters [path or 1, 1], and sigma^2 [path] or
        [path, output].
    """
    model, source = post.model, post.source
    data = post.context.data
    values = dict(post.sample(n, rng=stream(generator, "values")))
    scale_var = values.pop(SITE, None)
    several = isinstance(source, Closed) and source.is_mixture
    if not several:
        values = dict(source.state["hyper"]) if isinstance(source, Closed) else {}
    settings = model._settings(values or None)
    fitted = model._given(data, settings, model._condition(data, settings))
    if scale_var is None:  # a point mass, which may be a hyper-parameter
        scale_var = fitted.law.value[:, 0].expand(n, *fitted.law.value.shape[2:])
    if model.scale_per != "group":
        if group is not None:
            raise CapabilityError(f"{type(model).__name__} has no groups; leave group= out")
        return fitted, scale_var
    known = {label: number for number, label in enumerate(data[2].labels)}
    number = known.get(group)
    if group is None:
        raise DataError(
            f"group: expected a label, of {', '.join(map(repr, known))} or a new one, got None"
        )
    if number is not None:
        return model._one_group(fitted, data[2], number), scale_var[:, number]
    law = fitted.settings.law.expand(fitted.settings.batch_shape)  # [path or 1, 1]
    with scope(rng=stream(generator, "new group")):
        fresh = law.sample(torch.Size([1 if several else n]))
    return model._one_group(fitted, data[2], None), fresh.reshape(n)


def _coefficients(
    model: ScaleMixtureProcess,
    fitted: Fitted,
    scale_var: Tensor,
    ground: _Prior,
    generator: torch.Generator,
) -> Tensor:
    """Weights [path, row, output] of the kernel functions at the training rows."""
    n, outputs, like = len(scale_var), ground.outputs, fitted.x
    root = _root(scale_var, outputs)
    rows = len(fitted.x)
    noise_sd = fitted.settings.noise_var[:, 0].sqrt().to(like)[:, None, None]
    white = torch.randn(n, rows, outputs, generator=generator, dtype=like.dtype, device=like.device)
    noise = noise_sd * white
    residual = fitted.residual if fitted.residual.ndim == 2 else fitted.residual[:, 0]
    values = root * ground(fitted.x)
    if model.noise_in == "scale":
        gap = residual - values - root * noise
        if fitted.conditioned.factor is None:
            return nngp_iterative.solve(model, fitted, gap)
        factor = fitted.conditioned.factor[:, 0].expand(n, rows, rows)
        return torch.cholesky_solve(gap, factor)
    stats = fitted.conditioned.stats
    spectrum, vectors = stats.eigenvalues[:, 0], stats.eigenvectors[:, 0]
    variance = stats.noise_var[:, 0]
    if model.scale_per == "output":  # [hyper, output, ...]: the spectrum is the same for each
        spectrum, vectors, variance = spectrum[:, 0], vectors[:, 0], variance[:, 0]
    gap = residual - values - noise
    shrink = 1 / (spectrum[:, :, None] + variance[:, None, None] / root.square())
    return vectors @ (shrink * (vectors.mT @ gap))


# ------------------------------------------------------------------------------ prior functions


class _Prior:
    """Prior paths for sigma^2 = 1, values [path, row, output] at rows [row, feature]."""

    outputs: int

    def __call__(self, rows: Tensor) -> Tensor:
        raise AssertionError("every final class evaluates")


class _ExactPrior(_Prior):
    """Joint draws at all points asked for so far, extended point by point.

    Known rows keep their values: the draw at new rows is conditioned on all old ones. Values are
    R z with R the Cholesky factor of the kernel at the points and z standard normal.
    """

    def __init__(
        self,
        model: ScaleMixtureProcess,
        fitted: Fitted,
        n: int,
        outputs: int,
        generator: torch.Generator,
    ) -> None:
        self.outputs = outputs
        self._model, self._settings = model, fitted.settings
        self._generator, self._n = generator, n
        hyper = fitted.settings.batch_shape[0]
        like = fitted.x
        self._points = like[:0]
        self._factor = like.new_zeros(hyper, 0, 0)
        self._white = like.new_zeros(n, 0, outputs)
        self._values = like.new_zeros(n, 0, outputs)

    def __call__(self, rows: Tensor) -> Tensor:
        with torch.no_grad():
            distinct, which = torch.unique(rows.detach(), dim=0, return_inverse=True)
            place = _find(distinct, self._points)
            new = distinct[place < 0]
            if len(new):
                place[place < 0] = len(self._points) + torch.arange(len(new), device=rows.device)
                self._extend(new)
            return self._values[:, place[which]]

    def _extend(self, new: Tensor) -> None:
        """Draw at ``new`` given all points so far."""

        def gram(a: Tensor, b: Tensor) -> Tensor:
            return self._model._gram(self._settings, a[None, None], b[None, None])[:, 0]

        own = gram(new, new)
        half = torch.linalg.solve_triangular(self._factor, gram(self._points, new), upper=False)
        unit = own.diagonal(dim1=-2, dim2=-1).mean(-1)
        with scope(quiet=True):  # points close to each other are expected here
            corner, _ = safe_cholesky(own - half.mT @ half, unit=unit)
        white = torch.randn(
            self._n,
            len(new),
            self.outputs,
            generator=self._generator,
            dtype=new.dtype,
            device=new.device,
        )
        values = half.mT @ self._white + corner @ white
        old, count = len(self._points), len(new)
        top = torch.cat([self._factor, own.new_zeros(len(own), old, count)], -1)
        self._factor = torch.cat([top, torch.cat([half.mT, corner], -1)], -2)
        self._points = torch.cat([self._points, new])
        self._white = torch.cat([self._white, white], 1)
        self._values = torch.cat([self._values, values], 1)


def _find(rows: Tensor, known: Tensor) -> Tensor:
    """Position of each row among the known ones, which are distinct; -1 where it is new."""
    if len(known) == 0:
        return torch.full((len(rows),), -1, dtype=torch.long, device=rows.device)
    _, which = torch.unique(torch.cat([known, rows]), dim=0, return_inverse=True)
    place = torch.full((int(which.max()) + 1,), -1, dtype=torch.long, device=rows.device)
    place[which[: len(known)]] = torch.arange(len(known), device=rows.device)
    return place[which[len(known) :]]


class _FeaturePrior(_Prior):
    """Linear combinations of random features."""

    def __init__(
        self,
        model: ScaleMixtureProcess,
        fitted: Fitted,
        n: int,
        outputs: int,
        size: int,
        generator: torch.Generator,
    ) -> None:
        if fitted.settings.batch_shape[0] != 1:
            raise CapabilityError(
                "prior='features' needs one set of hyper-parameters, got a mixture over draws of "
                "them; use prior='exact'"
            )
        if size < 1:
            raise DataError(f"features: expected a number >= 1, got {size}")
        self.outputs = outputs
        values = {k: v[0, 0] for k, v in fitted.settings.kernel.items()}
        bound, _ = functional.bind(model.kernel, values)
        like = fitted.x
        self._phi: Callable[[Tensor], Tensor] = random_features(
            bound, size, like.shape[1], generator=generator, like=like
        )
        count = self._phi(like.new_zeros(1, like.shape[1])).shape[-1]
        self._weights = torch.randn(
            n, count, outputs, generator=generator, dtype=like.dtype, device=like.device
        )

    def __call__(self, rows: Tensor) -> Tensor:
        return self._phi(rows) @ self._weights

"""Regression with scale mixtures of Gaussian processes, NNGPs in particular."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import gpytorch
import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.errors import DataError
from probkit.files import register
from probkit.kernels.iterative import Iterative
from probkit.kernels.storing import kernel_config, kernel_from_config
from probkit.models.nngp_process import Learned, ScaleMixtureProcess, ScaleProposal
from probkit.models.scale_laws import InverseGamma, as_scale_law
from probkit.models.standardise import Scaling, fit_scaling, no_scaling

__all__ = ["ScaleMixtureNNGP", "ScaleProposal", "check_options", "check_positive"]


@dataclass(frozen=True, eq=False)
class ScaleMixtureNNGP(ScaleMixtureProcess):
    """Gaussian process regression with an unknown, shared scale: a heavy-tailed process.

    f | sigma^2 ~ GP(0, sigma^2 K), sigma^2 ~ ``scale``, one sigma^2 for all inputs and outputs
    (unless ``scale_per`` says otherwise), and y = f + noise. It is the wide limit of a network
    whose last-layer variance is random (Lee, Yun, Yang and Lee, "Scale Mixtures of Neural Network
    Gaussian Processes", ICLR 2022, theorem 3.1); any GPyTorch kernel may stand in for the NNGP
    kernel. An inverse gamma law gives a Student-t process in closed form, a point mass the plain
    Gaussian process, and every other law a one-dimensional integral that is computed by
    quadrature.

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
        scale_per: None for one sigma^2 shared by everything. "output": each output c has its own
            sigma_c^2, drawn independently from ``scale``, so that outputs are independent processes
            with one kernel. "group": each group g of rows has its own function f_g | sigma_g^2 ~
            GP(0, sigma_g^2 K), independent of the others given the hyper-parameters, which groups
            share; outputs share the sigma^2 of their group. Both are exact.
        standardize: Scale inputs and targets by the training means and standard deviations; results
            are on the original scale, ``log_evidence`` included.
        learn: Hyper-parameters that a fit may change, out of :meth:`hyper_sites`; None for all:
            those that the kernel learns, ``noise_var``, and the scale argument of the law.
        hyper_scale: Scale of the half-Cauchy prior of each positive hyper-parameter whose kernel
            gives it no prior of its own.
        memory_limit: Bytes that kernel matrices may take. Beyond it none is stored: solves are by
            conjugate gradients, and the log determinant, so the evidence, is an estimate by
            Lanczos quadrature, the same random vectors each time. None: matrices are always stored.
            Needs ``noise_in="scale"``; does not apply to the small matrices of groups.
        solver: Tolerance, preconditioner and random vectors of that route.

    Data is a pair (X [row, feature], y [row] or [row, output]). With ``scale_per="group"`` it is a
    triple: one label a row comes third, integers or strings; ``predict`` then needs
    ``groups={"group": labels}``, and predicts labels that were not seen from the prior.

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
    scale_per: Literal["output", "group"] | None = None
    standardize: bool = False
    learn: tuple[str, ...] | None = None
    hyper_scale: float = 2.5
    memory_limit: float | None = None
    solver: Iterative = field(default_factory=Iterative)

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, gpytorch.kernels.Kernel):
            raise DataError(
                f"kernel: expected a GPyTorch kernel such as NNGPKernel(), got "
                f"{type(self.kernel).__name__}"
            )
        object.__setattr__(self, "scale", as_scale_law(self.scale))
        check_positive("noise_var", self.noise_var)
        if self.memory_limit is not None:
            check_positive("memory_limit", self.memory_limit)
        check_options(self)

    def _scaling(self, x: Tensor, y: Tensor) -> Scaling:
        return fit_scaling(x, y) if self.standardize else no_scaling(x, y)

    def _noise(self) -> Learned:
        return Learned(torch.tensor(float(self.noise_var), dtype=torch.float64))


def check_positive(name: str, value: Any) -> None:
    """Refuse anything but a finite number > 0.

    Raises:
        DataError: With the name of the option.
    """
    if not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise DataError(f"{name}: expected a finite number > 0, got {value!r}")


def check_options(model: ScaleMixtureProcess) -> None:
    """Check the options that all scale-mixture regressions share.

    Raises:
        DataError: One is outside its range; the message names it.
    """
    check_positive("hyper_scale", model.hyper_scale)
    if model.noise_in not in ("scale", "outside"):
        raise DataError(f"noise_in: expected 'scale' or 'outside', got {model.noise_in!r}")
    if model.scale_per not in (None, "output", "group"):
        raise DataError(f"scale_per: expected None, 'output' or 'group', got {model.scale_per!r}")
    model._check_learn()


# --------------------------------------------------------------------------------------- files


def _to_tree(model: ScaleMixtureNNGP) -> dict[str, Any]:
    config, tensors = kernel_config(model.kernel)
    options = {
        name: getattr(model, name)
        for name in (
            *("scale", "noise_var", "noise_in", "scale_per", "standardize", "learn"),
            *("hyper_scale", "memory_limit", "solver"),
        )
    }
    return {"kernel": {"config": config, "tensors": tensors}, **options}


def _from_tree(tree: dict[str, Any]) -> ScaleMixtureNNGP:
    kernel = kernel_from_config(tree["kernel"]["config"], tree["kernel"]["tensors"])
    return ScaleMixtureNNGP(kernel, **{k: v for k, v in tree.items() if k != "kernel"})


register(ScaleMixtureNNGP, "ScaleMixtureNNGP", _to_tree, _from_tree)

"""Sparse Bayesian learning with a Kronecker dictionary and a Kronecker-structured support."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from probkit.errors import DataError
from probkit.files import register
from probkit.models.sbl.base import SparseModel, checked_matrix
from probkit.models.scale_laws import HalfCauchy

__all__ = ["KroneckerSBL"]

UPDATES = ("hybrid", "am", "svd", "ksbl")


@dataclass(frozen=True, eq=False)
class KroneckerSBL(SparseModel):
    """Sparse recovery with H = H_1 kron ... kron H_I and prior variances g_1 kron ... kron g_I.

    y = H x + n; x need not be a Kronecker vector, only its support is (He & Joseph, "Bayesian
    algorithms for Kronecker-structured sparse vector recovery", IEEE TSP 2024). Real or circular
    complex, any number of modes. Nothing of size N x N or M x M is ever formed: an E-step costs
    the products with the factors and their small spectra.

    Args:
        factors: H_1, ..., H_I, each [M_i, N_i], or [*problem, M_i, N_i]. Mode 1 varies slowest, as
            in ``y.reshape(M_1, ..., M_I)``.
        noise_var: Noise variance s2 (E|n|^2 if complex), a number or one for each problem; None
            learns it.
        update: "am": alternating minimisation, monotone. "svd": rank-one projections, faster and
            in most cases sparser, without a guarantee. "hybrid": the SVD step first, then AM, then
            a revision of the support, all judged by the evidence. "ksbl": one AM cycle a step, the
            earlier baseline.
        shared_support: Whether y has a last dim [snapshot] of measurements that share g.
        noise_floor: Smallest learned noise variance, as a share of mean |y|^2.
        coupling: Block sparsity: for each mode beta >= 0, by which an index lifts the prior
            variances of its neighbours (0.5 or 0.8; 0 leaves a mode alone). Fitted by alternating
            least squares in place of ``update`` "hybrid" or "am".
        variance_law: Prior law of each entry of each g_i, for the full posterior
            (``Direct(hyper=NUTS())``, small problems) only.
        noise_law: Prior law of the noise variance, likewise.

    Data is y [*problem, M_1, ..., M_I] or [*problem, M_1 * ... * M_I], with [snapshot] at the end
    with ``shared_support``. Weights have the shape [*problem, N_1, ..., N_I].

    Raises:
        ShapeError: A factor is no matrix.
        DataError: A value outside its range; the message names it.

    Example:
        >>> import probkit as pk
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> factors = [torch.randn(4, 5, generator=g), torch.randn(5, 6, generator=g)]
        >>> x = torch.zeros(5, 6)
        >>> x[1, 2] = 1.0
        >>> y = factors[0] @ x @ factors[1].T
        >>> post = pk.infer(KroneckerSBL(factors, noise_var=1e-4), y, rng=0)
        >>> post.analytic["weights"].mean.abs().argmax().item() == 1 * 6 + 2
        True
    """

    factors: Sequence[Any]
    noise_var: Any = None
    update: str = "hybrid"
    shared_support: bool = False
    noise_floor: float = 1e-6
    coupling: Sequence[float] | None = None
    variance_law: Distribution = field(default_factory=lambda: HalfCauchy(1.0))
    noise_law: Distribution = field(default_factory=lambda: HalfCauchy(1.0))

    def __post_init__(self) -> None:
        if not isinstance(self.factors, list | tuple) or not self.factors:
            raise DataError(
                f"factors: expected a list [H_1, ..., H_I] of matrices, got "
                f"{type(self.factors).__name__}"
            )
        matrices = tuple(
            checked_matrix(factor, f"factors[{i}]") for i, factor in enumerate(self.factors)
        )
        object.__setattr__(self, "factors", matrices)
        self._check_options(UPDATES)
        if self.coupling is not None:
            self._check_coupling()

    def _check_coupling(self) -> None:
        given = self.coupling
        if not isinstance(given, list | tuple) or len(given) != len(self.factors):
            raise DataError(
                f"coupling: expected one number >= 0 for each of {len(self.factors)} modes, got "
                f"{given!r}"
            )
        if not all(isinstance(beta, Real) and 0 <= float(beta) < math.inf for beta in given):
            raise DataError(f"coupling: expected finite numbers beta >= 0, got {given!r}")
        if self.update not in ("hybrid", "am"):
            raise DataError(
                f"coupling: expected update 'hybrid' or 'am', which it replaces, got "
                f"{self.update!r}"
            )
        object.__setattr__(self, "coupling", tuple(float(beta) for beta in given))

    @property
    def dictionaries(self) -> tuple[Tensor, ...]:
        """H_1, ..., H_I."""
        return tuple(self.factors)


def _to_tree(model: KroneckerSBL) -> dict[str, Any]:
    return {item.name: getattr(model, item.name) for item in fields(model)}


register(KroneckerSBL, "KroneckerSBL", _to_tree, lambda tree: KroneckerSBL(**tree))

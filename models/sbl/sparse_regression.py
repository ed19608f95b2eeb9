"""Plain sparse Bayesian learning: one prior variance for each weight."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor
from torch.distributions import Distribution

from probkit.files import register
from probkit.models.sbl.base import SparseModel, checked_matrix
from probkit.models.scale_laws import HalfCauchy

__all__ = ["SparseRegression"]

UPDATES = ("em", "mackay", "mm", "fast")


@dataclass(frozen=True, eq=False)
class SparseRegression(SparseModel):
    """Linear regression with automatic relevance determination, real or circular complex.

    y = H x + n with x_j ~ (C)N(0, g_j) and n ~ (C)N(0, noise_var I) (Tipping, "Sparse Bayesian
    learning and the relevance vector machine", JMLR 2001). ``infer`` maximises the evidence over
    the prior variances g, most of which become zero, and returns the exact posterior of the
    weights given them. H may have more columns than rows, or fewer.

    With more columns than data, one snapshot and ``noise_var=None`` the evidence has optima in
    which the noise is far too small and hundreds of weights fit it. "em" with pruning seldom ends
    there; "fast" and runs without pruning do. A warning is given where the noise collapsed.

    Args:
        H: Dictionary [M, N]; [*problem, M, N] for a batch of problems with their own.
        noise_var: Noise variance s2 (E|n|^2 if complex), a number or one for each problem; None
            learns it.
        update: How g is fitted. "em": monotone, and with pruning the most accurate. "mackay": fixed
            point, the fastest. "mm": monotone and fast. "fast": one weight at a time from the empty
            model (Tipping & Faul 2003), which reaches the highest evidence; for a known noise.
        shared_support: Whether y has a last dim [snapshot] of measurements that share g.
        noise_floor: Smallest learned noise variance, as a share of mean |y|^2.
        variance_law: Prior law of each variance, for the full posterior (``Direct(hyper=NUTS())``)
            only; the half-Cauchy is stated for the standard deviation (the horseshoe).
        noise_law: Prior law of the noise variance, likewise.

    Data is y [*problem, M], or [*problem, M, snapshot] with ``shared_support``.

    Raises:
        ShapeError: H is no matrix.
        DataError: A value outside its range; the message names it.

    Example:
        >>> import probkit as pk
        >>> import torch
        >>> H = torch.eye(4, dtype=torch.float64)
        >>> y = torch.tensor([3.0, 0.01, -2.0, 0.0], dtype=torch.float64)
        >>> post = pk.infer(SparseRegression(H, noise_var=0.01), y, rng=0)
        >>> (post.analytic["weights"].mean != 0).tolist()
        [True, False, True, False]
    """

    H: Any
    noise_var: Any = None
    update: str = "em"
    shared_support: bool = False
    noise_floor: float = 1e-6
    variance_law: Distribution = field(default_factory=lambda: HalfCauchy(1.0))
    noise_law: Distribution = field(default_factory=lambda: HalfCauchy(1.0))

    def __post_init__(self) -> None:
        object.__setattr__(self, "H", checked_matrix(self.H, "H"))
        self._check_options(UPDATES)

    @property
    def dictionaries(self) -> tuple[Tensor, ...]:
        """The one dictionary, H."""
        return (self.H,)


def _to_tree(model: SparseRegression) -> dict[str, Any]:
    return {item.name: getattr(model, item.name) for item in fields(model)}


register(SparseRegression, "SparseRegression", _to_tree, lambda tree: SparseRegression(**tree))

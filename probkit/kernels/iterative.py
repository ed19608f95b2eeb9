r"""Solves and log determinants of kernel matrices that are never stored.

With :math:`A = K + s I` known by its products only: preconditioned conjugate gradients solve
:math:`A X = B`; their coefficients are a Lanczos tridiagonalisation of the preconditioned matrix,
whose quadrature estimates :math:`\log |A| - \log |P|` (Gardner et al., "GPyTorch: Blackbox
Matrix-Matrix Gaussian Process Inference with GPU Acceleration", NeurIPS 2018, sections 3 and 4).
The preconditioner is :math:`P = L L^T + s I`, with L from a pivoted Cholesky factorisation of K.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.errors import ConvergenceWarning, DataError
from probkit.files import storable
from probkit.numerics import safe_cholesky
from probkit.rng import stream

__all__ = [
    "Iterative",
    "LogDet",
    "NoisyKernel",
    "Reduction",
    "Solution",
    "conjugate_gradients",
]


@storable
@dataclass(frozen=True)
class Iterative:
    """How a kernel matrix that is not stored is solved and its determinant estimated.

    Args:
        tolerance: Stop when every residual is below this, relative to its right-hand side.
        max_iter: Largest number of products with the matrix.
        rank: Rank of the preconditioner; 0 for none.
        probes: Random vectors of the log determinant; its error falls with their root.
        seed: Seed of these vectors: equal for all evaluations, so that an optimiser sees a smooth
            function.
        devices: Devices among which the rows of every product are divided, such as ("cuda:0",
            "cuda:1"); by default where the data lives. For models, which build the operator.

    Raises:
        DataError: An option outside its range.

    Example:
        >>> Iterative(probes=32).rank
        100
    """

    tolerance: float = 1e-8
    max_iter: int = 1000
    rank: int = 100
    probes: int = 16
    seed: int = 0
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise DataError(f"tolerance: expected a number in (0, 1), got {self.tolerance!r}")
        for name, least in (("max_iter", 1), ("rank", 0), ("probes", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DataError(f"{name}: expected a whole number >= {least}, got {value!r}")


@dataclass(frozen=True)
class Solution:
    """What conjugate gradients found.

    Attributes:
        x: Solutions [n, r].
        steps: Products with the matrix that it took.
        residual: Relative residuals at the end [r].
        steps_of: Diagonal and off-diagonal of the Lanczos matrices, [step, r] and [step - 1, r].
    """

    x: Tensor
    steps: int
    residual: Tensor
    steps_of: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LogDet:
    """An estimate of a log determinant.

    Attributes:
        value: The estimate; gradients flow through it.
        error: Its Monte Carlo standard error.
    """

    value: Tensor
    error: Tensor


class Reduction(NamedTuple):
    """What a right-hand side is reduced to.

    Attributes:
        quadratic: Diagonal of B^T A^-1 B [r].
        log_det: Estimate of log |A|.
        solution: A^-1 B [n, r], without gradients.
    """

    quadratic: Tensor
    log_det: LogDet
    solution: Tensor


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor],
    right: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    max_iter: int,
) -> Solution:
    """Solve A X = B for several right-hand sides at once.

    Each column has its own step lengths; columns that have converged stand still.

    Args:
        multiply: Returns A V for V [n, r].
        right: B [n, r].
        precondition: Returns P^-1 V.
        tolerance: Relative residual at which a column has converged.
        max_iter: Largest number of products.

    Example:
        >>> A = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
        >>> b = torch.ones(2, 1, dtype=torch.float64)
        >>> found = conjugate_gradients(A.matmul, b, lambda v: v, tolerance=1e-12, max_iter=9)
        >>> found.x.flatten(), found.steps
        (tensor([0.4000, 0.2000], dtype=torch.float64), 2)
    """
    size = right.norm(dim=0)
    size = torch.where(size > 0, size, torch.ones_like(size))
    x, residual = torch.zeros_like(right), right.clone()
    direction = precondition(residual).clone()  # the identity returns the residual itself
    inner = (residual * direction).sum(0)
    alphas, betas = [], []
    active = residual.norm(dim=0) / size > tolerance
    for _ in range(max_iter):
        if not bool(active.any()):
            break
        image = multiply(direction)
        curvature = (direction * image).sum(0)
        alpha = torch.where(active, inner / torch.where(active, curvature, 1.0), 0.0)
        x.addcmul_(alpha, direction)
        residual.addcmul_(alpha, image, value=-1.0)
        whitened = precondition(residual)
        new = (residual * whitened).sum(0)
        beta = torch.where(active, new / torch.where(active, inner, 1.0), 0.0)
        alphas.append(alpha)
        betas.append(beta)
        active = active & (residual.norm(dim=0) / size > tolerance)
        direction = whitened + beta * direction
        inner = torch.where(active, new, inner)
    return Solution(x, len(alphas), residual.norm(dim=0) / size, _lanczos(alphas, betas, right))


def _lanczos(alphas: list[Tensor], betas: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Lanczos matrices from the coefficients of conjugate gradients.

    Steps after convergence (alpha = 0) become identity rows without coupling: log 1 = 0 there.
    """
    if not alphas:
        none = like.new_ones(1, like.shape[1])
        return none, none[:0]
    alpha, beta = torch.stack(alphas), torch.stack(betas)
    moving = alpha > 0
    inverse = torch.where(moving, 1 / torch.where(moving, alpha, 1.0), 1.0)
    diagonal = inverse.clone()
    before = torch.where(moving[1:], beta[:-1] * inverse[:-1], 0.0)
    diagonal[1:] += before
    off = torch.where(moving[1:], beta[:-1].clamp_min(0).sqrt() * inverse[:-1], 0.0)
    return diagonal, off


class NoisyKernel:
    """A = K + s I, K a LinearOperator: solved, and its determinant estimated, by iteration.

    Args:
        kernel: Kernel matrix [n, n], such as :func:`~probkit.kernels.partitioned`.
        noise: Noise variance s > 0 (a scalar tensor).
        options: Tolerances and sizes.

    Raises:
        DataError: A kernel that is not square, or noise that is not positive.

    Example:
        >>> from gpytorch.kernels import RBFKernel
        >>> from probkit.kernels import partitioned
        >>> x = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None]
        >>> A = NoisyKernel(partitioned(RBFKernel(), x), torch.tensor(0.1).double())
        >>> y = x.sin()
        >>> bool(torch.allclose(A.multiply(A.solve(y)), y))
        True
    """

    def __init__(self, kernel: Any, noise: Tensor, options: Iterative | None = None) -> None:
        if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
            raise DataError(f"NoisyKernel: expected a kernel [n, n], got {list(kernel.shape)}")
        if noise.numel() != 1 or not float(noise.detach()) > 0:
            raise DataError(
                f"NoisyKernel: expected one noise variance > 0, got {noise.detach().tolist()}"
            )
        self.kernel, self.noise = kernel, noise.reshape(())
        self.options = Iterative() if options is None else options
        self.rows = kernel.shape[0]
        with torch.no_grad():
            self._prepare()

    def _prepare(self) -> None:
        """Factorise the preconditioner: L, and the Cholesky factor of s I + L^T L."""
        rank = min(self.options.rank, self.rows)
        noise = self.noise.detach()
        if rank == 0:
            self.low_rank, self.pivots = None, None
            self.log_det_preconditioner = self.rows * noise.log()
            return
        low, order = self.kernel.pivoted_cholesky(rank=rank, error_tol=1e-12, return_pivots=True)
        self.low_rank, self.pivots = low, order[: low.shape[1]]
        small = low.mT @ low
        small.diagonal().add_(noise)
        self.small = torch.linalg.cholesky(small)
        self.log_det_preconditioner = (
            2 * self.small.diagonal().log().sum() + (self.rows - low.shape[1]) * noise.log()
        )

    # ------------------------------------------------------------------------------ products

    def multiply(self, vectors: Tensor) -> Tensor:
        """Return A V [n, r]; gradients flow to the kernel's tensors and the noise."""
        return self.kernel @ vectors + self.noise * vectors

    def _precondition(self, vectors: Tensor) -> Tensor:
        noise = self.noise.detach()
        if self.low_rank is None:
            return vectors / noise
        inner = torch.cholesky_solve(self.low_rank.mT @ vectors, self.small)
        return (vectors - self.low_rank @ inner) / noise

    # -------------------------------------------------------------------------------- solves

    def solve(self, right: Tensor) -> Tensor:
        """Return A^-1 B [n, r], without gradients.

        Warns:
            ConvergenceWarning: ``max_iter`` products were not enough.
        """
        with torch.no_grad():
            return self._solution(right).x

    def _solution(self, right: Tensor) -> Solution:
        options = self.options
        found = conjugate_gradients(
            self.multiply,
            right,
            self._precondition,
            tolerance=options.tolerance,
            max_iter=options.max_iter,
        )
        worst = float(found.residual.max())
        if worst > options.tolerance:
            warnings.warn(
                f"conjugate gradients: a relative residual of {worst:.2g} is left after "
                f"{found.steps} products, more than tolerance={options.tolerance:g}; raise "
                "max_iter, rank or the noise",
                ConvergenceWarning,
                stacklevel=4,
            )
        return found

    def reduce(self, right: Tensor) -> Reduction:
        """Return the diagonal of B^T A^-1 B, log |A| and A^-1 B, in one run of the iteration.

        Gradients flow to the kernel's tensors, the noise and ``right``: those of the quadratic form
        are exact up to the tolerance, those of the log determinant unbiased estimates from the same
        random vectors as its value, with the preconditioner as a control (Wenger et al.,
        "Preconditioning for Scalable Gaussian Process Hyperparameter Optimization", ICML 2022).
        """
        with torch.no_grad():
            probes = self._probes(right)
            both = self._solution(torch.cat([right, probes], 1))
            count = right.shape[1]
            x, solved = both.x[:, :count], both.x[:, count:]
            whitened = self._precondition(probes)
            terms = self._quadrature(both, probes, whitened, count)
            value = self.log_det_preconditioner + terms.mean()
            few = len(terms) < 2
            error = terms.new_tensor(math.nan) if few else terms.std() / math.sqrt(len(terms))
        # expressions with the right gradients; only those of them are used
        bilinear = -(x * self.multiply(x)).sum(0) + 2 * (x * right).sum(0)
        quadratic = (x * right).sum(0).detach()
        slope = self._slope(solved, whitened)
        return Reduction(
            quadratic + bilinear - bilinear.detach(),
            LogDet(value + slope - slope.detach(), error),
            x,
        )

    def _slope(self, solved: Tensor, whitened: Tensor) -> Tensor:
        """An expression whose gradient is an unbiased estimate of that of log |A|.

        log |P| is differentiated exactly; the random vectors estimate the rest only, which is small
        where P is close to A: the traces of A^-1 dA and of P^-1 dP from the same vectors.
        """
        noise = self.noise
        image = self.multiply(whitened)
        if self.pivots is None:
            log_det = self.rows * noise.log()
            preconditioned = noise * whitened
        else:
            columns = self.kernel[:, self.pivots].to_dense()
            corner, _ = safe_cholesky(columns[self.pivots])
            low = torch.linalg.solve_triangular(corner, columns.mT, upper=False).mT
            small = low.mT @ low + noise * torch.eye(len(corner)).to(low)
            log_det = torch.logdet(small) + (self.rows - len(corner)) * noise.log()
            preconditioned = low @ (low.mT @ whitened) + noise * whitened
        rest = (solved * image).sum(0) - (whitened * preconditioned).sum(0)
        return log_det + rest.mean()

    def _probes(self, like: Tensor) -> Tensor:
        """Draws [n, probe] from N(0, P)."""
        generator = stream(self.options.seed, "log determinant", device=like.device)

        def normal(rows: int) -> Tensor:
            shape = (rows, self.options.probes)
            return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

        white = self.noise.detach().sqrt() * normal(self.rows)
        if self.low_rank is None:
            return white
        return white + self.low_rank @ normal(self.low_rank.shape[1])

    def _quadrature(self, found: Solution, probes: Tensor, whitened: Tensor, skip: int) -> Tensor:
        """Estimate log |P^-1/2 A P^-1/2| from each probe [probe]."""
        diagonal, off = (part[:, skip:] for part in found.steps_of)
        T = torch.diag_embed(diagonal.T) + torch.diag_embed(off.T, 1) + torch.diag_embed(off.T, -1)
        values, vectors = torch.linalg.eigh(T)
        weights = vectors[:, 0].square()
        logs = values.clamp_min(torch.finfo(values.dtype).tiny).log()
        return (probes * whitened).sum(0) * (weights * logs).sum(-1)

"""The Kronecker E-step when only some entries of y are seen.

The covariance of the observed entries, C_oo, is no longer a Kronecker product. Solves go by
conjugate gradients, preconditioned with the inverse of the full covariance; the diagonal of the
posterior covariance by Hutchinson's estimator; the log determinant by stochastic Lanczos
quadrature. Probes are drawn from a fixed seed, so that every E-step sees the same errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probkit.errors import NumericsWarning
from probkit.models.sbl.kronecker_e_step import Spectrum, kronecker_spectrum
from probkit.models.sbl.mode_products import mode_products, outer
from probkit.models.sbl.moments import Moments, abs_square, gaussian_log_evidence

__all__ = ["MaskedCovariance", "conjugate_gradients", "lanczos_log_det", "masked_moments"]

PROBES = 32
"""Random probes of each estimate."""

DRAFT_PROBES = 8
"""Probes while a fit is under way."""

_SEED = 20240229
_LANCZOS = 40

Operator = Callable[[Tensor], Tensor]


def conjugate_gradients(
    apply: Operator,
    right: Tensor,
    precondition: Operator,
    *,
    dims: int,
    tolerance: float = 1e-10,
    max_iter: int = 1000,
) -> Tensor:
    """Solve A x = right for many right-hand sides at once.

    Args:
        apply: x -> A x; A Hermitian positive definite.
        right: [*batch, ...].
        precondition: An approximate inverse of A, Hermitian positive definite.
        dims: Number of trailing dims of one vector.
        tolerance: Relative residual at which to stop.
        max_iter: Largest number of iterations.

    Returns:
        x, of the shape of ``right``.

    Warns:
        NumericsWarning: Not converged.
    """
    axes = tuple(range(-dims, 0))

    def inner(a: Tensor, b: Tensor) -> Tensor:
        product = (a.conj() * b).sum(axes, keepdim=True)
        return product.real if product.is_complex() else product

    tiny = torch.finfo(torch.float64).tiny
    goal = tolerance**2 * inner(right, right)
    solution, rest = torch.zeros_like(right), right
    step = precondition(rest)
    direction, size = step, inner(rest, step)
    for _ in range(max_iter):
        if bool((inner(rest, rest) <= goal).all()):
            return solution
        image = apply(direction)
        length = size / inner(direction, image).clamp_min(tiny)
        solution = solution + length * direction
        rest = rest - length * image
        step = precondition(rest)
        new = inner(rest, step)
        direction = step + (new / size.clamp_min(tiny)) * direction
        size = new
    if bool((inner(rest, rest) > 1e4 * goal).any()):
        import warnings

        worst = float((inner(rest, rest) / inner(right, right).clamp_min(tiny)).max() ** 0.5)
        warnings.warn(
            f"conjugate gradients stopped after {max_iter} iterations at a relative residual of "
            f"{worst:.1e}; a larger noise variance makes the system better conditioned",
            NumericsWarning,
            stacklevel=2,
        )
    return solution


class MaskedCovariance:
    """C_oo of the observed entries, as an operator on tensors that are zero elsewhere.

    Args:
        factors: H_i [*batch, M_i, N_i].
        variances: g_i [*batch, N_i].
        noise_var: s2 [*batch].
        observed: 1.0 where y is seen, [*batch, M_1, ..., M_I].
    """

    def __init__(
        self,
        factors: Sequence[Tensor],
        variances: Sequence[Tensor],
        noise_var: Tensor,
        observed: Tensor,
    ) -> None:
        self.modes = len(factors)
        self.factors = [factor.unsqueeze(-3) for factor in factors]
        self.adjoints = [factor.mH.unsqueeze(-3) for factor in factors]
        self.prior = outer(variances).unsqueeze(-self.modes - 1)
        self.noise = noise_var.reshape(noise_var.shape + (1,) * (self.modes + 1))
        self.mask = observed.unsqueeze(-self.modes - 1)
        self.spectrum: Spectrum = kronecker_spectrum(factors, variances, noise_var)
        self._turns = [vector.unsqueeze(-3) for vector in self.spectrum.vectors]

    def back(self, data: Tensor) -> Tensor:
        """H^H data, [*batch, snapshot, N_1, ..., N_I]."""
        return mode_products(data, self.adjoints)

    def forward(self, weights: Tensor) -> Tensor:
        """The observed part of H weights."""
        return self.mask * mode_products(weights, self.factors)

    def apply(self, data: Tensor) -> Tensor:
        """C_oo data."""
        return self.forward(self.prior * self.back(data)) + self.noise * data

    def full_inverse(self, data: Tensor) -> Tensor:
        """C^{-1} data with the covariance of all entries."""
        turned = mode_products(data, [turn.mH for turn in self._turns])
        solved = turned / self.spectrum.values.unsqueeze(-self.modes - 1)
        return mode_products(solved, self._turns)

    def solve(self, data: Tensor, *, tolerance: float = 1e-10) -> Tensor:
        """C_oo^{-1} data; ``data`` is zero where nothing was observed."""
        return conjugate_gradients(
            self.apply,
            data,
            lambda rest: self.mask * self.full_inverse(rest),
            dims=self.modes,
            tolerance=tolerance,
        )

    def log_det(self, probes: int = PROBES) -> Tensor:
        """Log |C_oo| = log |C| + log |(C^{-1})_mm| over the missing entries m, [*batch].

        The second term is estimated by Lanczos quadrature.
        """
        dims = tuple(range(-self.modes, 0))
        full = self.spectrum.values.log().sum(dims)
        hidden = 1 - self.mask
        signs = _signs((probes, *self.spectrum.values.shape[-self.modes :]), self.mask)
        start = (hidden * signs).expand(*full.shape, probes, *signs.shape[1:])
        if not bool(hidden.any()):
            return full
        estimate = lanczos_log_det(
            lambda data: hidden * self.full_inverse(data.to(self._turns[0].dtype)),
            start.to(self._turns[0].dtype),
            dims=self.modes,
        )
        return full + estimate.mean(-1)


def _signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random signs from the fixed seed."""
    generator = torch.Generator().manual_seed(_SEED)
    signs = torch.randint(2, shape, generator=generator) * 2.0 - 1.0
    return signs.to(like)


def lanczos_log_det(apply: Operator, start: Tensor, *, dims: int, steps: int = _LANCZOS) -> Tensor:
    """Quadratic forms v^H log(A) v by Lanczos quadrature with full reorthogonalisation.

    Args:
        apply: x -> A x; A Hermitian positive definite.
        start: v [*batch, ...].
        dims: Number of trailing dims of one vector.
        steps: Largest number of Lanczos steps.

    Returns:
        [*batch].
    """
    lead = start.shape[: start.ndim - dims]
    shape = start.shape
    flat = start.reshape(*lead, -1)
    norm = abs_square(flat).sum(-1).sqrt()
    safe = torch.where(norm > 0, norm, 1.0)
    steps = min(steps, int(flat.shape[-1]))
    basis = flat.new_zeros(*lead, steps, flat.shape[-1])
    basis[..., 0, :] = flat / safe.unsqueeze(-1)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for step in range(steps):
        newest = basis[..., step, :]
        image = apply(newest.reshape(shape)).reshape(*lead, -1)
        diagonal.append((newest.conj() * image).sum(-1).real)
        known = basis[..., : step + 1, :]
        for _ in range(2):  # twice is enough
            overlap = known.conj() @ image.unsqueeze(-1)
            image = image - (known.mT @ overlap).squeeze(-1)
        length = abs_square(image).sum(-1).sqrt()
        if step + 1 == steps or bool((length < 1e-10 * diagonal[0].abs()).all()):
            break
        beside.append(length)
        basis[..., step + 1, :] = image / torch.where(length > 0, length, 1.0).unsqueeze(-1)
    small = torch.diag_embed(torch.stack(diagonal[: len(beside) + 1], -1))
    if beside:
        off = torch.diag_embed(torch.stack(beside, -1), offset=1)
        small = small + off + off.mT
    values, vectors = torch.linalg.eigh(small)
    logs = values.clamp_min(torch.finfo(values.dtype).tiny).log()
    return norm.square() * (vectors[..., 0, :].square() * logs).sum(-1)


def masked_moments(
    factors: Sequence[Tensor],
    variances: Sequence[Tensor],
    noise_var: Tensor,
    y: Tensor,
    observed: Tensor,
    *,
    probes: int = PROBES,
    draft: bool = False,
) -> Moments:
    """Posterior moments when only the entries with ``observed`` = 1 were seen.

    The mean is exact to the tolerance of the solver. With B = G^{1/2} H^H C^{-1} H G^{1/2}, the
    shrinkage 1 - Sigma_jj / g_j is B_jj, estimated by the mean of conj(z_j) (B z)_j over signs z;
    its variance is at most B_jj (1 - B_jj) over the number of probes, since B <= I.

    Args:
        factors: H_i [*batch, M_i, N_i].
        variances: g_i [*batch, N_i].
        noise_var: s2 [*batch].
        y: [*batch, snapshot, M_1, ..., M_I]; what is not observed is ignored.
        observed: 1.0 where y is seen, [*batch, M_1, ..., M_I].
        probes: Random probes of each estimate.
        draft: For the steps of a fit: fewer probes, looser solves, and no evidence (NaN).
    """
    modes = len(factors)
    probes = DRAFT_PROBES if draft else probes
    dims = tuple(range(-modes, 0))
    system = MaskedCovariance(factors, variances, noise_var, observed)
    seen = system.mask * y
    solved = system.solve(seen, tolerance=1e-6 if draft else 1e-10)
    projection = system.back(solved)
    prior = outer(variances)
    root = prior.sqrt().unsqueeze(-modes - 1)
    signs = _signs((probes, *prior.shape[-modes:]), prior).to(y.dtype)
    image = root * system.back(
        system.solve(system.forward(root * signs), tolerance=1e-3 if draft else 1e-6)
    )
    shrink = (signs * image).mean(-modes - 1)
    shrink = (shrink.real if shrink.is_complex() else shrink).clamp(0, 1)
    active = prior > 0
    leverage = torch.where(active, shrink / torch.where(active, prior, 1.0), 0.0)
    counts = observed.sum(dims)
    snapshots = y.shape[-modes - 1]
    quadratic = (seen.conj() * solved).sum((*dims, -modes - 1)).real
    missing = observed.shape[-modes:].numel() - counts
    size = observed.shape[-modes:].numel()
    log_det = torch.full_like(counts, torch.nan) if draft else system.log_det(probes)
    evidence = gaussian_log_evidence(log_det, quadratic, size, snapshots, is_complex=y.is_complex())
    # The unit factors (2 pi or pi) of entries that were not seen do not belong to the density.
    nothing = torch.zeros_like(quadratic)
    unit = gaussian_log_evidence(nothing, nothing, 1, snapshots, is_complex=y.is_complex())
    return Moments(
        mean=projection * prior.unsqueeze(-modes - 1),
        variance=prior * (1 - shrink),
        projection=projection,
        leverage=leverage,
        residual=noise_var.square() * abs_square(solved).sum((*dims, -modes - 1)),
        freedom=shrink.sum(dims),
        log_evidence=evidence - missing * unit,
    )

"""Exact inference in linear-Gaussian chains: Kalman filter, RTS smoother, evidence, paths.

z_1 ~ N(m_1, P_1), z_(t+1) = A_t z_t + N(0, Q_t), and at each step a Gaussian factor in
u_t = H_t z_t: observations with noise (`GaussianObservations`) or natural-parameter sites
(`NaturalSites`), whose precision may have any rank. Uneven time steps are matrices A_t, Q_t that
vary with t; a step with nothing observed has a zero site (or NaN observations), one with several
observations their sum (`collect_sites`). Padding needs no mask: give it zero sites and ignore what
comes out there.

Two ways to the same numbers (they agree to 1e-9 in float64): a loop over the steps, and associative
scans of depth log T, ``method="scan"``. Both are differentiable. ``method="auto"`` takes the scan
from 32 steps on while (number of sequences) S^2 <= 512: on one CPU core it was measured to win
there, by a factor of 10 for a single sequence, and to lose for more. On a GPU, where the loop waits
for every step to be launched, it is taken from 32 steps on.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.inference.message_passing.gaussian import (
    GaussianChain,
    canonical_gaussian,
    symmetric,
    times,
)
from probkit.inference.message_passing.gaussian_sites import Sites
from probkit.inference.message_passing.kalman_loop import loop_affine, loop_filter, loop_smoother
from probkit.inference.message_passing.kalman_scan import scan_affine, scan_filter, scan_smoother
from probkit.numerics import safe_cholesky
from probkit.rng import Rng, stream

__all__ = [
    "KalmanFilter",
    "KalmanSmoother",
    "kalman_filter",
    "kalman_log_evidence",
    "kalman_sample_paths",
    "kalman_smoother",
    "kalman_two_pass",
]

Method = Literal["auto", "loop", "scan"]


class KalmanFilter(NamedTuple):
    """What the past says about each state.

    Attributes:
        log_evidence: log p(data), the sum of ``log_increment`` [*batch]. For natural sites the log
            of the integral of the prior times all factors exp(eta' u - u' Lam u / 2).
        log_increment: The same at step t given the steps before [*batch, T].
        filtered_mean: E[z_t | data up to t] [*batch, T, S].
        filtered_cov: Cov[z_t | data up to t] [*batch, T, S, S].
        predicted_mean: E[z_t | data before t] [*batch, T, S].
        predicted_cov: Cov[z_t | data before t] [*batch, T, S, S].
    """

    log_evidence: Tensor
    log_increment: Tensor
    filtered_mean: Tensor
    filtered_cov: Tensor
    predicted_mean: Tensor
    predicted_cov: Tensor


class KalmanSmoother(NamedTuple):
    """What all the data say about each state.

    Attributes:
        log_evidence: log p(data) [*batch]; see `KalmanFilter`.
        mean: E[z_t | data] [*batch, T, S].
        cov: Cov[z_t | data] [*batch, T, S, S].
        cross_cov: Cov[z_(t+1), z_t | data] [*batch, T - 1, S, S].
    """

    log_evidence: Tensor
    mean: Tensor
    cov: Tensor
    cross_cov: Tensor


def kalman_filter(
    initial_mean: Tensor,
    initial_cov: Tensor,
    transition: Tensor,
    noise: Tensor,
    sites: Sites,
    *,
    observation: Tensor | None = None,
    method: Method = "auto",
) -> KalmanFilter:
    """Filter: the law of each state given the data so far.

    Args:
        initial_mean: m_1 [*batch, S].
        initial_cov: P_1 [*batch, S, S].
        transition: A [*batch, S, S], or A_t [*batch, T - 1, S, S] with all batch dims written out.
        noise: Q [*batch, S, S], or Q_t [*batch, T - 1, S, S] likewise; positive semi-definite.
        sites: `NaturalSites` or `GaussianObservations`, whose values [*batch, T, r] carry all batch
            dims; the other arguments broadcast to them.
        observation: H [*batch, r, S], or H_t [*batch, T, r, S]; None takes the first r entries of
            the state.
        method: "loop", "scan", or "auto", by shape (rule in the module introduction).

    Returns:
        A `KalmanFilter`, differentiable.

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a value is not finite, or types differ.

    Example:
        >>> from probkit.inference.message_passing import GaussianObservations
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> y = torch.tensor([[2.0], [torch.nan]], dtype=torch.float64)
        >>> result = kalman_filter(one[0] * 0, one, one, one, GaussianObservations(y, one))
        >>> [round(m, 9) for m in result.filtered_mean.flatten().tolist()]
        [1.0, 1.0]
        >>> [round(v, 9) for v in result.filtered_cov.flatten().tolist()]
        [0.5, 1.5]
    """
    chain = canonical_gaussian(initial_mean, initial_cov, transition, noise, sites, observation)
    mean, cov = scan_filter(chain) if _use_scan(chain, method) else loop_filter(chain)
    predicted_mean, predicted_cov = _predict(chain, mean, cov)
    H = chain.observation
    increment = chain.sites.log_evidence(
        times(H, predicted_mean), symmetric(H @ predicted_cov @ H.mT)
    )
    return KalmanFilter(increment.sum(-1), increment, mean, cov, predicted_mean, predicted_cov)


def kalman_smoother(
    initial_mean: Tensor,
    initial_cov: Tensor,
    transition: Tensor,
    noise: Tensor,
    sites: Sites,
    *,
    observation: Tensor | None = None,
    method: Method = "auto",
) -> KalmanSmoother:
    """Smooth (Rauch-Tung-Striebel): the law of each state given all the data.

    The covariances of prediction must be positive definite, since the gain P_t A_t' (A_t P_t A_t' +
    Q_t)^-1 is found by Cholesky; jitter is added, with a warning, where they are not.

    Args:
        initial_mean: m_1 [*batch, S].
        initial_cov: P_1 [*batch, S, S].
        transition: A [*batch, S, S] or A_t [*batch, T - 1, S, S]; see `kalman_filter`.
        noise: Q [*batch, S, S] or Q_t [*batch, T - 1, S, S].
        sites: `NaturalSites` or `GaussianObservations`.
        observation: H [*batch, r, S] or H_t [*batch, T, r, S]; None takes the first r entries.
        method: "loop", "scan", or "auto", by shape (rule in the module introduction).

    Returns:
        A `KalmanSmoother`, differentiable.

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a value is not finite, or types differ.

    Example:
        >>> from probkit.inference.message_passing import NaturalSites
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> eta = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
        >>> sites = NaturalSites(eta, (eta > 0).double().unsqueeze(-1))  # only step 2 observed
        >>> result = kalman_smoother(one[0] * 0, one, one, one, sites)
        >>> [round(m, 9) for m in result.mean.flatten().tolist()]
        [1.0, 2.0]
    """
    return kalman_two_pass(
        initial_mean, initial_cov, transition, noise, sites, observation=observation, method=method
    )[1]


def kalman_two_pass(
    initial_mean: Tensor,
    initial_cov: Tensor,
    transition: Tensor,
    noise: Tensor,
    sites: Sites,
    *,
    observation: Tensor | None = None,
    method: Method = "auto",
) -> tuple[KalmanFilter, KalmanSmoother]:
    """Filter and smooth, for those who need what both passes found.

    Args:
        initial_mean: m_1 [*batch, S].
        initial_cov: P_1 [*batch, S, S].
        transition: A [*batch, S, S] or A_t [*batch, T - 1, S, S]; see `kalman_filter`.
        noise: Q [*batch, S, S] or Q_t [*batch, T - 1, S, S].
        sites: `NaturalSites` or `GaussianObservations`.
        observation: H [*batch, r, S] or H_t [*batch, T, r, S]; None takes the first r entries.
        method: "loop", "scan", or "auto", by shape (rule in the module introduction).

    Returns:
        What `kalman_filter` and what `kalman_smoother` return.

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a value is not finite, or types differ.

    Example:
        >>> from probkit.inference.message_passing import NaturalSites
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> sites = NaturalSites(torch.ones(3, 1, dtype=torch.float64), one.expand(3, 1, 1))
        >>> filtered, smoothed = kalman_two_pass(one[0] * 0, one, one, one, sites)
        >>> bool(torch.isclose(filtered.filtered_mean[-1], smoothed.mean[-1]))
        True
    """
    chain = canonical_gaussian(initial_mean, initial_cov, transition, noise, sites, observation)
    scan = _use_scan(chain, method)
    filtered = kalman_filter(
        initial_mean, initial_cov, transition, noise, sites, observation=observation, method=method
    )
    gain, offset, rest = _backward_kernels(chain, filtered)
    mean, cov = (scan_smoother if scan else loop_smoother)(gain, offset, rest)
    cross = cov[..., 1:, :, :] @ gain[..., :-1, :, :].mT
    return filtered, KalmanSmoother(filtered.log_evidence, mean, cov, cross)


def kalman_log_evidence(
    initial_mean: Tensor,
    initial_cov: Tensor,
    transition: Tensor,
    noise: Tensor,
    sites: Sites,
    *,
    observation: Tensor | None = None,
    method: Method = "auto",
) -> Tensor:
    """Return log p(data) [*batch], differentiable in every argument.

    Args:
        initial_mean: m_1 [*batch, S].
        initial_cov: P_1 [*batch, S, S].
        transition: A [*batch, S, S] or A_t [*batch, T - 1, S, S]; see `kalman_filter`.
        noise: Q [*batch, S, S] or Q_t [*batch, T - 1, S, S].
        sites: `NaturalSites` or `GaussianObservations`.
        observation: H [*batch, r, S] or H_t [*batch, T, r, S]; None takes the first r entries.
        method: "loop", "scan", or "auto", by shape (rule in the module introduction).

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a value is not finite, or types differ.

    Example:
        >>> from probkit.inference.message_passing import NaturalSites
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> nothing = NaturalSites(torch.zeros(5, 1, dtype=torch.float64), 0 * one)
        >>> kalman_log_evidence(one[0], one, one, one, nothing).item()
        0.0
    """
    return kalman_filter(
        initial_mean, initial_cov, transition, noise, sites, observation=observation, method=method
    ).log_evidence


def kalman_sample_paths(
    initial_mean: Tensor,
    initial_cov: Tensor,
    transition: Tensor,
    noise: Tensor,
    sites: Sites,
    n: int,
    *,
    rng: Rng,
    observation: Tensor | None = None,
    method: Method = "auto",
) -> Tensor:
    """Draw paths from p(z_1, ..., z_T | data): filter forward, sample backward; no gradients.

    Args:
        initial_mean: m_1 [*batch, S].
        initial_cov: P_1 [*batch, S, S].
        transition: A [*batch, S, S] or A_t [*batch, T - 1, S, S]; see `kalman_filter`.
        noise: Q [*batch, S, S] or Q_t [*batch, T - 1, S, S].
        sites: `NaturalSites` or `GaussianObservations`.
        n: Number of paths for each sequence.
        rng: Seed or generator.
        observation: H [*batch, r, S] or H_t [*batch, T, r, S]; None takes the first r entries.
        method: "loop", "scan", or "auto", by shape (rule in the module introduction).

    Returns:
        Paths [n, *batch, T, S], independent draws.

    Raises:
        ShapeError: shapes do not fit together, or T is 0.
        DataError: a value is not finite, types differ, or ``n`` is below 1.

    Example:
        >>> from probkit.inference.message_passing import GaussianObservations
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> exact = GaussianObservations(torch.tensor([[1.0], [2.0]], dtype=torch.float64), 0 * one)
        >>> kalman_sample_paths(one[0], one, one, one, exact, 1, rng=0).flatten().tolist()
        [1.0, 2.0]
    """
    if n < 1:
        raise DataError(f"expected n >= 1 paths, got {n}")
    with torch.no_grad():
        chain = canonical_gaussian(initial_mean, initial_cov, transition, noise, sites, observation)
        filtered = kalman_filter(
            initial_mean,
            initial_cov,
            transition,
            noise,
            sites,
            observation=observation,
            method=method,
        )
        gain, offset, rest = _backward_kernels(chain, filtered)
        # Symmetric square roots: the kernels may be singular, and no jitter is wanted here.
        values, vectors = torch.linalg.eigh(rest)
        root = (vectors * values.clamp_min(0.0).sqrt().unsqueeze(-2)) @ vectors.mT
        generator = stream(rng, "kalman_sample_paths")
        normal = torch.randn(n, *offset.shape, generator=generator, dtype=offset.dtype)
        drawn = offset + times(root, normal.to(offset.device))
        gain = gain.expand(n, *gain.shape)
        return (scan_affine if _use_scan(chain, method) else loop_affine)(gain, drawn)


# --------------------------------------------------------------------------- steps shared by all


def _use_scan(chain: GaussianChain, method: Method) -> bool:
    """Choose the scan or the loop, by the rule in the module's introduction."""
    if method not in ("auto", "loop", "scan"):
        raise DataError(f"method must be 'auto', 'loop' or 'scan', got {method!r}")
    if method != "auto":
        return method == "scan"
    *batch, steps, _, states = chain.observation.shape
    few = torch.Size(batch).numel() * states**2 <= 512
    return steps >= 32 and (few or chain.initial_mean.device.type != "cpu")


def _predict(chain: GaussianChain, mean: Tensor, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted means and covariances of all steps from the filtered ones."""
    A = chain.transition
    later = times(A, mean[..., :-1, :])
    later_cov = symmetric(A @ cov[..., :-1, :, :] @ A.mT) + chain.noise
    return (
        torch.cat((chain.initial_mean.unsqueeze(-2), later), -2),
        torch.cat((chain.initial_cov.unsqueeze(-3), later_cov), -3),
    )


def _backward_kernels(
    chain: GaussianChain, filtered: KalmanFilter
) -> tuple[Tensor, Tensor, Tensor]:
    """p(z_t | z_(t+1), data up to t) = N(E_t z_(t+1) + g_t, L_t), in Joseph's form.

    E_t = P_t A_t' (A_t P_t A_t' + Q_t)^-1, g_t = (I - E_t A_t) m_t,
    L_t = (I - E_t A_t) P_t (I - E_t A_t)' + E_t Q_t E_t'; at the last step E = 0.
    """
    A, mean, cov = chain.transition, filtered.filtered_mean, filtered.filtered_cov
    before, before_mean = cov[..., :-1, :, :], mean[..., :-1, :]
    L, _ = safe_cholesky(filtered.predicted_cov[..., 1:, :, :])
    gain = torch.cholesky_solve(A @ before, L).mT
    keep = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device) - gain @ A
    rest = symmetric(keep @ before @ keep.mT + gain @ chain.noise @ gain.mT)
    last = torch.zeros_like(cov[..., -1:, :, :])
    return (
        torch.cat((gain, last), -3),
        torch.cat((times(keep, before_mean), mean[..., -1:, :]), -2),
        torch.cat((rest, cov[..., -1:, :, :]), -3),
    )

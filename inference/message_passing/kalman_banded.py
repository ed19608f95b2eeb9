"""Smoothing a Gaussian Markov prior with natural sites by two banded Cholesky factorisations.

The states of a chain z_1 ~ N(0, P_1), z_(t+1) = A_t z_t + N(0, Q_t) have a block tridiagonal
precision J, and sites exp(eta' u - u' Lam u / 2) in u = H z add H' Lam_t H to its diagonal blocks.
One factorisation from each end (LAPACK ``pbtrf``) holds in its diagonal blocks

    F_t = precision of z_t given all before it, before z_(t+1) is summed out,
    B_t = precision of z_t given all after it,

so that Cov[z_t]^-1 = F_t + B_t - J_tt and Cov[z_(t+1), z_t] = -Cov[z_(t+1)] J_(t+1,t) F_t^-1 at
all t at once, with no recursion in Python. It costs T S^3 like the filter, and was measured
to be about six times as fast as the scans on one CPU core (``benchmarks/funbat/smoothing.py``).

Precisions are only as good as Q_t^-1: nearby steps of a smooth process make it large, and its
rounding shows. `markov_prior` therefore bounds that rounding and leaves chains above `ROUNDING` to
the covariance form (`kalman_smoother`), as it does with other types than float64 and with devices
other than the CPU. `smooth_sites` takes what the prior holds; the numbers agree to 1e-9.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.linalg import lapack
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.inference.message_passing.gaussian import symmetric
from probkit.inference.message_passing.gaussian_sites import NaturalSites
from probkit.inference.message_passing.kalman import KalmanSmoother, kalman_smoother
from probkit.numerics import check_finite, safe_cholesky

_LOG_2PI = math.log(2 * math.pi)

__all__ = [
    "ROUNDING",
    "MarkovPrecision",
    "MarkovPrior",
    "expected_log_transitions",
    "join_components",
    "markov_prior",
    "smooth_sites",
    "smoothed_covariances",
]

ROUNDING = 2e-9
"""Largest bound on the relative rounding of a prior's precision that is taken; the errors that
follow in means and covariances were measured to be a hundred times smaller."""


class MarkovPrecision(NamedTuple):
    """The joint precision of a chain's states, block tridiagonal.

    Attributes:
        diagonal: J_tt [*batch, T, S, S].
        upper: J_(t,t+1) [*batch, T - 1, S, S].
        log_det: log |J| [*batch].
    """

    diagonal: Tensor
    upper: Tensor
    log_det: Tensor


class MarkovPrior(NamedTuple):
    """A zero-mean Gaussian Markov chain, prepared for smoothing many times.

    Attributes:
        initial_cov: P_1 [*batch, S, S].
        transition: A_t [*batch, T - 1, S, S].
        noise: Q_t [*batch, T - 1, S, S].
        observation: H [r, S], the entries or sums of entries that the sites speak of.
        precision: Their joint precision, or None where it is too badly conditioned to be used.
    """

    initial_cov: Tensor
    transition: Tensor
    noise: Tensor
    observation: Tensor
    precision: MarkovPrecision | None


def markov_prior(
    initial_cov: Tensor, transition: Tensor, noise: Tensor, observation: Tensor
) -> MarkovPrior:
    """Prepare a chain z_1 ~ N(0, P_1), z_(t+1) = A_t z_t + N(0, Q_t) for `smooth_sites`.

    Args:
        initial_cov: P_1 [*batch, S, S], positive definite.
        transition: A_t [*batch, T - 1, S, S].
        noise: Q_t [*batch, T - 1, S, S], positive semi-definite.
        observation: H [r, S].

    Raises:
        ShapeError: the shapes do not fit together.
        DataError: a value is not finite.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> walk = one.expand(4, 1, 1)
        >>> markov_prior(one, walk, walk, one).precision.diagonal.flatten().tolist()
        [2.0, 2.0, 2.0, 2.0, 1.0]
    """
    states = initial_cov.shape[-1] if initial_cov.ndim else 0
    batch = initial_cov.shape[:-2]
    expected = (*batch, *transition.shape[len(batch) : -2], states, states)
    for name, tensor, shape in (
        ("initial_cov [*batch, S, S]", initial_cov, (*batch, states, states)),
        ("transition [*batch, T - 1, S, S]", transition, expected),
        ("noise [*batch, T - 1, S, S]", noise, expected),
        ("observation [r, S]", observation, (*observation.shape[:1], states)),
    ):
        if tensor.shape != shape or transition.ndim != len(batch) + 3:
            raise ShapeError(f"expected {name} = {shape}, got {tuple(tensor.shape)}")
        check_finite(tensor, name.split()[0])
    usable = initial_cov.dtype == torch.float64 and initial_cov.device.type == "cpu"
    precision = _precision(initial_cov, transition, noise) if usable else None
    return MarkovPrior(initial_cov, transition, noise, observation, precision)


def join_components(prior: MarkovPrior) -> MarkovPrior:
    """Stack independent components into one chain, component after component.

    Args:
        prior: R components of S states each, [*batch, R, ...] in every field; one observation
            H [1, S] for all of them.

    Returns:
        The chain of R S states, whose R observed values are those of the components.

    Example:
        >>> one = torch.ones(3, 1, 1, dtype=torch.float64)
        >>> steps = one.unsqueeze(1).expand(3, 4, 1, 1)
        >>> walks = markov_prior(one, steps, steps, one[0])
        >>> joined = join_components(walks)
        >>> joined.transition.shape, joined.observation.shape
        (torch.Size([4, 3, 3]), torch.Size([3, 3]))
    """
    components = prior.initial_cov.shape[-3]
    eye = torch.eye(components, dtype=prior.observation.dtype, device=prior.observation.device)
    precision = prior.precision
    if precision is not None:
        precision = MarkovPrecision(
            _block_diagonal(precision.diagonal.movedim(-4, -3)),
            _block_diagonal(precision.upper.movedim(-4, -3)),
            precision.log_det.sum(-1),
        )
    return MarkovPrior(
        _block_diagonal(prior.initial_cov),
        _block_diagonal(prior.transition.movedim(-4, -3)),
        _block_diagonal(prior.noise.movedim(-4, -3)),
        torch.kron(eye, prior.observation),
        precision,
    )


def smooth_sites(prior: MarkovPrior, sites: NaturalSites, *, cross: bool = True) -> KalmanSmoother:
    """Return the law of each state given all sites; no gradients (see `expected_log_transitions`).

    Args:
        prior: From `markov_prior`, perhaps joined; its batch dims broadcast to those of the sites.
        sites: eta [*batch, T, r] and Lam [*batch, T, r, r], positive semi-definite, zero where
            nothing was observed.
        cross: Whether covariances of neighbouring steps are wanted; if not, ``cross_cov`` is empty.

    Returns:
        A `KalmanSmoother` of the states; H mean and H cov H' are those of the observed values. Its
        evidence is log of the integral of the prior times all sites.

    Raises:
        ShapeError: the sites do not fit the prior.
        DataError: a value of the sites is not finite, or a site is not positive semi-definite.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> prior = markov_prior(one, one[None] * 0, one[None], one)
        >>> sites = NaturalSites(torch.ones(2, 1, dtype=torch.float64), one.expand(2, 1, 1))
        >>> result = smooth_sites(prior, sites)
        >>> [round(m, 9) for m in result.mean.flatten().tolist()]
        [0.5, 0.5]
    """
    steps, observed = prior.transition.shape[-3] + 1, len(prior.observation)
    shape = (*sites.eta.shape[:-2], steps, observed)
    if sites.eta.shape != shape or sites.precision.shape != (*shape, observed):
        raise ShapeError(
            f"expected sites with eta [*batch, T, r] = {shape} and precision [*batch, T, r, r], "
            f"got {tuple(sites.eta.shape)} and {tuple(sites.precision.shape)}"
        )
    check_finite(sites.eta, "eta", ("step", "entry"))
    check_finite(sites.precision, "site precision", ("step", "row", "column"))
    with torch.no_grad():
        if prior.precision is not None and sites.eta.dtype == torch.float64:
            return _banded(prior.precision, prior.observation, sites, cross)
        return _covariance_form(prior, sites, cross)


def smoothed_covariances(prior: MarkovPrior, sites: NaturalSites, steps: Tensor) -> Tensor:
    """Return the joint covariance of the states at some steps, given all sites; no gradients.

    Args:
        prior: From `markov_prior`, perhaps joined.
        sites: eta [*batch, T, r] and Lam [*batch, T, r, r].
        steps: Increasing steps [m].

    Returns:
        Cov[z_i, z_j] [*batch, m, S, m, S].

    Raises:
        ShapeError: the sites do not fit the prior.
        DataError: a value of the sites is not finite, or a site is not positive semi-definite.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> walk = markov_prior(one, one.expand(2, 1, 1), one.expand(2, 1, 1), one)
        >>> zero = torch.zeros(3, 1, dtype=torch.float64)
        >>> cov = smoothed_covariances(walk, NaturalSites(zero, zero[..., None]), torch.arange(3))
        >>> cov.squeeze().round(decimals=9).tolist()
        [[1.0, 1.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0]]
    """
    result = smooth_sites(prior, sites)
    with torch.no_grad():
        if prior.precision is not None and sites.eta.dtype == torch.float64:
            return _columns(prior.precision, prior.observation, sites, steps)
        return _chained(result, steps)


def expected_log_transitions(
    initial_cov: Tensor, transition: Tensor, noise: Tensor, second: Tensor, lagged: Tensor
) -> Tensor:
    """E[log p(z_1, ..., z_T)] [*batch] under given moments, differentiable in the chain.

    By Fisher's identity its gradient with respect to any parameter of the prior, at the moments
    that `smooth_sites` returns for that prior, is the gradient of the log evidence.

    Args:
        initial_cov: P_1 [*batch, S, S].
        transition: A_t [*batch, T - 1, S, S].
        noise: Q_t [*batch, T - 1, S, S], positive definite.
        second: M_t = E[z_t z_t'] [*batch, T, S, S].
        lagged: X_t = E[z_(t+1) z_t'] [*batch, T - 1, S, S].

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> second = one.expand(2, 1, 1)
        >>> round(expected_log_transitions(one, one[None], one[None], second, one[None]).item(), 6)
        -2.337877
    """
    AX = transition @ lagged.mT
    W = second[..., 1:, :, :] - AX - AX.mT + transition @ second[..., :-1, :, :] @ transition.mT
    covs = torch.cat((initial_cov.unsqueeze(-3), noise), -3)
    moments = torch.cat((second[..., :1, :, :], symmetric(W)), -3)
    L = torch.linalg.cholesky(covs)
    quadratic = torch.cholesky_solve(moments, L).diagonal(dim1=-2, dim2=-1).sum((-2, -1))
    log_det = 2 * L.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
    constant = covs.shape[-3] * covs.shape[-1] * _LOG_2PI
    return -(quadratic + log_det + constant) / 2


# --------------------------------------------------------------------------- the prior's precision


def _precision(initial_cov: Tensor, transition: Tensor, noise: Tensor) -> MarkovPrecision | None:
    """The joint precision, or None where rounding would exceed `ROUNDING`."""
    covs = torch.cat((initial_cov.unsqueeze(-3), noise), -3)
    L, failed = torch.linalg.cholesky_ex(covs)
    if bool(failed.any()):
        return None
    inverse = symmetric(torch.cholesky_inverse(L))
    scale = initial_cov.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)
    rounding = torch.finfo(covs.dtype).eps * inverse.diagonal(dim1=-2, dim2=-1) * scale
    if not bool(rounding.max() <= ROUNDING):
        return None
    AQ = transition.mT @ inverse[..., 1:, :, :]
    diagonal = inverse.clone()
    diagonal[..., :-1, :, :] += symmetric(AQ @ transition)
    log_det = -2 * L.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
    return MarkovPrecision(diagonal, -AQ, log_det)


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Matrices [..., R, S, S] along the diagonal of one [..., R S, R S]."""
    *lead, components, states, _ = blocks.shape
    eye = torch.eye(components, dtype=blocks.dtype, device=blocks.device)
    spread = blocks.unsqueeze(-2) * eye[:, None, :, None]  # [..., R, S, R, S]
    return spread.reshape(*lead, components * states, components * states)


# --------------------------------------------------------------------------- banded smoothing


def _banded(prior: MarkovPrecision, H: Tensor, sites: NaturalSites, cross: bool) -> KalmanSmoother:
    """Smooth by a factorisation from each end; all sequences of the batch form one band."""
    *batch, steps, _ = sites.eta.shape
    states = H.shape[-1]
    diagonal = _posterior_diagonal(prior, H, sites)
    upper = prior.upper.expand(*batch, steps - 1, states, states)
    linear = sites.eta @ H
    offsets = _bandwidth(prior.upper)
    forward, below, factor = _factor(diagonal, upper, offsets)
    backward = _reverse(_factor(_reverse(diagonal), _reverse(upper.mT), offsets)[0])
    mean = torch.from_numpy(
        lapack.dpbtrs(factor, linear.reshape(-1, 1).numpy(), lower=1)[0].copy()
    ).reshape(*batch, steps, states)
    cov = symmetric(torch.linalg.inv(forward @ forward.mT + backward @ backward.mT - diagonal))
    log_det = 2 * forward.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1))
    evidence = (prior.log_det - log_det + (linear * mean).sum((-2, -1))) / 2
    if not cross:
        return KalmanSmoother(evidence, mean, cov, cov.new_empty(*batch, 0, states, states))
    gain = -torch.linalg.solve_triangular(forward[..., :-1, :, :].mT, below.mT, upper=True)
    return KalmanSmoother(evidence, mean, cov, cov[..., 1:, :, :] @ gain.mT)


def _posterior_diagonal(prior: MarkovPrecision, H: Tensor, sites: NaturalSites) -> Tensor:
    """J_tt + H' Lam_t H [*batch, T, S, S]."""
    *lead, _ = sites.eta.shape
    # for all steps one product with kron(H, H)
    added = sites.precision.reshape(*lead, -1) @ torch.kron(H, H)
    return symmetric(prior.diagonal + added.reshape(*lead, H.shape[-1], H.shape[-1]))


def _columns(prior: MarkovPrecision, H: Tensor, sites: NaturalSites, steps: Tensor) -> Tensor:
    """Columns of the inverse of the joint precision, by back substitution."""
    *batch, total, _ = sites.eta.shape
    states, m = H.shape[-1], len(steps)
    upper = prior.upper.expand(*batch, total - 1, states, states)
    factor = _factor(_posterior_diagonal(prior, H, sites), upper, _bandwidth(prior.upper))[2]
    units = torch.zeros(total, states, m, states, dtype=H.dtype)
    units[steps, :, torch.arange(m)] = torch.eye(states, dtype=H.dtype)
    right = units.reshape(1, total * states, m * states).expand(math.prod(batch), -1, -1)
    solved = lapack.dpbtrs(factor, right.reshape(-1, m * states).numpy(), lower=1)[0]
    columns = torch.from_numpy(solved.copy()).reshape(*batch, total, states, m, states)
    return columns[..., steps, :, :, :]


def _chained(result: KalmanSmoother, steps: Tensor) -> Tensor:
    """Covariances of distant states by those of neighbours, Cov[z_t, z_j] = G_t Cov[z_(t+1), z_j].

    G_t = Cov[z_t, z_(t+1)] Cov[z_(t+1)]^-1, as the states are a Markov chain.
    """
    m, states = len(steps), result.mean.shape[-1]
    L, _ = safe_cholesky(result.cov[..., 1:, :, :])
    gain = torch.cholesky_solve(result.cross_cov, L).mT
    batch = result.mean.shape[:-2]
    cov = result.mean.new_zeros(*batch, m, states, m, states)
    later = result.mean.new_zeros(*batch, states, m * states)
    place = {int(t): i for i, t in enumerate(steps)}
    for t in range(max(place), min(place) - 1, -1):
        if t < max(place):
            later = gain[..., t, :, :] @ later
        if t in place:
            i = place[t]
            own = slice(i * states, (i + 1) * states)
            later[..., own] = result.cov[..., t, :, :]
            after = later.reshape(*batch, states, m, states)[..., i:, :]
            cov[..., i, :, i:, :] = after
            cov[..., i:, :, i, :] = after.movedim(-3, -1)
    return cov


def _bandwidth(upper: Tensor) -> int:
    """How far from the diagonal the precision reaches; the blocks of the sites are full."""
    states = upper.shape[-1]
    seen = (upper != 0).reshape(-1, states, states).any(0)
    place = torch.arange(states)
    reach = states + place - place.unsqueeze(-1)
    return max(states - 1, int(torch.where(seen, reach, 0).max()))


def _reverse(blocks: Tensor) -> Tensor:
    """Blocks [*batch, T, S, S] with the steps and the states in opposite order."""
    return blocks.flip(-3, -2, -1)


def _factor(diagonal: Tensor, upper: Tensor, offsets: int) -> tuple[Tensor, Tensor, object]:
    """Cholesky factor of block tridiagonal matrices.

    Returns:
        Its diagonal blocks [*batch, T, S, S], the blocks below them [*batch, T - 1, S, S], and the
        factor in LAPACK's lower band form, all sequences in one band.
    """
    *batch, steps, states, _ = diagonal.shape
    # Row (t, a) of the matrix from the start of block t on; reading it a places further on, row by
    # row, gives the entries from the diagonal on, which is the band form.
    wide = 3 * states
    rows = diagonal.new_zeros(*batch, steps, states, wide)
    rows[..., :states] = diagonal
    rows[..., :-1, :, states : 2 * states] = upper
    band = _shifted(rows, offsets + 1).reshape(-1, offsets + 1).numpy().T
    factor, info = lapack.dpbtrf(band, lower=1, overwrite_ab=1)
    if info != 0:
        raise DataError(
            f"expected positive semi-definite site precisions, step {(info - 1) // states % steps} "
            "is not; symmetrise them and check the weights that formed them"
        )
    columns = torch.zeros_like(rows)
    _shifted(columns, offsets + 1).copy_(
        torch.from_numpy(factor.T).reshape(*batch, steps, states, offsets + 1)
    )
    below = columns[..., :-1, :, states : 2 * states].mT
    return columns[..., :states].mT, below, factor


def _shifted(rows: Tensor, length: int) -> Tensor:
    """View of ``length`` entries of each row [..., S, W], starting at a in row a."""
    *lead, states, wide = rows.shape
    *strides, row, one = rows.stride()
    return rows.as_strided((*lead, states, length), (*strides, row + one, one))


# --------------------------------------------------------------------------- covariance form


def _covariance_form(prior: MarkovPrior, sites: NaturalSites, cross: bool) -> KalmanSmoother:
    batch = sites.eta.shape[:-2]

    def whole(tensor: Tensor, core: int) -> Tensor:
        return tensor.expand(*batch, *tensor.shape[tensor.ndim - core :])

    initial_cov = whole(prior.initial_cov, 2)
    result = kalman_smoother(
        torch.zeros_like(initial_cov[..., 0]),
        initial_cov,
        whole(prior.transition, 3),
        whole(prior.noise, 3),
        sites,
        observation=prior.observation,
    )
    return result if cross else result._replace(cross_cov=result.cross_cov[..., :0, :, :])

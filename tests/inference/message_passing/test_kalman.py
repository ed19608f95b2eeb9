"""Linear-Gaussian chains against the dense joint Gaussian; each check against a wrong variant."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.inference.message_passing import (
    GaussianObservations,
    NaturalSites,
    collect_sites,
    gaussian,
    gaussian_sites,
    kalman,
    kalman_filter,
    kalman_log_evidence,
    kalman_sample_paths,
    kalman_smoother,
)

F64 = torch.float64
METHODS = ["loop", "scan"]
Site = NaturalSites | GaussianObservations


class Model(NamedTuple):
    initial_mean: Tensor
    initial_cov: Tensor
    transition: Tensor
    noise: Tensor


def covariance(generator: torch.Generator, *shape: int, rank: int | None = None) -> Tensor:
    """Random positive semi-definite matrices of the given rank."""
    n = shape[-1]
    root = torch.randn(*shape[:-1], rank or n, generator=generator, dtype=F64)
    return root @ root.mT / n


def random_model(
    generator: torch.Generator, batch: tuple[int, ...] = (), steps: int = 6, states: int = 3
) -> Model:
    """A chain whose transition and noise differ from step to step."""
    mean = torch.randn(*batch, states, generator=generator, dtype=F64)
    transition = torch.randn(*batch, steps - 1, states, states, generator=generator, dtype=F64)
    return Model(
        mean,
        covariance(generator, *batch, states, states) + 0.1 * torch.eye(states, dtype=F64),
        transition / math.sqrt(states),
        covariance(generator, *batch, steps - 1, states, states)
        + 0.05 * torch.eye(states, dtype=F64),
    )


def random_sites(
    generator: torch.Generator,
    batch: tuple[int, ...] = (),
    steps: int = 6,
    r: int = 2,
    *,
    kind: str = "full rank",
) -> Site:
    """Sites of one kind; in all of them step 1 is missing."""
    values = torch.randn(*batch, steps, r, generator=generator, dtype=F64)
    if kind == "moment":
        values[..., 1, :] = torch.nan
        values[..., 2, 0] = torch.nan
        return GaussianObservations(values, covariance(generator, *batch, steps, r, r))
    if kind == "noiseless":
        return GaussianObservations(values, torch.zeros(r, r, dtype=F64))
    rank = 1 if kind == "rank deficient" else r
    root = torch.randn(*batch, steps, r, rank, generator=generator, dtype=F64)
    root[..., 1, :, :] = 0
    # eta in the range of Lam, as sums of observations give it
    noise = torch.randn(*batch, steps, rank, 1, generator=generator, dtype=F64)
    return NaturalSites((root @ noise).squeeze(-1), root @ root.mT)


class Dense(NamedTuple):
    log_evidence: Tensor
    mean: Tensor
    cov: Tensor


def dense(model: Model, sites: Site, H: Tensor, *, upto: int | None = None) -> Dense:
    """The joint Gaussian of all states [T S], conditioned on the sites before step ``upto``."""
    steps, r = sites.values.shape
    states = model.initial_mean.shape[-1]
    means, cov = [model.initial_mean], torch.zeros(steps, states, steps, states, dtype=F64)
    cov[0, :, 0] = model.initial_cov
    for t in range(1, steps):
        A, Q = model.transition[t - 1], model.noise[t - 1]
        means.append(A @ means[-1])
        for s in range(t):
            cov[t, :, s] = A @ cov[t - 1, :, s]
            cov[s, :, t] = cov[t, :, s].T
        cov[t, :, t] = A @ cov[t - 1, :, t - 1] @ A.T + Q
    mean, K = torch.cat(means), cov.reshape(steps * states, steps * states)
    upto = steps if upto is None else upto
    if upto == 0:
        return Dense(mean.new_zeros(()), mean, K)
    big_H = torch.block_diag(*H.expand(steps, r, states))[: upto * r]
    u, S = big_H @ mean, big_H @ K @ big_H.T
    cross = K @ big_H.T
    eye = torch.eye(upto * r, dtype=F64)
    if isinstance(sites, NaturalSites):
        Lam = torch.block_diag(*sites.precision.expand(steps, r, r)[:upto])
        eta = sites.eta[:upto].reshape(-1)
        J = torch.linalg.inv(eye + Lam @ S)
        residual = J @ (eta - Lam @ u)
        evidence = (
            torch.logdet(J) / 2 + eta @ u - u @ Lam @ u / 2 + (eta - Lam @ u) @ S @ residual / 2
        )
        return Dense(evidence, mean + cross @ residual, K - cross @ J @ Lam @ cross.T)
    seen = ~sites.y[:upto].reshape(-1).isnan()
    y = sites.y[:upto].reshape(-1)[seen]
    R = torch.block_diag(*sites.covariance.expand(steps, r, r)[:upto])
    S = (S + R)[seen][:, seen]
    cross, u = cross[:, seen], u[seen]
    law = torch.distributions.MultivariateNormal(u, S) if len(y) else None
    evidence = law.log_prob(y) if law is not None else mean.new_zeros(())
    W = torch.linalg.inv(S)
    return Dense(evidence, mean + cross @ W @ (y - u), K - cross @ W @ cross.T)


def close(value: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def caught(check: Callable[[], Any]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def check_filter(model: Model, sites: Site, H: Tensor, method: str) -> None:
    steps, states = len(sites.values), model.initial_mean.shape[-1]
    result = kalman_filter(*model, sites, observation=H, method=method)  # type: ignore[arg-type]
    before = torch.zeros((), dtype=F64)
    for t in range(steps):
        block = slice(t * states, (t + 1) * states)
        prior, now = (dense(model, sites, H, upto=n) for n in (t, t + 1))
        close(result.predicted_mean[t], prior.mean[block])
        close(result.predicted_cov[t], prior.cov[block, block])
        close(result.filtered_mean[t], now.mean[block])
        close(result.filtered_cov[t], now.cov[block, block])
        close(result.log_increment[t], now.log_evidence - before)
        before = now.log_evidence
    close(result.log_evidence, before)


def check_smoother(model: Model, sites: Site, H: Tensor, method: str) -> None:
    steps, states = len(sites.values), model.initial_mean.shape[-1]
    exact = dense(model, sites, H)
    result = kalman_smoother(*model, sites, observation=H, method=method)  # type: ignore[arg-type]
    close(result.log_evidence, exact.log_evidence)
    close(result.mean, exact.mean.reshape(steps, states))
    blocks = exact.cov.reshape(steps, states, steps, states)
    for t in range(steps):
        close(result.cov[t], blocks[t, :, t])
    for t in range(steps - 1):
        close(result.cross_cov[t], blocks[t + 1, :, t])


KINDS = ["full rank", "rank deficient", "moment", "noiseless"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_filter_and_smoother_equal_the_dense_gaussian(
    kind: str, method: str, generator: torch.Generator
) -> None:
    for states, r in ((3, 2), (2, 2), (4, 1), (1, 1), (5, 3)):
        model = random_model(generator, states=states)
        sites = random_sites(generator, r=r, kind=kind)
        for H in (
            torch.randn(r, states, generator=generator, dtype=F64),
            torch.randn(6, r, states, generator=generator, dtype=F64),
        ):
            check_filter(model, sites, H, method)
            check_smoother(model, sites, H, method)


def test_first_entries_are_observed_by_default(generator: torch.Generator) -> None:
    model, sites = random_model(generator), random_sites(generator)
    H = torch.eye(3, dtype=F64)[:2]
    close(kalman_smoother(*model, sites).mean, kalman_smoother(*model, sites, observation=H).mean)


def test_more_observed_combinations_than_states(generator: torch.Generator) -> None:
    model, sites = random_model(generator, states=2), random_sites(generator, r=3)
    H = torch.randn(3, 2, generator=generator, dtype=F64)
    for method in METHODS:
        check_smoother(model, sites, H, method)


def test_both_forms_of_a_site_agree(generator: torch.Generator) -> None:
    model = random_model(generator)
    y = torch.randn(6, 2, generator=generator, dtype=F64)
    R = covariance(generator, 6, 2, 2) + 0.1 * torch.eye(2, dtype=F64)
    Lam = torch.linalg.inv(R)
    eta = (Lam @ y.unsqueeze(-1)).squeeze(-1)
    moment = kalman_smoother(*model, GaussianObservations(y, R))
    natural = kalman_smoother(*model, NaturalSites(eta, Lam))
    close(natural.mean, moment.mean)
    close(natural.cov, moment.cov)
    constant = (eta * y).sum(-1) + torch.logdet(2 * math.pi * R)
    close(natural.log_evidence - constant.sum() / 2, moment.log_evidence)


def test_several_observations_of_one_step_add_up(generator: torch.Generator) -> None:
    model = random_model(generator, steps=4)
    index = torch.tensor([0, 2, 2, 2, 3])
    root = torch.randn(5, 2, 1, generator=generator, dtype=F64)
    eta = torch.randn(5, 2, generator=generator, dtype=F64)
    sites = collect_sites(index, eta, root @ root.mT, 4)
    assert not sites.precision[1].any()
    close(sites.eta[2], eta[1:4].sum(0))
    # one after another: the same chain with steps of zero length
    eye = torch.eye(3, dtype=F64)
    stay = torch.tensor([0, 1, 2, 2, 2, 3])
    move = stay.diff() == 1
    moves = torch.where(move[:, None, None], model.transition[(stay[1:] - 1).clamp_min(0)], eye)
    noise = torch.where(move[:, None, None], model.noise[(stay[1:] - 1).clamp_min(0)], 0.0)
    place = torch.tensor([0, 2, 3, 4, 5])
    spread = collect_sites(place, eta, root @ root.mT, 6)
    long = kalman_filter(model.initial_mean, model.initial_cov, moves, noise, spread)
    short = kalman_filter(*model, sites)
    close(long.log_evidence, short.log_evidence)
    close(long.filtered_mean[[0, 1, 4, 5]], short.filtered_mean)
    close(long.filtered_cov[[0, 1, 4, 5]], short.filtered_cov)


# --------------------------------------------------------------------------- uneven time steps


def matern(order: int, gaps: Tensor, lengthscale: float) -> tuple[Tensor, Tensor, Tensor]:
    """P_inf, A, Q of a unit-variance Matern process by the matrix exponential of its equation."""
    c = math.sqrt(2 * order - 1) / lengthscale
    F = torch.diag(torch.ones(order - 1, dtype=F64), 1)
    F[-1] = -torch.tensor([math.comb(order, i) * c ** (order - i) for i in range(order)], dtype=F64)
    P = torch.zeros(order, order, dtype=F64)
    if order == 1:
        P[0, 0] = 1.0
    elif order == 2:
        P = torch.diag(torch.tensor([1.0, c**2], dtype=F64))
    else:
        p = c**2 / 3
        P = torch.tensor([[1, 0, -p], [0, p, 0], [-p, 0, c**4]], dtype=F64)
    A = torch.linalg.matrix_exp(F * gaps[:, None, None])
    return P, A, P - A @ P @ A.mT


def matern_gram(order: int, x: Tensor, lengthscale: float) -> Tensor:
    d = (x[:, None] - x[None]).abs() * math.sqrt(2 * order - 1) / lengthscale
    polynomial = {1: torch.ones_like(d), 2: 1 + d, 3: 1 + d + d**2 / 3}[order]
    return polynomial * (-d).exp()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_uneven_steps_equal_a_gaussian_process(
    order: int, method: str, generator: torch.Generator
) -> None:
    x = torch.rand(40, generator=generator, dtype=F64).sort().values
    P, A, Q = matern(order, x.diff(), 0.3)
    y = torch.randn(40, 1, generator=generator, dtype=F64)
    y[5:9] = torch.nan
    seen = ~y[:, 0].isnan()
    noise = 0.09 * torch.eye(1, dtype=F64)
    zero = torch.zeros(order, dtype=F64)
    result = kalman_smoother(zero, P, A, Q, GaussianObservations(y, noise), method=method)  # type: ignore[arg-type]
    K = matern_gram(order, x, 0.3)
    S = K[seen][:, seen] + 0.09 * torch.eye(int(seen.sum()), dtype=F64)
    W = torch.linalg.inv(S)
    close(result.mean[:, 0], K[:, seen] @ W @ y[seen, 0], 1e-8)
    close(result.cov[:, 0, 0], (K - K[:, seen] @ W @ K[seen]).diagonal(), 1e-8)
    law = torch.distributions.MultivariateNormal(torch.zeros(len(S), dtype=F64), S)
    close(result.log_evidence, law.log_prob(y[seen, 0]), 1e-8)


# --------------------------------------------------------------------------- the checks' own test


def wrong_order(model: Model) -> Model:
    return model._replace(transition=model.transition.roll(1, 0), noise=model.noise.roll(1, 0))


def transposed(model: Model) -> Model:
    return model._replace(transition=model.transition.mT)


@pytest.mark.parametrize("mutant", [wrong_order, transposed])
def test_dense_check_catches_a_wrong_transition(
    mutant: Callable[[Model], Model], generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sites = random_model(generator), random_sites(generator)
    H = torch.eye(3, dtype=F64)[:2]
    right = kalman.canonical_gaussian

    def wrong(*arguments: Any) -> gaussian.GaussianChain:
        changed = mutant(Model(*arguments[:4]))
        return right(*changed, *arguments[4:])

    for method in METHODS:
        check_filter(model, sites, H, method)
    monkeypatch.setattr(kalman, "canonical_gaussian", wrong)
    for method in METHODS:
        assert caught(lambda method=method: check_filter(model, sites, H, method))
        assert caught(lambda method=method: check_smoother(model, sites, H, method))


@pytest.mark.parametrize("method", METHODS)
def test_dense_check_catches_a_missing_backward_pass(
    method: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sites = random_model(generator), random_sites(generator)
    H = torch.eye(3, dtype=F64)[:2]
    check_smoother(model, sites, H, method)

    def only_filtered(gain: Tensor, offset: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        result = kalman_filter(*model, sites)
        return result.filtered_mean, result.filtered_cov

    monkeypatch.setattr(kalman, f"{method}_smoother", only_filtered)
    assert caught(lambda: check_smoother(model, sites, H, method))


@pytest.mark.parametrize("method", METHODS)
def test_dense_check_catches_ignored_missing_steps(
    method: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sites = random_model(generator), random_sites(generator, kind="moment")
    H = torch.eye(3, dtype=F64)[:2]
    check_filter(model, sites, H, method)
    right = GaussianObservations.weigh

    def zero_instead_of_missing(self: GaussianObservations, S: Tensor) -> Any:
        return right(self._replace(y=self.y.nan_to_num(0.0)), S)

    monkeypatch.setattr(GaussianObservations, "weigh", zero_instead_of_missing)
    assert caught(lambda: check_filter(model, sites, H, method))


def test_dense_check_catches_a_dropped_determinant(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sites = random_model(generator), random_sites(generator)
    H = torch.eye(3, dtype=F64)[:2]
    right = NaturalSites.log_evidence

    def without(self: NaturalSites, mean: Tensor, S: Tensor) -> Tensor:
        M = torch.eye(2, dtype=F64) + self.precision @ S
        return right(self, mean, S) + torch.logdet(M) / 2

    monkeypatch.setattr(NaturalSites, "log_evidence", without)
    assert caught(lambda: check_filter(model, sites, H, "loop"))


# --------------------------------------------------------------------------- loop, scan, batch


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 500])
def test_loop_equals_scan(steps: int, kind: str, generator: torch.Generator) -> None:
    model = random_model(generator, (2,), steps)
    sites = random_sites(generator, (2,), max(steps, 3), kind=kind)
    if steps < 3:
        sites = type(sites)(
            sites.values[:, :steps],
            sites.matrices if kind == "noiseless" else sites.matrices[:, :steps],
        )
    for function in (kalman_filter, kalman_smoother):
        loop = function(*model, sites, method="loop")
        scan = function(*model, sites, method="scan")
        for a, b in zip(loop, scan, strict=True):
            close(a, b)
    paths = (kalman_sample_paths(*model, sites, 3, rng=0, method=m) for m in ("loop", "scan"))
    close(*paths, 1e-7)  # square roots of singular kernels


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_loop_over_it(kind: str, method: str, generator: torch.Generator) -> None:
    model = random_model(generator, (3, 2))
    sites = random_sites(generator, (3, 2), kind=kind)
    H = torch.randn(3, 2, 2, 3, generator=generator, dtype=F64)
    result = kalman_smoother(*model, sites, observation=H, method=method)  # type: ignore[arg-type]
    for i, j in itertools.product(range(3), range(2)):
        matrices = sites.matrices if kind == "noiseless" else sites.matrices[i, j]
        alone = kalman_smoother(
            *(x[i, j] for x in model),
            type(sites)(sites.values[i, j], matrices),
            observation=H[i, j],
            method=method,  # type: ignore[arg-type]
        )
        for a, b in zip(result, alone, strict=True):
            close(a[i, j], b, 1e-11)


@pytest.mark.parametrize(
    ("batch", "steps", "scan"),
    [((), 20, False), ((), 40, True), ((100,), 40, False)],
)
def test_choice_by_shape(
    batch: tuple[int, ...], steps: int, scan: bool, generator: torch.Generator
) -> None:
    model = random_model(generator, batch, steps)
    sites = random_sites(generator, batch, steps)
    chain = gaussian.canonical_gaussian(*model, sites, None)
    assert kalman._use_scan(chain, "auto") == scan
    for a, b in zip(
        kalman_smoother(*model, sites), kalman_smoother(*model, sites, method="loop"), strict=True
    ):
        close(a, b)


def test_constant_matrices_broadcast(generator: torch.Generator) -> None:
    model, sites = random_model(generator, (4,)), random_sites(generator, (4,))
    constant = Model(
        model.initial_mean[0], model.initial_cov[0], model.transition[0, 0], model.noise[0, 0]
    )
    full = Model(
        *(x.expand(4, *x.shape) for x in constant[:2]),
        *(x.expand(4, 5, 3, 3) for x in constant[2:]),
    )
    for a, b in zip(kalman_smoother(*constant, sites), kalman_smoother(*full, sites), strict=True):
        close(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_zero_sites_at_the_end_change_nothing(method: str, generator: torch.Generator) -> None:
    model, sites = random_model(generator, steps=9), random_sites(generator, steps=9)
    assert isinstance(sites, NaturalSites)
    short = NaturalSites(sites.eta[:6], sites.precision[:6])
    padded = NaturalSites(sites.eta.clone(), sites.precision.clone())
    padded.eta[6:] = 0
    padded.precision[6:] = 0
    first = model._replace(transition=model.transition[:5], noise=model.noise[:5])
    a = kalman_smoother(*model, padded, method=method)  # type: ignore[arg-type]
    b = kalman_smoother(*first, short, method=method)  # type: ignore[arg-type]
    close(a.log_evidence, b.log_evidence, 1e-10)
    close(a.mean[:6], b.mean, 1e-10)
    close(a.cov[:6], b.cov, 1e-10)


def test_inputs_are_not_changed(generator: torch.Generator) -> None:
    model, sites = random_model(generator), random_sites(generator)
    kept = [x.clone() for x in (*model, *sites)]
    for method in METHODS:
        kalman_smoother(*model, sites, method=method)  # type: ignore[arg-type]
        kalman_sample_paths(*model, sites, 2, rng=0, method=method)  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip((*model, *sites), kept, strict=True))


def test_very_precise_sites_leave_positive_variances() -> None:
    P, A, Q = matern(3, torch.full((200,), 0.01, dtype=F64), 0.2)
    precision = torch.zeros(201, 1, 1, dtype=F64)
    precision[::7] = 1e14
    eta = precision.squeeze(-1) * 0.3
    zero = torch.zeros(3, dtype=F64)
    for method in METHODS:
        result = kalman_smoother(zero, P, A, Q, NaturalSites(eta, precision), method=method)  # type: ignore[arg-type]
        assert (result.cov.diagonal(dim1=-2, dim2=-1) > 0).all()
        close(result.mean[::7, 0], torch.full((29,), 0.3, dtype=F64))


# --------------------------------------------------------------------------- paths


@pytest.mark.parametrize("kind", ["rank deficient", "moment"])
def test_drawn_paths_have_the_joint_law(kind: str, generator: torch.Generator) -> None:
    model = random_model(generator, steps=4, states=2)
    sites = random_sites(generator, steps=4, r=2, kind=kind)
    H = torch.eye(2, dtype=F64)
    exact = dense(model, sites, H)
    n = 40_000
    paths = kalman_sample_paths(*model, sites, n, rng=5, observation=H).reshape(n, 8)

    def worst(draws: Tensor) -> tuple[float, float]:
        """Largest z-scores of the means and of the second moments."""
        centred = draws - exact.mean
        scale = exact.cov.diagonal().sqrt()
        mean = (centred.mean(0) / scale).abs().max() * math.sqrt(n)
        products = centred.T @ centred / n
        error = (exact.cov**2 + torch.outer(scale, scale) ** 2).sqrt() / math.sqrt(n)
        return float(mean), float(((products - exact.cov) / error).abs().max())

    mean_z, cov_z = worst(paths)
    assert mean_z < 4.0 and cov_z < 4.5
    # draws from the marginals, without the dependence between steps, are seen
    shuffled = paths.reshape(n, 4, 2).clone()
    for t in range(4):
        shuffled[:, t] = shuffled[torch.randperm(n, generator=generator), t]
    assert worst(shuffled.reshape(n, 8))[1] > 4.5


def test_same_seed_same_paths(generator: torch.Generator) -> None:
    model, sites = random_model(generator, (2,)), random_sites(generator, (2,))
    first = kalman_sample_paths(*model, sites, 4, rng=1)
    assert first.shape == (4, 2, 6, 3)
    assert torch.equal(first, kalman_sample_paths(*model, sites, 4, rng=1))
    assert not torch.equal(first, kalman_sample_paths(*model, sites, 4, rng=2))


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["rank deficient", "moment"])
def test_gradients_against_differences(kind: str, method: str, generator: torch.Generator) -> None:
    model = random_model(generator, steps=3, states=2)
    sites = random_sites(generator, steps=3, r=2, kind=kind)

    def value(*tensors: Tensor) -> Tensor:
        mean, cov, A, Q, values, matrices = tensors
        symmetric = [gaussian.symmetric(x) for x in (cov, Q, matrices)]
        data = type(sites)(values, symmetric[2])
        if isinstance(data, GaussianObservations):
            data = data._replace(y=torch.where(sites.values.isnan(), torch.nan, values))
        chain = (mean, symmetric[0], A, symmetric[1], data)
        smoothed = kalman_smoother(*chain, method=method)  # type: ignore[arg-type]
        return torch.stack((smoothed.log_evidence, smoothed.mean.sum(), smoothed.cov.sum()))

    tensors = (*model, sites.values.nan_to_num(0.0), sites.matrices)
    tracked = tuple(x.clone().requires_grad_() for x in tensors)
    assert torch.autograd.gradcheck(value, tracked)


def test_gradient_of_evidence_in_eta_is_the_smoothed_mean(generator: torch.Generator) -> None:
    model, sites = random_model(generator), random_sites(generator, kind="rank deficient")
    assert isinstance(sites, NaturalSites)
    result = kalman_smoother(*model, sites)
    for method in METHODS:
        eta, Lam = sites.eta.clone().requires_grad_(), sites.precision.clone().requires_grad_()
        value = kalman_log_evidence(*model, NaturalSites(eta, Lam), method=method)  # type: ignore[arg-type]
        by_eta, by_precision = torch.autograd.grad(value, (eta, Lam))
        close(by_eta, result.mean[:, :2])
        u = result.mean[:, :2, None]
        close(gaussian.symmetric(by_precision), -(result.cov[:, :2, :2] + u @ u.mT) / 2)


# --------------------------------------------------------------------------- bad input


def test_bad_input(generator: torch.Generator) -> None:
    mean, cov, A, Q = random_model(generator, (2,))
    sites = random_sites(generator, (2,))
    assert isinstance(sites, NaturalSites)
    empty = NaturalSites(sites.eta[:, :0], sites.precision[:, :0])
    with pytest.raises(ShapeError, match=r"at least one step in the sites .* got T = 0"):
        kalman_filter(mean, cov, A, Q, empty)
    with pytest.raises(ShapeError, match=r"expected transition .* = \(2, \(5\), 3, 3\), got"):
        kalman_filter(mean, cov, A[:, :3], Q, sites)
    with pytest.raises(ShapeError, match=r"expected noise .* got \(2, 5, 2, 3\)"):
        kalman_filter(mean, cov, A, Q[:, :, :2], sites)
    with pytest.raises(ShapeError, match=r"expected initial_cov \[\*batch, S, S\] = \(2, 3, 3\)"):
        kalman_filter(mean, cov[:, :2], A, Q, sites)
    with pytest.raises(ShapeError, match=r"expected observation .* = \(2, \(6\), 2, 3\)"):
        kalman_filter(mean, cov, A, Q, sites, observation=A)
    with pytest.raises(ShapeError, match="expected r <= S = 1 without observation H, got r = 2"):
        kalman_filter(mean[:, :1], cov[:, :1, :1], A[..., :1, :1], Q[..., :1, :1], sites)
    with pytest.raises(DataError, match="transition must be finite, got nan"):
        kalman_filter(mean, cov, A * torch.nan, Q, sites)
    with pytest.raises(DataError, match="eta must be finite, got nan at batch 1, step 2, entry 0"):
        eta = sites.eta.clone()
        eta[1, 2, 0] = torch.nan
        kalman_filter(mean, cov, A, Q, sites._replace(eta=eta))
    with pytest.raises(DataError, match="y must be finite, got inf at batch 0, step 0, entry 0"):
        y = sites.eta.clone()
        y[0, 0, 0], y[1] = torch.inf, torch.nan
        kalman_filter(mean, cov, A, Q, GaussianObservations(y, sites.precision))
    with pytest.raises(DataError, match="expected noise in torch.float64 like the sites, got"):
        kalman_filter(mean, cov, A, Q.float(), sites)
    with pytest.raises(DataError, match="method must be 'auto', 'loop' or 'scan'"):
        kalman_filter(mean, cov, A, Q, sites, method="both")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected n >= 1 paths, got 0"):
        kalman_sample_paths(mean, cov, A, Q, sites, 0, rng=0)
    with pytest.raises(DataError, match=r"index must be in 0..3, got 0..4"):
        collect_sites(torch.tensor([0, 4]), torch.zeros(2, 1), torch.zeros(2, 1, 1), 4)
    with pytest.raises(ShapeError, match=r"expected index \[N\], eta"):
        collect_sites(torch.tensor([0]), torch.zeros(2, 1), torch.zeros(2, 1, 1), 4)


def test_inverse_by_formula(generator: torch.Generator) -> None:
    for n in (1, 2, 3):
        M = torch.eye(n, dtype=F64) + covariance(generator, 7, n, n)
        close(gaussian_sites.inverse(M), torch.linalg.inv(M), 1e-12)

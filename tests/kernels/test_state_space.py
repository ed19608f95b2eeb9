"""Kernels as stochastic differential equations, against closed forms and matrix exponentials."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.kernels import Matern, Periodic, state_space

F64 = torch.float64
HALVES = (0.5, 1.5, 2.5)


@pytest.mark.parametrize("nu", HALVES)
def test_matern_is_that_of_gpytorch(nu: float, generator: torch.Generator) -> None:
    x = torch.rand(7, 1, generator=generator, dtype=F64)
    theirs = gpytorch.kernels.MaternKernel(nu=nu).double()
    theirs.initialize(lengthscale=torch.tensor(0.4, dtype=F64))
    expected = 1.7 * theirs(x).to_dense()
    torch.testing.assert_close(Matern(nu, 0.4, 1.7)(x).to_dense(), expected, rtol=1e-12, atol=0)


def test_periodic_is_that_of_gpytorch(generator: torch.Generator) -> None:
    x = torch.rand(7, 1, generator=generator, dtype=F64)
    theirs = gpytorch.kernels.PeriodicKernel().double()
    theirs.initialize(
        lengthscale=torch.tensor(0.49, dtype=F64), period_length=torch.tensor(0.4, dtype=F64)
    )
    ours = Periodic(0.4, 0.7)(x).to_dense()
    torch.testing.assert_close(ours, theirs(x).to_dense(), rtol=1e-12, atol=0)


def covariance(kernel: gpytorch.kernels.Kernel, gaps: Tensor) -> Tensor:
    """H A(d) P H' at each gap."""
    space = state_space(kernel)
    A, _ = space.dynamics(gaps, space.log_hyper)
    H = space.observation()
    return (A @ space.stationary(space.log_hyper) @ H) @ H


@pytest.mark.parametrize(
    "kernel",
    [
        *(Matern(nu, 0.3, 1.7) for nu in HALVES),
        Matern(1.5, 0.3) + Matern(0.5, 0.1, 0.4),
        gpytorch.kernels.ScaleKernel(gpytorch.kernels.MaternKernel(nu=2.5)).double(),
    ],
)
def test_a_process_has_the_covariance_of_its_kernel(kernel: gpytorch.kernels.Kernel) -> None:
    gaps = torch.tensor([0.0, 1e-6, 0.01, 0.3, 2.0], dtype=F64)
    expected = kernel(gaps[:, None], torch.zeros(1, 1, dtype=F64)).to_dense().squeeze(-1)
    torch.testing.assert_close(covariance(kernel, gaps), expected.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("lengthscale", "atol"), [(2.0, 1e-9), (1.0, 1e-4), (0.6, 3e-2)])
def test_harmonics_add_up_to_the_periodic_kernel(lengthscale: float, atol: float) -> None:
    # What six harmonics leave out is 2 e^{-a} sum_(j > 6) I_j(a), a = 1 / l^2.
    gaps = torch.linspace(0, 1.3, 40, dtype=F64)
    kernel = Periodic(0.4, lengthscale, 1.5)
    expected = kernel(gaps[:, None], torch.zeros(1, 1, dtype=F64)).to_dense().squeeze(-1).detach()
    torch.testing.assert_close(covariance(kernel, gaps), expected, rtol=0, atol=atol)
    many = Periodic(0.4, lengthscale, 1.5, harmonics=20)
    torch.testing.assert_close(covariance(many, gaps), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("nu", HALVES)
def test_noise_keeps_the_process_stationary(nu: float) -> None:
    space = Matern(nu, 0.3, 1.7).state_space()
    gaps = torch.tensor([0.02, 0.3, 1.0], dtype=F64)
    A, Q = space.dynamics(gaps, space.log_hyper)
    P = space.stationary(space.log_hyper)
    torch.testing.assert_close(A @ P @ A.mT + Q, P.expand_as(Q), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nu", HALVES)
def test_steps_compose(nu: float) -> None:
    space = Matern(nu, 0.3).state_space()
    gaps = torch.tensor([0.1, 0.25, 0.35], dtype=F64)
    A, Q = space.dynamics(gaps, space.log_hyper)
    torch.testing.assert_close(A[1] @ A[0], A[2], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(A[1] @ Q[0] @ A[1].mT + Q[1], Q[2], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nu", HALVES)
def test_noise_over_tiny_gaps_keeps_its_digits(nu: float) -> None:
    # Doubling a gap multiplies the variance of the increment of f by 2^(2 nu), up to O(gap).
    space = Matern(nu, 1.0).state_space()
    gaps = torch.tensor([1e-7, 2e-7], dtype=F64)
    Q = space.dynamics(gaps, space.log_hyper)[1]
    ratio = float(Q[1, 0, 0] / Q[0, 0, 0])
    assert ratio == pytest.approx(2 ** (2 * nu), rel=1e-5)
    assert bool((torch.linalg.cholesky_ex(Q)[1] == 0).all())


@pytest.mark.parametrize("kernel", [Matern(1.5, 0.3), Matern(2.5, 0.2), Periodic(0.7, 1.2)])
def test_derivative_is_that_of_the_state(kernel: Matern) -> None:
    # E[f(d) f'(0)] = -k'(d), from the state-space form and by differences of the kernel.
    space = kernel.state_space()
    gap = torch.tensor([0.2], dtype=F64)
    A, _ = space.dynamics(gap, space.log_hyper)
    row = space.derivative(space.log_hyper)
    value = space.observation() @ A[0] @ space.stationary(space.log_hyper) @ row
    width = 1e-5
    ends = torch.cat((gap + width, gap - width))
    k = covariance(kernel, ends)
    assert float(value) == pytest.approx(float(-(k[0] - k[1]) / (2 * width)), rel=1e-6)


def test_length_scales_of_periodic_parts_have_a_gradient() -> None:
    space = Periodic(1.0, 0.8).state_space()
    log_l = torch.tensor(-0.2, dtype=F64, requires_grad=True)
    part = space.parts[0]
    assert torch.autograd.gradcheck(lambda v: part.stationary(v).diagonal(), (log_l,))


def test_batches_count_as_kernels_one_by_one(generator: torch.Generator) -> None:
    x = torch.rand(4, 1, generator=generator, dtype=F64)
    both = Matern(1.5, torch.tensor([0.2, 0.5]), batch_shape=torch.Size([2]))
    each = torch.stack([Matern(1.5, scale)(x).to_dense() for scale in (0.2, 0.5)])
    torch.testing.assert_close(both(x).to_dense(), each, rtol=1e-6, atol=0)
    assert both(x, diag=True).shape == (2, 4)
    with pytest.raises(CapabilityError, match="a batch of Matern kernels .* one by one"):
        both.state_space()


def test_values_are_read_and_set() -> None:
    kernel = Matern(0.5, 0.2, 3.0)
    assert kernel.lengthscale.item() == pytest.approx(0.2, rel=1e-12)
    kernel.lengthscale, kernel.variance = 0.7, 0.1
    assert kernel.lengthscale.item() == pytest.approx(0.7, rel=1e-12)
    assert kernel.variance.item() == pytest.approx(0.1, rel=1e-12)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Matern(1.0), "expected nu 0.5, 1.5 or 2.5, got 1.0"),
        (
            lambda: Matern(0.5, lengthscale=0.0),
            "Matern: expected a finite lengthscale > 0, got 0.0",
        ),
        (lambda: Matern(0.5, variance=-1.0), "expected a finite variance > 0, got -1.0"),
        (lambda: Periodic(0.0), "expected a finite period > 0, got 0.0"),
        (lambda: Periodic(1.0, harmonics=0), "whole number of harmonics >= 1, got 0"),
        (
            lambda: Matern(0.5, torch.ones(3)),
            r"expected lengthscale \[\*batch_shape=\(\)\], got \(3,\)",
        ),
        (
            lambda: Matern(0.5)(torch.zeros(2, 2)).to_dense(),
            r"expected one column, got 2; choose it with active_dims",
        ),
    ],
)
def test_bad_options_are_named(make: object, text: str) -> None:
    with pytest.raises(DataError, match=text):
        make()  # type: ignore[operator]


def test_kernels_without_a_state_space_are_refused() -> None:
    with pytest.raises(CapabilityError, match="RBFKernel has no state-space form here; take"):
        state_space(gpytorch.kernels.RBFKernel())

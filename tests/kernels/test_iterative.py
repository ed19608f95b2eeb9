"""Solves and log determinants by iteration against Cholesky factors."""

from __future__ import annotations

import math

import pytest
import torch
from gpytorch.kernels import MaternKernel

from probkit.errors import ConvergenceWarning, DataError
from probkit.kernels import NNGPKernel, evaluate, hyperparameters, partitioned
from probkit.kernels.iterative import Iterative, NoisyKernel, conjugate_gradients

F64 = torch.float64


def problem(kernel, n=80, noise=0.1, options=None, requires_grad=False):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g, dtype=F64)
    right = torch.randn(n, 2, generator=g, dtype=F64)
    values = {name: hyper.value.double() for name, hyper in hyperparameters(kernel).items()}
    s = torch.tensor(noise, dtype=F64)
    if requires_grad:
        values = {name: value.requires_grad_() for name, value in values.items()}
        s.requires_grad_()
    A = NoisyKernel(partitioned(kernel, x, params=values), s, options)
    dense = evaluate(kernel, x, params=values) + s * torch.eye(n, dtype=F64)
    return A, dense, right, [*values.values(), s]


@pytest.mark.parametrize("rank", [0, 10, 80])
@pytest.mark.parametrize("kernel", [NNGPKernel(depth=2), MaternKernel(nu=1.5)])
def test_solves_equal_cholesky(kernel, rank):
    A, dense, right, _ = problem(kernel, options=Iterative(rank=rank, tolerance=1e-12))
    torch.testing.assert_close(A.multiply(right), dense @ right, rtol=1e-12, atol=1e-12)
    want = torch.linalg.solve(dense, right)
    # the residual is 1e-12 of the right-hand side; the smallest eigenvalue is at least the noise
    atol = 1e-12 * float(right.norm()) / 0.1 * 10
    torch.testing.assert_close(A.solve(right), want, rtol=0, atol=atol)


def test_the_preconditioner_saves_products():
    steps = {}
    for rank in (0, 20):
        A, _, right, _ = problem(
            MaternKernel(nu=2.5, active_dims=[0]), noise=1e-3, options=Iterative(rank=rank)
        )
        steps[rank] = A._solution(right).steps
    assert steps[20] < 0.6 * steps[0]


@pytest.mark.parametrize("rank", [0, 15])
def test_quadratic_form_log_determinant_and_their_gradients(rank):
    options = Iterative(rank=rank, probes=3000, tolerance=1e-10)
    A, dense, right, leaves = problem(NNGPKernel(depth=1), options=options, requires_grad=True)
    right.requires_grad_()
    quadratic, log_det, solution = A.reduce(right)
    torch.testing.assert_close(solution, torch.linalg.solve(dense, right), rtol=0, atol=1e-6)
    want = (right * torch.linalg.solve(dense, right)).sum(0)
    torch.testing.assert_close(quadratic, want, rtol=1e-8, atol=0)
    off = float((log_det.value - torch.logdet(dense)).detach())
    assert abs(off) < 4 * float(log_det.error)
    assert 0 < float(log_det.error) < 1.0
    ours = torch.autograd.grad(quadratic.sum(), [*leaves, right], retain_graph=True)
    theirs = torch.autograd.grad(want.sum(), [*leaves, right], retain_graph=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(log_det.value, leaves)
    exact = torch.autograd.grad(torch.logdet(dense), leaves)
    for one, other in zip(found, exact, strict=True):
        # 3000 probes: some 1 / sqrt(3000) of the size of a trace, four of that
        torch.testing.assert_close(one, other, rtol=4 / math.sqrt(3000), atol=0.05)


def test_a_full_preconditioner_leaves_no_error():
    A, dense, right, _ = problem(NNGPKernel(depth=1), n=30, options=Iterative(rank=30, probes=2))
    log_det = A.reduce(right).log_det
    assert float(log_det.value) == pytest.approx(float(torch.logdet(dense)), abs=1e-6)
    assert float(log_det.error) < 1e-6


def test_equal_seeds_give_equal_estimates():
    one, two, other = (
        problem(NNGPKernel(), options=Iterative(rank=5, probes=4, seed=seed))[0]
        for seed in (0, 0, 1)
    )
    y = torch.ones(80, 1, dtype=F64)
    values = [float(A.reduce(y).log_det.value) for A in (one, two, other)]
    assert values[0] == values[1] != values[2]


def test_zero_right_hand_sides_and_converged_columns_stand_still():
    A, dense, right, _ = problem(NNGPKernel(), options=Iterative(rank=5, tolerance=1e-11))
    right = torch.cat([torch.zeros(80, 1, dtype=F64), dense[:, :1], right], 1)
    found = A.solve(right)
    assert bool((found[:, 0] == 0).all())
    torch.testing.assert_close(found, torch.linalg.solve(dense, right), rtol=0, atol=1e-7)


def test_too_few_products_warn():
    A, _, right, _ = problem(NNGPKernel(), noise=1e-4, options=Iterative(rank=0, max_iter=3))
    with pytest.warns(ConvergenceWarning, match="left after 3 products.*raise max_iter, rank or"):
        A.solve(right)


def test_bad_options():
    with pytest.raises(DataError, match=r"tolerance: expected a number in \(0, 1\), got 2"):
        Iterative(tolerance=2)
    with pytest.raises(DataError, match="probes: expected a whole number >= 1, got 0"):
        Iterative(probes=0)
    with pytest.raises(DataError, match="rank: expected a whole number >= 0, got 1.5"):
        Iterative(rank=1.5)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    with pytest.raises(DataError, match=r"expected a kernel \[n, n\], got \[5, 3\]"):
        NoisyKernel(partitioned(NNGPKernel(), x, x[:3]), torch.ones((), dtype=F64))
    with pytest.raises(DataError, match=r"expected one noise variance > 0, got 0.0"):
        NoisyKernel(partitioned(NNGPKernel(), x), torch.zeros((), dtype=F64))


def test_conjugate_gradients_is_exact_after_n_steps():
    g = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=g, dtype=F64)
    A = root @ root.T + torch.eye(6, dtype=F64)
    b = torch.randn(6, 3, generator=g, dtype=F64)
    found = conjugate_gradients(A.matmul, b, lambda v: v, tolerance=1e-10, max_iter=50)
    assert found.steps <= 8
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-7)

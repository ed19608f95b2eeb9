"""Stationary kernels: formulas, gradients, products, tiles; GPyTorch as the peer."""

from __future__ import annotations

import gpytorch
import pytest
import torch

from probkit.errors import DataError
from probkit.kernels.backends import tiles as tiles_module
from probkit.kernels.backends.stationary_tiled import FAMILIES, stationary, stationary_product

PEERS = {
    "rbf": lambda: gpytorch.kernels.RBFKernel(ard_num_dims=3),
    "matern12": lambda: gpytorch.kernels.MaternKernel(nu=0.5, ard_num_dims=3),
    "matern32": lambda: gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=3),
    "matern52": lambda: gpytorch.kernels.MaternKernel(nu=2.5, ard_num_dims=3),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles_module, "_CPU", (8, 16))


@pytest.fixture
def points():
    g = torch.Generator().manual_seed(0)
    x1 = torch.randn(37, 3, generator=g, dtype=torch.float64)
    x2 = torch.randn(29, 3, generator=g, dtype=torch.float64)
    v = torch.randn(29, 2, generator=g, dtype=torch.float64)
    return x1, x2, v, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


def dense(x1, x2, lengthscale, family):
    """The formulas, whole, with autograd of their own."""
    r2 = ((x1[:, None] - x2[None]) / lengthscale).square().sum(-1)
    r = torch.where(r2 > 0, r2.where(r2 > 0, torch.ones(())).sqrt(), 0.0)
    return {
        "rbf": (-r2 / 2).exp(),
        "matern12": (-r).exp(),
        "matern32": (1 + 3**0.5 * r) * (-(3**0.5) * r).exp(),
        "matern52": (1 + 5**0.5 * r + 5 / 3 * r2) * (-(5**0.5) * r).exp(),
    }[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_equal_gpytorch(points, family):
    x1, x2, _, lengthscale = points
    peer = PEERS[family]().double()
    peer.lengthscale = lengthscale
    with torch.no_grad():
        want = peer(x1, x2).to_dense()
    # gpytorch expands squares, which costs digits; 1e-7 is the root of its rounding
    torch.testing.assert_close(
        stationary(x1, x2, lengthscale, family=family), want, atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("symmetric", [False, True])
def test_tiles_and_gradients_equal_the_formula(points, family, symmetric):
    x1, x2, v, lengthscale = points
    if symmetric:
        v = torch.cat([v, v[:8]])
    leaves = [t.clone().requires_grad_() for t in (x1, x2, lengthscale, v)]
    same = [t.clone().requires_grad_() for t in (x1, x2, lengthscale, v)]
    other = None if symmetric else leaves[1]
    K = stationary(leaves[0], other, leaves[2], family=family)
    want = dense(same[0], same[0] if symmetric else same[1], same[2], family)
    torch.testing.assert_close(K, want, atol=1e-13, rtol=0)
    if symmetric:
        assert torch.equal(K, K.T)
        assert bool((K.diagonal() == 1).all())
    product = stationary_product(leaves[0], other, leaves[3], leaves[2], family=family)
    torch.testing.assert_close(product, want @ same[3], atol=1e-12, rtol=0)
    weight = torch.linspace(-1, 1, K.numel(), dtype=torch.float64).view_as(K)
    (K * weight).sum().backward()
    product.square().sum().backward()
    (want * weight).sum().backward(retain_graph=True)
    (want @ same[3]).square().sum().backward()
    for ours, theirs in zip(leaves, same, strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_equal_a_loop(points, family):
    x1, _, _, lengthscale = points
    both = torch.stack([lengthscale, 2 * lengthscale])
    v = x1[None].expand(2, -1, -1)
    K = stationary(x1, None, both, family=family)
    looped = torch.stack([stationary(x1, None, one, family=family) for one in both])
    assert torch.equal(K, looped)
    product = stationary_product(x1, None, v, both, family=family)
    torch.testing.assert_close(product, K @ v, atol=1e-12, rtol=0)


def test_diagonal_and_single_precision(points):
    x1, x2, _, lengthscale = points
    pairs = stationary(x1[:29], x2, lengthscale, family="matern32", diag=True)
    K = stationary(x1[:29], x2, lengthscale, family="matern32")
    torch.testing.assert_close(pairs, K.diagonal(), atol=1e-14, rtol=0)
    single = stationary(x1.float(), x2.float(), lengthscale.float(), family="matern52")
    double = stationary(x1, x2, lengthscale, family="matern52")
    # |dK/ds| <= 5/6 and s is a sum of three squares of size 10: some 100 units of rounding
    torch.testing.assert_close(single.double(), double, atol=100 * 1.2e-7, rtol=0)


def test_close_rows_keep_their_distance():
    x = torch.tensor([[1e3], [1e3 + 1e-6]], dtype=torch.float64)
    K = stationary(x, None, torch.ones(1, dtype=torch.float64), family="matern12")
    assert float(1 - K[0, 1]) == pytest.approx(1e-6, rel=1e-6)


def test_unknown_family():
    x = torch.zeros(2, 1)
    text = "expected one of 'rbf', 'matern12', 'matern32', 'matern52', got 'cauchy'"
    with pytest.raises(DataError, match=text):
        stationary(x, None, torch.ones(1), family="cauchy")

"""Products and operators that never store the matrix: dense agreement, gradients, memory."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.kernels import (
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    ScaleKernel,
)

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.kernels import NNGPKernel, evaluate, hyperparameters, partitioned, product
from probkit.kernels.backends import tiles

F64 = torch.float64
KERNELS = {
    "nngp": lambda: NNGPKernel(depth=2, learn=("w_std", "b_std", "last_w_std")),
    "resnet": lambda: NNGPKernel(depth=2, arch="resnet", activation="erf"),
    "tanh on columns": lambda: NNGPKernel(depth=1, activation="tanh", active_dims=[0, 2]),
    "scaled Matern": lambda: ScaleKernel(MaternKernel(nu=2.5, ard_num_dims=3)),
    "rough": lambda: MaternKernel(nu=0.5, active_dims=[1]),
    "sum": lambda: ScaleKernel(RBFKernel()) + MaternKernel(nu=1.5) + NNGPKernel(depth=1),
    "any other": lambda: RBFKernel() * PeriodicKernel() + PolynomialKernel(2),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "_CPU", (8, 16))


def inputs(n=41, m=33):
    g = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)  # noqa: E731
    return make(n, 3), make(m, 3), make(m, 2)


def values_of(kernel):
    return {
        name: (1.1 * hyper.value.double()).requires_grad_()
        for name, hyper in hyperparameters(kernel).items()
    }


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_equal_the_dense_matrix(name, symmetric):
    kernel = KERNELS[name]()
    x1, x2, v = inputs()
    found = []
    for route in ("dense", "product", "operator", "operator on two devices"):
        params = values_of(kernel)
        a, b, right = (t.clone().requires_grad_() for t in ((x2 if symmetric else x1), x2, v))
        other = None if symmetric else b
        if route == "dense":
            out = evaluate(kernel, a, other, params=params) @ right
        elif route == "product":
            # blocks of two rows
            out = product(kernel, a, other, right, params=params, block_bytes=2 * 33 * 8)
        else:
            devices = ("cpu", "cpu") if "two" in route else ()
            out = partitioned(kernel, a, other, params=params, devices=devices) @ right
        leaves = [a, right, *params.values()] + ([] if symmetric else [b])
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for results in found[1:]:
        for got, want in zip(results, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_operator_behaves_like_its_matrix():
    kernel = KERNELS["scaled Matern"]()
    x1, x2, v = inputs()
    K, dense = partitioned(kernel, x1, x2), evaluate(kernel, x1, x2)
    torch.testing.assert_close(K.to_dense(), dense)
    torch.testing.assert_close(K.mT @ v[:41].new_ones(41, 2), dense.mT @ v.new_ones(41, 2))
    torch.testing.assert_close(K[3:9, 2:5].to_dense(), dense[3:9, 2:5])
    torch.testing.assert_close(K[torch.tensor([1, 5]), torch.tensor([2, 0])], dense[[1, 5], [2, 0]])
    batch = torch.stack([v, 2 * v])
    torch.testing.assert_close(K @ batch, dense @ batch, rtol=1e-10, atol=1e-10)
    square = partitioned(kernel, x1)
    torch.testing.assert_close(square.diagonal(), evaluate(kernel, x1, diag=True))
    factor = square.pivoted_cholesky(rank=41)
    torch.testing.assert_close(factor @ factor.mT, square.to_dense(), rtol=1e-8, atol=1e-8)


def test_gpytorch_solves_with_the_operator():
    x1, _, _ = inputs(n=60)
    y = x1[:, :1].sin()
    kernel = KERNELS["nngp"]()
    with gpytorch.settings.max_cholesky_size(1), gpytorch.settings.cg_tolerance(1e-4):
        found = partitioned(kernel, x1).add_jitter(0.3).solve(y)
    A = evaluate(kernel, x1) + 0.3 * torch.eye(60, dtype=F64)
    torch.testing.assert_close(found, torch.linalg.solve(A, y), rtol=0, atol=1e-3)


def test_bad_input():
    x1, x2, v = inputs()
    kernel = KERNELS["scaled Matern"]()
    with pytest.raises(ShapeError, match=r"expected x1 \[n, d\], x2 \[m, d\] and vectors \[m, r\]"):
        product(kernel, x1, x2, v[:3])
    with pytest.raises(ShapeError, match="expected one kernel, got a batch"):
        product(NNGPKernel(batch_shape=(2,)), x1, x2, v)
    with pytest.raises(DataError, match="unknown hyper-parameter 'width': expected one of"):
        partitioned(kernel, x1, params={"width": torch.ones(())})
    with pytest.raises(ShapeError, match=r"partitioned: expected x \[n, d\], got \[3\]"):
        partitioned(kernel, x1[0])
    with pytest.raises(CapabilityError, match="expected arch 'mlp' or 'resnet', got 'conv'"):
        image = NNGPKernel(depth=1, arch="conv", image_shape=(1, 1, 3))
        image.product(x1, None, x1)

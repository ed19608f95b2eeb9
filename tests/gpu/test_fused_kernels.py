"""The fused kernels on a real device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from probkit.errors import DataError
from probkit.extras import available
from probkit.kernels import NNGPKernel, backend, partitioned
from probkit.kernels.backends import torch_tiled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not available("cupy"), reason="no CUDA device, or no CuPy"
    ),
]
F64 = torch.float64


def problem(dtype=F64, n=700, m=450, d=19):
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(k, d, generator=g, dtype=F64) for k in (n, m)]
    v = torch.randn(m, 20, generator=g, dtype=F64)
    w, b = torch.linspace(1.2, 2.1, 4, dtype=F64), torch.linspace(0.3, 0.0, 4, dtype=F64)
    return [t.to("cuda", dtype) for t in (*parts, v, w, b)]


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("which", ["nngp", "ntk"])
def test_networks(dtype, activation, residual, which):
    x1, x2, v, w, b = problem(dtype)
    fused = backend("cupy", "cuda")
    options = {"activation": activation, "residual": residual}
    tol = {"rtol": 1e-9, "atol": 1e-9} if dtype == F64 else {"rtol": 1e-3, "atol": 1e-3}
    want = getattr(torch_tiled, which)(x1, x2, w, b, **options)
    torch.testing.assert_close(getattr(fused, which)(x1, x2, w, b, **options), want, **tol)
    square = getattr(fused, which)(x2, None, w, b, **options)
    assert torch.equal(square, square.T)
    product = getattr(fused, f"{which}_product")(x1, x2, v, w, b, **options)
    torch.testing.assert_close(product, want @ v, **tol)


@pytest.mark.parametrize("family", ["rbf", "matern12", "matern32", "matern52"])
def test_stationary_and_gradients(family):
    x1, x2, v, *_ = problem(d=3)
    found = []
    for functions in (backend("cupy", "cuda"), torch_tiled):
        leaves = [t.clone().requires_grad_() for t in (x1, x2, v)]
        one, two, right = leaves
        scale = torch.ones(1, dtype=F64, device="cuda")
        K = functions.stationary(one, two, scale, family=family)
        out = functions.stationary_product(one, two, right, scale, family=family)
        (K.square().sum() + out.square().sum()).backward()
        found.append([K, out, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-8)


def test_backward_kernel():
    x1, x2, _, w, b = problem()
    found = []
    for functions in (backend("cupy", "cuda"), torch_tiled):
        leaves = [t.clone().requires_grad_() for t in (x1, x2, w, b)]
        functions.nngp(*leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gram", ["cupy-bf16x3", "cupy-bf16x6"])
def test_split_gram(gram):
    x1, x2, _, w, b = problem(torch.float32, d=256)
    want = torch_tiled.nngp(x1.double(), x2.double(), w.double(), b.double())
    got = backend(gram, "cuda").nngp(x1, x2, w, b).double()
    assert float((got - want).abs().max() / want.abs().max()) < 1e-4


def test_another_stream_than_the_default():
    x1, x2, _, w, b = problem(n=3000, m=3000)
    want = torch_tiled.nngp(x1, x2, w, b)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x1 = (x1 * 2) / 2  # work that the kernel must wait for
        got = backend("cupy", "cuda").nngp(x1, x2, w, b)
        total = got.sum()  # and work that must wait for the kernel
    stream.synchronize()
    torch.testing.assert_close(total, want.sum(), rtol=1e-10, atol=0)


def test_strided_inputs_and_the_chosen_backend():
    x1, x2, _, w, b = problem()
    want = torch_tiled.nngp(x1[::2], x2.T.contiguous().T, w, b)
    got = backend(None, "cuda").nngp(x1[::2], x2.T.contiguous().T, w, b)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert type(backend(None, "cuda")).__name__ == "Fused"


def test_matrix_free_operator_and_devices():
    x1, _, _, _, _ = problem()
    kernel = NNGPKernel(depth=2)
    v = x1[:, :3]
    want = kernel(x1).to_dense() @ v
    devices = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
    got = partitioned(kernel, x1, devices=devices) @ v
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_data_on_the_cpu_is_refused():
    with pytest.raises(DataError, match="expected data on a CUDA device, got cpu"):
        backend("cupy", "cpu")

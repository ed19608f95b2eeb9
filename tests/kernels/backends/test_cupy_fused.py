"""The fused CUDA kernels, run on the host: the same numbers as tiled PyTorch."""

from __future__ import annotations

import pytest
import torch

from probkit.errors import DataError, MissingExtraError
from probkit.extras import available
from probkit.kernels.backends import backend, cupy_fused, torch_tiled
from probkit.kernels.backends.cupy_fused import Fused, check_tensors
from probkit.kernels.backends.launcher import check_major
from probkit.kernels.backends.split_gram import BOUNDS, split_gram
from tests.kernels.backends import cuda_host

F64 = torch.float64
needs_compiler = pytest.mark.skipif(cuda_host.COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return Fused(launch=cuda_host.HostLauncher(tmp_path_factory.mktemp("kernels")))


def problem(n=70, m=131, d=19, r=18, steps=4, dtype=F64):
    """More than one tile each way, features beyond one chunk, vectors beyond one pass."""
    g = torch.Generator().manual_seed(n + m)
    x1 = torch.randn(n, d, generator=g, dtype=F64).to(dtype)
    x2 = torch.randn(m, d, generator=g, dtype=F64).to(dtype)
    v = torch.randn(m, r, generator=g, dtype=F64).to(dtype)
    w = torch.linspace(1.2, 2.1, steps, dtype=F64).to(dtype)
    b = torch.linspace(0.3, 0.0, steps, dtype=F64).to(dtype)
    return x1, x2, v, w, b


NETWORKS = [
    ("nngp", "relu", False, F64),
    ("nngp", "erf", True, F64),
    ("ntk", "relu", True, F64),
    ("ntk", "erf", False, torch.float32),
]


@needs_compiler
@pytest.mark.parametrize(("which", "activation", "residual", "dtype"), NETWORKS)
def test_networks(fused, which, activation, residual, dtype):
    x1, x2, v, w, b = problem(dtype=dtype)
    options = {"activation": activation, "residual": residual}
    # the tangent kernel's slope near close rows is a root: half the digits of the tile's rounding
    tol = {"rtol": 1e-10, "atol": 1e-10} if dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}
    ours, reference = getattr(fused, which), getattr(torch_tiled, which)
    want = reference(x1, x2, w, b, **options)
    torch.testing.assert_close(ours(x1, x2, w, b, **options), want, **tol)
    square = ours(x2, None, w, b, **options)
    torch.testing.assert_close(square, reference(x2, None, w, b, **options), **tol)
    assert torch.equal(square, square.T)
    assert torch.equal(square.diagonal(), reference(x2, None, w, b, diag=True, **options))
    product = getattr(fused, f"{which}_product")
    torch.testing.assert_close(product(x1, x2, v, w, b, **options), want @ v, **tol)
    torch.testing.assert_close(product(x2, None, v, w, b, **options), square @ v, **tol)


@needs_compiler
@pytest.mark.parametrize(("activation", "residual"), [("relu", True), ("erf", False)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_backward_kernel(fused, activation, residual, symmetric):
    x1, x2, v, w, b = problem(n=67, m=66, d=3, r=1)
    options = {"activation": activation, "residual": residual}
    found = []
    for functions in (fused, torch_tiled):
        leaves = [t.clone().requires_grad_() for t in (x1, x2, w, b)]
        one, two, weight, bias = leaves
        K = functions.nngp(one, None if symmetric else two, weight, bias, **options)
        (K * torch.linspace(-1, 2, K.numel(), dtype=F64).view_as(K)).sum().backward()
        found.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert len(found[0]) == (3 if symmetric else 4)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@needs_compiler
def test_strided_tensors(fused):
    x1, x2, v, w, b = problem(n=80, m=70, d=4)
    found = fused.nngp_product(x1[::2], x2.T.contiguous().T, v.T.contiguous().T, w, b)
    want = torch_tiled.nngp(x1[::2], x2, w, b) @ v
    torch.testing.assert_close(found, want, rtol=1e-11, atol=1e-11)


@needs_compiler
@pytest.mark.parametrize("family", ["rbf", "matern12", "matern32", "matern52"])
def test_stationary(fused, family):
    x1, x2, v, *_ = problem(n=66, m=65, d=2, r=3)
    lengthscale = torch.tensor([0.7, 1.9], dtype=F64)
    found = []
    for functions in (fused, torch_tiled):
        leaves = [t.clone().requires_grad_() for t in (x1, x2, lengthscale, v)]
        one, two, scale, vectors = leaves
        K = functions.stationary(one, two, scale, family=family)
        square = functions.stationary(one, None, scale, family=family)
        product = functions.stationary_product(one, two, vectors, scale, family=family)
        (K.square().sum() + (square[0] * square[1]).sum() + product.sin().sum()).backward()
        found.append([K, square, product, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@needs_compiler
@pytest.mark.parametrize("gram", ["bf16x3", "bf16x6"])
def test_split_gram_keeps_its_bound(fused, gram):
    x1, x2, _, w, b = problem(n=65, m=40, d=64, dtype=torch.float32)
    exact = x1.double() @ x2.double().T
    size = x1.double().abs() @ x2.double().abs().T
    error = ((split_gram(x1, x2, gram).double() - exact).abs() / size).max()
    # 64 float32 additions walk at most 64 units of rounding beyond the bound
    assert float(error) < BOUNDS[gram] + 64 * 2.0**-24
    if gram == "bf16x3":
        assert float(error) > 1e-6  # it is not computed in float32 after all
    split = Fused(gram, launch=fused.launch)
    want = torch_tiled.nngp(x1.double(), x2.double(), w.double(), b.double())
    got = split.nngp(x1, x2, w, b).double()
    # weight variances of about 2, times 1/2 for each slope: the layers pass the error on
    bound = (BOUNDS[gram] * size / 64 * w[0] * 1.5).max() + 1e-5
    assert float((got - want).abs().max()) < float(bound)


def test_tanh_and_convolutions_go_to_torch(fused):
    x1, x2, v, w, b = problem(n=9, m=8)
    v = v[:8]
    want = torch_tiled.nngp(x1, x2, w, b, activation="tanh")
    assert torch.equal(fused.nngp(x1, x2, w, b, activation="tanh"), want)
    product = fused.nngp_product(x1, x2, v, w, b, activation="tanh")
    torch.testing.assert_close(product, want @ v, rtol=1e-12, atol=1e-12)
    assert fused.conv_nngp is torch_tiled.conv_nngp


def test_tensors_that_do_not_go_together():
    x = torch.zeros(3, 2)
    with pytest.raises(DataError, match="expected all tensors on one device, got cpu, meta"):
        check_tensors(x, x.to("meta"))
    with pytest.raises(DataError, match=r"float32 or float64 throughout, got torch.float16"):
        check_tensors(x.half())
    with pytest.raises(DataError, match=r"got torch.float32, torch.float64; use .float\(\) or"):
        Fused(launch=lambda *_: None).nngp(x, x.double(), x[0], x[0])
    with pytest.raises(DataError, match="gram: expected one of 'exact', 'bf16x3', 'bf16x6'"):
        Fused("tf32")
    with pytest.raises(DataError, match="split_gram: expected float32 rows, got torch.float64"):
        split_gram(x.double(), x.double(), "bf16x3")


def test_cuda_versions_must_match():
    check_major("13.0", 13)
    text = r"expected CuPy for CUDA 12, .* got one for CUDA 13; pip install 'probkit\[cuda12\]'"
    with pytest.raises(DataError, match=text):
        check_major("12.8", 13)
    with pytest.raises(DataError, match="expected a PyTorch with CUDA, got one without"):
        check_major(None, 13)


def test_without_cupy_or_a_gpu():
    x = torch.zeros(2, 2)
    if available("cupy"):
        with pytest.raises(DataError, match="expected data on a CUDA device, got cpu"):
            Fused().nngp(x, None, x[0], x[0])
    else:
        with pytest.raises(MissingExtraError, match=r"probkit\[cuda12\].*probkit\[cuda13\]"):
            Fused().nngp(x, None, x[0], x[0])


@needs_compiler
def test_too_large_for_memory(fused, monkeypatch):
    monkeypatch.setattr("probkit.numerics._ALWAYS_FITS", 0)
    monkeypatch.setattr("probkit.numerics.available_memory", lambda device: 1000)
    x1, x2, _, w, b = problem(n=50, m=50)
    with pytest.raises(DataError, match=r"\[50, 50\] needs .* GiB on cpu.*partitioned kernel"):
        fused.nngp(x1, x2, w, b)


def test_the_sources_agree_on_sizes():
    text = cuda_host.source()
    assert "kTile = kSide * kMicro" in text and 16 * 4 == cupy_fused.TILE
    assert f"kBackwardSteps = {cupy_fused.MAX_STEPS};" in text
    assert f"kVectors = {cupy_fused._VECTORS};" in text


def test_data_that_is_not_on_a_gpu(monkeypatch):
    monkeypatch.setattr("probkit.kernels.backends.launcher.available", lambda module: True)
    text = "backend 'cupy': expected data on a CUDA device, got cpu; use 'torch'"
    with pytest.raises(DataError, match=text):
        backend("cupy", "cpu")
    x = torch.zeros(2, 2)
    with pytest.raises(DataError, match=text):
        Fused().nngp(x, None, x[0], x[0])

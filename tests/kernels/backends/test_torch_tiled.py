from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from probkit.errors import DataError
from probkit.kernels.backends import tiles, torch_tiled
from probkit.kernels.backends.torch_tiled import nngp, nngp_product, ntk, ntk_product

F64 = torch.float64
STDS = [(1.5, 0.3), (1.1, 0.5), (1.5, 0.0), (1.2, 0.2)]
FUNCTIONS = {"nngp": nngp, "ntk": ntk}


def variances_of(stds):
    return tuple(torch.tensor(column, dtype=F64) ** 2 for column in zip(*stds, strict=True))


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 3 x 5 for every matrix, however small."""
    monkeypatch.setattr(torch_tiled, "SMALL", 0)
    monkeypatch.setattr(tiles, "_CPU", (3, 5))
    monkeypatch.setattr(tiles, "_MAX_THREADS", 1)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
def test_matches_the_naive_recursion(
    activation, tangent, residual, tiled, naive_matrix, points, request
):
    if tiled:
        request.getfixturevalue("tiny_tiles")
    x1, x2 = points(11, 4), points(7, 4, seed=1)
    function = ntk if tangent else nngp
    w, b = variances_of(STDS)
    options = {"activation": activation, "residual": residual}
    cross = function(x1, x2, w, b, **options)
    same = function(x1, None, w, b, **options)
    torch.testing.assert_close(
        cross, naive_matrix(x1, x2, STDS, activation, tangent, residual), rtol=1e-13, atol=1e-13
    )
    expected = naive_matrix(x1, x1, STDS, activation, tangent, residual)
    # theta of coinciding rows is off by sqrt(1e-16) in the naive tangent kernel
    off = ~torch.eye(11, dtype=torch.bool)
    torch.testing.assert_close(same[off], expected[off], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        same.diagonal(), expected.diagonal(), rtol=1e-7 if tangent else 1e-13, atol=0
    )


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 13),
    m=st.integers(0, 13),
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    activation=st.sampled_from(["relu", "erf"]),
    tangent=st.booleans(),
    residual=st.booleans(),
)
def test_tiles_of_any_shape_agree_with_the_whole(
    n, m, rows, columns, activation, tangent, residual
):
    generator = torch.Generator().manual_seed(n * 100 + m)
    x1 = torch.randn(n, 3, dtype=F64, generator=generator)
    x2 = torch.randn(m, 3, dtype=F64, generator=generator)
    function = ntk if tangent else nngp
    w, b = variances_of(STDS)
    options = {"activation": activation, "residual": residual}
    whole = [function(x1, x, w, b, **options) for x in (None, x2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_tiled, "SMALL", -1)
        patch.setattr(tiles, "_CPU", (rows, columns))
        tiled = [function(x1, x, w, b, **options) for x in (None, x2)]
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_real_tiles_agree_with_the_whole(function, activation, points, monkeypatch):
    x1, x2 = points(301, 3), points(700, 3, seed=1)
    w, b = variances_of(STDS)
    tiled = [function(x1, x, w, b, activation=activation) for x in (None, x2)]
    monkeypatch.setattr(torch_tiled, "SMALL", 10**9)
    whole = [function(x1, x, w, b, activation=activation) for x in (None, x2)]
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("tiled", [False, True])
def test_symmetric_exactly_and_diagonal_exactly(function, activation, tiled, points, request):
    if tiled:
        request.getfixturevalue("tiny_tiles")
    x = points(13, 2)
    w, b = variances_of(STDS)
    K = function(x, None, w, b, activation=activation)
    diagonal = function(x, None, w, b, activation=activation, diag=True)
    assert torch.equal(K, K.mT)
    assert torch.equal(K.diagonal(), diagonal)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("residual", [False, True])
def test_pairs_are_the_diagonal_of_the_matrix(function, activation, residual, points):
    x1, x2 = points(2, 6, 3), points(6, 3, seed=1)
    w, b = variances_of(STDS)
    options = {"activation": activation, "residual": residual}
    pairs = function(x1, x2, w, b, diag=True, **options)
    matrix = function(x1, x2, w, b, **options)
    torch.testing.assert_close(pairs, matrix.diagonal(dim1=-2, dim2=-1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("tiled", [False, True])
def test_batch_equals_loop(function, tiled, points, request):
    if tiled:
        request.getfixturevalue("tiny_tiles")
    x1, x2 = points(2, 1, 8, 3), points(3, 6, 3, seed=1)
    w, b = points(2, 1, 4, seed=2).square(), points(3, 4, seed=3).square()
    cross, same = function(x1, x2, w, b), function(x1, None, w, b)
    diagonal = function(x1, None, w, b, diag=True)
    assert cross.shape == (2, 3, 8, 6)
    assert same.shape == (2, 3, 8, 8)
    assert diagonal.shape == (2, 3, 8)
    for i in range(2):
        for j in range(3):
            one = (w[i, 0], b[j])
            torch.testing.assert_close(
                cross[i, j], function(x1[i, 0], x2[j], *one), rtol=1e-13, atol=1e-13
            )
            torch.testing.assert_close(
                same[i, j], function(x1[i, 0], None, *one), rtol=1e-13, atol=1e-13
            )
            torch.testing.assert_close(
                diagonal[i, j], function(x1[i, 0], None, *one, diag=True), rtol=1e-13, atol=0
            )


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("tiled", [False, True])
def test_gradients_and_second_gradients(function, activation, residual, tiled, points, request):
    if tiled:
        request.getfixturevalue("tiny_tiles")
    x1 = points(2, 4, 2).requires_grad_()
    x2 = points(6, 2, seed=1).requires_grad_()
    w = points(2, 3, seed=2).square().add(0.3).requires_grad_()
    b = points(3, seed=3).square().add(0.1).requires_grad_()

    options = {"activation": activation, "residual": residual}

    def cross(x1, x2, w, b):
        return function(x1, x2, w, b, **options)

    def same(x1, w, b):
        return function(x1, None, w, b, **options)

    def pairs(x1, x2, w, b):
        return function(x1, x2[:4], w, b, diag=True, **options)

    with torch.random.fork_rng(devices=[]):  # the checks draw from the global stream
        for matrix, inputs in (
            (cross, (x1, x2, w, b)),
            (same, (x1, w, b)),
            (pairs, (x1, x2, w, b)),
        ):
            assert gradcheck(matrix, inputs, rtol=1e-6, atol=1e-7, fast_mode=residual or tiled)
        assert gradgradcheck(cross, (x1, x2, w, b), fast_mode=True)
        assert gradgradcheck(same, (x1, w, b), fast_mode=True)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_tiled_gradients_agree_with_autograd_of_the_whole(
    function, activation, points, monkeypatch
):
    w, b = (v.requires_grad_() for v in variances_of(STDS))
    x1, x2 = points(150, 3).requires_grad_(), points(600, 3, seed=1).requires_grad_()
    weights, square = points(150, 600, seed=2), points(150, 150, seed=3)

    def gradients(create_graph=False):
        cross = (function(x1, x2, w, b, activation=activation) * weights).sum()
        same = (function(x1, None, w, b, activation=activation) * square).sum()
        return torch.autograd.grad(
            cross, (x1, x2, w, b), create_graph=create_graph
        ) + torch.autograd.grad(same, (x1, w, b), create_graph=create_graph)

    tiled = gradients()
    # the way to second derivatives gives the same first ones (gradgradcheck does not look at them)
    for one, other in zip(tiled, gradients(create_graph=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)
    monkeypatch.setattr(torch_tiled, "SMALL", 10**9)
    for one, other in zip(tiled, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("tiled", [False, True])
def test_finite_with_repeated_opposite_and_zero_rows(function, activation, tiled, points, request):
    if tiled:
        request.getfixturevalue("tiny_tiles")
    x = points(6, 3)
    x[1] = x[0]  # repeated
    x[2] = -x[0]  # opposite
    x[3] = x[0] * (1 + 1e-15)
    x[4] = 0.0
    x[5] = 1e9 * x[0]
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    w = torch.tensor([2.0, 1.5, 1.0], dtype=F64, requires_grad=True)
    b = torch.zeros(3, dtype=F64, requires_grad=True)
    for other in (None, x2):
        K = function(x1, other, w, b, activation=activation)
        assert K.isfinite().all()
        assert K[4].eq(0).all() and K[:, 4].eq(0).all()
        inputs = [t for t in (x1, other, w, b) if t is not None]
        first = torch.autograd.grad(K.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), inputs, allow_unused=True)
        assert all(g.isfinite().all() for g in first)
        assert all(g.isfinite().all() for g in second if g is not None)
    for other in (None, x2):
        diagonal = function(x1, other, w, b, activation=activation, diag=True)
        (gradient,) = torch.autograd.grad(diagonal.sum(), x1)
        assert gradient.isfinite().all()


def test_gradient_with_repeated_rows_is_the_central_difference(points):
    x = points(5, 3)
    x[3] = x[1]
    w = torch.tensor([2.0, 1.5, 1.0], dtype=F64, requires_grad=True)
    b = torch.tensor([0.2, 0.1, 0.3], dtype=F64, requires_grad=True)
    with torch.random.fork_rng(devices=[]):
        assert gradcheck(lambda w, b: nngp(x, None, w, b), (w, b), rtol=1e-6, atol=1e-7)
        assert gradcheck(lambda w, b: nngp(x, x.clone(), w, b), (w, b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_float32_is_close_to_float64(activation, points):
    x = points(300, 5)
    w, b = variances_of(STDS)
    for function in (nngp, ntk):
        double = function(x, None, w, b, activation=activation)
        single = function(x.float(), None, w.float(), b.float(), activation=activation)
        assert single.dtype == torch.float32
        # the tangent kernel of nearly equal rows has the slope of a square root
        tolerance = 5e-6 if function is nngp else 2e-3
        torch.testing.assert_close(single.double(), double, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_positive_semidefinite(function, activation, points):
    K = function(points(200, 3), None, *variances_of(STDS), activation=activation)
    values = torch.linalg.eigvalsh(K)
    assert values[0] > -1e-13 * values[-1]


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_tanh_in_tiles(tangent, residual, points, monkeypatch):
    x1, x2 = points(9, 3).requires_grad_(), points(6, 3, seed=1)
    w, b = (v[:3] for v in variances_of(STDS))
    function = ntk if tangent else nngp

    def results():
        K = [function(x1, x, w, b, activation="tanh", residual=residual) for x in (None, x2)]
        return *K, torch.autograd.grad(sum(k.square().sum() for k in K), x1)[0]

    whole = results()
    monkeypatch.setattr(torch_tiled, "SMALL", 0)
    monkeypatch.setattr(tiles, "_CPU", (4, 7))
    for one, other in zip(whole, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert torch.equal(whole[0], whole[0].mT)
    assert torch.linalg.eigvalsh(whole[0]).min() > 0
    diagonal = function(x1, None, w, b, activation="tanh", residual=residual, diag=True)
    assert torch.equal(whole[0].diagonal(), diagonal)


def test_residual_of_one_block_by_hand(points):
    """Two steps of the dense network, added."""
    x = points(4, 3)
    w, b = variances_of([(1.5, 0.3), (1.1, 0.5), (1.0, 0.0)])
    first, second = nngp(x, None, w[:1], b[:1]), nngp(x, None, w[:2], b[:2])
    K, k = first + second, (first + second).diagonal()
    c = K / (k[:, None] * k).sqrt()
    angle = torch.arccos(c.clamp(-1, 1))
    F = (k[:, None] * k).sqrt() * (angle.sin() + (torch.pi - angle) * c) / (2 * torch.pi)
    torch.testing.assert_close(nngp(x, None, w, b, residual=True), F)


def test_one_step_is_linear(points):
    x1, x2 = points(4, 3), points(5, 3, seed=1)
    w, b = torch.tensor([2.0], dtype=F64), torch.tensor([0.5], dtype=F64)
    torch.testing.assert_close(nngp(x1, x2, w, b), x1 @ x2.T * 2 / 3 + 0.5)
    torch.testing.assert_close(ntk(x1, x2, w, b), x1 @ x2.T * 2 / 3 + 0.5)


def test_deep_networks_stay_finite(points):
    """Critical ReLU initialisation, 200 layers: the rows' variances neither vanish nor explode."""
    w, b = torch.full((201,), 2.0, dtype=F64), torch.zeros(201, dtype=F64)
    x = points(5, 3)
    K = nngp(x, None, w, b)
    torch.testing.assert_close(K.diagonal(), 2 * (x * x).mean(-1), rtol=1e-12, atol=0)
    assert (K <= K.diagonal().outer(K.diagonal()).sqrt() * (1 + 1e-12)).all()


def test_bad_requests(points):
    one = torch.ones(2, dtype=F64)
    with pytest.raises(DataError, match=r"activation: expected one of .*'tanh', got 'gelu'"):
        nngp(points(3, 2), None, one, one, activation="gelu")
    huge = torch.zeros(1, 1, dtype=F64).expand(10**6, 1)
    with pytest.raises(DataError, match=r"kernel matrix \[1000000, 1000000\] needs"):
        nngp(huge, None, one, one)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("function", "product"), [(nngp, nngp_product), (ntk, ntk_product)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_equal_the_matrix(monkeypatch, activation, residual, function, product, symmetric):
    monkeypatch.setattr(tiles, "_CPU", (4, 7))
    g = torch.Generator().manual_seed(3)
    x1 = torch.randn(2, 19, 3, generator=g, dtype=F64)
    x2 = torch.randn(23, 3, generator=g, dtype=F64)
    w, b = variances_of(STDS)
    v = torch.randn(2, 19 if symmetric else 23, 2, generator=g, dtype=F64)
    options = {"activation": activation, "residual": residual}

    def gradients(whole):
        leaves = [t.clone().requires_grad_() for t in (x1, x2, v, w, b)]
        one, two, vectors, weight, bias = leaves
        other = None if symmetric else two
        if whole:
            out = function(one, other, weight, bias, **options) @ vectors
        else:
            out = product(one, other, vectors, weight, bias, **options)
        used = [leaf for leaf in leaves if not (symmetric and leaf is two)]
        return out, torch.autograd.grad(out.square().sum(), used)

    want, want_gradients = gradients(whole=True)
    got, got_gradients = gradients(whole=False)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    # the slope of the ReLU tangent kernel between close rows is a root: half the digits
    for one, other in zip(got_gradients, want_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)

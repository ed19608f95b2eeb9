from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from probkit.errors import DataError
from probkit.kernels.backends import conv_tiled
from probkit.kernels.backends.conv_tiled import conv_nngp, conv_ntk

F64 = torch.float64
STDS = [(1.5, 0.3), (1.1, 0.5), (1.2, 0.2)]
FUNCTIONS = {"nngp": conv_nngp, "ntk": conv_ntk}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
every_activation = pytest.mark.parametrize("activation", ["relu", "erf"])
every_pooling = pytest.mark.parametrize("pooling", ["flatten", "gap"])


def variances_of(stds=STDS):
    return tuple(torch.tensor(column, dtype=F64) ** 2 for column in zip(*stds, strict=True))


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of a few pairs of pixels, also where gradients are wanted."""
    monkeypatch.setattr(conv_tiled, "SMALL", 0)
    monkeypatch.setattr(conv_tiled, "_TILE_CPU", 40)
    monkeypatch.setattr(conv_tiled, "_MAX_THREADS", 1)


# ------------------------------------------------------------------------- values


@every_function
@every_activation
@every_pooling
@pytest.mark.parametrize("size", [(3, 2, 2), (2, 4, 1), (1, 3, 1), (4, 1, 3), (1, 1, 2)])
def test_matches_a_loop_over_pixels(function, activation, pooling, size, naive_conv_matrix, points):
    x1, x2 = points(3, *size), points(2, *size, seed=1)
    options = {"activation": activation, "pooling": pooling}
    tangent = function is conv_ntk
    cross = function(x1, x2, *variances_of(), **options)
    expected = naive_conv_matrix(x1, x2, STDS, pooling, activation, tangent)
    torch.testing.assert_close(cross, expected, rtol=1e-13, atol=1e-13)
    same = function(x1, None, *variances_of(), **options)
    expected = naive_conv_matrix(x1, x1, STDS, pooling, activation, tangent)
    # the naive tangent kernel of an image with itself has angles off by sqrt(1e-16)
    off = ~torch.eye(3, dtype=torch.bool)
    torch.testing.assert_close(same[off], expected[off], rtol=1e-13, atol=1e-13)
    tolerance = 1e-7 if tangent else 1e-13
    torch.testing.assert_close(same.diagonal(), expected.diagonal(), rtol=tolerance, atol=0)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 7),
    m=st.integers(0, 7),
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    tile=st.integers(1, 300),
    pooling=st.sampled_from(["flatten", "gap"]),
    tangent=st.booleans(),
)
def test_tiles_of_any_size_agree_with_the_whole(n, m, height, width, tile, pooling, tangent):
    generator = torch.Generator().manual_seed(n * 100 + m)
    shape = (height, width, 2)
    x1 = torch.randn(n, *shape, dtype=F64, generator=generator)
    x2 = torch.randn(m, *shape, dtype=F64, generator=generator)
    function = conv_ntk if tangent else conv_nngp
    w, b = variances_of()
    # small problems that want gradients are computed whole
    whole = [function(x1, x, w.requires_grad_(), b, pooling=pooling) for x in (None, x2)]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(conv_tiled, "_TILE_CPU", tile)
        tiled = [function(x1, x, w, b, pooling=pooling) for x in (None, x2)]
        pairs = function(x1, None, w, b, pooling=pooling, diag=True)
    for one, other in zip(whole, tiled, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-12, atol=1e-13)
    assert torch.equal(tiled[0], tiled[0].mT)
    torch.testing.assert_close(tiled[0].diagonal(), pairs, rtol=1e-14, atol=0)


@every_function
@every_activation
@every_pooling
def test_pairs_are_the_diagonal_of_the_matrix(function, activation, pooling, points):
    x1, x2 = points(2, 4, 3, 3, 1), points(4, 3, 3, 1, seed=1)
    options = {"activation": activation, "pooling": pooling}
    pairs = function(x1, x2, *variances_of(), diag=True, **options)
    matrix = function(x1, x2, *variances_of(), **options)
    torch.testing.assert_close(pairs, matrix.diagonal(dim1=-2, dim2=-1), rtol=1e-13, atol=1e-13)
    same = function(x1, None, *variances_of(), diag=True, **options)
    again = function(x1, x1.clone(), *variances_of(), diag=True, **options)
    # the angle of a pixel with itself is exact in the first one only
    torch.testing.assert_close(same, again, rtol=1e-7 if function is conv_ntk else 1e-13, atol=0)


@every_function
@every_pooling
@pytest.mark.parametrize("tiled", [False, True])
def test_batch_equals_loop(function, pooling, tiled, points, request):
    if tiled:
        request.getfixturevalue("tiny_tiles")
    x1, x2 = points(2, 1, 4, 3, 2, 1), points(3, 5, 3, 2, 1, seed=1)
    w, b = points(2, 1, 3, seed=2).square(), points(3, 3, seed=3).square()
    cross = function(x1, x2, w, b, pooling=pooling)
    same = function(x1, None, w, b, pooling=pooling)
    diagonal = function(x1, None, w, b, pooling=pooling, diag=True)
    assert cross.shape == (2, 3, 4, 5)
    assert same.shape == (2, 3, 4, 4)
    assert diagonal.shape == (2, 3, 4)
    close = {"rtol": 1e-13, "atol": 1e-13}
    for i in range(2):
        for j in range(3):
            one = (w[i, 0], b[j])
            alone = function(x1[i, 0], None, *one, pooling=pooling)
            torch.testing.assert_close(
                cross[i, j], function(x1[i, 0], x2[j], *one, pooling=pooling), **close
            )
            torch.testing.assert_close(same[i, j], alone, **close)
            torch.testing.assert_close(diagonal[i, j], alone.diagonal(), **close)


@every_function
@every_activation
@every_pooling
def test_positive_semidefinite(function, activation, pooling, points):
    K = function(points(40, 3, 3, 1), None, *variances_of(), activation=activation, pooling=pooling)
    values = torch.linalg.eigvalsh(K)
    assert values[0] > -1e-13 * values[-1]


@every_pooling
def test_an_image_of_one_pixel_is_a_dense_network(pooling, points):
    """The middle tap is all that sees the image: weight variances are nine times smaller."""
    from probkit.kernels.backends.torch_tiled import nngp, ntk

    x = points(5, 1, 1, 3)
    w, b = variances_of()
    dense = torch.tensor([1 / 9, 1 / 9, 1], dtype=F64) * w
    for conv, plain in ((conv_nngp, nngp), (conv_ntk, ntk)):
        torch.testing.assert_close(
            conv(x, None, w, b, pooling=pooling), plain(x[:, 0, 0], None, dense, b)
        )


def test_pooling_ignores_where_things_are_only_away_from_the_border(points):
    """A dot moved inside of the image: the same for average pooling, another one for flattening."""
    x = torch.zeros(2, 9, 9, 1, dtype=F64)
    x[0, 3, 3] = x[1, 5, 4] = 2.0
    w, b = variances_of()
    gap = conv_nngp(x, None, w, torch.zeros_like(b), pooling="gap")
    torch.testing.assert_close(gap[0, 1], gap[0, 0], rtol=1e-13, atol=0)
    flat = conv_nngp(x, None, w, torch.zeros_like(b), pooling="flatten")
    assert flat[0, 1] < 0.6 * flat[0, 0]


@every_pooling
def test_float32_is_close_to_float64(pooling, points):
    x = points(10, 4, 4, 2)
    w, b = variances_of()
    for function in FUNCTIONS.values():
        double = function(x, None, w, b, pooling=pooling)
        single = function(x.float(), None, w.float(), b.float(), pooling=pooling)
        assert single.dtype == torch.float32
        # the tangent kernel of nearly equal patches has the slope of a square root
        tolerance = 5e-6 if function is conv_nngp else 2e-3
        torch.testing.assert_close(single.double(), double, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------- gradients


@every_function
@every_activation
@every_pooling
@pytest.mark.parametrize("tiled", [False, True])
def test_gradients_and_second_gradients(function, activation, pooling, tiled, points, request):
    if tiled:
        request.getfixturevalue("tiny_tiles")
    x1 = points(2, 2, 2, 1).requires_grad_()
    x2 = points(3, 2, 2, 1, seed=1).requires_grad_()
    w = points(3, seed=2).square().add(0.3).requires_grad_()
    b = points(3, seed=3).square().add(0.1).requires_grad_()
    options = {"activation": activation, "pooling": pooling}

    def cross(x1, x2, w, b):
        return function(x1, x2, w, b, **options)

    def same(x1, w, b):
        return function(x1, None, w, b, **options)

    def pairs(x1, x2, w, b):
        return function(x1, x2[:2], w, b, diag=True, **options)

    def own(x1, w, b):
        return function(x1, None, w, b, diag=True, **options)

    with torch.random.fork_rng(devices=[]):  # the checks draw from the global stream
        assert gradcheck(cross, (x1, x2, w, b), rtol=1e-6, atol=1e-7, fast_mode=tiled)
        for other, inputs in ((same, (x1, w, b)), (pairs, (x1, x2, w, b)), (own, (x1, w, b))):
            assert gradcheck(other, inputs, rtol=1e-6, atol=1e-7, fast_mode=True)
        assert gradgradcheck(same, (x1, w, b), fast_mode=True)


@every_function
@every_pooling
@pytest.mark.parametrize("tiled", [False, True])
def test_finite_with_repeated_constant_and_zero_images(function, pooling, tiled, points, request):
    if tiled:
        request.getfixturevalue("tiny_tiles")
    x = points(5, 4, 3, 1)
    x[1] = x[0]  # repeated
    x[2] = -x[0]  # opposite
    x[3] = 0.7  # patches that repeat within the image
    x[4] = 0.0
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    w = torch.tensor([2.0, 1.5, 1.0], dtype=F64, requires_grad=True)
    b = torch.zeros(3, dtype=F64, requires_grad=True)
    for other in (None, x2):
        K = function(x1, other, w, b, pooling=pooling)
        assert K.isfinite().all()
        assert K[4].eq(0).all() and K[:, 4].eq(0).all()
        inputs = [t for t in (x1, other, w, b) if t is not None]
        first = torch.autograd.grad(K.sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.sum() for g in first), inputs, allow_unused=True)
        assert all(g.isfinite().all() for g in first)
        assert all(g.isfinite().all() for g in second if g is not None)
    (gradient,) = torch.autograd.grad(
        function(x1, None, w, b, pooling=pooling, diag=True).sum(), x1
    )
    assert gradient.isfinite().all()


def test_gradient_with_repeated_images_is_the_central_difference(points):
    x = points(4, 3, 3, 1)
    x[3] = x[1]
    w = torch.tensor([2.0, 1.5, 1.0], dtype=F64, requires_grad=True)
    b = torch.tensor([0.2, 0.1, 0.3], dtype=F64, requires_grad=True)
    with torch.random.fork_rng(devices=[]):
        for pooling in ("flatten", "gap"):
            for other in (None, x.clone()):
                assert gradcheck(
                    lambda w, b, other=other, pooling=pooling: conv_nngp(
                        x, other, w, b, pooling=pooling
                    ),
                    (w, b),
                    rtol=1e-6,
                    atol=1e-7,
                )


# ------------------------------------------------------------------------- bad input


def test_bad_requests(points):
    one = torch.ones(2, dtype=F64)
    x = points(2, 3, 3, 1)
    with pytest.raises(DataError, match=r"pooling: expected one of 'flatten', 'gap', got 'max'"):
        conv_nngp(x, None, one, one, pooling="max")
    with pytest.raises(DataError, match=r"activation: expected one of .*, got 'gelu'"):
        conv_ntk(x, None, one, one, activation="gelu")
    huge = torch.zeros(1, 1, 1, 1, dtype=F64)
    with pytest.raises(DataError, match=r"matrix \[1000000, 1000000\] of images \[1, 1, 1\] needs"):
        conv_nngp(huge.expand(10**6, 1, 1, 1), None, one, one)
    with pytest.raises(DataError, match=r"of images \[30000, 30000, 1\] needs .* GiB"):
        conv_nngp(huge.expand(1, 30000, 30000, 1), None, one, one, pooling="gap")


def test_second_derivatives_that_cannot_fit(monkeypatch, points):
    """What is kept for second derivatives is asked for before it is tried."""
    x = points(12, 8, 8, 1)
    w, b = (v.requires_grad_() for v in variances_of())
    K = conv_nngp(x, None, w, b, pooling="gap")
    monkeypatch.setattr("probkit.numerics.available_memory", lambda device: 2**20)
    with pytest.raises(DataError, match=r"second derivatives .* 589824 pairs of pixels needs"):
        torch.autograd.grad(K.sum(), w, create_graph=True)

"""The map of metrics to [0, 1]: known values, inverse, Jacobian, directions, bad bounds."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.models.pfn.normalizer import CurveNormalizer

INF = math.inf
KINDS = {
    "accuracy": CurveNormalizer.accuracy(),
    "error": CurveNormalizer.error(),
    "log loss": CurveNormalizer.log_loss(y0=math.log(10)),
    "loss above 1.7": CurveNormalizer.log_loss(y0=5.0, best=1.7),
    "logistic": CurveNormalizer(False, -INF, -1.0, 1.0, INF),
    "wide": CurveNormalizer(True, -3.0, -1.0, 2.0, 9.0),
}


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("normalizer", "y", "g"),
    [
        (CurveNormalizer(False, 0, 0, 1, 1), 0.25, 0.2350),
        (CurveNormalizer(True, 0, 0, math.log(10), INF), 0.0, 1.0),
        (CurveNormalizer(True, 0, 0, math.log(10), INF), math.log(10), 0.36788),
        (CurveNormalizer(False, 0, 0, 1, 1), 0.0, 0.0),
        (CurveNormalizer(False, 0, 0, 1, 1), 1.0, 1.0),
        (CurveNormalizer(True, 0, 0, 1, 1), 0.25, 1 - 0.2350),
    ],
)
def test_known_values(normalizer, y, g):
    assert float(normalizer.normalize(number(y))) == pytest.approx(g, abs=5e-5)


def test_without_hard_bounds_it_is_the_logistic_function():
    y = torch.linspace(-8, 8, 33, dtype=torch.float64)
    assert torch.allclose(KINDS["logistic"].normalize(y), torch.sigmoid(y), rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind):
    n = KINDS[kind]
    low = n.lower if math.isfinite(n.lower) else -6.0
    high = n.upper if math.isfinite(n.upper) else 8.0
    y = torch.linspace(low, high, 201, dtype=torch.float64)
    back = n.denormalize(n.normalize(y))
    assert float((back - y).abs().max()) < 1e-9
    g = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert float((n.normalize(n.denormalize(g)) - g).abs().max()) < 1e-12
    single = y.float()
    error = (n.denormalize(n.normalize(single)) - single).abs().max()
    assert float(error) < 1e-5 * (1 + high - low)


def test_large_losses_keep_their_order_in_double_precision():
    n = CurveNormalizer.log_loss(y0=2.3)
    y = torch.tensor([5.0, 10.0, 30.0, 50.0], dtype=torch.float64)
    g = n.normalize(y)
    assert bool((g > 0).all()) and bool((g.diff() < 0).all())
    assert torch.allclose(n.denormalize(g), y, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_jacobian_is_the_derivative(kind):
    n = KINDS[kind]
    y = torch.linspace(0.05, 0.95, 19, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(n.normalize(y).sum(), y)
    assert torch.allclose(n.log_jacobian(y), slope.abs().log(), atol=1e-10)
    assert bool((slope < 0).all()) == n.minimize


def test_bounds_of_each_curve():
    y0 = torch.tensor([2.3, 0.7], dtype=torch.float64)
    many = CurveNormalizer.log_loss(y0=y0)
    y = torch.tensor([[1.0, 0.5, 0.2], [0.6, 0.4, 0.1]], dtype=torch.float64)
    for k in range(2):
        one = CurveNormalizer.log_loss(y0=float(y0[k]))
        assert torch.allclose(many.normalize(y)[k], one.normalize(y[k]))
        assert torch.allclose(many.log_jacobian(y)[k], one.log_jacobian(y[k]))
        assert torch.allclose(many.select([k]).normalize(y[[k]])[0], one.normalize(y[k]))
    assert torch.allclose(many.denormalize(many.normalize(y)), y)
    assert many.curves == 2 and KINDS["error"].curves is None


def test_outside_names_the_side():
    y = torch.tensor([-0.1, 0.5, 1.1], dtype=torch.float64)
    assert KINDS["accuracy"].outside(y).tolist() == [-1, 0, 1]
    assert KINDS["log loss"].outside(y * 1000).tolist() == [-1, 0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CurveNormalizer(False, 0, 0, INF, INF), "expected finite soft bounds"),
        (lambda: CurveNormalizer(False, 0, 0.5, 0.5, 1), "expected soft_lower < soft_upper"),
        (lambda: CurveNormalizer(False, 0, 0.8, 0.5, 1), "expected soft_lower < soft_upper"),
        (lambda: CurveNormalizer(False, 0.1, 0, 1, 1), "soft bounds inside the hard ones"),
        (lambda: CurveNormalizer(False, 0, 0, 1.2, 1), "soft bounds inside the hard ones"),
        (lambda: CurveNormalizer(False, 0, 0, math.nan, 1), "expected a number for soft_upper"),
        (lambda: CurveNormalizer(False, None, 0, 1, 1), "expected a number for lower, got None"),
        (lambda: CurveNormalizer.log_loss(), "expected y0, the loss of the untrained network"),
        (lambda: CurveNormalizer.log_loss(0.0), "expected soft_lower < soft_upper"),
        (lambda: CurveNormalizer.log_loss(torch.tensor([1.0, math.nan])), "soft_upper is NaN"),
    ],
)
def test_bad_bounds(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_bad_shapes():
    with pytest.raises(ShapeError, match=r"expected lower as a number or \[curve\]"):
        CurveNormalizer(False, torch.zeros(2, 2), 0, 1, 1)
    with pytest.raises(ShapeError, match=r"bounds \[curve\] of one length, got \[2, 3\]"):
        CurveNormalizer(False, torch.zeros(2), torch.zeros(3), 1, 1)

"""Infinitely wide networks: published numbers, BoTorch's kernel, and random wide networks."""

from __future__ import annotations

import math

import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.kernels import InfiniteWidthBNNKernel

import probkit as pk
from probkit.bo.surrogates import IBNNSurrogate, make_surrogate

PAIR = torch.tensor([(0.2, 0.7), (0.9, 0.1)], dtype=torch.float64)


def _fix(kernel):
    """Set the published variances, in double precision."""
    kernel.weight_var = torch.tensor(10.0, dtype=torch.float64)
    kernel.bias_var = torch.tensor(1.3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("activation", "bias_var", "covariance", "variance"),
    [
        ("relu", 1.3, 475.7371005702512, 534.05),
        ("relu", 1.6, 519.798494541, 580.85),
        ("erf", 1.3, 4.57026286576, None),
    ],
)
def test_published_numbers(activation, bias_var, covariance, variance):
    K = IBNNSurrogate(activation=activation, bias_var=bias_var).kernel()(PAIR).to_dense()
    assert float(K[0, 1]) == pytest.approx(covariance, rel=1e-11)
    if variance is not None:
        assert float(K[0, 0]) == pytest.approx(variance, rel=1e-12)


def test_the_kernel_is_that_of_botorch():
    theirs = InfiniteWidthBNNKernel(depth=3).double()
    _fix(theirs)
    # Theirs keeps angles a little above zero, which moves the diagonal by a ten-millionth.
    ours = IBNNSurrogate().kernel()(PAIR).to_dense().detach()
    reference = theirs(PAIR).to_dense().detach()
    assert float(ours[0, 1]) == pytest.approx(float(reference[0, 1]), rel=1e-11)
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_wide_random_networks_have_this_covariance(activation):
    """Twenty thousand outputs of width 512: the Monte Carlo error is about one per cent."""
    generator = torch.Generator().manual_seed(0)
    function = torch.relu if activation == "relu" else torch.erf
    width, networks = 512, 40
    products = []
    for _ in range(networks):
        h, fan_in = PAIR, 2
        for _ in range(3):
            weight = math.sqrt(10 / fan_in) * torch.randn(fan_in, width, generator=generator)
            bias = math.sqrt(1.3) * torch.randn(width, generator=generator)
            h, fan_in = function(h @ weight.double() + bias.double()), width
        out = math.sqrt(10 / width) * torch.randn(width, 500, generator=generator).double()
        out = h @ out + math.sqrt(1.3) * torch.randn(500, generator=generator).double()
        products.append((out[0] * out[1]).mean())
    expected = float(IBNNSurrogate(activation=activation).kernel()(PAIR).to_dense()[0, 1])
    assert float(torch.stack(products).mean()) == pytest.approx(expected, rel=0.05)


def test_predictions_are_those_of_a_process_with_that_kernel():
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(12, 4, generator=generator).double()
    y = x.sum(1, keepdim=True).sin()
    model = make_surrogate("ibnn", x, y, rng=0)
    kernel = InfiniteWidthBNNKernel(depth=3).double()
    _fix(kernel)
    reference = SingleTaskGP(x, y, covar_module=kernel)
    reference.mean_module.constant.data.copy_(model.mean_module.constant)
    reference.likelihood.noise = model.likelihood.noise.detach()
    at = torch.rand(5, 4, generator=generator).double()
    ours, theirs = model.posterior(at), reference.posterior(at)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-2, atol=1e-6)


def test_only_mean_and_noise_are_fitted_unless_asked():
    x = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
    y = (6 * x).sin()
    fixed = make_surrogate("ibnn", x, y, rng=0)
    assert {name for name, _ in fixed.named_parameters()} == {
        "likelihood.noise_covar.raw_noise",
        "mean_module.raw_constant",
    }
    learned = make_surrogate("ibnn", x, y, options={"learn": True}, rng=0)
    assert abs(float(learned.covar_module.w_std.mean()) - math.sqrt(10)) > 1e-3


def test_bad_options_are_named():
    with pytest.raises(pk.DataError, match="weight_var: expected a finite number > 0, got -1"):
        IBNNSurrogate(weight_var=-1)
    with pytest.raises(pk.DataError, match="noise: expected 'learned' or 'none', got 'some'"):
        IBNNSurrogate(noise="some")
    with pytest.raises(pk.DataError, match="activation"):
        IBNNSurrogate(activation="gelu")

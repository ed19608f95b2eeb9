"""Deep kernel machines: their NNGP limit, their gradients, and what learning brings."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.kernels import NNGPKernel
from probkit.models import PointMass, ScaleMixtureNNGP
from probkit.models.deep_kernel_machine import DeepKernelMachine, gram_divergence
from probkit.testing import ModelConformance

X = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)[:, None]
X = torch.cat([X, (2 * X).cos()], 1)
Y = (3 * X[:, 0]).sin() + 0.2 * X[:, 1]
NEW = X[:4] + 0.13


def _kernel(depth=2, activation="relu"):
    return NNGPKernel(depth, activation, w_std=1.4, b_std=0.4, last_w_std=1.1, last_b_std=0.2)


class TestModel(ModelConformance):
    latents = ("f",)

    def problem(self):
        return DeepKernelMachine(_kernel(), steps=15), (X, Y), NEW


class TestSeveralOutputs(ModelConformance):
    latents = ("f",)

    def problem(self):
        model = DeepKernelMachine(_kernel(1, "erf"), nu=3.0, steps=15)
        return model, (X, torch.stack([Y, Y.flip(0)], 1)), NEW


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_an_infinite_price_is_the_nngp(depth, activation):
    kernel = _kernel(depth, activation)
    post = pk.infer(DeepKernelMachine(kernel, nu=math.inf), (X, Y), rng=0)
    there = pk.infer(ScaleMixtureNNGP(kernel, PointMass(1.0), 0.1), (X, Y), rng=0)
    # the jitter of the layers is 1e-8 of their diagonals
    torch.testing.assert_close(
        post.log_evidence.value, there.log_evidence.value, rtol=1e-6, atol=1e-6
    )
    for site in (None, "f"):
        a, b = post.predict(NEW, site=site), there.predict(NEW, site=site)
        torch.testing.assert_close(a.mean, b.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.variance, b.variance, rtol=1e-5, atol=1e-5)


def test_a_high_price_comes_close_to_the_nngp():
    """The gain over the NNGP falls as 1 / nu: the objective is quadratic near its start."""
    start = float(
        pk.infer(DeepKernelMachine(_kernel(), math.inf), (X, Y), rng=0).log_evidence.value
    )
    gains = []
    for nu in (1e3, 1e4):
        model = DeepKernelMachine(_kernel(), nu, steps=300)
        gains.append(float(pk.infer(model, (X, Y), rng=0).log_evidence.value) - start)
    assert gains[0] > gains[1] > 0
    assert gains[0] / gains[1] == pytest.approx(10, rel=0.1)


def _factors(depth, seed=0, amount=0.2):
    generator = torch.Generator().manual_seed(seed)
    raw = amount * torch.randn(depth, 9, 9, generator=generator, dtype=torch.float64)
    return [torch.tril(r, -1) + torch.diag(r.diagonal().exp()) for r in raw]


def test_the_objective_is_the_formula():
    model = DeepKernelMachine(_kernel(), nu=(0.7, 2.5))
    factors = _factors(2)
    first, second = model.grams(factors, X)
    tiny = 1e-8 * torch.eye(9, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    before = X @ X.T / 2
    for k, (nu, gram) in enumerate(zip((0.7, 2.5), (first, second), strict=True)):
        prior = model.square(k, before)
        prior = prior + tiny * prior.diagonal().mean()
        zero = torch.zeros(9, dtype=torch.float64)
        solved = torch.linalg.solve(prior, gram)
        price = 0.5 * (solved.trace() - torch.linalg.slogdet(solved).logabsdet - 9)
        torch.testing.assert_close(gram_divergence(factors[k]), price, rtol=1e-4, atol=1e-4)
        if k:
            law = kl_divergence(MultivariateNormal(zero, gram), MultivariateNormal(zero, prior))
            torch.testing.assert_close(price, law, rtol=1e-4, atol=1e-4)
        total = total - nu * gram_divergence(factors[k])
        before = gram
    last = model.square(2, second) + 0.1 * torch.eye(9, dtype=torch.float64)
    law = MultivariateNormal(torch.zeros(9, dtype=torch.float64), last)
    torch.testing.assert_close(model.objective(factors, (X, Y)), total + law.log_prob(Y))


def test_gradients_are_those_of_differences():
    model = DeepKernelMachine(_kernel(2, "erf"), nu=0.5)
    raw = 0.2 * torch.randn(
        2, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    def value(r):
        return model.objective(model._factors(r, [0, 1], 9), (X, Y))

    point = raw.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(point), point)
    for entry in ((0, 0, 0), (0, 8, 3), (1, 4, 4), (1, 7, 0), (0, 2, 1)):
        step = torch.zeros_like(raw)
        step[entry] = 1e-5
        rise = (value(raw + step) - value(raw - step)) / 2e-5
        assert float(gradient[entry]) == pytest.approx(float(rise), rel=1e-4, abs=1e-6)
    assert float(gradient[0, 0, 3]) == 0.0  # above the diagonal


def test_learning_improves_on_the_nngp():
    """The evidence rises by more than the price, and the fit of the targets with it."""
    nngp = pk.infer(DeepKernelMachine(_kernel(), math.inf), (X, Y), rng=0)
    model = DeepKernelMachine(_kernel(), nu=0.5)
    post = pk.infer(model, (X, Y), rng=0)
    assert float(post.log_evidence.value) > float(nngp.log_evidence.value) + 1
    factors = post.source.state["factors"]
    paid = sum(0.5 * float(gram_divergence(factor)) for factor in factors)
    assert paid > 0.05
    assert float(post.log_evidence.value) + paid > float(nngp.log_evidence.value) + 1
    # the top of the objective: no small step climbs further
    best = float(post.log_evidence.value)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        noise = 0.01 * torch.randn(2, 9, 9, generator=generator, dtype=torch.float64)
        moved = [f + torch.tril(e) for f, e in zip(factors, noise, strict=True)]
        assert float(model.objective(moved, (X, Y))) < best + 1e-6


def test_training_rows_are_predicted_from_their_learned_gram():
    """At a training row the conditional is exact: its Gram entries come back."""
    post = pk.infer(DeepKernelMachine(_kernel(2, "erf"), nu=0.5, steps=40), (X, Y), rng=0)
    model = post.model
    gram = model.square(2, model.grams(post.source.state["factors"], X)[-1])
    weights = torch.linalg.solve(gram + 0.1 * torch.eye(9, dtype=torch.float64), gram)
    law = post.predict(X, site="f")
    torch.testing.assert_close(law.mean, weights.mT @ Y, rtol=1e-4, atol=1e-4)
    wanted = (gram - gram @ weights).diagonal()
    torch.testing.assert_close(law.variance, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"nu": 0.0}, "nu: expected a number > 0, or one for each of 2 layers, got 0.0"),
        ({"nu": (1.0,)}, "nu: expected a number > 0, or one for each of 2 layers"),
        ({"noise_var": 0.0}, "noise_var: expected a finite number > 0, got 0.0"),
        ({"steps": 0}, "steps: expected a whole number >= 1, got 0"),
        ({"kernel": None}, "kernel: expected an NNGPKernel with arch='mlp', got 'NoneType'"),
        ({"kernel": NNGPKernel(depth=0)}, "depth >= 1"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(DataError, match=text):
        DeepKernelMachine(**{"kernel": _kernel(), **options})


def test_bad_input_is_named():
    model = DeepKernelMachine(_kernel(), math.inf)
    with pytest.raises(ShapeError, match="equally many rows"):
        pk.infer(model, (X, Y[:3]), rng=0)
    with pytest.raises(ShapeError, match=r"use X\[:, None\]"):
        pk.infer(model, (Y, Y), rng=0)
    with pytest.raises(DataError, match="at least one row"):
        pk.infer(model, (X[:0], Y[:0]), rng=0)
    with pytest.raises(DataError, match="expected data"):
        pk.infer(model, X, rng=0)
    with pytest.raises(DataError, match="X: expected float64 or float32, got torch.float16"):
        pk.infer(model, (X.half(), Y), rng=0)
    post = pk.infer(model, (X, Y), rng=0)
    with pytest.raises(ShapeError, match="expected 2 feature columns as in training, got 1"):
        post.predict(X[:, :1])
    with pytest.raises(DataError, match="expected None .new observations. or 'f', got 'y'"):
        post.predict(X, site="y")
    with pytest.raises(CapabilityError, match="leave joint= out"):
        post.predict(X, joint=True)

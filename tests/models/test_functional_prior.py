"""Network priors tuned to a process: distances fall and functions look like it."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from gpytorch.kernels import RBFKernel

import probkit as pk
from probkit.errors import DataError, ShapeError
from probkit.inference import SGHMC
from probkit.kernels import NNGPKernel
from probkit.models import InverseGamma, LogNormal
from probkit.models.bnn import BNN
from probkit.models.functional_prior import (
    LayerwiseBNN,
    PriorMatch,
    ProcessPrior,
    network_functions,
    sliced_wasserstein,
)
from probkit.rng import stream
from probkit.testing import ModelConformance

X = torch.linspace(-3.0, 3.0, 40)[:, None]
QUICK = PriorMatch(
    steps=30, lr=0.15, draws=64, measurements=10, critic_steps=50, critic_width=40, critic_lr=0.03
)


class TestModel(ModelConformance):
    latents = ("f",)

    def problem(self):
        x = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
        model = LayerwiseBNN(
            hidden=(3,), w_std=(1.3, 0.6), b_std=(0.4, 0.2), noise_var=0.1, inputs=x
        )
        return model, (x, x[:, 0].sin()), x[:3] + 0.1

    def sampler(self):
        return SGHMC(20, warmup=20, step_size=0.001)


def _functions(model, x, n, seed):
    stds = torch.tensor([model.w_std, model.b_std], dtype=x.dtype)
    return network_functions(model, stds, x, n, stream(seed, "f"))


def test_its_prior_is_that_of_a_network_with_those_weights():
    model = LayerwiseBNN(hidden=(5, 4), w_std=(1.3, 0.6, 2.0), b_std=(0.4, 0.2, 0.7), noise_var=0.1)
    draws = BNN.sample_prior(
        LayerwiseBNN(
            hidden=(5, 4), w_std=model.w_std, b_std=model.b_std, noise_var=0.1, inputs=X.double()
        ),
        4000,
        rng=0,
    )
    for k in range(3):
        for name, std in ((f"weight_{k}", model.w_std[k]), (f"bias_{k}", model.b_std[k])):
            spread = draws[name].std()
            # relative error of a standard deviation: 1 / sqrt(2 n)
            assert abs(float(spread) / std - 1) < 4 / math.sqrt(2 * draws[name].numel())


def test_wide_functions_have_the_covariance_of_the_kernel():
    """The factors of the layers are those of the NNGP kernel."""
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    model = LayerwiseBNN(
        hidden=(400,), activation="relu", w_std=(1.5, 0.8), b_std=(0.6, 1e-6), noise_var=0.1
    )
    f = _functions(model, x, 8000, 0)
    kernel = NNGPKernel(depth=1, w_std=1.5, b_std=0.6, last_w_std=0.8)
    wanted = kernel(x).to_dense().detach()
    error = ((wanted.diag()[:, None] * wanted.diag() + wanted**2) / 8000).sqrt()
    assert float(((f.T.cov() - wanted) / error).abs().max()) < 4.5


def test_process_draws_have_the_moments_of_the_mixture():
    x = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None]
    kernel = RBFKernel().double()
    laws = {"lengthscale": LogNormal(0.0, 0.5)}
    process = ProcessPrior(kernel, laws, InverseGamma(6.0, 5.0))
    f = process.sample(40_000, x, rng=0)
    levels = (torch.arange(2000).double() + 0.5) / 2000
    lengths = LogNormal(0.0, 0.5).icdf(levels)
    gap = (x - x.mT).square()
    wanted = (-0.5 * gap / lengths[:, None, None] ** 2).exp().mean(0)  # E[sigma^2] = 1
    products = f[:, :, None] * f[:, None, :]
    error = products.std(0) / 40_000**0.5
    assert float(((products.mean(0) - wanted) / error).abs().max()) < 4.5


def test_matching_lowers_the_distance_and_moves_the_functions_closer():
    process = ProcessPrior(RBFKernel(), scale=None)
    start = LayerwiseBNN(hidden=(50,), w_std=(0.3,), b_std=(3.0,), noise_var=0.1)
    found = QUICK.fit(start, process, X, rng=0)
    assert float(found.distance[-5:].mean()) < 0.5 * float(found.distance[:5].mean())
    n, x = 4000, X[::4]
    theirs = process.sample(n, x, rng=1)
    before = float(sliced_wasserstein(_functions(start, x, n, 2), theirs, rng=0))
    after = float(sliced_wasserstein(_functions(found.model, x, n, 2), theirs, rng=0))
    floor = float(sliced_wasserstein(process.sample(n, x, rng=3), theirs, rng=0))
    assert after < 0.5 * before
    assert floor < after  # the family does not hold the process
    for column in (0, 5):
        ks = [
            scipy.stats.ks_2samp(_functions(m, x, n, 4)[:, column], theirs[:, column]).statistic
            for m in (start, found.model)
        ]
        # two samples of one law: 1.36 sqrt(2 / n) is exceeded in 5 % of cases
        assert ks[1] < ks[0] - 2 * 1.36 * (2 / n) ** 0.5
    assert found.w_std.shape == (31, 2)
    assert found.model.w_std == tuple(found.w_std[-1].tolist())
    assert start.w_std == (0.3, 0.3)


@pytest.mark.slow
def test_a_reachable_prior_is_found():
    """Functions of a wide network itself: the variances come back."""
    kernel = NNGPKernel(depth=1, activation="erf", w_std=1.0, b_std=0.5, last_w_std=1.5)
    start = LayerwiseBNN(hidden=(100,), activation="erf", w_std=(3.0, 0.5), noise_var=0.1)
    match = PriorMatch(steps=150, draws=128, measurements=20, critic_steps=60, critic_width=50)
    found = match.fit(start, ProcessPrior(kernel), X, rng=0)
    x = X[::8].double()
    sd = _functions(found.model, x, 20_000, 0).std(0)
    wanted = kernel(x, diag=True).detach().sqrt()
    assert float((sd / wanted - 1).abs().max()) < 0.12
    first = _functions(start, x, 20_000, 0).std(0)
    assert float((first / wanted - 1).abs().max()) > 0.2


def test_climbing_instead_would_be_seen():
    """With the sign of the distance turned the functions move away: the tests above would fail."""

    class Climbing(PriorMatch):
        def _distance(self, *given):
            return -super()._distance(*given)

    match = Climbing(steps=10, lr=0.2, draws=64, measurements=10, critic_steps=20, critic_width=30)
    process = ProcessPrior(RBFKernel())
    start = LayerwiseBNN(hidden=(20,), w_std=(0.3,), b_std=(3.0,), noise_var=0.1)
    found = match.fit(start, process, X, rng=0)
    x = X[::4]
    theirs = process.sample(2000, x, rng=1)
    before, after = (
        float(sliced_wasserstein(_functions(m, x, 2000, 2), theirs, rng=0))
        for m in (start, found.model)
    )
    assert after > before


def test_the_seed_decides_and_the_caller_is_told():
    match = PriorMatch(steps=3, draws=8, measurements=5, critic_steps=2, critic_width=8)
    start = LayerwiseBNN(hidden=(6,), noise_var=0.1)
    seen = []
    first = match.fit(
        start, ProcessPrior(RBFKernel()), X, rng=0, callback=lambda k, d: seen.append((k, d))
    )
    again = match.fit(start, ProcessPrior(RBFKernel()), X, rng=0)
    other = match.fit(start, ProcessPrior(RBFKernel()), X, rng=1)
    assert torch.equal(first.distance, again.distance) and first.model.w_std == again.model.w_std
    assert not torch.equal(first.distance, other.distance)
    assert seen == list(enumerate(first.distance.tolist()))


@pytest.mark.filterwarnings("ignore:SGHMC. the chains disagree")  # units may change places
def test_the_tuned_network_is_inferred_by_sghmc(tmp_path):
    x = torch.linspace(-2, 2, 30, dtype=torch.float64)[:, None]
    model = LayerwiseBNN(hidden=(20,), w_std=(2.0, 1.0), b_std=(1.0, 0.1), noise_var=0.01)
    sampler = SGHMC(60, warmup=800, step_size=0.01, thin=5, friction=0.1)
    post = pk.infer(model, (x, x[:, 0].sin()), sampler, rng=0, chains=2)
    error = (post.predict(x, site="f").mean - x[:, 0].sin()).abs().max()
    assert float(error) < 0.3
    post.save(tmp_path)
    assert pk.load(tmp_path).model.w_std == (2.0, 1.0)


def test_sliced_distance_of_shifted_normals():
    """Along direction u a shift m is seen as |u'm|; in two dims its mean is 2 |m| / pi."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4000, 2, generator=generator, dtype=torch.float64)
    found = float(sliced_wasserstein(a, b + torch.tensor([3.0, 0.0]), directions=1000, rng=0))
    # |cos| has standard deviation 0.31 over directions; sample means 2 / sqrt(4000) apart.
    assert found == pytest.approx(6 / math.pi, abs=4 * 3 * 0.31 / 1000**0.5 + 0.05)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LayerwiseBNN(hidden=(3,), w_std=(1.0, 2.0, 3.0)), "w_std: expected 2 finite"),
        (lambda: LayerwiseBNN(hidden=(3,), b_std=(0.0,)), "b_std: expected 2 finite numbers > 0"),
        (lambda: LayerwiseBNN(prior="iid"), "expected prior='fan_in'"),
        (lambda: LayerwiseBNN(gains=(1.0, 2.0)), "give w_std and b_std instead"),
        (lambda: PriorMatch(steps=0), "PriorMatch: expected whole steps"),
        (lambda: PriorMatch(lr=0.0), "PriorMatch: expected lr, critic_lr and penalty > 0"),
        (lambda: PriorMatch(train_share=1.5), "0 <= train_share <= 1"),
        (
            lambda: ProcessPrior(RBFKernel(), {"scale": LogNormal(0.0, 1.0)}),
            "laws: expected names out of lengthscale, got scale",
        ),
    ],
)
def test_bad_options_are_named(make, text):
    with pytest.raises(DataError, match=text):
        make()


def test_bad_inputs_are_named():
    model, process = LayerwiseBNN(hidden=(3,), noise_var=0.1), ProcessPrior(RBFKernel())
    with pytest.raises(ShapeError, match=r"use x\[:, None\]"):
        QUICK.fit(model, process, X[:, 0], rng=0)
    with pytest.raises(DataError, match="x must be finite, got nan at row 3, column 0"):
        broken = X.clone()
        broken[3] = torch.nan
        QUICK.fit(model, process, broken, rng=0)
    with pytest.raises(ShapeError, match="two samples"):
        sliced_wasserstein(X, X[:3], rng=0)

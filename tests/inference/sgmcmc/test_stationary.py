"""Stationary laws against the exact ones of the discretised recursions, and mutants caught."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from support.fits import GroupModel, LineModel, RateModel, line_data
from support.recursions import langevin, on_passes, solve_lyapunov, underdamped
from torch.distributions import Normal, constraints

import probkit as pk
from probkit.inference import SGHMC, SGLD
from probkit.inference.sgmcmc import base
from probkit.inference.sgmcmc.gradient import StochasticPotential
from probkit.model import Batch, Model, Site
from probkit.testing import batch_means, z_bound

F64 = torch.float64
CHAINS = 48


@dataclass(frozen=True)
class Mean(Model):
    """y_i ~ N(mu, noise^2) for all i; errors of batch gradients do not depend on mu."""

    noise: float = 1.5
    prior: float = 10.0
    batched: ClassVar[bool] = True

    def sites(self, data):
        return {"mu": Site((), constraints.real)}

    def log_joint(self, values, data, *, scale=1.0):
        mu = values["mu"]
        fit = Normal(mu[..., None], self.noise).log_prob(data).sum(-1)
        return Normal(0.0, self.prior).log_prob(mu) + scale * fit

    def plate_size(self, data):
        return len(data)

    def minibatch(self, data, index):
        return Batch(data[index], index, len(data) / len(index))

    def exact(self, data):
        precision = len(data) / self.noise**2 + self.prior**-2
        return float(data.sum()) / self.noise**2 / precision, precision

    def error(self, data, size):
        """Variance of a batch's gradient error, drawn without replacement."""
        n = len(data)
        spread = float(data.var(unbiased=False)) * (n - size) / (n - 1) / size
        return torch.tensor([[spread * n**2 / self.noise**4]], dtype=F64)


Y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0, -0.5, 3.1, 1.4, -1.0, 0.6], dtype=F64)


def worst(post, site, mean, covariance):
    """Largest |z| of means and of second moments of a site of shape [D] or []."""
    draws = post.draws[site]
    draws = (draws[..., None] if draws.ndim == 2 else draws) - mean
    products = draws[..., :, None] * draws[..., None, :]
    found = []
    for series, exact in ((draws, torch.zeros_like(draws[0, 0])), (products, covariance)):
        blocks = batch_means(series)
        error = blocks.std(0) / len(blocks) ** 0.5
        found.append(float(((blocks.mean(0) - exact).abs() / error).max()))
    return max(found)


BOUND = z_bound(8)

# ------------------------------------------------------------------------------- full data

SIZES = {"SGLD": 0.03, "SGHMC": 0.12}


def on_line(kind, **changes):
    """Draws of the line model, and the exact law of the recursion that made them."""
    x, y = line_data()
    mean, covariance, _ = LineModel().exact((x, y))
    precision = torch.linalg.inv(covariance)
    scale = torch.tensor([0.6, 1.3], dtype=F64)
    options = {"warmup": 60, "precondition": False, "preconditioner": scale, "thin": 2}
    size = SIZES["SGLD" if issubclass(kind, SGLD) else "SGHMC"]
    if issubclass(kind, SGHMC):
        options["friction"] = 0.3
        step, _, spread = underdamped(precision, size, scale, 0.3)
    else:
        step, _, spread = langevin(precision, size, scale)
    sampler = kind(225, step_size=size, **{**options, **changes})
    post = pk.infer(LineModel(), (x, y), sampler, rng=0, chains=128)
    return post, mean, solve_lyapunov(step, spread)[:2, :2], covariance


@pytest.mark.parametrize("kind", [SGLD, SGHMC])
def test_full_data_on_a_normal_target(kind):
    """Exact to the last bit of bias: the law of the recursion, not the posterior, is the target."""
    post, mean, expected, covariance = on_line(kind)
    assert worst(post, "w", mean, expected) < BOUND
    # The step is large enough for its bias to be seen, so that the oracle is no formality.
    assert float((expected - covariance).diagonal().div(covariance.diagonal()).abs().min()) > 0.04
    assert worst(post, "w", mean, covariance) > BOUND


@pytest.mark.parametrize("kind", [SGLD, SGHMC])
def test_the_bias_vanishes_with_the_step(kind):
    """The recursion's law tends to the posterior: the bias is of the order of the step size."""
    _, covariance, _ = LineModel().exact(line_data())
    precision, scale = torch.linalg.inv(covariance), torch.ones(2, dtype=F64)
    bias = []
    for size in (1e-2, 1e-3):
        if kind is SGLD:
            step, _, spread = langevin(precision, size, scale)
        else:
            step, _, spread = underdamped(precision, size, scale, 0.3)
        bias.append(float((solve_lyapunov(step, spread)[:2, :2] - covariance).abs().max()))
    order = math.log10(bias[0] / bias[1])
    assert order == pytest.approx(1.0 if kind is SGLD else 2.0, abs=0.1)


class HalfNoiseSGLD(SGLD):
    def _move(self, position, momentum, gradient, preconditioner, noise, stage):
        return super()._move(position, momentum, gradient, preconditioner, 0.5 * noise, stage)


class HalfNoiseSGHMC(SGHMC):
    def _move(self, position, momentum, gradient, preconditioner, noise, stage):
        return super()._move(position, momentum, gradient, preconditioner, 0.5 * noise, stage)


class ShortDriftSGLD(SGLD):
    """The drift is 0.35 eps, not eps / 2."""

    def _move(self, position, momentum, gradient, preconditioner, noise, stage):
        return super()._move(position, momentum, 0.7 * gradient, preconditioner, noise, stage)


class HalfFrictionSGHMC(SGHMC):
    """The momentum loses 0.15 of itself in a step, the noise is that of 0.3."""

    def _move(self, position, momentum, gradient, preconditioner, noise, stage):
        momentum = momentum * 0.85 / 0.7
        return super()._move(position, momentum, gradient, preconditioner, noise, stage)


@pytest.mark.parametrize(
    "mutant", [HalfNoiseSGLD, HalfNoiseSGHMC, ShortDriftSGLD, HalfFrictionSGHMC]
)
def test_wrong_dynamics_are_caught(mutant):
    post, mean, expected, _ = on_line(mutant)
    assert worst(post, "w", mean, expected) > 2 * BOUND


# ------------------------------------------------------------------------------- minibatches


def on_batches(kind, size=0.1, *, model=None, **changes):
    """Draws of the mean model from batches of two units, and the exact law."""
    model = model or Mean()
    mean, precision = Mean().exact(Y)
    matrix, scale = torch.tensor([[precision]], dtype=F64), torch.ones(1, dtype=F64)
    options = {"warmup": 60, "precondition": False, "batch_size": 2}
    if kind is SGHMC:
        options["friction"] = 0.3
        step, kick, spread = underdamped(matrix, size, scale, 0.3)
    else:
        step, kick, spread = langevin(matrix, size, scale)
    expected = on_passes(step, kick, spread, Mean().error(Y, 2), 5)[:1, :1]
    sampler = kind(400, step_size=size, **{**options, **changes})
    post = pk.infer(model, Y, sampler, rng=0, chains=CHAINS)
    return post, mean, expected, 1.0 / precision


@pytest.mark.parametrize(("kind", "size"), [(SGLD, 0.1), (SGHMC, 0.2)])
def test_minibatches_in_random_passes(kind, size):
    post, mean, expected, variance = on_batches(kind, size)
    assert worst(post, "mu", mean, expected) < BOUND
    # Full data has another bias, so that the gradient noise is seen.
    build = langevin if kind is SGLD else underdamped
    rest = () if kind is SGLD else (0.3,)
    step, _, spread = build(
        torch.tensor([[1 / variance]], dtype=F64), size, torch.ones(1, dtype=F64), *rest
    )
    full = solve_lyapunov(step, spread)[:1, :1]
    assert abs(float(expected / full) - 1) > 0.02


@pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")
def test_a_missing_scale_is_caught():
    class Unscaled(Mean):
        def minibatch(self, data, index):
            return Batch(data[index], index, 1.0)

    post, mean, expected, _ = on_batches(SGLD, model=Unscaled())
    assert worst(post, "mu", mean, expected) > 2 * BOUND


class OneByOne(Mean):
    """As Mean, but its log joint cannot be mapped over batches: it branches on them."""

    def log_joint(self, values, data, *, scale=1.0):
        assert bool(data.abs().sum() >= 0)
        return super().log_joint(values, data, scale=scale)


def test_chains_on_own_batches_together_or_one_by_one():
    options = {"rng": 3, "chains": 3}
    sampler = SGLD(20, warmup=10, step_size=0.1, batch_size=3)
    together = pk.infer(Mean(), Y, sampler, **options)
    apart = pk.infer(OneByOne(), Y, sampler, **options)
    torch.testing.assert_close(together.draws["mu"], apart.draws["mu"], rtol=1e-10, atol=0)
    torch.testing.assert_close(
        together.sample_stats["lp"], apart.sample_stats["lp"], rtol=1e-10, atol=0
    )


def local_means(size, batch):
    """Exact mean [mu, z] of draws of SGLD on the plate model, averaged over a pass.

    Batches multiply the state, so the mean is the fixed point of the affine map of one pass,
    averaged over all orders of the units.
    """
    data = Y[:4] + 4.0
    orders = list(itertools.permutations(range(4)))
    scale = 4 / batch
    maps = []
    for order in orders:
        inside = []
        A, b = torch.eye(5, dtype=F64), torch.zeros(5, dtype=F64)
        for begin in range(0, 4, batch):
            precision, pull = torch.zeros(5, 5, dtype=F64), torch.zeros(5, dtype=F64)
            precision[0, 0] = 1.0
            for unit in order[begin : begin + batch]:
                k = unit + 1
                precision[0, 0] += scale
                precision[k, k] += 2 * scale
                precision[0, k] -= scale
                precision[k, 0] -= scale
                pull[k] += scale * data[unit]
            step = torch.eye(5, dtype=F64) - 0.5 * size * precision
            A, b = step @ A, step @ b + 0.5 * size * pull
            inside.append((A, b))
        maps.append(inside)
    last_a = torch.stack([inside[-1][0] for inside in maps]).mean(0)
    last_b = torch.stack([inside[-1][1] for inside in maps]).mean(0)
    start = torch.linalg.solve(torch.eye(5, dtype=F64) - last_a, last_b)
    means = [A @ start + b for inside in maps for A, b in inside]
    return torch.stack(means).mean(0)


@pytest.mark.parametrize("mutant", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_local_sites_on_minibatches(mutant, monkeypatch):
    """Sites of a plate get gradients from the batches that hold them, at the right weight."""
    if mutant:
        monkeypatch.setattr(
            GroupModel, "minibatch", lambda self, data, index: Batch(data[index], index, 1.0)
        )
    sampler = SGLD(400, warmup=60, step_size=0.3, batch_size=2, precondition=False)
    post = pk.infer(GroupModel(), Y[:4] + 4.0, sampler, rng=1, chains=CHAINS)
    draws = torch.cat([post.draws["mu"][..., None], post.draws["z"]], -1)
    blocks = batch_means(draws)
    error = blocks.std(0) / len(blocks) ** 0.5
    z = float(((blocks.mean(0) - local_means(0.3, 2)).abs() / error).max())
    assert z > 2 * z_bound(5) if mutant else z < z_bound(5)


# ------------------------------------------------------------------------------- constraints


@pytest.mark.parametrize("kind", [SGLD, SGHMC])
@pytest.mark.parametrize("mutant", [False, True])
def test_the_jacobian_of_a_positive_site(kind, mutant, monkeypatch):
    """log of a Gamma(a, b) draw has mean digamma(a) - log b; without the Jacobian, a - 1.

    Steps are small (0.02 of the posterior sd of the logarithm, squared, for SGLD), the bias of the
    mean is of that order: below 0.02 sd, while the mutant is off by 0.3 sd.
    """
    data = torch.tensor([0.4, 1.1, 0.2, 0.9, 0.3, 0.6], dtype=F64)
    a, b = RateModel().exact(data)
    if mutant:

        def without(self, position):
            values, log_det = self.free.constrain(position)
            return self._alone(values, self._batches[0]) + 0.0 * log_det

        monkeypatch.setattr(StochasticPotential, "log_density", without)
    size = 0.02 if kind is SGLD else 0.1
    sampler = kind(225, warmup=100, step_size=size, thin=3, precondition=False)
    post = pk.infer(RateModel(), data, sampler, rng=0, chains=128)
    logs = post.draws["rate"].log()
    sd = float(torch.special.polygamma(1, torch.tensor(a, dtype=F64)).sqrt())
    expected = float(torch.special.digamma(torch.tensor(a, dtype=F64))) - math.log(b)
    blocks = batch_means(logs[..., None])
    error = float(blocks.std() / len(blocks) ** 0.5)
    gap = abs(float(logs.mean()) - expected)
    assert gap > 0.2 * sd if mutant else gap < z_bound() * error + 0.02 * sd


# ------------------------------------------------------------------------------- the warm-up


@pytest.mark.parametrize("given", [False, True])
def test_the_adaptive_warm_up_is_the_scalar_loop(given, monkeypatch):
    """SGHMC of one parameter against the update written out in numbers (tau before its update)."""
    data = Y[:5]
    noise = torch.randn(60, 1, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    monkeypatch.setattr(
        base, "_noise", lambda position, rngs, count: noise[:count] if count == 60 else None
    )
    model = Mean()
    mean, precision = model.exact(data)
    sampler = SGHMC(
        30,
        warmup=30,
        step_size=0.05,
        friction=0.1,
        chunk=60,
        preconditioner=torch.tensor([2.0]) if given else None,
    )
    seen = []
    move = SGHMC._move

    def record(self, position, *rest):
        seen.append(float(position[0, 0]))
        return move(self, position, *rest)

    monkeypatch.setattr(SGHMC, "_move", record)
    post = pk.infer(model, data, sampler, rng=0)
    q, r = seen[0], 0.0
    tau, g, v, m = 1.0, 1.0, 1.0, 2.0 if given else 1.0
    eta, alpha = 0.05, 0.1
    path = []
    for t in range(60):
        gradient = precision * (q - mean)
        if t < 30:
            rate = 1.0 / (tau + 1.0)
            tau = tau * (1.0 - g * g / v) + 1.0
            g = g + rate * (gradient - g)
            v = v + rate * (gradient * gradient - v)
            m = m + (t / 30) * (v**-0.5 - m) if given else v**-0.5
        variance = max(2 * eta**2 * alpha * m - eta**4, 1e-16 * eta**2)
        r = r - eta**2 * m * gradient - alpha * r + variance**0.5 * float(noise[t])
        q = q + r
        path.append(q)
    torch.testing.assert_close(
        post.draws["mu"][0], torch.tensor(path[30:], dtype=F64), rtol=1e-9, atol=1e-12
    )
    assert seen[1:] == pytest.approx(path[:-1], rel=1e-9)


def test_the_learned_scale_is_the_root_mean_square_gradient():
    """On a normal target at rest E[gradient^2] = precision, whatever the starting scale."""
    x, y = line_data(n=40)
    _, covariance, _ = LineModel().exact((x, y))
    sampler = SGLD(1, warmup=1000, step_size=0.05, chunk=1001)
    problem = pk.sampler.Problem(LineModel(), (x, y))
    rngs = [pk.stream(0, k) for k in range(32)]
    state = sampler.init(problem, rngs=rngs)
    scale = sampler.step(problem, state, rngs=rngs).state["preconditioner"]
    exact = torch.linalg.inv(covariance).diagonal().rsqrt()
    # The memory is long but finite: a chain's estimate varies by tens of percent.
    error = scale.std(0) / 32**0.5
    assert bool(((scale.mean(0) / exact - 1).abs() < 0.1 + 4 * error / exact).all())

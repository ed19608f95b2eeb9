"""Bounds and predictive laws of labels and counts, against quadrature."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import probkit as pk
from probkit import distributions as D
from probkit.errors import DataError
from probkit.inference.passing import MessagePassing
from probkit.inference.quadrature import integrate_log
from probkit.kernels.state_space import Matern
from probkit.models.funbat import FunBaT, TensorData
from probkit.models.funbat.counts import MixedPoisson, unit_softplus
from probkit.models.funbat.likelihoods import BernoulliNoise, PoissonNoise
from probkit.predictive import Analytic

F64 = torch.float64
COUNTS = torch.tensor([0.0, 1.0, 2.0, 7.0, 60.0], dtype=F64)
LABELS = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0], dtype=F64)


def expected_log_likelihood(
    noise: BernoulliNoise | PoissonNoise, y: Tensor, m: Tensor, v: Tensor
) -> Tensor:
    """E[log p(y | f)] [entry], f ~ N(m, v), on a fine grid."""
    z = torch.linspace(-12, 12, 4001, dtype=F64).unsqueeze(-1)
    weight = Normal(torch.zeros((), dtype=F64), torch.ones((), dtype=F64)).log_prob(z).exp()
    values = noise.log_likelihood(y, m + v.sqrt() * z, {})
    return (weight * values).sum(0) / weight.sum(0)


@pytest.mark.parametrize(
    ("noise", "y"), [(BernoulliNoise(0.7), LABELS), (PoissonNoise(3.0), COUNTS)]
)
def test_the_bound_lies_below_the_expected_log_likelihood(
    noise: BernoulliNoise | PoissonNoise, y: Tensor, generator: torch.Generator
) -> None:
    for _ in range(20):
        m = 2 * torch.randn(5, generator=generator, dtype=F64)
        v = torch.rand(5, generator=generator, dtype=F64) + 1e-3
        exact = expected_log_likelihood(noise, y, m, v)
        parts = []
        for i in range(5):
            one = y[i : i + 1]
            state = noise.start(one, 1)
            mean, second = m[i].reshape(1, 1), (m[i] ** 2 + v[i]).reshape(1, 1)
            parts.append(noise.absorb(state, one, mean, second, hold=False)[1][0])
        bound = torch.stack(parts)
        assert bool((bound <= exact + 1e-9).all())
    # and it is tight where f is known
    state = noise.start(y, 1)
    tight = noise.absorb(state, y, m[None], (m**2 + 1e-12)[None], hold=False)[1]
    torch.testing.assert_close(tight[0], noise.log_likelihood(y, m, {}).sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    ("noise", "y"), [(BernoulliNoise(-0.4), LABELS), (PoissonNoise(2.0), COUNTS)]
)
def test_the_parabola_touches_the_log_likelihood_and_stays_below(
    noise: BernoulliNoise | PoissonNoise, y: Tensor
) -> None:
    f = torch.linspace(-12, 12, 2001, dtype=F64)
    for centre in (-3.0, 0.0, 2.5):
        m = torch.full((1, len(y)), centre, dtype=F64)
        state, _ = noise.absorb(noise.start(y, 1), y, m, m.square(), hold=False)
        precision, linear = noise.quadratic(state, y)
        for i in range(len(y)):
            exact = noise.log_likelihood(y[i], f, {})
            at = noise.log_likelihood(y[i], m[0, i], {})
            step = f - centre
            rise = (linear[0, i] - precision[0, i] * centre) * step
            parabola = at + rise - precision[0, i] * step.square() / 2
            assert bool((parabola <= exact + 1e-9).all())
            near = step.abs() < 0.02
            assert float((exact - parabola)[near].abs().max()) < 0.02 * (1 + float(y[i])) / 2


def test_the_curvature_is_the_smallest_that_bounds() -> None:
    """Five percent less, and the parabola cuts the log likelihood somewhere."""
    noise, f = PoissonNoise(2.0), torch.linspace(-12, 12, 2001, dtype=F64)
    curvature = noise.start(COUNTS, 1)["curvature"][0]
    link, slope = unit_softplus(f)
    for y, bound in zip(COUNTS, curvature, strict=True):
        gradient = slope * (y / link - 2.0)
        largest = -(gradient.diff() / f.diff()).min()
        assert 0.999 * bound < largest <= bound
        centre = f[:-1][(gradient.diff() / f.diff()).argmin()]
        at = noise.log_likelihood(y, centre, {})
        own_link, own_slope = unit_softplus(centre)
        step = torch.tensor([-0.05, 0.05], dtype=F64)
        rise = own_slope * (y / own_link - 2.0) * step
        wrong = at + rise - 0.95 * bound * step.square() / 2
        assert bool((wrong > noise.log_likelihood(y, centre + step, {})).any())


def test_counts_under_an_uncertain_rate() -> None:
    loc = torch.tensor([-1.0, 0.5, 2.0], dtype=F64)
    scale = torch.tensor([0.3, 1.0, 0.7], dtype=F64)
    law = MixedPoisson(loc, scale, torch.full((3,), 4.0, dtype=F64))
    counts = torch.arange(400, dtype=F64).unsqueeze(-1)
    probability = law.log_prob(counts).exp()
    torch.testing.assert_close(probability.sum(0), torch.ones(3, dtype=F64))
    mean = (counts * probability).sum(0)
    torch.testing.assert_close(law.mean, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        law.variance, ((counts - mean).square() * probability).sum(0), rtol=1e-8, atol=1e-8
    )
    torch.testing.assert_close(law.cdf(counts), probability.cumsum(0), rtol=1e-9, atol=1e-9)
    assert law.cdf(torch.tensor(-1.0, dtype=F64)).tolist() == [0.0, 0.0, 0.0]

    def log_integrand(f: Tensor) -> Tensor:
        rate = 4.0 * unit_softplus(f)[0]
        return (
            torch.xlogy(torch.tensor(5.0), rate)
            - rate
            - math.lgamma(6)
            + Normal(loc, scale).log_prob(f)
        )

    exact = integrate_log(log_integrand, batch_shape=(3,), scan=(-20, 20)).log_integral
    torch.testing.assert_close(
        law.log_prob(torch.tensor(5.0, dtype=F64)), exact, rtol=1e-6, atol=1e-6
    )


def test_quantiles_of_counts() -> None:
    law = MixedPoisson(*(torch.tensor([x, x], dtype=F64) for x in (0.5, 1.0, 40.0)))
    for q in (0.0, 0.05, 0.5, 0.95, 0.9999):
        count = D.icdf(law, torch.full((2,), q, dtype=F64))
        assert bool((law.cdf(count) >= q).all())
        assert bool(((law.cdf(count - 1) < q) | (count == 0)).all())


def test_draws_follow_the_laws(generator: torch.Generator) -> None:
    n = 20_000
    m, v = torch.full((1, 1), 0.8, dtype=F64), torch.full((1, 1), 0.5, dtype=F64)
    for noise in (BernoulliNoise(-0.3), PoissonNoise(3.0)):
        f = m + v.sqrt() * torch.randn(n, 1, generator=generator, dtype=F64)
        y = noise.sample(f, {}, rng=generator)
        law = noise.law({}, m, v)
        error = (law.variance / n).sqrt()
        assert abs(float(y.mean() - law.mean)) < 4 * float(error)
        exact = noise.law({}, m, 0 * v)
        rate = noise.sample(m.expand(n, 1), {}, rng=generator)
        assert abs(float(rate.mean() - exact.mean)) < 4 * float((exact.variance / n).sqrt())
    drawn = Analytic(PoissonNoise(3.0).law({}, m, v)).sample(n, rng=1)
    law = PoissonNoise(3.0).law({}, m, v)
    assert abs(float(drawn.mean() - law.mean)) < 4 * float((law.variance / n).sqrt())


def grid_data(
    noise: BernoulliNoise | PoissonNoise, generator: torch.Generator
) -> tuple[TensorData, Tensor]:
    """Entries on a 15 x 15 grid, and the f that made them."""
    index = torch.randint(15, (400, 2), generator=generator).double() / 14
    f = 2 * (3 * index[:, 0]).sin() * (2 * index[:, 1]).cos()
    return TensorData(index, noise.sample(f, {}, rng=generator)), f


@pytest.mark.parametrize("noise", [BernoulliNoise(0.2), PoissonNoise(3.0)])
def test_a_surface_from_labels_and_from_counts(
    noise: BernoulliNoise | PoissonNoise, generator: torch.Generator
) -> None:
    data, f = grid_data(noise, generator)
    kernel = Matern(1.5, lengthscale=0.4)
    model = FunBaT(1, kind="cp", kernels=kernel, noise=noise, learn_hyperparameters=False)
    post = pk.infer(model, data, MessagePassing(sweeps=25, tolerance=0), rng=0)
    trace = post.sample_stats["bound_trace"][0, 0]
    assert float((trace.diff() / trace[1:].abs()).min()) > -1e-10
    latent = post.predict(data.index, site="f")
    error = (latent.mean - f).abs()
    # 29 numbers decide: the mean squared z-score has a standard deviation of about 0.25
    z = error.square() / latent.variance
    assert float(z.mean()) < 2.0
    assert float(error.square().mean()) < float(f.var()) / 3
    # 400 entries share 29 numbers: the share of f in 90 % intervals has an error of about 0.06
    assert float((error < 1.645 * latent.variance.sqrt()).double().mean()) > 0.75
    law = post.predict(data.index)
    base = noise.law({}, f * 0, f * 0) if isinstance(noise, PoissonNoise) else None
    density = law.log_prob(data.y).mean()
    if base is None:
        rate = data.y.mean()
        constant = (data.y * rate.log() + (1 - data.y) * (1 - rate).log()).mean()
    else:
        constant = base.log_prob(data.y).mean()
    assert float(density) > float(constant) + 0.05
    with pytest.raises(DataError, match="expected (labels|counts)"):
        model.prepare((data.index, data.y + 0.5))


def test_a_sweep_with_wrong_weights_lowers_the_bound(generator: torch.Generator) -> None:
    """The bound notices twice the expected Polya-Gamma variables, and half the curvature."""

    class TooSure(BernoulliNoise):
        def quadratic(self, state: Any, y: Tensor) -> tuple[Tensor, Tensor]:
            precision, linear = super().quadratic(state, y)
            return 3 * precision, linear

    data, _ = grid_data(BernoulliNoise(), generator)
    kernel = Matern(1.5, lengthscale=0.4)
    bounds = []
    for noise in (BernoulliNoise(), TooSure()):
        model = FunBaT(1, kind="cp", kernels=kernel, noise=noise, learn_hyperparameters=False)
        post = pk.infer(model, data, MessagePassing(sweeps=20, tolerance=0), rng=0)
        bounds.append(post.log_evidence.value.item())
    assert bounds[1] < bounds[0] - 1.0


def test_bad_input() -> None:
    with pytest.raises(DataError, match="expected labels 0 and 1, got 2 in row 1"):
        BernoulliNoise().check(torch.tensor([0.0, 2.0]))
    with pytest.raises(DataError, match=r"expected counts 0, 1, 2, ..., got 1.5 in row 1"):
        PoissonNoise().check(torch.tensor([0.0, 1.5]))
    with pytest.raises(DataError, match="expected counts"):
        PoissonNoise().check(torch.tensor([-1.0]))
    with pytest.raises(DataError, match="expected a finite level > 0"):
        PoissonNoise(0.0)
    with pytest.raises(DataError, match="expected a finite offset"):
        BernoulliNoise(math.nan)
    BernoulliNoise().check(LABELS)
    PoissonNoise().check(COUNTS)

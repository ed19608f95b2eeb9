"""Importance-weighted bounds, path gradients, natural gradients, and what a fit says of itself."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.fits import GroupModel, LineModel, RateModel, line_data
from torch.distributions import MultivariateNormal, Normal

import probkit as pk
from probkit.errors import CapabilityError, ConvergenceWarning, DataError, NumericsWarning
from probkit.inference import SVI, FullRank, LowRank, MeanField, elbo
from probkit.inference.natural import antithetic, expected_derivatives, natural_step
from probkit.loader import Loader
from probkit.model import Batch
from probkit.rng import stream
from probkit.testing import assert_mean, z_bound
from probkit.tree import leaves, map_tensors

F64 = torch.float64
Y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0, -0.5], dtype=F64)
GUIDES = [MeanField(), FullRank(), LowRank(1)]


def shaken(guide, model, data, seed=0, size=0.2):
    """Parameters away from where the guide starts."""
    return map_tensors(
        lambda t: t + size * torch.randn(t.shape, generator=stream(seed, "p"), dtype=t.dtype),
        guide.init(model, data, rng=seed),
    )


# ------------------------------------------------------------------------------- densities


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("index", [None, torch.tensor([3, 1])])
def test_log_prob_of_draws_is_what_sample_said(guide, index):
    model = GroupModel()
    params = shaken(guide, model, Y)
    batch = Batch(Y) if index is None else model.minibatch(Y, index)
    values, stated = guide.sample(params, model, batch, 5, rng=1)
    found = guide.log_prob(params, model, batch, values)
    torch.testing.assert_close(found.global_, stated.global_)
    torch.testing.assert_close(found.local, stated.local)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: type(g).__name__)
def test_log_prob_has_the_jacobian(guide):
    params = shaken(guide, RateModel(), Y.abs())
    values, stated = guide.sample(params, RateModel(), Batch(Y.abs()), 5, rng=1)
    found = guide.log_prob(params, RateModel(), Batch(Y.abs()), values)
    torch.testing.assert_close(found.total(), stated.total())
    assert float((found.total() + values["rate"].log() - stated.total()).abs().max()) > 0.1


# ------------------------------------------------------------------------------- the bound


def exact_gap():
    """Line model, mean-field parameters off the optimum, and the exact log evidence."""
    model, data = LineModel(), line_data()
    mean, covariance, evidence = model.exact(data)
    params = {"w": {"loc": mean + 0.15, "log_scale": covariance.diagonal().sqrt().log() - 0.2}}
    return model, data, params, float(evidence)


def test_the_importance_weighted_bound_rises_to_the_evidence():
    """Burda et al. 2016, theorem 1: monotone in K, below the evidence, consistent."""
    model, data, params, evidence = exact_gap()
    means, errors = [], []
    for k in (1, 4, 16, 256):
        terms = elbo.bound(
            model, MeanField(), params, Batch(data), 80_000 // k + 500, stream(0, k), importance=k
        )
        means.append(float(terms.mean()))
        errors.append(float(terms.std()) / len(terms) ** 0.5)
    for low, high, a, b in zip(means, means[1:], errors, errors[1:], strict=False):
        assert high - low > -z_bound(4) * math.hypot(a, b)
    assert means[1] - means[0] > 5 * math.hypot(*errors[:2]), "K changes nothing"
    assert all(m < evidence + z_bound(4) * e for m, e in zip(means, errors, strict=True))
    assert evidence - means[-1] < 0.2 * (evidence - means[0])


def test_one_draw_is_the_evidence_lower_bound():
    model, data, params, evidence = exact_gap()
    one = elbo.bound(model, MeanField(), params, Batch(data), 7, stream(0, "a"), importance=1)
    torch.testing.assert_close(
        one, elbo.elbo(model, MeanField(), params, Batch(data), 7, stream(0, "a"))
    )
    q = Normal(params["w"]["loc"], params["w"]["log_scale"].exp())
    mean, covariance, _ = model.exact(data)
    joint = MultivariateNormal(q.mean, torch.diag(q.variance))
    gap = torch.distributions.kl_divergence(joint, MultivariateNormal(mean, covariance))
    many = elbo.bound(model, MeanField(), params, Batch(data), 20_000, stream(0, "b"))
    assert_mean(many[:, None], evidence - float(gap), "bound")


def gradients(path, importance, repeats, n=1):
    """Gradient estimates [repeat, parameter] of the bound at fixed parameters."""
    model, data, params, _ = exact_gap()
    rng = stream(1, "gradient", path, importance)
    out = []
    for _ in range(repeats):
        leaf = map_tensors(lambda t: t.detach().clone().requires_grad_(), params)
        value = elbo.bound(
            model, MeanField(), leaf, Batch(data), n, rng, importance=importance, path=path
        )
        value.mean().backward()
        out.append(torch.cat([t.grad for t in leaves(leaf)]))
    return torch.stack(out)


@pytest.mark.parametrize("importance", [1, 5])
def test_the_path_gradient_has_the_same_mean(importance):
    """Unbiased for the same gradient as the total one (Tucker et al. 2019)."""
    total = gradients(False, importance, 900)
    path = gradients(True, importance, 900)
    error = (total.var(0) / len(total) + path.var(0) / len(path)).sqrt()
    z = ((total.mean(0) - path.mean(0)).abs() / error).max()
    assert float(z) < z_bound(4)
    assert float(total.mean(0).abs().div(error).max()) > 10, "nothing to compare"


def test_a_missing_square_of_the_weights_is_caught():
    """With the weights to the first power the path gradient is another one."""
    total = gradients(False, 5, 900)
    model, data, params, _ = exact_gap()
    rng, out = stream(1, "mutant"), []
    for _ in range(900):
        leaf = map_tensors(lambda t: t.detach().clone().requires_grad_(), params)
        values, _ = MeanField().sample(leaf, model, Batch(data), 5, rng=rng)
        log_q = MeanField().log_prob(params, model, Batch(data), values).total()
        log_w = model.log_joint(values, data) - log_q
        (torch.softmax(log_w.detach(), 0) * log_w).sum().backward()
        out.append(torch.cat([t.grad for t in leaves(leaf)]))
    wrong = torch.stack(out)
    error = (total.var(0) / len(total) + wrong.var(0) / len(wrong)).sqrt()
    assert float(((total.mean(0) - wrong.mean(0)).abs() / error).max()) > 2 * z_bound(4)


def test_the_path_gradient_has_no_noise_at_the_posterior():
    """Roeder et al. 2017: at q = p every draw gives gradient zero; the total one is noisy."""
    model, data = LineModel(), line_data()
    mean, covariance, _ = model.exact(data)
    factor = torch.linalg.cholesky(covariance)
    params = {
        "loc": mean,
        "log_diagonal": factor.diagonal().log(),
        "below": factor.tril(-1),
        "local": {},
    }
    sizes = {}
    for path in (True, False):
        leaf = map_tensors(lambda t: t.detach().clone().requires_grad_(), params)
        value = elbo.bound(model, FullRank(), leaf, Batch(data), 1, stream(0, "draw"), path=path)
        value.sum().backward()
        sizes[path] = max(float(t.grad.abs().max()) for t in leaves(leaf))
    assert sizes[True] < 1e-8 < 1e-2 < sizes[False]


def test_an_importance_weighted_fit_is_wider_and_its_bound_tighter():
    """Mean field of a correlated normal: K = 1 is too narrow, K > 1 covers more of it."""
    mean, covariance, evidence = LineModel().exact(line_data())
    fits = {
        k: pk.infer(
            LineModel(),
            line_data(),
            SVI(steps=400, lr=0.05, decay=0.02, importance=k, gradient="path"),
            guide=MeanField(),
            rng=0,
        )
        for k in (1, 10)
    }
    widths = {
        k: fit.marginals["w"].stddev / covariance.diagonal().sqrt() for k, fit in fits.items()
    }
    assert bool((widths[10] > widths[1] + 0.01).all())
    bounds = {k: float(fit.log_evidence.value) for k, fit in fits.items()}
    errors = {k: float(fit.sample_stats["bound_se"]) for k, fit in fits.items()}
    assert bounds[1] < bounds[10] < float(evidence) + 4 * errors[10]


# ------------------------------------------------------------------------------- natural gradients


def test_one_step_is_the_normal_posterior():
    mean, covariance, evidence = LineModel(width=3).exact(line_data(width=3))
    sampler = SVI(steps=1, lr=1.0, update="natural", particles=2)
    post = pk.infer(LineModel(width=3), line_data(width=3), sampler, rng=0)
    law = post.marginals["w"]
    torch.testing.assert_close(law.mean, mean)
    torch.testing.assert_close(law.stddev, covariance.diagonal().sqrt())
    torch.testing.assert_close(
        FullRank().factor(post.source.params[0]) @ FullRank().factor(post.source.params[0]).mT,
        covariance,
    )
    # Every weight is the evidence: no spread, no tail.
    # The model adds constants in float32.
    assert float(post.log_evidence.value) == pytest.approx(float(evidence), abs=1e-6)
    assert float(post.sample_stats["bound_se"]) < 1e-8
    assert float(post.sample_stats["pareto_k"]) == -math.inf


def test_damped_steps_shrink_the_distance_by_their_rate():
    """On a normal target precision errors fall by (1 - rate) a step, whatever the draws."""
    target = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=F64)
    centre = torch.tensor([1.0, -3.0], dtype=F64)

    def log_density(x):
        gap = x - centre
        return -0.5 * (gap @ target * gap).sum(-1)

    loc, factor = torch.zeros(2, dtype=F64), 0.3 * torch.eye(2, dtype=F64)
    start = torch.cholesky_inverse(factor) - target
    for step in range(1, 6):
        draws = loc + antithetic(3, loc, stream(0, step)) @ factor.mT
        assert len(draws) == 4
        _, gradient, curvature = expected_derivatives(log_density, draws)
        torch.testing.assert_close(curvature, -target)
        loc, factor = natural_step(loc, factor, gradient, curvature, 0.3)
        torch.testing.assert_close(torch.cholesky_inverse(factor) - target, 0.7**step * start)


def test_a_target_that_is_not_concave_keeps_the_precision_positive():
    """At a saddle the plain update has a negative eigenvalue; the second-order one has not."""
    loc, factor = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    curvature = torch.diag(torch.tensor([3.0, -1.0], dtype=F64))
    _, new = natural_step(loc, factor, loc, curvature, 0.9)
    precision = torch.cholesky_inverse(new)
    change = -curvature - torch.eye(2, dtype=F64)
    expected = torch.eye(2, dtype=F64) + 0.9 * change + 0.5 * 0.81 * change @ change
    torch.testing.assert_close(precision, expected)
    assert float(torch.linalg.eigvalsh(precision).min()) > 0


def test_expected_derivatives_of_a_linear_part_are_zero():
    _, gradient, curvature = expected_derivatives(
        lambda x: x[:, 0] - x[:, 1].pow(3), torch.ones(4, 2, dtype=F64)
    )
    assert gradient.tolist() == [1.0, -3.0]
    assert curvature.tolist() == [[0.0, 0.0], [0.0, -6.0]]


def test_a_positive_site_by_natural_gradients():
    """The optimum over log-normals of a Gamma posterior: sd of the log is 1 / sqrt(a).

    E_q[a z - b e^z] with z ~ N(m, s^2): stationary where b e^(m + s^2/2) = a and 1 / s^2 = a.
    """
    a, b = RateModel().exact(Y.abs())
    sampler = SVI(steps=300, lr=0.3, decay=0.01, update="natural", particles=32, evidence_draws=50)
    post = pk.infer(RateModel(), Y.abs(), sampler, guide=FullRank(), rng=0)
    params = post.source.params[0]
    # The last steps average 32 draws with rate 0.003: an error of a percent of the sd.
    assert float(params["log_diagonal"].exp()) == pytest.approx(a**-0.5, rel=0.02)
    assert float(params["loc"]) == pytest.approx(math.log(a / b) - 0.5 / a, abs=0.02 * a**-0.5 * 3)


def test_natural_steps_on_minibatches():
    x, y = line_data(n=60)
    mean, covariance, _ = LineModel().exact((x, y))
    sampler = SVI(steps=600, lr=0.3, decay=0.005, update="natural", batch_size=20, particles=2)
    post = pk.infer(LineModel(), (x, y), sampler, guide=FullRank(), rng=0)
    law, sd = post.marginals["w"], covariance.diagonal().sqrt()
    assert float(((law.mean - mean) / sd).abs().max()) < 0.2
    assert float((law.stddev / sd).log().abs().max()) < 0.05
    assert post.log_evidence is None


@pytest.mark.parametrize(
    ("model", "data", "guide"), [(GroupModel(), Y, FullRank()), (RateModel(), Y.abs(), MeanField())]
)
def test_natural_steps_need_a_full_gaussian(model, data, guide):
    with pytest.raises(CapabilityError, match="needs the guide FullRank and a model without local"):
        pk.infer(model, data, SVI(update="natural", lr=0.5), guide=guide, rng=0)


# ------------------------------------------------------------------------------- convergence


def test_a_run_ends_when_the_bound_is_flat():
    sampler = SVI(steps=5000, lr=0.05, decay=1.0, window=100, chunk=40)
    post = pk.infer(LineModel(), line_data(), sampler, guide=FullRank(), rng=0, chains=2)
    assert post.attrs["converged"] is True and post.attrs["complete"] is True
    assert post.sample_stats["converged"].tolist() == [True, True]
    _, _, evidence = LineModel().exact(line_data())
    gap = float(evidence) - post.log_evidence.value
    assert bool((gap < 0.05).all())


def test_a_run_that_still_rises_is_said():
    sampler = SVI(steps=60, lr=0.01, window=20, evidence_draws=50)
    with pytest.warns(ConvergenceWarning, match=r"windows of 20 steps when steps=60 ran out"):
        post = pk.infer(LineModel(), line_data(), sampler, guide=FullRank(), rng=0)
    assert post.attrs["converged"] is False


def test_the_rule_counts_windows():
    """A trace that falls, rises within its error, and rises beyond it."""
    from probkit.inference.svi import _is_flat

    noise = torch.randn(200, generator=stream(0, "noise"), dtype=F64)
    ramp = torch.linspace(0, 1, 200, dtype=F64)
    assert _is_flat(noise - 5 * ramp) and _is_flat(torch.zeros(200, dtype=F64))
    assert not _is_flat(noise + 5 * ramp) and not _is_flat(ramp)


# ------------------------------------------------------------------------------- the fit's quality


def test_a_guide_that_misses_the_posterior_is_said():
    """Pareto k of a Gaussian that is far too narrow: log p / q is quadratic, k near (1 - s^2).

    With q of standard deviation s the weights have an exact Pareto tail of shape 1 - s^2 (in
    posterior units), above 0.7 at s = 0.4.
    """
    sampler = SVI(steps=1, lr=1e-9)
    mean, covariance, _ = LineModel().exact(line_data())

    class Narrow(FullRank):
        def init(self, model, data, *, rng):
            factor = 0.4 * torch.linalg.cholesky(covariance)
            return {
                "loc": mean,
                "log_diagonal": factor.diagonal().log(),
                "below": factor.tril(-1),
                "local": {},
            }

    with pytest.warns(NumericsWarning, match=r"Pareto k of the guide is 0\.\d\d, above 0\.7"):
        post = pk.infer(LineModel(), line_data(), sampler, guide=Narrow(), rng=0)
    assert 0.7 < float(post.sample_stats["pareto_k"]) < 1.0


def test_a_good_guide_passes_and_its_bound_has_an_error():
    sampler = SVI(steps=400, lr=0.05, decay=0.05, evidence_draws=4000)
    post = pk.infer(LineModel(), line_data(), sampler, guide=FullRank(), rng=0, chains=2)
    stats = post.sample_stats
    assert stats["pareto_k"].shape == stats["bound_se"].shape == (2,)
    assert bool((stats["pareto_k"] < 0.5).all())
    _, _, evidence = LineModel().exact(line_data())
    low = post.log_evidence.value - 4 * stats["bound_se"]
    assert bool((low < float(evidence)).all()) and bool((stats["bound_se"] > 0).all())
    exported = post.to_arviz(rng=0).sample_stats
    assert exported["pareto_k"].shape == (2,)


# ------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"importance": 0}, "importance >= 1"),
        ({"importance": 2, "batch_size": 3}, "importance=2 is a bound on full data only"),
        ({"gradient": "score"}, "expected gradient 'total' or 'path'"),
        ({"update": "newton"}, "update 'adam' or 'natural'"),
        ({"update": "natural", "lr": 1.5}, r"expects lr <= 1 and neither.* got lr=1\.5"),
        ({"update": "natural", "importance": 3}, "expects lr <= 1 and neither"),
        ({"update": "natural", "gradient": "path"}, "expects lr <= 1 and neither"),
        ({"window": 1}, "expected window >= 2 steps or None, got 1"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(DataError, match=f"^SVI: .*{text}"):
        SVI(**options)


def test_a_loader_has_no_importance_weighted_bound():
    def rows(epoch, generator):
        yield Batch(line_data(), None, 1.0)

    with pytest.raises(DataError, match="not on the batches of a Loader"):
        pk.infer(LineModel(), Loader(rows, example=line_data()), SVI(importance=2), rng=0)


def test_the_path_gradient_needs_a_density():
    class Bare:
        def init(self, model, data, *, rng):
            return MeanField().init(model, data, rng=rng)

        def sample(self, params, model, batch, n, *, rng):
            return MeanField().sample(params, model, batch, n, rng=rng)

    with pytest.raises(CapabilityError, match="needs the guide's log_prob; Bare lacks it"):
        pk.infer(LineModel(), line_data(), SVI(gradient="path"), guide=Bare(), rng=0)


def test_a_guide_with_its_own_bound_takes_no_other():
    class Own(MeanField):
        def elbo(self, params, model, batch, n, *, rng):
            return params["w"]["loc"].sum().expand(n)

    for options in ({"importance": 2}, {"gradient": "path"}):
        with pytest.raises(CapabilityError, match="Own brings a bound of its own"):
            pk.infer(LineModel(), line_data(), SVI(**options), guide=Own(), rng=0)


def test_processes_need_a_group():
    with pytest.raises(DataError, match="expected a process group, got none"):
        pk.infer(LineModel(), line_data(), SVI(distributed=True), rng=0)


# ------------------------------------------------------------------------------- Pyro programs


def line_program(x, y=None):
    """LineModel, of two columns, as a Pyro program."""
    w = pyro.sample("w", dist.Normal(x.new_zeros(2), 1.5).to_event(1))
    with pyro.plate("row", len(x)) as index:
        pyro.sample("y", dist.Normal(x[index] @ w, 0.5), obs=None if y is None else y[index])


@pytest.mark.parametrize(
    "options",
    [
        {"update": "natural", "lr": 1.0, "steps": 1},
        {"importance": 4, "steps": 20},
        {"gradient": "path", "importance": 4, "steps": 20},
        {"gradient": "path", "batch_size": 3, "steps": 20},
        {"update": "natural", "batch_size": 3, "lr": 0.1, "steps": 20},
    ],
    ids=str,
)
def test_a_pyro_program_is_fitted_as_its_native_twin(options):
    x, y = line_data()
    sampler = SVI(**{"evidence_draws": 50, **options})
    native = pk.infer(LineModel(), (x, y), sampler, guide=FullRank(), rng=0)
    program = pk.FromPyro(line_program, minibatch_plate="row")
    found = pk.infer(program, {"x": x, "y": y}, sampler, guide=FullRank(), rng=0)
    for name in ("loc", "log_diagonal", "below"):
        torch.testing.assert_close(
            found.source.params[0][name], native.source.params[0][name], rtol=1e-6, atol=1e-8
        )

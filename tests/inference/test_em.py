"""EM: brute-force optima, monotone objectives, restarts, SQUAREM, posterior modes, errors."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from scipy.optimize import minimize
from torch.distributions import constraints

from probkit import infer
from probkit.errors import CapabilityError, ConvergenceWarning, DataError, NumericsWarning
from probkit.files import storable
from probkit.inference.em import EM
from probkit.model import Model, Site


@storable
@dataclass(frozen=True)
class Mixture(Model):
    """A mixture of two normals on the line; parameters may carry leading dims [restart]."""

    spread: float = 1.0
    batched_em = True

    def sites(self, data):
        return {
            "weights": Site((2,), constraints.simplex, ("component",)),
            "means": Site((2,), constraints.real, ("component",)),
            "variances": Site((2,), constraints.positive, ("component",)),
        }

    def em_init(self, data, *, rng):
        means = data[torch.randperm(len(data), generator=rng)[:2]]
        half = torch.full((2,), 0.5, dtype=data.dtype)
        return {
            "weights": half,
            "means": means,
            "variances": self.spread * data.var() * (half + 0.5),
        }

    def log_terms(self, params, data):
        mean, variance = params["means"].unsqueeze(-2), params["variances"].unsqueeze(-2)
        square = (data.unsqueeze(-1) - mean).square() / variance
        return params["weights"].log().unsqueeze(-2) - 0.5 * (
            square + variance.log() + math.log(2 * math.pi)
        )

    def e_step(self, params, data):
        terms = self.log_terms(params, data)
        total = terms.logsumexp(-1, keepdim=True)
        r = (terms - total).exp()
        x = data.unsqueeze(-1)
        sums = {"n": r.sum(-2), "x": (r * x).sum(-2), "xx": (r * x.square()).sum(-2)}
        return sums, total.sum((-1, -2))

    def m_step(self, stats, data):
        mean = stats["x"] / stats["n"]
        return {
            "weights": stats["n"] / len(data),
            "means": mean,
            "variances": stats["xx"] / stats["n"] - mean.square(),
        }


class Looped(Mixture):
    """The same without batches."""

    batched_em = False


def mixture_data(gap=1.2, n=300):
    g = torch.Generator().manual_seed(0)
    component = (torch.rand(n, generator=g) < 0.35).double()
    return (
        gap * component * 2 - gap + torch.randn(n, generator=g).double() * (0.6 + 0.5 * component)
    )


def best_by_search(y):
    """Largest mixture log likelihood found by quasi-Newton search from many starts."""

    def negative(flat):
        weights = torch.softmax(flat[:2], 0)
        params = {"weights": weights, "means": flat[2:4], "variances": flat[4:].exp()}
        return -Mixture().log_terms(params, y).logsumexp(-1).sum()

    def with_gradient(x):
        flat = torch.tensor(x, requires_grad=True)
        value = negative(flat)
        value.backward()
        return value.item(), flat.grad.numpy()

    g = torch.Generator().manual_seed(1)
    found = []
    for _ in range(15):
        start = torch.cat(
            [torch.zeros(2), 2 * torch.randn(2, generator=g), torch.zeros(2)]
        ).double()
        found.append(minimize(with_gradient, start.numpy(), jac=True, method="L-BFGS-B").fun)
    return -min(found)


@pytest.mark.parametrize("model", [Mixture(), Looped()])
@pytest.mark.parametrize("accelerate", [None, "squarem"])
def test_mixture_reaches_the_best_optimum(model, accelerate):
    y = mixture_data()
    options = EM(max_iter=3000, tolerance=1e-11, restarts=6, accelerate=accelerate)
    post = infer(model, y, options, rng=0)
    assert post.is_point_estimate
    assert {k: tuple(v.shape) for k, v in post.draws.items()} == {
        "weights": (1, 1, 2),
        "means": (1, 1, 2),
        "variances": (1, 1, 2),
    }
    stats = post.sample_stats
    best = best_by_search(y)
    assert float(stats["objective"].max()) == pytest.approx(best, abs=1e-5)
    values = {name: value[0, 0] for name, value in post.draws.items()}
    assert float(Mixture().e_step(values, y)[1]) == pytest.approx(best, abs=1e-5)
    assert not bool(stats["drops"].any())


def check_monotone(post):
    trace = post.sample_stats["objective_trace"]
    rises = trace.diff(dim=-1)
    assert bool((rises[~rises.isnan()] >= -1e-8 * trace[0, 0, 0].abs()).all())


def test_batched_restarts_equal_a_loop():
    y = mixture_data()
    batched = infer(Mixture(), y, EM(restarts=4, max_iter=300, tolerance=1e-7), rng=3)
    looped = infer(Looped(), y, EM(restarts=4, max_iter=300, tolerance=1e-7), rng=3)
    for name, value in batched.sample_stats.items():
        assert torch.allclose(
            value.double(), looped.sample_stats[name].double(), atol=1e-8, equal_nan=True
        )
    assert torch.allclose(batched.draws["means"], looped.draws["means"])
    check_monotone(batched)


def test_restarts_do_not_depend_on_their_number():
    y = mixture_data()
    few = infer(Looped(), y, EM(restarts=2, max_iter=300), rng=3).sample_stats["objective"]
    many = infer(Looped(), y, EM(restarts=4, max_iter=300), rng=3).sample_stats["objective"]
    assert torch.equal(few[0], many[0, :2])


def test_squarem_is_faster_and_as_good():
    y = mixture_data(gap=0.7)
    runs = {
        accelerate: infer(
            Mixture(),
            y,
            EM(max_iter=20000, tolerance=1e-12, accelerate=accelerate),
            rng=2,
        )
        for accelerate in (None, "squarem")
    }
    steps = {k: int(post.sample_stats["iterations"].max()) for k, post in runs.items()}
    best = {k: float(post.sample_stats["objective"].max()) for k, post in runs.items()}
    assert steps["squarem"] < 0.5 * steps[None]
    assert best["squarem"] == pytest.approx(best[None], abs=1e-6)
    check_monotone(runs["squarem"])


class WildMixture(Mixture):
    """An M-step that does not maximise: it pulls the means to the origin."""

    def m_step(self, stats, data):
        new = super().m_step(stats, data)
        return {**new, "means": new["means"] * 0.3}


def test_a_falling_objective_warns_once():
    with pytest.warns(ConvergenceWarning, match="the objective fell from") as caught:
        post = infer(WildMixture(), mixture_data(), EM(tolerance=1e-4, restarts=3), rng=0)
    assert sum("objective fell" in str(w.message) for w in caught) == 1
    assert int(post.sample_stats["drops"].sum()) > 0
    with pytest.raises(AssertionError):
        check_monotone(post)


@storable
@dataclass(frozen=True)
class RoundedMixture(Mixture):
    """Log likelihoods off by some 25 units of float32 rounding, as long sums are."""

    def e_step(self, params, data):
        stats, log_likelihood = super().e_step(params, data)
        error = 3e-6 * torch.sin(1e7 * params["means"][..., 0].double())
        return stats, log_likelihood.double() * (1 + error)


def test_rounding_is_no_fall_at_the_precision_of_the_parameters():
    options = EM(max_iter=60, tolerance=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "EM on .*: no restart of chain", ConvergenceWarning)
        single = infer(RoundedMixture(), mixture_data().float(), options, rng=0).sample_stats
        trace = single["objective_trace"]
        assert float((trace.diff(dim=-1) / trace[..., 1:].abs()).min()) < -1e-6
        assert not bool(single["drops"].any())
        with pytest.warns(ConvergenceWarning, match="the objective fell from"):
            infer(RoundedMixture(), mixture_data(), options, rng=0)
    with pytest.warns(ConvergenceWarning, match="the objective fell from"):
        infer(WildMixture(), mixture_data().float(), EM(tolerance=1e-4), rng=0)


def test_not_converged_warns():
    with pytest.warns(ConvergenceWarning, match="no restart of chain 0, 1 converged within max_it"):
        post = infer(Mixture(), mixture_data(), EM(max_iter=3, tolerance=0.0), rng=0, chains=2)
    assert post.sample_stats["objective_trace"].shape == (2, 1, 3)


# --------------------------------------------------------------------------- MAP, other parameters


class ZipParams(NamedTuple):
    zero: torch.Tensor
    rate: torch.Tensor


@dataclass(frozen=True)
class ZeroInflatedPoisson(Model):
    """y is 0 with probability ``zero``, else Poisson; Beta and Gamma priors when asked for."""

    prior: bool = False

    def sites(self, data):
        return {"zero": Site((), constraints.unit_interval), "rate": Site((), constraints.positive)}

    def em_init(self, data, *, rng):
        u = torch.rand(2, generator=rng, dtype=torch.float64)
        return ZipParams(u[0], 1 + 3 * u[1])

    def em_values(self, params):
        return params._asdict()

    def terms(self, params, data):
        poisson = data * params.rate.log() - params.rate - torch.lgamma(data + 1)
        inflated = torch.where(data == 0, params.zero.log(), -math.inf)
        return inflated, (-params.zero).log1p() + poisson

    def e_step(self, params, data):
        inflated, counted = self.terms(params, data)
        total = torch.logaddexp(inflated, counted)
        return (inflated - total).exp(), total.sum()

    def m_step(self, stats, data):
        a, b, shape, rate = (3.0, 2.0, 2.0, 1.5) if self.prior else (1.0, 1.0, 1.0, 0.0)
        extra, n = stats.sum(), len(data)
        return ZipParams(
            (extra + a - 1) / (n + a + b - 2),
            (((1 - stats) * data).sum() + shape - 1) / (n - extra + rate),
        )


class PenalisedZip(ZeroInflatedPoisson):
    def log_prior(self, values):
        zero, rate = values["zero"], values["rate"]
        return 2 * zero.log() + (-zero).log1p() + rate.log() - 1.5 * rate


Y = torch.tensor([0, 0, 3, 0, 1, 2, 0, 4, 0, 0, 2, 5, 0, 0, 1, 3]).double()


def best_on_a_grid(objective):
    """Brute force: the maximiser on a fine grid of (zero, rate), refined twice."""
    low, high = torch.tensor([0.01, 0.1]).double(), torch.tensor([0.95, 8.0]).double()
    for _ in range(6):
        axes = [
            torch.linspace(float(a), float(b), 61).double() for a, b in zip(low, high, strict=True)
        ]
        zero, rate = torch.meshgrid(*axes, indexing="ij")
        value = objective(zero, rate)
        k = int(value.argmax())
        centre = torch.stack([zero.flatten()[k], rate.flatten()[k]])
        width = (high - low) / 20
        low, high = torch.maximum(centre - width, low), torch.minimum(centre + width, high)
    return centre, float(value.max())


@pytest.mark.parametrize("prior", [False, True])
def test_zero_inflated_counts_against_a_grid(prior):
    model = PenalisedZip(True) if prior else ZeroInflatedPoisson()

    def objective(zero, rate):
        params = ZipParams(zero.unsqueeze(-1), rate.unsqueeze(-1))
        total = torch.logaddexp(*model.terms(params, Y)).sum(-1)
        return total + (model.log_prior({"zero": zero, "rate": rate}) if prior else 0.0)

    centre, best = best_on_a_grid(objective)
    post = infer(model, Y, EM(max_iter=2000, tolerance=1e-13), rng=0, chains=2)
    assert post.draws["zero"].shape == (2, 1)
    for name, answer in zip(("zero", "rate"), centre, strict=True):
        assert float((post.draws[name] - answer).abs().max()) < 1e-4
    assert float(post.sample_stats["objective"].max()) == pytest.approx(best, abs=1e-8)
    check_monotone(post)


def test_the_prior_can_be_left_out_of_the_objective():
    model = PenalisedZip(False)
    with pytest.warns(ConvergenceWarning, match="objective fell"):
        infer(model, Y, EM(tolerance=1e-9), rng=0)
    post = infer(model, Y, EM(tolerance=1e-9, map=False), rng=0)
    assert int(post.sample_stats["drops"].sum()) == 0
    with pytest.raises(CapabilityError, match=r"EM\(map=True\) needs log_prior"):
        infer(ZeroInflatedPoisson(), Y, EM(map=True), rng=0)


def test_squarem_needs_sites():
    with pytest.raises(CapabilityError, match="needs parameters that are the sites"):
        infer(ZeroInflatedPoisson(), Y, EM(accelerate="squarem"), rng=0)


# --------------------------------------------------------------------------- driver and errors


def test_resumes_bit_for_bit(tmp_path):
    y = mixture_data()
    options = EM(restarts=2, max_iter=60, tolerance=1e-6, accelerate="squarem")
    whole = infer(Mixture(), y, options, rng=1, chains=2)
    stop = [lambda info: info.step == 2]
    with pytest.warns(ConvergenceWarning, match="no restart"):
        infer(Mixture(), y, options, rng=1, chains=2, checkpoint=tmp_path, callbacks=stop)
    resumed = infer(Mixture(), y, options, rng=1, chains=2, checkpoint=tmp_path)
    assert torch.equal(whole.draws["means"], resumed.draws["means"])
    assert torch.equal(whole.sample_stats["iterations"], resumed.sample_stats["iterations"])


def test_the_posterior_is_saved_and_exported(tmp_path):
    from probkit import load

    post = infer(Mixture(), mixture_data(), EM(restarts=3), rng=0)
    post.save(tmp_path / "fit")
    again = load(tmp_path / "fit", model=Mixture())
    assert torch.equal(again.draws["means"], post.draws["means"])
    assert post.to_datatree()["sample_stats"]["objective"].shape == (1, 3)


class Collapsing(Mixture):
    """A component that collapses onto one point in some restarts."""

    def em_init(self, data, *, rng):
        start = super().em_init(data, rng=rng)
        bad = float(torch.rand((), generator=rng)) < 0.5
        return {**start, "variances": start["variances"] * (math.nan if bad else 1.0)}


def test_a_failed_restart_is_dropped():
    with pytest.warns(NumericsWarning, match="was dropped, its objective is NaN"):
        post = infer(Collapsing(), mixture_data(), EM(restarts=8), rng=0)
    failed = torch.isneginf(post.sample_stats["objective"])
    assert 0 < int(failed.sum()) < 8
    assert bool(torch.isfinite(post.draws["means"]).all())


class Hopeless(Mixture):
    def e_step(self, params, data):
        stats, total = super().e_step(params, data)
        return stats, torch.full_like(total, -math.inf)


def test_no_finite_start():
    with pytest.raises(DataError, match="no finite objective from 2 starts"):
        infer(Hopeless(), mixture_data(), EM(restarts=2), rng=0)


class OneLogLikelihood(Mixture):
    def e_step(self, params, data):
        stats, total = super().e_step(params, data)
        return stats, total.sum()


def test_batched_models_return_one_log_likelihood_per_restart():
    with pytest.raises(DataError, match="expected 3 log likelihoods, got shape"):
        infer(OneLogLikelihood(), mixture_data(), EM(restarts=3), rng=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iter": 0}, "whole max_iter and restarts >= 1"),
        ({"tolerance": -1.0}, "0 <= tolerance < inf"),
        ({"accelerate": "fast"}, "accelerate None or 'squarem', got 'fast'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        EM(**options)

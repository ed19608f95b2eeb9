"""MAP against closed forms."""

from __future__ import annotations

import pytest
import torch
from support.fits import GroupModel, LineModel, RateModel, line_data
from torch.distributions import constraints

import probkit as pk
from probkit.errors import CapabilityError, ConvergenceWarning, DataError
from probkit.inference import MAP
from probkit.model import Model, Site

Y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0], dtype=torch.float64)


def test_a_normal_posterior_peaks_at_its_mean():
    post = pk.infer(LineModel(), line_data(), MAP(tolerance=1e-9), rng=0)
    mean, _, _ = LineModel().exact(line_data())
    assert post.draws["w"].shape == (1, 1, 2)
    # A gradient below 1e-9 max(1, |lp|) over the smallest precision, 1 / prior^2.
    torch.testing.assert_close(post.draws["w"][0, 0], mean, rtol=0, atol=1e-7)
    expected = LineModel().log_joint({"w": mean}, line_data())
    torch.testing.assert_close(post.sample_stats["lp"][0, 0], expected)
    assert post.is_point_estimate and post.attrs["converged"] is True


@pytest.mark.parametrize(("jacobian", "shift"), [(False, 1.0), (True, 0.0)])
def test_the_mode_of_a_gamma_depends_on_the_density(jacobian, shift):
    """Gamma(a, b): mode (a - 1) / b of the value, and a / b of its logarithm's density."""
    a, b = RateModel().exact(Y)
    post = pk.infer(RateModel(), Y, MAP(jacobian=jacobian, tolerance=1e-9), rng=0)
    assert float(post.draws["rate"][0, 0]) == pytest.approx((a - shift) / b, abs=1e-7)


def test_locals_are_optimised_with_the_rest():
    post = pk.infer(GroupModel(), Y, MAP(tolerance=1e-9), rng=0)
    mean, _, _ = GroupModel().exact(Y)
    torch.testing.assert_close(post.draws["mu"][0, 0], mean[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(post.draws["z"][0, 0], mean[1:], rtol=0, atol=1e-6)


class TwoHills(Model):
    """Modes at -2 (lower) and 3 (higher)."""

    def sites(self, data):
        return {"x": Site((), constraints.real)}

    def log_joint(self, values, data, *, scale=1.0):
        x = values["x"]
        low, high = -2 * (x + 2).square(), 4.0 - 2 * (x - 3).square()
        return torch.logaddexp(low, high)


def test_restarts_find_the_higher_mode():
    found = [
        float(pk.infer(TwoHills(), Y, MAP(restarts=r), rng=1, chains=8).draws["x"].min())
        for r in (1, 12)
    ]
    assert found[0] == pytest.approx(-2, abs=1e-3), "one start misses it in some chain"
    assert found[1] == pytest.approx(3, abs=1e-3)


class Quartic(TwoHills):
    def log_joint(self, values, data, *, scale=1.0):
        return -1e4 * (values["x"] - 1.2345).abs() ** 1.5


def test_an_unconverged_run_warns_for_any_chain():
    with pytest.warns(ConvergenceWarning, match=r"tolerance=1e-06 .* raise max_iter$"):
        post = pk.infer(Quartic(), Y, MAP(max_iter=2, restarts=1), rng=0, chains=3)
    assert post.attrs["converged"] is False
    assert post.sample_stats["converged"].shape == (3, 1)


@pytest.mark.parametrize(("max_iter", "chunk"), [(7, 3), (6, 3), (2, 5)])
def test_max_iter_is_kept(max_iter, chunk):
    """The evaluations of L-BFGS are bounded by its iterations, whatever the chunks."""
    steps = []
    sampler = MAP(restarts=1, max_iter=max_iter, chunk=chunk, tolerance=1e-300)
    with pytest.warns(ConvergenceWarning):
        post = pk.infer(Quartic(), Y, sampler, rng=0, callbacks=[steps.append])
    assert len(steps) <= -(-max_iter // chunk) and bool(torch.isfinite(post.draws["x"]).all())


def test_the_memory_crosses_the_chunks():
    """L-BFGS in chunks of one iteration needs no more of them than in one piece."""
    steps = []
    sampler = MAP(restarts=1, chunk=1)
    post = pk.infer(LineModel(width=6), line_data(20, 6), sampler, rng=0, callbacks=[steps.append])
    mean, covariance, _ = LineModel(width=6).exact(line_data(20, 6))
    # Error = covariance @ gradient, every entry of it below tolerance * |lp|.
    bound = 1e-6 * float(post.sample_stats["lp"].abs()) * float(covariance.abs().sum(1).max())
    assert float((post.draws["w"][0, 0] - mean).abs().max()) <= bound
    assert len(steps) <= 20, "without memory it would be steepest descent"


def test_a_model_without_sites():
    class Empty(TwoHills):
        def sites(self, data):
            return {}

    with pytest.raises(CapabilityError, match="Empty has no sites to optimise"):
        pk.infer(Empty(), Y, MAP(), rng=0)


def test_a_density_that_is_nowhere_finite():
    class Nowhere(TwoHills):
        def log_joint(self, values, data, *, scale=1.0):
            return values["x"] * 0 - torch.inf

    with pytest.raises(DataError, match="not finite at any starting point"):
        pk.infer(Nowhere(), Y, MAP(), rng=0)


@pytest.mark.parametrize(
    "wrong", [{"restarts": 0}, {"max_iter": 0}, {"chunk": 0}, {"tolerance": 0.0}]
)
def test_options_are_checked(wrong):
    with pytest.raises(DataError, match=r"^MAP: expected restarts, max_iter and chunk >= 1"):
        MAP(**wrong)


def test_a_step_to_where_the_model_overflows_is_no_error():
    class Cliff(Model):
        batched = True

        def sites(self, data):
            return {"a": Site((), constraints.real)}

        def log_joint(self, values, data, *, scale=1.0):
            a = values["a"]
            if bool((a > 3.0).any()):
                raise DataError("matrix must be finite, got inf")
            return 40.0 * a - a.exp()

    with pytest.warns(ConvergenceWarning):
        post = pk.infer(Cliff(), torch.zeros(1), MAP(restarts=2), rng=0)
    assert float(post.sample_stats["lp"]) == pytest.approx(
        float(Cliff().log_joint({"a": post.draws["a"]}, None))
    )

"""What cannot be run is refused by name, and what ran badly is said."""

from __future__ import annotations

import math

import pytest
import torch
from support.fits import LineModel, line_data
from torch.distributions import constraints

import probkit as pk
from probkit.errors import CapabilityError, ConvergenceWarning, DataError, ShapeError
from probkit.inference import SGHMC, SGLD
from probkit.model import Model, Site

DATA = torch.zeros(1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"draws": 0}, r"expected draws, thin, chunk, batch_size and block >= 1.*got 0, "),
        ({"thin": 0}, "expected draws, thin"),
        ({"chunk": 0}, "expected draws, thin"),
        ({"batch_size": 0}, "expected draws, thin"),
        ({"block": 0}, "expected draws, thin"),
        ({"warmup": -1}, "warmup >= 0, got"),
        ({"step_size": 0.0}, r"expected step_size > 0, got 0\.0"),
        ({"step_size": math.inf}, "expected step_size > 0, got inf"),
    ],
)
@pytest.mark.parametrize("kind", [SGLD, SGHMC])
def test_options_are_checked(kind, options, text):
    with pytest.raises(DataError, match=f"^{kind.__name__}: .*{text}"):
        kind(**options)


@pytest.mark.parametrize("friction", [0.0, -0.1, 1.1, math.nan])
def test_friction_is_a_share(friction):
    with pytest.raises(DataError, match=r"SGHMC: expected friction in \(0, 1\], got"):
        SGHMC(friction=friction)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (torch.ones(3), ShapeError, r"expected the diagonal \[D=2\].*, got \(3,\)"),
        (torch.eye(2), ShapeError, r"expected the diagonal \[D=2\].*, got \(2, 2\)"),
        (torch.tensor([1.0, 0.0]), DataError, "expected finite entries > 0"),
        (torch.tensor([1.0, torch.nan]), DataError, "expected finite entries > 0"),
    ],
)
def test_the_preconditioner_is_checked(given, error, text):
    with pytest.raises(error, match=text):
        pk.infer(LineModel(), line_data(), SGLD(5, warmup=2, preconditioner=given), rng=0)


def test_a_run_that_diverges_names_the_site():
    """Far beyond the stability limit 4 / precision the position grows without bound."""
    sampler = SGLD(2000, warmup=0, step_size=50.0, precondition=False)
    with pytest.raises(
        DataError,
        match=r"SGLD: the log density, with site 'w' furthest out, is not finite in chain 0 "
        r"after step \d+; lower step_size=50, take",
    ):
        pk.infer(LineModel(), line_data(), sampler, rng=0)


def test_only_the_site_at_fault_is_named():
    class Edge(Model):
        """sqrt(1.5 - b) has no value, and no gradient, for b above 1.5."""

        def sites(self, data):
            return {name: Site((), constraints.real) for name in "abc"}

        def log_joint(self, values, data, *, scale=1.0):
            hill = -0.5 * sum(v.square() for v in values.values())
            return hill + 0.0 * (1.5 - values["b"]).sqrt()

        def initial_values(self, data, n, *, rng):
            return {name: torch.zeros(n, dtype=torch.float64) for name in "abc"}

    sampler = SGLD(2000, warmup=0, step_size=0.5, precondition=False)
    with pytest.raises(DataError, match="the gradient for site 'b' is not finite"):
        pk.infer(Edge(), DATA, sampler, rng=0)


def test_a_model_without_sites_is_refused():
    class Empty(Model):
        def sites(self, data):
            return {}

        def log_joint(self, values, data, *, scale=1.0):
            return torch.zeros(())

    with pytest.raises(CapabilityError, match="SGHMC: Empty has no sites to sample"):
        pk.infer(Empty(), DATA, SGHMC(), rng=0)


def test_a_start_outside_the_density_names_the_site():
    class Nowhere(LineModel):
        def log_joint(self, values, data, *, scale=1.0):
            return super().log_joint(values, data) + (values["w"][..., 0] - 1e9).log()

    with pytest.raises(DataError, match=r"starting point of chain 0, because of site 'w'"):
        pk.infer(Nowhere(), line_data(), SGLD(5), rng=0)


def test_friction_that_cannot_take_the_noise_is_said():
    """2 friction m < step^2: the noise term of the update would be negative."""
    sampler = SGHMC(20, warmup=5, step_size=0.5, friction=0.05)
    with pytest.warns(ConvergenceWarning, match="exceeded what friction removes"):
        post = pk.infer(LineModel(), line_data(), sampler, rng=0)
    assert float(post.sample_stats["noise_cut"][0]) > 0.5


def test_chains_that_disagree_are_said():
    sampler = SGLD(100, warmup=0, step_size=1e-7, precondition=False)
    with pytest.warns(ConvergenceWarning, match=r"chains disagree .*for 'w', expected below 1\.1"):
        pk.infer(LineModel(), line_data(), sampler, rng=0, chains=4)


def test_a_warm_start_begins_at_a_draw():
    x, y = line_data()
    mean, covariance, _ = LineModel().exact((x, y))
    first = pk.infer(LineModel(), (x, y), SGLD(50, warmup=200, step_size=0.05), rng=0)
    again = SGLD(1, warmup=0, step_size=1e-12, start=first)
    post = pk.infer(LineModel(), (x, y), again, rng=1)
    gap = (first.draws["w"][0] - post.draws["w"][0, 0]).abs().amax(-1).min()
    assert float(gap) < 1e-4


def test_statistics_go_to_arviz():
    post = pk.infer(LineModel(), line_data(), SGHMC(10, warmup=5), rng=0, chains=2)
    stats = post.to_arviz().sample_stats
    assert dict(stats["lp"].sizes) == {"chain": 2, "draw": 10}
    values = {name: value.flatten(0, 1) for name, value in post.draws.items()}
    # On full data lp is the log density at the very draw (no constraint: no Jacobian).
    expected = LineModel().log_joint(values, line_data()).reshape(2, 10)
    torch.testing.assert_close(post.sample_stats["lp"], expected)
    assert float(stats["step_size"].min()) == float(stats["step_size"].max()) == 0.01

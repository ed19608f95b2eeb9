"""Calibration tools: exact laws by enumeration, right posteriors pass, wrong ones are caught."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binomtest, chisquare
from support.fits import Metropolis
from support.models import ConjugateNormal
from torch.distributions import Normal, constraints

import probkit as pk
from probkit.calibration import (
    SBC,
    Coverage,
    chi_square_p_value,
    clopper_pearson,
    coverage,
    coverage_on,
    ecdf_band,
    ecdf_p_value,
    geweke,
    sbc,
    transition_of,
    wilson,
)
from probkit.errors import CapabilityError, ConvergenceWarning, DataError, ShapeError
from probkit.files import storable
from probkit.inference import HMC, MAP, Direct, ImportanceSampling
from probkit.model import Site
from probkit.plots import coverage_plot, ecdf_difference_plot, figure, rank_plot
from probkit.predictive import Analytic
from probkit.rng import stream
from probkit.sources import Closed

# --------------------------------------------------------------------- uniformity, by enumeration


def outcomes(replicates, draws):
    return [np.array(ranks) for ranks in itertools.product(range(draws + 1), repeat=replicates)]


@pytest.mark.parametrize(("replicates", "draws"), [(1, 3), (4, 1), (4, 3), (5, 2)])
def test_p_values_are_exact(replicates, draws):
    """P(p-value <= a) = a at every value a that the p-value takes: enumerated, not simulated."""
    p = np.array([ecdf_p_value(ranks, draws) for ranks in outcomes(replicates, draws)])
    for value in np.unique(p.round(10)):
        assert np.mean(p <= value + 1e-9) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(("replicates", "draws"), [(4, 3), (5, 2), (6, 1)])
@pytest.mark.parametrize("level", [0.3, 0.8])
def test_bands_hold_as_often_as_stated_and_are_no_wider_than_needed(replicates, draws, level):
    band = ecdf_band(replicates, draws, level)
    shares = np.array(
        [(ranks[:, None] <= band.rank).mean(0) for ranks in outcomes(replicates, draws)]
    )
    inside = ((shares >= band.low - 1e-12) & (shares <= band.high + 1e-12)).all(1)
    assert inside.mean() >= level
    # The p-value below which the band ends is the next smaller one that there is.
    p = np.array([ecdf_p_value(ranks, draws) for ranks in outcomes(replicates, draws)])
    assert p[~inside].max(initial=0.0) <= 1 - level + 1e-9
    assert p[inside].min() > 1 - level - 1e-9


def test_large_bands_hold_as_often_as_stated():
    ranks = np.random.default_rng(0).integers(0, 100, (4000, 60))
    band = ecdf_band(60, 99)
    shares = (ranks[:, :, None] <= band.rank).mean(1)
    held = ((shares >= band.low - 1e-12) & (shares <= band.high + 1e-12)).all(1).mean()
    # 95 % or a little more, since counts are discrete; four standard errors are 0.014.
    assert 0.936 < held < 0.98


def test_chi_square_is_pearsons():
    ranks = np.random.default_rng(1).integers(0, 20, 200)
    observed = np.bincount(ranks // 2, minlength=10)
    assert chi_square_p_value(ranks, 19, bins=10) == pytest.approx(chisquare(observed).pvalue)
    # Bins of unequal width have unequal expectations: 7 ranks in 3 bins are 2 + 3 + 2.
    uneven = np.repeat(np.arange(7), 10)
    assert chi_square_p_value(uneven, 6, bins=3) == pytest.approx(1.0)


@pytest.mark.parametrize("p_value", [chi_square_p_value, ecdf_p_value])
@pytest.mark.parametrize("shape", ["shifted", "narrow", "wide"])
def test_wrong_ranks_are_rejected(p_value, shape):
    generator = np.random.default_rng(2)
    normal = generator.normal(size=(300, 100))
    change = {
        "shifted": lambda truth: truth + 0.5,
        "narrow": lambda truth: 2.0 * truth,
        "wide": lambda truth: 0.5 * truth,
    }[shape]
    ranks = (normal[:, 1:] < change(normal[:, :1])).sum(1)
    assert p_value(ranks, 99) < 1e-4
    assert p_value((normal[:, 1:] < normal[:, :1]).sum(1), 99) > 1e-3


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: ecdf_p_value([0, 5], 4), "ranks from 0 to draws=4, got 0 to 5"),
        (lambda: ecdf_p_value([0.5], 4), "whole numbers"),
        (lambda: ecdf_p_value([], 4), "at least one replicate and one draw, got 0"),
        (lambda: chi_square_p_value([0, 1, 2], 4), "two bins need 10 replicates"),
        (lambda: ecdf_band(10, 4, 1.0), "level between 0 and 1"),
    ],
)
def test_uniformity_is_refused_by_name(call, match):
    with pytest.raises(DataError, match=match):
        call()


@pytest.mark.parametrize("successes", [0, 1, 7, 20])
def test_intervals_are_scipys(successes):
    test = binomtest(successes, 20)
    exact, score = test.proportion_ci(0.9, "exact"), test.proportion_ci(0.9, "wilson")
    assert clopper_pearson(successes, 20, 0.9) == pytest.approx((exact.low, exact.high))
    assert wilson(successes, 20, 0.9) == pytest.approx((score.low, score.high))
    with pytest.raises(DataError, match="successes <= trials"):
        wilson(21, 20)


# ------------------------------------------------------------------------------------------- SBC


def pair(generator, rows=3):
    mu = 2.0 * torch.randn((), generator=generator, dtype=torch.float64)
    return {"mu": mu}, mu + torch.randn(rows, generator=generator, dtype=torch.float64)


@storable
@dataclass(frozen=True)
class Wrong(ConjugateNormal):
    """A posterior that is moved, rescaled, or the prior."""

    shift: float = 0.0
    scale: float = 1.0
    prior_only: bool = False

    def condition(self, data, hyper=None):
        post = super().condition(data)
        law = post.marginals["mu"]
        law = Normal(law.mean + self.shift * law.stddev, self.scale * law.stddev)
        if self.prior_only:
            law = Normal(torch.zeros(()).double(), self.prior_sd)
        return replace(post, source=Closed({"mu": law}), marginals={"mu": law})


def calibrated(model, n=150, **options):
    return sbc(model, Direct(), n=n, draws=49, rng=3, simulate=pair, **options)


def test_an_exact_posterior_is_calibrated():
    result = calibrated(ConjugateNormal())
    assert set(result.ranks) == {"mu", "log_joint"}
    assert result.passed(0.01)
    assert min(result.p_values("chi2").values()) > 1e-3
    table = result.summary()
    # Mean and spread of uniform ranks, four standard errors over 150 replicates.
    assert abs(table.loc["mu", "centre"] - 1) < 4 * (1 / 3 / 150) ** 0.5
    assert abs(table.loc["mu", "spread"] - 1) < 4 * (0.2 / 150) ** 0.5
    row = result.coverage().table((0.9,)).loc[("mu", 0.9)]
    assert row["low"] < 0.9 < row["high"]
    assert result.complete and result.replicates == 150
    assert "150 replicates, 2 quantities" in repr(result)


@pytest.mark.parametrize(
    "options", [{"shift": 0.7}, {"scale": 0.5}, {"scale": 2.0}], ids=["shift", "half", "double"]
)
def test_wrong_posteriors_are_caught(options):
    result = calibrated(Wrong(**options))
    assert not result.passed(1e-4)
    table = result.summary().loc["mu"]
    if "shift" in options:
        assert table["centre"] < 0.8  # the posterior lies too high, the truth ranks low
    else:
        assert (table["spread"] > 1) == (options["scale"] < 1)


def test_a_posterior_that_ignores_the_data_is_caught_by_the_log_joint_alone():
    result = calibrated(Wrong(prior_only=True))
    p = result.p_values()
    assert p["mu"] > 1e-3 and p["log_joint"] < 1e-6


def test_replicates_do_not_depend_on_their_number_or_the_executor():
    few, many = calibrated(ConjugateNormal(), n=5), calibrated(ConjugateNormal(), n=12)
    with ThreadPoolExecutor(3) as executor:
        spread = calibrated(ConjugateNormal(), n=12, executor=executor)
    for name in few.ranks:
        assert torch.equal(many.ranks[name][:5], few.ranks[name])
        assert torch.equal(many.ranks[name], spread.ranks[name])
    assert not torch.equal(many.ranks["mu"], many.ranks["mu"].roll(1))


def test_own_quantities_are_ranked():
    def quantities(values, data):
        return {"distance": (values["mu"] - data.mean()).abs()}

    result = calibrated(ConjugateNormal(), quantities=quantities)
    assert set(result.ranks) == {"distance"} and result.passed()
    with pytest.raises(ShapeError, match=r"quantities: expected 'bad' \[n=50\], got \(\)"):
        calibrated(ConjugateNormal(), n=1, quantities=lambda v, d: {"bad": torch.zeros(())})


def program(x, y=None):
    mu = pyro.sample("mu", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("row", len(x)):
        pyro.sample("obs", dist.Normal(mu + x, 1.0), obs=y)


def program_model():
    x = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    return pk.FromPyro(program, observed={"y": "obs"}, inputs={"x": x})


def test_pyro_programs_simulate_themselves():
    sampler = ImportanceSampling(400, proposal="prior")
    result = sbc(program_model(), sampler, n=60, draws=19, rng=0)
    assert set(result.ranks) == {"mu", "log_joint"} and result.passed()


@dataclass(frozen=True)
class Interrupted(Metropolis):
    """Ctrl-C comes in the fit of one replicate."""

    at: tuple[int, ...] = ()
    seen = [0]

    def init(self, problem, *, rngs):
        self.seen[0] += 1
        if self.seen[0] in self.at:
            raise KeyboardInterrupt
        return super().init(problem, rngs=rngs)


def test_ctrl_c_keeps_the_replicates_so_far():
    sampler = Interrupted(draws=60, at=(4,))
    sampler.seen[0] = 0
    with pytest.warns(ConvergenceWarning, match="autocorrelated"):
        result = sbc(ConjugateNormal(), sampler, n=10, draws=40, rng=0, simulate=pair)
    assert result.replicates == 3 and not result.complete
    sampler.seen[0] = 3
    with pytest.raises(KeyboardInterrupt):
        sbc(ConjugateNormal(), sampler, n=10, draws=40, rng=0, simulate=pair)


def test_autocorrelated_draws_are_warned_of():
    timid = Metropolis(draws=200, size=0.1)
    with pytest.warns(ConvergenceWarning, match=r"in 4 of 4 replicates the 99 draws are autocorr"):
        sbc(ConjugateNormal(), timid, n=4, draws=99, rng=0, simulate=pair)


def test_what_cannot_be_calibrated_is_refused():
    with pytest.raises(CapabilityError, match="ConjugateNormal lacks sample_dataset.*simulate="):
        sbc(ConjugateNormal(), Direct(), n=2, rng=0)
    with pytest.raises(CapabilityError, match="MAP gives a point estimate"):
        sbc(ConjugateNormal(), MAP(restarts=1), n=2, rng=0, simulate=pair)
    with pytest.raises(DataError, match="at least draws=99 posterior draws.* 1 chains of 50"):
        sbc(ConjugateNormal(), Metropolis(), n=2, rng=0, simulate=pair)
    with pytest.raises(ShapeError, match=r"expected site 'mu' of shape \(\), got \(1,\)"):
        sbc(
            ConjugateNormal(),
            Direct(),
            n=2,
            rng=0,
            simulate=lambda g: ({"mu": torch.zeros(1)}, torch.zeros(3)),
        )
    with pytest.raises(DataError, match="n: expected a whole number"):
        sbc(ConjugateNormal(), Direct(), n=0, rng=0, simulate=pair)
    with pytest.raises(DataError, match="test='ecdf' or 'chi2', got 'ks'"):
        SBC({"a": torch.tensor([1])}, 3, torch.ones(1)).p_values("ks")


def test_a_failing_fit_says_which_replicate():
    class Fails(ConjugateNormal):
        def condition(self, data, hyper=None):
            raise DataError("no")

    with pytest.raises(DataError) as caught:
        sbc(Fails(), Direct(), n=2, rng=5, simulate=pair)
    assert caught.value.__notes__ == ["in replicate 0 of the calibration, rng=5"]


# -------------------------------------------------------------------------------------- coverage


def covered(model, **options):
    return coverage(
        model, Direct(), n=150, draws=99, rng=4, simulate=pair, inputs=len, **options
    ).table((0.5, 0.9))


def test_latents_and_predictions_are_covered():
    table = covered(ConjugateNormal())
    assert set(table.index.get_level_values("name")) == {"mu", "prediction"}
    nominal = table.index.get_level_values("level")
    # Four intervals at 95 %, independent enough that one miss would be an accident of the seed.
    assert (table["low"] < nominal).all() and (table["high"] > nominal).all()


def test_coverage_sees_narrow_posteriors():
    table = covered(Wrong(scale=0.4))
    assert table.loc[("mu", 0.9), "high"] < 0.9
    # |z| < 1.645 of a law 0.4 times as wide: exact coverage 2 Phi(0.4 * 1.645) - 1.
    exact = 2 * float(Normal(0.0, 1.0).cdf(torch.tensor(0.4 * 1.6449))) - 1
    row = table.loc[("mu", 0.9)]
    assert row["low"] < exact < row["high"]


def test_coverage_sees_predictions_without_noise():
    class Sure(ConjugateNormal):
        def predict(self, post, x, *, site=None, **options):
            return super().predict(post, x, site="mu")

    table = covered(Sure())
    row = table.loc[("prediction", 0.9)]
    assert row["high"] < 0.9
    assert table.loc[("mu", 0.9), "high"] > 0.9


def test_coverage_of_a_pyro_program():
    sampler = ImportanceSampling(400, proposal="prior")
    found = coverage(program_model(), sampler, n=30, draws=50, rng=1)
    assert found.pits["prediction"].shape == (30, 3) and found.pits["mu"].shape == (30, 1)
    table = found.table((0.8,))
    assert (table["low"] < 0.8).all() and (table["high"] > 0.8).all()
    assert "mu: 0." in repr(found)


def test_held_out_observations():
    y = torch.randn(500, generator=stream(0), dtype=torch.float64)
    right = Analytic(Normal(torch.zeros(500).double(), 1.0))
    narrow = Analytic(Normal(torch.zeros(500).double(), 0.5))
    table = coverage_on({"right": right, "narrow": narrow}, y).table((0.9,))
    assert table.loc[("right", 0.9), "low"] < 0.9 < table.loc[("right", 0.9), "high"]
    inside = int((y.abs() < 0.5 * 1.6448536).sum())
    row = table.loc[("narrow", 0.9)]
    assert row["coverage"] == pytest.approx(inside / 500)
    assert (row["low"], row["high"]) == pytest.approx(clopper_pearson(inside, 500))


def test_held_out_observations_of_a_posterior():
    data = pair(stream(1), rows=50)[1]
    post = pk.infer(ConjugateNormal(), data[:20], Direct(), rng=0)
    found = coverage_on(post, data[20:], x=30)
    law = post.marginals["mu"]
    exact = Normal(law.mean, (law.variance + 1).sqrt()).cdf(data[20:])
    torch.testing.assert_close(found.pits["prediction"][:, 0], exact)
    with pytest.raises(DataError, match="expected x=<inputs of y> with a posterior"):
        coverage_on(post, data[20:])
    with pytest.raises(ShapeError, match=r"y of shape \[\*obs\] = \(30,\), got \(20,\)"):
        coverage_on(post, data[:20], x=30)
    with pytest.raises(DataError, match=r"finite y, entry \[2\]"):
        coverage_on(post, [1.0, 2.0, float("nan")], x=3)


def test_coverage_that_cannot_be_measured_is_refused():
    with pytest.raises(CapabilityError, match="where are the inputs in data of type Tensor"):
        coverage(ConjugateNormal(), Direct(), n=1, rng=0, simulate=pair)

    class Mute(ConjugateNormal):
        simulate = None

    with pytest.raises(CapabilityError, match="coverage of predictions needs simulate"):
        coverage(Mute(), Direct(), n=1, rng=0, simulate=pair, predictions=True)
    with pytest.raises(DataError, match="levels between 0 and 1, got 1.5"):
        Coverage({"a": torch.full((3, 1), 0.5)}).table((1.5,))
    with pytest.raises(DataError, match="expected names among a, got b"):
        Coverage({"a": torch.full((3, 1), 0.5)}).plot(["b"])


# ---------------------------------------------------------------------------------------- Geweke


def redraw(values, generator):
    return values["mu"] + torch.randn(3, generator=generator, dtype=torch.float64)


def exact_move(scale=1.0, shift=0.0, use=1.0):
    def move(values, data, generator):
        mean, sd = ConjugateNormal().moments(use * data)
        noise = torch.randn((), generator=generator, dtype=torch.float64)
        return {"mu": mean + sd.double() * (shift + scale * noise)}

    return move


def metropolis_move(accept=True):
    """Random walk: for the log joint; without the acceptance step it drifts away."""

    def move(values, data, generator):
        model = ConjugateNormal()
        mu = values["mu"]
        noise = torch.randn(2, generator=generator, dtype=torch.float64)
        uniform = torch.rand((), generator=generator, dtype=torch.float64)
        new = mu + noise[0]
        gain = model.log_joint({"mu": new}, data) - model.log_joint({"mu": mu}, data)
        return {"mu": new if not accept or uniform.log() < gain else mu}

    return move


def drifts(move, **options):
    return geweke(
        ConjugateNormal(),
        move,
        redraw=redraw,
        simulate=pair,
        rng=2,
        **{"chains": 60, "steps": 40, "log_joint": False, **options},
    )


@pytest.mark.parametrize("move", [exact_move(), metropolis_move()], ids=["gibbs", "metropolis"])
def test_right_kernels_stay_in_the_joint(move):
    result = drifts(move)
    assert set(result.drift) == {"mu", "mu^2"}
    assert result.passed(0.01), result


@pytest.mark.parametrize(
    "move",
    [exact_move(scale=0.5), exact_move(shift=0.5), exact_move(use=0.5), metropolis_move(False)],
    ids=["half-scale", "shift", "half-the-data", "no-accept"],
)
def test_wrong_kernels_leave_it(move):
    assert not drifts(move).passed(1e-3)


def test_geweke_on_executors_and_pyro_programs():
    def move(values, data, generator):
        centre = (data["y"] - data["x"]).sum() / (len(data["y"]) + 1)
        noise = torch.randn((), generator=generator, dtype=torch.float64)
        return {"mu": centre + noise / (len(data["y"]) + 1) ** 0.5}

    options = {"chains": 6, "steps": 5, "rng": 0}
    here = geweke(program_model(), move, **options)
    with ThreadPoolExecutor(2) as executor:
        there = geweke(program_model(), move, executor=executor, **options)
    assert all(torch.equal(here.drift[name], there.drift[name]) for name in here.drift)
    assert here.passed(1e-3)
    assert list(here.summary().columns) == ["drift", "error", "z", "p"]
    assert "largest |z|" in repr(here)


def test_samplers_that_cannot_be_tested_are_refused():
    with pytest.raises(CapabilityError, match="Metropolis lacks warmup, start, step_size"):
        geweke(ConjugateNormal(), Metropolis(), redraw=redraw, simulate=pair, rng=0)
    with pytest.raises(CapabilityError, match=r"expected HMC\(step_size=<fixed>\), got None"):
        transition_of(ConjugateNormal(), HMC())
    with pytest.raises(CapabilityError, match="lacks replace_observed; pass redraw="):
        geweke(ConjugateNormal(), exact_move(), simulate=pair, rng=0)
    with pytest.raises(DataError, match="chains >= 5"):
        geweke(ConjugateNormal(), exact_move(), redraw=redraw, simulate=pair, rng=0, chains=2)


# ----------------------------------------------------------------------------------------- plots


def test_plots_show_what_was_found():
    result = calibrated(ConjugateNormal(), n=40)
    made = result.plot()
    titles = [ax.get_title(loc="left") for ax in made.axes[:2]]
    assert sorted(titles) == ["log_joint", "mu"]
    heights = [bar.get_height() for bar in made.axes[titles.index("mu")].patches]
    assert sum(heights) == 40
    line = made.axes[2 + titles.index("mu")].lines[1]
    band = ecdf_band(40, 49)
    share = (result.ranks["mu"].numpy()[:, None] <= band.rank).mean(0)
    np.testing.assert_allclose(line.get_ydata(), share - band.uniform)
    with pytest.raises(DataError, match="quantities among mu, log_joint, got nope"):
        result.plot(["nope"])
    assert len(result.coverage().plot().axes[0].lines) == 3


def test_plots_refuse_other_ranks():
    axes = figure()[1]
    with pytest.raises(DataError, match="ranks .* from 0 to draws=3, got 1 of range 7 to 7"):
        rank_plot(axes[0, 0], [7], 3)
    with pytest.raises(DataError, match="equally many ranks"):
        ecdf_difference_plot(axes[0, 0], {"a": [1], "b": [1, 2]}, 3)
    with pytest.raises(DataError, match="at least one name"):
        coverage_plot(axes[0, 0], {})


def test_site_entries_are_named():
    class Two(ConjugateNormal):
        def sites(self, data):
            return {"mu": Site((2,), constraints.real, ("k",))}

        log_joint = None

        def condition(self, data, hyper=None):
            law = Normal(torch.zeros(2).double(), 1.0)
            return replace(super().condition(data), source=Closed({"mu": law}), marginals={})

    found = sbc(
        Two(),
        Direct(),
        n=3,
        draws=9,
        rng=0,
        simulate=lambda g: (
            {"mu": torch.randn(2, generator=g, dtype=torch.float64)},
            torch.zeros(3, dtype=torch.float64),
        ),
    )
    assert list(found.ranks) == ["mu[0]", "mu[1]"]

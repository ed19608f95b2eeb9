"""The report on draws: each diagnostic speaks where it should, and is silent where not."""

from __future__ import annotations

from dataclasses import replace

import arviz
import numpy as np
import pytest
import torch
from support.models import ConjugateNormal
from torch.distributions import StudentT

from probkit.diagnostics import bfmi, diagnose, loo, pareto_k
from probkit.errors import CapabilityError, DataError
from probkit.posterior import Context, Posterior
from probkit.sources import Closed, Draws

F64 = torch.float64


def noise(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=F64)


def posterior(draws, stats=None, attrs=None, model=None, data=None):
    source = Draws({"x": draws})
    return Posterior(source, model, Context(data), sample_stats=stats or {}, attrs=attrs or {})


def hamiltonian(generator, chains=4, draws=300):
    """Statistics of a healthy run."""
    energy = noise(generator, chains, draws)
    return {
        "diverging": torch.zeros(chains, draws, dtype=torch.bool),
        "tree_depth": torch.full((chains, draws), 3),
        "n_steps": torch.full((chains, draws), 7),
        "energy": energy,
    }


OPTIONS = {"options": {"max_depth": "5", "draws": "300"}}


def bad(report):
    return [finding.check for finding in report.findings if not finding.ok]


def test_a_healthy_run_is_ok(generator):
    report = diagnose(posterior(noise(generator, 4, 300), hamiltonian(generator), OPTIONS))
    assert report.ok and report.warnings == () and report.skipped == ()
    checks = [finding.check for finding in report.findings]
    assert checks == ["divergences", "max depth", "E-BFMI", "R-hat", "bulk ESS", "tail ESS"]
    assert "r_hat" in report.table.columns
    assert str(report).count("ok  ") == 6 and "WARN" not in str(report)


def test_divergences_are_counted(generator):
    stats = hamiltonian(generator)
    stats["diverging"][1, :7] = True
    report = diagnose(posterior(noise(generator, 4, 300), stats, OPTIONS))
    assert bad(report) == ["divergences"]
    assert "7 of 1200 transitions diverged" in report.warnings[0]
    assert "WARN divergences" in str(report) and "-> 7 of 1200" in str(report)


@pytest.mark.parametrize(("at_most", "found"), [(12, []), (13, ["max depth"])])
def test_cut_off_paths_are_seen(generator, at_most, found):
    stats = hamiltonian(generator)
    stats["tree_depth"].view(-1)[:at_most] = 5  # of 1200: 1 % is 12
    report = diagnose(posterior(noise(generator, 4, 300), stats, OPTIONS))
    assert bad(report) == found
    if found:
        assert "1.1% of the transitions stopped at max_depth=5" in report.warnings[0]


def test_steps_count_where_there_is_no_tree(generator):
    stats = hamiltonian(generator)
    del stats["tree_depth"]
    stats["n_steps"][:, ::2] = 64
    post = posterior(noise(generator, 4, 300), stats, {"options": {"max_steps": "64"}})
    assert bad(diagnose(post)) == ["max steps"]


def test_low_bfmi_is_seen_and_is_arvizs(generator):
    stats = hamiltonian(generator)
    stats["energy"] = stats["energy"].cumsum(1)  # a random walk: energies hardly change
    post = posterior(noise(generator, 4, 300), stats, OPTIONS)
    assert bad(diagnose(post)) == ["E-BFMI"]
    np.testing.assert_allclose(bfmi(post).numpy(), arviz.bfmi(stats["energy"].numpy()))
    # The definition: mean square of changes over the variance.
    energy = stats["energy"]
    exact = energy.diff(dim=1).square().mean(1) / energy.var(1, correction=0)
    torch.testing.assert_close(bfmi(post), exact, rtol=0.02, atol=0.0)


def test_chains_that_disagree_and_slow_ones_are_seen(generator):
    apart = noise(generator, 4, 300)
    apart[3] += 3.0
    report = diagnose(posterior(apart))
    assert "R-hat" in bad(report) and "R-hat of x is" in report.warnings[0]
    slow = noise(generator, 4, 300)
    for t in range(1, 300):
        slow[:, t] = 0.97 * slow[:, t - 1] + 0.24 * slow[:, t]
    assert {"bulk ESS", "tail ESS"} <= set(bad(diagnose(posterior(slow))))


def test_scale_differences_between_chains_are_seen(generator):
    """Means agree, spreads do not: only the folded rank R-hat tells."""
    draws = noise(generator, 4, 1000)
    draws[0] *= 4.0
    assert "R-hat" in bad(diagnose(posterior(draws)))


def test_one_chain_says_that_it_is_one(generator, capfd):
    report = diagnose(posterior(noise(generator, 1, 400)))
    assert report.ok and "R-hat: there is one chain" in report.skipped[0]
    assert capfd.readouterr().err == ""


def test_too_few_draws_are_refused(generator):
    with pytest.raises(DataError, match="at least 20 draws of each chain.*got 4 chains of 10"):
        diagnose(posterior(noise(generator, 4, 10)))
    with pytest.raises(DataError, match=r"energies \[chain, draw\] of at least 20 draws, got"):
        bfmi(posterior(noise(generator, 2, 5), {"energy": noise(generator, 2, 5)}))
    with pytest.raises(DataError, match=r"at least 20 log weights \[draw\], got 3"):
        pareto_k(torch.zeros(3))
    weighted = Posterior(Draws({"x": noise(generator, 1, 5)}, torch.zeros(1, 5)), None)
    with pytest.raises(DataError, match="at least 20 weighted draws, got 5"):
        diagnose(weighted)
    few = posterior(noise(generator, 2, 30), model=ConjugateNormal(), data=torch.zeros(3))
    with pytest.raises(DataError, match="loo: expected at least 100 draws in all, got 2 chains"):
        loo(few)


def test_what_has_no_draws_is_refused(generator):
    with pytest.raises(CapabilityError, match=r"this posterior \(Closed\) has not: a closed form"):
        diagnose(Posterior(Closed(), None))
    point = posterior(noise(generator, 1, 1), attrs={"point_estimate": True})
    with pytest.raises(CapabilityError, match="a point estimate has no draws"):
        diagnose(point)
    with pytest.raises(CapabilityError, match="E-BFMI needs sample_stats.*this posterior has none"):
        bfmi(posterior(noise(generator, 2, 50)))
    with pytest.raises(CapabilityError, match="loo needs pointwise_log_likelihood"):
        loo(posterior(noise(generator, 2, 60)))


def test_interrupted_runs_say_so(generator):
    report = diagnose(posterior(noise(generator, 4, 200), attrs={"complete": False}))
    assert "interrupted" in report.skipped[0] and "not checked" in str(report)


# ------------------------------------------------------------------------------ weights and LOO


def weights(generator, freedom, n=4000):
    """Log weights of a Student-t posterior under a normal proposal: heavy where tails differ."""
    x = noise(generator, n)
    target = StudentT(torch.tensor(freedom, dtype=F64)).log_prob(x)
    return x, target - torch.distributions.Normal(0.0, torch.ones((), dtype=F64)).log_prob(x)


def test_heavy_weights_are_seen(generator):
    x, light = weights(generator, 1000.0)
    good = Posterior(Draws({"x": x[None]}, light[None]), None)
    assert diagnose(good).ok
    heavy = 2.0 * x.square() / 2  # weights exp(x^2): their variance is infinite, k = 2
    report = diagnose(Posterior(Draws({"x": x[None]}, heavy[None]), None))
    assert bad(report) == ["Pareto k of weights", "ESS of weights"]
    assert "Pareto k of the weights is" in report.warnings[0]
    # A tail of weights w = u^-k has Pareto index k.
    u = torch.rand(20_000, generator=generator, dtype=F64)
    for k in (0.4, 0.9):
        assert pareto_k(-k * u.log()) == pytest.approx(k, abs=0.15)
    assert pareto_k(torch.zeros(100)) == -float("inf")


def conjugate(generator, data):
    model = ConjugateNormal()
    mean, sd = model.moments(data)
    draws = mean + sd * noise(generator, 4, 500)
    return Posterior(Draws({"mu": draws}), model, Context(data))


def test_loo_is_the_exact_one_and_sees_an_outlier(generator):
    data = noise(generator, 12)
    post = conjugate(generator, data)
    found = loo(post)
    model = ConjugateNormal()
    exact = []
    for i in range(12):
        mean, sd = model.moments(torch.cat([data[:i], data[i + 1 :]]))
        law = torch.distributions.Normal(mean, (sd.square() + 1.0).sqrt().to(mean))
        exact.append(law.log_prob(data[i]))
    # Importance sampling of 2000 draws: some hundredths for each observation.
    torch.testing.assert_close(found.pointwise, torch.stack(exact), rtol=0, atol=0.05)
    assert found.elpd == pytest.approx(float(found.pointwise.sum()))
    assert found.bad == 0 and diagnose(post).ok
    wild = torch.cat([data[:2], torch.tensor([25.0], dtype=F64)])
    report = diagnose(conjugate(generator, wild))
    assert "Pareto k of LOO" in bad(report)
    assert "of 3 observations" in report.warnings[-1]


def test_weighted_draws_are_no_loo(generator):
    data = noise(generator, 5)
    post = conjugate(generator, data)
    weighted = replace(post, source=Draws(post.draws, torch.zeros(4, 500, dtype=F64)))
    with pytest.raises(CapabilityError, match="equally weighted draws"):
        loo(weighted)

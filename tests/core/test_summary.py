"""Summary tables: every kind of posterior against numbers computed apart."""

from __future__ import annotations

import arviz
import numpy as np
import pytest
import scipy.stats
import torch
from support.models import ConjugateNormal, normal_data
from torch.distributions import (
    Categorical,
    Gamma,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
    Poisson,
    TransformedDistribution,
    constraints,
)
from torch.distributions.transforms import AffineTransform, SigmoidTransform, StickBreakingTransform

from probkit.errors import CapabilityError
from probkit.inference import MeanField
from probkit.model import Model, Site
from probkit.posterior import Context, Posterior
from probkit.sources import Closed, Draws, Fitted, Population

ALL = ["mean", "sd", "q5", "q95", "mcse_mean", "ess_bulk", "ess_tail", "r_hat"]


def normal_draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_draws_have_arviz_diagnostics_and_labels():
    values = normal_draws(4, 100, 2) + torch.tensor([0.0, 3.0])
    context = Context(None, {"school": ["A", "B"]}, {"theta": ("school",)})
    table = Posterior(Draws({"theta": values}), None, context).summary()
    assert list(table.index) == ["theta[A]", "theta[B]"]
    assert list(table.columns) == ALL
    x = values[..., 1].numpy()
    row = table.loc["theta[B]"]
    assert row["mean"] == pytest.approx(x.mean())
    assert row["sd"] == pytest.approx(x.std(ddof=1))
    np.testing.assert_allclose(row[["q5", "q95"]], np.quantile(x, [0.05, 0.95]))
    assert row["ess_bulk"] == pytest.approx(float(arviz.ess(x, method="bulk")))
    assert row["ess_tail"] == pytest.approx(float(arviz.ess(x, method="tail")))
    assert row["r_hat"] == pytest.approx(float(arviz.rhat(x)))
    assert row["mcse_mean"] == pytest.approx(float(arviz.mcse(x, method="mean")))
    assert table.attrs["point_estimate"] is False


def test_matrix_entries_scalars_and_odd_types():
    values = {
        "s": normal_draws(2, 10),
        "m": normal_draws(2, 10, 2, 2, seed=1).float(),
        "k": torch.arange(20).reshape(2, 10),
        "z": torch.complex(normal_draws(2, 10), normal_draws(2, 10, seed=4)),
    }
    table = Posterior(Draws(values), None).summary()
    assert list(table.index) == [
        "s",
        "m[0, 0]",
        "m[0, 1]",
        "m[1, 0]",
        "m[1, 1]",
        "k",
        "z.real",
        "z.imag",
    ]
    assert table.loc["k", "mean"] == 9.5
    assert table.loc["z.imag", "mean"] == pytest.approx(values["z"].imag.mean().item())
    assert table.loc["m[1, 0]", "mean"] == pytest.approx(values["m"][..., 1, 0].mean().item())


def test_labels_of_another_length_become_positions():
    context = Context(None, {"school": ["A", "B", "C"]}, {"theta": ("school",)})
    table = Posterior(Draws({"theta": normal_draws(1, 8, 2)}), None, context).summary()
    assert list(table.index) == ["theta[0]", "theta[1]"]


def test_weighted_draws():
    values = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    table = Posterior(Draws({"a": values}, weights.log() + 7.0), None).summary()
    assert list(table.columns) == ["mean", "sd", "q5", "q95", "ess"]
    mean = 0.2 + 1.0 + 1.2
    assert table.loc["a", "mean"] == pytest.approx(mean)
    spread = 0.2 * (1 - mean) ** 2 + 0.5 * (2 - mean) ** 2 + 0.3 * (4 - mean) ** 2
    assert table.loc["a", "sd"] == pytest.approx(spread**0.5)
    assert table.loc["a", "ess"] == pytest.approx(1 / (0.04 + 0.25 + 0.09))


def test_a_closed_form_is_tabulated_without_sampling():
    data = normal_data()
    model = ConjugateNormal()
    mean, sd = model.moments(data)
    row = model.condition(data).summary().loc["mu"]
    law = scipy.stats.norm(mean.item(), sd.item())
    np.testing.assert_allclose(
        row[["mean", "sd", "q5", "q95"]], [law.mean(), law.std(), law.ppf(0.05), law.ppf(0.95)]
    )


def test_joint_laws_give_their_marginals():
    covariance = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    joint = MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)
    table = Posterior(Closed({"w": joint}), None).summary()
    np.testing.assert_allclose(table["sd"], [2**0.5, 1.0])
    np.testing.assert_allclose(table["q95"], [2**0.5 * 1.6448536269514722, 1.6448536269514722])


@pytest.mark.parametrize("weighted", [False, True])
def test_several_hyper_draws_are_mixed_exactly(weighted):
    loc = torch.tensor([[0.0, 1.0], [5.0, 2.0]], dtype=torch.float64)
    scale = torch.tensor([[1.0, 2.0], [0.5, 1.0]], dtype=torch.float64)
    log_weights = torch.tensor([[0.0, 1.0], [0.5, -1.0]], dtype=torch.float64) if weighted else None
    source = Closed({"f": Normal(loc, scale)}, {"h": loc}, log_weights=log_weights)
    table = Posterior(source, None).summary()
    w = torch.ones(4) / 4 if log_weights is None else torch.softmax(log_weights.flatten(), 0)
    mean = (w * loc.flatten()).sum()
    second = (w * (scale.square() + loc.square()).flatten()).sum()
    assert table.loc["f", "mean"] == pytest.approx(mean.item())
    assert table.loc["f", "sd"] == pytest.approx((second - mean**2).sqrt().item())
    q5 = torch.tensor(table.loc["f", "q5"])
    assert (w * Normal(loc, scale).cdf(q5).flatten()).sum().item() == pytest.approx(0.05)
    assert "h" in table.index


@pytest.mark.parametrize("chains", [1, 2])
def test_fitted_guides_have_exact_marginals(chains):
    class Positive(Model):
        def sites(self, data):
            return {
                "a": Site((), constraints.real),
                "b": Site((2,), constraints.positive, ("d",)),
                "p": Site((), constraints.interval(-1.0, 3.0)),
            }

    def params(shift):
        one = torch.ones((), dtype=torch.float64)
        return {
            "a": {"loc": shift * one, "log_scale": 0 * one},
            "b": {"loc": shift * one * torch.ones(2), "log_scale": -one * torch.ones(2)},
            "p": {"loc": 0.3 * one, "log_scale": -one},
        }

    shifts = [0.0, 2.0][:chains]
    post = Posterior(Fitted(MeanField(), [params(s) for s in shifts]), Positive(), Context(None))
    table = post.summary()
    assert list(table.index) == ["a", "b[0]", "b[1]", "p"]
    # Against many draws, within their Monte Carlo error.
    n = 40_000
    draws = post.sample(n, rng=1)
    for row, x in {"a": draws["a"], "b[1]": draws["b"][:, 1], "p": draws["p"]}.items():
        sd = table.loc[row, "sd"]
        assert abs(x.mean().item() - table.loc[row, "mean"]) < 4 * sd / n**0.5
        kurtosis = ((x - x.mean()) ** 4).mean() / x.var() ** 2
        assert abs(x.std().item() / sd - 1) < 4 * ((kurtosis - 1) / (4 * n)) ** 0.5
        for level, name in ((0.05, "q5"), (0.95, "q95")):
            share = (x <= table.loc[row, name]).double().mean().item()
            assert abs(share - level) < 4 * (0.05 * 0.95 / n) ** 0.5


def test_moments_of_transformed_laws_by_quadrature():
    """A sigmoid of a normal has no closed moments; a dense Riemann sum has them."""
    base = Normal(torch.tensor(0.4, dtype=torch.float64), 0.8)
    law = TransformedDistribution(base, [SigmoidTransform(), AffineTransform(2.0, 3.0)])
    table = Posterior(Closed(), None, marginals={"p": law}).summary()
    z = np.linspace(-12, 12, 2_000_001)
    weights = scipy.stats.norm.pdf(z) * (z[1] - z[0])
    values = 2 + 3 / (1 + np.exp(-(0.4 + 0.8 * z)))
    mean = (weights * values).sum()
    assert table.loc["p", "mean"] == pytest.approx(mean, abs=1e-9)
    sd = np.sqrt((weights * (values - mean) ** 2).sum())
    assert table.loc["p", "sd"] == pytest.approx(sd, abs=1e-9)


def test_marginals_without_closed_forms_are_nan_and_classes_have_probabilities():
    counts = Poisson(torch.tensor(3.0))
    states = Categorical(torch.tensor([[0.2, 0.8], [0.5, 0.5]]))
    simplex = TransformedDistribution(
        Independent(Normal(torch.zeros(2), 1.0), 1), [StickBreakingTransform()]
    )
    marginals = {"n": counts, "state": states, "pi": simplex}
    table = Posterior(Closed(), None, marginals=marginals).summary()
    assert table.loc["n", "mean"] == 3.0
    assert np.isnan(table.loc["n", "q5"])
    assert table.loc["state[0, 1]", "mean"] == pytest.approx(0.8)
    assert table.loc["state[0, 1]", "sd"] == pytest.approx(0.4)
    assert table.loc["pi[0]":"pi[2]"].isna().all().all()


def test_ragged_marginals_have_one_block_for_each_sequence():
    parts = (Normal(torch.zeros(2), 1.0), Normal(torch.zeros(3), 2.0))
    table = Posterior(Closed(), None, marginals={"state": parts}).summary()
    assert list(table.index) == [
        *(f"state[0][{i}]" for i in range(2)),
        *(f"state[1][{i}]" for i in range(3)),
    ]
    assert table.loc["state[1][2]", "sd"] == 2.0


def test_other_families_of_marginals():
    one = torch.tensor(2.0, dtype=torch.float64)
    laws = {"g": Gamma(3 * one, one), "l": LogNormal(0.1 * one, 0.5 * one)}
    table = Posterior(Closed(laws), None).summary()
    assert table.loc["g", "q95"] == pytest.approx(scipy.stats.gamma(6, scale=0.5).ppf(0.95))
    assert table.loc["l", "q5"] == pytest.approx(
        scipy.stats.lognorm(1.0, scale=np.exp(0.2)).ppf(0.05)
    )


def test_point_estimates_have_a_value_only():
    source = Draws({"w": torch.tensor([[[1.0, 2.0]]])})
    table = Posterior(source, None, attrs={"point_estimate": True}).summary()
    assert list(table.columns) == ["value"]
    assert table["value"].tolist() == [1.0, 2.0]
    assert table.attrs["point_estimate"] is True
    twice = Posterior(source.join([source]), None, attrs={"point_estimate": True}).summary()
    assert list(twice.columns) == ["value[0]", "value[1]"]


def test_nothing_to_summarise():
    assert Posterior(Closed(), None).summary().empty
    objects = Population([["a", "b"]], torch.zeros(1, 2))
    with pytest.raises(CapabilityError, match="expected tensor particles; use post.particles.best"):
        Posterior(objects, None).summary()

    class Opaque:
        pass

    with pytest.raises(CapabilityError, match=r"Opaque has no known marginals.*summary\(rng=0\)"):
        Posterior(Fitted(Opaque(), [{}]), None).summary()


def test_tensor_particles_are_weighted_draws():
    particles = Population([torch.tensor([1.0, 3.0])], torch.tensor([[0.75, 0.25]]).log())
    table = Posterior(particles, None).summary()
    assert table.loc["particle", "mean"] == pytest.approx(1.5)


def test_draws_of_a_fitted_guide_fill_in_for_unknown_marginals():
    class Shares(Model):
        def sites(self, data):
            real, simplex = constraints.real, constraints.simplex
            return {"a": Site((), real), "pi": Site((3,), simplex, ("k",))}

    zero = torch.zeros((), dtype=torch.float64)
    params = {
        "a": {"loc": zero, "log_scale": zero},
        "pi": {"loc": zero.expand(2), "log_scale": zero.expand(2)},
    }
    post = Posterior(Fitted(MeanField(), [params]), Shares(), Context(None))
    unknown = post.summary()
    assert unknown.loc["pi[0]":"pi[2]"].isna().all().all()
    table = post.summary(draws=4000, rng=0)
    assert table.loc["a"].equals(unknown.loc["a"]), "what is known in closed form stays exact"
    assert set(table.index) == set(unknown.index)
    draws = post.sample(4000, rng=0)["pi"]
    assert table.loc["pi[0]":"pi[2]", "mean"].tolist() == pytest.approx(draws.mean(0).tolist())
    assert table.loc["pi[1]", "q95"] == pytest.approx(draws[:, 1].quantile(0.95).item())

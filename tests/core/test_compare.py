"""Comparison of models: leave-one-out and evidence, against direct computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.models import ConjugateNormal, normal_data
from torch.distributions import Normal

from probkit.compare import compare
from probkit.errors import CapabilityError, DataError, NumericsWarning
from probkit.posterior import Context, Evidence, Posterior
from probkit.sources import Closed, Draws


def exact_draws(model, data, *shape, seed=0):
    """Independent draws of the conjugate posterior: what an ideal sampler would return."""
    mean, sd = model.moments(data)
    generator = torch.Generator().manual_seed(seed)
    mu = mean + sd * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return Posterior(Draws({"mu": mu}), model, Context(data, {}, {"mu": ()}))


def exact_loo(model, data):
    """log p(y_i | y_-i), each in closed form."""
    result = []
    for i in range(len(data)):
        mean, sd = model.moments(torch.cat([data[:i], data[i + 1 :]]))
        result.append(Normal(mean, (sd**2 + model.noise_sd**2) ** 0.5).log_prob(data[i]))
    return torch.stack(result)


def with_evidence(value, kind, data=None):
    evidence = Evidence(torch.as_tensor(value, dtype=torch.float64), kind)
    return Posterior(Closed(), None, Context(data), log_evidence=evidence)


def test_loo_agrees_with_exact_leave_one_out():
    data = normal_data(20)
    models = {"right": ConjugateNormal(), "wrong": ConjugateNormal(noise_sd=3.0)}
    posts = {name: exact_draws(model, data, 4, 1000) for name, model in models.items()}
    table = compare(posts)
    exact = {name: exact_loo(model, data) for name, model in models.items()}
    assert list(table.index) == ["right", "wrong"]
    for name in models:
        # The error of importance sampling is far below that of the sum over observations.
        assert table.loc[name, "elpd_loo"] == pytest.approx(exact[name].sum().item(), abs=0.05)
        se = math.sqrt(20 * exact[name].var(correction=0).item())
        assert table.loc[name, "se"] == pytest.approx(se, rel=0.02)
    difference = exact["right"] - exact["wrong"]
    assert table.loc["wrong", "elpd_diff"] == pytest.approx(difference.sum().item(), abs=0.05)
    dse = math.sqrt(20 * difference.var(correction=0).item())
    assert table.loc["wrong", "dse"] == pytest.approx(dse, rel=0.02)
    assert table.loc["right", "elpd_diff"] == 0
    assert table["bad_k"].tolist() == [0, 0]
    assert table["observations"].tolist() == [20, 20]


def test_a_large_pareto_k_is_counted_and_warned_of():
    data = torch.cat([normal_data(10), torch.tensor([25.0], dtype=torch.float64)])
    model = ConjugateNormal(noise_sd=1.0, prior_sd=10.0)
    posts = {"a": exact_draws(model, data, 2, 200), "b": exact_draws(model, data, 2, 200, seed=1)}
    with pytest.warns(NumericsWarning, match="Pareto k is too large for"):
        table = compare(posts)
    assert (table["bad_k"] > 0).any()


def test_evidence_differences_of_exact_values():
    data = normal_data()
    models = {"narrow": ConjugateNormal(prior_sd=0.5), "wide": ConjugateNormal(prior_sd=5.0)}
    table = compare({name: model.condition(data) for name, model in models.items()})
    values = {name: model.evidence(data).item() for name, model in models.items()}
    best, other = sorted(values, key=lambda name: -values[name])
    assert list(table.index) == [best, other]
    assert table.loc[other, "difference"] == pytest.approx(values[best] - values[other])
    assert table["kind"].tolist() == ["exact", "exact"]
    assert table["comparable"].all()


def test_chains_are_combined_by_kind():
    table = compare(
        {"a": with_evidence([-3.0, -2.0], "bound"), "b": with_evidence([-9.0], "bound")}
    )
    assert table.loc["a", "log_evidence"] == -2.0
    table = compare(
        {"a": with_evidence([-3.0, -2.0], "estimate"), "b": with_evidence([-9.0], "estimate")}
    )
    expected = math.log((math.exp(-3) + math.exp(-2)) / 2)
    assert table.loc["a", "log_evidence"] == pytest.approx(expected)
    assert table.loc["a", "sd"] == pytest.approx(2**-0.5)
    assert np.isnan(table.loc["b", "sd"])


def test_mixed_kinds_are_marked():
    posts = {"exact": with_evidence([-3.0], "exact"), "bound": with_evidence([-4.0], "bound")}
    with pytest.warns(NumericsWarning, match="mixes bound and exact evidences"):
        table = compare(posts)
    assert table["comparable"].to_dict() == {"exact": True, "bound": False}
    assert table["kind"].to_dict() == {"exact": "exact", "bound": "bound"}


def test_the_criterion_can_be_chosen():
    data = normal_data()
    posts = {}
    for name, prior in (("a", 1.0), ("b", 2.0)):
        model = ConjugateNormal(prior_sd=prior)
        draws = exact_draws(model, data, 2, 300)
        posts[name] = Posterior(
            draws.source, model, draws.context, log_evidence=model.condition(data).log_evidence
        )
    assert "elpd_loo" in compare(posts).columns
    assert "log_evidence" in compare(posts, by="evidence").columns
    with pytest.raises(DataError, match="expected by='loo' or by='evidence', got 'waic'"):
        compare(posts, by="waic")


def test_posteriors_without_a_criterion():
    nothing = Posterior(Closed(), None, Context(None))
    other = with_evidence([-1.0], "exact")
    with pytest.raises(
        CapabilityError, match=r"pointwise log likelihood \(a, b: none\).*\(b: none\)"
    ):
        compare({"a": other, "b": nothing})
    with pytest.raises(CapabilityError, match="compare\\(by='loo'\\) needs equally weighted draws"):
        compare({"a": other, "b": other}, by="loo")


def test_weighted_draws_and_point_estimates_are_no_loo():
    data = normal_data()
    model = ConjugateNormal()
    draws = exact_draws(model, data, 1, 100)
    weighted = Posterior(
        Draws(draws.draws, torch.zeros(1, 100)), model, Context(data), log_evidence=None
    )
    point = Posterior(
        Draws({"mu": torch.zeros(1, 1).double()}),
        model,
        Context(data),
        attrs={"point_estimate": True},
    )
    with pytest.raises(CapabilityError, match="weighted, point lacks"):
        compare({"weighted": weighted, "point": point, "draws": draws}, by="loo")


def test_other_data_is_refused():
    model = ConjugateNormal()
    with pytest.raises(DataError, match="'b' and 'a' were fitted to other observations"):
        compare({"a": model.condition(normal_data(8)), "b": model.condition(normal_data(9))})
    # Inputs may differ, observations not; containers are compared by their fields.
    x, y = torch.zeros(3, 1), torch.ones(3)
    compare(
        {"a": with_evidence([0.0], "exact", (x, y)), "b": with_evidence([0.0], "exact", (x + 1, y))}
    )

    class Container:
        def __init__(self, values):
            self.values = values

    a, b = Container([y]), Container([y + 1])
    compare(
        {"a": with_evidence([0.0], "exact", a), "b": with_evidence([0.0], "exact", Container([y]))}
    )
    with pytest.raises(DataError, match="other observations"):
        compare({"a": with_evidence([0.0], "exact", a), "b": with_evidence([0.0], "exact", b)})


def test_one_posterior_is_no_comparison():
    with pytest.raises(DataError, match="expected two or more posteriors, got 1"):
        compare({"a": with_evidence([0.0], "exact")})


def test_posteriors_need_names():
    with pytest.raises(DataError, match="expected a mapping name -> posterior, got list"):
        compare([])

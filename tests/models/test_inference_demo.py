"""The pieces of the inference demo view that are not shown to be right by its pictures."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import pytest
import torch
from torch.distributions import Normal, Poisson

import probkit as pk
from probkit.inference import HMC
from probkit.models import inference_demo as demo
from probkit.testing import batch_means, z_bound

with contextlib.suppress(ImportError):  # adds warning filters when it is first imported
    import statsmodels.api  # noqa: F401

F64 = torch.float64
SCHOOLS = {
    "effect": torch.tensor([28.0, 8.0, -3.0], dtype=F64),
    "standard_error": torch.tensor([15.0, 10.0, 16.0], dtype=F64),
}
COUNTS = {
    "deaths": torch.tensor([4.0, 0.0, 7.0], dtype=F64),
    "expected": torch.tensor([2.5, 3.0, 5.0], dtype=F64),
}


def values(n: int = 4) -> dict[str, torch.Tensor]:
    noise = torch.randn(n, 5, generator=torch.Generator().manual_seed(1), dtype=F64)
    return {"mean": noise[:, 0], "spread": noise[:, 1].exp(), "effect": noise[:, 2:]}


@pytest.mark.parametrize(("build", "data"), [(demo.Schools, SCHOOLS), (demo.Counties, COUNTS)])
def test_both_forms_are_one_density(build: Any, data: Any) -> None:
    """p(centred) = p(non-centred) / spread^groups, for effects = mean + spread * z."""
    free = values()
    effects = free["mean"][:, None] + free["spread"][:, None] * free["effect"]
    centred = build(True).log_joint({**free, "effect": effects}, data)
    noncentred = build(False).log_joint(free, data)
    torch.testing.assert_close(centred, noncentred - 3 * free["spread"].log())


def test_likelihoods_are_those_of_torch() -> None:
    free = values()
    schools = demo.Schools(True).pointwise_log_likelihood(free, SCHOOLS)["effect"]
    law = Normal(free["effect"], SCHOOLS["standard_error"])
    torch.testing.assert_close(schools, law.log_prob(SCHOOLS["effect"]))
    counties = demo.Counties(True).pointwise_log_likelihood(free, COUNTS)["deaths"]
    rates = Poisson(COUNTS["expected"] * free["effect"].exp())
    torch.testing.assert_close(counties, rates.log_prob(COUNTS["deaths"]))


@pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")
def test_draws_agree_with_importance_sampling() -> None:
    model = demo.Counties(False)
    post = pk.infer(model, COUNTS, HMC(225, warmup=200), rng=0, chains=16)
    noise = torch.randn(40_000, 5, generator=torch.Generator().manual_seed(2), dtype=F64)
    prior = {
        "mean": 0.5 * noise[:, 0],
        "spread": 0.5 * noise[:, 1].abs(),
        "effect": noise[:, 2:],
    }
    share = model.pointwise_log_likelihood(prior, COUNTS)["deaths"].sum(-1).softmax(0)
    for name in ("mean", "spread"):
        found, draws = batch_means(post.draws[name]), prior[name]
        wanted = float((share * draws).sum())
        error = float((share.square() * (draws - wanted).square()).sum())
        own = float(found.var()) / len(found)
        assert abs(float(found.mean()) - wanted) < z_bound(2) * (own + error) ** 0.5


def test_counties_are_real_or_simulated_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "statsmodels.api", None)
    table, real = demo._counties(0)
    assert not real and "simulated" in demo._SIMULATED
    assert len(table) == 60 and bool((table["expected"] > 0).all())
    monkeypatch.undo()
    pytest.importorskip("statsmodels.api")
    table, real = demo._counties(0)
    assert real and len(table) == 60
    # Raw ratios of deaths to expectation vary around one.
    assert table["deaths"].sum() == pytest.approx(table["expected"].sum(), rel=0.2)


def test_ranks_are_among_all_chains() -> None:
    draws = torch.tensor([[0.3, 2.0], [-1.0, 0.5]])
    assert demo._rank_of(draws).tolist() == [[1, 3], [0, 2]]

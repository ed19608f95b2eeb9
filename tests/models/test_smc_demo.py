"""The pieces of the smc demo view that are not shown to be right by its pictures."""

from __future__ import annotations

from typing import Any

import matplotlib.cbook
import pytest
import torch

import probkit as pk
from probkit.inference.smc import PaRIS, ParticleFilter
from probkit.models import smc_demo
from probkit.models.state_space import StochasticVolatility


def test_simulates_and_says_so_without_the_sample_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*args: Any, **options: Any) -> None:
        raise FileNotFoundError("goog.npz")

    monkeypatch.setattr(matplotlib.cbook, "get_sample_data", absent)
    y, real = smc_demo._returns(3)
    assert not real
    assert len(y) == 200
    assert "simulated" in smc_demo._ORIGIN[real]


def test_smoothed_moments_agree_with_weighted_paths() -> None:
    y = torch.tensor([0.3, -1.2, 2.5, 0.1], dtype=torch.float64)
    model = StochasticVolatility(0.9, 0.5)
    chains = 8
    parisian = pk.infer(model, y, PaRIS(250, smc_demo._moments), rng=0, chains=chains)
    mean, sd = smc_demo._smoothed(parisian)
    # never resampled, the paths of a filter are an importance sample of the smoothing law
    importance = ParticleFilter(20_000, ess_threshold=0.0, paths=True)
    traced = pk.infer(model, y, importance, rng=1)
    assert traced.log_weights is not None
    weights, path = traced.log_weights[0].exp(), traced.draws["path"][0]
    wanted = weights @ path
    spread = (weights @ path.square() - wanted.square()).sqrt()
    between = parisian.sample_stats["smoothed"][:, 0].std(0) / chains**0.5
    error = (between.square() + spread.square() * weights.square().sum()).sqrt()
    assert ((mean - wanted).abs() < 5 * error).all()
    # a standard deviation is known about as well as the mean
    assert ((sd - spread).abs() < 5 * error).all()

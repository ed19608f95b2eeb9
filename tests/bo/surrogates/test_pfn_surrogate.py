"""Prior-data fitted networks as surrogates."""

from __future__ import annotations

import pytest
import torch
from botorch.acquisition import qLogExpectedImprovement

import probkit as pk
from probkit.bo.domain import Domain
from probkit.bo.policy import Goal, allowed_acquisitions
from probkit.bo.policy.abilities import abilities_of
from probkit.bo.surrogates import PFNSurrogate, make_surrogate
from probkit.models.pfn import GPPrior, amortize


@pytest.fixture(scope="module")
def net():
    return amortize(GPPrior(features=3, rows=12), "tiny", steps=3, bars=20, rng=0)


def _data():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 2, generator=generator).double()
    x[:, 0] = 10 * x[:, 0]
    x[:, 1] = (2 * x[:, 1]).floor()
    return x, x[:, :1] + x[:, 1:]


BOUNDS = Domain(torch.tensor([[0.0, 0.0], [10.0, 1.0]]), categorical=(1,))


def test_inputs_reach_the_network_in_the_unit_cube(net, tmp_path):
    x, y = _data()
    model = make_surrogate(PFNSurrogate(net), x, y, bounds=BOUNDS, rng=0)
    half = 0.5**0.5
    units = torch.cat([x[:, :1] / 10, half * (x[:, 1:] == 0), half * (x[:, 1:] == 1)], 1)
    plain = net.to_botorch(units, y)
    with torch.no_grad():
        # The network computes in single precision.
        close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(
            model.posterior(x[:, None]).mean, plain.posterior(units[:, None]).mean, **close
        )
        joined = model.condition_on_observations(x[:2], y[:2])
        both = net.to_botorch(torch.cat([units, units[:2]]), torch.cat([y, y[:2]]))
        torch.testing.assert_close(
            joined.posterior(x[:, None]).mean, both.posterior(units[:, None]).mean, **close
        )
    net.save(tmp_path / "net.safetensors")
    options = {"path": str(tmp_path / "net.safetensors")}
    stored = make_surrogate("pfn", x, y, bounds=BOUNDS, options=options, rng=0)
    torch.testing.assert_close(
        stored.posterior(x[:, None]).mean.detach(),
        model.posterior(x[:, None]).mean.detach(),
        **close,
    )


def test_monte_carlo_acquisitions_work(net):
    x, y = _data()
    model = make_surrogate(PFNSurrogate(net), x, y, bounds=BOUNDS, rng=0)
    allowed = allowed_acquisitions(abilities_of(model, x), Goal())
    assert allowed == ["q_log_ei", "q_log_nei", "q_ucb", "q_simple_regret"]
    with pk.scope(rng=0):
        value = qLogExpectedImprovement(model, y.max())(x[:3, None])
    assert bool(torch.isfinite(value).all())


def test_the_shipped_network_predicts_what_its_prior_says():
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(40, 1, generator=generator).double()
    noise = 0.05 * torch.randn(40, 1, generator=generator).double()
    model = make_surrogate("pfn", x, (6 * x).sin() + noise, rng=0)
    grid = torch.linspace(0.05, 0.95, 50).double()[:, None, None]
    with torch.no_grad():
        posterior = model.posterior(grid)
    error = (posterior.mean - (6 * grid).sin()).square().mean().sqrt()
    assert float(error) < 0.15  # the function has a spread of 0.7
    # its own intervals, which it learned on ten thousands of such functions, hold the function
    inside = (posterior.mean - (6 * grid).sin()).abs() < 3 * posterior.variance.sqrt()
    assert float(inside.double().mean()) > 0.9


def test_what_the_network_cannot_take_is_refused(net):
    x, y = _data()
    wide = torch.rand(5, 7, generator=torch.Generator().manual_seed(2)).double()
    with pytest.raises(pk.ShapeError, match="up to 6 features, got 7"):
        make_surrogate("pfn", wide, wide.sum(1), rng=0)
    with pytest.raises(pk.DataError, match="a PFN standardises by itself"):
        make_surrogate(PFNSurrogate(net), x, y, bounds=BOUNDS, outcome="rank", rng=0)

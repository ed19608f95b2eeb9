"""What the guides have of their own; the rest is in the conformance suite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.fits import GroupModel, LineModel, RateModel, line_data
from torch.distributions import LogNormal, Normal, TransformedDistribution, constraints

import probkit as pk
from probkit.errors import CapabilityError, DataError
from probkit.inference import SVI, Fixed, FullRank, LowRank, MeanField
from probkit.model import Batch, Model, Site

Y = torch.tensor([0.3, 1.2, 0.1, 0.8], dtype=torch.float64)
GUIDES = [MeanField(), FullRank(), LowRank(2)]


class Of(Model):
    """A model of given sites."""

    def __init__(self, **sites):
        self._sites = sites

    def sites(self, data):
        return self._sites


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: type(g).__name__)
def test_a_model_with_local_sites_only(guide):
    model = Of(z=Site((4,), constraints.positive, ("unit",), plate="unit"))
    params = guide.init(model, Y, rng=0)
    values, log_q = guide.sample(params, model, Batch(Y), 3, rng=0)
    assert values["z"].shape == (3, 4)
    assert log_q.global_.tolist() == [0.0] * 3 and bool((log_q.local != 0).all())
    assert guide.marginals(params, model, Y)["z"].mean.shape == (4,)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: type(g).__name__)
def test_a_site_of_size_zero(guide):
    model = Of(a=Site((0,), constraints.real, ("none",)), b=Site((), constraints.real))
    values, log_q = guide.sample(guide.init(model, Y, rng=0), model, Batch(Y), 3, rng=0)
    assert values["a"].shape == (3, 0) and bool(torch.isfinite(log_q.total()).all())


@pytest.mark.parametrize("guide", GUIDES, ids=lambda g: type(g).__name__)
def test_precision_follows_the_data(guide):
    for dtype in (torch.float32, torch.float64):
        data = tuple(part.to(dtype) for part in line_data())
        params = guide.init(LineModel(), data, rng=0)
        values, log_q = guide.sample(params, LineModel(), Batch(data), 2, rng=0)
        assert values["w"].dtype == log_q.total().dtype == dtype


def test_seeds_may_be_integers_of_any_kind():
    params = MeanField().init(LineModel(), line_data(), rng=np.int64(3))
    drawn = [
        MeanField().sample(params, LineModel(), Batch(line_data()), 2, rng=seed)[0]["w"]
        for seed in (3, np.int64(3))
    ]
    assert torch.equal(*drawn)


def test_parameters_start_near_zero_or_where_the_model_says():
    near = MeanField().init(LineModel(), line_data(), rng=0)["w"]["loc"]
    assert float(near.abs().max()) <= 0.2

    class Own(RateModel):
        def initial_values(self, data, n, *, rng):
            return {"rate": torch.full((n,), 20.0, dtype=torch.float64)}

    for guide in (MeanField(), FullRank()):
        params = guide.init(Own(), Y, rng=0)
        loc = params["rate"]["loc"] if isinstance(guide, MeanField) else params["loc"][0]
        assert float(loc) == pytest.approx(math.log(20.0))


def test_minibatches_take_their_own_parameters():
    model, guide = GroupModel(), MeanField(1e-8)
    params = guide.init(model, Y, rng=0)
    params["z"]["loc"] = torch.arange(4.0, dtype=torch.float64)
    batch = model.minibatch(Y, torch.tensor([3, 1]))
    values, _ = guide.sample(params, model, batch, 2, rng=0)
    torch.testing.assert_close(
        values["z"], torch.tensor([[3.0, 1.0]] * 2).double(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("support", "expected"),
    [
        (constraints.real, Normal),
        (constraints.positive, LogNormal),
        (constraints.greater_than(torch.zeros(2, dtype=torch.float64)), LogNormal),
        (constraints.greater_than(torch.tensor([0.0, 1.0], dtype=torch.float64)), None),
        (constraints.greater_than(1.0), None),
        (constraints.unit_interval, None),
    ],
)
def test_marginals_have_their_own_law(support, expected):
    model = Of(x=Site((2,), support, ("a",)))
    law = MeanField().marginals(MeanField().init(model, Y, rng=0), model, Y)["x"]
    assert type(law) is (expected or TransformedDistribution)
    assert law.batch_shape == (2,)


def test_full_rank_states_a_normal_density():
    """log q against torch's multivariate normal at the same parameters."""
    model, guide = LineModel(width=3), FullRank(0.5)
    params = guide.init(model, line_data(width=3), rng=0)
    params["below"] = torch.arange(9.0, dtype=torch.float64).reshape(3, 3) / 5
    values, log_q = guide.sample(params, model, Batch(line_data(width=3)), 5, rng=0)
    tril = params["below"].tril(-1) + 0.5 * torch.eye(3, dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(params["loc"], scale_tril=tril)
    torch.testing.assert_close(log_q.total(), law.log_prob(values["w"]))


def test_low_rank_states_a_normal_density():
    model, guide = LineModel(width=3), LowRank(1, 0.5)
    params = guide.init(model, line_data(width=3), rng=0)
    params["factor"] = torch.tensor([[1.0], [-0.5], [0.2]], dtype=torch.float64)
    values, log_q = guide.sample(params, model, Batch(line_data(width=3)), 5, rng=0)
    covariance = params["factor"] @ params["factor"].T + 0.25 * torch.eye(3, dtype=torch.float64)
    law = torch.distributions.MultivariateNormal(params["loc"], covariance)
    torch.testing.assert_close(log_q.total(), law.log_prob(values["w"]))


def test_low_rank_is_not_wider_than_the_sites():
    params = LowRank(8).init(LineModel(), line_data(), rng=0)
    assert params["factor"].shape == (2, 2)


def test_fixed_keeps_its_parameters():
    params = MeanField().init(LineModel(), line_data(), rng=0)
    guide = Fixed(MeanField(), params)
    assert guide.init(LineModel(), line_data(), rng=9) is params
    expected = MeanField().sample(params, LineModel(), Batch(line_data()), 2, rng=1)[0]["w"]
    found = guide.sample(params, LineModel(), Batch(line_data()), 2, rng=1)[0]["w"]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("guide", [MeanField, FullRank, LowRank])
def test_options_are_checked(guide, scale):
    with pytest.raises(DataError, match=f"^{guide.__name__}: expected init_scale > 0"):
        guide(init_scale=scale)


def test_rank_is_checked():
    with pytest.raises(DataError, match="expected rank >= 1, got 0"):
        LowRank(0)


def test_discrete_sites_are_refused():
    model = Of(k=Site((), constraints.boolean, discrete=True))
    with pytest.raises(CapabilityError, match="discrete: k"):
        MeanField().init(model, Y, rng=0)


def test_marginals_of_sites_made_with_to_event_are_known():
    class Events(Model):
        def sites(self, data):
            return {
                "w": Site((2, 3), constraints.independent(constraints.real, 2), ("a", "b")),
                "s": Site((3,), constraints.independent(constraints.positive, 1), ("b",)),
                "p": Site((3,), constraints.independent(constraints.unit_interval, 1), ("b",)),
            }

        def log_joint(self, values, data, *, scale=1.0):
            return -values["w"].square().sum() - values["s"].sum() - values["p"].sum()

    post = pk.infer(Events(), torch.zeros(1), SVI(steps=2, evidence_draws=2), rng=0)
    assert post.marginals["w"].event_shape == (2, 3)
    table = post.summary()
    assert len(table) == 12 and not table.isna().any().any()

"""Domains, encodings and outcome transforms."""

from __future__ import annotations

import pytest
import torch
from botorch.acquisition import LogExpectedImprovement, qLogExpectedImprovement

import probkit as pk
from probkit.bo.domain import Domain, as_domain
from probkit.bo.surrogates import RankGaussian, Winsorize, make_surrogate
from probkit.bo.surrogates.data import training_data
from probkit.bo.surrogates.encoding import Encode
from probkit.bo.surrogates.outcomes import lower_fence, outcome_transform


def _mixed():
    bounds = torch.tensor([[0.0, 0.0, 1.0, 0.0], [10.0, 2.0, 5.0, 1.0]])
    return Domain(bounds, categorical=(1,), integer=(2,))


def test_points_become_features():
    x = torch.tensor([[5.0, 2.0, 2.2, 0.25], [0.0, 0.0, 5.0, 1.0]]).double()
    codes = Encode(_mixed())(x)
    expected = torch.tensor([[0.5, 2.0, 0.25, 0.25], [0.0, 0.0, 1.0, 1.0]]).double()
    torch.testing.assert_close(codes, expected)
    units = Encode(_mixed(), one_hot=True, center=True)(x)
    h = 0.5**0.5
    expected = torch.tensor([[0.0, -0.5, -0.5, 0, 0, h], [-1.0, 1.0, 1.0, h, 0, 0]]).double()
    torch.testing.assert_close(units, expected)
    assert Encode(_mixed(), one_hot=True).features == 6 and Encode(_mixed()).features == 4
    gap = units[0, 3:] - units[1, 3:]
    assert float(gap.norm()) == pytest.approx(1.0)


def test_rounding_lets_gradients_through():
    x = torch.tensor([[5.0, 2.0, 2.2, 0.25]]).double().requires_grad_()
    (slope,) = torch.autograd.grad(Encode(_mixed())(x)[0, 2], x)
    assert float(slope[0, 2]) == pytest.approx(0.25)


def test_samples_fill_the_box_and_its_branches():
    domain = _mixed()
    x = domain.sample(300, seed=0)
    domain.check(x)
    assert torch.bincount(x[:, 1].long()).tolist() == pytest.approx([100, 100, 100], abs=12)
    assert torch.bincount(x[:, 2].long())[1:].tolist() == pytest.approx([60] * 5, abs=12)
    assert torch.equal(x, domain.sample(300, seed=0))
    branches = Domain(domain.bounds, (1,), (2,), branches=({1: 0.0, 3: 0.5}, {1: 2.0}))
    x = branches.sample(200, seed=0)
    assert set(x[:, 1].tolist()) == {0.0, 2.0}
    assert bool((x[x[:, 1] == 0, 3] == 0.5).all())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Domain(torch.zeros(3)), r"bounds: expected \[2, feature\]"),
        (lambda: Domain([[0, 1], [1, 1]]), r"expected lower < upper .* got \[1, 1\] for feature 1"),
        (lambda: Domain([[0, 2], [1, 1]]), r"got \[2, 1\] for feature 1"),
        (lambda: Domain([[0.0], [float("inf")]]), "bounds must be finite"),
        (lambda: Domain([[0.0], [1.5]], categorical=(0,)), "expected whole numbers for feature 0"),
        (lambda: Domain([[0.0], [1.0]], categorical=(1,)), r"distinct columns in \[0, 1\)"),
        (lambda: Domain([[0.0], [1.0]], (0,), (0,)), "categorical or integer, got both"),
        (lambda: Domain([[0.0], [1.0]], fidelity=3), r"fidelity: expected a column in \[0, 1\)"),
        (lambda: Domain([[0.0], [1.0]], branches=({4: 1.0},)), "branches: expected columns"),
    ],
)
def test_bad_domains_are_named(make, text):
    with pytest.raises((pk.DataError, pk.ShapeError), match=text):
        make()


def test_bad_observations_are_named():
    x, y = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), None
    y = x.sum(1)
    with pytest.raises(pk.DataError, match="Y must be finite, got nan at row 2, output 0"):
        training_data(x, torch.where(torch.arange(4) == 2, torch.nan, y))
    with pytest.raises(pk.DataError, match="X must be finite, got inf at row 1"):
        training_data(torch.where(torch.arange(4)[:, None] == 1, torch.inf, x), y)
    with pytest.raises(pk.DataError, match="needs at least 2 observations, got 1"):
        training_data(x[:1], y[:1])
    with pytest.raises(pk.ShapeError, match=r"equally many rows, got \(4, 2\) and \(3, 1\)"):
        training_data(x, y[:3])
    with pytest.raises(pk.DataError, match=r"got 2 outside \[0, 1\] at row 0, feature 0"):
        training_data(torch.full_like(x, 2.0), y)
    with pytest.raises(pk.ShapeError, match=r"Yvar: expected the shape of Y \(4, 1\)"):
        training_data(x, y, y[:2])
    with pytest.raises(pk.DataError, match="Yvar: expected variances >= 0, got -1 at row 0"):
        training_data(x, y, torch.full((4,), -1.0))
    with pytest.raises(pk.DataError, match=r"whole category codes, got 0.5 at row 0, feature 1"):
        training_data(
            torch.full_like(x, 0.5), y, bounds=Domain([[0.0, 0.0], [1.0, 2.0]], categorical=(1,))
        )
    with pytest.raises(pk.DataError, match="surrogate: expected one of 'gp', .* got 'gpp'"):
        make_surrogate("gpp", x, y, rng=0)
    with pytest.raises(pk.DataError, match="surrogate options: .*colour"):
        make_surrogate("gp", x, y, options={"colour": 1}, rng=0)
    with pytest.raises(pk.CapabilityError, match="expected a name, a Surrogate .* got int"):
        make_surrogate(3, x, y, rng=0)
    with pytest.raises(pk.DataError, match="outcome: expected one of 'standardize', .* got 'log'"):
        make_surrogate("gp", x, y, outcome="log", rng=0)
    with pytest.raises(pk.ShapeError, match=r"expected \[row, feature=3\]"):
        as_domain([[0.0] * 3, [1.0] * 3], 3).check(x)


def test_clipping_holds_off_bad_outliers():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(40, 1, generator=generator).double()
    y[:3] = torch.tensor([[-1e6], [-400.0], [-30.0]])
    transform = Winsorize(1)
    scaled = transform(y)[0]
    fence = float(lower_fence(y, 3.0))
    assert -6 < fence < -1.5
    clean = y[3:]
    # The scale is about that of the bulk, whatever the outliers.
    assert float(transform.stdvs) == pytest.approx(float(clean.std()), rel=0.35)
    torch.testing.assert_close(transform.untransform(scaled)[0][3:], clean)
    assert float(scaled[:3].std()) == pytest.approx(0.0, abs=1e-9)
    transform.eval()
    far = transform(torch.tensor([[-1e6]]).double())[
        0
    ]  # Predictions below the clip stay as they are.
    torch.testing.assert_close(transform.untransform(far)[0], torch.tensor([[-1e6]]).double())
    constant = torch.ones(5, 1).double()
    assert bool(torch.isfinite(Winsorize(1)(constant)[0]).all())


def test_clipping_leaves_plain_outcomes_alone():
    y = torch.linspace(-1, 1, 21).double()[:, None]
    torch.testing.assert_close(Winsorize(1)(y)[0], outcome_transform("standardize", 1)(y)[0])


def test_ranks_ignore_any_increasing_change_of_units():
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(30, 2, generator=generator).double()
    y[4] = y[5]
    one, other = RankGaussian(2), RankGaussian(2)
    torch.testing.assert_close(one(y)[0], other(y.exp() * 1e4)[0], rtol=1e-9, atol=1e-9)
    scores = one(y)[0]
    torch.testing.assert_close(one.untransform(scores)[0], y)
    assert torch.equal(scores[4], scores[5])
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-9)
    beyond = one.eval()(y.max(0, keepdim=True).values + 1)[0]
    assert bool((beyond > scores.max(0).values).all())
    part = one.subset_output([1])
    torch.testing.assert_close(part.untransform(scores[:, 1:])[0], y[:, 1:])
    variance = one.eval()(y[:3], torch.full((3, 2), 1e-12).double())[1]
    moved = one(y[:3] + 1e-7)[0] - one(y[:3])[0]
    torch.testing.assert_close(variance, 1e-12 * (moved / 1e-7).square(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("outcome", ["winsorize", "bilog", "rank", "none"])
def test_surrogates_take_every_outcome_transform(outcome):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(15, 2, generator=generator).double()
    y = -(x - 0.4).square().sum(1, keepdim=True)
    y[2] = -1e5 if outcome in ("winsorize", "rank") else y[2]
    for name, options in (("gp", {}), ("ensemble", {"steps": 20, "members": 3})):
        model = make_surrogate(name, x, y, outcome=outcome, options=options, rng=0)
        with pk.scope(rng=0):
            value = qLogExpectedImprovement(model, y.max())(x[:3, None])
        assert bool(torch.isfinite(value).all())
    if outcome == "winsorize":
        gp = make_surrogate("gp", x, y, outcome=outcome, rng=0)
        values = LogExpectedImprovement(gp, y.max())(x[:, None])
        assert bool(torch.isfinite(values).all())
        keep = torch.arange(15) != 2
        assert float((gp.posterior(x).mean - y)[keep].abs().max()) < 0.1

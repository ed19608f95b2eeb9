"""Maximising acquisition functions: boxes, categories, branches, batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from botorch.acquisition import AcquisitionFunction
from botorch.models.deterministic import GenericDeterministicModel
from botorch.utils.transforms import t_batch_mode_transform

import probkit as pk
from probkit.bo.domain import Domain
from probkit.bo.policy import acquisition_for, maximise
from probkit.bo.surrogates import make_surrogate


class Surface(AcquisitionFunction):
    """A known function of one point, that turns away from pending ones."""

    def __init__(self, function):
        super().__init__(GenericDeterministicModel(lambda X: X[..., :1]))
        self.function = function
        self.X_pending = None

    def set_X_pending(self, X_pending=None):
        self.X_pending = X_pending

    @t_batch_mode_transform(expected_q=1)
    def forward(self, X):
        value = self.function(X.squeeze(-2))
        if self.X_pending is not None:
            gap = (X - self.X_pending).square().sum(-1)
            value = value - torch.exp(-gap / 0.01).sum(-1)
        return value


def test_the_maximum_of_a_smooth_function_is_found_to_many_digits():
    centre = torch.tensor([0.3123, 0.7771, 1.9]).double()
    surface = Surface(lambda x: -(x - centre).square().sum(-1))
    bounds = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 2.0]])
    found = maximise(surface, bounds, rng=0)
    torch.testing.assert_close(found[0], centre, rtol=0, atol=1e-4)


def test_a_narrow_peak_beside_an_incumbent_is_found():
    """A thousandth of the box wide: no space-filling design would see it."""
    centre = torch.tensor([0.31234, 0.77711]).double()

    def peak(x):
        return torch.exp(-((x - centre) / 2e-3).square().sum(-1)) - (x - 0.9).square().sum(-1)

    incumbent = centre[None] + 1e-3
    near = maximise(Surface(peak), None, incumbents=incumbent, rng=0)
    torch.testing.assert_close(near[0], centre, rtol=0, atol=1e-4)
    far = maximise(Surface(peak), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), rng=0)
    assert float((far[0] - 0.9).abs().max()) < 1e-2


def test_categories_and_whole_numbers_keep_their_values():
    bounds = torch.tensor([[0.0, 0.0, 0.0, 1.0], [1.0, 3.0, 4.0, 30.0]])
    domain = Domain(bounds, categorical=(1, 2), integer=(3,))
    worth = torch.tensor([[0.0, 1.0, 5.0, 2.0, 3.0]] * 4).double()
    worth[2, 4] = 9.0

    def value(x):
        a, b = x[..., 1].round().long(), x[..., 2].round().long()
        return worth[a, b] - (x[..., 0] - 0.25).square() - 0.1 * (x[..., 3] - 17.2).square()

    found = maximise(Surface(value), domain, rng=0)[0]
    assert found[1:].tolist() == [2.0, 4.0, 17.0]
    assert float(found[0]) == pytest.approx(0.25, abs=1e-3)


def test_a_space_of_categories_alone_is_climbed():
    domain = Domain(torch.tensor([[0.0] * 10, [3.0] * 10]), categorical=tuple(range(10)))
    target = torch.tensor([0, 3, 1, 2, 2, 0, 1, 3, 3, 1]).double()
    found = maximise(Surface(lambda x: (x == target).double().sum(-1)), domain, rng=0)
    assert torch.equal(found[0], target)


def test_each_branch_of_a_conditional_space_is_searched():
    """Column 1 is active only where column 0 is 1; elsewhere it stands at zero."""
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    domain = Domain(bounds, categorical=(0,), branches=({0: 0.0, 1: 0.0}, {0: 1.0}))
    for best in (0.0, 1.0):
        value = lambda x, best=best: (  # noqa: E731
            2.0 * (x[..., 0] == best).double() - (x[..., 1] - 0.6).square()
        )
        found = maximise(Surface(value), domain, rng=0)[0]
        assert float(found[0]) == best
        assert float(found[1]) == pytest.approx(0.6 if best else 0.0, abs=1e-3)


def test_points_of_a_batch_are_distinct_and_new():
    domain = Domain(torch.tensor([[0.0, 0.0], [2.0, 1.0]]), categorical=(0, 1))
    surface = Surface(lambda x: x.sum(-1))
    visited = torch.tensor([[2.0, 1.0], [1.0, 1.0]]).double()
    found = maximise(surface, domain, q=4, avoid=visited, rng=0)
    rows = {tuple(row) for row in found.tolist()}
    assert rows == set(itertools.product((0.0, 1.0, 2.0), (0.0, 1.0))) - {(2.0, 1.0), (1.0, 1.0)}
    assert surface.X_pending is None
    everything = domain.sample(200, seed=0).unique(dim=0)
    with pytest.raises(pk.DataError, match=r"all points of the space have been proposed \(6"):
        maximise(surface, domain, avoid=everything, rng=0)


@pytest.mark.parametrize("name", ["gp", "ensemble"])
def test_batches_of_surrogates_are_pairwise_distinct(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(9, 2, generator=generator).double()
    y = -(x - 0.4).square().sum(1, keepdim=True)
    options = {"hidden": (6,), "steps": 40, "members": 6} if name == "ensemble" else None
    model = make_surrogate(name, x, y, options=options, rng=0)
    acquisition = acquisition_for(model, X=x, Y=y, q=4, samples=32, rng=0)
    before = torch.get_rng_state()
    found = maximise(acquisition, None, q=4, incumbents=x, rng=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert float(torch.pdist(found).min()) > 1e-6
    assert torch.equal(found, maximise(acquisition, None, q=4, incumbents=x, rng=0))
    as_domain_check = Domain(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    as_domain_check.check(found)


def test_look_ahead_finds_its_points_together():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 1, generator=generator).double()
    y = -(x - 0.4).square()
    model = make_surrogate("gp", x, y, rng=0)
    acquisition = acquisition_for(model, X=x, Y=y, acquisition="kg", rng=0)
    found = maximise(
        acquisition, None, incumbents=x, raw_samples=8, restarts=1, iterations=5, rng=0
    )
    assert found.shape == (1, 1) and 0 <= float(found) <= 1
    domain = Domain(torch.tensor([[0.0], [2.0]]), categorical=(0,))
    with pytest.raises(pk.CapabilityError, match="looks ahead in continuous boxes only"):
        maximise(acquisition, domain, rng=0)


def test_fidelity_stays_at_its_target_unless_it_is_chosen():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(8, 2, generator=generator).double()
    domain = Domain(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), fidelity=1)
    found = maximise(Surface(lambda z: -(z - 0.3).square().sum(-1)), domain, rng=0)
    assert found[0].tolist() == pytest.approx([0.3, 1.0], abs=1e-3)
    assert len(x) == 8


def test_one_point_functions_take_no_batch():
    x = torch.rand(6, 1, generator=torch.Generator().manual_seed(0)).double()
    model = make_surrogate("gp", x, x, rng=0)
    acquisition = acquisition_for(model, X=x, Y=x, rng=0)
    with pytest.raises(pk.CapabilityError, match="values one point at a time; for several take"):
        maximise(acquisition, None, q=2, incumbents=x, rng=0)
    with pytest.raises(pk.DataError, match="bounds: expected a Domain"):
        maximise(Surface(lambda z: z.sum(-1)), None, rng=0)

"""Laws made of laws: finite mixtures as one distribution, and independent blocks."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td

import probkit as pk
from probkit import distributions as D
from probkit.predictive import Analytic, Mixture
from probkit.testing.statistics import z_bound


def _normals(*shape: int) -> td.Normal:
    generator = torch.Generator().manual_seed(0)
    loc = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return td.Normal(loc, 0.2 + torch.rand(shape, generator=generator, dtype=torch.float64))


def _weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# ------------------------------------------------------------------------------- mixtures


def test_a_mixture_is_that_of_torch():
    ours = D.FiniteMixture(_normals(4, 5), _weights(4, 5))
    theirs = td.MixtureSameFamily(
        td.Categorical(logits=_weights(4, 5).T),
        td.Normal(_normals(4, 5).loc.T, _normals(4, 5).scale.T),
    )
    x = _normals(3, 5).loc
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.variance, theirs.variance)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x))
    torch.testing.assert_close(ours.cdf(x), theirs.cdf(x))
    level = torch.tensor(0.3, dtype=torch.float64)
    torch.testing.assert_close(ours.cdf(ours.icdf(level)), level.expand(5), rtol=0, atol=1e-8)


@pytest.mark.parametrize("joint", [False, True])
def test_draws_take_components_by_their_weights(joint):
    """Each batch element has weights of its own; entries of a joint draw share the component."""
    n = 20_000
    if joint:
        loc = torch.tensor([[[-3.0, -3.0]], [[3.0, 3.0]]], dtype=torch.float64).expand(2, 2, 2)
        parts = D.ScaledMultivariateNormal(loc, 0.1 * torch.eye(2).double(), torch.ones(2, 2))
    else:
        parts = td.Normal(torch.tensor([[-3.0], [3.0]]).double().expand(2, 2), 0.1)
    probabilities = torch.tensor([[0.2, 0.9], [0.8, 0.1]], dtype=torch.float64)
    law = D.FiniteMixture(parts, probabilities.log())
    draws = D.sample(law, (n,), generator=torch.Generator().manual_seed(0))
    low = (draws < 0).double()
    if joint:
        assert bool((low[..., 0] == low[..., 1]).all())
        low = low[..., 0]
    z = (low.mean(0) - probabilities[0]) / (probabilities[0] * probabilities[1] / n).sqrt()
    assert float(z.abs().max()) < z_bound(2)


def test_parameters_that_components_share_are_not_copied():
    """One factor serves 300 amplitudes; a draw for each batch element has its own amplitude."""
    loc = torch.zeros(1, 2, 3, dtype=torch.float64)
    root = torch.eye(3, dtype=torch.float64).expand(1, 1, 3, 3)
    amplitude = torch.linspace(0.1, 3, 300, dtype=torch.float64)[:, None].expand(300, 2)
    law = D.FiniteMixture(D.ScaledMultivariateNormal(loc, root, amplitude), torch.zeros(300, 1))
    draws = D.sample(law, (20_000,), generator=torch.Generator().manual_seed(0))
    squares = draws.square()
    z = (squares.mean(0) - law.variance) / (squares.std(0) / 20_000**0.5)
    assert float(z.abs().max()) < z_bound(6)
    assert law.select_batch(1).batch_shape == ()
    assert law.select_batch(torch.tensor([1, 1, 0])).batch_shape == (3,)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(pk.ShapeError, match=r"log_weights \[component, \*batch\] = \(4, 5\)"):
        D.FiniteMixture(_normals(4, 5), torch.zeros(4, 3))


# --------------------------------------------------------------------------------- blocks


def test_blocks_put_every_entry_in_its_place():
    first, second = _normals(2, 3), td.StudentT(torch.full((2, 1), 5.0).double())
    law = D.IndependentBlocks(
        [first, second], [torch.tensor([2, 0, 3]), torch.tensor([1])], axis=-1
    )
    assert law.batch_shape == (2, 4) and law.event_shape == ()
    torch.testing.assert_close(law.mean[:, [2, 0, 3]], first.mean)
    torch.testing.assert_close(law.variance[:, 1:2], second.variance)
    x = _normals(6, 2, 4).loc
    density = law.log_prob(x)
    torch.testing.assert_close(density[..., [2, 0, 3]], first.log_prob(x[..., [2, 0, 3]]))
    torch.testing.assert_close(density[..., 1:2], second.log_prob(x[..., 1:2]))
    level = Analytic(law).cdf(Analytic(law).quantile(0.2))
    torch.testing.assert_close(
        level, torch.full((2, 4), 0.2, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert Analytic(law).quantile(0.5).dtype == torch.float64
    assert Analytic(law).sample(7, rng=0).shape == (7, 2, 4)


def test_joint_blocks_have_one_density():
    root = torch.linalg.cholesky(torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64))
    two = D.MultivariateStudentT(torch.tensor(5.0).double(), torch.ones(2).double(), root)
    one = D.ScaledMultivariateNormal(torch.zeros(1).double(), torch.eye(1).double())
    law = D.IndependentBlocks([two, one], [torch.tensor([0, 2]), torch.tensor([1])], axis=-1)
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(law.log_prob(x), two.log_prob(x[[0, 2]]) + one.log_prob(x[[1]]))
    marginal = D.marginals(law)
    assert marginal.event_shape == ()
    torch.testing.assert_close(marginal.variance, law.variance)


def test_stacked_blocks_are_one_part_for_each_output():
    columns = [_normals(3), td.Normal(torch.zeros(3).double(), 2.0)]
    law = D.IndependentBlocks(
        columns, [torch.tensor([1]), torch.tensor([0])], axis=-1, stacked=True
    )
    assert law.batch_shape == (3, 2)
    torch.testing.assert_close(law.mean[:, 1], columns[0].mean)
    assert law.part_at(0) is columns[1]
    plain = D.IndependentBlocks(columns, [torch.arange(3), torch.arange(3, 6)], axis=-1)
    with pytest.raises(pk.CapabilityError, match="stacked along a dim"):
        plain.part_at(0)


def test_a_mixture_of_blocks_keeps_their_dependence():
    """The component is shared by all blocks: given it they are independent, mixed they are not."""
    left, right = (
        td.Normal(torch.tensor([[-3.0], [3.0]]).double(), torch.tensor(0.1).double()),
        td.Normal(torch.tensor([[-2.0], [2.0]]).double(), torch.tensor(0.1).double()),
    )
    blocks = D.IndependentBlocks([left, right], [torch.tensor([0]), torch.tensor([1])], axis=-1)
    mixture = Mixture(blocks, torch.tensor([0.3, 0.7]).double().log())
    draws = mixture.sample(4000, rng=0)
    assert bool(((draws[:, 0] < 0) == (draws[:, 1] < 0)).all())
    share = float((draws[:, 0] < 0).double().mean())
    assert abs(share - 0.3) < 4 * (0.21 / 4000) ** 0.5


def test_positions_must_add_up():
    part = _normals(2)
    for positions in ([torch.tensor([0, 2])], [torch.tensor([0, 0])], []):
        with pytest.raises(pk.ShapeError, match="positions that are together 0, 1"):
            D.IndependentBlocks([part] * len(positions), positions, axis=-1)

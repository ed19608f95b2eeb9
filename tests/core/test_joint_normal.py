"""A normal law on a table against the law of its entries in a row."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal

import probkit as pk
from probkit import distributions as D
from probkit.errors import ShapeError
from probkit.testing import worst_z, z_bound

GENERATOR = torch.Generator().manual_seed(0)
ROOT = torch.randn(2, 6, 6, generator=GENERATOR).double().tril() + 3 * torch.eye(6)
LOC = torch.randn(2, 3, 2, generator=GENERATOR).double()
LAW = D.JointNormal(LOC, ROOT)
FLAT = MultivariateNormal(LOC.flatten(-2), ROOT @ ROOT.mT)


def test_density_and_moments_are_those_of_the_flat_law():
    y = torch.randn(4, 2, 3, 2, generator=GENERATOR).double()
    torch.testing.assert_close(LAW.log_prob(y), FLAT.log_prob(y.flatten(-2)))
    torch.testing.assert_close(LAW.variance, FLAT.variance.reshape(2, 3, 2))
    torch.testing.assert_close(LAW.covariance_matrix, FLAT.covariance_matrix)
    assert LAW.batch_shape == (2,) and LAW.event_shape == (3, 2)
    margins = D.marginals(LAW)
    torch.testing.assert_close(margins.stddev.square(), LAW.variance)
    wide = LAW.expand((5, 2))
    torch.testing.assert_close(wide.log_prob(y[:1]), LAW.log_prob(y[0]).expand(5, 2))


def test_draws_have_its_covariance():
    with pk.scope(rng=1):
        draws = (LAW.sample((4000,)) - LOC).flatten(-2)
    products = draws[..., :, None] * draws[..., None, :]
    assert worst_z(products, LAW.covariance_matrix) < z_bound(72)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"scale_tril .* got \(3, 2\) and \(3, 3\)"):
        D.JointNormal(torch.zeros(3, 2), torch.eye(3))

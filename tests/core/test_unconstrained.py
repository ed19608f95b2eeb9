"""Bijections: round trips, and Jacobians against automatic differentiation."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from pyro.distributions import constraints as pyro_constraints
from torch.distributions import LKJCholesky, Wishart, constraints

from probkit.bijections import bijection
from probkit.errors import CapabilityError, DataError
from probkit.model import Site
from probkit.unconstrained import Unconstrained


def free_entries(value, support):
    """The entries of a value that may vary on their own: what its density is a density of."""
    name = type(support).__name__.lower()
    if "simplex" in name:
        return value[..., :-1].flatten()
    size = value.shape[-1] if value.ndim > 1 else 0
    if "corrcholesky" in name:
        row, column = torch.tril_indices(size, size, -1)
        return value[..., row, column].flatten()
    if "cholesky" in name or "definite" in name:
        row, column = torch.tril_indices(size, size)
        return value[..., row, column].flatten()
    if "corr" in name:
        row, column = torch.tril_indices(size, size, -1)
        return value[..., row, column].flatten()
    return value.flatten()


CASES = {
    "real": (constraints.real, (3,)),
    "positive": (constraints.positive, (2, 2)),
    "nonnegative": (constraints.nonnegative, (2,)),
    "unit interval": (constraints.unit_interval, (3,)),
    "interval": (constraints.interval(-2.0, 5.0), (3,)),
    "greater": (constraints.greater_than(1.5), (2,)),
    "less": (constraints.less_than(-1.0), (2,)),
    "scalar": (constraints.positive, ()),
    "real vector": (constraints.real_vector, (3,)),
    "independent": (constraints.independent(constraints.positive, 1), (3,)),
    "simplex": (constraints.simplex, (4,)),
    "corr_cholesky": (constraints.corr_cholesky, (3, 3)),
    "lower_cholesky": (constraints.lower_cholesky, (3, 3)),
    "positive_definite": (constraints.positive_definite, (3, 3)),
    "corr_matrix": (pyro_constraints.corr_matrix, (3, 3)),
    "ordered": (pyro_constraints.ordered_vector, (4,)),
    "positive ordered": (pyro_constraints.positive_ordered_vector, (3,)),
}


def flat_of(name, n, generator):
    support, shape = CASES[name]
    site = Site(shape, support, tuple(f"d{k}" for k in range(len(shape))))
    free = Unconstrained({"x": site})
    return free, torch.randn(n, free.size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, generator):
    support, shape = CASES[name]
    free, flat = flat_of(name, 20, generator)
    values = free.values(flat)
    assert values["x"].shape == (20, *shape)
    assert bool(support.check(values["x"]).all())
    torch.testing.assert_close(free.flatten(values), flat, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_log_jacobian_is_that_of_autograd(name, generator):
    support, _ = CASES[name]
    free, flat = flat_of(name, 4, generator)
    _, log_det = free.constrain(flat)
    assert log_det.shape == (4,)
    for row, found in zip(flat, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: free_entries(free.values(x)["x"], support), row
        )
        expected = torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_jacobians_are_not_zero_by_chance(generator):
    """The comparison would catch a missing Jacobian in every case but those that have none."""
    for name in set(CASES) - {"real", "real vector"}:
        free, flat = flat_of(name, 4, generator)
        assert float(free.constrain(flat)[1].abs().max()) > 0.1, name


def test_several_sites_lie_one_after_another(generator):
    sites = {name.replace(" ", "_"): case for name, case in CASES.items()}
    free = Unconstrained(
        {n: Site(s, c, tuple(f"{n}{k}" for k in range(len(s)))) for n, (c, s) in sites.items()}
    )
    flat = torch.randn(2, 3, free.size, generator=generator, dtype=torch.float64)
    values, log_det = free.constrain(flat)
    assert log_det.shape == (2, 3)
    assert all(values[n].shape == (2, 3, *s) for n, (_, s) in sites.items())
    torch.testing.assert_close(free.flatten(values), flat, rtol=1e-7, atol=1e-9)
    parts = 0.0
    for n, (c, s) in sites.items():
        alone = Unconstrained({n: Site(s, c, tuple(f"{n}{k}" for k in range(len(s))))})
        parts = parts + alone.constrain(alone.flatten({n: values[n]}))[1]
    torch.testing.assert_close(log_det, parts)


def integral(law, name, order, n, generator):
    """Importance estimate and error of the integral of a density over its support."""
    support, _ = CASES[name]
    free = Unconstrained({"x": Site((order, order), support, ("a", "b"))})
    scale = 1.5
    flat = scale * torch.randn(n, free.size, generator=generator, dtype=torch.float64)
    log_q = -0.5 * (flat / scale).square() - math.log(scale * math.sqrt(2 * math.pi))
    values, log_det = free.constrain(flat)
    weights = (law.log_prob(values["x"]) + log_det - log_q.sum(1)).exp()
    return float(weights.mean()), float(weights.std()) / n**0.5


def test_densities_of_matrices_integrate_to_one(generator):
    """The measure is the one in which torch states Wishart and LKJ densities."""
    eye = torch.eye(2, dtype=torch.float64)
    for law, name in (
        (Wishart(torch.tensor(4.0, dtype=torch.float64), eye), "positive_definite"),
        (LKJCholesky(2, torch.tensor(1.5, dtype=torch.float64)), "corr_cholesky"),
    ):
        mean, error = integral(law, name, 2, 40_000, generator)
        assert error < 0.05 and abs(mean - 1) < 4 * error, name


@pytest.mark.parametrize("name", CASES)
def test_supports_survive_pickling(name):
    support, shape = CASES[name]
    copy = pickle.loads(pickle.dumps(support))
    assert bijection(copy).inverse_shape(shape) == bijection(support).inverse_shape(shape)


@pytest.mark.parametrize("support", [constraints.symmetric, pyro_constraints.sphere])
def test_an_unknown_support_is_named(support):
    with pytest.raises(CapabilityError, match=r"^site 'x': no bijection to the reals is known"):
        Unconstrained({"x": Site((2, 2), support, ("a", "b"))})


def test_discrete_sites_are_named():
    sites = {"k": Site((), constraints.boolean, discrete=True), "x": Site((), constraints.real)}
    with pytest.raises(CapabilityError, match=r"continuous sites; discrete: k\. Sum them out"):
        Unconstrained(sites)


def test_flatten_checks_values():
    free = Unconstrained({"s": Site((), constraints.positive), "m": Site((), constraints.real)})
    with pytest.raises(DataError, match="missing: m"):
        free.flatten({"s": torch.tensor(1.0)})
    with pytest.raises(DataError, match=r"site 's': a value lies outside its support"):
        free.flatten({"s": torch.tensor(-1.0), "m": torch.tensor(0.0)})
    with pytest.raises(DataError, match=r"site 'm': a value lies outside"):
        free.flatten({"s": torch.tensor(1.0), "m": torch.tensor(torch.nan)})


def test_no_sites_are_an_empty_vector():
    free = Unconstrained({})
    assert free.size == 0 and free.values(torch.zeros(3, 0)) == {}
    assert free.constrain(torch.zeros(3, 0))[1].tolist() == [0.0, 0.0, 0.0]

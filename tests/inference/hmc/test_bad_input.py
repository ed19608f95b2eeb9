"""What cannot be sampled is refused by name, and what went wrong is said."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.distributions import constraints

from probkit import infer
from probkit.errors import (
    CapabilityError,
    ConvergenceWarning,
    DataError,
    NumericsWarning,
    ShapeError,
)
from probkit.inference.hmc import HMC, NUTS
from probkit.inference.hmc.potential import Potential
from probkit.model import Model, Site

REAL, POSITIVE = constraints.real, constraints.positive


@dataclass(frozen=True)
class Written(Model):
    """A model whose log joint is a function of a and b; its data is that function."""

    batched: ClassVar[bool] = True

    def sites(self, data):
        return {"a": Site((), REAL), "b": Site((), POSITIVE)}

    def log_joint(self, values, data, *, scale=1.0):
        return data(values["a"], values["b"])


def fine(a, b):
    return -0.5 * a.square() - b


def run(function, sampler: Any = None, **options):
    sampler = sampler or NUTS(10, warmup=10)
    return infer(Written(), function, sampler, **{"rng": 0, **options})


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda a, b: fine(a, b) + torch.where(b > 1e9, 0.0, -torch.inf), "-inf.*sites 'a', 'b'"),
        (lambda a, b: fine(a, b) + torch.where(a < 2, torch.nan, 0.0), "nan.*'a', 'b'"),
        (lambda a, b: fine(a, b) + (0 * a).sqrt(), "gradient.*not finite for site 'a'"),
        (lambda a, b: fine(a, b) + 0 * torch.where(b > 0, b, b).sub(b).sqrt(), "gradient.*'b'"),
    ],
    ids=["density-nowhere", "density-nan", "gradient-a", "gradient-b"],
)
def test_no_finite_start_names_the_sites(function, named):
    with pytest.raises(DataError, match=named):
        run(function)


def test_the_site_that_can_be_cured_is_named():
    """Starts from the model's own initial values, b outside of the density's support."""

    class Outside(Written):
        def initial_values(self, data, n, *, rng):
            return {"a": torch.zeros(n).double(), "b": torch.full((n,), 50.0).double()}

    function = lambda a, b: fine(a, b) + torch.where(b < 2, 0.0, -torch.inf)  # noqa: E731
    with pytest.raises(DataError, match="-inf.*chain 0, because of site 'b';"):
        infer(Outside(), function, HMC(5, warmup=5), rng=0)


def test_bad_starts_are_drawn_again():
    half = lambda a, b: fine(a, b) + torch.where(a > 0, 0.0, -torch.inf)  # noqa: E731
    with pytest.warns(ConvergenceWarning, match="diverged"):
        post = run(half, HMC(40, warmup=20, step_size=0.5, length=2.0), chains=8)
    assert bool((post.draws["a"] > 0).all())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"draws": 0}, DataError, "draws and chunk >= 1"),
        ({"warmup": -1}, DataError, "warmup >= 0"),
        ({"accept": 1.0}, DataError, "accept between 0 and 1"),
        ({"step_size": 0.0}, DataError, "step_size > 0"),
        ({"block": 0}, DataError, "block >= 1"),
    ],
)
@pytest.mark.parametrize("cls", [HMC, NUTS])
def test_options_are_checked(cls, options, error, match):
    with pytest.raises(error, match=match):
        cls(**options)


def test_own_options_are_checked():
    with pytest.raises(DataError, match="max_depth from 1 to 15"):
        NUTS(max_depth=0)
    with pytest.raises(DataError, match="length > 0"):
        HMC(length=-1.0)
    with pytest.raises(DataError, match="max_steps >= 1"):
        HMC(max_steps=0)


@pytest.mark.parametrize(
    ("matrix", "dense", "error", "match"),
    [
        (torch.ones(3), False, ShapeError, r"\[D=2\] or a covariance \[D=2, D=2\].*\(3,\)"),
        (torch.eye(2), False, ShapeError, "dense=True"),
        (torch.tensor([1.0, -1.0]), False, DataError, "variances > 0"),
        (torch.tensor([1.0, torch.nan]), False, DataError, "finite"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), True, DataError, "positive definite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), True, DataError, "symmetric"),
    ],
)
def test_mass_matrices_are_checked(matrix, dense, error, match):
    with pytest.raises(error, match=f"inverse_mass.*{match}"):
        run(fine, NUTS(5, warmup=5, inverse_mass=matrix, dense=dense))


def test_a_log_joint_without_gradient_is_refused():
    class OnTheLine(Written):
        def sites(self, data):
            return {"a": Site((), REAL)}

        def log_joint(self, values, data, *, scale=1.0):
            return -values["a"].detach().square()

    with pytest.raises(CapabilityError, match="not differentiable"):
        infer(OnTheLine(), None, NUTS(5, warmup=5), rng=0)


def test_a_log_joint_of_the_wrong_shape_is_refused():
    with pytest.raises(ShapeError, match="scalar for one point"):
        run(lambda a, b: torch.stack([a, b], -1))


@pytest.mark.parametrize("cls", [HMC, NUTS])
def test_draws_of_chains_that_only_diverge_are_no_posterior(cls):
    steep = lambda a, b: -1e6 * a.square() - b  # noqa: E731
    with pytest.raises(DataError, match="all chains failed: 3 of 3 diverged"):
        run(steep, cls(20, warmup=0, step_size=5.0), chains=3)


def test_divergences_are_warned_of():
    class Walled(Written):
        def initial_values(self, data, n, *, rng):
            return {"a": torch.zeros(n).double(), "b": torch.ones(n).double()}

    wall = lambda a, b: fine(a, b) + torch.where(b > 2, -1e8 * (b - 2).square(), 0.0)  # noqa: E731
    with pytest.warns(ConvergenceWarning, match="transitions diverged after warm-up.*accept"):
        infer(Walled(), wall, HMC(40, warmup=0, step_size=0.4, length=2.0), rng=0, chains=4)


def test_chains_that_disagree_are_warned_of():
    apart = lambda a, b: -b - 2 * (a.square() - 9).square() / 9  # noqa: E731
    with pytest.warns(ConvergenceWarning, match="R-hat of a is .*above 1.01"):
        run(apart, HMC(100, warmup=50), chains=4)


def test_heavy_tails_are_warned_of():
    """Neal's funnel: the energy changes more than momenta of one draw can."""
    with pytest.warns(ConvergenceWarning) as caught:
        infer(Funnel(), None, HMC(150, warmup=50, length=3.0), rng=1, chains=4)
    assert any("E-BFMI" in str(w.message) for w in caught)


def test_trial_points_do_not_talk(recwarn):
    """Jitter at points that are tried and rejected concerns nobody; filters are put back."""

    def warns_far_out(a, b):
        if bool((a.abs() > 3).any()):
            warnings.warn("adding jitter", NumericsWarning, stacklevel=2)
        return fine(a, b)

    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as executor:
        run(warns_far_out, HMC(30, warmup=30, block=2), chains=8, executor=executor)
    assert not [w for w in recwarn if issubclass(w.category, NumericsWarning)]
    assert warnings.filters == before


class Funnel(Model):
    batched = True

    def sites(self, data):
        return {"v": Site((), REAL), "x": Site((20,), REAL, ("entry",))}

    def log_joint(self, values, data, *, scale=1.0):
        v, x = values["v"], values["x"]
        return -v.square() / 18 - (x.square().sum(-1) * (-v).exp()) / 2 - 10 * v


def test_a_matrix_that_cannot_be_factorised_ends_one_path_alone():
    class Curved(Written):
        def log_joint(self, values, data, *, scale=1.0):
            a = values["a"]
            eye = torch.eye(2, dtype=a.dtype).expand(*a.shape, 2, 2)
            corner = torch.ones(2, 2, dtype=a.dtype) - torch.eye(2, dtype=a.dtype)
            factor = torch.linalg.cholesky(eye + a[..., None, None] * corner)
            return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) - values["b"]

    points = torch.tensor([[0.5, 0.0], [1.5, 0.0], [-0.2, 0.0]], dtype=torch.float64)
    potential = Potential(Curved(), None)
    energy, gradient = potential(points)
    assert torch.isfinite(energy).tolist() == [True, False, True]
    assert bool((gradient[1] == 0).all())
    alone, slope = potential(points[:1])
    assert float(alone) == float(energy[0]) and bool((slope == gradient[:1]).all())

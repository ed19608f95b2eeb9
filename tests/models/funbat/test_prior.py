"""The Pyro program against closed forms, and message passing against NUTS on that program."""

from __future__ import annotations

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import probkit as pk
from probkit.errors import CapabilityError
from probkit.inference import NUTS
from probkit.inference.passing import MessagePassing
from probkit.kernels.state_space import Matern, Periodic
from probkit.models.funbat import (
    FunBaT,
    GaussianNoise,
    LogWarp,
    StudentTNoise,
    TensorData,
    additive,
)
from probkit.models.funbat.likelihoods import BernoulliNoise, PoissonNoise
from probkit.models.funbat.prior import factor_prior, funbat_program, multilinear

F64 = torch.float64


def small_data(
    generator: torch.Generator, *, n: int = 45, sizes: tuple[int, int] = (6, 5)
) -> TensorData:
    """Entries on a grid of one smooth product."""
    index = torch.stack(
        [torch.randint(size, (n,), generator=generator).double() / (size - 1) for size in sizes],
        -1,
    )
    f = (1 + (3 * index[:, 0]).sin()) * (2 * index[:, 1]).cos()
    return TensorData(index, f + 0.3 * torch.randn(n, generator=generator, dtype=F64))


@pytest.mark.parametrize(
    "kernel",
    [Matern(0.5, 0.3, 2.0), Matern(1.5, 0.4), Matern(2.5, 0.7), Matern(1.5, 0.3) + Periodic(0.5)],
)
def test_the_prior_of_a_factor_is_the_kernel(kernel: Matern, generator: torch.Generator) -> None:
    data = small_data(generator)
    law = factor_prior(FunBaT(2, kind="cp", kernels=kernel), data, 0)
    points = data.grids[0].points.unsqueeze(-1)
    exact = kernel(points).to_dense().detach()
    assert law.batch_shape == (2,)
    # of the periodic kernel, harmonics from the seventh on are left out: 1e-6 of the variance
    torch.testing.assert_close(law.covariance_matrix[1], exact, rtol=5e-6, atol=5e-6)


def test_the_function_is_multilinear(generator: torch.Generator) -> None:
    shapes = ((4, 2), (3, 3), (5, 2))
    factors = [torch.randn(7, *shape, generator=generator, dtype=F64) for shape in shapes]
    core = torch.randn(7, 2, 3, 2, generator=generator, dtype=F64)
    rows = torch.stack([torch.randint(n, (11,), generator=generator) for n, _ in shapes], -1)
    free = [torch.ones(r, dtype=torch.bool) for _, r in shapes]
    exact = torch.einsum(
        "bijk,bni,bnj,bnk->bn", core, *(u[:, rows[:, k]] for k, u in enumerate(factors))
    )
    torch.testing.assert_close(multilinear(factors, rows, free, core), exact)
    alone = multilinear([u[0] for u in factors], rows, free, core[0])
    torch.testing.assert_close(alone, exact[0])


def test_constant_components_are_one(generator: torch.Generator) -> None:
    mask = additive(2)  # two main effects and one product
    u = torch.randn(4, 2, generator=generator, dtype=F64)
    v = torch.randn(3, 2, generator=generator, dtype=F64)
    rows = torch.tensor([[0, 1], [3, 2]])
    f = multilinear([u, v], rows, list(mask.unbind(1)), None)
    for n, (i, j) in enumerate(rows.tolist()):
        assert float(f[n]) == pytest.approx(float(u[i, 0] + v[j, 0] + u[i, 1] * v[j, 1]))


@pytest.mark.parametrize(
    ("noise", "site"),
    [
        (GaussianNoise(2.0, 0.5), True),
        (StudentTNoise(5.0), True),
        (BernoulliNoise(0.3), False),
        (PoissonNoise(2.0), False),
    ],
)
def test_the_density_of_the_program(
    noise: GaussianNoise, site: bool, generator: torch.Generator
) -> None:
    data = small_data(generator, n=12)
    if not site:
        data = TensorData(data.index, (data.y > 0.5).double())
    model = FunBaT((2, 1), kernels=Matern(1.5, 0.4), noise=noise)
    program, inputs = funbat_program(model, data)
    wrapped = pk.FromPyro(program)
    shapes = {name: one.shape for name, one in wrapped.sites(inputs).items()}
    assert shapes == {
        "white_1": (2, data.sizes[0]),
        "white_2": (1, data.sizes[1]),
        "core": (2, 1),
        **({"noise_precision": ()} if site else {}),
    }
    values = {
        name: torch.rand(shape, generator=generator, dtype=F64) for name, shape in shapes.items()
    }
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), torch.ones((), dtype=F64))
    expected = sum(normal.log_prob(values[n]).sum() for n in shapes if n != "noise_precision")
    u = [
        (factor_prior(model, data, k).scale_tril @ values[f"white_{k + 1}"].unsqueeze(-1)).squeeze(
            -1
        )
        for k in range(2)
    ]
    rows = inputs["rows"]
    f = torch.einsum("ni,nj,ij->n", u[0].T[rows[:, 0]], u[1].T[rows[:, 1]], values["core"])
    if site:
        # in the units of the fit, plus the Jacobian of standardising
        spread = data.y.std(correction=0)
        z = (data.y - data.y.mean()) / spread
        expected = expected + noise.log_likelihood(z, f, values).sum() - 12 * spread.log()
        prior = dist.Gamma(torch.tensor(noise.shape).double(), torch.tensor(noise.rate).double())
        expected = expected + prior.log_prob(values["noise_precision"])
    else:
        expected = expected + noise.log_likelihood(data.y, f, values).sum()
    torch.testing.assert_close(wrapped.log_joint(values, inputs), expected)


def test_what_has_no_program(generator: torch.Generator) -> None:
    data = small_data(generator)
    with pytest.raises(CapabilityError, match="funbat_program knows no warp"):
        funbat_program(FunBaT(1, warp=LogWarp()), data)

    class Other(GaussianNoise.__mro__[1]):  # type: ignore[misc]
        """A likelihood of someone else's."""

    with pytest.raises(CapabilityError, match="knows no likelihood Other"):
        funbat_program(FunBaT(1, noise=Other()), data)


def moments_of(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means, standard deviations and Monte Carlo errors of the means of draws [chain, draw, *]."""
    chains, length = draws.shape[:2]
    parts = 5  # batch means: a chain's autocorrelation is short against a fifth of it
    batches = draws[:, : length // parts * parts].reshape(chains * parts, length // parts, -1)
    error = batches.mean(1).std(0) / math.sqrt(chains * parts)
    flat = draws.flatten(0, 1)
    return flat.mean(0), flat.std(0), error


@pytest.mark.slow
def test_nuts_confirms_message_passing(generator: torch.Generator) -> None:
    """Means within Monte Carlo error plus a third of a posterior sd; sds between 0.6 and 1.2.

    Factors are independent under q and dependent under the posterior (one may grow as the other
    shrinks), so that q is narrower; NUTS knows its sds to about 5 %, 400 draws being worth half.
    """
    data = small_data(generator, n=30, sizes=(4, 3))
    model = FunBaT(
        1,
        kind="cp",
        kernels=Matern(1.5, 0.5),
        noise=GaussianNoise(2.0, 0.2),
        learn_hyperparameters=False,
    )
    fast = pk.infer(model, data, MessagePassing(restarts=3), rng=0)
    program, inputs = funbat_program(model, data)
    sampler = NUTS(draws=100, warmup=100, accept=0.8, block=4)
    with warnings.catch_warnings():
        # Both factors may change sign together: R-hat sees it in them, f does not.
        warnings.simplefilter("ignore", pk.ConvergenceWarning)
        slow = pk.infer(pk.FromPyro(program), inputs, sampler, rng=1, chains=4)
    cells = torch.cartesian_prod(torch.arange(data.sizes[0]), torch.arange(data.sizes[1]))
    u, v = (
        slow.draws[f"white_{k + 1}"] @ factor_prior(model, data, k).scale_tril[0].T
        for k in range(2)
    )
    f = u[..., 0, cells[:, 0]] * v[..., 0, cells[:, 1]]
    f = data.y.mean() + data.y.std(correction=0) * f
    mean, sd, error = moments_of(f)
    index = torch.stack([grid.points[cells[:, k]] for k, grid in enumerate(data.grids)], -1)
    approximate = fast.predict(index, site="f")
    assert bool(((approximate.mean - mean).abs() < 4 * error + sd / 3).all())
    ratio = approximate.variance.sqrt() / sd
    assert 0.6 < float(ratio.min()) and float(ratio.max()) < 1.2
    # the same check refuses an approximation that is off
    assert bool(((approximate.mean + sd - mean).abs() > 4 * error + sd / 3).any())
    tau = slow.draws["noise_precision"].flatten()
    law = fast.marginals["noise_precision"]
    assert abs(float(law.mean - tau.mean())) < 0.35 * float(tau.std())

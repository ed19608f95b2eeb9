"""What must not change the result: how the density is evaluated, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.distributions import constraints

from probkit import infer
from probkit.inference.hmc import HMC, NUTS
from probkit.model import Model, Site
from probkit.testing import worst_z, z_bound

pytestmark = pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")


@dataclass(frozen=True)
class Batched(Model):
    """Two normals of different scale and a rate; the data is the mean of the normals [2]."""

    batched: ClassVar[bool] = True

    def sites(self, data):
        return {
            "x": Site((2,), constraints.real, ("entry",)),
            "rate": Site((), constraints.positive),
        }

    def log_joint(self, values, data, *, scale=1.0):
        x, rate = values["x"], values["rate"]
        sd = data.new_tensor([1.0, 5.0])
        return -0.5 * ((x - data) / sd).square().sum(-1) + 2.0 * rate.log() - 3.0 * rate


@dataclass(frozen=True)
class OneByOne(Batched):
    """The same, mapped by the sampler."""

    batched: ClassVar[bool] = False


DATA = torch.tensor([1.0, -2.0], dtype=torch.float64)
SAMPLERS = [HMC(30, warmup=20, block=2, length=2.0), NUTS(20, warmup=20, block=2)]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["hmc", "nuts"])
def test_batched_and_mapped_densities_give_the_same_chains(sampler):
    together = infer(Batched(), DATA, sampler, rng=0, chains=4)
    mapped = infer(OneByOne(), DATA, sampler, rng=0, chains=4)
    # Rounding differs in the last digit and paths of some hundred steps amplify it a little.
    for name, draws in together.draws.items():
        torch.testing.assert_close(mapped.draws[name], draws, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["hmc", "nuts"])
def test_chains_are_the_same_alone_and_among_others(sampler):
    many = infer(Batched(), DATA, sampler, rng=0, chains=6)
    few = infer(Batched(), DATA, sampler, rng=0, chains=2)
    for name, draws in few.draws.items():
        assert torch.equal(many.draws[name][:2], draws)


@pytest.mark.parametrize(
    "sampler",
    [HMC(150, warmup=100), pytest.param(NUTS(80, warmup=80), marks=pytest.mark.slow)],
    ids=["hmc", "nuts"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_precisions_have_the_same_moments(sampler, dtype):
    data = DATA.to(dtype)
    post = infer(Batched(), data, sampler, rng=1, chains=24)
    x, rate = post.draws["x"], post.draws["rate"]
    assert x.dtype == dtype and post.sample_stats["energy"].dtype == dtype
    # rate ~ Gamma(3, 3) of mean 1 and variance 1 / 3.
    assert worst_z(x.mean(1), DATA) < z_bound(6)
    assert worst_z((x - data).square().mean(1), torch.tensor([1.0, 25.0])) < z_bound(6)
    assert worst_z(rate.mean(1), 1.0) < z_bound(6)
    assert worst_z((rate - 1).square().mean(1), 1 / 3) < z_bound(6)

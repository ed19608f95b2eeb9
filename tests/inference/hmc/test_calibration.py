"""Simulation-based calibration: over data from the prior, ranks of the truth are uniform.

Talts et al. (2018). A rank is taken among independent draws, one from each chain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch.distributions import Gamma, Normal, constraints

from probkit import infer
from probkit.inference.hmc import HMC, NUTS, potential
from probkit.model import Model, Site
from probkit.rng import scope

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning"),
]

CHAINS = 15  # ranks 0, ..., 15


@dataclass(frozen=True)
class Level(Model):
    """mean ~ N(0, 2), precision ~ Gamma(2, 2), y_i ~ N(mean, precision^-1/2); 4 observations."""

    batched: ClassVar[bool] = True

    def sites(self, data):
        return {
            "mean": Site((), constraints.real),
            "precision": Site((), constraints.positive),
        }

    def log_joint(self, values, data, *, scale=1.0):
        mean, precision = values["mean"], values["precision"]
        prior = Normal(0.0, 2.0).log_prob(mean) + Gamma(2.0, 2.0).log_prob(precision)
        law = Normal(mean[..., None], precision[..., None].rsqrt())
        return prior + law.log_prob(data).sum(-1)


def ranks(sampler, datasets, seed):
    """Rank of the true mean and precision among one draw of each chain [dataset, 2]."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(datasets):
        noise = torch.randn(5, generator=generator, dtype=torch.float64)
        with scope(rng=generator):
            precision = Gamma(torch.tensor(2.0).double(), 2.0).sample()
        mean = 2.0 * noise[0]
        data = mean + noise[1:] * precision.rsqrt()
        post = infer(Level(), data, sampler, rng=number, chains=CHAINS)
        last = [post.draws["mean"][:, -1] < mean, post.draws["precision"][:, -1] < precision]
        found.append(torch.stack(last).sum(1))
    return torch.stack(found).double()


def worst_uniform_z(found):
    """Largest |z| of the first two moments of ranks against uniform ones on 0, ..., CHAINS."""
    u = (found - CHAINS / 2) / (CHAINS + 1)
    grid = (torch.arange(CHAINS + 1).double() - CHAINS / 2) / (CHAINS + 1)
    n = len(found)
    first = u.mean(0) / (grid.var(correction=0) / n).sqrt()
    square = u.square().mean(0) - grid.square().mean()
    second = square / (grid.square().var(correction=0) / n).sqrt()
    return float(torch.cat([first, second]).abs().max())


# |z| of four nearly independent numbers stays below 3.9 but for one seed in 2500.
@pytest.mark.parametrize(
    ("sampler", "datasets"),
    [(HMC(12, warmup=80, chunk=92), 60), (NUTS(4, warmup=50, chunk=54), 20)],
    ids=["hmc", "nuts"],
)
def test_ranks_are_uniform(sampler, datasets):
    assert worst_uniform_z(ranks(sampler, datasets, seed=1)) < 3.9


def test_ranks_see_a_missing_jacobian(monkeypatch):
    def forgetful(self, position):
        values, _ = self.free.constrain(position)
        return potential.log_joint_of(self.model, values, self.data)

    monkeypatch.setattr(potential.Potential, "log_density", forgetful)
    assert worst_uniform_z(ranks(HMC(12, warmup=80, chunk=92), 60, seed=1)) > 3.9

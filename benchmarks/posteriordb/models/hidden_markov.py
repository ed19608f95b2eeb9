"""A hidden Markov model with two states, summed out: y_t ~ N(mu_z, 1), 0 < mu1 < mu2.

Rows of the transition matrix are uniform on the simplex, mu1 ~ N(3, 1), mu2 ~ N(10, 1). At the
first step both states have weight one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints as pyro_constraints
from torch import Tensor
from torch.distributions import Normal, constraints

from benchmarks.posteriordb.models.case import Case, double
from probkit.inference.message_passing import hmm_log_evidence
from probkit.model import Model, Site, Values


class HiddenMarkov(Model):
    """The log joint by message passing; means as a first one and a gap above it."""

    batched = True

    def sites(self, data: Any) -> dict[str, Site]:
        """Return the latents."""
        return {
            "theta": Site((2, 2), constraints.simplex, ("state", "to")),
            "low": Site((), constraints.positive),
            "gap": Site((), constraints.positive),
        }

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return the log joint [*batch]."""
        mu = torch.stack([values["low"], values["low"] + values["gap"]], -1)
        prior = Normal(double([3.0, 10.0]), 1.0).log_prob(mu).sum(-1)
        emission = Normal(mu[..., None, :], 1.0).log_prob(data["y"][:, None])
        log_initial = emission.new_zeros(2) - torch.log(double(2.0))
        return prior + hmm_log_evidence(log_initial, values["theta"].log(), emission)


def program(y: Tensor) -> None:
    one = y.new_ones(2)
    theta1 = pyro.sample("theta1", dist.Dirichlet(one))
    theta2 = pyro.sample("theta2", dist.Dirichlet(one))
    order = dist.ImproperUniform(pyro_constraints.positive_ordered_vector, (), (2,))
    mu = pyro.sample("mu", order)
    pyro.factor("mu prior", dist.Normal(y.new_tensor([3.0, 10.0]), 1.0).log_prob(mu).sum(-1))
    log_transition = torch.stack([theta1, theta2]).log()
    emission = dist.Normal(mu, 1.0).log_prob(y[:, None])
    # The forward recursion: log p(y_1..t, z_t).
    forward = emission[0]
    for row in emission[1:]:
        forward = (forward[:, None] + log_transition).logsumexp(0) + row
    pyro.factor("y", forward.logsumexp(0))


def _data(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {"y": double(stored["y"])}


def _quantities(draws: Values) -> dict[str, Tensor]:
    if "mu" in draws:
        return draws
    mu = torch.stack([draws["low"], draws["low"] + draws["gap"]], -1)
    return {"theta1": draws["theta"][..., 0, :], "theta2": draws["theta"][..., 1, :], "mu": mu}


HIDDEN_MARKOV = Case("hmm_example", HiddenMarkov(), program, _data, _quantities)

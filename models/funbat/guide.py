"""The approximate posterior as a guide: trajectories, core and noise, independent of each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from probkit.distributions import select
from probkit.files import storable
from probkit.guide import LogQ, Params
from probkit.inference.message_passing import NaturalSites, kalman_sample_paths
from probkit.inference.passing import select_copy, stack_copies
from probkit.model import Batch, Values
from probkit.models.funbat.pairs import pairs_of, unpack
from probkit.models.funbat.smoothing import make_chain
from probkit.rng import Rng, scope, seed_of, stream

__all__ = ["TrajectoryGuide"]


@storable
@dataclass(frozen=True)
class TrajectoryGuide:
    """q(factor_1) ... q(factor_K) q(core) q(noise); each q(factor_k) is a Markov chain.

    Its parameters are the state of a fit: the sites of each mode, which with the prior make the
    chain; mean and covariance of the core; the noise's own factors.
    """

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Return the starting point of a fit."""
        generator = stream(rng, "start", device=data.device)
        return select_copy(model.start_messages(data, rngs=[generator]), 0)

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw whole trajectories, cores and noise, jointly from q."""
        layout = model.layout(batch.data, params)
        root = stream(rng, "guide", device=layout.y.device)
        state = stack_copies([params])
        values: dict[str, Tensor] = {}
        log_q = layout.y.new_zeros(n)
        for k, mode in enumerate(state["modes"]):
            chain = make_chain(layout.spaces[k], layout.grids[k], mode["hyper"])
            r = mode["eta"].shape[-1]
            sites = NaturalSites(mode["eta"], unpack(mode["precision"], r))
            paths = kalman_sample_paths(
                chain.initial_cov.new_zeros(1, chain.initial_cov.shape[-1]),
                chain.initial_cov,
                chain.transition,
                chain.noise,
                sites,
                n,
                rng=stream(seed_of(root), "factor", k),
                observation=chain.observation,
            )
            u = paths[:, 0] @ chain.observation.mT
            values[f"factor_{k + 1}"] = u
            prior = model.log_factor_prior(u, layout, k, mode["hyper"][0])
            second = u[..., pairs_of(r).first] * u[..., pairs_of(r).second]
            weight = pairs_of(r).weight.to(u)
            fit = (mode["eta"][0] * u).sum((-2, -1))
            fit = fit - (mode["precision"][0] * second @ weight).sum(-1) / 2
            log_q = log_q + prior + fit - mode["log_z"][0]
        if state["core"] is not None:
            law = MultivariateNormal(params["core"]["mean"], params["core"]["cov"])
            with scope(rng=stream(root, "core")):
                w = law.sample(torch.Size([n]))
            values["core"] = w.reshape(n, *layout.ranks)
            log_q = log_q + law.log_prob(w)
        for name, law in layout.noise.marginals(state["noise"]).items():
            with scope(rng=stream(root, name)):
                values[name] = law.sample(torch.Size([n]))[:, 0]
            log_q = log_q + law.log_prob(values[name].unsqueeze(-1))[:, 0]
        return values, LogQ(log_q, torch.zeros_like(log_q))

    def marginals(self, params: Params, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return the marginals of each point of each factor, of the core and of the noise."""
        found: dict[str, Distribution] = {}
        for k, mode in enumerate(params["modes"]):
            pairs = pairs_of(mode["mean"].shape[-1])
            variance = mode["cov"][..., pairs.first == pairs.second]
            found[f"factor_{k + 1}"] = Normal(mode["mean"], variance.sqrt(), validate_args=False)
        if params["core"] is not None:
            sd = params["core"]["cov"].diagonal().sqrt()
            ranks = model.shape_of(data)
            found["core"] = Normal(params["core"]["mean"].reshape(ranks), sd.reshape(ranks))
        laws = model.noise_model.marginals(stack_copies([params["noise"]]))
        for name, law in laws.items():
            found[name] = _first(law)
        return found


def _first(law: Distribution) -> Distribution:
    """The only copy of a law [copy]."""
    return select(law, 0)

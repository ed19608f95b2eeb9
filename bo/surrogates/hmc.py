"""Bayesian neural networks by Hamiltonian Monte Carlo, warm-started between rounds."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.bo.surrogates.base import quiet_fit, transformed_data
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.networks import NetworkSurrogate, ascend, fitting_values, tempered
from probkit.bo.surrogates.posterior_surrogate import PosteriorSurrogate
from probkit.density import log_joint_of
from probkit.driver import infer
from probkit.errors import DataError
from probkit.files import storable
from probkit.inference import HMC
from probkit.inference.hmc.start import Start
from probkit.model import Values
from probkit.models import BNN
from probkit.numerics import ess_from_log_weights
from probkit.posterior import Posterior
from probkit.rng import Rng, seed_of, stream
from probkit.sampler import Problem
from probkit.sources import Draws
from probkit.unconstrained import Unconstrained

__all__ = ["HMCSurrogate"]

_LOG = logging.getLogger("probkit")
_LEAST_ACCEPTANCE = 0.1
_SMALLER = 0.25


@storable
@dataclass(frozen=True)
class HMCSurrogate(NetworkSurrogate):
    """A network whose posterior is drawn by many chains of HMC in one tensor program.

    The first round climbs from random weights by Adam and warms up there. Later rounds weigh the
    draws of the last one by what the new data, and the new scale of the outcomes, say of them.
    Where the weights leave half of the draws effective, these draws serve again, weighted; else
    chains start from draws chosen by weight and sample anew, with the step size learned before.

    In a study whose outcomes are exact the noise is learned all the same: it is how far a network
    of this size passes by the points. Held near zero, it leaves chains stuck where they climbed and
    an ensemble that is far too sure.

    Chains that fail (no finite draws, or hardly a move accepted) are run again with a quarter of
    the step size; if that fails, too, a Gaussian process takes the place of the network in this
    round: the model says so in ``diagnostics["fallback"]``, and the log ``probkit`` warns.

    Args:
        chains: Chains.
        draws: Draws kept of each, of which the ensemble consists.
        warmup: Transitions before, in the first round.
        rewarm: Transitions before, in later rounds.
        length: Path length, with unit masses.
        max_steps: Leapfrog steps of one path at most, in the first round.
        warm_steps: The same in later rounds.
        ascent: Adam steps before the first round; a twentieth of them before later ones.
        lr: Their learning rate.
    """

    chains: int = 8
    draws: int = 12
    warmup: int = 40
    rewarm: int = 8
    length: float = 2.0
    max_steps: int = 64
    warm_steps: int = 32
    ascent: int = 2000
    lr: float = 0.05

    interpolates = False

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.chains, self.draws, self.warmup, self.rewarm, self.max_steps, self.ascent)
        if not all(isinstance(n, int) and n >= 1 for n in counts):
            raise DataError(
                "HMCSurrogate: expected whole chains, draws, warmup, rewarm, max_steps and ascent "
                f">= 1, got {', '.join(map(str, counts))}"
            )

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> Any:
        """Draw from the posterior of the network."""
        x, y, encode, transform = transformed_data(data)
        pair = (x, y[:, 0] if data.outputs == 1 else y)
        model, seed = self.network_for(data, transform), seed_of(rng)
        old = fitting_values(model, pair, previous)
        weights = _importance(model, pair, old, previous)
        if old is not None and weights is not None:
            effective = float(ess_from_log_weights(weights, 0))
            if effective >= 0.5 * len(weights):
                assert previous is not None
                reused = _reused(model, pair, old, weights)
                report = {"ess": effective, "sampled": 0.0, "fallback": 0.0}
                state = _state(model, reused, float(previous["step_size"]))
                return PosteriorSurrogate(
                    reused, encode, transform, warm_state=state, diagnostics=report
                )
        post = self._sample(model, pair, old, weights, previous, seed)
        if post is None:
            return _gaussian_process(data, seed)
        return PosteriorSurrogate(
            post,
            encode,
            transform,
            warm_state=_state(model, post, _step_size(post)),
            diagnostics=_report(post),
        )

    def _sample(
        self,
        model: BNN,
        data: tuple[Tensor, Tensor],
        old: Values | None,
        weights: Tensor | None,
        previous: Mapping[str, Any] | None,
        seed: int,
    ) -> Posterior | None:
        """Run the chains, a second time with smaller steps if need be; None where both fail."""
        warm = old is not None
        start = self._starts(model, data, old, weights, seed)
        step = float(previous["step_size"]) if warm and previous is not None else None
        masses = torch.ones(Unconstrained(model.sites(data)).size).to(data[0])
        for attempt in range(2):
            sampler = HMC(
                draws=self.draws,
                warmup=self.rewarm if warm else self.warmup,
                start=Start(start, None, step),
                step_size=step,
                inverse_mass=masses,
                adapt_mass=False,
                length=self.length,
                max_steps=self.warm_steps if warm else self.max_steps,
                accept=0.8 if attempt == 0 else 0.95,
            )
            rng = stream(seed, "chains", attempt)
            try:
                with quiet_fit():
                    post = infer(model, data, sampler, rng=rng, chains=self.chains)
            except DataError as error:
                _LOG.info("HMC surrogate: %s", error)
            else:
                if _is_sound(post):
                    return post
                step = _step_size(post)
            step = None if step is None else _SMALLER * step
        return None

    def _starts(
        self,
        model: BNN,
        data: tuple[Tensor, Tensor],
        old: Values | None,
        weights: Tensor | None,
        seed: int,
    ) -> dict[str, Tensor]:
        """Return points [chain, *site] from which chains start."""
        generator = stream(seed, "start")
        if old is None or weights is None:
            first = model.initial_values(data, self.chains, rng=generator)
            return ascend(model, data, first, steps=self.ascent, lr=self.lr)
        shares = torch.softmax(tempered(weights, 0.5 * self.chains), 0)
        chosen = torch.multinomial(shares, self.chains, replacement=True, generator=generator)
        picked = {name: value[chosen] for name, value in old.items()}
        return ascend(model, data, picked, steps=max(1, self.ascent // 20), lr=0.5 * self.lr)


def _importance(
    model: BNN,
    data: tuple[Tensor, Tensor],
    old: Values | None,
    previous: Mapping[str, Any] | None,
) -> Tensor | None:
    """Log weights [draw] that turn draws of the last posterior into draws of this one."""
    if old is None or previous is None:
        return None
    with torch.no_grad():
        new = log_joint_of(model, old, data)
    weights = new - previous["log_joint"].to(new)
    before = previous.get("log_weights")
    weights = weights if before is None else weights + before.to(new)
    return weights if bool(torch.isfinite(weights).any()) else None


def _reused(
    model: BNN, data: tuple[Tensor, Tensor], values: Values, log_weights: Tensor
) -> Posterior:
    """Return the old draws, weighted, as a posterior."""
    from probkit.posterior import make_posterior

    source = Draws({name: value[None] for name, value in values.items()}, log_weights[None])
    return make_posterior(Problem(model, data), source, attrs={"seed": 0})


def _state(model: BNN, post: Posterior, step_size: float) -> dict[str, Any]:
    """Return what the next round starts from."""
    values = {name: value.flatten(0, 1) for name, value in post.draws.items()}
    with torch.no_grad():
        log_joint = log_joint_of(model, values, post.context.data)
    weights = post.log_weights
    return {
        "values": values,
        "log_joint": log_joint,
        "log_weights": None if weights is None else weights.flatten(),
        "step_size": step_size,
    }


def _step_size(post: Posterior) -> float:
    return float(post.sample_stats["step_size"][:, -1].median())


def _is_sound(post: Posterior) -> bool:
    finite = all(bool(torch.isfinite(value).all()) for value in post.draws.values())
    accepted = float(post.sample_stats["acceptance_rate"].mean())
    return finite and math.isfinite(accepted) and accepted >= _LEAST_ACCEPTANCE


def _report(post: Posterior) -> dict[str, float]:
    stats = post.sample_stats
    return {
        "sampled": 1.0,
        "fallback": 0.0,
        "acceptance": float(stats["acceptance_rate"].mean()),
        "divergences": float(stats["diverging"].sum()),
        "leapfrog_steps": float(stats["n_steps"].double().mean()),
        "step_size": _step_size(post),
    }


def _gaussian_process(data: TrainingData, seed: int) -> Any:
    """Fit what takes the place of a network whose chains failed."""
    from probkit.bo.surrogates.gp import GPSurrogate
    from probkit.bo.surrogates.registry import _listed

    _LOG.warning(
        "HMC surrogate: no chain gave usable draws, twice; a Gaussian process takes its place in "
        "this round. Lower prior_std or length, or raise noise_var"
    )
    models = [
        GPSurrogate().fit(data.output(k), rng=stream(seed, "fallback", k))
        for k in range(data.outputs)
    ]
    model = models[0] if len(models) == 1 else _listed(models)
    for part in (model, *models):
        part.warm_state = None
    model.diagnostics = {"fallback": 1.0}
    return model

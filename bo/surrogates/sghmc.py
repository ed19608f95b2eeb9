"""Bayesian neural networks by stochastic-gradient Hamiltonian Monte Carlo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from probkit.bo.surrogates.base import quiet_fit, transformed_data
from probkit.bo.surrogates.data import TrainingData
from probkit.bo.surrogates.networks import NetworkSurrogate, ascend, fitting_values
from probkit.bo.surrogates.posterior_surrogate import PosteriorSurrogate
from probkit.driver import infer
from probkit.errors import DataError
from probkit.files import storable
from probkit.inference import SGHMC
from probkit.inference.hmc.start import Start
from probkit.rng import Rng, seed_of, stream

__all__ = ["SGHMCSurrogate"]


@storable
@dataclass(frozen=True)
class SGHMCSurrogate(NetworkSurrogate):
    """A network drawn by scale-adapted SGHMC, in the way of BOHAMIANN.

    Springenberg, Klein, Falkner and Hutter, "Bayesian optimization with robust Bayesian neural
    networks", NeurIPS 2016. Chains run together; later rounds start from the draws of the last one.
    There is no accept step, so the spread of the ensemble has a bias that no diagnostic tells.

    Args:
        chains: Chains.
        draws: Draws kept of each.
        warmup: Steps before, in the first round; a fourth of them later.
        thin: Steps from one draw to the next.
        step_size: Step size.
        batch_size: Rows of a minibatch; None, and fewer rows than that, use all.
        ascent: Adam steps before the first round.
    """

    chains: int = 4
    draws: int = 25
    warmup: int = 400
    thin: int = 10
    step_size: float = 0.01
    batch_size: int | None = 16
    ascent: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = (self.chains, self.draws, self.warmup, self.thin, self.ascent)
        if not all(isinstance(n, int) and n >= 1 for n in counts):
            raise DataError(
                "SGHMCSurrogate: expected whole chains, draws, warmup, thin and ascent >= 1, got "
                f"{', '.join(map(str, counts))}"
            )
        self._sampler(None, warm=False, rows=1)

    def _sampler(self, start: Start | None, *, warm: bool, rows: int) -> SGHMC:
        batch = self.batch_size if self.batch_size is not None and self.batch_size < rows else None
        return SGHMC(
            draws=self.draws,
            warmup=max(1, self.warmup // 4) if warm else self.warmup,
            thin=self.thin,
            step_size=self.step_size,
            batch_size=batch,
            start=start,
        )

    def fit(
        self, data: TrainingData, *, previous: Mapping[str, Any] | None = None, rng: Rng
    ) -> PosteriorSurrogate:
        """Draw from the posterior of the network."""
        x, y, encode, transform = transformed_data(data)
        pair = (x, y[:, 0] if data.outputs == 1 else y)
        model, seed = self.network_for(data, transform), seed_of(rng)
        old = fitting_values(model, pair, previous)
        if old is None:
            first = model.initial_values(pair, self.chains, rng=stream(seed, "start"))
            start = ascend(model, pair, first, steps=self.ascent, lr=0.02)
        else:
            start = dict(old)
        sampler = self._sampler(Start(start), warm=old is not None, rows=len(x))
        with quiet_fit() as caught:
            post = infer(model, pair, sampler, rng=stream(seed, "chains"), chains=self.chains)
        last = {name: value[:, -1] for name, value in post.draws.items()}
        report = {
            "warnings": float(len(caught)),
            "noise_cut": float(post.sample_stats["noise_cut"].max()),
        }
        return PosteriorSurrogate(
            post, encode, transform, warm_state={"values": last}, diagnostics=report
        )

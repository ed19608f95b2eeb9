"""Self-normalised importance sampling."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from probkit.density import check_log_joint, log_joint_of
from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.files import storable
from probkit.model import Batch, Values, lacks
from probkit.numerics import ess_from_log_weights, logmeanexp
from probkit.posterior import Evidence, Posterior, make_posterior
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree

__all__ = ["ImportanceSampling"]


@storable
@dataclass(frozen=True)
class ImportanceSampling(Sampler):
    """Weighted draws from a proposal, with an unbiased estimate of the evidence.

    The proposal is ``infer(guide=)``, else the model's own guide, else the prior (which needs
    ``sample_prior`` and ``log_likelihood``). The effective sample size is reported in
    ``attrs["ess"]``; below 10 a warning says so.

    Args:
        draws: Draws for each chain.
        chunk: Draws between reports.
        proposal: "guide" or "prior": "prior" ignores the model's own guide.

    Example:
        >>> from probkit import infer
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.models import BurrXII, ScaleMixtureNNGP
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> model = ScaleMixtureNNGP(NNGPKernel(), scale=BurrXII(2.0, 1.0))
        >>> post = infer(model, (x, x[:, 0].sin()), ImportanceSampling(500), rng=0)
        >>> post.log_weights.shape
        torch.Size([1, 500])
    """

    draws: int = 1000
    chunk: int = 1000
    proposal: str = "guide"

    needs = ("sites", "log_joint")
    accepts_guide = True

    def __post_init__(self) -> None:
        if min(self.draws, self.chunk) < 1 or self.proposal not in ("guide", "prior"):
            raise DataError(
                "ImportanceSampling: expected draws and chunk >= 1 and proposal 'guide' or "
                f"'prior', got {self.draws}, {self.chunk}, {self.proposal!r}"
            )

    def total(self) -> int:
        """Number of chunks."""
        return -(-self.draws // self.chunk)

    def _guide(self, problem: Problem) -> Any:
        """The guide that proposes; None for the prior."""
        if problem.guide is not None:
            if self.proposal == "prior":
                raise DataError("ImportanceSampling: leave out guide= or proposal='prior'")
            return problem.guide
        own = getattr(problem.model, "guide", None)
        return own() if callable(own) and self.proposal == "guide" else None

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Prepare the proposal."""
        guide = self._guide(problem)
        if guide is None:
            missing = lacks(problem.model, ("sample_prior", "log_likelihood"))
            if missing:
                raise CapabilityError(
                    f"ImportanceSampling from the prior needs sample_prior and log_likelihood; "
                    f"{type(problem.model).__name__} lacks {', '.join(missing)}. Pass guide="
                )
            return {"params": None, "drawn": 0}
        params = guide.init(problem.model, problem.data, rng=rngs[0])
        values, _ = guide.sample(params, problem.model, Batch(problem.data), 2, rng=rngs[0])
        check_log_joint(problem.model, values, problem.data)
        return {"params": params, "drawn": 0}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Draw and weigh one chunk."""
        n = min(self.chunk, self.draws - state["drawn"])
        with torch.no_grad():
            values, log_weights = self._weighted(problem, state["params"], n, rngs[0])
        if log_weights.shape != (n,):
            raise ShapeError(
                f"log_likelihood of {type(problem.model).__name__}: expected [n={n}] for n values, "
                f"got {tuple(log_weights.shape)}; carry leading dims through"
            )
        if bool((torch.isnan(log_weights) | torch.isposinf(log_weights)).any()):
            raise DataError(
                "ImportanceSampling: a log weight is NaN or infinite; check the log joint and that "
                "the proposal has a density where it draws"
            )
        keep = {
            "values": {name: value[None] for name, value in values.items()},
            "log_weights": log_weights[None],
        }
        drawn = state["drawn"] + n
        ess = float(ess_from_log_weights(log_weights, dim=0))
        return Step({**state, "drawn": drawn}, drawn >= self.draws, keep, {"ess": ess})

    def _weighted(
        self, problem: Problem, params: Any, n: int, rng: torch.Generator
    ) -> tuple[Values, Tensor]:
        guide = self._guide(problem)
        if guide is None:
            draw = problem.model.sample_prior
            # The prior of a program may depend on its inputs; such a model takes them as ``x``.
            takes_inputs = "x" in inspect.signature(draw).parameters
            values = draw(n, rng=rng, **({"x": problem.data} if takes_inputs else {}))
            return values, problem.model.log_likelihood(values, problem.data)
        values, log_q = guide.sample(params, problem.model, Batch(problem.data), n, rng=rng)
        return values, log_joint_of(problem.model, values, problem.data) - log_q.total()

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Collect draws, weights and evidence."""
        log_weights = kept["log_weights"]
        if bool(torch.isneginf(log_weights).all()):
            raise DataError(
                "ImportanceSampling: every weight is zero; the proposal does not overlap the "
                "posterior, pass another guide="
            )
        return make_posterior(
            problem,
            Draws(kept["values"], log_weights),
            log_evidence=Evidence(logmeanexp(log_weights, dim=1), "estimate"),
        )

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Report the smallest effective sample size of all chains; warn when it is below 10."""
        log_weights = posterior.source.log_weights  # type: ignore[attr-defined]
        ess = float(ess_from_log_weights(log_weights, dim=1).min())
        if ess < 10:
            warnings.warn(
                f"importance sampling kept {ess:.1f} effective draws of {log_weights.shape[1]}; "
                "the weighted draws say little: use a proposal nearer the posterior (guide=) or "
                "another sampler",
                NumericsWarning,
                stacklevel=4,
            )
        return replace(posterior, attrs={**posterior.attrs, "ess": ess})

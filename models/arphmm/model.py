"""ARPHMM: switching autoregressions whose hidden states are partially known."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical, constraints

from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.files import storable
from probkit.inference.message_passing import (
    HMMFilter,
    HMMPath,
    HMMSmoother,
    hmm_filter,
    hmm_log_evidence,
    hmm_sample_paths,
    hmm_smoother,
    hmm_viterbi,
)
from probkit.model import Model, Site, Values
from probkit.models.arphmm.emission import log_emission, second_moments
from probkit.models.arphmm.lagged import Lagged, Start, lagged
from probkit.models.arphmm.prediction import flat_draws, future, one_step_ahead, state_law
from probkit.models.arphmm.prior import SwitchingPrior, log_dirichlet, log_regimes
from probkit.models.arphmm.rul.failure import (
    Failure,
    phase_type_life,
    require_failure,
    simulate_life,
)
from probkit.models.arphmm.sequences import Sequences, as_sequences
from probkit.models.arphmm.simulation import simulate_sequences
from probkit.models.arphmm.starts import start_responsibilities
from probkit.models.arphmm.streaming import FilterState, advance, begin
from probkit.models.arphmm.supports import Covariance, MaskedSimplexRows, covariance_support
from probkit.models.arphmm.updates import (
    draw_regimes,
    draw_rows,
    maximise_regimes,
    maximise_rows,
)
from probkit.predictive import Predictive
from probkit.rng import Rng, require_rng, stream
from probkit.sampler import Sampler

__all__ = ["ARPHMM"]


class Statistics(NamedTuple):
    """Expected statistics of an E-step.

    Attributes:
        initial: Expected first states, summed over sequences [*batch, K].
        transition: Expected numbers of transitions [*batch, K, K].
        moments: Sums of z z^T, z = (x, y) [*batch, K, P + D, P + D].
        old: The parameters that the step was made at.
    """

    initial: Tensor
    transition: Tensor
    moments: Tensor
    old: dict[str, Tensor]


@storable
@dataclass(frozen=True)
class ARPHMM(Model):
    """A vector autoregression that switches with a partially hidden Markov chain.

    With x_t = (1, y_(t-1), ..., y_(t-L)),

        p(z_1 = k) = initial_k,  p(z_t = l | z_(t-1) = k) = transition_kl,
        y_t | z_t = k ~ N(weights_k x_t, covariance_k),

    and, where something is known of the state at time t, a plausibility pl_t(k) that multiplies the
    emission density (Juesas, Ramasso, Drujont and Placet 2016; Ramasso and Denoeux 2014, whose
    generalised likelihood is the sum over paths of p(y, z) prod_t pl_t(z_t)). All ones give an
    ordinary switching autoregression, one-hot rows give supervised learning.

    Data: :class:`Sequences`, one array [time, feature], or a list of arrays. The first ``order``
    values of a sequence are history, unless the sequences carry ``prev`` or ``start`` is "zeros".
    A step whose value or lags hold NaN counts through its plausibility only; this is fast and
    approximate (an exact treatment would carry the missing lags along).

    Values: ``initial`` [state], ``transition`` [state, state], ``weights`` [state, feature,
    regressor] with regressors 1, y_(t-1), ..., y_(t-L), ``covariance`` [state, feature, feature].

    Args:
        states: Number of states K.
        order: Number of lags L, 0 for none.
        cov: "full", "diag", or "shared" by all states.
        transition: "full", "left_right" (each state goes on to the next, or stays), or a mask
            [state, state] of allowed transitions.
        prior: A :class:`SwitchingPrior`; None for maximum likelihood, which can degenerate and
            which samplers refuse. ``SwitchingPrior.for_data`` scales one to the data.
        start: What precedes a sequence: "condition" or "zeros".
        missing: "skip" allows NaN values, "error" refuses them.
        features: Number of features; only needed to simulate from the prior.
        failure: What counts as failure, for ``predict(site="rul")``.

    Raises:
        DataError: An option is out of range.
        ShapeError: The mask is not [state, state].

    Example:
        >>> from probkit import infer
        >>> from probkit.inference import EM
        >>> y = torch.cat([torch.zeros(30), torch.ones(30)]).double()
        >>> y = y + 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
        >>> model = ARPHMM(states=2, order=0)
        >>> post = infer(model, y, EM(restarts=4), rng=0)
        >>> model.viterbi(post, y)[0][[0, -1]].unique().numel()
        2
    """

    states: int
    order: int = 1
    cov: Covariance = "full"
    transition: Literal["full", "left_right"] | Tensor = "full"
    prior: SwitchingPrior | None = SwitchingPrior()
    start: Start = "condition"
    missing: Literal["skip", "error"] = "skip"
    features: int | None = None
    failure: Failure | None = None

    batched: ClassVar[bool] = True
    batched_em: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole = isinstance(self.states, int) and isinstance(self.order, int)
        if not whole or self.states < 1 or self.order < 0:
            raise DataError(
                f"ARPHMM: expected whole states >= 1 and order >= 0, got {self.states}, "
                f"{self.order}"
            )
        for name, allowed in (
            ("cov", ("full", "diag", "shared")),
            ("start", ("condition", "zeros")),
            ("missing", ("skip", "error")),
        ):
            if getattr(self, name) not in allowed:
                raise DataError(
                    f"ARPHMM: expected {name} one of {', '.join(allowed)}, got "
                    f"{getattr(self, name)!r}"
                )
        if isinstance(self.transition, str):
            if self.transition not in ("full", "left_right"):
                raise DataError(
                    "ARPHMM: expected transition 'full', 'left_right' or a mask [state, state], "
                    f"got {self.transition!r}"
                )
        else:
            mask = as_tensor(self.transition, name="transition").bool()
            if tuple(mask.shape) != (self.states, self.states):
                raise ShapeError(
                    f"ARPHMM: expected a transition mask [state={self.states}, "
                    f"state={self.states}], got {tuple(mask.shape)}"
                )
            if not bool(mask.any(1).all()):
                k = int((~mask.any(1)).nonzero()[0])
                raise DataError(f"ARPHMM: the transition mask lets state {k} go nowhere")
            object.__setattr__(self, "transition", mask)

    # ------------------------------------------------------------------ what is known of the data

    @property
    def mask(self) -> Tensor:
        """Allowed transitions [state, state]."""
        if isinstance(self.transition, Tensor):
            return self.transition
        ones = torch.ones(self.states, self.states, dtype=torch.bool)
        return ones if self.transition == "full" else ones.triu() & ones.tril(1)

    @property
    def ordered(self) -> bool:
        """Whether no state can be reached again once it was left for a later one."""
        return not bool(self.mask.tril(-1).any()) and self.states > 1

    def prepare(self, data: Any) -> Lagged:
        """Turn sequences into rows of lags and values; rows pass unchanged.

        Raises:
            DataError: A sequence is too short, holds NaN where none are allowed, or a feature is
                constant; labels contradict the transition mask.
            ShapeError: Features or plausibilities do not fit the model.
        """
        if isinstance(data, Lagged):
            return data
        sequences = as_sequences(data)
        if self.features not in (None, sequences.features):
            raise ShapeError(
                f"ARPHMM(features={self.features}): expected that many features, got "
                f"{sequences.features}"
            )
        rows = lagged(
            sequences,
            order=self.order,
            states=self.states,
            start=self.start,
            missing=self.missing == "skip",
        )
        self._check_varies(rows)
        self._check_labels(rows)
        return rows

    def _check_varies(self, data: Lagged) -> None:
        """Find features that never change: they carry nothing, and no noise variance fits them."""
        seen = data.design[data.usable][:, data.regressors :]
        if len(seen) < 2:
            return
        constant = (seen == seen[0]).all(0).nonzero()
        if len(constant):
            raise DataError(
                f"feature {int(constant[0])} is {float(seen[0, int(constant[0])]):.6g} at every "
                "usable step; drop it"
            )

    def _check_labels(self, data: Lagged) -> None:
        """Find sequences whose labels no path can follow."""
        if data.log_plausibility is None:
            return
        like = data.design
        allowed = self.mask.to(like.device)
        steps = torch.where(allowed, 0.0, -torch.inf).to(like)
        possible = hmm_filter(
            like.new_zeros(self.states),
            steps,
            torch.where(data.log_plausibility > -torch.inf, 0.0, -torch.inf).to(like),
            lengths=data.lengths,
        )
        dead = (possible.log_evidence == -torch.inf).nonzero()
        if len(dead):
            n = int(dead[0])
            t = int((possible.log_increment[n] == -torch.inf).nonzero()[0]) + int(data.first[n])
            raise DataError(
                f"labels of sequence {n}: no path of allowed transitions reaches time {t}; correct "
                "the label there or before, raise its nonspecificity, or allow the transition"
            )

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return the four sites."""
        rows = self.prepare(data)
        k, d, p = self.states, rows.features, rows.regressors
        full = bool(self.mask.all())
        return {
            "initial": Site((k,), constraints.simplex, ("state",)),
            "transition": Site(
                (k, k),
                constraints.simplex if full else MaskedSimplexRows(self.mask),
                ("state", "next_state"),
            ),
            "weights": Site((k, d, p), constraints.real, ("state", "feature", "regressor")),
            "covariance": Site(
                (k, d, d), covariance_support(self.cov, k), ("state", "feature", "feature_2")
            ),
        }

    def sampler(self) -> Sampler:
        """Return EM from eight starts."""
        from probkit.inference.em import EM

        return EM(restarts=8)

    # ------------------------------------------------------------------ densities

    def _chain(self, values: Values, rows: Lagged) -> dict[str, Any]:
        """Arguments of the message-passing functions.

        Log initial [*batch, 1, K], transition [*batch, 1, K, K] and emission [*batch, N, T, K]
        probabilities, and the lengths where they differ.
        """
        emission = log_emission(rows, values["weights"], values["covariance"])
        return {
            "log_initial": _safe_log(values["initial"]).unsqueeze(-2),
            "log_transition": _safe_log(values["transition"]).unsqueeze(-3),
            "log_emission": emission,
            "lengths": rows.lengths.expand(emission.shape[:-2]) if rows.ragged else None,
        }

    def sequence_log_likelihood(self, values: Values, data: Any) -> Tensor:
        """Return log p(y_n, labels_n | values) [*batch, N] of each sequence."""
        rows = self.prepare(data)
        return hmm_log_evidence(**self._chain(values, rows))

    def log_likelihood(self, values: Values, data: Any) -> Tensor:
        """Return log p(y, labels | values) [*batch]."""
        return self.sequence_log_likelihood(values, data).sum(-1)

    def pointwise_log_likelihood(self, values: Values, data: Any) -> Mapping[str, Tensor]:
        """Return {"y": [*batch, sequence]}: sequences are the exchangeable units."""
        return {"y": self.sequence_log_likelihood(values, data)}

    def log_prior(self, values: Values) -> Tensor:
        """Return log p(values) [*batch].

        Without a prior (maximum likelihood) it is zero, so that EM has one objective for both.
        """
        if self.prior is None:
            return values["initial"].new_zeros(values["initial"].shape[:-1])
        like = values["initial"]
        start = torch.full_like(like, self.prior.initial)
        rows = self.prior.concentrations(self.mask.to(like.device), like)
        return (
            log_dirichlet(like, start)
            + log_dirichlet(values["transition"], rows).sum(-1)
            + log_regimes(self.prior, values["weights"], values["covariance"], self.cov)
        )

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return log p(values, y, labels) [*batch], states summed out.

        Raises:
            CapabilityError: There is no prior.
        """
        self._require_prior("a posterior")
        return scale * self.log_likelihood(values, data) + self.log_prior(values)

    def _require_prior(self, what: str) -> SwitchingPrior:
        if self.prior is None:
            raise CapabilityError(
                f"ARPHMM(prior=None) has no prior, so there is no {what}; use EM, or give "
                "prior=SwitchingPrior(...)"
            )
        return self.prior

    # ------------------------------------------------------------------ EM

    def em_init(self, data: Any, *, rng: torch.Generator) -> dict[str, Tensor]:
        """Take one M-step from responsibilities of labels and clusters."""
        rows = self.prepare(data)
        self._check_mode()
        gamma = start_responsibilities(rows, self.states, ordered=self.ordered, rng=rng)
        pairs = torch.einsum("ntk,ntl->kl", gamma[:, :-1], gamma[:, 1:])
        mask = self.mask.to(gamma)
        even = mask / mask.sum(-1, keepdim=True)
        old = {"initial": gamma.new_full((self.states,), 1 / self.states), "transition": even}
        # One count spread evenly over what is allowed keeps every path possible at the start.
        stats = Statistics(
            gamma[:, 0].sum(0) + 1 / self.states,
            pairs * mask + even,
            second_moments(rows, gamma),
            old,
        )
        return self.m_step(stats, rows)

    def _check_mode(self) -> None:
        """Refuse priors whose density is highest where a probability is zero."""
        if self.prior is not None and min(self.prior.initial, self.prior.transition) < 1:
            raise DataError(
                "EM: expected Dirichlet concentrations >= 1 (below, the mode lies at zero "
                f"probabilities), got initial={self.prior.initial}, "
                f"transition={self.prior.transition}; raise them, or use NUTS or Gibbs"
            )

    def e_step(self, params: Mapping[str, Tensor], data: Any) -> tuple[Statistics, Tensor]:
        """Return expected statistics and the log likelihood [*batch]."""
        rows = self.prepare(data)
        found = hmm_smoother(**self._chain(params, rows))
        stats = Statistics(
            found.smoothed[..., 0, :].sum(-2),
            found.pair_sum.sum(-3),
            second_moments(rows, found.smoothed),
            dict(params),
        )
        return stats, found.log_evidence.sum(-1)

    def m_step(self, stats: Statistics, data: Any) -> dict[str, Tensor]:
        """Return the parameters that maximise the expected log joint."""
        rows = self.prepare(data)
        start = steps = None
        if self.prior is not None:
            start = torch.full_like(stats.initial, self.prior.initial)
            steps = self.prior.concentrations(self.mask.to(rows.device), stats.transition)
        weights, covariance = maximise_regimes(stats.moments, rows.regressors, self.prior, self.cov)
        return {
            "initial": maximise_rows(stats.initial, start, stats.old["initial"]),
            "transition": maximise_rows(stats.transition, steps, stats.old["transition"]),
            "weights": weights,
            "covariance": covariance,
        }

    def review(self, posterior: Any) -> None:
        """Warn of states that EM left with fewer steps than they have regressors and features."""
        rows: Lagged = posterior.context.data
        for chain in range(posterior.chains):
            values = {name: value[chain, 0] for name, value in posterior.draws.items()}
            gamma = torch.where(rows.usable[..., None], self.smooth(values, rows).smoothed, 0.0)
            count = gamma.sum((0, 1))
            needed = rows.regressors + rows.features
            weak = [k for k in range(self.states) if float(count[k]) < needed]
            if weak:
                fate = "the prior decides" if self.prior else "the fit there is not to be trusted"
                warnings.warn(
                    f"ARPHMM: states {weak} of chain {chain} explain fewer than {needed} steps "
                    f"(regressors plus features); {fate}. Use fewer states or more restarts",
                    NumericsWarning,
                    stacklevel=5,
                )

    # ------------------------------------------------------------------ Gibbs

    def gibbs_init(self, data: Any, *, rng: torch.Generator) -> dict[str, Tensor]:
        """Return values [*site] to start from."""
        self._require_prior("conditional law of the parameters")
        rows = self.prepare(data)
        gamma = start_responsibilities(rows, self.states, ordered=self.ordered, rng=rng)
        return self._draw_values(gamma.argmax(-1), rows, rng)

    def gibbs_step(self, values: Values, data: Any, *, rng: torch.Generator) -> dict[str, Tensor]:
        """Draw all state paths given ``values``, then values given the paths (blocked Gibbs)."""
        self._require_prior("conditional law of the parameters")
        rows = self.prepare(data)
        paths = hmm_sample_paths(**self._chain(values, rows), n=1, rng=rng)
        return self._draw_values(paths[0], rows, rng)

    def _draw_values(self, paths: Tensor, rows: Lagged, rng: torch.Generator) -> dict[str, Tensor]:
        """Draw all parameters given state paths [N, T] (negative on padding)."""
        prior = self._require_prior("conditional law of the parameters")
        steps = paths.shape[1]
        valid = torch.arange(steps, device=paths.device) < rows.lengths[:, None]
        onehot = torch.nn.functional.one_hot(paths.clamp_min(0), self.states).to(rows.design)
        onehot = onehot * valid[..., None]
        counts = torch.einsum("ntk,ntl->kl", onehot[:, :-1], onehot[:, 1:])
        concentration = prior.concentrations(self.mask.to(counts.device), counts)
        moments = second_moments(rows, onehot)
        weights, covariance = draw_regimes(moments, rows.regressors, prior, self.cov, rng=rng)
        return {
            "initial": draw_rows(prior.initial + onehot[:, 0].sum(0), rng=rng),
            "transition": draw_rows(concentration + counts, rng=rng),
            "weights": weights,
            "covariance": covariance,
        }

    # ------------------------------------------------------------------ states

    def filter(self, values: Any, data: Any) -> HMMFilter:
        """Filter: laws of states [*batch, N, T, K] given the past.

        Args:
            values: Values [*batch, *site], or a point-estimate posterior.
            data: The sequences.
        """
        values, rows = _point(values), self.prepare(data)
        return hmm_filter(**self._chain(values, rows))

    def smooth(self, values: Any, data: Any) -> HMMSmoother:
        """Smooth: laws of states [*batch, N, T, K] given all of a sequence."""
        values, rows = _point(values), self.prepare(data)
        return hmm_smoother(**self._chain(values, rows))

    def viterbi(self, values: Any, data: Any) -> HMMPath:
        """Find the most probable state paths [*batch, N, T]."""
        values, rows = _point(values), self.prepare(data)
        return hmm_viterbi(**self._chain(values, rows))

    def latents(self, values: Values, data: Any) -> Mapping[str, Any]:
        """Return {"state": one Categorical [*batch, T] for each sequence}."""
        rows = self.prepare(data)
        smoothed = self.smooth(values, rows).smoothed
        return {
            "state": tuple(
                Categorical(probs=smoothed[..., n, : int(length), :])
                for n, length in enumerate(rows.lengths)
            )
        }

    # ------------------------------------------------------------------ prediction

    def predict(
        self,
        post: Any,
        x: Any,
        *,
        site: str | None = None,
        joint: bool = False,
        groups: Mapping[str, Sequence[Any]] | None = None,
        rng: Rng | None = None,
    ) -> Predictive:
        """Predict along one sequence, averaged over the draws of ``post``.

        Args:
            post: A posterior of this model.
            x: One sequence, with or without labels.
            site: None or "observation": each y_t given what came before it [time, feature], the
                history left out. "state": z_t given the whole sequence [time]. "filtered_state":
                z_t given y_1, ..., y_t. "rul": the number of steps from the end of the sequence
                until ``failure``, simulated; exact where failure is an end state alone.
            joint: Not offered: the steps are predicted one at a time. Whole futures come from
                :meth:`forecast`.
            groups: Not used.
            rng: For a simulated "rul".

        Raises:
            CapabilityError: ``joint`` or ``groups`` was asked for, or the site is not known.
            DataError: ``x`` holds several sequences.
        """
        if joint or groups is not None:
            raise CapabilityError(
                "ARPHMM predicts one step at a time and has no plates; leave joint= and groups= "
                "out, use forecast(...) for whole futures"
            )
        rows, values = self._one(x), flat_draws(post)
        if site in (None, "observation"):
            unlabelled = self.prepare(rows.sequences.without_labels())
            return one_step_ahead(values, self.filter(values, unlabelled), unlabelled)
        if site == "state":
            return state_law(self.smooth(values, rows).smoothed[:, 0])
        if site == "filtered_state":
            return state_law(self.filter(values, rows).filtered[:, 0])
        if site == "rul":
            return self._life(post, rows, values, rng)
        raise CapabilityError(
            "ARPHMM: expected site None, 'observation', 'state', 'filtered_state' or 'rul', got "
            f"{site!r}"
        )

    def _life(
        self, post: Any, rows: Lagged, values: dict[str, Tensor], rng: Rng | None
    ) -> Predictive:
        """Law of the remaining life after one sequence."""
        failure = require_failure(self.failure)
        if failure.level is None:
            last = int(rows.lengths[0]) - 1
            filtered = self.filter(values, rows).filtered[:, 0, last]
            return phase_type_life(values, filtered, failure)
        return simulate_life(self, post, rows, failure, rng=require_rng(rng, "predict"))

    def _one(self, x: Any) -> Lagged:
        """The rows of one sequence."""
        rows = self.prepare(x)
        if len(rows.sequences) != 1:
            raise DataError(
                f"expected one sequence, got {len(rows.sequences)}; predict them one at a time, "
                "sequences[n]"
            )
        return rows

    def forecast(
        self, post: Any, x: Any, *, horizon: int, paths: int = 1000, rng: Rng
    ) -> Predictive:
        """Simulate what follows the end of one sequence.

        Args:
            post: A posterior of this model; its draws share the paths evenly.
            x: The sequence so far.
            horizon: Number of steps ahead, any.
            paths: Number of simulated futures.
            rng: Seed or generator.

        Returns:
            Draws over [horizon, feature]; the steps of one draw belong together.
        """
        y, _ = self.simulate_future(post, x, horizon=horizon, paths=paths, rng=rng)
        return y

    def simulate_future(
        self, post: Any, x: Any, *, horizon: int, paths: int = 1000, rng: Rng
    ) -> tuple[Predictive, Tensor]:
        """Return :meth:`forecast` and the states [path, horizon] behind it.

        Raises:
            DataError: ``horizon`` or ``paths`` is below one, or the last values are missing.
        """
        if min(horizon, paths) < 1:
            raise DataError(f"forecast: expected horizon and paths >= 1, got {horizon}, {paths}")
        rows, values = self._one(x), flat_draws(post)
        last = int(rows.lengths[0]) - 1
        history = self._history_after(rows.sequences, 0)
        if bool(history.isnan().any()):
            raise DataError(
                f"forecast: the last {self.order} values hold NaN; fill them, they are the lags"
            )
        filtered = self.filter(values, rows).filtered[:, 0, last]
        return future(values, filtered, history, horizon, paths=paths, rng=rng)

    def _history_after(self, sequences: Sequences, n: int) -> Tensor:
        """The last ``order`` values of sequence ``n`` [lag, feature], oldest first."""
        y = sequences.y[n]
        if sequences.prev is not None:
            y = torch.cat([sequences.prev[n], y])
        elif self.start == "zeros":
            y = torch.cat([y.new_zeros(self.order, y.shape[1]), y])
        return y[len(y) - self.order :]

    # ------------------------------------------------------------------ streams

    def filter_start(self, post: Any, *, history: Any = None) -> FilterState:
        """Return the filter before the first value of a stream.

        Args:
            post: A posterior (its draws are filtered side by side), or values [*site].
            history: The ``order`` values before it [lag, feature], oldest first; None for zeros.
        """
        values = flat_draws(post) if hasattr(post, "draws") else dict(_point(post))
        like = values["weights"]
        features = like.shape[-2]
        before = like.new_zeros(self.order, features)
        if history is not None:
            before = as_tensor(history, name="history").to(like)
            before = before[:, None] if before.ndim == 1 and features == 1 else before
            if before.ndim != 2 or len(before) < self.order or before.shape[1] != features:
                raise ShapeError(
                    f"history: expected [lag={self.order}, feature={features}], got "
                    f"{tuple(before.shape)}"
                )
            before = before[len(before) - self.order :]
        return begin(values, before)

    def filter_step(self, state: FilterState, y_t: Any, *, label: Any = None) -> FilterState:
        """Take in one value of a stream; memory and time do not grow with its length.

        Args:
            state: From :meth:`filter_start` or the last step.
            y_t: The value [feature]; NaN where missing.
            label: Plausibilities of the present state [state]; None where nothing is known.

        Returns:
            The next state: ``probs`` [draw, K] and ``log_evidence`` [draw] are its results.
        """
        y = torch.atleast_1d(as_tensor(y_t, name="y_t").to(state.history))
        if label is None:
            return advance(state, y, None)
        row = as_tensor(label, name="label")
        if tuple(row.shape) != (self.states,):
            raise ShapeError(f"label: expected [state={self.states}], got {tuple(row.shape)}")
        checked = Sequences((y[None],), labels=(row[None],)).labels
        assert checked is not None
        return advance(state, y, checked[0][0].log())

    # ------------------------------------------------------------------ simulation

    def sample_prior(self, n: int, *, rng: Rng) -> Values:
        """Draw ``n`` values [n, *site] from the prior.

        Raises:
            CapabilityError: There is no prior.
            DataError: ``features`` is not given.
        """
        prior = self._require_prior("prior to draw from")
        if self.features is None:
            raise DataError("ARPHMM: expected features=<number> to simulate from the prior")
        root = stream(rng, "prior")
        width = 1 + self.features * (self.order + 1)
        none = torch.zeros(n, self.states, width, width, dtype=torch.float64)
        start = torch.full((n, self.states), prior.initial, dtype=torch.float64)
        steps = prior.concentrations(self.mask, none).expand(n, self.states, self.states)
        weights, covariance = draw_regimes(none, width - self.features, prior, self.cov, rng=root)
        return {
            "initial": draw_rows(start, rng=root),
            "transition": draw_rows(steps, rng=root),
            "weights": weights,
            "covariance": covariance,
        }

    def simulate(self, values: Values, x: Any, *, rng: Rng) -> Any:
        """Draw sequences of given lengths at ``values``.

        Args:
            values: Values [*site], or [n, *site] for a list of n data sets.
            x: Numbers of time steps, history included, one for each sequence; or sequences whose
                lengths are taken.
            rng: Seed or generator.

        Returns:
            :class:`Sequences`, whose first ``order`` values are zero; a list for [n, *site].
        """
        lengths = _lengths(x)
        if values["initial"].ndim == 1:
            return simulate_sequences(values, lengths, order=self.order, rng=rng)[0]
        root = stream(rng, "simulate")
        return [
            simulate_sequences(
                {name: value[i] for name, value in values.items()},
                lengths,
                order=self.order,
                rng=root,
            )[0]
            for i in range(len(values["initial"]))
        ]


def _lengths(x: Any) -> list[int]:
    """Numbers of time steps: given as such, or those of sequences."""
    if isinstance(x, int):
        return [x]
    if isinstance(x, list | tuple) and all(isinstance(one, int) for one in x):
        return list(x)
    return list((x.sequences if isinstance(x, Lagged) else as_sequences(x)).lengths)


def _point(values: Any) -> Values:
    """Values of a mapping, or the one draw of a point estimate."""
    draws = getattr(values, "draws", None)
    if draws is None:
        for name in ("initial", "transition"):
            _check_stochastic(values[name], name)
        return values
    first: Sequence[int] = next(iter(draws.values())).shape[:2]
    if tuple(first) != (1, 1):
        raise DataError(
            f"expected values or a posterior of one draw, got {first[0]} chains of {first[1]} "
            "draws; use posterior.predict(..., site='state') to average over draws"
        )
    return {name: draw[0, 0] for name, draw in draws.items()}


def _check_stochastic(rows: Tensor, name: str) -> None:
    """Check probabilities that a user gave."""
    total = rows.sum(-1)
    tolerance = 1e3 * torch.finfo(rows.dtype).eps
    if bool((rows < 0).any() | ((total - 1).abs() > tolerance).any()):
        raise DataError(
            f"{name}: expected probabilities >= 0 whose rows sum to one, got rows that sum to "
            f"{float(total.min()):.6g} to {float(total.max()):.6g}"
        )


def _safe_log(probs: Tensor) -> Tensor:
    """Log of probabilities; zeros become minus infinity without spoiling gradients."""
    positive = probs > 0
    return torch.where(positive, torch.where(positive, probs, 1.0).log(), -torch.inf)

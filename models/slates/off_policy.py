"""Off-policy evaluation of slates: the value of a policy from the log of another.

Every estimator takes arrays [row] or [row, slot] and returns an :class:`OffPolicyValue`: the value,
its standard error, an interval, and the effective sample size. Weights are ratios of target to
logging propensities, see :func:`importance_weights`. What is assumed of the clicks decides which
propensities enter: of the whole slate (:func:`slate_ips`, :func:`doubly_robust`), of the slots up
to the one that was rewarded (:func:`cascade_ips`, :func:`cascade_doubly_robust`), or of the slot
alone (:func:`independent_ips`); :func:`pseudo_inverse` assumes that the slate's reward is a sum of
unknown contributions of its slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.numerics import check_finite
from probkit.rng import Rng, require_rng, stream

__all__ = [
    "Interval",
    "OffPolicyValue",
    "cascade_doubly_robust",
    "cascade_ips",
    "direct_method",
    "doubly_robust",
    "importance_weights",
    "independent_ips",
    "ips",
    "pseudo_inverse",
    "pseudo_inverse_weights",
    "slate_ips",
    "snips",
]

Method = Literal["normal", "bernstein", "bootstrap"]


@dataclass(frozen=True)
class OffPolicyValue:
    """An estimate of a policy's value.

    Attributes:
        value: The estimate.
        se: Its standard error; of a self-normalised estimate by the delta method.
        low: Lower end of the interval.
        high: Upper end.
        ess: Effective sample size (sum w)^2 / sum w^2; with weights for each slot, of the slot
            where it is smallest. Few effective rows mean that the interval cannot be trusted.
        rows: Number of rows.
        largest_weight: The largest weight.
    """

    value: float
    se: float
    low: float
    high: float
    ess: float
    rows: int
    largest_weight: float


@dataclass(frozen=True)
class Interval:
    """How intervals are made.

    Args:
        level: Probability that the interval covers the value.
        method: "normal"; "bernstein" (Maurer and Pontil 2009, theorem 4: valid at any sample size
            where the terms lie in a known range; the range seen is taken, so that it holds for
            weights that are bounded by those seen); or "bootstrap" (percentiles of resampled
            units).
        unit: Unit of each row [row], such as its user: rows of one unit are dependent. None for
            independent rows.
        resamples: Bootstrap samples.
        rng: Randomness of the bootstrap.
    """

    level: float = 0.95
    method: Method = "normal"
    unit: Any = None
    resamples: int = 1000
    rng: Rng | None = None

    def __post_init__(self) -> None:
        if not 0 < self.level < 1 or self.resamples < 2:
            raise DataError(
                f"Interval: expected 0 < level < 1 and resamples >= 2, got {self.level} and "
                f"{self.resamples}"
            )
        if self.method not in ("normal", "bernstein", "bootstrap"):
            raise DataError(
                "Interval: expected method 'normal', 'bernstein' or 'bootstrap', got "
                f"{self.method!r}"
            )


def importance_weights(target: Any, logging: Any) -> Tensor:
    """Return target / logging propensities of the actions logged.

    Args:
        target: Propensities of the policy to be evaluated, in [0, 1].
        logging: Propensities of the policy that logged, in (0, 1]; same shape.

    Raises:
        DataError: A propensity is outside its range.

    Example:
        >>> importance_weights([0.5, 0.0], [0.25, 0.5])
        tensor([2., 0.], dtype=torch.float64)
    """
    top, bottom = _numbers(target, "target"), _numbers(logging, "logging")
    if top.shape != bottom.shape:
        raise ShapeError(
            f"importance_weights: expected target and logging of one shape, got "
            f"{tuple(top.shape)} and {tuple(bottom.shape)}"
        )
    for value, name, zero in ((top, "target", True), (bottom, "logging", False)):
        low = value >= 0 if zero else value > 0
        bad = ~(low & (value <= 1))
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            raise DataError(
                f"importance_weights: expected {name} propensities in "
                f"{'[' if zero else '('}0, 1], got {value[at].item():g} at {list(at)}"
            )
    return top / bottom


def ips(reward: Any, weight: Any, *, interval: Interval | None = None) -> OffPolicyValue:
    """Inverse propensity score: mean of w r (Horvitz and Thompson 1952). Unbiased.

    Args:
        reward: Rewards [row].
        weight: Weights [row].
        interval: How the interval is made.

    Example:
        >>> ips([1.0, 0.0, 1.0, 1.0], [2.0, 1.0, 0.5, 0.5]).value
        0.75
    """
    r, w = _rewards(reward), _weights(weight)
    _same(r, w, "row")
    return _mean(w * r, w, interval)


def snips(reward: Any, weight: Any, *, interval: Interval | None = None) -> OffPolicyValue:
    """Self-normalised inverse propensity score: sum w r / sum w (Swaminathan and Joachims 2015).

    Consistent, with less variance and never outside the range of the rewards.

    Args:
        reward: Rewards [row].
        weight: Weights [row].
        interval: How the interval is made.
    """
    r, w = _rewards(reward), _weights(weight)
    _same(r, w, "row")
    return _ratio((w * r)[:, None], w[:, None], interval)


def direct_method(q_target: Any, *, interval: Interval | None = None) -> OffPolicyValue:
    """Mean of a model's expected rewards under the target policy; as good as the model.

    Args:
        q_target: Expected reward of the target policy in each row [row].
        interval: How the interval is made; it covers the rows, not the model's error.
    """
    q = _rewards(q_target)
    return _mean(q, torch.ones_like(q), interval)


def doubly_robust(
    reward: Any, weight: Any, q_logged: Any, q_target: Any, *, interval: Interval | None = None
) -> OffPolicyValue:
    """Doubly robust: mean of q_target + w (r - q_logged) (Dudik, Langford and Li 2011).

    Unbiased if the propensities are right, whatever the model; a good model lowers the variance.

    Args:
        reward: Rewards [row], of an action or of a whole slate.
        weight: Weights [row].
        q_logged: A model's expected reward of what was logged [row].
        q_target: Its expected reward under the target policy [row].
        interval: How the interval is made.
    """
    r, w, q, v = _rewards(reward), _weights(weight), _rewards(q_logged), _rewards(q_target)
    _same(r, w, "row")
    _same(r, q, "row")
    _same(r, v, "row")
    return _mean(v + w * (r - q), w, interval)


def slate_ips(
    reward: Any,
    weight: Any,
    *,
    slot_weights: Any = None,
    self_normalised: bool = False,
    interval: Interval | None = None,
) -> OffPolicyValue:
    """SIPS: the weight of the whole slate on the reward of all its slots.

    Args:
        reward: Rewards of the slots [row, slot].
        weight: pi_e(slate) / pi_b(slate) [row].
        slot_weights: What a reward in each slot counts [slot]; None for 1.
        self_normalised: Divide by the mean weight.
        interval: How the interval is made.
    """
    w = _weights(weight)
    r = _rewards(reward, slots=True)
    _same(r[:, 0], w, "row")
    return _slotwise(r, w[:, None].expand_as(r), slot_weights, self_normalised, interval)


def independent_ips(
    reward: Any,
    weight: Any,
    *,
    slot_weights: Any = None,
    self_normalised: bool = False,
    interval: Interval | None = None,
) -> OffPolicyValue:
    """IIPS: each slot's reward weighted by its own slot (Li, Abbasi-Yadkori and others 2018).

    Right where a slot's reward depends on the item in that slot alone.

    Args:
        reward: Rewards of the slots [row, slot].
        weight: pi_e(item at slot) / pi_b(item at slot) [row, slot], marginal over other slots.
        slot_weights: What a reward in each slot counts [slot]; None for 1.
        self_normalised: Divide each slot by its mean weight.
        interval: How the interval is made.
    """
    r, w = _rewards(reward, slots=True), _weights(weight, slots=True)
    _same(r, w, "row, slot")
    return _slotwise(r, w, slot_weights, self_normalised, interval)


def cascade_ips(
    reward: Any,
    weight: Any,
    *,
    slot_weights: Any = None,
    self_normalised: bool = False,
    interval: Interval | None = None,
) -> OffPolicyValue:
    """RIPS: each slot's reward weighted by the slots up to it (McInerney and others 2020).

    Right where users read from the top, so that a reward depends on the slots above it.

    Args:
        reward: Rewards of the slots [row, slot].
        weight: pi_e(item at slot | slots above) / pi_b(...) [row, slot]; they are multiplied here.
        slot_weights: What a reward in each slot counts [slot]; None for 1.
        self_normalised: Divide each slot by its mean weight.
        interval: How the interval is made.
    """
    r, w = _rewards(reward, slots=True), _weights(weight, slots=True)
    _same(r, w, "row, slot")
    return _slotwise(r, w.cumprod(1), slot_weights, self_normalised, interval)


def cascade_doubly_robust(
    reward: Any,
    weight: Any,
    q_logged: Any,
    q_target: Any,
    *,
    slot_weights: Any = None,
    interval: Interval | None = None,
) -> OffPolicyValue:
    """Doubly robust under the cascade assumption (Kiyohara and others 2022, equation 8).

    mean of sum_l w_{1:l} (r_l - Q_l(a_{1:l})) + w_{1:l-1} E_e[Q_l(a_{1:l-1}, .)], where Q_l is the
    expected reward of slot l and of those below it under the target policy. It is right where the
    propensities are, whatever the model.

    Args:
        reward: Rewards of the slots [row, slot].
        weight: pi_e(item at slot | slots above) / pi_b(...) [row, slot].
        q_logged: A model's Q_l of the slots logged [row, slot].
        q_target: Its mean over the target policy's choice of slot l, given the slots logged above
            it [row, slot].
        slot_weights: What a reward in each slot counts [slot]; None for 1. Q counts the same.
        interval: How the interval is made.
    """
    r, w = _rewards(reward, slots=True), _weights(weight, slots=True)
    q, v = _rewards(q_logged, slots=True), _rewards(q_target, slots=True)
    for other in (w, q, v):
        _same(r, other, "row, slot")
    upto = w.cumprod(1)
    above = torch.cat([torch.ones_like(upto[:, :1]), upto[:, :-1]], 1)
    r = r * _slot_weights(slot_weights, r)
    terms = (upto * (r - q) + above * v).sum(1)
    return _mean(terms, upto, interval)


def pseudo_inverse_weights(
    target: Any, logging: Any = None, *, slates: Any = None, slate_probs: Any = None, logged: Any
) -> Tensor:
    """Weights [row] of the pseudo-inverse estimator (Swaminathan and others 2017, equation 3).

    w = q' Gamma^+ 1_slate with q the target's slot marginals and Gamma = E[1_slate 1_slate'] under
    the logging policy, both over the (slot, item) pairs. Where the logging policy fills its slots
    independently, this is 1 + sum_l (pi_e(a_l) / pi_b(a_l) - 1), for which marginals suffice; else
    give the slates it can show with their probabilities.

    Args:
        target: Slot marginals of the target policy [row, slot, item] or [slot, item].
        logging: Slot marginals of a logging policy with independent slots, same shape.
        slates: All slates that the logging policy shows [slate, slot], instead of ``logging``.
        slate_probs: Their probabilities [row, slate] or [slate].
        logged: The slates logged [row, slot], item positions.

    Example:
        >>> uniform = torch.full((2, 3), 1 / 3, dtype=torch.float64)
        >>> greedy = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]], dtype=torch.float64)
        >>> pseudo_inverse_weights(greedy, uniform, logged=[[0, 1], [0, 2]])
        tensor([5., 2.], dtype=torch.float64)
    """
    marginals = _numbers(target, "target")
    shown = as_tensor(logged, name="logged").long()
    if shown.ndim != 2 or marginals.ndim not in (2, 3) or marginals.shape[-2] != shown.shape[1]:
        raise ShapeError(
            "pseudo_inverse_weights: expected target [row, slot, item] or [slot, item] and logged "
            f"[row, slot], got {tuple(marginals.shape)} and {tuple(shown.shape)}"
        )
    if (logging is None) == (slates is None or slate_probs is None):
        raise DataError(
            "pseudo_inverse_weights: expected either logging= (independent slots) or slates= with "
            "slate_probs="
        )
    rows = len(shown)
    if logging is not None:
        base = _numbers(logging, "logging")
        ratio = importance_weights(_at(marginals, shown), _at(base, shown))
        return ratio.sum(1) - (shown.shape[1] - 1)
    options = as_tensor(slates, name="slates").long()
    probs = _numbers(slate_probs, "slate_probs")
    items = marginals.shape[-1]
    indicator = torch.nn.functional.one_hot(options, items).flatten(1).to(probs)
    gamma = torch.einsum("...s,sa,sb->...ab", probs, indicator, indicator)
    direction = torch.linalg.pinv(gamma, hermitian=True) @ marginals.flatten(-2)[..., None]
    flat = torch.nn.functional.one_hot(shown, items).flatten(1).to(probs)
    return (flat * direction[..., 0].expand(rows, -1)).sum(1)


def pseudo_inverse(
    reward: Any, weight: Any, *, self_normalised: bool = False, interval: Interval | None = None
) -> OffPolicyValue:
    """Pseudo-inverse estimator: mean of w r (Swaminathan and others 2017, equation 3).

    Unbiased where a slate's expected reward is a sum of unknown contributions of its (slot, item)
    pairs, however these depend on the user. Weights may be negative.

    Args:
        reward: Reward of each slate [row], in total or of any other kind.
        weight: Weights [row] of :func:`pseudo_inverse_weights`.
        self_normalised: Divide by the mean weight.
        interval: How the interval is made.
    """
    r, w = _rewards(reward), _numbers(weight, "weight")
    check_finite(w, "weight", ("row",))
    _same(r, w, "row")
    if self_normalised:
        return _ratio((w * r)[:, None], w[:, None], interval)
    return _mean(w * r, w, interval)


# ---------------------------------------------------------------- the parts


def _numbers(value: Any, name: str) -> Tensor:
    """Numbers as float64, what arrays they may come in."""
    return as_tensor(value, name=name).double()


def _rewards(value: Any, *, slots: bool = False) -> Tensor:
    found = _numbers(value, "reward")
    dims = ("row", "slot") if slots else ("row",)
    if found.ndim != len(dims) or 0 in found.shape:
        raise ShapeError(
            f"off-policy value: expected rewards [{', '.join(dims)}], got {tuple(found.shape)}"
        )
    check_finite(found, "reward", dims)
    return found


def _weights(value: Any, *, slots: bool = False) -> Tensor:
    found = _numbers(value, "weight")
    dims = ("row", "slot") if slots else ("row",)
    if found.ndim != len(dims):
        raise ShapeError(
            f"off-policy value: expected weights [{', '.join(dims)}], got {tuple(found.shape)}"
        )
    check_finite(found, "weight", dims)
    if bool((found < 0).any()):
        at = (found < 0).nonzero()[0].tolist()
        raise DataError(
            f"off-policy value: expected weights >= 0, got {found[tuple(at)].item():g} at {at}"
        )
    return found


def _same(a: Tensor, b: Tensor, dims: str) -> None:
    if a.shape != b.shape:
        raise ShapeError(
            f"off-policy value: expected arrays [{dims}] of one shape, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )


def _slot_weights(value: Any, reward: Tensor) -> Tensor:
    if value is None:
        return torch.ones_like(reward[0])
    found = _numbers(value, "slot_weights")
    if tuple(found.shape) != (reward.shape[1],):
        raise ShapeError(
            f"off-policy value: expected slot_weights [slot={reward.shape[1]}], got "
            f"{tuple(found.shape)}"
        )
    return found


def _slotwise(
    reward: Tensor,
    weight: Tensor,
    slot_weights: Any,
    self_normalised: bool,
    interval: Interval | None,
) -> OffPolicyValue:
    terms = weight * reward * _slot_weights(slot_weights, reward)
    if self_normalised:
        return _ratio(terms, weight, interval)
    return _mean(terms.sum(1), weight, interval)


def _at(marginals: Tensor, shown: Tensor) -> Tensor:
    """Marginal probability [row, slot] of the items shown."""
    table = marginals.expand(len(shown), *marginals.shape[-2:])
    return table.gather(-1, shown[..., None])[..., 0]


def _mean(terms: Tensor, weight: Tensor, interval: Interval | None) -> OffPolicyValue:
    """The mean of terms [row], with its error."""
    return _finish(
        float(terms.mean()), terms, weight, interval or Interval(), lambda pick: terms[pick].mean()
    )


def _ratio(terms: Tensor, weight: Tensor, interval: Interval | None) -> OffPolicyValue:
    """Sum over slots of (sum of terms / sum of weights), terms and weights [row, slot]."""
    total = weight.mean(0)
    if bool((total == 0).any()):
        raise DataError(
            "off-policy value: all weights of a slot are zero; the log holds nothing that the "
            "target policy would do"
        )
    ratio = terms.mean(0) / total
    influence = (terms - weight * ratio) / total  # Delta method.
    value = float(ratio.sum())

    def again(pick: Tensor) -> Tensor:
        bottom = weight[pick].sum(0)
        found = torch.where(bottom == 0, ratio, terms[pick].sum(0) / bottom)
        return found.sum()

    return _finish(value, influence.sum(1) + value, weight, interval or Interval(), again)


def _finish(
    value: float,
    terms: Tensor,
    weight: Tensor,
    interval: Interval,
    again: Callable[[Tensor], Tensor],
) -> OffPolicyValue:
    """Standard error and interval of an estimate whose rows contribute ``terms`` [row]."""
    sums, unit = _by_unit(terms - value, interval.unit)
    count, rows = len(sums), len(terms)
    se = float(sums.square().sum().sqrt()) / rows * math.sqrt(count / max(count - 1, 1))
    se = se if count > 1 else math.nan
    normal = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    tail = torch.tensor((1 + interval.level) / 2, dtype=torch.float64)
    if interval.method == "normal":
        reach = float(normal.icdf(tail)) * se
        low, high = value - reach, value + reach
    elif interval.method == "bernstein":
        reach = _bernstein(se, sums * count / rows, interval.level)
        low, high = value - reach, value + reach
    else:
        low, high = _bootstrap(again, unit, count, rows, interval)
    square = weight.reshape(rows, -1)
    ess = (square.sum(0).square() / square.square().sum(0).clamp_min(1e-300)).amin()
    return OffPolicyValue(value, se, low, high, float(ess), rows, float(weight.max()))


def _by_unit(deviation: Tensor, unit: Any) -> tuple[Tensor, Tensor]:
    """Sum deviations [row] by unit; also the unit number of each row."""
    if unit is None:
        return deviation, torch.arange(len(deviation))
    labels = as_tensor(unit, name="unit")
    if tuple(labels.shape) != tuple(deviation.shape):
        raise ShapeError(
            f"off-policy value: expected unit [row={len(deviation)}], got {tuple(labels.shape)}"
        )
    number = labels.unique(return_inverse=True)[1]
    sums = torch.zeros(int(number.max()) + 1, dtype=deviation.dtype)
    return sums.index_add_(0, number, deviation), number


def _bernstein(se: float, deviation: Tensor, level: float) -> float:
    """Half-width of the empirical Bernstein interval."""
    count = len(deviation)
    if count < 2:
        return math.inf
    log = math.log(4 / (1 - level))  # Two sides.
    spread = float(deviation.max() - deviation.min())
    return math.sqrt(2 * log) * se + 7 * spread * log / (3 * (count - 1))


def _bootstrap(
    again: Callable[[Tensor], Tensor], unit: Tensor, count: int, rows: int, interval: Interval
) -> tuple[float, float]:
    """Percentiles of the estimate over resampled units."""
    generator = stream(require_rng(interval.rng, "bootstrap"), "bootstrap")
    order = unit.argsort(stable=True)
    ends = torch.bincount(unit, minlength=count).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    plain = count == rows
    found = torch.empty(interval.resamples, dtype=torch.float64)
    for b in range(interval.resamples):
        chosen = torch.randint(count, (count,), generator=generator)
        if plain:
            found[b] = again(chosen)
        else:
            pick = torch.cat([order[starts[u] : ends[u]] for u in chosen.tolist()])
            found[b] = again(pick)
    tail = (1 - interval.level) / 2
    low, high = found.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high

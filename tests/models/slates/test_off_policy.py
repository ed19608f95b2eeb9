"""Off-policy values: enumerated expectations, the numbers of obp, real logs, intervals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.models.slates.off_policy import (
    Interval,
    cascade_doubly_robust,
    cascade_ips,
    direct_method,
    doubly_robust,
    importance_weights,
    independent_ips,
    ips,
    pseudo_inverse,
    pseudo_inverse_weights,
    slate_ips,
    snips,
)

DATA = Path(__file__).parents[2] / "data" / "slates"
pytestmark = pytest.mark.usefixtures("unchanged_global_state")

# A tiny slate problem: two slots, three items, everything can be enumerated.
SLATES = torch.tensor(list(itertools.permutations(range(3), 2)))
LOGGING = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.05, 0.2], dtype=torch.float64)
TARGET = torch.tensor([0.05, 0.35, 0.1, 0.1, 0.3, 0.1], dtype=torch.float64)


def conditional(law):
    """P(first), P(second | first) of each slate [slate, slot]."""
    first = torch.zeros(3, dtype=torch.float64).index_add_(0, SLATES[:, 0], law)
    return torch.stack([first[SLATES[:, 0]], law / first[SLATES[:, 0]]], 1)


def marginal(law):
    """P(item at slot) [slot, item]."""
    table = torch.zeros(2, 3, dtype=torch.float64)
    for slot in (0, 1):
        table[slot].index_add_(0, SLATES[:, slot], law)
    return table


def expectation(estimate, *arrays):
    """Mean of a linear estimate over the logging law: rows repeated in proportion to it."""
    rows = torch.repeat_interleave(torch.arange(6), (LOGGING * 20).round().long())
    return estimate(*(array[rows] for array in arrays)).value


CASCADE = torch.tensor([[0.4, 0.1], [0.4, 0.7], [0.9, 0.3], [0.9, 0.2], [0.2, 0.5], [0.2, 0.6]])
CASCADE = CASCADE.double()  # Slot 1's reward depends on slot 1 alone, slot 2's on both.


def test_the_whole_slate_is_unbiased_for_any_rewards():
    weight = importance_weights(TARGET, LOGGING)
    truth = float((TARGET[:, None] * CASCADE).sum())
    assert expectation(slate_ips, CASCADE, weight) == pytest.approx(truth, abs=1e-12)
    assert expectation(ips, CASCADE.sum(1), weight) == pytest.approx(truth, abs=1e-12)


def test_the_cascade_is_unbiased_where_a_slot_depends_on_those_above():
    weight = importance_weights(conditional(TARGET), conditional(LOGGING))
    truth = float((TARGET[:, None] * CASCADE).sum())
    assert expectation(cascade_ips, CASCADE, weight) == pytest.approx(truth, abs=1e-12)
    # Below instead of above: the first slot's reward depends on the second item. It must fail.
    upside_down = CASCADE.flip(1)
    wrong = expectation(cascade_ips, upside_down, weight)
    assert abs(wrong - float((TARGET[:, None] * upside_down).sum())) > 0.02


def test_independent_slots_need_their_own_weights_only():
    table = torch.tensor([[0.2, 0.7, 0.4], [0.5, 0.1, 0.9]], dtype=torch.float64)
    reward = torch.stack([table[s][SLATES[:, s]] for s in (0, 1)], 1)
    own = torch.stack([(marginal(TARGET) / marginal(LOGGING))[s][SLATES[:, s]] for s in (0, 1)], 1)
    truth = float((TARGET[:, None] * reward).sum())
    assert expectation(independent_ips, reward, own) == pytest.approx(truth, abs=1e-12)
    assert (
        abs(expectation(independent_ips, CASCADE, own) - float((TARGET[:, None] * CASCADE).sum()))
        > 0.01
    )


@pytest.mark.parametrize("slope", [0.0, 0.3, -2.0])
def test_doubly_robust_is_unbiased_for_any_model(slope):
    weight = importance_weights(conditional(TARGET), conditional(LOGGING))
    truth = float((TARGET[:, None] * CASCADE).sum())
    model = slope * torch.arange(6.0, dtype=torch.float64)
    whole = weight.prod(1)
    mean = (TARGET * model).sum().expand(6)
    found = expectation(doubly_robust, CASCADE.sum(1), whole, model, mean)
    assert found == pytest.approx(truth, abs=1e-12)
    first = slope * torch.tensor([0.3, 1.0, -0.4], dtype=torch.float64)
    logged = torch.stack([first[SLATES[:, 0]], model], 1)
    head = conditional(TARGET)[:, 0]
    by_first = torch.zeros(3, dtype=torch.float64).index_add_(
        0, SLATES[:, 0], TARGET / head * model
    )
    mean_first = sum(float(marginal(TARGET)[0, i] * first[i]) for i in range(3))
    target = torch.stack(
        [torch.full((6,), mean_first, dtype=torch.float64), by_first[SLATES[:, 0]]], 1
    )
    found = expectation(cascade_doubly_robust, CASCADE, weight, logged, target)
    assert found == pytest.approx(truth, abs=1e-12)


def test_a_perfect_model_leaves_no_variance():
    reward = torch.stack([CASCADE[:, 0], CASCADE[:, 1]], 1)
    weight = importance_weights(conditional(TARGET), conditional(LOGGING))
    second = conditional(TARGET)[:, 1] * reward[:, 1]
    below = torch.zeros(3, dtype=torch.float64).index_add_(0, SLATES[:, 0], second)[SLATES[:, 0]]
    q = torch.stack([reward[:, 0] + below, reward[:, 1]], 1)
    first = float((TARGET * (reward[:, 0] + reward[:, 1])).sum())
    v = torch.stack([torch.full((6,), first, dtype=torch.float64), below], 1)
    found = cascade_doubly_robust(reward, weight, q, v)
    assert found.value == pytest.approx(first, abs=1e-12)
    assert found.se < 1e-12


def test_pseudo_inverse_is_unbiased_for_additive_rewards():
    table = torch.tensor([[0.2, 0.7, 0.4], [0.5, 0.1, 0.9]], dtype=torch.float64)
    reward = sum(table[s][SLATES[:, s]] for s in (0, 1))
    weight = pseudo_inverse_weights(
        marginal(TARGET), slates=SLATES, slate_probs=LOGGING, logged=SLATES
    )
    assert expectation(pseudo_inverse, reward, weight) == pytest.approx(
        float((TARGET * reward).sum()), abs=1e-9
    )
    interaction = torch.eye(6, dtype=torch.float64)[2]  # Not additive: it must fail.
    assert abs(expectation(pseudo_inverse, interaction, weight) - float(TARGET[2])) > 0.01


def test_pseudo_inverse_of_independent_slots_has_the_short_form():
    base = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], dtype=torch.float64)
    aim = torch.tensor([[0.1, 0.8, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)
    every = torch.tensor(list(itertools.product(range(3), repeat=2)))
    probs = base[0][every[:, 0]] * base[1][every[:, 1]]
    short = pseudo_inverse_weights(aim, base, logged=every)
    long = pseudo_inverse_weights(aim, slates=every, slate_probs=probs, logged=every)
    assert torch.allclose(short, long, atol=1e-10)


def obp_log():
    """The log that obp simulated, and its own values of the uniform policy."""
    found = np.load(DATA / "obp_slates.npz")
    values = json.loads((DATA / "obp_slates.json").read_text(encoding="utf-8"))["values"]
    reward = torch.from_numpy(found["reward"]).double()
    cascade = torch.from_numpy(found["cascade"]).double()
    own = torch.cat([cascade[:, :1], torch.from_numpy(found["own"]).double()], 1)
    action = torch.from_numpy(found["action"]).long()
    above = torch.cat([torch.ones(len(cascade), 1).double(), cascade[:, :-1]], 1)
    return action, reward, cascade / above, own, values


def test_the_values_of_obp_on_its_log():
    """Slate estimators agree with obp's (the log is stored in float32: 1e-6)."""
    action, reward, logging, own, values = obp_log()
    target = torch.tensor([1 / 6, 1 / 5, 1 / 4], dtype=torch.float64).expand_as(reward)
    step = importance_weights(target, (logging).clamp_max(1.0))
    alone = importance_weights(torch.full_like(reward, 1 / 6), own)
    found = {}
    for suffix, normalised in (("", False), ("_self_normalised", True)):
        options = {"self_normalised": normalised}
        found[f"sips{suffix}"] = slate_ips(reward, step.prod(1), **options).value
        found[f"iips{suffix}"] = independent_ips(reward, alone, **options).value
        found[f"rips{suffix}"] = cascade_ips(reward, step, **options).value
    later = reward.flip(1).cumsum(1).flip(1)
    table = torch.stack(
        [torch.stack([later[action[:, s] == i, s].mean() for i in range(6)]) for s in range(3)]
    )
    logged = torch.stack([table[s][action[:, s]] for s in range(3)], 1)
    choice = torch.ones(len(action), 3, 6, dtype=torch.float64)
    for s in range(1, 3):
        choice[:, s].scatter_(1, action[:, :s], 0.0)
    mean = (choice / choice.sum(2, keepdim=True) * table).sum(2)
    found["cascade_dr"] = cascade_doubly_robust(reward, step, logged, mean).value
    # The figures that other people's documents quote:
    assert found["sips"] == pytest.approx(1.007665, abs=2e-6)
    assert found["iips"] == pytest.approx(0.990548, abs=2e-6)
    assert found["rips"] == pytest.approx(0.998868, abs=2e-6)
    assert found == pytest.approx(values, abs=2e-6)


@pytest.mark.parametrize("method", ["normal", "bootstrap", "bernstein"])
def test_intervals_cover(method):
    """Of 200 logs, at least the share expected hold the truth (99.9 % binomial bound)."""
    generator = torch.Generator().manual_seed(0)
    truth = float((TARGET[:, None] * CASCADE).sum())
    covered = 0
    for k in range(200):
        rows = torch.multinomial(LOGGING, 150, replacement=True, generator=generator)
        clicks = torch.bernoulli(CASCADE[rows], generator=generator)
        interval = Interval(level=0.9, method=method, resamples=200, rng=k)
        weight = importance_weights(TARGET, LOGGING)[rows]
        found = slate_ips(clicks, weight, interval=interval)
        assert found.low <= found.value <= found.high
        covered += found.low <= truth <= found.high
    assert covered >= 180 - 3.1 * (200 * 0.9 * 0.1) ** 0.5 - 4  # skewness of 150 rows
    if method == "bernstein":
        assert covered == 200  # It is valid at any sample size, hence wide.


def test_the_standard_error_is_that_of_repeated_logs():
    generator = torch.Generator().manual_seed(1)
    weight = importance_weights(TARGET, LOGGING)
    for estimate in (ips, snips):
        values, errors = [], []
        for _ in range(400):
            rows = torch.multinomial(LOGGING, 200, replacement=True, generator=generator)
            found = estimate(CASCADE.sum(1)[rows], weight[rows])
            values.append(found.value)
            errors.append(found.se)
        spread = torch.tensor(values).std()
        # The sd of a sample sd from 400 values is 3.5 %; four of those.
        assert float(torch.tensor(errors).mean() / spread) == pytest.approx(1, abs=0.15)


def test_rows_of_one_unit_are_one_observation():
    reward, weight = torch.rand(50, generator=torch.Generator().manual_seed(2)), torch.ones(50)
    single = ips(reward, weight)
    twice = ips(
        reward.repeat(2), weight.repeat(2), interval=Interval(unit=torch.arange(50).repeat(2))
    )
    assert twice.se == pytest.approx(single.se, rel=1e-6)
    naive = ips(reward.repeat(2), weight.repeat(2))
    assert naive.se < 0.75 * single.se
    wide = Interval(method="bootstrap", unit=torch.arange(50).repeat(2), rng=0)
    found = ips(reward.repeat(2), weight.repeat(2), interval=wide)
    assert (found.high - found.low) / 3.92 == pytest.approx(single.se, rel=0.2)


def test_self_normalised_values_stay_within_the_rewards():
    found = snips([1.0, 1.0], [100.0, 0.1])
    assert found.value == pytest.approx(1.0)
    assert found.ess == pytest.approx(100.1**2 / (1e4 + 0.01))
    assert direct_method([0.2, 0.4]).value == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: importance_weights([0.5], [0.0]), DataError, r"logging propensities in \(0, 1\]"),
        (lambda: importance_weights([1.5], [0.5]), DataError, r"target propensities in \[0, 1\]"),
        (lambda: importance_weights([0.5], [float("nan")]), DataError, "got nan"),
        (lambda: importance_weights([0.5, 0.1], [0.5]), ShapeError, "one shape"),
        (lambda: ips([1.0], [-1.0]), DataError, "weights >= 0"),
        (lambda: ips([1.0, 2.0], [1.0]), ShapeError, "of one shape"),
        (lambda: ips([float("nan")], [1.0]), DataError, "reward must be finite"),
        (lambda: ips([], []), ShapeError, "expected rewards"),
        (lambda: slate_ips([1.0], [1.0]), ShapeError, r"rewards \[row, slot\]"),
        (lambda: snips([1.0], [0.0]), DataError, "all weights of a slot are zero"),
        (lambda: Interval(level=1.0), DataError, "0 < level < 1"),
        (lambda: Interval(method="t"), DataError, "'normal', 'bernstein' or 'bootstrap'"),
        (
            lambda: ips([1.0], [1.0], interval=Interval(method="bootstrap")),
            DataError,
            "rng=",
        ),
        (
            lambda: ips([1.0], [1.0], interval=Interval(unit=[0, 1])),
            ShapeError,
            r"unit \[row=1\]",
        ),
        (
            lambda: slate_ips([[1.0, 0.0]], [1.0], slot_weights=[1.0]),
            ShapeError,
            r"slot_weights \[slot=2\]",
        ),
        (
            lambda: pseudo_inverse_weights(marginal(TARGET), logged=SLATES),
            DataError,
            "either logging=",
        ),
        (
            lambda: pseudo_inverse_weights(marginal(TARGET), marginal(LOGGING), logged=[0, 1]),
            ShapeError,
            r"logged \[row, slot\]",
        ),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()

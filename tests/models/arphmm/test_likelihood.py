"""Likelihoods, state laws and updates, against enumeration and closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from probkit.models.arphmm import ARPHMM, Sequences, plausibility

_RTOL = 1e-10


def close(found, expected, atol=2e-10):
    torch.testing.assert_close(found, expected, rtol=_RTOL, atol=atol)


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


class TestTiny:
    """Sixteen paths, added up by hand (numbers computed once, independently)."""

    def test_with_labels(self, tiny):
        values, data, _ = tiny
        model = ARPHMM(2, 1, prior=None)
        close(model.log_likelihood(values, data), tensor(-7.904929337111473), 1e-12)
        found = model.smooth(values, data)
        close(
            found.smoothed[0, :, 0], tensor([0.9550970065, 0.8598561014, 0.0740244351, 1.0]), 1e-9
        )
        close(
            found.pair_sum[0],
            tensor([[0.9868135917, 0.9021639513], [0.9470669448, 0.1639555123]]),
            1e-9,
        )
        path = model.viterbi(values, data)
        assert path.path[0].tolist() == [0, 0, 1, 0]
        close(path.log_joint[0], tensor(-8.167397465883589), 1e-12)

    def test_m_step(self, tiny):
        values, data, _ = tiny
        model = ARPHMM(2, 1, prior=None)
        stats, _ = model.e_step(values, data)
        new = model.m_step(stats, data)
        expected = tensor([[0.5224062061, 0.4775937939], [0.8524282644, 0.1475717356]])
        close(new["transition"], expected, 1e-9)
        weights = tensor([[[0.7419305737, -0.0714569637]], [[1.5655882422, -1.8453442798]]])
        assert torch.allclose(new["weights"], weights, atol=3e-5)
        close(new["covariance"][:, 0, 0], tensor([0.0674192405, 0.0360328285]), 1e-9)

    def test_without_labels(self, tiny):
        values, _, data = tiny
        model = ARPHMM(2, 1, prior=None)
        close(model.log_likelihood(values, data), tensor(-4.809260618573549), 1e-12)
        smoothed = model.smooth(values, data).smoothed[0, :, 0]
        close(smoothed, tensor([0.8644465741, 0.8197523642, 0.0698162075, 0.1283795717]), 1e-9)
        path = model.viterbi(values, data)
        assert path.path[0].tolist() == [0, 0, 1, 1]
        close(path.log_joint[0], tensor(-5.2752295144837245), 1e-12)

    def test_history_may_be_given_apart(self, tiny):
        values, _, data = tiny
        y = data.y[0]
        apart = Sequences([y[1:]], prev=[y[:1]])
        model = ARPHMM(2, 1, prior=None)
        close(model.log_likelihood(values, apart), model.log_likelihood(values, data), 1e-13)

    def test_zeros_before_the_sequence(self, tiny):
        values, _, data = tiny
        model = ARPHMM(2, 1, prior=None, start="zeros")
        shorter = Sequences([data.y[0][1:]])
        close(model.log_likelihood(values, shorter), tensor(-4.972946305140913), 1e-12)


def random_case(seed, *, states, features, order, steps):
    """Random values, a sequence and plausibilities with zeros among them."""
    rng = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    width = 1 + features * order
    noise = torch.randn(states, features, features, generator=rng, dtype=torch.float64)
    rows = uniform(states, states) + 0.05
    start = uniform(states) + 0.05
    values = {
        "initial": start / start.sum(),
        "transition": rows / rows.sum(1, keepdim=True),
        "weights": torch.randn(states, features, width, generator=rng, dtype=torch.float64),
        "covariance": noise @ noise.mT + 0.3 * torch.eye(features, dtype=torch.float64),
    }
    y = torch.randn(order + steps, features, generator=rng, dtype=torch.float64)
    labels = uniform(order + steps, states)
    labels = torch.where(labels < 0.3, 0.0, labels)
    labels[:, 0] = labels[:, 0].clamp_min(0.1)
    return values, y, labels


def enumerate_paths(values, y, labels, order):
    """Log joint of every path: {path: log p(path, y, labels)}."""
    states = len(values["initial"])
    laws = [MultivariateNormal(torch.zeros_like(y[0]), c) for c in values["covariance"]]
    steps = len(y) - order

    def emission(t, k):
        lags = [y[order + t - lag] for lag in range(1, order + 1)]
        x = torch.cat([torch.ones(1, dtype=torch.float64), *lags])
        term = laws[k].log_prob(y[order + t] - values["weights"][k] @ x)
        return float(term) + math.log(float(labels[order + t, k]) or 5e-324)

    table = [[emission(t, k) for k in range(states)] for t in range(steps)]
    found = {}
    for path in itertools.product(range(states), repeat=steps):
        total = math.log(float(values["initial"][path[0]])) + table[0][path[0]]
        for t in range(1, steps):
            total += math.log(float(values["transition"][path[t - 1], path[t]])) + table[t][path[t]]
        found[path] = total
    return found


@pytest.mark.parametrize(
    ("seed", "states", "features", "order", "steps"),
    [(0, 2, 1, 1, 8), (1, 3, 2, 1, 6), (2, 3, 1, 2, 7), (3, 2, 3, 0, 9), (4, 1, 2, 2, 5)],
)
def test_everything_equals_the_sum_over_paths(seed, states, features, order, steps):
    values, y, labels = random_case(
        seed, states=states, features=features, order=order, steps=steps
    )
    paths = enumerate_paths(values, y, labels, order)
    logs = tensor(list(paths.values()))
    log_evidence = torch.logsumexp(logs, 0)
    weights = (logs - log_evidence).exp()
    gamma = torch.zeros(steps, states, dtype=torch.float64)
    pairs = torch.zeros(states, states, dtype=torch.float64)
    for path, weight in zip(paths, weights, strict=True):
        for t, k in enumerate(path):
            gamma[t, k] += weight
            if t:
                pairs[path[t - 1], k] += weight
    model = ARPHMM(states, order, prior=None)
    data = Sequences([y], labels=[labels])
    close(model.log_likelihood(values, data), log_evidence)
    found = model.smooth(values, data)
    close(found.smoothed[0], gamma)
    close(found.pair_sum[0], pairs)
    best = max(paths, key=paths.__getitem__)
    viterbi = model.viterbi(values, data)
    assert tuple(viterbi.path[0].tolist()) == best
    close(viterbi.log_joint[0], tensor(paths[best]))


def test_gradient_is_the_expected_score():
    """Fisher's identity: d log L is the expectation of d log p(y, z) under the smoothed states."""
    values, y, labels = random_case(7, states=3, features=2, order=1, steps=20)
    model, data = ARPHMM(3, 1, prior=None), Sequences([y], labels=[labels])
    free = {name: value.clone().requires_grad_() for name, value in values.items()}
    names = ["initial", "transition", "weights"]
    found = torch.autograd.grad(model.log_likelihood(free, data), [free[n] for n in names])
    smooth = model.smooth(values, data)
    close(found[0], smooth.smoothed[0, 0] / values["initial"])
    close(found[1], smooth.pair_sum[0] / values["transition"])
    rows = model.prepare(data)
    x, target = rows.design[0, :, : rows.regressors], rows.design[0, :, rows.regressors :]
    for k in range(3):
        residual = target - x @ values["weights"][k].mT
        expected = torch.linalg.solve(
            values["covariance"][k], (smooth.smoothed[0, :, k, None] * residual).mT @ x
        )
        close(found[2][k], expected)


def test_plausibilities_only_lower_the_likelihood():
    values, y, labels = random_case(11, states=3, features=1, order=1, steps=30)
    model = ARPHMM(3, 1, prior=None)
    with_labels = model.log_likelihood(values, Sequences([y], labels=[labels]))
    assert float(with_labels) < float(model.log_likelihood(values, Sequences([y])))


def test_scaling_a_row_of_plausibilities_adds_its_logarithm():
    values, y, labels = random_case(12, states=3, features=1, order=1, steps=30)
    model = ARPHMM(3, 1, prior=None)
    scaled = labels.clone()
    scaled[5] *= 0.25
    before, after = (Sequences([y], labels=[one]) for one in (labels, scaled))
    shift = model.log_likelihood(values, after) - model.log_likelihood(values, before)
    close(shift, tensor(math.log(0.25)))
    close(model.smooth(values, after).smoothed, model.smooth(values, before).smoothed)


def test_padding_changes_nothing():
    values, y, labels = random_case(13, states=3, features=2, order=1, steps=25)
    model = ARPHMM(3, 1, prior=None)
    together = Sequences([y, y[:9], y[3:]], labels=[labels, labels[:9], labels[3:]])
    alone = [together[n] for n in range(3)]
    close(
        model.sequence_log_likelihood(values, together),
        torch.cat([model.sequence_log_likelihood(values, one) for one in alone]),
    )
    stats, _ = model.e_step(values, together)
    parts = [model.e_step(values, one)[0] for one in alone]
    for name in ("initial", "transition", "moments"):
        close(getattr(stats, name), sum(getattr(part, name) for part in parts))


def test_missing_values_leave_only_the_plausibility():
    values, y, labels = random_case(14, states=2, features=2, order=1, steps=12)
    y[6, 1] = math.nan
    model = ARPHMM(2, 1, prior=None)
    rows = model.prepare(Sequences([y], labels=[labels]))
    assert (~rows.usable[0]).nonzero()[:, 0].tolist() == [5, 6]
    chain = model._chain(values, rows)
    close(chain["log_emission"][0, 5:7], labels[6:8].log())
    stats, _ = model.e_step(values, rows)
    gamma = model.smooth(values, rows).smoothed[0]
    kept = rows.usable[0]
    expected = torch.einsum(
        "tk,ti,tj->kij", gamma[kept], rows.design[0, kept], rows.design[0, kept]
    )
    close(stats.moments, expected)


def test_certain_labels_give_least_squares_in_one_step():
    rng = torch.Generator().manual_seed(3)
    y = torch.randn(60, 2, generator=rng, dtype=torch.float64)
    z = torch.arange(60) // 20 % 2
    data = Sequences([y], labels=[plausibility.from_labels(z, 2)])
    model = ARPHMM(2, 1, prior=None)
    start = model.em_init(data, rng=rng)
    new = model.m_step(model.e_step(start, data)[0], data)
    for k in range(2):
        at = (z[1:] == k).nonzero()[:, 0] + 1
        x = torch.cat([torch.ones(len(at), 1, dtype=torch.float64), y[at - 1]], 1)
        solution = torch.linalg.lstsq(x, y[at]).solution
        close(new["weights"][k], solution.mT)
        residual = y[at] - x @ solution
        close(new["covariance"][k], residual.mT @ residual / len(at))
    jumps = tensor([[18 + 19, 1], [1, 19]])
    close(new["transition"], jumps / jumps.sum(1, keepdim=True))


def test_batch_equals_loop():
    cases = [random_case(seed, states=3, features=2, order=1, steps=15) for seed in range(4)]
    data = Sequences([cases[0][1], cases[1][1][:9]])
    model = ARPHMM(3, 1)
    stacked = {name: torch.stack([case[0][name] for case in cases]) for name in cases[0][0]}
    together = model.log_joint(stacked, data)
    close(together, torch.stack([model.log_joint(case[0], data) for case in cases]))


@pytest.mark.slow
def test_a_million_steps_do_not_underflow(tiny):
    values, _, _ = tiny
    data = ARPHMM(2, 1).simulate(values, 1_000_001, rng=0)
    result = float(ARPHMM(2, 1).log_likelihood(values, data))
    assert math.isfinite(result)
    # Twenty pieces, each with its own history, differ only by what crosses the cuts.
    y = data.y[0]
    cuts = range(0, 1_000_000, 50_000)
    pieces = Sequences([y[c + 1 : c + 50_001] for c in cuts], prev=[y[c : c + 1] for c in cuts])
    assert abs(float(ARPHMM(2, 1).log_likelihood(values, pieces)) - result) < 20 * 10


def test_single_precision_over_ten_thousand_steps(tiny):
    values, _, _ = tiny
    data = ARPHMM(2, 1).simulate(values, 10_001, rng=1)
    double = ARPHMM(2, 1).log_likelihood(values, data)
    single = ARPHMM(2, 1).log_likelihood(
        {name: value.float() for name, value in values.items()}, Sequences([data.y[0].float()])
    )
    assert single.dtype == torch.float32
    assert abs(float(single) / float(double) - 1) < 1e-4

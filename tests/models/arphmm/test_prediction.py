"""Predictions one step ahead, states, futures, and streams."""

from __future__ import annotations

import math

import pytest
import torch

from probkit import infer
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import EM, Gibbs
from probkit.models.arphmm import ARPHMM, Sequences
from probkit.models.arphmm.selection import bic, free_parameters, held_out_score


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def fixed(model, values, data):
    """A posterior of one draw with given values."""
    from probkit.posterior import make_posterior
    from probkit.sampler import Problem
    from probkit.sources import Draws

    problem = Problem(model, model.prepare(data))
    return make_posterior(
        problem,
        Draws({name: value[None, None] for name, value in values.items()}),
        attrs={"point_estimate": True},
    )


def test_next_step_of_the_tiny_chain(tiny):
    """The law of the value after the last one, worked out by hand."""
    values, data, unlabelled = tiny
    model = ARPHMM(2, 1, prior=None)
    for seqs, mean, variance in (
        (data, 0.394, 0.748444),
        (unlabelled, -0.2248505041, 0.8259276935),
    ):
        post = fixed(model, values, seqs)
        found = model.forecast(post, seqs, horizon=1, paths=200_000, rng=0)
        se = math.sqrt(variance / 200_000)
        assert abs(float(found.mean) - mean) < 4 * se
        assert abs(float(found.variance) - variance) < 4 * variance * math.sqrt(2 / 200_000) * 1.5


def test_one_step_ahead_adds_up_to_the_evidence(tiny):
    values, _, data = tiny
    model = ARPHMM(2, 1, prior=None)
    post = fixed(model, values, data)
    ahead = post.predict(data)
    total = ahead.log_prob(data.y[0][1:]).sum()
    torch.testing.assert_close(total, model.log_likelihood(values, data))
    assert tuple(ahead.mean.shape) == (4, 1)
    drawn = ahead.sample(40_000, rng=0)
    se = (ahead.variance / 40_000).sqrt()
    assert float(((drawn.mean(0) - ahead.mean).abs() / se).max()) < 4
    level = tensor(0.9)
    q = ahead.quantile(0.9)
    torch.testing.assert_close(ahead.cdf(q), level.expand(4, 1), rtol=0, atol=1e-9)


def test_states_average_over_draws(tiny):
    _, data, _ = tiny
    model = ARPHMM(2, 1)
    post = infer(model, data, Gibbs(draws=5, warmup=2), rng=0)
    found = post.predict(data, site="state").probs
    each = [
        model.smooth({n: v[0, s] for n, v in post.draws.items()}, data).smoothed[0]
        for s in range(5)
    ]
    torch.testing.assert_close(found, torch.stack(each).mean(0))
    filtered = post.predict(data, site="filtered_state").probs
    torch.testing.assert_close(filtered.sum(-1), torch.ones(4, dtype=torch.float64))


def test_forecasts_keep_the_dynamics():
    """One state: the forecast is that of an autoregression, whose moments are known."""
    values = {
        "initial": tensor([1.0]),
        "transition": tensor([[1.0]]),
        "weights": tensor([[[0.5, 0.8]]]),
        "covariance": tensor([[[0.2]]]),
    }
    model = ARPHMM(1, 1, prior=None)
    data = Sequences([tensor([0.0, 3.0])])
    paths = 20_000
    found = model.forecast(fixed(model, values, data), data, horizon=30, paths=paths, rng=0)
    mean, variance = tensor(3.0), tensor(0.0)
    for h in range(30):
        mean, variance = 0.5 + 0.8 * mean, 0.64 * variance + 0.2
        assert abs(float(found.mean[h, 0] - mean)) < 4.5 * math.sqrt(float(variance) / paths)
        assert abs(float(found.variance[h, 0] / variance) - 1) < 4.5 * math.sqrt(2 / paths)


def test_a_stream_gives_the_filter(tiny):
    values, data, _ = tiny
    model = ARPHMM(2, 1, prior=None)
    whole = model.filter(values, data)
    state = model.filter_start(values, history=data.y[0][:1])
    for t in range(1, 5):
        state = model.filter_step(state, data.y[0][t], label=data.labels[0][t])
        torch.testing.assert_close(state.probs, whole.filtered[0, t - 1])
    torch.testing.assert_close(state.log_evidence, whole.log_evidence[0])


def test_a_stream_with_a_hole_gives_the_filter(regimes):
    model = ARPHMM(4, 2)
    y = model.simulate(regimes, 30, rng=3).y[0].clone()
    y[11] = math.nan
    whole = model.filter(regimes, y)
    state = model.filter_start(regimes, history=y[:2])
    for t in range(2, 30):
        state = model.filter_step(state, y[t])
        torch.testing.assert_close(state.probs, whole.filtered[0, t - 2])


def test_streams_use_constant_memory(regimes):
    model = ARPHMM(4, 2)
    state = first = model.filter_step(model.filter_start(regimes), [0.0])
    for _ in range(50):
        state = model.filter_step(state, [0.3])
    assert [t.shape for t in state if isinstance(t, torch.Tensor)] == [
        t.shape for t in first if isinstance(t, torch.Tensor)
    ]


def test_bic_counts_what_is_free():
    assert free_parameters(ARPHMM(3, 2, cov="full"), 2) == 2 + 6 + 3 * 2 * 5 + 3 * 3
    assert free_parameters(ARPHMM(3, 2, cov="diag", transition="left_right"), 2) == 2 + 2 + 30 + 6
    assert free_parameters(ARPHMM(3, 0, cov="shared"), 2) == 2 + 6 + 6 + 3


def test_the_right_number_of_states_has_the_best_scores(regimes):
    truth = {
        "initial": tensor([0.5, 0.5]),
        "transition": tensor([[0.9, 0.1], [0.1, 0.9]]),
        "weights": tensor([[[-1.0, 0.5]], [[1.0, -0.5]]]),
        "covariance": tensor([[[0.2]], [[0.2]]]),
    }
    data = ARPHMM(2, 1).simulate(truth, [200] * 4, rng=0)
    train, test = data[:3], data[3:]
    scores, held = {}, {}
    for states in (1, 2, 3):
        model = ARPHMM(states, 1, prior=None)
        post = infer(model, train, EM(restarts=3), rng=0)
        scores[states] = float(bic(model, post))
        held[states] = float(held_out_score(model, post, test))
    assert min(scores, key=scores.__getitem__) == 2
    assert held[2] > held[1]


class TestBadInput:
    @pytest.fixture
    def post(self, tiny):
        values, data, _ = tiny
        return fixed(ARPHMM(2, 1, prior=None), values, data)

    def test_several_sequences(self, post):
        with pytest.raises(DataError, match="expected one sequence, got 2"):
            post.predict(Sequences([[0.0, 1.0], [1.0, 2.0]]))

    def test_unknown_site(self, post, tiny):
        with pytest.raises(CapabilityError, match="or 'rul', got 'nonsense'"):
            post.predict(tiny[1], site="nonsense")

    def test_joint(self, post, tiny):
        with pytest.raises(CapabilityError, match="one step at a time"):
            post.predict(tiny[1], joint=True)

    def test_horizon(self, post, tiny):
        with pytest.raises(DataError, match="horizon and paths >= 1, got 0"):
            post.model.forecast(post, tiny[1], horizon=0, rng=0)

    def test_forecast_after_a_hole(self, post):
        with pytest.raises(DataError, match="the last 1 values hold NaN"):
            post.model.forecast(post, tensor([0.0, 1.0, math.nan]), horizon=2, rng=0)

    def test_many_draws_where_values_are_wanted(self, tiny):
        model = ARPHMM(2, 1)
        post = infer(model, tiny[1], Gibbs(draws=3, warmup=1), rng=0)
        with pytest.raises(DataError, match="1 chains of 3 draws"):
            model.viterbi(post, tiny[1])

    def test_stream_shapes(self, tiny):
        model = ARPHMM(2, 1)
        state = model.filter_start(tiny[0])
        with pytest.raises(ShapeError, match=r"y_t \[feature=1\]"):
            model.filter_step(state, [1.0, 2.0])
        with pytest.raises(ShapeError, match=r"label: expected \[state=2\]"):
            model.filter_step(state, [1.0], label=[1.0, 1.0, 1.0])
        with pytest.raises(DataError, match="expected finite values or NaN"):
            model.filter_step(state, [math.inf])
        with pytest.raises(ShapeError, match=r"history: expected \[lag=1"):
            model.filter_start(tiny[0], history=torch.zeros(1, 3))

"""EM: monotone, right on known answers, and equal to statsmodels where the models coincide."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from probkit import infer
from probkit.errors import DataError, NumericsWarning
from probkit.inference import EM
from probkit.models.arphmm import ARPHMM, Sequences, SwitchingPrior, plausibility
from probkit.models.arphmm.relabel import permute_states
from probkit.models.arphmm.simulation import simulate_sequences

_DROP = 1e-8  # relative; larger falls are no rounding errors


def objective(model, values, data):
    return float(model.log_likelihood(values, data) + model.log_prior(values))


def trace(model, data, seed, steps=12):
    rows = model.prepare(data)
    params = model.em_init(rows, rng=torch.Generator().manual_seed(seed))
    found = [objective(model, params, rows)]
    for _ in range(steps):
        params = model.m_step(model.e_step(params, rows)[0], rows)
        found.append(objective(model, params, rows))
    return np.array(found)


def sequences(seed):
    """Two short random walks with noise; every second seed with labels, every fifth with holes."""
    rng = torch.Generator().manual_seed(seed)
    y = [
        torch.randn(n, 2, generator=rng, dtype=torch.float64).cumsum(0)
        + torch.randn(n, 2, generator=rng, dtype=torch.float64)
        for n in (25, 18)
    ]
    labels = None
    if seed % 2:
        labels = [torch.rand(len(one), 3, generator=rng, dtype=torch.float64) for one in y]
    if seed % 5 == 0:
        y[0][7, 1] = math.nan
    return Sequences(y, labels)


@pytest.mark.parametrize("cov", ["full", "diag", "shared"])
@pytest.mark.parametrize("transition", ["full", "left_right"])
def test_the_objective_never_falls(cov, transition):
    """Over 35 random data sets for each of six kinds of model: 210 runs."""
    for seed in range(35):
        model = ARPHMM(3, 1, cov=cov, transition=transition, prior=SwitchingPrior(sticky=seed % 3))
        found = trace(model, sequences(seed), seed)
        assert np.isfinite(found).all()
        falls = np.diff(found) / np.maximum(1, np.abs(found[:-1]))
        assert falls.min() >= -_DROP, (seed, falls.min())


def test_a_wrong_m_step_is_noticed():
    """The check above can fail: with covariances a tenth too small it does, near convergence."""

    class Wrong(ARPHMM):
        def m_step(self, stats, data):
            new = super().m_step(stats, data)
            return {**new, "covariance": new["covariance"] * 0.9}

    right = ARPHMM(3, 1)
    data = right.prepare(sequences(1))
    with warnings.catch_warnings():  # of a state that explains little
        warnings.simplefilter("ignore", NumericsWarning)
        post = infer(right, data, EM(max_iter=2000, tolerance=1e-9), rng=0)
    params = {name: value[0, 0] for name, value in post.draws.items()}
    moved = Wrong(3, 1).m_step(right.e_step(params, data)[0], data)
    before = objective(right, params, data)
    assert objective(right, moved, data) < before - _DROP * abs(before)


def test_maximum_likelihood_is_monotone_too():
    rng = torch.Generator().manual_seed(0)
    y = torch.randn(400, 1, generator=rng, dtype=torch.float64).cumsum(0)
    found = trace(ARPHMM(2, 1, prior=None), y, 0)
    assert np.diff(found).min() >= -_DROP * abs(found[0])


def test_the_mode_is_stationary():
    """At convergence the gradient of the log joint vanishes along the free directions."""
    model = ARPHMM(2, 1, cov="full", prior=SwitchingPrior(initial=2.0, transition=2.0))
    data = model.prepare(sequences(2).without_labels())
    post = infer(model, data, EM(restarts=2, max_iter=4000, tolerance=1e-14), rng=0)
    values = {n: v[0, 0].clone().requires_grad_() for n, v in post.draws.items()}
    gradient = dict(
        zip(
            values,
            torch.autograd.grad(model.log_joint(values, data), list(values.values())),
            strict=True,
        )
    )
    assert float(gradient["weights"].abs().max()) < 1e-4
    assert float(gradient["covariance"].abs().max()) < 1e-4
    for name in ("initial", "transition"):  # on the simplex: equal along each row
        rows = gradient[name]
        assert float((rows - rows.mean(-1, keepdim=True)).abs().max()) < 1e-4


def test_parameters_are_recovered(regimes):
    """Twenty sequences of four regimes, each estimate within five standard errors."""
    model = ARPHMM(4, 2)
    data = model.simulate(regimes, [150] * 20, rng=0)
    post = infer(model, data, EM(restarts=4), rng=0)
    found = {name: value[0, 0] for name, value in post.draws.items()}
    distance = torch.cdist(found["weights"][:, 0], regimes["weights"][:, 0])
    rows, columns = linear_sum_assignment(distance.numpy())
    order = torch.as_tensor(rows[np.argsort(columns)])
    found = {
        n: v[0]
        for n, v in permute_states({n: v[None] for n, v in found.items()}, order[None]).items()
    }
    stats, _ = model.e_step(regimes, data)
    for k in range(4):
        xx = stats.moments[k, :3, :3]
        se = (regimes["covariance"][k, 0, 0] * torch.linalg.inv(xx).diagonal()).sqrt()
        error = (found["weights"][k, 0] - regimes["weights"][k, 0]).abs() / se
        assert float(error.max()) < 5
        count = float(xx[0, 0])
        relative = float(found["covariance"][k, 0, 0] / regimes["covariance"][k, 0, 0]) - 1
        assert abs(relative) < 5 * math.sqrt(2 / count)
    visits = stats.transition.sum(1, keepdim=True)
    se = (regimes["transition"] * (1 - regimes["transition"]) / visits).sqrt()
    assert float(((found["transition"] - regimes["transition"]).abs() / se).max()) < 5


def test_labels_help_in_proportion_to_their_worth():
    """Adjusted Rand index of the states against the nonspecificity of (right) labels."""
    truth = {
        "initial": torch.full((3,), 1 / 3).double(),
        "transition": torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.6, 0.3], [0.1, 0.3, 0.6]]).double(),
        "weights": 2 * torch.eye(3).double()[..., None],
        "covariance": torch.eye(3).double().repeat(3, 1, 1),
    }
    worth = (0.1, 0.5, 1.0)
    scores = np.zeros((12, len(worth)))
    for seed in range(len(scores)):
        data, states = simulate_sequences(truth, [100], order=0, rng=seed)
        for column, nu in enumerate(worth):
            labels = plausibility.from_labels(states[0], 3, nonspecificity=nu)
            seqs = Sequences(data.y, [labels])
            model = ARPHMM(3, 0, prior=SwitchingPrior(scale=1.0))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                post = infer(model, seqs, EM(restarts=3, max_iter=100), rng=seed)
            path = model.viterbi(post, seqs.without_labels()).path[0]
            scores[seed, column] = adjusted_rand_score(states[0].numpy(), path.numpy())
    gain = scores[:, :-1] - scores[:, 1:]
    se = gain.std(0, ddof=1) / math.sqrt(len(scores))
    # Ordered within noise, and certain labels clearly better than none.
    assert (gain.mean(0) > -2 * se).all()
    total = scores[:, 0] - scores[:, -1]
    assert total.mean() > 2 * total.std(ddof=1) / math.sqrt(len(scores))


def test_left_right_chains_keep_their_zeros():
    rng = torch.Generator().manual_seed(1)
    y = torch.cat([torch.full((15,), float(k)) for k in range(3)]).double()
    y = y + 0.1 * torch.randn(45, generator=rng, dtype=torch.float64)
    model = ARPHMM(3, 0, transition="left_right")
    post = infer(model, [y, y + 0.05], EM(restarts=4), rng=0)
    transition = post.draws["transition"][0, 0]
    assert not bool(transition[~model.mask].any())
    assert model.viterbi(post, y).path[0].tolist() == [0] * 15 + [1] * 15 + [2] * 15


def test_posteriors_are_stored(tmp_path):
    import probkit as pk

    model = ARPHMM(2, 1, transition="left_right", cov="diag")
    post = infer(model, sequences(2).without_labels(), EM(), rng=0)
    post.save(tmp_path / "fit")
    again = pk.load(tmp_path / "fit")
    for name, value in post.draws.items():
        torch.testing.assert_close(again.draws[name], value, rtol=0, atol=0)
    assert again.model == model
    summary = post.summary()
    assert len(summary) == 2 + 4 + 2 * 2 * 3 + 2 * 4


def test_a_prior_without_a_mode_is_refused():
    with pytest.raises(DataError, match="concentrations >= 1"):
        infer(ARPHMM(2, 1, prior=SwitchingPrior(transition=0.5)), torch.arange(20.0), EM(), rng=0)


def test_too_few_steps_without_a_prior():
    y = torch.tensor([0.0, 1.0, 0.0, 5.0]).double()
    with pytest.raises(DataError, match="linearly dependent regressors"):
        infer(ARPHMM(3, 2, prior=None), y, EM(), rng=0)

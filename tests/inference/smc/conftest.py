"""Exact answers that particle methods are held against."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import MultivariateNormal


def dense_gaussian(model, y):
    """Exact posterior of a LinearGaussian by one joint Gaussian of all states and observations.

    Returns log evidence, smoothed mean [T, D] and covariance [T, D, T, D].
    """
    T, D = len(y), model.transition.shape[0]
    A, Q, C, R = model.transition, model.transition_cov, model.observation, model.observation_cov
    mean0, cov0 = model.initial_law
    means, covs = [mean0], {(0, 0): cov0}
    for t in range(1, T):
        means.append(A @ means[-1])
        for s in range(t):
            covs[t, s] = A @ covs[t - 1, s]
            covs[s, t] = covs[t, s].mT
        covs[t, t] = A @ covs[t - 1, t - 1] @ A.mT + Q
    mean = torch.cat(means)
    prior = torch.cat([torch.cat([covs[t, s] for s in range(T)], 1) for t in range(T)])
    H = torch.block_diag(*[C] * T)
    noise = torch.block_diag(*[R] * T)
    seen = ~torch.isnan(y.reshape(-1))
    H, noise, flat = H[seen], noise[seen][:, seen], y.reshape(-1)[seen]
    S = H @ prior @ H.mT + noise
    S = 0.5 * (S + S.mT)
    log_evidence = MultivariateNormal(H @ mean, S, validate_args=False).log_prob(flat)
    gain = torch.linalg.solve(S, H @ prior).mT
    smoothed = mean + gain @ (flat - H @ mean)
    covariance = prior - gain @ H @ prior
    return SimpleNamespace(
        log_evidence=log_evidence,
        mean=smoothed.reshape(T, D),
        covariance=covariance.reshape(T, D, T, D),
    )


def enumerate_hmm(model, y):
    """Exact evidence and marginals of a DiscreteHMM by all K^T paths."""
    K, T = len(model.initial), len(y)
    paths = torch.tensor(list(itertools.product(range(K), repeat=T)))
    log_joint = model.initial.log()[paths[:, 0]]
    for t in range(T):
        if t > 0:
            log_joint = log_joint + model.transition.log()[paths[:, t - 1], paths[:, t]]
        log_joint = log_joint + model.emission.log()[paths[:, t], y[t]]
    log_evidence = log_joint.logsumexp(0)
    weights = (log_joint - log_evidence).exp()
    one_hot = torch.nn.functional.one_hot(paths, K).double()
    return SimpleNamespace(
        paths=paths,
        weights=weights,
        log_evidence=log_evidence,
        marginals=torch.einsum("p,ptk->tk", weights, one_hot),
        pairs=torch.einsum("p,ptk,ptl->tkl", weights, one_hot[:, :-1], one_hot[:, 1:]),
    )


def z_score(samples, truth):
    """(mean - truth) / standard error of independent samples [n]."""
    return float((samples.mean() - truth) / (samples.std() / len(samples) ** 0.5))


@pytest.fixture
def exact():
    return SimpleNamespace(gaussian=dense_gaussian, hmm=enumerate_hmm, z=z_score)


@pytest.fixture
def hmm():
    """A three-state chain with six observations (the setting of the acceptance checks)."""
    from probkit.models.state_space import DiscreteHMM

    model = DiscreteHMM(
        initial=[0.5, 0.3, 0.2],
        transition=[[0.1, 0.8, 0.1], [0.15, 0.15, 0.7], [0.75, 0.15, 0.1]],
        emission=[[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.05, 0.25, 0.7]],
    )
    return model, torch.tensor([2, 2, 2, 2, 2, 0])


@pytest.fixture
def lgssm():
    """a=0.7, b=1, sx=0.2, sy=1, stationary start; simulate with ``model.simulate_path``."""
    from probkit.models.state_space import LinearGaussian

    return LinearGaussian(0.7, 0.04, 1.0, 1.0)

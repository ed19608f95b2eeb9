"""The Gaussian process that leans on a language model."""

from __future__ import annotations

import math

import pytest
import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.optim import optimize_acqf, optimize_acqf_discrete

from probkit.bo.acquisition import LogStudentTExpectedImprovement
from probkit.bo.llm.hybrid import Said, fit_hybrid
from probkit.bo.surrogates.data import training_data
from probkit.bo.surrogates.gp import GPSurrogate
from probkit.errors import DataError, ShapeError
from probkit.rng import scope


def _f(X: torch.Tensor) -> torch.Tensor:
    return (9 * X[:, 0]).sin() + 2 * (X[:, 1] - 0.3) ** 2


@pytest.fixture
def rows():
    X = torch.rand(7, 2, generator=torch.Generator().manual_seed(3)).double()
    return X, _f(X), training_data(X, _f(X))


def _told(X, mean, sd=0.1) -> Said:
    return Said(X, mean, torch.full_like(mean, sd))


@pytest.mark.parametrize("method", ["trust", "stack"])
def test_good_words_are_trusted_and_help(rows, method: str) -> None:
    X, y, data = rows
    new = torch.rand(40, 2, generator=torch.Generator().manual_seed(5)).double()
    hybrid = fit_hybrid(data, _told(X, y + 0.01), method=method, noise="none")
    assert hybrid.trusted and hybrid.weights["gp"] < 0.1
    hybrid.hear(_told(new, _f(new) + 0.01))
    with torch.no_grad():
        ours = hybrid.model.posterior(new[:, None]).mean.flatten()
        plain = hybrid.base.posterior(new[:, None]).mean.flatten()
    assert float((ours - _f(new)).abs().mean()) < 0.2 * float((plain - _f(new)).abs().mean())


@pytest.mark.parametrize("method", ["trust", "stack"])
@pytest.mark.parametrize("words", ["mirrored", "constant", "mean of the others"])
def test_bad_words_leave_the_plain_process(rows, method: str, words: str) -> None:
    X, y, data = rows
    mean = {
        "mirrored": 2 * y.mean() - y,
        "constant": torch.full_like(y, float(y.mean())),
        "mean of the others": (y.sum() - y) / (len(y) - 1),
    }[words]
    hybrid = fit_hybrid(data, _told(X, mean), method=method, noise="none")
    assert not hybrid.trusted and hybrid.model is hybrid.base
    plain = GPSurrogate(noise="none").fit(data, rng=0)
    at = torch.rand(5, 2, generator=torch.Generator().manual_seed(1)).double()
    assert torch.equal(hybrid.model.posterior(at).mean, plain.posterior(at).mean)
    assert torch.equal(hybrid.model.posterior(at).variance, plain.posterior(at).variance)


def test_weights_are_posterior_probabilities(rows) -> None:
    """Odds of two members move by the ratio of their prior odds, and by nothing else."""
    X, y, data = rows
    told = _told(X, y + 0.3 * torch.sin(7 * X[:, 1]))
    one, other = (fit_hybrid(data, told, prior=p).weights for p in (0.5, 0.9))
    for name in ("trust 0.5", "trust 1"):
        gap = math.log(one[name] / one["gp"]) - math.log(other[name] / other["gp"])
        assert abs(gap - math.log(9)) < 1e-6
    assert abs(sum(one.values()) - 1) < 1e-12


def test_evidence_does_not_depend_on_the_units(rows) -> None:
    X, y, data = rows
    told = _told(X, y + 0.2 * torch.cos(5 * X[:, 0]))
    large = training_data(X, 1e3 * y + 7.0)
    a = fit_hybrid(data, told).weights
    b = fit_hybrid(large, Said(X, 1e3 * told.mean + 7.0, 1e3 * told.sd)).weights
    # Fits stop at a tolerance of the optimiser, so weights agree to a part in a thousand.
    assert all(abs(a[k] - b[k]) < 1e-3 for k in a)


def test_trusted_process_meets_the_outcomes(rows) -> None:
    X, y, data = rows
    rng = torch.Generator().manual_seed(2)
    scattered = y + 0.05 * torch.randn(7, generator=rng, dtype=torch.float64)
    hybrid = fit_hybrid(data, _told(X, scattered), noise="none")
    assert hybrid.trusted
    with torch.no_grad():
        posterior = hybrid.model.posterior(X[:, None])
    assert float((posterior.mean.flatten() - y).abs().max()) < 1e-2


def test_ordinary_acquisition_functions_work(rows) -> None:
    X, y, data = rows
    hybrid = fit_hybrid(data, _told(X, y + 0.01), noise="none")
    new = torch.rand(30, 2, generator=torch.Generator().manual_seed(9)).double()
    hybrid.hear(_told(new, _f(new)))
    closed = LogStudentTExpectedImprovement(hybrid.model, best_f=y.max())
    best, value = optimize_acqf_discrete(closed, q=1, choices=new)
    with torch.no_grad():
        assert torch.allclose(value, closed(new[:, None]).max())
    bounds = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    drawn = qLogExpectedImprovement(hybrid.model, best_f=y.max())
    with scope(rng=0):
        pair, _ = optimize_acqf(
            drawn, bounds, q=2, num_restarts=1, raw_samples=8, options={"maxiter": 3}
        )
    assert pair.shape == (2, 2) and best.shape == (1, 2)


def test_gradients_are_those_of_differences(rows) -> None:
    X, y, data = rows
    hybrid = fit_hybrid(data, _told(X, y + 0.01), noise="none")
    at = torch.tensor([[0.4, 0.6]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(hybrid.model.posterior(at).mean.sum(), at)
    for k in range(2):
        step = torch.zeros(1, 2, dtype=torch.float64)
        step[0, k] = 1e-5
        with torch.no_grad():
            up, down = (hybrid.model.posterior(at + s * step).mean.sum() for s in (1, -1))
        assert abs(float(slope[0, k]) - float(up - down) / 2e-5) < 1e-5


def test_rows_without_words_leave_the_plain_process(rows) -> None:
    X, y, data = rows
    assert not fit_hybrid(data, _told(X[:-1], y[:-1])).trusted
    assert not fit_hybrid(data, None).trusted


def test_later_words_replace_earlier_ones() -> None:
    X = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    one = _told(X, torch.tensor([1.0, 2.0], dtype=torch.float64))
    both = one | _told(X[1:], torch.tensor([5.0], dtype=torch.float64))
    assert both.at(X).mean.tolist() == [1.0, 5.0]
    with pytest.raises(DataError, match=r"nothing was said about point 0: \[0.5\]"):
        both.at(X[:1] + 0.5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "vote"}, "method: expected 'trust' or 'stack', got 'vote'"),
        ({"prior": 1.0}, r"prior: expected a probability in \(0, 1\), got 1.0"),
        ({"trusts": (0.0, 1.0)}, r"trusts: expected distinct factors in \(0, 2\]"),
    ],
)
def test_bad_options(rows, options: dict, text: str) -> None:
    X, y, data = rows
    with pytest.raises(DataError, match=text):
        fit_hybrid(data, _told(X, y), **options)


def test_bad_words(rows) -> None:
    X, y, data = rows
    with pytest.raises(ShapeError, match=r"said: expected X \[point, feature\]"):
        fit_hybrid(data, Said(X, y[:3], y[:3]))
    with pytest.raises(DataError, match=r"said.mean must be finite, got nan at point 2"):
        broken = y.clone()
        broken[2] = math.nan
        fit_hybrid(data, _told(X, broken))
    with pytest.raises(DataError, match="said.sd: expected standard deviations >= 0, got -1"):
        fit_hybrid(data, _told(X, y, -1.0))
    two = training_data(X, torch.stack([y, y], 1))
    with pytest.raises(DataError, match="a hybrid predicts one output, got 2"):
        fit_hybrid(two, _told(X, y))

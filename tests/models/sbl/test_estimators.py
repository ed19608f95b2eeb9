"""scikit-learn estimators: its own checks, closed forms, known examples, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, make_moons
from sklearn.linear_model import ARDRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import probkit as pk
from probkit.errors import ConvergenceWarning, DataError, ShapeError
from probkit.models.sbl.estimators import (
    KroneckerSparseBayes,
    RVMClassifier,
    RVMRegressor,
    SparseBayesRegressor,
)
from probkit.models.sbl.rvm import fit_sparse_logistic, moderated_sigmoid

pytestmark = pytest.mark.filterwarnings(
    "ignore::probkit.errors.ConvergenceWarning", "ignore::probkit.errors.NumericsWarning"
)


@parametrize_with_checks([SparseBayesRegressor(), RVMRegressor(), RVMClassifier()])
def test_conventions_of_scikit_learn(estimator, check):
    state = np.random.get_state()  # some of its checks draw from NumPy's global stream
    check(estimator)
    np.random.set_state(state)


def sparse_problem(n=80, p=30, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p)) * rng.uniform(0.5, 2.0, p)
    w = np.zeros(p)
    w[:4] = [1.5, -2.0, 0.7, 1.0]
    return X, X @ w + 3.0 + 0.2 * rng.standard_normal(n), w


class TestSparseBayesRegressor:
    def test_it_is_the_model_of_the_package(self):
        X, y, _ = sparse_problem()
        found = SparseBayesRegressor(fit_intercept=False, noise_var=0.05).fit(X, y)
        model = pk.models.SparseRegression(torch.as_tensor(X), noise_var=0.05)
        sampler = pk.models.sbl.EvidenceMaximization(max_iter=1000)
        post = pk.infer(model, torch.as_tensor(y), sampler, rng=0)
        law = post.analytic["weights"]
        np.testing.assert_allclose(found.coef_, law.mean.numpy(), rtol=1e-10)
        sd = np.sqrt(np.diag(found.sigma_))
        np.testing.assert_allclose(sd, law.stddev.numpy()[found.active_], rtol=1e-7)
        mean, std = found.predict(X[:5], return_std=True)
        ahead = post.predict(torch.as_tensor(X[:5]))
        np.testing.assert_allclose(mean, ahead.mean.numpy(), rtol=1e-9)
        np.testing.assert_allclose(std, ahead.variance.sqrt().numpy(), rtol=1e-7)

    def test_support_intercept_and_noise_are_found(self):
        X, y, w = sparse_problem()
        for options in ({}, {"standardize": True}):
            found = SparseBayesRegressor(**options).fit(X, y)
            assert set(found.active_) >= {0, 1, 2, 3} and len(found.active_) < 12
            sd = np.zeros(30)
            sd[found.active_] = np.sqrt(np.diag(found.sigma_))
            assert (np.abs(found.coef_ - w)[:4] < 5 * sd[:4]).all()
            assert abs(found.intercept_ - 3.0) < 5 * 0.2 / np.sqrt(80)
            assert 0.6 < found.noise_var_ / 0.04 < 1.5

    def test_intervals_cover_new_data(self):
        X, y, w = sparse_problem(n=200)
        found = SparseBayesRegressor().fit(X, y)
        rng = np.random.default_rng(1)
        new = rng.standard_normal((2000, 30))
        truth = new @ w + 3.0 + 0.2 * rng.standard_normal(2000)
        mean, sd = found.predict(new, return_std=True)
        covered = np.mean(np.abs(truth - mean) < 1.6449 * sd)
        # 200 rows know the noise sd to 5 %, which moves 90 % coverage by 2 points
        assert abs(covered - 0.9) < 4 * np.sqrt(0.09 / 2000) + 0.02

    def test_pipelines_and_grid_search(self):
        X, y = load_diabetes(return_X_y=True)
        pipeline = make_pipeline(
            PolynomialFeatures(2, include_bias=False), StandardScaler(), SparseBayesRegressor()
        )
        search = GridSearchCV(
            pipeline, {"sparsebayesregressor__update": ["mackay", "em"]}, cv=3, scoring="r2"
        )
        search.fit(X, y)
        plain = cross_val_score(
            make_pipeline(
                PolynomialFeatures(2, include_bias=False), StandardScaler(), ARDRegression()
            ),
            X,
            y,
            cv=3,
            scoring="r2",
        )
        assert search.best_score_ > plain.mean() - 2 * plain.std(ddof=1) / np.sqrt(3)


class TestRVMRegressor:
    @pytest.mark.parametrize("seed", range(3))
    def test_the_sinc_of_the_literature(self, seed):
        """Four to nine vectors, and an error of at most 0.05, from 100 points with noise 0.1."""
        x = np.linspace(-10, 10, 100)[:, None]
        truth = np.sinc(x[:, 0] / np.pi)
        y = truth + 0.1 * np.random.default_rng(seed).standard_normal(100)
        found = RVMRegressor(gamma=1 / 9).fit(x, y)
        assert 4 <= len(found.relevance_) <= 9
        assert np.sqrt(np.mean((found.predict(x) - truth) ** 2)) <= 0.05
        assert 0.07 < np.sqrt(found.noise_var_) < 0.13
        by_hand = found.intercept_ + found.coef_ @ np.exp(
            -((found.relevance_vectors_ - 1.7) ** 2)[:, 0] / 9
        )
        np.testing.assert_allclose(found.predict([[1.7]]), [by_hand], rtol=1e-8)

    def test_a_kernel_of_ones_own(self):
        x = np.linspace(-1, 1, 40)[:, None]
        found = RVMRegressor(kernel=lambda a, b: float(np.exp(-np.abs(a - b).sum()))).fit(
            x, x[:, 0]
        )
        assert np.abs(found.predict(x) - x[:, 0]).max() < 0.1


class TestRVMClassifier:
    def test_breast_cancer(self):
        X, y = load_breast_cancer(return_X_y=True)
        model = make_pipeline(StandardScaler(), RVMClassifier(gamma=0.02))
        score = cross_val_score(model, X, y, cv=3)
        assert score.mean() > 0.955  # linear discriminants reach 0.956
        machine = model.fit(X, y)[-1]
        assert len(machine.relevance_) < 40

    def test_probabilities_are_calibrated(self):
        """On overlapping classes with known probabilities."""
        rng = np.random.default_rng(0)
        X = rng.standard_normal((600, 1))
        p = 1 / (1 + np.exp(-2 * X[:, 0]))
        y = (rng.random(600) < p).astype(int)
        found = RVMClassifier(gamma=0.5).fit(X, y)
        grid = np.linspace(-1.5, 1.5, 13)[:, None]
        truth = 1 / (1 + np.exp(-2 * grid[:, 0]))
        error = found.predict_proba(grid)[:, 1] - truth
        assert np.abs(error).max() < 0.12  # about 3 standard errors of a bin of 40 points

    def test_three_classes(self):
        rng = np.random.default_rng(0)
        centres = np.array([[0, 0], [3, 0], [0, 3]])
        y = np.repeat(["a", "b", "c"], 40)
        X = centres.repeat(40, 0) + 0.5 * rng.standard_normal((120, 2))
        found = RVMClassifier().fit(X, y)
        assert found.score(X, y) > 0.95
        np.testing.assert_allclose(found.predict_proba(X).sum(1), 1.0)

    def test_one_class(self):
        with pytest.raises(ValueError, match="one class"):
            RVMClassifier().fit(np.zeros((4, 1)), [1, 1, 1, 1])


class TestSparseLogistic:
    def test_the_mode_is_stationary_and_the_hessian_right(self):
        X, t = make_moons(60, noise=0.3, random_state=0)
        design = torch.as_tensor(np.column_stack([np.ones(60), X, X**2]))
        target = torch.as_tensor(t).double()
        found = fit_sparse_logistic(design, target)
        part = design[:, found.active]
        weights = found.mean.clone().requires_grad_()

        def log_joint(w):
            activation = part @ w
            fit = target * activation - torch.nn.functional.softplus(activation)
            return fit.sum() - 0.5 * (found.precision * w**2).sum()

        (gradient,) = torch.autograd.grad(log_joint(weights), weights)
        assert float(gradient.abs().max()) < 1e-5
        hessian = torch.autograd.functional.hessian(log_joint, found.mean)
        torch.testing.assert_close(torch.linalg.inv(-hessian), found.covariance)

    def test_evidence_is_that_of_quadrature(self):
        """One weight: Laplace's evidence against numerical integration."""
        x = torch.linspace(-2, 2, 80, dtype=torch.float64)
        target = (x + 0.8 * torch.sin(7 * x) > 0).double()
        found = fit_sparse_logistic(x[:, None], target)
        w = torch.linspace(-10, 20, 30_001, dtype=torch.float64)
        activation = w[:, None] * x
        log_joint = (target * activation - torch.nn.functional.softplus(activation)).sum(1)
        log_joint = log_joint + torch.distributions.Normal(
            torch.zeros((), dtype=torch.float64), found.precision[0].rsqrt()
        ).log_prob(w)
        exact = torch.logsumexp(log_joint, 0) + np.log(30 / 30_000)
        assert abs(float(found.log_evidence - exact)) < 0.1  # Laplace's own error
        # and the fitted precision is where that evidence is stationary: 1 - a S = a w^2
        balance = 1 - found.precision * found.covariance[0, 0] - found.precision * found.mean**2
        assert abs(float(balance)) < 1e-2

    def test_uncertain_activations_are_moderated(self):
        """Against the integral over the activation, to the known error of the probit trick."""
        for mean, variance in ((0.5, 1.0), (2.0, 4.0), (-1.0, 9.0)):
            draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()
            exact = float(torch.sigmoid(mean + variance**0.5 * draws).mean())
            found = moderated_sigmoid(torch.tensor(mean), torch.tensor(variance))
            assert abs(float(found) - exact) < 0.02

    def test_bad_input(self):
        with pytest.raises(ShapeError, match=r"target \[row=3\]"):
            fit_sparse_logistic(torch.zeros(3, 2), torch.zeros(4))
        with pytest.raises(DataError, match="both classes"):
            fit_sparse_logistic(torch.zeros(3, 2), torch.ones(3))
        design = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)).double()
        with pytest.warns(ConvergenceWarning, match="had not settled"):
            fit_sparse_logistic(design, (design[:, 0] > 0.1).double(), max_iter=1)


class TestKroneckerSparseBayes:
    def make(self, complex_=False):
        rng = np.random.default_rng(0)

        def normal(*shape):
            real = rng.standard_normal(shape)
            return real + 1j * rng.standard_normal(shape) if complex_ else real

        H = [normal(7, 8), normal(8, 9)]
        x = np.zeros((8, 9), complex if complex_ else float)
        x[np.ix_([1, 5], [2, 6])] = normal(2, 2)
        clean = H[0] @ x @ H[1].T
        return H, x, clean + 0.01 * normal(7, 8)

    @pytest.mark.parametrize("complex_", [False, True])
    def test_recovery_and_prediction(self, complex_):
        H, x, y = self.make(complex_)
        found = KroneckerSparseBayes().fit(H, y)
        assert np.linalg.norm(found.coef_ - x) / np.linalg.norm(x) < 0.05
        assert (found.support_ > 0.5).sum() >= 4 and found.var_.shape == (8, 9)
        assert [len(part) for part in found.hyper_] == [8, 9]
        mean, sd = found.predict(H, return_std=True)
        assert mean.shape == y.shape
        assert np.mean(np.abs(mean - y) < 4 * sd) > 0.95

    def test_clone_and_parameters(self):
        model = KroneckerSparseBayes(update="svd", starts=2, random_state=3)
        again = clone(model)
        assert again.get_params() == model.get_params() and again is not model
        again.set_params(update="am")
        assert model.update == "svd" and again.update == "am"

    def test_data_that_do_not_fit(self):
        H, _, y = self.make()
        with pytest.raises((ShapeError, DataError)):
            KroneckerSparseBayes().fit(H, y[:3])

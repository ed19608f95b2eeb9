"""Sparse Bayesian learning behind the interface of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.metrics.pairwise import pairwise_kernels
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

import probkit
from probkit.errors import DataError
from probkit.models.sbl.evidence_maximization import EvidenceMaximization
from probkit.models.sbl.kronecker_sbl import KroneckerSBL
from probkit.models.sbl.rvm import fit_sparse_logistic, moderated_sigmoid
from probkit.models.sbl.sparse_regression import SparseRegression
from probkit.models.sbl.support import support_probability

__all__ = [
    "KroneckerSparseBayes",
    "RVMClassifier",
    "RVMRegressor",
    "SparseBayesRegressor",
]

Array = np.ndarray[Any, Any]


class _SparseLinear(RegressorMixin, BaseEstimator):
    """What the two regressors share: a fit on a design, predictions from the active columns."""

    def _fit_design(self, design: Array, y: Array) -> None:
        """Fit the weights of the columns of ``design`` [row, column] to y [row]."""
        model = SparseRegression(
            torch.as_tensor(design),
            noise_var=self.noise_var,
            update=self.update,
            noise_floor=self.noise_floor,
        )
        sampler = EvidenceMaximization(max_iter=self.max_iter, tolerance=self.tol, prune=self.prune)
        post = probkit.infer(model, torch.as_tensor(y), sampler, rng=0)
        law: Any = post.analytic["weights"]
        mean = law.mean.numpy()
        variance = post.draws["weight_var"].reshape(-1).numpy()
        active = np.flatnonzero(variance > 0)
        noise = float(post.draws["noise_var"].reshape(-1)[0]) if self.noise_var is None else None
        self.noise_var_ = float(self.noise_var) if noise is None else noise
        columns = design[:, active]
        precision = columns.T @ columns / self.noise_var_ + np.diag(1 / variance[active])
        self._active = active
        self._covariance = np.linalg.inv(precision) if len(active) else np.zeros((0, 0))
        self._weights = mean
        self.prior_variances_ = variance
        self.log_evidence_ = float(post.sample_stats["log_evidence"].sum())
        self.n_iter_ = int(post.sample_stats["iterations"].max())

    def _predict_design(self, design: Array) -> tuple[Array, Array]:
        """Mean and standard deviation [row] of a new observation."""
        columns = design[:, self._active]
        variance = np.einsum("ij,jk,ik->i", columns, self._covariance, columns)
        mean: Array = columns @ self._weights[self._active]
        return mean, np.sqrt(variance + self.noise_var_)


class SparseBayesRegressor(_SparseLinear):
    """Linear regression in which the data decides which coefficients are not zero.

    Each coefficient has a prior variance of its own, fitted by the evidence
    (:class:`~probkit.models.SparseRegression`); columns and target are centred.

    Args:
        noise_var: Noise variance; None learns it.
        update: "em", "mackay", "mm" or "fast".
        fit_intercept: Whether to centre.
        standardize: Whether columns are scaled to unit variance for the fit.
        prune: Relative threshold of prior variances; "auto", a number, or None.
        noise_floor: Smallest learned noise variance, as a share of the target's.
        max_iter: Largest number of EM steps.
        tol: Relative change at which they stop.

    Attributes:
        coef_: [feature] posterior means, exact zeros where pruned.
        intercept_: The constant.
        sigma_: Covariance of the coefficients in use [active, active], in the order of
            ``active_``.
        active_: Their positions.
        prior_variances_: [feature] of the (scaled) columns; ``noise_var_``, ``log_evidence_`` and
            ``n_iter_`` likewise tell of the fit.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> model = SparseBayesRegressor(standardize=True).fit(X, y)
        >>> mean, sd = model.predict(X[:2], return_std=True)
        >>> mean.shape, bool((sd > 0).all())
        ((2,), True)
    """

    def __init__(
        self,
        *,
        noise_var: float | None = None,
        update: str = "em",
        fit_intercept: bool = True,
        standardize: bool = False,
        prune: float | str | None = "auto",
        noise_floor: float = 1e-6,
        max_iter: int = 1000,
        tol: float = 1e-4,
    ) -> None:
        self.noise_var = noise_var
        self.update = update
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.prune = prune
        self.noise_floor = noise_floor
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any) -> SparseBayesRegressor:
        """Fit to X [row, feature] and y [row]; returns itself."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        y = np.asarray(y, dtype=np.float64)
        self._shift = X.mean(0) if self.fit_intercept else np.zeros(X.shape[1])
        self._offset = float(y.mean()) if self.fit_intercept else 0.0
        spread = X.std(0) if self.standardize else np.ones(X.shape[1])
        self._scale = np.where(spread > 0, spread, 1.0)
        self._fit_design((X - self._shift) / self._scale, y - self._offset)
        self.active_ = self._active
        self.coef_ = self._weights / self._scale
        part = self._scale[self.active_]
        self.sigma_ = self._covariance / np.outer(part, part)
        self.intercept_ = self._offset - float(self._shift @ self.coef_)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict [row]; with ``return_std`` also the sd of a new observation, noise included."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        mean, sd = self._predict_design((X - self._shift) / self._scale)
        return (mean + self._offset, sd) if return_std else mean + self._offset


class _Kernel:
    """Columns of a relevance vector machine: a kernel at each training row, and a constant."""

    kernel: Any
    gamma: Any
    degree: int
    coef0: float

    def _design(self, X: Array, rows: Array) -> Array:
        """[row, 1 + training row]."""
        options: dict[str, Any] = {}
        if not callable(self.kernel):
            gamma = self.gamma
            if gamma == "scale":
                spread = float(rows.var())
                gamma = 1.0 / (rows.shape[1] * spread) if spread > 0 else 1.0
            options = {"gamma": gamma, "degree": self.degree, "coef0": self.coef0}
        columns = pairwise_kernels(X, rows, metric=self.kernel, filter_params=True, **options)
        return np.column_stack([np.ones(len(X)), columns])


class RVMRegressor(_Kernel, _SparseLinear):
    """Relevance vector regression: sparse Bayesian weights of kernels at the training rows.

    Tipping, "Sparse Bayesian learning and the relevance vector machine" (JMLR 2001).

    Args:
        kernel: A name that :func:`sklearn.metrics.pairwise.pairwise_kernels` knows, or a callable.
        gamma: Kernel coefficient; "scale" is 1 / (features * variance of X).
        degree: Of polynomial kernels.
        coef0: Of polynomial and sigmoid kernels.
        noise_var: Noise variance; None learns it.
        update: "em", "mackay", "mm" or "fast".
        prune: Relative threshold of prior variances; "auto", a number, or None.
        noise_floor: Smallest learned noise variance, as a share of the target's.
        max_iter: Largest number of EM steps.
        tol: Relative change at which they stop.

    Attributes:
        relevance_: Positions of the relevance vectors among the training rows.
        relevance_vectors_: Those rows [vector, feature].
        coef_: Their weights [vector].
        intercept_: The constant.

    Example:
        >>> x = np.linspace(-10, 10, 60)[:, None]
        >>> model = RVMRegressor(gamma=1 / 9).fit(x, np.sinc(x[:, 0] / np.pi))
        >>> len(model.relevance_) < 20
        True
    """

    def __init__(
        self,
        *,
        kernel: Any = "rbf",
        gamma: float | str = "scale",
        degree: int = 3,
        coef0: float = 1.0,
        noise_var: float | None = None,
        update: str = "mackay",
        prune: float | str | None = "auto",
        noise_floor: float = 1e-6,
        max_iter: int = 1000,
        tol: float = 1e-4,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.noise_var = noise_var
        self.update = update
        self.prune = prune
        self.noise_floor = noise_floor
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any) -> RVMRegressor:
        """Fit to X [row, feature] and y [row]; returns itself."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        y = np.asarray(y, dtype=np.float64)
        self._offset = float(y.mean())
        self._rows = X
        self._fit_design(self._design(X, X), y - self._offset)
        self.relevance_ = self._active[self._active > 0] - 1
        self.relevance_vectors_ = X[self.relevance_]
        self.coef_ = self._weights[1:][self.relevance_]
        self.intercept_ = self._offset + float(self._weights[0])
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Predict [row]; with ``return_std`` also the sd of a new observation, noise included."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        mean, sd = self._predict_design(self._design(X, self._rows))
        return (mean + self._offset, sd) if return_std else mean + self._offset


class RVMClassifier(_Kernel, ClassifierMixin, BaseEstimator):
    """Relevance vector classification, by Laplace's approximation.

    Several classes are told apart one against the rest, and their probabilities normalised.

    Args:
        kernel: A name that :func:`sklearn.metrics.pairwise.pairwise_kernels` knows, or a callable.
        gamma: Kernel coefficient; "scale" is 1 / (features * variance of X).
        degree: Of polynomial kernels.
        coef0: Of polynomial and sigmoid kernels.
        max_iter: Largest number of updates of the precisions.
        tol: Change of log precisions at which they stop.

    Attributes:
        classes_: The labels.
        relevance_: Positions of the relevance vectors of any class among the training rows.
        relevance_vectors_: Those rows.
        log_evidence_: [machine] of each binary machine.

    Example:
        >>> from sklearn.datasets import make_moons
        >>> X, y = make_moons(80, noise=0.15, random_state=0)
        >>> model = RVMClassifier(gamma=2.0).fit(X, y)
        >>> model.predict_proba(X[:1]).shape, model.score(X, y) > 0.9
        ((1, 2), True)
    """

    def __init__(
        self,
        *,
        kernel: Any = "rbf",
        gamma: float | str = "scale",
        degree: int = 3,
        coef0: float = 1.0,
        max_iter: int = 500,
        tol: float = 1e-2,
    ) -> None:
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.max_iter = max_iter
        self.tol = tol

    def fit(self, X: Any, y: Any) -> RVMClassifier:
        """Fit to X [row, feature] and labels y [row]; returns itself.

        Raises:
            DataError: All labels are the same.
        """
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise DataError(
                "RVMClassifier: expected at least two classes, got one class only "
                f"({self.classes_[0]!r})"
            )
        self._rows = X
        design = torch.as_tensor(self._design(X, X))
        wanted = [1] if len(self.classes_) == 2 else range(len(self.classes_))
        self._machines = [
            fit_sparse_logistic(
                design,
                torch.as_tensor(codes == k).double(),
                max_iter=self.max_iter,
                tolerance=self.tol,
            )
            for k in wanted
        ]
        used = torch.cat([machine.active for machine in self._machines]).unique().numpy()
        self.relevance_ = used[used > 0] - 1
        self.relevance_vectors_ = X[self.relevance_]
        self.log_evidence_ = np.array([float(m.log_evidence) for m in self._machines])
        self.n_iter_ = max(machine.iterations for machine in self._machines)
        return self

    def predict_proba(self, X: Any) -> Array:
        """Class probabilities [row, class], uncertainty of the weights included."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        design = torch.as_tensor(self._design(X, self._rows))
        one = [moderated_sigmoid(*machine.activation(design)) for machine in self._machines]
        probs = torch.stack([1 - one[0], one[0]] if len(one) == 1 else one, 1)
        result: Array = (probs / probs.sum(1, keepdim=True)).numpy()
        return result

    def predict(self, X: Any) -> Array:
        """The most probable labels [row]."""
        check_is_fitted(self)
        labels: Array = self.classes_[self.predict_proba(X).argmax(1)]
        return labels


class KroneckerSparseBayes(BaseEstimator):
    """Recovery of a sparse tensor of weights behind a Kronecker product of dictionaries.

    The data matrix of scikit-learn is here a list of factors: ``fit([H_1, ..., H_I], y)``. Real or
    complex; see :class:`~probkit.models.KroneckerSBL`.

    Args:
        noise_var: Noise variance; None learns it.
        update: "hybrid", "am", "svd" or "ksbl".
        starts: Starting points; the highest evidence wins.
        coupling: Block sparsity, one number >= 0 for each mode.
        prune: Relative threshold of prior variances; "auto", a number, or None.
        max_iter: Largest number of EM steps of each stage.
        tol: Relative change at which they stop.
        random_state: Seed of the further starts.

    Attributes:
        coef_: Posterior means [N_1, ..., N_I].
        var_: Posterior variances.
        support_: Probability that each weight exceeds a thousandth of the largest.
        hyper_: Prior variances of each mode.
        noise_var_: Noise variance.
        log_evidence_: Log evidence of the fit.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> H = [rng.standard_normal((4, 5)), rng.standard_normal((5, 6))]
        >>> x = np.zeros((5, 6)); x[1, 2] = 1.0
        >>> model = KroneckerSparseBayes(noise_var=1e-4).fit(H, H[0] @ x @ H[1].T)
        >>> np.unravel_index(np.abs(model.coef_).argmax(), (5, 6))
        (np.int64(1), np.int64(2))
    """

    def __init__(
        self,
        *,
        noise_var: float | None = None,
        update: str = "hybrid",
        starts: int = 1,
        coupling: Sequence[float] | None = None,
        prune: float | str | None = "auto",
        max_iter: int = 500,
        tol: float = 1e-4,
        random_state: int = 0,
    ) -> None:
        self.noise_var = noise_var
        self.update = update
        self.starts = starts
        self.coupling = coupling
        self.prune = prune
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Sequence[Any], y: Any) -> KroneckerSparseBayes:
        """Fit to factors X = [H_1, ..., H_I] and data y [M_1, ..., M_I]; returns itself."""
        model = KroneckerSBL(
            list(X), noise_var=self.noise_var, update=self.update, coupling=self.coupling
        )
        sampler = EvidenceMaximization(
            max_iter=self.max_iter, tolerance=self.tol, starts=self.starts, prune=self.prune
        )
        post = probkit.infer(model, y, sampler, rng=self.random_state)
        law: Any = post.analytic["weights"]
        self.posterior_ = post
        self.coef_ = law.mean.numpy()
        self.var_ = law.variance.numpy()
        self.support_ = support_probability(post).numpy()
        self.hyper_ = [
            value.reshape(value.shape[-1]).numpy()
            for name, value in post.draws.items()
            if name.startswith("weight_var")
        ]
        learned = post.draws.get("noise_var")
        self.noise_var_ = float(self.noise_var if learned is None else learned.reshape(-1)[0])  # type: ignore[arg-type]
        self.log_evidence_ = float(post.sample_stats["log_evidence"].sum())
        return self

    def predict(self, X: Sequence[Any], return_std: bool = False) -> Any:
        """Predict at new factors, with ``return_std`` also the sd of new data."""
        check_is_fitted(self)
        law = self.posterior_.predict(list(X))
        mean: Array = law.mean.numpy()
        return (mean, law.variance.sqrt().numpy()) if return_std else mean

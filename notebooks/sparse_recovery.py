# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sparse recovery: which few of many?
#
# Few measurements, many candidates, most of which do nothing: antenna paths, sources in an array,
# columns of a regression. Sparse Bayesian learning gives every candidate a prior variance of its
# own and lets the evidence decide which are zero. There is no penalty to tune, and what is left
# comes with a posterior. Four problems: a regression on real data, a decision that needs the error
# bars, a channel with a Kronecker dictionary, and what can go wrong.

# %%
# %matplotlib inline

# %%
import warnings

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LassoCV
from sklearn.model_selection import cross_val_predict, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

import probkit as pk
from probkit import plots
from probkit.models import (
    EvidenceMaximization,
    KroneckerSBL,
    SparseBayesRegressor,
    SparseRegression,
)
from probkit.models.sbl.metrics import nmse, support_recovery_rate
from probkit.models.sbl.simulators import simulate_kronecker
from probkit.models.sbl.support import support_probability

# %% [markdown]
# ## Which measurements matter for diabetes?
#
# Ten measurements of 442 patients, with all squares and products: 65 columns.
# `SparseBayesRegressor` is a scikit-learn estimator; pipelines and cross-validation work as usual.

# %%
frame = load_diabetes(as_frame=True, scaled=False)
X, y = frame.data, frame.target.to_numpy()
powers = PolynomialFeatures(2, include_bias=False)


def pipeline(estimator):
    """Squares and products, standardised, then the estimator."""
    return make_pipeline(powers, StandardScaler(), estimator)


sparse = pipeline(SparseBayesRegressor())
lasso = pipeline(LassoCV(cv=5, max_iter=200_000))
r2 = {
    name: 1 - np.mean((cross_val_predict(model, X, y, cv=5) - y) ** 2) / y.var()
    for name, model in (("sparse Bayes", sparse), ("lasso", lasso))
}
fit = sparse.fit(X, y)[-1]
kept = len(fit.active_)
sparse_r2, lasso_r2 = r2["sparse Bayes"], r2["lasso"]
n_lasso = int((lasso.fit(X, y)[-1].coef_ != 0).sum())
pd.DataFrame({"R2 (5 folds)": r2, "columns": {"sparse Bayes": kept, "lasso": n_lasso}}).round(3)

# %%
names = powers.get_feature_names_out(X.columns)[fit.active_]
mean, sd = fit.coef_[fit.active_], np.sqrt(np.diag(fit.sigma_))
order = np.argsort(np.abs(mean))
fig, axes = plots.figure(1, 1, size=(7.0, 3.2))
with plots.style():
    axes[0, 0].errorbar(mean[order], range(kept), xerr=2 * sd[order], fmt="o", capsize=3)
    axes[0, 0].set_yticks(range(kept), names[order])
    axes[0, 0].axvline(0.0, color="0.6", linewidth=0.8)
    axes[0, 0].set(xlabel="progression per standard deviation, with two posterior sds")
fig

# %% [markdown]
# ## Error bars that a decision can use
#
# A clinic admits patients whose progression will exceed 200 with a probability of at least one
# half, and asks a specialist about those between 0.3 and 0.7. `predict(return_std=True)` gives the
# law of a new patient. Its probabilities, checked on patients not fitted to:

# %%
train, test, t_train, t_test = train_test_split(X, y, test_size=0.4, random_state=0)
model = pipeline(SparseBayesRegressor()).fit(train, t_train)
mean, sd = model.predict(test, return_std=True)
covered = float(np.mean(np.abs(t_test - mean) < 1.645 * sd))
chance = torch.special.ndtr(torch.as_tensor((mean - 200) / sd)).numpy()
bins = pd.cut(chance, [0, 0.1, 0.3, 0.7, 1.0])
table = pd.DataFrame({"predicted": chance, "happened": t_test > 200}).groupby(bins, observed=True)
print(f"90 % intervals cover {covered:.2f} of {len(t_test)} patients")
pd.concat([table.mean(), table.size().rename("patients")], axis=1).round(2)

# %% [markdown]
# ## A dictionary with structure
#
# In a channel, an image or an array the dictionary is a Kronecker product, and so is the support:
# a few angles at one end, a few at the other. `KroneckerSBL` learns one short vector of variances
# for each mode, which is faster *and* more accurate. Here 3,375 unknowns are seen through 1,440
# measurements (8 x 12 x 15) at 25 dB, in ten problems at once.

# %%
data = simulate_kronecker(10, data_sizes=(8, 12, 15), nonzeros=3, snr_db=25.0, rng=0)
structured = KroneckerSBL(data.factors, noise_var=data.noise_var)
post = pk.infer(structured, data.y, rng=0)
law = post.analytic["weights"]
errors = nmse(law.mean, data.weights, dims=3)
recovered = support_recovery_rate(law.mean, data.weights, dims=3)
kronecker_error = float(errors.median())
pd.DataFrame({"NMSE": errors, "support recovered": recovered}).T.round(5)

# %%
fig, axes = plots.figure(1, 3, size=(11.0, 2.8))
with plots.style():
    for mode, ax in enumerate(axes[0], start=1):
        values = post.draws[f"weight_var_{mode}"].reshape(10, -1)[0]
        used = data.weights[0].abs().amax([d for d in range(3) if d != mode - 1]) > 0
        ax.bar(range(len(values)), values / values.max(), color=plots.PALETTE[0])
        ax.plot(np.flatnonzero(used), [1.05] * int(used.sum()), "v", color=plots.PALETTE[1])
        ax.set(title=f"mode {mode}", xlabel="index", ylabel="prior variance, largest = 1")
fig

# %% [markdown]
# Each weight has a probability of being there:

# %%
present = support_probability(post)
truth = data.weights.abs() > 0
found = float(present[truth].mean())
false_alarms = float((present[~truth] > 0.5).double().mean())
print(f"mean probability of the true weights {found:.3f}; false alarms {false_alarms:.5f}")

# %% [markdown]
# ## What can go wrong
#
# **Unknown noise, more columns than data, one snapshot.** The evidence has optima where the noise
# is nearly zero and dozens of columns fit it. The structure cures it, a known noise level cures it,
# and where neither is at hand there is a warning.

# %%
rng = torch.Generator().manual_seed(0)
H = torch.randn(40, 120, generator=rng, dtype=torch.float64)
x = torch.zeros(120, dtype=torch.float64)
x[:12] = torch.randn(12, generator=rng, dtype=torch.float64)
clean = H @ x
noise_var = float(clean.square().mean()) / 100
seen = clean + noise_var**0.5 * torch.randn(40, generator=rng, dtype=torch.float64)


def recover(noise, prune="auto"):
    """Fit with known or learned noise; the error, the columns in use, and what was warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = SparseRegression(H, noise_var=noise, update="mackay")
        post = pk.infer(model, seen, EvidenceMaximization(prune=prune), rng=0)
    weights = post.analytic["weights"].mean
    learned = post.draws.get("noise_var")
    return {
        "NMSE": float(nmse(weights, x)),
        "columns in use": int((weights != 0).sum()),
        "noise / truth": 1.0 if learned is None else float(learned.flatten()[0]) / noise_var,
        "warning": str(caught[0].message)[:40] + "..." if caught else "",
    }


cases = pd.DataFrame(
    {
        "known noise": recover(noise_var),
        "learned noise": recover(None),
        "learned noise, nothing pruned": recover(None, prune=None),
    }
).T
known_error = float(cases.loc["known noise", "NMSE"])
cases

# %% [markdown]
# **Noise alone.** No column is worth its place, the mean is zero, and the fit says so.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    silence = 0.1 * torch.randn(40, generator=rng, dtype=torch.float64)
    empty = pk.infer(SparseRegression(H, noise_var=1.0, update="fast"), silence, rng=0)
nothing = bool((empty.analytic["weights"].mean == 0).all())
str(caught[0].message)

# %% [markdown]
# **Shapes.** A wrong one is named, with what was expected.

# %%
try:
    pk.infer(structured, data.y[:, :7], rng=0)
except (pk.ShapeError, pk.DataError) as error:
    refusal = str(error)
refusal

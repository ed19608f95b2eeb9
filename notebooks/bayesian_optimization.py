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
# # Bayesian optimisation: few evaluations, and an answer you can defend
#
# A clinic predicts how diabetes will progress, with a support vector regression whose three knobs
# (cost, kernel width, tolerance) somebody must set. One evaluation of a setting is a
# cross-validation; here it takes a moment, on the clinic's full data an hour. So twenty-odd
# evaluations have to do, and the answer must stand up: which setting, how good is it really, and
# how sure are we? This tutorial starts inside a plain BoTorch loop, with a surrogate of probkit
# dropped in, and then hands the same problem to a `Study`, which survives kills, failures and
# impatience. On the way three things go wrong on purpose.

# %%
# %matplotlib inline

# %%
import tempfile
from pathlib import Path

import numpy as np
import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.optim import optimize_acqf
from sklearn.datasets import load_diabetes
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR

from probkit import plots
from probkit.bo import Float, Measurement, Space, Study
from probkit.bo.plots import regret_plot, slice_plot, surrogate_calibration_plot
from probkit.bo.surrogates import make_surrogate

torch.set_num_threads(1)

# %% [markdown]
# ## The problem
#
# Real data: 442 patients, ten measurements, progression after a year. The loss of a setting is its
# cross-validated squared error, as a share of the variance: 1 means "no better than the mean".

# %%
X, y = load_diabetes(return_X_y=True)
y = (y - y.mean()) / y.std()


def loss(params, folds=5, seed=0):
    model = make_pipeline(StandardScaler(), SVR(**params))
    cv = KFold(folds, shuffle=True, random_state=seed)
    return float(-cross_val_score(model, X, y, cv=cv, scoring="neg_mean_squared_error").mean())


space = Space(
    C=Float(1e-3, 1e3, log=True),
    gamma=Float(1e-5, 1e1, log=True),
    epsilon=Float(1e-3, 1.0, log=True),
)
default_loss = loss({"C": 1.0, "gamma": 0.1, "epsilon": 0.1})
f"scikit-learn's defaults: {default_loss:.3f}"

# %% [markdown]
# ## A loop of your own
#
# A surrogate of probkit is a BoTorch model. `make_surrogate` fits one to points in the unit cube;
# everything else below is BoTorch as its own tutorials use it. `"ibnn"` is the limit of an
# infinitely wide network, a Gaussian process whose kernel knows no length scale: it may trust far
# differences more than a stationary kernel does. Exchange the name (`"gp"`, `"laplace"`, `"hmc"`,
# `"dkl"`, ...), and nothing else changes. BoTorch maximises, so the loss changes its sign.

# %%


def own_loop(surrogate, start=8, steps=10, seed=0):
    """Eight points of a Sobol sequence, then expected improvement; return all losses, in order."""
    points = space.encode(space.sobol(start, rng=seed))
    values = torch.tensor([[-loss(p)] for p in space.decode(points)], dtype=torch.float64)
    state = None
    for k in range(steps):
        model = make_surrogate(surrogate, points, values, previous=state, rng=k)
        state = model  # the next fit starts from this one
        acquisition = LogExpectedImprovement(model, best_f=values.max())
        new, _ = optimize_acqf(acquisition, space.bounds, q=1, num_restarts=4, raw_samples=64)
        points = torch.cat([points, new])
        values = torch.cat([values, torch.tensor([[-loss(space.decode(new)[0])]])])
    return -values[:, 0].numpy()


with torch.random.fork_rng():  # optimize_acqf draws its starts from the global stream
    torch.random.default_generator.manual_seed(0)
    own = own_loop("ibnn")
own_best = own.min()
f"best of 18 evaluations: {own_best:.4f}"

# %% [markdown]
# ## The same, as a study
#
# A `Study` keeps the book: it asks for the next point, is told what it gave, and saves each of both
# in a SQLite file before it goes on. Below it is stopped after twelve evaluations, in the middle of
# the thirteenth. A new process would open the file and find one *pending* trial; what comes after
# it is exactly what would have come without the interruption.

# %%
folder = Path(tempfile.mkdtemp())
settings = {"surrogate": "gp", "noise": "none", "initial": 8, "rng": 1}
study = Study(space, {"loss": "min"}, storage=folder / "svr.db", **settings)
study.optimize(loss, 12)
lost = study.ask()  # ... and the machine is switched off
del study

study = Study.load(folder / "svr.db")
print("pending:", [t.number for t in study.pending], "of", len(study), "trials")
study.optimize(loss, 6, pending="rerun")

twin = Study(space, {"loss": "min"}, **settings)  # in memory, never interrupted
twin.optimize(loss, 18)
identical = [t.params for t in study.trials] == [t.params for t in twin.trials]
study_best = study.best().value
print(f"the same points as without a break: {identical}; best {study_best:.4f}")
study.best()

# %%
fig, axes = plots.figure(1, 3, size=(13.0, 3.6))
regret_plot(
    axes[0, 0], {"own loop, ibnn": np.minimum.accumulate(own), "study, gp": study.trace()}
).axhline(default_loss, color="#8a8a8a", linestyle=":", label="defaults")
axes[0, 0].set_ylabel("best loss so far")
slice_plot(axes[0, 1], study, "C")
slice_plot(axes[0, 2], study, "gamma")
fig

# %% [markdown]
# The dots are trials, the curves what the surrogate believes along one knob with the others at
# their best. Which knob matters can be read off numbers: the share of the surrogate's variance that
# each explains alone, and together with its interactions.

# %%
importance = study.importance(512)
least = importance["total"].idxmin()
importance.round(2)

# %% [markdown]
# ## What can go wrong, one: a failure is not a number
#
# Say settings with a large cost never finish. A common reflex is to tell zero for "nothing came
# out", and zero is an excellent loss: the search falls in love with the broken corner. Tell the
# failure instead: the study keeps the place in mind as bad, and never takes it for a result.

# %%
limit = 2.0


def fragile(params):
    if params["C"] > limit:
        raise TimeoutError("did not converge within the hour")
    return loss(params)


def told_as_zero(params):
    return 0.0 if params["C"] > limit else loss(params)


honest = Study(space, {"loss": "min"}, **settings)
honest.optimize(fragile, 16, catch=TimeoutError)
naive = Study(space, {"loss": "min"}, **settings)
naive.optimize(told_as_zero, 16)
honest_failures = sum(t.status == "failed" for t in honest.trials[8:])
naive_failures = sum(t["C"] > limit for t in naive.trials[8:])
honest_best = honest.best().value
print(
    f"of 8 chosen points beyond the limit: {honest_failures} told as failed, {naive_failures} as 0"
)
print(f"best of the honest study {honest_best:.4f}; the other one reports {naive.best().value:.1f}")

# %% [markdown]
# ## What can go wrong, two: the winner's curse
#
# Cross-validation is noisy: with other folds the same setting gets another loss. The best of many
# noisy numbers is partly luck, so the *told* minimum promises too much. Here every evaluation uses
# other folds, and says how noisy it is: repetitions of one setting have a standard deviation of
# about 0.014. With `var` told, the surrogate smooths; its prediction at the chosen point is the
# number to quote, and 20 fresh repetitions tell who was right.

# %%


def noisy(params):
    seed = int(1e6 * params["C"] * params["gamma"] * params["epsilon"]) % 100_003
    model = make_pipeline(StandardScaler(), SVR(**params))
    cv = KFold(3, shuffle=True, random_state=seed)
    scores = -cross_val_score(model, X, y, cv=cv, scoring="neg_mean_squared_error")
    return Measurement(float(scores.mean()), var=2e-4)


lab = Study(space, {"loss": "min"}, surrogate="gp", initial=10, rng=3)
lab.optimize(noisy, 30)
told_minimum = lab.best().value
predicted = lab.predict([t.params for t in lab.trials])
chosen = lab.trials[int(predicted["loss"].idxmin())]
promise, doubt = predicted.loc[chosen.number, ["loss", "loss_sd"]]
truth = float(np.mean([loss(chosen.params, folds=3, seed=s) for s in range(1000, 1020)]))
print(f"told minimum {told_minimum:.3f}; predicted {promise:.3f} +- {doubt:.3f}; truth {truth:.3f}")

# %% [markdown]
# ## What can go wrong, three: a surrogate that is too sure
#
# Expected improvement trusts the surrogate's doubts as much as its predictions. So look: each trial
# is predicted by a surrogate that has not seen it, and we count how often its intervals hold what
# was told.

# %%
calibration = lab.calibration(folds=5)
coverage = calibration.coverage(0.8)["loss"]
fig, axes = plots.figure(1, 1, size=(4.6, 3.8))
surrogate_calibration_plot(axes[0, 0], calibration)
calibration.summary().round(3)

# %% [markdown]
# Thirty trials crowd around the optimum after a broad start, which is hard on any model with one
# length scale; read the curve as a warning light, not as a test. Where it stays far below the
# diagonal, try `surrogate="auto"`, which compares surrogates by leave-one-out predictions, or a
# robust outcome transform: `Study(..., outcome="winsorize")`.
#
# ## The decision
#
# We deploy the setting with the best *prediction*, quote the prediction and its doubt, and keep the
# file: whoever has more data tomorrow opens it and goes on.

# %%
decision = {name: float(f"{value:.2g}") for name, value in chosen.params.items()}
gain = default_loss - truth
print(f"deploy {decision}: loss {promise:.3f} +- {doubt:.3f}, {gain:.3f} below the defaults")

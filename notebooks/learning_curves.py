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
# # Learning curves: which training runs are worth their time?
#
# A random search over hyper-parameters spends most of its time on runs that were lost after a few
# epochs. Looking at the curves one sees which; this tutorial lets a network say so, with
# probabilities. `LearningCurvePFN` was trained once, on simulated learning curves. Given the
# first epochs of a real one, a single forward pass returns the Bayesian predictive law of every
# later epoch under the prior that the simulator is. We check whether to believe it, stop runs with
# it, and see where it fails.

# %%
# %matplotlib inline

# %%
import warnings

import numpy as np
import pandas as pd
import torch

import probkit as pk
from probkit import plots
from probkit.datasets import random_mlp_runs
from probkit.models.pfn import (
    CurveNormalizer,
    CurvePrior,
    Curves,
    LearningCurvePFN,
    OutOfPriorWarning,
    RunWatch,
    polish,
)

# %% [markdown]
# ## Data
#
# Real ones, made here: eight networks with random learning rates, widths, batch sizes and label
# noise, trained for 30 epochs on the digits of scikit-learn. A run is iterated epoch by epoch.

# %%
runs = random_mlp_runs(8, epochs=30, rng=0)
history = [[metrics.accuracy for metrics in run] for run in runs]
final = [values[-1] for values in history]
print("final accuracies:", np.round(final, 2))

# %% [markdown]
# ## One curve
#
# The run that improved most, after eight epochs. `CurveNormalizer` tells what the metric is: here
# an accuracy, so that nothing is predicted above one. For an error use `.error()`, for a loss
# `.log_loss(y0)` with the loss before training.

# %%
lc = LearningCurvePFN.load()
accuracy = CurveNormalizer.accuracy()
chosen = int(np.argmax([values[-1] - values[0] for values in history]))
seen = history[chosen][:8]
post = pk.infer(lc, Curves(None, seen, accuracy, horizon=30), rng=0)
ahead = post.predict(torch.arange(9, 31))
median_30 = float(ahead.median[-1])
low_30, high_30 = (float(q) for q in ahead.quantile([0.05, 0.95])[:, -1])
print(f"epoch 30: {median_30:.2f}, 90 % between {low_30:.2f} and {high_30:.2f}")

# %% [markdown]
# The same law answers what a decision needs: the probability of beating a value, and by how much
# it is expected to be beaten.

# %%
to_beat = 0.9
chance = float(ahead.prob_above(to_beat)[-1])
gain = float(ahead.ei(to_beat)[-1])
print(f"P(accuracy at epoch 30 > {to_beat}) = {chance:.2f}; expected improvement {gain:.3f}")

# %%
fig, axes = plots.figure(1, 3, size=(12.0, 3.4))
t = np.arange(1, 31)
y = np.array(history[chosen])
for ax, cut in zip(axes[0], (3, 8, 15), strict=True):
    law = lc.predict(y[:cut], normalizer=accuracy, horizon=30)
    low, q1, middle, q3, high = law.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).numpy()
    plots.band_plot(ax, t[cut:], middle, [(q1, q3), (low, high)], label="median, 50 % and 90 %")
    with plots.style():
        ax.plot(t[:cut], y[:cut], "o", color="k", markersize=4, label="observed")
        ax.plot(t[cut:], y[cut:], ".", color="#8a8a8a", label="what came")
        ax.set(title=f"after {cut} epochs", xlabel="epoch", ylim=(0, 1))
with plots.style():
    axes[0, 0].set(ylabel="validation accuracy")
    axes[0, 0].legend(loc="lower right")
fig

# %% [markdown]
# ## Many curves, of any length, in one call
#
# A list of curves is a batch. Steps that were not measured are simply left out.

# %%
batch = Curves(None, [values[: 3 + k] for k, values in enumerate(history)], accuracy, horizon=30)
medians = lc.predict(batch, torch.tensor([30.0])).median[:, 0]
pd.DataFrame({"epochs seen": batch.lengths, "predicted at 30": medians, "reached": final}).round(2)

# %% [markdown]
# ## Is it right?
#
# On curves drawn from its own prior the network can be checked exactly: where its laws are right,
# the probability that they give to "at most what came" is uniform.

# %%
_, (_, drawn) = CurvePrior().sample_dataset(300, rng=1)
cuts = (10, 40)
pits = {}
for cut in cuts:
    law = lc.law(
        Curves(None, drawn[:, :cut], allow_outside=True),
        torch.arange(cut + 1.0, 101.0, 6).double().expand(300, -1),
    )
    pits[f"{cut} epochs seen"] = law.cdf(drawn[:, cut::6]).numpy()
coverage_90 = [float((np.abs(u - 0.5) < 0.45).mean()) for u in pits.values()]
coverage_50 = [float((np.abs(u - 0.5) < 0.25).mean()) for u in pits.values()]
print("90 % intervals cover", np.round(coverage_90, 2), " 50 % intervals", np.round(coverage_50, 2))

# %%
fig, axes = plots.figure(1, 1, size=(4.6, 4.2))
with plots.style():
    levels = np.linspace(0.02, 0.98, 49)
    for name, u in pits.items():
        covered = [(np.abs(u - 0.5) < level / 2).mean() for level in levels]
        axes[0, 0].plot(levels, covered, label=name)
    axes[0, 0].plot([0, 1], [0, 1], ":", color="k")
    axes[0, 0].set(xlabel="level of the interval", ylabel="share that it covers")
    axes[0, 0].legend()
fig

# %% [markdown]
# Both lines follow the diagonal: an interval of 90 % covers nine values in ten. The model card of
# the weights (`lc.card`) says how this was measured, and what a larger network would gain.
#
# A single curve can be checked, and polished, by sampling its thirteen parameters instead. That
# takes a thousand times longer.

# %%
fine = polish(Curves(None, seen, accuracy, horizon=30), torch.tensor([30.0]), n=300, runs=2, rng=0)
polished_median = float(fine.predictive.median)
print(f"sampled {polished_median:.2f}, network {median_30:.2f}")

# %% [markdown]
# ## Decide
#
# The rule: leave a run when no later epoch has more than a 5 % chance of beating the best accuracy
# known. `RunWatch` keeps the record of one run; `OptunaPruner`, `LightningCallback` and
# `TransformersCallback` do the same inside those libraries:
#
# ```python
# study = optuna.create_study(direction="maximize", pruner=OptunaPruner(horizon=30))
# trainer = lightning.Trainer(callbacks=[LightningCallback("val_acc", accuracy, best=0.93)])
# ```

# %%
best, rows = None, []
for values in history:
    watch = RunWatch(lc, accuracy, horizon=30, best=best)
    used = 0
    for epoch, value in enumerate(values, 1):
        used = epoch
        if best is not None and watch.observe(epoch, value):
            break
    best = max(values[:used]) if best is None else max(best, *values[:used])
    rows.append({"epochs": used, "best seen": max(values[:used]), "if trained on": max(values)})
table = pd.DataFrame(rows)
saved = 1 - table["epochs"].sum() / (30 * len(runs))
regret = table["if trained on"].max() - best
print(f"{saved:.0%} of the epochs saved, regret {regret:.3f}")
table.round(3)

# %% [markdown]
# ## What can go wrong
#
# **A curve that the prior does not know.** Divergence, a restart of the learning rate, a sudden
# insight: nothing like it was ever simulated, and the prediction says so.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lc.predict([*seen, 0.1, 0.1, 0.11, 0.1], normalizer=accuracy)
diverged = [str(w.message) for w in caught if issubclass(w.category, OutOfPriorWarning)]
print(diverged[0])

# %% [markdown]
# **The wrong direction.** An error falls. Without a normaliser, larger counts as better.

# %%
error = 1 - np.array(history[chosen][:12])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lc.predict(error)
direction = str(caught[0].message)
print(direction)
right_way = float(lc.predict(error, normalizer=CurveNormalizer.error()).median[-1])

# %% [markdown]
# **A metric without its bounds.** A loss above one is no share; the error says which bound, and
# what to pass.

# %%
try:
    lc.predict([2.1, 1.7, 1.2, 0.9])
except pk.DataError as problem:
    refusal = str(problem)
print(refusal)
loss_30 = float(
    lc.predict([2.1, 1.7, 1.2, 0.9], normalizer=CurveNormalizer.log_loss(2.3), horizon=30).median[
        -1
    ]
)

# %% [markdown]
# **A horizon beyond 100.** The prior knows 100 steps. Of longer curves keep every k-th point.

# %%
try:
    Curves(None, seen, accuracy, horizon=500)
except pk.DataError as problem:
    too_long = str(problem)
print(too_long)

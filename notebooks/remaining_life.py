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
# # Remaining life: when to stop the machine?
#
# A plant runs machines that wear out through stages nobody sees. Sensors see some of it; an expert
# looks in now and then and says "probably degrading". Stopping a machine early throws life away,
# letting it fail costs much more. From records of machines that ran to failure we learn the
# stages with an autoregressive partially-hidden Markov model (`ARPHMM`), turn them into a law of
# the cycles that are left, check that its intervals cover, and decide when to stop each machine.
#
# The machines are simulated, so that everything can be compared with the truth. The same steps on
# real turbofan engines (C-MAPSS) are in `benchmarks/arphmm/fd001.py`.

# %%
# %matplotlib inline

# %%
import warnings

import numpy as np
import pandas as pd
import torch

import probkit as pk
from probkit import plots
from probkit.inference import EM
from probkit.models import ARPHMM, Sequences, SwitchingPrior
from probkit.models.arphmm import plausibility
from probkit.models.arphmm.rul import (
    ConformalLife,
    HealthIndicator,
    LifeRegression,
    TrailingFeatures,
    coverage_by_band,
    life_scores,
    plan_maintenance,
    simulate_degradation,
)

# %% [markdown]
# ## Data
#
# Six sensors of 90 machines that ran to failure, of 60 more that we hold out, and of 80 that are
# running now.

# %%
machines = simulate_degradation(230, rng=1)
train, held, running = range(90), range(90, 150), range(150, 230)
lengths = np.array([len(life) for life in machines.lives])
print(f"lives from {lengths.min()} to {lengths.max()} cycles, median {np.median(lengths):.0f}")

fig, axes = plots.figure(1, 2, size=(10.0, 3.2))
with plots.style():
    for sensor in (0, 1, 5):
        axes[0, 0].plot(machines.sensors[0][:, sensor] - machines.sensors[0][0, sensor])
    axes[0, 0].set(xlabel="cycle", ylabel="three sensors, from their start")
    axes[0, 1].hist(lengths, bins=25, color=plots.PALETTE[0])
    axes[0, 1].set(xlabel="life, cycles", ylabel="machines")
fig

# %% [markdown]
# ## One number for health
#
# A regression of min(cycles left, 100) / 100 on the standardised sensors gives an indicator that
# falls from about one to zero. A sensor that never changes gets weight zero.

# %%
cap = 100.0
indicator = HealthIndicator.fit([machines.sensors[i] for i in train], cap=cap)
health = {i: indicator(machines.sensors[i]) for i in (*train, *held)}
dead_sensor_weight = float(indicator.weights[-1])
indicator.weights.round(decimals=3)

# %% [markdown]
# ## What the expert knows
#
# One look in ten cycles, one in ten of them wrong. A label becomes a row of *plausibilities*: one
# for the stage that was named, $\nu$ for the others. With $\nu = 0$ the label is certain, with
# $\nu = 1$ it is ignored. Where nobody looked, all stages are plausible.

# %%
generator = torch.Generator().manual_seed(0)


def looks(stage, wrong_share=0.1, every=10):
    """What an expert writes down; -1 where nobody looked."""
    seen = stage.clone()
    wrong = torch.rand(len(seen), generator=generator) < wrong_share
    seen[wrong] = torch.randint(4, (int(wrong.sum()),), generator=generator)
    seen[torch.arange(len(seen)) % every != 0] = -1
    return seen


notes = {i: looks(machines.stages[i]) for i in train}
labels = [plausibility.from_labels(notes[i], 4, nonspecificity=0.1) for i in train]
labels[0][:12:5]

# %% [markdown]
# ## The model
#
# Four stages, each can only go on to the next; in each, health is an autoregression of its own. EM
# finds the posterior mode, plausibilities and all.

# %%
prior = SwitchingPrior(scale=0.01)
model = ARPHMM(states=4, order=1, transition="left_right", prior=prior)
post = pk.infer(model, Sequences([health[i] for i in train], labels), EM(), rng=0)
stay = post.draws["transition"][0, 0].diagonal()
level = post.draws["weights"][0, 0, :, 0, 0] / (1 - post.draws["weights"][0, 0, :, 0, 1])
pd.DataFrame({"stays with probability": stay, "pulls health to": level}).round(3)

# %%
i = held[3]
probs = post.predict(Sequences([health[i]]), site="state").probs
fig, axes = plots.figure(1, 1, size=(9.0, 3.4))
with plots.style():
    bottom = torch.zeros(len(probs), dtype=probs.dtype)
    for stage in range(4):
        axes[0, 0].fill_between(
            range(1, len(probs) + 1),
            bottom,
            bottom + probs[:, stage],
            color=plots.PALETTE[stage],
            alpha=0.35,
            step="mid",
            label=f"stage {stage}",
        )
        bottom = bottom + probs[:, stage]
    axes[0, 0].plot(health[i], color="0.2", linewidth=0.9, label="health")
    axes[0, 0].plot(machines.stages[i] / 3, color="0.5", linestyle=":", label="true stage / 3")
    axes[0, 0].set(xlabel="cycle", ylabel="probability of the stage")
    axes[0, 0].legend(ncols=3, fontsize=8)
fig

# %% [markdown]
# ## What labels are worth
#
# On new machines without any label: the share of cycles whose most probable stage is the true one,
# against $\nu$. The labels are the same in every fit, only their weight changes. Where labels are
# many, trusting the wrong ones too much costs a little; ignored ($\nu = 1$), the stages that EM
# finds by itself are not quite the expert's.

# %%
weights_of_labels = (0.01, 0.05, 0.2, 0.5, 1.0)
short = [i for i in train if i < 30]


def stage_accuracy(nu, every):
    """Share of cycles of held-out machines whose stage is recovered."""
    rng = torch.Generator().manual_seed(7)
    rows = []
    for i in short:
        z = machines.stages[i].clone()
        wrong = torch.rand(len(z), generator=rng) < 0.1
        z[wrong] = torch.randint(4, (int(wrong.sum()),), generator=rng)
        z[torch.arange(len(z)) % every != 0] = -1
        rows.append(plausibility.from_labels(z, 4, nonspecificity=nu))
    data = Sequences([health[i] for i in short], rows)
    fit = pk.infer(model, data, EM(max_iter=150), rng=0)
    path = model.viterbi(fit, Sequences([health[i] for i in held])).path
    right = [
        (path[n, : lengths[i] - 1] == machines.stages[i][1:]).double() for n, i in enumerate(held)
    ]
    return float(torch.cat(right).mean())


with warnings.catch_warnings():
    warnings.simplefilter("ignore", pk.ConvergenceWarning)
    accuracy = {every: [stage_accuracy(nu, every) for nu in weights_of_labels] for every in (2, 10)}
fig, axes = plots.figure(1, 1, size=(6.0, 3.4))
with plots.style():
    for (every, values), colour in zip(accuracy.items(), plots.PALETTE, strict=False):
        name = f"one look in {every} cycles"
        axes[0, 0].plot(weights_of_labels, values, "o-", color=colour, label=name)
    axes[0, 0].set(xscale="log", xlabel="nonspecificity of a label", ylabel="stages recovered")
    axes[0, 0].legend()
labelled_accuracy, unlabelled_accuracy = max(accuracy[2]), accuracy[2][-1]
fig

# %% [markdown]
# ## How long will it last?
#
# In each stage, a regression of the cycles left on trailing means of health; the law of the stage
# comes from the filter, which has seen the past only. Together they are a mixture, one law for
# each machine. Lives beyond 100 cycles count as 100: long before failure nothing tells them apart.

# %%
regression = LifeRegression.fit(
    post,
    Sequences([health[i] for i in train]),
    [machines.lives[i] for i in train],
    features=TrailingFeatures((1, 5, 15, 40), age=False),
    cap=cap,
)


def stopped(units):
    """Each machine at one random cycle of its life: what was seen, and what was left."""
    seen, left = [], []
    for i in units:
        t = int(torch.randint(10, lengths[i] - 1, (1,), generator=generator))
        seen.append(indicator(machines.sensors[i][: t + 1]))
        left.append(machines.lives[i][t].clamp_max(cap))
    return Sequences(seen), torch.stack(left)


now, truth = stopped(running)
predicted = regression.predict(now)
mean_life = torch.cat([machines.lives[i] for i in train]).clamp_max(cap).mean()
rmse = life_scores(predicted.mean, truth)["rmse"]
rmse_of_the_mean = life_scores(mean_life.expand(len(truth)), truth)["rmse"]
pd.DataFrame(
    {
        "model": life_scores(predicted.mean, truth),
        "training mean": life_scores(mean_life.expand(len(truth)), truth),
    }
).round(1)

# %% [markdown]
# ## Do the intervals cover?
#
# The 60 held-out machines, each stopped at a random cycle, say how honest the laws are: their
# probability integral transforms become the steps of a recalibrated law (conformal prediction).
# Nothing about the running machines is used.

# %%
calibration, known = stopped(held)
conformal = ConformalLife.fit(regression.predict(calibration), known)
life = conformal(predicted)
edges = (0, 25, 50, 75, float("inf"))
table = coverage_by_band(life, truth, edges=edges)
coverage = float(table.loc["all", "covered"])
table.round(2)

# %% [markdown]
# Coverage is a promise about all machines together. In a band of the true life it can differ, and
# the table says by how much: nobody knows the band of a running machine.

# %%
order = torch.argsort(truth)
low, middle, high = life.quantile([0.05, 0.5, 0.95])
fig, axes = plots.figure(1, 1, size=(9.0, 3.4))
with plots.style():
    steps = range(len(truth))
    axes[0, 0].fill_between(steps, low[order], high[order], color=plots.PALETTE[0], alpha=0.25)
    axes[0, 0].plot(steps, middle[order], color=plots.PALETTE[0], label="median and 90 %")
    axes[0, 0].plot(steps, truth[order], ".", color="0.2", label="truth")
    axes[0, 0].set(xlabel="machine, by what it has left", ylabel="cycles left")
    axes[0, 0].legend()
fig

# %% [markdown]
# ## The decision
#
# An unused cycle costs 1, a failure 100 and another 5 for each cycle of standstill. The plan
# minimises the expected cost of each machine. Beside it, two rules that need no model: stop all at
# the same cycle (the best one in hindsight), and run all to failure.

# %%
costs = {"cost_early": 1.0, "cost_late": 5.0, "cost_failure": 100.0}
plan = plan_maintenance(life, **costs)


def paid(time):
    """Average cost of stopping machines at ``time``, given what they had left."""
    late = costs["cost_late"] * (time - truth).clamp_min(0) + 100.0 * (truth < time)
    return float((costs["cost_early"] * (truth - time).clamp_min(0) + late).mean())


cost_of_plan = paid(plan.time)
same = {float(t): paid(torch.full_like(truth, t)) for t in np.arange(0.0, 101.0, 5.0)}
cost_of_best_constant = min(same.values())
pd.Series(
    {
        "plan": cost_of_plan,
        "all at the best constant time": cost_of_best_constant,
        "all to failure": paid(truth + 1),
    },
    name="cost per machine",
).round(1)

# %% [markdown]
# ## What can go wrong
#
# **Labels that contradict the model.** A machine cannot heal: a certain label "stage 0" after a
# certain label "stage 3" has no path. The error names the place.

# %%
z = torch.full((50,), -1)
z[10], z[30] = 3, 0
try:
    certain = plausibility.from_labels(z, 4)
    pk.infer(model, Sequences([health[0][:50]], [certain]), EM(), rng=0)
except pk.DataError as error:
    contradiction = str(error)
contradiction

# %% [markdown]
# A little nonspecificity is enough to let the data overrule one of the two.

# %%
doubtful = plausibility.from_labels(z, 4, nonspecificity=0.05)
model.smooth(post, Sequences([health[0][:50]], [doubtful])).smoothed[0, [8, 28]].round(decimals=2)

# %% [markdown]
# **More stages than the data can carry.** Stages that explain next to nothing are reported.

# %%
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pk.infer(ARPHMM(6, 1, prior=prior), Sequences([health[0][:12]]), EM(), rng=0)
caution = str(caught[-1].message)
caution

# %% [markdown]
# **A stream.** On the machine itself nobody wants to refit: `filter_step` takes one value at a
# time, with constant memory.

# %%
i = running[0]
stream = indicator(machines.sensors[i])
state = model.filter_start(
    {name: value[0, 0] for name, value in post.draws.items()}, history=stream[:1]
)
for value in stream[1:]:
    state = model.filter_step(state, value)
last_stage = int(state.probs.argmax())
state.probs

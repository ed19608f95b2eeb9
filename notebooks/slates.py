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
# # Slates: what to show next?
#
# A market place shows each visitor a handful of items and sees at most one click. Two things are
# easily lost in the log: *what else was shown* when something was clicked, and that *nothing* was
# clicked. `SlateGRU` models the choice among what was shown, keeps a distribution over every item
# and user, and so knows what it does not know. This page goes from such a log to a decision, and
# then asks what that decision would be worth before anyone sees it.

# %%
# %matplotlib inline

# %%
import pandas as pd
import torch

import probkit as pk
from probkit import plots
from probkit.inference import SVI
from probkit.models.slates import (
    Greedy,
    InSlateThompson,
    Popularity,
    Random,
    SlateGRU,
    SlateLog,
    SlateMeanField,
    SlatePrior,
    Thompson,
    click_log_probs,
    click_probs,
    draw_market_place,
    recommend,
    slate_propensities,
)
from probkit.models.slates.metrics import click_calibration, distinct_groups
from probkit.models.slates.off_policy import cascade_ips, importance_weights, slate_ips

# %% [markdown]
# ## The log
#
# Real logs come as tables with one row for each item shown; `SlateLog.from_frame` (or the path of
# a Parquet file) reads them. Here a simulated market place writes one, so that the truth is known:
# 150 items in 15 groups, 120 users whose taste moves a little towards what they click.

# %%
place = draw_market_place(users=120, items=150, groups=15, rng=0)
simulated = place.log(16, 5, rng=0)
rows = [
    {
        "user": u,
        "time": t,
        "item": f"item {int(item):03d}",
        "click": int(item) == int(simulated.click[u, t]),
        "rank": k,
    }
    for u in range(120)
    for t in range(16)
    for k, item in enumerate(simulated.slate[u, t, 1:])
]
table = pd.DataFrame(rows)
table.head(6)

# %%
groups = {f"item {i:03d}": int(place.groups[i]) for i in range(3, place.n_items)}
log = SlateLog.from_frame(table, position="rank", groups=groups)
assert torch.equal(log.click, simulated.click)  # Labels are sorted, so that ids are the same.
log = log.hold_out(valid=0.0, test=0.2, keep=5)
held = (log.part == 2).nonzero()[:, 0]
print(log, "-", len(held), "users are held out from step 5 on")

# %% [markdown]
# ## The fit
#
# Items have a prior mean for their group, so that an item nobody has seen yet borrows from its
# neighbours. The priors are in units of the plane that items and users live in. The likelihood
# counts every click once: its *temperature* is 1. (The published implementation divides it by about
# 0.01, which counts each click a hundred times and makes the posterior far too narrow.)

# %%
prior = SlatePrior(
    group_mean=3.0, log_group_scale=(-1.0, 1.0), user=2.5, no_click=3.0, logit_gamma=(0.0, 2.0)
)
model = SlateGRU(
    log.n_items, groups=log.groups, transition="linear", dim=2, prior=prior, length_bias=False
)
sampler = SVI(steps=300, lr=0.05, decay=0.3, particles=1, evidence_draws=10)
post = pk.infer(model, log, sampler, guide=SlateMeanField(users="table"), rng=0)

test = log.mask("test")
averaged = -float(click_log_probs(post, log, draws=60, rng=0)[test].mean())
plugged = -float(click_log_probs(post, log, draws=None)[test].mean())
guess = float(log.slate_lengths[test].double().log().mean())
pd.Series(
    {"averaged over the posterior": averaged, "plugged in": plugged, "guessing": guess},
    name="nats a choice, held-out",
).round(3)

# %% [markdown]
# Averaging over the posterior predicts better than its mean plugged in, which is too sure of
# itself. Where it is unsure is where little was shown (compared within groups: how far the items of
# a group are apart, and so how little a group tells of them, differs too):

# %%
sd = post.marginals["items"].stddev[3:].mean(1)
shown = log.exposure()[3:]
member = torch.nn.functional.one_hot(log.groups[3:]).float()
pair = torch.stack([sd.log(), (1.0 + shown).log()], 1)
within = pair - member @ (member.T @ pair / member.sum(0)[:, None].clamp_min(1))
narrower = float(torch.corrcoef(within.T)[0, 1])
chosen, probs = [], []
for step in range(5, 16, 2):
    probs.append(
        click_probs(
            post, log[held].before(step), log.slate[held, step], users=held, draws=60, rng=0
        )
    )
    chosen.append(log.click_idx[held, step])
calibration = click_calibration(torch.cat(probs), torch.cat(chosen), bins=6, rng=0)
fig, axes = plots.figure(1, 2, size=(10.5, 3.4))
with plots.style():
    axes[0, 0].plot(shown, sd, ".", color=plots.PALETTE[0])
    axes[0, 0].set(xlabel="times shown", ylabel="posterior sd of the item", xscale="log")
    axes[0, 1].vlines(calibration.predicted, calibration.low, calibration.high, color="0.5")
    axes[0, 1].plot(calibration.predicted, calibration.happened, "o", color=plots.PALETTE[1])
    axes[0, 1].plot([0, 0.8], [0, 0.8], color="0.7", linewidth=0.8)
    axes[0, 1].set(xlabel="predicted probability", ylabel="share chosen, 95 % interval")
fig

# %% [markdown]
# ## The decision
#
# `recommend` turns the posterior into slates. *Greedy* takes the best items at the posterior mean,
# *Thompson sampling* those of one draw of the posterior for each user, *in-slate Thompson sampling*
# one draw for every slot, so that a slate covers what is still uncertain. The simulator knows how
# often each slate would be clicked.

# %%
step = 12
history, state = log[held].before(step), place.states(log.click)[held, step]
policies = {
    "greedy": Greedy(),
    "Thompson": Thompson(),
    "in-slate Thompson": InSlateThompson(),
    "popularity": Popularity(),
    "random": Random(),
}
slates = {
    name: recommend(post, history, 5, policy, users=held, rng=1)
    for name, policy in policies.items()
}
rates = {n: float(place.click_probability(state, s.ids).mean()) for n, s in slates.items()}
variety = {n: float(distinct_groups(s.ids, log.groups).double().mean()) for n, s in slates.items()}
best_rate = float(place.click_probability(state, place.best(state, 5)).mean())
greedy_rate, random_rate = rates["greedy"], rates["random"]
inslate_groups, greedy_groups = variety["in-slate Thompson"], variety["greedy"]
print(f"best possible: {best_rate:.3f}")
pd.DataFrame({"expected click rate": rates, "groups in a slate": variety}).round(3)

# %% [markdown]
# One decision rewards greed: it has nothing to learn from. Exploration is an investment that pays
# when clicks come back as data; `closed_loop` measures that, and the benchmark page holds its
# figures. Whatever is shown, *log the propensities*: `recommend` returns the probability of each
# slot's item given the slots above it.
#
# ## Before anyone sees it: off-policy evaluation
#
# Suppose the site runs in-slate Thompson sampling, and somebody proposes to draw from a posterior
# of a third of the spread. Its value can be estimated from the running policy's log, here of 24
# users at six steps. Cascade weights multiply the slots down to the one that was clicked, the
# others those of the whole slate.

# %%
bolder = InSlateThompson(temperature=0.1)
generator = torch.Generator().manual_seed(2)
rewards, weights, target_rate = [], [], 0.0
for t in range(5, 16, 2):
    past, now = log[held].before(t), place.states(log.click)[held, t]
    running = recommend(post, past, 5, InSlateThompson(), users=held, rng=t)
    answers = place.respond(now, running.ids, rng=generator)
    rewards.append(torch.nn.functional.one_hot(answers, 6)[:, 1:].double())
    target = slate_propensities(post, past, running.ids, bolder, users=held, draws=300, rng=3)
    weights.append(importance_weights(target, running.propensity))
    proposed = recommend(post, past, 5, bolder, users=held, propensity_draws=0, rng=4).ids
    target_rate += float(place.click_probability(now, proposed).mean()) / 6
reward, weight = torch.cat(rewards), torch.cat(weights)
estimates = {
    "whole slate (SIPS)": slate_ips(reward, weight.prod(1)),
    "cascade (RIPS)": cascade_ips(reward, weight),
    "cascade, self-normalised": cascade_ips(reward, weight, self_normalised=True),
}
effective = estimates["whole slate (SIPS)"].ess
print(f"clicked by the running policy's users: {float(reward.sum(1).mean()):.3f}")
print(f"what the proposal would get: {target_rate:.3f}")
pd.DataFrame(
    {name: [e.value, e.low, e.high, e.ess, e.rows] for name, e in estimates.items()},
    index=["value", "low", "high", "effective rows", "rows"],
).round(3)

# %% [markdown]
# Look at the effective rows before the value: of 144 slates a few carry the weight, because two
# sampling policies seldom agree on five slots, and the intervals are as wide as that makes them.
# **What can go wrong**, then:
#
# * *Too few effective rows.* An estimate without its effective sample size is worth nothing. The
#   weights of the first slot alone, or of a policy closer to the one that ran, lose less.
# * *Propensities that were not logged*, or of another policy than the one that ran, cannot be
#   repaired later.
# * *Tempering.* A cold posterior looks sharp and explores nothing.
# * *Leaking the answer.* Users' first states learn from training clicks alone; a history that
#   contains the step to be predicted makes every policy look good. `log.before(step)` cuts it.
# * *Unknown users.* A guide with a table of users has no row for a new one:

# %%
try:
    recommend(post, [[7, 9], []], size=5, rng=0)
    refused = False
except ValueError as error:
    refused = True
    print(error)

# %%
amortised = pk.infer(
    model, log, SVI(steps=100, lr=0.05, decay=0.3, particles=1, evidence_draws=5), rng=1
)
recommend(amortised, [[7, 9], []], size=5, exclude="clicked", rng=0).ids

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
# # Guided generation: which part is this label?
#
# A warehouse returns thousands of parts a week. Each carries a part number, two letters and four
# digits, and many labels are smudged, so that the scanner is unsure of most characters. A wrong
# guess sends a wrong part (40 euros); asking a person costs 5. Which number does a label bear, and
# how sure may one be?
#
# The scanner alone cannot say. A *language model* of part numbers knows which numbers are usual,
# and the last digit is a check digit. This tutorial puts the three together: the language model
# writes, the scan and the check digit weigh, and particles give the posterior over part numbers.
# The model here is a Markov chain, so that everything can be compared with exact sums. With a large
# model only one line changes.

# %%
# %matplotlib inline

# %%
import math

import pandas as pd
import torch

import probkit as pk
from probkit import plots
from probkit.calibration import wilson
from probkit.inference import BeamSearch, BestOfN, ParticleFilter, SelfConsistency
from probkit.inference.smc import evidence
from probkit.models.language import Budget, GuidedGeneration, Law, MarkovLM, Steps
from probkit.models.language.answers import (
    answer_posterior,
    calibrate_confidence,
    expected_calibration_error,
)
from probkit.models.language.potentials import VerifierPotential

# %% [markdown]
# ## Data: a catalogue, and how the scanner errs
#
# The data are simulated. A hidden law of numbers, with favourite letters and digits, makes the
# catalogue of 3,000 parts that we may look at, and later the labels. The last digit makes the sum
# of all digits a multiple of ten, with A to E counting as 1 to 5.

# %%
LETTERS, DIGITS = "ABCDE", "0123456789"
SYMBOLS = LETTERS + DIGITS
WORTH = torch.tensor([1, 2, 3, 4, 5, *range(10)])
is_letter = torch.arange(15) < 5


def hidden_tables(rng):
    """Laws of the next symbol given two: letters after at most one letter, digits after two."""
    draw = torch.distributions.Gamma(torch.tensor(0.2).double(), torch.tensor(1.0).double())
    with pk.scope(rng=rng):
        first, second, third = draw.sample((15,)), draw.sample((15, 15)), draw.sample((15, 15, 15))
    tables = [first * is_letter, second * is_letter, third * ~is_letter]
    return [table / table.sum(-1, keepdim=True) for table in tables]


def draw_parts(tables, n, rng):
    """Part numbers [part, 6] as symbols; the last one is the check digit."""
    first, second, third = tables
    x = [torch.multinomial(first, n, replacement=True, generator=rng)]
    x.append(torch.multinomial(second[x[0]], 1, generator=rng)[:, 0])
    for _ in range(3):
        x.append(torch.multinomial(third[x[-2], x[-1]], 1, generator=rng)[:, 0])
    check = (-WORTH[torch.stack(x)].sum(0)) % 10
    return torch.stack([*x, check + 5], 1)


rng = torch.Generator().manual_seed(7)
tables = hidden_tables(rng)
catalogue = draw_parts(tables, 3000, rng)
print(["".join(SYMBOLS[k] for k in row) for row in catalogue[:6].tolist()])

# %% [markdown]
# The scanner reads a character right in 65 % of cases, takes it for a similar one in 25 %, and for
# anything in the rest. The maker publishes that table, and so it is known.

# %%
SIMILAR = {"8": "B30", "B": "8E", "0": "D8", "D": "0", "1": "7", "7": "1", "5": "6", "6": "58",
           "3": "8", "E": "B", "A": "4", "4": "A", "2": "7", "9": "4", "C": "0"}  # fmt: skip
reads = torch.full((15, 15), 0.10 / 15, dtype=torch.float64)  # [true, read]
for k, symbol in enumerate(SYMBOLS):
    reads[k, k] += 0.65
    for other in SIMILAR[symbol]:
        reads[k, SYMBOLS.index(other)] += 0.25 / len(SIMILAR[symbol])


def scan(parts, rng):
    return torch.multinomial(reads[parts.flatten()], 1, generator=rng).view_as(parts)


labels = draw_parts(tables, 100, rng)
scans = scan(labels, rng)
read_right = float((labels == scans).all(1).double().mean())
print(f"labels read without an error: {read_right:.0%}")
labels, scans = labels[:70], scans[:70]  # as many as this page has time for

# %% [markdown]
# ## The language model: counts
#
# A chain of order two, learned from the first five characters of the catalogue: each symbol given
# the two before it, a little smoothed. It has never heard of check digits.


# %%
def learn(parts):
    first = torch.bincount(parts[:, 0], minlength=15) + 0.1 * is_letter
    second = torch.zeros(15, 15).double() + 0.1 * is_letter
    third = torch.zeros(15, 15, 15).double() + 0.1 * ~is_letter
    for row in parts.tolist():
        second[row[0], row[1]] += 1
        for a, b, c in zip(row[:3], row[1:4], row[2:5], strict=True):
            third[a, b, c] += 1
    first = first.double()
    return [table / table.sum(-1, keepdim=True) for table in (first, second, third)]


first, second, third = learn(catalogue)
lm = MarkovLM([first, second], third, symbols=list(SYMBOLS))
steps = Steps(stop=(), max_tokens=1, max_steps=6)

# %% [markdown]
# ## The potential: scan and check digit
#
# A particle is a number so far. Each step adds one character, and its potential is the probability
# that the scanner reads that character as it did: a *per-step* potential, since it rates the last
# step only. The sixth character must also pass the check.


# %%
def passes(number):
    return int(WORTH[[SYMBOLS.index(c) for c in number]].sum()) % 10 == 0


def scanned(row):
    """The potential of one scan, as a log score of the last character."""
    log_reads = reads[:, row].log().tolist()  # [true][position]

    def rate(number):
        if len(number) == 6 and not passes(number):
            return -math.inf
        return log_reads[SYMBOLS.index(number[-1])][len(number) - 1]

    return VerifierPotential(rate, kind="per_step", scale="log")


def reading(row, **options):
    return GuidedGeneration(lm, scanned(row), steps=steps, **options)


# %% [markdown]
# ## The exact answer
#
# There are 250,000 possible numbers, few enough to sum over all of them. So we know what the
# particles should find; with texts of a large model nobody does.


# %%
def exact(row):
    """Log evidence and posterior [a, b, c, d, e, f] over all numbers, by brute force."""
    seen = reads[:, row].T  # [position, true]
    joint = torch.einsum(
        "a,ab,abc,bcd,cde,def,a,b,c,d,e,f->abcdef",
        first[:5], second[:5, :5], third[:5, :5, 5:], third[:5, 5:, 5:],
        third[5:, 5:, 5:], third[5:, 5:, 5:],
        seen[0, :5], seen[1, :5], *(seen[k, 5:] for k in range(2, 6)),
    )  # fmt: skip
    letters, digits = WORTH[:5], WORTH[5:]
    total = letters.view(5, 1, 1, 1, 1, 1) + letters.view(5, 1, 1, 1, 1)
    for k in range(4):
        total = total + digits.view(10, *[1] * (3 - k))
    joint = joint * (total % 10 == 0)
    return float(joint.sum().log()), joint / joint.sum()


def spelled(flat, shape=(5, 5, 10, 10, 10, 10)):
    place = torch.unravel_index(torch.tensor(flat), shape)
    return "".join((LETTERS if k < 2 else DIGITS)[int(p)] for k, p in enumerate(place))


exact_laws = [exact(row) for row in scans]

# %% [markdown]
# ## One label
#
# We take one on which the exact posterior is undecided. Four groups of 1,000 particles;
# `answer_posterior` adds up the weights of equal numbers; the spread
# of the groups gives standard errors.

# %%
chosen = min(range(70), key=lambda k: abs(float(exact_laws[k][1].max()) - 0.6))
post = pk.infer(reading(scans[chosen]), "part number: ", ParticleFilter(1000), rng=0, chains=4)
answers = answer_posterior(post, str)
print("scanned as", "".join(SYMBOLS[k] for k in scans[chosen].tolist()))
answers.table().head(6)

log_z, law = exact_laws[chosen]
found = evidence(post)
log_z_gap = found.log_mean - log_z
top = law.flatten().topk(8)
wanted = {spelled(i): float(p) for p, i in zip(top.values, top.indices.tolist(), strict=True)}
largest_gap = max(abs(answers.prob(number) - p) for number, p in wanted.items())
print(f"log evidence {found.log_mean:.2f} ± {found.relative_error:.2f}, exactly {log_z:.2f}")

# %%
fig, axes = plots.figure(1, 2, size=(11, 3.3))
with plots.style():
    left, right = axes[0]
    names = list(wanted)
    left.bar(names, [answers.prob(n) for n in names], color=plots.PALETTE[0], alpha=0.75)
    left.plot(names, list(wanted.values()), "k_", markersize=16, label="exact")
    left.set(ylabel="probability", title="Posterior of the part number")
    left.tick_params(axis="x", rotation=30)
    left.legend()
    right.plot(range(1, 7), post.sample_stats["ess"].mean(0) / 1000)
    right.set(xlabel="character", ylabel="effective share", ylim=(0, 1), title="Health of the run")
fig

# %% [markdown]
# The effective share collapses at the last character: nine numbers of ten fail the check.
#
# ## A better proposal: let the check digit choose the last character
#
# Particles die at the last character because the language model knows no check digits. A *masked
# proposal* lets it draw only characters that pass; the weights are corrected by p / q, so that
# the target stays the same and the evidence stays unbiased. It is only less noisy.


# %%
def mask(prefix):
    """Which symbols may follow: [token], the end of the sequence last."""
    if len(prefix.text) < 5:
        return torch.ones(16, dtype=torch.bool)
    return torch.tensor([*(passes(prefix.text + symbol) for symbol in SYMBOLS), False])


spread = {}
for name, proposal in (("plain", None), ("masked", Law(allowed=mask))):
    groups = pk.infer(
        reading(scans[chosen], proposal=proposal), "part number: ", ParticleFilter(64), rng=5,
        chains=20,
    )  # fmt: skip
    share = float(groups.sample_stats["ess"][:, -1].mean()) / 64
    spread[name] = evidence(groups)._asdict() | {
        "exact": log_z,
        "effective share at the end": share,
    }
masked_error = spread["masked"]["relative_error"]
plain_error = spread["plain"]["relative_error"]
shares = [spread[name]["effective share at the end"] for name in spread]
columns = ["log_mean", "relative_error", "exact", "effective share at the end"]
pd.DataFrame(spread).T[columns].astype(float).round(3)

# %% [markdown]
# ## All labels: particles against the usual ways, at the same number of tokens
#
# All of them use the masked proposal, so that no number is wasted on the check digit.
#
# - *self-consistency* draws 128 numbers and takes the most frequent: it never looks at the scan;
# - *best of 128* draws 128 numbers and keeps the one that the scan likes best;
# - *beam search* keeps the best 16 of 128 at each character;
# - the *particle filter* weighs, and answers with the most probable number.


# %%
def winners(sampler):
    """The answer posterior of every label."""
    models = [reading(row, proposal=Law(allowed=mask)) for row in scans]
    return [
        answer_posterior(pk.infer(model, "part number: ", sampler, rng=k), str)
        for k, model in enumerate(models)
    ]


def share_right(results):
    truth = ["".join(SYMBOLS[k] for k in row) for row in labels.tolist()]
    return [result.mode == number for result, number in zip(results, truth, strict=True)]


methods = {
    "self-consistency, 128": SelfConsistency(128),
    "best of 128": BestOfN(128),
    "beam search, 128": BeamSearch(128, 8),
    "particle filter, 128": ParticleFilter(128),
    "particle filter, 400": ParticleFilter(400),
}
results = {name: winners(sampler) for name, sampler in methods.items()}

# %%
rows = {}
for name, each in results.items():
    right = share_right(each)
    low, high = wilson(sum(right), len(right))
    rows[name] = {"right": sum(right) / len(right), "low": low, "high": high}
best_possible = sum(
    spelled(int(law.argmax())) == "".join(SYMBOLS[k] for k in label)
    for (_, law), label in zip(exact_laws, labels.tolist(), strict=True)
) / len(labels)
rows["exact posterior"] = {"right": best_possible, "low": None, "high": None}
filter_right = rows["particle filter, 128"]["right"]
best_of_n_right = rows["best of 128"]["right"]
voting_right = rows["self-consistency, 128"]["right"]
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# ## The decision
#
# Send the part where the answer's probability is high enough, else ask. With 40 euros for a wrong
# part and 5 for a question, asking is better below a probability of 1 - 5/40 = 87.5 %, *if* the
# probabilities mean what they say. Are they? The expected calibration error compares them with how
# often the answers were right.

# %%
WRONG, ASK = 40.0, 5.0


def cost(confidences, right, threshold):
    send = torch.as_tensor(confidences) >= threshold
    return float(torch.where(send, WRONG * ~torch.as_tensor(right), ASK).mean())


table = {}
for name in ("best of 128", "particle filter, 128", "particle filter, 400"):
    confidence = [answer.confidence for answer in results[name]]
    right = share_right(results[name])
    table[name] = {
        "calibration error": expected_calibration_error(confidence, right),
        "euros a label": cost(confidence, right, 1 - ASK / WRONG),
    }
sure = [float(law.max()) for _, law in exact_laws]
known = [
    spelled(int(law.argmax())) == "".join(SYMBOLS[k] for k in label)
    for (_, law), label in zip(exact_laws, labels.tolist(), strict=True)
]
table["exact posterior"] = {
    "calibration error": expected_calibration_error(sure, known),
    "euros a label": cost(sure, known, 1 - ASK / WRONG),
}
table["always send (particle filter)"] = {"euros a label": cost(confidence, right, 0.0)}
table["always ask"] = {"euros a label": ASK}
filter_cost = table["particle filter, 400"]["euros a label"]
filter_error = table["particle filter, 400"]["calibration error"]
exact_cost = table["exact posterior"]["euros a label"]
best_of_n_cost = table["best of 128"]["euros a label"]
pd.DataFrame(table).T.round(3)

# %% [markdown]
# Best-of-N puts all its weight on one answer: it is always sure, and often wrong. The filter's
# confidence means something, but a few particles carry the posterior of a hard label, and they are
# surer than the exact posterior is. More particles mend that; so does a map from stated to
# calibrated confidence, learned on labels with known answers. Half of ours teach it, the other half
# tests it.

# %%
confidence = [answer.confidence for answer in results["particle filter, 128"]]
right = share_right(results["particle filter, 128"])
half = len(confidence) // 2
calibration = calibrate_confidence(confidence[:half], right[:half], method="platt")
mended = calibration(confidence[half:])
mended_error = expected_calibration_error(mended, right[half:])
raw_error = expected_calibration_error(confidence[half:], right[half:])
raw_cost = cost(confidence[half:], right[half:], 1 - ASK / WRONG)
mended_cost = cost(mended, right[half:], 1 - ASK / WRONG)
print(f"new labels, as it is: error {raw_error:.3f}, {raw_cost:.2f} euros a label; ", end="")
print(f"calibrated: {mended_error:.3f}, {mended_cost:.2f} euros")

# %% [markdown]
# ## What can go wrong
#
# **A value given as a per-step potential.** Suppose the function returns the score of the *whole*
# number so far, as reward models do, but is declared `per_step`. Then the first character is
# counted six times, the second five times. Declared as a `value`, it is counted once, whichever
# step one looks at: the two kinds are never mixed.


# %%
def whole(row, kind):
    log_reads = reads[:, row].log()

    def rate(number):
        if len(number) == 6 and not passes(number):
            return -math.inf
        return float(sum(log_reads[SYMBOLS.index(c), t] for t, c in enumerate(number)))

    potential = VerifierPotential(rate, kind=kind, scale="log")
    return GuidedGeneration(lm, potential, steps=steps, proposal=Law(allowed=mask))


mode = max(wanted, key=wanted.get)
kinds = {"exact": {"probability of " + mode: wanted[mode], "log evidence": log_z}}
for kind in ("value", "per_step"):
    run = pk.infer(
        whole(scans[chosen], kind), "part number: ", ParticleFilter(500), rng=1, chains=8
    )
    kinds[f"whole score as {kind}"] = {
        "probability of " + mode: answer_posterior(run, str).prob(mode),
        "log evidence": evidence(run).log_mean,
    }
as_value = kinds["whole score as value"]["log evidence"] - log_z
as_steps = kinds["whole score as per_step"]["log evidence"] - log_z
pd.DataFrame(kinds).T.round(3)

# %% [markdown]
# **An uncorrected temperature.** `law=Law(temperature=0.5)` makes *another language model*, with
# its own posterior; the run records which. As a `proposal` the same temperature is corrected, and
# the posterior is the one of the model.

# %%
cold = Law(temperature=0.5)
masked_cold = Law(temperature=0.5, allowed=mask)
gaps = {}
for name, law_of_model in (("law", cold), ("proposal", Law())):
    model = reading(scans[chosen], law=law_of_model, proposal=masked_cold)
    run = pk.infer(model, "part number: ", ParticleFilter(250), rng=2, chains=8)
    gaps[name] = (evidence(run).log_mean - log_z, run.attrs["law"])
uncorrected_gap, corrected_gap = gaps["law"][0], gaps["proposal"][0]
for name, (gap, recorded) in gaps.items():
    print(f"as {name}: log evidence {gap:+.2f} from the exact one; recorded as {recorded!r}")

# %% [markdown]
# **Premature collapse.** With four particles one lucky start takes over: all survivors share one
# ancestor, and the run looks sure of whatever that ancestor was. Watch `unique_ancestors` and the
# spread between groups, not the confidence of one run.

# %%
small = pk.infer(reading(scans[chosen]), "part number: ", ParticleFilter(4), rng=3, chains=40)
large = pk.infer(reading(scans[chosen]), "part number: ", ParticleFilter(250), rng=3, chains=10)
collapse = {}
for name, run in (("4 particles", small), ("250 particles", large)):
    weights = run.log_weights.exp()
    alone = [
        max(pd.Series(w.tolist()).groupby([p.text for p in chain]).sum())
        for w, chain in zip(weights, run.particles.particles, strict=True)
    ]
    died = (run.sample_stats["extinct_at"] >= 0).double().mean()
    collapse[name] = {
        "ancestors of the first character": float(
            run.sample_stats["unique_ancestors"][:, 0].double().mean()
        ),
        "mean confidence of a group": sum(alone) / len(alone),
        "groups that died out": float(died),
        "spread of log evidence": float(
            run.log_evidence.value[run.log_evidence.value > -math.inf].std()
        ),
    }
pd.DataFrame(collapse).T.round(2)

# %% [markdown]
# **A budget.** Limits stop a run before the step that would begin beyond them; what is there is
# returned, validly weighted, and marked.

# %%
limited = reading(scans[chosen], budget=Budget(completion_tokens=300))
short = pk.infer(limited, "part number: ", ParticleFilter(100), rng=0)
stopped = short.attrs["stopped"][0]
spent = short.attrs["usage"][0]["completion_tokens"]
print(stopped, "| longest number:", max(len(p.text) for p in short.particles.particles[0]))

# %% [markdown]
# ## With a large model
#
# Everything above works with any back end. SmolLM2 (135 million parameters, `probkit fetch
# smollm2`) runs in this process, and any OpenAI-compatible server over HTTP:
#
# ```python
# from probkit.models.language import OpenAILM, load_smollm2
#
# lm = load_smollm2()                       # or OpenAILM("http://localhost:8000/v1", "my-model")
# model = GuidedGeneration(lm, potential, steps=Steps(stop="\n", max_tokens=40, max_steps=12))
# post = pk.infer(model, [{"role": "user", "content": question}], ParticleFilter(16), rng=0)
# answer_posterior(post, last_number)
# ```

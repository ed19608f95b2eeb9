"""Demo view: text under a constraint, by independent draws and by particles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view

if TYPE_CHECKING:
    from torch import Tensor

    from probkit.models.language import GuidedGeneration, MarkovLM

__all__: list[str] = []

_LENGTH, _PARTICLES = 24, 16
_BANNED = "ea"
_ALPHABET = " abcdefghijklmnopqrstuvwxyz"

#: What the letters are learned from.
_TALE = """
on monday a small boat left the harbour with a load of salt and wool. the wind was low, and the
captain, an old man of few words, let his dog stand at the bow and bark at the gulls. by noon the
fog had lifted and a grey island rose out of the water, its cliffs as white as chalk. nobody had
drawn it on a map. they sailed around it, found a sandy bay, and put a plank across to the shore.
a path of flat stones ran up to a hut with a green door and a garden of beans, and from its
chimney came a thin line of smoke. the captain knocked. a woman with a lamp in her hand looked at
him, then at the dog, and laughed. you are late, she said, the soup is cold, but sit down and tell
us how the world is doing. so they sat, and talked, and when the tide turned at midnight the boat
was still in the bay, and the salt and the wool were none of anybody's worries for a month.
"""


def _letters() -> MarkovLM:
    """A chain of order two over letters, learned from the tale."""
    import torch

    from probkit.models.language import MarkovLM

    text = "".join(c for c in " ".join(_TALE.split()) if c in _ALPHABET)
    index = [_ALPHABET.index(c) for c in text]
    size = len(_ALPHABET)
    pairs = torch.full((size, size), 1e-3, dtype=torch.float64)
    triples = torch.zeros(size, size, size, dtype=torch.float64)
    for a, b in zip(index, index[1:], strict=False):
        pairs[a, b] += 1
    for a, b, c in zip(index, index[1:], index[2:], strict=False):
        triples[a, b, c] += 1
    single = torch.bincount(torch.tensor(index), minlength=size).double()
    single[0] = 0  # texts begin with a letter
    pairs[0, 0] = triples[:, 0, 0] = 0
    by_pair = pairs / pairs.sum(-1, keepdim=True)
    triples += 0.5 * by_pair  # rare histories borrow from the last letter
    return MarkovLM(
        [single / single.sum(), by_pair],
        triples / triples.sum(-1, keepdim=True),
        symbols=list(_ALPHABET),
    )


@dataclass(frozen=True)
class _Exact:
    """What the chain says by summing over all texts.

    Attributes:
        log_z: Log probability that a text keeps the rule.
        last: Law of the last letter of those that do, [symbol].
        letters: Letters that a text drawn alone has on average, the one that breaks the rule
            included.
    """

    log_z: float
    last: Tensor
    letters: float


def _exact(lm: MarkovLM) -> _Exact:
    """Sum over all texts, letter by letter."""
    import torch

    keep = torch.tensor([c not in _BANNED for c in _ALPHABET]).double()
    first, second = lm.initial
    kept = [1.0, float((first * keep).sum())]  # share that keeps the rule after t letters
    state = first[:, None] * keep[:, None] * second * keep  # [before last, last]
    for _ in range(_LENGTH - 2):
        kept.append(float(state.sum()))
        state = torch.einsum("ab,abc->bc", state, lm.transition) * keep
    return _Exact(float(state.sum().log()), state.sum(0) / state.sum(), sum(kept))


@dataclass(frozen=True)
class _Run:
    """A particle filter, remembered.

    Attributes:
        texts: [step][particle].
        alive: Weight above zero, [step][particle].
        parents: Position of each particle's parent, [step][particle].
        ess: [step].
    """

    texts: list[list[str]]
    alive: list[list[bool]]
    parents: list[list[int]]
    ess: list[float]


def _remembered(model: GuidedGeneration, n: int, threshold: float, seed: int) -> _Run:
    """Run a filter step by step; a run that dies out is shorter."""
    import probkit as pk
    from probkit.inference.smc import ExtinctionError, filter_step, spawn

    rng = pk.stream(seed, "tree")
    cloud = spawn(model, n, "go", rng=rng)
    run = _Run([], [], [], [])
    for t in range(_LENGTH):
        try:
            cloud, ancestors = filter_step(model, t, cloud, "go", ess_threshold=threshold, rng=rng)
        except ExtinctionError:
            break
        run.texts.append([p.text for p in cloud.particles])
        run.alive.append([weight > 0 for weight in cloud.weights.tolist()])
        run.parents.append(list(range(n)) if ancestors is None else ancestors.tolist())
        run.ess.append(float(cloud.ess))
    return run


Node = tuple[int, int]


def _layout(run: _Run) -> tuple[dict[Node, float], dict[Node, Node]]:
    """Height of each node (step, particle) of the tree, and its parent."""
    parent = {
        (t, k): (t - 1, up)
        for t, row in enumerate(run.parents)
        for k, up in enumerate(row)
        if t > 0 and run.alive[t - 1][up]  # a text that broke the rule goes nowhere
    }
    children: dict[Node, list[Node]] = {}
    for node, above in parent.items():
        children.setdefault(above, []).append(node)
    height: dict[Node, float] = {}
    last = len(run.texts) - 1
    place = 0.0

    def settle(node: Node) -> float:
        nonlocal place
        below = sorted(children.get(node, ()), key=lambda n: run.texts[n[0]][n[1]])
        if below:
            height[node] = float(np.mean([settle(child) for child in below]))
        else:
            height[node] = place
            place += 1.0 if node[0] == last else 0.6
        return height[node]

    for k in sorted(range(len(run.texts[0])), key=lambda k: run.texts[0][k]):
        settle((0, k))
    return height, parent


def _tree(run: _Run) -> Any:
    """The tree of a run: surviving lines in colour, letters at the nodes, texts at the tips."""
    from probkit import plots

    height, parent = _layout(run)
    last = len(run.texts) - 1
    lines: set[Node] = set()
    for k, lives in enumerate(run.alive[last]):
        node: Node | None = (last, k) if lives else None
        while node is not None and node not in lines:
            lines.add(node)
            node = parent.get(node)
    fig, axes = plots.figure(1, 1, size=(12.0, 7.5))
    ax = axes[0, 0]
    with plots.style():
        for node, above in parent.items():
            on = node in lines
            ax.plot(
                [above[0], node[0]],
                [height[above], height[node]],
                color=plots.PALETTE[0] if on else "#c4c4c4",
                linewidth=1.6 if on else 0.7,
                zorder=2 if on else 1,
            )
        for (t, k), y in height.items():
            dead = not run.alive[t][k]
            mark = plots.PALETTE[1] if dead else "#202020" if (t, k) in lines else "#9a9a9a"
            letter = run.texts[t][k][-1].replace(" ", "\N{OPEN BOX}")
            ax.text(
                t, y, letter, ha="center", va="center", fontsize=7.5, color=mark, zorder=3,
                bbox={"boxstyle": "circle,pad=0.12", "fc": "white", "ec": "none"},
            )  # fmt: skip
        for k, text in enumerate(run.texts[last]):
            if run.alive[last][k]:
                ax.text(
                    last + 0.5, height[last, k], text, va="center", fontsize=8, family="monospace"
                )
        ax.set(
            xlabel="letter", yticks=[], xlim=(-0.6, last + 7), ylim=(max(height.values()) + 1, -1)
        )
        ax.set_xticks(range(0, last + 1, 4), [str(t + 1) for t in range(0, last + 1, 4)])
        ax.grid(visible=False)
    return fig


def run(ctx: DemoContext) -> None:
    """Write without a letter: the tree of particles, equal budgets, evidence, and answers."""
    from probkit.models.language import GuidedGeneration, Steps
    from probkit.models.language.potentials import VerifierPotential

    lm = _letters()
    rule = VerifierPotential(lambda text: text[-1] not in _BANNED, kind="per_step")
    letters = Steps(stop=(), max_tokens=1, max_steps=_LENGTH)
    model = GuidedGeneration(lm, rule, steps=letters)
    exact = _exact(lm)
    ctx.text(
        f"""
        A language model that needs no download: a Markov chain over letters, each drawn given the
        two before it, learned from a short tale. The task is a text of {_LENGTH} letters without
        "e" and "a". One text in {math.exp(-exact.log_z):.0f} keeps the rule by chance. A particle
        filter grows {_PARTICLES} texts side by side, gives those that break the rule weight zero,
        and puts copies of the others in their place.
        """
    )
    one = _remembered(model, _PARTICLES, 0.5, ctx.rng_seed)
    ctx.figure(
        _tree(one),
        "tree",
        "Particles as a tree. Blue lines lead to the texts at the end, grey ones were given up; "
        "an orange letter broke the rule (\N{OPEN BOX} is a space)",
    )
    _budgets(ctx, model, exact)
    _answers(ctx, model, exact.last)
    if ctx.full:
        _smollm2(ctx)


def _budgets(ctx: DemoContext, model: GuidedGeneration, exact: _Exact) -> None:
    """Independent sampling and the filter at the same number of tokens."""
    import probkit as pk
    from probkit import plots
    from probkit.inference.smc import ParticleFilter, evidence

    runs = 100 if ctx.full else 20
    # a text that broke the rule costs nothing more, so that more of them can be drawn
    many = round(_PARTICLES * _LENGTH / exact.letters)
    ways = {
        f"{many} independent texts": ParticleFilter(many, ess_threshold=0.0),
        f"filter of {_PARTICLES}": ParticleFilter(_PARTICLES),
    }
    rows, shares = {}, {}
    for name, sampler in ctx.track(ways.items(), "budgets"):
        post = pk.infer(model, "go", sampler, rng=ctx.rng_seed, chains=runs)
        died = (post.sample_stats["extinct_at"] >= 0).tolist()
        assert post.log_weights is not None
        alive = (post.log_weights > -math.inf).sum(1).tolist()
        kept = [0 if dead else count for dead, count in zip(died, alive, strict=True)]
        ess = post.sample_stats["ess"].double()
        ess[post.sample_stats["extinct_at"] >= 0, -1] = 0.0
        shares[name] = (ess.mean(0) / sampler.n).tolist()
        found = evidence(post)
        rows[name] = {
            "runs with a text left": f"{runs - sum(died)} of {runs}",
            "texts left, mean": float(np.mean(kept)),
            "tokens a run": sum(u["completion_tokens"] for u in post.attrs["usage"]) / runs,
            "log evidence": found.log_mean,
            "standard error": found.relative_error,
        }
    rows["exact"] = {"log evidence": exact.log_z}
    ctx.table(
        pd.DataFrame(rows).T.rename_axis("method"),
        f"{runs} runs of each; the independent texts may spend more tokens. Both estimate the "
        "evidence, the probability of keeping the rule, without bias; one of them varies far more",
        digits=3,
    )
    fig, axes = plots.figure(1, 1, size=(7.0, 3.2))
    with plots.style():
        for name, share in shares.items():
            axes[0, 0].plot(range(1, len(share) + 1), share, label=name)
        axes[0, 0].set(xlabel="letter", ylabel="effective share of the texts", ylim=(0, 1))
        axes[0, 0].legend()
    ctx.figure(fig, "ess", "Independent texts break the rule one by one; the filter renews itself")


def _answers(ctx: DemoContext, model: GuidedGeneration, exact: Tensor) -> None:
    """The posterior of an answer: here, with which letter a text ends."""
    import probkit as pk
    from probkit import plots
    from probkit.inference import ParticleFilter
    from probkit.models.language.answers import answer_posterior

    post = pk.infer(model, "go", ParticleFilter(100), rng=ctx.rng_seed, chains=10)
    answers = answer_posterior(post, lambda text: text[-1])
    shown = list(answers.answers[:12])
    labels = ["space" if letter == " " else str(letter) for letter in shown]
    fig, axes = plots.figure(1, 1, size=(8.0, 3.2))
    assert answers.errors is not None
    with plots.style():
        ax = axes[0, 0]
        ax.bar(
            labels, answers.probs[:12], yerr=2 * answers.errors[:12], color=plots.PALETTE[0],
            alpha=0.75, capsize=2, label="1000 particles in ten groups, ± 2 s.e.",
        )  # fmt: skip
        ax.plot(labels, [exact[_ALPHABET.index(str(c))] for c in shown], "k_", ms=14, label="exact")
        ax.set(xlabel="last letter", ylabel="probability", ylim=(0, None))
        ax.legend()
    ctx.text(
        """
        Weighted texts are draws from the model *given* the rule, so that questions about them have
        a posterior. With which letter does a text end? A parser reads the answer off each text, and
        the weights of equal answers add up.
        """
    )
    ctx.figure(fig, "answers", "Posterior of an answer, against the exact law of the chain")


def _smollm2(ctx: DemoContext) -> None:
    """The same rule for a real language model, where its weights are installed."""
    import probkit as pk
    from probkit.errors import MissingExtraError
    from probkit.inference import ParticleFilter
    from probkit.models.language import GuidedGeneration, Steps, load_smollm2
    from probkit.models.language.potentials import VerifierPotential

    try:
        lm = load_smollm2()
    except MissingExtraError as error:
        ctx.note(f"SmolLM2 is left out here: {error}")
        return
    rule = VerifierPotential(lambda text: "e" not in text.lower(), kind="value")
    model = GuidedGeneration(lm, rule, steps=Steps(stop=(), max_tokens=1, max_steps=12))
    prompt = "On a sunny morning in May, my dog and I"
    post = pk.infer(model, prompt, ParticleFilter(_PARTICLES), rng=ctx.rng_seed)
    assert post.particles is not None and post.log_weights is not None
    rows = [
        {"text": particle.text.strip(), "weight": float(weight)}
        for particle, weight in zip(
            post.particles.particles[0], post.log_weights[0].exp(), strict=True
        )
        if weight > 0
    ]
    frame = pd.DataFrame(rows).groupby("text").sum().sort_values("weight", ascending=False)
    ctx.table(
        frame.head(8),
        f'SmolLM2-135M goes on from "{prompt}", twelve tokens without the letter "e"',
        digits=2,
    )


register_view(DemoView("language", "Text under a constraint, by particles", run, order=80))

"""The pieces of the language demo view that are not shown to be right by its pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probkit.models import language_demo as demo
from probkit.models.language import GuidedGeneration, Steps
from probkit.models.language.potentials import VerifierPotential


def test_the_chain_is_summed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_LENGTH", 4)
    lm = demo._letters()
    keep = torch.tensor([c not in demo._BANNED for c in demo._ALPHABET]).double()
    first, second = lm.initial
    joint = torch.einsum("a,ab,abc,bcd->abcd", first, second, lm.transition, lm.transition)
    kept = torch.einsum("abcd,a,b,c,d->abcd", joint, keep, keep, keep, keep)
    exact = demo._exact(lm)
    assert exact.log_z == pytest.approx(float(kept.sum().log()))
    torch.testing.assert_close(exact.last, kept.sum((0, 1, 2)) / kept.sum())
    alive = [
        1.0,
        float(first @ keep),
        float(torch.einsum("a,ab,a,b->", first, second, keep, keep)),
        float(torch.einsum("abcd,a,b,c->", joint, keep, keep, keep)),
    ]
    assert exact.letters == pytest.approx(sum(alive))


def test_the_tree_is_the_ancestry() -> None:
    lm = demo._letters()
    rule = VerifierPotential(lambda text: text[-1] not in demo._BANNED, kind="per_step")
    letters = Steps(stop=(), max_tokens=1, max_steps=demo._LENGTH)
    run = demo._remembered(GuidedGeneration(lm, rule, steps=letters), 16, 0.5, seed=0)
    assert len(run.texts) == demo._LENGTH
    height, parent = demo._layout(run)
    children: dict[tuple[int, int], list[float]] = {}
    for (t, k), (before, up) in parent.items():
        assert before == t - 1 and run.texts[t][k][:-1] == run.texts[before][up]
        children.setdefault((before, up), []).append(height[t, k])
    for node, below in children.items():
        assert height[node] == pytest.approx(np.mean(below))
    for t, row in enumerate(run.texts):
        for k, text in enumerate(row):
            assert run.alive[t][k] == (not set(text) & set(demo._BANNED))
    tips = [height[demo._LENGTH - 1, k] for k in range(16) if run.alive[-1][k]]
    assert len(set(tips)) == len(tips) and np.diff(sorted(tips)).min() >= 0.6

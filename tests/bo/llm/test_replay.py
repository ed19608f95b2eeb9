"""A search with a language model, recorded once and repeated without the model."""

from __future__ import annotations

import pytest
import torch

from probkit.bo import LLMCandidates, LLMSurrogate, LLMWarmStart, Space
from probkit.bo.llm import GPScript, ProblemCard
from probkit.errors import DataError
from probkit.models.language import RecordingLM, ReplayLM
from probkit.models.language.oracle import FiniteLM, OracleLM

from .conftest import bowl


def search(lm, space: Space, steps: int = 2, mode: str = "mc") -> tuple[torch.Tensor, list[float]]:
    """First points, then candidates ranked by the surrogate."""
    card = ProblemCard("a bowl", "depth", "min")
    X = LLMWarmStart(lm, space, card).propose(4, rng=0).X
    y = [bowl(p) for p in space.from_codes(X)]
    for step in range(steps):
        pool = LLMCandidates(lm, space, card).propose((X, y), 4, rng=step).X
        spec = LLMSurrogate(lm, space, card, n_perm=2, k=4, mode=mode, outcome="score", decimals=3)
        model = spec.condition(X, y, rng=step)
        best = pool[int(model.acquisition()(pool[:, None]).argmax())]
        X, y = torch.cat([X, best[None]]), [*y, bowl(space.from_codes(best[None])[0])]
    return X, y


def test_a_recorded_search_repeats_without_the_model(plane, tmp_path):
    path = tmp_path / "search.jsonl"
    script = GPScript(plane)
    first = search(RecordingLM(OracleLM(script, malformed=0.2, timeouts=0.1), path), plane)
    again = search(ReplayLM(path), plane)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]


def test_token_probabilities_are_recorded_too(plane, tmp_path):
    path = tmp_path / "law.jsonl"
    X = torch.tensor([[0.2, 0.2], [0.8, 0.6]], dtype=torch.float64)

    def predicted(lm):
        spec = LLMSurrogate(
            lm, plane, mode="logprob", n_perm=1, outcome="score", decimals=1, prune=0.05
        )
        return spec.condition(X, [1.0, 3.0], rng=0).posterior(X * 0.9)

    recorded = predicted(RecordingLM(FiniteLM(GPScript(plane).law), path))
    replayed = predicted(ReplayLM(path))
    assert torch.equal(recorded.values, replayed.values)
    torch.testing.assert_close(recorded.probs, replayed.probs, rtol=1e-6, atol=1e-9)


def test_another_search_is_not_in_the_transcript(plane, tmp_path):
    path = tmp_path / "search.jsonl"
    search(RecordingLM(OracleLM(GPScript(plane)), path), plane, steps=1)
    lm = ReplayLM(path)
    with pytest.raises(DataError, match="was not recorded"):
        LLMWarmStart(lm, plane, ProblemCard("another", "depth")).propose(4, rng=0)

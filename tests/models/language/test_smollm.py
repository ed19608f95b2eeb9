"""SmolLM2 for real, in transformers and in llama.cpp: each with itself, and with each other."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.models.language import Law, Prefix
from probkit.models.language.protocol import extended
from probkit.testing import LanguageModelConformance

pytestmark = pytest.mark.slow

COUNT = "1, 2, 3, 4,"
CAPITAL = "The capital of France is"


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


class TestLlamaCppLM(LanguageModelConformance):
    prompt, stop = COUNT, ("6", "7")
    max_tokens = 5
    draws = 3  # The law is checked by log probabilities; frequencies below.
    tolerance = 0.05  # What is read in one go and token by token differs: the weights have 4 bits.

    @pytest.fixture(autouse=True)
    def _shared(self, llama):
        self.lm = llama

    def model(self):
        return self.lm


def test_forked_caches_give_the_logits_of_reading_again(smollm):
    prefix = smollm.start(CAPITAL)
    steps = smollm.generate([prefix] * 4, max_tokens=6, stop=["."], rng=stream())
    assert any("Paris" in step.text for step in steps)
    ancestors = [0, 0, 2, 3]
    prefixes = [extended(prefix, steps[k]) for k in ancestors]
    found = smollm.next_log_probs(prefixes)
    for row, p in zip(found, prefixes, strict=True):
        with torch.no_grad():
            logits = smollm.model(input_ids=torch.tensor([p.tokens])).logits[0, -1]
        assert float((row - torch.log_softmax(logits.double(), -1)).abs().max()) < 1e-4
    given = torch.tensor([step.log_p for step in steps]).double()
    torch.testing.assert_close(smollm.score([prefix] * 4, steps), given, atol=1e-4, rtol=0)


def test_it_counts(smollm, llama):
    for lm in (smollm, llama):
        (step,) = lm.generate(
            [lm.start(COUNT)], max_tokens=30, stop=["7"], law=Law(temperature=0.0), rng=stream()
        )
        assert (step.text, step.reason) == (" 5, 6, 7", "stop")


def test_both_read_the_same_tokens(smollm, llama):
    chat = [{"role": "user", "content": "Say hé."}]
    for prompt in (COUNT, "Zwölf 🎉 tables\n\n", chat):
        assert smollm.start(prompt) == llama.start(prompt)
    assert smollm.end_ids == llama.end_ids == (0, 2)
    same = [a == b for a, b in zip(smollm.vocabulary, llama.vocabulary, strict=True)]
    assert all(same)


def test_first_tokens_have_the_same_log_probabilities(smollm, llama):
    """llama.cpp rounds activations to 8 bits, so unlikely tokens differ by more."""
    for prompt in (CAPITAL, COUNT):
        a, b = (lm.next_log_probs([lm.start(prompt)])[0] for lm in (smollm, llama))
        top = int(a.argmax())
        assert top == int(b.argmax()) and abs(float(a[top] - b[top])) < 0.01
        assert float((a.exp() - b.exp()).abs().sum()) / 2 < 0.01


def test_draws_of_llama_follow_transformers(smollm, llama):
    prefix, n = llama.start(CAPITAL), 120
    row = smollm.next_log_probs([smollm.start(CAPITAL)])[0].exp()
    paris = int(row.argmax())
    steps = llama.generate([prefix] * n, max_tokens=1, rng=stream())
    p = float(row[paris])
    share = sum(step.tokens == (paris,) for step in steps) / n
    assert abs(share - p) < 3.9 * math.sqrt(p * (1 - p) / n)  # 1e-4, two-sided


def test_characters_split_among_tokens(llama):
    """llama.cpp tells nothing of parts of characters; they are asked for."""
    prefix = llama.start("🎉🎉🎉🎉🎉🎉")
    (step,) = llama.generate([prefix], max_tokens=3, rng=stream())
    assert len(step.tokens) == 3 and math.isfinite(step.log_p)
    assert llama._streamed({"prompt": list(prefix.tokens), "n_predict": 2}).tokens == ()
    score = float(llama.score([prefix], [step]))
    assert math.isclose(score, step.log_p, abs_tol=0.05)


def test_the_context_of_llama_ends_steps_and_refuses_prompts(llama):
    from probkit.errors import DataError
    from probkit.models.language import Continuation

    with pytest.raises(DataError, match="the prompt has 1501 tokens and the model reads 1024"):
        llama.start("a b c d" * 500)
    full = Prefix("x", tuple(range(100, 1124)), 1)
    with pytest.raises(DataError, match="prefix 0 has 1024 tokens .* nothing can follow it"):
        llama.generate([full], max_tokens=1, rng=stream())
    with pytest.raises(DataError, match="prefix and step 0 have 1025 tokens"):
        llama.score([full], [Continuation((5,), "", 0.0, 0.0, "length", 1)])
    with pytest.raises(DataError, match="unknown token 49152; expected ids from 0 to 49151"):
        llama.next_log_probs([Prefix("x", (49152,), 1)])

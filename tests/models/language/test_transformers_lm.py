"""Language models of transformers on a tiny one: forked caches, ragged batches, laws, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_lm import save_tiny_model

from probkit.errors import CapabilityError, DataError, MissingExtraError, ShapeError
from probkit.models.language import Continuation, Law, Prefix
from probkit.models.language.protocol import extended
from probkit.testing import LanguageModelConformance

pytest.importorskip("transformers")

from probkit.models.language import TransformersLM

PROMPT = "hello: ab\n\n"


def stream(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def fresh(tiny_folder):
    """The tiny model, nothing remembered."""
    return TransformersLM(tiny_folder)


def reread(lm, prefix):
    """Next-token log probabilities by one plain pass over the whole prefix."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prefix.tokens])).logits[0, -1]
    return torch.log_softmax(logits.double(), -1)


class TestTransformersLM(LanguageModelConformance):
    prompt, stop = PROMPT, ("a", "e", "1\n")
    max_tokens = 8

    @pytest.fixture(autouse=True)
    def _shared(self, tiny_lm):
        self.lm = tiny_lm

    def model(self):
        return self.lm


class TestSmallBatches(LanguageModelConformance):
    """The same with few sequences at once and no memory between calls."""

    prompt, stop = PROMPT, ("a", "e", "1\n")
    max_tokens = 8
    draws = 300

    @pytest.fixture(autouse=True)
    def _own(self, tiny_folder):
        self.lm = TransformersLM(tiny_folder, batch=3, cache_bytes=0)

    def model(self):
        return self.lm


# -------------------------------------------------------------------------- the cache


def grow(lm, rounds=4, n=6, stop=("a", "e")):
    """Prefixes of several lengths, resampled between rounds as particles are."""
    prefixes, rng = [lm.start(PROMPT)] * n, stream(3)
    history = [prefixes]
    for _ in range(rounds):
        steps = lm.generate(prefixes, stop=stop, max_tokens=9, rng=rng)
        moved = [
            p if s.reason == "end" else extended(p, s) for p, s in zip(prefixes, steps, strict=True)
        ]
        ancestors = torch.randint(n, (n,), generator=rng).tolist()
        prefixes = [moved[k] for k in ancestors]
        history.append(prefixes)
    return history


def test_forked_caches_give_the_logits_of_reading_again(fresh):
    history = grow(fresh)
    assert len({len(p.tokens) for p in history[-1]}) > 1
    for prefixes in reversed(history):  # Back to older ones, too: beginnings of known rows.
        found = fresh.next_log_probs(prefixes)
        expected = torch.stack([reread(fresh, p) for p in prefixes])
        assert float((found - expected).abs().max()) < 1e-4


def test_a_wrong_fork_is_caught(fresh, monkeypatch):
    """The comparison above fails when every sequence takes its neighbour's row."""
    from probkit.models.language.kv_cache import PrefixCache

    prefixes = grow(fresh)[-1]
    right = PrefixCache._find

    def neighbour(self, ids, most):
        pick = right(self, ids, most)
        if pick.block is None:
            return pick
        row = (pick.row + 1) % len(pick.block.tokens)
        return type(pick)(pick.block, row, min(pick.count, len(pick.block.tokens[row])))

    monkeypatch.setattr(PrefixCache, "_find", neighbour)
    found = fresh.next_log_probs(prefixes)
    expected = torch.stack([reread(fresh, p) for p in prefixes])
    assert float((found - expected).abs().max()) > 1e-2


def test_draws_are_those_of_reading_again(tiny_folder):
    """With and without memory, in one batch or several: the same tokens."""
    forked = grow(TransformersLM(tiny_folder))
    assert grow(TransformersLM(tiny_folder, cache_bytes=0)) == forked
    assert grow(TransformersLM(tiny_folder, batch=2)) == forked


def test_a_ragged_batch_equals_one_by_one(tiny_folder):
    batch, single = TransformersLM(tiny_folder), TransformersLM(tiny_folder)
    prompts = ["a", "hello there, 12", "x" * 40, "hello there, 13", "b: c"]
    prefixes = [batch.start(prompt) for prompt in prompts]
    together = batch.next_log_probs(prefixes)
    alone = torch.cat([single.next_log_probs([p]) for p in prefixes])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    steps = batch.generate(prefixes, max_tokens=12, stop=["e"], rng=stream())
    for k, (prefix, step) in enumerate(zip(prefixes, steps, strict=True)):
        score = single.score([prefix], [step])
        assert math.isclose(float(score), step.log_p, abs_tol=1e-4), k


def test_the_prompt_is_read_once(fresh):
    prefix = fresh.start(PROMPT)
    steps = fresh.generate([prefix] * 8, max_tokens=3, rng=stream())
    assert fresh.usage.prompt_tokens - fresh.usage.cached_tokens == len(prefix.tokens)
    before = fresh.usage
    longer = [extended(prefix, step) for step in steps if step.reason == "length"]
    fresh.generate(longer, max_tokens=2, rng=stream())
    spent = fresh.usage - before
    assert spent.prompt_tokens == sum(len(p.tokens) for p in longer)
    assert spent.prompt_tokens - spent.cached_tokens == len({p.tokens for p in longer})


def test_what_new_prefixes_share_is_read_once(fresh):
    head = tuple(fresh.start("the same beginning, and then ").tokens)
    prefixes = [Prefix("p", (*head, k, k + 1), len(head)) for k in range(20, 30)]
    fresh.next_log_probs(prefixes)
    spent = fresh.usage
    assert spent.prompt_tokens == 10 * (len(head) + 2)
    assert spent.prompt_tokens - spent.cached_tokens == len(head) + 20


def test_memory_is_bounded(tiny_folder):
    lm = TransformersLM(tiny_folder, cache_bytes=200_000)
    for k in range(12):
        lm.generate([lm.start(f"{k} and more words here")] * 4, max_tokens=9, rng=stream(k))
        kept = [block.nbytes for block in lm._cache._blocks]
        assert len(kept) == 1 or sum(kept) <= 200_000


# -------------------------------------------------------------------------- laws and ends


def test_masked_and_truncated_steps_have_the_log_probability_of_enumeration(fresh):
    prefix = fresh.start(PROMPT)
    digits = [k for k, text in enumerate(fresh.vocabulary) if text.isdigit()]
    mask = torch.zeros(len(fresh.vocabulary), dtype=torch.bool)
    mask[digits] = True
    law = Law(temperature=0.7, top_p=0.8, allowed=lambda seen: mask)
    base = Law(temperature=1.3)
    steps = fresh.generate([prefix] * 20, max_tokens=2, law=law, base=base, rng=stream())
    total = {}
    for first in digits:
        q, p, here = _token(fresh, prefix, first, mask)
        for second in digits if q > 0 else ():
            q2, p2, _ = _token(fresh, here, second, mask)
            total[first, second] = (q * q2, p * p2)
    assert math.isclose(sum(q for q, _ in total.values()), 1.0, rel_tol=1e-9)
    for step in steps:
        q, p = total[step.tokens]
        assert math.isclose(step.log_q, math.log(q), abs_tol=1e-4)
        assert math.isclose(step.log_p, math.log(p), abs_tol=1e-4)


def _token(lm, prefix, token, mask):
    """Probabilities of a token under the laws of the test above, by hand; and what follows it."""
    row = lm.next_log_probs([prefix])[0]
    weights = {k: math.exp(float(row[k]) / 0.7) for k in range(len(row)) if mask[k]}
    kept, run, whole = {}, 0.0, sum(weights.values())
    for k in sorted(weights, key=lambda k: (-weights[k], k)):
        if run >= 0.8 * whole:
            break
        kept[k] = weights[k]
        run += weights[k]
    q = kept.get(token, 0.0) / run
    p = float(torch.softmax(row / 1.3, 0)[token])
    step = Continuation((token,), lm.vocabulary[token], 0.0, 0.0, "length", 1)
    return q, p, extended(prefix, step)


def test_several_ends_count_as_one_event(tiny_folder):
    letter = TransformersLM(tiny_folder).tokenizer("e")["input_ids"][0]
    lm = TransformersLM(tiny_folder, end=[letter])
    assert lm.end_ids == tuple(sorted((1, letter)))
    assert lm.vocabulary[letter] == ""
    prefix = lm.start(PROMPT)
    ended = [
        step
        for step in lm.generate([prefix] * 60, max_tokens=12, rng=stream())
        if step.reason == "end"
    ]
    assert ended and all("e" not in step.text for step in ended)
    for step in ended[:3]:
        *_, last = walk(lm, prefix, step.tokens)
        inner = sum(
            float(row[t])
            for row, t in zip(walk(lm, prefix, step.tokens), step.tokens, strict=False)
        )
        expected = inner + float(last[list(lm.end_ids)].logsumexp(0))
        assert math.isclose(step.log_p, expected, abs_tol=1e-4)


def walk(lm, prefix, tokens):
    """Next-token log probabilities before each token and after the last."""
    return [
        lm.next_log_probs([Prefix(prefix.prompt, prefix.tokens + tokens[:k], prefix.start)])[0]
        for k in range(len(tokens) + 1)
    ]


def test_temperature_0_breaks_ties_by_the_smallest_id():
    from probkit.models.language.sampling import law_log_probs

    row = torch.tensor([0.1, 0.4, 0.4, 0.1], dtype=torch.float64).log()
    assert law_log_probs(row, Law(temperature=0.0)).exp().tolist() == [0.0, 1.0, 0.0, 0.0]


# -------------------------------------------------------------------------- text


def test_characters_split_among_tokens_arrive_whole(fresh):
    first, second = (
        fresh.vocabulary.index("\ufffd"),
        fresh.vocabulary.index("\ufffd", fresh.vocabulary.index("\ufffd") + 1),
    )
    assert fresh.tokenizer.decode([first, second]) == "é"

    def only(prefix):
        mask = torch.zeros(len(fresh.vocabulary), dtype=torch.bool)
        mask[first if len(prefix.generated) % 2 == 0 else second] = True
        return mask

    prefix, law, texts = fresh.start(PROMPT), Law(allowed=only), []
    for _ in range(4):
        (step,) = fresh.generate([prefix], max_tokens=1, law=law, rng=stream())
        prefix = extended(prefix, step)
        texts.append(step.text)
    assert texts == ["", "é", "", "é"] and prefix.text == "éé"
    (step,) = fresh.generate(
        [fresh.start(PROMPT)], max_tokens=9, law=law, stop=["éé"], rng=stream()
    )
    assert (step.text, step.reason, len(step.tokens)) == ("éé", "stop", 4)


def test_stop_strings_may_spread_over_tokens(fresh):
    prefix = fresh.start(PROMPT)
    steps = fresh.generate([prefix] * 32, max_tokens=20, rng=stream())
    text = next(s.text for s in steps if len(s.text) > 6 and "\ufffd" not in s.text)
    stop = text[2:5]
    again = fresh.generate([prefix] * 32, max_tokens=20, stop=[stop], rng=stream())
    for step, cut in zip(steps, again, strict=True):
        if stop in step.text:
            assert cut.reason == "stop" and cut.text.endswith(stop)
            assert step.text.startswith(cut.text)
            assert cut.tokens == step.tokens[: len(cut.tokens)]


def test_tokens_are_never_read_from_text_again(fresh):
    """Generated "a", "b" stays two tokens, though the tokenizer would merge them."""
    a, b, ab = (fresh.vocabulary.index(text) for text in ("a", "b", "ab"))
    assert fresh.tokenizer("ab")["input_ids"] == [ab]

    def only(prefix):
        mask = torch.zeros(len(fresh.vocabulary), dtype=torch.bool)
        mask[a if len(prefix.generated) % 2 == 0 else b] = True
        return mask

    prefix = fresh.start(PROMPT)
    (step,) = fresh.generate([prefix], max_tokens=2, law=Law(allowed=only), rng=stream())
    assert (step.tokens, step.text) == ((a, b), "ab")
    moved = extended(prefix, step)
    expected = reread(fresh, moved)
    torch.testing.assert_close(fresh.next_log_probs([moved])[0], expected, atol=1e-5, rtol=0)


def test_chats_go_through_the_template(fresh):
    prefix = fresh.start([{"role": "user", "content": "hi"}])
    assert prefix.prompt == (("user", "hi"),)
    assert fresh.tokenizer.decode(prefix.tokens) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    begun = fresh.start(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "1, 2"}]
    )
    assert fresh.tokenizer.decode(begun.tokens).endswith("<|im_start|>assistant\n1, 2")


def test_prefixes_without_tokens_are_read_as_text(fresh):
    known = fresh.start(PROMPT + "12")
    unknown = Prefix(PROMPT, (), 0, "12")
    torch.testing.assert_close(
        fresh.next_log_probs([known]), fresh.next_log_probs([unknown]), atol=1e-6, rtol=0
    )
    step = Continuation((), "34", 0.0, 0.0, "length", 2)
    given = step._replace(tokens=tuple(fresh.tokenizer("34")["input_ids"]))
    torch.testing.assert_close(fresh.score([known], [step]), fresh.score([known], [given]))


# -------------------------------------------------------------------------- bad input


def test_loaded_models_are_taken_as_they_are(tiny_lm, tiny_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    lm = TransformersLM(model, tiny_lm.tokenizer, dtype=torch.float64)
    prefix = lm.start(PROMPT)
    torch.testing.assert_close(
        lm.next_log_probs([prefix]), tiny_lm.next_log_probs([prefix]), atol=1e-4, rtol=0
    )
    assert repr(lm) == "TransformersLM(LlamaForCausalLM, 55 tokens)"
    with pytest.raises(DataError, match="a loaded model needs its tokenizer"):
        TransformersLM(model)
    with pytest.raises(DataError, match="expected batch >= 1, got 0"):
        TransformersLM(model, tiny_lm.tokenizer, batch=0)
    with pytest.raises(DataError, match=r"expected ids below 55 in end, got \[99\]"):
        TransformersLM(model, tiny_lm.tokenizer, end=[99])


def test_the_context_ends_steps_and_refuses_prompts(tmp_path):
    lm = TransformersLM(save_tiny_model(tmp_path, positions=16))
    with pytest.raises(DataError, match="the prompt has 16 tokens and the model reads 16"):
        lm.start("x" * 16)
    prefix = lm.start("x" * 13)
    steps = lm.generate([prefix] * 10, max_tokens=9, rng=stream())
    assert {s.n_tokens for s in steps if s.reason == "length"} == {3}
    full = Prefix("x", tuple(range(2, 18)), 1)
    with pytest.raises(DataError, match="prefix 1 has 16 tokens .* nothing can follow it"):
        lm.generate([prefix, full], max_tokens=1, rng=stream())
    with pytest.raises(DataError, match="prefix and step 0 have 17 tokens .* reads 16"):
        lm.score([full], [Continuation((3, 4), "", 0.0, 0.0, "length", 2)])


def test_unknown_tokens(fresh):
    prefix = fresh.start(PROMPT)
    with pytest.raises(DataError, match="unknown token 55; expected ids from 0 to 54"):
        fresh.score([prefix], [Continuation((3, 55), "", 0.0, 0.0, "length", 2)])
    with pytest.raises(DataError, match="unknown token -1"):
        fresh.next_log_probs([Prefix("x", (3, -1), 1)])
    with pytest.raises(ShapeError, match=r"expected a mask \[token\] of 55 booleans"):
        law = Law(allowed=lambda seen: torch.ones(3))
        fresh.generate([prefix], max_tokens=1, law=law, rng=stream())


def test_a_chat_needs_a_template(fresh):
    fresh.tokenizer.chat_template = None
    with pytest.raises(CapabilityError, match="has no chat template; write the chat as raw text"):
        fresh.start([{"role": "user", "content": "hi"}])


def test_models_that_cannot_be_loaded(tmp_path):
    with pytest.raises(DataError, match=r"there is no file '.*none\.gguf'"):
        TransformersLM(tmp_path / "none.gguf")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(DataError, match=r"cannot load '.*damaged\.gguf'"):
        TransformersLM(tmp_path / "damaged.gguf")
    with pytest.raises(DataError, match=r"cannot load '.*empty'"):
        (tmp_path / "empty").mkdir()
        TransformersLM(tmp_path / "empty")


def test_layers_that_forget_are_refused(tiny_lm):
    from transformers import MistralConfig, MistralForCausalLM

    from probkit.rng import scope

    config = MistralConfig(
        vocab_size=55,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
    )
    with scope(rng=0):
        model = MistralForCausalLM(config)
    with pytest.raises(CapabilityError, match="MistralForCausalLM has layers that forget"):
        TransformersLM(model, tiny_lm.tokenizer)


def test_the_package_is_asked_for_by_its_extra(monkeypatch, tiny_folder):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r'pip install "probkit\[llm\]"'):
        TransformersLM(tiny_folder)

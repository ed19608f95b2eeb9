"""What every language model back end must hold."""

# ruff: noqa: D102 (the names of tests say what they check)

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.testing.state import unchanged_globals
from probkit.testing.statistics import z_bound

__all__ = ["LanguageModelConformance"]


class LanguageModelConformance:
    """Tests of a back end; subclasses name themselves ``Test...`` and supply :meth:`model`.

    Tests that need what the back end cannot do are skipped; what it can do is checked against
    its own statements: log probabilities against scores, scores against each other, draws against
    next-token distributions.

    Attributes:
        seed: Root of all random numbers.
        prompt: Raw text to continue.
        stop: Strings, of which one ends some of 16 continuations of ``max_tokens`` tokens at least.
        max_tokens: Length of continuations; above the length of one.
        draws: One-token draws of the tests of frequencies.
        tolerance: Error of log probabilities that are computed in another way or order.

    Example:
        >>> from probkit.testing import LanguageModelConformance
        >>> class TestMyLM(LanguageModelConformance):
        ...     prompt, stop = "Once upon a time", (".",)
        ...     def model(self):
        ...         return MyLM()
    """

    seed: int = 0
    prompt: str = "go"
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 6
    draws: int = 2000
    tolerance: float = 1e-4

    def model(self) -> Any:
        """Return the back end; the same object may be returned every time."""
        raise TypeError(f"{type(self).__name__} must supply model() -> a LanguageModel")

    # ---------------------------------------------------------------- shared steps

    def stream(self) -> torch.Generator:
        """Return the stream at its start."""
        return torch.Generator().manual_seed(self.seed)

    def ready(self, *flags: str) -> tuple[Any, Any]:
        """Return model and prefix; skip the test where the model lacks a capability."""
        lm = self.model()
        for flag in flags:
            if not getattr(lm.capabilities, flag):
                pytest.skip(f"{type(lm).__name__} has no {flag}")
        return lm, lm.start(self.prompt)

    def steps(self, lm: Any, prefixes: Any, **options: Any) -> Any:
        """Continue prefixes on the stream at its start."""
        options = {"max_tokens": self.max_tokens, "rng": self.stream(), **options}
        return lm.generate(prefixes, **options)

    # ---------------------------------------------------------------- prefixes and steps

    def test_it_is_a_language_model(self) -> None:
        from probkit.models.language import LanguageModel

        assert isinstance(self.model(), LanguageModel)

    def test_a_start_has_nothing_generated(self) -> None:
        _, prefix = self.ready()
        assert (prefix.prompt, prefix.text, prefix.generated) == (self.prompt, "", ())

    def test_every_prefix_gets_a_step(self) -> None:
        lm, prefix = self.ready()
        steps = self.steps(lm, [prefix] * 5)
        assert len(steps) == 5
        for step in steps:
            assert step.reason in ("length", "end")
            assert 0 < step.n_tokens <= self.max_tokens
            assert step.reason == "end" or step.text
            if step.tokens:
                assert step.n_tokens == len(step.tokens) + (step.reason == "end")
            if lm.capabilities.logprobs:
                assert step.log_q <= 0 and step.log_p == step.log_q
        assert lm.generate([], max_tokens=1, rng=self.stream()) == []

    def test_a_step_of_one_token_has_one(self) -> None:
        lm, prefix = self.ready()
        assert {s.n_tokens for s in self.steps(lm, [prefix] * 4, max_tokens=1)} == {1}

    def test_equal_prefixes_are_continued_differently(self) -> None:
        lm, prefix = self.ready()
        assert len({step.text for step in self.steps(lm, [prefix] * 16)}) > 1

    def test_stop_strings_end_steps_and_belong_to_them(self) -> None:
        lm, prefix = self.ready()
        steps = self.steps(lm, [prefix] * 16, stop=self.stop)
        stopped = [step for step in steps if step.reason == "stop"]
        assert stopped, "none was stopped: choose a stop string that is likelier"
        for step in steps:
            places = [step.text.find(s) for s in self.stop if s in step.text]
            assert bool(places) == (step.reason == "stop")
            vocabulary = lm.vocabulary  # Empty where a server does not tell it.
            if vocabulary and len(step.tokens) > 1 and places:
                before = "".join(vocabulary[token] for token in step.tokens[:-1])
                assert not any(s in before for s in self.stop), "went on after a stop string"

    # ---------------------------------------------------------------- seeds

    def test_the_seed_decides(self) -> None:
        lm, prefix = self.ready("seed")
        first, again = (self.steps(lm, [prefix] * 6) for _ in range(2))
        assert [step.text for step in first] == [step.text for step in again]
        other = self.steps(lm, [prefix] * 6, rng=torch.Generator().manual_seed(self.seed + 1))
        assert [step.text for step in other] != [step.text for step in first]

    def test_a_step_does_not_depend_on_those_after_it(self) -> None:
        lm, prefix = self.ready("seed")
        alone = self.steps(lm, [prefix])
        among = self.steps(lm, [prefix] * 4)
        assert among[0].text == alone[0].text
        longer = extended_by(prefix, among[1])
        assert self.steps(lm, [prefix, longer])[0].text == alone[0].text

    def test_the_stream_moves_on(self) -> None:
        lm, prefix = self.ready()
        rng = self.stream()
        first = self.steps(lm, [prefix] * 8, rng=rng)
        assert not torch.equal(rng.get_state(), self.stream().get_state())
        second = self.steps(lm, [prefix] * 8, rng=rng)
        if lm.capabilities.seed:
            assert [step.text for step in first] != [step.text for step in second]

    def test_global_state_is_left_alone(self) -> None:
        lm, prefix = self.ready()
        with unchanged_globals():
            self.steps(lm, [prefix] * 2)
            if lm.capabilities.prompt_logprobs:
                lm.score([prefix], self.steps(lm, [prefix]))
            if lm.capabilities.logits:
                lm.next_log_probs([prefix])

    # ---------------------------------------------------------------- log probabilities

    def test_scores_are_the_log_probabilities_of_draws(self) -> None:
        lm, prefix = self.ready("logprobs", "prompt_logprobs")
        steps = self.steps(lm, [prefix] * 6, stop=self.stop)
        given = torch.tensor([step.log_p for step in steps], dtype=torch.float64)
        found = lm.score([prefix] * 6, steps)
        assert found.shape == (6,) and found.dtype == torch.float64
        torch.testing.assert_close(found, given, atol=self.tolerance, rtol=0)

    def test_scores_add_up_along_a_text(self) -> None:
        lm, prefix = self.ready("prompt_logprobs")
        first = [s for s in self.steps(lm, [prefix] * 8, max_tokens=3) if s.reason != "end"][:3]
        middle = [extended_by(prefix, step) for step in first]
        second = self.steps(lm, middle)
        whole = [
            b._replace(
                tokens=a.tokens + b.tokens, text=a.text + b.text, n_tokens=a.n_tokens + b.n_tokens
            )
            for a, b in zip(first, second, strict=True)
        ]
        start = [prefix] * len(first)
        together = lm.score(start, whole)
        apart = lm.score(start, first) + lm.score(middle, second)
        torch.testing.assert_close(together, apart, atol=2 * self.tolerance, rtol=0)

    def test_next_tokens_have_normalised_probabilities(self) -> None:
        lm, prefix = self.ready("logits")
        table = lm.next_log_probs([prefix, prefix])
        assert table.shape == (2, len(lm.vocabulary)) and table.dtype == torch.float64
        torch.testing.assert_close(table.exp().sum(-1), torch.ones(2).double())
        torch.testing.assert_close(table[0], table[1], atol=self.tolerance, rtol=0)

    def test_draws_follow_their_law(self) -> None:
        lm, prefix = self.ready("logits", "logprobs")
        from probkit.models.language import Law

        for law in (Law(), Law(temperature=0.7), Law(top_p=0.77), Law(temperature=1.5, top_p=0.93)):
            expected = reference_law(lm.next_log_probs([prefix])[0], law)
            self.check_frequencies(lm, prefix, law, expected)

    def test_forbidden_tokens_never_come(self) -> None:
        lm, prefix = self.ready("logits", "logprobs")
        from probkit.models.language import Law

        table = lm.next_log_probs([prefix])[0]
        allowed = torch.zeros(len(table), dtype=torch.bool)
        allowed[table.argsort(descending=True)[1:4]] = True
        expected = torch.log_softmax(table.masked_fill(~allowed, -torch.inf), 0)
        law = Law(allowed=lambda seen: allowed)
        self.check_frequencies(lm, prefix, law, expected, draws=min(self.draws, 200))

    def check_frequencies(
        self, lm: Any, prefix: Any, law: Any, expected: Tensor, draws: int | None = None
    ) -> None:
        """Compare one-token draws with log probabilities [token], token by token."""
        count = self.draws if draws is None else draws
        steps = self.steps(lm, [prefix] * count, max_tokens=1, law=law)
        ends = [k for k, text in enumerate(lm.vocabulary) if not text]
        seen = torch.tensor([step.tokens[0] if step.tokens else ends[0] for step in steps])
        if len(ends) > 1:  # One event.
            together = expected[ends].logsumexp(0)
            expected = expected.clone()
            expected[ends] = -torch.inf
            expected[ends[0]] = together
        given = torch.tensor([step.log_q for step in steps], dtype=torch.float64)
        torch.testing.assert_close(given, expected[seen], atol=self.tolerance, rtol=0)
        probs = expected.exp()
        frequency = torch.bincount(seen, minlength=len(probs)).double() / count
        error = (probs * (1 - probs) / count).sqrt()
        common = probs * count >= 10  # Where the normal approximation holds.
        z = (frequency - probs)[common] / error[common].clamp_min(1e-9)
        assert bool((z.abs() <= z_bound(int(common.sum()))).all()), law

    def test_temperature_0_takes_the_likeliest(self) -> None:
        lm, prefix = self.ready()
        from probkit.models.language import Law

        steps = self.steps(lm, [prefix] * 3, law=Law(temperature=0.0))
        assert len({step.text for step in steps}) == 1
        if lm.capabilities.logprobs and lm.capabilities.logits:
            assert steps[0].log_q == 0.0
            assert steps[0].tokens[0] == int(lm.next_log_probs([prefix])[0].argmax())

    def test_the_base_law_is_reported_beside_the_law(self) -> None:
        lm, prefix = self.ready("logprobs", "prompt_logprobs")
        from probkit.models.language import Law

        law = Law(temperature=0.6, top_p=0.95)
        steps = self.steps(lm, [prefix] * 4, law=law, base=Law())
        given = torch.tensor([step.log_p for step in steps], dtype=torch.float64)
        found = lm.score([prefix] * 4, steps)
        torch.testing.assert_close(given, found, atol=self.tolerance, rtol=0)
        assert any(abs(step.log_q - step.log_p) > 1e-3 for step in steps)

    # ---------------------------------------------------------------- usage and bad input

    def test_usage_adds_up(self) -> None:
        lm, prefix = self.ready()
        before = lm.usage
        steps = self.steps(lm, [prefix] * 3)
        spent = lm.usage - before
        assert spent.completion_tokens == sum(step.n_tokens for step in steps)
        assert spent.calls >= 1 and spent.seconds > 0 and spent.failures == 0
        assert 0 <= spent.cached_tokens <= spent.prompt_tokens

    def test_an_empty_prompt_is_refused(self) -> None:
        lm = self.model()
        with pytest.raises(DataError, match="start: expected a prompt"):
            lm.start("")
        with pytest.raises(DataError, match="start: expected text or a non-empty list"):
            lm.start([])
        with pytest.raises(DataError, match="start: expected message 0 as"):
            lm.start([{"text": "hello"}])

    def test_bad_requests_are_refused(self) -> None:
        lm, prefix = self.ready()
        with pytest.raises(DataError, match="expected max_tokens >= 1"):
            self.steps(lm, [prefix], max_tokens=0)
        with pytest.raises(DataError, match="expected stop to be a sequence of non-empty strings"):
            self.steps(lm, [prefix], stop="ab")
        with pytest.raises(DataError, match="expected stop to be a sequence of non-empty strings"):
            self.steps(lm, [prefix], stop=[""])
        with pytest.raises(DataError, match=r"expected rng to be a torch\.Generator"):
            self.steps(lm, [prefix], rng=0)
        if lm.capabilities.prompt_logprobs:
            with pytest.raises(ShapeError, match="expected one step for each prefix"):
                lm.score([prefix], [])


def extended_by(prefix: Any, step: Any) -> Any:
    """Return the prefix after a step."""
    from probkit.models.language.protocol import extended

    return extended(prefix, step)


def reference_law(table: Tensor, law: Any) -> Tensor:
    """Log probabilities of tokens under temperature and nucleus, written out plainly."""
    probs = (table / law.temperature).softmax(0).tolist()
    kept, total = set(), 0.0
    for token in sorted(range(len(probs)), key=lambda k: (-probs[k], k)):
        if total >= law.top_p:
            break
        kept.add(token)
        total += probs[token]
    chosen = [p if k in kept else 0.0 for k, p in enumerate(probs)]
    result = torch.tensor(chosen, dtype=torch.float64)
    return (result / result.sum()).log()

"""What every back end must hold, over HTTP, for servers that tell much and servers that do not."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
from support.openai_server import OpenAIServer, Variant

from probkit.models import OpenAILM
from probkit.models.language import Law
from probkit.testing import LanguageModelConformance


class OverHTTP(LanguageModelConformance):
    prompt, stop, tolerance = "x|", ("\n", "ca"), 1e-9
    variant: ClassVar[Variant]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def served(cls):
        with OpenAIServer(cls.variant) as server:
            with OpenAILM(f"{server.url}/v1", api_key_env=None) as lm:
                _ = lm.profile
                cls.lm = lm
                yield

    def model(self):
        return self.lm


class TestTellsTokens(OverHTTP):
    variant = Variant(vllm=True)

    def test_the_base_law_is_reported_beside_the_law(self):
        """Log probabilities are told before the temperature: log p is exact, log q unknown."""
        lm, prefix = self.ready()
        steps = self.steps(lm, [prefix] * 4, law=Law(temperature=0.6, top_p=0.95), base=Law())
        found = lm.score([prefix] * 4, steps).tolist()
        assert [step.log_p for step in steps] == pytest.approx(found)
        assert all(math.isnan(step.log_q) for step in steps)


class TestTellsText(OverHTTP):
    variant = Variant(completions=False, chat="repeat", logprobs=False)

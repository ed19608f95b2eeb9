"""Log probability of given text under any law."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from probkit.errors import CapabilityError
from probkit.models.language.protocol import (
    Continuation,
    LanguageModel,
    Law,
    Prefix,
    require_capability,
)
from probkit.models.language.sampling import allowed_mask, law_log_probs

__all__ = ["is_plain", "joined_steps", "require_scores", "score_under"]


def is_plain(law: Law) -> bool:
    """Tell whether a law is the model's own distribution."""
    return law.temperature == 1.0 and law.top_p == 1.0 and law.allowed is None


def require_scores(lm: LanguageModel, law: Law, purpose: str, remedy: str) -> None:
    """Check that given text can be scored under a law.

    Raises:
        CapabilityError: It cannot.
    """
    flag = "prompt_logprobs" if is_plain(law) else "logits"
    require_capability(lm, flag, purpose, remedy)


def score_under(
    lm: LanguageModel, law: Law, prefixes: Sequence[Prefix], steps: Sequence[Continuation]
) -> Tensor:
    """Return log p(step | prefix) under a law, [n], float64.

    The model's own law takes one pass for each pair, any other one pass for each token.

    Args:
        lm: Needs ``prompt_logprobs``; ``logits`` for a law other than the model's own.
        law: The law.
        prefixes: n prefixes.
        steps: Their n steps. The end of the sequence belongs to a step with the reason "end".

    Raises:
        CapabilityError: The back end lacks what is needed, or the tokens of a step are unknown.

    Example:
        >>> from probkit.models.language.markov import MarkovLM
        >>> lm = MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]])
        >>> step = Continuation((0, 1), "ab", 0.0, 0.0, "length", 2)
        >>> score_under(lm, Law(temperature=0.5), [lm.start("go")], [step]).exp()
        tensor([0.0061], dtype=torch.float64)
    """
    if not prefixes:
        return torch.zeros(0, dtype=torch.float64)
    if is_plain(law):
        # NaN: a request that failed for good, whose particle then has no weight.
        return lm.score(prefixes, steps).double().nan_to_num(nan=-math.inf, neginf=-math.inf)
    return _token_by_token(lm, law, prefixes, steps)


def _token_by_token(
    lm: LanguageModel, law: Law, prefixes: Sequence[Prefix], steps: Sequence[Continuation]
) -> Tensor:
    vocabulary = lm.vocabulary
    rows = [_with_end(step, vocabulary) for step in steps]
    total = [0.0] * len(rows)
    for t in range(max(map(len, rows), default=0)):
        index = [k for k, row in enumerate(rows) if len(row) > t and total[k] > -math.inf]
        if not index:
            break
        before = [_grown(prefixes[k], rows[k][:t], vocabulary) for k in index]
        table = lm.next_log_probs(before).double()
        table = law_log_probs(table, law, allowed_mask(law, before, table.shape[-1]))
        chosen = torch.tensor([rows[k][t] for k in index], device=table.device)
        found = table.gather(-1, chosen[:, None])[:, 0].tolist()
        for k, value in zip(index, found, strict=True):
            total[k] += value
    return torch.tensor(total, dtype=torch.float64)


def _with_end(step: Continuation, vocabulary: Sequence[str]) -> tuple[int, ...]:
    """Token ids of a step, the end of the sequence included."""
    if not step.tokens and step.text:
        raise CapabilityError(
            "scoring text under a temperature, a nucleus or a mask needs its tokens; this back end "
            "does not tell them. Use the model's own law, Law()"
        )
    ends = step.reason == "end" and not (step.tokens and vocabulary[step.tokens[-1]] == "")
    return (*step.tokens, vocabulary.index("")) if ends else step.tokens


def _grown(prefix: Prefix, tokens: tuple[int, ...], vocabulary: Sequence[str]) -> Prefix:
    if not tokens:
        return prefix
    text = prefix.text + "".join(vocabulary[token] for token in tokens)
    return Prefix(prefix.prompt, prefix.tokens + tokens, prefix.start, text)


def joined_steps(steps: Sequence[Continuation]) -> Continuation:
    """Return several steps in a row as one.

    Example:
        >>> a = Continuation((1,), "b", -1.0, -1.0, "length", 1)
        >>> joined_steps([a, a._replace(reason="end")]).text
        'bb'
    """
    tokens = tuple(token for step in steps for token in step.tokens)
    return Continuation(
        tokens,
        "".join(step.text for step in steps),
        sum(step.log_q for step in steps),
        sum(step.log_p for step in steps),
        steps[-1].reason,
        sum(step.n_tokens for step in steps),
    )

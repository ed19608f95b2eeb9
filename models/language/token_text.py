"""Between token ids and text, piece by piece: characters may be split among tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["TokenText"]

_PARTIAL = "\ufffd"
_CONTEXT = 8


class TokenText:
    """Text of token ids as a continuation of others.

    Args:
        tokenizer: A tokenizer of transformers.
        size: Number of token ids of the model.
        end_ids: Ids that end the sequence; they have no text.
    """

    def __init__(self, tokenizer: Any, size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer, self._size, self._end_ids = tokenizer, size, frozenset(end_ids)
        self._vocabulary: tuple[str, ...] | None = None

    def whole(self, ids: Sequence[int]) -> str:
        """Return the text of ids up to the last complete character."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text.rstrip(_PARTIAL)

    def added(self, before: Sequence[int], new: Sequence[int]) -> str:
        """Return the text that new ids add to what stands before them.

        The bytes of a character that is not complete yet are added with its last one.
        """
        anchor = tuple(before[-_CONTEXT:])
        return self.whole((*anchor, *new))[len(self.whole(anchor)) :]

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Text of each token id; empty for those that end the sequence."""
        if self._vocabulary is None:
            known = len(self._tokenizer)
            anchor = self._tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
            skip = len(self._decoded(anchor))
            self._vocabulary = tuple(
                ""
                if token in self._end_ids
                else self._decoded([*anchor, token])[skip:]
                if token < known
                else f"<{token}>"
                for token in range(self._size)
            )
        return self._vocabulary

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text

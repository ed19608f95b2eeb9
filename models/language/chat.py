"""Prompts as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from probkit.errors import DataError
from probkit.models.language.protocol import Prompt

__all__ = ["messages_of", "prompt_value"]


def prompt_value(prompt: Prompt) -> str | tuple[tuple[str, str], ...]:
    """Return a prompt as it stands in a prefix: text, or pairs (role, content).

    Raises:
        DataError: An empty prompt, or messages without role and content.

    Example:
        >>> prompt_value([{"role": "user", "content": "Hello"}])
        (('user', 'Hello'),)
    """
    if isinstance(prompt, str):
        if not prompt:
            raise DataError("start: expected a prompt with text in it, got an empty string")
        return prompt
    if not isinstance(prompt, Sequence) or not prompt:
        raise DataError(
            "start: expected text or a non-empty list of messages "
            f'[{{"role": "user", "content": "..."}}], got {prompt!r}'
        )
    return tuple(_pair(k, message) for k, message in enumerate(prompt))


def _pair(k: int, message: object) -> tuple[str, str]:
    if isinstance(message, Mapping) and set(message) == {"role", "content"}:
        role, content = message["role"], message["content"]
        if isinstance(role, str) and isinstance(content, str) and role:
            return role, content
    raise DataError(
        f'start: expected message {k} as {{"role": "...", "content": "..."}} with texts, '
        f"got {message!r}"
    )


def messages_of(prompt: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    """Return pairs (role, content) as messages again."""
    return [{"role": role, "content": content} for role, content in prompt]

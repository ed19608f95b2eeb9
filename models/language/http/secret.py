"""The API key: read from the environment, and wiped out of everything that comes back."""

from __future__ import annotations

import os

from probkit.errors import DataError

__all__ = ["Secret"]

_WIPED = "[api key]"


class Secret:
    """An API key that does not show.

    Args:
        variable: Name of the environment variable that holds it; None for no key.
    """

    __slots__ = ("_value", "variable")

    def __init__(self, variable: str | None) -> None:
        self.variable = variable
        self._value = os.environ.get(variable, "").strip() if variable else ""
        if not self._value.isascii() or any(c.isspace() for c in self._value):
            raise DataError(
                f"OpenAILM: expected an API key of printable ASCII characters in the environment "
                f"variable {variable}, got one with others; set it again"
            )

    def __repr__(self) -> str:
        return f"Secret(variable={self.variable!r})"

    def __reduce__(self) -> tuple[type[Secret], tuple[str | None]]:
        return Secret, (self.variable,)

    def __bool__(self) -> bool:
        return bool(self._value)

    @property
    def headers(self) -> dict[str, str]:
        """Headers that carry the key."""
        return {"Authorization": f"Bearer {self._value}"} if self._value else {}

    def wipe(self, body: bytes) -> bytes:
        """Return a body in which the key, should a server repeat it, is blotted out."""
        if not self._value:
            return body
        return body.replace(self._value.encode(), _WIPED.encode())

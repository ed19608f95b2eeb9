"""Which tokens a constraint allows next: what a masked proposal draws from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.language.protocol import Prefix

__all__ = ["AllowedTokens", "TokenTrie", "tokens_where"]

_REMEMBERED = 512  # masks of the texts seen last
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"  # part of a character: no text of its own


class TokenTrie:
    """The texts of a vocabulary by their first characters, so that dead branches are cut at once.

    Args:
        vocabulary: Text of each token.

    Example:
        >>> trie = TokenTrie(["a", "ab", "b", ""])
        >>> trie.mask(lambda text: text in ("a", "ab"), ends=False).tolist()
        [True, True, False, False]
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.size = len(vocabulary)
        self.ends = [k for k, text in enumerate(vocabulary) if not text]
        self._root: dict[str, Any] = {}
        for k, text in enumerate(vocabulary):
            if text and _UNREADABLE not in text:
                node = self._root
                for character in text:
                    node = node.setdefault(character, {})
                node.setdefault("", []).append(k)

    def mask(self, alive: Callable[[str], bool], *, ends: bool) -> Tensor:
        """Return the mask [token] of the tokens whose whole text is alive.

        Args:
            alive: Tells of a text whether it may follow. Where it says no of a text, it must say
                no of every longer one that begins with it.
            ends: Whether the sequence may end here.
        """
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[self.ends] = ends
        found: list[int] = []
        stack = [(self._root, "")]
        while stack:
            node, path = stack.pop()
            for character, child in node.items():
                if character and alive(path + character):
                    found += child.get("", ())
                    stack.append((child, path + character))
        mask[found] = True
        return mask


class AllowedTokens:
    """Function of a prefix for ``Law(allowed=...)``: what a constraint lets follow.

    Args:
        mask: Text -> mask [token].

    Masks of recent texts are remembered.
    """

    def __init__(self, mask: Callable[[str], Tensor]) -> None:
        self._mask = lru_cache(maxsize=_REMEMBERED)(mask)

    def __call__(self, prefix: Prefix) -> Tensor:
        """Return the mask [token] after a prefix."""
        return self._mask(prefix.text)


def tokens_where(
    predicate: Callable[[str], bool], vocabulary: Sequence[str], *, end: bool = True
) -> Callable[[Prefix], Tensor]:
    """Allow the tokens whose text satisfies a predicate, whatever came before.

    Args:
        predicate: Token text -> whether it may be used.
        vocabulary: ``lm.vocabulary``.
        end: Whether the sequence may end.

    Returns:
        A function for ``Law(allowed=...)``.

    Raises:
        DataError: No token is left.

    Example:
        >>> without_e = tokens_where(lambda text: "e" not in text, ["a", "be", ""])
        >>> without_e(Prefix("go")).tolist()
        [True, False, True]
    """
    mask = torch.tensor([end if not text else bool(predicate(text)) for text in vocabulary])
    if not bool(mask.any()):
        raise DataError(
            f"tokens_where: expected a predicate that some token meets, none of {len(mask)} does"
        )
    return lambda prefix: mask

r"""The exact law of the number that a language model would write, from its token probabilities.

The texts that begin with a number form a tree: each node is a text that may still become a longer
number, its edges are tokens. One forward pass gives the probabilities of all edges of a node, so
all numbers of d decimals are reached in about d + 3 passes, each one over the nodes of one depth.

Nothing is assumed of the tokens. An edge is any token, by its text: a digit, several digits, a
point with digits, a space with a digit, or the end of a number together with what follows it
("5 ##", "7\n"). It is followed where the longer text can still grow into a number, ends there where
the text holds a number followed by white space, a delimiter or the end of the sequence, and is
invalid otherwise. Different tokens that give the same text ("1" then "2", or "12") are different
branches, because the model continues them differently; their masses add up at the values that they
reach. With numbers of fixed decimals a number is complete with its last decimal, whatever follows.

Branches of little probability are not followed. One that has passed its point holds numbers close
to each other and counts at their middle (``coarse``); one before it is left to the tail
(``pruned``). The total is kept: the masses of all values, of pruned branches and of invalid texts
sum to one.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probkit.bo.llm.scores import can_grow, ended, is_complete, number_of, shortened
from probkit.errors import DataError
from probkit.models.language.protocol import LanguageModel, Law, Prefix, require_capability
from probkit.models.language.sampling import law_log_probs

__all__ = ["DigitDensity", "DigitTree", "label_probability"]


@dataclass(frozen=True, eq=False)
class DigitDensity:
    """A discrete law over numbers, with what could not be told of it.

    Attributes:
        values: Distinct numbers in ascending order, [value], float64.
        mass: Their probabilities; with ``pruned`` and ``invalid`` they sum to one, [value].
        pruned: Probability of branches that were given up before their point.
        invalid: Probability of texts that hold no acceptable number.
        coarse: Part of ``mass`` that stands at the middle of a branch that was not followed.
    """

    values: Tensor
    mass: Tensor
    pruned: float = 0.0
    invalid: float = 0.0
    coarse: float = 0.0

    @property
    def tail(self) -> float:
        """Probability of everything but ``values``."""
        return self.pruned + self.invalid

    @property
    def total(self) -> float:
        """Probability of ``values``; 1 - ``tail`` up to rounding."""
        return float(self.mass.sum())

    @property
    def probs(self) -> Tensor:
        """Probabilities of the values, given that it is one of them, [value].

        Raises:
            DataError: There are none.
        """
        if not self.total > 0:
            raise DataError("the model writes no number here: its whole mass is in the tail")
        return self.mass / self.mass.sum()

    @property
    def mean(self) -> float:
        """Mean, given that it is one of ``values``."""
        return float(self.probs @ self.values)

    @property
    def variance(self) -> float:
        """Variance, given that it is one of ``values``."""
        return float(self.probs @ (self.values - self.mean).square())

    def probability(self, low: float, high: float) -> float:
        """Return P(low <= value <= high), given that it is one of ``values``.

        The probability over all texts lies within ``tail + coarse`` of it.
        """
        inside = (self.values >= low) & (self.values <= high)
        return float(self.probs[inside].sum())

    def expected_improvement(self, best: float, direction: Literal["min", "max"] = "min") -> float:
        """Return E[max(0, improvement on ``best``)], exactly."""
        gain = best - self.values if direction == "min" else self.values - best
        return float(self.probs @ gain.clamp_min(0.0))

    @classmethod
    def mixture(cls, parts: Sequence[DigitDensity]) -> DigitDensity:
        """Return the equal mixture of densities."""
        mass: dict[float, float] = defaultdict(float)
        for part in parts:
            for value, weight in zip(part.values.tolist(), part.mass.tolist(), strict=True):
                mass[value] += weight / len(parts)
        return _density(
            mass,
            math.fsum(part.pruned for part in parts) / len(parts),
            math.fsum(part.invalid for part in parts) / len(parts),
            math.fsum(part.coarse for part in parts) / len(parts),
        )


def _density(
    mass: Mapping[float, float], pruned: float, invalid: float, coarse: float
) -> DigitDensity:
    values = sorted(mass)
    return DigitDensity(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor([mass[value] for value in values], dtype=torch.float64),
        pruned,
        invalid,
        coarse,
    )


class _Edges(NamedTuple):
    """What the tokens of a vocabulary do to a text.

    Attributes:
        grow: Ids of tokens after which the text can grow, [edge].
        added: Digits that each of them adds, [edge].
        finish: Ids of tokens that end a number and add to it, [edge].
        close: Ids of tokens that end the number as it is, [edge].
        invalid: Ids of all others, [edge].
    """

    grow: NDArray[np.int64]
    added: NDArray[np.int64]
    finish: NDArray[np.int64]
    close: NDArray[np.int64]
    invalid: NDArray[np.int64]


class _Grammar:
    """Sorts the tokens of a vocabulary by what they do; a text counts by its shape only."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.texts = list(vocabulary)
        self._known: dict[str, _Edges] = {}

    def edges(self, text: str) -> _Edges:
        """The edges of the node with this text."""
        shape = re.sub("[0-9]", "0", text)
        if shape not in self._known:
            self._known[shape] = self._sort(shape)
        return self._known[shape]

    def _sort(self, shape: str) -> _Edges:
        grow, added, finish, close, invalid = [], [], [], [], []
        now = ended(shape)
        for token, text in enumerate(self.texts):
            longer = shape + text
            if text and can_grow(longer):
                grow.append(token)
                added.append(sum(c.isdigit() for c in text))
                continue
            number = ended(longer)
            if number is None:
                invalid.append(token)
            elif number == now:
                close.append(token)
            else:
                finish.append(token)
        return _Edges(*(np.array(k, dtype=np.int64) for k in (grow, added, finish, close, invalid)))


@dataclass
class _Walk:
    """What a walk has found below one prefix."""

    mass: dict[float, float] = field(default_factory=lambda: defaultdict(float))
    pruned: float = 0.0
    invalid: float = 0.0
    coarse: float = 0.0

    def density(self) -> DigitDensity:
        return _density(self.mass, self.pruned, self.invalid, self.coarse)


class _Node(NamedTuple):
    root: int
    text: str
    mass: float
    prefix: Prefix


@dataclass(frozen=True)
class DigitTree:
    """How the tree of digits is walked.

    Args:
        decimals: Decimals of the numbers; further ones are cut.
        prune: Branches of less probability are not followed.
        width: Most branches followed for each digit that a token adds: the most probable
            ``width ** k`` among the tokens of k digits.
        between: Numbers outside count as invalid.
        batch: Nodes in one forward pass.

    Raises:
        DataError: An option out of range.

    Example:
        >>> from probkit.models.language.markov import MarkovLM
        >>> even = [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
        >>> lm = MarkovLM([0.5, 0.5, 0.0], even, end=[0.5, 0.5, 1.0], symbols=["1", "2", "x"])
        >>> density = DigitTree(prune=0.2).walk(lm, [lm.start("## ")])[0]
        >>> density.values.tolist(), density.mass.tolist(), density.pruned
        ([1.0, 2.0], [0.25, 0.25], 0.5)
    """

    decimals: int = 3
    prune: float = 1e-4
    width: int = 10
    between: tuple[float, float] = (-math.inf, math.inf)
    batch: int = 256

    def __post_init__(self) -> None:
        """Check the options."""
        for name, least in (("decimals", 0), ("width", 1), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DataError(f"DigitTree: expected a whole {name} >= {least}, got {value!r}")
        if not 0.0 <= self.prune < 1.0:
            raise DataError(f"DigitTree: expected 0 <= prune < 1, got {self.prune!r}")

    def walk(
        self,
        lm: LanguageModel,
        prefixes: Sequence[Prefix],
        law: Law = Law(),  # noqa: B008 (frozen)
    ) -> list[DigitDensity]:
        """Return the law of the number that follows each prefix.

        Args:
            lm: A model with ``logits``.
            prefixes: n prefixes.
            law: Temperature and nucleus of the tokens.

        Raises:
            CapabilityError: The model does not tell next-token distributions.
        """
        require_capability(
            lm, "logits", "the digit tree", "Sample numbers instead (mode='mc'), or use "
            "TransformersLM, LlamaCppLM or MarkovLM."
        )  # fmt: skip
        grammar = _Grammar(lm.vocabulary)
        walks = [_Walk() for _ in prefixes]
        nodes = [_Node(k, "", 1.0, prefix) for k, prefix in enumerate(prefixes)]
        while nodes:
            below: list[_Node] = []
            for begin in range(0, len(nodes), self.batch):
                part = nodes[begin : begin + self.batch]
                table = lm.next_log_probs([node.prefix for node in part])
                probs = law_log_probs(table.double().cpu(), law).exp().numpy()
                for node, row in zip(part, probs, strict=True):
                    below += self._step(grammar, node, row, walks[node.root])
            nodes = below
        return [walk.density() for walk in walks]

    def _step(
        self, grammar: _Grammar, node: _Node, probs: NDArray[np.float64], walk: _Walk
    ) -> list[_Node]:
        """Share the mass of a node among its edges; return the nodes to go on from."""
        edges = grammar.edges(node.text)
        walk.invalid += node.mass * float(probs[edges.invalid].sum())
        closing = node.mass * float(probs[edges.close].sum())
        if closing > 0:
            self._reach(number_of(node.text), closing, walk)
        for token in edges.finish[probs[edges.finish] > 0].tolist():
            number = ended(node.text + grammar.texts[token])
            assert number is not None
            self._reach(number, node.mass * float(probs[token]), walk)
        mass = node.mass * probs[edges.grow]
        kept = (mass >= self.prune) & self._widest(mass, edges.added)
        below = []
        for k in mass.nonzero()[0].tolist():
            token, part = int(edges.grow[k]), float(mass[k])
            text = node.text + grammar.texts[token]
            number = number_of(text)
            if is_complete(number, self.decimals):
                self._reach(number, part, walk)
            elif kept[k]:
                old = node.prefix
                longer = old.text + grammar.texts[token]
                prefix = Prefix(old.prompt, (*old.tokens, token), old.start, longer)
                below.append(_Node(node.root, text, part, prefix))
            else:
                self._give_up(number, part, walk)
        return below

    def _reach(self, number: str, mass: float, walk: _Walk) -> None:
        self._count(float(shortened(number, self.decimals)), mass, walk)

    def _count(self, value: float, mass: float, walk: _Walk) -> bool:
        """Count a number; return whether it may be counted."""
        inside = self.between[0] <= value <= self.between[1]
        if inside:
            walk.mass[value] += mass
        else:
            walk.invalid += mass
        return inside

    def _give_up(self, number: str, mass: float, walk: _Walk) -> None:
        """Count a branch that is not followed, at the middle of its numbers if these are near."""
        whole, point, fraction = number.partition(".")
        if not point:
            walk.pruned += mass
            return
        rest = 10.0 ** -len(fraction) - 10.0**-self.decimals
        middle = abs(float(f"{whole}.{fraction}0")) + 0.5 * rest
        if self._count(-middle if whole.startswith("-") else middle, mass, walk):
            walk.coarse += mass

    def _widest(self, mass: NDArray[np.float64], added: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which edges are among the most probable ones that add as many digits, [edge]."""
        kept = np.ones(len(mass), dtype=bool)
        for digits in set(added.tolist()) - {0}:
            group = (added == digits).nonzero()[0]
            room = self.width**digits
            if len(group) > room:
                kept[group[np.argsort(-mass[group], kind="stable")[room:]]] = False
        return kept


#: White space and delimiters that may precede a label, and how deep they are followed.
_LEAD = re.compile(r" {0,2}(?:#|## {0,2})?")
_LABEL = re.compile(r" {0,2}(?:## {0,2})?(?P<label>[01])(?![0-9.])")


def read_label(text: str) -> int | None:
    """Return the label, 0 or 1, that an answer begins with; None where it begins with another.

    Example:
        >>> read_label(" 1 ##"), read_label("0"), read_label("10"), read_label("one")
        (1, 0, None, None)
    """
    found = _LABEL.match(text)
    return None if found is None else int(found["label"])


def label_probability(
    lm: LanguageModel,
    prefixes: Sequence[Prefix],
    law: Law = Law(),  # noqa: B008 (frozen)
    *,
    prune: float = 1e-4,
) -> Tensor:
    """Return P(1) / (P(0) + P(1)) at the first token that holds a label, [n], float64.

    A label counts in every token that holds it: "1", " 1", "1 ##"; tokens that only lead up to it
    (a space, a delimiter) are followed. NaN where neither label has probability.

    Args:
        lm: A model with ``logits``.
        prefixes: n prefixes.
        law: Temperature and nucleus of the tokens.
        prune: Leading tokens of less probability are not followed.
    """
    texts = list(lm.vocabulary)
    found = torch.zeros(len(prefixes), 2, dtype=torch.float64)
    nodes = [_Node(k, "", 1.0, prefix) for k, prefix in enumerate(prefixes)]
    sorted_tokens: dict[str, tuple[Tensor, Tensor, list[int]]] = {}
    while nodes:
        probs = law_log_probs(
            lm.next_log_probs([n.prefix for n in nodes]).double().cpu(), law
        ).exp()
        below = []
        for node, row in zip(nodes, probs, strict=True):
            if node.text not in sorted_tokens:
                sorted_tokens[node.text] = _label_tokens(texts, node.text)
            zeros, ones, lead = sorted_tokens[node.text]
            found[node.root, 0] += node.mass * row[zeros].sum()
            found[node.root, 1] += node.mass * row[ones].sum()
            for token in lead:
                mass = node.mass * float(row[token])
                if mass > prune:
                    old, text = node.prefix, node.prefix.text + texts[token]
                    prefix = Prefix(old.prompt, (*old.tokens, token), old.start, text)
                    below.append(_Node(node.root, node.text + texts[token], mass, prefix))
        nodes = below
    return found[:, 1] / found.sum(-1)


def _label_tokens(texts: Sequence[str], before: str) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens that hold label 0, that hold label 1, and that only lead up to one."""
    labels = [read_label(before + text) for text in texts]
    ids = [torch.tensor([k for k, label in enumerate(labels) if label == want]) for want in (0, 1)]
    lead = [k for k, text in enumerate(texts) if text and _LEAD.fullmatch(before + text)]
    return ids[0].long(), ids[1].long(), lead

"""Exact likelihoods as potentials: text guided by data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.model import lacks
from probkit.models.language.potentials.ratings import log_scores
from probkit.models.language.protocol import Prefix

__all__ = ["LikelihoodPotential", "ModelLikelihood"]


@storable
@dataclass(frozen=True)
class ModelLikelihood:
    """The likelihood of a probkit model as a function of values read from text.

    Args:
        model: Has ``log_likelihood(values, data)``.
        data: Its data.
        site: Name of the site that a bare number or list is a value of; None where what is read
            is a mapping of names to values.

    Raises:
        CapabilityError: The model has no ``log_likelihood``.
    """

    model: Any
    data: Any
    site: str | None = None

    def __post_init__(self) -> None:
        if lacks(self.model, ("log_likelihood",)):
            raise CapabilityError(
                f"ModelLikelihood needs log_likelihood(values, data); {type(self.model).__name__} "
                "lacks it. Pass a function of the answer to LikelihoodPotential"
            )

    def __call__(self, answer: Any) -> float:
        """Return log p(data | answer)."""
        named = answer if isinstance(answer, Mapping) else {self.site or "value": answer}
        if not isinstance(answer, Mapping) and self.site is None:
            raise DataError(
                f"ModelLikelihood: expected values by name, got {answer!r}; say which site= it is"
            )
        values = {name: torch.as_tensor(v, dtype=torch.float64) for name, v in named.items()}
        with torch.no_grad():
            return float(self.model.log_likelihood(values, self.data))


@storable
@dataclass(frozen=True)
class LikelihoodPotential:
    """V = p(data | answer), the answer read from the text: the language model is the prior.

    The weighted answers are then draws from p(answer | data), proportional to
    p_LM(text) p(data | answer).

    Args:
        log_likelihood: Answer -> log density of the data, or a :class:`ModelLikelihood`.
        parse: Text -> answer; None where there is none.
        early: Whether unfinished texts that can be read already are weighed, too. It changes which
            texts survive on the way, not the target: values telescope. Wrong early readings (the
            "1" of "12") waste particles.
        unparsed: Log value of a finished text without an answer.

    Raises:
        DataError: Not functions; later, a log likelihood that is NaN or plus infinity.

    Example:
        >>> coin = LikelihoodPotential(lambda p: -((p - 0.5) ** 2), float)
        >>> coin.log_value([Prefix("p?", text="0.3")], [True]).item()
        -0.04000000000000001
    """

    log_likelihood: Callable[[Any], float]
    parse: Callable[[str], Any]
    early: bool = False
    unparsed: float = -float("inf")

    kind = "value"

    def __post_init__(self) -> None:
        if not callable(self.log_likelihood) or not callable(self.parse):
            raise DataError(
                "LikelihoodPotential: expected functions log_likelihood(answer) and parse(text), "
                f"got {self.log_likelihood!r} and {self.parse!r}"
            )

    def log_value(self, prefixes: Sequence[Prefix], finished: Sequence[bool]) -> Tensor:
        """Return the log likelihood of each finished answer, [n]; 0 for texts on the way."""
        result = torch.zeros(len(prefixes), dtype=torch.float64)
        known: dict[str, float] = {}
        for k, (prefix, ends) in enumerate(zip(prefixes, finished, strict=True)):
            if not (ends or (self.early and prefix.text)):
                continue
            if prefix.text not in known:
                known[prefix.text] = self._one(prefix.text)
            value = known[prefix.text]
            result[k] = (self.unparsed if ends else 0.0) if math.isnan(value) else value
        return result

    def _one(self, text: str) -> float:
        """Log likelihood of one text; NaN where it has no answer."""
        answer = self.parse(text)
        if answer is None:
            return float("nan")
        score = [self.log_likelihood(answer)]
        return float(log_scores("LikelihoodPotential", score, [text], probability=False))

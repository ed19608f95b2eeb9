"""Arithmetic on measurements: paired ratios, their spread, and whether results agree."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.harness.spec import Agreement, Fingerprint

__all__ = ["Spread", "disagreement", "paired_ratio", "quantile"]


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and range of the ratios of one comparison."""

    median: float
    q25: float
    q75: float
    low: float
    high: float

    def meets(self, bound: float) -> bool:
        """Whether the median is at or below `bound`."""
        return self.median <= bound

    def clear_of(self, bound: float) -> bool:
        """Whether both quartiles lie on the same side of `bound`."""
        return self.q75 <= bound or self.q25 > bound


def quantile(values: Sequence[float], q: float) -> float:
    """Return the `q` quantile by linear interpolation between order statistics.

    Args:
        values: Numbers, at least one.
        q: Between 0 and 1.

    Example:
        >>> quantile([1.0, 2.0, 4.0], 0.25)
        1.5
    """
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def paired_ratio(ours: Sequence[float], peer: Sequence[float]) -> Spread:
    """Return the spread of ``ours[k] / peer[k]`` over rounds k.

    Ratios are taken inside a round, where both sides met the same load, and summarised after.

    Args:
        ours: Seconds of our contender, one per round.
        peer: Seconds of the peer, one per round.

    Raises:
        ValueError: The two have other lengths, are empty, or a time is not positive.

    Example:
        >>> paired_ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]).median
        1.0
    """
    if len(ours) != len(peer) or not ours:
        raise ValueError(f"expected equal numbers of rounds, got {len(ours)} and {len(peer)}")
    if min(*ours, *peer) <= 0:
        raise ValueError("a measured time is not positive: the work is too short for the clock")
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return Spread(
        median=statistics.median(ratios),
        q25=quantile(ratios, 0.25),
        q75=quantile(ratios, 0.75),
        low=min(ratios),
        high=max(ratios),
    )


def disagreement(ours: Fingerprint, peer: Fingerprint, rule: Agreement) -> tuple[float, str]:
    """Compare two fingerprints.

    Args:
        ours: Named numbers of our result.
        peer: Named numbers of the peer's result.
        rule: The keys compared and the tolerance.

    Returns:
        The largest ``|ours - peer|`` and a sentence on the first violation, empty where all agree.

    Example:
        >>> disagreement({"k": [1.0]}, {"k": [1.5]}, Agreement(("k",), atol=0.1))
        (0.5, 'k[0] is 1 in ours and 1.5 in the peer, allowed difference 0.1')
    """
    worst, problem = 0.0, ""
    for key in rule.keys:
        a, b = list(ours.get(key, ())), list(peer.get(key, ()))
        if len(a) != len(b) or not a:
            return math.inf, f"{key} has {len(a)} numbers in ours and {len(b)} in the peer"
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            gap, allowed = abs(x - y), rule.atol + rule.rtol * abs(y)
            worst = max(worst, math.inf if math.isnan(gap) else gap)
            if not gap <= allowed and not problem:
                problem = (
                    f"{key}[{i}] is {x:.12g} in ours and {y:.12g} in the peer, "
                    f"allowed difference {allowed:.3g}"
                )
    return worst, problem

"""Extrapolate learning curves in one forward pass of a network trained on a prior over them.

Source: Adriaensen, Rakotoarison, Mueller and Hutter (2023), "Efficient Bayesian learning curve
extrapolation using prior-data fitted networks".
"""

from __future__ import annotations

import bisect
import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.data import as_tensor, convert
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import register
from probkit.fingerprint import digest
from probkit.model import Model, Site, Values
from probkit.models.pfn.bars import BarDistribution
from probkit.models.pfn.curve_predictive import CurvePredictive
from probkit.models.pfn.curve_prior import CurvePrior
from probkit.models.pfn.curve_task import (
    EPOCH_FEATURES,
    METRIC_FEATURES,
    encode_epochs,
    encode_metric,
)
from probkit.models.pfn.curves import GRID, Curves
from probkit.models.pfn.network import PFNNetwork, PFNSize
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.stopping import StopDecision, check_delta
from probkit.models.pfn.surprise import OutOfPriorWarning, PriorCheck, check_prior, falling
from probkit.models.pfn.weight_files import load_weights
from probkit.numerics import check_allocation
from probkit.posterior import Context, Posterior
from probkit.rng import Rng, stream
from probkit.sampler import Sampler
from probkit.sources import Closed

__all__ = ["LearningCurvePFN"]

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "curves.safetensors"
_CHECKED = 256  # curves of a batch that are looked at for a warning
_TOKENS = 1 << 13  # tokens of one forward pass: bounds memory, and keeps the work in cache
_FEWEST = 16  # curves of equal length that are worth a pass without a mask


@dataclass(frozen=True, eq=False)
class LearningCurvePFN(Model):
    """A predictor of learning curves: conditioning is one forward pass.

    ``infer(lc, Curves(t, y, normalizer=...), rng=0).predict(t_future)`` and the direct
    ``lc.predict(y, normalizer=...)`` give the same laws, for one curve or thousands.

    Args:
        network: The trained network.
        borders: [bar + 1] borders of its bars.
        card: How it was trained and how well it does.
        out_of_prior: What to do with curves that the prior cannot explain: "warn" or "ignore".

    Example:
        >>> from probkit.models.pfn import CurveNormalizer
        >>> lc = LearningCurvePFN.load()
        >>> seen = [0.31, 0.42, 0.49, 0.54, 0.57, 0.60]
        >>> ahead = lc.predict(seen, normalizer=CurveNormalizer.accuracy(), horizon=50)
        >>> ahead.median.shape
        torch.Size([44])
        >>> bool(lc.should_stop(seen, 0.2, normalizer=CurveNormalizer.accuracy(), horizon=50))
        False
    """

    network: PFNNetwork
    borders: Tensor
    card: Mapping[str, Any]
    out_of_prior: Literal["warn", "ignore"] = "warn"

    def __post_init__(self) -> None:
        if self.out_of_prior not in ("warn", "ignore"):
            raise DataError(
                f"LearningCurvePFN: expected out_of_prior 'warn' or 'ignore', got "
                f"{self.out_of_prior!r}"
            )

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        out_of_prior: Literal["warn", "ignore"] = "warn",
    ) -> LearningCurvePFN:
        """Read trained weights.

        Args:
            path: A weight file; None takes the one in the package.
            device: Where to put the network.
            out_of_prior: See the class.

        Raises:
            DataError: The file is missing, damaged, or of another prior or version.
        """
        file = load_weights(path or DEFAULT_WEIGHTS, prior=CurvePrior().version)
        if file.borders is None:
            raise DataError(f"{str(path)!r} has no borders; expected weights with a bar head")
        size = PFNSize(**file.network)
        if (size.features, size.targets) != (EPOCH_FEATURES, METRIC_FEATURES):
            raise DataError(
                f"{str(path)!r} encodes an epoch by {size.features} numbers and a value by "
                f"{size.targets}, expected {EPOCH_FEATURES} and {METRIC_FEATURES}; train it anew"
            )
        network = PFNNetwork(size, generator=stream(0, "unused"))
        file.fill(network)
        network = network.to(device).eval().requires_grad_(False)
        return cls(network, file.borders.to(device), dict(file.card), out_of_prior)

    # ---------------------------------------------------------------- the contract of a model

    def sites(self, data: Any = None) -> Mapping[str, Site]:
        """Return no sites: the parameters of the curves are integrated out by the network."""
        return {}

    def prepare(self, data: Any) -> Curves:
        """Check that the data are :class:`Curves`."""
        if not isinstance(data, Curves):
            raise DataError(
                f"LearningCurvePFN: expected Curves(t, y, normalizer=...), got "
                f"{type(data).__name__}"
            )
        return data

    def sampler(self) -> Sampler:
        """Return ``Direct()``."""
        from probkit.inference import Direct

        return Direct()

    def condition(self, data: Curves, hyper: Values | None) -> Posterior:
        """Return the posterior of the curves ``data``."""
        if hyper:
            raise CapabilityError(
                f"LearningCurvePFN has no hyper-parameters, got {', '.join(hyper)}"
            )
        curves = self.prepare(data)
        self._warn(curves)
        return Posterior(
            source=Closed(), model=self, context=Context(curves), attrs={"weights": self.mark}
        )

    def predict(
        self,
        post: Any,
        x: Any = None,
        *,
        site: str | None = None,
        joint: bool = False,
        groups: Mapping[str, Sequence[Any]] | None = None,
        rng: Rng | None = None,
        t: Any = None,
        normalizer: CurveNormalizer | None = None,
        horizon: int = GRID,
        every: int = 1,
    ) -> CurvePredictive:
        """Predict the metric at future steps.

        Args:
            post: A posterior, :class:`Curves`, or the values observed: [step] of one curve,
                [curve, step], or a list of arrays.
            x: Future steps, [step] for all curves or [curve, step]. None takes all steps after the
                longest observed curve, up to the horizon.
            site: Only None: a new observation, noise included.
            joint: Only False: the network knows the law of each step, not their dependence.
            groups: Only None.
            rng: Not needed.
            t: Steps of the values observed; None numbers them 1, 2, 3, ... Used, as the next three,
                where ``post`` holds bare values.
            normalizer: Map of the metric.
            horizon: Last step of the curves.
            every: Keep every ``every``-th point.

        Returns:
            Laws of shape [step] for one curve, else [curve, step].

        Raises:
            DataError: A step asked for is not after the last observed one or beyond the horizon.
            CapabilityError: A joint law or a latent is asked for.
        """
        if joint or site is not None or groups:
            raise CapabilityError(
                "LearningCurvePFN predicts new observations step by step: expected joint=False, "
                "site=None and no groups; for paths of one curve use curve_posterior"
            )
        if isinstance(post, Posterior):
            curves = self.prepare(post.context.data)
        else:
            curves = self._curves(post, t, normalizer, horizon, every)
            self._warn(curves)
        steps = self._future(curves, x)
        return CurvePredictive(
            self.law(curves, steps), curves.normalizer, steps, curves.single, _precision(curves)
        )

    # ---------------------------------------------------------------- decisions and checks

    def should_stop(
        self,
        y: Any,
        y_best: Any,
        *,
        delta: float = 0.05,
        t: Any = None,
        normalizer: CurveNormalizer | None = None,
        horizon: int = GRID,
        every: int = 1,
    ) -> StopDecision:
        """Decide whether a run has no fair chance left: see :mod:`probkit.models.pfn.stopping`.

        Args:
            y: Values observed, or :class:`Curves`.
            y_best: The value to beat, a number or [curve]; None where there is none yet, which
                stops nothing.
            delta: Largest probability of success at which a run is stopped.
            t: As in :meth:`predict`.
            normalizer: As in :meth:`predict`.
            horizon: As in :meth:`predict`.
            every: As in :meth:`predict`.

        Raises:
            DataError: ``delta`` is no probability, ``y_best`` lies outside the bounds, or a curve
                has reached its horizon.
        """
        check_delta(delta)
        curves = self._curves(y, t, normalizer, horizon, every)
        shape = () if curves.single else (len(curves),)
        best = None if y_best is None else _best(y_best, curves)  # [1] or [curve]
        chance = torch.ones(len(curves), dtype=torch.float64, device=curves.device)
        if bool((curves.last >= curves.horizon).any()):
            raise DataError(
                f"should_stop: expected a step after the last observed one, but a curve has "
                f"reached horizon={curves.horizon}; raise the horizon, or stop asking"
            )
        if best is not None:
            self._warn(curves)
            chance = self._chance(curves, best)
        chance = chance.reshape(shape)
        if best is not None:
            best = best.expand(len(curves)).reshape(shape)
        return StopDecision(chance <= delta, chance, best, float(delta))

    def check_prior(self, curves: Curves) -> PriorCheck:
        """Score the observed part of curves under the prior; see :func:`check_prior`."""
        return check_prior(self.law, curves)

    @functools.cached_property
    def mark(self) -> str:
        """A short name of the weights."""
        return digest(self.network.state_dict())[:16]

    # ---------------------------------------------------------------- the forward pass

    @torch.no_grad()
    def law(self, curves: Curves, steps: Tensor) -> BarDistribution:
        """Return the law of the normalised metric at ``steps`` [curve, step]; the network's own.

        Curves of equal length are run together, and short runs of them with their neighbours, in
        blocks that fit the cache.
        """
        device = self.borders.device
        bars = self.network.size.bars
        what = f"laws [curve={steps.shape[0]}, step={steps.shape[1]}, bar={bars}]"
        check_allocation(4 * steps.numel() * bars, what, device=device)
        out = torch.empty((*steps.shape, bars), device=device)
        t, y = curves.grid_t.to(device).float(), curves.normalized.to(device).float()
        query = encode_epochs((steps / curves.every).to(device).float())
        x, value = encode_epochs(t), encode_metric(y)
        order = curves.lengths.argsort().to(device)
        lengths = curves.lengths.to(device)
        for rows in _blocks(lengths[order], steps.shape[1]):
            rows = order[rows]
            width = int(lengths[rows[-1]])
            ragged = None if int(lengths[rows[0]]) == width else lengths[rows]
            out[rows] = self.network(x[rows, :width], value[rows, :width], query[rows], ragged)
        return BarDistribution(self.borders, out, validate_args=False)

    def _chance(self, curves: Curves, best: Tensor) -> Tensor:
        """The largest probability [curve] of being better than ``best`` at a later step."""
        chances = []
        ends = curves.horizon // curves.every * curves.every
        for rows in torch.arange(len(curves)).split(512):
            part = curves[rows]
            first = int(part.last.min()) // curves.every * curves.every + curves.every
            # a thinned grid may end before the horizon
            later = torch.tensor(
                range(first, ends + 1, curves.every) or [curves.horizon], dtype=torch.float64
            )
            steps = later.to(part.device).expand(len(part), -1)
            law = CurvePredictive(self.law(part, steps), part.normalizer, steps)
            target = best if best.numel() == 1 else best[rows].unsqueeze(-1)
            better = law.prob_better(target.expand(len(part), 1))
            ahead = steps > part.last[:, None]
            ahead = ahead | ~ahead.any(1, keepdim=True)
            chances.append(torch.where(ahead, better, 0.0).amax(1))
        return torch.cat(chances).to(curves.device)

    def _curves(
        self, y: Any, t: Any, normalizer: CurveNormalizer | None, horizon: int, every: int
    ) -> Curves:
        if isinstance(y, Curves):
            return y
        return Curves(t, convert(y).data, normalizer, horizon, every)

    def _future(self, curves: Curves, x: Any) -> Tensor:
        """Future steps [curve, step], checked."""
        last = curves.last
        if x is None:
            first = int(last.max()) + 1 if len(last) else 1
            steps = torch.arange(first, curves.horizon + 1, dtype=torch.float64)
        else:
            steps = as_tensor(convert(x).data, name="t_future").to(torch.float64)
        if steps.dim() == 0:
            steps = steps.reshape(1)
        if steps.dim() > 2 or (steps.dim() == 2 and len(steps) not in (1, len(curves))):
            raise ShapeError(
                f"predict: expected future steps [step] or [curve={len(curves)}, step], got "
                f"{tuple(steps.shape)}"
            )
        steps = steps.to(curves.device).expand(len(curves), -1)
        if steps.numel() == 0:
            raise DataError(
                f"predict: nothing lies between the last observed step {float(last.max()):g} and "
                f"horizon={curves.horizon}; raise the horizon"
            )
        if not bool(steps.isfinite().all()) or bool((steps < 1).any()):
            raise DataError("predict: expected finite future steps >= 1")
        if bool((steps > curves.horizon).any()):
            raise DataError(
                f"predict: step {float(steps.max()):g} lies beyond horizon={curves.horizon}; give "
                "Curves or predict a longer horizon (above 100 with every=)"
            )
        early = steps <= last[:, None]
        if bool(early.any()):
            curve = int(early.nonzero()[0][0])
            among = "" if curves.single else f" of curve {curve}"
            raise DataError(
                f"predict: expected steps after the last observed one{among} "
                f"({float(last[curve]):g}), got {float(steps[early][0]):g}; for curves of several "
                "lengths give steps [curve, step]"
            )
        return steps

    def _warn(self, curves: Curves) -> None:
        """Say which curves are not what the prior expects."""
        if self.out_of_prior == "ignore" or len(curves) == 0:
            return
        down = falling(curves)
        if bool(down.any()) and not curves.minimize:
            warnings.warn(
                f"{_which(down, curves)} while larger values count as better; for an error or a "
                "loss pass normalizer=CurveNormalizer.error() or .log_loss(y0)",
                OutOfPriorWarning,
                stacklevel=4,
            )
            return
        # a warning does not need every curve of a large batch
        checked = curves if len(curves) <= _CHECKED else curves[:: -(-len(curves) // _CHECKED)]
        odd = check_prior(self.law, checked).surprising
        if bool(odd.any()):
            warnings.warn(
                f"{_which(odd, checked, 'is', 'are')} not what the prior over learning curves "
                "expects (a jump, a divergence or a change of pace): predictions are not "
                "calibrated there; check_prior(curves) scores each",
                OutOfPriorWarning,
                stacklevel=4,
            )


def _which(mask: Tensor, curves: Curves, one: str = "falls", many: str = "fall") -> str:
    """Name the marked curves: "the curve", "curve 3", or "7 of 20 curves (the first is 3)"."""
    if curves.single:
        return f"the curve {one}"
    count, first = int(mask.sum()), int(mask.nonzero()[0][0])
    if len(curves) >= _CHECKED // 2:  # perhaps a part of a batch, whose numbers mean nothing
        return f"{count} of {len(curves)} curves checked {one if count == 1 else many}"
    if count == 1:
        return f"curve {first} {one}"
    return f"{count} of {len(curves)} curves {many} (the first is curve {first})"


def _precision(curves: Curves) -> torch.dtype:
    return curves.dtype if curves.dtype in (torch.float32, torch.float64) else torch.float32


def _best(y_best: Any, curves: Curves) -> Tensor:
    """The value to beat, one number or [curve], checked."""
    best = as_tensor(convert(y_best).data, name="y_best") if not isinstance(
        y_best, int | float
    ) else torch.tensor(float(y_best))  # fmt: skip
    best = best.to(curves.device, torch.float64)
    if best.numel() != 1 and tuple(best.shape) != (len(curves),):
        raise ShapeError(
            f"should_stop: expected y_best as a number or [curve={len(curves)}], got "
            f"{tuple(best.shape)}"
        )
    best = best.reshape(-1)
    if not bool(best.isfinite().all()):
        raise DataError(
            f"should_stop: expected a finite y_best, got {best.tolist()[:3]}; pass None where no "
            "run has finished"
        )
    if curves.normalizer is None:
        side = (best > 1).int() - (best < 0).int()
    else:
        spread = best[:, None] if best.numel() > 1 else best.expand(len(curves))[:, None]
        side = curves.normalizer.outside(spread).flatten().int()
    if bool((side != 0).any()):
        raise DataError(
            f"should_stop: y_best = {float(best[0]):g} lies outside the bounds of the metric; "
            "check the normalizer"
        )
    return best


def _to_tree(lc: LearningCurvePFN) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "size": asdict(lc.network.size),
        "weights": dict(lc.network.state_dict()),
        "borders": lc.borders,
        "card": dict(lc.card),
        "out_of_prior": lc.out_of_prior,
    }


def _from_tree(tree: dict[str, Any]) -> LearningCurvePFN:
    network = PFNNetwork(PFNSize(**tree["size"]), generator=stream(0, "unused"))
    network.load_state_dict(tree["weights"])
    network = network.to(tree["borders"].device).eval().requires_grad_(False)
    return LearningCurvePFN(network, tree["borders"], tree["card"], tree["out_of_prior"])


register(LearningCurvePFN, "LearningCurvePFN", _to_tree, _from_tree)


def _blocks(lengths: Tensor, queries: int) -> Iterator[slice]:
    """Cut curves sorted by length [curve] into blocks of equal or neighbouring lengths."""
    sizes = lengths.tolist()
    start = 0
    while start < len(sizes):
        stop = bisect.bisect_right(sizes, sizes[start])
        if stop - start < _FEWEST:
            stop = min(start + 256, len(sizes))
        room = max(1, _TOKENS // (sizes[stop - 1] + queries + 1))
        stop = min(stop, start + room)
        yield slice(start, stop)
        start = stop

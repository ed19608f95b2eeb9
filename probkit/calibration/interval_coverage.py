"""Coverage: how often intervals of a stated probability hold the truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probkit.calibration.replicates import (
    Quantities,
    Simulate,
    draw_pair,
    fit,
    run_all,
    scalars,
    thin,
)
from probkit.data import as_tensor, convert
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.model import lacks
from probkit.posterior import Posterior
from probkit.predictive import Predictive
from probkit.rng import Rng, draw_count, seed_of, stream

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Coverage", "clopper_pearson", "coverage", "coverage_on", "wilson"]

_LEVELS = (0.5, 0.8, 0.9, 0.95)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval for a probability, which holds it at least as often as stated.

    Example:
        >>> [round(x, 4) for x in clopper_pearson(0, 10)]
        [0.0, 0.3085]
    """
    from scipy.stats import beta

    _check_trials(successes, trials, level)
    tail = (1.0 - level) / 2.0
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.isf(tail, successes + 1, trials - successes))
    return low, high


def wilson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a probability: narrower, and right on average.

    Example:
        >>> [round(x, 4) for x in wilson(0, 10)]
        [0.0, 0.2775]
    """
    from statistics import NormalDist

    _check_trials(successes, trials, level)
    z = NormalDist().inv_cdf(0.5 + level / 2.0)
    share, weight = successes / trials, z * z / trials
    centre = (share + weight / 2.0) / (1.0 + weight)
    half = z / (1.0 + weight) * (share * (1.0 - share) / trials + weight / (4.0 * trials)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _check_trials(successes: int, trials: int, level: float) -> None:
    if not 0 <= successes <= trials or trials < 1:
        raise DataError(f"expected 0 <= successes <= trials >= 1, got {successes} of {trials}")
    if not 0.0 < level < 1.0:
        raise DataError(f"expected a level between 0 and 1, got {level}")


@dataclass(frozen=True, repr=False)
class Coverage:
    """Probability transforms of truths, from which the coverage of every interval follows.

    Attributes:
        pits: Name -> [unit, entry] values F(truth) of the predicted distribution function, uniform
            if calibrated. Units are independent (replicates, or held-out observations); the
            entries of one unit may depend on each other.
        complete: False after an interruption.
    """

    pits: Mapping[str, Tensor]
    complete: bool = True

    def __repr__(self) -> str:
        """Say what is covered how often."""
        shares = self.table((0.9,))["coverage"].tolist()
        parts = [f"{name}: {share:.3f}" for name, share in zip(self.pits, shares, strict=True)]
        shown = ", ".join(parts[:4]) + (", ..." if len(parts) > 4 else "")
        return f"Coverage(of 90% intervals: {shown})"

    def table(self, levels: Sequence[float] = _LEVELS, *, confidence: float = 0.95) -> pd.DataFrame:
        """Tabulate coverage, indexed by name and level.

        Columns: coverage; low and high, an interval for the true coverage: that of Clopper and
        Pearson where each unit has one entry, else from the spread of the units' own shares (a
        t interval, clipped to [0, 1]); units.

        Args:
            levels: Probabilities of the central intervals.
            confidence: Probability with which low and high hold the true coverage.
        """
        import pandas as pd

        for level in levels:
            if not 0.0 < level < 1.0:
                raise DataError(f"table: expected levels between 0 and 1, got {level}")
        rows = {
            (name, level): _row(pit, level, confidence)
            for name, pit in self.pits.items()
            for level in levels
        }
        table = pd.DataFrame.from_dict(rows, orient="index")
        table.index = pd.MultiIndex.from_tuples(list(rows), names=["name", "level"])
        return table

    def plot(self, names: Sequence[str] | None = None) -> Figure:
        """Draw empirical against nominal coverage.

        Args:
            names: Which; by default at most eight.
        """
        from probkit.plots import coverage_plot, figure

        chosen = list(self.pits)[:8] if names is None else list(names)
        unknown = [name for name in chosen if name not in self.pits]
        if unknown or not chosen:
            raise DataError(
                f"plot: expected names among {', '.join(self.pits)}, got "
                f"{', '.join(unknown) or 'none'}"
            )
        made, axes = figure(size=(4.4, 4.2))
        coverage_plot(axes[0, 0], {name: self.pits[name].numpy() for name in chosen})
        return made


def _row(pit: Tensor, level: float, confidence: float) -> dict[str, float]:
    from scipy.stats import t

    inside = ((pit - 0.5).abs() <= level / 2).double()
    units, entries = inside.shape
    share = float(inside.mean())
    if entries == 1:
        low, high = clopper_pearson(int(inside.sum()), units, confidence)
    elif units < 2:
        low, high = 0.0, 1.0
    else:
        error = float(inside.mean(1).std()) / units**0.5
        half = float(t.ppf(0.5 + confidence / 2, units - 1)) * error
        low, high = max(0.0, share - half), min(1.0, share + half)
    return {"coverage": share, "low": low, "high": high, "units": units}


# --------------------------------------------------------------------------- simulated data


@dataclass(frozen=True)
class _Replicate:
    """Draws a truth and two data sets, fits the first, and transforms truth and second."""

    model: Any
    sampler: Any
    draws: int
    seed: int
    simulate: Simulate | None
    quantities: Quantities | None
    inputs: Callable[[Any], Any] | None
    predictions: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, number: int) -> dict[str, Tensor] | None:
        seed = seed_of(stream(self.seed, "replicate", number))
        truth, data = draw_pair(self.model, self.simulate, stream(seed, "truth"))
        try:
            post = fit(self.model, data, self.sampler, stream(seed, "fit"), self.options)
        except Exception as error:
            error.add_note(f"in replicate {number} of the coverage, rng={self.seed}")
            raise
        if not post.attrs.get("complete", True):
            return None
        pits = self._latents(post, truth, data, seed)
        if self.predictions:
            pits["prediction"] = self._prediction(post, truth, data, seed)
        return pits

    def _latents(
        self, post: Posterior, truth: Mapping[str, Tensor], data: Any, seed: int
    ) -> dict[str, Tensor]:
        taken = thin(post, self.draws, stream(seed, "thin"))
        both = {name: torch.cat([truth[name][None].to(v), v]) for name, v in taken.items()}
        found = scalars(self.model, both, data, quantities=self.quantities, log_joint=False)
        uniform = torch.rand(len(found), generator=stream(seed, "ties"), dtype=torch.float64)
        return {
            name: ((x[1:] < x[0]).sum() + u * (1 + (x[1:] == x[0]).sum()))[None] / len(x)
            for (name, x), u in zip(found.items(), uniform, strict=True)
        }

    def _prediction(
        self, post: Posterior, truth: Mapping[str, Tensor], data: Any, seed: int
    ) -> Tensor:
        """Transform new observations, drawn at the same truth and inputs."""
        x = self.inputs(data) if self.inputs is not None else _inputs_of(self.model, data)
        lead = {name: value[None] for name, value in truth.items()}
        new = self.model.simulate(lead, x, rng=stream(seed, "new"))
        if isinstance(new, Mapping):
            if len(new) != 1:
                raise CapabilityError(
                    f"coverage: expected one observed site to predict, got {', '.join(new)}; pass "
                    "predictions=False"
                )
            new = next(iter(new.values()))
        predictive = post.predict(x, rng=stream(seed, "predict"))
        return transforms(predictive, new[0])


def _inputs_of(model: Any, data: Any) -> Any:
    """Return the inputs of a data set: all of a mapping, or what comes before y in (X, y)."""
    if isinstance(data, Mapping):
        return {k: v for k, v in data.items() if k not in getattr(model, "observed", ())}
    if isinstance(data, tuple) and len(data) == 2:
        return data[0]
    raise CapabilityError(
        f"coverage: where are the inputs in data of type {type(data).__name__}? Pass "
        "inputs=<function(data) -> x>, or predictions=False"
    )


def transforms(predictive: Predictive, y: Tensor) -> Tensor:
    """Return F(y) [entry] of every observation under its predictive."""
    shape = tuple(predictive.mean.shape)
    if tuple(y.shape) != shape:
        raise ShapeError(f"coverage: expected y of shape [*obs] = {shape}, got {tuple(y.shape)}")
    with torch.no_grad():
        pit = predictive.cdf(y)
    return pit.detach().cpu().double().clamp(0.0, 1.0).flatten()


def coverage(
    model: Any,
    sampler: Any = None,
    *,
    n: int = 100,
    draws: int = 199,
    rng: Rng,
    simulate: Simulate | None = None,
    quantities: Quantities | None = None,
    predictions: bool | None = None,
    inputs: Callable[[Any], Any] | None = None,
    guide: Any = None,
    chains: int = 1,
    executor: Executor | None = None,
) -> Coverage:
    """Measure how often intervals hold the truth, over data sets drawn from the model.

    For each of ``n`` truths drawn from the prior a data set is drawn and fitted. Intervals of the
    latents are held against the truth, intervals of predictions (``"prediction"``) against new
    observations at the same inputs. Outcomes have to be continuous.

    Ctrl-C returns the replicates so far, marked by ``complete=False``.

    Args:
        model: A model that can be simulated (``sample_dataset``, and ``simulate`` for predictions).
        sampler: As for :func:`probkit.infer`; None takes the model's own choice.
        n: Number of data sets.
        draws: Posterior draws that a latent is ranked among.
        rng: Seed. Replicate ``k`` has its own stream, whatever ``n`` and the executor.
        simulate: Function (generator) -> (values, data), as for :func:`sbc`.
        quantities: Function (values, data) -> {name: [n]}, in place of the entries of the sites.
        predictions: Whether to check predictions; None where the model has ``simulate`` and
            ``predict``.
        inputs: Function data -> x, the inputs to predict at; by default what comes before y in
            (X, y), or the entries of a mapping that are not observed.
        guide: As for :func:`probkit.infer`.
        chains: Chains of each fit.
        executor: Any ``concurrent.futures.Executor``; replicates run on it.

    Raises:
        CapabilityError: The model cannot be simulated, or its inputs cannot be told from its data.
        DataError: The posterior has fewer than ``draws`` draws.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import probkit as pk
        >>> from probkit.inference import ImportanceSampling
        >>> zeros = torch.zeros(4, dtype=torch.float64)
        >>> def location(x, y=None):
        ...     mu = pyro.sample("mu", dist.Normal(x[0], 1.0))
        ...     with pyro.plate("row", 4):
        ...         pyro.sample("obs", dist.Normal(mu + x, 1.0), obs=y)
        >>> model = pk.FromPyro(location, observed={"y": "obs"}, inputs={"x": zeros})
        >>> sampler = ImportanceSampling(500, proposal="prior")
        >>> found = coverage(model, sampler, n=5, draws=50, rng=0)
        >>> sorted(found.pits)
        ['mu', 'prediction']
    """
    n, draws = draw_count(n, "coverage: n"), draw_count(draws, "coverage: draws")
    if predictions is None:
        predictions = not lacks(model, ("simulate", "predict"))
    missing = lacks(model, ("simulate", "predict")) if predictions else []
    if missing:
        raise CapabilityError(
            f"coverage of predictions needs {', '.join(missing)}, which {type(model).__name__} "
            "lacks; pass predictions=False"
        )
    task = _Replicate(
        model,
        sampler,
        draws,
        seed_of(rng),
        simulate,
        quantities,
        inputs,
        predictions,
        {"chains": chains, "guide": guide},
    )
    results, complete = run_all(task, n, executor)
    pits = {name: _stack([found[name] for found in results], name) for name in results[0]}
    return Coverage(pits, complete)


def _stack(parts: Sequence[Tensor], name: str) -> Tensor:
    sizes = {len(part) for part in parts}
    if len(sizes) > 1:
        raise ShapeError(
            f"coverage: expected as many entries of {name!r} in every data set, got {sorted(sizes)}"
        )
    return torch.stack(list(parts))


# --------------------------------------------------------------------------- held-out data


def coverage_on(
    source: Posterior | Predictive | Mapping[str, Predictive],
    y: Any,
    *,
    x: Any = None,
    rng: Rng | None = None,
) -> Coverage:
    """Measure how often predictive intervals hold held-out observations.

    Observations count as independent given the model, which the intervals of
    :meth:`Coverage.table` rest on. Outcomes have to be continuous.

    Args:
        source: A posterior (give ``x``), a predictive, or several predictives by name.
        y: Held-out observations [*obs].
        x: Inputs of ``y``, where ``source`` is a posterior.
        rng: Needed where the prediction draws random numbers.

    Raises:
        DataError: ``x`` is missing, or NaN is in ``y``.
        ShapeError: ``y`` has not the shape of the prediction.

    Example:
        >>> from probkit.predictive import Analytic
        >>> predictive = Analytic(torch.distributions.Normal(torch.zeros(200), 1.0))
        >>> y = torch.randn(200, generator=torch.Generator().manual_seed(0))
        >>> row = coverage_on(predictive, y).table((0.9,)).iloc[0]
        >>> bool(row.low < 0.9 < row.high)
        True
    """
    if isinstance(source, Posterior):
        if x is None:
            raise DataError("coverage_on: expected x=<inputs of y> with a posterior, got none")
        source = source.predict(convert(x).data, rng=rng)
    several = source if isinstance(source, Mapping) else {"prediction": source}
    observed = as_tensor(y, name="y")
    if not bool(torch.isfinite(observed).all()):
        place = np.argwhere(~np.isfinite(observed.detach().cpu().numpy()))[0].tolist()
        raise DataError(f"coverage_on: expected finite y, entry {place} is not; remove it")
    return Coverage({name: transforms(p, observed)[:, None] for name, p in several.items()})

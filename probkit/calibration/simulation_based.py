"""Simulation-based calibration: over data from the prior, ranks of the truth are uniform."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from probkit.calibration.interval_coverage import Coverage
from probkit.calibration.replicates import (
    Quantities,
    Simulate,
    draw_pair,
    fit,
    run_all,
    scalars,
    smallest_ess,
    thin,
)
from probkit.calibration.uniformity import chi_square_p_value, ecdf_p_value
from probkit.errors import ConvergenceWarning, DataError
from probkit.rng import Rng, draw_count, seed_of, stream

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SBC", "sbc"]

Test = Literal["ecdf", "chi2"]


@dataclass(frozen=True, repr=False)
class SBC:
    """Ranks of true values among posterior draws.

    Attributes:
        ranks: Quantity -> [replicate] number of draws below the truth, from 0 to ``draws``.
        draws: Draws that each truth was ranked among.
        ess: [replicate] smallest effective sample size of the fit; infinite where draws are
            independent by construction.
        complete: False after an interruption.
    """

    ranks: Mapping[str, Tensor]
    draws: int
    ess: Tensor
    complete: bool = True

    @property
    def replicates(self) -> int:
        """Number of data sets that were fitted."""
        return len(self.ess)

    def __repr__(self) -> str:
        """Say what it is, and the smallest p-value."""
        worst = min(self.p_values().items(), key=lambda item: item[1])
        return (
            f"SBC({self.replicates} replicates, {len(self.ranks)} quantities, draws={self.draws}, "
            f"smallest p-value {worst[1]:.2g} of {worst[0]})"
        )

    def p_values(self, test: Test = "ecdf") -> dict[str, float]:
        """Return the p-value of each quantity's ranks being uniform.

        Args:
            test: "ecdf", exact, by the largest deviation of the distribution function; or "chi2".
        """
        if test not in ("ecdf", "chi2"):
            raise DataError(f"p_values: expected test='ecdf' or 'chi2', got {test!r}")
        p_value = ecdf_p_value if test == "ecdf" else chi_square_p_value
        return {name: p_value(ranks.numpy(), self.draws) for name, ranks in self.ranks.items()}

    def passed(self, level: float = 0.01) -> bool:
        """Whether no quantity is rejected, all tests together at ``level`` (Bonferroni)."""
        return min(self.p_values().values()) * len(self.ranks) > level

    def summary(self) -> pd.DataFrame:
        """Tabulate each quantity: p-values, and mean and spread of the ranks.

        ``centre`` is the mean rank over draws / 2 and ``spread`` its standard deviation over that
        of uniform ranks, both 1 for a calibrated posterior. A centre below 1 means posteriors that
        lie too high, a spread above 1 posteriors that are too narrow.
        """
        import pandas as pd

        rows = {}
        ecdf, chi = self.p_values(), self._chi_square()
        uniform_sd = ((self.draws + 1) ** 2 / 12 - 1 / 12) ** 0.5
        for name, ranks in self.ranks.items():
            values = ranks.double()
            rows[name] = {
                "p_ecdf": ecdf[name],
                "p_chi2": chi.get(name, float("nan")),
                "centre": float(values.mean()) / (self.draws / 2),
                "spread": float((values - self.draws / 2).square().mean().sqrt()) / uniform_sd,
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _chi_square(self) -> dict[str, float]:
        return self.p_values("chi2") if self.replicates >= 10 else {}

    def coverage(self, *, rng: Rng = 0) -> Coverage:
        """Return the coverage of central intervals, from the same ranks.

        Args:
            rng: Breaks ties: the probability transform is (rank + uniform) / (draws + 1).
        """
        generator = stream(rng, "ties")
        pits = {
            name: (
                ranks.double() + torch.rand(len(ranks), generator=generator, dtype=torch.float64)
            )
            / (self.draws + 1)
            for name, ranks in self.ranks.items()
        }
        return Coverage({name: pit[:, None] for name, pit in pits.items()}, complete=self.complete)

    def plot(self, quantities: Sequence[str] | None = None) -> Figure:
        """Draw rank histograms above differences of distribution functions.

        Args:
            quantities: Which; by default the four with the smallest p-values.
        """
        from probkit.plots import ecdf_difference_plot, figure, rank_plot

        if quantities is None:
            p_values = self.p_values()
            quantities = sorted(p_values, key=lambda name: p_values[name])[:4]
        unknown = [name for name in quantities if name not in self.ranks]
        if unknown or not quantities:
            raise DataError(
                f"plot: expected quantities among {', '.join(self.ranks)}, got "
                f"{', '.join(unknown) or 'none'}"
            )
        made, axes = figure(2, len(quantities), size=(3.4 * len(quantities), 4.8), sharey="row")
        for name, column in zip(quantities, axes.T, strict=True):
            rank_plot(column[0], self.ranks[name].numpy(), self.draws, label=name)
            ecdf_difference_plot(column[1], {name: self.ranks[name].numpy()}, self.draws)
        for axis in axes[:, 1:].ravel():
            axis.set_ylabel("")
        return made


@dataclass(frozen=True)
class _Replicate:
    """Draws a truth and data, fits, and ranks; what an executor's worker does."""

    model: Any
    sampler: Any
    draws: int
    seed: int
    simulate: Simulate | None
    quantities: Quantities | None
    log_joint: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, number: int) -> tuple[dict[str, int], float] | None:
        root = stream(self.seed, "replicate", number)
        seed = seed_of(root)
        truth, data = draw_pair(self.model, self.simulate, stream(seed, "truth"))
        try:
            post = fit(self.model, data, self.sampler, stream(seed, "fit"), self.options)
        except Exception as error:
            error.add_note(f"in replicate {number} of the calibration, rng={self.seed}")
            raise
        if not post.attrs.get("complete", True):
            return None
        taken = thin(post, self.draws, stream(seed, "thin"))
        both = {name: torch.cat([truth[name][None].to(v), v]) for name, v in taken.items()}
        found = scalars(
            self.model, both, data, quantities=self.quantities, log_joint=self.log_joint
        )
        ties = stream(seed, "ties")
        return {name: _rank(x, ties) for name, x in found.items()}, smallest_ess(post)


def _rank(values: Tensor, rng: torch.Generator) -> int:
    """Return the rank of the first among the others; ties are broken at random."""
    truth, others = values[0], values[1:]
    below, equal = int((others < truth).sum()), int((others == truth).sum())
    return below + int(torch.randint(equal + 1, (), generator=rng))


def sbc(
    model: Any,
    sampler: Any = None,
    *,
    n: int = 100,
    draws: int = 99,
    rng: Rng,
    simulate: Simulate | None = None,
    quantities: Quantities | None = None,
    log_joint: bool = True,
    guide: Any = None,
    chains: int = 1,
    executor: Executor | None = None,
) -> SBC:
    """Test a sampler by simulation-based calibration (Talts et al. 2018).

    Draws ``n`` truths from the prior and a data set from each, fits every data set, and ranks the
    truth among ``draws`` posterior draws. If prior, likelihood and sampler agree, every rank is
    uniform on 0, ..., draws, whatever the model.

    Autocorrelated draws would spread the ranks too far, so draws are thinned evenly over all
    chains; a warning says where their effective sample size falls short of ``draws``.

    Ctrl-C returns the replicates so far, marked by ``complete=False``.

    Args:
        model: A model that can be simulated (``sample_dataset``), or any with ``simulate``.
        sampler: As for :func:`probkit.infer`; None takes the model's own choice.
        n: Number of data sets.
        draws: Posterior draws that a truth is ranked among.
        rng: Seed. Replicate ``k`` has its own stream, whatever ``n`` and the executor.
        simulate: Function (generator) -> (values {site: [*site]}, data), in place of the model's
            own simulation.
        quantities: Function (values {site: [n, *site]}, data) -> {name: [n]}, the scalars to rank;
            by default every entry of every site.
        log_joint: Rank the log joint as well, where ``quantities`` is None and the model has one.
        guide: As for :func:`probkit.infer`.
        chains: Chains of each fit.
        executor: Any ``concurrent.futures.Executor``; replicates run on it.

    Returns:
        The ranks, with tests and plots.

    Raises:
        CapabilityError: The model cannot be simulated, or the sampler gives a point estimate.
        DataError: The posterior has fewer than ``draws`` draws.

    Warns:
        ConvergenceWarning: Draws are autocorrelated in a tenth of the replicates or more.

    Example:
        >>> from torch.distributions import constraints
        >>> from probkit.inference import ImportanceSampling
        >>> from probkit.model import Model, Site
        >>> class Location(Model):
        ...     batched = True
        ...     def sites(self, data):
        ...         return {"mu": Site((), constraints.real)}
        ...     def log_likelihood(self, values, data):
        ...         return -0.5 * (data - values["mu"][..., None]).square().sum(-1)
        ...     def log_joint(self, values, data, *, scale=1.0):
        ...         return self.log_likelihood(values, data) - 0.5 * values["mu"].square()
        ...     def sample_prior(self, n, *, rng):
        ...         return {"mu": torch.randn(n, generator=stream(rng), dtype=torch.float64)}
        >>> def pair(rng):
        ...     mu = torch.randn((), generator=rng, dtype=torch.float64)
        ...     return {"mu": mu}, mu + torch.randn(3, generator=rng, dtype=torch.float64)
        >>> sampler = ImportanceSampling(1000, proposal="prior")
        >>> result = sbc(Location(), sampler, n=20, draws=9, rng=0, simulate=pair)
        >>> result.replicates, sorted(result.ranks)
        (20, ['log_joint', 'mu'])
    """
    n, draws = draw_count(n, "sbc: n"), draw_count(draws, "sbc: draws")
    options = {"chains": chains, "guide": guide}
    task = _Replicate(model, sampler, draws, seed_of(rng), simulate, quantities, log_joint, options)
    results, complete = run_all(task, n, executor)
    names = results[0][0]
    ranks = {name: torch.tensor([found[name] for found, _ in results]) for name in names}
    ess = torch.tensor([found for _, found in results], dtype=torch.float64)
    short = int((ess < draws).sum())
    if short >= max(1, len(results) // 10):
        warnings.warn(
            f"sbc: in {short} of {len(results)} replicates the {draws} draws are autocorrelated "
            f"(smallest ESS {float(ess.min()):.0f}), which spreads their ranks; raise the "
            "sampler's draws, or lower draws=",
            ConvergenceWarning,
            stacklevel=2,
        )
    return SBC(ranks, draws, ess, complete)

"""What the draws of a posterior say of themselves: one report of all common diagnostics."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from probkit.arviz_export import export_groups, wrap_groups
from probkit.errors import CapabilityError, DataError
from probkit.numerics import ess_from_log_weights
from probkit.rng import scope
from probkit.sources import Draws

if TYPE_CHECKING:
    import pandas as pd

    from probkit.posterior import Posterior

__all__ = ["Diagnosis", "Finding", "Loo", "bfmi", "diagnose", "loo", "pareto_k"]

_FEWEST_DRAWS = 20
_LOW_BFMI = 0.3
_HIGH_R_HAT = 1.01
_ESS_PER_CHAIN = 100
_HIGH_K = 0.7


@dataclass(frozen=True)
class Finding:
    """One diagnostic.

    Attributes:
        check: Name of the diagnostic.
        ok: Whether the value keeps its bound.
        value: The worst value found.
        bound: The bound, in words.
        text: What it means and, where it is not ok, what to do.
    """

    check: str
    ok: bool
    value: float
    bound: str
    text: str


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """A report on the draws of one posterior; print it.

    Attributes:
        findings: Every diagnostic that applies.
        table: The summary table, one row for each scalar.
        skipped: What could not be checked, and why.
    """

    findings: tuple[Finding, ...]
    table: pd.DataFrame
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every diagnostic keeps its bound."""
        return all(finding.ok for finding in self.findings)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each diagnostic that does not."""
        return tuple(finding.text for finding in self.findings if not finding.ok)

    def __repr__(self) -> str:
        """The report."""
        width = max(len(finding.check) for finding in self.findings)
        lines = [
            f"{'ok  ' if f.ok else 'WARN'} {f.check:<{width}} {f.value:>8.4g}  ({f.bound})"
            for f in self.findings
        ]
        lines += [f"  -> {text}" for text in self.warnings]
        lines += [f"  not checked: {text}" for text in self.skipped]
        return "\n".join(lines)

    __str__ = __repr__


def diagnose(post: Posterior) -> Diagnosis:
    """Check the draws of a posterior by every diagnostic that applies.

    * Draws of chains: rank-normalised split R-hat above 1.01, bulk or tail effective sample size
      under 100 for each chain (Vehtari et al. 2021).
    * Hamiltonian samplers as well: divergent transitions, paths cut off at the greatest depth or
      number of steps, E-BFMI below 0.3 (Betancourt 2016).
    * Weighted draws: Pareto k of the weights above 0.7 (Vehtari et al. 2024), and their effective
      sample size.
    * Models with a pointwise likelihood: Pareto k of leave-one-out above 0.7.

    Raises:
        CapabilityError: The posterior stores no draws, or is a point estimate.
        DataError: There are too few draws for any of these numbers to mean something.

    Example:
        >>> from probkit.posterior import Posterior
        >>> generator = torch.Generator().manual_seed(0)
        >>> draws = torch.randn(4, 500, generator=generator, dtype=torch.float64)
        >>> diagnose(Posterior(Draws({"mu": draws}), model=None)).ok
        True
        >>> lost = draws + torch.tensor([0.0, 0.0, 0.0, 3.0])[:, None]
        >>> report = diagnose(Posterior(Draws({"mu": lost}), model=None))
        >>> [finding.check for finding in report.findings if not finding.ok]
        ['R-hat', 'bulk ESS', 'tail ESS']
    """
    source = _draws_of(post, "diagnose")
    skipped: list[str] = []
    if source.log_weights is not None:
        findings = _of_weights(source.log_weights)
    else:
        _require_draws(source, "diagnose")
        findings = [*_of_transitions(post, skipped), *_of_chains(post, skipped)]
    findings += _of_loo(post, skipped)
    if not post.attrs.get("complete", True):
        skipped.append("the end of the run: it was interrupted, these are the draws so far")
    return Diagnosis(tuple(findings), post.summary(), tuple(skipped))


# -------------------------------------------------------------------------------- what is needed


def _draws_of(post: Posterior, what: str) -> Draws:
    if post.is_point_estimate:
        raise CapabilityError(f"{what}: a point estimate has no draws; use a sampler that has")
    if not isinstance(post.source, Draws) or not post.draws:
        raise CapabilityError(
            f"{what} needs stored draws, which this posterior ({type(post.source).__name__}) has "
            "not: a closed form needs no such check, and a fitted guide is checked by its weights "
            "(ImportanceSampling with the guide)"
        )
    return post.source


def _require_draws(source: Draws, what: str) -> None:
    chains, draws = source.shape
    if draws < _FEWEST_DRAWS:
        raise DataError(
            f"{what}: expected at least {_FEWEST_DRAWS} draws of each chain to estimate R-hat, "
            f"ESS and E-BFMI, got {chains} chains of {draws}; raise draws="
        )


def _labelled(table: pd.DataFrame, column: str, *, smallest: bool) -> tuple[str, float]:
    """Return the row with the worst value in a column; NaN (constants) do not count."""
    values = table[column].dropna()
    if values.empty:
        return "nothing", 1.0 if column == "r_hat" else float("inf")
    place = int(values.argmin() if smallest else values.argmax())
    return str(values.index[place]), float(values.iloc[place])


# ------------------------------------------------------------------------------------- findings


def _of_chains(post: Posterior, skipped: list[str]) -> list[Finding]:
    table = post.summary()
    findings = []
    if post.chains == 1:
        skipped.append(
            "R-hat: there is one chain; run several, chains=4, to see whether they agree"
        )
    else:
        name, value = _labelled(table, "r_hat", smallest=False)
        bad = int((table["r_hat"] > _HIGH_R_HAT).sum())
        findings.append(
            Finding(
                "R-hat",
                value <= _HIGH_R_HAT,
                value,
                f"at most {_HIGH_R_HAT}",
                f"R-hat of {name} is {value:.4g}, {bad} scalars are above {_HIGH_R_HAT}: the "
                "chains disagree; take more warmup and draws, and look for several modes",
            )
        )
    least = _ESS_PER_CHAIN * post.chains
    for kind in ("bulk", "tail"):
        name, value = _labelled(table, f"ess_{kind}", smallest=True)
        findings.append(
            Finding(
                f"{kind} ESS",
                value >= least,
                value,
                f"at least {least}",
                f"{kind} ESS of {name} is {value:.0f}, under {_ESS_PER_CHAIN} for each of "
                f"{post.chains} chains: its mean and quantiles are rough, and R-hat is not to be "
                "trusted; take more draws",
            )
        )
    return findings


def _of_transitions(post: Posterior, skipped: list[str]) -> list[Finding]:
    """Findings on the transitions of Hamiltonian samplers."""
    stats = post.sample_stats
    findings = []
    if "diverging" in stats:
        diverging = stats["diverging"]
        count = int(diverging.sum())
        findings.append(
            Finding(
                "divergences",
                count == 0,
                count,
                "none",
                f"{count} of {diverging.numel()} transitions diverged: draws near sharp curvature "
                "are missing; raise accept (0.95, 0.99), or reparametrise the model",
            )
        )
    findings += _of_length(post)
    if "energy" in stats:
        value = float(bfmi(post).min())
        findings.append(
            Finding(
                "E-BFMI",
                value >= _LOW_BFMI,
                value,
                f"at least {_LOW_BFMI}",
                f"E-BFMI is {value:.2f}, below {_LOW_BFMI}: momenta explore the energies slowly; "
                "reparametrise heavy tails (non-centred), or take more draws",
            )
        )
    elif "diverging" in stats:
        skipped.append("E-BFMI: the sampler keeps no energies")
    return findings


def _of_length(post: Posterior) -> list[Finding]:
    """Whether paths were cut off at the greatest depth, or number of steps."""
    for stat, option in (("tree_depth", "max_depth"), ("n_steps", "max_steps")):
        most = _option(post, option)
        if stat in post.sample_stats and most is not None:
            lengths = post.sample_stats[stat]
            share = float((lengths >= most).double().mean())
            return [
                Finding(
                    option.replace("_", " "),
                    share <= 0.01,
                    share,
                    "at most 1% of the transitions",
                    f"{share:.1%} of the transitions stopped at {option}={most}: paths are too "
                    "short for this posterior; rescale or decorrelate it (dense=True), or raise "
                    f"{option}",
                )
            ]
    return []


def _option(post: Posterior, name: str) -> int | None:
    """Read a whole-number option of the sampler off the record."""
    text = post.attrs.get("options", {}).get(name)
    return int(text) if isinstance(text, str) and re.fullmatch(r"\d+", text) else None


def _of_weights(log_weights: Tensor) -> list[Finding]:
    flat = log_weights.detach().cpu().double().flatten()
    if len(flat) < _FEWEST_DRAWS:
        raise DataError(
            f"diagnose: expected at least {_FEWEST_DRAWS} weighted draws, got {len(flat)}; raise "
            "draws="
        )
    k = pareto_k(flat)
    ess = float(ess_from_log_weights(flat, 0))
    return [
        Finding(
            "Pareto k of weights",
            k <= _HIGH_K,
            k,
            f"at most {_HIGH_K}",
            f"Pareto k of the weights is {k:.2f}, above {_HIGH_K}: the proposal misses part of the "
            "posterior and estimates are unreliable; use a wider or better fitted guide, or MCMC",
        ),
        Finding(
            "ESS of weights",
            ess >= _ESS_PER_CHAIN,
            ess,
            f"at least {_ESS_PER_CHAIN}",
            f"the weights are worth {ess:.0f} of {len(flat)} draws; take more, or improve the "
            "proposal",
        ),
    ]


def _of_loo(post: Posterior, skipped: list[str]) -> list[Finding]:
    if post.log_weights is not None or not callable(
        getattr(post.model, "pointwise_log_likelihood", None)
    ):
        return []
    try:
        found = loo(post)
    except (CapabilityError, DataError) as error:
        skipped.append(f"leave-one-out: {error}")
        return []
    worst = float(found.pareto_k.max())
    return [
        Finding(
            "Pareto k of LOO",
            found.bad == 0,
            worst,
            f"at most {found.good_k:.2f}",
            f"Pareto k of leave-one-out is above {found.good_k:.2f} for {found.bad} of "
            f"{len(found.pareto_k)} observations, up to {worst:.2f}: these shape the posterior "
            "much, and elpd is unreliable for them; refit without each, or use a model with "
            "heavier tails",
        )
    ]


# ------------------------------------------------------------------------------------- measures


def bfmi(post: Posterior) -> Tensor:
    """Return the energy Bayesian fraction of missing information [chain] (Betancourt 2016).

    Raises:
        CapabilityError: The sampler keeps no energies.
        DataError: Too few draws.
    """
    energy = post.sample_stats.get("energy")
    if energy is None:
        raise CapabilityError(
            "E-BFMI needs sample_stats['energy'], which Hamiltonian samplers keep; this posterior "
            f"has {', '.join(post.sample_stats) or 'none'}"
        )
    if energy.shape[1] < _FEWEST_DRAWS:
        raise DataError(
            f"E-BFMI: expected energies [chain, draw] of at least {_FEWEST_DRAWS} draws, got "
            f"{tuple(energy.shape)}; raise draws="
        )
    import arviz

    with np.errstate(all="ignore"):
        found = arviz.bfmi(energy.detach().cpu().double().numpy())
    return torch.as_tensor(np.asarray(found, dtype=np.float64)).nan_to_num(1.0)


def pareto_k(log_weights: Tensor) -> float:
    """Return Pareto k of importance weights [draw]: above 0.7 their estimates are unreliable.

    Raises:
        DataError: Too few weights to fit their tail.

    Example:
        >>> round(pareto_k(torch.zeros(1000).double()), 2) <= 0.7
        True
    """
    flat = log_weights.detach().cpu().double().flatten()
    if len(flat) < _FEWEST_DRAWS:
        raise DataError(
            f"pareto_k: expected at least {_FEWEST_DRAWS} log weights [draw], got {len(flat)}; "
            "take more draws"
        )
    if bool((flat == flat[0]).all()):
        return -float("inf")  # Equal weights have no tail.
    import arviz

    with scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _, k = arviz.psislw(flat.numpy().copy())
    return float(k)


@dataclass(frozen=True)
class Loo:
    """Leave-one-out predictive density by Pareto-smoothed importance sampling.

    Attributes:
        elpd: Expected log predictive density, the sum over observations.
        se: Its standard error over observations.
        p: Effective number of parameters.
        pointwise: [observation] log predictive densities.
        pareto_k: [observation] how far to trust each.
        good_k: Largest k to be trusted, 0.7 or less for few draws.
    """

    elpd: float
    se: float
    p: float
    pointwise: Tensor
    pareto_k: Tensor
    good_k: float

    @property
    def bad(self) -> int:
        """Number of observations that are not to be trusted."""
        return int((self.pareto_k > self.good_k).sum())


def loo(post: Posterior) -> Loo:
    """Estimate the leave-one-out predictive density (Vehtari, Gelman and Gabry 2017), by ArviZ.

    Raises:
        CapabilityError: The posterior has no equally weighted draws, or the model no pointwise log
            likelihood.
        DataError: Too few draws.
    """
    source = _draws_of(post, "loo")
    if source.log_weights is not None:
        raise CapabilityError("loo needs equally weighted draws; resample with post.sample first")
    chains, draws = source.shape
    if chains * draws < 5 * _FEWEST_DRAWS:
        raise DataError(
            f"loo: expected at least {5 * _FEWEST_DRAWS} draws in all, got {chains} chains of "
            f"{draws}; raise draws="
        )
    likelihood: Mapping[str, Tensor] = post.log_likelihood
    if not likelihood:
        raise CapabilityError(
            f"loo needs pointwise_log_likelihood(values, data), which {type(post.model).__name__} "
            "lacks"
        )
    import arviz
    import xarray as xr

    parts = [value.detach().cpu().double() for value in likelihood.values()]
    joined = torch.cat([part.flatten(2) for part in parts], dim=2).numpy()
    groups = export_groups(post)
    groups["log_likelihood"] = xr.Dataset({"all": (["chain", "draw", "observation"], joined)})
    data = wrap_groups(groups, str(arviz.__version__))
    with scope(), warnings.catch_warnings():  # Scopes exclude each other: filters are global.
        # ArviZ warns of large Pareto k in words of its own.
        warnings.simplefilter("ignore", UserWarning)
        result: Any = arviz.loo(data, pointwise=True)
    # ArviZ 0.x calls these loo_i and p_loo, 1.x elpd_i and p.
    pointwise = np.asarray(result.loo_i if hasattr(result, "loo_i") else result.elpd_i).ravel()
    return Loo(
        elpd=float(pointwise.sum()),
        se=float(np.sqrt(len(pointwise) * np.var(pointwise))),
        p=float(result.p_loo if hasattr(result, "p_loo") else result.p),
        pointwise=torch.as_tensor(pointwise.copy()),
        pareto_k=torch.as_tensor(np.asarray(result.pareto_k).ravel().copy()),
        good_k=float(result.good_k),
    )

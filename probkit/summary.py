"""Summary tables of posteriors: one row for each scalar entry."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit import distributions as D
from probkit.errors import CapabilityError
from probkit.numerics import ess_from_log_weights
from probkit.predictive import Empirical, Mixture, Predictive
from probkit.rng import Rng
from probkit.sources import Closed, Fitted, Population

if TYPE_CHECKING:
    import pandas as pd

    from probkit.posterior import Posterior

__all__ = ["summarise"]

_LEVELS = {"q5": 0.05, "q95": 0.95}
_COLUMNS = ("mean", "sd", *_LEVELS, "mcse_mean", "ess_bulk", "ess_tail", "r_hat", "ess")

Columns = Mapping[str, Tensor]


def summarise(post: Posterior, *, draws: int = 1000, rng: Rng | None = None) -> pd.DataFrame:
    """Tabulate a posterior, one row for each scalar entry ``site[label, ...]``.

    * Draws: mean, sd, q5, q95 and ArviZ's rank-normalised diagnostics mcse_mean, ess_bulk,
      ess_tail and r_hat.
    * Weighted draws: weighted mean, sd and quantiles, and ``ess``, Kish's effective sample size.
    * Closed forms and variational marginals: exact mean, sd and quantiles, no sampling.
    * Point estimates: ``value`` alone (``value[chain]`` where several optimisations ran).

    Complex sites have rows ``.real`` and ``.imag``; categorical marginals a row for each class,
    whose mean is its probability. What a law does not know in closed form is NaN. Columns that no
    row has are left out, and ``attrs`` of the table says whether the draws are a point estimate.

    Args:
        post: The posterior.
        draws: Draws to take from a fitted guide for the sites whose marginals are not known.
        rng: Needed in that case.

    Raises:
        CapabilityError: There are neither draws nor known marginals and no ``rng``, or the
            particles are no tensors.

    Example:
        >>> from probkit.posterior import Posterior
        >>> from probkit.sources import Closed
        >>> law = torch.distributions.Normal(torch.zeros(2), 1.0)
        >>> float(summarise(Posterior(Closed({"w": law}), model=None)).loc["w[1]", "sd"])
        1.0
    """
    import pandas as pd

    sampled: Mapping[str, Tensor] = {}
    if rng is not None and isinstance(post.source, Fitted):
        sampled = post.sample(draws, rng=rng)
    if not sampled:
        _refuse_empty(post)
    tables = [_rows(post, name, columns) for name, columns in _site_columns(post, sampled)]
    if not tables:
        table = pd.DataFrame(columns=["mean", "sd", *_LEVELS], dtype=float)
    else:
        table = pd.concat(tables)
        first = [column for column in table.columns if column.startswith("value")]
        table = table[first + [column for column in _COLUMNS if column in table.columns]]
    table.attrs["point_estimate"] = post.is_point_estimate
    return table


def _refuse_empty(post: Posterior) -> None:
    if isinstance(post.source, Population) and not post.draws:
        raise CapabilityError(
            "a summary needs numbers: expected tensor particles; use post.particles.best(), "
            "post.log_weights or post.sample(n)"
        )
    if isinstance(post.source, Fitted) and not post.marginals and not _fits(post):
        raise CapabilityError(
            f"{type(post.source.guide).__name__} has no known marginals and stores no draws: "
            "summary(rng=0) takes some, as post.sample(n, rng=0) does"
        )


def _site_columns(post: Posterior, sampled: Columns) -> Iterator[tuple[str, Columns]]:
    """Yield each site's columns, every one of the shape of the site.

    Sites whose law is unknown are read off ``sampled`` {site: [n, *site]}, where there are any.
    """
    laws = _law_columns(post)
    for name, value in sampled.items():
        if name not in laws or bool(laws[name]["mean"].isnan().all()):
            laws.pop(name, None)
            yield from _parts(name, value, lambda part: _moments(Empirical(part.cpu().double())))
    for name, value in post.draws.items():
        if name not in laws:
            yield from _parts(name, value, lambda part: _draw_columns(post, part))
    for name, columns in laws.items():
        yield name, {key: column.detach().cpu().double() for key, column in columns.items()}


# --------------------------------------------------------------------------- draws


def _parts(name: str, value: Tensor, columns: Any) -> Iterator[tuple[str, Columns]]:
    if value.is_complex():
        yield f"{name}.real", columns(value.real)
        yield f"{name}.imag", columns(value.imag)
    else:
        yield name, columns(value)


def _draw_columns(post: Posterior, value: Tensor) -> Columns:
    """Columns of draws [chain, draw, *site]."""
    value = value.detach().cpu().double()
    if post.is_point_estimate or value.shape[:2] == (1, 1):
        if len(value) == 1:
            return {"value": value[0, 0]}
        return {f"value[{chain}]": row[0] for chain, row in enumerate(value)}
    if post.log_weights is not None:
        log_weights = post.log_weights.detach().cpu().double().flatten()
        pooled = Empirical(value.flatten(0, 1), log_weights)
        ess = ess_from_log_weights(log_weights, 0)
        return {**_moments(pooled), "ess": ess.expand(value.shape[2:])}
    flat = value.flatten(0, 1)
    moments = dict(_moments(Empirical(flat)))
    if len(flat) > 1:
        moments["sd"] = flat.std(0)
    return {**moments, **_diagnostics(value)}


def _moments(law: Predictive) -> Columns:
    quantiles = {name: law.quantile(level) for name, level in _LEVELS.items()}
    return {"mean": law.mean, "sd": law.variance.sqrt(), **quantiles}


def _diagnostics(value: Tensor) -> Columns:
    """ArviZ's diagnostics of draws [chain, draw, *site]; none where there are under four draws."""
    if value.shape[1] < 4 or value[0, 0].numel() == 0:
        return {}
    import arviz
    import xarray as xr

    shape = value.shape[2:]
    dims = ["chain", "draw", "entry"]
    data = xr.Dataset(
        {"x": (dims, value.flatten(2).numpy() if shape else value.numpy()[..., None])}
    )
    with np.errstate(all="ignore"):  # constant entries give 0 / 0, which is NaN
        found = {
            "mcse_mean": arviz.mcse(data, method="mean"),
            "ess_bulk": arviz.ess(data, method="bulk"),
            "ess_tail": arviz.ess(data, method="tail"),
        }
        if len(value) > 1:  # ArviZ has none of one chain, and logs a complaint.
            found["r_hat"] = arviz.rhat(data)
    columns = {
        name: torch.as_tensor(np.array(result["x"].values)).reshape(shape)
        for name, result in found.items()
    }
    return {"r_hat": torch.full(shape, torch.nan, dtype=torch.float64), **columns}


# --------------------------------------------------------------------------- laws


def _law_columns(post: Posterior) -> dict[str, Columns]:
    """Columns of every site whose marginals are known."""
    source = post.source
    columns: dict[str, Columns] = {}
    with torch.no_grad():
        if isinstance(source, Closed) and source.is_mixture:
            for site, joint in source.joint.items():
                for name, dist in _real_laws(site, joint):
                    columns[name] = _moments(_hyper_mixture(source, dist))
        elif isinstance(source, Closed):
            for site, joint in source.joint.items():
                laws = _real_laws(site, joint)
                columns.update({name: _columns_of([dist]) for name, dist in laws})
        elif isinstance(source, Fitted) and not post.marginals:
            columns.update({name: _columns_of(fits) for name, fits in _fits(post).items()})
        for name, marginal in post.marginals.items():
            if isinstance(marginal, tuple):  # ragged: one law for each sequence
                parts = {f"{name}[{i}]": _columns_of([part]) for i, part in enumerate(marginal)}
                columns.update(parts)
            else:
                laws = _real_laws(name, marginal)
                columns.update({part: _columns_of([law]) for part, law in laws})
    return columns


def _real_laws(name: str, dist: Distribution) -> list[tuple[str, Distribution]]:
    """A complex law, one with ``real`` and ``imag`` parts that are laws, becomes those two."""
    try:
        law = D.marginals(dist)
    except CapabilityError:
        return [(name, dist)]
    parts = getattr(law, "real", None), getattr(law, "imag", None)
    if isinstance(parts[0], Distribution) and isinstance(parts[1], Distribution):
        return [(f"{name}.real", parts[0]), (f"{name}.imag", parts[1])]
    return [(name, dist)]


def _hyper_mixture(source: Closed, dist: Distribution) -> Mixture:
    """A closed marginal, mixed over the hyper-parameter draws."""
    flat = D.flatten_batch(dist, 2)
    if source.log_weights is None:
        return Mixture(flat, torch.zeros(flat.batch_shape[0], dtype=torch.float64))
    return Mixture(flat, source.log_weights.flatten())


def _fits(post: Posterior) -> dict[str, list[Distribution]]:
    """Marginals of every fit of a guide; empty where they are not known."""
    source = post.source
    assert isinstance(source, Fitted)
    fits = [
        Fitted(source.guide, [params]).marginals(post.model, post.context.data)
        for params in source.params
    ]
    return {name: [fit[name] for fit in fits] for name in fits[0]}


def _columns_of(parts: Sequence[Distribution]) -> Columns:
    """Columns of an equal mixture of laws of one site (in most cases of one law)."""
    if _is_categorical(parts[0]):
        probs = torch.stack([part.probs for part in parts]).mean(0).double()  # type: ignore[attr-defined]
        nan = torch.full_like(probs, torch.nan)
        return {"mean": probs, "sd": (probs * (1 - probs)).sqrt(), "q5": nan, "q95": nan}
    try:
        laws = [D.marginals(part) for part in parts]
    except CapabilityError:
        nan = torch.full(parts[0].batch_shape + parts[0].event_shape, torch.nan)
        return dict.fromkeys(("mean", "sd", *_LEVELS), nan)
    moments = [_law_moments(law) for law in laws]
    means = torch.stack([mean for mean, _ in moments])
    within = torch.stack([variance for _, variance in moments])
    variance = within.mean(0) + means.var(0, correction=0)
    columns = {"mean": means.mean(0), "sd": variance.sqrt()}
    for name, level in _LEVELS.items():
        try:
            columns[name] = _quantile(laws, torch.as_tensor(level, dtype=means.dtype))
        except CapabilityError:  # countable supports, and laws without a distribution function
            columns[name] = torch.full_like(means[0], torch.nan)
    return columns


def _is_categorical(dist: Distribution) -> bool:
    return isinstance(dist, torch.distributions.Categorical | torch.distributions.OneHotCategorical)


def _law_moments(law: Distribution) -> tuple[Tensor, Tensor]:
    """Mean and variance of one-dimensional laws, by quadrature where the class has none.

    E[g(X)] = int g(F^{-1}(Phi(z))) phi(z) dz, by the trapezoidal rule, which converges
    geometrically for the transformed normals that guides have.
    """
    try:
        return law.mean, law.variance
    except NotImplementedError:
        z = torch.linspace(-8.0, 8.0, 641, dtype=torch.float64)
        weight = torch.exp(-0.5 * z.square())
        column = (-1, *[1] * len(law.batch_shape))
        points = D.icdf(law, torch.special.ndtr(z).reshape(column))
        weight = (weight / weight.sum()).reshape(column)
        mean = (weight * points).sum(0)
        return mean, (weight * (points - mean).square()).sum(0)


def _quantile(laws: Sequence[Distribution], level: Tensor) -> Tensor:
    """Quantile of an equal mixture of laws."""
    if len(laws) == 1:
        return D.icdf(laws[0], level.expand(laws[0].batch_shape))

    def mean_cdf(x: Tensor) -> Tensor:
        return torch.stack([D.cdf(law, x) for law in laws]).mean(0)

    def log_density(x: Tensor) -> Tensor:
        return torch.stack([law.log_prob(x) for law in laws]).exp().mean(0).log()

    shape = laws[0].batch_shape
    return D.find_quantile(mean_cdf, log_density, level, shape, *D.support_bounds(laws[0]))


# --------------------------------------------------------------------------- rows


def _rows(post: Posterior, name: str, columns: Columns) -> pd.DataFrame:
    """Make one row for each entry of a site."""
    import pandas as pd

    shape = next(iter(columns.values())).shape
    site = name.removesuffix(".real").removesuffix(".imag")
    labels = _axis_labels(post, site, shape)
    index = [
        f"{name}[{', '.join(entry)}]" if entry else name for entry in itertools.product(*labels)
    ]
    data = {key: column.expand(shape).reshape(-1).numpy() for key, column in columns.items()}
    return pd.DataFrame(data, index=index)


def _axis_labels(post: Posterior, site: str, shape: Sequence[int]) -> list[list[str]]:
    """Labels along each axis: coords where there is one for each entry, else positions."""
    dims = post.context.dims.get(site, ())
    labels = []
    for axis, size in enumerate(shape):
        coords = post.context.coords.get(dims[axis]) if axis < len(dims) else None
        known = coords is not None and len(coords) == size
        labels.append([str(label) for label in (coords if known and coords else range(size))])
    return labels

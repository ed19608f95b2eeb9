"""Demo view: sea-surface temperatures by month and year, and fluorescence from few readings."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view

__all__: list[str] = []

_MONTHS = ("Jan", "Mar", "May", "Jul", "Sep", "Nov")


def run(ctx: DemoContext) -> None:
    """Write the view."""
    _el_nino(ctx)
    _kinetics(ctx)


def _fit(model: Any, data: Any, *, rng: int, chains: int, sweeps: int) -> Any:
    """Average several seeds; a demo need not wait for the last digit of the bound."""
    import probkit as pk
    from probkit.inference.passing import MessagePassing

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pk.ConvergenceWarning)
        return pk.infer(model, data, MessagePassing(sweeps=sweeps), rng=rng, chains=chains)


def _scores(post: Any, index: Any, y: Any) -> dict[str, float]:
    from probkit.models.funbat import score_predictions

    scores = score_predictions(post.predict(index), y)
    return {"RMSE": scores["rmse"], "90 % coverage": scores["coverage"]}


def _el_nino(ctx: DemoContext) -> None:
    """Fill in withheld months of the El Nino series, and show the seasons and the years."""
    import statsmodels.api as sm
    import torch

    from probkit import plots
    from probkit.kernels.state_space import Matern, Periodic
    from probkit.models.funbat import (
        FunBaT,
        TensorData,
        full_terms,
        main_effects,
        masked_terms,
    )

    table = sm.datasets.elnino.load_pandas().data.set_index("YEAR")
    years = table.index.to_numpy()
    month, year = np.meshgrid(np.arange(12) / 12, years)
    index = pd.DataFrame({"month": month.ravel(), "year": year.ravel()})
    y = table.to_numpy().ravel()
    rng = np.random.default_rng(ctx.rng_seed)
    # single months, and every eighth year as a whole
    held = np.isin(index["year"], np.arange(1957, 2010, 8))
    test = (rng.random(len(y)) < 0.15) | held
    model = FunBaT(
        kind="cp",
        masks=masked_terms(main_effects(2), full_terms(2, rank=2)),
        kernels=[Periodic(1.0, lengthscale=1.0), Matern(0.5, lengthscale=0.05)],
        scale_index=[False, True],
    )
    known: Any = index[~test]
    post = _fit(model, TensorData(known, y[~test]), rng=ctx.rng_seed, chains=2, sweeps=25)
    frame = pd.DataFrame({"month": index["month"], "year": index["year"], "y": y})
    seasonal = frame[~test].groupby("month")["y"].mean()
    scattered, whole = test & ~held, held
    rows: dict[str, dict[str, float]] = {}
    for name, mask in (("scattered months", scattered), ("whole years", whole)):
        part, truth = index[mask], torch.as_tensor(y[mask])
        plain = float(np.sqrt(np.mean((y[mask] - seasonal[part["month"]].to_numpy()) ** 2)))
        rows[name] = {**_scores(post, part, truth), "RMSE of the month's mean": plain}
    ctx.text(
        f"""
        ## Sea-surface temperature by month and year

        Sixty-one years of monthly temperatures off Peru (statsmodels' El Nino data). A value is
        indexed by the month, on a circle, and the year, on a line: a season that repeats, a level
        that wanders, and two products of both, for a warm phase is felt more in some months than
        in others. {int(scattered.sum())} single months and every eighth year were withheld. In a
        withheld year the model knows the season and the years around it, but not the anomaly: its
        bands widen, though not enough for 1997, the strongest El Nino of the series.
        """
    )
    ctx.table(pd.DataFrame(rows).T, "Degrees Celsius, on what was withheld", digits=3)
    fig, axes = plots.figure(1, 3, size=(13.0, 3.6))
    _factor(axes[0, 0], model, post, "month", np.linspace(0, 1, 80), component=0)
    axes[0, 0].set(title="Season (main effect)", xlabel="month", ylabel="standard deviations")
    axes[0, 0].set_xticks(np.arange(0, 12, 2) / 12, _MONTHS)
    _factor(axes[0, 1], model, post, "year", np.linspace(1950, 2012, 200), component=0)
    axes[0, 1].set(title="Level (main effect)", xlabel="year", ylabel="standard deviations")
    _one_stretch(axes[0, 2], post, frame, test, (1995, 1999))
    ctx.figure(fig, "el_nino", "Factors of one fit and a stretch of the series, with 90 % bands")


def _factor(ax: Any, model: Any, post: Any, mode: str, grid: Any, *, component: int) -> None:
    """Draw one component of a factor with its band."""
    from probkit import plots

    factor = model.factor(post, mode, grid)
    mean = factor.mean[0, :, component].numpy()
    half = 1.645 * factor.variance[0, :, component].sqrt().numpy()
    plots.band_plot(ax, grid, mean, [(mean - half, mean + half)])


def _one_stretch(ax: Any, post: Any, frame: pd.DataFrame, test: Any, span: tuple[int, int]) -> None:
    """Draw predictions and observations in time, a year of them withheld."""
    from probkit import plots

    shown = frame["year"].between(*span)
    part, held = frame[shown], test[shown.to_numpy()]
    prediction = post.predict(part[["month", "year"]])
    low, high = prediction.quantile([0.05, 0.95]).numpy()
    time = (part["year"] + part["month"]).to_numpy()
    plots.band_plot(ax, time, prediction.quantile(0.5).numpy(), [(low, high)], label="predicted")
    with plots.style():
        ax.plot(time[~held], part["y"].to_numpy()[~held], "o", ms=3, label="seen")
        ax.plot(time[held], part["y"].to_numpy()[held], "x", ms=4, label="withheld")
        ax.set(title="The winter of 1997", xlabel="year", ylabel="degrees Celsius")
        ax.legend()


def _kinetics(ctx: DemoContext) -> None:
    """Recover a fluorescence measurement from a twentieth of its readings."""
    import tensorly as tl
    import torch
    from tensorly.datasets import load_kinetic
    from tensorly.decomposition import parafac

    from probkit import plots
    from probkit.kernels.state_space import Matern
    from probkit.models.funbat import FunBaT, TensorData

    stored = load_kinetic()
    sample = np.asarray(stored["tensor"])[10]  # emission, excitation, time
    axes_of = [np.asarray(tick, dtype=float) for tick in stored["ticks"][1:]]
    grid = np.stack([a.ravel() for a in np.meshgrid(*axes_of, indexing="ij")], -1)
    names = ("emission", "excitation", "time")
    y = sample.ravel()
    known = np.isfinite(y)
    rng = np.random.default_rng(ctx.rng_seed)
    seen = known & (rng.random(len(y)) < 0.05)
    data = TensorData(grid[seen], y[seen], names)
    model = FunBaT(3, kind="cp", kernels=Matern(2.5, lengthscale=0.5))
    post = _fit(model, data, rng=ctx.rng_seed, chains=2, sweeps=30)
    test = known & ~seen
    spread = float(y[known].std())
    rows = {"FunBaT, CP 3": _scores(post, grid[test], torch.as_tensor(y[test]))}
    mask = seen.reshape(sample.shape).astype(float)
    dense = tl.cp_to_tensor(
        parafac(
            tl.tensor(np.where(seen, y, 0.0).reshape(sample.shape)),
            3,
            mask=tl.tensor(mask),
            init="random",
            random_state=0,
            n_iter_max=100,
        )
    )
    error = np.asarray(dense).ravel()[test] - y[test]
    rows["tensorly parafac with a mask"] = {"RMSE": float(np.sqrt(np.mean(error**2)))}
    frame = pd.DataFrame(rows).T
    frame["RMSE"] /= spread
    ctx.text(
        f"""
        ## Fluorescence from a twentieth of the readings

        One sample of tensorly's kinetic fluorescence data: intensity by emission wavelength,
        excitation wavelength and time. {int(seen.sum())} of {int(known.sum()):,} readings were
        kept. Spectra and decay are smooth, which a tensor of unrelated cells cannot know.
        """
    )
    ctx.table(frame, "On the other readings; RMSE in standard deviations of the data", digits=3)
    fig, panels = plots.figure(1, 3, size=(13.0, 3.6))
    for panel, name, ticks in zip(panels[0], names, axes_of, strict=True):
        for component in range(3):
            fine = np.linspace(ticks[0], ticks[-1], 100)
            factor = model.factor(post, name, fine)
            mean = factor.mean[0, :, component].numpy()
            half = 1.645 * factor.variance[0, :, component].sqrt().numpy()
            colour = plots.PALETTE[component]
            plots.band_plot(panel, fine, mean, [(mean - half, mean + half)], colour=colour)
        panel.set(title=name, xlabel=name)
    ctx.figure(fig, "kinetics", "The three components of one fit, with 90 % bands")


register_view(DemoView("funbat", "Tensors with continuous indexes", run, order=55))

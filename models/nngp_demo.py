"""Demo views: scale mixtures of NNGPs on the diabetes data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view

if TYPE_CHECKING:
    from torch.distributions import Distribution

__all__: list[str] = []


def _laws() -> dict[str, Distribution]:
    from probkit.models import BurrXII, InverseGamma, PointMass

    return {
        "NNGP": PointMass(1.0),
        "inverse gamma": InverseGamma(2.0, 2.0),
        "Burr": BurrXII(2.0, 1.0),
    }


def _fit(law: Distribution, x: pd.DataFrame, y: pd.Series, seed: int) -> Any:
    """Fit hyper-parameters by marginal likelihood and condition in closed form."""
    import probkit as pk
    from probkit.inference import MAP, Direct
    from probkit.kernels import NNGPKernel
    from probkit.models import ScaleMixtureNNGP

    model = ScaleMixtureNNGP(NNGPKernel(depth=2), scale=law, standardize=True)
    return pk.infer(model, (x, y), Direct(hyper=MAP(restarts=1, max_iter=60)), rng=seed)


def _score(post: Any, x: pd.DataFrame, y: pd.Series) -> tuple[dict[str, float], np.ndarray]:
    """RMSE, mean NLL and 90 % coverage on test rows, and their PIT values."""
    target = y.to_numpy()
    prediction = post.predict(x)
    pit = prediction.cdf(target).numpy()
    return {
        "RMSE": float(np.sqrt(np.mean((prediction.mean.numpy() - target) ** 2))),
        "NLL": float(-prediction.log_prob(target).mean()),
        "90 % coverage": float(np.mean(np.abs(pit - 0.5) <= 0.45)),
    }, pit


def _compare(
    ctx: DemoContext, splits: list[Any], what: str
) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Score every law on every split."""
    rows: list[dict[str, Any]] = []
    pits: dict[str, list[np.ndarray]] = {}
    for number, (x, y, x_test, y_test) in enumerate(ctx.track(splits, what)):
        for name, law in _laws().items():
            scores, pit = _score(_fit(law, x, y, ctx.rng_seed), x_test, y_test)
            rows.append({"law of the scale": name, "split": number, **scores})
            pits.setdefault(name, []).append(pit)
    return pd.DataFrame(rows), {name: np.concatenate(parts) for name, parts in pits.items()}


def _summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean over splits, with the standard error of the mean."""
    groups = frame.drop(columns="split").groupby("law of the scale", sort=False)
    mean, error = groups.mean(), groups.sem()
    table = pd.DataFrame(index=mean.index)
    for column in mean:
        table[column] = mean[column]
        table[f"{column} ±"] = error[column]
    return table


def _shifted(data: Any, seed: int, n: int) -> list[Any]:
    """Train on patients of low body mass index, test on those of high: covariate shift."""
    generator = np.random.default_rng(seed)
    order = data.x["bmi"].argsort().to_numpy()
    low, high = order[: len(order) // 2], order[-len(order) // 4 :]
    splits = []
    for _ in range(n):
        train = generator.choice(low, 60, replace=False)
        x, y = data.x, data.y
        splits.append((x.iloc[train], y.iloc[train], x.iloc[high], y.iloc[high]))
    return splits


def run(ctx: DemoContext) -> None:
    """Random splits, small samples and shift, three laws side by side."""
    from probkit import plots
    from probkit.datasets import diabetes

    data = diabetes()
    many = 20 if ctx.full else 2
    settings = {
        "random splits (398 patients to learn from)": list(
            data.splits(many, train=0.9, seed=ctx.rng_seed)
        ),
        "small samples (15 patients)": list(data.splits(4 * many, train=15, seed=ctx.rng_seed)),
        "shift (60 patients of low BMI, tested on high BMI)": _shifted(
            data, ctx.rng_seed, 2 * many
        ),
    }
    ctx.text(
        """
        Disease progression after one year, predicted from ten measurements of 442 patients. The
        same infinitely wide network (ReLU, two hidden layers) with three laws of its unknown
        output scale: a fixed scale (the plain NNGP), an inverse gamma (a Student-t process) and a
        Burr XII. Hyper-parameters maximise the marginal likelihood of the training rows. With
        hundreds of rows the data pin the scale down and the three agree; with few rows the
        mixtures have heavier tails and cover a little more. A shift of the inputs hurts all three:
        the law of the scale widens the intervals, it does not repair the mean.
        """
    )
    fig, axes = plots.figure(1, 3, size=(12.6, 4.4))
    for ax, (name, splits) in zip(axes[0], settings.items(), strict=True):
        frame, pits = _compare(ctx, splits, name)
        ctx.table(_summary(frame), f"{name}: mean over {len(splits)} splits and its standard error")
        plots.calibration_plot(ax, pits)
        ax.set_title(name.split(" (")[0])
    ctx.figure(fig, "calibration", "Empirical against nominal coverage of central intervals")
    _intervals(ctx, data)


def _intervals(ctx: DemoContext, data: Any) -> None:
    """Show predictions for single patients, and save the scale's posterior for ArviZ."""
    from probkit import plots

    x, y, x_test, y_test = next(data.splits(1, train=15, seed=ctx.rng_seed))
    shown = slice(0, 18)
    fig, axes = plots.figure(1, 2, size=(10.0, 5.0))
    posteriors = {name: _fit(law, x, y, ctx.rng_seed) for name, law in _laws().items()}
    labels = [f"patient {i}" for i in x_test.index[shown]]
    styles = (("NNGP", -0.18, plots.PALETTE[0]), ("inverse gamma", 0.18, plots.PALETTE[1]))
    for name, offset, colour in styles:
        prediction = posteriors[name].predict(x_test.iloc[shown])
        low, q25, q75, high = prediction.quantile([0.025, 0.25, 0.75, 0.975]).numpy()
        plots.interval_plot(
            axes[0, 0], labels, prediction.mean, low, high,
            inner=(q25, q75), colour=colour, label=name, offset=offset,
        )  # fmt: skip
    with plots.style():
        axes[0, 0].plot(y_test.iloc[shown], range(len(labels)), "kx", label="observed")
        axes[0, 0].legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3)
        axes[0, 0].set_xlabel("disease progression (50 % and 95 % intervals, 15 training patients)")
        grid = np.linspace(0.02, 0.98, 97)
        for (name, post), colour in zip(posteriors.items(), plots.PALETTE, strict=False):
            law = post.analytic.get("scale_var")
            if law is None:
                continue
            import torch

            sigma = law.icdf(torch.as_tensor(grid)).sqrt().numpy()
            axes[0, 1].plot(sigma, grid, label=name, color=colour)
        axes[0, 1].set(xlabel="output scale sigma", ylabel="posterior probability below")
        axes[0, 1].legend()
    ctx.figure(fig, "intervals", "Predictions for single patients, and the posterior of the scale")
    post = posteriors["inverse gamma"]
    ctx.arviz(post.to_arviz(rng=ctx.rng_seed), "diabetes")


register_view(DemoView("nngp", "Scale mixtures of NNGPs on the diabetes data", run, order=10))

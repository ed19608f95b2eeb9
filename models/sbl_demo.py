"""Demo view: a wireless channel recovered from few pilots, and relevance on real data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view

__all__: list[str] = []


def run(ctx: DemoContext) -> None:
    """Write the view."""
    _channel(ctx)
    _diabetes(ctx)
    _breast_cancer(ctx)


def _channel(ctx: DemoContext) -> None:
    """Recover channels through a reflecting surface; show one of them."""
    import torch

    import probkit as pk
    from probkit import plots
    from probkit.models import EvidenceMaximization, KroneckerSBL
    from probkit.models.sbl.greedy import kronecker_omp
    from probkit.models.sbl.simulators import simulate_irs_channel

    trials = 24 if ctx.full else 6
    rows: dict[str, Any] = {}
    for snr in ctx.track((8.0, 16.0), "channels"):
        channel = simulate_irs_channel(trials, snr_db=snr, rng=ctx.rng_seed)
        data = channel.data
        model = KroneckerSBL(data.factors, noise_var=data.noise_var)
        post = pk.infer(model, data.y, EvidenceMaximization(max_iter=150), rng=ctx.rng_seed)
        law: Any = post.analytic["weights"]
        greedy = torch.stack(
            [
                kronecker_omp([f[i] for f in data.factors], data.y[i], noise_var=float(noise))
                for i, noise in enumerate(data.noise_var)
            ]
        )
        rows[f"{snr:.0f} dB"] = {
            "Kronecker SBL": float(channel.channel_nmse(law.mean).median()),
            "Kronecker OMP": float(channel.channel_nmse(greedy).median()),
        }
    ctx.text(
        f"""
        ## A channel from 288 numbers

        A base station with 16 antennas reaches a user with 6 through a surface of 256 reflectors.
        Three pilots and six reflection patterns give 288 complex measurements of 5,832 unknown
        path gains, few of which are not zero. `KroneckerSBL` learns which angles matter in each
        of the three modes, on {trials} simulated channels at once, without ever forming a 5,832
        column matrix.
        """
    )
    ctx.table(
        pd.DataFrame(rows),
        "Error of the cascaded channel (NMSE, median over channels), lower is better",
    )
    errors = channel.channel_nmse(law.mean)
    chosen = int(errors.argsort()[len(errors) // 2])
    truth = channel.cascaded(data.weights)[chosen, 0].abs()
    found = channel.cascaded(law.mean)[chosen, 0].abs()
    spectrum = [channel.data.weights, law.mean]
    fig, axes = plots.figure(1, 3, size=(12.0, 3.4))
    with plots.style():
        for ax, matrix, title in (
            (axes[0, 0], truth, "True channel, first pattern"),
            (axes[0, 1], found, "Recovered"),
        ):
            ax.imshow(
                matrix.numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=float(truth.max())
            )
            ax.set(title=title, xlabel="user antenna", ylabel="base antenna")
            ax.grid(visible=False)
        for weights, style, name in zip(spectrum, ("o", "x"), ("truth", "recovered"), strict=True):
            power = weights[chosen].abs().square().sum((0, 1)).sqrt()
            axes[0, 2].plot(power.numpy(), style, label=name)
        axes[0, 2].set(title="Gains by arrival angle", xlabel="angle at the base", ylabel="gain")
        axes[0, 2].legend()
    ctx.figure(
        fig,
        "channel",
        f"The channel of median error at 16 dB (NMSE {float(errors[chosen]):.2g})",
    )


def _diabetes(ctx: DemoContext) -> None:
    """Which of 65 squares and products matter for diabetes?"""
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import ARDRegression
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    from probkit import plots
    from probkit.models import SparseBayesRegressor

    frame = load_diabetes(as_frame=True, scaled=False)
    X, y = frame.data, frame.target
    powers = PolynomialFeatures(2, include_bias=False)
    scores = {
        name: cross_val_score(
            make_pipeline(powers, StandardScaler(), estimator), X, y, cv=5, scoring="r2"
        )
        for name, estimator in (
            ("SparseBayesRegressor", SparseBayesRegressor()),
            ("scikit-learn ARDRegression", ARDRegression()),
        )
    }
    model = make_pipeline(powers, StandardScaler(), SparseBayesRegressor()).fit(X, y)
    fit = model[-1]
    names = powers.get_feature_names_out(X.columns)[fit.active_]
    sd = np.sqrt(np.diag(fit.sigma_))
    mean = fit.coef_[fit.active_]
    order = np.argsort(np.abs(mean))
    ctx.text(
        f"""
        ## Relevance in real data

        Ten measurements of 442 diabetes patients, their squares and products: {len(fit.coef_)}
        candidate columns. The evidence keeps {len(names)}.
        """
    )
    ctx.table(
        pd.DataFrame(
            {
                name: {"R2": s.mean(), "standard error": s.std(ddof=1) / 5**0.5}
                for name, s in scores.items()
            }
        ).T,
        "Five-fold cross-validation",
        digits=3,
    )
    fig, axes = plots.figure(1, 1, size=(7.5, 0.9 + 0.28 * len(names)))
    with plots.style():
        places = np.arange(len(names))
        axes[0, 0].errorbar(mean[order], places, xerr=2 * sd[order], fmt="o", capsize=3)
        axes[0, 0].set_yticks(places, names[order])
        axes[0, 0].axvline(0.0, color="0.6", linewidth=0.8)
        axes[0, 0].set(xlabel="disease progression per standard deviation, ± 2 posterior sds")
    ctx.figure(fig, "diabetes", "The columns that the evidence keeps")


def _breast_cancer(ctx: DemoContext) -> None:
    """Few relevance vectors, and probabilities with errors counted."""
    from sklearn.datasets import load_breast_cancer
    from sklearn.metrics import log_loss
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    from probkit.models import RVMClassifier

    X, y = load_breast_cancer(return_X_y=True)
    parts = train_test_split(X, y, test_size=0.4, random_state=ctx.rng_seed, stratify=y)
    train, test, t_train, t_test = parts
    rvm = make_pipeline(StandardScaler(), RVMClassifier(gamma=0.02)).fit(train, t_train)
    svm = make_pipeline(StandardScaler(), SVC(gamma=0.02)).fit(train, t_train)
    loss = log_loss(t_test, rvm.predict_proba(test))
    table = pd.DataFrame(
        {
            "RVMClassifier": {
                "vectors": len(rvm[-1].relevance_),
                "accuracy": rvm.score(test, t_test),
                "log loss": loss,
            },
            "scikit-learn SVC": {
                "vectors": len(svm[-1].support_),
                "accuracy": svm.score(test, t_test),
                "log loss": np.nan,
            },
        }
    ).T
    ctx.text(
        """
        A relevance vector machine on the breast-cancer data of scikit-learn: kernels at a handful
        of patients do what a support vector machine does with many, and give probabilities.
        """
    )
    ctx.table(table, f"{len(t_test)} patients not fitted to", digits=3)


register_view(DemoView("sbl", "Sparse recovery and relevance", run, order=50))

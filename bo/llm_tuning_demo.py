"""Demo view: a language model advises a search, replayed from a transcript."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view

if TYPE_CHECKING:
    from probkit.bo import Space, Study
    from probkit.models.language import LanguageModel

__all__: list[str] = []

_TRANSCRIPT = Path(__file__).parent / "llm_tuning_demo.jsonl"
_TRIALS, _SEED = 12, 5
_OPTIONS = {"n_perm": 1, "k": 3, "candidates": 2, "pool": 2}


def _space() -> Space:
    from probkit.bo import Int, Space

    return Space(log2_C=Int(-5, 15), log2_gamma=Int(-15, 3))


@functools.cache
def _error(data: str, log2_C: int, log2_gamma: int) -> float:
    """Share of errors of a support vector machine in three-fold cross-validation."""
    from sklearn import datasets
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    X, y = getattr(datasets, f"load_{data}")(return_X_y=True)
    model = make_pipeline(StandardScaler(), SVC(C=2.0**log2_C, gamma=2.0**log2_gamma))
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    return float(1 - cross_val_score(model, X, y, cv=folds).mean())


def _loss(params: Mapping[str, Any]) -> float:
    return _error("breast_cancer", params["log2_C"], params["log2_gamma"])


def _study(lm: LanguageModel | None, seed: int = _SEED) -> Study:
    from probkit.bo import Study
    from probkit.bo.llm import ProblemCard

    card = ProblemCard(
        "support vector machine", "error", "min", task="classification of tumours",
        n_samples=569, n_numeric=30, n_classes=2,
    )  # fmt: skip
    options = {} if lm is None else {"lm": lm, "card": card, **_OPTIONS}
    return Study(
        _space(), {"error": "min"}, surrogate="gp" if lm is None else "llm", initial=4, rng=seed,
        options=options, noise="none",
    )  # fmt: skip


def _experienced(adversarial: bool = False) -> LanguageModel:
    """A scripted adviser who has tuned the same model on other data, wines, and remembers that."""
    from probkit.bo.llm import GPScript
    from probkit.models.language.oracle import OracleLM

    def remembered(params: Mapping[str, Any]) -> float:
        return _error("wine", params["log2_C"], params["log2_gamma"])

    script = GPScript(_space(), truth=remembered, sd=0.02, adversarial=adversarial)
    return OracleLM(script, malformed=0.1)


def _record(path: Path = _TRANSCRIPT) -> None:
    """Write the transcript that the view replays."""
    from probkit.models.language.replay import RecordingLM

    path.unlink(missing_ok=True)
    _study(RecordingLM(_experienced(), path)).optimize(_loss, _TRIALS)


def run(ctx: DemoContext) -> None:
    """Search with the recorded adviser, without one, and with one that lies."""
    from probkit import plots
    from probkit.bo.llm.calibration import coverage_report
    from probkit.bo.plots import regret_plot
    from probkit.models.language.replay import RecordingLM, ReplayLM

    advised = _study(ReplayLM(_TRANSCRIPT)).optimize(_loss, _TRIALS)
    plain = _study(None).optimize(_loss, _TRIALS)
    with tempfile.TemporaryDirectory() as folder:
        liar = RecordingLM(_experienced(adversarial=True), Path(folder) / "lies.jsonl")
        misled = _study(liar).optimize(_loss, _TRIALS)
    advice, usage = advised.advice, advised.usage
    ctx.text(
        f"""
        A support vector machine is to tell malignant tumours from benign ones; two knobs, {_TRIALS}
        evaluations. The adviser's answers are **replayed from a transcript**: it has tuned the same
        model on other data (wines), one answer in ten is garbage, and it is asked in words only.
        It recommends two of the four initial points; then each of its predictions is held against
        what the evaluation gave, and a Gaussian process leans on it as far as that earns it trust.
        An adviser who says the opposite of what it knows is found out by its first predictions: it
        costs the two initial points that it chose, and from then on the plain process decides.
        """
    )
    fig, axes = plots.figure(1, 3, size=(13.0, 3.8))
    traces: dict[str, Any] = {
        "plain process": plain.trace().to_numpy(),
        "with the adviser": advised.trace().to_numpy(),
        "with a liar": misled.trace().to_numpy(),
    }
    ax = regret_plot(axes[0, 0], traces)
    ax.set(title="Best error so far", ylabel="share of errors", yscale="log")
    _map(axes[0, 1], advised)
    said = _predictions(advised)
    report = coverage_report(*said)
    _reliability(axes[0, 2], *said)
    ctx.figure(fig, "advice", "Searches; where the adviser led; what it had predicted")
    rows = {
        "best error": [s.best().value for s in (plain, advised, misled)],
        "evaluation of the best": [s.best().number + 1 for s in (plain, advised, misled)],
        "weight of the plain process": [
            s.advice.get("weights", {}).get("gp", 1.0) for s in (plain, advised, misled)
        ],
        "questions": [s.usage.calls for s in (plain, advised, misled)],
    }
    ctx.table(pd.DataFrame(rows, index=list(traces)).T, "Three searches", digits=3)
    ctx.text(
        f"""
        Of {advice["asked"]} recorded answers {advice["accepted"]} could be used, for
        {usage.calls} requests. The adviser's 68 % intervals held {report.raw[0]:.0%} of the
        outcomes as predicted, {report.calibrated[0]:.0%} after calibration on the other rows.
        """
    )


def _predictions(study: Study) -> tuple[Any, Any, Any]:
    """What was predicted of evaluated points before their outcome: mean, sd and outcome, [row]."""
    from probkit.bo.llm.hybrid import Said, places

    said = Said(**study._kept()["said"])
    seen = study.observations()
    where = places(seen.X, said.X)
    known = where >= 0
    return -said.mean[where[known]], said.sd[where[known]], -seen.Y[known, 0]


def _map(ax: Any, study: Study) -> None:
    """Evaluated points over the error as it is."""
    space = study.space
    low = [space.parameters[n].low for n in space.names]  # type: ignore[attr-defined]
    high = [space.parameters[n].high for n in space.names]  # type: ignore[attr-defined]
    styles = {"llm": ("#d95f02", "o", "proposed by the adviser"),
              "initial": ("#4d4d4d", "s", "initial, evenly spread"),
              "model": ("#1b6ca8", "^", "chosen by the hybrid")}  # fmt: skip
    for origin, (colour, marker, label) in styles.items():
        chosen = [t for t in study.trials if t.origin == origin]
        if chosen:
            x, y = zip(*((t["log2_C"], t["log2_gamma"]) for t in chosen), strict=True)
            ax.scatter(x, y, c=colour, marker=marker, s=36, label=label, zorder=3)
    best = study.best()
    ax.scatter([best["log2_C"]], [best["log2_gamma"]], s=110, facecolors="none", edgecolors="k",
               label="best")  # fmt: skip
    ax.set(xlim=(low[0] - 1, high[0] + 1), ylim=(low[1] - 1, high[1] + 1))
    ax.set(xlabel="log2 C", ylabel="log2 gamma", title="Evaluated points")
    ax.legend(fontsize=7, loc="lower left")


def _reliability(ax: Any, mean: Any, sd: Any, value: Any) -> None:
    """Outcomes against predictions made before them."""
    ax.errorbar(mean, value, xerr=2 * sd, fmt="o", color="#d95f02", ecolor="#f0b48a", ms=4)
    ends = [0.8 * float(value.min()), 1.2 * float(np.max([mean.max(), value.max()]))]
    ax.plot(ends, ends, color="#8a8a8a", linewidth=0.8)
    ax.set(xlabel="predicted by the adviser, 2 sd", ylabel="measured", title="Before and after")
    ax.set(xscale="log", yscale="log", xlim=(ends[0] / 3, ends[1]))


register_view(DemoView("llm-bo", "A search advised by a language model, replayed", run, order=75))

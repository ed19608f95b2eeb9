"""Train weights from the command line: ``python -m probkit.models.pfn.train curves``.

``curves`` is the learning-curve network: its defaults reproduce the file that the package ships,
bit for bit on the same processor with one thread (``OMP_NUM_THREADS=1``). ``processes`` is a
surrogate for Bayesian optimization; the shipped file took ``--steps 3500``, and more steps come
closer to the process. A run that is stopped continues when the command is given again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from probkit._version import __version__
from probkit.models.pfn.amortization import amortize
from probkit.models.pfn.curve_prior import CurvePrior
from probkit.models.pfn.curve_scores import curve_scores
from probkit.models.pfn.curve_task import (
    EPOCH_FEATURES,
    METRIC_FEATURES,
    CurveTask,
    curve_borders,
)
from probkit.models.pfn.gp_prior import SURROGATE_PRIOR, process_scores
from probkit.models.pfn.network import SIZES, PFNNetwork, PFNSize
from probkit.models.pfn.predictor import PFN, with_card
from probkit.models.pfn.training import TrainingPlan, train
from probkit.models.pfn.weight_files import WeightFile, save_weights
from probkit.rng import stream
from probkit.sampler import Info

__all__ = ["main", "train_curves", "train_processes"]

_HELD_OUT = 20_231
# mean log density by cut after ten million curves, Adriaensen et al. (2023), table 3
_PUBLISHED = {
    "128 x 3": {"10": 1.585, "20": 1.989, "40": 2.282, "80": 2.431},
    "256 x 6": {"10": 1.721, "20": 2.098, "40": 2.387, "80": 2.514},
    "512 x 12": {"10": 1.758, "20": 2.133, "40": 2.403, "80": 2.519},
}
_LIMITS = (
    "Trained on one processor core, on far fewer curves than the published networks: see the gap "
    "between 'measured' and 'published'. Curves that diverge, turn over, or start slowly lie "
    "outside the prior. Laws of different epochs are marginal; their dependence is not known."
)


def train_curves(
    out: Path,
    plan: TrainingPlan,
    *,
    size: PFNSize,
    queries: int = 24,
    seed: int = 0,
    checkpoint: Path | None = None,
    report: bool = False,
) -> WeightFile:
    """Train a network on the learning-curve prior and write its weight file.

    Args:
        out: The weight file to write.
        plan: Length and speed of the training.
        size: Shape of the network; two features of an epoch, one of a metric value.
        queries: Future epochs asked for in each curve.
        seed: Of borders, starting weights and data.
        checkpoint: Where the run is saved while it lasts; beside ``out`` by default.
        report: Print the loss as it falls.
    """
    prior = CurvePrior()
    borders = curve_borders(prior, size.bars, rng=seed)
    network = PFNNetwork(size, generator=stream(seed, "weights"))
    task = CurveTask(borders, prior, queries)
    if checkpoint is None:
        checkpoint = out.with_suffix(".checkpoint.safetensors")
    callbacks = (_report,) if report else ()
    run = train(network, task, plan, rng=seed, checkpoint=checkpoint, callbacks=callbacks)
    recipe = {**asdict(plan), "queries": queries, "seed": seed}
    recipe.pop("device")
    file = WeightFile(
        prior=prior.version,
        network=asdict(size),
        weights=network.cpu().state_dict(),
        borders=borders,
        constants={
            "horizon": prior.horizon,
            "epoch_features": EPOCH_FEATURES,
            "metric_features": METRIC_FEATURES,
        },
        card={
            "name": "learning curves",
            "use": "predict the rest of a training curve of at most 100 epochs from its start",
            "command": "OMP_NUM_THREADS=1 python -m probkit.models.pfn.train curves",
            "training": recipe,
            "measured": curve_scores(network, borders, rng=_HELD_OUT),
            "measured on": "10000 curves of the prior, seed 20231; coverage of central intervals",
            "published": _PUBLISHED,
            "limits": _LIMITS,
            "curves": run.step * plan.batch,
            "complete": run.step == plan.steps,
            "probkit": __version__,
            "torch": str(torch.__version__),
            "license": "Apache-2.0",
        },
    )
    if run.step == plan.steps:
        save_weights(out, file)
    return file


def train_processes(
    out: Path,
    plan: TrainingPlan,
    *,
    size: PFNSize,
    seed: int = 0,
    checkpoint: Path | None = None,
    report: bool = False,
) -> PFN:
    """Train a surrogate on Gaussian processes of one to six inputs and write its weight file.

    Args:
        out: The weight file to write.
        plan: Length and speed of the training.
        size: Shape of the network.
        seed: Of borders, starting weights and data.
        checkpoint: Where the run is saved while it lasts; beside ``out`` by default.
        report: Print the loss as it falls.
    """
    net = amortize(
        SURROGATE_PRIOR,
        size,
        plan=plan,
        bars=size.bars,
        octaves=(2, 4),
        rng=seed,
        checkpoint=checkpoint or out.with_suffix(".checkpoint.safetensors"),
        callbacks=(_report,) if report else (),
    )
    module = "python -m probkit.models.pfn.train"
    net = with_card(
        net,
        name="Gaussian processes",
        use="a surrogate for Bayesian optimization in the unit cube, up to six inputs",
        command=f"OMP_NUM_THREADS=1 {module} processes --steps {plan.steps}",
        measured=process_scores(net, SURROGATE_PRIOR, rng=_HELD_OUT),
        license="Apache-2.0",
    )
    net.save(out)
    return net


def _report(info: Info) -> None:
    if (info.step // 32) % 10 == 0 or info.done:
        sys.stdout.write(
            f"step {info.step}/{info.total}  loss {info.stats['loss']:.4f}  "
            f"{info.seconds:.0f} processor seconds\n"
        )
        sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m probkit.models.pfn.train")
    parser.add_argument("prior", choices=["curves", "processes"])
    parser.add_argument("--out", type=Path, help="weight file; <prior>.safetensors by default")
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--bars", type=int, default=500)
    parser.add_argument("--steps", type=int, default=11_500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--queries", type=int, default=24)
    parser.add_argument("--average", type=float, default=0.0)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    width, layers, heads = SIZES[given.size]
    plan = TrainingPlan(
        steps=given.steps,
        batch=given.batch,
        lr=given.lr,
        average=given.average,
        precision=given.precision,
        compile=given.compile,
        device=given.device,
    )
    out = given.out or Path(f"{given.prior}.safetensors")
    if given.prior == "processes":
        size = PFNSize(width, layers, heads, given.bars)
        train_processes(out, plan, size=size, seed=given.seed, report=True)
        return
    size = PFNSize(width, layers, heads, given.bars, EPOCH_FEATURES, METRIC_FEATURES)
    train_curves(out, plan, size=size, queries=given.queries, seed=given.seed, report=True)


if __name__ == "__main__":
    main()

"""The trainer: AdamW on endless fresh data, resumable bit for bit.

A *task* draws blocks of simulated data and turns rows of a block into a loss. The data of step s
depend on the seed and on s alone, so a run that was stopped continues from its checkpoint as if it
had never been: weights, moments of the optimiser and the running average are all it saves. Data are
never used twice, so there is nothing to over-fit.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from probkit.errors import DataError
from probkit.files import load_tree, save_tree
from probkit.progress import Progress
from probkit.rng import Rng, seed_of, stream
from probkit.sampler import Info

__all__ = ["Task", "TrainingPlan", "TrainingRun", "train"]

_BLOCK_STEPS = 32  # steps served by one block of simulated data


class Task(Protocol):
    """What a network is trained on.

    Attributes:
        version: Name of the prior and of the way data sets are cut, for checkpoints and files.
    """

    @property
    def version(self) -> str:
        """Name of the prior and of the way data sets are cut."""
        ...

    def block(self, n: int, *, rng: torch.Generator) -> tuple[Tensor, ...]:
        """Simulate ``n`` data sets: tensors [n, ...] on the device of ``rng``."""
        ...

    def loss(
        self, network: Callable[..., Tensor], rows: tuple[Tensor, ...], *, rng: torch.Generator
    ) -> Tensor:
        """Return the mean loss (nats) of a batch of rows of a block."""
        ...


@dataclass(frozen=True)
class TrainingPlan:
    """How long and how fast to train.

    The learning rate rises linearly over the first ``warmup`` share of the steps and falls to zero
    along a cosine, step by step.

    Attributes:
        steps: Gradient steps.
        batch: Data sets in each.
        lr: Highest learning rate; 2e-3 suits a width of 128, wider networks want less.
        warmup: Share of the steps before the highest rate.
        clip: Largest norm of a gradient.
        average: Rate of the exponential average of the weights; 0 keeps the last ones.
        precision: Of matrix products: "float32" or "bfloat16" (autocast; for GPUs). Softmax, bars
            and loss are always float32.
        compile: Whether to run the network through ``torch.compile``.
        device: Where to train.
    """

    steps: int = 1000
    batch: int = 64
    lr: float = 2e-3
    warmup: float = 0.03
    clip: float = 1.0
    average: float = 0.0
    precision: str = "float32"
    compile: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(f"{name}: expected a whole number >= 1, got {value!r}")
        if not 0 < self.lr < math.inf or not 0 < self.clip:
            raise DataError(f"expected lr > 0 and clip > 0, got {self.lr} and {self.clip}")
        if not 0 <= self.warmup < 1 or not 0 <= self.average < 1:
            raise DataError(
                f"expected warmup and average in [0, 1), got {self.warmup} and {self.average}"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise DataError(f"precision: expected 'float32' or 'bfloat16', got {self.precision!r}")

    def rate(self, step: int) -> float:
        """Return the learning rate of step 0, ..., steps - 1."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.lr * (step + 1) / rising
        share = (step - rising) / max(1, self.steps - rising)
        return self.lr * 0.5 * (1 + math.cos(math.pi * share))


@dataclass
class TrainingRun:
    """What a run has done.

    Attributes:
        step: Steps done.
        losses: Mean loss of each block of steps, in nats.
        seconds: Processor seconds spent, over all resumptions.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(
    network: nn.Module,
    task: Task,
    plan: TrainingPlan,
    *,
    rng: Rng,
    checkpoint: str | Path | None = None,
    every: float = 60.0,
    callbacks: Sequence[Callable[[Info], Any]] = (),
) -> TrainingRun:
    """Train ``network`` in place on what ``task`` simulates.

    Args:
        network: Any module that the task's loss can call.
        task: Source of data and loss.
        plan: Length and speed.
        rng: Seed of the data.
        checkpoint: File (.safetensors) to save to and, where it exists, to resume from.
        every: Seconds between saves.
        callbacks: Called with an :class:`~probkit.sampler.Info` after each block of 32 steps; one
            that returns True ends the run (a checkpoint is left).

    Raises:
        DataError: The checkpoint belongs to another run, or the loss is not finite.
    """
    device = torch.device(plan.device)
    network.to(device).train()
    seed = seed_of(rng)
    weights: list[Tensor] = list(network.parameters())
    optimiser = torch.optim.AdamW(weights, lr=plan.lr, betas=(0.9, 0.98), weight_decay=0.0)
    averaged = [weight.detach().clone() for weight in weights] if plan.average else []
    marks = {**asdict(plan), "task": task.version, "seed": seed}
    marks.pop("device")
    run = TrainingRun()
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.is_file():
        _restore(path, marks, run, weights, optimiser, averaged)
    call = torch.compile(network) if plan.compile else network
    saved_at = time.monotonic()
    with Progress() as progress:
        watchers: list[Callable[[Info], Any]] = [progress, *callbacks]
        while run.step < plan.steps:
            started = time.process_time()
            loss = _train_block(call, weights, averaged, optimiser, task, plan, seed, run)
            run.seconds += time.process_time() - started
            run.losses.append(loss)
            if not math.isfinite(loss):
                raise DataError(
                    f"the loss became {loss} by step {run.step}; lower lr or check the simulator"
                )
            done = run.step == plan.steps
            info = Info(run.step, plan.steps, 0, run.seconds, {"loss": loss}, done, "training")
            stop = [watcher(info) is True for watcher in watchers]
            due = time.monotonic() - saved_at >= every or run.step == plan.steps or any(stop)
            if path is not None and due:
                _save(path, marks, run, weights, optimiser, averaged)
                saved_at = time.monotonic()
            if any(stop):
                break
    if averaged and run.step == plan.steps:
        with torch.no_grad():
            for weight, mean in zip(weights, averaged, strict=True):
                weight.copy_(mean)
    network.eval()
    return run


def _train_block(
    call: Callable[..., Tensor],
    weights: list[Tensor],
    averaged: list[Tensor],
    optimiser: torch.optim.Optimizer,
    task: Task,
    plan: TrainingPlan,
    seed: int,
    run: TrainingRun,
) -> float:
    """Do the steps of one block of simulated data; return their mean loss."""
    device = torch.device(plan.device)
    block = run.step // _BLOCK_STEPS
    count = min(_BLOCK_STEPS, plan.steps - block * _BLOCK_STEPS)
    rows = task.block(count * plan.batch, rng=stream(seed, "data", block, device=device))
    total = torch.zeros((), device=device)
    for k in range(count):
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(run.step)
        batch = tuple(part[k * plan.batch : (k + 1) * plan.batch] for part in rows)
        rng = stream(seed, "cut", run.step)
        with _precision(plan):
            loss = task.loss(call, batch, rng=rng)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, plan.clip)
        optimiser.step()
        run.step += 1
        if averaged:
            # the average forgets its start faster while it is young
            keep = min(plan.average, (1 + run.step) / (10 + run.step))
            with torch.no_grad():
                torch._foreach_lerp_(averaged, [w.detach() for w in weights], 1 - keep)
        total += loss.detach()
    return float(total) / count


def _precision(plan: TrainingPlan) -> contextlib.AbstractContextManager[Any]:
    if plan.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(plan.device).type, torch.bfloat16)


def _save(
    path: Path,
    marks: dict[str, Any],
    run: TrainingRun,
    weights: list[Tensor],
    optimiser: torch.optim.Optimizer,
    averaged: list[Tensor],
) -> None:
    state = [optimiser.state[weight] for weight in weights]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tree(
        path,
        {
            "marks": marks,
            "run": asdict(run),
            "weights": [weight.detach().clone() for weight in weights],
            "first": [entry["exp_avg"] for entry in state],
            "second": [entry["exp_avg_sq"] for entry in state],
            "averaged": [mean.clone() for mean in averaged],
        },
    )


@torch.no_grad()
def _restore(
    path: Path,
    marks: dict[str, Any],
    run: TrainingRun,
    weights: list[Tensor],
    optimiser: torch.optim.Optimizer,
    averaged: list[Tensor],
) -> None:
    saved = load_tree(path)
    found = saved["marks"]
    differing = [name for name in {**marks, **found} if marks.get(name) != found.get(name)]
    if differing:
        parts = "; ".join(
            f"{name}: expected {marks.get(name)}, found {found.get(name)}" for name in differing
        )
        raise DataError(
            f"checkpoint {str(path)!r} belongs to another run ({parts}); "
            "choose another file or delete it"
        )
    shapes = [tuple(w.shape) for w in weights]
    if [tuple(w.shape) for w in saved["weights"]] != shapes:
        raise DataError(f"checkpoint {str(path)!r} holds a network of another size")
    run.step = saved["run"]["step"]
    run.losses = list(saved["run"]["losses"])
    run.seconds = saved["run"]["seconds"]
    for k, weight in enumerate(weights):
        weight.copy_(saved["weights"][k])
        optimiser.state[weight] = {
            "step": torch.tensor(float(run.step)),
            "exp_avg": saved["first"][k].to(weight.device),
            "exp_avg_sq": saved["second"][k].to(weight.device),
        }
        if averaged:
            averaged[k].copy_(saved["averaged"][k])

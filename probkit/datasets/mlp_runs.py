"""Training runs of small neural networks, made on the spot: learning curves one epoch at a time."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from probkit.errors import DataError
from probkit.rng import Rng, seed_of, stream

__all__ = ["Epoch", "MLPRun", "random_mlp_runs"]

_SETS = ("digits", "breast_cancer", "wine")


class Epoch(NamedTuple):
    """What is known after an epoch.

    Attributes:
        epoch: 1, 2, 3, ...
        accuracy: Share of the validation set that is classified correctly.
        log_loss: Mean cross-entropy on it, in nats.
    """

    epoch: int
    accuracy: float
    log_loss: float


@dataclass(frozen=True)
class MLPRun:
    """One run: scikit-learn's ``MLPClassifier`` on a data set that scikit-learn carries.

    Iterating trains it and yields the metrics after each epoch. A run that is left early costs
    nothing more.

    Args:
        dataset: "digits", "breast_cancer" or "wine"; a third of the rows validates.
        hidden: Hidden units.
        batch: Rows of a gradient step.
        lr: Learning rate.
        momentum: Nesterov momentum.
        label_noise: Share of the training labels that are drawn anew.
        epochs: Epochs of a full run.
        seed: Of the split, the weights, the noise and the order of rows.

    Raises:
        DataError: An option is out of range.

    Example:
        >>> run = MLPRun("wine", hidden=8, epochs=3, seed=0)
        >>> [metrics.epoch for metrics in run]
        [1, 2, 3]
    """

    dataset: Literal["digits", "breast_cancer", "wine"] = "digits"
    hidden: int = 32
    batch: int = 64
    lr: float = 0.01
    momentum: float = 0.9
    label_noise: float = 0.0
    epochs: int = 30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset not in _SETS:
            raise DataError(f"MLPRun: expected dataset in {_SETS}, got {self.dataset!r}")
        if min(self.hidden, self.batch, self.epochs) < 1:
            raise DataError(
                f"MLPRun: expected hidden, batch and epochs >= 1, got {self.hidden}, {self.batch} "
                f"and {self.epochs}"
            )
        if not (self.lr > 0 and 0 <= self.momentum < 1 and 0 <= self.label_noise <= 1):
            raise DataError(
                "MLPRun: expected lr > 0, 0 <= momentum < 1 and 0 <= label_noise <= 1, got "
                f"{self.lr}, {self.momentum} and {self.label_noise}"
            )

    @property
    def untrained_loss(self) -> float:
        """About the loss before training: the log of the number of classes."""
        return math.log(len(np.unique(_data(self.dataset)[1])))

    def __iter__(self) -> Iterator[Epoch]:
        """Train; yield the metrics after each epoch."""
        from sklearn.neural_network import MLPClassifier

        rng = np.random.default_rng(self.seed)
        x, y = _data(self.dataset)
        order = rng.permutation(len(x))
        cut = len(x) // 3
        x_valid, y_valid, x_train = x[order[:cut]], y[order[:cut]], x[order[cut:]]
        y_train = y[order[cut:]].copy()
        classes = np.unique(y)
        noisy = rng.random(len(y_train)) < self.label_noise
        y_train[noisy] = rng.choice(classes, int(noisy.sum()))
        shift, scale = x_train.mean(0), x_train.std(0) + 1e-6
        x_train, x_valid = (x_train - shift) / scale, (x_valid - shift) / scale
        net = MLPClassifier(
            (self.hidden,),
            solver="sgd",
            batch_size=min(self.batch, len(x_train)),
            learning_rate_init=self.lr,
            momentum=self.momentum,
            alpha=1e-4,
            random_state=self.seed,
        )
        with np.errstate(all="ignore"):
            for epoch in range(1, self.epochs + 1):
                try:
                    net.partial_fit(x_train, y_train, classes=classes)
                    probs = net.predict_proba(x_valid)
                except ValueError:  # the weights overflowed
                    return
                right = probs[np.arange(len(y_valid)), np.searchsorted(classes, y_valid)]
                loss = float(-np.log(right.clip(1e-12)).mean())
                accuracy = float((classes[probs.argmax(1)] == y_valid).mean())
                yield Epoch(epoch, accuracy, loss)


def random_mlp_runs(n: int, *, dataset: str = "digits", epochs: int = 30, rng: Rng) -> list[MLPRun]:
    """Draw ``n`` configurations, good and bad, as a random search would.

    Learning rates are log-uniform on [5e-4, 0.3], hidden units on [4, 64], batch sizes on [16,
    256]; momentum is uniform on [0, 0.95]; four runs in ten have label noise, up to 60 %.

    Args:
        n: Number of runs.
        dataset: See :class:`MLPRun`.
        epochs: Epochs of a full run.
        rng: Seed or generator.
    """
    draw: Any = np.random.default_rng(seed_of(stream(rng, "mlp runs")))
    runs = []
    for k in range(n):
        noise = float(draw.uniform(0, 0.6)) if draw.random() < 0.4 else 0.0
        runs.append(
            MLPRun(
                dataset,  # type: ignore[arg-type]
                hidden=int(2 ** draw.uniform(2, 6)),
                batch=int(2 ** draw.uniform(4, 8)),
                lr=float(10 ** draw.uniform(math.log10(5e-4), math.log10(0.3))),
                momentum=float(draw.uniform(0, 0.95)),
                label_noise=noise,
                epochs=epochs,
                seed=k,
            )
        )
    return runs


@functools.cache
def _data(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [row, feature] and classes [row]."""
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, f"load_{name}")()
    return np.asarray(bunch.data, dtype=np.float64), np.asarray(bunch.target)

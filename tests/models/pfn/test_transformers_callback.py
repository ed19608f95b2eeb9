"""The callback inside real trainings with the Transformers ``Trainer``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what their imports announce
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from probkit.errors import DataError
from probkit.extras import available
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.transformers_callback import TransformersCallback
from probkit.rng import scope

ACC = CurveNormalizer.accuracy()
needs_accelerate = pytest.mark.skipif(
    not available("accelerate"), reason="Trainer of transformers needs the package accelerate"
)


class Classifier(nn.Module):
    """A linear classifier in the form that the trainer expects."""

    def __init__(self):
        super().__init__()
        self.layer = nn.utils.skip_init(nn.Linear, 4, 2)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x, labels):
        logits = self.layer(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(noise, n=120):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    y = (x[:, 0] > 0).long()
    y = torch.where(torch.rand(n, generator=g) < noise, 1 - y, y)
    return [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]


def accuracy(prediction):
    logits, labels = prediction
    return {"accuracy": float((np.argmax(logits, 1) == labels).mean())}


def train(callback, folder, *, noise=0.4, epochs=25, metrics=accuracy, **options):
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=60,
        per_device_eval_batch_size=120,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **({"eval_strategy": "epoch", "learning_rate": 0.05} | options),
    )
    with scope(rng=0, foreign=True):  # the trainer seeds the global streams
        trainer = Trainer(
            Classifier(),
            args,
            train_dataset=rows(noise),
            eval_dataset=rows(noise),
            compute_metrics=metrics,
            callbacks=[callback],
        )
        trainer.train()
    return trainer


@dataclass(frozen=True)
class Arguments:
    """What the callback reads of the training arguments, which cannot be made without a device."""

    eval_strategy: str = "epoch"
    num_train_epochs: float = 25
    eval_steps: float | None = None


def handled(callback, values, args=None, *, log_history=(), max_steps=50):
    """Pass values through the handler that the trainer calls; return it and the control."""
    args, state, control = args or Arguments(), TrainerState(), TrainerControl()
    state.log_history, state.max_steps = list(log_history), max_steps
    handler = CallbackHandler([callback], None, None, None, None)
    control = handler.on_train_begin(args, state, control)
    for value in values:
        control = handler.on_evaluate(args, state, control, {"eval_accuracy": value})
        if control.should_training_stop:
            break
    return handler, args, state, control


def test_the_handler_of_the_trainer_is_told_to_stop(lc):
    callback = TransformersCallback("accuracy", ACC, best=0.97, model=lc)
    *_, control = handled(callback, [0.3 + 0.002 * t for t in range(25)])
    assert control.should_training_stop and callback.watch.stopped_at == callback.watch.steps[-1]
    leader = TransformersCallback("accuracy", ACC, best=0.4, model=lc, delta=0.001)
    handler, args, state, control = handled(leader, [0.5, 0.6, 0.65, 0.7])
    assert not control.should_training_stop
    handler.on_train_end(args, state, control)
    handler.on_evaluate(args, state, control, {"eval_accuracy": 0.1})  # after training
    assert leader.closed.steps == [1, 2, 3, 4]


def test_a_metric_that_becomes_nan_stops_the_training(lc):
    *_, control = handled(TransformersCallback("accuracy", ACC, model=lc), [0.5, float("nan")])
    assert control.should_training_stop


def test_a_run_that_continues_keeps_its_curve(lc):
    callback = TransformersCallback("accuracy", ACC, model=lc, check=[24])
    log = [{"eval_accuracy": 0.4, "step": 2}, {"loss": 1.0}, {"eval_accuracy": 0.5, "step": 4}]
    handled(callback, [0.6], log_history=log)
    assert callback.watch.steps == [1, 2, 3] and callback.watch.values == [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("args", "horizon"),
    [
        (Arguments(), 25),
        (Arguments("steps", eval_steps=10), 5),
        (Arguments("steps", eval_steps=0.1), 10),
    ],
)
def test_the_horizon_counts_evaluations(lc, args, horizon):
    callback = TransformersCallback("accuracy", ACC, model=lc)
    handled(callback, [], args)
    assert callback.watch.horizon == horizon


def test_bad_input(lc):
    with pytest.raises(DataError, match="delta: expected a probability"):
        TransformersCallback("accuracy", ACC, delta=-1)
    with pytest.raises(
        DataError, match="expected the metric 'eval_f1' to be evaluated, found eval"
    ):
        handled(TransformersCallback("f1", ACC, model=lc), [0.5])
    with pytest.raises(DataError, match="at least two evaluations in a full run, got 0"):
        handled(TransformersCallback("accuracy", ACC, model=lc), [], Arguments("no"))


# ------------------------------------------------------------------ whole trainings


@pytest.fixture
def no_datasets(monkeypatch):
    """The folder of our tests of data sets is no package of that name."""
    monkeypatch.setattr("transformers.trainer.is_datasets_available", lambda: False)


@needs_accelerate
@pytest.mark.parametrize("options", [{}, {"eval_strategy": "steps", "eval_steps": 2}])
def test_a_hopeless_training_is_stopped(lc, tmp_path, options, capsys, no_datasets):
    callback = TransformersCallback("accuracy", ACC, best=0.97, model=lc)
    trainer = train(callback, tmp_path, **options)
    assert callback.closed.horizon == 25
    assert callback.closed.stopped_at is not None
    assert trainer.state.epoch == callback.closed.stopped_at < 20


@needs_accelerate
def test_a_training_that_leads_goes_on_while_it_may_improve(lc, tmp_path, capsys, no_datasets):
    callback = TransformersCallback("eval_accuracy", ACC, best=0.4, delta=0.0001, model=lc)
    trainer = train(callback, tmp_path, noise=0.1, epochs=4, learning_rate=0.001)
    assert trainer.state.epoch == 4 and callback.closed.stopped_at is None
    with scope(rng=0, foreign=True):
        trainer.evaluate()  # after training: not a part of the curve
    assert callback.closed.steps == [1, 2, 3, 4]


def test_it_is_a_callback_of_transformers(lc):
    callback = TransformersCallback("accuracy", ACC, model=lc)
    assert isinstance(callback, TrainerCallback) and callback.metric == "eval_accuracy"

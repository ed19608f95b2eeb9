"""The trainer: resumption, schedules, and what it refuses."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from probkit.errors import DataError
from probkit.models.pfn import CurvePrior, PFNNetwork, PFNSize, TrainingPlan
from probkit.models.pfn.curve_task import METRIC_FEATURES, CurveTask, curve_borders
from probkit.models.pfn.training import train
from probkit.rng import stream

PLAN = TrainingPlan(steps=70, batch=8, average=0.99)


@pytest.fixture(scope="module")
def task():
    prior = CurvePrior()
    return CurveTask(curve_borders(prior, 40, rng=0, curves=1000), prior, queries=6)


def network(seed=0):
    size = PFNSize(16, 1, 2, 40, features=2, targets=METRIC_FEATURES)
    return PFNNetwork(size, generator=stream(seed, "weights"))


def weights(net):
    return torch.cat([w.detach().flatten() for w in net.parameters()])


def test_a_stopped_run_resumes_bit_for_bit(task, tmp_path):
    whole, parts, file = network(), network(), tmp_path / "run.safetensors"
    train(whole, task, PLAN, rng=0)
    stopped = train(parts, task, PLAN, rng=0, checkpoint=file, callbacks=[lambda i: i.step >= 32])
    assert stopped.step == 32
    resumed = network(seed=5)  # its weights come from the file
    run = train(resumed, task, PLAN, rng=0, checkpoint=file)
    assert run.step == 70
    assert len(run.losses) == 3
    assert torch.equal(weights(whole), weights(resumed))
    assert run.seconds > stopped.seconds


def test_a_finished_run_is_not_repeated(task, tmp_path):
    file = tmp_path / "run.safetensors"
    first = network()
    train(first, task, PLAN, rng=0, checkpoint=file)
    again = network(seed=5)
    train(again, task, PLAN, rng=0, checkpoint=file)
    assert torch.equal(weights(first), weights(again))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 71}, "steps: expected 71, found 70"), ({"lr": 1e-3}, "lr: expected 0.001")],
)
def test_another_run_is_refused(task, tmp_path, change, message):
    file = tmp_path / "run.safetensors"
    train(network(), task, PLAN, rng=0, checkpoint=file, callbacks=[lambda i: True])
    with pytest.raises(DataError, match=message):
        train(network(), task, dataclasses.replace(PLAN, **change), rng=0, checkpoint=file)
    with pytest.raises(DataError, match="seed: expected 1, found 0"):
        train(network(), task, PLAN, rng=1, checkpoint=file)


def test_another_size_is_refused(task, tmp_path):
    file = tmp_path / "run.safetensors"
    train(network(), task, PLAN, rng=0, checkpoint=file, callbacks=[lambda i: True])
    wide = PFNNetwork(
        PFNSize(32, 1, 2, 40, 2, METRIC_FEATURES), generator=torch.Generator().manual_seed(0)
    )
    with pytest.raises(DataError, match="another size"):
        train(wide, task, PLAN, rng=0, checkpoint=file)


def test_the_rate_rises_and_falls():
    plan = TrainingPlan(steps=1000, lr=2e-3, warmup=0.03)
    rates = [plan.rate(k) for k in range(1000)]
    assert rates[0] == pytest.approx(2e-3 / 30)
    assert max(rates) == pytest.approx(2e-3)
    assert rates.index(max(rates)) in (29, 30)
    assert rates[515] == pytest.approx(1e-3, rel=0.01)
    assert rates[-1] < 1e-7
    assert all(rate > 0 for rate in rates)


def test_the_loss_is_that_of_the_bars(task):
    """An untrained head of equal logits loses the logarithm of the number of bars."""

    def flat(x, y, query):
        return torch.zeros(*query.shape[:2], 40, requires_grad=True)

    rows = task.block(8, rng=torch.Generator().manual_seed(0))
    loss = task.loss(flat, rows, rng=torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(40), abs=1e-6)


def test_training_lowers_the_loss(task):
    run = train(network(), task, TrainingPlan(steps=320, batch=16, lr=5e-3), rng=0)
    assert run.losses[-1] < run.losses[0] - 0.15
    assert run.losses[-1] < math.log(40)


def test_a_diverged_run_is_told(task):
    net = network()
    with torch.no_grad():
        net.head.bias.fill_(math.nan)
    with pytest.raises(DataError, match="the loss became nan"):
        train(net, task, PLAN, rng=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected a whole number >= 1, got 0"),
        ({"lr": -1.0}, "expected lr > 0"),
        ({"warmup": 1.0}, r"expected warmup and average in \[0, 1\)"),
        ({"precision": "half"}, "precision: expected 'float32' or 'bfloat16', got 'half'"),
    ],
)
def test_bad_plans(options, message):
    with pytest.raises(DataError, match=message):
        TrainingPlan(**options)


def test_bfloat16_trains(task):
    net = network()
    run = train(net, task, TrainingPlan(steps=32, batch=8, precision="bfloat16"), rng=0)
    assert all(math.isfinite(loss) for loss in run.losses)
    assert next(net.parameters()).dtype == torch.float32

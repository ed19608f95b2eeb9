"""Prior-data fitted networks on a CUDA device; skipped where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.models.pfn import CurvePrior, LearningCurvePFN, PFNNetwork, PFNSize, TrainingPlan
from probkit.models.pfn.curve_prior import mean_curve
from probkit.models.pfn.curve_task import METRIC_FEATURES, CurveTask, curve_borders
from probkit.models.pfn.training import train
from probkit.rng import stream

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_curves_drawn_on_the_device_follow_the_prior():
    values, (t, y) = CurvePrior().sample_dataset(20_000, rng=stream(0, "curves", device="cuda"))
    assert y.device.type == "cuda"
    f = mean_curve(values, t)
    assert f[:, 0].mean().item() == pytest.approx(0.417, abs=0.007)
    assert f[:, -1].mean().item() == pytest.approx(0.612, abs=0.007)


@pytest.mark.parametrize("compiled", [False, True])
def test_training_in_bfloat16(compiled, tmp_path):
    prior = CurvePrior()
    task = CurveTask(curve_borders(prior, 40, rng=0, curves=1000), prior, queries=6)
    size = PFNSize(32, 2, 4, 40, 2, METRIC_FEATURES)
    network = PFNNetwork(size, generator=stream(0, "weights"))
    plan = TrainingPlan(
        steps=320, batch=64, lr=4e-3, precision="bfloat16", compile=compiled, device="cuda"
    )
    run = train(network, task, plan, rng=0, checkpoint=tmp_path / "run.safetensors")
    assert run.losses[-1] < math.log(40) - 0.2
    assert run.losses[-1] < run.losses[0]


def test_predictions_equal_those_of_the_cpu():
    seen = [[0.2, 0.3, 0.36, 0.41], [0.1, 0.15]]
    here, there = (
        LearningCurvePFN.load(device=device, out_of_prior="ignore").predict(seen).median.cpu()
        for device in ("cpu", "cuda")
    )
    assert (here - there).abs().max() < 1e-3

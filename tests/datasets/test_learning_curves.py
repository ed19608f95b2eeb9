"""Readers of learning curves on small files of each format, and runs trained on the spot."""

from __future__ import annotations

import gzip
import json
import math
import os
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import sklearn.neural_network  # noqa: F401  (its import draws a random number)
import torch

from probkit.datasets import (
    MLPRun,
    load_lcbench,
    load_lcdb_curves,
    load_mlp_curves,
    load_nasbench201,
    load_pd1,
    load_taskset,
    random_mlp_runs,
)
from probkit.errors import DataError


def lists(curves):
    return [one.tolist() for one in curves.y]


def test_lcdb(tmp_path):
    text = (
        "openmlid,learner,size_train,n,valid_mean,test_mean,valid_s0\n"
        "3,svc,23,5,0.7,0.71,\n3,svc,16,5,0.6,0.61,0.5\n5,tree,16,5,0.8,0.81,0.7\n"
    )
    (tmp_path / "lcdb_accuracy_curves.csv.gz").write_bytes(gzip.compress(text.encode()))
    curves = load_lcdb_curves(tmp_path)
    assert lists(curves) == [[0.61, 0.71], [0.81]] and curves.metric == "accuracy"
    assert curves.runs["learner"].tolist() == ["svc", "tree"]
    assert curves.t[0].tolist() == [1, 2]
    assert lists(load_lcdb_curves(tmp_path, value="valid_s0")) == [[0.7]]  # gaps are left out
    with pytest.raises(DataError, match="expected the columns nope"):
        load_lcdb_curves(tmp_path, value="nope")


def test_mlp_files(tmp_path):
    acc = np.array([[0.1, 0.5, 0.6], [0.2, 0.3, 0.4]], dtype=np.float32)
    file = tmp_path / "mlp_epoch_curves.npz"
    np.savez(file, acc=acc, loss=3 - acc, dataset=["wine", "digits"], config=np.zeros((2, 8)))
    curves = load_mlp_curves(file, metric="accuracy")
    assert torch.allclose(curves.y[1], torch.tensor([0.3, 0.4]).double(), atol=1e-7)
    assert torch.allclose(curves.y0, torch.tensor([0.1, 0.2]).double(), atol=1e-7)
    loss = load_mlp_curves(tmp_path, metric="log loss")
    assert loss.metric == "log loss" and float(loss.y0[0]) == pytest.approx(2.9)
    assert loss.select(loss.runs["dataset"] == "digits").lengths == (2,)
    with pytest.raises(DataError, match="expected 'accuracy' or 'log loss'"):
        load_mlp_curves(file, metric="loss")
    np.savez(file, acc=acc)
    with pytest.raises(DataError, match="expected the arrays dataset, config"):
        load_mlp_curves(file, metric="accuracy")


@pytest.mark.parametrize("packed", [False, True])
def test_lcbench(tmp_path, packed):
    entry = {
        "config": {"lr": 0.1},
        "log": {"Train/val_accuracy": [10.0, 80.0], "Train/val_cross_entropy": [2.3, 0.7]},
    }
    text = json.dumps({"adult": {"0": entry, "1": entry}, "higgs": {"0": entry}}).encode()
    file = tmp_path / ("data.json.gz" if packed else "data.json")
    file.write_bytes(gzip.compress(text) if packed else text)
    curves = load_lcbench(file)
    assert lists(curves) == [[0.1, 0.8]] * 3 and curves.runs["lr"].tolist() == [0.1] * 3
    loss = load_lcbench(file, dataset="higgs", tag="Train/val_cross_entropy")
    assert lists(loss) == [[2.3, 0.7]] and loss.metric == "log loss"
    with pytest.raises(DataError, match="has no data set 'iris', but adult, higgs"):
        load_lcbench(file, dataset="iris")
    with pytest.raises(DataError, match="configuration 0 of adult does not log 'x', but Train/val"):
        load_lcbench(file, tag="x")


def test_lcbench_that_is_no_json(tmp_path):
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(DataError, match="expected JSON"):
        load_lcbench(tmp_path / "data.json")


def test_nasbench201(tmp_path):
    def result(values):
        return {"eval_acc1es": OrderedDict((f"x-valid@{k}", v) for k, v in enumerate(values))}

    runs = OrderedDict(
        {("cifar10-valid", 777): result([20.0, 60.0, 90.0]), ("cifar100", 777): result([1.0])}
    )
    archs = {0: {"full": {"arch_str": "|skip|", "all_results": runs}, "less": {}}}
    torch.save({"arch2infos": archs, "meta_archs": ["|skip|"]}, tmp_path / "nb.pth")
    curves = load_nasbench201(tmp_path / "nb.pth")
    assert curves.metric == "error" and curves.runs["seed"].tolist() == [777]
    assert torch.allclose(curves.y[0], torch.tensor([0.8, 0.4, 0.1]).double())
    accuracy = load_nasbench201(tmp_path / "nb.pth", dataset="cifar100", error=False)
    assert lists(accuracy) == [[0.01]]
    with pytest.raises(DataError, match="no curve found"):
        load_nasbench201(tmp_path / "nb.pth", budget="less")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch.save({"arch2infos": Path("x")}, tmp_path / "nb.pth")
    with pytest.raises(DataError, match="made of plain containers"):
        load_nasbench201(tmp_path / "nb.pth")


def test_taskset(tmp_path):
    ys = np.arange(2 * 5 * 3 * 4, dtype=float).reshape(2, 5, 3, 4)
    ys[1, 2, 2] = math.nan
    np.savez(tmp_path / "mlp.npz", optimizers=np.array([b"a", b"b"]), xs=[0, 200, 400], ys=ys)
    curves = load_taskset(tmp_path / "mlp.npz", replica=0)
    assert lists(curves) == [[5.0, 9.0], [65.0, 69.0]] and curves.y0.tolist() == [1.0, 61.0]
    assert curves.runs["optimizer"].tolist() == ["a", "b"]
    mean = load_taskset(tmp_path / "mlp.npz", channel=0)
    assert mean.y[0][0] == ys[0, :, 1, 0].mean() and math.isnan(mean.y[1][1])
    with pytest.raises(DataError, match="has 4 channels and 5 replicas, got channel=4"):
        load_taskset(tmp_path / "mlp.npz", channel=4)
    np.savez(tmp_path / "late.npz", xs=[200, 400, 600], ys=ys)
    with pytest.raises(DataError, match="begins before training, at 0"):
        load_taskset(tmp_path / "late.npz")
    np.savez(tmp_path / "flat.npz", xs=[0], ys=ys[0, 0])
    with pytest.raises(DataError, match="expected the arrays xs"):
        load_taskset(tmp_path / "flat.npz")


def test_pd1(tmp_path):
    trials = [
        {"study_group": "a", "valid/ce_loss": [3.0, None, 1.0], "hps.lr": 0.1, "hps.x": [1]},
        {"study_group": "b", "valid/ce_loss": [2.0, float("nan")], "valid/error_rate": [0.5]},
        {"study_group": "a", "valid/ce_loss": None},
    ]
    text = "\n".join(json.dumps(trial) for trial in trials) + "\n"
    (tmp_path / "pd1.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    curves = load_pd1(tmp_path / "pd1.jsonl.gz")
    assert lists(curves) == [[3.0, 1.0], [2.0]] and curves.metric == "log loss"
    assert curves.runs["diverged"].tolist() == [False, True]
    assert curves.runs["lr"].tolist()[0] == 0.1 and "x" not in curves.runs
    assert lists(load_pd1(tmp_path / "pd1.jsonl.gz", study="b")) == [[2.0]]
    assert load_pd1(tmp_path / "pd1.jsonl.gz", metric="valid/error_rate").metric == "error"
    (tmp_path / "bad.jsonl").write_text("{}\n{")
    with pytest.raises(DataError, match=r"bad.jsonl, line 2: expected JSON"):
        load_pd1(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    "read", [load_lcbench, load_nasbench201, load_taskset, load_pd1, load_lcdb_curves]
)
def test_missing_files(read, tmp_path):
    with pytest.raises(DataError, match="expected a file at"):
        read(tmp_path / "nothing.json")


# ------------------------------------------------------------------ runs on the spot


def test_a_run_learns_and_repeats():
    run = MLPRun("wine", hidden=16, lr=0.05, epochs=8, seed=3)
    first, again = list(run), list(run)
    assert first == again and [one.epoch for one in first] == list(range(1, 9))
    assert first[-1].accuracy > 0.9 and first[-1].log_loss < run.untrained_loss / 2
    assert list(MLPRun("wine", hidden=16, lr=0.05, epochs=8, seed=4)) != first


def test_label_noise_hurts():
    clean, noisy = (
        list(MLPRun("wine", hidden=16, lr=0.05, label_noise=share, epochs=8))[-1].log_loss
        for share in (0.0, 0.9)
    )
    assert noisy > 2 * clean


def test_a_run_that_diverges_ends_without_a_warning():
    metrics = list(MLPRun("digits", lr=1e6, momentum=0.99, epochs=5))
    assert all(math.isfinite(one.log_loss) for one in metrics)


def test_random_runs():
    runs = random_mlp_runs(40, dataset="wine", epochs=5, rng=1)
    assert runs == random_mlp_runs(40, dataset="wine", epochs=5, rng=1)
    assert 8 <= sum(run.label_noise > 0 for run in runs) <= 24  # 16 expected, sd 3.1
    assert all(5e-4 <= run.lr <= 0.3 and 4 <= run.hidden <= 64 for run in runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "iris"}, "expected dataset in"),
        ({"epochs": 0}, "hidden, batch and epochs >= 1"),
        ({"momentum": 1.0}, "0 <= momentum < 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(DataError, match=message):
        MLPRun(**options)


@pytest.mark.skipif("PROBKIT_DATA" not in os.environ, reason="needs PROBKIT_DATA")
def test_the_real_files():
    folder = Path(os.environ["PROBKIT_DATA"]) / "pfn"
    assert len(load_lcdb_curves(folder)) == 2922
    runs = load_mlp_curves(folder, metric="accuracy")
    assert len(runs) == 180 and set(runs.lengths) == {100}

"""Two gloo processes on one machine share a fit: the result is that of a single process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.fits import GroupModel, LineModel, RateModel, line_data

import probkit as pk
from probkit.errors import CapabilityError, DataError
from probkit.inference import SVI, FullRank
from probkit.inference.ranks import Ranks

TESTS = Path(__file__).parents[1]

WORKER = """
import json, sys
import torch, torch.distributed as group
sys.path.append(sys.argv[4])
from support.fits import GroupModel, LineModel, line_data
import probkit as pk
from probkit.inference import SVI, FullRank, MeanField

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
group.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
found = {}
shared = SVI(steps=60, chunk=7, lr=0.05, decay=0.05, distributed=True, evidence_draws=50)
whole = pk.infer(LineModel(), line_data(), shared, guide=FullRank(), rng=3)
found["whole"] = {k: v.tolist() for k, v in whole.source.params[0].items() if k != "local"}
natural = SVI(steps=1, lr=1.0, update="natural", distributed=True, evidence_draws=50)
step = pk.infer(LineModel(), line_data(), natural, guide=FullRank(), rng=3)
found["natural"] = step.marginals["w"].mean.tolist()
y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0, -0.5], dtype=torch.float64)
batches = SVI(steps=700, lr=0.05, decay=0.005, batch_size=1, distributed=True)
fit = pk.infer(GroupModel(), y, batches, guide=MeanField(), rng=0)
found["batches"] = [fit.marginals["mu"].mean.tolist(), *fit.marginals["z"].mean.tolist()]
stop = SVI(steps=2000, lr=0.05, window=40, batch_size=2, distributed=True)
ended = pk.infer(GroupModel(), y, stop, guide=MeanField(), rng=0)
found["converged"] = ended.attrs["converged"]
found["mu"] = float(ended.marginals["mu"].mean)
with open(out, "w") as file:
    json.dump(found, file)
group.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(WORKER)
    outs = [folder / f"{rank}.json" for rank in range(2)]
    runs = [
        subprocess.Popen(
            [sys.executable, folder / "worker.py", str(rank), folder / "store", out, TESTS],
            stderr=subprocess.PIPE,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    errors = [run.communicate(timeout=300)[1] for run in runs]
    assert all(run.returncode == 0 for run in runs), "\n".join(errors)
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.slow
def test_both_processes_hold_the_same_fit(ranks):
    assert ranks[0] == ranks[1]


@pytest.mark.slow
def test_shards_together_are_the_single_process(ranks):
    """Half of the rows each, the same draws: the averaged gradient is that of all rows."""
    single = SVI(steps=60, chunk=7, lr=0.05, decay=0.05, evidence_draws=50)
    post = pk.infer(LineModel(), line_data(), single, guide=FullRank(), rng=3)
    for name, value in post.source.params[0].items():
        if name != "local":
            found = torch.tensor(ranks[0]["whole"][name], dtype=torch.float64)
            torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_natural_steps_are_shared(ranks):
    mean, _, _ = LineModel().exact(line_data())
    torch.testing.assert_close(torch.tensor(ranks[0]["natural"], dtype=torch.float64), mean)


@pytest.mark.slow
def test_batches_of_both_find_the_optimum(ranks):
    """Own indexes of each process, local sites on both: tolerance as for one process."""
    y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0, -0.5], dtype=torch.float64)
    mean, covariance, _ = GroupModel().exact(y)
    precision = torch.linalg.inv(covariance).diagonal().sqrt()
    found = torch.tensor(ranks[0]["batches"], dtype=torch.float64)
    assert float(((found - mean) * precision).abs().max()) < 5 * 3 * (0.05 * 0.005) ** 0.5


@pytest.mark.slow
def test_processes_agree_on_when_to_stop(ranks):
    assert ranks[0]["converged"] is True


def test_shards_cut_the_units():
    shards = [Ranks(rank, 3).shard(8).tolist() for rank in range(3)]
    assert shards == [[0, 3, 6], [1, 4, 7], [2, 5]]
    with pytest.raises(DataError, match="at least one unit for each of 3 processes, got 2"):
        Ranks(0, 3).shard(2)


def test_the_scale_makes_the_mean_of_processes_the_sum_of_shards(monkeypatch):
    """Gradients of the log joint over 5 units on 2 uneven shards, against all at once."""
    model, data = GroupModel(), torch.linspace(-1, 2, 5, dtype=torch.float64)
    sampler = SVI(distributed=True)
    problem = pk.sampler.Problem(model, data)
    feed = {"seed": 1, "epoch": 0, "position": 0, "order": None}
    rng = torch.Generator().manual_seed(0)
    values = {"mu": torch.tensor(0.3, dtype=torch.float64), "z": data.square()}
    terms = []
    for rank in range(2):
        batch, _ = sampler._next_batch(problem, feed, rng, Ranks(rank, 2))
        chosen = {"mu": values["mu"], "z": values["z"][batch.index]}
        terms.append(model.log_joint(chosen, batch.data, scale=batch.scale))
    torch.testing.assert_close(torch.stack(terms).mean(), model.log_joint(values, data))


def test_shared_fits_need_minibatches():
    group = torch.distributed
    store = group.HashStore()
    group.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(CapabilityError, match=r"SVI\(distributed=True\) needs plate_size"):
            pk.infer(RateModel(), line_data()[1].abs(), SVI(distributed=True), rng=0)
        with pytest.raises(DataError, match="importance= cannot be shared among processes"):
            pk.infer(LineModel(), line_data(), SVI(distributed=True, importance=2), rng=0)
    finally:
        group.destroy_process_group()

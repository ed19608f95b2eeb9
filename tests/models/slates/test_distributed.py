"""Two gloo processes share users, and the rows of the item table: one process's result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.slates import random_log

import probkit as pk
from probkit.inference import SVI
from probkit.inference.ranks import Ranks
from probkit.inference.row_adam import own_rows
from probkit.loader import Loader
from probkit.model import Batch
from probkit.models.slates import SlateGRU, SlateMeanField, SlatePrior

TESTS = Path(__file__).parents[2]

WORKER = """
import json, sys
import torch, torch.distributed as group
sys.path[:0] = [sys.argv[4], sys.argv[5]]
import probkit as pk
from test_distributed import GUIDES, batches, fit, problem

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
group.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
found = {name: fit(guide, rank, 2, name) for name, guide in GUIDES.items()}
with open(out, "w") as file:
    json.dump(found, file)
group.destroy_process_group()
"""

GUIDES = {
    "whole": SlateMeanField(divergence="uniform", subset=6),
    "table": SlateMeanField(users="table", divergence="uniform", subset=6),
    "small": SlateMeanField(divergence="all"),
    "batches": SlateMeanField(divergence="uniform", subset=6),
}


def problem():
    log = random_log(users=8, steps=3, slots=3, items=38, seed=0, n_groups=2)
    model = SlateGRU(
        log.n_items,
        groups=log.groups,
        transition="gru",
        dim=2,
        prior=SlatePrior(multiplier=0.2),
        dtype=torch.float64,
    )
    return model, log


def batches(rank, world):
    """Batches of four users; each process has its part of every one."""
    model, log = problem()
    del model

    def factory(epoch, generator):
        for chosen in torch.randperm(8, generator=generator).split(4):
            mine = chosen[rank::world]
            yield Batch(log.take(mine), mine, scale=8 / len(mine))

    return Loader(factory, units=8, example=log.take(torch.arange(2)))


def fit(guide, rank, world, name):
    """Parameters after a few steps."""
    model, log = problem()
    data = batches(rank, world) if name == "batches" else log
    sampler = SVI(steps=7, chunk=3, particles=2, distributed=world > 1, evidence_draws=2)
    post = pk.infer(model, data, sampler, guide=guide, rng=5)
    return {
        name: {key: value.tolist() for key, value in own.items()}
        for name, own in post.source.params[0].items()
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "worker.py").write_text(WORKER)
    outs = [folder / f"{rank}.json" for rank in range(2)]
    here = Path(__file__).parent
    runs = [
        subprocess.Popen(
            [sys.executable, folder / "worker.py", str(rank), folder / "store", out, TESTS, here],
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
@pytest.mark.parametrize("name", list(GUIDES))
def test_two_processes_give_the_result_of_one(ranks, name):
    """Half of the users each, half of the item rows each, the same draws: equal to rounding."""
    single = fit(GUIDES[name], 0, 1, name)
    assert set(single) == set(ranks[0][name])
    for site, own in single.items():
        for key, value in own.items():
            found = torch.tensor(ranks[0][name][site][key], dtype=torch.float64)
            expected = torch.tensor(value, dtype=torch.float64)
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9, msg=f"{site} {key}")


@pytest.mark.slow
def test_the_fit_moved(ranks):
    model, log = problem()
    start = GUIDES["whole"].init(model, log, rng=pk.rng.stream(5, "chain", 0))
    found = torch.tensor(ranks[0]["whole"]["items"]["loc"], dtype=torch.float64)
    assert float((found - start["items"]["loc"]).abs().mean()) > 0.01


def test_rows_are_dealt_in_turn():
    table = {"x": torch.arange(5.0)}
    assert [own_rows(table, Ranks(k, 2))["x"].tolist() for k in range(2)] == [[0, 2, 4], [1, 3]]

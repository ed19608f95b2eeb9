"""Runs that another process starts, is killed in, and starts again."""

from __future__ import annotations

import time

import torch

import probkit as pk
from probkit.checkpoint import Checkpoint
from probkit.inference import MAP, SVI, Direct, ImportanceSampling
from probkit.kernels import NNGPKernel
from probkit.models import ScaleMixtureNNGP
from support.fits import GroupModel, LineModel, Metropolis, RateModel, line_data

Y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0], dtype=torch.float64)


def process_problem():
    x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    return ScaleMixtureNNGP(NNGPKernel(depth=2)), (x, (3 * x[:, 0]).sin())


#: Name -> (model, data, sampler, chains).
RUNS = {
    "SVI": lambda: (GroupModel(), Y, SVI(steps=60, chunk=2, batch_size=2), 2),
    "ImportanceSampling": lambda: (
        LineModel(1.0),
        line_data(4),
        ImportanceSampling(600, chunk=20, proposal="prior"),
        2,
    ),
    "MAP": lambda: (RateModel(), Y, MAP(restarts=8, chunk=1), 2),
    "Direct(hyper=MAP)": lambda: (
        *process_problem(),
        Direct(hyper=MAP(restarts=2, chunk=1, tolerance=1e-3)),
        1,
    ),
    "Metropolis": lambda: (LineModel(), line_data(), Metropolis(150, width=2, each=5), 3),
}


def run(name, folder=None, *, pause=0.0, callbacks=()):
    """Run one of :data:`RUNS`, saving after every step and resting after it."""
    model, data, sampler, chains = RUNS[name]()
    checkpoint = None if folder is None else Checkpoint(folder, steps=1)
    rest = [lambda info: time.sleep(pause)] if pause else []
    return pk.infer(
        model,
        data,
        sampler,
        rng=11,
        chains=chains,
        checkpoint=checkpoint,
        callbacks=[*rest, *callbacks],
    )


def run_slowly(name, folder):
    """What the process that is killed does."""
    run(name, folder, pause=0.05)

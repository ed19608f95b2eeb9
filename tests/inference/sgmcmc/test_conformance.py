"""SGLD and SGHMC hold what every sampler must hold."""

from __future__ import annotations

import pytest
import torch
from support.fits import GroupModel, LineModel, line_data

from probkit.inference import SGHMC, SGLD, Cyclical
from probkit.testing import SamplerConformance

pytestmark = pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")


class OnLine(SamplerConformance):
    moment_chains = 64
    stops = 4
    # Variances are too large by step * precision * preconditioner / 4: 4 % at the step of SGLD.
    bias = 0.02

    def moments(self):
        mean, covariance, _ = LineModel().exact(line_data())
        return {"w": (mean, covariance.diagonal().sqrt())}


class TestSGLD(OnLine):
    def problem(self):
        return SGLD(24, warmup=12, chunk=8, block=2), LineModel(), line_data()

    def precise(self):
        return SGLD(144, warmup=500, step_size=0.02, thin=5, block=64)


class TestSGHMC(OnLine):
    def problem(self):
        return SGHMC(16, warmup=20, chunk=7, block=2), LineModel(), line_data()

    def precise(self):
        return SGHMC(144, warmup=200, step_size=0.05, friction=0.1, thin=5, block=64)


class TestOnBatches(SamplerConformance):
    """Own indexes of every chain, local sites, and cycles."""

    stops = 5

    def problem(self):
        sampler = SGHMC(
            12, warmup=5, batch_size=2, chunk=4, thin=2, step_size=Cyclical(0.1, 3), block=2
        )
        data = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0], dtype=torch.float64)
        return sampler, GroupModel(), data

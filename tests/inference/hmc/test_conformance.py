"""HMC and NUTS hold what every sampler must hold."""

from __future__ import annotations

import pytest
from support.fits import LineModel, line_data

from probkit.inference.hmc import HMC, NUTS
from probkit.testing import SamplerConformance

pytestmark = pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")


class OnLine(SamplerConformance):
    moment_chains = 32
    stops = 5

    def moments(self):
        mean, covariance, _ = LineModel().exact(line_data())
        return {"w": (mean, covariance.diagonal().sqrt())}


class TestHMC(OnLine):
    def problem(self):
        return HMC(24, warmup=40, chunk=8, block=2), LineModel(), line_data()

    def precise(self):
        return HMC(225, warmup=150, block=32)


class TestNUTS(OnLine):
    def problem(self):
        return NUTS(16, warmup=24, chunk=5, block=2), LineModel(), line_data()

    def precise(self):
        return NUTS(144, warmup=100, block=32)


class TestDenseNUTS(OnLine):
    """The shared tests again where the state holds matrices, without the long run."""

    stops = 3

    def problem(self):
        return NUTS(8, warmup=24, chunk=8, block=2, dense=True), LineModel(), line_data()

    def moments(self):
        return None

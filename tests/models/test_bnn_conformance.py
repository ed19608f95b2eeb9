"""Bayesian neural networks pass the conformance suite of models."""

from __future__ import annotations

import torch

from probkit.inference import SVI
from probkit.models import BNN, LogNormal
from probkit.testing import ModelConformance

X = torch.tensor([[0.1, -0.4], [0.9, 0.3], [-0.5, 0.8], [0.2, 0.6], [-1.0, -0.7]]).double()
Y = torch.tensor([0.3, -0.2, 0.9, 0.4, -0.8]).double()
NEW = torch.tensor([[0.0, 0.0], [0.5, -0.5], [-1.5, 1.0]]).double()


class TestIid(ModelConformance):
    latents = ("f",)
    prior_draws = 150

    def problem(self):
        model = BNN(hidden=(3,), noise_var=LogNormal(-2.0, 0.7), prior_std=0.8, inputs=X)
        return model, (X, Y), NEW

    def sampler(self):
        return SVI(steps=50, evidence_draws=20)


class TestFanInWithLearnedGains(TestIid):
    def problem(self):
        model = BNN(
            hidden=(3, 2),
            activation="erf",
            prior="fan_in",
            gains=(1.5, 0.8),
            learn_gains=0.4,
            noise_var=0.2,
            inputs=X,
        )
        return model, (X, Y), NEW


class TestSeveralOutputs(TestIid):
    def problem(self):
        y = torch.stack([Y, Y.square(), 1 - Y], 1)
        model = BNN(hidden=(3,), noise_var=LogNormal(-2.0, 0.7), outputs=3, inputs=X)
        return model, (X, y), NEW


class TestStandardised(TestIid):
    def problem(self):
        return BNN(hidden=(3,), standardize=True), (X, 10 + 5 * Y), NEW

    test_prior_draws_follow_the_density = None
    test_prior_draws_have_the_shape_of_the_sites = None
    test_simulate_gives_one_data_set_for_each_value = None
    test_simulated_pairs_follow_the_log_joint = None


class TestLinear(TestIid):
    def problem(self):
        return BNN(hidden=(), noise_var=0.3, inputs=X), (X, Y), NEW

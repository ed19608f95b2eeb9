"""Entropic resampling: other ancestors, the same estimates."""

from __future__ import annotations

import math

import pytest
import torch

from probkit import infer
from probkit.errors import DataError
from probkit.inference import ParticleFilter
from probkit.inference.smc import Entropic, entropic, tempered_resample
from probkit.inference.smc.cloud import Cloud

MODES = ("ess", "entropy", "base")


def cloud_of(weights):
    log_weights = torch.tensor(weights, dtype=torch.float64).log()
    particles = torch.arange(len(weights))
    return Cloud(particles, log_weights, torch.zeros((), dtype=torch.float64))


def test_temperatures_are_those_of_the_formulas():
    cloud = cloud_of([0.7, 0.1, 0.1, 0.1])
    ess = 1 / (0.49 + 0.03)
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.1)) / math.log(4)
    for progress in (0.0, 0.3):
        expected = {
            "ess": (1 - progress) * 4 / ess,
            "entropy": 1 / (entropy + (1 - entropy) * progress),
            "base": 2 - progress,
        }
        for mode, value in expected.items():
            found = Entropic(mode).temperature(cloud, progress)
            assert found == pytest.approx(value, rel=1e-12)
    equal = cloud_of([0.25] * 4)
    assert Entropic("ess").temperature(equal, 0.0) == pytest.approx(1.0)
    one = cloud_of([1.0, 0.0, 0.0, 0.0])
    assert Entropic("entropy").temperature(one, 0.0) == 1e6
    assert not Entropic().applies(equal, 0.0)
    assert Entropic().applies(cloud, 0.2) is (ess < 2.0)
    assert not Entropic().applies(cloud, 0.5)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "residual", "multinomial"])
def test_resampling_keeps_expectations(scheme):
    cloud = cloud_of([0.6, 0.25, 0.1, 0.05, 0.0])
    rng = torch.Generator().manual_seed(0)
    mass = []
    for _ in range(2000):
        after, ancestors = tempered_resample(cloud, scheme, 3.0, rng=rng)
        assert float(after.weights.sum()) == pytest.approx(1.0)
        scaled = after.weights * after.log_evidence.exp()
        mass.append(torch.zeros(5, dtype=torch.float64).index_add(0, ancestors, scaled))
    found = torch.stack(mass)
    error = found.std(0) / 2000**0.5
    assert bool(((found.mean(0) - cloud.weights).abs() <= 3.5 * error + 1e-12).all())
    assert float(found[:, 4].max()) == 0.0


def check_unbiased(exact, hmm, mode, chains=150):
    model, y = hmm
    options = ParticleFilter(6, tempering=Entropic(mode, ess_threshold=0.9, until=0.8))
    post = infer(model, y, options, rng=0, chains=chains)
    ratio = (post.log_evidence.value - exact.hmm(model, y).log_evidence).exp()
    assert abs(exact.z(ratio, 1.0)) < 3.0
    return post


@pytest.mark.parametrize("mode", MODES)
def test_evidence_is_unbiased(exact, hmm, mode):
    post = check_unbiased(exact, hmm, mode)
    plain = infer(*hmm, ParticleFilter(6, ess_threshold=0.9), rng=0, chains=150)
    assert not torch.equal(post.log_evidence.value, plain.log_evidence.value)


def test_the_check_catches_a_dropped_remainder(exact, hmm, monkeypatch):
    from probkit.inference.smc import filters

    def dropped(cloud, scheme, temperature, *, rng):
        after, ancestors = tempered_resample(cloud, scheme, temperature, rng=rng)
        equal = torch.full_like(after.log_weights, -math.log(cloud.n))
        return Cloud(after.particles, equal, cloud.log_evidence), ancestors

    monkeypatch.setattr(filters, "tempered_resample", dropped)
    with pytest.raises(AssertionError):
        check_unbiased(exact, hmm, "base", chains=500)


def test_more_ancestors_survive_a_sharp_start():
    from probkit.models.state_space import DiscreteHMM

    class Sharp(DiscreteHMM):
        """Weighs the first two steps with the fifth power."""

        def log_weight(self, t, old, new, data):
            return super().log_weight(t, old, new, data) * (5.0 if t < 2 else 1.0)

    model = Sharp(
        initial=[0.4, 0.3, 0.3],
        transition=[[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]],
        emission=[[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]],
    )
    y = torch.tensor([0, 0, 0, 0, 0, 0])
    left = {}
    for name, tempering in (("plain", None), ("entropic", Entropic("ess"))):
        post = infer(model, y, ParticleFilter(50, tempering=tempering), rng=0, chains=10)
        left[name] = float(post.sample_stats["unique_ancestors"][:, 0].double().mean())
    assert left["entropic"] > left["plain"]


def test_bad_options():
    with pytest.raises(DataError, match="expected mode 'ess', 'entropy' or 'base', got 'hot'"):
        Entropic("hot")
    with pytest.raises(DataError, match="expected 0 <= until <= 1, got 2"):
        Entropic(until=2)
    with pytest.raises(DataError, match=r"expected tempering=Entropic\(...\) or None, got 'ess'"):
        ParticleFilter(4, tempering="ess")
    assert entropic.__all__ == ["Entropic", "tempered_resample"]

"""Particle samplers on guided generation hold what every sampler must hold."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from support.guided_toys import Local, Value, model_of

from probkit.inference import Entropic, ParallelTempering, ParticleFilter, ParticleGibbs
from probkit.testing import SamplerConformance


class OnThreads(SamplerConformance):
    """Threads share a back end, and so its counters: costs of chains are not compared."""

    def test_an_executor_changes_nothing(self):
        post, _ = self.reference()
        with ThreadPoolExecutor(2) as executor:
            other = self.run(chains=2, executor=executor)
        assert other.particles.particles == post.particles.particles
        assert other.log_weights.equal(post.log_weights)
        for name, value in post.sample_stats.items():
            assert name.startswith("cost_") or value.equal(other.sample_stats[name])


class TestFilter(OnThreads):
    def problem(self):
        return ParticleFilter(4), model_of(Value()), "go"


class TestEntropicFilter(OnThreads):
    def problem(self):
        return ParticleFilter(4, tempering=Entropic("ess", until=1.0)), model_of(Local()), "go"


class TestGibbs(OnThreads):
    def problem(self):
        return ParticleGibbs(2, draws=4, warmup=1), model_of(Local()), "go"


class TestLadder(OnThreads):
    def problem(self):
        ladder = ParallelTempering(ParticleGibbs(2, draws=3, warmup=1), (1.0, 2.0))
        return ladder, model_of(Local()), "go"

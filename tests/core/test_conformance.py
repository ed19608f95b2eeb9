"""The conformance suites hold for the core's own parts, and catch wrong ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.fits import GroupModel, LineModel, Metropolis, RateModel, line_data
from support.models import ConjugateNormal, normal_data
from torch.distributions import Normal, constraints

from probkit.guide import LogQ
from probkit.inference import MAP, SVI, Direct, FullRank, ImportanceSampling, LowRank, MeanField
from probkit.model import Batch, Model, Site
from probkit.sampler import Step
from probkit.testing import GuideConformance, ModelConformance, SamplerConformance

Y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0], dtype=torch.float64)


# ------------------------------------------------------------------------------------- models


class TestLineModel(ModelConformance):
    def problem(self):
        x, y = line_data()
        return LineModel(), (x, y), x[:3]

    def sampler(self):
        return SVI(steps=50, evidence_draws=50)


class TestRateModel(ModelConformance):
    def problem(self):
        return RateModel(), Y, None

    def sampler(self):
        return MAP()


class TestGroupModel(ModelConformance):
    def problem(self):
        return GroupModel(), Y, None

    def sampler(self):
        return SVI(steps=50, evidence_draws=50)


class TestConjugateNormal(ModelConformance):
    def problem(self):
        return ConjugateNormal(), normal_data(), 3


# ------------------------------------------------------------------------------------- guides


class TestMeanFieldOnALine(GuideConformance):
    def problem(self):
        return MeanField(0.3), LineModel(), line_data()


class TestMeanFieldOnLocals(GuideConformance):
    def problem(self):
        return MeanField(0.3), GroupModel(), Y


class TestMeanFieldOnARate(GuideConformance):
    def problem(self):
        return MeanField(0.3), RateModel(), Y


class TestFullRankOnALine(GuideConformance):
    def problem(self):
        return FullRank(0.3), LineModel(width=3), line_data(width=3)


class TestFullRankOnLocals(GuideConformance):
    idle = True  # One global site: nothing lies below the diagonal.

    def problem(self):
        return FullRank(0.3), GroupModel(), Y


class TestLowRankOnALine(GuideConformance):
    def problem(self):
        return LowRank(2, 0.3), LineModel(width=3), line_data(width=3)


@dataclass(frozen=True)
class Shapes(Model):
    """Sites of every support that guides meet; only the sites matter."""

    def sites(self, data):
        return {
            "interval": Site((2,), constraints.interval(-1.0, 2.0), ("a",)),
            "simplex": Site((3,), constraints.simplex, ("b",)),
            "factor": Site((2, 2), constraints.lower_cholesky, ("c", "d")),
            "correlation": Site((3, 3), constraints.corr_cholesky, ("e", "f")),
            "matrix": Site((2, 2), constraints.positive_definite, ("c", "d")),
        }


class TestMeanFieldOnShapes(GuideConformance):
    def problem(self):
        return MeanField(0.2), Shapes(), Y


class TestFullRankOnShapes(GuideConformance):
    draws = 8000

    def problem(self):
        return FullRank(0.2), Shapes(), Y


# ------------------------------------------------------------------------------------- samplers


def line_moments():
    mean, covariance, _ = LineModel().exact(line_data())
    return {"w": (mean, covariance.diagonal().sqrt())}


class TestSVI(SamplerConformance):
    bias = 0.05  # The last learning rate leaves the parameters near the optimum, not at it.

    def problem(self):
        return SVI(steps=30, chunk=4, batch_size=3), LineModel(), line_data()

    def precise(self):
        return SVI(steps=500, lr=0.05, decay=0.02)

    def moments(self):
        return line_moments()


class TestSVIWithLocals(SamplerConformance):
    def problem(self):
        return SVI(steps=15, chunk=4, batch_size=2), GroupModel(), Y


class TestMAP(SamplerConformance):
    def problem(self):
        return MAP(chunk=2), RateModel(), Y


class TestImportanceSampling(SamplerConformance):
    def problem(self):
        return ImportanceSampling(500, chunk=60, proposal="prior"), LineModel(1.0), line_data(4)

    def precise(self):
        return ImportanceSampling(20_000, proposal="prior")

    def moments(self):
        mean, covariance, _ = LineModel(1.0).exact(line_data(4))
        return {"w": (mean, covariance.diagonal().sqrt())}


class TestDirect(SamplerConformance):
    def problem(self):
        return Direct(), ConjugateNormal(), normal_data()

    def moments(self):
        return {"mu": ConjugateNormal().moments(normal_data())}


class TestMetropolis(SamplerConformance):
    def problem(self):
        return Metropolis(30, width=4), LineModel(), line_data()

    def precise(self):
        return Metropolis(2500, 0.6, width=4, each=500)

    def moments(self):
        return line_moments()


# ------------------------------------------------------------------------------------- mutants


def fails(suite, name, *arguments):
    """Assert that one test of a suite fails on a wrong part."""
    with pytest.raises(AssertionError):
        getattr(suite(), name)(*arguments)


class WrongPrior(LineModel):
    def sample_prior(self, n, *, rng):
        return {"w": 1.15 * super().sample_prior(n, rng=rng)["w"]}


class WrongNoise(LineModel):
    def simulate(self, values, x, *, rng):
        mean = values["w"] @ x.T
        return mean + 1.2 * (super().simulate(values, x, rng=rng) - mean)


class NoBatchScale(LineModel):
    def log_joint(self, values, data, *, scale=1.0):
        return super().log_joint(values, data)


class Mixing(LineModel):
    """Lets points that are evaluated together see each other."""

    def log_joint(self, values, data, *, scale=1.0):
        result = super().log_joint(values, data, scale=scale)
        return result + 0.01 * values["w"].sum() if result.ndim else result


class Detached(LineModel):
    def log_prior(self, values):
        return super().log_prior({"w": values["w"].detach()})


class Careless(LineModel):
    def prepare(self, data):
        for x in data:
            if not bool(torch.isfinite(x).all()):
                from probkit.errors import DataError

                raise DataError("some values are not finite")
        return data


def on_line(model):
    class Suite(ModelConformance):
        def problem(self):
            x, y = line_data()
            return model, (x, y), x[:3]

    return Suite


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (WrongPrior(), "test_prior_draws_follow_the_density"),
        (WrongNoise(), "test_simulated_pairs_follow_the_log_joint"),
        (NoBatchScale(), "test_minibatches_average_to_the_whole"),
        (Mixing(), "test_log_joint_of_many_points_is_that_of_each"),
        (Detached(), "test_gradient_is_that_of_differences"),
        (Careless(), "test_nan_is_refused_by_its_place"),
    ],
)
def test_a_wrong_model_is_caught(model, name):
    fails(on_line(model), name)


@dataclass(frozen=True)
class WrongGuide(MeanField):
    """A mean field whose log density is wrong in one of several ways."""

    fault: str = ""

    def sample(self, params, model, batch, n, *, rng):
        values, log_q = super().sample(params, model, batch, n, rng=rng)
        if self.fault == "no jacobian":
            return values, LogQ(log_q.global_ + values["rate"].log(), log_q.local)
        if self.fault == "constant":
            return values, LogQ(log_q.global_ + 0.2, log_q.local)
        if self.fault == "no scale":
            return values, LogQ(log_q.global_ + log_q.local, 0 * log_q.local)
        if self.fault == "detached":
            values = {name: value.detach() for name, value in values.items()}
            return values, LogQ(0 * log_q.global_.detach(), 0 * log_q.local.detach())
        return values, log_q

    def marginals(self, params, model, data):
        laws = super().marginals(params, model, data)
        if self.fault != "wide":
            return laws
        return {
            k: Normal(v.base_dist.loc, v.base_dist.scale * 1.2).expand([]) for k, v in laws.items()
        }


def with_guide(guide, model):
    class Suite(GuideConformance):
        draws = 20_000

        def problem(self):
            return guide, model, Y

    return Suite


@pytest.mark.parametrize(
    ("fault", "model", "name"),
    [
        ("no jacobian", RateModel(), "test_log_q_is_the_density_of_the_draws"),
        ("constant", RateModel(), "test_log_q_is_the_density_of_the_draws"),
        ("no scale", GroupModel(), "test_minibatches_scale_local_terms_without_bias"),
    ],
)
def test_a_wrong_guide_is_caught(fault, model, name):
    fails(with_guide(WrongGuide(0.3, fault), model), name)


def test_a_guide_without_gradients_is_caught():
    with pytest.raises((AssertionError, RuntimeError)):
        with_guide(
            WrongGuide(0.3, "detached"), RateModel()
        )().test_gradients_reach_every_parameter()


@dataclass(frozen=True)
class WrongMetropolis(Metropolis):
    fault: str = ""

    def _density(self, problem, flat):
        if self.fault == "flat prior":
            return super()._density(problem, flat) * 0.8
        return super()._density(problem, flat)

    def step(self, problem, state, *, rngs):
        if self.fault == "in place":
            state["flat"].add_(1.0)
        if self.fault == "shared noise":
            rngs = [rngs[0]] * len(rngs)
        if self.fault == "memory":
            object.__setattr__(self, "size", self.size * 0.99)
        step = super().step(problem, state, rngs=rngs)
        return Step(step.state, step.done, step.keep, step.info)


def with_metropolis(fault):
    class Suite(SamplerConformance):
        def problem(self):
            return WrongMetropolis(30, width=2, fault=fault), LineModel(), line_data()

        def precise(self):
            return WrongMetropolis(4000, 0.6, width=4, each=1000, fault=fault)

        def moments(self):
            return line_moments()

    return Suite


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("flat prior", "test_moments_are_exact"),
        ("in place", "test_a_step_leaves_the_old_state_alone"),
        ("memory", "test_a_step_leaves_the_old_state_alone"),
        ("memory", "test_nothing_but_the_result_is_left"),
    ],
)
def test_a_wrong_sampler_is_caught(fault, name):
    fails(with_metropolis(fault), name)


def test_a_wrong_weight_is_caught():
    class Suite(TestImportanceSampling):
        def problem(self):
            sampler, _, data = super().problem()
            return sampler, Doubled(1.0), data

    fails(Suite, "test_moments_are_exact")


class Doubled(LineModel):
    """Its likelihood counts every observation 1.3 times: wrong weights for the prior's draws."""

    def log_likelihood(self, values, data):
        return 1.3 * super().log_likelihood(values, data)


def test_a_batch_is_what_guides_take():
    values, log_q = MeanField().sample(
        MeanField().init(GroupModel(), Y, rng=0), GroupModel(), Batch(Y), 3, rng=0
    )
    assert values["z"].shape == (3, 5) and log_q.total(2.0).shape == (3,)

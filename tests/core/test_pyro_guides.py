"""Pyro guides as probkit guides, and probkit models inside Pyro."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Trace_ELBO
from pyro.infer import SVI as PyroSVI
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoStructured,
)
from pyro.nn import PyroModule, PyroParam
from support.models import ConjugateNormal, normal_data
from torch.distributions import constraints, transform_to

from probkit.driver import infer
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import SVI, MeanField
from probkit.loader import Sized
from probkit.model import Batch, Model, Site
from probkit.posterior import load
from probkit.pyro_adapter import FromPyro, PyroGuide, as_guide, native_sites, to_pyro
from probkit.rng import scope

F64 = torch.float64
ONE = torch.tensor(1.0, dtype=F64)


def program(x, y=None):
    """A vector, a positive number and one local site per unit."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2, dtype=F64), 2.0).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    with pyro.plate("data", len(x)) as i:
        shift = pyro.sample("shift", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
        mean = x[i] @ weight + shift
        pyro.sample("obs", dist.Normal(mean, noise), obs=None if y is None else y[i])


def program_data(n=6):
    g = torch.Generator().manual_seed(8)
    return {
        "x": torch.randn(n, 2, generator=g, dtype=F64),
        "y": torch.randn(n, generator=g).double(),
    }


MODEL = FromPyro(program, minibatch_plate="data")
DATA = program_data()


def normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - torch.log(scale) - 0.5 * math.log(2 * math.pi)


def spread(params, seed=0):
    """Move every parameter away from its start."""
    g = torch.Generator().manual_seed(seed)
    return {
        kind: {k: v + 0.3 * torch.randn(v.shape, generator=g, dtype=F64) for k, v in group.items()}
        for kind, group in params.items()
    }


# --------------------------------------------------------------------------------- closed forms


def softplus_positive(free):
    return transform_to(AutoNormal.scale_constraint)(free)


@pytest.mark.parametrize("index", [None, torch.tensor([4, 0, 1])], ids=["whole", "batch"])
def test_log_q_of_auto_normal_is_the_closed_form(index):
    guide = PyroGuide(AutoNormal)
    params = spread(guide.init(MODEL, DATA, rng=0))
    batch = Batch(DATA) if index is None else MODEL.minibatch(DATA, index)
    values, log_q = guide.sample(params, MODEL, batch, 5, rng=1)
    rows = slice(None) if index is None else index
    assert values["shift"].shape == (5, 6 if index is None else 3)
    assert all(v.dtype == F64 for v in values.values())

    def part(name, rows=slice(None)):
        loc = params["module"][f"locs.{name}_unconstrained"][rows]
        return loc, softplus_positive(params["module"][f"scales.{name}_unconstrained"][rows])

    noise, shift = values["noise"], values["shift"]
    by_hand = normal(values["weight"], *part("weight")).sum(-1)
    by_hand = by_hand + normal(noise.log(), *part("noise", ...)) - noise.log()
    torch.testing.assert_close(log_q.global_, by_hand)
    # Local terms are those of the batch; the bound weighs them.
    local = (normal(shift.log(), *part("shift", rows)) - shift.log()).sum(-1)
    torch.testing.assert_close(log_q.local, local)
    torch.testing.assert_close(log_q.total(2.0), by_hand + 2.0 * local)


def test_log_q_of_auto_multivariate_normal_is_the_closed_form():
    guide = PyroGuide(AutoMultivariateNormal)
    params = spread(guide.init(MODEL, DATA, rng=0))
    values, log_q = guide.sample(params, MODEL, Batch(DATA), 4, rng=1)
    free = params["module"]
    scale = softplus_positive(free["scale_unconstrained"])
    tril = transform_to(AutoMultivariateNormal.scale_tril_constraint)(
        free["scale_tril_unconstrained"]
    )
    law = torch.distributions.MultivariateNormal(free["loc"], scale_tril=scale[:, None] * tril)
    logs = torch.cat([values["noise"][:, None], values["shift"]], -1).log()
    flat = torch.cat([values["weight"], logs], -1)
    torch.testing.assert_close(log_q.total(), law.log_prob(flat) - logs.sum(-1))


GUIDES = {
    "AutoNormal": PyroGuide(AutoNormal, options={"init_scale": 1.0}),
    "AutoDiagonalNormal": PyroGuide(AutoDiagonalNormal, options={"init_scale": 1.0}),
    "AutoMultivariateNormal": PyroGuide(AutoMultivariateNormal, options={"init_scale": 1.0}),
    "AutoLowRank": PyroGuide(AutoLowRankMultivariateNormal, options={"init_scale": 1.0}),
    "AutoIAFNormal": PyroGuide(AutoIAFNormal, options={"hidden_dim": [10]}),
    "AutoStructured": PyroGuide(AutoStructured, options={"init_scale": 1.0}),
}


@pytest.mark.parametrize("name", GUIDES)
def test_draws_follow_their_density(name):
    """The mean of p / q over draws of q is one, for a density p inside q, of both programs."""

    def narrow(y=None):
        loc = torch.zeros(2, dtype=F64)
        a = pyro.sample("a", dist.Normal(loc, 0.5).to_event(1))
        pyro.sample("b", dist.LogNormal(0.3 * a[0], 0.5))

    model, data = FromPyro(narrow), {"y": torch.zeros((), dtype=F64)}
    n = 4000
    params = GUIDES[name].init(model, data, rng=3)
    with torch.no_grad():
        values, log_q = GUIDES[name].sample(params, model, Batch(data), n, rng=4)
        log_p = torch.func.vmap(lambda point: model.log_joint(point, data))(values)
    weights = (log_p - log_q.total()).exp()
    error = float(weights.std()) / math.sqrt(n)
    assert error < 0.1  # else the test could not fail
    assert abs(float(weights.mean()) - 1.0) < 4 * error


def test_auto_delta_is_a_point():
    values, log_q = PyroGuide(AutoDelta).sample(
        PyroGuide(AutoDelta).init(MODEL, DATA, rng=0), MODEL, Batch(DATA), 3, rng=0
    )
    assert torch.equal(values["shift"][0], values["shift"][2])
    assert torch.equal(log_q.total(), torch.zeros(3, dtype=F64))


@pytest.mark.parametrize("name", ["AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal"])
def test_draws_are_differentiable_in_the_parameters(name):
    guide = GUIDES[name]
    start = guide.init(MODEL, DATA, rng=0)
    keys = list(start["module"])

    def bound(*tensors):
        params = {"module": dict(zip(keys, tensors, strict=True))}
        values, log_q = guide.sample(params, MODEL, Batch(DATA), 2, rng=5)
        log_p = torch.func.vmap(lambda point: MODEL.log_joint(point, DATA))(values)
        return (log_p - log_q.total()).sum()

    tensors = tuple(t.clone().requires_grad_() for t in start["module"].values())
    assert torch.autograd.gradcheck(bound, tensors, fast_mode=True)


# -------------------------------------------------------------------------- functions, modules


def hand_guide(x):
    loc = pyro.param("loc", torch.zeros(2, dtype=F64))
    scale = pyro.param("scale", lambda: torch.ones(2), constraint=constraints.positive)
    pyro.sample("weight", dist.Normal(loc, scale).to_event(1))
    pyro.sample("noise", dist.LogNormal(pyro.param("level", torch.tensor(0.5)), 0.3))
    with pyro.plate("data", len(x)) as i:
        level = pyro.param("levels", torch.arange(6.0), event_dim=0)
        assert level.shape == i.shape
        pyro.sample("shift", dist.LogNormal(level, 0.2))


@pytest.mark.parametrize("index", [None, torch.tensor([5, 2])], ids=["whole", "batch"])
def test_guide_functions_take_parameters_from_outside(index):
    guide = PyroGuide(hand_guide)
    params = guide.init(MODEL, DATA, rng=0)["param"]
    assert set(params) == {"loc", "scale", "level", "levels"}
    assert torch.equal(params["scale"], torch.zeros(2, dtype=F64))  # unconstrained
    params = {**params, "scale": torch.tensor([0.5, -0.5], dtype=F64)}
    batch = Batch(DATA) if index is None else MODEL.minibatch(DATA, index)
    values, log_q = guide.sample({"param": params}, MODEL, batch, 3, rng=1)
    z = normal(values["weight"], params["loc"], params["scale"].exp()).sum(-1)
    noise = values["noise"].log()
    z = z + normal(noise, 0.5 * ONE, 0.3 * ONE) - noise
    torch.testing.assert_close(log_q.global_, z, rtol=1e-6, atol=1e-6)
    levels = params["levels"] if index is None else params["levels"][index]
    shift = values["shift"].log()
    local = (normal(shift, levels, 0.2 * ONE) - shift).sum(-1)
    torch.testing.assert_close(log_q.local, local, rtol=1e-5, atol=1e-5)
    assert len(pyro.get_param_store()) == 0


def test_networks_of_guides_are_parameters():
    with scope(rng=0):
        net = torch.nn.Linear(2, 1)

    def amortised(x):
        pyro.module("net", net)
        pyro.sample("weight", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        pyro.sample("noise", dist.LogNormal(0.0 * ONE, 1.0))
        with pyro.plate("data", len(x)) as i:
            pyro.sample("shift", dist.LogNormal(net(x[i])[:, 0], 1.0))

    class Amortised(PyroModule):
        def __init__(self):
            super().__init__()
            self.net = net
            self.scale = PyroParam(torch.tensor(2.0), constraints.positive)

        def forward(self, x):
            pyro.sample("weight", dist.Normal(torch.zeros(2, dtype=F64), self.scale).to_event(1))
            pyro.sample("noise", dist.LogNormal(0.0 * ONE, 1.0))
            with pyro.plate("data", len(x)) as i:
                pyro.sample("shift", dist.LogNormal(self.net(x[i])[:, 0], 1.0))

    before = {k: v.clone() for k, v in net.state_dict().items()}
    for guide, prefix in ((PyroGuide(amortised), "net$$$"), (PyroGuide(Amortised()), "net.")):
        params = guide.init(MODEL, DATA, rng=0)
        weight = torch.tensor([[0.7, -0.2]], dtype=F64, requires_grad=True)
        params["module"][f"{prefix}weight"] = weight
        batch = MODEL.minibatch(DATA, torch.tensor([3, 1]))
        values, log_q = guide.sample(params, MODEL, batch, 4, rng=2)
        mean = DATA["x"][[3, 1]] @ weight[0] + params["module"][f"{prefix}bias"]
        logs = values["shift"].log()
        torch.testing.assert_close(log_q.local, (normal(logs, mean, ONE) - logs).sum(-1))
        (grad,) = torch.autograd.grad(values["shift"].log().sum(), weight)
        torch.testing.assert_close(grad[0], 4 * DATA["x"][[3, 1]].sum(0))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.weight.dtype == torch.float32 and isinstance(net.weight, torch.nn.Parameter)


def test_ready_autoguides_and_factories():
    ready = AutoNormal(program, init_scale=0.7)
    for guide in (
        PyroGuide(ready),
        PyroGuide(AutoNormal, options={"init_scale": 0.7}),
        PyroGuide(lambda made_for: AutoNormal(made_for, init_scale=0.7), factory=True),
    ):
        params = guide.init(MODEL, DATA, rng=0)["module"]
        scale = softplus_positive(params["scales.weight_unconstrained"])
        torch.testing.assert_close(scale, torch.full((2,), 0.7, dtype=F64))
        values, _ = guide.sample({"module": params}, MODEL, Batch(DATA), 2, rng=0)
        assert values["shift"].shape == (2, 6)
    assert ready.prototype_trace is None and ready.model is not None


def test_the_structure_of_a_guide_is_the_same_in_every_process():
    """A fresh guide object with saved parameters draws what the old one draws."""
    old, new = (PyroGuide(AutoIAFNormal, options={"hidden_dim": [20]}) for _ in range(2))
    params = old.init(MODEL, DATA, rng=9)
    a, log_a = old.sample(params, MODEL, Batch(DATA), 3, rng=1)
    b, log_b = new.sample(params, MODEL, Batch(DATA), 3, rng=1)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(log_a.total(), log_b.total())
    other = old.init(MODEL, DATA, rng=10)["module"]
    assert any(not torch.equal(v, other[k]) for k, v in params["module"].items())


def test_guides_that_do_not_fit_are_refused():
    def misses(x):
        pyro.sample("weight", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def exceeds(x):
        hand_guide(x)
        pyro.sample("extra", dist.Normal(0.0, 1.0))

    def misshapen(x):
        with poutine.block(hide=["weight"]):
            hand_guide(x)
        pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def draw(guide, batch=None):
        params = guide.init(MODEL, DATA, rng=0)
        return guide.sample(params, MODEL, batch or Batch(DATA), 2, rng=0)

    with pytest.raises(DataError, match="misses does not sample 'noise', 'shift', which the model"):
        draw(PyroGuide(misses))
    with pytest.raises(DataError, match="exceeds samples 'extra', which the model lacks"):
        draw(PyroGuide(exceeds))
    with pytest.raises(ShapeError, match=r"'weight': expected shape \(2,\) .* got \(3,\)"):
        draw(PyroGuide(misshapen))
    batch = MODEL.minibatch(DATA, torch.tensor([1]))
    with pytest.raises(CapabilityError, match="cannot be subsampled; local sites: shift"):
        draw(PyroGuide(AutoMultivariateNormal), batch)
    with pytest.raises(DataError, match="options belong to an AutoGuide class; hand_guide is a"):
        PyroGuide(hand_guide, options={"init_scale": 1.0})


def test_draws_without_a_gradient_are_refused_where_one_is_asked_for():
    def jumps(y=None):
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(0.0, 1.0), obs=y)

    def guide(y):
        loc = pyro.param("loc", torch.zeros(()))
        law = dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Normal(torch.stack([loc, loc]), 1.0)
        )
        pyro.sample("a", law)

    model, data = FromPyro(jumps), {"y": torch.zeros((), dtype=F64)}
    wrapped = PyroGuide(guide)
    params = wrapped.init(model, data, rng=0)
    wrapped.sample(params, model, Batch(data), 2, rng=0)
    params["param"]["loc"].requires_grad_()
    with pytest.raises(CapabilityError, match="'a': MixtureSameFamily has no reparameterised"):
        wrapped.sample(params, model, Batch(data), 2, rng=0)


def test_as_guide_wraps_what_is_pyros():
    assert as_guide(None) is None
    own = MeanField()
    assert as_guide(own) is own
    assert as_guide(PyroGuide(hand_guide)).guide is hand_guide
    assert as_guide(hand_guide).guide is hand_guide and as_guide(AutoNormal).guide is AutoNormal
    with pytest.raises(CapabilityError, match="got the class MeanField; make an instance"):
        as_guide(MeanField)
    with pytest.raises(CapabilityError, match="a Pyro guide function or an AutoGuide, got 3"):
        as_guide(3)


# --------------------------------------------------------------------------------- in samplers


def conjugate(y=None):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=F64), 2.0))
    with pyro.plate("observation", 12 if y is None else len(y)) as i:
        pyro.sample("obs", dist.Normal(mu, 1.0), obs=None if y is None else y[i])


@pytest.mark.parametrize("native", [False, True], ids=["pyro model", "native model"])
def test_svi_with_an_autoguide_finds_the_posterior(native, tmp_path):
    y = normal_data()
    mean, sd = ConjugateNormal().moments(y)
    model, data = (ConjugateNormal(), y) if native else (FromPyro(conjugate), {"y": y})
    sampler = SVI(steps=400, lr=0.05, particles=8)
    post = infer(model, data, sampler, guide=AutoNormal, rng=0)
    params = post.source.params[0]["module"]
    scale = softplus_positive(params["scales.mu_unconstrained"])
    # Adam's noise at this rate is about the rate itself times the gradient's relative noise.
    assert abs(float(params["locs.mu_unconstrained"] - mean)) < 0.1 * float(sd)
    assert abs(float(scale / sd) - 1.0) < 0.1
    bound, evidence = float(post.log_evidence.value[0]), float(ConjugateNormal().evidence(y))
    assert evidence - 0.1 < bound < evidence + 0.02
    post.save(tmp_path / "fit")
    extra = {} if native else {"model": FromPyro(conjugate)}
    again = load(tmp_path / "fit", guide=PyroGuide(AutoNormal), **extra)
    assert torch.equal(post.sample(5, rng=1)["mu"], again.sample(5, rng=1)["mu"])


def test_svi_on_minibatches_of_a_pyro_program():
    y = normal_data()
    mean, sd = ConjugateNormal().moments(y)
    model = FromPyro(conjugate, minibatch_plate="observation")
    sampler = SVI(steps=600, lr=0.05, decay=0.05, particles=4, batch_size=4)
    post = infer(model, {"y": y}, sampler, guide=AutoNormal, rng=0)
    found = float(post.source.params[0]["module"]["locs.mu_unconstrained"])
    assert abs(found - float(mean)) < 0.4 * float(sd)


def test_the_models_own_parameters_are_points_of_the_guide():
    def learnt(x, y=None):
        slope = pyro.param("slope", torch.tensor(0.3, dtype=F64))
        noise = pyro.param("noise", torch.tensor(2.0), constraint=constraints.positive)
        base = pyro.sample("base", dist.Normal(0.0 * ONE, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(base + slope * x, noise), obs=y)

    model = FromPyro(learnt)
    data = {"x": DATA["x"][:, 0], "y": DATA["y"]}
    guide = PyroGuide(AutoNormal)
    params = guide.init(model, data, rng=0)
    assert set(params["point"]) == {"slope", "noise"}
    torch.testing.assert_close(params["point"]["noise"], torch.tensor(2.0, dtype=F64).log())
    values, log_q = guide.sample(params, model, Batch(data), 3, rng=0)
    torch.testing.assert_close(values["noise"], torch.full((3,), 2.0, dtype=F64))
    only = params["module"]
    by_hand = normal(
        values["base"],
        only["locs.base_unconstrained"],
        softplus_positive(only["scales.base_unconstrained"]),
    )
    torch.testing.assert_close(log_q.total(), by_hand)


def test_loaders_bring_rows_and_their_numbers():
    """A loader's batch holds its rows alone; local parameters are those of all units."""
    rows = {name: value[:2] for name, value in DATA.items()}
    guide, index = PyroGuide(AutoNormal), torch.tensor([5, 3])
    params = spread(guide.init(Sized(MODEL, 6), rows, rng=0))
    assert params["module"]["locs.shift_unconstrained"].shape == (6,)
    batch = Batch({name: value[index] for name, value in DATA.items()}, index, 3.0)
    values, log_q = guide.sample(params, MODEL, batch, 3, rng=1)
    loc = params["module"]["locs.shift_unconstrained"][index]
    scale = softplus_positive(params["module"]["scales.shift_unconstrained"][index])
    logs = values["shift"].log()
    torch.testing.assert_close(log_q.local, (normal(logs, loc, scale) - logs).sum(-1))
    inside = MODEL.minibatch(DATA, index)
    point = {name: value[0] for name, value in values.items()}
    torch.testing.assert_close(
        MODEL.log_joint(point, batch.data, scale=3.0),
        MODEL.log_joint(point, inside.data, scale=3.0),
    )


class Local(Model):
    """z_i ~ N(m, 1), y_i ~ N(z_i, 1): native, with local sites."""

    def sites(self, data):
        return {
            "m": Site((), constraints.real),
            "z": Site((len(data),), constraints.positive, ("unit",), plate="unit"),
        }

    def log_joint(self, values, data, *, scale=1.0):
        local = normal(values["z"], values["m"], ONE) + normal(data, values["z"], ONE)
        return normal(values["m"], 0.0, ONE) + scale * local.sum(-1)

    def plate_size(self, data):
        return len(data)

    def minibatch(self, data, index):
        return Batch(data[index], index, len(data) / len(index))


def test_autoguides_subsample_native_models():
    guide, data = PyroGuide(AutoNormal), torch.arange(5.0, dtype=F64)
    params = spread(guide.init(Local(), data, rng=0))
    index = torch.tensor([3, 1])
    values, log_q = guide.sample(params, Local(), Local().minibatch(data, index), 4, rng=0)
    assert values["z"].shape == (4, 2)
    loc = params["module"]["locs.z_unconstrained"][index]
    scale = softplus_positive(params["module"]["scales.z_unconstrained"][index])
    logs = values["z"].log()
    torch.testing.assert_close(log_q.local, (normal(logs, loc, scale) - logs).sum(-1))


# ------------------------------------------------------------------------------ native to Pyro


def test_the_program_of_a_native_model_has_its_log_joint():
    y = normal_data()
    for mu in (torch.tensor(0.4, dtype=F64), torch.tensor(-2.0, dtype=F64)):
        conditioned = poutine.condition(to_pyro(ConjugateNormal()), data={"mu": mu})
        found = poutine.trace(conditioned).get_trace(y).log_prob_sum()
        torch.testing.assert_close(found, ConjugateNormal().log_joint({"mu": mu}, y))
    z = torch.ones(5, dtype=F64)
    values = {"m": torch.tensor(0.3, dtype=F64), "z": z}
    data = torch.arange(5.0, dtype=F64)
    trace = poutine.trace(poutine.condition(to_pyro(Local()), data=values)).get_trace(data)
    torch.testing.assert_close(trace.log_prob_sum(), Local().log_joint(values, data))
    assert trace.nodes["z"]["fn"].event_shape == (5,)


def test_pyro_infers_native_models():
    y = normal_data()
    mean, sd = (float(v) for v in ConjugateNormal().moments(y))
    native = to_pyro(ConjugateNormal())
    with scope(rng=0, foreign=True):
        chain = MCMC(NUTS(native), num_samples=300, warmup_steps=100, disable_progbar=True)
        chain.run(y)
        draws = chain.get_samples()["mu"]
    # NUTS on a normal is nearly independent; half the draws is a safe effective size.
    assert abs(float(draws.mean()) - mean) < 4 * sd / math.sqrt(150)
    assert abs(float(draws.std()) / sd - 1.0) < 4 / math.sqrt(2 * 150)
    with scope(rng=0, foreign=True), pyro.get_param_store().scope():
        guide = AutoNormal(native)
        elbo = Trace_ELBO(num_particles=4, vectorize_particles=True)
        svi = PyroSVI(native, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
        for _ in range(200):
            svi.step(y)
        median = float(guide.median(y)["mu"])
    assert abs(median - mean) < 0.5 * sd


def test_native_models_are_parts_of_programs():
    y = normal_data()

    def larger(data, more):
        values = native_sites("inner", ConjugateNormal(), data)
        pyro.sample("more", dist.Normal(values["mu"], 0.5 * ONE), obs=more)

    mu, more = torch.tensor(1.1, dtype=F64), torch.tensor(2.0, dtype=F64)
    model = FromPyro(larger, observed=("more",))
    found = model.log_joint({"inner.mu": mu}, {"data": y, "more": more})
    by_hand = ConjugateNormal().log_joint({"mu": mu}, y) + normal(more, mu, 0.5 * ONE)
    torch.testing.assert_close(found, by_hand)


def test_what_cannot_go_into_pyro_is_refused():
    class Discrete(Model):
        def sites(self, data):
            return {"k": Site((), constraints.nonnegative_integer, discrete=True)}

        def log_joint(self, values, data, *, scale=1.0):
            return ONE

    with pytest.raises(CapabilityError, match="needs continuous sites, 'k' is discrete"):
        to_pyro(Discrete())(None)
    with pytest.raises(CapabilityError, match="int lacks sites, log_joint"):
        to_pyro(3)
    # Another factor inside another Pyro program does not leak into the first.
    assert len(pyro.get_param_store()) == 0


def test_a_point_guide_gives_a_point_estimate_without_evidence():
    fit = SVI(steps=5, evidence_draws=2)
    post = infer(MODEL, DATA, fit, guide=AutoDelta, rng=0, chains=2)
    assert post.is_point_estimate and post.log_evidence is None
    assert post.draws["shift"].shape[:2] == (2, 1)
    assert list(post.summary().columns) == ["value[0]", "value[1]"]
    spread = infer(MODEL, DATA, fit, guide=AutoNormal, rng=0)
    assert not spread.is_point_estimate and spread.log_evidence.kind == "bound"

"""Pyro programs as models: density, structure, minibatches, prediction, isolation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch.distributions import constraints

from probkit.driver import infer
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import MAP
from probkit.model import lacks
from probkit.posterior import Context, Posterior, load
from probkit.pyro_adapter import FromPyro
from probkit.rng import scope
from probkit.sources import Draws

F64 = torch.float64
EFFECT = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0], dtype=F64)
ERROR = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0], dtype=F64)
SCHOOLS = {"sigma": ERROR, "y": EFFECT}


def eight_schools(sigma, y=None):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.deterministic("shrunk", theta - mu, event_dim=0)
        return pyro.sample("effect", dist.Normal(theta, sigma), obs=y)


def nested(x, y=None):
    """Two nested plates, an event dim, a mask, a scale and a factor."""
    weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    rows, columns = pyro.plate("row", 4, dim=-2), pyro.plate("column", 2, dim=-1)
    with columns:
        # Gamma computes in the dtype of its parameters, whatever that of the value.
        level = pyro.sample("level", dist.Gamma(torch.tensor(2.0, dtype=F64), 1.0))
    with rows:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    with rows, columns:
        cell = pyro.sample("cell", dist.Normal(shift, level))
        share = pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=F64)))
        pyro.factor("bonus", -0.5 * cell**2)
        with poutine.mask(mask=x > 0), poutine.scale(scale=0.5):
            mean = cell + share @ weight.to(F64)
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)


def nested_data():
    g = torch.Generator().manual_seed(3)
    return {name: torch.randn(4, 2, generator=g, dtype=F64) for name in ("x", "y")}


def nested_values(n):
    g = torch.Generator().manual_seed(4)
    values = {
        "weight": torch.randn(n, 3, generator=g, dtype=F64),
        "level": torch.rand(n, 2, generator=g, dtype=F64) + 0.5,
        "shift": torch.randn(n, 4, 1, generator=g, dtype=F64),
        "cell": torch.randn(n, 4, 2, generator=g, dtype=F64),
    }
    share = torch.rand(n, 4, 2, 3, generator=g, dtype=F64)
    return {**values, "share": share / share.sum(-1, keepdim=True)}


def school_values(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "mu": 5.0 * torch.randn(n, generator=g, dtype=F64),
        "tau": 0.5 + 5.0 * torch.rand(n, generator=g, dtype=F64),
        "theta": 5.0 * torch.randn(n, 8, generator=g, dtype=F64),
    }


def row(values, i):
    return {name: value[i] for name, value in values.items()}


def normal(x, loc, scale):
    return -0.5 * ((x - loc) / scale) ** 2 - torch.log(scale) - 0.5 * math.log(2 * math.pi)


def posterior(model, data, values, coords=None):
    dims = {name: site.dims for name, site in model.sites(data).items()}
    draws = Draws({name: value[None] for name, value in values.items()})
    return Posterior(draws, model, Context(data, coords or {}, dims))


# ------------------------------------------------------------------------------------- density


def test_log_joint_of_eight_schools_is_the_hand_formula():
    v = row(school_values(1), 0)
    five = torch.tensor(5.0, dtype=F64)
    by_hand = (
        normal(v["mu"], 0.0, five)
        + torch.log(2.0 / (math.pi * five * (1 + (v["tau"] / five) ** 2)))
        + normal(v["theta"], v["mu"], v["tau"]).sum()
        + normal(EFFECT, v["theta"], ERROR).sum()
    )
    found = FromPyro(eight_schools).log_joint(v, SCHOOLS)
    assert found.dtype == F64 and found.shape == ()
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=0)  # 5.0 is a float32 in Pyro


@pytest.mark.parametrize(
    ("program", "data", "values"),
    [
        (eight_schools, SCHOOLS, school_values(5)),
        (nested, nested_data(), nested_values(5)),
    ],
    ids=["schools", "nested plates, masks, scales, factors"],
)
def test_vmap_loop_and_a_plain_pyro_trace_agree(program, data, values):
    model = FromPyro(program)
    mapped = torch.func.vmap(lambda point: model.log_joint(point, data))(values)
    looped = torch.stack([model.log_joint(row(values, i), data) for i in range(5)])
    direct = []
    for i in range(5):
        conditioned = poutine.condition(program, data=row(values, i))
        direct.append(poutine.trace(conditioned).get_trace(**data).log_prob_sum())
    torch.testing.assert_close(mapped, looped, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(looped, torch.stack(direct), rtol=1e-12, atol=1e-12)


def test_masked_entries_and_factors_count_as_they_should():
    model, data, v = FromPyro(nested), nested_data(), row(nested_values(1), 0)
    hidden = data["x"] <= 0
    moved = {**data, "y": torch.where(hidden, data["y"] + 7.0, data["y"])}
    assert model.log_joint(v, moved) == model.log_joint(v, data)
    seen = {**data, "y": torch.where(hidden, data["y"], data["y"] + 7.0)}
    assert model.log_joint(v, seen) != model.log_joint(v, data)

    def without_factor(x, y=None):
        with poutine.block(hide=["bonus"]):
            nested(x, y)

    gap = model.log_joint(v, data) - FromPyro(without_factor).log_joint(v, data)
    torch.testing.assert_close(gap, -0.5 * v["cell"].square().sum())


def test_gradients_are_those_of_finite_differences():
    model, data, v = FromPyro(nested), nested_data(), row(nested_values(1), 0)

    def density(cell, level):
        return model.log_joint({**v, "cell": cell, "level": level}, data)

    inputs = (v["cell"].clone().requires_grad_(), v["level"].clone().requires_grad_())
    assert torch.autograd.gradcheck(density, inputs)
    batch = nested_values(3)
    grads = torch.func.vmap(torch.func.grad(lambda p: model.log_joint(p, data)))(batch)
    one = torch.func.grad(lambda p: model.log_joint(p, data))(row(batch, 1))
    torch.testing.assert_close(grads["cell"][1], one["cell"], rtol=1e-12, atol=1e-12)


def test_pointwise_terms_sum_to_the_likelihood_part_of_the_joint():
    model, values = FromPyro(eight_schools), school_values(6)
    stacked = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in values.items()}
    points = model.pointwise_log_likelihood(stacked, SCHOOLS)
    assert points["effect"].shape == (2, 3, 8)
    by_hand = normal(EFFECT, stacked["theta"], ERROR)
    torch.testing.assert_close(points["effect"], by_hand)
    torch.testing.assert_close(model.log_likelihood(stacked, SCHOOLS), by_hand.sum(-1))


def test_discrete_sites_are_flagged_or_summed_out():
    def mixture(y=None):
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        with pyro.plate("data", 3):
            which = pyro.sample("which", dist.Bernoulli(share))
            pyro.sample("obs", dist.Normal(4.0 * which, 1.0), obs=y)

    data = {"y": torch.tensor([0.3, 3.8, 2.0], dtype=F64)}
    share = torch.tensor([0.3, 0.6], dtype=F64)
    assert FromPyro(mixture).sites(data)["which"].discrete
    summed = FromPyro(mixture, enumerate_discrete=True)
    assert list(summed.sites(data)) == ["share"]
    found = torch.func.vmap(lambda s: summed.log_joint({"share": s}, data))(share)
    one = torch.tensor(1.0, dtype=F64)
    parts = torch.stack(
        [
            torch.log1p(-share)[:, None] + normal(data["y"], 0.0, one),
            torch.log(share)[:, None] + normal(data["y"], 4.0, one),
        ]
    )
    prior = torch.distributions.Beta(2 * one, 2 * one).log_prob(share)
    torch.testing.assert_close(found, prior + parts.logsumexp(0).sum(-1))

    def crossed(y=None):
        rows, columns = pyro.plate("row", 2, dim=-2), pyro.plate("column", 2, dim=-1)
        with rows:
            a = pyro.sample("a", dist.Bernoulli(0.5))
        with columns:
            b = pyro.sample("b", dist.Bernoulli(0.5))
        with rows, columns:
            pyro.sample("obs", dist.Normal(a + b, 1.0), obs=y)

    with pytest.raises(CapabilityError, match="needs nested plates, these cross: row, column"):
        FromPyro(crossed, enumerate_discrete=True).log_joint({}, {"y": torch.zeros(2, 2)})


# ----------------------------------------------------------------------------------- structure


def test_sites_are_named_by_their_plates():
    sites = FromPyro(nested, dims={"weight": ("feature",)}).sites(nested_data())
    assert sites["weight"].dims == ("feature",)
    assert (sites["shift"].shape, sites["shift"].dims) == ((4, 1), ("row", "shift_dim_1"))
    assert (sites["level"].shape, sites["level"].dims) == ((2,), ("column",))
    assert (sites["cell"].shape, sites["cell"].dims) == ((4, 2), ("row", "column"))
    assert sites["share"].dims == ("row", "column", "share_dim_2")
    assert not any(site.discrete or site.plate for site in sites.values())
    assert sites["level"].support.check(torch.tensor(1.0))
    assert not sites["level"].support.check(torch.tensor(-1.0))


def test_parameters_are_sites_with_a_flat_prior():
    def program(x, y=None):
        slope = pyro.param("slope", torch.tensor(0.5, dtype=F64))
        noise = pyro.param("noise", lambda: torch.ones(2), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(slope * x, noise.mean()), obs=y)

    x = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    data, model = {"x": x, "y": 2.0 * x}, FromPyro(program)
    sites = model.sites(data)
    assert set(sites) == {"slope", "noise"}
    assert sites["noise"].shape == (2,) and sites["noise"].support is constraints.positive
    values = {"slope": torch.tensor(1.5, dtype=F64), "noise": torch.tensor([1.0, 3.0], dtype=F64)}
    two = torch.tensor(2.0, dtype=F64)
    torch.testing.assert_close(model.log_joint(values, data), normal(data["y"], 1.5 * x, two).sum())
    assert model.initial_points(data)["slope"] == 0.5
    with pytest.raises(CapabilityError, match="no prior for pyro.param 'slope', 'noise'"):
        model.sample_prior(2, x={"x": x}, rng=0)
    assert len(pyro.get_param_store()) == 0


def test_a_parameter_without_value_is_refused():
    def program(y=None):
        pyro.sample("obs", dist.Normal(pyro.param("loc"), 1.0), obs=y)

    with pytest.raises(DataError, match=r"pyro.param\('loc'\) has no initial value"):
        FromPyro(program).sites({"y": torch.zeros(())})


def test_a_bayesian_module_is_a_program():
    class Regression(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1)
            law = dist.Normal(torch.zeros(1, 2, dtype=F64), 1.0).to_event(2)
            self.linear.weight = PyroSample(law)
            self.linear.bias = torch.nn.Parameter(torch.ones(1, dtype=F64))

        def forward(self, x, y=None):
            mean = self.linear(x).squeeze(-1)
            with pyro.plate("data", len(x)):
                return pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    data = {"x": torch.eye(2, dtype=F64), "y": torch.zeros(2, dtype=F64)}
    with scope(rng=0):  # torch.nn.Linear draws its weights
        module = Regression()
    model = FromPyro(module)
    assert list(model.sites(data)) == ["linear.weight"]
    w = torch.tensor([[[0.5, -1.0]], [[1.0, 2.0]]], dtype=F64)
    one = torch.tensor(1.0, dtype=F64)
    by_hand = normal(w, 0.0, one).sum((1, 2)) + normal(w[:, 0] + 1.0, 0.0, one).sum(-1)
    found = torch.func.vmap(lambda value: model.log_joint({"linear.weight": value}, data))(w)
    torch.testing.assert_close(found, by_hand)


def test_structure_that_changes_is_refused():
    def wandering(y=None):
        if pyro.sample("a", dist.Normal(0.0, 1.0)) > 0:
            pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(0.0, 1.0), obs=y)

    def bounded(y=None):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        pyro.sample("below", dist.Uniform(0.0, top))
        pyro.sample("obs", dist.Normal(0.0, 1.0), obs=y)

    def noisy(y=None):
        pyro.sample("obs", dist.Normal(torch.randn(()), 1.0), obs=y)

    data = {"y": torch.zeros(())}
    with pytest.raises(DataError, match=r"other sites from run to run \(b\)"):
        FromPyro(wandering).sites(data)
    with pytest.raises(DataError, match="support of site 'below' depends on other sites"):
        FromPyro(bounded).sites(data)
    with pytest.raises(DataError, match="noisy draws random numbers outside pyro.sample"):
        FromPyro(noisy).sites(data)


def test_observations_that_broadcast_are_refused():
    def program(x, y=None):
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(x, 1.0), obs=y)

    data = {"x": torch.zeros(3, 1), "y": torch.zeros(3)}
    with pytest.raises(DataError, match=r"shape \(3, 3\), as its distribution has, got \(3,\)"):
        FromPyro(program).sites(data)


# ---------------------------------------------------------------------------------------- data


def test_bad_data_is_named():
    model = FromPyro(eight_schools)
    with pytest.raises(DataError, match="mapping of the keyword arguments .*sigma, y.*got tuple"):
        model.prepare((ERROR, EFFECT))
    with pytest.raises(DataError, match="no keyword argument 'sigmas'; expected sigma, y"):
        model.prepare({"sigmas": ERROR, "y": EFFECT})
    with pytest.raises(DataError, match="eight_schools needs 'sigma' in the data"):
        model.prepare({"y": EFFECT})
    with pytest.raises(DataError, match="observed argument 'y' of eight_schools"):
        model.prepare({"sigma": ERROR})
    spoilt = EFFECT.clone()
    spoilt[2] = math.nan
    with pytest.raises(DataError, match=r"data\['y'\]: expected finite .* entry \[2\] is nan"):
        model.prepare({"sigma": ERROR, "y": spoilt})
    kept = FromPyro(eight_schools, allow_missing=True).prepare({"sigma": ERROR, "y": spoilt})
    assert kept["y"] is spoilt
    with pytest.raises(DataError, match=r"no keyword argument 'effect'; it has sigma, y"):
        FromPyro(eight_schools, observed=("effect",))
    with pytest.raises(DataError, match=r"expected observed=\('y',\)"):
        FromPyro(eight_schools, observed="y")


def test_values_are_checked():
    model, v = FromPyro(eight_schools), row(school_values(1), 0)
    with pytest.raises(DataError, match="value for every site of the Pyro program, missing: 'mu'"):
        model.log_joint({k: x for k, x in v.items() if k != "mu"}, SCHOOLS)
    with pytest.raises(DataError, match="eight_schools has no site 'nu'; expected mu, tau, theta"):
        model.log_joint({**v, "nu": v["mu"]}, SCHOOLS)

    def counts(y=None):
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("data", 2):
            pyro.sample("obs", dist.Poisson(rate), obs=y)

    with pytest.raises(DataError, match="counts: .*support"):
        FromPyro(counts).log_joint({"rate": torch.tensor(1.0)}, {"y": torch.tensor([1.0, -1.0])})


def test_labels_of_pandas_data_become_coords():
    names = list("ABCDEFGH")
    frame = pd.DataFrame({"sigma": ERROR.numpy(), "y": EFFECT.numpy()}, index=names)
    model = FromPyro(eight_schools)
    assert model.data_dims(SCHOOLS) == {"sigma": None, "y": ("school",)}

    def pooled(sigma, y=None):
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("school", len(sigma)):
            theta = pyro.sample("theta", dist.Normal(mu, 3.0))
            pyro.sample("effect", dist.Normal(theta, sigma), obs=y)

    data = {"sigma": frame["sigma"], "y": frame["y"]}
    post = infer(FromPyro(pooled), data, MAP(), rng=0)
    assert list(post.context.coords["school"]) == names
    assert post.context.dims["theta"] == ("school",)


def test_float32_programs_take_float64_data_and_the_reverse():
    def program(x, y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x * w).sum(-1), 1.0), obs=y)

    for dtype in (torch.float32, F64):
        data = {"x": torch.ones(3, 2, dtype=dtype), "y": torch.zeros(3, dtype=dtype)}
        model = FromPyro(program, inputs=data)
        assert model.log_joint({"w": torch.ones(2, dtype=dtype)}, data).dtype == dtype
        assert model.sample_prior(3, rng=0)["w"].dtype == dtype


# --------------------------------------------------------------------------------- minibatches


def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)) as i:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(slope * x[i] + shift, 0.5), obs=None if y is None else y[i])


def regression_data(n=12):
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(n, generator=g, dtype=F64) for name in ("x", "y")}


def test_the_batches_of_an_epoch_average_to_the_full_log_joint():
    model, data = FromPyro(regression, minibatch_plate="data"), regression_data()
    assert model.plate_size(data) == 12
    assert model.sites(data)["shift"].plate == "data" and model.sites(data)["slope"].plate is None
    shift = torch.linspace(-1, 1, 12, dtype=F64)
    slope = torch.tensor(0.7, dtype=F64)
    whole = model.log_joint({"slope": slope, "shift": shift}, data)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    parts = []
    for index in order.split(4):
        batch = model.minibatch(data, index)
        assert batch.scale == 3.0
        assert model.sites(batch.data)["shift"].shape == (4,)
        values = {"slope": slope, "shift": shift[index]}
        parts.append(model.log_joint(values, batch.data, scale=batch.scale))
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-12, atol=1e-12)
    # The weight counts once: without it a batch has the terms of its own units.
    index = order[:4]
    rows = {name: value[index] for name, value in data.items()}
    alone = FromPyro(regression).log_joint({"slope": slope, "shift": shift[index]}, rows)
    batch = model.minibatch(data, index)
    found = model.log_joint({"slope": slope, "shift": shift[index]}, batch.data)
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-12)


def test_parameters_and_data_are_subsampled_by_the_plate():
    def program(x, y=None):
        with pyro.plate("data", len(x)):
            level = pyro.param("level", torch.zeros(12, dtype=F64), event_dim=0)
            rows = pyro.subsample(x, event_dim=0)
            seen = None if y is None else pyro.subsample(y, event_dim=0)
            pyro.sample("obs", dist.Normal(level + rows, 1.0), obs=seen)

    model, data = FromPyro(program, minibatch_plate="data"), regression_data()
    level = torch.linspace(0, 1, 12, dtype=F64)
    index = torch.tensor([7, 2, 3])
    batch = model.minibatch(data, index)
    assert model.sites(batch.data)["level"].shape == (12,)
    one = torch.tensor(1.0, dtype=F64)
    by_hand = normal(data["y"], level + data["x"], one)
    found = model.log_joint({"level": level}, batch.data, scale=batch.scale)
    torch.testing.assert_close(found, 4.0 * by_hand[index].sum())
    torch.testing.assert_close(model.log_joint({"level": level}, data), by_hand.sum())


def test_pointwise_terms_of_a_batch_are_not_weighted():
    model, data = FromPyro(regression, minibatch_plate="data"), regression_data()
    index = torch.tensor([2, 9, 4])
    shift = torch.linspace(-1, 1, 12, dtype=F64)
    values = {"slope": torch.tensor([0.4, 0.1], dtype=F64), "shift": shift.expand(2, 12)}
    whole = model.pointwise_log_likelihood(values, data)["obs"]
    part = {**values, "shift": values["shift"][:, index]}
    batch = model.minibatch(data, index)
    found = model.pointwise_log_likelihood(part, batch.data)["obs"]
    torch.testing.assert_close(found, whole[:, index])


def test_sites_have_all_units_though_the_plate_asks_for_fewer():
    def program(x, y=None):
        with pyro.plate("data", len(x), subsample_size=4) as i:
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(shift, 1.0), obs=y[i])

    model, data = FromPyro(program, minibatch_plate="data"), regression_data()
    assert model.sites(data)["shift"].shape == (12,)
    batch = model.minibatch(data, torch.arange(4))
    assert model.sites(batch.data)["shift"].shape == (4,)


def subsampling(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=4) as i:
        pyro.sample("obs", dist.Normal(slope * x[i], 1.0), obs=y[i])


def test_programs_that_subsample_by_themselves_are_refused():
    data = regression_data()
    with pytest.raises(DataError, match="plate 'data' subsamples 4 of 12 units by itself"):
        FromPyro(subsampling).sites(data)
    model = FromPyro(subsampling, minibatch_plate="data")
    values = {"slope": torch.tensor(0.3, dtype=F64)}
    with pytest.raises(DataError, match="asks for subsample_size=4, but the data is whole"):
        model.log_joint(values, data)
    with pytest.raises(DataError, match="subsample_size=4, but the batch has 3 units"):
        model.log_joint(values, model.minibatch(data, torch.arange(3)).data)
    index = torch.tensor([1, 5, 6, 11])
    batch = model.minibatch(data, index)
    plain = FromPyro(regression, minibatch_plate="data").minibatch(data, index)
    assert batch.scale == plain.scale == 3.0
    one = torch.tensor(1.0, dtype=F64)
    by_hand = (
        normal(values["slope"], 0.0, one)
        + 3.0 * normal(data["y"][index], 0.3 * data["x"][index], one).sum()
    )
    torch.testing.assert_close(model.log_joint(values, batch.data, scale=3.0), by_hand)


def test_minibatches_need_a_plate_in_front():
    assert lacks(FromPyro(regression), ("plate_size", "minibatch")) == ["plate_size", "minibatch"]
    with pytest.raises(DataError, match="minibatch_plate='rows': expected a plate .* has data"):
        FromPyro(regression, minibatch_plate="rows").sites(regression_data())
    with pytest.raises(DataError, match="expected the minibatch plate 'column' as its leading"):
        FromPyro(nested, minibatch_plate="column").sites(nested_data())
    model = FromPyro(regression, minibatch_plate="data")
    with pytest.raises(ShapeError, match="expected index"):
        model.minibatch(regression_data(), torch.tensor(3))
    batch = model.minibatch(regression_data(), torch.tensor([3, 12]))
    with pytest.raises(DataError, match="plate 'data' has 12 units, the batch asks for unit 12"):
        model.log_joint({"slope": torch.tensor(0.0), "shift": torch.zeros(2)}, batch.data)


# ---------------------------------------------------------------------------------- simulation


def test_prior_draws_have_the_prior_moments():
    model = FromPyro(eight_schools, observed={"y": "effect"})
    n = 4000
    draws = model.sample_prior(n, x={"sigma": ERROR}, rng=5)
    assert {k: tuple(v.shape) for k, v in draws.items()} == {
        "mu": (n,),
        "tau": (n,),
        "theta": (n, 8),
    }
    assert abs(float(draws["mu"].mean())) < 4 * 5.0 / math.sqrt(n)
    assert abs(float(draws["mu"].std()) - 5.0) < 4 * 5.0 / math.sqrt(2 * n)
    half = float((draws["tau"] < 5.0).double().mean())  # the median of HalfCauchy(5)
    assert abs(half - 0.5) < 4 * 0.5 / math.sqrt(n)
    z = (draws["theta"] - draws["mu"][:, None]) / draws["tau"][:, None]
    assert abs(float(z.var()) - 1.0) < 4 * math.sqrt(2 / (8 * n))
    again = model.sample_prior(n, x={"sigma": ERROR}, rng=5)
    assert all(torch.equal(draws[k], again[k]) for k in draws)


def test_simulated_data_follow_their_values():
    model, n = FromPyro(eight_schools), 3000
    one = row(school_values(1), 0)
    values = {k: v.expand(n, *v.shape) for k, v in one.items()}
    found = model.simulate(values, {"sigma": ERROR}, rng=1)["effect"]
    z = (found - one["theta"]) / ERROR
    assert found.shape == (n, 8)
    assert float(z.mean(0).abs().max()) < 4.5 / math.sqrt(n)
    assert float((z.var(0) - 1).abs().max()) < 4.5 * math.sqrt(2 / n)


def test_programs_that_branch_are_simulated_one_by_one():
    def program(y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        loc = 10.0 if a > 0 else -10.0
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    values, data = FromPyro(program).sample_dataset(40, rng=0)
    assert data["y"].shape == (40,)
    assert torch.equal(values["a"] > 0, data["y"] > 0) and 0 < int((values["a"] > 0).sum()) < 40


def test_laws_that_draw_elsewhere_are_run_one_by_one():
    class Foreign(dist.TorchDistribution):
        """Draws with NumPy: under vmap its one draw would serve every element."""

        arg_constraints = {}
        support = constraints.real

        def __init__(self):
            super().__init__(torch.Size(), validate_args=False)

        def sample(self, sample_shape=()):
            return torch.as_tensor(np.random.standard_normal(tuple(sample_shape)))

        def log_prob(self, value):
            return -0.5 * value**2

    def program(y=None):
        a = pyro.sample("a", Foreign())
        pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    draws = FromPyro(program).sample_prior(30, rng=0)["a"]
    assert len(draws.unique()) == 30


def test_what_a_prior_draw_needs_is_said():
    with pytest.raises(CapabilityError, match="needs inputs 'sigma' here: give FromPyro"):
        FromPyro(eight_schools).sample_prior(2, rng=0)
    with pytest.raises(CapabilityError, match="which of the sites effect, mu, tau, theta are obs"):
        FromPyro(eight_schools, inputs={"sigma": ERROR}).sample_prior(2, rng=0)
    drawn = FromPyro(eight_schools, inputs=SCHOOLS).sample_prior(2, rng=0)
    assert set(drawn) == {"mu", "tau", "theta"}


# ---------------------------------------------------------------------------------- prediction


def test_a_new_observation_is_the_mixture_over_draws():
    model, values = FromPyro(eight_schools), school_values(50)
    post = posterior(model, SCHOOLS, values)
    found = post.predict({"sigma": ERROR})
    torch.testing.assert_close(found.mean, values["theta"].mean(0))
    spread = values["theta"].var(0, unbiased=False) + ERROR**2
    torch.testing.assert_close(found.variance, spread)
    density = normal(EFFECT, values["theta"], ERROR).logsumexp(0) - math.log(50)
    torch.testing.assert_close(found.log_prob(EFFECT), density)
    together = normal(EFFECT, values["theta"], ERROR).sum(-1).logsumexp(0) - math.log(50)
    joint = post.predict({"sigma": ERROR}, joint=True)
    torch.testing.assert_close(joint.log_prob(EFFECT), together)
    assert torch.equal(post.predict({"sigma": ERROR}, site="theta").values, values["theta"])
    shrunk = post.predict({"sigma": ERROR}, site="shrunk").values
    torch.testing.assert_close(shrunk, values["theta"] - values["mu"][:, None])


def test_weights_of_draws_carry_over():
    model, values = FromPyro(eight_schools), school_values(3)
    weights = torch.tensor([0.0, -1e9, -1e9], dtype=F64)
    draws = Draws({k: v[None] for k, v in values.items()}, weights[None])
    dims = {k: s.dims for k, s in model.sites(SCHOOLS).items()}
    post = Posterior(draws, model, Context(SCHOOLS, {}, dims))
    torch.testing.assert_close(post.predict({"sigma": ERROR}).mean, values["theta"][0])
    torch.testing.assert_close(
        post.predict({"sigma": ERROR}, site="theta").mean, values["theta"][0]
    )


def test_groups_are_matched_by_label_never_by_size():
    model, n = FromPyro(eight_schools), 600
    values = school_values(n)
    post = posterior(model, SCHOOLS, values, {"school": list("ABCDEFGH")})
    new = {"sigma": torch.ones(8, dtype=F64)}
    order = list("HGFEDCBA")
    found = post.predict(new, site="theta", groups={"school": order})
    assert torch.equal(found.values, values["theta"].flip(-1))
    assert found.coords["school"] == order and found.dims == ("school",)
    few = {"sigma": torch.ones(4, dtype=F64)}
    with pytest.raises(DataError, match="plate 'school' of site 'theta' has 8 units .* and 4 at"):
        post.predict(few, rng=0)
    labels = ["C", "new", np.str_("A"), "new"]
    with pytest.raises(DataError, match="draws random numbers: expected rng"):
        post.predict(few, groups={"school": labels})
    mixed = post.predict(few, site="theta", groups={"school": labels}, rng=3).values
    assert torch.equal(mixed[:, [0, 2]], values["theta"][:, [2, 0]])
    assert torch.equal(mixed[:, 1], mixed[:, 3])
    z = (mixed[:, 1] - values["mu"]) / values["tau"]  # unseen schools: the prior given mu and tau
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.var()) - 1.0) < 4 * math.sqrt(2 / n)
    fresh = post.predict(few, groups={"school": labels}, rng=3)
    torch.testing.assert_close(fresh.mean, mixed.mean(0))


def test_group_errors_say_what_is_known():
    model, values = FromPyro(eight_schools), school_values(4)
    post = posterior(model, SCHOOLS, values, {"school": list("ABCDEFGH")})
    x = {"sigma": ERROR[:2]}
    with pytest.raises(ShapeError, match="expected 2 labels, one per unit .* got 3"):
        post.predict(x, groups={"school": list("ABC")})
    with pytest.raises(DataError, match="no plate 'pupil' at these inputs; .*one of school"):
        post.predict({"sigma": ERROR}, groups={"pupil": [1]})
    bare = posterior(model, SCHOOLS, values)
    with pytest.raises(DataError, match="the posterior has no labels for this plate; fit with"):
        bare.predict(x, groups={"school": list("AB")})
    with pytest.raises(DataError, match="no site 'phi' to predict; expected one of mu, tau"):
        post.predict({"sigma": ERROR}, site="phi")


def test_groups_of_nested_plates_are_matched_in_both():
    def program(n_class, n_pupil, y=None):
        base = pyro.sample("base", dist.Normal(0.0, 1.0))
        classes = pyro.plate("class", n_class, dim=-2)
        pupils = pyro.plate("pupil", n_pupil, dim=-1)
        with classes:
            level = pyro.sample("level", dist.Normal(base, 1.0))
        with classes, pupils:
            skill = pyro.sample("skill", dist.Normal(level, 0.1))
            pyro.sample("obs", dist.Normal(skill, 0.1), obs=y)

    data = {"n_class": 2, "n_pupil": 3, "y": torch.zeros(2, 3, dtype=F64)}
    g = torch.Generator().manual_seed(0)
    values = {
        "base": torch.randn(300, generator=g, dtype=F64),
        "level": torch.randn(300, 2, 1, generator=g, dtype=F64),
        "skill": torch.randn(300, 2, 3, generator=g, dtype=F64),
    }
    coords = {"class": ["p", "q"], "pupil": [1, 2, 3]}
    post = posterior(FromPyro(program), data, values, coords)
    groups = {"class": ["q", "r"], "pupil": [3, 9]}
    x = {"n_class": 2, "n_pupil": 2}
    skill = post.predict(x, site="skill", groups=groups, rng=0).values
    level = post.predict(x, site="level", groups=groups, rng=0).values
    assert torch.equal(skill[:, 0, 0], values["skill"][:, 1, 2])
    assert torch.equal(level[:, 0], values["level"][:, 1])
    # A new pupil of a known class varies about the level of that class.
    assert float((skill[:, 0, 1] - values["level"][:, 1, 0]).std()) < 0.1 * (1 + 4 / math.sqrt(600))
    assert float((level[:, 1, 0] - values["base"]).std()) > 0.8


def test_several_observed_sites_are_told_apart():
    def program(y=None, z=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        first = pyro.sample("first", dist.Normal(a, 1.0), obs=y)
        pyro.sample("second", dist.Normal(first, 1.0), obs=z)

    data = {"y": torch.zeros((), dtype=F64), "z": torch.zeros((), dtype=F64)}
    model = FromPyro(program, observed=("y", "z"))
    values = {"a": torch.zeros(2000, dtype=F64)}
    post = posterior(model, data, {"a": values["a"][:1000]})
    with pytest.raises(DataError, match=r"2 observed sites to predict \(first, second\)"):
        post.predict({})
    assert abs(float(post.predict({}, site="first").variance) - 1.0) < 1e-12
    found = post.predict({}, site="second", rng=0)
    assert abs(float(found.variance) - 2.0) < 4 * math.sqrt(2 / 1000)


def test_observations_without_a_closed_form_are_drawn():
    def program(y=None):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        base = dist.Normal(torch.stack([a, a]), 1.0)
        law = dist.TransformedDistribution(base, [dist.transforms.ExpTransform()])
        pyro.sample("obs", law.to_event(1), obs=y)

    post = posterior(
        FromPyro(program),
        {"y": torch.ones(2, dtype=F64)},
        {"a": torch.zeros(900, dtype=F64)},
    )
    with pytest.raises(DataError, match="draws random numbers: expected rng"):
        post.predict({})
    found = post.predict({}, rng=0)
    assert found.values.shape == (900, 2)
    spread = float(found.values.log().var())
    assert abs(spread - 1.0) < 4 * math.sqrt(2 / 1800)


# ----------------------------------------------------------------------------------- isolation


def test_the_callers_pyro_state_is_untouched():
    pyro.param("slope", torch.tensor(7.0))
    try:

        def program(x, y=None):
            slope = pyro.param("slope", torch.tensor(0.5))
            pyro.param("other", torch.tensor(1.0))
            np.random.rand()
            with pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(slope * x, 1.0), obs=y)

        data = {"x": torch.ones(2), "y": torch.ones(2)}
        model = FromPyro(eight_schools)
        with pyro.plate("outside", 5), poutine.trace() as outer:
            sites = model.sites(SCHOOLS)
            model.log_joint(row(school_values(1), 0), SCHOOLS)
            model.simulate(school_values(2), {"sigma": ERROR}, rng=0)
        assert sites["theta"].shape == (8,)
        assert set(outer.trace.nodes) == set()
        with pytest.raises(DataError, match="random numbers outside pyro.sample"):
            FromPyro(program).sites(data)
        assert list(pyro.get_param_store()) == ["slope"]
        assert float(pyro.param("slope").detach()) == 7.0
    finally:
        pyro.clear_param_store()


def test_structure_is_found_anew_for_other_data():
    def program(group, y=None):
        with pyro.plate("group", int(group.max()) + 1):
            level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(group)):
            pyro.sample("obs", dist.Normal(level[group], 1.0), obs=y)

    model = FromPyro(program)
    y = torch.zeros(4)
    assert model.sites({"group": torch.tensor([0, 1, 1, 0]), "y": y})["level"].shape == (2,)
    group = torch.tensor([0, 1, 2, 0])
    assert model.sites({"group": group, "y": y})["level"].shape == (3,)
    group[1] = 5
    assert model.sites({"group": group, "y": y})["level"].shape == (6,)


def test_posteriors_are_saved_without_the_program(tmp_path):
    model, values = FromPyro(eight_schools), school_values(20)
    post = posterior(model, SCHOOLS, values, {"school": list("ABCDEFGH")})
    post.save(tmp_path / "post")
    with pytest.raises(DataError, match="pass model= to load"):
        load(tmp_path / "post")
    again = load(tmp_path / "post", model=FromPyro(eight_schools))
    x, groups = {"sigma": ERROR[:2]}, {"school": ["B", "H"]}
    before, after = (p.predict(x, groups=groups) for p in (post, again))
    assert torch.equal(before.log_prob(EFFECT[:2]), after.log_prob(EFFECT[:2]))


def test_the_fingerprint_is_that_of_the_program():
    from probkit.fingerprint import digest

    model = FromPyro(eight_schools)
    mark = digest(model)
    model.log_joint(row(school_values(1), 0), SCHOOLS)
    assert digest(model) == mark == digest(FromPyro(eight_schools))
    assert digest(FromPyro(nested)) != mark

"""SVI: exact posteriors recovered, bounds below evidences, minibatches without bias."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from support.fits import GroupModel, LineModel, RateModel, line_data, same

import probkit as pk
from probkit.checkpoint import Checkpoint
from probkit.errors import CapabilityError, DataError
from probkit.inference import MAP, SVI, FullRank, LowRank, MeanField
from probkit.inference.svi import elbo
from probkit.loader import Loader
from probkit.model import Batch
from probkit.rng import stream
from probkit.testing import assert_mean, worst_z, z_bound
from probkit.tree import map_tensors

Y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0, -0.5], dtype=torch.float64)
GOOD = SVI(steps=800, lr=0.05, decay=0.01, particles=8, evidence_draws=4000)


# ------------------------------------------------------------------------------- exact results


@pytest.mark.parametrize("guide", [FullRank(), LowRank(1), LowRank(5)])
def test_a_normal_posterior_is_recovered(guide):
    """At the optimum the gradient has no noise (Roeder et al. 2017 apart): q is exact there.

    The reparameterised gradient of this bound keeps the noise of the entropy term, of order
    1 / sqrt(particles); Adam at its last rate lr * decay averages it, so that the parameters end
    within about sqrt(lr * decay) of the optimum, in standard deviations: 0.022 here.
    """
    mean, covariance, evidence = LineModel().exact(line_data())
    post = pk.infer(LineModel(), line_data(), GOOD, guide=guide, rng=0)
    law, sd = post.marginals["w"], covariance.diagonal().sqrt()
    assert float(((law.mean - mean) / sd).abs().max()) < 5 * 0.022
    assert float((law.stddev / sd).log().abs().max()) < 5 * 0.022
    correlation = post.sample(20_000, rng=1)["w"].T.corrcoef()[0, 1]
    exact = covariance[0, 1] / sd.prod()
    assert abs(float(correlation - exact)) < 5 * 0.022 + 5 / 20_000**0.5
    assert post.log_evidence.kind == "bound"
    assert float(post.log_evidence.value) == pytest.approx(float(evidence), abs=0.02)


def test_the_mean_field_optimum_of_a_normal_is_known():
    """Its means are exact, its precisions the diagonal of the precision matrix."""
    mean, covariance, evidence = LineModel().exact(line_data())
    precision = torch.linalg.inv(covariance)
    post = pk.infer(LineModel(), line_data(), GOOD, guide=MeanField(), rng=0)
    law = post.marginals["w"]
    sd = precision.diagonal() ** -0.5
    assert float(((law.mean - mean) / sd).abs().max()) < 5 * 0.022
    assert float((law.stddev / sd).log().abs().max()) < 5 * 0.022
    # KL(q || p) = (sum log precision_ii - log det precision) / 2.
    gap = 0.5 * float(precision.diagonal().log().sum() - torch.logdet(precision))
    assert float(post.log_evidence.value) == pytest.approx(float(evidence) - gap, abs=0.02)


def test_the_bound_lies_below_the_evidence():
    """For any parameters: one-sided test over random ones, and the gap is KL(q || p)."""
    model, data = LineModel(), line_data()
    mean, covariance, evidence = model.exact(data)
    generator = stream(0, "params")
    for _ in range(10):
        loc, log_scale = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        params = {"w": {"loc": mean + 0.3 * loc, "log_scale": -1 + 0.3 * log_scale}}
        bounds = elbo(model, MeanField(), params, Batch(data), 4000, generator)
        q = torch.distributions.MultivariateNormal(
            params["w"]["loc"], torch.diag((2 * params["w"]["log_scale"]).exp())
        )
        p = torch.distributions.MultivariateNormal(mean, covariance)
        gap = torch.distributions.kl_divergence(q, p)
        assert_mean(bounds[:, None], float(evidence - gap), "bound")
        assert float(bounds.mean()) < float(evidence)


def test_chains_are_independent_fits():
    post = pk.infer(
        LineModel(),
        line_data(),
        SVI(steps=30, evidence_draws=50),
        guide=MeanField(),
        rng=0,
        chains=3,
    )
    assert post.chains == 3 and post.log_evidence.value.shape == (3,)
    assert len({float(p["w"]["loc"][0]) for p in post.source.params}) == 3
    assert post.sample(7, rng=0)["w"].shape == (7, 2)


# ------------------------------------------------------------------------------- minibatches


def fixed_params(seed=0):
    model = GroupModel()
    return map_tensors(
        lambda t: t + 0.3 * torch.randn(t.shape, generator=stream(seed, "p"), dtype=t.dtype),
        MeanField(0.4).init(model, Y, rng=seed),
    )


def batch_bounds(n_batches, size, *, scaled=True, guide_scaled=True):
    """Single-draw bounds on random batches at fixed parameters, [batch, 1]."""
    model, params, guide = GroupModel(), fixed_params(), MeanField()
    generator = stream(5, "batches")
    out = []
    for _ in range(n_batches):
        index = torch.randperm(len(Y), generator=generator)[:size]
        batch = model.minibatch(Y, index)
        if not scaled:
            batch = Batch(batch.data, batch.index, 1.0)
        values, log_q = guide.sample(params, model, batch, 1, rng=generator)
        log_p = model.log_joint({k: v[0] for k, v in values.items()}, batch.data, scale=batch.scale)
        local_scale = batch.scale if guide_scaled else 1.0
        out.append(log_p - log_q.total(local_scale))
    return torch.stack(out)


@pytest.fixture(scope="module")
def full_bound():
    """The bound on all data: closed form from the moments of q."""
    bounds = elbo(GroupModel(), MeanField(), fixed_params(), Batch(Y), 200_000, stream(1, "whole"))
    return float(bounds.mean()), float(bounds.std()) / len(bounds) ** 0.5


def test_the_bound_on_batches_is_unbiased(full_bound):
    expected, error = full_bound
    draws = batch_bounds(3000, 2)
    own = float(draws.std()) / len(draws) ** 0.5
    assert abs(float(draws.mean()) - expected) < z_bound() * math.hypot(own, error)


@pytest.mark.parametrize("fault", [{"scaled": False}, {"guide_scaled": False}])
def test_a_missing_scale_shows_in_the_bound(fault, full_bound):
    assert worst_z(batch_bounds(3000, 2, **fault), full_bound[0]) > 2 * z_bound()


def test_elbo_uses_the_scale_of_the_batch_on_both_densities():
    model, params = GroupModel(), fixed_params()
    batch = model.minibatch(Y, torch.tensor([4, 1]))
    found = elbo(model, MeanField(), params, batch, 3, stream(0, "draw"))
    values, log_q = MeanField().sample(params, model, batch, 3, rng=stream(0, "draw"))
    point = [{k: v[i] for k, v in values.items()} for i in range(3)]
    log_p = torch.stack([model.log_joint(p, batch.data, scale=3.0) for p in point])
    torch.testing.assert_close(found, log_p - log_q.global_ - 3.0 * log_q.local)


@pytest.mark.parametrize("guide", [MeanField(), pytest.param(FullRank(), marks=pytest.mark.slow)])
def test_locals_are_fitted_under_minibatches(guide):
    """Mean-field optimum of the plate model: exact means of all units, from batches of two."""
    mean, covariance, _ = GroupModel().exact(Y)
    sampler = SVI(steps=1500, lr=0.05, decay=0.005, batch_size=2)
    post = pk.infer(GroupModel(), Y, sampler, guide=guide, rng=0)
    precision = torch.linalg.inv(covariance).diagonal()
    found = torch.cat([post.marginals["mu"].mean.reshape(1), post.marginals["z"].mean])
    # Batches add noise of the order of the scale, 3; the rest is as above.
    tolerance = 5 * 3 * (0.05 * 0.005) ** 0.5
    assert float(((found - mean) * precision.sqrt()).abs().max()) < tolerance
    spread = torch.cat([post.marginals["mu"].stddev.reshape(1), post.marginals["z"].stddev])
    assert float((spread * precision.sqrt()).log().abs().max()) < tolerance
    assert post.log_evidence is None
    assert post.sample(3, rng=0)["z"].shape == (3, len(Y))


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
def test_every_unit_is_met_once_in_a_pass(size):
    met = []

    class Watched(GroupModel):
        def minibatch(self, data, index):
            met.append(index)
            return super().minibatch(data, index)

    steps = 2 * -(-len(Y) // size)
    pk.infer(Watched(), Y, SVI(steps=steps, chunk=1, batch_size=size), rng=0)
    seen = torch.cat(met)
    assert sorted(seen[: len(Y)].tolist()) == sorted(seen[len(Y) :].tolist()) == list(range(len(Y)))
    if size < len(Y):
        assert not torch.equal(seen[: len(Y)], seen[len(Y) :]), "each pass has its own order"


def test_batches_need_a_plate():
    with pytest.raises(CapabilityError) as caught:
        pk.infer(RateModel(), Y.abs(), SVI(batch_size=2), rng=0)
    assert str(caught.value) == (
        "SVI(batch_size=) needs plate_size and minibatch; RateModel lacks plate_size, minibatch. "
        "Leave it out"
    )


# ------------------------------------------------------------------------------- loaders


def batches(epoch, generator):
    """All units in a random order, two at a time; NumPy arrays, as a file would give."""
    for index in torch.randperm(len(Y), generator=generator).split(2):
        yield Batch(Y[index].numpy(), index, scale=3.0)


def loader(factory=batches, **changes):
    return Loader(factory, **{"units": len(Y), "example": Y[:2].numpy(), **changes})


STEPS = SVI(steps=20, chunk=3)


@pytest.mark.slow
def test_a_loader_fits_what_batches_fit():
    mean, covariance, _ = GroupModel().exact(Y)
    post = pk.infer(GroupModel(), loader(), SVI(steps=1500, lr=0.05, decay=0.005), rng=0)
    precision = torch.linalg.inv(covariance).diagonal().sqrt()
    found = torch.cat([post.marginals["mu"].mean.reshape(1), post.marginals["z"].mean])
    assert float(((found - mean) * precision).abs().max()) < 5 * 3 * (0.05 * 0.005) ** 0.5
    assert post.sample(3, rng=0)["z"].shape == (3, len(Y))


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_loader_resumes_to_the_same_bits(stop, tmp_path):
    """Stops inside and between epochs of three batches; chunks of three, seven steps."""
    arguments = (GroupModel(), loader(), SVI(steps=20, chunk=3))
    whole = pk.infer(*arguments, rng=0, chains=2)
    options = {"rng": 0, "chains": 2, "checkpoint": Checkpoint(tmp_path, seconds=1e9)}
    pk.infer(*arguments, **options, callbacks=[lambda info: info.step == stop])
    again = pk.infer(GroupModel(), loader(), SVI(steps=20, chunk=3), **options)
    assert same(again, whole)


def test_a_resumed_run_replays_one_epoch_only(tmp_path):
    opened = []

    def factory(epoch, generator):
        opened.append(epoch)
        return batches(epoch, generator)

    options = {"rng": 0, "checkpoint": Checkpoint(tmp_path, seconds=1e9)}
    arguments = (GroupModel(), loader(factory), SVI(steps=20, chunk=4))
    pk.infer(*arguments, **options, callbacks=[lambda info: info.step == 2])
    assert opened == [0, 0, 1, 2]  # Once more at the start, to look at a batch.
    opened.clear()
    fresh = pickle.loads(pickle.dumps(loader()))  # Open iterators do not travel.
    assert fresh.units == len(Y) and not fresh._cursors
    pk.infer(GroupModel(), loader(factory), SVI(steps=20, chunk=4), **options)
    assert opened == [2, 3, 4, 5, 6]


def test_epochs_have_their_own_order_and_chains_their_own():
    seen = {}

    def factory(epoch, generator):
        index = torch.randperm(len(Y), generator=generator)
        seen.setdefault(epoch, []).append(tuple(index.tolist()))
        return (Batch(Y[i], i, 3.0) for i in index.split(2))

    pk.infer(GroupModel(), loader(factory), SVI(steps=12, chunk=12), rng=0, chains=2)
    assert len(set(seen[0])) == 2 and len(set(seen[0] + seen[1] + seen[2] + seen[3])) == 8


def test_locals_need_the_number_of_units():
    with pytest.raises(DataError, match=r"site 'z' is local to the plate 'unit'.*units="):
        pk.infer(GroupModel(), loader(units=None), STEPS, rng=0)
    x, y = line_data()

    def rows(epoch, generator):
        yield Batch((x, y), None, 1.0)

    post = pk.infer(LineModel(), Loader(rows, example=(x, y)), STEPS, rng=0)
    assert post.marginals["w"].mean.shape == (2,)


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (lambda e, g: iter(()), "the factory gave no batch in epoch 1"),
        (lambda e, g: iter([Y[:2]]), r"expected the factory to give Batch.* got Tensor"),
        (
            lambda e, g: iter([Batch(Y[:2], torch.arange(2))]),
            r"Batch\.scale = units / batch size = 3, got 1",
        ),
    ],
)
def test_a_wrong_factory_is_named(factory, text):
    with pytest.raises(DataError, match=text):
        pk.infer(GroupModel(), loader(factory), STEPS, rng=0)


def test_batches_are_checked_like_data():
    x, y = line_data()

    def rows(epoch, generator):
        yield Batch((x, y), None, 1.0)
        yield Batch((x, y * torch.nan), None, 1.0)

    with pytest.raises(DataError, match=r"y: not finite in entry \(0,\)"):
        pk.infer(LineModel(), Loader(rows, example=(x, y)), STEPS, rng=0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"units": 0}, "expected units >= 1, got 0"),
        ({"example": None}, "expected example=<data of one batch>, got none"),
        ({"factory": 3}, r"expected factory\(epoch, generator\), got int"),
    ],
)
def test_options_of_a_loader_are_checked(changes, text):
    with pytest.raises(DataError, match=text):
        loader(**changes)


def test_a_loader_feeds_svi_only():
    with pytest.raises(CapabilityError, match="MAP needs all data at once"):
        pk.infer(GroupModel(), loader(), MAP(), rng=0)
    with pytest.raises(DataError, match="leave out batch_size="):
        pk.infer(GroupModel(), loader(), SVI(batch_size=2), rng=0)


# ------------------------------------------------------------------------------- options, errors


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"decay": 0.0},
        {"decay": 1.1},
        {"particles": 0},
        {"batch_size": 0},
        {"chunk": 0},
        {"evidence_draws": 0},
    ],
)
def test_options_are_checked(wrong):
    with pytest.raises(DataError, match=r"^SVI: expected whole steps.* 0 < lr < inf"):
        SVI(**wrong)


def test_a_guide_without_parameters_has_nothing_to_fit():
    class Empty(MeanField):
        def init(self, model, data, *, rng):
            return {}

    with pytest.raises(CapabilityError, match="Empty has no parameters to fit"):
        pk.infer(LineModel(), line_data(), SVI(), guide=Empty(), rng=0)


def test_a_bound_that_breaks_down_names_the_rate():
    class Cliff(LineModel):
        def log_prior(self, values):
            return super().log_prior(values) + (1.0 - values["w"][..., 0]).log()

    sampler = SVI(steps=200, lr=5.0, chunk=10)
    with pytest.raises(DataError, match=r"the bound became nan at step \d+; lower lr=5"):
        pk.infer(Cliff(), line_data(), sampler, guide=MeanField(), rng=0)


def test_the_rate_falls_to_its_share():
    """With lr and gradient steps known, Adam's first step is lr; the last one lr * decay."""
    sizes = []

    class Slope(LineModel):
        def log_joint(self, values, data, *, scale=1.0):
            return 1e3 * values["w"].sum(-1)

    previous = {}

    class Watched(MeanField):
        def sample(self, params, model, batch, n, *, rng):
            loc = params["w"]["loc"].detach().clone()
            if "loc" in previous:
                sizes.append(float((loc - previous["loc"]).abs().max()))
            previous["loc"] = loc
            return super().sample(params, model, batch, n, rng=rng)

    sampler = SVI(steps=50, lr=0.1, decay=0.1, chunk=50, evidence_draws=50)
    pk.infer(Slope(), line_data(), sampler, guide=Watched(), rng=0)
    steps = [size for size in sizes if size > 0]
    assert steps[0] == pytest.approx(0.1, rel=1e-3)
    assert steps[-1] == pytest.approx(0.1 * 0.1 ** (49 / 50), rel=0.02)

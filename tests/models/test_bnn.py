"""Bayesian neural networks: densities, priors, batches, predictions and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import botorch  # noqa: F401 (its import sets options of GPyTorch, once)
import pytest
import torch
from pyro import poutine
from torch.distributions import Normal

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import MAP, SVI, DeepEnsemble, ImportanceSampling, MeanField
from probkit.kernels import NNGPKernel
from probkit.models import BNN, HalfCauchy, LogNormal
from probkit.models.bnn.network import ACTIVATIONS
from probkit.predictive import Empirical, Mixture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(7, 3, generator=GENERATOR).double()
Y = X[:, 0].sin() - X[:, 1]
NEW = torch.randn(4, 3, generator=GENERATOR).double()


def _values(model, n=6, data=(X, Y), seed=1):
    return model.initial_values(data, n, rng=torch.Generator().manual_seed(seed))


def _by_hand(model, values, x):
    """The network as torch.nn layers, one set of weights."""
    sizes = [x.shape[1], *model.hidden, values[f"bias_{len(model.hidden)}"].shape[0]]
    act = ACTIVATIONS[model.activation]
    h = x
    for k in range(len(sizes) - 1):
        weight = values[f"weight_{k}"]
        if model.prior == "fan_in":
            gain = values.get(("gain_first", "gain_later")[k > 0], model.gains[int(k > 0)])
            weight = weight * gain / math.sqrt(sizes[k])
        h = torch.nn.functional.linear(act(h) if k else h, weight.T, values[f"bias_{k}"])
    return h


MODELS = {
    "iid": BNN(hidden=(5, 4), noise_var=LogNormal(-2.0, 0.5), prior_std=1.7),
    "fan_in": BNN(hidden=(5,), activation="relu", prior="fan_in", gains=(2.0, 0.5), noise_var=0.2),
    "learned": BNN(hidden=(5,), activation="gelu", prior="fan_in", learn_gains=0.3, prior_std=0.4),
    "linear": BNN(hidden=(), noise_var=0.2),
}


@pytest.mark.parametrize("name", MODELS)
def test_networks_are_those_of_torch(name):
    model = MODELS[name]
    values = _values(model)
    together = model.network(values, X)
    assert together.shape == (6, 7, 1)
    for k in range(6):
        one = {n: v[k] for n, v in values.items()}
        torch.testing.assert_close(together[k], _by_hand(model, one, X))
    grid = {n: v.reshape(2, 3, *v.shape[1:]) for n, v in values.items()}
    leads = X.reshape(1, 7, 3).expand(5, 7, 3)
    expected = together.reshape(2, 3, 1, 7, 1).expand(2, 3, 5, 7, 1)
    torch.testing.assert_close(model.network(grid, leads), expected)


@pytest.mark.parametrize("name", MODELS)
def test_the_log_joint_is_the_sum_of_its_terms(name):
    model = MODELS[name]
    values = {n: v[0] for n, v in _values(model).items()}
    noise = values.get("noise_var", torch.tensor(0.2).double())
    total = Normal(_by_hand(model, values, X)[:, 0], noise.sqrt()).log_prob(Y).sum()
    for n, v in values.items():
        if n.startswith("weight"):
            sd = 1.7 if name == "iid" else 1.0
            total += Normal(0.0, torch.tensor(sd).double()).log_prob(v).sum()
        elif n.startswith("bias"):
            total += Normal(0.0, torch.tensor(float(model.prior_std)).double()).log_prob(v).sum()
        elif n.startswith("gain"):
            total += torch.distributions.LogNormal(*torch.tensor([0.0, 0.3]).double()).log_prob(v)
        else:
            total += model.noise_var.log_prob(v)
    torch.testing.assert_close(model.log_joint(values, (X, Y)), total)
    assert float(model.log_joint(values, (X, Y), scale=0.0)) == pytest.approx(
        float(model.log_prior(values))
    )


@pytest.mark.parametrize("name", MODELS)
def test_many_chains_equal_a_loop(name):
    """Densities and gradients agree to 1e-10, the promise of batching."""
    model = MODELS[name]
    values = {n: v.requires_grad_() for n, v in _values(model, 8).items()}
    together = model.log_joint(values, (X, Y))
    gradient = torch.autograd.grad(together.sum(), list(values.values()))
    for k in range(8):
        one = {n: v[k].detach().requires_grad_() for n, v in values.items()}
        alone = model.log_joint(one, (X, Y))
        torch.testing.assert_close(together[k], alone, rtol=0, atol=1e-10)
        for whole, part in zip(
            gradient, torch.autograd.grad(alone, list(one.values())), strict=True
        ):
            torch.testing.assert_close(whole[k], part, rtol=0, atol=1e-10)


def test_several_outputs_have_noise_of_their_own():
    model = BNN(hidden=(4,), noise_var=LogNormal(-2.0, 0.5))
    y = torch.stack([Y, Y.square()], 1)
    values = _values(model, 5, (X, y))
    assert values["noise_var"].shape == (5, 2)
    found = model.pointwise_log_likelihood(values, (X, y))["y"]
    f = model.network(values, X)
    expected = Normal(f, values["noise_var"].sqrt()[:, None]).log_prob(y)
    torch.testing.assert_close(found, expected)


def test_a_categorical_likelihood_is_that_of_the_softmax():
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    model = BNN(hidden=(4,), likelihood="categorical", outputs=3)
    values = _values(model, 5, (X, labels))
    found = model.pointwise_log_likelihood(values, (X, labels))["y"]
    logits = model.network(values, X)
    expected = torch.distributions.Categorical(logits=logits).log_prob(labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(model.log_likelihood(values, (X, labels)), expected.sum(-1))


def test_labels_are_learned_and_predicted():
    x = torch.cat([torch.randn(20, 2, generator=GENERATOR) + c for c in (-3.0, 0.0, 3.0)]).double()
    labels = torch.arange(3).repeat_interleave(20)
    model = BNN(hidden=(8,), likelihood="categorical", outputs=3, inputs=x)
    post = pk.infer(model, (x, labels), DeepEnsemble(members=3, steps=300, lr=0.05), rng=0)
    predicted = post.predict(x)
    assert predicted.probs.shape == (60, 3)
    torch.testing.assert_close(predicted.probs.sum(-1), torch.ones(60).double())
    assert float((predicted.probs.argmax(-1) == labels).double().mean()) > 0.95
    draws = predicted.sample(5, rng=0)
    assert draws.shape == (5, 60) and not draws.is_floating_point()
    assert post.predict(x, site="f").mean.shape == (60, 3)
    joint = post.predict(x[:4], joint=True)
    assert joint.log_prob(labels[:4]).shape == ()
    values, (inputs, drawn) = model.sample_dataset(4, rng=0)
    assert inputs.shape == (4, 60, 2) and drawn.shape == (4, 60)
    assert set(drawn.unique().tolist()) <= {0, 1, 2} and values["bias_1"].shape == (4, 3)


# ------------------------------------------------------------------------------------ priors


@pytest.mark.parametrize(("activation", "hidden"), [("relu", (300,)), ("erf", (300,))])
def test_fan_in_networks_have_the_covariance_of_their_nngp(activation, hidden):
    """Exact at any width for one hidden layer, where f is a sum of independent units."""
    _check_nngp(activation, hidden, slack=0.0)


@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_deep_fan_in_networks_tend_to_their_nngp(activation):
    """Three layers of width 128: a bias of order 1 / width beside the Monte Carlo error."""
    _check_nngp(activation, (128, 128, 128), slack=0.02)


def _check_nngp(activation, hidden, slack):
    gain, bias, n = 1.4, 0.6, 1000
    x = X[:3]
    model = BNN(
        hidden=hidden,
        activation=activation,
        prior="fan_in",
        gains=(gain, gain),
        prior_std=bias,
        noise_var=0.1,
        inputs=x,
    )
    products = []
    for part in range(5):
        values = model.sample_prior(n // 5, rng=part)
        f = model.network(values, x)[..., 0]
        products.append(f[:, :, None] * f[:, None])
    found = torch.cat(products)
    kernel = NNGPKernel(
        len(hidden), activation, w_std=gain, b_std=bias, last_w_std=gain, last_b_std=bias
    )
    expected = kernel(x).to_dense().detach()
    error = found.std(0) / math.sqrt(n)
    # Nine entries, level 1e-4 over all: 4.3 standard errors.
    gap = (found.mean(0) - expected).abs() - slack * expected.abs()
    assert float((gap / error).max()) < 4.3


def test_the_size_of_iid_networks_grows_with_their_width():
    """What the fan-in prior is for: var f = s^2 (1 + width E a^2) under the other."""
    sizes = []
    for width in (10, 1000):
        model = BNN(hidden=(width,), noise_var=0.1, inputs=X[:1])
        f = model.network(model.sample_prior(400, rng=0), X[:1])
        sizes.append(float(f.var()))
    assert sizes[1] > 30 * sizes[0]


def test_gains_and_noise_are_drawn_from_their_priors():
    model = BNN(
        hidden=(2,),
        prior="fan_in",
        gains=(3.0, 0.5),
        learn_gains=0.2,
        noise_var=LogNormal(-1.0, 0.3),
        inputs=X,
    )
    draws = model.sample_prior(4000, rng=0)
    for name, (mean, sd) in {
        "gain_first": (math.log(3.0), 0.2),
        "gain_later": (math.log(0.5), 0.2),
        "noise_var": (-1.0, 0.3),
    }.items():
        z = (draws[name].log() - mean) / sd
        assert abs(float(z.mean())) < 4 / math.sqrt(4000)
        assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / 4000)
    assert set(BNN(hidden=(), prior="fan_in", learn_gains=0.1).sites((X, Y))) == {
        "weight_0",
        "bias_0",
        "gain_first",
        "noise_var",
    }


@pytest.mark.parametrize("name", MODELS)
def test_starting_weights_are_those_of_an_initialised_network(name):
    """Weights that act have standard deviation 1 / sqrt(fan_in), or less where the prior has."""
    model = MODELS[name] if name == "linear" else replace(MODELS[name], hidden=(40,))
    values = model.initial_values((X, Y), 400, rng=torch.Generator().manual_seed(3))
    last = f"weight_{len(model.hidden)}"
    fan_in = values[last].shape[1]
    acting = values[last]
    if model.prior == "fan_in":
        acting = acting * model.gains[int(bool(model.hidden))] / math.sqrt(fan_in)
    prior = model.gains[1] if model.prior == "fan_in" else model.prior_std * math.sqrt(fan_in)
    expected = min(1.0, prior) / math.sqrt(fan_in)
    assert float(acting.std()) == pytest.approx(expected, rel=0.05)


# ----------------------------------------------------------------------------- scales and batches


def test_standardising_is_the_model_of_scaled_data():
    x, y = 5 * X - 2, 300 + 40 * Y
    scaled = BNN(hidden=(4,), noise_var=0.05, standardize=True)
    plain = BNN(hidden=(4,), noise_var=0.05)
    sx = (x - x.mean(0)) / x.std(0, correction=0)
    mean, sd = y.mean(), y.std(correction=0)
    values = _values(plain, 5)
    expected = plain.log_joint(values, (sx, (y - mean) / sd)) - len(y) * sd.log()
    torch.testing.assert_close(scaled.log_joint(values, (x, y)), expected)
    batch = scaled.minibatch((x, y), torch.tensor([0, 3]))
    found = scaled.log_likelihood(values, batch.data)
    whole = scaled.pointwise_log_likelihood(values, (x, y))["y"]
    torch.testing.assert_close(found, whole[:, [0, 3]].sum(-1))
    post = pk.infer(scaled, (x, y), DeepEnsemble(members=2, steps=20), rng=0)
    f = post.predict(x, site="f").values
    draws = {n: v[0] for n, v in post.draws.items()}
    torch.testing.assert_close(f, plain.network(draws, sx)[..., 0] * sd + mean)
    noise = post.predict(x).dist.variance - 0.05 * sd**2
    assert float(noise.abs().max()) < 1e-9


def test_minibatch_svi_finds_a_line():
    x = torch.randn(200, 1, generator=GENERATOR).double()
    y = 2 * x[:, 0] - 1 + 0.1 * torch.randn(200, generator=GENERATOR).double()
    model = BNN(hidden=(), noise_var=0.01, prior_std=3.0)
    sampler = SVI(steps=600, batch_size=50, lr=0.05)
    post = pk.infer(model, (x, y), sampler, guide=MeanField(), rng=0)
    assert float(post.analytic["weight_0"].mean) == pytest.approx(2.0, abs=0.05)
    assert float(post.analytic["bias_0"].mean) == pytest.approx(-1.0, abs=0.05)


def test_float32_data_makes_float32_networks():
    model = BNN(hidden=(4,))
    data = (X.float(), Y.float())
    post = pk.infer(model, data, DeepEnsemble(members=2, steps=30), rng=0)
    assert {v.dtype for v in post.draws.values()} == {torch.float32}
    assert post.predict(NEW.float()).mean.dtype == torch.float32
    values = _values(model, 3, data)
    double = {n: v.double() for n, v in values.items()}
    torch.testing.assert_close(
        model.log_joint(values, data).double(),
        model.log_joint(double, (data[0].double(), data[1].double())),
        rtol=1e-5,
        atol=1e-4,
    )
    whole = model.prepare((torch.arange(6).reshape(3, 2), torch.arange(3)))
    assert whole[0].dtype == whole[1].dtype == torch.float64


def test_pyro_sees_the_same_density():
    model = MODELS["iid"]
    values = {n: v[0] for n, v in _values(model).items()}
    program = pk.to_pyro(model)
    trace = poutine.trace(poutine.condition(program, values)).get_trace((X, Y))
    torch.testing.assert_close(trace.log_prob_sum(), model.log_joint(values, (X, Y)))


# ------------------------------------------------------------------------------- predictions


def _ensemble(model=MODELS["fan_in"], data=(X, Y), members=3):
    return pk.infer(model, data, DeepEnsemble(members=members, steps=30), rng=0)


def test_predictions_mix_over_the_draws():
    post = _ensemble()
    predicted = post.predict(NEW)
    assert isinstance(predicted, Mixture)
    draws = {n: v[0] for n, v in post.draws.items()}
    f = MODELS["fan_in"].network(draws, NEW)[..., 0]
    torch.testing.assert_close(predicted.mean, f.mean(0))
    expected = f.var(0, correction=0) + 0.2
    torch.testing.assert_close(predicted.variance, expected)
    latent = post.predict(NEW, site="f")
    assert isinstance(latent, Empirical)
    torch.testing.assert_close(latent.values, f)
    joint = post.predict(NEW, joint=True)
    each = Normal(f, math.sqrt(0.2)).log_prob(torch.zeros(4).double()).sum(-1)
    expected = torch.logsumexp(each, 0) - math.log(3)
    torch.testing.assert_close(joint.log_prob(torch.zeros(4).double()), expected)


def test_leading_dims_of_inputs_are_kept():
    y = torch.stack([Y, -Y], 1)
    for target, tail in ((Y, ()), (y, (2,))):
        post = _ensemble(BNN(hidden=(3,)), (X, target))
        grid = NEW.reshape(2, 1, 2, 3)
        for site in (None, "f"):
            predicted = post.predict(grid, site=site, joint=True)
            assert predicted.mean.shape == (2, 1, 2, *tail)
            flat = post.predict(NEW, site=site)
            torch.testing.assert_close(predicted.mean.reshape(4, *tail), flat.mean)
            torch.testing.assert_close(predicted.variance.reshape(4, *tail), flat.variance)


def test_draws_are_taken_in_parts_where_they_are_many(monkeypatch):
    post = _ensemble(members=7)
    whole = post.predict(NEW, site="f").values
    monkeypatch.setattr("probkit.models.bnn.model._CHUNK_BYTES", 400)
    torch.testing.assert_close(post.predict(NEW, site="f").values, whole)


def test_weighted_draws_keep_their_weights():
    model = BNN(hidden=(), noise_var=0.3)
    sampler = ImportanceSampling(2000)
    guide = MeanField(init_scale=1.0)
    post = pk.infer(model, (X[:3], Y[:3]), sampler, guide=guide, rng=0)
    weights = torch.softmax(post.log_weights.flatten(), 0)
    draws = {n: v.flatten(0, 1) for n, v in post.draws.items()}
    expected = weights @ model.network(draws, NEW)[..., 0]
    torch.testing.assert_close(post.predict(NEW).mean, expected)
    torch.testing.assert_close(post.predict(NEW, site="f").mean, expected)


def test_botorch_takes_ensembles():
    post = _ensemble(BNN(hidden=(3,)), (X, torch.stack([Y, -Y], 1)))
    wrapped = post.to_botorch()
    points = NEW.reshape(2, 2, 3)
    found = wrapped.posterior(points)
    with pk.scope(rng=0):
        assert found.rsample(torch.Size([5])).shape == (5, 2, 2, 2)
    torch.testing.assert_close(found.mean, post.predict(points, site="f").mean)
    noisy = wrapped.posterior(points, observation_noise=True)
    torch.testing.assert_close(noisy.variance, post.predict(points).variance)


def test_predictions_are_differentiable_in_the_inputs():
    x = NEW.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_ensemble().predict(x).mean.sum(), x)
    assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().max()) > 0


# --------------------------------------------------------------------------------- bad input


def test_options_are_checked():
    for options, message in (
        ({"hidden": (5, 0)}, r"hidden: expected widths >= 1 .* got \(5, 0\)"),
        ({"hidden": 50}, "hidden: expected widths"),
        ({"activation": "softplus"}, "activation: expected one of 'tanh', .* got 'softplus'"),
        ({"prior": "flat"}, "prior: expected 'iid' or 'fan_in', got 'flat'"),
        ({"prior_std": 0.0}, "prior_std: expected a finite number > 0, got 0.0"),
        ({"gains": (1.0,)}, "gains: expected .first, later."),
        ({"gains": (1.0, -1.0)}, "gains: expected a finite number > 0, got -1.0"),
        ({"learn_gains": 0.5}, "learn_gains: expected None with prior='iid'"),
        ({"noise_var": -0.1}, "noise_var: expected a finite number > 0, got -0.1"),
        ({"noise_var": LogNormal(torch.zeros(2), 1.0)}, "noise_var: expected one law"),
        ({"likelihood": "poisson"}, "likelihood: expected 'normal' or 'categorical'"),
        ({"likelihood": "categorical"}, "outputs: expected the number of classes >= 2"),
        ({"likelihood": "categorical", "outputs": 2, "standardize": True}, "standardize: expected"),
        ({"outputs": 0}, "outputs: expected a whole number >= 1, got 0"),
        ({"inputs": torch.zeros(3)}, r"inputs: expected \[\*lead, row, feature\]"),
    ):
        with pytest.raises((DataError, ShapeError), match=message):
            BNN(**options)


def test_data_is_checked():
    model = BNN(hidden=(3,))
    for data, message in (
        (X, "expected data .X .row, feature., y"),
        ((X[:, 0], Y), r"X: expected \[\*lead, row, feature\] .* got \(7,\)"),
        ((X, Y[:5]), r"equally many rows, got \(7, 3\) and \(5,\)"),
        ((X[:0], Y[:0]), "at least one row"),
        ((X.to(torch.complex128), Y), "X: expected float64 or float32, got torch.complex128"),
        ((X, Y.half()), "y: expected float64 or float32, got torch.float16"),
    ):
        with pytest.raises((DataError, ShapeError), match=message):
            pk.infer(model, data, MAP(), rng=0)
    spoiled = X.clone()
    spoiled[4, 1] = torch.inf
    with pytest.raises(DataError, match="X must be finite, got inf at row 4, column 1"):
        pk.infer(model, (spoiled, Y), MAP(), rng=0)
    with pytest.raises(ShapeError, match=r"y: expected \[row, output=2\], got \(7,\)"):
        pk.infer(BNN(hidden=(3,), outputs=2), (X, Y), MAP(), rng=0)
    with pytest.raises(DataError, match="expected a target that varies, got 7 equal values"):
        pk.infer(BNN(hidden=(3,), standardize=True), (X, 0 * Y + 2), MAP(), rng=0)


def test_labels_are_checked():
    model = BNN(hidden=(3,), likelihood="categorical", outputs=2)
    labels = torch.tensor([0, 1, 1, 0, 2, 0, 1])
    with pytest.raises(DataError, match="expected labels 0 to 1, got 2 at row 4"):
        pk.infer(model, (X, labels), MAP(), rng=0)
    with pytest.raises(DataError, match="expected labels 0 to 1, got 0.5 at row 0"):
        pk.infer(model, (X, 0.5 * torch.ones(7)), MAP(), rng=0)


def test_predictions_are_checked():
    post = _ensemble()
    with pytest.raises(ShapeError, match="x: expected 3 feature columns as in training, got 2"):
        post.predict(NEW[:, :2])
    with pytest.raises(DataError, match="x must be finite, got nan at row 0, column 0"):
        post.predict(NEW / 0 * 0)
    with pytest.raises(DataError, match="site: expected None .* or 'f', got 'g'"):
        post.predict(NEW, site="g")
    with pytest.raises(CapabilityError, match="no plates; leave groups= out"):
        post.predict(NEW, groups={"g": ["a"] * 4})


def test_simulation_needs_inputs_and_a_scale():
    with pytest.raises(CapabilityError, match="sample_prior sees no data: .* inputs=X"):
        BNN().sample_prior(2, rng=0)
    model = BNN(hidden=(3,), standardize=True, inputs=X)
    with pytest.raises(CapabilityError, match="the scale of BNN.standardize=True."):
        model.sample_dataset(2, rng=0)


def test_any_law_of_the_noise_is_kept_in_files(tmp_path):
    model = BNN(hidden=(3,), noise_var=HalfCauchy(0.5))
    post = _ensemble(model)
    post.save(tmp_path)
    back = pk.load(tmp_path).model
    assert back.hidden == (3,) and type(back.noise_var) is HalfCauchy
    values = _values(model)
    torch.testing.assert_close(back.log_prior(values), model.log_prior(values))

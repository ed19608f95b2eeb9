"""Laplace on networks against brute-force Jacobians, and the evidence that tunes it."""

from __future__ import annotations

import math

import pytest
import torch
from botorch.posteriors import GPyTorchPosterior
from torch.func import hessian, jacrev

import probkit as pk
from probkit.inference import DeepEnsemble, Laplace
from probkit.inference.laplace.curvature import gauss_newton
from probkit.inference.laplace.evidence import NetworkEvidence, maximise
from probkit.inference.laplace.layers import jacobian_factors
from probkit.models import BNN, LogNormal

GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(9, 2, generator=GENERATOR).double()
Y = torch.stack([X[:, 0].sin(), X[:, 1] ** 2 - X[:, 0]], 1)
LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0])
NEW = torch.randn(4, 2, generator=GENERATOR).double()

REGRESSION = BNN(hidden=(4, 3), noise_var=LogNormal(-2.0, 1.0), prior_std=1.4)
FAN_IN = BNN(
    hidden=(4, 3), activation="erf", prior="fan_in", gains=(2.0, 1.3), prior_std=0.6, noise_var=0.1
)
CLASSES = BNN(hidden=(5,), likelihood="categorical", outputs=3, prior_std=0.8)
CASES = {"regression": (REGRESSION, Y), "fan_in": (FAN_IN, Y), "classes": (CLASSES, LABELS)}


def _point(model, y):
    values = model.initial_values((X, y), 1, rng=torch.Generator().manual_seed(5))
    return {name: value[0] for name, value in values.items()}


def _names(model):
    return [name for pair in model.layer_names() for name in pair]


def _flat_function(model, point):
    """The network as a function of the flat weights and inputs."""
    names = _names(model)
    sizes = [point[name].numel() for name in names]

    def network(flat, x):
        parts = flat.split(sizes)
        values = {n: p.reshape(point[n].shape) for n, p in zip(names, parts, strict=True)}
        return model.network({**point, **values}, x)

    return network, torch.cat([point[name].flatten() for name in names])


def _brute(case):
    """Gauss-Newton matrix [A, A] by torch.func, from the likelihood as the model states it."""
    model, y = CASES[case]
    point = _point(model, y)
    network, flat = _flat_function(model, point)
    jacobian = jacrev(network)(flat, X)  # [row, output, A]
    f = network(flat, X)

    def negative(outputs, row):
        if case == "classes":
            return -torch.log_softmax(outputs, -1)[y[row]]
        variance = point["noise_var"] if case == "regression" else 0.1
        return (0.5 * (outputs - y[row]).square() / variance).sum()

    total = torch.zeros(len(flat), len(flat)).double()
    for row in range(len(X)):
        curvature = hessian(lambda o, row=row: negative(o, row))(f[row])
        total += jacobian[row].T @ curvature @ jacobian[row]
    sd = model.weight_sd()
    prior = torch.cat([torch.full_like(point[n].flatten(), sd[n]) for n in _names(model)])
    return model, y, point, jacobian, total, prior


@pytest.mark.parametrize("case", CASES)
def test_full_is_the_gauss_newton_matrix(case):
    model, y, point, _, total, prior = _brute(case)
    found = gauss_newton(model, point, (X, y), "full")
    torch.testing.assert_close(found.matrix, prior[:, None] * total * prior)
    ones, one = torch.ones(len(model.layer_names())).double(), torch.ones(()).double()
    root = found.covariance(ones, one).root
    expected = torch.linalg.inv(total + torch.diag(prior**-2))
    torch.testing.assert_close(root @ root.T, expected)


@pytest.mark.parametrize("case", CASES)
def test_diag_is_its_diagonal(case):
    model, y, point, _, total, prior = _brute(case)
    found = gauss_newton(model, point, (X, y), "diag")
    ones, one = torch.ones(len(model.layer_names())).double(), torch.ones(()).double()
    variance = found.covariance(ones, one).variance()
    torch.testing.assert_close(variance, 1 / (total.diagonal() + prior**-2))


@pytest.mark.parametrize("case", CASES)
def test_kron_is_the_product_of_mean_factors(case):
    """Sum of input products (x) mean of output curvatures; from the definition, layer by layer."""
    model, y, point, _, _, prior = _brute(case)
    ones, one = torch.ones(len(model.layer_names())).double(), torch.ones(()).double()
    covariance = gauss_newton(model, point, (X, y), "kron").covariance(ones, one)
    dense = covariance.colour(torch.eye(len(prior)).double())
    found = dense.T @ dense
    output = model.output_curvature(point, (X, y))
    middle = output.root @ output.root.mT
    _, factors = jacobian_factors(model, point, X)
    start = 0
    for factor in factors:
        inward = factor.inputs.T @ factor.inputs
        outward = torch.einsum("nko,nkl,nlp->op", factor.slopes, middle, factor.slopes) / len(X)
        size = len(inward) * len(outward)
        part = slice(start, start + size)
        precision = torch.kron(inward, outward.contiguous()) + torch.diag(prior[part] ** -2)
        # Equal priors of weights and biases within a layer are not needed.
        torch.testing.assert_close(found[part, part], torch.linalg.inv(precision))
        start += size
    assert start == len(prior)
    torch.testing.assert_close(covariance.variance(), found.diagonal())


def test_kron_is_exact_for_a_single_row():
    """One row: every block is one Kronecker product, that of the full matrix."""
    model, data = BNN(hidden=(4,), noise_var=0.1), (X[:1], Y[:1, 0])
    point = {k: v[0] for k, v in model.initial_values(data, 1, rng=GENERATOR).items()}
    ones, one = torch.ones(2).double(), torch.ones(()).double()
    dense = gauss_newton(model, point, data, "kron").covariance(ones, one)
    table = dense.colour(torch.eye(17).double())
    precision = gauss_newton(model, point, data, "full").matrix + torch.eye(17).double()
    for part in (slice(0, 12), slice(12, 17)):
        expected = torch.linalg.inv(precision[part, part])
        torch.testing.assert_close((table.T @ table)[part, part], expected)


@pytest.mark.parametrize("case", ["regression", "fan_in", "classes"])
@pytest.mark.parametrize("structure", ["full", "diag", "kron", "last_layer"])
def test_linearised_predictions_are_those_of_the_brute_force_jacobian(case, structure):
    model, y = CASES[case]
    point = _point(model, y)
    sampler = Laplace(structure, point, tune=("prior",), tune_steps=1)
    post = pk.infer(model, (X, y), sampler, rng=0)
    params = post.source.params[0]
    size = len(params["loc"])
    dense = params["covariance"].colour(torch.eye(size).double())
    sigma = dense.T @ dense
    network, flat = _flat_function(model, point)
    jacobian = jacrev(network)(flat, NEW)[..., -size:]
    expected = torch.einsum("nka,ab,mlb->nkml", jacobian, sigma, jacobian)
    joint = post.predict(NEW, site="f", joint=True)
    outputs = jacobian.shape[1]
    torch.testing.assert_close(
        joint.dist.covariance_matrix, expected.reshape(4 * outputs, -1), rtol=1e-6, atol=1e-7
    )
    torch.testing.assert_close(joint.mean, network(flat, NEW))
    alone = post.predict(NEW, site="f")
    variance = torch.einsum("nknk->nk", expected)
    torch.testing.assert_close(alone.variance, variance)
    torch.testing.assert_close(alone.mean, joint.mean)
    batch = post.predict(NEW.reshape(2, 2, 2), site="f", joint=True)
    blocks = torch.stack([expected[:2, :, :2], expected[2:, :, 2:]]).reshape(2, 2 * outputs, -1)
    torch.testing.assert_close(batch.dist.covariance_matrix, blocks, rtol=1e-6, atol=1e-7)


def test_exact_hessians_of_networks_predict_by_the_same_rule():
    """All sites vary, noise included; the order of the flat vector puts layers first."""
    model = BNN(hidden=(3,), noise_var=LogNormal(-2.0, 0.5), prior_std=0.5)
    y = X[:, 0].sin()
    post = pk.infer(model, (X, y), Laplace("full", curvature="hessian"), rng=0)
    params = post.source.params[0]
    assert params["sites"][-1] == "noise_var" and not params["held"]
    point = post.source.guide.centre(params, model, (X, y))
    network, flat = _flat_function(model, point)
    jacobian = jacrev(network)(flat, NEW)[:, 0]
    root = params["covariance"].root[: len(flat)]
    expected = jacobian @ root @ root.T @ jacobian.T
    found = post.predict(NEW, site="f", joint=True).dist.covariance_matrix
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert post.analytic["noise_var"].mean > 0

    def minus(flat):
        values, log_det = pk.Unconstrained(model.sites((X, y))).constrain(flat)
        return -(model.log_joint(values, (X, y)) + log_det)

    brute = hessian(minus)(params["loc"])
    whole = params["covariance"].root
    torch.testing.assert_close(whole @ whole.T, torch.linalg.inv(brute), rtol=1e-6, atol=1e-8)


def test_predictions_are_differentiable_in_the_inputs():
    """As acquisition functions need; checked by central differences."""
    model = BNN(hidden=(4,), noise_var=0.1)
    y = X[:, 0].sin()
    post = pk.infer(model, (X, y), Laplace("kron", tune=("prior",)), rng=0)
    x = NEW[:2].clone().requires_grad_()

    def score(inputs):
        predicted = post.predict(inputs, site="f", joint=True)
        return predicted.mean.sum() + predicted.dist.covariance_matrix[0, 1]

    (gradient,) = torch.autograd.grad(score(x), x)
    width = 1e-6
    for entry in ((0, 0), (1, 1)):
        step = torch.zeros_like(NEW[:2])
        step[entry] = width
        rise = (score(NEW[:2] + step) - score(NEW[:2] - step)) / (2 * width)
        assert float(gradient[entry]) == pytest.approx(float(rise), rel=1e-6, abs=1e-9)


def test_labels_are_predicted_by_averaging_probabilities():
    point = _point(*CASES["classes"])
    sampler = Laplace("full", point, tune=("prior",), tune_steps=1)
    post = pk.infer(CLASSES, (X, LABELS), sampler, rng=0)
    probs = post.predict(NEW, rng=0).probs
    assert probs.shape == (4, 3)
    latent = post.predict(NEW, site="f", joint=True).dist
    draws = torch.distributions.MultivariateNormal(
        latent.loc.flatten(), latent.covariance_matrix + 1e-9 * torch.eye(12).double()
    )
    with pk.scope(rng=7):
        softmax = torch.softmax(draws.sample((20_000,)).reshape(-1, 4, 3), -1)
    # 1000 draws against 20000: six standard errors of the smaller sample.
    error = softmax.std(0) / math.sqrt(1000)
    assert bool(((probs - softmax.mean(0)).abs() < 6 * error).all())


# ------------------------------------------------------------------------------ the evidence


def _evidence(structure, tune=("layers", "noise")):
    model, y = CASES["regression"]
    point = _point(model, y)
    found = gauss_newton(model, point, (X, y), structure)
    pairs = model.layer_names()[-1:] if structure == "last_layer" else model.layer_names()
    sd = model.weight_sd()
    output = model.output_curvature(point, (X, y))
    return NetworkEvidence(
        curvature=found,
        log_likelihood=model.log_likelihood(point, (X, y)),
        squares=torch.stack([sum((point[n] / sd[n]).square().sum() for n in p) for p in pairs]),
        sizes=torch.tensor([float(sum(point[n].numel() for n in p)) for p in pairs]).double(),
        residual=output.residual.square().sum(),
        observations=Y.numel(),
    )


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "last_layer"])
def test_the_gradient_of_the_evidence_is_that_of_differences(structure):
    evidence = _evidence(structure)
    layers = len(evidence.squares)
    start = torch.linspace(-0.5, 0.7, layers + 1).double().requires_grad_()
    value = evidence(start[:-1], start[-1])
    (gradient,) = torch.autograd.grad(value, start)
    for k in range(layers + 1):
        step = torch.zeros(layers + 1).double()
        step[k] = 1e-5
        with torch.no_grad():
            up, down = start + step, start - step
            rise = evidence(up[:-1], up[-1]) - evidence(down[:-1], down[-1])
        assert float(gradient[k]) == pytest.approx(float(rise) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_factors_on_prior_and_noise_are_those_of_another_model(structure):
    """Precision times 3, noise times 2: the same as the model with that prior and noise."""
    model, y = CASES["regression"]
    point = _point(model, y)
    log_precision = torch.full((3,), math.log(3.0)).double()
    found = _evidence(structure)(log_precision, torch.tensor(math.log(2.0)).double())
    other = BNN(hidden=(4, 3), noise_var=LogNormal(-2.0, 1.0), prior_std=1.4 / math.sqrt(3))
    moved = {**point, "noise_var": 2 * point["noise_var"]}
    with pytest.warns(pk.ConvergenceWarning):
        post = pk.infer(other, (X, y), Laplace(structure, moved), rng=0)
    torch.testing.assert_close(post.log_evidence.value[0], found)


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "last_layer"])
def test_tuning_ends_where_the_gradient_vanishes(structure):
    evidence = _evidence(structure)
    tuned = maximise(evidence, ("layers", "noise"), 200)
    spot = torch.cat([tuned.precision.log(), tuned.noise.log()[None]]).requires_grad_()
    value = evidence(spot[:-1], spot[-1])
    (gradient,) = torch.autograd.grad(value, spot)
    assert float(gradient.abs().max()) < 1e-4
    start = evidence(torch.zeros_like(evidence.squares), torch.zeros(()).double())
    assert float(tuned.log_evidence) > float(start)
    one = maximise(evidence, ("prior",), 200)
    assert float(one.noise) == 1.0 and bool((one.precision == one.precision[0]).all())
    assert float(start) < float(one.log_evidence) < float(tuned.log_evidence)


def test_tuned_noise_is_held_and_enters_predictions():
    model, y = CASES["regression"]
    point = _point(model, y)
    post = pk.infer(model, (X, y), Laplace("kron", point, tune=("layers", "noise")), rng=0)
    factor = post.sample_stats["noise_factor"]
    held = post.source.params[0]["held"]["noise_var"]
    torch.testing.assert_close(held, point["noise_var"] * factor)
    added = post.predict(NEW).variance - post.predict(NEW, site="f").variance
    torch.testing.assert_close(added, held.expand(4, 2))
    assert torch.equal(post.sample(2, rng=0)["noise_var"], held.expand(2, 2))
    assert post.sample_stats["prior_factor"].shape == (1, 3)


@pytest.mark.parametrize("structure", ["full", "kron", "diag"])
def test_rows_may_come_in_parts(structure, monkeypatch):
    """Chunks of a few rows give the same matrices."""
    whole = _evidence(structure)(torch.zeros(3).double(), torch.zeros(()).double())
    monkeypatch.setattr("probkit.inference.laplace.layers._CHUNK_BYTES", 200)
    parts = _evidence(structure)(torch.zeros(3).double(), torch.zeros(()).double())
    torch.testing.assert_close(parts, whole)


def test_float32_networks_agree_with_float64():
    model = BNN(hidden=(8,), noise_var=0.05)
    y = X[:, 0].sin()
    sampler = Laplace("kron", DeepEnsemble(1, 300, 0.05, fraction=1.0), tune=("prior",))
    point = pk.infer(model, (X, y), DeepEnsemble(1, 300, 0.05, fraction=1.0), rng=0)
    single = {k: v[0, 0].float() for k, v in point.draws.items()}
    double = {k: v.double() for k, v in single.items()}
    tune = ("prior",)
    low = pk.infer(model, (X.float(), y.float()), Laplace("kron", single, tune=tune), rng=0)
    high = pk.infer(model, (X, y), Laplace("kron", double, tune=tune), rng=0)
    predicted = low.predict(NEW.float())
    assert predicted.mean.dtype == torch.float32 and sampler.structure == "kron"
    torch.testing.assert_close(
        predicted.variance.double(), high.predict(NEW).variance, rtol=1e-4, atol=1e-5
    )


def test_botorch_sees_one_joint_gaussian_over_outputs():
    model, y = CASES["fan_in"]
    post = pk.infer(model, (X, y), Laplace("kron", _point(model, y), tune=("prior",)), rng=0)
    wrapped = post.to_botorch()
    assert wrapped.num_outputs == 2
    points = NEW.reshape(2, 2, 2)
    result = wrapped.posterior(points)
    assert isinstance(result, GPyTorchPosterior)
    expected = post.predict(points, site="f", joint=True)
    torch.testing.assert_close(result.mean, expected.mean)
    covariance = result.distribution.covariance_matrix
    torch.testing.assert_close(covariance, expected.dist.covariance_matrix)
    second = post.to_botorch(outputs=[1]).posterior(points, observation_noise=True)
    torch.testing.assert_close(second.variance, expected.variance[..., 1:] + 0.1)


def test_botorch_takes_some_outputs_of_a_mixture_of_modes():
    sampler = Laplace("kron", DeepEnsemble(1, 50, 0.05, fraction=1.0), tune=("prior",))
    post = pk.infer(BNN(hidden=(4,), noise_var=0.1), (X, Y), sampler, rng=0, chains=2)
    both = post.predict(NEW, site="f", joint=True)
    found = post.to_botorch(outputs=[1]).posterior(NEW)
    torch.testing.assert_close(found.mean[:, 0], both.mean[:, 1])
    torch.testing.assert_close(found.variance[:, 0], both.variance[:, 1])

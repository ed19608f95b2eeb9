"""Ensembles of wide networks against the closed forms of gradient descent."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import HMC
from probkit.kernels import NNGPKernel
from probkit.models import InverseGamma, LogNormal, PointMass
from probkit.models.nngp_ensemble import ScaleMixtureNetwork, WideEnsemble
from probkit.testing import ModelConformance, SamplerConformance, worst_z, z_bound

X = torch.linspace(-2.0, 2.0, 5, dtype=torch.float64)[:, None]
Y = X[:, 0].sin()
NEW = torch.tensor([[-2.5], [-0.7], [0.4], [2.8]], dtype=torch.float64)


def _kernel(depth=1, activation="erf", **options):
    return NNGPKernel(depth, activation, w_std=1.5, b_std=0.5, last_w_std=1.0, **options)


class TestModel(ModelConformance):
    latents = ("f",)

    def problem(self):
        model = ScaleMixtureNetwork(_kernel(2, "relu"), width=4, noise_var=0.1)
        return model, (X, Y), NEW

    def sampler(self):
        return WideEnsemble(members=12, steps=20)


class TestClassifier(ModelConformance):
    latents = ("f",)

    def problem(self):
        model = ScaleMixtureNetwork(_kernel(), 5, LogNormal(0.0, 0.5), "cross_entropy")
        return model, (X, torch.tensor([0, 0, 1, 2, 2])), NEW

    def sampler(self):
        return WideEnsemble(members=12, steps=20, train="all")


class TestSampler(SamplerConformance):
    def problem(self):
        sampler = WideEnsemble(members=6, steps=12, chunk=4)
        return sampler, ScaleMixtureNetwork(_kernel(), width=8), (X, Y)


# ------------------------------------------------------------------------- gradient descent


def _descent(model, data, values, x, steps, lr):
    """f_t(x) = f_0(x) + k(x, X) K^-1 (1 - (1 - lr K / n)^t) (y - f_0(X)), each network's own k."""
    train, target = data
    phi, phi_new = model.features(values, train), model.features(values, x)
    gram, cross = phi @ phi.mT, phi_new @ phi.mT
    # The bias of the last layer moves too.
    b = model._std("last_b_std")
    gram, cross = gram + b**2, cross + b**2
    level, basis = torch.linalg.eigh(gram)
    left = (1 - (1 - lr * level / len(train)) ** steps) / level
    error = target[:, None] - model.network(values, train)
    move = basis @ (left[..., None] * (basis.mT @ error))
    return model.network(values, x) + cross @ move


@pytest.mark.parametrize("last_b_std", [0.0, 0.7])
def test_descent_of_the_last_layer_is_the_closed_form(last_b_std):
    model = ScaleMixtureNetwork(_kernel(2, "relu", last_b_std=last_b_std), width=16)
    sampler = WideEnsemble(members=7, steps=60, lr=0.4, optimizer="gd", chunk=25)
    post = pk.infer(model, (X, Y), sampler, rng=3)
    start = sampler.init(
        pk.sampler.Problem(model, model.prepare((X, Y))),
        rngs=[pk.rng.stream(3, "chain", 0)],
    )["values"]
    wanted = _descent(model, (X, Y), start, NEW, 60, 0.4)
    found = post.predict(NEW).values
    torch.testing.assert_close(found, wanted.squeeze(-1), rtol=1e-9, atol=1e-9)
    moved = {k for k in start if not torch.equal(start[k], post.draws[k][0])}
    assert moved == {"weight_2", "bias_2"} if last_b_std else {"weight_2"}
    assert torch.equal(start["scale_var"], post.draws["scale_var"][0])


def test_members_do_not_see_each_other():
    """The first of two members ends where it would end beside seven others."""
    model = ScaleMixtureNetwork(_kernel(), width=8)
    data = model.prepare((X, Y))
    start = model.initial_values(data, 7, rng=0)
    problem = pk.sampler.Problem(model, data)
    for optimizer in ("gd", "adam"):
        sampler = WideEnsemble(7, 30, optimizer=optimizer, train="all", lr=0.01, chunk=30)
        ends = []
        for n in (2, 7):
            state = {"values": {k: v[:n] for k, v in start.items()}, "optimizer": None, "taken": 0}
            ends.append(sampler.step(problem, state, rngs=None).state["values"])
        for name in start:
            torch.testing.assert_close(ends[0][name], ends[1][name][:2], rtol=1e-12, atol=1e-13)


def _limit(kernel, x):
    """Location and variance for sigma^2 = 1 of the noise-free process posterior."""
    gram, cross = kernel(X).to_dense().detach(), kernel(x, X).to_dense().detach()
    solve = torch.linalg.solve(gram, cross.mT).mT
    return solve @ Y, kernel(x, diag=True).detach() - (solve * cross).sum(-1)


def _trained(train, scale, members, width, *, steps=4000, lr=1.0, seed=0):
    model = ScaleMixtureNetwork(_kernel(), width, scale)
    sampler = WideEnsemble(members, steps, lr, "gd", train, chunk=1000)
    post = pk.infer(model, (X, Y), sampler, rng=seed)
    return post, post.predict(NEW).values


@pytest.mark.slow
def test_trained_members_follow_the_student_t_law():
    """Five points of a sine, last layers trained: df = 2 alpha, the law of the start, not updated.

    Descent to the end is the closed form, which is used here for the 4000 networks. The scale is
    checked for heavy tails: a normal law of the same variance is refused.
    """
    members, width = 4000, 2000
    model = ScaleMixtureNetwork(_kernel(), width, InverseGamma(2.0, 2.0))
    data = model.prepare((X, Y))
    ends = []
    for part in range(8):
        values = model.initial_values(data, members // 8, rng=part)
        ends.append(_descent(model, data, values, NEW, math.inf, 1e-9).squeeze(-1))
    f = torch.cat(ends)
    location, variance = _limit(_kernel(), NEW)
    z = (f - location) / variance.sqrt()  # scale^2 = beta / alpha = 1
    # Kolmogorov: 1.63 / sqrt(n) is exceeded in 1 % of cases, four columns.
    bound = 2.0 / members**0.5
    for column in z.T:
        assert scipy.stats.kstest(column.numpy(), scipy.stats.t(4).cdf).statistic < bound
        normal = scipy.stats.norm(0, float(column.std()))
        assert scipy.stats.kstest(column.numpy(), normal.cdf).statistic > bound
    # One sigma^2 for all rows: squares of different rows are dependent.
    ranks = torch.corrcoef(z.abs().argsort(0).argsort(0).double().T)
    assert float(ranks[0, 3]) > 0.1


@pytest.mark.slow
def test_descent_reaches_the_limit_of_the_closed_form():
    """With a point mass the ensemble is that of the Gaussian process."""
    post, f = _trained("last", PointMass(1.7), 300, 400)
    location, variance = _limit(_kernel(), NEW)
    sd = (1.7 * variance).sqrt()
    assert worst_z(f, location) < z_bound(4)
    # The sample variance of n normal values has a relative standard error of sqrt(2 / n).
    assert float(((f.var(0) / sd.square()) - 1).abs().max()) < z_bound(4) * (2 / 300) ** 0.5
    assert float(post.sample_stats["loss"].max()) < 1e-5


@pytest.mark.slow
def test_all_layers_trained_follow_the_tangent_kernel_of_their_scale():
    """Given sigma^2 the kernel is K + sigma^2 (NTK - K): the last layer's share does not scale."""
    kernel = _kernel()
    members, width = 8, 2000
    model = ScaleMixtureNetwork(kernel, width, InverseGamma(3.0, 2.0))
    data = model.prepare((X, Y))
    sampler = WideEnsemble(members, 2000, 0.5, "gd", "all", chunk=500)
    post = pk.infer(model, (X, Y), sampler, rng=0)
    problem = pk.sampler.Problem(model, data)
    start = sampler.init(problem, rngs=[pk.rng.stream(0, "chain", 0)])["values"]
    both = torch.cat([X, NEW])
    nngp, ntk = kernel(both).to_dense().detach(), kernel.ntk(both).detach()
    first, rest = {}, None
    for name, factor in (("scaled", start["scale_var"]), ("plain", torch.ones(members))):
        theta = nngp + factor.double()[:, None, None] * (ntk - nngp)
        error = Y[:, None] - model.network(start, X)
        move = theta[:, 5:, :5] @ torch.linalg.solve(theta[:, :5, :5], error)
        first[name] = (model.network(start, NEW) + move).squeeze(-1)
    rest = post.predict(NEW).values
    spread = float((rest - rest.mean(0)).square().mean().sqrt())
    gap = {name: float((rest - wanted).square().mean().sqrt()) for name, wanted in first.items()}
    # The limit is approached as 1 / sqrt(width).
    assert gap["scaled"] < 0.12 * spread
    assert gap["plain"] > 1.5 * gap["scaled"]


# ------------------------------------------------------------------------------------ the rest


def test_adam_fits_and_averages():
    model = ScaleMixtureNetwork(_kernel(), 256, noise_var=0.01)
    post = pk.infer(model, (X, Y), WideEnsemble(20, 1500, 0.1), rng=0)
    assert float(post.sample_stats["loss"].max()) < 1e-3
    latent, seen = post.predict(X, site="f"), post.predict(X)
    torch.testing.assert_close(latent.mean, Y, atol=0.05, rtol=0)
    torch.testing.assert_close(seen.mean, latent.mean)
    torch.testing.assert_close(seen.variance, latent.variance + 0.01)
    far = post.predict(NEW, site="f").variance
    assert float(far[-1]) > 10 * float(latent.variance.max())


def test_classes_are_told_apart_and_probabilities_averaged():
    labels = torch.tensor([0, 0, 1, 2, 2])
    model = ScaleMixtureNetwork(_kernel(), 128, loss="cross_entropy")
    post = pk.infer(model, (X, labels), WideEnsemble(10, 600, 0.1), rng=0)
    law = post.predict(X)
    assert torch.equal(law.probs.argmax(-1), labels)
    members = torch.softmax(post.predict(X, site="f").values, -1)
    torch.testing.assert_close(law.probs, members.mean(0))
    # Sum, not mean, over the classes.
    uniform = model.loss_of(torch.zeros(5, 3).double(), torch.eye(3).double()[labels])
    assert float(uniform) == pytest.approx(math.log(3))


def test_the_log_joint_can_be_sampled():
    """The density of sigma^2, weights and targets: the prior of sigma^2 tested by its draws."""
    model = ScaleMixtureNetwork(_kernel(), 3, noise_var=0.1)
    post = pk.infer(model, (X, Y), HMC(20, warmup=20), rng=0)
    assert post.predict(NEW).mean.shape == (4,)


def test_float32_stays_float32():
    post = pk.infer(
        ScaleMixtureNetwork(_kernel(), 8), (X.float(), Y.float()), WideEnsemble(3, 5), rng=0
    )
    assert post.draws["weight_0"].dtype == torch.float32
    assert post.predict(NEW).mean.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 0}, "width: expected a whole number >= 1, got 0"),
        ({"loss": "hinge"}, "loss: expected 'squared' or 'cross_entropy', got 'hinge'"),
        ({"noise_var": -1.0}, "noise_var: expected a finite number >= 0, got -1.0"),
        ({"classes": 1}, "classes: expected a whole number >= 2, got 1"),
        ({"scale": 3.0}, "a scale law must be a distribution"),
        ({"scale": InverseGamma(torch.ones(2), 1.0)}, "expected one law, got batch shape"),
    ],
)
def test_bad_options_are_named(options, text):
    with pytest.raises(DataError, match=text):
        ScaleMixtureNetwork(_kernel(), **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"members": 0}, "whole members, steps and chunk >= 1, got 0"),
        ({"lr": 0.0}, "expected 0 < lr < inf, got 0.0"),
        ({"optimizer": "sgd"}, "expected optimizer 'gd' or 'adam'"),
        ({"train": "first"}, "train 'last' or 'all', got 'adam', 'first'"),
    ],
)
def test_bad_sampler_options_are_named(options, text):
    with pytest.raises(DataError, match=text):
        WideEnsemble(**options)


def test_bad_input_is_named():
    model = ScaleMixtureNetwork(_kernel(), 4)
    with pytest.raises(DataError, match="kernel: expected an NNGPKernel with arch='mlp'"):
        ScaleMixtureNetwork(None)
    with pytest.raises(DataError, match="depth >= 1"):
        ScaleMixtureNetwork(NNGPKernel(depth=0))
    with pytest.raises(ShapeError, match="equally many rows"):
        pk.infer(model, (X, Y[:3]), rng=0)
    with pytest.raises(ShapeError, match=r"use X\[:, None\]"):
        pk.infer(model, (Y, Y), rng=0)
    with pytest.raises(DataError, match="at least one row"):
        pk.infer(model, (X[:0], Y[:0]), rng=0)
    with pytest.raises(DataError, match="no longer finite at step .*; lower lr=1000"):
        pk.infer(model, (X, Y), WideEnsemble(3, 400, 1000.0, "gd"), rng=0)
    labels = ScaleMixtureNetwork(_kernel(), 4, loss="cross_entropy")
    with pytest.raises(DataError, match="expected whole numbers, got"):
        pk.infer(labels, (X, Y), rng=0)
    post = pk.infer(model, (X, Y), WideEnsemble(3, 5), rng=0)
    with pytest.raises(ShapeError, match="expected 1 feature columns as in training, got 2"):
        post.predict(torch.zeros(3, 2))
    with pytest.raises(DataError, match="expected None .new observations. or 'f', got 'y'"):
        post.predict(X, site="y")
    with pytest.raises(CapabilityError, match="noise_var=0 leaves no density"):
        model.log_joint(model.initial_values((X, Y), 2, rng=0), (X, Y))

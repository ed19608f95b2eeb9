"""The evidence lower bound: against formulas written out, Monte Carlo, integrals and GPyTorch."""

from __future__ import annotations

import math

import gpytorch
import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import probkit as pk
from probkit.inference import SVI
from probkit.kernels import NNGPKernel
from probkit.model import Batch
from probkit.models import BurrXII, HalfCauchy, InverseGamma, LogNormal, PointMass
from probkit.models.nngp_classification import ScaleMixtureClassifier, SparseScaleGuide
from probkit.models.nngp_classification.bound import Whitened, gaussian_divergence
from probkit.models.nngp_classification.data import LabelledData
from probkit.models.nngp_classification.scales import (
    expected_precision,
    fitted_scale,
    scale_divergence,
    start_scale,
)
from probkit.rng import scope, stream
from probkit.testing import assert_mean
from probkit.tree import map_tensors

LAWS = [InverseGamma(3.0, 2.0), PointMass(1.3), LogNormal(0.1, 0.5), BurrXII(3.0, 2.0)]


def _kernel() -> NNGPKernel:
    return NNGPKernel(depth=2, w_std=1.4, b_std=0.5, last_w_std=1.0)


def _data(n=12, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % classes


def _moved(params, amount=0.2, seed=1):
    """Parameters away from the prior, where nothing cancels."""
    generator = stream(seed, "move")
    return map_tensors(
        lambda t: t + amount * torch.randn(t.shape, generator=generator, dtype=t.dtype), params
    )


def _ready(law, covariance="full", *, whiten=True, n=12, classes=3, inducing=5, learn=None):
    model = ScaleMixtureClassifier(
        _kernel(), law, inducing, covariance, whiten=whiten, jitter=1e-3, learn=learn
    )
    data = model.prepare(_data(n, classes))
    guide = model.guide()
    return model, guide, data, _moved(guide.init(model, data, rng=0))


def _moments(guide, params, factor):
    """mu [class, M] and S [class, M, M] in plain coordinates, for sigma^2 = 1."""
    law = guide._law(params, factor)
    root = torch.diag_embed(law.factor) if law.is_diagonal else law.factor
    full = factor @ root
    return law.mean @ factor.mT, full @ full.mT


# ------------------------------------------------------------------------------- divergences


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_divergence_is_the_formula_of_the_plain_coordinates(covariance, whiten):
    """1/2 [C ln|K| - sum ln|S_c| - M C + sum tr(K^-1 S_c) + (a/b) sum mu' K^-1 mu] + KL(IG, IG)."""
    model, guide, data, params = _ready(InverseGamma(2.0, 1.5), covariance, whiten=whiten)
    factor = guide._prior_factor(params, model, data)
    mean, cov = _moments(guide, params, factor)
    gram = factor @ factor.mT
    inverse = torch.linalg.inv(gram)
    q = fitted_scale(model.scale, params["scale"])
    a, b, alpha, beta = (float(v) for v in (q.concentration, q.rate, 2.0, 1.5))
    classes, count = mean.shape
    wanted = 0.5 * (
        classes * torch.logdet(gram)
        - torch.logdet(cov).sum()
        - classes * count
        + torch.einsum("ij,cji->", inverse, cov)
        + a / b * torch.einsum("ci,ij,cj->", mean, inverse, mean)
    )
    digamma = float(torch.digamma(q.concentration))
    wanted = wanted + (a - alpha) * digamma - math.lgamma(a) + math.lgamma(alpha)
    wanted = wanted + alpha * math.log(b / beta) + a * (beta - b) / b
    found = gaussian_divergence(guide._law(params, factor), expected_precision(q))
    found = found + scale_divergence(q, model.scale)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_divergence_of_inverse_gammas_is_the_known_number():
    value = scale_divergence(InverseGamma(3.0, 4.0), InverseGamma(2.0, 1.5))
    assert float(value) == pytest.approx(0.316295660562, abs=5e-13)


@pytest.mark.parametrize("law", [*LAWS, HalfCauchy(1.1)], ids=lambda law: type(law).__name__)
def test_scale_divergence_and_precision_are_means_over_draws(law):
    params = _moved(start_scale(law, torch.ones(1).double()))
    fitted = fitted_scale(law, params)
    if isinstance(law, PointMass):
        assert float(scale_divergence(fitted, law)) == 0.0
        assert float(expected_precision(fitted)) == pytest.approx(1 / 1.3)
        return
    with scope(rng=3):
        draws = fitted.sample(torch.Size([200_000]))
    terms = torch.stack([fitted.log_prob(draws) - law.log_prob(draws), 1 / draws], 1)
    wanted = torch.stack([scale_divergence(fitted, law), expected_precision(fitted)])
    assert_mean(terms - wanted, 0.0, "divergence and precision")


def test_normal_part_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    root = torch.tril(torch.randn(2, 3, 3, generator=generator, dtype=torch.float64))
    root = root + 4 * torch.eye(3)
    mean = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    variance = 1.75
    q = MultivariateNormal(mean, scale_tril=variance**0.5 * root)
    p = MultivariateNormal(torch.zeros(3).double(), variance * torch.eye(3).double())
    found = gaussian_divergence(Whitened(mean, root), torch.tensor(1 / variance).double())
    torch.testing.assert_close(found, kl_divergence(q, p).sum())


# --------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: type(law).__name__)
def test_bound_is_the_mean_of_log_joint_minus_log_q(law, covariance, whiten):
    """The generic estimate uses draws of u and f; the guide's own has the divergences exactly."""
    model, guide, data, params = _ready(law, covariance, whiten=whiten, learn=())
    n = 20_000
    with torch.no_grad():
        values, log_q = guide.sample(params, model, Batch(data), n, rng=1)
        generic = model.log_joint(values, data) - log_q.total()
        own = guide.elbo(params, model, Batch(data), n, rng=2)
    assert own.var() < generic.var()
    error = ((generic.var() + own.var()) / n).sqrt()
    assert abs(float(generic.mean() - own.mean())) < 4.5 * float(error)


def test_a_wrong_trace_term_would_be_seen(monkeypatch):
    """With the trace multiplied by E[1 / sigma^2], a common slip, the last test fails."""
    from probkit.models.nngp_classification import guide as module

    model, guide, data, params = _ready(InverseGamma(3.0, 2.0), learn=())
    right = module.gaussian_divergence

    def wrong(law, precision):
        return right(law, precision) + 0.5 * (precision - 1) * law.factor.square().sum()

    monkeypatch.setattr(module, "gaussian_divergence", wrong)
    n = 20_000
    with torch.no_grad():
        values, log_q = guide.sample(params, model, Batch(data), n, rng=1)
        generic = model.log_joint(values, data) - log_q.total()
        own = guide.elbo(params, model, Batch(data), n, rng=2)
    error = ((generic.var() + own.var()) / n).sqrt()
    assert abs(float(generic.mean() - own.mean())) > 5.5 * float(error)


def test_expected_likelihood_is_that_of_the_marginals():
    """All rows and classes of a draw share sigma^2, and only marginal variances are used."""
    model, guide, data, params = _ready(InverseGamma(3.0, 2.0), learn=())
    factor = guide._prior_factor(params, model, data)
    mean, cov = _moments(guide, params, factor)
    gram = model.kernel(data.inducing).to_dense().detach()
    cross = model.kernel(data.x, data.inducing).to_dense().detach()
    weights = cross @ torch.linalg.inv(factor @ factor.mT)  # A
    residual = model.kernel(data.x, diag=True).detach() - (weights * cross).sum(1)
    scores = guide.scores(params, model, data, data.x)
    torch.testing.assert_close(scores.mean, weights @ mean.mT)
    wanted = residual[:, None] + torch.einsum("ni,cij,nj->nc", weights, cov, weights)
    torch.testing.assert_close(scores.variance, wanted)
    assert gram.shape == (5, 5)


def test_minibatches_give_an_unbiased_bound():
    model, guide, data, params = _ready(InverseGamma(3.0, 2.0))
    n = 4000
    whole = guide.elbo(params, model, Batch(data), n, rng=0).detach()
    parts = []
    for start in range(0, 12, 4):  # unequal to the order of the classes: 0 1 2 0, 1 2 0 1, ...
        batch = model.minibatch(data, torch.arange(start, start + 4))
        assert batch.scale == 3.0
        parts.append(guide.elbo(params, model, batch, n, rng=stream(5, start)).detach())
    together = torch.stack(parts)
    error = ((together.var(1).sum() / 9 + whole.var()) / n).sqrt()
    assert abs(float(together.mean() - whole.mean())) < 4.5 * float(error)
    assert abs(float(together[0].mean() - whole.mean())) > 4.5 * float(error)


def test_classes_may_be_renamed():
    """The bound is the same after a permutation of classes in labels and parameters."""
    model, guide, data, params = _ready(InverseGamma(3.0, 2.0))
    order = torch.tensor([2, 0, 1])
    renamed = LabelledData(data.x, torch.argsort(order)[data.labels], data.inducing, 3)
    moved = {**params, **{k: params[k][order] for k in ("mean", "log_diagonal", "below")}}
    n = 20_000
    a = guide.elbo(params, model, Batch(data), n, rng=0).detach()
    b = guide.elbo(moved, model, Batch(renamed), n, rng=1).detach()
    assert abs(float(a.mean() - b.mean())) < 4.5 * float(((a.var() + b.var()) / n).sqrt())


def test_a_diagonal_covariance_is_a_full_one_without_the_rest():
    full, guide, data, params = _ready(InverseGamma(3.0, 2.0))
    params = {**params, "below": torch.zeros_like(params["below"])}
    diagonal = {k: v for k, v in params.items() if k != "below"}
    a = guide.elbo(params, full, Batch(data), 5, rng=0)
    b = SparseScaleGuide("diag").elbo(diagonal, full, Batch(data), 5, rng=0)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_it_starts_at_the_prior_as_far_as_the_family_holds_it(covariance, whiten):
    model, guide, data, _ = _ready(InverseGamma(2.0, 1.5), covariance, whiten=whiten)
    params = guide.init(model, data, rng=0)
    factor = guide._prior_factor(params, model, data)
    law = guide._law(params, factor)
    start = float(gaussian_divergence(law, torch.tensor(1.0).double()))
    if whiten or covariance == "full":
        assert start == pytest.approx(0.0, abs=1e-9)
        return
    narrower = {**params, "log_diagonal": params["log_diagonal"] - 0.05}
    wider = {**params, "log_diagonal": params["log_diagonal"] + 0.05}
    for other in (narrower, wider):
        there = gaussian_divergence(guide._law(other, factor), torch.tensor(1.0).double())
        assert float(there) > start > 0


# -------------------------------------------------------------------------- the true evidence


def _binary_evidence(gram, labels, law):
    """log p(labels) of two classes by quadrature: only g = f_1 - f_0 ~ N(0, 2 sigma^2 K) counts."""
    z, w = np.polynomial.hermite_e.hermegauss(40)
    z, w = torch.as_tensor(z), torch.as_tensor(w / w.sum())
    grid = torch.cartesian_prod(z, z, z)
    weight = torch.cartesian_prod(w, w, w).prod(1)
    root = torch.linalg.cholesky(2 * gram)
    levels = (torch.arange(400).double() + 0.5) / 400
    sign = 2.0 * labels - 1
    total = torch.zeros((), dtype=torch.float64)
    for variance in law.icdf(levels):
        g = variance.sqrt() * grid @ root.mT
        total = total + (weight * torch.sigmoid(sign * g).prod(1)).sum() / 400
    return float(total.log())


def test_bound_lies_closely_below_the_evidence():
    """Three rows as inducing inputs; the gap is KL(q || p), and the family nearly holds p."""
    law = InverseGamma(3.0, 2.0)
    x = torch.tensor([[-1.0, 0.3], [0.4, -0.8], [1.2, 0.9]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1])
    model = ScaleMixtureClassifier(_kernel(), law, inducing=3, jitter=1e-9, learn=())
    sampler = SVI(steps=250, lr=0.1, decay=0.02, particles=16, evidence_draws=50_000)
    post = pk.infer(model, (x, labels), sampler, rng=0)
    exact = _binary_evidence(_kernel()(x).to_dense().detach(), labels, law)
    bound = float(post.log_evidence.value)
    # log softmax has a standard deviation of about 1 per row: 50 000 draws give 0.01.
    assert exact - 0.15 < bound < exact + 0.03
    assert post.log_evidence.kind == "bound"


# ------------------------------------------------------------------------------------- a peer


class _PeerModel(gpytorch.models.ApproximateGP):
    """GPyTorch's sparse variational classifier, whitening off."""

    def __init__(self, kernel, inducing, classes):
        count = len(inducing)
        law = gpytorch.variational.CholeskyVariationalDistribution(
            count, batch_shape=torch.Size([classes])
        )
        strategy = gpytorch.variational.UnwhitenedVariationalStrategy(
            self, inducing, law, learn_inducing_locations=True, jitter_val=0.0
        )
        super().__init__(strategy)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("whiten", [True, False])
def test_a_point_mass_is_the_ordinary_sparse_classifier(whiten):
    """Marginals, divergence, and so the bound, equal those of GPyTorch."""
    kernel = gpytorch.kernels.RBFKernel().double()
    kernel.lengthscale = 0.7
    model = ScaleMixtureClassifier(kernel, PointMass(1.0), 5, whiten=whiten, jitter=1e-14)
    data = model.prepare(_data())
    guide = model.guide()
    params = _moved(guide.init(model, data, rng=0))
    params["inducing_inputs"] = data.inducing  # exact rows, as the peer is given them
    factor = guide._prior_factor(params, model, data)
    mean, cov = _moments(guide, params, factor)
    peer = _PeerModel(kernel, data.inducing.clone(), 3).double()
    law = peer.variational_strategy._variational_distribution
    law.variational_mean.data = mean.clone()
    law.chol_variational_covar.data = torch.linalg.cholesky(cov)
    peer.variational_strategy.variational_params_initialized.fill_(1)
    peer.train()
    with torch.no_grad(), gpytorch.settings.cholesky_jitter(double_value=1e-12):
        there = peer(data.x)
        divergence = peer.variational_strategy.kl_divergence().sum()
    scores = guide.scores(params, model, data, data.x)
    torch.testing.assert_close(scores.mean, there.mean.mT, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.variance, there.variance.mT, rtol=0, atol=1e-6)
    own = gaussian_divergence(guide._law(params, factor), torch.ones(()).double())
    torch.testing.assert_close(own, divergence, rtol=0, atol=1e-6)
    # The bound from the peer's numbers and the same noise.
    noise = torch.randn(50, 12, 3, generator=stream(9, "x"), dtype=torch.float64)
    f = there.mean.mT + there.variance.mT.sqrt() * noise
    f = f.gather(-1, data.labels.expand(50, 12)[..., None]).squeeze(-1) - f.logsumexp(-1)
    wanted = f.sum(-1) - divergence
    found = guide.elbo(params, model, Batch(data), 50, rng=stream(9, "x"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)

"""SparseRegression and KroneckerSBL through ``infer``."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import probkit as pk
from probkit import infer
from probkit.errors import (
    CapabilityError,
    ConvergenceWarning,
    DataError,
    NumericsWarning,
    ShapeError,
)
from probkit.files import pack, unpack
from probkit.fingerprint import digest
from probkit.inference import EM, Direct
from probkit.models import EvidenceMaximization, InverseGamma, KroneckerSBL, SparseRegression
from probkit.models.sbl import ComplexNormal
from probkit.models.sbl.e_step import dense_moments
from probkit.models.sbl.laws import WeightLaw
from probkit.models.sbl.mode_products import mode_products, outer
from probkit.models.sbl.simulators import simulate_kronecker
from probkit.models.sbl.support import support_mask, support_probability
from probkit.testing import ModelConformance, SamplerConformance, assert_mean
from probkit.testing.statistics import z_bound

REAL, COMPLEX = torch.float64, torch.complex128
LAW = InverseGamma(3.0, 2.0)


def plain(n: int = 30, p: int = 12, *, dtype: torch.dtype = REAL, seed: int = 0, snr: float = 20):
    """H [n, p], x with three non-zeros, y, s2."""
    g = torch.Generator().manual_seed(seed)
    H = torch.randn(n, p, generator=g, dtype=dtype)
    x = torch.zeros(p, dtype=dtype)
    x[[1, 4, 7]] = torch.tensor([2.0, -1.0, 1.5], dtype=dtype)
    s2 = float((H @ x).abs().square().mean()) / 10 ** (snr / 10)
    return H, x, H @ x + s2**0.5 * torch.randn(n, generator=g, dtype=dtype), s2


def small(n: int = 1, *, is_complex: bool = False, seed: int = 0):
    return simulate_kronecker(
        n, sizes=(6, 5), data_sizes=(5, 6), nonzeros=2, is_complex=is_complex, rng=seed
    )


def one(data: Any, k: int = 0, **options: Any) -> tuple[KroneckerSBL, Tensor]:
    """Problem ``k`` alone."""
    options = {"noise_var": float(data.noise_var[k]), **options}
    return KroneckerSBL([f[k] for f in data.factors], **options), data.y[k]


# ------------------------------------------------------------------------ conformance


class TestSparseRegression(ModelConformance):
    latents = ("f",)
    prior_draws = 30

    def problem(self) -> Any:
        H, _, y, _ = plain()
        model = SparseRegression(H, variance_law=LAW, noise_law=LAW)
        return model, y, H[:4] + 0.1


class TestKroneckerSBL(ModelConformance):
    latents = ("f",)
    prior_draws = 30

    def problem(self) -> Any:
        data = small()
        model, y = one(data, noise_var=None, variance_law=LAW, noise_law=LAW)
        return model, y, [f[0][:2] for f in data.factors]


class TestSharedSupport(ModelConformance):
    prior_draws = 30

    def problem(self) -> Any:
        H, _, y, s2 = plain()
        model = SparseRegression(H, noise_var=s2, shared_support=True, variance_law=LAW)
        return model, y[:, None], H[:3]


class TestEvidenceMaximization(SamplerConformance):
    def problem(self) -> Any:
        model, y = one(small())
        return EvidenceMaximization(max_iter=60, starts=2), model, y


# ------------------------------------------------------------------------ posterior


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(40, 15), (15, 40)])
@pytest.mark.parametrize("update", ["em", "mackay", "mm", "fast"])
def test_sparse_weights_are_recovered(
    update: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    H, x, y, s2 = plain(*shape, dtype=dtype, snr=30)
    post = infer(SparseRegression(H, noise_var=s2, update=update), y, rng=0)
    mean = post.analytic["weights"].mean
    assert float((mean - x).abs().square().sum() / x.abs().square().sum()) < 0.02
    assert bool(support_mask(post, threshold=0.3)[[1, 4, 7]].all())
    assert int(support_mask(post, threshold=0.3).sum()) == 3
    assert isinstance(post.analytic["weights"], ComplexNormal) == dtype.is_complex


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("update", ["hybrid", "am", "svd", "ksbl"])
def test_kronecker_weights_are_recovered(update: str, is_complex: bool) -> None:
    data = simulate_kronecker(
        2, sizes=(8, 9), data_sizes=(7, 8), nonzeros=2, is_complex=is_complex, snr_db=30, rng=3
    )
    model = KroneckerSBL(data.factors, noise_var=data.noise_var, update=update)
    fit = EvidenceMaximization(max_iter=1000)
    mean = infer(model, data.y, fit, rng=0).analytic["weights"].mean
    error = (mean - data.weights).abs().square().sum((1, 2))
    assert float((error / data.weights.abs().square().sum((1, 2))).max()) < 0.02


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_draws_follow_the_exact_posterior(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Mean and full covariance of draws against the dense formulas, plain and factored."""
    g = torch.Generator().manual_seed(5)
    n = 1500
    factors = [
        torch.randn(3, 2, generator=g, dtype=dtype),
        torch.randn(2, 3, generator=g, dtype=dtype),
    ]
    H = torch.randn(*shape, generator=g, dtype=dtype)
    for model, names in (
        (SparseRegression(H, noise_var=0.5), ["weight_var"]),
        (KroneckerSBL(factors, noise_var=0.5), ["weight_var_1", "weight_var_2"]),
    ):
        hyper = {
            name: torch.rand(size, generator=g, dtype=REAL)
            for name, size in zip(names, model.sizes, strict=True)
        }
        y = torch.randn(model.data_sizes, generator=g, dtype=dtype)
        post = infer(model, y, Direct(hyper=hyper), rng=0)
        draws = post.sample(n, rng=1)["weights"].flatten(1)
        full = functools.reduce(torch.kron, model.dictionaries)
        prior = outer(list(hyper.values())).flatten()
        covariance = torch.linalg.inv(full.mH @ full / 0.5 + torch.diag(1 / prior))
        mean = covariance @ full.mH @ y.flatten() / 0.5
        torch.testing.assert_close(post.analytic["weights"].mean.flatten(), mean)
        centred = draws - mean
        products = (centred[:, :, None] * centred.conj()[:, None, :] - covariance).flatten(1)
        parts = [centred, products]
        if dtype.is_complex:  # circular: E[x x^T] = 0
            parts.append((centred[:, :, None] * centred[:, None, :]).flatten(1))
        terms = torch.cat(parts, 1)
        terms = torch.cat([terms.real, terms.imag], 1) if dtype.is_complex else terms
        spread = terms.std(0) > 1e-12
        assert_mean(terms[:, spread], 0.0, f"draws of {type(model).__name__}")


def test_marginals_and_evidence_are_those_of_the_fit() -> None:
    H, _, y, _ = plain()
    post = infer(SparseRegression(H), y, rng=0)
    variance, noise = post.draws["weight_var"][0, 0], post.draws["noise_var"][0, 0]
    exact = dense_moments(H, variance, noise, y[None])
    torch.testing.assert_close(post.analytic["weights"].mean, exact.mean[0])
    torch.testing.assert_close(post.analytic["weights"].variance, exact.variance)
    torch.testing.assert_close(post.log_evidence.value, exact.log_evidence[None])
    torch.testing.assert_close(post.sample_stats["log_evidence"], exact.log_evidence[None])
    assert post.log_evidence.kind == "exact"
    assert post.is_point_estimate
    assert post.attrs["evidence_trace"][-1] <= float(post.log_evidence.value) + 1e-3
    assert len(post.summary()) == 12 + 12 + 1


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_predictions_are_the_dense_formula(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(6)
    data = small(is_complex=dtype.is_complex)
    model, y = one(data)
    post = infer(model, y, rng=0)
    law = post.source.joint["weights"]
    full = functools.reduce(torch.kron, model.dictionaries)
    prior = outer(law.variances).flatten()
    C = full @ (prior[:, None] * full.mH) + float(model.noise_var) * torch.eye(30, dtype=dtype)
    covariance = torch.diag(prior).to(dtype) - (prior[:, None] * full.mH) @ torch.linalg.solve(
        C, full * prior
    )
    new = [torch.randn(2, 6, generator=g, dtype=dtype), torch.randn(3, 5, generator=g, dtype=dtype)]
    rows = torch.kron(*new)
    mean = rows @ post.analytic["weights"].mean.flatten()
    variance = ((rows @ covariance) * rows.conj()).sum(1).real
    for x, shape in ((new, (2, 3)), (rows, (6,))):
        latent = post.predict(x, site="f")
        torch.testing.assert_close(latent.mean, mean.reshape(shape))
        torch.testing.assert_close(latent.variance, variance.reshape(shape), rtol=1e-6, atol=1e-9)
        noisy = post.predict(x)
        torch.testing.assert_close(
            noisy.variance - latent.variance, torch.full(shape, float(model.noise_var), dtype=REAL)
        )
    if dtype == REAL:
        joint = post.predict(rows, joint=True).dist
        expected = rows @ covariance @ rows.T + float(model.noise_var) * torch.eye(6, dtype=REAL)
        torch.testing.assert_close(joint.covariance_matrix, expected, rtol=1e-6, atol=1e-9)


def test_support_probabilities() -> None:
    """By draws of the posterior, real and complex."""
    for dtype in (REAL, COMPLEX):
        H, _, y, s2 = plain(8, 8, dtype=dtype, snr=0)
        hyper = {"weight_var": torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0], dtype=REAL)}
        post = infer(SparseRegression(H[:, :6], noise_var=s2), y, Direct(hyper=hyper), rng=0)
        found = support_probability(post, 0.4)
        draws = post.sample(4000, rng=2)["weights"]
        share = (draws.abs() > 0.4).double().mean(0)
        error = (found * (1 - found) / 4000).sqrt()
        assert float(((found - share).abs() - z_bound(6) * error).max()) <= 1e-9
        assert float(found[2]) == 0.0


# ------------------------------------------------------------------------ batches, snapshots


@pytest.mark.parametrize("update", ["hybrid", "am", "svd"])
def test_a_batch_is_each_problem(update: str) -> None:
    data = small(3)
    model = KroneckerSBL(data.factors, noise_var=data.noise_var, update=update)
    together = infer(model, data.y, rng=0)
    for k in range(3):
        alone = infer(*one(data, k, update=update), rng=0)
        torch.testing.assert_close(
            together.analytic["weights"].mean[k],
            alone.analytic["weights"].mean,
            rtol=1e-6,
            atol=1e-8,
        )
        assert together.sample_stats["iterations"][0, k] == alone.sample_stats["iterations"][0]


@pytest.mark.parametrize("update", ["em", "mackay", "mm", "fast"])
def test_a_plain_batch_is_each_problem(update: str) -> None:
    H, _, y, s2 = plain()
    batch = torch.stack([y, y.flip(0), y + 0.1])
    together = infer(SparseRegression(H, noise_var=s2, update=update), batch, rng=0)
    grid = infer(SparseRegression(H, noise_var=s2, update=update), batch[None], rng=0)
    assert grid.analytic["weights"].mean.shape == (1, 3, 12)
    for k in range(3):
        alone = infer(SparseRegression(H, noise_var=s2, update=update), batch[k], rng=0)
        for found in (together.analytic["weights"].mean[k], grid.analytic["weights"].mean[0, k]):
            torch.testing.assert_close(found, alone.analytic["weights"].mean, rtol=1e-6, atol=1e-8)


def test_snapshots_share_the_support() -> None:
    """Ten weak snapshots find what one of them cannot; the posterior of each is exact."""
    g = torch.Generator().manual_seed(8)
    H = torch.randn(20, 40, generator=g, dtype=REAL)
    x = torch.zeros(40, 10, dtype=REAL)
    x[[3, 17, 30]] = torch.randn(3, 10, generator=g, dtype=REAL)
    y = H @ x + torch.randn(20, 10, generator=g, dtype=REAL)
    post = infer(SparseRegression(H, noise_var=1.0, shared_support=True), y, rng=0)
    assert post.analytic["weights"].mean.shape == (40, 10)
    used = (post.draws["weight_var"][0, 0] > 0.2).nonzero().flatten().tolist()
    assert used == [3, 17, 30]
    exact = dense_moments(H, post.draws["weight_var"][0, 0], torch.tensor(1.0, dtype=REAL), y.T)
    torch.testing.assert_close(post.analytic["weights"].mean, exact.mean.T)
    assert post.sample(3, rng=0)["weights"].shape == (3, 40, 10)
    assert post.predict(H[:2]).mean.shape == (2, 10)
    factors = [
        torch.randn(4, 5, generator=g, dtype=REAL),
        torch.randn(5, 4, generator=g, dtype=REAL),
    ]
    w = torch.zeros(5, 4, 3, dtype=REAL)
    w[1, 2] = 2.0
    field = mode_products(w.movedim(-1, 0), [f[None] for f in factors]).movedim(0, -1)
    post = infer(KroneckerSBL(factors, noise_var=1e-3, shared_support=True), field, rng=0)
    assert post.analytic["weights"].mean.shape == (5, 4, 3)
    assert post.predict(factors).mean.shape == (4, 5, 3)


def test_data_in_either_form() -> None:
    model, y = one(small())
    flat, shaped = infer(model, y.flatten(), rng=0), infer(model, y, rng=0)
    assert digest(flat.source) == digest(shaped.source)


# ------------------------------------------------------------------------ invariances


def test_permuted_modes_and_unit_modes() -> None:
    data = small()
    model, y = one(data, update="am")
    base = infer(model, y, rng=0).analytic["weights"].mean
    turned = KroneckerSBL(model.factors[::-1], noise_var=model.noise_var, update="am")
    # The order of the cycle differs, and so does the path, by less than the tolerance allows.
    fit = EvidenceMaximization(max_iter=2000, tolerance=1e-8)
    found = infer(turned, y.mT, fit, rng=0).analytic["weights"].mean.mT
    base = infer(model, y, fit, rng=0).analytic["weights"].mean
    torch.testing.assert_close(found, base, rtol=1e-3, atol=1e-4)
    more = [model.factors[0], torch.ones(1, 1), model.factors[1]]
    unit = KroneckerSBL(more, noise_var=model.noise_var, update="am")
    found = infer(unit, y[:, None], fit, rng=0).analytic["weights"].mean[:, 0]
    torch.testing.assert_close(found, base, rtol=1e-4, atol=1e-6)


def test_scaled_data() -> None:
    """Start and thresholds are relative, but g = 1 is not: the fits meet at the optimum."""
    H, _, y, s2 = plain()
    fit = EvidenceMaximization(max_iter=2000, tolerance=1e-8)
    base = infer(SparseRegression(H, noise_var=s2, update="mm"), y, fit, rng=0)
    scaled = infer(SparseRegression(H, noise_var=100 * s2, update="mm"), 10 * y, fit, rng=0)
    torch.testing.assert_close(
        scaled.analytic["weights"].mean, 10 * base.analytic["weights"].mean, rtol=1e-3, atol=1e-3
    )


# ------------------------------------------------------------------------ noise


def test_learned_noise() -> None:
    H, _, y, s2 = plain(200, 20, snr=10)
    for update in ("em", "mackay", "mm", "fast"):
        post = infer(SparseRegression(H, update=update), y, rng=0)
        # The standard error of a variance from 197 residuals is 10 %.
        assert float(post.draws["noise_var"]) == pytest.approx(s2, rel=0.4)


def test_noise_collapse_is_noticed_and_floored() -> None:
    g = torch.Generator().manual_seed(9)
    H, y = torch.randn(20, 80, generator=g, dtype=REAL), torch.randn(20, generator=g, dtype=REAL)
    fit = EvidenceMaximization(max_iter=400, prune=None)
    with pytest.warns() as caught:
        post = infer(SparseRegression(H, update="mackay", noise_floor=1e-3), y, fit, rng=0)
    texts = [str(w.message) for w in caught if w.category is NumericsWarning]
    assert any("noise variance collapsed in 1 of 1 problems" in text for text in texts)
    assert float(post.draws["noise_var"]) >= 1e-3 * float(y.square().mean())


# ------------------------------------------------------------------------ other samplers


@pytest.mark.slow
def test_full_posterior_of_the_variances() -> None:
    """NUTS over (variance, noise) of a tiny problem against quadrature."""
    from probkit.inference import NUTS

    h = torch.tensor([[1.0], [0.5], [-1.0]], dtype=REAL)
    y = torch.tensor([1.2, 0.3, -0.8], dtype=REAL)
    model = SparseRegression(h, variance_law=LAW, noise_law=LAW)
    post = infer(model, y, Direct(hyper=NUTS(warmup=200, draws=400)), chains=4, rng=0)
    u = torch.linspace(-6, 5, 400, dtype=REAL)
    a, b = torch.meshgrid(u.exp(), u.exp(), indexing="ij")
    hyper = {"weight_var": a[..., None], "noise_var": b}
    log_p = model.log_evidence(hyper, y) + model.log_hyperprior(hyper) + a.log() + b.log()
    weight = torch.softmax(log_p.flatten(), 0).reshape(a.shape)
    for value, found in ((a.log(), "weight_var"), (b.log(), "noise_var")):
        exact = (weight * value).sum()
        sd = (weight * (value - exact).square()).sum().sqrt()
        draws = post.draws[found].log().reshape(4, -1)
        error = sd * (5 / draws.numel()) ** 0.5  # an autocorrelation time of 5 at most
        assert abs(float(draws.mean() - exact)) <= z_bound(2) * float(error)
    moments = dense_moments(h.expand(400, 400, 3, 1), a[..., None], b, y.expand(400, 400, 1, 3))
    exact = (weight * moments.mean[..., 0, 0]).sum()
    law = post.source.joint["weights"]
    assert isinstance(law, WeightLaw) and law.batch_shape == (4, 400)
    assert float(law.mean.mean()) == pytest.approx(float(exact), abs=0.03)
    drawn = post.sample(500, rng=1)["weights"]
    spread = float(drawn.std()) / 500**0.5
    assert float(drawn.mean()) == pytest.approx(float(exact), abs=z_bound() * spread + 0.03)
    prediction = post.predict(h)
    assert prediction.mean.shape == (3,)
    assert support_probability(post, 0.5).shape == (1,)


def test_kronecker_evidence_is_differentiable() -> None:
    """Where a factor has more rows than columns, C has equal eigenvalues."""
    g = torch.Generator().manual_seed(10)
    factors = [
        torch.randn(5, 2, generator=g, dtype=REAL),
        torch.randn(3, 4, generator=g, dtype=REAL),
    ]
    model = KroneckerSBL(factors)
    y = model.prepare(torch.randn(5, 3, generator=g, dtype=REAL))
    hyper = [
        torch.rand(2, generator=g, dtype=REAL) + 0.1,
        torch.rand(4, generator=g, dtype=REAL) + 0.1,
        torch.tensor(0.3, dtype=REAL),
    ]

    def evidence(*values: Tensor) -> Tensor:
        names = ("weight_var_1", "weight_var_2", "noise_var")
        return model.log_evidence(dict(zip(names, values, strict=True)), y)

    leaves = [value.requires_grad_() for value in hyper]
    assert torch.autograd.gradcheck(evidence, leaves)
    dense = dense_moments(
        torch.kron(*factors), outer(hyper[:2]).flatten(), hyper[2], y.flatten()[None]
    )
    torch.testing.assert_close(evidence(*hyper), dense.log_evidence)


def test_condition_needs_variances() -> None:
    model, y = one(small())
    with pytest.raises(CapabilityError, match="holds no prior variances"):
        infer(model, y, Direct(), rng=0)
    with pytest.raises(CapabilityError, match="Samplers that fit"):
        infer(model, y, EM(), rng=0)


def test_several_starts_and_chains() -> None:
    model, y = one(small(seed=4))
    best = infer(model, y, EvidenceMaximization(starts=4), rng=0)
    single = infer(model, y, EvidenceMaximization(starts=1), rng=0)
    assert float(best.log_evidence.value) >= float(single.log_evidence.value) - 1e-9
    chains = infer(model, y, EvidenceMaximization(max_iter=300), rng=0, chains=3)
    assert chains.log_evidence.value.shape == (3,)
    assert chains.draws["weight_var_1"].shape == (3, 1, 6)
    assert chains.predict(list(model.factors)).mean.shape == (5, 6)
    assert chains.sample(4, rng=0)["weights"].shape == (4, 6, 5)


# ------------------------------------------------------------------------ files


def test_complex_summary_and_export() -> None:
    """Rows for real and imaginary part, each with half the variance."""
    model, y = one(small(is_complex=True))
    post = infer(model, y, rng=0)
    table = post.summary()
    law = post.analytic["weights"]
    assert float(table.loc["weights.real[1, 2]", "mean"]) == float(law.mean[1, 2].real)
    assert float(table.loc["weights.imag[1, 2]", "mean"]) == float(law.mean[1, 2].imag)
    half = float((law.variance[1, 2] / 2).sqrt())
    assert float(table.loc["weights.imag[1, 2]", "sd"]) == pytest.approx(half)
    tree = post.to_datatree(draws=5, rng=0)
    assert {"weights_real", "weights_imag", "weight_var_1"} <= set(tree.posterior.data_vars)


@pytest.mark.parametrize("is_complex", [False, True])
def test_models_and_posteriors_are_stored(is_complex: bool, tmp_path) -> None:
    model, y = one(small(is_complex=is_complex), coupling=[0.5, 0.0])
    assert digest(unpack(*pack(model))) == digest(model)
    post = infer(model, y, rng=0)
    post.save(tmp_path)
    back = pk.load(tmp_path)
    assert digest(back.source) == digest(post.source)
    torch.testing.assert_close(back.sample(2, rng=3)["weights"], post.sample(2, rng=3)["weights"])


# ------------------------------------------------------------------------ bad input


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=REAL)


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=REAL)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: SparseRegression(_zeros(3)), ShapeError, "H: expected a matrix"),
        (lambda: SparseRegression(_zeros(0, 3)), ShapeError, "H: expected a matrix"),
        (
            lambda: SparseRegression(_eye(2) * torch.nan),
            DataError,
            "H must be finite, got nan at row 0",
        ),
        (lambda: SparseRegression(_eye(2), noise_var=0.0), DataError, "noise_var: expected finite"),
        (
            lambda: SparseRegression(_eye(2), noise_var=-1.0),
            DataError,
            "noise_var: expected finite",
        ),
        (lambda: SparseRegression(_eye(2), update="svd"), DataError, "update: expected one of em"),
        (
            lambda: SparseRegression(_eye(2), noise_floor=0),
            DataError,
            "noise_floor: expected a share",
        ),
        (lambda: SparseRegression(_eye(2).half()), DataError, "H: expected float64 or float32"),
        (lambda: SparseRegression(_eye(2), shared_support=2), DataError, "shared_support True or"),
        (lambda: KroneckerSBL([]), DataError, "factors: expected a list"),
        (lambda: KroneckerSBL(_eye(2)), DataError, "factors: expected a list"),
        (lambda: KroneckerSBL([_eye(2), _zeros(2)]), ShapeError, "factors[1]: expected a matrix"),
        (lambda: KroneckerSBL([_eye(2)], update="em"), DataError, "update: expected one of hybrid"),
        (lambda: KroneckerSBL([_eye(2)] * 2, coupling=[0.5, -0.1]), DataError, "beta >= 0"),
        (lambda: KroneckerSBL([_eye(2)] * 2, coupling=[0.5]), DataError, "each of 2 modes"),
        (
            lambda: KroneckerSBL([_eye(2)] * 2, coupling=[1, 1], update="svd"),
            DataError,
            "coupling: expected update 'hybrid' or 'am'",
        ),
        (lambda: EvidenceMaximization(max_iter=0), DataError, "max_iter and starts >= 1"),
        (lambda: EvidenceMaximization(tolerance=0), DataError, "0 < tolerance"),
        (lambda: EvidenceMaximization(prune=1.5), DataError, "prune 'auto', None or in"),
        (lambda: EvidenceMaximization(prune_after=-1), DataError, "prune_after >= 0"),
    ],
)
def test_bad_options(make, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("y", "error", "text"),
    [
        (torch.ones(5), ShapeError, "y: expected [*problem, M] with M = 2 x 3 = 6"),
        (torch.ones(3, 2), ShapeError, "y: expected [*problem, M] with M = 2 x 3 = 6"),
        (torch.full((2, 3), torch.nan), DataError, "y must be finite, got nan at measurement_1 0"),
        (torch.zeros(2, 3), DataError, "y: all zero"),
        (torch.ones(0, 2, 3), DataError, "at least one value"),
        (torch.ones(2, 3).half(), DataError, "y: expected float64 or float32"),
        ((torch.ones(2, 3), torch.ones(2, 2)), ShapeError, "observed: expected the shape of y"),
        ((torch.ones(2, 3), 2 * torch.ones(2, 3)), DataError, "observed: expected True where"),
        ((torch.ones(2, 3),), DataError, "a pair (y, observed)"),
    ],
)
def test_bad_data(y: Any, error: type[Exception], text: str) -> None:
    model = KroneckerSBL([torch.ones(2, 4), torch.eye(3)], noise_var=0.1)
    with pytest.raises(error, match=re.escape(text)):
        infer(model, y, rng=0)


def test_bad_predictions_and_noise() -> None:
    model, y = one(small())
    post = infer(model, y, rng=0)
    with pytest.raises(ShapeError, match=re.escape("x: expected [row, 30] or factors with (6, 5)")):
        post.predict(torch.ones(2, 7))
    with pytest.raises(DataError, match="site: expected None"):
        post.predict(torch.ones(2, 30), site="g")
    with pytest.raises(CapabilityError, match="no plates"):
        post.predict(torch.ones(2, 30), groups={"a": [1]})
    with pytest.raises(CapabilityError, match="joint=True takes one matrix"):
        post.predict([torch.ones(2, 6), torch.ones(2, 5)], joint=True)
    with pytest.raises(CapabilityError, match="gives draws and marginals, no density"):
        post.source.joint["weights"].log_prob(post.analytic["weights"].mean)
    per_problem = KroneckerSBL(model.factors, noise_var=torch.ones(3))
    with pytest.raises(ShapeError, match="noise_var: expected a number or one for each problem"):
        infer(per_problem, torch.stack([y, y]), rng=0)
    with pytest.raises(CapabilityError, match="takes no mask"):
        infer(SparseRegression(torch.eye(2)), (torch.ones(2), torch.ones(2)), rng=0)
    with pytest.raises(CapabilityError, match="takes one problem"):
        model.log_evidence({}, torch.stack([y, y]))
    with pytest.raises(DataError, match="threshold: expected a finite number"):
        support_probability(post, -1.0)
    with pytest.raises(DataError, match="probability: expected"):
        support_mask(post, probability=0.0)


def test_zero_columns_warn_and_stay_zero() -> None:
    H, _, y, s2 = plain()
    H = H.clone()
    H[:, 3] = 0
    with pytest.warns(NumericsWarning, match="H: column 3 is zero"):
        model = SparseRegression(H, noise_var=s2)
    post = infer(model, y, rng=0)
    assert float(post.draws["weight_var"][0, 0, 3]) == 0.0
    assert bool(torch.isfinite(post.analytic["weights"].mean).all())


def test_everything_pruned_gives_zero_and_a_warning() -> None:
    y = torch.tensor([0.1, -0.2, 0.1], dtype=REAL)
    with pytest.warns(ConvergenceWarning, match="every weight was pruned in 1 of 1 problems"):
        post = infer(SparseRegression(_eye(3), noise_var=10.0, update="fast"), y, rng=0)
    assert post.analytic["weights"].mean.tolist() == [0, 0, 0]
    assert post.sample(2, rng=0)["weights"].abs().sum() == 0
    assert bool((support_probability(post) == 0).all())


def test_no_iterations_left_is_reported() -> None:
    H, _, y, s2 = plain()
    with pytest.warns(ConvergenceWarning, match="1 of 1 problems did not converge in max_iter=2"):
        infer(SparseRegression(H, noise_var=s2), y, EvidenceMaximization(max_iter=2), rng=0)

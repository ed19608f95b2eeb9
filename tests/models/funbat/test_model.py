"""The model as users see it: predictions, factors, updates, options, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import MessagePassing
from probkit.kernels import Matern, Periodic
from probkit.models.funbat import FunBaT, HyperPrior, LogWarp, StudentTNoise, TensorData, additive
from probkit.models.funbat.masks import interactions, masked_terms
from probkit.predictive import Analytic, Mixture

F64 = torch.float64


def f(x: Tensor) -> Tensor:
    """A function of rank 2 on [0, 1]^3."""
    first = (2 * math.pi * x[:, 0]).sin() * (math.pi * x[:, 1]).cos() * (1 + x[:, 2])
    third = (3 * math.pi * x[:, 1]).sin() * (2 * math.pi * x[:, 2]).cos()
    return first + (x[:, 0] - 0.5) * third


def published_test() -> tuple[Tensor, Tensor]:
    """1500 uniform points and noisy values of ``f``."""
    g = np.random.default_rng(0)
    x = torch.from_numpy(g.random((1500, 3)))
    return x, f(x) + 0.1 * torch.from_numpy(g.standard_normal(1500))


def gridded(n: int = 400, steps: int = 20, seed: int = 0) -> TensorData:
    """Entries on a coarse grid, several at most coordinates."""
    g = torch.Generator().manual_seed(seed)
    x = torch.stack([torch.randint(k, (n,), generator=g) / (k - 1) for k in (6, 5, steps)], 1)
    x = x.double()
    return TensorData(x, f(x) + 0.1 * torch.randn(n, generator=g, dtype=F64))


CP = FunBaT(2, kind="cp", kernels=Matern(1.5, 0.3), standardise="scale")
QUICK = MessagePassing(sweeps=25, tolerance=0.0)


def fitted(model: FunBaT = CP, data: TensorData | None = None, **options: Any) -> pk.Posterior:
    """A short fit."""
    return pk.infer(model, data or gridded(), QUICK, rng=0, **options)


# --------------------------------------------------------------------------- quality


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cp", "tucker"])
def test_a_function_of_rank_two_is_found(kind: str) -> None:
    x, y = published_test()
    model = FunBaT(
        2, kind=kind, kernels=Matern(1.5, 0.3), learn_hyperparameters=False, standardise=False
    )
    sampler = MessagePassing(sweeps=30, tolerance=0.0, block=5)
    post = pk.infer(model, TensorData(x[:1000], y[:1000]), sampler, rng=0, chains=5)
    index, truth, seen = x[1000:], f(x[1000:]), y[1000:]
    good = 0
    for chain in range(5):
        alone = pk.Posterior(
            type(post.source)(post.source.guide, [post.source.params[chain]]), model, post.context
        )
        latent, new = alone.predict(index, site="f"), alone.predict(index)
        rmse = float((latent.mean - truth).square().mean().sqrt())
        low, high = new.quantile([0.05, 0.95])
        coverage = float(((seen > low) & (seen < high)).double().mean())
        noise = float((new.variance - latent.variance).mean().sqrt())
        # 500 entries: one standard error of the coverage is .013
        good += rmse <= 0.045 and 0.86 <= coverage <= 0.94 and 0.09 <= noise <= 0.11
    assert good >= 4


def test_learning_finds_smoother_factors() -> None:
    """On data of rank 2 the bound rises well above that of the length scale given."""
    data = gridded()
    poor = Matern(1.5, 0.05)
    options: dict[str, Any] = {"kind": "cp", "kernels": poor, "standardise": "scale"}
    fixed = fitted(FunBaT(2, **options, learn_hyperparameters=False), data)
    learned = fitted(FunBaT(2, **options, learn_from=8), data)
    assert fixed.log_evidence is not None and learned.log_evidence is not None
    assert float(learned.log_evidence.value) > float(fixed.log_evidence.value) + 20
    scales = FunBaT(2, **options).hyperparameters(learned)
    assert max(float(s["lengthscale"].max()) for s in scales) > 0.12


def test_variances_return_to_the_prior_far_outside() -> None:
    post = fitted(FunBaT(2, kind="cp", kernels=Matern(1.5, 0.3), learn_hyperparameters=False))
    model = post.model
    found = model.factor(post, 1, torch.tensor([-9.0, 0.2, 0.21, 10.0]))
    assert bool((found.variance > 0).all())
    ends = torch.tensor([0, 3])
    torch.testing.assert_close(
        found.mean[:, ends], torch.zeros(1, 2, 2, dtype=F64), atol=1e-8, rtol=0
    )
    torch.testing.assert_close(
        found.variance[:, ends], torch.ones(1, 2, 2, dtype=F64), atol=1e-8, rtol=0
    )
    everywhere = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * 3 - 1
    assert bool((post.predict(everywhere, site="f").variance > 0).all())


# --------------------------------------------------------------------------- results


@pytest.mark.parametrize("nu", [1.5, 2.5])
def test_derivatives_of_factors_are_those_of_differences(nu: float) -> None:
    data = gridded()
    stretched = TensorData(data.index * torch.tensor([2.0, 1.0, 50.0]).double(), data.y)
    model = FunBaT((2, 1, 2), kernels=Matern(nu, 0.3))
    post = fitted(model, stretched)
    width = 1e-4
    grid = torch.linspace(3.03, 47.01, 7, dtype=F64)
    around = torch.stack((grid - width, grid, grid + width), 1).flatten()
    found = model.factor(post, 2, around)
    assert found.derivative is not None and found.derivative_variance is not None
    mean = found.mean[0].reshape(7, 3, 2)
    slope = (mean[:, 2] - mean[:, 0]) / (2 * width)
    torch.testing.assert_close(found.derivative[0, 1::3], slope, rtol=1e-4, atol=1e-6)
    assert bool((found.derivative_variance > 0).all())
    assert model.core(post).mean.shape == (1, 2, 1, 2)


def test_rough_factors_have_no_derivative_and_cp_no_core() -> None:
    model = FunBaT(1, kind="cp", kernels=Matern(0.5, 0.3))
    post = fitted(model)
    assert model.factor(post, "mode_2").derivative is None
    with pytest.raises(CapabilityError, match="CP has no core; use kind='tucker'"):
        model.core(post)
    with pytest.raises(DataError, match=r"expected a mode 0..2 or one of mode_1, mode_2, mode_3"):
        model.factor(post, "time")


def test_chains_are_averaged() -> None:
    post = fitted(chains=3)
    assert post.log_evidence is not None and post.log_evidence.kind == "bound"
    assert post.log_evidence.value.shape == (3,)
    x = torch.tensor([[0.2, 0.4, 0.1], [0.7, 0.1, 1.3]])
    both = post.predict(x)
    assert isinstance(both, Mixture)
    each = []
    for params in post.source.params:
        one = pk.Posterior(type(post.source)(post.source.guide, [params]), CP, post.context)
        prediction = one.predict(x)
        assert isinstance(prediction, Analytic)
        each.append(prediction)
    torch.testing.assert_close(both.mean, torch.stack([p.mean for p in each]).mean(0))
    density = torch.stack([p.log_prob(both.mean) for p in each])
    torch.testing.assert_close(both.log_prob(both.mean), density.logsumexp(0) - math.log(3))


def test_frames_give_names_and_labels() -> None:
    data = gridded(60)
    frame = pd.DataFrame(data.index.numpy(), columns=["lat", "lon", "day"])
    frame.index = [f"row {i}" for i in range(60)]
    named = TensorData(frame, pd.Series(data.y.numpy()))
    assert named.names == ("lat", "lon", "day")
    assert named.labels is not None and named.labels[3] == "row 3"
    post = fitted(CP, named)
    turned = frame[["day", "lat", "lon"]].iloc[:4]
    torch.testing.assert_close(post.predict(turned).mean, post.predict(data.index[:4]).mean)
    assert CP.factor(post, "day", [0.5]).mean.shape == (1, 1, 2)


def test_a_pair_counts_as_data() -> None:
    data = gridded(60)
    pair = pk.infer(CP, (data.index.numpy(), data.y.numpy()), QUICK, rng=0)
    torch.testing.assert_close(pair.predict(data).mean, fitted(CP, data).predict(data).mean)


def test_units_do_not_matter() -> None:
    """Stretched coordinates and another unit of y give the same fit in these units."""
    data = gridded(200)
    moved = TensorData(10 + 7 * data.index, -3 + 4 * data.y)
    model = FunBaT(2, kind="cp", kernels=Matern(1.5, 0.3))
    a, b = fitted(model, data), fitted(model, moved)
    x = torch.tensor([[0.23, 0.4, 0.8], [1.2, 0.1, 0.3]], dtype=F64)
    pa, pb = a.predict(x), b.predict(10 + 7 * x)
    torch.testing.assert_close(pb.mean, -3 + 4 * pa.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pb.variance, 16 * pa.variance, rtol=1e-5, atol=1e-5)


def test_a_warp_is_undone() -> None:
    data = gridded(300)
    positive = TensorData(data.index, data.y.exp())
    model = FunBaT(
        2,
        kind="cp",
        kernels=Matern(1.5, 0.3),
        warp=LogWarp(lower=0.0, margin=1e-9),
        standardise="scale",
    )
    post, plain = fitted(model, positive), fitted(CP, data)
    x = torch.tensor([[0.23, 0.4, 0.8], [0.9, 0.1, 0.3]], dtype=F64)
    warped, straight = post.predict(x), plain.predict(x)
    torch.testing.assert_close(
        warped.quantile(0.3), straight.quantile(0.3).exp(), rtol=1e-5, atol=0
    )
    lognormal = (straight.mean + straight.variance / 2).exp()
    torch.testing.assert_close(warped.mean, lognormal, rtol=1e-5, atol=0)
    y = torch.tensor([0.7, 1.3], dtype=F64)
    torch.testing.assert_close(
        warped.log_prob(y), straight.log_prob(y.log()) - y.log(), rtol=1e-4, atol=1e-6
    )
    assert warped.cdf(torch.tensor(-5.0)).tolist() == [0.0, 0.0]
    assert warped.log_prob(torch.tensor([-5.0, -5.0])).tolist() == [-math.inf] * 2
    heavy = FunBaT(1, kind="cp", noise="student_t", warp=LogWarp())
    assert bool(torch.isinf(fitted(heavy, positive).predict(x).mean).all())
    with pytest.raises(DataError, match=r"y must be above .* got -1 at row 1; give"):
        LogWarp(0.0, 0.5).forward(torch.tensor([1.0, -1.0]))


@pytest.mark.slow
def test_periodic_and_summed_kernels() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.stack((torch.randint(6, (400,), generator=g) / 5, torch.rand(400, generator=g)), 1)
    x = x.double()
    truth = lambda x: (1 + x[:, 0]) * (8 * math.pi * x[:, 1]).sin() + x[:, 1]  # noqa: E731
    data = TensorData(x, truth(x) + 0.05 * torch.randn(400, generator=g, dtype=F64))
    kernels = [Matern(1.5, 0.5), Periodic(0.25, 1.0) + Matern(1.5, 1.0)]
    model = FunBaT(2, kind="cp", kernels=kernels, scale_index=[True, False], standardise="scale")
    post = pk.infer(model, data, MessagePassing(sweeps=40, tolerance=0.0, restarts=2), rng=0)
    beyond = torch.tensor([[0.4, 1.2], [0.8, 1.31]], dtype=F64)
    error = post.predict(beyond, site="f").mean - truth(beyond)
    assert float(error.abs().max()) < 0.25  # a period and a fifth outside of the data


# --------------------------------------------------------------------------- updates and files


def update_case(kind: str) -> tuple[TensorData, TensorData]:
    data = gridded(700, steps=60, seed=4)
    if kind == "new time steps":
        late = data.index[:, 2] > 58.5 / 59
    else:
        late = torch.arange(len(data)) % 200 == 0
    return data.take(~late), data.take(late)


@pytest.mark.parametrize(
    ("kind", "noise", "learn"),
    [
        ("new time steps", "gaussian", False),
        ("new time steps", "student_t", False),
        ("new entries", "gaussian", True),
        ("new entries", "student_t", False),
    ],
)
def test_an_update_is_a_refit(kind: str, noise: str, learn: bool) -> None:
    """Three sweeps after the news, predictions are those of sweeping on to the end."""
    before, news = update_case(kind)
    model = FunBaT(
        2,
        kind="cp",
        kernels=Matern(1.5, 0.4),
        noise=noise,
        learn_hyperparameters=learn,
        standardise=False,
    )
    post = pk.infer(model, before, MessagePassing(sweeps=300, tolerance=0.0), rng=0)
    x = torch.rand(200, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    quick = post.update(news, rng=0)
    assert len(quick.context.data) == len(before) + len(news)
    assert quick.attrs["updates"] == 1
    end = model.update(post, news, sweeps=150).predict(x, site="f")
    sd = end.variance.sqrt()
    found = quick.predict(x, site="f")
    gap = ((found.mean - end.mean) / sd).square().mean().sqrt()
    stale = ((post.predict(x, site="f").mean - end.mean) / sd).square().mean().sqrt()
    assert float(gap) < 0.01 < float(stale)


def test_updates_extend_every_part() -> None:
    data = gridded(300, steps=30)
    late = data.index[:, 2] > 0.8
    model = FunBaT((2, 2, 2), kernels=Matern(1.5, 0.3), standardise="scale")
    post = fitted(model, data.take(~late))
    more = post.update((data.index[late].numpy(), data.y[late].numpy()), rng=0)
    assert more.context.data.sizes == data.sizes
    truth = f(data.index[late])
    error = (more.predict(data.index[late], site="f").mean - truth).square().mean().sqrt()
    blind = (post.predict(data.index[late], site="f").mean - truth).square().mean().sqrt()
    assert float(error) < 0.9 * float(blind)
    with pytest.raises(DataError, match="expected one rank for each of 2 modes"):
        post.update(([[0.0, 1.0]], [1.0]), rng=0)


def test_a_saved_fit_predicts_the_same(tmp_path: Path) -> None:
    model = FunBaT(
        kind="cp",
        masks=masked_terms(additive(3), interactions(3)),
        kernels=[Matern(0.5, 0.3), Matern(1.5, 0.2) + Matern(0.5, 0.1), Matern(2.5, 0.3)],
        noise=StudentTNoise(df=6.0),
        warp=LogWarp(lower=-20.0, margin=1.0),
        hyper_prior=HyperPrior(1.0, 2.0),
    )
    post = fitted(model, gridded(120))
    post.save(tmp_path)
    back = pk.load(tmp_path)
    x = torch.tensor([[0.23, 0.4, 0.8]], dtype=F64)
    assert torch.equal(back.predict(x).quantile(0.9), post.predict(x).quantile(0.9))
    assert torch.equal(
        back.update(gridded(20, seed=9), rng=0).predict(x).quantile(0.9),
        post.update(gridded(20, seed=9), rng=0).predict(x).quantile(0.9),
    )


# --------------------------------------------------------------------------- edges and bad input


def test_constant_modes_and_values() -> None:
    data = gridded(80)
    x = data.index.clone()
    x[:, 1] = 5.0
    post = fitted(CP, TensorData(x, data.y))
    assert bool(torch.isfinite(post.predict(x).mean).all())
    flat = fitted(FunBaT(2, kind="cp"), TensorData(data.index, torch.full((80,), 3.0)))
    torch.testing.assert_close(
        flat.predict(x[:3]).mean, torch.full((3,), 3.0).double(), atol=1e-3, rtol=0
    )
    single = fitted(FunBaT(1, kind="cp"), TensorData([[0.0, 1.0]], [2.0]))
    assert bool(torch.isfinite(single.predict([[0.0, 1.0]]).mean).all())


XY = ([[0.0, 0.5], [1.0, 0.5]], [1.0, 2.0])


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda: TensorData([[0.0, math.nan]], [1.0]), DataError,
         "index must be finite, got nan at row 0, mode 'mode_2'"),
        (lambda: TensorData([[0.0, 1.0]], [math.inf]), DataError, "y must be finite, got inf at"),
        (lambda: TensorData([0.0, 1.0], [1.0, 2.0]), ShapeError,
         r"expected index \[entry, mode\] and y \[entry\] .* got \(2,\) and \(2,\)"),
        (lambda: TensorData([[0.0], [1.0]], [1.0]), ShapeError, r"got \(2, 1\) and \(1,\)"),
        (lambda: TensorData(*XY, modes=["a", "a"]), ShapeError, "2 different names of modes"),
        (lambda: FunBaT(0), DataError, "expected whole ranks >= 1, got 0"),
        (lambda: FunBaT((2, 3), kind="cp"), DataError, r"CP needs equal ranks, got \(2, 3\)"),
        (lambda: FunBaT(2, kind="tt"), DataError, "expected kind 'tucker' or 'cp', got 'tt'"),
        (lambda: FunBaT(2, noise="cauchy"), DataError, "noise 'gaussian', .* got 'cauchy'"),
        (lambda: FunBaT(2, learn_from=0), DataError, "expected a whole learn_from >= 1, got 0"),
        (lambda: FunBaT(2, standardise="y"), DataError, "True, False or 'scale', got 'y'"),
        (lambda: FunBaT(2, noise="poisson", warp=LogWarp()), DataError, "takes no warp"),
        (lambda: FunBaT(kind="cp", masks=[[True, False], [False, False]]), DataError,
         "component 1 varies along no mode"),
        (lambda: FunBaT(kind="cp", masks=[[True, False]]), DataError, "no component varies along"),
        (lambda: FunBaT(masks=[[True], [False]]), DataError, r"got \[False\] for mode 1"),
        (lambda: FunBaT((2, 2, 2)).prepare(TensorData(*XY)), DataError,
         r"one rank for each of 2 modes \(mode_1, mode_2\), got 3"),
        (lambda: FunBaT(65).prepare(TensorData(*XY)), DataError,
         r"a core of 65 x 65 = 4225 entries has a covariance of 0.133 GiB; the limit is 4096"),
        (lambda: FunBaT(2, kernels=[Matern()] * 3).prepare(TensorData(*XY)), DataError,
         "one kernel, or one for each of 2 modes, got 3"),
        (lambda: FunBaT(2, scale_index=[True]).prepare(TensorData(*XY)), DataError,
         "scale_index True, False or one for each of 2 modes"),
        (lambda: FunBaT(kind="cp", masks=additive(3)).prepare(TensorData(*XY)), DataError,
         "masks: expected 2 modes, got 3"),
        (lambda: FunBaT(2).prepare({"y": 1}), DataError, r"TensorData\(index, y\) or a pair"),
        (lambda: StudentTNoise(df=0.0), DataError, "expected a finite df > 0, got 0.0"),
        (lambda: LogWarp(margin=0.0), DataError, "expected a finite margin > 0, got 0.0"),
        (lambda: HyperPrior(lengthscale_sd=0.0), DataError, "expected lengthscale_sd > 0, got 0.0"),
        (lambda: interactions(2, order=3), DataError, "expected order <= 2 modes, got 3"),
    ],
)  # fmt: skip
def test_bad_input_is_named(act: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        act()


def test_bad_queries_are_named() -> None:
    post = fitted(CP, gridded(60))
    with pytest.raises(ShapeError, match=r"index: expected \[entry, mode=3\] .* got \(1, 2\)"):
        post.predict([[0.0, 1.0]])
    with pytest.raises(DataError, match="index must be finite, got nan at row 0, mode 'mode_3'"):
        post.predict([[0.0, 1.0, math.nan]])
    with pytest.raises(
        DataError,
        match="expected the columns mode_1, mode_2, mode_3 as in training; missing: mode_2",
    ):
        post.predict(pd.DataFrame({"mode_1": [0.0], "mode_3": [0.0], "lat": [0.0]}))
    with pytest.raises(CapabilityError, match="predicts site None .* or 'f', got 'u'"):
        post.predict([[0.0, 1.0, 0.5]], site="u")
    with pytest.raises(CapabilityError, match="has no groups="):
        post.predict([[0.0, 1.0, 0.5]], groups={"a": [1]})

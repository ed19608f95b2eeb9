"""The same numbers on a CUDA device as on the CPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, constraints

import probkit as pk
from probkit.inference import MAP, SVI, Direct, FullRank, ImportanceSampling
from probkit.kernels import NNGPKernel
from probkit.model import Model, Site
from probkit.models import BurrXII, InverseGamma, ScaleMixtureNNGP

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def _data(device: str, n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = x[:, 0].sin() + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)
    return x.to(device), y.to(device)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("which", ["nngp", "ntk"])
def test_kernels_and_their_gradients(activation, which):
    results = []
    for device in ("cpu", "cuda"):
        x, _ = _data(device)
        x.requires_grad_()
        kernel = NNGPKernel(depth=3, activation=activation).to(device)
        K = kernel(x).to_dense() if which == "nngp" else kernel.ntk(x)
        K.sin().sum().backward()
        results.append((K.detach().cpu(), x.grad.cpu()))
    for here, there in zip(*results, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", [InverseGamma(2.0, 2.0), BurrXII(2.0, 1.0)])
@pytest.mark.parametrize("noise_in", ["scale", "outside"])
def test_regression(law, noise_in):
    predictions = []
    for device in ("cpu", "cuda"):
        x, y = _data(device)
        model = ScaleMixtureNNGP(NNGPKernel(), law, noise_in=noise_in, standardize=True)
        post = pk.infer(model, (x, y), rng=0)
        law_there = post.predict(x[:20] + 0.1)
        predictions.append((law_there.mean.cpu(), law_there.quantile([0.05, 0.95]).cpu()))
    for here, there in zip(*predictions, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-7, atol=1e-7)


def test_hyper_parameters_by_marginal_likelihood():
    fits = []
    for device in ("cpu", "cuda"):
        model = ScaleMixtureNNGP(NNGPKernel(depth=2))
        post = pk.infer(model, _data(device, 100), Direct(hyper=MAP(restarts=1)), rng=0)
        fits.append(post.log_evidence.value.cpu())
    torch.testing.assert_close(*fits, rtol=1e-4, atol=1e-4)


class _Means(Model):
    def sites(self, data):
        return {"mean": Site((3,), constraints.real, ("k",))}

    def log_joint(self, values, data, *, scale=1.0):
        prior = Normal(torch.zeros_like(values["mean"]), 1.0).log_prob(values["mean"]).sum()
        return prior + scale * Normal(values["mean"], 1.0).log_prob(data).sum()


def test_variational_and_importance_samplers_draw_on_the_device():
    data = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fit = pk.infer(_Means(), data.cuda(), SVI(steps=600), guide=FullRank(), rng=0)
    draws = fit.sample(4000, rng=1)["mean"]
    assert draws.device.type == "cuda"
    exact_mean, exact_sd = data.sum(0) / 51, 51**-0.5
    assert bool(((draws.mean(0).cpu() - exact_mean).abs() < 0.2 * exact_sd).all())
    checked = pk.infer(
        _Means(),
        data.cuda(),
        ImportanceSampling(1000),
        guide=fit.source.guide,
        rng=0,
    )
    assert checked.log_weights.device.type == "cuda"


def test_the_global_streams_of_the_device_are_left_alone():
    before = torch.cuda.get_rng_state()
    pk.infer(_Means(), torch.zeros(5, 3, dtype=torch.float64).cuda(), SVI(steps=20), rng=0)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_a_posterior_saved_on_the_device_loads_on_the_cpu(tmp_path):
    x, y = _data("cuda", 50)
    post = pk.infer(ScaleMixtureNNGP(NNGPKernel()), (x, y), rng=0)
    post.save(tmp_path)
    again = pk.load(tmp_path)
    torch.testing.assert_close(again.predict(x.cpu()).mean, post.predict(x).mean.cpu())

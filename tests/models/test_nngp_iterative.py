"""Scale-mixture regression without a stored kernel matrix, against the dense one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import probkit as pk
from probkit.errors import CapabilityError, DataError
from probkit.inference import MAP, Direct
from probkit.kernels import NNGPKernel
from probkit.kernels.iterative import Iterative
from probkit.models import BurrXII, InverseGamma, ScaleMixtureNNGP, sample_paths

F64 = torch.float64
EXACT = Iterative(
    tolerance=1e-12, rank=60, probes=4, devices=("cpu", "cpu")
)  # a preconditioner of full rank: no error


def data(n=60, outputs=None):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=g, dtype=F64)
    y = x[:, 0].sin() + 0.1 * torch.randn(n, generator=g, dtype=F64)
    return x, y if outputs is None else torch.stack([y, 2 * y + x[:, 1]], 1)


def pair(law, **options):
    dense = ScaleMixtureNNGP(NNGPKernel(depth=2), law, standardize=True, **options)
    return dense, replace(dense, memory_limit=1000.0, solver=EXACT)


@pytest.mark.parametrize("law", [InverseGamma(2.0, 2.0), BurrXII(2.0, 1.0)])
@pytest.mark.parametrize("scale_per", [None, "output"])
@pytest.mark.parametrize("joint", [False, True])
def test_equals_the_dense_route(law, scale_per, joint):
    x, y = data(outputs=2 if scale_per else None)
    new = x[:9].reshape(3, 3, 2) + 0.1
    found = []
    for model in pair(law, scale_per=scale_per):
        post = pk.infer(model, (x, y), rng=0)
        assert post.log_evidence.kind == ("exact" if model.memory_limit is None else "estimate")
        for site in (None, "f"):
            law_there = post.predict(new, site=site, joint=joint)
            found.append([post.log_evidence.value, law_there.mean, law_there.variance])
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        for got, want in zip(other, one, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)
    assert post.source.state["factor"] is None


def test_hyper_parameters_and_input_gradients():
    x, y = data()
    dense, iterative = pair(InverseGamma(2.0, 2.0))
    values = dense.hyper_values((x, y))
    slopes = []
    for model in (dense, iterative):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        evidence = model.log_evidence(leaves, (x, y))
        at = x[:4].clone().requires_grad_()
        there = pk.infer(model, (x, y), rng=0).predict(at)
        (there.mean.sum() + there.variance.sum()).backward()
        slopes.append([*torch.autograd.grad(evidence, list(leaves.values())), at.grad])
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_hyper_parameters_are_found():
    x, y = data()
    pair_of_fits = [
        pk.infer(m, (x, y), Direct(hyper=MAP()), rng=0) for m in pair(InverseGamma(2.0, 2.0))
    ]
    one, other = (fit.predict(x).mean for fit in pair_of_fits)
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


def test_an_estimated_evidence_is_close_and_repeats():
    x, y = data(n=200)
    dense = ScaleMixtureNNGP(NNGPKernel(depth=2), noise_var=0.3)
    rough = replace(dense, memory_limit=1.0, solver=Iterative(rank=20, probes=64))
    exact, first, second = (
        float(pk.infer(model, (x, y), rng=0).log_evidence.value) for model in (dense, rough, rough)
    )
    assert first == second
    # half of the log determinant, whose standard error over 64 probes is below 0.1 here
    assert abs(first - exact) < 0.3


def test_paths_by_random_features():
    x, y = data()
    dense, iterative = pair(InverseGamma(2.0, 2.0))
    values = [
        sample_paths(pk.infer(m, (x, y), rng=0), 3, rng=1, prior="features")(x[:5])
        for m in (dense, iterative)
    ]
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-6)
    with pytest.raises(CapabilityError, match="memory_limit rules out; use prior='features'"):
        sample_paths(pk.infer(iterative, (x, y), rng=0), 3, rng=1)


def test_saved_and_loaded(tmp_path):
    x, y = data(n=30)
    post = pk.infer(pair(InverseGamma(2.0, 2.0))[1], (x, y), rng=0)
    post.save(tmp_path / "post")
    again = pk.load(tmp_path / "post")
    assert again.model.solver == EXACT and again.model.memory_limit == 1000.0
    torch.testing.assert_close(again.predict(x[:3]).mean, post.predict(x[:3]).mean)


def test_bad_input():
    with pytest.raises(DataError, match="memory_limit: expected a finite number > 0, got -1"):
        ScaleMixtureNNGP(NNGPKernel(), memory_limit=-1)
    model = ScaleMixtureNNGP(NNGPKernel(), noise_in="outside", memory_limit=100.0)
    with pytest.raises(CapabilityError, match="use noise_in='scale' or raise the limit"):
        pk.infer(model, data(), rng=0)

from __future__ import annotations

import copy
import json

import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan
from gpytorch.kernels import (
    CosineKernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from gpytorch.priors import (
    GammaPrior,
    HalfCauchyPrior,
    HalfNormalPrior,
    LogNormalPrior,
    NormalPrior,
    UniformPrior,
)

from probkit import files
from probkit.errors import DataError
from probkit.kernels import NNGPKernel, kernel_config, kernel_from_config

TWO = torch.Size([2])
KERNELS = {
    "rbf": lambda: RBFKernel(ard_num_dims=3, active_dims=(0, 2, 3)),
    "matern": lambda: MaternKernel(0.5, lengthscale_constraint=GreaterThan(0.25)),
    "rational quadratic": lambda: RQKernel(ard_num_dims=4, alpha_constraint=LessThan(9.0)),
    "periodic": lambda: PeriodicKernel(period_length_constraint=Interval(0.1, 7.0)),
    "periodic ard": lambda: PeriodicKernel(ard_num_dims=4),
    "linear": lambda: LinearKernel(),
    "linear ard": lambda: LinearKernel(ard_num_dims=4),
    "cosine": lambda: CosineKernel(active_dims=(1,)),
    "no transform": lambda: RBFKernel(lengthscale_constraint=GreaterThan(1e-4, transform=None)),
    "scale": lambda: ScaleKernel(RBFKernel(active_dims=(0, 2))),
    "batch": lambda: ScaleKernel(RBFKernel(batch_shape=TWO), batch_shape=TWO),
    "batch inside": lambda: ScaleKernel(RBFKernel(batch_shape=TWO)),
    "nested": lambda: (ScaleKernel(RBFKernel()) + LinearKernel()) * NNGPKernel(1),
    "nngp": lambda: NNGPKernel(2, "erf", 1.1, 0.2, 0.9, 0.4, learn=("last_w_std", "b_std")),
    "nngp without bias": lambda: NNGPKernel(2, b_std=0.0, batch_shape=TWO, active_dims=(0, 1)),
    "nngp linear": lambda: NNGPKernel(0, last_b_std=0.5, learn=(), backend="torch"),
    "nngp tanh": lambda: NNGPKernel(1, "tanh"),
    "nngp per layer": lambda: NNGPKernel(2, "relu", [1.5, 0.8], [0.3, 0.0], batch_shape=TWO),
    "nngp residual": lambda: NNGPKernel(2, arch="resnet", w_std=[1.5, 0.8, 0.5]),
    "nngp flatten": lambda: NNGPKernel(2, arch="conv", image_shape=(2, 2, 1)),
    "nngp gap": lambda: NNGPKernel(
        1, "erf", [0.8], arch="conv", image_shape=(2, 1, 2), pooling="gap"
    ),
    "priors": lambda: ScaleKernel(
        PeriodicKernel(
            lengthscale_prior=GammaPrior(2.0, 1.5), period_length_prior=LogNormalPrior(0.5, 2.0)
        ),
        outputscale_prior=HalfCauchyPrior(3.0),
    ),
    "more priors": lambda: (
        RBFKernel(lengthscale_prior=NormalPrior(0.5, 2.0))
        + RBFKernel(lengthscale_prior=UniformPrior(0.5, 2.0))
        + RBFKernel(lengthscale_prior=HalfNormalPrior(1.5))
    ),
    "a copy": lambda: copy.deepcopy(ScaleKernel(RBFKernel())),
}


@pytest.fixture(params=KERNELS)
def kernel(request, generator):
    made = KERNELS[request.param]()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.rand(parameter.shape, generator=generator).to(parameter)
    next(iter(made.parameters()), torch.zeros(1)).requires_grad_(False)
    return made


def through_json(config):
    return json.loads(json.dumps(config, allow_nan=False))


@pytest.mark.parametrize("double", [False, True])
@torch.no_grad()
def test_round_trip_is_exact(kernel, double, points):
    kernel = kernel.double() if double else kernel
    config, tensors = kernel_config(kernel)
    made = kernel_from_config(through_json(config), tensors)
    x = points(5, 4)
    x = x if double else x.float()
    assert torch.equal(made(x).to_dense(), kernel(x).to_dense())
    assert torch.equal(made(x, diag=True), kernel(x, diag=True))
    before, after = kernel.state_dict(), made.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        # GPyTorch converts the buffer of such a prior, but not the distribution behind it
        assert after[name].dtype == tensor.dtype or "_buffered_" in name
    grads = [{n: p.requires_grad for n, p in k.named_parameters()} for k in (kernel, made)]
    assert grads[0] == grads[1]
    for (one, _, prior, closure, _), (other, _, again, closure2, _) in zip(
        kernel.named_priors(), made.named_priors(), strict=True
    ):
        assert one == other and type(prior) is type(again)
        assert torch.equal(
            prior.log_prob(closure(kernel.get_submodule(one.rpartition(".")[0]))),
            again.log_prob(closure2(made.get_submodule(one.rpartition(".")[0]))),
        )
    assert sorted(repr(made).split()) == sorted(repr(kernel).split())


@torch.no_grad()
def test_storable_inside_other_objects(kernel, points):
    structure, tensors = files.pack({"kernel": kernel, "noise": 0.1})
    made = files.unpack(through_json(structure), tensors)["kernel"]
    x = points(5, 4).float()
    assert torch.equal(made(x).to_dense(), kernel(x).to_dense())


def test_one_kernel_in_two_places_stays_one():
    inner = RBFKernel()
    made = kernel_from_config(*kernel_config(inner * inner + LinearKernel()))
    assert made.kernels[0].kernels[0] is made.kernels[0].kernels[1]


def test_tensors_are_copies():
    kernel = RBFKernel()
    config, tensors = kernel_config(kernel)
    made = kernel_from_config(config, tensors)
    made.lengthscale = 3.0
    tensors["raw_lengthscale"] += 1.0
    assert kernel.raw_lengthscale.item() == 0.0


# ------------------------------------------------------------------------- bad input


class _Own(RBFKernel):
    pass


class _OwnConstraint(GreaterThan):
    pass


def _shared_parameter():
    kernel = RBFKernel() + RBFKernel()
    kernel.kernels[1].raw_lengthscale = kernel.kernels[0].raw_lengthscale
    return kernel


def _prior_on_the_log():
    kernel = RBFKernel()
    kernel.register_prior(
        "p", GammaPrior(2.0, 1.0), lambda m: m.lengthscale.log(), lambda m, v: None
    )
    return kernel


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: PolynomialKernel(2), "cannot store a PolynomialKernel: expected NNGPKernel, RBF"),
        (lambda: ScaleKernel(_Own()), "cannot store a _Own"),
        (
            lambda: RBFKernel(lengthscale_constraint=_OwnConstraint(0.1)),
            r"cannot store constraint raw_lengthscale_constraint \(_OwnConstraint\)",
        ),
        (
            lambda: RBFKernel(lengthscale_constraint=GreaterThan(0.1, torch.exp, torch.log)),
            "cannot store constraint .* with its own transform or none",
        ),
        (_shared_parameter, "it is one parameter with kernels.0.raw_lengthscale"),
        (_prior_on_the_log, "cannot store prior p .* on the value"),
    ],
)
def test_what_cannot_be_stored_is_passed_again(make, text):
    with pytest.raises(DataError, match=f"{text}.*pass the kernel again when loading"):
        kernel_config(make())


def test_damaged_files():
    config, tensors = kernel_config(RBFKernel())
    with pytest.raises(DataError, match="unknown kernel 'os.system' in the file"):
        kernel_from_config({**config, "class": "os.system"}, tensors)
    with pytest.raises(DataError, match="lacks tensor 'raw_lengthscale_constraint.lower_bound'"):
        kernel_from_config(config, {})
    with pytest.raises(DataError, match=r"'raw_lengthscale' .* expected \[1, 1\], got \[3\]"):
        kernel_from_config(config, {**tensors, "raw_lengthscale": torch.zeros(3)})
    constraint = {"raw_lengthscale_constraint": {"class": "Module", "transform": True}}
    with pytest.raises(DataError, match="unknown constraint 'Module' in the file"):
        kernel_from_config({**config, "constraints": constraint}, tensors)
    for prior, text in (
        ({"class": "Prior", "on": "lengthscale"}, "unknown prior 'Prior' in the file"),
        ({"class": "HalfCauchyPrior", "on": "__class__"}, "has no value '__class__'"),
    ):
        with pytest.raises(DataError, match=text):
            kernel_from_config(
                {**config, "priors": {"p": prior}}, {**tensors, "p.scale": torch.tensor(1.0)}
            )

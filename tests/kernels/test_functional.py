from __future__ import annotations

import copy

import gpytorch
import pytest
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
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
from gpytorch.priors import GammaPrior, LogNormalPrior
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import constraints

from probkit.errors import DataError, ShapeError
from probkit.kernels import NNGPKernel, evaluate, hyperparameters

F64 = torch.float64
TWO = torch.Size([2])
KERNELS = {
    "rbf": lambda: RBFKernel(),
    "rbf ard": lambda: RBFKernel(ard_num_dims=3),
    "matern 1/2": lambda: MaternKernel(0.5),
    "matern 3/2": lambda: MaternKernel(1.5),
    "matern 5/2": lambda: MaternKernel(2.5),
    "matern ard": lambda: MaternKernel(1.5, ard_num_dims=3),
    "rational quadratic": lambda: RQKernel(ard_num_dims=3),
    "periodic": lambda: PeriodicKernel(),
    "periodic ard": lambda: PeriodicKernel(ard_num_dims=3),
    "linear": lambda: LinearKernel(ard_num_dims=3),
    "cosine": lambda: CosineKernel(),
    "polynomial": lambda: PolynomialKernel(2),
    "nngp relu": lambda: NNGPKernel(2),
    "nngp erf": lambda: NNGPKernel(2, "erf", last_b_std=0.3),
    "nngp per layer": lambda: NNGPKernel(2, "erf", [1.5, 0.8], [0.3, 0.2], last_b_std=0.3),
    "nngp residual": lambda: NNGPKernel(1, arch="resnet", w_std=[1.5, 0.8]),
    "nngp flatten": lambda: NNGPKernel(2, arch="conv", image_shape=(1, 3, 1)),
    "nngp gap": lambda: NNGPKernel(
        2, arch="conv", image_shape=(3, 1, 1), w_std=[1.5, 0.8], pooling="gap"
    ),
    "columns": lambda: ScaleKernel(RBFKernel(active_dims=(0, 2))),
    "sum": lambda: ScaleKernel(RBFKernel()) + LinearKernel(active_dims=(1,)),
    "nested": lambda: (
        (RBFKernel() + LinearKernel()) * (MaternKernel(active_dims=(1,)) + RQKernel())
    ),
    "scaled nngp": lambda: ScaleKernel(NNGPKernel(2, b_std=0.0)),
    "batch inside": lambda: ScaleKernel(RBFKernel(batch_shape=TWO)),
    "batch outside": lambda: ScaleKernel(MaternKernel(), batch_shape=TWO),
    "batch of nngp": lambda: ScaleKernel(NNGPKernel(1, batch_shape=TWO), batch_shape=TWO),
}


@pytest.fixture(params=KERNELS)
def kernel(request, generator):
    made = KERNELS[request.param]().double()
    for parameter in made.parameters():
        parameter.data += torch.rand(parameter.shape, dtype=F64, generator=generator)
    return made


def draws_of(kernel, *lead):
    """Values [*lead, *shape] that differ between draws."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: hyper.value * torch.rand(*lead, *hyper.shape, dtype=F64, generator=generator).add(0.5)
        for name, hyper in hyperparameters(kernel).items()
    }


def with_values(kernel, values):
    """A copy of the kernel with its parameters set the way GPyTorch does it."""
    made = copy.deepcopy(kernel)
    for name, hyper in hyperparameters(kernel).items():
        raw = made.get_parameter(hyper.raw_name)
        constraint = made.constraint_for_parameter_name(hyper.raw_name)
        raw.data = constraint.inverse_transform(values[name].detach()).reshape(raw.shape)
    return made


@torch.no_grad()
def test_own_values_give_what_the_kernel_gives(kernel, points):
    x1, x2 = points(6, 3), points(4, 3, seed=1)
    values = {name: hyper.value for name, hyper in hyperparameters(kernel).items()}
    close = {"rtol": 1e-12, "atol": 1e-12}
    for params in (None, values):
        torch.testing.assert_close(
            evaluate(kernel, x1, params=params), kernel(x1).to_dense(), **close
        )
        torch.testing.assert_close(
            evaluate(kernel, x1, x2, params=params), kernel(x1, x2).to_dense(), **close
        )
        torch.testing.assert_close(
            evaluate(kernel, x1, params=params, diag=True),
            kernel(x1).to_dense().diagonal(dim1=-2, dim2=-1),
            **close,
        )


@torch.no_grad()
def test_draws_equal_a_loop_over_kernels(kernel, points):
    x1, x2 = points(6, 3), points(4, 3, seed=1)
    params = draws_of(kernel, 2, 3)
    cross = evaluate(kernel, x1, x2, params=params)
    same = evaluate(kernel, x1, params=params)
    diagonal = evaluate(kernel, x1, params=params, diag=True)
    assert cross.shape == (2, 3, *kernel.batch_shape, 6, 4)
    for i in range(2):
        for j in range(3):
            one = with_values(kernel, {name: value[i, j] for name, value in params.items()})
            close = {"rtol": 1e-11, "atol": 1e-12}
            torch.testing.assert_close(cross[i, j], one(x1, x2).to_dense(), **close)
            torch.testing.assert_close(same[i, j], one(x1).to_dense(), **close)
            torch.testing.assert_close(
                diagonal[i, j], one(x1).to_dense().diagonal(dim1=-2, dim2=-1), **close
            )


def _takes_cdist(kernel):
    """Whether GPyTorch takes torch.cdist of scaled inputs, which has no second derivative."""
    ard = isinstance(kernel, MaternKernel) and kernel.ard_num_dims is not None
    return ard or isinstance(kernel, PeriodicKernel | CosineKernel)


def test_gradients_reach_every_value(kernel, points):
    x1, x2 = points(4, 3), points(3, 3, seed=1)
    params = {name: value.requires_grad_() for name, value in draws_of(kernel, 2).items()}

    def matrix(*values):
        return evaluate(kernel, x1, x2, params=dict(zip(params, values, strict=True)))

    with torch.random.fork_rng(devices=[]):
        assert gradcheck(matrix, tuple(params.values()), rtol=1e-6, atol=1e-7)
        # GPyTorch's own RBF and Matern covariances have no second derivative, silently
        if _takes_cdist(kernel):
            with pytest.raises(RuntimeError, match="_cdist_backward"):
                gradgradcheck(matrix, tuple(params.values()))
        else:
            assert gradgradcheck(matrix, tuple(params.values()), rtol=1e-4, atol=1e-5)


def test_some_values_and_the_kernels_own_gradient(points):
    x = points(5, 2)
    kernel = ScaleKernel(NNGPKernel(2)).double()
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=F64)
    K = evaluate(kernel, x, params={"outputscale": scale})
    torch.testing.assert_close(K[2], 6 * K[0])
    K.sum().backward()
    assert kernel.base_kernel.raw_w_std.grad.abs().item() > 0
    assert kernel.raw_outputscale.grad is None


def test_leading_dims_are_broadcast(points):
    kernel = ScaleKernel(RBFKernel()).double()
    params = {
        "outputscale": torch.rand(4, 1, dtype=F64, generator=torch.Generator().manual_seed(0)),
        "base_kernel.lengthscale": torch.tensor([1.0, 2.0, 3.0], dtype=F64),
    }
    K = evaluate(kernel, points(5, 2), params=params)
    assert K.shape == (4, 3, 5, 5)
    one = {"outputscale": params["outputscale"][2, 0], "base_kernel.lengthscale": torch.tensor(2.0)}
    torch.testing.assert_close(K[2, 1], evaluate(kernel, points(5, 2), params=one))
    batch = evaluate(kernel, points(3, 5, 2), params={"outputscale": torch.ones(4, 3, dtype=F64)})
    assert batch.shape == (4, 3, 5, 5)


def test_values_on_the_boundary_are_exact(points):
    x = points(4, 2)
    kernel = NNGPKernel(2)
    K = evaluate(kernel, x, params={"b_std": torch.zeros((), dtype=F64)})
    assert torch.equal(K, NNGPKernel(2, b_std=0.0)(x).to_dense())


@pytest.mark.parametrize("own", [True, False])
def test_the_kernel_is_not_changed(kernel, own, points):
    x = points(4, 3)
    state = {name: (id(t), t.clone()) for name, t in kernel.state_dict(keep_vars=True).items()}
    attributes = [(m, dict(vars(m))) for m in kernel.modules()]
    evaluate(kernel, x, params=None if own else draws_of(kernel, 3)).sum()
    hyperparameters(kernel)
    for name, tensor in kernel.state_dict(keep_vars=True).items():
        assert id(tensor) == state[name][0] and torch.equal(tensor, state[name][1])
    for module, before in attributes:
        assert vars(module).keys() == before.keys()
        assert all(vars(module)[key] is value for key, value in before.items())
    lazily = gpytorch.settings.lazily_evaluate_kernels.on()
    assert lazily


def test_one_kernel_in_two_places(points):
    x = points(4, 2)
    inner = RBFKernel().double()
    kernel = inner * inner
    assert list(hyperparameters(kernel)) == ["kernels.0.lengthscale"]
    K = evaluate(kernel, x, params={"kernels.0.lengthscale": torch.tensor([0.7, 2.0], dtype=F64)})
    inner.lengthscale = 2.0
    torch.testing.assert_close(K[1], inner(x).to_dense() ** 2)


def test_one_constraint_for_two_parameters(points):
    """A value given for one of them leaves the other one's transform as it was."""
    shared = GreaterThan(0.1)
    kernel = RBFKernel(lengthscale_constraint=shared) + RBFKernel(lengthscale_constraint=shared)
    x = points(4, 2).float()
    given = evaluate(
        kernel, x, params={"kernels.1.lengthscale": kernel.kernels[1].lengthscale[0, 0]}
    )
    torch.testing.assert_close(given, kernel(x).to_dense())


# ------------------------------------------------------------------------- descriptions


def test_descriptions():
    kernel = ScaleKernel(
        PeriodicKernel(
            ard_num_dims=2,
            batch_shape=torch.Size([3]),
            lengthscale_prior=GammaPrior(2.0, 1.0),
            period_length_prior=LogNormalPrior(0.0, 1.0),
            lengthscale_constraint=GreaterThan(0.5),
            period_length_constraint=Interval(0.25, 4.0),
        ),
        outputscale_constraint=LessThan(8.0),
        batch_shape=torch.Size([3]),
    )
    kernel.base_kernel.raw_lengthscale.requires_grad_(False)
    found = hyperparameters(kernel)
    length = found["base_kernel.lengthscale"]
    period = found["base_kernel.period_length"]
    scale = found["outputscale"]
    assert list(found) == [scale.name, length.name, period.name]
    assert length.raw_name == "base_kernel.raw_lengthscale"
    assert length.shape == length.value.shape == (3, 2)
    assert torch.equal(length.value, kernel.base_kernel.lengthscale.detach().reshape(3, 2))
    assert scale.shape == (3,)
    assert length.fixed and not period.fixed
    # both values are equal at the start, and still each prior finds its own
    assert length.prior is kernel.base_kernel.lengthscale_prior
    assert period.prior is kernel.base_kernel.period_length_prior
    assert scale.prior is None
    assert isinstance(length.support, type(constraints.greater_than(0)))
    assert length.support.lower_bound == 0.5
    assert (period.support.lower_bound, period.support.upper_bound) == (0.25, 4.0)
    assert scale.support.upper_bound == 8.0


def test_supports():
    def support(constraint):
        return hyperparameters(RBFKernel(lengthscale_constraint=constraint))["lengthscale"].support

    assert support(Positive()) is constraints.positive
    assert support(GreaterThan(1e-4, transform=None)).lower_bound == pytest.approx(1e-4)
    assert hyperparameters(NNGPKernel())["w_std"].support is constraints.positive
    bare = RBFKernel()
    del bare._constraints["raw_lengthscale_constraint"]
    assert hyperparameters(bare)["lengthscale"].support is constraints.real


def test_no_transform_and_no_constraint(points):
    x = points(4, 2)
    plain = RBFKernel(lengthscale_constraint=GreaterThan(1e-4, transform=None)).double()
    plain.lengthscale = 1.5
    reference = RBFKernel().double()
    reference.lengthscale = 1.5
    params = {"lengthscale": torch.tensor(1.5, dtype=F64)}
    torch.testing.assert_close(evaluate(plain, x, params=params), reference(x).to_dense())
    torch.testing.assert_close(evaluate(plain, x), reference(x).to_dense())


class _Squared(Positive):
    """A constraint that keeps transforming whatever its flag says."""

    def transform(self, tensor):
        return tensor**2

    def inverse_transform(self, transformed_tensor):
        return transformed_tensor.sqrt()


def test_unknown_constraint_classes_go_through_the_raw_parameter(points):
    x = points(4, 2)
    kernel = RBFKernel(lengthscale_constraint=_Squared()).double()
    reference = RBFKernel().double()
    reference.lengthscale = 1.5
    K = evaluate(kernel, x, params={"lengthscale": torch.tensor(1.5, dtype=F64)})
    torch.testing.assert_close(K, reference(x).to_dense())


# ------------------------------------------------------------------------- bad input


def test_bad_requests(points):
    x = points(4, 2)
    kernel = ScaleKernel(RBFKernel(ard_num_dims=2)).double()
    with pytest.raises(DataError, match="unknown hyper-parameter 'noise': expected one of outputs"):
        evaluate(kernel, x, params={"noise": torch.tensor(1.0)})
    with pytest.raises(ShapeError, match=r"lengthscale: expected .* shape \[2\], got \[4, 3\]"):
        evaluate(kernel, x, params={"base_kernel.lengthscale": torch.ones(4, 3)})
    with pytest.raises(ShapeError, match=r"lengthscale: expected .* shape \[2\], got \[\]"):
        evaluate(kernel, x, params={"base_kernel.lengthscale": torch.tensor(1.0)})
    with pytest.raises(ShapeError, match="same d, got d = 2 and 3"):
        evaluate(kernel, x, points(4, 3))
    with pytest.raises(ShapeError, match="d = ard_num_dims = 2, got d = 3"):
        evaluate(kernel, points(4, 3))
    with pytest.raises(DataError, match="float16"):
        evaluate(kernel, x.half())


def test_prior_on_a_function_of_a_value():
    kernel = RBFKernel()
    kernel.register_prior(
        "log_prior", GammaPrior(2.0, 1.0), lambda m: m.lengthscale.log(), lambda m, v: None
    )
    with pytest.raises(DataError, match="prior 'log_prior': expected a prior on the value"):
        hyperparameters(kernel)

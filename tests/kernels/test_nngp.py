from __future__ import annotations

import copy

import gpytorch
import pytest
import torch
from botorch.models.kernels import InfiniteWidthBNNKernel
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.priors import GammaPrior

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.kernels import NNGPKernel, evaluate

F64 = torch.float64
X = torch.tensor([(1, 0.5, -0.3), (0.2, -1, 0.7), (-0.4, 0.1, 0.9), (0.3, 0.3, 0.3)], dtype=F64)


def kernel_of(activation="relu", **options):
    return NNGPKernel(3, activation, w_std=1.5, b_std=0.3, last_w_std=1.2, **options)


# Values of an independent JAX implementation (neural-tangents), twelve decimals.
REFERENCE = {
    "relu": (
        (0.590840049935, 0.788024388280),
        (0.926054942600, 1.766985169902),
        (1.13551875, 1.265371875, 0.88948125, 0.404240625),
    ),
    "erf": (
        (-0.089301105525, 0.294827860080),
        (-0.508525390048, 1.083777686728),
        (0.719145324406, 0.723138644974, 0.708626229957, 0.651470977293),
    ),
}


@pytest.mark.parametrize("activation", ["relu", "erf"])
@torch.no_grad()
def test_reference_values(activation):
    off_diagonal, tangent, diagonal = REFERENCE[activation]
    kernel = kernel_of(activation)
    K, theta = kernel(X).to_dense(), kernel.ntk(X)
    assert K[0, 2].item() == pytest.approx(off_diagonal[0], abs=1e-12)
    assert K[1, 2].item() == pytest.approx(off_diagonal[1], abs=1e-12)
    assert theta[0, 2].item() == pytest.approx(tangent[0], abs=1e-12)
    assert theta[1, 2].item() == pytest.approx(tangent[1], abs=1e-12)
    assert kernel(X, diag=True).tolist() == pytest.approx(diagonal, abs=1e-12)
    assert K.diagonal().tolist() == pytest.approx(diagonal, abs=1e-12)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@pytest.mark.parametrize("depth", [0, 1, 4])
@torch.no_grad()
def test_matches_the_naive_recursion(activation, depth, naive_matrix, points):
    x1, x2 = points(5, 3), points(4, 3, seed=1)
    kernel = NNGPKernel(depth, activation, 1.3, 0.4, 0.8, 0.6)
    stds = [(1.3, 0.4)] * depth + [(0.8, 0.6)]
    torch.testing.assert_close(
        kernel(x1, x2).to_dense(), naive_matrix(x1, x2, stds, activation), rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(
        kernel.ntk(x1, x2), naive_matrix(x1, x2, stds, activation, True), rtol=1e-13, atol=1e-13
    )
    assert torch.equal(kernel.ntk(x1, diag=True), kernel.ntk(x1).diagonal())


@torch.no_grad()
def test_matches_botorch(points):
    x1, x2 = points(40, 4), points(30, 4, seed=1)
    theirs = InfiniteWidthBNNKernel(depth=3).double()
    theirs.weight_var, theirs.bias_var = 1.7, 0.2
    ours = NNGPKernel(3, "relu", 1.7**0.5, 0.2**0.5, 1.7**0.5, 0.2**0.5)
    # its clamp of arccos at 1 - 1e-7 acts on the diagonal only, here; its variances are in float32
    weight, bias = theirs.weight_var.item(), theirs.bias_var.item()
    ours.w_std = ours.last_w_std = weight**0.5
    ours.b_std = ours.last_b_std = bias**0.5
    torch.testing.assert_close(
        ours(x1, x2).to_dense(), theirs(x1, x2).to_dense(), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(ours(x1).to_dense(), theirs(x1).to_dense(), rtol=2e-6, atol=0)
    torch.testing.assert_close(ours(x1, diag=True), theirs(x1, diag=True), rtol=1e-12, atol=0)


# ------------------------------------------------------------------------- architectures

IMAGES = torch.arange(1, 65, dtype=F64).sin().reshape(2, 4, 4, 2)
# (kernel, tangent kernel) by the same JAX implementation: entries (0, 2) and (1, 2) of residual
# networks with two blocks, (0, 0), (0, 1) and (1, 1) of two convolutions
ARCHITECTURES = {
    ("resnet", "relu"): ((1.291757064493, 2.311237022427), (1.423392146684, 4.422666687823)),
    ("resnet", "erf"): ((-0.217807959470, 0.349892234400), (-0.672006786662, 1.006040539992)),
    ("flatten", "relu"): (
        (0.590765911728, 0.529509332416, 0.592717280098),
        (1.707497735183, 1.282423015858, 1.713351840295),
    ),
    ("flatten", "erf"): (
        (0.593297590000, 0.492057296894, 0.593793602237),
        (2.043036295845, 1.574868463065, 2.045751598117),
    ),
    ("gap", "relu"): (
        (0.313134750721, 0.312241750990, 0.314186594025),
        (0.522427017448, 0.505282570126, 0.524367959231),
    ),
    ("gap", "erf"): (
        (0.106337163025, 0.103139242778, 0.106191882061),
        (0.282082718496, 0.259847013313, 0.281949809426),
    ),
}


def architecture(name, activation="relu", **options):
    """A kernel with two blocks or convolutions, and inputs for it."""
    stds = {"w_std": 1.5, "b_std": 0.3, "last_w_std": 1.2} | options
    if name == "resnet":
        return NNGPKernel(2, activation, arch="resnet", **stds), X
    image = {"arch": "conv", "image_shape": (4, 4, 2), "pooling": name}
    return NNGPKernel(2, activation, **image, **stds), IMAGES


@pytest.mark.parametrize(("name", "activation"), ARCHITECTURES)
@torch.no_grad()
def test_reference_values_of_architectures(name, activation):
    kernel, x = architecture(name, activation)
    for K, expected in zip(
        (kernel(x).to_dense(), kernel.ntk(x)), ARCHITECTURES[name, activation], strict=True
    ):
        found = (K[0, 2], K[1, 2]) if name == "resnet" else (K[0, 0], K[0, 1], K[1, 1])
        assert [value.item() for value in found] == pytest.approx(list(expected), abs=2e-12)
        assert torch.equal(K, K.T)
    assert torch.equal(kernel(x, diag=True), kernel(x).to_dense().diagonal())
    assert torch.equal(kernel.ntk(x, diag=True), kernel.ntk(x).diagonal())


@pytest.mark.parametrize(
    ("activation", "bias_var", "covariance", "variance"),
    [
        ("relu", 1.3, 475.7371005702512, 534.05),
        ("relu", 1.6, 519.798494541, 580.85),
        ("erf", 1.3, 4.57026286576, None),
    ],
)
@torch.no_grad()
def test_infinite_width_network_of_bayesian_optimization(
    activation, bias_var, covariance, variance
):
    """Depth 3 with one variance for all layers, the last one too."""
    w_std, b_std = 10**0.5, bias_var**0.5
    kernel = NNGPKernel(3, activation, w_std, b_std, w_std, b_std)
    K = kernel(torch.tensor([(0.2, 0.7), (0.9, 0.1)], dtype=F64)).to_dense()
    assert K[0, 1].item() == pytest.approx(covariance, rel=1e-11)
    if variance is not None:
        assert K[0, 0].item() == pytest.approx(variance, rel=1e-13)


@pytest.mark.parametrize("activation", ["relu", "erf"])
@torch.no_grad()
def test_one_value_for_each_layer(activation, naive_matrix, points):
    x1, x2 = points(5, 3), points(4, 3, seed=1)
    w, b = [1.1, 1.6, 0.9], [0.2, 0.0, 0.1]
    kernel = NNGPKernel(3, activation, w, b, 1.2, 0.5)
    stds = [*zip(w, b, strict=True), (1.2, 0.5)]
    close = {"rtol": 1e-13, "atol": 1e-13}
    torch.testing.assert_close(
        kernel(x1, x2).to_dense(), naive_matrix(x1, x2, stds, activation), **close
    )
    torch.testing.assert_close(
        kernel.ntk(x1, x2), naive_matrix(x1, x2, stds, activation, True), **close
    )
    residual = NNGPKernel(2, activation, w, b, 1.2, 0.5, arch="resnet")
    torch.testing.assert_close(
        residual(x1, x2).to_dense(),
        naive_matrix(x1, x2, stds, activation, False, True),
        **close,
    )


@torch.no_grad()
def test_one_value_for_each_convolution(naive_conv_matrix, points):
    x1, x2 = points(3, 3, 2, 1), points(2, 3, 2, 1, seed=1)
    image = {"arch": "conv", "image_shape": (3, 2, 1)}
    for pooling in ("flatten", "gap"):
        kernel = NNGPKernel(2, "relu", [1.1, 1.6], [0.2, 0.4], 0.9, 0.3, pooling=pooling, **image)
        stds = [(1.1, 0.2), (1.6, 0.4), (0.9, 0.3)]
        torch.testing.assert_close(
            kernel(x1, x2).to_dense(), naive_conv_matrix(x1, x2, stds, pooling)
        )
        torch.testing.assert_close(
            kernel.ntk(x1, x2), naive_conv_matrix(x1, x2, stds, pooling, tangent=True)
        )


@torch.no_grad()
def test_values_for_each_layer_are_read_set_and_expanded(points):
    x = points(4, 3)
    kernel = NNGPKernel(3, w_std=[1.1, 1.6, 0.9], b_std=0.2)
    assert kernel.w_std.shape == (1, 3) and kernel.b_std.shape == (1, 1)
    assert kernel.w_std[0].tolist() == pytest.approx([1.1, 1.6, 0.9])
    expanded = kernel.expand_batch(torch.Size([2]))
    assert expanded.w_std.shape == (2, 1, 3)
    torch.testing.assert_close(expanded(x).to_dense()[1], kernel(x).to_dense())
    torch.testing.assert_close(expanded[1](x).to_dense(), kernel(x).to_dense())
    kernel.w_std = [1.0, 2.0, 3.0]
    assert kernel.w_std[0].tolist() == pytest.approx([1.0, 2.0, 3.0])
    kernel.w_std = 1.5
    torch.testing.assert_close(
        kernel(x).to_dense(), NNGPKernel(3, w_std=1.5, b_std=0.2)(x).to_dense()
    )
    each = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=F64)
    batch = NNGPKernel(2, w_std=each, b_std=torch.tensor([0.1, 0.2, 0.3]), batch_shape=(3,))
    assert batch.w_std.shape == (3, 1, 2) and batch.b_std.shape == (3, 1, 1)
    for k in range(3):
        one = NNGPKernel(2, w_std=each[k], b_std=0.1 * (k + 1))
        torch.testing.assert_close(batch(x).to_dense()[k], one(x).to_dense())
    shared = NNGPKernel(2, w_std=[1.0, 2.0], batch_shape=(2,))  # a list is one value for each layer
    assert shared.w_std.squeeze(-2).tolist() == [pytest.approx([1.0, 2.0])] * 2
    with pytest.raises(ShapeError, match=r"w_std: .* one value for each of 3 layers, got \[2\]"):
        NNGPKernel(3, w_std=[1.0, 2.0])
    with pytest.raises(ShapeError, match=r"last_w_std: expected a number or a tensor .*got \[3\]"):
        NNGPKernel(3, last_w_std=[1.0, 2.0, 3.0])
    with pytest.raises(ShapeError, match=r"b_std: expected one value for all layers, got 3"):
        kernel.b_std = [0.1, 0.2, 0.3]


@pytest.mark.parametrize("name", ["flatten", "gap"])
@torch.no_grad()
def test_images_and_flattened_rows_are_the_same(name, points):
    kernel, images = architecture(name)
    rows = images.flatten(-3)
    K = kernel(images).to_dense()
    assert torch.equal(K, kernel(rows).to_dense())
    assert torch.equal(kernel.ntk(images), kernel.ntk(rows))
    assert torch.equal(kernel(images, diag=True), kernel(rows, diag=True))
    torch.testing.assert_close(kernel(images, rows.clone()).to_dense(), K)
    batch = torch.stack([images, 2 * images, images.flip(-2)])
    assert kernel(batch).shape == (3, 2, 2)
    torch.testing.assert_close(kernel(batch).to_dense()[0], K)
    among = torch.cat([torch.ones(2, 1, dtype=F64), rows], dim=-1)
    chosen, _ = architecture(name, active_dims=range(1, 33))
    assert torch.equal(chosen(among).to_dense(), K)
    assert torch.equal(chosen.ntk(among), kernel.ntk(rows))


@pytest.mark.parametrize("name", ["resnet", "flatten", "gap"])
@torch.no_grad()
def test_architectures_with_batch_shape_equal_a_loop(name):
    stds = torch.tensor([0.7, 1.9], dtype=F64)
    kernel, x = architecture(name, w_std=stds, batch_shape=(2,))
    K, theta = kernel(x).to_dense(), kernel.ntk(x)
    assert kernel(x, diag=True).shape == K.shape[:-1]
    for k, std in enumerate(stds):
        one, _ = architecture(name, w_std=std)
        torch.testing.assert_close(K[k], one(x).to_dense(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(theta[k], one.ntk(x), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["resnet", "flatten", "gap"])
@pytest.mark.parametrize("activation", ["relu", "erf", "tanh"])
def test_hyperparameters_of_architectures_have_gradients(name, activation):
    """Central differences; two rows are equal."""
    kernel, x = architecture(name, activation, last_b_std=0.5)
    x = torch.cat([x[:2], x[:1]])
    weights = torch.linspace(0.5, 1.5, 9, dtype=F64).reshape(3, 3)

    def objective():
        return (kernel(x).to_dense() * weights).sum()

    gradients = torch.autograd.grad(objective(), list(kernel.parameters()))
    shift = 1e-5
    for parameter, gradient in zip(kernel.parameters(), gradients, strict=True):
        with torch.no_grad():
            values = []
            for sign in (1, -2):
                parameter += sign * shift
                values.append(objective().item())
            parameter += shift
        difference = (values[0] - values[1]) / (2 * shift)
        assert gradient.item() == pytest.approx(difference, rel=1e-6)


@torch.no_grad()
def test_tanh_is_between_erf_and_its_bounds(points):
    """Tanh is no stand-in: near erf(u sqrt(pi) / 2), which has its slope, but not equal to it."""
    x = points(6, 3)
    tanh = NNGPKernel(1, "tanh", 1.0, 0.0, 1.0)(x).to_dense()
    scale = torch.pi**0.5 / 2
    erf = NNGPKernel(1, "erf", scale, 0.0, 1.0)(x).to_dense()
    assert 1e-3 < (tanh - erf).abs().max() < 0.06


# ------------------------------------------------------------------------- GPyTorch conventions


@torch.no_grad()
def test_batch_shape_equals_loop(points):
    stds = torch.tensor([0.7, 1.0, 1.9], dtype=F64)
    kernel = NNGPKernel(2, w_std=stds, b_std=0.2, batch_shape=torch.Size([3]))
    assert kernel.w_std.shape == (3, 1, 1)
    x1, x2 = points(5, 2), points(4, 2, seed=1)
    K = kernel(x1, x2).to_dense()
    assert K.shape == kernel(x1, x2).shape == (3, 5, 4)
    for k, std in enumerate(stds):
        one = NNGPKernel(2, w_std=std, b_std=0.2)
        torch.testing.assert_close(K[k], one(x1, x2).to_dense(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(kernel[k](x1, x2).to_dense(), K[k], rtol=1e-13, atol=1e-13)
    each = points(3, 5, 2, seed=2)
    assert kernel(each).to_dense().shape == (3, 5, 5)
    assert kernel(each, diag=True).shape == (3, 5)


@torch.no_grad()
def test_expand_batch_keeps_columns(points):
    x = points(4, 5)
    kernel = kernel_of(active_dims=(1, 3))
    expanded = kernel.expand_batch(torch.Size([2, 3]))
    assert expanded.batch_shape == (2, 3)
    K = expanded(x).to_dense()
    assert K.shape == (2, 3, 4, 4)
    torch.testing.assert_close(K[1, 2], kernel_of()(x[:, [1, 3]]).to_dense())
    assert kernel.batch_shape == ()
    assert torch.equal(expanded[0, 1](x).to_dense(), K[0, 1])


@torch.no_grad()
def test_lazy_indexing(points):
    x1, x2 = points(6, 2), points(5, 2, seed=1)
    lazy, dense = kernel_of()(x1, x2), kernel_of()(x1, x2).to_dense()
    assert torch.equal(lazy[2:4, 1:].to_dense(), dense[2:4, 1:])
    flipped = kernel_of()(x1, x1.flip(0))
    torch.testing.assert_close(
        flipped.diagonal(), flipped.to_dense().diagonal(), rtol=1e-13, atol=1e-13
    )


@torch.no_grad()
def test_one_column_and_active_dims(points):
    x = points(6, 3)
    only = kernel_of(active_dims=(1,))
    torch.testing.assert_close(only(x).to_dense(), kernel_of()(x[:, 1]).to_dense())
    torch.testing.assert_close(only.ntk(x), kernel_of().ntk(x[:, 1]))
    columns = kernel_of().forward(x, x, last_dim_is_batch=True)
    assert columns.shape == (3, 6, 6)
    torch.testing.assert_close(columns[1], only(x).to_dense())
    torch.testing.assert_close(
        kernel_of().forward(x, x, diag=True, last_dim_is_batch=True)[1], only(x, diag=True)
    )


@torch.no_grad()
def test_inside_other_kernels(points):
    x = points(6, 2)
    inner, rbf = kernel_of("erf"), RBFKernel().double()
    scaled = ScaleKernel(inner).double()
    scaled.outputscale = 2.5
    K, R = inner(x).to_dense(), rbf(x).to_dense()
    torch.testing.assert_close(scaled(x).to_dense(), 2.5 * K)
    torch.testing.assert_close((inner + rbf)(x).to_dense(), K + R)
    torch.testing.assert_close((inner * rbf)(x).to_dense(), K * R)


class _Dense(torch.nn.Module):
    """Evaluates inside the call, while the parameters are replaced."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def forward(self, x):
        return self.kernel(x).to_dense()


def test_functional_call(points):
    kernel, x = kernel_of(), points(5, 2)
    before = copy.deepcopy(kernel.state_dict())
    other = NNGPKernel(3, w_std=0.9, b_std=0.3, last_w_std=1.2)
    raw = {"raw_w_std": other.raw_w_std.detach().requires_grad_()}
    K = torch.func.functional_call(_Dense(kernel), {f"kernel.{k}": v for k, v in raw.items()}, x)
    torch.testing.assert_close(K, other(x).to_dense())
    K.sum().backward()
    assert raw["raw_w_std"].grad.item() > 0
    assert all(torch.equal(kernel.state_dict()[name], old) for name, old in before.items())


class _Regression(gpytorch.models.ExactGP):
    def __init__(self, x, y, likelihood, kernel):
        super().__init__(x, y, likelihood)
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ["relu", "erf"])
def test_exact_gp_trains_and_predicts(dtype, activation, points):
    x = points(30, 2).to(dtype)
    y = torch.sin(x[:, 0])
    likelihood = gpytorch.likelihoods.GaussianLikelihood().to(dtype)
    model = _Regression(x, y, likelihood, NNGPKernel(2, activation, last_b_std=0.5))
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = -objective(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    new = points(4, 2, seed=3).to(dtype).requires_grad_()
    prediction = model(new)
    prediction.variance.sum().backward()
    assert prediction.mean.dtype == dtype
    assert new.grad.isfinite().all()


@pytest.mark.parametrize("name", ["resnet", "flatten", "gap"])
def test_exact_gp_over_architectures(name, points):
    kernel, _ = architecture(name, "erf", last_b_std=0.5)
    x = points(12, 32)
    y = x.mean(-1).tanh()
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = _Regression(x, y, likelihood, kernel)
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = -objective(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    new = points(3, 32, seed=3).requires_grad_()
    prediction = model(new)
    prediction.variance.sum().backward()
    assert prediction.mean.shape == (3,)
    assert new.grad.isfinite().all()


def test_gradient_reaches_both_inputs_when_they_are_equal(points):
    """Equal values in two tensors are one input only where no gradient could tell."""
    x1 = points(3, 2).requires_grad_()
    x2 = x1.detach().clone().requires_grad_()
    G = points(3, 3, seed=1)
    (kernel_of()(x1, x2).to_dense() * G).sum().backward()
    shift = 1e-6
    for x, kind in ((x1, 0), (x2, 1)):
        moved = [[a.detach().clone(), b.detach().clone()] for a, b in [(x1, x2)] * 2]
        moved[0][kind][0, 1] += shift
        moved[1][kind][0, 1] -= shift
        up, down = ((kernel_of().forward(*pair) * G).sum() for pair in moved)
        assert x.grad[0, 1].item() == pytest.approx(((up - down) / (2 * shift)).item(), abs=1e-6)


# ------------------------------------------------------------------------- hyper-parameters


def names_of(kernel):
    return {name.removeprefix("raw_") for name, _ in kernel.named_parameters()}


def test_what_is_learned():
    assert names_of(NNGPKernel()) == {"w_std", "b_std"}
    assert names_of(NNGPKernel(b_std=0.0)) == {"w_std"}
    assert names_of(NNGPKernel(last_b_std=0.1)) == {"w_std", "b_std", "last_b_std"}
    assert names_of(NNGPKernel(depth=0, last_b_std=0.1)) == {"last_b_std"}
    assert names_of(NNGPKernel(learn=("last_w_std", "w_std"))) == {"w_std", "last_w_std"}
    assert names_of(NNGPKernel(learn=())) == set()


def test_fixed_zero_bias_is_exact():
    kernel = NNGPKernel(b_std=0.0)
    assert kernel.b_std.item() == 0.0
    zero = torch.zeros(1, 3, dtype=F64)
    assert kernel(zero, X).to_dense().eq(0).all()
    assert kernel.ntk(zero, X).eq(0).all()


def test_values_are_set_and_read():
    kernel = NNGPKernel()
    for name, value in {"w_std": 0.8, "b_std": 0.1, "last_w_std": 2.0, "last_b_std": 0.4}.items():
        setattr(kernel, name, value)
        assert getattr(kernel, name).item() == pytest.approx(value, rel=1e-14)
    kernel.initialize(w_std=1.1, last_w_std=0.9)
    assert kernel.w_std.item() == pytest.approx(1.1, rel=1e-14)
    assert kernel.last_w_std.item() == pytest.approx(0.9, rel=1e-14)


def test_prior_on_a_standard_deviation():
    kernel = NNGPKernel()
    kernel.register_prior("w_std_prior", GammaPrior(2.0, 1.0), "w_std")
    ((_, module, prior, closure, setter),) = kernel.named_priors()
    assert prior.log_prob(closure(module)).isfinite().all()
    setter(module, torch.tensor(0.7))
    assert kernel.w_std.item() == pytest.approx(0.7, rel=1e-7)


def test_state_dict_round_trip(points):
    source, target = NNGPKernel(w_std=0.7, b_std=1.1, last_w_std=3.0), NNGPKernel()
    target.load_state_dict(source.state_dict())
    x = points(4, 2)
    assert torch.equal(target(x).to_dense(), source(x).to_dense())


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"depth": -1}, r"depth: expected a whole number of hidden layers >= 0, got -1"),
        ({"depth": 1.5}, r"depth: expected a whole number of hidden layers >= 0, got 1.5"),
        ({"depth": True}, r"depth: expected a whole number"),
        (
            {"activation": "gelu"},
            r"activation: expected one of 'relu', 'erf', 'tanh', got 'gelu'",
        ),
        ({"arch": "vit"}, r"arch: expected one of 'mlp', 'resnet', 'conv', got 'vit'"),
        ({"arch": "resnet", "depth": 0}, r"depth: expected .* residual blocks >= 1, got 0"),
        ({"arch": "conv", "depth": 0}, r"depth: expected .* convolutions >= 1, got 0"),
        ({"image_shape": (4, 4, 1)}, r"image_shape: expected None for arch 'mlp', got \(4, 4, 1\)"),
        ({"pooling": "gap"}, r"pooling: expected None for arch 'mlp', got 'gap'"),
        ({"arch": "conv"}, r"image_shape: expected height, width and channels .* got None"),
        ({"arch": "conv", "image_shape": (4, 4)}, r"image_shape: expected .* got \(4, 4\)"),
        ({"arch": "conv", "image_shape": (4, 0, 1)}, r"image_shape: .* each >= 1"),
        ({"arch": "conv", "image_shape": (4, 4.0, 1)}, r"image_shape: .* each >= 1"),
        (
            {"arch": "conv", "image_shape": (4, 4, 1), "pooling": "max"},
            r"pooling: expected one of 'flatten', 'gap', got 'max'",
        ),
        ({"w_std": [1.0, 0.0, 1.0]}, r"w_std: expected finite and > 0, got values from 0 to 1"),
        ({"b_std": [0.1, 0.0, 0.1], "learn": ("b_std",)}, r"learn: b_std = 0 cannot be learned"),
        ({"w_std": 0.0}, r"w_std: expected finite and > 0, got 0"),
        ({"w_std": -1.0}, r"w_std: expected finite and > 0, got -1"),
        ({"last_w_std": float("nan")}, r"last_w_std: expected finite and > 0, got nan"),
        ({"b_std": -0.1}, r"b_std: expected finite and >= 0, got -0.1"),
        ({"last_b_std": float("inf")}, r"last_b_std: expected finite and >= 0, got inf"),
        ({"learn": ("noise",)}, r"learn: expected names out of w_std, b_std, .*got 'noise'"),
        ({"learn": ("b_std",), "b_std": 0.0}, r"learn: b_std = 0 cannot be learned"),
        ({"depth": 0, "learn": ("w_std",)}, r"learn: expected names out of last_w_std"),
        ({"w_std": torch.tensor([1.0, -1.0])}, r"w_std: expected finite and > 0, got values from"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(DataError, match=text):
        NNGPKernel(**options)


def test_bad_shapes_of_hyperparameters():
    with pytest.raises(ShapeError, match=r"w_std: expected a number or .* 3 layers, got \[2\]"):
        NNGPKernel(w_std=torch.tensor([1.0, 2.0]))
    kernel = NNGPKernel()
    with pytest.raises(DataError, match="w_std: expected finite and > 0, got 0"):
        kernel.w_std = kernel.b_std * 0
    with pytest.raises(DataError, match="b_std: expected > 0 where it is learned, got 0"):
        NNGPKernel().b_std = 0.0


def test_bad_inputs(points):
    kernel, x = kernel_of(), points(3, 2)
    with pytest.raises(ShapeError, match=r"with the same d, got d = 2 and 3"):
        kernel(x, points(3, 3))
    with pytest.raises(ShapeError, match=r"with the same d, got d = 2 and 3"):
        kernel.ntk(x, points(3, 3))
    with pytest.raises(ShapeError, match=r"d >= 1 columns, got \[3, 0\]"):
        kernel(x[:, :0])
    with pytest.raises(DataError, match=r"float32 or float64, got torch.float16; use x.double"):
        kernel(x.half())
    with pytest.raises(DataError, match=r"float32 or float64, got torch.int64"):
        kernel(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(DataError, match=r"of one dtype on one device, got torch.float64"):
        kernel(x, x.float())
    with pytest.raises(ShapeError, match=r"as many rows, got 3 and 2"):
        kernel(x, x[:2], diag=True)


def test_bad_images(points):
    kernel, images = architecture("gap")
    with pytest.raises(
        ShapeError,
        match=r"images \[\*batch, n, H, W, C\] with \(H, W, C\) = \(4, 4, 2\), or flattened rows "
        r"\[\*batch, n, 32\], got \[2, 4, 4, 3\]",
    ):
        kernel(torch.ones(2, 4, 4, 3, dtype=F64))
    for wrong in (images[0], images[..., 0], points(3, 31), points(3, 32).flatten()):
        with pytest.raises(ShapeError, match=r"expected images .* got \["):
            kernel(wrong)
        with pytest.raises(ShapeError, match=r"expected images .* got \["):
            kernel.ntk(wrong)
    rows = images.flatten(-3)
    with pytest.raises(ShapeError, match=r"expected images .* got \[2, 4, 4, 2\]"):
        kernel.forward(images, images)
    with pytest.raises(CapabilityError, match=r"last_dim_is_batch=True: expected arch 'mlp' or"):
        kernel.forward(rows, rows, last_dim_is_batch=True)
    with pytest.raises(DataError, match="torch.float16"):
        kernel(images.half())
    with pytest.raises(ShapeError, match=r"as many rows, got 2 and 1"):
        kernel(rows, rows[:1], diag=True)


def test_values_that_are_not_finite(points):
    x = points(4, 3)
    x[2, 1] = float("nan")
    for call in (lambda: NNGPKernel()(x), lambda: NNGPKernel().ntk(points(2, 3), x)):
        with pytest.raises(DataError, match="x must be finite, got nan at row 2, column 1"):
            call()
    x[2, 1] = float("inf")
    with pytest.raises(DataError, match="x must be finite, got inf at row 2, column 1"):
        evaluate(NNGPKernel(), x)


def test_global_state_is_unchanged(points):
    x = points(200, 2).requires_grad_()
    rng, dtype = torch.get_rng_state(), torch.get_default_dtype()
    lazily = gpytorch.settings.lazily_evaluate_kernels.on()
    kernel = kernel_of()
    kernel(x).to_dense().sum().backward()
    kernel.ntk(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() == dtype
    assert gpytorch.settings.lazily_evaluate_kernels.on() == lazily
    assert torch.is_grad_enabled()

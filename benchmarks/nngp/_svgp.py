"""GPyTorch's sparse variational classifier, with the kernel and the digits that both sides use."""

from __future__ import annotations

from typing import Any


def digits(n: int) -> tuple[Any, Any, Any, Any]:
    """Return scikit-learn's digits: ``n`` training rows, labels, and the rest to test on."""
    import torch
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.as_tensor(bunch.data / 16), torch.as_tensor(bunch.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:n], y[:n], x[n:], y[n:]


def kernel() -> Any:
    """Return the NNGP kernel of both sides, its hyper-parameters fixed."""
    from probkit.kernels import NNGPKernel

    return NNGPKernel(depth=3, learn=())


def peer(inducing: Any, classes: int, *, learn_scale: bool = False) -> tuple[Any, Any]:
    """Return GPyTorch's model (whitened, shared inducing inputs) and softmax likelihood.

    ``learn_scale`` puts a learned output scale, from one on, before the kernel.
    """
    import gpytorch
    import torch

    class Model(gpytorch.models.ApproximateGP):  # type: ignore[misc]
        def __init__(self) -> None:
            law = gpytorch.variational.CholeskyVariationalDistribution(
                len(inducing), batch_shape=torch.Size([classes])
            )
            strategy = gpytorch.variational.VariationalStrategy(
                self, inducing.clone(), law, learn_inducing_locations=True, jitter_val=1e-6
            )
            super().__init__(
                gpytorch.variational.IndependentMultitaskVariationalStrategy(
                    strategy, num_tasks=classes
                )
            )
            self.mean_module = gpytorch.means.ZeroMean()
            scaled = gpytorch.kernels.ScaleKernel(kernel())
            scaled.initialize(outputscale=1.0)
            self.covar_module = scaled if learn_scale else kernel()

        def forward(self, x: Any) -> Any:
            mean, covariance = self.mean_module(x), self.covar_module(x)
            return gpytorch.distributions.MultivariateNormal(mean, covariance)

    likelihood = gpytorch.likelihoods.SoftmaxLikelihood(
        num_features=classes, num_classes=classes, mixing_weights=False
    )
    return Model().double(), likelihood.double()


def train_peer(
    model: Any, likelihood: Any, x: Any, y: Any, *, steps: int, batch: int, draws: int, lr: float
) -> None:
    """Fit by Adam on minibatches, the rate falling to a tenth."""
    import gpytorch
    import torch

    model.train()
    likelihood.train()
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(x))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(0)
    order = torch.zeros(0, dtype=torch.long)
    with gpytorch.settings.num_likelihood_samples(draws):
        for step in range(steps):
            if len(order) == 0:
                order = torch.randperm(len(x), generator=generator)
            index, order = order[:batch], order[batch:]
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.1 ** (step / steps)
            optimizer.zero_grad()
            (-bound(model(x[index]), y[index])).backward()
            optimizer.step()


def probabilities(model: Any, x: Any, draws: int) -> Any:
    """Return class probabilities [row, class], averaged over draws of the marginal scores."""
    import torch

    model.eval()
    with torch.no_grad():
        scores = model(x)
        mean, sd = scores.mean, scores.variance.sqrt()
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(draws, *mean.shape, generator=generator, dtype=mean.dtype)
        return torch.softmax(mean + sd * noise, -1).mean(0)

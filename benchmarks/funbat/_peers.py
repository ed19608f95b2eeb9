"""What a user without functional tensors would do with the same entries."""

from __future__ import annotations

from typing import Any

from benchmarks.funbat._pm25 import BINS, DAYS, day_means

Split = tuple[Any, Any, Any, Any]


def rmse(prediction: Any, y: Any) -> float:
    """Root mean squared error."""
    return float(((prediction - y) ** 2).mean() ** 0.5)


def point_rows(split: Split) -> dict[str, float]:
    """RMSE of predictions without error bars: x, y, x_test, y_test in turn."""
    from sklearn.ensemble import HistGradientBoostingRegressor
    from sklearn.neighbors import KNeighborsRegressor

    x, y, x_test, y_test = split
    boosting = HistGradientBoostingRegressor(
        max_iter=1000, early_stopping=True, n_iter_no_change=50, random_state=0
    ).fit(x, y)
    # distances in bins, so that a day counts as much as one bin of the weather
    neighbours = KNeighborsRegressor(5).fit(x * BINS, y)
    return {
        "mean of the training entries": rmse(y.mean(), y_test),
        "mean of that day": rmse(interpolated_day_means(x, y, x_test), y_test),
        "gradient boosting (scikit-learn)": rmse(boosting.predict(x_test), y_test),
        "5 nearest neighbours": rmse(neighbours.predict(x_test * BINS), y_test),
    }


def interpolated_day_means(x: Any, y: Any, x_test: Any) -> Any:
    """The mean of each test entry's day; by linear interpolation where no entry is of that day."""
    import numpy as np

    days, means = day_means(x, y)
    return np.interp(x_test[:, 2] * (DAYS - 1), days, means)


def tensorly_rows(split: Split) -> dict[str, float]:
    """RMSE of masked CP and Tucker of rank 2 on a 50 x 50 x 150 grid."""
    import numpy as np
    import tensorly as tl
    from tensorly.decomposition import parafac, tucker

    x, y, x_test, y_test = split
    bins = np.array([50, 50, 150])
    place, test = (np.minimum((part * bins).astype(int), bins - 1) for part in (x, x_test))
    flat = np.ravel_multi_index(tuple(place.T), tuple(bins))
    count = np.bincount(flat, minlength=bins.prod())
    filled = np.bincount(flat, y, minlength=bins.prod()) / np.maximum(count, 1)
    tensor, mask = filled.reshape(bins), (count > 0).reshape(bins).astype(float)
    options = {"mask": tl.tensor(mask), "init": "random", "random_state": 0, "n_iter_max": 50}
    found = {}
    for name, method, rank, dense in (
        ("tensorly parafac, masked, rank 2", parafac, 2, tl.cp_to_tensor),
        ("tensorly tucker, masked, rank 2", tucker, [2, 2, 2], tl.tucker_to_tensor),
    ):
        surface = np.asarray(dense(method(tl.tensor(tensor), rank, **options)))
        found[name] = rmse(surface[tuple(test.T)], y_test)
    return found


def svgp_scores(split: Split, *, steps: int = 400) -> dict[str, float]:
    """GPyTorch's sparse variational GP with ARD Matern 3/2, 200 inducing inputs, Adam."""
    import gpytorch
    import torch
    from torch.distributions import Normal

    x, y, x_test, y_test = (torch.as_tensor(part) for part in split)
    generator = torch.Generator().manual_seed(0)
    start = x[torch.randperm(len(x), generator=generator)[:200]].clone()

    class Model(gpytorch.models.ApproximateGP):  # type: ignore[misc]
        def __init__(self) -> None:
            law = gpytorch.variational.CholeskyVariationalDistribution(len(start))
            super().__init__(
                gpytorch.variational.VariationalStrategy(
                    self, start, law, learn_inducing_locations=True
                )
            )
            self.mean_module = gpytorch.means.ConstantMean()
            base = gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=3)
            base.lengthscale = torch.tensor([[0.3, 0.3, 0.02]])
            self.covar_module = gpytorch.kernels.ScaleKernel(base)

        def forward(self, inputs: Any) -> Any:
            return gpytorch.distributions.MultivariateNormal(
                self.mean_module(inputs), self.covar_module(inputs)
            )

    model, likelihood = Model().double(), gpytorch.likelihoods.GaussianLikelihood().double()
    bound = gpytorch.mlls.VariationalELBO(likelihood, model, num_data=len(x))
    optimizer = torch.optim.Adam([*model.parameters(), *likelihood.parameters()], lr=0.02)
    for _ in range(steps):
        rows = torch.randint(len(x), (512,), generator=generator)
        optimizer.zero_grad()
        (-bound(model(x[rows]), y[rows])).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        law = likelihood(model(x_test))
        mean, sd = law.mean, law.variance.sqrt()
        density = Normal(mean, sd).log_prob(y_test)
        inside = ((y_test - mean).abs() <= 1.6449 * sd).double()
    return {
        "rmse": rmse(mean, y_test),
        "nlpd": float(-density.mean()),
        "coverage": float(inside.mean()),
    }

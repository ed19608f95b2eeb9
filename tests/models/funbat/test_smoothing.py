"""One mode given its sites, against dense Gaussian processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from probkit.kernels import Matern, Periodic, state_space
from probkit.models.funbat.grids import insert_points, locate, make_grid
from probkit.models.funbat.hyper import HyperPrior, gradient, sensitivity
from probkit.models.funbat.pairs import pack, unpack
from probkit.models.funbat.smoothing import make_chain, smooth

F64 = torch.float64
R = 2
KERNELS = {
    "1/2": Matern(0.5, 0.3, 1.7),
    "3/2": Matern(1.5, 0.3, 1.7),
    "5/2": Matern(2.5, 0.3, 1.7),
    "sum": Matern(1.5, 0.3) + Matern(0.5, 0.1, 0.5),
    "periodic": Periodic(0.4, 1.5, 2.0) + Matern(1.5, 0.2),
}


def problem(points: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sites of rank one at some points and none at others, eta and packed Lam [1, point, *]."""
    n = len(points)
    B = 3 * torch.randn(n, R, 1, generator=generator, dtype=F64)
    eta = 3 * torch.randn(n, R, generator=generator, dtype=F64)
    seen = (torch.rand(n, generator=generator) < 0.7).double()
    return (eta * seen[:, None])[None], pack(B @ B.mT * seen[:, None, None])[None]


def dense(kernel: Matern, points: Tensor, eta: Tensor, lam: Tensor) -> tuple[Tensor, ...]:
    """Mean, covariance and log Z of the same by matrices of all points and components."""
    n = len(points)
    K = torch.kron(kernel(points[:, None]).to_dense().detach(), torch.eye(R, dtype=F64))
    Lam = torch.block_diag(*unpack(lam[0], R))
    M = torch.eye(n * R, dtype=F64) + K @ Lam
    cov = torch.linalg.solve(M, K)
    mean = cov @ eta.flatten()
    log_z = eta.flatten() @ mean / 2 - torch.linalg.slogdet(M)[1] / 2
    blocks = torch.stack([cov[R * t : R * t + R, R * t : R * t + R] for t in range(n)])
    return mean.reshape(n, R), blocks, log_z


def grids(generator: torch.Generator) -> list[Tensor]:
    """Irregular points, some of them very close, and regular ones."""
    random = torch.rand(40, generator=generator, dtype=F64)
    return [torch.cat((random, random[:3] + 1e-7)), torch.linspace(0, 1, 30, dtype=F64)]


@pytest.mark.parametrize("name", KERNELS)
def test_smoothing_is_that_of_a_dense_process(name: str, generator: torch.Generator) -> None:
    kernel = KERNELS[name]
    space = state_space(kernel)
    for coordinates in grids(generator):
        grid = make_grid(coordinates)
        eta, lam = problem(grid.points, generator)
        hyper = space.log_hyper.expand(1, R, *space.log_hyper.shape)
        result = smooth(make_chain(space, grid, hyper), eta, lam)
        mean, cov, log_z = dense(kernel, grid.points, eta, lam)
        # Six harmonics leave out 1e-6 of the periodic kernel at this length scale.
        atol = 1e-4 if name == "periodic" else 1e-8
        torch.testing.assert_close(result.mean[0], mean, rtol=0, atol=atol)
        torch.testing.assert_close(unpack(result.cov, R)[0], cov, rtol=0, atol=atol)
        torch.testing.assert_close(result.log_z[0], log_z, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("name", KERNELS)
def test_slopes_are_those_of_differences(name: str, generator: torch.Generator) -> None:
    """In both forms of the pass: regular grids take precisions, close points covariances."""
    space = state_space(KERNELS[name])
    for coordinates in grids(generator):
        grid = make_grid(coordinates)
        eta, lam = problem(grid.points, generator)
        hyper = space.log_hyper.expand(1, R, *space.log_hyper.shape).clone()
        hyper[0, 1] += 0.2
        chain = make_chain(space, grid, hyper)
        found = gradient(
            space,
            grid,
            hyper,
            space.log_hyper,
            HyperPrior(1e9, 1e9),
            sensitivity(space, grid, hyper, chain, smooth(chain, eta, lam)),
        )
        width = 1e-4
        for place in torch.ones_like(hyper).nonzero():
            step = torch.zeros_like(hyper)
            step[tuple(place)] = width
            up, down = (
                smooth(make_chain(space, grid, hyper + s), eta, lam, cross=False).log_z[0]
                for s in (step, -step)
            )
            expected = float(up - down) / (2 * width)
            assert float(found[tuple(place)]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_points_without_sites_change_nothing(generator: torch.Generator) -> None:
    space = state_space(KERNELS["3/2"])
    grid = make_grid(torch.rand(20, generator=generator, dtype=F64))
    eta, lam = problem(grid.points, generator)
    hyper = space.log_hyper.expand(1, R, 1, 2)
    before = smooth(make_chain(space, grid, hyper), eta, lam)
    more, old = insert_points(grid, torch.tensor([-0.5, 0.31, 0.77, 2.0], dtype=F64))
    wide_eta = eta.new_zeros(1, len(more.points), R).index_add_(1, old, eta)
    wide_lam = lam.new_zeros(1, len(more.points), lam.shape[-1]).index_add_(1, old, lam)
    after = smooth(make_chain(space, more, hyper), wide_eta, wide_lam)
    torch.testing.assert_close(after.mean[:, old], before.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(after.log_z, before.log_z, rtol=1e-10, atol=0)


def test_grids_merge_sort_and_place() -> None:
    coordinates = torch.tensor([0.5, 0.0, 1.0, 0.5 + 1e-12, 0.0], dtype=F64)
    grid = make_grid(coordinates)
    assert grid.points.tolist() == [0.0, 0.5, 1.0]
    assert grid.index.tolist() == [1, 0, 2, 1, 0]
    assert len(grid.gaps) == 1 and grid.gap_index.tolist() == [0, 0]
    more, old = insert_points(grid, torch.tensor([0.5, 1e6], dtype=F64))
    assert more.points.tolist() == [0.0, 0.5, 1.0, 1e6]
    assert (old.tolist(), more.index.tolist()) == ([0, 1, 2], [1, 3])
    assert locate(more, grid.points).tolist() == [0, 1, 2]
    alone = make_grid(torch.zeros(3, dtype=F64))
    assert (len(alone.points), len(alone.gaps), locate(alone, alone.points).tolist()) == (1, 0, [0])

"""Greedy baselines, metrics and simulators."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.models.sbl.greedy import kronecker_omp, omp
from probkit.models.sbl.metrics import nmse, support_recovery_rate
from probkit.models.sbl.mode_products import mode_products
from probkit.models.sbl.simulators import simulate_irs_channel, simulate_kronecker

REAL, COMPLEX = torch.float64, torch.complex128


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_omp_recovers_and_stops(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    H = torch.randn(40, 80, generator=g, dtype=dtype)
    x = torch.zeros(80, dtype=dtype)
    x[[3, 20, 66]] = torch.tensor([2.0, -1.5, 1.0], dtype=dtype)
    y = H @ x + 0.01 * torch.randn(40, generator=g, dtype=dtype)
    for rule in ({"atoms": 3}, {"noise_var": 1e-4}, {"residual": 1e-4}):
        found = omp(H, y, **rule)
        assert found.nonzero().flatten().tolist() == [3, 20, 66], rule
        exact = torch.linalg.lstsq(H[:, [3, 20, 66]], y[:, None]).solution[:, 0]
        torch.testing.assert_close(found[[3, 20, 66]], exact)


@pytest.mark.parametrize("is_complex", [False, True])
def test_kronecker_omp_recovers_a_grid(is_complex: bool) -> None:
    data = simulate_kronecker(
        1,
        sizes=(9, 8),
        data_sizes=(12, 10),
        nonzeros=2,
        snr_db=40,
        is_complex=is_complex,
        rank_one=False,
        rng=2,
    )
    factors = [f[0] for f in data.factors]
    found = kronecker_omp(factors, data.y[0], atoms=2)
    assert bool(((found != 0) == (data.weights[0] != 0)).all())
    rest = data.y[0] - mode_products(found, factors)
    inside = mode_products(
        rest, [f[:, (data.weights[0] != 0).any(1 - i)].mH for i, f in enumerate(factors)]
    )
    torch.testing.assert_close(inside, torch.zeros_like(inside), rtol=0, atol=1e-10)
    flat = kronecker_omp(factors, data.y[0].flatten(), noise_var=float(data.noise_var[0]))
    assert float(nmse(flat, data.weights[0], dims=2)) < 1e-2


def test_greedy_refuses_bad_input() -> None:
    H, y = torch.eye(3), torch.ones(3)
    with pytest.raises(DataError, match="a stopping rule: atoms="):
        omp(H, y)
    with pytest.raises(DataError, match="atoms: expected a whole number"):
        omp(H, y, atoms=0)
    with pytest.raises(DataError, match="noise_var: expected a finite number"):
        omp(H, y, noise_var=-1.0)
    with pytest.raises(DataError, match="residual: expected a share"):
        kronecker_omp([H], y, residual=1.0)
    with pytest.raises(ShapeError, match=r"expected H \[M, N\] and y \[M\]"):
        omp(H, torch.ones(2), atoms=1)
    with pytest.raises(ShapeError, match="expected y with 3 x 3 entries"):
        kronecker_omp([H, H], y, atoms=1)


def test_metrics() -> None:
    truth = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    estimate = torch.tensor([[1.0, 1e-9, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    assert nmse(estimate, truth)[0].item() == pytest.approx(1.25 / 5)
    assert support_recovery_rate(estimate, truth).tolist() == pytest.approx([2 / 3, 1.0])
    grid = truth.reshape(2, 2, 2)
    assert nmse(estimate.reshape(2, 2, 2), grid, dims=2)[0].item() == pytest.approx(1.25 / 5)
    with pytest.raises(ShapeError, match="one shape"):
        nmse(truth, truth[0])
    with pytest.raises(DataError, match="dims: expected 1 to 2"):
        nmse(truth, truth, dims=3)


def test_kronecker_simulator() -> None:
    data = simulate_kronecker(3, nonzeros=4, snr_db=13, rng=0)
    assert [tuple(f.shape) for f in data.factors] == [(3, 8, 15), (3, 12, 15), (3, 15, 15)]
    assert (data.weights != 0).flatten(1).sum(1).tolist() == [64] * 3
    field = mode_products(data.weights, data.factors)
    ratio = field.square().mean((1, 2, 3)) / data.noise_var
    torch.testing.assert_close(ratio, torch.full((3,), 10**1.3, dtype=REAL))
    noise = (data.y - field).square().mean((1, 2, 3)) / data.noise_var
    assert float((noise - 1).abs().max()) < 5 * math.sqrt(2 / 1440)
    unfolded = data.weights[0].reshape(15, -1)
    assert int(torch.linalg.matrix_rank(unfolded)) == 1
    loose = simulate_kronecker(1, rank_one=False, rng=0)
    assert int(torch.linalg.matrix_rank(loose.weights[0].reshape(15, -1))) == 3
    again = simulate_kronecker(3, nonzeros=4, snr_db=13, rng=0)
    assert bool((again.y == data.y).all())
    with pytest.raises(DataError, match="nonzeros: expected 1 to 15"):
        simulate_kronecker(1, nonzeros=16, rng=0)
    with pytest.raises(DataError, match="one number for each mode"):
        simulate_kronecker(1, sizes=(3, 4), rng=0)


def test_irs_channels_are_those_of_the_physics() -> None:
    """H x against base <- IRS <- user channels built from steering vectors."""
    channel = simulate_irs_channel(2, snr_db=200, rng=1)
    data, problem = channel.data, 0
    assert [tuple(f.shape[1:]) for f in data.factors] == [(6, 18), (3, 18), (16, 18)]
    x = data.weights[problem]
    assert int((x != 0).sum()) == 9
    # Each pattern's channel, [base, user]; pilots are recovered from H_2 = X^T conj(A_user).
    channels = channel.cascaded(data.weights)[problem]
    pilots = torch.linalg.pinv(channel.user.conj().mT) @ data.factors[1][problem].mT  # [6, 3]
    torch.testing.assert_close(pilots.abs(), torch.full((6, 3), 1 / math.sqrt(6), dtype=REAL))
    received = (channels @ pilots).mT  # [pattern, pilot, base]
    torch.testing.assert_close(received, data.y[problem], rtol=0, atol=1e-6)
    # Rank one: a single departure angle at the user.
    assert torch.linalg.matrix_rank(channels[0], rtol=1e-8) == 1
    assert float(channel.channel_nmse(data.weights).max()) == 0.0
    worse = channel.channel_nmse(1.1 * data.weights)
    torch.testing.assert_close(worse, torch.full((2,), 0.01, dtype=REAL))


def test_reflected_columns_depend_on_differences() -> None:
    """18 of the 18^2 columns of Omega^T (row-wise Khatri-Rao of A and conj A) differ."""
    from probkit.models.sbl.simulators import _steering

    surface = _steering(256, 18)
    columns = (surface[:, :, None] * surface.conj()[:, None, :]).flatten(1)  # (n, m): n slow
    for n in (0, 5, 17):
        for m in (0, 4, 11):
            torch.testing.assert_close(columns[:, 18 * n + m], columns[:, (m - n) % 18])

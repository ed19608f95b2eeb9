"""The jitter ladder, the checks and the log-space functions."""

from __future__ import annotations

import warnings

import mpmath
import pytest
import torch

from probkit.errors import DataError, NumericsWarning, ShapeError
from probkit.numerics import (
    available_memory,
    check_allocation,
    check_finite,
    ess_from_log_weights,
    lgamma_difference,
    log_gamma_kernel,
    log_softmax_weights,
    logmeanexp,
    safe_cholesky,
)


def _double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class TestSafeCholesky:
    def test_no_jitter_where_none_is_needed(self, generator: torch.Generator) -> None:
        a = torch.randn(3, 5, 5, generator=generator, dtype=torch.float64)
        a = a @ a.mT + 0.1 * torch.eye(5, dtype=torch.float64)
        L, jitter = safe_cholesky(a)
        assert (jitter == 0).all()
        assert torch.equal(L, torch.linalg.cholesky(a))

    def test_only_failing_elements_climb(self) -> None:
        good = torch.eye(3, dtype=torch.float64)
        # An eigenvalue of -5e-7 x mean diagonal: the rung 1e-6 is the first that mends it.
        bad = torch.diag(_double(1.5, 1.5, -5e-7))
        with pytest.warns(NumericsWarning, match="1 of 2 matrices; adding jitter") as caught:
            L, jitter = safe_cholesky(torch.stack([good, bad]))
        assert jitter[0] == 0
        assert jitter[1].item() == pytest.approx(1e-6 * bad.trace().item() / 3, rel=1e-12)
        assert len(caught) == 3  # 1e-8, 1e-7, 1e-6
        assert torch.equal(L[0], good)
        expected = bad + jitter[1] * torch.eye(3, dtype=torch.float64)
        assert torch.allclose(L[1] @ L[1].T, expected, rtol=0, atol=1e-14)

    def test_batch_equals_loop(self) -> None:
        batch = torch.stack(
            [torch.diag(_double(1.0, d)) for d in (1.0, -3e-8, -3e-7, 1e-12)]
        ).reshape(2, 2, 2, 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NumericsWarning)
            L, jitter = safe_cholesky(batch)
            for i in range(2):
                for j in range(2):
                    one, one_jitter = safe_cholesky(batch[i, j])
                    assert torch.equal(L[i, j], one)
                    assert torch.equal(jitter[i, j], one_jitter)

    def test_indefinite_matrix_is_an_error(self) -> None:
        with (
            pytest.raises(DataError, match="not positive definite, even with jitter 0.0001"),
            pytest.warns(NumericsWarning),
        ):
            safe_cholesky(torch.diag(_double(1.0, -1.0)))

    def test_gradient_with_and_without_jitter(self, generator: torch.Generator) -> None:
        a = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        a = (a @ a.T + torch.eye(3, dtype=torch.float64)).requires_grad_()

        def log_det(m: torch.Tensor) -> torch.Tensor:
            L, _ = safe_cholesky(0.5 * (m + m.mT))
            return L.diagonal(dim1=-2, dim2=-1).log().sum(-1)

        assert torch.autograd.gradcheck(log_det, (a,))
        singular = torch.ones(2, 2, dtype=torch.float64).requires_grad_()
        with pytest.warns(NumericsWarning):
            L, _ = safe_cholesky(singular - 1e-9 * torch.eye(2, dtype=torch.float64))
        L.sum().backward()
        assert singular.grad is not None and torch.isfinite(singular.grad).all()

    def test_bad_input(self) -> None:
        with pytest.raises(ShapeError, match=r"square matrices \[\*batch, n, n\], got \(2, 3\)"):
            safe_cholesky(torch.zeros(2, 3))
        with pytest.raises(DataError, match="nan at row 1, column 0"):
            safe_cholesky(torch.tensor([[1.0, 0.0], [float("nan"), 1.0]]))
        with pytest.raises(DataError, match="float32 or float64"):
            safe_cholesky(torch.eye(2, dtype=torch.float16))


class TestChecks:
    def test_names_place_and_label(self) -> None:
        x = torch.zeros(4, 3)
        x[2, 1] = float("inf")
        with pytest.raises(DataError, match="X must be finite, got inf at row 2, column 1"):
            check_finite(x, "X")
        with pytest.raises(DataError, match="row 2, column 'bmi'"):
            check_finite(x, "X", labels=["age", "bmi", "bp"])
        with pytest.raises(DataError, match="row 'c', column 1"):
            check_finite(x, "X", labels={"row": ["a", "b", "c", "d"]})
        with pytest.raises(DataError, match="y must be finite, got nan at row 1;"):
            check_finite(torch.tensor([0.0, float("nan")]), "y")
        with pytest.raises(DataError, match="batch 0, row 2, column 1"):
            check_finite(x[None], "X")

    def test_finite_values_pass_even_if_their_sum_overflows(self) -> None:
        check_finite(torch.full((3,), 1e308, dtype=torch.float64), "y")
        check_finite(torch.arange(3), "counts")
        check_finite(torch.zeros(0, 2), "X")

    def test_impossible_allocation(self) -> None:
        check_allocation(1, "a byte")
        with pytest.raises(DataError, match="kernel needs .* GiB on cpu, but .* are available"):
            check_allocation(available_memory() * 2, "kernel")


class TestLogSpace:
    def test_weights(self) -> None:
        log_w = _double(0.0, 1.0, -2.0)[:, None] + 1e4
        w = log_w.sub(1e4).exp()
        assert torch.allclose(log_softmax_weights(log_w, 0).exp(), w / w.sum(), rtol=1e-12)
        ess = ess_from_log_weights(log_w, 0)
        assert torch.allclose(ess, w.sum() ** 2 / (w**2).sum(), rtol=1e-11)
        assert torch.allclose(logmeanexp(log_w, 0), w.mean().log() + 1e4, rtol=1e-14)

    def test_weights_that_are_all_zero(self) -> None:
        with pytest.raises(DataError, match="log weights along dim 0"):
            log_softmax_weights(torch.full((3,), -torch.inf), 0)

    @pytest.mark.parametrize("a", [1e-3, 0.5, 3.0, 11.999, 12.0, 100.0, 1e8])
    @pytest.mark.parametrize("b", [0.0, 0.5, 2.0, 5000.5])
    def test_lgamma_difference(self, a: float, b: float) -> None:
        with mpmath.workdps(40):
            exact = mpmath.loggamma(mpmath.mpf(a) + b) - mpmath.loggamma(a)
            got = lgamma_difference(torch.tensor(a, dtype=torch.float64), b).item()
            assert abs(got - exact) <= 2e-15 * (1 + abs(exact))

    @pytest.mark.parametrize("a", [1e-3, 0.5, 11.999, 12.0, 1e4])
    @pytest.mark.parametrize("offset", [-2.0, -0.1, 0.0, 0.3])
    def test_log_gamma_kernel(self, a: float, offset: float) -> None:
        with mpmath.workdps(40):
            log_z = float(mpmath.log(a)) + offset
            exact = a * mpmath.mpf(log_z) - mpmath.exp(log_z) - mpmath.loggamma(a)
            got = log_gamma_kernel(
                torch.tensor(a, dtype=torch.float64), torch.tensor(log_z, dtype=torch.float64)
            ).item()
            # The rounding of log a and log z moves the result by a |expm1 offset| eps log z.
            shift = a * abs(mpmath.expm1(offset)) * 2.3e-16 * (1 + abs(log_z))
            assert abs(got - exact) <= 1e-15 * (1 + abs(exact)) + 2 * shift

    def test_gradients(self) -> None:
        a = _double(0.3, 5.0, 11.5, 12.5, 300.0).requires_grad_()
        b = _double(0.5, 1.0, 2.0, 3.0, 4.0).requires_grad_()
        assert torch.autograd.gradcheck(lgamma_difference, (a, b))
        z = _double(-1.0, 1.0, 2.0, 2.5, 5.0).requires_grad_()
        assert torch.autograd.gradcheck(log_gamma_kernel, (a, z))

"""The M-steps: fixed points, monotone evidence, and one-weight changes by brute force."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from probkit import infer
from probkit.errors import ConvergenceWarning
from probkit.models import EvidenceMaximization, KroneckerSBL, SparseRegression
from probkit.models.sbl.block import block_step, coupling_matrix
from probkit.models.sbl.e_step import dense_moments
from probkit.models.sbl.evidence_maximization import fast_start
from probkit.models.sbl.fast_marginal import best_changes, fast_passes
from probkit.models.sbl.kronecker_updates import (
    alternating_step,
    fix_scale,
    flat_variances,
    rank_one_step,
    relative_change,
)
from probkit.models.sbl.mode_products import outer
from probkit.models.sbl.pruning import prune, reduce
from probkit.models.sbl.simulators import simulate_kronecker

REAL = torch.float64


def plain(n: int, p: int, k: int, seed: int, *, dtype: torch.dtype = REAL, snr: float = 20.0):
    """H [n, p], x with k non-zeros, y, s2."""
    g = torch.Generator().manual_seed(seed)
    H = torch.randn(n, p, generator=g, dtype=dtype)
    x = torch.zeros(p, dtype=dtype)
    x[torch.randperm(p, generator=g)[:k]] = torch.randn(k, generator=g, dtype=dtype)
    field = H @ x
    s2 = float(field.abs().square().mean()) / 10 ** (snr / 10)
    return H, x, field + s2**0.5 * torch.randn(n, generator=g, dtype=dtype), s2


def worst_fall(trace: list[float]) -> float:
    """Largest relative fall of a trace."""
    values = torch.tensor(trace, dtype=REAL)
    return float(((values[:-1] - values[1:]) / values[:-1].abs()).max())


@pytest.mark.parametrize("dtype", [REAL, torch.complex128])
@pytest.mark.parametrize("update", ["em", "mm"])
def test_plain_monotone(update: str, dtype: torch.dtype) -> None:
    H, _, y, s2 = plain(20, 40, 4, 0, dtype=dtype)
    fit = EvidenceMaximization(max_iter=60, tolerance=1e-9, prune=None)
    with pytest.warns(UserWarning, match="did not converge"):
        post = infer(SparseRegression(H, noise_var=s2, update=update), y, fit, rng=0)
    trace = post.attrs["evidence_trace"]
    assert len(trace) == 60
    assert worst_fall(trace) <= 1e-9


@pytest.mark.parametrize("noise", [None, 0.02])
@pytest.mark.parametrize("is_complex", [False, True])
def test_alternating_monotone(noise: float | None, is_complex: bool) -> None:
    data = simulate_kronecker(
        2, sizes=(6, 7, 5), data_sizes=(4, 5, 4), nonzeros=2, is_complex=is_complex, rng=1
    )
    fit = EvidenceMaximization(max_iter=40, tolerance=1e-10, prune=None)
    for k in range(2):
        model = KroneckerSBL([f[k] for f in data.factors], noise_var=noise, update="am")
        with pytest.warns(UserWarning):
            post = infer(model, data.y[k], fit, rng=0)
        assert worst_fall(post.attrs["evidence_trace"]) <= 1e-9


def test_the_check_of_monotony_catches_a_wrong_step() -> None:
    """A step that halves the right answer lowers the evidence somewhere."""
    from probkit.models.sbl import evidence_maximization as module

    H, _, y, s2 = plain(20, 40, 4, 0)
    right = module._UPDATES["em"]
    wrong = {**module._UPDATES, "em": lambda m, parts: [0.5 * right(m, parts)[0]]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_UPDATES", wrong)
        fit = EvidenceMaximization(max_iter=60, prune=None)
        post = infer(SparseRegression(H, noise_var=s2), y, fit, rng=0)
    assert worst_fall(post.attrs["evidence_trace"]) > 1e-6


@pytest.mark.parametrize("step", [alternating_step, rank_one_step])
def test_kronecker_moments_are_returned(step) -> None:
    """If T is a positive Kronecker product, both steps return it."""
    g = torch.Generator().manual_seed(2)
    parts = [torch.rand(3, n, generator=g, dtype=REAL) + 0.1 for n in (4, 6, 5)]
    start = [part.expand(3, -1) for part in flat_variances((4, 6, 5), parts[0])]
    found = step(outer(parts), start)
    torch.testing.assert_close(outer(found), outer(parts), rtol=1e-10, atol=1e-10)


def test_alternating_step_lowers_its_objective() -> None:
    g = torch.Generator().manual_seed(3)
    moment = torch.rand(4, 5, 6, generator=g, dtype=REAL) ** 3 + 1e-3
    parts = flat_variances((4, 5, 6), moment)

    def objective(variances: list[Tensor]) -> float:
        full = outer(variances)
        return float((full.log() + moment / full).sum())

    values = [objective(parts)]
    for _ in range(5):
        parts = alternating_step(moment, parts, cycles=1)
        values.append(objective(parts))
    assert all(b <= a + 1e-9 for a, b in zip(values, values[1:], strict=False))
    # A stationary point: no small change of one factor lowers it.
    parts = alternating_step(moment, parts, cycles=500, tolerance=1e-12)
    best = objective(parts)
    for mode in range(3):
        for scale in (0.99, 1.01):
            moved = list(parts)
            moved[mode] = parts[mode].clone()
            moved[mode][0] *= scale
            assert objective(moved) >= best


def test_rank_one_step_projects() -> None:
    """With two modes: the best rank-one approximation, by the singular value decomposition."""
    g = torch.Generator().manual_seed(4)
    moment = torch.rand(5, 8, generator=g, dtype=REAL)
    u, s, vh = torch.linalg.svd(moment)
    expected = s[0] * torch.outer(u[:, 0], vh[0])
    found = rank_one_step(moment, flat_variances((5, 8), moment))
    torch.testing.assert_close(outer(found), expected)
    found = rank_one_step(moment.mT.contiguous(), flat_variances((8, 5), moment))
    torch.testing.assert_close(outer(found), expected.mT)


def test_scale_convention_and_change() -> None:
    g = torch.Generator().manual_seed(5)
    parts = [torch.rand(n, generator=g, dtype=REAL) for n in (3, 4, 5)]
    fixed = fix_scale(parts)
    torch.testing.assert_close(outer(fixed), outer(parts))
    assert [float(part.norm()) for part in fixed[:2]] == pytest.approx([1.0, 1.0])
    other = [part + 0.01 for part in parts]
    expected = (outer(other) - outer(parts)).norm() / outer(parts).norm()
    torch.testing.assert_close(relative_change(other, parts), expected)


def test_pruned_entries_stay_zero_and_do_not_divide() -> None:
    g = torch.Generator().manual_seed(6)
    moment = torch.rand(4, 5, generator=g, dtype=REAL)
    parts = [torch.tensor([1.0, 0, 1, 0], dtype=REAL), torch.ones(5, dtype=REAL)]
    moment[1], moment[3] = 0, 0
    for step in (alternating_step, rank_one_step):
        found = step(moment, parts)
        assert bool(torch.isfinite(torch.cat(found)).all())
        assert found[0][[1, 3]].tolist() == [0, 0]
        torch.testing.assert_close(
            step(moment[[0, 2]], [torch.ones(2, dtype=REAL), parts[1]])[1], found[1]
        )


def test_pruning_and_reduction() -> None:
    variance = torch.tensor([[1.0, 1e-4, 0.5], [2.0, 1e-13, 1e-3]], dtype=REAL)
    assert prune([variance], 1e-3)[0].tolist() == [[1.0, 0.0, 0.5], [2.0, 0.0, 0.0]]
    assert prune([variance], 0.0)[0][1].tolist() == [2.0, 0.0, 1e-3]
    reduction = reduce(prune([variance], 1e-3))
    kept = reduction.columns([variance])
    assert kept[0].tolist() == [[1.0, 0.5], [2.0, 1e-3]]
    assert reduction.spread(kept)[0].tolist() == [[1.0, 0.0, 0.5], [2.0, 0.0, 1e-3]]


# ------------------------------------------------------------------- one weight at a time


def test_best_changes_are_the_best_on_a_grid() -> None:
    """The evidence as a function of one variance, by fresh E-steps."""
    H, _, y, s2 = plain(12, 8, 3, 7, snr=10.0)
    g = torch.Generator().manual_seed(8)
    variance = torch.rand(8, generator=g, dtype=REAL)
    variance[[1, 4]] = 0.0
    noise = torch.tensor(s2, dtype=REAL)
    moments = dense_moments(H, variance, noise, y[None])
    best, gain = best_changes(variance, moments.leverage, moments.projection_square(), 0.5)
    for j in range(8):

        def evidence(value: float, j: int = j) -> float:
            changed = variance.clone()
            changed[j] = value
            return float(dense_moments(H, changed, noise, y[None]).log_evidence)

        highest = evidence(float(best[j]))
        assert highest - float(moments.log_evidence) == pytest.approx(float(gain[j]), abs=1e-8)
        grid = [0.0, *torch.logspace(-6, 3, 60).tolist()]
        assert all(evidence(value) <= highest + 1e-9 for value in grid)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
@pytest.mark.parametrize("dtype", [REAL, torch.complex128])
def test_rank_one_updates_do_not_drift(shape: tuple[int, int], dtype: torch.dtype) -> None:
    n, p = shape
    H, _, y, s2 = plain(n, p, 4, 9, dtype=dtype)
    noise = torch.tensor([s2], dtype=REAL)
    start = fast_start(H, torch.zeros(1, p, dtype=REAL), noise, y[None, None])
    weight = 1.0 if dtype.is_complex else 0.5
    end, done = fast_passes(H, start, changes=40, tolerance=1e-6, weight=weight)
    assert bool(done.all())
    fresh = dense_moments(H, end.variance[0], noise[0], y[None])
    torch.testing.assert_close(end.leverage[0], fresh.leverage, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(end.projection[0], fresh.projection, rtol=1e-7, atol=1e-7)
    empty = dense_moments(H, torch.zeros(p, dtype=REAL), noise[0], y[None])
    assert fresh.log_evidence > empty.log_evidence


def test_mackay_mm_and_fast_meet() -> None:
    """n = 100, p = 300, ten non-zeros, known noise: one evidence within 0.5; EM is still below."""
    H, _, y, s2 = plain(100, 300, 10, 1)
    reached = {}
    for update in ("mackay", "mm", "fast", "em"):
        fit = EvidenceMaximization(max_iter=300, tolerance=1e-6, prune=None)
        model = SparseRegression(H, noise_var=s2, update=update)
        with warnings.catch_warnings():  # EM, and the last digits of MM, need more steps
            warnings.simplefilter("ignore", ConvergenceWarning)
            reached[update] = float(infer(model, y, fit, rng=0).log_evidence.value)
    three = [reached[update] for update in ("mackay", "mm", "fast")]
    assert max(three) - min(three) <= 0.5, reached
    assert reached["em"] <= max(three), reached


# ------------------------------------------------------------------- block sparsity


def test_coupled_modes_lift_neighbours() -> None:
    moment = torch.full((5, 4), 1e-6, dtype=REAL)
    moment[2] = 1.0
    start = flat_variances((5, 4), moment)
    places = [torch.arange(5), torch.arange(4)]
    found = block_step(moment[None], [p[None] for p in start], (0.5, 0.0), places)
    first = found[0][0] / found[0][0].max()
    torch.testing.assert_close(
        first, torch.tensor([0.0, 0.5, 1.0, 0.5, 0.0], dtype=REAL), rtol=0, atol=2e-5
    )
    uncoupled = block_step(moment[None], [p[None] for p in start], (0.0, 0.0), places)
    expected = alternating_step(moment[None], [p[None] for p in start])
    torch.testing.assert_close(outer(uncoupled), outer(expected), rtol=1e-3, atol=1e-9)


def test_coupling_is_clipped_at_the_ends() -> None:
    matrix = coupling_matrix(torch.arange(3), 0.8)
    assert matrix.tolist() == [[1.0, 0.8, 0.0], [0.8, 1.0, 0.8], [0.0, 0.8, 1.0]]

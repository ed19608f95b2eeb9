"""Messages of multilinear functions, against sums written out."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from probkit.models.funbat.contraction import (
    Core,
    core_sums,
    function_moments,
    mode_messages,
    table,
)
from probkit.models.funbat.pairs import fold, outer_pairs, pack, pairs_of, unfold, unpack

F64 = torch.float64
CASES = [((2, 3, 2), True), ((3, 1, 2, 2), True), ((4,), True), ((3, 3, 3), False), ((2,), False)]
COPIES, ENTRIES, POINTS = 2, 9, 4


def kron(parts: list[Tensor]) -> Tensor:
    """Kronecker product, the first part slowest."""
    return functools.reduce(torch.kron, [part.contiguous() for part in parts])


class Problem:
    """Random moments of every mode and of the core."""

    def __init__(self, ranks: tuple[int, ...], has_core: bool, generator: torch.Generator) -> None:
        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=F64)

        self.ranks, self.modes = ranks, range(len(ranks))
        self.means = [randn(COPIES, POINTS, r) for r in ranks]
        roots = [randn(COPIES, POINTS, r, r) for r in ranks]
        self.covs = [root @ root.mT for root in roots]
        self.tables = [table(m, pack(V)) for m, V in zip(self.means, self.covs, strict=True)]
        self.index = [torch.randint(POINTS, (ENTRIES,), generator=generator) for _ in ranks]
        self.precision = torch.rand(ENTRIES, COPIES, generator=generator, dtype=F64)
        self.linear = randn(ENTRIES, COPIES)
        D = math.prod(ranks)
        if has_core:
            self.w = randn(COPIES, D)
            root = randn(COPIES, D, D)
            cov = root @ root.mT
            self.core: Core | None = Core.of(self.w, cov, ranks)
        else:
            self.core = None
            superdiagonal = torch.zeros(ranks, dtype=F64)
            for i in range(ranks[0]):
                superdiagonal[(i,) * len(ranks)] = 1.0
            self.w = superdiagonal.flatten().expand(COPIES, D)
            cov = torch.zeros(COPIES, D, D, dtype=F64)
        self.ww = cov + self.w.unsqueeze(-1) * self.w.unsqueeze(-2)

    def moments(self, k: int, b: int, n: int) -> tuple[Tensor, Tensor]:
        """E[u] and E[u u'] of mode k at entry n."""
        m = self.means[k][b, self.index[k][n]]
        return m, self.covs[k][b, self.index[k][n]] + torch.outer(m, m)


@pytest.mark.parametrize(("ranks", "has_core"), CASES)
def test_messages_are_the_sums_written_out(
    ranks: tuple[int, ...], has_core: bool, generator: torch.Generator
) -> None:
    p = Problem(ranks, has_core, generator)
    one, K = torch.ones(1, dtype=F64), len(ranks)
    for k in p.modes:
        eta, lam = mode_messages(p.tables, p.index, k, p.core, ranks, p.precision, p.linear)
        expected_eta = torch.zeros_like(eta)
        expected = eta.new_zeros(COPIES, POINTS, ranks[k], ranks[k])
        for b in range(COPIES):
            W = p.w[b].reshape(ranks).movedim(k, 0).reshape(ranks[k], -1)
            rest = W.shape[1]
            WW = p.ww[b].reshape(*ranks, *ranks).movedim((k, K + k), (0, 1))
            WW = WW.reshape(ranks[k], ranks[k], rest, rest)
            for n in range(ENTRIES):
                pairs = [p.moments(j, b, n) for j in p.modes if j != k]
                z = kron([m for m, _ in pairs] or [one])
                S = kron([s for _, s in pairs] or [one[None]])
                at = p.index[k][n]
                expected_eta[b, at] += p.linear[n, b] * W @ z
                expected[b, at] += p.precision[n, b] * torch.einsum("ijpq,pq->ij", WW, S)
        torch.testing.assert_close(eta, expected_eta, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(unpack(lam, ranks[k]), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("ranks", "has_core"), CASES)
def test_moments_of_the_function_and_sums_for_the_core(
    ranks: tuple[int, ...], has_core: bool, generator: torch.Generator
) -> None:
    p = Problem(ranks, has_core, generator)
    mean, second = function_moments(p.tables, p.index, p.core, ranks)
    eta, lam = core_sums(p.tables, p.index, ranks, p.precision, p.linear)
    expected_eta, expected = torch.zeros_like(eta), torch.zeros_like(lam)
    for b in range(COPIES):
        for n in range(ENTRIES):
            pairs = [p.moments(k, b, n) for k in p.modes]
            z, S = kron([m for m, _ in pairs]), kron([s for _, s in pairs])
            assert float(mean[b, n]) == pytest.approx(float(z @ p.w[b]), rel=1e-10, abs=1e-10)
            assert float(second[b, n]) == pytest.approx(float((S * p.ww[b]).sum()), rel=1e-10)
            expected_eta[b] += p.linear[n, b] * z
            expected[b] += p.precision[n, b] * S
    torch.testing.assert_close(eta, expected_eta, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lam, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ranks", [(2, 3, 2), (3, 1, 2, 2)])
def test_every_mode_sees_the_same_function(
    ranks: tuple[int, ...], generator: torch.Generator
) -> None:
    """<w, kron of u> = u^k . a for every mode; unfolding the core in reverse order breaks it."""
    vectors = [torch.randn(r, generator=generator, dtype=F64) for r in ranks]
    w = torch.randn(math.prod(ranks), generator=generator, dtype=F64)
    value = float(w @ kron(vectors))
    tables = [table(u.reshape(1, 1, -1), 0 * outer_pairs(u).reshape(1, 1, -1)) for u in vectors]
    index = [torch.zeros(1, dtype=torch.long)] * len(ranks)
    core = Core.of(w[None], torch.zeros(1, len(w), len(w), dtype=F64), ranks)
    ones = torch.ones(1, 1, dtype=F64)
    for k, u in enumerate(vectors):
        a, aa = mode_messages(tables, index, k, core, ranks, ones, ones)
        assert float(a[0, 0] @ u) == pytest.approx(value, rel=1e-12)
        assert float(u @ unpack(aa, ranks[k])[0, 0] @ u) == pytest.approx(value**2, rel=1e-12)
    reverse = w.reshape(ranks[::-1]).permute(*reversed(range(len(ranks)))).reshape(1, -1)
    wrong = Core.of(reverse, torch.zeros(1, len(w), len(w), dtype=F64), ranks)
    a, _ = mode_messages(tables, index, 0, wrong, ranks, ones, ones)
    assert abs(float(a[0, 0] @ vectors[0]) - value) > 1e-2


def test_chunks_do_not_matter(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from probkit.models.funbat import contraction

    p = Problem((2, 3, 2), True, generator)

    def everything() -> list[Tensor]:
        return [
            *mode_messages(p.tables, p.index, 1, p.core, p.ranks, p.precision, p.linear),
            *core_sums(p.tables, p.index, p.ranks, p.precision, p.linear),
            *function_moments(p.tables, p.index, p.core, p.ranks),
        ]

    whole = everything()
    monkeypatch.setattr(contraction, "_CHUNK_NUMBERS", 30)
    for a, b in zip(everything(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_pairs_stand_for_symmetric_matrices(generator: torch.Generator) -> None:
    ranks = (2, 3)
    root = torch.randn(6, 6, generator=generator, dtype=F64)
    M = root @ root.mT
    S = []
    for r in ranks:
        half = torch.randn(r, r, generator=generator, dtype=F64)
        S.append(half @ half.mT)
        assert torch.equal(unpack(pack(S[-1]), r), S[-1])
        assert int(pairs_of(r).weight.sum()) == r * r
    folded = fold(M, ranks)
    packed = pack(S[0])[:, None] * pack(S[1])[None, :]
    full = torch.kron(*S)
    assert float((folded * packed).sum()) == pytest.approx(float((M * full).sum()), rel=1e-12)
    torch.testing.assert_close(unfold(packed, ranks), full, rtol=1e-12, atol=1e-12)

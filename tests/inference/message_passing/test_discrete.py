"""Discrete chains against the sum over all paths, and each check against a wrong variant."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.inference.message_passing import (
    HMMSmoother,
    check_chain,
    check_evidence,
    discrete,
    discrete_blocks,
    discrete_log,
    discrete_scaled,
    hmm_filter,
    hmm_log_evidence,
    hmm_sample_paths,
    hmm_smoother,
    hmm_viterbi,
    lengths_from_mask,
)
from probkit.inference.message_passing import (
    chain as chain_module,
)

F64 = torch.float64
METHODS = ["loop", "scan"]


class Inputs(NamedTuple):
    log_initial: Tensor
    log_transition: Tensor
    log_emission: Tensor


def random_inputs(
    generator: torch.Generator,
    batch: tuple[int, ...] = (),
    steps: int = 4,
    states: int = 3,
    *,
    own: bool = False,
    varying: bool = False,
    zeros: bool = False,
) -> Inputs:
    """A chain with random probabilities; ``own``: a transition matrix for each sequence."""

    def simplex(*shape: int) -> Tensor:
        rows = torch.rand(*shape, generator=generator, dtype=F64) + 0.05
        return rows / rows.sum(-1, keepdim=True)

    lead = batch if own else (1,) * len(batch) if varying else ()
    core = (steps - 1, states, states) if varying else (states, states)
    transition = simplex(*lead, *core)
    if zeros:  # left to right
        transition = transition.triu()
        transition = transition / transition.sum(-1, keepdim=True)
    emission = 2 * torch.randn(*batch, steps, states, generator=generator, dtype=F64)
    return Inputs(simplex(*batch, states).log(), transition.log(), emission)


class Exact(NamedTuple):
    log_evidence: float
    increments: Tensor
    filtered: Tensor
    predicted: Tensor
    smoothed: Tensor
    pairs: Tensor
    path: tuple[int, ...]
    log_joint: float
    law: dict[tuple[int, ...], float]


def brute_force(log_initial: Tensor, log_transition: Tensor, log_emission: Tensor) -> Exact:
    """Everything by the sum over all K^T paths of one sequence."""
    steps, states = log_emission.shape
    pi, A, b = log_initial.exp(), log_transition.exp(), log_emission.exp()
    A = A.expand(steps - 1, states, states)

    def weight(path: tuple[int, ...], upto: int) -> float:
        """p(z_1, ..., z_T, y_1, ..., y_upto)."""
        value = pi[path[0]]
        for t in range(1, len(path)):
            value = value * A[t - 1, path[t - 1], path[t]]
        for t in range(upto):
            value = value * b[t, path[t]]
        return float(value)

    paths = list(itertools.product(range(states), repeat=steps))
    law = {path: weight(path, steps) for path in paths}
    filtered, predicted = (
        torch.zeros(steps, states, dtype=F64),
        torch.zeros(steps, states, dtype=F64),
    )
    smoothed, pairs = torch.zeros_like(filtered), torch.zeros(steps - 1, states, states, dtype=F64)
    totals = [1.0]
    for t in range(steps):
        for path in itertools.product(range(states), repeat=t + 1):
            filtered[t, path[-1]] += weight(path, t + 1)
            predicted[t, path[-1]] += weight(path, t)
        totals.append(float(filtered[t].sum()))
        filtered[t] /= filtered[t].sum()
        predicted[t] /= predicted[t].sum()
    for path, w in law.items():
        for t in range(steps):
            smoothed[t, path[t]] += w / totals[-1]
        for t in range(steps - 1):
            pairs[t, path[t], path[t + 1]] += w / totals[-1]
    best = max(law, key=lambda path: law[path])
    increments = torch.tensor(totals, dtype=F64).log().diff()
    law = {path: w / totals[-1] for path, w in law.items()}
    return Exact(
        math.log(totals[-1]),
        increments,
        filtered,
        predicted,
        smoothed,
        pairs,
        best,
        math.log(max(weight(p, steps) for p in paths)),
        law,
    )


def assert_equal(value: Tensor, expected: Tensor | float, tolerance: float = 1e-10) -> None:
    expected = torch.as_tensor(expected, dtype=value.dtype)
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def caught(check: Callable[[], Any]) -> bool:
    """Whether a check fails."""
    try:
        check()
    except AssertionError:
        return True
    return False


KINDS = {
    "plain": {},
    "left to right": {"zeros": True},
    "varying": {"varying": True},
}


# --------------------------------------------------------------------------- brute force


def check_filter(inputs: Inputs, method: str) -> None:
    exact = brute_force(*inputs)
    result = hmm_filter(*inputs, method=method)  # type: ignore[arg-type]
    assert_equal(result.log_evidence, exact.log_evidence)
    assert_equal(result.log_increment, exact.increments)
    assert_equal(result.filtered, exact.filtered)
    assert_equal(result.predicted, exact.predicted)


def check_smoother(inputs: Inputs, method: str) -> None:
    exact = brute_force(*inputs)
    result = hmm_smoother(*inputs, pairs=True, method=method)  # type: ignore[arg-type]
    assert_equal(result.log_evidence, exact.log_evidence)
    assert_equal(result.log_increment, exact.increments)
    assert_equal(result.smoothed, exact.smoothed)
    assert result.pairs is not None
    assert_equal(result.pairs, exact.pairs)
    assert_equal(result.pair_sum, exact.pairs.sum(0))
    assert_equal(hmm_smoother(*inputs, method=method).pair_sum, exact.pairs.sum(0))  # type: ignore[arg-type]
    assert_equal(hmm_log_evidence(*inputs, method=method), exact.log_evidence)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_filter_and_smoother_equal_the_sum_over_paths(
    kind: str, method: str, generator: torch.Generator
) -> None:
    for _ in range(3):
        inputs = random_inputs(generator, **KINDS[kind])  # type: ignore[arg-type]
        check_filter(inputs, method)
        check_smoother(inputs, method)


@pytest.mark.parametrize("kind", KINDS)
def test_differentiable_paths_equal_the_sum_over_paths(
    kind: str, generator: torch.Generator
) -> None:
    inputs = random_inputs(generator, **KINDS[kind])  # type: ignore[arg-type]
    tracked = Inputs(*(x.clone().requires_grad_() for x in inputs))
    exact = brute_force(*inputs)
    for method in METHODS:
        result = hmm_smoother(*tracked, pairs=True, method=method)  # type: ignore[arg-type]
        assert result.smoothed.requires_grad
        assert_equal(result.smoothed.detach(), exact.smoothed)
        assert result.pairs is not None
        assert_equal(result.pairs.detach(), exact.pairs)
        filtered = hmm_filter(*tracked, method=method)  # type: ignore[arg-type]
        assert_equal(filtered.filtered.detach(), exact.filtered)
        assert_equal(filtered.predicted.detach(), exact.predicted)


@pytest.mark.parametrize("kind", KINDS)
def test_viterbi_equals_the_best_of_all_paths(kind: str, generator: torch.Generator) -> None:
    for _ in range(5):
        inputs = random_inputs(generator, **KINDS[kind])  # type: ignore[arg-type]
        exact = brute_force(*inputs)
        result = hmm_viterbi(*inputs)
        assert tuple(result.path.tolist()) == exact.path
        assert_equal(result.log_joint, exact.log_joint)


def path_chi_square(inputs: Inputs, paths: Tensor, law: dict[tuple[int, ...], float]) -> float:
    """z-score of the chi-square statistic of drawn paths [n, T] against their law."""
    n = len(paths)
    counts = {path: 0 for path in law}
    for path in paths.tolist():
        counts[tuple(path)] += 1
    likely = [p for p, prob in law.items() if n * prob >= 5]
    assert all(counts[p] == 0 for p, prob in law.items() if prob == 0.0)
    rest = 1 - sum(law[p] for p in likely)
    cells = [(counts[p], n * law[p]) for p in likely]
    if n * rest >= 5:
        cells.append((n - sum(c for c, _ in cells), n * rest))
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    freedom = len(cells) - 1
    # Wilson & Hilferty: the cube root of chi-square / freedom is close to normal.
    return float(
        ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_paths_follow_their_law(kind: str, generator: torch.Generator) -> None:
    inputs = random_inputs(generator, **KINDS[kind])  # type: ignore[arg-type]
    law = brute_force(*inputs).law
    paths = hmm_sample_paths(*inputs, 20_000, rng=1)
    assert path_chi_square(inputs, paths, law) < 4.0
    # the check sees draws from the marginals alone, without the dependence between steps
    marginal = hmm_smoother(*inputs).smoothed
    steps = [
        torch.multinomial(row, len(paths), replacement=True, generator=generator)
        for row in marginal
    ]
    if kind == "left to right":
        with pytest.raises(AssertionError):
            path_chi_square(inputs, torch.stack(steps, -1), law)
    else:
        assert path_chi_square(inputs, torch.stack(steps, -1), law) > 4.0


def test_same_seed_same_paths(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (2,), 5)
    first = hmm_sample_paths(*inputs, 7, rng=3)
    assert first.shape == (7, 2, 5)
    assert torch.equal(first, hmm_sample_paths(*inputs, 7, rng=3))
    assert not torch.equal(first, hmm_sample_paths(*inputs, 7, rng=4))


def test_tiny_autoregressive_example() -> None:
    # y = (.5, 1, -.3, .8) after a first value .2, two states with mean c + phi y_(t-1); enumerated
    y = torch.tensor([0.2, 0.5, 1.0, -0.3, 0.8], dtype=F64)
    c, phi, var = (torch.tensor(v, dtype=F64) for v in ([0.1, -0.2], [0.9, -0.5], [0.25, 0.5]))
    residual = y[1:, None] - c - phi * y[:-1, None]
    emission = -0.5 * (residual**2 / var + var.log() + math.log(2 * math.pi))
    initial = torch.tensor([0.6, 0.4], dtype=F64).log()
    transition = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=F64).log()
    plain = hmm_smoother(initial, transition, emission)
    assert_equal(plain.log_evidence, -4.809260618573549, 1e-13)
    assert hmm_viterbi(initial, transition, emission).path.tolist() == [0, 0, 1, 1]
    plausibility = torch.tensor([[1, 0.3], [1, 1], [0.2, 1], [0.5, 0]], dtype=F64)
    partial = hmm_smoother(initial, transition, emission + plausibility.log())
    assert_equal(partial.log_evidence, -7.904929337111473, 1e-13)
    gamma = torch.tensor([0.9550970065, 0.8598561014, 0.0740244351, 1.0], dtype=F64)
    assert_equal(partial.smoothed[:, 0], gamma, 1e-9)
    counts = [[0.9868135917, 0.9021639513], [0.9470669448, 0.1639555123]]
    assert_equal(partial.pair_sum, torch.tensor(counts, dtype=F64), 1e-9)
    best = hmm_viterbi(initial, transition, emission + plausibility.log())
    assert best.path.tolist() == [0, 0, 1, 0]
    assert_equal(best.log_joint, -8.167397465883589, 1e-13)


# --------------------------------------------------------------------------- the checks' own test


def test_brute_force_catches_a_transposed_transition(generator: torch.Generator) -> None:
    inputs = random_inputs(generator)
    exact = brute_force(*inputs)
    wrong = hmm_smoother(inputs.log_initial, inputs.log_transition.T, inputs.log_emission)
    assert caught(lambda: assert_equal(wrong.smoothed, exact.smoothed))
    assert caught(lambda: assert_equal(wrong.log_evidence, exact.log_evidence))


def test_brute_force_catches_a_transition_before_the_first_observation(
    generator: torch.Generator,
) -> None:
    inputs = random_inputs(generator)
    late = (inputs.log_initial.exp() @ inputs.log_transition.exp()).log()
    wrong = hmm_filter(late, inputs.log_transition, inputs.log_emission)
    assert caught(lambda: assert_equal(wrong.filtered, brute_force(*inputs).filtered))


def test_brute_force_catches_shifted_time_varying_transitions(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, varying=True)
    shifted = inputs._replace(log_transition=inputs.log_transition.roll(1, 0))
    exact = brute_force(*inputs)
    assert caught(lambda: assert_equal(hmm_filter(*shifted).filtered, exact.filtered))
    assert caught(lambda: assert_equal(hmm_smoother(*shifted).smoothed, exact.smoothed))


def test_brute_force_catches_a_missing_backward_message(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_inputs(generator)
    check_smoother(inputs, "loop")
    whole = discrete_scaled.recursions

    def without_backward(*arguments: Any, both: bool) -> tuple[Tensor, Tensor, Tensor]:
        messages, products, increment = whole(*arguments, both=both)
        products[:, products.shape[1] // 2 :] = 1.0
        return messages, products, increment

    monkeypatch.setattr(discrete_scaled, "recursions", without_backward)
    assert caught(lambda: check_smoother(inputs, "loop"))


@pytest.mark.parametrize("method", METHODS)
def test_brute_force_catches_an_emission_left_out_of_the_backward_message(
    method: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs(*(x.requires_grad_() for x in random_inputs(generator)))
    name = f"{method}_messages"
    right = getattr(discrete_log, name)

    def wrong(chain: Any, **_: Any) -> discrete_log.LogMessages:
        return right(chain)._replace(
            backward=right(chain._replace(log_emission=chain.log_emission.roll(1, -2))).backward
        )

    exact = brute_force(*(x.detach() for x in inputs))

    def check() -> None:
        smoothed = hmm_smoother(*inputs, method=method).smoothed  # type: ignore[arg-type]
        assert_equal(smoothed.detach(), exact.smoothed)

    check()
    monkeypatch.setattr(discrete, name, wrong)
    assert caught(check)


# --------------------------------------------------------------------------- padding and batches


LENGTHS = torch.tensor([7, 1, 3, 2, 6])


def check_padding(inputs: Inputs, method: str, padding: float) -> None:
    """Results of padded sequences equal those of each sequence alone."""
    emission = inputs.log_emission.clone()
    for row, length in zip(emission, LENGTHS.tolist(), strict=True):
        row[length:] = padding
    padded = inputs._replace(log_emission=emission)
    smoothed = hmm_smoother(*padded, lengths=LENGTHS, pairs=True, method=method)  # type: ignore[arg-type]
    filtered = hmm_filter(*padded, lengths=LENGTHS, method=method)  # type: ignore[arg-type]
    best = hmm_viterbi(*padded, lengths=LENGTHS)
    assert smoothed.pairs is not None
    for i, length in enumerate(LENGTHS.tolist()):
        varying = inputs.log_transition.ndim == 4
        transition = inputs.log_transition
        if varying:
            transition = transition[i if len(transition) > 1 else 0][: length - 1]
        elif transition.ndim == 3:
            transition = transition[i]
        alone = Inputs(inputs.log_initial[i], transition, inputs.log_emission[i, :length])
        expected = hmm_smoother(*alone, pairs=True)
        assert_equal(smoothed.log_evidence[i], expected.log_evidence)
        assert_equal(smoothed.log_increment[i, :length], expected.log_increment)
        assert_equal(smoothed.smoothed[i, :length], expected.smoothed)
        assert_equal(smoothed.pair_sum[i], expected.pair_sum)
        assert expected.pairs is not None
        assert_equal(smoothed.pairs[i, : length - 1], expected.pairs)
        for tail in (smoothed.smoothed, smoothed.log_increment, filtered.filtered):
            assert not tail[i, length:].any()
        assert not smoothed.pairs[i, length - 1 :].any()
        single = hmm_filter(*alone)
        assert_equal(filtered.filtered[i, :length], single.filtered)
        assert_equal(filtered.predicted[i, :length], single.predicted)
        assert_equal(filtered.log_evidence[i], single.log_evidence)
        path = hmm_viterbi(*alone)
        assert_equal(best.log_joint[i], path.log_joint)
        assert torch.equal(best.path[i, :length], path.path)
        assert (best.path[i, length:] == -1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("padding", [1000.0, -math.inf, math.nan])
@pytest.mark.parametrize("kind", ["shared", "own", "left to right", "varying", "own varying"])
def test_padding_changes_nothing(
    kind: str, padding: float, method: str, generator: torch.Generator
) -> None:
    inputs = random_inputs(
        generator,
        (5,),
        7,
        own="own" in kind,
        varying="varying" in kind,
        zeros=kind == "left to right",
    )
    check_padding(inputs, method, padding)


@pytest.mark.parametrize("method", METHODS)
def test_padding_check_catches_ignored_lengths(
    method: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = random_inputs(generator, (5,), 7)
    check_padding(inputs, method, 0.0)
    monkeypatch.setattr(
        chain_module, "_check_lengths", lambda lengths, batch, steps: lengths * 0 + steps
    )
    assert caught(lambda: check_padding(inputs, method, 0.0))


def test_drawn_paths_end_with_their_sequence(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (5,), 7)
    paths = hmm_sample_paths(*inputs, 4000, rng=0, lengths=LENGTHS)
    smoothed = hmm_smoother(*inputs, lengths=LENGTHS).smoothed
    for i, length in enumerate(LENGTHS.tolist()):
        assert (paths[:, i, length:] == -1).all()
        share = torch.nn.functional.one_hot(paths[:, i, :length], 3).double().mean(0)
        error = (smoothed[i, :length] * (1 - smoothed[i, :length]) / 4000).sqrt()
        assert ((share - smoothed[i, :length]).abs() <= 4.5 * error + 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["shared", "grouped", "own", "varying", "own varying"])
def test_batch_equals_loop(kind: str, method: str, generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (3, 2), 11, own="own" in kind, varying="varying" in kind)
    if kind == "grouped":  # one transition for each of three groups of two sequences
        inputs = inputs._replace(
            log_transition=random_inputs(generator, (3, 1), 11, own=True).log_transition
        )
    results = hmm_smoother(*inputs, pairs=True, method=method)  # type: ignore[arg-type]
    best = hmm_viterbi(*inputs)
    core = 3 if "varying" in kind else 2
    transition = inputs.log_transition.expand(3, 2, *inputs.log_transition.shape[-core:])
    for i, j in itertools.product(range(3), range(2)):
        alone = (inputs.log_initial[i, j], transition[i, j], inputs.log_emission[i, j])
        expected = hmm_smoother(*alone, pairs=True)
        for name, value, reference in zip(HMMSmoother._fields, results, expected, strict=True):
            assert value is not None and reference is not None, name
            assert_equal(value[i, j], reference, 1e-12)
        assert torch.equal(best.path[i, j], hmm_viterbi(*alone).path)


# --------------------------------------------------------------------------- loop against scan


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 100, 1000])
def test_loop_equals_scan(steps: int, zeros: bool, generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (2,), steps, 4, zeros=zeros)
    loop = hmm_smoother(*inputs, pairs=True, method="loop")
    scan = hmm_smoother(*inputs, pairs=True, method="scan")
    for a, b in zip(loop, scan, strict=True):
        assert a is not None and b is not None
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    loop_filter, scan_filter = (hmm_filter(*inputs, method=m) for m in ("loop", "scan"))
    for a, b in zip(loop_filter, scan_filter, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", ["shared", "grouped", "own"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 16, 17, 30, 1000])
def test_blocks_equal_the_loop(
    steps: int, kind: str, zeros: bool, generator: torch.Generator
) -> None:
    inputs = random_inputs(generator, (2, 3), steps, 4, own=kind == "own", zeros=zeros)
    if kind == "grouped":
        own = random_inputs(generator, (2, 1), steps, 4, own=True, zeros=zeros)
        inputs = inputs._replace(log_transition=own.log_transition)
    loop = hmm_smoother(*inputs, pairs=True, method="loop")
    chain = chain_module.canonical(*inputs, None)
    scaled = discrete_blocks.blocked_smoother(chain)
    assert scaled.reliable.all()
    for pairs in (False, True):
        result = discrete._smooth_scaled(chain, scaled, pairs)
        for a, b in zip(loop, result, strict=True):
            if b is not None:
                assert a is not None
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_blocks_are_repaired_where_they_underflow(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (2,), 2000, 3, zeros=True)
    inputs.log_emission[1, :-1, 0] = -40.0
    inputs.log_emission[1, :-1, 1:] = 0.0
    inputs.log_emission[1, -1, 1:] = -math.inf
    chain = chain_module.canonical(*inputs, None)
    assert discrete_blocks.blocked_smoother(chain).reliable.tolist() == [True, False]
    result = hmm_smoother(*inputs)
    exact = discrete._smooth_log(chain, discrete_log.loop_messages(chain), False)
    assert_equal(result.log_evidence, exact.log_evidence)
    assert_equal(result.smoothed, exact.smoothed)
    assert_equal(result.pair_sum, exact.pair_sum, 1e-9)


@pytest.mark.parametrize(
    ("batch", "steps", "lengths", "tracked", "route"),
    [
        ((), 100, False, False, "loop"),
        ((), 600, False, False, "blocks"),
        ((), 1100, True, False, "scan"),
        ((40,), 600, False, False, "loop"),
        ((), 20, False, True, "log loop"),
        ((), 40, False, True, "scan"),
        ((40,), 40, False, True, "log loop"),
    ],
)
def test_choice_by_shape(
    batch: tuple[int, ...],
    steps: int,
    lengths: bool,
    tracked: bool,
    route: str,
    generator: torch.Generator,
) -> None:
    inputs = random_inputs(generator, batch, steps)
    ends = torch.tensor(steps - 3) if lengths else None
    shown = Inputs(*(x.clone().requires_grad_(tracked) for x in inputs))
    chain = chain_module.canonical(*shown, ends)
    assert discrete._route(chain, "auto", smooth=True) == route
    chosen = hmm_smoother(*shown, lengths=ends)
    loop = hmm_smoother(*inputs, lengths=ends, method="loop")
    for a, b in zip(chosen[:4], loop[:4], strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-9, atol=1e-9)
    filtered = hmm_filter(*shown, lengths=ends).filtered.detach()
    assert_equal(filtered, hmm_filter(*inputs, lengths=ends, method="loop").filtered, 1e-9)


def test_one_step(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (2,), 1)
    for method in METHODS:
        result = hmm_smoother(*inputs, pairs=True, method=method)  # type: ignore[arg-type]
        joint = inputs.log_initial + inputs.log_emission[:, 0]
        assert_equal(result.log_evidence, joint.logsumexp(-1))
        assert_equal(result.smoothed[:, 0], joint.softmax(-1))
        assert result.pairs is not None and result.pairs.shape == (2, 0, 3, 3)
        assert not result.pair_sum.any()
    assert hmm_viterbi(*inputs).path.flatten().tolist() == joint.argmax(-1).tolist()
    assert hmm_sample_paths(*inputs, 3, rng=0).shape == (3, 2, 1)


# --------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_evidence_is_the_expected_statistics(
    kind: str, method: str, generator: torch.Generator
) -> None:
    inputs = random_inputs(generator, (2,), 5, **KINDS[kind])  # type: ignore[arg-type]
    lengths = torch.tensor([5, 3])
    tracked = [x.clone().requires_grad_() for x in inputs]
    value = hmm_log_evidence(*tracked, lengths=lengths, method=method)  # type: ignore[arg-type]
    gradients = torch.autograd.grad(value.sum(), tracked)
    result = hmm_smoother(*inputs, lengths=lengths, pairs=True)
    assert result.pairs is not None
    assert_equal(gradients[0], result.smoothed[:, 0])
    counts = result.pairs if kind == "varying" else result.pair_sum
    assert_equal(gradients[1], counts.sum(0, keepdim=kind == "varying"))
    assert_equal(gradients[2], result.smoothed)
    # the same by autograd through the log-domain messages
    chain = chain_module.canonical(*tracked, lengths)
    messages = getattr(discrete_log, f"{method}_messages")(chain)
    plain = discrete._filter_log(chain, messages).log_evidence.sum()
    for fisher, direct in zip(gradients, torch.autograd.grad(plain, tracked), strict=True):
        assert_equal(fisher, direct)


def test_gradient_of_evidence_against_central_differences(generator: torch.Generator) -> None:
    inputs = random_inputs(generator)
    tracked = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(hmm_log_evidence(*tracked), tracked)
    for position, gradient in enumerate(gradients):
        for index in itertools.product(*(range(n) for n in gradient.shape)):
            values = []
            for sign in (1, -1):
                moved = [x.clone() for x in inputs]
                moved[position][index] += sign * 1e-5
                values.append(brute_force(*moved).log_evidence)
            assert abs((values[0] - values[1]) / 2e-5 - gradient[index]) < 1e-8


def test_second_derivatives_and_vmap(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (), 4, 2)
    tracked = tuple(x.clone().requires_grad_() for x in inputs)
    assert torch.autograd.gradgradcheck(
        hmm_log_evidence, tracked, torch.ones((), dtype=F64, requires_grad=True)
    )
    batch = random_inputs(generator, (3,), 4, 2)

    def value(e: Tensor) -> Tensor:
        return hmm_log_evidence(inputs.log_initial, inputs.log_transition, e)

    assert_equal(
        torch.func.vmap(value)(batch.log_emission),
        hmm_log_evidence(inputs.log_initial, inputs.log_transition, batch.log_emission),
    )
    gradient = torch.func.vmap(torch.func.grad(value))(batch.log_emission)
    expected = hmm_smoother(inputs.log_initial, inputs.log_transition, batch.log_emission)
    assert_equal(gradient, expected.smoothed)
    hessian = torch.func.jacrev(torch.func.jacrev(value))(inputs.log_emission)
    by_autograd = torch.autograd.functional.hessian(value, inputs.log_emission)
    assert_equal(hessian, by_autograd)


@pytest.mark.parametrize("method", METHODS)
def test_smoother_is_differentiable(method: str, generator: torch.Generator) -> None:
    inputs = random_inputs(generator, zeros=True, states=2)
    emission = inputs.log_emission.clone().requires_grad_()

    def smoothed(e: Tensor) -> Tensor:
        return hmm_smoother(inputs.log_initial, inputs.log_transition, e, method=method).smoothed  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(smoothed, emission)


# --------------------------------------------------------------------------- zeros and underflow


def test_long_left_to_right_chain_does_not_underflow() -> None:
    # state 0 falls 40 000 nats behind before the last step says that it is the only possible one
    steps = 1000
    emission = torch.zeros(steps, 2, dtype=F64)
    emission[:-1, 0] = -40.0
    emission[-1, 1] = -math.inf
    initial = torch.tensor([0.5, 0.5], dtype=F64).log()
    transition = torch.tensor([[0.9, 0.1], [0.0, 1.0]], dtype=F64).log()
    exact = math.log(0.5) + (steps - 1) * (math.log(0.9) - 40.0)
    for method in METHODS:
        result = hmm_smoother(initial, transition, emission, method=method)  # type: ignore[arg-type]
        assert_equal(result.log_evidence, exact, 1e-12)
        assert (result.smoothed[:, 0] == 1).all()
        filtered = hmm_filter(initial, transition, emission, method=method)  # type: ignore[arg-type]
        assert_equal(filtered.log_evidence, exact, 1e-12)
        assert filtered.filtered[-1, 0] == 1


def test_the_certificate_is_what_saves_the_scaled_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discrete_scaled, "_floor", lambda messages: -1.0)
    with pytest.raises(AssertionError):
        test_long_left_to_right_chain_does_not_underflow()


def test_only_unreliable_sequences_are_repaired(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (3,), 40)
    inputs.log_emission[1, :20, 0] -= 100.0
    inputs.log_emission[1, 20:, 1:] -= 100.0
    inputs.log_emission[1, 30] = torch.tensor([-math.inf, -math.inf, 0.0])
    for method in METHODS:
        together = hmm_smoother(*inputs, method=method)  # type: ignore[arg-type]
        for i in range(3):
            alone = inputs._replace(
                log_initial=inputs.log_initial[i], log_emission=inputs.log_emission[i]
            )
            chain = chain_module.canonical(*alone, None)
            exact = discrete._smooth_log(chain, discrete_log.loop_messages(chain), False)
            assert_equal(together.log_evidence[i], exact.log_evidence)
            assert_equal(together.smoothed[i], exact.smoothed)
            assert_equal(together.pair_sum[i], exact.pair_sum)


@pytest.mark.parametrize("method", METHODS)
def test_impossible_sequence(method: str, generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (2,), 5, zeros=True)
    emission = inputs.log_emission.clone()
    emission[1, 1, :2] = -math.inf  # must be in state 2 at step 1
    emission[1, 3, 2] = -math.inf  # and may not be there at step 3
    inputs = inputs._replace(log_emission=emission)
    for result in (
        hmm_filter(*inputs, method=method),  # type: ignore[arg-type]
        hmm_smoother(*inputs, pairs=True, method=method),  # type: ignore[arg-type]
    ):
        assert result.log_evidence[1] == -math.inf and math.isfinite(result.log_evidence[0])
        assert torch.isfinite(result.log_increment[1, :3]).all()
        assert (result.log_increment[1, 3:] == -math.inf).all()
        assert not any(field.isnan().any() for field in result if field is not None)
        with pytest.raises(
            DataError, match="sequence 1 has probability zero: no state is possible at step 3"
        ):
            check_evidence(result.log_increment)
    best = hmm_viterbi(*inputs)
    assert best.log_joint[1] == -math.inf and (best.path[1] == -1).all()
    with pytest.raises(
        DataError, match=r"sequence \(1,\) has probability zero, so it has no paths"
    ):
        hmm_sample_paths(*inputs, 2, rng=0)
    tracked = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(hmm_log_evidence(*tracked, method=method)[1], tracked)  # type: ignore[arg-type]
    assert not any(g.any() or g.isnan().any() for g in gradients)


def test_many_steps_neither_underflow_nor_drift() -> None:
    # independent steps: the evidence is a plain sum
    steps = 200_000
    half = torch.tensor([0.5, 0.5], dtype=F64).log()
    emission = torch.tensor([-3.0, -5.0], dtype=F64).expand(steps, 2)
    exact = steps * math.log(0.5 * (math.exp(-3) + math.exp(-5)))
    value = hmm_log_evidence(half, half.expand(2, 2), emission, method="scan")
    assert abs(float(value) / exact - 1) < 1e-12


def test_float32_keeps_its_type(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (2,), 300)
    exact = hmm_smoother(*inputs)
    for method in METHODS:
        single = hmm_smoother(*(x.float() for x in inputs), method=method)  # type: ignore[arg-type]
        assert single.smoothed.dtype == torch.float32
        assert_equal(single.log_evidence.double(), exact.log_evidence, 1e-4)
        assert_equal(single.smoothed.double(), exact.smoothed, 1e-3)


def test_inputs_are_not_changed(generator: torch.Generator) -> None:
    inputs = random_inputs(generator, (2,), 6)
    kept = [x.clone() for x in inputs]
    for method in METHODS:
        hmm_smoother(*inputs, method=method)  # type: ignore[arg-type]
        hmm_filter(*inputs, method=method)  # type: ignore[arg-type]
    hmm_viterbi(*inputs)
    hmm_sample_paths(*inputs, 2, rng=0)
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


# --------------------------------------------------------------------------- bad input


def test_shape_errors(generator: torch.Generator) -> None:
    pi, A, e = random_inputs(generator, (2,), 4)
    with pytest.raises(ShapeError, match=r"expected at least one step .* got T = 0"):
        hmm_smoother(pi, A, e[:, :0])
    with pytest.raises(ShapeError, match=r"expected log_transition \[\*batch, K, K\] with 3, 3"):
        hmm_filter(pi, A[:2], e)
    with pytest.raises(ShapeError, match=r"\[\*batch, T - 1, K, K\] with 3, 3, 3 last"):
        hmm_filter(pi, A.expand(2, 4, 3, 3), e)
    with pytest.raises(ShapeError, match=r"expected log_initial .* broadcast to \(2,\)"):
        hmm_viterbi(pi[:1].expand(5, 3), A, e)
    with pytest.raises(ShapeError, match=r"expected lengths \[\*batch\] = \(2,\)"):
        hmm_smoother(pi, A, e, lengths=torch.tensor([4]))
    with pytest.raises(DataError, match=r"lengths must be in 1..4, got 5 for sequence 1"):
        hmm_smoother(pi, A, e, lengths=torch.tensor([4, 5]))
    with pytest.raises(DataError, match="expected integer lengths, got torch.bool"):
        hmm_smoother(pi, A, e, lengths=torch.tensor([True, False]))
    with pytest.raises(DataError, match="method must be 'auto', 'loop' or 'scan', got 'fast'"):
        hmm_smoother(pi, A, e, method="fast")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="expected n >= 1 paths, got 0"):
        hmm_sample_paths(pi, A, e, 0, rng=0)


def test_masks() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert lengths_from_mask(mask).tolist() == [2, 1]
    with pytest.raises(DataError, match="sequence 1 is not; give a missing step log_emission = 0"):
        lengths_from_mask(torch.tensor([[True, True], [False, True]]))
    with pytest.raises(DataError, match="sequence 0 is not"):
        lengths_from_mask(torch.tensor([[False, False], [True, True]]))
    with pytest.raises(DataError, match="expected a boolean mask"):
        lengths_from_mask(torch.ones(2, 3))


def test_check_chain(generator: torch.Generator) -> None:
    pi, A, e = random_inputs(generator, (2,), 4)
    check_chain(pi, A, e)
    with pytest.raises(DataError, match=r"exp\(log_transition\) must sum to 1, row 2 sums to"):
        check_chain(pi, A + torch.tensor([0.0, 0.0, 0.1], dtype=F64)[:, None], e)
    with pytest.raises(DataError, match=r"exp\(log_initial\) must sum to 1, row 0 sums to"):
        check_chain(pi - 1, A, e)
    with pytest.raises(
        DataError, match=r"log_emission must be a log prob.* nan at index \(1, 2, 0\)"
    ):
        check_chain(
            pi,
            A,
            e.index_put(
                (torch.tensor(1), torch.tensor(2), torch.tensor(0)), e.new_tensor(math.nan)
            ),
        )
    with pytest.raises(DataError, match="log_initial must be a log probability"):
        check_chain(pi + math.inf, A, e)


def test_check_evidence_names_a_nan() -> None:
    check_evidence(torch.zeros(2, 3))
    check_evidence(torch.tensor([[0.0, -math.inf]]), lengths=torch.tensor([1]))
    with pytest.raises(DataError, match="the sequence has a NaN likelihood at step 1"):
        check_evidence(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("method", METHODS)
def test_one_state_is_a_sum_over_time(method: str, generator: torch.Generator) -> None:
    """With a single state there is nothing to infer: the evidence is the sum of the emissions."""
    emission = torch.randn(3, 6, 1, generator=generator, dtype=torch.float64)
    none = torch.zeros(1, dtype=torch.float64)
    found = hmm_smoother(none, none[:, None], emission, method=method)
    torch.testing.assert_close(found.log_evidence, emission.sum((1, 2)))
    torch.testing.assert_close(found.log_increment, emission[..., 0])
    assert bool((found.smoothed == 1).all()) and found.pair_sum.flatten().tolist() == [5.0] * 3

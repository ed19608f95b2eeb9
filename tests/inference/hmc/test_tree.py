"""The tree of NUTS against recursion written out, and its choice of a leaf against the weights."""

from __future__ import annotations

import pytest
import torch

from probkit.inference.hmc import tree as tree_module
from probkit.inference.hmc.leapfrog import Phase, Point, kinetic, leapfrog
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.tree import _subtree, blocks_of, draw_tree, uniforms_needed
from probkit.inference.hmc.uturn import Span, block_turns, joint_turns
from probkit.testing import z_bound

UNIT = Metric(torch.ones(2, dtype=torch.float64))


def oval(position):
    """A normal with precisions 1 and 9, minus a constant."""
    precision = torch.tensor([1.0, 9.0], dtype=torch.float64)
    return 0.5 * (precision * position.square()).sum(-1), precision * position


def begin(chains, generator, same=False):
    position = torch.randn(chains, 2, generator=generator, dtype=torch.float64)
    momentum = torch.randn(chains, 2, generator=generator, dtype=torch.float64)
    if same:
        position, momentum = position[:1].repeat(chains, 1), momentum[:1].repeat(chains, 1)
    return Phase(Point(position, *oval(position)), momentum)


def turned(first, last, total):
    return float(first @ total) <= 0 or float(last @ total) <= 0


def recursive_turns(momenta):
    """Any turn in a span [leaf, D] or in one of its halves, by recursion."""
    n = len(momenta)
    if n == 1:
        return False
    a, b = momenta[: n // 2], momenta[n // 2 :]
    return (
        recursive_turns(a)
        or recursive_turns(b)
        or turned(a[0], b[-1], momenta.sum(0))
        or turned(a[0], b[0], a.sum(0) + b[0])
        or turned(a[-1], b[-1], b.sum(0) + a[-1])
    )


@pytest.mark.parametrize("leaves", [1, 2, 4, 8])
def test_blocks_turn_as_recursion_says(generator, leaves):
    drift = torch.tensor([1.5, 0.0, 0.0], dtype=torch.float64)
    momenta = drift + torch.randn(300, leaves, 3, generator=generator, dtype=torch.float64)
    expected = [recursive_turns(row) for row in momenta]
    assert block_turns(momenta).tolist() == expected
    assert leaves == 1 or 0 < sum(expected) < 300


def test_joins_turn_as_written_out(generator):
    parts = torch.randn(2, 400, 4, 3, generator=generator, dtype=torch.float64) + 0.5
    a, b = (Span(p[:, 0], p[:, -1], p.sum(1)) for p in parts)
    expected = [
        turned(x[0], y[-1], x.sum(0) + y.sum(0))
        or turned(x[0], y[0], x.sum(0) + y[0])
        or turned(x[-1], y[-1], y.sum(0) + x[-1])
        for x, y in zip(*parts, strict=True)
    ]
    assert joint_turns(a, b).tolist() == expected
    assert 0 < sum(expected) < 400


@pytest.mark.parametrize("depth", [0, 2, 3, 4, 5])
def test_a_subtree_is_its_leaves_written_out(generator, depth):
    chains, size = 40, 2**depth
    start = begin(chains, generator)
    step = 0.5 ** (1 + torch.arange(chains, dtype=torch.float64) % 6)[:, None]
    step[::2] *= -1
    uniforms = torch.rand(chains, 2 * blocks_of(depth), generator=generator, dtype=torch.float64)
    energy0 = start.point.energy + kinetic(start.momentum)
    found = _subtree(oval, UNIT, start, step, energy0, depth, uniforms)
    path, phase = [], start
    for _ in range(size):
        phase = leapfrog(oval, UNIT, phase, step)
        path.append(phase)
    momenta = torch.stack([p.momentum for p in path], 1)
    error = torch.stack([p.point.energy + kinetic(p.momentum) - energy0 for p in path], 1)
    assert found.turned.tolist() == [recursive_turns(row) for row in momenta]
    assert not bool(found.diverged.any())
    whole = ~found.turned
    assert depth < 2 or 0 < int(whole.sum()) < chains
    close = torch.testing.assert_close
    close(found.log_weight[whole], error.neg().logsumexp(1)[whole])
    close(found.span.total[whole], momenta.sum(1)[whole])
    close(found.accepted[whole], error.clamp(min=0).neg().exp().sum(1)[whole])
    assert found.visited[whole].tolist() == [size] * int(whole.sum())
    close(found.end.momentum, path[-1].momentum)
    # The candidate is one of the leaves, with that leaf's error.
    leaf = (error - found.error[:, None]).abs().argmin(1)
    rows = torch.arange(chains)
    close(torch.stack([p.point.position for p in path], 1)[rows, leaf], found.candidate.position)


def leaf_z(generator, depth=4, chains=20_000):
    """Largest |z| of how often each leaf is the candidate, against its weight."""
    start = begin(chains, generator, same=True)
    # From near the middle and fast: a branch that turned would lack leaves.
    position, momentum = 0.1 * start.point.position, torch.full_like(start.momentum, 2.0)
    start = Phase(Point(position, *steep(position)), momentum)
    step = torch.full((chains, 1), 0.03, dtype=torch.float64)
    uniforms = torch.rand(chains, 2 * blocks_of(depth), generator=generator, dtype=torch.float64)
    energy0 = start.point.energy + kinetic(start.momentum) + 0.0
    found = _subtree(steep, UNIT, start, step, energy0, depth, uniforms)
    assert not bool(found.turned.any())
    errors, phase = [], Phase(*(part for part in start))
    phase = Phase(Point(phase.point.position[:1], *steep(phase.point.position[:1])), phase[1][:1])
    for _ in range(2**depth):
        phase = leapfrog(steep, UNIT, phase, step[:1])
        errors.append(phase.point.energy + kinetic(phase.momentum) - energy0[:1])
    weights = torch.cat(errors).neg().softmax(0)
    leaf = (found.error[:, None] - torch.cat(errors)[None]).abs().argmin(1)
    share = torch.bincount(leaf, minlength=2**depth).double() / chains
    return float(((share - weights) / (weights * (1 - weights) / chains).sqrt()).abs().max())


def steep(position):
    """Gradients of another energy than the one that is reported, so that weights differ much."""
    energy, gradient = oval(position)
    return energy + 4.0 * position[:, 0], gradient


def test_leaves_are_drawn_by_their_weights(generator):
    assert leaf_z(generator) < z_bound(16)


def test_that_test_sees_equal_chances(generator, monkeypatch):
    def blind(log_weights, log_total, uniform):
        return (uniform * log_weights.shape[1]).long()

    monkeypatch.setattr(tree_module, "_pick", blind)
    assert leaf_z(generator) > z_bound(16)


def test_a_chain_alone_draws_the_same_tree(generator):
    """Chains leave the batch as they end; the others must not notice."""
    chains, depth = 12, 6
    start = begin(chains, generator)
    step = 0.05 * 2.0 ** (torch.arange(chains, dtype=torch.float64) % 4)
    uniforms = torch.rand(chains, uniforms_needed(depth), generator=generator, dtype=torch.float64)
    together = draw_tree(oval, UNIT, start.point, start.momentum, step, uniforms, depth)
    assert len(set(together.stats["tree_depth"].tolist())) > 1
    for k in range(chains):
        one = slice(k, k + 1)
        point = Point(*(part[one] for part in start.point))
        alone = draw_tree(oval, UNIT, point, start.momentum[one], step[one], uniforms[one], depth)
        torch.testing.assert_close(alone.point.position, together.point.position[one])
        for name, value in alone.stats.items():
            torch.testing.assert_close(value, together.stats[name][one], msg=name)


def test_statistics_of_a_draw(generator):
    chains = 200
    start = begin(chains, generator)
    step = torch.full((chains,), 0.3, dtype=torch.float64)
    uniforms = torch.rand(chains, uniforms_needed(3), generator=generator, dtype=torch.float64)
    point, stats = draw_tree(oval, UNIT, start.point, start.momentum, step, uniforms, 3)
    assert int(stats["tree_depth"].max()) <= 3 and int(stats["n_steps"].max()) <= 7
    depth = stats["tree_depth"]
    assert bool(((stats["n_steps"] >= 2 ** (depth - 1)) & (stats["n_steps"] < 2**depth)).all())
    assert bool(((stats["acceptance_rate"] > 0) & (stats["acceptance_rate"] <= 1)).all())
    torch.testing.assert_close(-stats["lp"], oval(point.position)[0])
    before = start.point.energy + kinetic(start.momentum)
    torch.testing.assert_close(stats["energy"] - before, stats["energy_error"])
    assert not bool(stats["diverging"].any())


def test_a_wild_step_diverges_and_stays(generator):
    start = begin(4, generator)
    step = torch.tensor([0.3, 200.0, 0.3, 200.0], dtype=torch.float64)
    uniforms = torch.rand(4, uniforms_needed(4), generator=generator, dtype=torch.float64)
    point, stats = draw_tree(oval, UNIT, start.point, start.momentum, step, uniforms, 4)
    assert stats["diverging"].tolist() == [False, True, False, True]
    assert bool((point.position[1::2] == start.point.position[1::2]).all())
    assert stats["n_steps"][1::2].tolist() == [1, 1]

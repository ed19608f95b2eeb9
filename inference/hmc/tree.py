"""The trajectory tree of NUTS, doubled for all chains together and without recursion.

All chains that still grow double at the same time, so depth and leaf number are plain integers; a
chain that has ended leaves the batch. A subtree is built from aligned blocks of up to four leaves;
blocks are joined as the carries of a binary counter, which repeats exactly the joins of a recursive
tree.

Sampling is multinomial (Betancourt 2017, appendix A.3): uniform progressive within a subtree,
biased progressive between the old tree and the new subtree.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probkit.inference.hmc.leapfrog import Phase, Point, kinetic, leapfrog
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.potential import Potential
from probkit.inference.hmc.uturn import Span, block_turns, join, joint_turns

__all__ = ["BLOCK", "MAX_ENERGY_ERROR", "Transition", "blocks_of", "draw_tree", "uniforms_needed"]

MAX_ENERGY_ERROR = 1000.0
_BLOCK_DEPTH = 2
BLOCK = 1 << _BLOCK_DEPTH


class Transition(NamedTuple):
    """Where a transition leads, and what it saw on the way.

    Attributes:
        point: The next point of each chain.
        stats: Name -> [chain] statistics, under ArviZ's names.
    """

    point: Point
    stats: dict[str, Tensor]


class _Block(NamedTuple):
    """Leaves of one block, or several joined: a candidate drawn from them, and their weight.

    Attributes:
        end: Phase at the last leaf.
        candidate: A leaf drawn with probability proportional to exp(-energy error).
        error: Energy error [chain] of the candidate.
        log_weight: [chain] log of the sum of the weights.
        span: For the U-turn criterion.
        diverged: [chain] whether a leaf's energy error exceeds the bound.
        turned: [chain] whether a span inside has turned.
        accepted: [chain] sum of acceptance probabilities up to a divergence.
        visited: [chain] number of leaves up to a divergence.
    """

    end: Phase
    candidate: Point
    error: Tensor
    log_weight: Tensor
    span: Span
    diverged: Tensor
    turned: Tensor
    accepted: Tensor
    visited: Tensor

    @property
    def ended(self) -> Tensor:
        """Whether the chain's trajectory ends in these leaves [chain]."""
        return self.diverged | self.turned


def blocks_of(depth: int) -> int:
    """Number of blocks of the subtree that doubling ``depth`` adds."""
    return 1 << max(0, depth - _BLOCK_DEPTH)


def uniforms_needed(max_depth: int) -> int:
    """Uniform numbers that one transition of one chain uses up at most.

    Each doubling takes one for its direction, one to choose between the trees, and two for each
    block.

    Example:
        >>> uniforms_needed(1)
        4
    """
    return sum(2 + 2 * blocks_of(depth) for depth in range(max_depth))


def draw_tree(
    potential: Potential,
    metric: Metric,
    point: Point,
    momentum: Tensor,
    step: Tensor,
    uniforms: Tensor,
    max_depth: int,
) -> Transition:
    """Draw the next point of every chain by the No-U-Turn sampler.

    Args:
        potential: Energy and gradient.
        metric: Mass matrix.
        point: Current points.
        momentum: Fresh whitened momenta [chain, D], standard normal.
        step: Step sizes [chain].
        uniforms: [chain, uniforms_needed(max_depth)].
        max_depth: Doublings at most.
    """
    chains = len(step)
    start_energy = point.energy + kinetic(momentum)
    # Both ends of every trajectory, [end, chain, *]: the past one first.
    ends = Phase(Point(*(_twice(part) for part in point)), _twice(momentum))
    chosen, error, log_weight = point, torch.zeros_like(step), torch.zeros_like(step)
    total = momentum
    accepted, visited = torch.zeros_like(step), torch.zeros_like(step)
    depth_reached = torch.zeros(chains, dtype=torch.int64, device=step.device)
    diverging = torch.zeros(chains, dtype=torch.bool, device=step.device)
    rows = torch.arange(chains, device=step.device)
    used = 0
    for depth in range(max_depth):
        random = uniforms[rows, used : used + 2 + 2 * blocks_of(depth)]
        used += random.shape[1]
        forward = (random[:, 0] < 0.5).long()
        near = _take(ends, forward, rows)
        far_momentum = ends.momentum[1 - forward, rows]
        signed = torch.where(forward.bool(), step[rows], -step[rows])[:, None]
        tree = _subtree(potential, metric, near, signed, start_energy[rows], depth, random[:, 2:])
        accepted = accepted.index_add(0, rows, tree.accepted)
        visited = visited.index_add(0, rows, tree.visited)
        diverging = diverging.index_put((rows,), tree.diverged)
        depth_reached = depth_reached.index_add(0, rows, torch.ones_like(rows))
        whole = ~tree.ended
        old_weight = log_weight[rows]
        take = whole & (random[:, 1].log() < tree.log_weight - old_weight)
        chosen = _put_point(chosen, rows[take], tree.candidate, take)
        error = error.index_put((rows[take],), tree.error[take])
        grown = rows[whole]
        turned = joint_turns(Span(far_momentum, near.momentum, total[rows]), tree.span)
        total = total.index_add(0, grown, tree.span.total[whole])
        log_weight = log_weight.index_put(
            (grown,), torch.logaddexp(old_weight, tree.log_weight)[whole]
        )
        ends = _put(ends, forward[whole], grown, _only(tree.end, whole))
        rows = rows[whole & ~turned]
        if len(rows) == 0:
            break
    stats = {
        "lp": -chosen.energy,
        "acceptance_rate": accepted / visited,
        "step_size": step,
        "n_steps": visited.long(),
        "tree_depth": depth_reached,
        "energy": start_energy + error,
        "energy_error": error,
        "diverging": diverging,
    }
    return Transition(chosen, stats)


def _subtree(
    potential: Potential,
    metric: Metric,
    start: Phase,
    step: Tensor,
    start_energy: Tensor,
    depth: int,
    uniforms: Tensor,
) -> _Block:
    """Grow 2^depth leaves beyond ``start``; stops early when every chain has ended.

    Args:
        potential: Energy and gradient.
        metric: Mass matrix.
        start: The end from which the trajectory goes on.
        step: Signed step sizes [chain, 1].
        start_energy: Energy [chain] at the beginning of the transition.
        depth: Number of this doubling.
        uniforms: [chain, 2 * blocks_of(depth)].
    """
    leaves = 1 << min(depth, _BLOCK_DEPTH)
    tree: _Block | None = None
    waiting: list[Span] = []
    for number in range(blocks_of(depth)):
        phase = start if tree is None else tree.end
        block = _block(
            potential, metric, phase, step, start_energy, leaves, uniforms[:, 2 * number]
        )
        turned = block.turned
        span = block.span
        carry = number
        while carry & 1:
            before = waiting.pop()
            turned = turned | joint_turns(before, span)
            span = join(before, span)
            carry >>= 1
        waiting.append(span)
        block = block._replace(turned=turned, span=span)
        tree = block if tree is None else _append(tree, block, uniforms[:, 2 * number + 1])
        if bool(tree.ended.all()):
            break
    assert tree is not None
    return tree


def _append(tree: _Block, block: _Block, uniform: Tensor) -> _Block:
    """Join a subtree so far with its next block; ended chains keep their counts."""
    log_weight = torch.logaddexp(tree.log_weight, block.log_weight)
    take = uniform.log() < block.log_weight - log_weight
    going = ~tree.ended
    return _Block(
        end=block.end,
        candidate=block.candidate.where(take, tree.candidate),
        error=torch.where(take, block.error, tree.error),
        log_weight=log_weight,
        span=block.span,
        diverged=tree.diverged | (going & block.diverged),
        turned=tree.turned | (going & block.turned),
        accepted=tree.accepted + going * block.accepted,
        visited=tree.visited + going * block.visited,
    )


def _block(
    potential: Potential,
    metric: Metric,
    phase: Phase,
    step: Tensor,
    start_energy: Tensor,
    leaves: int,
    uniform: Tensor,
) -> _Block:
    """Take ``leaves`` leapfrog steps and sum them up."""
    path = []
    for _ in range(leaves):
        phase = leapfrog(potential, metric, phase, step)
        path.append(phase)
    momenta = torch.stack([leaf.momentum for leaf in path], dim=1)
    energies = torch.stack([leaf.point.energy for leaf in path], dim=1)
    error = energies + kinetic(momenta) - start_energy[:, None]
    # A comparison with NaN is false: what is not a number has diverged.
    wild = ~(error <= MAX_ENERGY_ERROR)
    error = error.masked_fill(wild, torch.inf)
    before_wild = wild.cumsum(1) - wild.long() == 0
    accepted = (error.clamp(min=0.0).neg().exp() * before_wild).sum(1)
    log_weight = error.neg().logsumexp(1)
    index = _pick(error.neg(), log_weight, uniform)
    chain = torch.arange(len(index), device=index.device)
    positions = torch.stack([leaf.point.position for leaf in path], dim=1)
    gradients = torch.stack([leaf.point.gradient for leaf in path], dim=1)
    candidate = Point(positions[chain, index], energies[chain, index], gradients[chain, index])
    return _Block(
        end=phase,
        candidate=candidate,
        error=error[chain, index],
        log_weight=log_weight,
        span=Span(momenta[:, 0], momenta[:, -1], momenta.sum(1)),
        diverged=wild.any(1),
        turned=block_turns(momenta),
        accepted=accepted,
        visited=before_wild.sum(1).to(accepted.dtype),
    )


def _pick(log_weights: Tensor, log_total: Tensor, uniform: Tensor) -> Tensor:
    """Draw a leaf [chain] with probability proportional to its weight, by inversion.

    Args:
        log_weights: [chain, leaf].
        log_total: [chain] log of their sums; where it is -inf the choice does not matter.
        uniform: [chain].
    """
    share = (log_weights - log_total[:, None]).exp().nan_to_num(0.0)
    index = (share.cumsum(1) <= uniform[:, None]).sum(1)
    return index.clamp(max=log_weights.shape[1] - 1)


def _twice(part: Tensor) -> Tensor:
    return torch.stack([part, part])


def _take(ends: Phase, side: Tensor, rows: Tensor) -> Phase:
    """Take the ends ``side`` of the chains ``rows``."""
    point = Point(*(part[side, rows] for part in ends.point))
    return Phase(point, ends.momentum[side, rows])


def _put(ends: Phase, side: Tensor, rows: Tensor, new: Phase) -> Phase:
    """Replace the ends ``side`` of the chains ``rows``."""
    place = (side, rows)
    point = Point(*(a.index_put(place, b) for a, b in zip(ends.point, new.point, strict=True)))
    return Phase(point, ends.momentum.index_put(place, new.momentum))


def _only(phase: Phase, rows: Tensor) -> Phase:
    return Phase(Point(*(part[rows] for part in phase.point)), phase.momentum[rows])


def _put_point(point: Point, rows: Tensor, new: Point, take: Tensor) -> Point:
    """Replace the chains ``rows`` of ``point`` by the entries of ``new`` that ``take`` names."""
    return Point(
        *(old.index_put((rows,), fresh[take]) for old, fresh in zip(point, new, strict=True))
    )

"""The tree of NUTS with all chains in lock-step, in pieces that can be compiled.

The same transition as :func:`~probkit.inference.hmc.tree.draw_tree`, number for number, with the
same random numbers. Chains that have ended do not leave the batch; they get step size 0 and masks
keep what they have, so that sizes never change. Inside the pieces positions, gradients and momenta
are [D, chain]: compiled loops run over adjacent chains, however few dimensions there are. Four
pieces serve trees of every depth:

    trunk   doublings 0 and 1, and the beginning of doubling 2
    block   one more block of leaves of a subtree
    merge   the U-turn criterion where two spans of blocks are joined
    close   add the finished subtree to the tree, and begin the next doubling
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probkit.inference.hmc.leapfrog import Phase, Point, kinetic
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.proposal import leaps
from probkit.inference.hmc.tree import BLOCK, MAX_ENERGY_ERROR, Transition, blocks_of
from probkit.inference.hmc.uturn import Span, join

__all__ = ["LockstepTree", "pieces"]

Evaluate = Callable[[Tensor], tuple[Tensor, Tensor]]
Pieces = dict[str, Callable[..., tuple[Tensor, ...]]]

_TRUNK = 2  # Doublings of the trunk.


class End(NamedTuple):
    """An end of a trajectory: position, gradient and momentum [D, chain]."""

    position: Tensor
    gradient: Tensor
    momentum: Tensor


class Tree(NamedTuple):
    """The trajectories so far.

    Attributes:
        past: The end that lies in the past.
        future: The other end.
        chosen: The point drawn from the trajectory.
        error: Energy error [chain] of that point.
        log_weight: [chain] log of the sum of all weights.
        total: Sum of all momenta [D, chain].
        accepted: [chain] sum of acceptance probabilities.
        visited: [chain] number of leaves.
        depth: [chain] number of doublings.
        diverging: [chain] whether it has diverged.
        active: [chain] whether it still grows.
    """

    past: End
    future: End
    chosen: Point
    error: Tensor
    log_weight: Tensor
    total: Tensor
    accepted: Tensor
    visited: Tensor
    depth: Tensor
    diverging: Tensor
    active: Tensor


class Branch(NamedTuple):
    """A subtree that grows, block by block.

    Attributes:
        end: Where it has arrived.
        candidate: A point drawn from it.
        error: Energy error [chain] of that point.
        log_weight: [chain] log of the sum of its weights.
        accepted: [chain] sum of acceptance probabilities.
        visited: [chain] number of leaves.
        diverged: [chain] whether it has diverged.
        ended: [chain] whether it has diverged, has turned, or belongs to a chain at rest.
    """

    end: End
    candidate: Point
    error: Tensor
    log_weight: Tensor
    accepted: Tensor
    visited: Tensor
    diverged: Tensor
    ended: Tensor


def flat(tree: Any) -> tuple[Tensor, ...]:
    """List the tensors of nested named tuples."""
    if isinstance(tree, Tensor):
        return (tree,)
    return tuple(leaf for part in tree for leaf in flat(part))


def shaped(kind: Any, leaves: list[Tensor]) -> Any:
    """Rebuild a named tuple from the first of ``leaves``, which are taken off the list."""
    if kind is Tensor:
        return leaves.pop(0)
    return kind(*(shaped(_KINDS.get(name, Tensor), leaves) for name in kind._fields))


_KINDS: dict[str, Any] = {
    "past": End,
    "future": End,
    "end": End,
    "chosen": Point,
    "candidate": Point,
}


def _choose(condition: Tensor, new: Any, old: Any) -> Any:
    """Take ``new`` in chains where ``condition`` [chain] holds, in all parts of a named tuple."""
    if isinstance(new, Tensor):
        return torch.where(condition, new, old)
    return type(new)(*(_choose(condition, a, b) for a, b in zip(new, old, strict=True)))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(0)


def _turned(first: Tensor, last: Tensor, total: Tensor) -> Tensor:
    """Whether a span has turned [chain]."""
    return ~((_dot(first, total) > 0.0) & (_dot(last, total) > 0.0))


def _joint_turns(a: Span, b: Span) -> Tensor:
    """Whether ``a``, joined with ``b`` that follows, has turned [chain]."""
    whole = _turned(a.first, b.last, a.total + b.total)
    return (
        whole
        | _turned(a.first, b.first, a.total + b.first)
        | _turned(a.last, b.last, b.total + a.last)
    )


def _span_of(momenta: Sequence[Tensor]) -> tuple[Span, Tensor]:
    """Join leaves pairwise: their span, and whether any aligned span has turned."""
    if len(momenta) == 1:
        (only,) = momenta
        return Span(only, only, only), torch.zeros_like(only[0], dtype=torch.bool)
    half = len(momenta) // 2
    (a, turned_a), (b, turned_b) = _span_of(momenta[:half]), _span_of(momenta[half:])
    if half == 1:
        here = _turned(a.first, b.last, a.total + b.total)
    else:
        here = _joint_turns(a, b)
    return join(a, b), turned_a | turned_b | here


def _log_sum(logs: Sequence[Tensor]) -> Tensor:
    """Log of a sum, from the logs [chain] of its terms."""
    top = functools.reduce(torch.maximum, logs)
    top = top.masked_fill(top == -torch.inf, 0.0)
    terms = [(log - top).exp() for log in logs]
    return functools.reduce(torch.add, terms).log() + top


def _start_branch(tree: Tree, direction: Tensor) -> tuple[Branch, Tensor]:
    """Choose the end that goes on: an empty branch there, and whether it is the future one."""
    forward = direction < 0.5
    near = _choose(forward, tree.future, tree.past)
    nothing = torch.zeros_like(tree.error)
    branch = Branch(
        end=near,
        candidate=tree.chosen,
        error=nothing,
        log_weight=torch.full_like(nothing, -torch.inf),
        accepted=nothing,
        visited=nothing,
        diverged=torch.zeros_like(tree.diverging),
        ended=~tree.active,
    )
    return branch, forward


def _grow(
    evaluate: Evaluate,
    root: Tensor,
    branch: Branch,
    forward: Tensor,
    step: Tensor,
    start_energy: Tensor,
    pick: Tensor,
    take: Tensor,
    leaves: int,
) -> tuple[Branch, Span]:
    """Add a block of leaves to a branch; also returns the span of the block alone.

    Args:
        evaluate: Energy and gradient.
        root: Square root of the inverse mass matrix.
        branch: What to continue.
        forward: [chain] direction in time.
        step: Step sizes [chain].
        start_energy: Energy [chain] at the beginning of the transition.
        pick: Uniform numbers [chain] that choose a leaf of the block.
        take: Uniform numbers [chain] that choose between the branch so far and the block.
        leaves: A power of two.
    """
    signed = torch.where(forward, step, -step).masked_fill(branch.ended, 0.0)
    end = branch.end
    point, momentum = Point(end.position, start_energy, end.gradient), end.momentum
    path = []
    for _ in range(leaves):
        point, momentum = leaps(evaluate, root, point, momentum, signed, 1)
        path.append(Phase(point, momentum))
    errors, tame, accepted, visited = [], ~branch.ended, branch.accepted, branch.visited
    diverged = branch.diverged
    for leaf in path:
        error = leaf.point.energy + kinetic(leaf.momentum.T) - start_energy
        wild = ~(error <= MAX_ENERGY_ERROR)
        error = error.masked_fill(wild, torch.inf)
        # Leaves up to a divergence count, the one that diverges with acceptance zero.
        accepted = accepted + tame * error.clamp(min=0.0).neg().exp()
        visited = visited + tame
        diverged = diverged | (tame & wild)
        tame = tame & ~wild
        errors.append(error)
    weight = _log_sum([-error for error in errors])
    candidate, leaf_error = path[0].point, errors[0]
    reached = (-errors[0] - weight).exp().nan_to_num(0.0)
    for leaf, error in zip(path[1:], errors[1:], strict=True):
        # Inversion: the first leaf at which the sum of the shares passes the random number.
        later = reached <= pick
        candidate = _choose(later, leaf.point, candidate)
        leaf_error = torch.where(later, error, leaf_error)
        reached = reached + (-error - weight).exp().nan_to_num(0.0)
    span, turned = _span_of([p.momentum for p in path])
    log_weight = torch.logaddexp(branch.log_weight, weight)
    newer = take.log() < weight - log_weight
    grown = Branch(
        end=End(point.position, point.gradient, momentum),
        candidate=_choose(newer, candidate, branch.candidate),
        error=torch.where(newer, leaf_error, branch.error),
        log_weight=log_weight,
        accepted=accepted,
        visited=visited,
        diverged=diverged,
        ended=branch.ended | diverged | turned,
    )
    return grown, span


def _close(tree: Tree, branch: Branch, span: Span, forward: Tensor, uniform: Tensor) -> Tree:
    """Add a finished branch to the tree: biased progressive sampling, and the U-turn criterion."""
    whole = tree.active & ~branch.ended
    take = whole & (uniform.log() < branch.log_weight - tree.log_weight)
    near = _choose(forward, tree.future.momentum, tree.past.momentum)
    far = _choose(forward, tree.past.momentum, tree.future.momentum)
    turned = _joint_turns(Span(far, near, tree.total), span)
    return Tree(
        past=_choose(whole & ~forward, branch.end, tree.past),
        future=_choose(whole & forward, branch.end, tree.future),
        chosen=_choose(take, branch.candidate, tree.chosen),
        error=torch.where(take, branch.error, tree.error),
        log_weight=torch.where(
            whole, torch.logaddexp(tree.log_weight, branch.log_weight), tree.log_weight
        ),
        total=_choose(whole, tree.total + span.total, tree.total),
        accepted=tree.accepted + branch.accepted,
        visited=tree.visited + branch.visited,
        depth=tree.depth + tree.active,
        diverging=tree.diverging | (tree.active & branch.diverged),
        active=whole & ~turned,
    )


def _first_leaf(point: Point, momentum: Tensor) -> Tree:
    """The tree of one leaf."""
    end = End(point.position, point.gradient, momentum)
    nothing = torch.zeros_like(point.energy)
    never = torch.zeros_like(nothing, dtype=torch.bool)
    return Tree(
        past=end,
        future=end,
        chosen=point,
        error=nothing,
        log_weight=nothing,
        total=momentum,
        accepted=nothing,
        visited=nothing,
        depth=torch.zeros_like(nothing, dtype=torch.int64),
        diverging=never,
        active=~never,
    )


def _laid_out(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def pieces(evaluate: Callable[..., tuple[Tensor, Tensor]]) -> Pieces:
    """Return the four pieces as functions of tensors alone.

    Args:
        evaluate: ``evaluate(position, *constants)``, potential [chain] and gradient [chain, D] at
            positions [chain, D].
            Whatever a piece gets after its own arguments is handed to it.
    """

    def trunk(
        position: Tensor,
        energy: Tensor,
        gradient: Tensor,
        momentum: Tensor,
        step: Tensor,
        root: Tensor,
        uniforms: Tensor,
        *constants: Tensor,
    ) -> tuple[Tensor, ...]:
        def bound(q: Tensor) -> tuple[Tensor, Tensor]:
            return evaluate(q, *constants)

        point = Point(position.T, energy, gradient.T)
        start_energy = energy + kinetic(momentum)
        tree = _first_leaf(point, momentum.T)
        row = 0
        for depth in range(_TRUNK):
            direction, accept, pick, take = uniforms[row : row + 4]
            row += 4
            branch, forward = _start_branch(tree, direction)
            branch, span = _grow(
                bound, root, branch, forward, step, start_energy, pick, take, 1 << depth
            )
            tree = _close(tree, branch, span, forward, accept)
        branch, forward = _start_branch(tree, uniforms[row])
        return _laid_out((*flat(tree), *flat(branch), forward, start_energy, tree.active.any()))

    def block(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(tensors)
        branch: Branch = shaped(Branch, leaves)
        forward, step, root, start_energy, pick, take = leaves[:6]
        constants = leaves[6:]
        grown, span = _grow(
            lambda q: evaluate(q, *constants),
            root,
            branch,
            forward,
            step,
            start_energy,
            pick,
            take,
            BLOCK,
        )
        return _laid_out((*flat(grown), *flat(span), grown.ended.all()))

    def merge(*tensors: Tensor) -> tuple[Tensor, ...]:
        before, span, ended = Span(*tensors[:3]), Span(*tensors[3:6]), tensors[6]
        ended = ended | _joint_turns(before, span)
        return _laid_out((*join(before, span), ended, ended.all()))

    def close(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(tensors)
        tree: Tree = shaped(Tree, leaves)
        branch: Branch = shaped(Branch, leaves)
        span: Span = shaped(Span, leaves)
        forward, accept, direction = leaves
        tree = _close(tree, branch, span, forward, accept)
        branch, forward = _start_branch(tree, direction)
        return _laid_out((*flat(tree), *flat(branch), forward, tree.active.any()))

    return {"trunk": trunk, "block": block, "merge": merge, "close": close}


_TREE, _BRANCH = 17, 12  # Tensors of a Tree and of a Branch.
_ENDED = _BRANCH - 1


class LockstepTree:
    """Draws trees from the four pieces, compiled or not.

    Args:
        pieces: As :func:`pieces` returns them, or programs made of them.
    """

    def __init__(self, pieces: Pieces) -> None:
        self._trunk, self._block = pieces["trunk"], pieces["block"]
        self._merge, self._close = pieces["merge"], pieces["close"]

    def draw(
        self,
        metric: Metric,
        point: Point,
        momentum: Tensor,
        step: Tensor,
        uniforms: Tensor,
        max_depth: int,
    ) -> Transition:
        """Draw the next point of every chain; arguments and result as ``draw_tree`` has them."""
        rows = uniforms.T.contiguous()
        used = 4 * _TRUNK
        if len(rows) <= used:
            # The direction of a doubling that will not be: any number does.
            rows = torch.cat([rows, rows])
        last = len(rows) - 1
        *found, start_energy, growing = self._trunk(
            *point, momentum, step, metric.root, rows[: used + 1]
        )
        tree, forward = found[:_TREE], found[-1]
        branch: Sequence[Tensor] = found[_TREE : _TREE + _BRANCH]
        for depth in range(_TRUNK, max_depth):
            if not bool(growing):
                break
            branch, span = self._subtree(
                branch, forward, step, metric.root, start_energy, rows[used + 2 :], depth
            )
            accept, used = rows[used + 1], used + 2 + 2 * blocks_of(depth)
            *found, growing = self._close(
                *tree, *branch, *span, forward, accept, rows[min(used, last)]
            )
            tree, branch, forward = found[:_TREE], found[_TREE : _TREE + _BRANCH], found[-1]
        return _transition(shaped(Tree, list(tree)), start_energy, step)

    def _subtree(
        self,
        branch: Sequence[Tensor],
        forward: Tensor,
        step: Tensor,
        root: Tensor,
        start_energy: Tensor,
        rows: Tensor,
        depth: int,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Grow a branch to 2^depth leaves; blocks are joined as a binary counter carries."""
        waiting: list[Sequence[Tensor]] = []
        span: Sequence[Tensor] = ()
        for number in range(blocks_of(depth)):
            *found, done = self._block(
                *branch, forward, step, root, start_energy, rows[2 * number], rows[2 * number + 1]
            )
            branch = found[:_BRANCH]
            span = found[_BRANCH:]
            carry = number
            while carry & 1:
                *span, ended, done = self._merge(*waiting.pop(), *span, branch[_ENDED])
                branch = [*branch[:_ENDED], ended]
                carry >>= 1
            waiting.append(span)
            if bool(done):
                break
        return branch, span


def _transition(tree: Tree, start_energy: Tensor, step: Tensor) -> Transition:
    chosen = Point(*(part.T.contiguous() if part.ndim == 2 else part for part in tree.chosen))
    stats = {
        "lp": -chosen.energy,
        "acceptance_rate": tree.accepted / tree.visited,
        "step_size": step,
        "n_steps": tree.visited.long(),
        "tree_depth": tree.depth,
        "energy": start_energy + tree.error,
        "energy_error": tree.error,
        "diverging": tree.diverging,
    }
    return Transition(chosen, stats)

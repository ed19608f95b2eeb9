"""What evaluates a transition: eager torch, or programs compiled for one model and its data."""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from probkit.fingerprint import digest
from probkit.inference.hmc.potential import Potential
from probkit.inference.hmc.program import Program, compile_function, compiler_found, trace
from probkit.sampler import Problem

__all__ = ["Engine", "close", "engine_of", "make_pieces"]

_LOG = logging.getLogger("probkit")
_MOST_KEPT = 16

Piece = Callable[..., tuple[Tensor, ...]]
PieceMaker = Callable[[Callable[..., tuple[Tensor, Tensor]]], dict[str, Piece]]


class Engine:
    """The potential of a problem and, where they could be compiled, the programs.

    Attributes:
        potential: Energy and gradient, eager.
        tools: What a sampler made of the programs; None where it must run eagerly.
    """

    def __init__(self, potential: Potential, tools: Any = None) -> None:
        self.potential = potential
        self.tools = tools


class Programs:
    """The pieces of a transition, each compiled when it is first called.

    Args:
        pieces: Name -> function of tensors.
        constants: Arguments that each piece takes after its own, where it evaluates the potential.
        evaluating: Names of the pieces that do.
    """

    def __init__(
        self, pieces: dict[str, Piece], constants: Sequence[Tensor], evaluating: Sequence[str]
    ) -> None:
        self._pieces, self._constants = pieces, constants
        self._evaluating = set(evaluating)
        self._built: dict[str, Program] = {}

    def caller(self, name: str) -> Piece:
        """Return the piece ``name`` as a function that compiles itself."""

        def call(*arguments: Tensor) -> tuple[Tensor, ...]:
            program = self._built.get(name)
            if program is None:
                constants = self._constants if name in self._evaluating else ()
                program = compile_function(self._pieces[name], arguments, constants)
                self._built[name] = program
            return program(*arguments)

        return call


def make_pieces(potential: Potential, maker: PieceMaker, example: Tensor) -> dict[str, Piece]:
    """Trace the potential at ``example`` [chain, D], and make pieces that compile when called."""
    graph, constants = trace(potential.raw, [example.T.contiguous().T])

    def evaluate(position: Tensor, *constants: Tensor) -> tuple[Tensor, Tensor]:
        energy, gradient = graph(position, *constants)
        bad = ~(torch.isfinite(energy) & torch.isfinite(gradient).all(-1))
        energy = energy.masked_fill(bad, torch.inf)
        return energy, gradient.masked_fill(bad[:, None], 0.0)

    made = maker(evaluate)
    programs = Programs(made, constants, [name for name in made if name in _EVALUATING])
    return {name: programs.caller(name) for name in made}


def close(ours: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Tell whether two lists of tensors agree up to rounding."""
    for one, other in zip(ours, others, strict=True):
        tolerance = 1e-2 if one.dtype == torch.float32 else 1e-6
        a, b = one.to(torch.float64), other.to(torch.float64)
        scale = tolerance * float(a.nan_to_num(0.0, 0.0, 0.0).abs().max())
        if not torch.allclose(a, b, rtol=tolerance, atol=scale, equal_nan=True):
            return False
    return True


_EVALUATING = frozenset({"trunk", "block", "leaps 1", "leaps 4"})
_BY_PROBLEM: dict[tuple[int, str], Engine] = {}
_BY_CONTENT: OrderedDict[str, Any] = OrderedDict()


def engine_of(
    problem: Problem,
    kind: str,
    position: Tensor,
    build: Callable[[Potential], Any] | None,
    agrees: Callable[[Potential, Any], bool],
) -> Engine:
    """Return the engine of a problem, made on first use.

    Programs are kept for later runs on equal models and data. Before a run uses any, they are
    compared with the eager potential where the chains are, and dropped where they differ (a global
    variable that the model reads may have changed); whatever fails, the run goes on eagerly.

    Args:
        problem: Model and data.
        kind: What is built, for the memory.
        position: Where the chains are [chain, D].
        build: Compiles and returns the tools; None asks for eager transitions.
        agrees: Compares tools with the eager potential.
    """
    kind = f"{kind} {tuple(position.shape)} {position.dtype} {position.device} {build is not None}"
    place = (id(problem), kind)
    if place not in _BY_PROBLEM:
        potential = Potential(problem.model, problem.data)
        tools = None
        if build is not None and (position.device.type != "cpu" or compiler_found()):
            key = digest([kind, problem.model, problem.data])
            tools = _kept(key, potential, agrees) or _built(key, potential, build, agrees)
        _BY_PROBLEM[place] = Engine(potential, tools)
        weakref.finalize(problem, _BY_PROBLEM.pop, place, None)
    return _BY_PROBLEM[place]


def _kept(key: str, potential: Potential, agrees: Callable[[Potential, Any], bool]) -> Any:
    """Return the tools of an earlier run, if they still hold."""
    tools = _BY_CONTENT.get(key)
    try:
        return tools if tools is not None and agrees(potential, tools) else None
    except Exception:
        return None


def _built(
    key: str,
    potential: Potential,
    build: Callable[[Potential], Any],
    agrees: Callable[[Potential, Any], bool],
) -> Any:
    """Build tools anew; None where that fails or they differ from the eager potential."""
    _LOG.info("compiling the transitions of %s", type(potential.model).__name__)
    try:
        tools = build(potential)
        if not agrees(potential, tools):
            _LOG.info("compiled transitions differ from eager ones: the run goes on eagerly")
            return None
    except Exception as error:
        _LOG.info("transitions could not be compiled (%s): the run goes on eagerly", error)
        return None
    _BY_CONTENT[key] = tools
    while len(_BY_CONTENT) > _MOST_KEPT:
        _BY_CONTENT.popitem(last=False)
    return tools

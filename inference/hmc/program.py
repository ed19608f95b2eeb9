"""Tensor functions compiled ahead of use: traced to primitive operations, then built by inductor.

Tracing (``make_fx``) runs a function once on stand-in tensors and records the operations, those of
the backward pass included, so any log joint will do that neither branches on its values nor draws
random numbers. What a function reads besides its arguments, such as the data, becomes a constant
that is passed at every call. The result is called without the guards of ``torch.compile``: sizes,
dtypes and strides are those of the examples.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from probkit.rng import scope

__all__ = ["Program", "compiler_found", "compile_function", "trace"]

_LOG = logging.getLogger("probkit")

TensorFunction = Callable[..., tuple[Tensor, ...]]


@functools.cache
def compiler_found() -> bool:
    """Tell whether there is a C++ compiler that inductor could use."""
    if sys.platform == "win32":
        return shutil.which("cl") is not None
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        return shutil.which(get_cpp_compiler()) is not None
    except Exception:
        return False


def trace(function: TensorFunction, example: Sequence[Tensor]) -> tuple[Any, list[Tensor]]:
    """Record ``function`` as a graph of primitive operations.

    Args:
        function: Tensors to a tuple of tensors; it may use ``torch.autograd.grad`` inside.
        example: Arguments of the sizes, dtypes and strides to come.

    Returns:
        The graph module, and the constants that it takes after the arguments.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    stand_ins = [fake.from_tensor(tensor, static_shapes=True) for tensor in _apart(example)]
    graph = make_fx(lambda *args: function(*args))(*stand_ins)
    return graph, _lift_constants(graph, len(example))


def _lift_constants(graph: Any, arguments: int) -> list[Tensor]:
    """Turn the constants of a graph into arguments after the first ``arguments``."""
    last = [node for node in graph.graph.nodes if node.op == "placeholder"][arguments - 1]
    places: dict[str, Any] = {}
    constants: list[Tensor] = []
    for node in list(graph.graph.nodes):
        if node.op != "get_attr" or not isinstance(getattr(graph, node.target, None), Tensor):
            continue
        if node.target not in places:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(f"constant_{len(constants)}")
            last.meta = dict(node.meta)
            places[node.target] = last
            constants.append(getattr(graph, node.target))
        node.replace_all_uses_with(places[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    return constants


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors, gaps and all sharing of memory removed; dense strides stay.

    Stand-ins are remembered by tensor, and two arguments that are one tensor today may be two
    tomorrow.
    """
    return [tensor.detach().clone() for tensor in tensors]


class Program:
    """A compiled tensor function.

    Args:
        call: What inductor built.
        constants: Arguments that never change.
        example: Arguments whose strides it was built for.
    """

    def __init__(
        self, call: Callable[..., Any], constants: Sequence[Tensor], example: Sequence[Tensor]
    ) -> None:
        self._call = call
        self._constants = tuple(constants)
        self._strides = tuple(tensor.stride() for tensor in example)

    def __call__(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        """Run it; arguments of other strides are copied."""
        fitting = [
            tensor if tensor.stride() == stride else _restride(tensor, stride)
            for tensor, stride in zip(arguments, self._strides, strict=True)
        ]
        with torch.no_grad():
            return tuple(self._call(*fitting, *self._constants))


def _restride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(
        tensor.shape, stride, dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def compile_function(
    function: TensorFunction, example: Sequence[Tensor], constants: Sequence[Tensor] = ()
) -> Program:
    """Trace and build ``function(*example, *constants)``.

    Raises:
        Exception: Whatever tracing or the compiler raise; callers go on without.
    """
    import torch._inductor as inductor

    example = _apart(example)
    with _quiet():
        graph, lifted = trace(function, [*example, *constants])
        arguments = [*example, *constants, *lifted]
        call = inductor.compile(graph, list(arguments), options=dict(_OPTIONS))
    return Program(call, [*constants, *lifted], example)


# One translation unit with the calls of all kernels, and no pool of compiler processes.
_OPTIONS: dict[str, Any] = {"cpp_wrapper": True, "compile_threads": 1}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop warnings of the compiler's own making; filters are global, so under the scope's lock."""
    with scope(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

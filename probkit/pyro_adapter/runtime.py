"""Running Pyro code in isolation, and remembering what was learnt from its data."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import pyro
import torch
from pyro.nn.module import _Context
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor
from torch.overrides import TorchFunctionMode

from probkit.errors import DataError
from probkit.rng import Rng, scope

__all__ = [
    "DataCache",
    "DetachedData",
    "isolated",
    "name_of",
    "outside_vmap",
    "parameters_of",
    "require_mapped",
    "run_batched",
    "stream_positions",
]

T = TypeVar("T")


@contextlib.contextmanager
def isolated(*, rng: Rng | None = None, validate: bool = False) -> Iterator[None]:
    """Run Pyro code apart from the caller's Pyro state.

    Inside, the random streams continue ``rng``, the parameter store and the handler stack are
    empty, module parameters are local to their module, and all validation flags are ``validate``.
    On leaving, everything is what it was.

    Args:
        rng: Stream for torch, NumPy and Python; None leaves the global streams alone.
        validate: Argument validation of distributions, handlers and inference.
    """
    settings = {
        "module_local_params": True,
        "validate_distributions_pyro": validate,
        "validate_distributions_torch": validate,
        "validate_infer": validate,
        # Its checks of log densities warn of NaN by branching on values; samplers check themselves.
        "validate_poutine": False,
    }
    with (
        scope(rng=rng, validate=validate, foreign=True),
        pyro.settings.context(**settings),
        _empty_parameter_store(),
        _empty_stack(),
        _local_contexts(),
        _no_vmap_advice(),
    ):
        yield


@contextlib.contextmanager
def _local_contexts() -> Iterator[None]:
    """Give modules that were made without local parameters the (empty) state that these ask for."""
    _Context.param_state = {"params": {}, "constraints": {}}
    try:
        yield
    finally:
        if "param_state" in vars(_Context):
            del _Context.param_state


_quiet: list[bool] = []


@contextlib.contextmanager
def _no_vmap_advice() -> Iterator[None]:
    """Silence torch's advice on operations that vmap runs one by one."""
    # Torch does not tell how the switch stands: nested blocks are counted, under the scope's lock.
    switch = getattr(torch._C._functorch, "_set_vmap_fallback_warning_enabled", lambda flag: None)
    _quiet.append(True)
    switch(False)
    try:
        yield
    finally:
        _quiet.pop()
        switch(not _quiet)


@contextlib.contextmanager
def outside_vmap() -> Iterator[None]:
    """Leave the transformations of torch.func that are running, to draw where they forbid it."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with temporarily_clear_interpreter_stack():
        yield


@contextlib.contextmanager
def _empty_parameter_store() -> Iterator[None]:
    store = pyro.get_param_store()
    saved = (store._params, store._param_to_name, store._constraints)
    store.clear()
    try:
        yield
    finally:
        store._params, store._param_to_name, store._constraints = saved


@contextlib.contextmanager
def _empty_stack() -> Iterator[None]:
    """Hide the handlers and plates that the caller is inside of."""
    handlers, plates = list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)
    _PYRO_STACK.clear()
    _DIM_ALLOCATOR._stack.clear()
    try:
        yield
    finally:
        _PYRO_STACK[:] = handlers
        _DIM_ALLOCATOR._stack[:] = plates


def stream_positions() -> tuple[Any, ...]:
    """Return where the global random streams of torch, NumPy and Python are, to be compared."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    arrays = (torch.get_rng_state().numpy(), numpy_state[1])
    return (*(array.tobytes() for array in arrays), numpy_state[2], random.getstate())


class DataCache(Generic[T]):
    """Results that depend on one data mapping, looked up by the identity of its tensors.

    Programs may derive sizes from the content of their data, so shapes are no safe key. Tensors are
    compared by identity and version; everything else by equality.

    Args:
        size: Number of data mappings to remember.
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._entries: list[tuple[dict[str, Any], T]] = []

    def get(self, data: Mapping[str, Any], make: Callable[[], T]) -> T:
        """Return what belongs to ``data``, made by ``make`` at its first sight."""
        for known, result in self._entries:
            if _same(known, data):
                return result
        result = make()
        self.put(data, result)
        return result

    def knows(self, data: Mapping[str, Any]) -> bool:
        """Whether something belongs to ``data``."""
        return any(_same(known, data) for known, _ in self._entries)

    def put(self, data: Mapping[str, Any], result: T) -> None:
        """Remember ``result`` for ``data``."""
        kept = [entry for entry in self._entries if not _same(entry[0], data)]
        key = {name: _identity(value) for name, value in data.items()}
        self._entries = [(key, result), *kept][: self._size]


@dataclass(frozen=True)
class _Seen:
    """A tensor, remembered without keeping it alive."""

    tensor: weakref.ref[Tensor]
    version: int


def _identity(value: Any) -> Any:
    return _Seen(weakref.ref(value), _version(value)) if isinstance(value, Tensor) else value


def _version(value: Tensor) -> int:
    return -1 if value.is_inference() else value._version


def _same(known: Mapping[str, Any], data: Mapping[str, Any]) -> bool:
    return known.keys() == data.keys() and all(
        _matches(known[name], value) for name, value in data.items()
    )


def _matches(key: Any, value: Any) -> bool:
    if isinstance(key, _Seen):
        # The remembered tensor may be gone, and gone is None as an unobserved argument is.
        same = isinstance(value, Tensor) and key.tensor() is value
        return same and key.version == _version(value)
    return key is value or _equal(key, value)


def _equal(a: Any, b: Any) -> bool:
    simple = (bool, int, float, str, type(None), torch.Size)
    return isinstance(a, simple) and type(a) is type(b) and a == b


def parameters_of(program: Callable[..., Any]) -> tuple[dict[str, bool], bool]:
    """Return the keyword arguments of a program, and whether it takes any others.

    Returns:
        (name -> whether it is required, whether there is a ``**kwargs``).

    Raises:
        DataError: The program has arguments that cannot be passed by name.
    """
    target: Any = program.forward if isinstance(program, torch.nn.Module) else program
    names: dict[str, bool] = {}
    anything = False
    for name, parameter in inspect.signature(target).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            anything = True
        elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise DataError(
                f"argument {name!r} of {name_of(program)} cannot be passed by name; "
                "drop the '/' from its signature"
            )
        elif parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            names[name] = parameter.default is inspect.Parameter.empty
    return names, anything


def name_of(program: Callable[..., Any]) -> str:
    """Return what to call a program in messages."""
    if isinstance(program, functools.partial):
        return name_of(program.func)
    return getattr(program, "__name__", None) or type(program).__name__


class _NotMapped(Exception):
    """A random draw did not become one draw per element under vmap."""


def require_mapped(value: Any) -> None:
    """Stop a vmapped run in which a random draw is shared by all elements."""
    if isinstance(value, Tensor) and not torch._C._functorch.is_batchedtensor(value):
        raise _NotMapped


_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class DetachedData(TorchFunctionMode):
    """Read ``tensor.data``, which vmap forbids, as ``tensor.detach()``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


class _MappedFactories(TorchFunctionMode):
    """Make freshly allocated tensors part of the vmap that runs.

    Torch's distributions fill such tensors in place with random numbers, which vmap allows only
    where they have its batch dim.

    Args:
        counter: Any mapped scalar of the running vmap.
    """

    _FACTORIES = frozenset({torch.empty, torch.Tensor.new, torch.Tensor.new_empty})

    def __init__(self, counter: Tensor) -> None:
        super().__init__()
        self._zero = counter * 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._FACTORIES and isinstance(result, Tensor):
            return result + self._zero.to(result)
        return result


def run_batched(
    function: Callable[[Mapping[str, Tensor], bool], dict[str, Tensor]],
    values: Mapping[str, Tensor],
    n: int,
    *,
    rng: Rng | None,
    chunk: int = 256,
) -> dict[str, Tensor]:
    """Run ``function`` once for each of ``n`` points and stack what it returns.

    One vectorised run where the program allows it, else one run per point (programs that branch on
    values, samplers that reject). Both give independent draws; their numbers differ.

    Args:
        function: (point, mapped) -> tensors; ``mapped`` tells whether it runs under vmap, and then
            has to pass every random draw to :func:`require_mapped`.
        values: Points [n, *site].
        n: Number of points.
        rng: Stream of all draws.
        chunk: Points per vectorised run.
    """

    def point(row: Mapping[str, Tensor], counter: Tensor) -> dict[str, Tensor]:
        with _MappedFactories(counter):
            return function(row, True)

    generator = rng if isinstance(rng, torch.Generator) else None
    before = None if generator is None else generator.get_state()
    try:
        with isolated(rng=rng):
            mapped: dict[str, Tensor] = torch.func.vmap(
                point, randomness="different", chunk_size=chunk
            )(dict(values), torch.arange(n))
        return mapped
    except (_NotMapped, RuntimeError, ValueError, TypeError, NotImplementedError):
        if generator is not None and before is not None:
            generator.set_state(before)
    with isolated(rng=rng):
        rows = [function({k: v[i] for k, v in values.items()}, False) for i in range(n)]
    return stack(rows)


def stack(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack equally shaped results of single runs.

    Raises:
        DataError: The runs returned different names or shapes.
    """
    first = rows[0]
    for row in rows[1:]:
        if row.keys() != first.keys() or any(row[k].shape != first[k].shape for k in first):
            raise DataError(
                "the Pyro program returns other sites or shapes from run to run; probkit needs one "
                "fixed structure, so make the program's control flow independent of sampled values"
            )
    return {name: torch.stack([row[name] for row in rows]) for name in first}

"""Parameters of modules, exchanged for given tensors while a guide runs."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError
from probkit.pyro_adapter.runtime import name_of

__all__ = ["Slot", "slots_near", "slots_of", "slots_of_statements", "swapped"]


@dataclass(frozen=True)
class Slot:
    """The places of one parameter: entries of modules' parameter dicts, several where shared."""

    places: tuple[tuple[dict[str, Any], str], ...]

    def read(self) -> Tensor:
        """Return the tensor that is there."""
        home, key = self.places[0]
        value: Tensor = home[key]
        return value

    def write(self, value: Any) -> None:
        """Put a tensor there."""
        for home, key in self.places:
            home[key] = value


@contextlib.contextmanager
def swapped(slots: Mapping[str, Slot], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Put ``values`` in the place of the parameters of the same names."""
    saved = {name: slots[name].read() for name in values if name in slots}
    try:
        for name in saved:
            slots[name].write(values[name])
        yield
    finally:
        for name, value in saved.items():
            slots[name].write(value)


def slots_of(module: torch.nn.Module) -> dict[str, Slot]:
    """Return the slots of all parameters of a module; a shared one has the last of its names."""
    names: dict[int, str] = {}
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for prefix, child in module.named_modules():
        for key, value in child._parameters.items():
            if value is not None:
                names[id(value)] = f"{prefix}.{key}" if prefix else key
                places.setdefault(id(value), []).append((child._parameters, key))
    return {name: Slot(tuple(places[number])) for number, name in names.items()}


def slots_near(call: Callable[..., Any]) -> dict[str, Slot]:
    """Return the slots of all modules that a guide can be seen to use.

    These are the guide itself, the variables that it uses, and the object that it is a method of.
    """
    if isinstance(call, torch.nn.Module):
        return slots_of(call)
    found: dict[str, Slot] = {}
    for number, module in enumerate(_modules_near(call)):
        for name, slot in slots_of(module).items():
            found[f"{number}.{name}"] = slot
    return found


def slots_of_statements(
    call: Callable[..., Any],
    near: Mapping[str, Slot],
    values: Mapping[str, Tensor],
    statements: Mapping[str, Tensor],
) -> dict[str, Slot]:
    """Find the slots of the parameters that ``pyro.module`` statements registered.

    Args:
        call: The guide.
        near: Slots by name.
        values: What the slots held while the guide ran, by the same names.
        statements: Statement name -> the tensor that it registered.

    Raises:
        CapabilityError: A tensor belongs to none of the slots.
    """
    owner = {id(value): name for name, value in values.items()}
    missing = [name for name, value in statements.items() if id(value) not in owner]
    if missing:
        raise CapabilityError(
            f"guide {name_of(call)}: the module of {', '.join(missing)} is not among the variables "
            "that the function uses; make the guide a PyroModule"
        )
    return {name: near[owner[id(value)]] for name, value in statements.items()}


def _modules_near(call: Any) -> list[torch.nn.Module]:
    if isinstance(call, functools.partial):
        inner = [*call.args, *call.keywords.values()]
        return [*_only_modules(inner), *_modules_near(call.func)]
    owner = getattr(call, "__self__", None)
    near: list[Any] = [] if owner is None else [owner, *getattr(owner, "__dict__", {}).values()]
    function = inspect.unwrap(getattr(call, "__func__", call))
    if inspect.isfunction(function):
        used = inspect.getclosurevars(function)
        near += [*used.nonlocals.values(), *used.globals.values()]
    return _only_modules(near)


def _only_modules(values: list[Any]) -> list[torch.nn.Module]:
    return [value for value in values if isinstance(value, torch.nn.Module)]

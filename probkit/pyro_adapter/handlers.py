"""Effect handlers: what FromPyro and PyroGuide do at each statement of a program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit.errors import DataError
from probkit.pyro_adapter.flat import Flat
from probkit.pyro_adapter.runtime import require_mapped

__all__ = [
    "FixParams",
    "Indices",
    "LiftParams",
    "Substitute",
    "is_annotated",
    "is_flat",
    "is_free",
    "is_latent",
    "is_observation",
]


def _base(fn: Any) -> Any:
    while isinstance(fn, dist.MaskedDistribution | dist.Independent):
        fn = fn.base_dist
    return fn


def is_free(site: Mapping[str, Any]) -> bool:
    """Whether a message is a sample statement with a law of its own (not a plate, not fixed)."""
    if site["type"] != "sample" or isinstance(site["fn"], _Subsample):
        return False
    fixed = isinstance(_base(site["fn"]), dist.Delta | dist.Unit)
    return not (fixed or (site["infer"] or {}).get("_deterministic"))


def is_latent(site: Mapping[str, Any]) -> bool:
    """Whether a message is a latent sample site; Delta sites are determined by their parents."""
    return is_free(site) and not site["is_observed"]


def is_observation(site: Mapping[str, Any]) -> bool:
    """Whether a message is an observed sample site; factors and deterministic sites are not."""
    return is_free(site) and bool(site["is_observed"])


def is_flat(site: Mapping[str, Any]) -> bool:
    """Whether the law of a sample statement is an improper uniform one, which has no draws."""
    return isinstance(_base(site["fn"]), dist.ImproperUniform)


def is_annotated(site: Mapping[str, Any]) -> bool:
    """Whether a sample statement asks to be enumerated, infer={"enumerate": "parallel"}."""
    return (site["infer"] or {}).get("enumerate") == "parallel"


class Substitute(Messenger):
    """Give latent sites the values of one point.

    A site with an improper uniform law is never drawn: without a value it gets a starting point.

    Args:
        values: Site name -> value.
        strict: Whether a latent site without a value is an error; else it is drawn.
        enumerating: Whether sites that ask for enumeration may lack a value.
        mapped: Whether draws must be one per element of a vmap.
        choose: Site name -> function (value, distribution) -> value, applied in place of the plain
            value; for sites of which only a part is given.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        *,
        strict: bool = True,
        enumerating: bool = False,
        mapped: bool = False,
        choose: Mapping[str, Callable[[Tensor, Distribution], Tensor]] | None = None,
    ) -> None:
        super().__init__()
        self._values = values
        self._strict = strict
        self._enumerating = enumerating
        self._mapped = mapped
        self._choose = choose or {}

    def _pyro_sample(self, msg: Any) -> None:
        if not is_latent(msg):
            return
        name = msg["name"]
        if name in self._values:
            value = self._values[name]
            if name in self._choose:
                value = self._choose[name](value, msg["fn"])
            msg["value"], msg["done"] = value, True
        elif self._enumerating and is_annotated(msg):
            return
        elif self._strict:
            raise DataError(
                f"expected a value for every site of the Pyro program, missing: {name!r}"
            )
        elif is_flat(msg) and not isinstance(msg["fn"], Flat):
            law = msg["fn"]
            start = Flat(law.support, law.batch_shape, law.event_shape)
            msg["value"], msg["done"] = start.sample(), True

    def _pyro_post_sample(self, msg: Any) -> None:
        if self._mapped and is_latent(msg) and msg["name"] not in self._values:
            require_mapped(msg["value"])


class LiftParams(Messenger):
    """Turn ``pyro.param`` statements into sample sites with a flat law that start at their value.

    Parameters of modules (``pyro.module``, PyroModule) are part of the program and stay as they
    are: their statements do not carry the value into the computation.
    """

    def _pyro_param(self, msg: Any) -> None:
        if msg["fn"] != pyro.get_param_store().get_param or "$$$" in msg["name"]:
            return
        start = _initial_value(msg)
        constraint = msg["kwargs"].get("constraint", constraints.real)
        event = constraint.event_dim
        split = start.ndim - event
        law = Flat(constraint, start.shape[:split], start.shape[split:], start=start)
        # Plates index a parameter after the fact; they do not repeat or weight it.
        msg.update(
            type="sample",
            fn=law,
            args=(),
            kwargs={},
            is_observed=False,
            value=None,
            infer={"_param": msg["kwargs"]},
            cond_indep_stack=(),
            scale=1.0,
            mask=None,
        )

    def _pyro_post_sample(self, msg: Any) -> None:
        kwargs = (msg["infer"] or {}).get("_param")
        if kwargs is not None:
            # Restore the statement, so that a subsampling plate takes its rows of the parameter.
            msg["type"], msg["kwargs"] = "param", kwargs
            msg["value"] = msg["value"].view_as(msg["value"])
            msg["value"]._pyro_unconstrained_param = torch.zeros(())


def _initial_value(msg: Any) -> Tensor:
    if len(msg["args"]) < 2:
        raise DataError(
            f"pyro.param({msg['name']!r}) has no initial value: give one, as in "
            f"pyro.param({msg['name']!r}, torch.tensor(1.0)); the parameter store is not read"
        )
    start = msg["args"][1]
    value = start() if callable(start) else start
    return value.detach()


class FixParams(Messenger):
    """Give ``pyro.param`` statements values, and record the statements met.

    Args:
        values: Parameter name -> constrained value; a function of (name, constraint) that returns
            None where the initial value is meant.
    """

    def __init__(self, values: Callable[[str, Any], Tensor | None]) -> None:
        super().__init__()
        self._values = values
        self.seen: dict[str, tuple[Tensor, Any]] = {}

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if msg["fn"] != pyro.get_param_store().get_param:
            return
        if "$$$" in name:
            # Statement of pyro.module: the module itself holds the value.
            msg["value"], msg["done"] = msg["args"][1], True
            self.seen.setdefault(name, (msg["args"][1], None))
            return
        constraint = msg["kwargs"].get("constraint", constraints.real)
        value = self._values(name, constraint)
        if value is None:
            value = _initial_value(msg)
            self.seen.setdefault(name, (value, constraint))
        value = value.view_as(value)
        value._pyro_unconstrained_param = torch.zeros(())  # type: ignore[attr-defined]
        msg["value"], msg["done"] = value, True


class Indices(Messenger):
    """Decide what plates subsample.

    The minibatched plate gets the index of the batch, or all its units. Any other plate has to take
    its full range.

    Args:
        plate: Name of the minibatched plate; None for none.
        index: [unit] index of the batch; None for all units.
        lenient: Whether the minibatched plate may keep its own subsample when there is no index
            (to look at shapes).
    """

    def __init__(self, plate: str | None, index: Tensor | None, *, lenient: bool = False) -> None:
        super().__init__()
        self._plate = plate
        self._index = index
        self._lenient = lenient

    def _pyro_sample(self, msg: Any) -> None:
        law = msg["fn"]
        if not isinstance(law, _Subsample):
            return
        name, size, asked = msg["name"], law.size, law.subsample_size
        if name != self._plate:
            given = None if msg["value"] is None else len(msg["value"])
            taken = given if given is not None else asked
            if taken is not None and taken < size:
                raise DataError(
                    f"plate {name!r} subsamples {taken} of {size} units by itself: name it as "
                    f"FromPyro(..., minibatch_plate={name!r}), or drop its subsample"
                )
            return
        if self._index is None and asked is not None and asked < size:
            if self._lenient:
                return
            raise DataError(
                f"plate {name!r} asks for subsample_size={asked}, but the data is whole ({size} "
                "units): drop subsample_size; the sampler's batch_size decides"
            )
        index = torch.arange(size) if self._index is None else self._index
        if self._index is not None and asked is not None and asked != len(index):
            raise DataError(
                f"plate {name!r} asks for subsample_size={asked}, but the batch has {len(index)} "
                f"units: drop subsample_size, or use batch_size={asked}"
            )
        if self._index is not None and len(index) and int(index.max()) >= size:
            raise DataError(
                f"plate {name!r} has {size} units, the batch asks for unit {int(index.max())}"
            )
        msg["value"] = index.to(law.device)

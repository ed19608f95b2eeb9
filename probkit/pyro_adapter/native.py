"""A probkit model inside Pyro."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
from torch import Tensor
from torch.distributions import biject_to

from probkit.data import convert
from probkit.density import site_dtype
from probkit.errors import CapabilityError
from probkit.model import Site, lacks, prepare
from probkit.pyro_adapter.flat import Flat

__all__ = ["native_sites", "to_pyro"]


def native_sites(name: str, model: Any, data: Any) -> dict[str, Tensor]:
    """Sample the sites of a probkit model inside a Pyro program.

    Each site is an improper uniform sample site; one factor carries the model's log joint. Call it
    within any larger program, once per ``name``.

    Args:
        name: Prefix of the Pyro sites, ``<name>.<site>``; empty for none.
        model: A model with ``log_joint`` and continuous sites.
        data: Its data; may depend on other sites of the program.

    Returns:
        {site: value}, for use in the rest of the program.

    Raises:
        CapabilityError: The model has no log joint, a discrete site, or a support that has no
            bijection to the reals.

    Example:
        A model's ``scale`` as the noise of another observation::

            def program(data, y):
                values = native_sites("inner", model, data)
                pyro.sample("y", dist.Normal(0.0, values["scale"]), obs=y)
    """
    missing = lacks(model, ("sites", "log_joint"))
    if missing:
        raise CapabilityError(
            f"Pyro needs a model with sites and log_joint; {type(model).__name__} lacks "
            f"{', '.join(missing)}"
        )
    prefix = f"{name}." if name else ""
    ready = prepare(model, convert(data).data)
    sites = model.sites(ready)
    for site_name, site in sites.items():
        _check_site(site_name, site)
    dtype = site_dtype(ready)
    values = {
        site_name: pyro.sample(
            prefix + site_name, Flat(_support(site), (), site.shape, dtype=dtype)
        )
        for site_name, site in sites.items()
    }
    pyro.factor(f"{prefix}log_joint", _log_joint(model, sites, values, ready))
    return values


def _support(site: Site) -> Any:
    """The support as one event over all dims of the site."""
    from torch.distributions import constraints

    rest = len(site.shape) - site.support.event_dim
    return constraints.independent(site.support, rest) if rest else site.support


def _check_site(name: str, site: Site) -> None:
    if site.discrete:
        raise CapabilityError(
            f"to_pyro needs continuous sites, {name!r} is discrete; sum it out of the model"
        )
    try:
        biject_to(site.support)
    except NotImplementedError:
        raise CapabilityError(
            f"to_pyro: site {name!r} has support {site.support}, to which no bijection is known"
        ) from None


def _log_joint(model: Any, sites: Any, values: dict[str, Tensor], data: Any) -> Tensor:
    """The log joint, for values with or without the leading dims of parallel particles."""
    lead = next(
        (values[n].shape[: values[n].ndim - len(site.shape)] for n, site in sites.items()), ()
    )
    if not lead or getattr(model, "batched", False):
        return model.log_joint(values, data)
    import torch

    flat = {
        n: values[n].expand(*lead, *site.shape).reshape(-1, *site.shape)
        for n, site in sites.items()
    }
    from probkit.rng import scope

    with scope(validate=False):
        each = torch.func.vmap(lambda point: model.log_joint(point, data))(flat)
    return each.reshape(lead)


def to_pyro(model: Any) -> Callable[..., dict[str, Tensor]]:
    """Return a Pyro program ``program(data)`` whose log joint is that of a probkit model.

    It works in ``pyro.infer`` (SVI, HMC, NUTS, AutoGuides); starting values of its sites are
    uniform on [-2, 2] in unconstrained space. It cannot be simulated forward.

    Args:
        model: A model with ``log_joint`` and continuous sites.

    Raises:
        CapabilityError: The model has no log joint, or (when run) a discrete site.

    Example:
        >>> import torch
        >>> from pyro import poutine
        >>> from torch.distributions import Normal, constraints
        >>> from probkit.model import Site
        >>> class Location:
        ...     def sites(self, data):
        ...         return {"mu": Site((), constraints.real)}
        ...     def log_joint(self, values, data, *, scale=1.0):
        ...         return Normal(values["mu"], 1.0).log_prob(data).sum()
        >>> program = to_pyro(Location())
        >>> mu = {"mu": torch.tensor(0.0)}
        >>> trace = poutine.trace(poutine.condition(program, mu)).get_trace(torch.zeros(2))
        >>> trace.log_prob_sum()
        tensor(-1.8379)
    """
    missing = lacks(model, ("sites", "log_joint"))
    if missing:
        raise CapabilityError(
            f"to_pyro needs a model with sites and log_joint; {type(model).__name__} lacks "
            f"{', '.join(missing)}"
        )

    def program(data: Any) -> dict[str, Tensor]:
        return native_sites("", model, data)

    return program

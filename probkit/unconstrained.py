"""The map between constrained site values and one flat unconstrained vector."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions.transforms import Transform

from probkit.bijections import bijection
from probkit.errors import CapabilityError, DataError
from probkit.model import Site, Values

__all__ = ["Unconstrained"]


class Unconstrained:
    """Bijection between the values of continuous sites and a vector [*batch, size].

    Each support has its bijection (:func:`probkit.bijections.bijection`), sites are laid one after
    another. HMC, SVI and MAP share it.

    Args:
        sites: Site name -> site; all continuous.

    Raises:
        CapabilityError: A site is discrete, or its support has no bijection.

    Attributes:
        size: Length of the flat vector.

    Example:
        >>> from torch.distributions import constraints
        >>> u = Unconstrained({"scale": Site((), constraints.positive)})
        >>> values, log_det = u.constrain(torch.tensor([0.0], dtype=torch.float64))
        >>> values["scale"], log_det
        (tensor(1., dtype=torch.float64), tensor(0., dtype=torch.float64))
    """

    def __init__(self, sites: Mapping[str, Site]) -> None:
        discrete = [name for name, site in sites.items() if site.discrete]
        if discrete:
            raise CapabilityError(
                f"gradient-based samplers need continuous sites; discrete: {', '.join(discrete)}. "
                "Sum them out (of a Pyro program by FromPyro(..., enumerate_discrete=True)), or "
                "use EM or SMC"
            )
        self.sites = dict(sites)
        self._transforms: dict[str, Transform] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._slices: dict[str, slice] = {}
        start = 0
        for name, site in self.sites.items():
            try:
                transform = bijection(site.support)
            except CapabilityError as error:
                raise CapabilityError(f"site {name!r}: {error}") from error
            shape = torch.Size(transform.inverse_shape(torch.Size(site.shape)))
            self._transforms[name], self._shapes[name] = transform, shape
            self._slices[name] = slice(start, start + shape.numel())
            start += shape.numel()
        self.size = start

    def constrain(self, flat: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Map [*batch, size] to values [*batch, *site] and the log Jacobian [*batch].

        The log Jacobian is log |d values / d flat|: adding it to the density of the values gives
        the density of the flat vector.
        """
        values: dict[str, Tensor] = {}
        log_det = flat.new_zeros(flat.shape[:-1])
        for name, (part, value) in self._parts(flat).items():
            values[name] = value
            log_det = log_det + self._log_det(name, part, value)
        return values, log_det

    def values(self, flat: Tensor) -> dict[str, Tensor]:
        """Map [*batch, size] to values [*batch, *site]."""
        return {name: value for name, (_, value) in self._parts(flat).items()}

    def _parts(self, flat: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        parts = {}
        for name, transform in self._transforms.items():
            part = flat[..., self._slices[name]].reshape(flat.shape[:-1] + self._shapes[name])
            parts[name] = (part, transform(part))
        return parts

    def _log_det(self, name: str, part: Tensor, value: Tensor) -> Tensor:
        """Sum the transform's log Jacobian over all dims of the site."""
        log_det: Tensor = self._transforms[name].log_abs_det_jacobian(part, value)
        site_dims = log_det.ndim - (part.ndim - len(self._shapes[name]))
        return log_det.sum(tuple(range(-site_dims, 0))) if site_dims > 0 else log_det

    def flatten(self, values: Values) -> Tensor:
        """Map values [*batch, *site] to the vector [*batch, size].

        Raises:
            DataError: A site is missing, or a value lies outside its support.
        """
        missing = [name for name in self.sites if name not in values]
        if missing:
            raise DataError(f"expected a value for every site, missing: {', '.join(missing)}")
        columns = []
        for name, site in self.sites.items():
            value = values[name]
            lead = value.shape[: value.ndim - len(site.shape)]
            if not bool(site.support.check(value).all()):
                raise DataError(f"site {name!r}: a value lies outside its support {site.support}")
            free: Tensor = self._transforms[name].inv(value)
            columns.append(free.reshape(lead + (self._shapes[name].numel(),)))
        if not columns:
            return torch.zeros(0, dtype=torch.float64)
        return torch.cat(columns, dim=-1)

"""The family of a Laplace approximation: a Gaussian over unconstrained sites, others held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.bijections import bijection
from probkit.errors import CapabilityError
from probkit.files import storable
from probkit.guide import Guide, LogQ, Params
from probkit.inference.guides import _marginal
from probkit.model import Batch, Site, Values
from probkit.rng import Rng, stream
from probkit.unconstrained import Unconstrained

__all__ = ["LaplaceNormal"]


@storable
@dataclass(frozen=True)
class LaplaceNormal(Guide):
    """A Gaussian around the mode, in the unconstrained space; what :class:`Laplace` fits.

    Its parameters are ``loc`` [A], ``covariance``, the names of the ``sites`` that vary, and the
    values ``held`` of those that do not.

    Args:
        linearised: Whether networks predict by the Jacobian of their outputs (in closed form), or
            by draws of the weights.
    """

    linearised: bool = True

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Refuse: parameters come from :class:`Laplace`, not from gradient steps.

        Raises:
            CapabilityError: Always.
        """
        raise CapabilityError(
            "LaplaceNormal has no starting parameters; fit with Laplace(), or give SVI MeanField() "
            "or FullRank(). Fixed(post.source.guide, post.source.params[0]) makes it a proposal"
        )

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw ``n`` values of all sites; the density is that of the sites that vary."""
        loc, covariance = params["loc"], params["covariance"]
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "draw")
        shape, device = (n, len(loc)), generator.device
        noise = torch.randn(shape, generator=generator, dtype=loc.dtype, device=device).to(loc)
        free = Unconstrained(varying(params, model.sites(batch.data)))
        values, log_det = free.constrain(loc + covariance.colour(noise))
        base = -0.5 * (noise.square().sum(-1) + len(loc) * math.log(2 * math.pi))
        log_q = base - covariance.log_det_root - log_det
        for name, value in params["held"].items():
            values[name] = value.expand(n, *value.shape)
        return values, LogQ(log_q, torch.zeros_like(log_q))

    def marginals(self, params: Params, model: Any, data: Any) -> Mapping[str, Distribution]:
        """Return the law of each site that varies."""
        variance = params["covariance"].variance()
        laws, start = {}, 0
        for name, site in varying(params, model.sites(data)).items():
            shape = bijection(site.support).inverse_shape(torch.Size(site.shape))
            part = slice(start, start + torch.Size(shape).numel())
            start = part.stop
            loc, sd = params["loc"][part], variance[part].sqrt()
            laws[name] = _marginal(site, loc.reshape(shape), sd.reshape(shape))
        return laws

    def centre(self, params: Params, model: Any, data: Any) -> dict[str, Tensor]:
        """Return the values of all sites at the mode."""
        free = Unconstrained(varying(params, model.sites(data)))
        return {**free.values(params["loc"]), **params["held"]}


def varying(params: Params, sites: Mapping[str, Site]) -> dict[str, Site]:
    """Return the sites that vary, in the order of the flat vector."""
    return {name: sites[name] for name in params["sites"]}

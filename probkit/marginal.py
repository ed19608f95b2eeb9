"""The marginal model: hyper-parameters alone, everything else integrated out in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from probkit.errors import CapabilityError
from probkit.files import storable
from probkit.model import Model, Site, Values, lacks

__all__ = ["Marginal"]


@storable
@dataclass(frozen=True)
class Marginal(Model):
    """The model p(hyper) p(data | hyper) of a HasEvidence model: a HasLogJoint over its hypers.

    Any sampler for HasLogJoint models fits it; ``Direct(hyper=sampler)`` does so and conditions
    the full model on the result.

    Args:
        model: A model with ``hyper_sites``, ``log_hyperprior`` and ``log_evidence``.

    Raises:
        CapabilityError: The model lacks one of them.

    Example:
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.models import ScaleMixtureNNGP
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> sorted(Marginal(ScaleMixtureNNGP(NNGPKernel())).sites((x, x[:, 0])))[:1]
        ['kernel.b_std']
    """

    model: Any
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        missing = lacks(self.model, ("hyper_sites", "log_hyperprior", "log_evidence"))
        if missing:
            raise CapabilityError(
                f"hyper-parameters need a closed-form evidence; {type(self.model).__name__} lacks "
                f"{', '.join(missing)}"
            )

    @property
    def coords(self) -> Mapping[str, Sequence[Any]]:
        """Coords of the wrapped model."""
        return dict(getattr(self.model, "coords", {}))

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return the hyper-parameters."""
        sites: Mapping[str, Site] = self.model.hyper_sites(data)
        return sites

    def prepare(self, data: Any) -> Any:
        """Check the data as the wrapped model does."""
        check = getattr(self.model, "prepare", None)
        return check(data) if callable(check) else data

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return log p(hyper) + scale * log p(data | hyper), leading dims carried through."""
        evidence: Tensor = self.model.log_evidence(values, data)
        prior: Tensor = self.model.log_hyperprior(values)
        return prior + scale * evidence

    def initial_values(self, data: Any, n: int, *, rng: torch.Generator) -> Mapping[str, Tensor]:
        """Start at the model's own hyper-parameter values, then jitter around them."""
        from probkit.density import site_dtype
        from probkit.unconstrained import Unconstrained

        current = getattr(self.model, "hyper_values", None)
        free = Unconstrained(self.sites(data))
        if not callable(current):
            uniform = torch.rand(
                n, free.size, generator=rng, dtype=site_dtype(data), device=rng.device
            )
            return free.values(4.0 * uniform - 2.0)
        centre = free.flatten(current(data))
        noise = torch.randn(n, free.size, generator=rng, dtype=centre.dtype, device=rng.device)
        noise[0] = 0.0
        return free.values(centre + noise.to(centre.device))

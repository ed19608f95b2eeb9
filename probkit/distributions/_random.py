"""Random pieces shared by the joint laws and by :func:`probkit.distributions.sample`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def inverse_chi(df: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw sqrt(df / chi2_df), differentiable in df."""
    # _standard_gamma is the only gamma sampler of torch that accepts a generator.
    half = torch._standard_gamma(df / 2, generator=generator)
    return (0.5 * df / half.clamp_min(torch.finfo(df.dtype).tiny)).sqrt()


def randn_like(like: Tensor, shape: Any, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

"""What a finished run says about itself: warnings, and the refusal of what is no posterior."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from probkit.errors import ConvergenceWarning, DataError
from probkit.posterior import Posterior

__all__ = ["check_run", "split_r_hat"]

_LOW_BFMI = 0.3
_HIGH_R_HAT = 1.01
_FEWEST_DRAWS = 100
_SUSPECTS = 20


def check_run(posterior: Posterior) -> None:
    """Warn of divergences, low E-BFMI and high R-hat, one line each.

    R-hat and E-BFMI need 100 draws, R-hat at least two chains as well.

    Raises:
        DataError: No chain went anywhere: every one diverged in half of its transitions or never
            moved. Such draws are no posterior.
    """
    diverging = posterior.sample_stats["diverging"]
    _refuse_stuck(posterior, diverging)
    count = int(diverging.sum())
    if count:
        _warn(
            f"{count} of {diverging.numel()} transitions diverged after warm-up: draws near sharp "
            "curvature are missing; raise accept (0.95, 0.99), or reparametrise the model"
        )
    if diverging.shape[1] < _FEWEST_DRAWS:
        return
    bfmi = _bfmi(posterior.sample_stats["energy"])
    if bool((bfmi < _LOW_BFMI).any()):
        _warn(
            f"E-BFMI is {float(bfmi.min()):.2f}, below {_LOW_BFMI}: momenta explore the energies "
            "slowly; reparametrise heavy tails (non-centred), or take more draws"
        )
    if posterior.chains > 1:
        name, value = _worst_r_hat(posterior)
        if value > _HIGH_R_HAT:
            _warn(
                f"R-hat of {name} is {value:.4g}, above {_HIGH_R_HAT}: the chains disagree; take "
                "more warmup and draws, and look for several modes"
            )


def _warn(message: str) -> None:
    warnings.warn(message, ConvergenceWarning, stacklevel=6)


def _refuse_stuck(posterior: Posterior, diverging: Tensor) -> None:
    """Raise where no chain has explored anything."""
    if diverging.shape[1] < 10:
        return
    wild = diverging.double().mean(1) >= 0.5
    still = torch.ones_like(wild)
    for value in posterior.draws.values():
        still &= (value == value[:, :1]).flatten(1).all(1)
    if bool((wild | still).all()):
        raise DataError(
            f"all chains failed: {int(wild.sum())} of {len(wild)} diverged in half of their "
            f"transitions or more, {int(still.sum())} never moved; these draws are no posterior. "
            "Check the log joint and its gradient, start elsewhere, or take more warmup"
        )


def _bfmi(energy: Tensor) -> Tensor:
    """Energy Bayesian fraction of missing information [chain], by ArviZ."""
    import arviz

    found = torch.as_tensor(arviz.bfmi(energy.detach().cpu().double().numpy()))
    return found.nan_to_num(1.0)


def split_r_hat(draws: Tensor) -> Tensor:
    """Return the classic split R-hat [entry] of draws [chain, draw, entry]."""
    half = draws.shape[1] // 2
    parts = torch.cat([draws[:, :half], draws[:, -half:]])
    within = parts.var(1).mean(0)
    between = parts.mean(1).var(0)
    return ((half - 1) / half + between / within).sqrt()


def _worst_r_hat(posterior: Posterior) -> tuple[str, float]:
    """Return the largest rank-normalised R-hat and whose it is.

    ArviZ ranks one scalar after another, so it is asked about the entries whose classic split R-hat
    (of values, and of distances from the median) is largest.
    """
    import arviz

    names: list[str] = []
    columns = []
    for site, value in posterior.draws.items():
        flat = value.detach().cpu().double().reshape(*value.shape[:2], -1)
        names += [f"{site}[{k}]" if value.ndim > 2 else site for k in range(flat.shape[2])]
        columns.append(flat)
    draws = torch.cat(columns, dim=2)
    folded = (draws - draws.flatten(0, 1).median(0).values).abs()
    suspicion = torch.maximum(split_r_hat(draws), split_r_hat(folded)).nan_to_num(0.0, 1e9)
    suspects = suspicion.topk(min(_SUSPECTS, len(names))).indices.tolist()
    found = {names[k]: float(arviz.rhat(draws[:, :, k].numpy())) for k in suspects}
    worst = max(found, key=lambda name: -1.0 if found[name] != found[name] else found[name])
    return worst, found[worst]

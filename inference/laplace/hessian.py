"""Exact second derivatives of a log density, many rows in one batched evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from probkit.errors import DataError

__all__ = ["gradient_and_hessian", "positive_root"]

_ROWS = 64


def gradient_and_hessian(
    log_density: Callable[[Tensor], Tensor], position: Tensor
) -> tuple[Tensor, Tensor]:
    """Differentiate a batched log density twice at one point.

    The point is repeated for each row: the gradient of copy k, entry k, is differentiated once
    more, so that one double backward pass serves many rows.

    Args:
        log_density: [n, D] -> [n], rows independent of each other.
        position: [D].

    Returns:
        Gradient [D] and Hessian [D, D], symmetrised.
    """
    size = len(position)
    rows = []
    for start in range(0, size, _ROWS):
        entries = torch.arange(start, min(size, start + _ROWS), device=position.device)
        with torch.enable_grad():
            copies = position.detach().expand(len(entries), size).clone().requires_grad_()
            (gradient,) = torch.autograd.grad(log_density(copies).sum(), copies, create_graph=True)
            picked = gradient[torch.arange(len(entries), device=position.device), entries]
            if picked.requires_grad:
                (part,) = torch.autograd.grad(picked.sum(), copies, allow_unused=True)
            else:  # The density is linear: no second derivatives.
                part = None
        rows.append(torch.zeros_like(copies) if part is None else part)
    hessian = torch.cat(rows)
    return gradient[0].detach(), 0.5 * (hessian + hessian.mT)


def positive_root(precision: Tensor, names: list[str], what: str) -> Tensor:
    """Return the lower Cholesky factor of minus the Hessian.

    Args:
        precision: [D, D].
        names: Site of each entry.
        what: Name of the model.

    Raises:
        DataError: It is not positive definite; the site that contributes most to the worst
            direction is named.
    """
    factor, info = torch.linalg.cholesky_ex(precision)
    if int(info) == 0 and bool(torch.isfinite(factor).all()):
        return factor
    if not bool(torch.isfinite(precision).all()):
        bad = int((~torch.isfinite(precision)).any(-1).nonzero()[0])
        raise DataError(
            f"Laplace: the second derivatives of log_joint of {what} are not finite for site "
            f"{names[bad]!r} at the mode; rewrite the density, or start elsewhere by mode="
        )
    values, vectors = torch.linalg.eigh(precision)
    worst = int(vectors[:, 0].abs().argmax())
    raise DataError(
        f"Laplace: minus the Hessian of log_joint of {what} is not positive definite at the mode "
        f"(smallest eigenvalue {float(values[0]):.3g}, mostly along site {names[worst]!r}), so the "
        "point is no maximum; give mode= more iterations or a better start, add a prior there, or "
        "use curvature='ggn' for networks"
    )

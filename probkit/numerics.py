"""Numerical policies that every part of probkit shares.

One jitter ladder for Cholesky factors, one way to name a non-finite value, one guard against
allocations that cannot fit, and the few log-space functions that PyTorch lacks.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from probkit.errors import DataError, NumericsWarning, ShapeError

__all__ = [
    "JITTER_LADDER",
    "available_memory",
    "check_allocation",
    "check_finite",
    "ess_from_log_weights",
    "lgamma_difference",
    "log_gamma_kernel",
    "log_softmax_weights",
    "logmeanexp",
    "safe_cholesky",
]

JITTER_LADDER = (0.0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
"""Jitter tried by :func:`safe_cholesky`, in units of the mean diagonal of each matrix."""


# --------------------------------------------------------------------------- Cholesky factors


def safe_cholesky(
    A: Tensor, *, ladder: Sequence[float] = JITTER_LADDER, unit: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factorise symmetric positive (semi-)definite matrices, adding jitter only where needed.

    Each batch element climbs ``ladder`` on its own: a matrix that factorises without jitter keeps
    an exact factor, whatever happens to its neighbours. Only the lower triangle is read.

    Args:
        A: Matrices [*batch, n, n] in float32 or float64.
        ladder: Increasing multiples of ``unit``, tried in order.
        unit: What the ladder is in units of [*batch]; by default the mean diagonal. A matrix that
            is a difference, such as a conditional covariance, has rounding errors of the size of
            what it was subtracted from: give that.

    Returns:
        The lower factor [*batch, n, n], differentiable with respect to ``A``, and the jitter
        [*batch] that was added to each diagonal (absolute, detached).

    Raises:
        ShapeError: ``A`` is not a batch of square matrices.
        DataError: ``A`` holds non-finite values, is in half precision, or stays indefinite at the
            end of the ladder.

    Warns:
        NumericsWarning: at each rise of the ladder, with the jitter added.

    Example:
        >>> L, jitter = safe_cholesky(torch.eye(2, dtype=torch.float64) * 4)
        >>> L.diagonal().tolist(), jitter.item()
        ([2.0, 2.0], 0.0)
    """
    if A.ndim < 2 or A.shape[-1] != A.shape[-2]:
        raise ShapeError(f"expected square matrices [*batch, n, n], got {tuple(A.shape)}")
    if A.dtype not in (torch.float32, torch.float64):
        raise DataError(f"expected float32 or float64 matrices, got {A.dtype}; use A.double()")
    check_finite(A, "matrix")
    multiple = torch.full(A.shape[:-2], float(ladder[0]), dtype=A.dtype, device=A.device)
    if ladder[0] == 0.0:
        L, info = torch.linalg.cholesky_ex(A)
        if not bool((info > 0).any()):
            return L, multiple
        failed = info > 0
        ladder = ladder[1:]
    else:
        failed = torch.ones_like(multiple, dtype=torch.bool)
    mean_diagonal = A.diagonal(dim1=-2, dim2=-1).mean(-1)
    unit = mean_diagonal if unit is None else unit.to(A).expand(A.shape[:-2])
    multiple = _climb(A.detach(), failed, ladder, unit.detach())
    L = torch.linalg.cholesky(_add_to_diagonal(A, multiple * unit))
    return L, (multiple * unit).detach()


def _climb(A: Tensor, failed: Tensor, ladder: Sequence[float], unit: Tensor) -> Tensor:
    """Return the smallest multiple of ``unit`` at which each matrix factorises."""
    multiple = torch.zeros_like(unit)
    for rung in ladder:
        jitter = rung * unit[failed]
        warnings.warn(
            f"Cholesky failed for {int(failed.sum())} of {failed.numel()} matrices; "
            f"adding jitter {float(jitter.max()):.3g} ({rung:g} x mean diagonal)",
            NumericsWarning,
            stacklevel=4,
        )
        multiple = torch.where(failed, rung, multiple)
        _, info = torch.linalg.cholesky_ex(_add_to_diagonal(A[failed], jitter))
        still = failed.clone()
        still[failed] = info > 0
        failed = still
        if not bool(failed.any()):
            return multiple
    raise DataError(
        f"matrix is not positive definite, even with jitter {ladder[-1]:g} x mean diagonal "
        f"({int(failed.sum())} of {failed.numel()} matrices); raise the noise or check the kernel"
    )


def _add_to_diagonal(A: Tensor, amount: Tensor) -> Tensor:
    return A + torch.diag_embed(amount.unsqueeze(-1).expand(A.shape[:-1]))


# --------------------------------------------------------------------------- checks


def check_finite(
    tensor: Tensor,
    name: str,
    dims: Sequence[str] = ("row", "column"),
    labels: Mapping[str, Sequence[object]] | Sequence[object] | None = None,
) -> None:
    """Raise an error that names the first non-finite value of ``tensor``.

    Args:
        tensor: Values of any shape; integers pass.
        name: What the tensor is, for the message.
        dims: Names of the trailing dimensions (of the leading ones, when there are fewer dimensions
            than names); further leading dimensions are called ``batch``.
        labels: Labels by dimension name, or those of the last dimension.

    Raises:
        DataError: a value is NaN or infinite.

    Example:
        >>> try:
        ...     check_finite(torch.tensor([[0.0, float("nan")]]), "X", labels=["age", "bmi"])
        ... except DataError as error:
        ...     print(error)
        X must be finite, got nan at row 0, column 'bmi'; drop or impute it
    """
    # A finite sum proves finite entries in one pass; an overflowing sum is settled below.
    if not tensor.is_floating_point() and not tensor.is_complex():
        return
    if bool(torch.isfinite(tensor.detach().sum())):
        return
    bad = ~torch.isfinite(tensor.detach())
    if not bool(bad.any()):
        return
    index = tuple(int(i) for i in bad.nonzero()[0])
    extra = max(len(index) - len(dims), 0)
    names = ["batch"] * extra + list(dims)[: len(index)]
    pairs = zip(names, index, strict=True)
    place = ", ".join(f"{d} {_label(d, i, labels, d == names[-1])}" for d, i in pairs)
    where = f" at {place}" if place else ""
    value = tensor.detach()[index].item()
    raise DataError(f"{name} must be finite, got {value}{where}; drop or impute it")


def _label(
    dim: str,
    index: int,
    labels: Mapping[str, Sequence[object]] | Sequence[object] | None,
    is_last: bool,
) -> str:
    if isinstance(labels, Mapping):
        return repr(labels[dim][index]) if dim in labels else str(index)
    if labels is not None and is_last:
        return repr(labels[index])
    return str(index)


def available_memory(device: torch.device | str = "cpu") -> int:
    """Return the bytes that can still be allocated on ``device``, container limits included.

    Example:
        >>> available_memory() > 0
        True
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # Blocks that PyTorch caches but does not use are free for its own tensors.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + cached)
    return min(_system_memory(), _container_memory())


def _system_memory() -> int:
    try:
        import psutil  # type: ignore[import-untyped, unused-ignore]

        return int(psutil.virtual_memory().available)
    except ImportError:
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _container_memory() -> int:
    """Bytes left under the control-group limit of this process; huge when there is none."""
    root = Path("/sys/fs/cgroup")
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        cache = _cached_file_pages(root / "memory.stat")
        return int(limit) - used + cache if limit != "max" else 2**62
    except (OSError, ValueError):
        return 2**62


def _cached_file_pages(statistics: Path) -> int:
    """Page cache that the kernel gives up when a container needs memory."""
    for line in statistics.read_text().splitlines():
        if line.startswith("inactive_file "):
            return int(line.split()[1])
    return 0


_ALWAYS_FITS = 2**19  # below this, asking the system for its free memory costs more than the work


def check_allocation(n_bytes: int, what: str, *, device: torch.device | str = "cpu") -> None:
    """Raise before an allocation that cannot fit, instead of being killed during it.

    Args:
        n_bytes: Size of the allocation in bytes.
        what: What needs it, for the message.
        device: Where it would be allocated.

    Raises:
        DataError: fewer than ``n_bytes`` bytes are available.

    Example:
        >>> check_allocation(8 * 100**2, "kernel matrix [100, 100]")
    """
    if n_bytes < _ALWAYS_FITS:
        return
    available = available_memory(device)
    if n_bytes > available:
        raise DataError(
            f"{what} needs {n_bytes / 2**30:.3g} GiB on {device}, but {available / 2**30:.3g} GiB "
            "are available; use fewer rows, a smaller batch or a partitioned kernel"
        )


# --------------------------------------------------------------------------- log-space weights


def logmeanexp(x: Tensor, dim: int) -> Tensor:
    """Return log of the mean of exp(x) along ``dim``.

    Example:
        >>> logmeanexp(torch.tensor([1000.0, 1000.0]), 0).item()
        1000.0
    """
    return torch.logsumexp(x, dim) - math.log(x.shape[dim])


def log_softmax_weights(log_weights: Tensor, dim: int) -> Tensor:
    """Normalise log weights along ``dim`` so that their exponentials sum to one.

    Raises:
        DataError: every weight along ``dim`` is zero, or one is NaN or plus infinity.

    Example:
        >>> log_softmax_weights(torch.tensor([5.0, 5.0]), 0).exp().tolist()
        [0.5, 0.5]
    """
    total = torch.logsumexp(log_weights, dim, keepdim=True)
    if not bool(torch.isfinite(total.detach()).all()):
        raise DataError(
            f"log weights along dim {dim} must have a finite sum; all weights are zero or one is "
            "not finite: check the log likelihood of the draws"
        )
    return log_weights - total


def ess_from_log_weights(log_weights: Tensor, dim: int) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2 of unnormalised log weights along ``dim``.

    Example:
        >>> round(ess_from_log_weights(torch.zeros(7, dtype=torch.float64), 0).item(), 9)
        7.0
    """
    return (2 * torch.logsumexp(log_weights, dim) - torch.logsumexp(2 * log_weights, dim)).exp()


# --------------------------------------------------------------------------- gamma functions

# Coefficients B_2k / (2k (2k - 1)) of Stirling's series (Abramowitz & Stegun 6.1.40).
_STIRLING = (
    1 / 12,
    -1 / 360,
    1 / 1260,
    -1 / 1680,
    1 / 1188,
    -691 / 360360,
    1 / 156,
    -3617 / 122400,
)
_STIRLING_FROM = 12.0  # the first term left out is below 1e-18 from here on


def _stirling_remainder(z: Tensor) -> Tensor:
    """lgamma(z) - [(z - 1/2) log z - z + log(2 pi)/2], for z >= 12."""
    inverse = 1 / z
    square = inverse * inverse
    total = torch.zeros_like(z)
    for coefficient in reversed(_STIRLING):
        total = total * square + coefficient
    return total * inverse


def lgamma_difference(a: Tensor, b: Tensor | float) -> Tensor:
    """Return lgamma(a + b) - lgamma(a) without cancellation, for a > 0 and b >= 0.

    At a = 1e8 the plain difference is off by about 1e-7, since lgamma is 1.7e9 there.

    Args:
        a: Positive values [*batch].
        b: Non-negative increments, broadcast with ``a``.

    Returns:
        The difference [*batch], differentiable in both.

    Example:
        >>> x = lgamma_difference(torch.tensor(1e8, dtype=torch.float64), 1.0)
        >>> abs(x.item() - math.log(1e8)) < 1e-14
        True
    """
    a, b = torch.broadcast_tensors(a, torch.as_tensor(b, dtype=a.dtype, device=a.device))
    large = a >= _STIRLING_FROM
    # Each branch gets harmless arguments where the other one is used: no NaN in the backward pass.
    big = torch.where(large, a, _STIRLING_FROM)
    small = torch.where(large, 1.0, a)
    step = torch.where(large, 1.0, b)
    series = (
        (big - 0.5) * torch.log1p(b / big)
        + b * (torch.log(big + b) - 1)
        + (_stirling_remainder(big + b) - _stirling_remainder(big))
    )
    return torch.where(large, series, torch.lgamma(small + step) - torch.lgamma(small))


def log_gamma_kernel(a: Tensor, log_z: Tensor) -> Tensor:
    """Return a log z - z - lgamma(a), the log density of log Z for Z ~ Gamma(a, 1).

    Computed as a (t - expm1 t) + [a log a - a - lgamma a] with t = log z - log a, which keeps full
    accuracy for large a, where the three plain terms cancel.

    Args:
        a: Shape parameter > 0 [*batch].
        log_z: Log of the argument, broadcast with ``a``.

    Returns:
        Values of the broadcast shape.

    Example:
        >>> one = torch.ones((), dtype=torch.float64)
        >>> log_gamma_kernel(one, one.log()).item()
        -1.0
    """
    large = a >= _STIRLING_FROM
    big = torch.where(large, a, _STIRLING_FROM)
    small = torch.where(large, 1.0, a)
    offset = torch.where(
        large,
        0.5 * torch.log(big / (2 * math.pi)) - _stirling_remainder(big),
        small * torch.log(small) - small - torch.lgamma(small),
    )
    # exp(700) is below the overflow of float64; the result is about -1e304 a there.
    limit = 700.0 if a.dtype == torch.float64 else 85.0
    t = (log_z - torch.log(a)).clamp(max=limit)
    return a * (t - torch.expm1(t)) + offset

"""Greedy baselines: orthogonal matching pursuit, plain and with Kronecker dictionaries.

Both stop by one of three rules: a given number of atoms (an oracle, where the truth is known), the
discrepancy principle (the residual has reached the noise), or a relative residual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import DataError, ShapeError
from probkit.models.sbl.mode_products import mode_products
from probkit.models.sbl.moments import abs_square

__all__ = ["kronecker_omp", "omp"]


def omp(
    H: Tensor,
    y: Tensor,
    *,
    atoms: int | None = None,
    noise_var: float | None = None,
    residual: float | None = None,
) -> Tensor:
    """Orthogonal matching pursuit (Pati, Rezaiifar & Krishnaprasad, 1993).

    Args:
        H: Dictionary [M, N], real or complex.
        y: Data [M].
        atoms: Stop at this many columns.
        noise_var: Stop when ||r||^2 <= M s2 + 2 s2 sqrt(M), as noise alone nearly always keeps.
        residual: Stop when ||r||^2 <= residual * ||y||^2.

    Returns:
        Weights [N].

    Raises:
        DataError: No stopping rule, or one outside its range.

    Example:
        >>> omp(torch.eye(3), torch.tensor([0.0, 2.0, 0.1]), atoms=1).tolist()
        [0.0, 2.0, 0.0]
    """
    dictionary, data = as_tensor(H, name="H"), as_tensor(y, name="y")
    if dictionary.ndim != 2 or data.shape != dictionary.shape[:1]:
        raise ShapeError(
            f"omp: expected H [M, N] and y [M], got {tuple(dictionary.shape)} and "
            f"{tuple(data.shape)}"
        )
    largest = min(dictionary.shape)
    limit, goal = _stopping(data, atoms, noise_var, residual, largest)
    common = torch.promote_types(dictionary.dtype, data.dtype)
    dictionary, data = dictionary.to(common), data.to(common)
    norms = _norms(dictionary)
    weights = torch.zeros(dictionary.shape[1], dtype=common, device=data.device)
    chosen: list[int] = []
    solution, rest = weights[:0], data
    while len(chosen) < limit and float(abs_square(rest).sum()) > goal:
        match = (dictionary.mH @ rest).abs() / norms
        match[chosen] = -1.0
        chosen.append(int(match.argmax()))
        part = dictionary[:, chosen]
        solution = torch.linalg.lstsq(part, data[:, None]).solution[:, 0]
        rest = data - part @ solution
    weights[chosen] = solution
    return weights


def kronecker_omp(
    factors: Sequence[Tensor],
    y: Tensor,
    *,
    atoms: int | None = None,
    noise_var: float | None = None,
    residual: float | None = None,
) -> Tensor:
    """Kronecker-OMP (Caiafa & Cichocki, 2013): the support is a grid of indices, one set a mode.

    Each step takes the entry of the whole dictionary that matches the residual best, adds its
    index to the set of each mode, and solves least squares on the grid by factors.

    Args:
        factors: H_i [M_i, N_i], real or complex.
        y: Data [M_1, ..., M_I] or flat.
        atoms: Largest number of indices of each mode.
        noise_var: Stop when ||r||^2 <= M s2 + 2 s2 sqrt(M).
        residual: Stop when ||r||^2 <= residual * ||y||^2.

    Returns:
        Weights [N_1, ..., N_I].

    Raises:
        DataError: No stopping rule, or one outside its range.

    Example:
        >>> eye = torch.eye(2)
        >>> kronecker_omp([eye, eye], torch.tensor([[0.0, 3.0], [0.0, 0.0]]), atoms=1).tolist()
        [[0.0, 3.0], [0.0, 0.0]]
    """
    matrices = [as_tensor(factor, name="factors") for factor in factors]
    data = as_tensor(y, name="y")
    sizes = tuple(int(matrix.shape[0]) for matrix in matrices)
    if data.numel() != math.prod(sizes):
        raise ShapeError(
            f"kronecker_omp: expected y with {' x '.join(map(str, sizes))} entries, got "
            f"{tuple(data.shape)}"
        )
    common = data.dtype
    for matrix in matrices:
        common = torch.promote_types(common, matrix.dtype)
    matrices, data = [m.to(common) for m in matrices], data.reshape(sizes).to(common)
    largest = max(int(matrix.shape[1]) for matrix in matrices)
    limit, goal = _stopping(data, atoms, noise_var, residual, largest)
    unit = [matrix / _norms(matrix) for matrix in matrices]
    chosen: list[list[int]] = [[] for _ in matrices]
    rest, solution = data, data
    while float(abs_square(rest).sum()) > goal:
        match = mode_products(rest, [matrix.mH for matrix in unit]).abs()
        place = torch.unravel_index(match.argmax(), match.shape)
        grown = False
        for indices, index, matrix in zip(chosen, place, matrices, strict=True):
            room = len(indices) < min(limit, min(matrix.shape))
            if int(index) not in indices and room:
                indices.append(int(index))
                grown = True
        if not grown:
            break
        parts = [m[:, indices] for m, indices in zip(matrices, chosen, strict=True)]
        solution = mode_products(data, [torch.linalg.pinv(part) for part in parts])
        rest = data - mode_products(solution, parts)
    weights = torch.zeros([m.shape[1] for m in matrices], dtype=common, device=data.device)
    if all(chosen):
        weights[torch.meshgrid(*(torch.tensor(c) for c in chosen), indexing="ij")] = solution
    return weights


def _norms(matrix: Tensor) -> Tensor:
    norm = abs_square(matrix).sum(0).sqrt()
    return torch.where(norm > 0, norm, 1.0)


def _stopping(
    data: Tensor,
    atoms: int | None,
    noise_var: float | None,
    residual: float | None,
    largest: int,
) -> tuple[int, float]:
    """Largest number of atoms, and the squared residual to reach."""
    if atoms is None and noise_var is None and residual is None:
        raise DataError("expected a stopping rule: atoms=, noise_var= or residual=; got none")
    if atoms is not None and (not isinstance(atoms, int) or atoms < 1):
        raise DataError(f"atoms: expected a whole number >= 1, got {atoms!r}")
    if noise_var is not None and not 0 < float(noise_var) < math.inf:
        raise DataError(f"noise_var: expected a finite number > 0, got {noise_var!r}")
    if residual is not None and not 0 <= float(residual) < 1:
        raise DataError(f"residual: expected a share of ||y||^2 in [0, 1), got {residual!r}")
    goals = [0.0]
    if noise_var is not None:
        count = data.numel()
        goals.append(float(noise_var) * (count + 2 * math.sqrt(count)))
    if residual is not None:
        goals.append(float(residual) * float(abs_square(data).sum()))
    return min(atoms or largest, largest), max(goals)

"""One or many problems of one dictionary, in the form that the algorithms work on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from probkit.models.sbl.e_step import dense_moments
from probkit.models.sbl.kronecker_e_step import kronecker_moments, kronecker_spectrum
from probkit.models.sbl.missing import masked_moments
from probkit.models.sbl.moments import Moments
from probkit.models.sbl.pruning import reduce

__all__ = ["SparseProblem", "moments_of"]


def moments_of(
    factors: Sequence[Tensor],
    variances: Sequence[Tensor],
    noise_var: Tensor,
    y: Tensor,
    observed: Tensor | None = None,
    draft: bool = False,
) -> Moments:
    """The E-step: a Cholesky factor with one mode, spectra of the factors with several.

    With ``observed`` [*batch, M_1, ..., M_I], 1.0 where y is seen, conjugate gradients; ``draft``
    is for the steps of a fit, whose estimates may be rough.
    """
    if observed is not None:
        return masked_moments(factors, variances, noise_var, y, observed, draft=draft)
    if len(factors) == 1:
        return dense_moments(factors[0], variances[0], noise_var, y)
    return kronecker_moments(kronecker_spectrum(factors, variances, noise_var), variances, y)


@dataclass(frozen=True)
class SparseProblem:
    """Data and dictionary of ``n`` problems that are solved together.

    The algorithms carry *rows*: several starting points of each problem. Row r belongs to problem
    r modulo n.

    Attributes:
        factors: H_i [M_i, N_i], or [problem, M_i, N_i].
        y: [problem, snapshot, M_1, ..., M_I].
        noise_var: Known s2 [problem]; None where it is learned.
        floor: Smallest s2 that learning may reach [problem].
        update: Name of the M-step.
        coupling: Strength of the coupling of neighbours in each mode; empty for none.
        observed: 1.0 where y is seen [problem, M_1, ..., M_I]; None where all of it is.
    """

    factors: list[Tensor]
    y: Tensor
    noise_var: Tensor | None
    floor: Tensor
    update: str
    coupling: tuple[float, ...] = ()
    observed: Tensor | None = None

    @property
    def n(self) -> int:
        """Number of problems."""
        return int(self.y.shape[0])

    @property
    def modes(self) -> int:
        """Number of modes I."""
        return len(self.factors)

    @property
    def sizes(self) -> tuple[int, ...]:
        """N_1, ..., N_I."""
        return tuple(int(factor.shape[-1]) for factor in self.factors)

    @property
    def data_size(self) -> int:
        """Entries of y in one problem: M times the number of snapshots."""
        return self.y[0].numel()

    def data_counts(self, rows: Tensor) -> Tensor:
        """Entries of y that were seen [row], over all snapshots."""
        full = torch.full_like(self.floor, float(self.data_size))
        if self.observed is not None:
            full = self.observed.flatten(1).sum(-1) * self.y.shape[1]
        return full[self._problems(rows)]

    def _problems(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows) if self.n == 1 else rows % self.n

    @property
    def evidence_weight(self) -> float:
        """Log evidence in units of log |C| + y^H C^{-1} y, over all snapshots."""
        return (1.0 if self.y.is_complex() else 0.5) * self.y.shape[1]

    def rows(self, rows: Tensor) -> tuple[list[Tensor], Tensor]:
        """The factors and the data of some rows."""
        index = self._problems(rows)
        return [f if f.ndim == 2 else f[index] for f in self.factors], self.y[index]

    def moments(
        self,
        rows: Tensor,
        variances: Sequence[Tensor],
        noise_var: Tensor,
        *,
        draft: bool = False,
    ) -> Moments:
        """E-step of some rows on the columns that any of them uses."""
        factors, y = self.rows(rows)
        reduction = reduce(variances)
        observed = None if self.observed is None else self.observed[self._problems(rows)]
        small = reduction.columns(factors)
        return moments_of(small, reduction.columns(variances), noise_var, y, observed, draft)

    def live_columns(self) -> list[Tensor]:
        """1.0 for the columns of each H_i that are not zero, [N_i] or [problem, N_i]."""
        return [(f.abs().amax(-2) > 0).to(self.floor) for f in self.factors]

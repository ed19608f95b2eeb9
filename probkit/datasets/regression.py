"""Regression data that scikit-learn carries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from probkit.errors import DataError

__all__ = ["Regression", "diabetes"]


@dataclass(frozen=True)
class Regression:
    """A regression data set.

    Attributes:
        x: Inputs, one row per observation, named columns.
        y: Target.
        source: Where it comes from.
    """

    x: pd.DataFrame
    y: pd.Series
    source: str

    def splits(
        self, n: int, *, train: float | int = 0.9, seed: int = 0
    ) -> Iterator[tuple[pd.DataFrame, pd.Series, pd.DataFrame, pd.Series]]:
        """Cut into random train and test parts.

        Args:
            n: Number of splits.
            train: Share (below 1) or number of training rows.
            seed: Seed of the permutations.

        Yields:
            (x_train, y_train, x_test, y_test).

        Raises:
            DataError: ``train`` leaves no row on one side.
        """
        rows = len(self.x)
        size = int(round(train * rows)) if train < 1 else int(train)
        if not 0 < size < rows:
            raise DataError(f"splits: expected 1 to {rows - 1} training rows, got {size}")
        generator = np.random.default_rng(seed)
        for _ in range(n):
            order = generator.permutation(rows)
            left, right = order[:size], order[size:]
            yield (
                self.x.iloc[left],
                self.y.iloc[left],
                self.x.iloc[right],
                self.y.iloc[right],
            )


def diabetes() -> Regression:
    """Return 442 diabetes patients: disease progression after one year against ten measurements.

    Data of Efron, Hastie, Johnstone and Tibshirani (2004), "Least angle regression", as
    scikit-learn carries them (columns unscaled).

    Example:
        >>> diabetes().x.shape
        (442, 10)
    """
    from sklearn.datasets import load_diabetes

    bunch = load_diabetes(as_frame=True, scaled=False)
    return Regression(bunch.data, bunch.target, "scikit-learn, Efron et al. (2004)")

"""The eight schools."""

from __future__ import annotations

import pandas as pd

__all__ = ["eight_schools"]


def eight_schools() -> pd.DataFrame:
    """Return estimated effects of coaching on test scores in eight schools.

    Data of Rubin (1981), "Estimation in parallel randomized experiments", Journal of Educational
    Statistics 6, table 1.

    Returns:
        A frame indexed by school, with columns ``effect`` and ``standard_error`` (score points).

    Example:
        >>> eight_schools().loc["A"].tolist()
        [28.0, 15.0]
    """
    return pd.DataFrame(
        {
            "effect": [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0],
            "standard_error": [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0],
        },
        index=pd.Index(list("ABCDEFGH"), name="school"),
    )

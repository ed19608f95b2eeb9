"""Conformance suites: what every model, guide and sampler must hold, for one factory each.

Subclass a suite in a test file, supply its factory, and pytest runs all of it::

    from probkit.testing import ModelConformance

    class TestMyModel(ModelConformance):
        def problem(self):
            return MyModel(), data, x_new

Parts that need a capability the object does not have are skipped with a reason. Statistical parts
use fixed seeds and z-tests, their bounds derived from Monte Carlo errors. This package alone
imports pytest (``pip install "probkit[test]"``).
"""

from __future__ import annotations

from probkit.extras import require

require("pytest", extra="test").register_assert_rewrite(
    *(
        f"{__name__}.{part}"
        for part in ("guide", "language", "model", "sampler", "state", "statistics")
    )
)

from probkit.testing.guide import GuideConformance  # noqa: E402
from probkit.testing.language import LanguageModelConformance  # noqa: E402
from probkit.testing.model import ModelConformance  # noqa: E402
from probkit.testing.sampler import SamplerConformance  # noqa: E402
from probkit.testing.state import unchanged_globals  # noqa: E402
from probkit.testing.statistics import assert_mean, batch_means, worst_z, z_bound  # noqa: E402

__all__ = [
    "GuideConformance",
    "LanguageModelConformance",
    "ModelConformance",
    "SamplerConformance",
    "assert_mean",
    "batch_means",
    "unchanged_globals",
    "worst_z",
    "z_bound",
]

"""Densities of the reference bar distribution, for ``tests/data/pfn/bars.json``.

Run inside the environment of the peer::

    python -m benchmarks.envs create pfns
    benchmarks/envs/pfns/bin/python -m benchmarks.pfn._bars_fixture tests/data/pfn/bars.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def fixture() -> dict[str, Any]:
    """Return borders, logits, points and what pfns says of them."""
    import importlib.metadata

    import torch
    from pfns.model.bar_distribution import FullSupportBarDistribution

    generator = torch.Generator().manual_seed(0)
    borders = torch.randn(26, generator=generator).sort().values
    logits = 2 * torch.randn(4, 3, 25, generator=generator)
    # inner points, points in the outer bars, and points beyond them
    y = 1.2 * torch.randn(4, 3, generator=generator)
    y[0, 0], y[1, 1], y[2, 2], y[3, 0] = -4.0, 5.0, borders[0] + 0.01, borders[-1] - 0.01
    law = FullSupportBarDistribution(borders)
    return {
        "package": f"pfns {importlib.metadata.version('pfns')}",
        "license": "Apache-2.0",
        "borders": borders.tolist(),
        "logits": logits.tolist(),
        "y": y.tolist(),
        "negative_log_density": law(logits, y).tolist(),
        "mean": law.mean(logits).tolist(),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(fixture(), indent=1) + "\n")

"""Draw the calibration of the shipped learning-curve network: ``docs/images``.

Run as ``python -m benchmarks.pfn._calibration_plot docs/images/curve_calibration.png``.
"""

from __future__ import annotations

import sys
from pathlib import Path

_CUTS = (10, 20, 40, 80)


def draw(path: Path, curves: int = 4000) -> None:
    """Plot coverage of central intervals on fresh curves against their level, by cut."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import torch

    from probkit.models.pfn import BarDistribution, CurvePrior, LearningCurvePFN
    from probkit.models.pfn.curve_task import encode_epochs, encode_metric

    lc = LearningCurvePFN.load()
    _, (t, y) = CurvePrior().sample_dataset(curves, rng=31)
    features = encode_epochs(t)
    levels = torch.linspace(0.02, 0.98, 49)
    figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.7", lw=1)
    for cut in _CUTS:
        distance = []
        for rows in y.split(250):
            x, query = (p.expand(len(rows), -1, -1) for p in features.split([cut, 100 - cut]))
            logits = lc.network(x, encode_metric(rows[:, :cut]), query)
            law = BarDistribution(lc.borders, logits, validate_args=False)
            distance.append((law.cdf(rows[:, cut:]) - 0.5).abs().flatten())
        inside = (2 * torch.cat(distance)).sort().values
        coverage = torch.searchsorted(inside, levels) / len(inside)
        axes.plot(levels, coverage, label=f"after {cut} of 100 epochs")
    axes.set(xlabel="level of the central interval", ylabel="share of later epochs inside")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]))

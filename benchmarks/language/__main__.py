"""Fill the stored cells of SmolLM2: python -m benchmarks.language constrained sums.

Cells that are there already are left alone.
"""

from __future__ import annotations

import argparse
import functools
import time

from benchmarks.language import _constrained, _running_sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", nargs="+", choices=("sums", "constrained"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after")
    chosen = parser.parse_args()
    until = time.monotonic() + chosen.seconds
    import torch

    from probkit.models.language import load_smollm2

    torch.set_num_threads(1)  # threads that wait for each other cost tenfold beside other work
    load = functools.cache(load_smollm2)
    for table in chosen.tables:
        fill = {"sums": _running_sums.fill, "constrained": _constrained.fill}[table]
        fill(load, lambda: time.monotonic() < until)


if __name__ == "__main__":
    main()

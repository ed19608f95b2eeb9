"""Fill the stored cells of SmolLM2: python -m benchmarks.language sums --seconds 1500.

Cells that are there already are left alone.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.language import _constrained, _running_sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=("sums", "constrained"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after")
    chosen = parser.parse_args()
    until = time.monotonic() + chosen.seconds
    fill = {"sums": _running_sums.fill, "constrained": _constrained.fill}[chosen.table]
    fill(lambda: time.monotonic() < until)


if __name__ == "__main__":
    main()

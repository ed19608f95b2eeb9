"""Posterior predictive scores of prior curves by tempered SMC, curve by curve, resumable.

Each entry is one curve of the prior cut after some epochs, sampled by independent runs of
:func:`probkit.models.pfn.curve_posterior`. Entries are appended to a file as they are found, so the
command may be stopped and given again::

    python -m benchmarks.pfn._reference benchmarks/pfn/reference.jsonl --curves 100
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STORE = Path(__file__).with_name("reference.jsonl")
CUTS = (10, 20, 40, 80)
SEED = 2024  # of the curves
OPTIONS = {"n": 1000, "moves": 9, "last_moves": 30, "runs": 2}


def common_curves(count: int) -> Any:
    """Curves y [curve, epoch] of the prior, the same in every run; more of them begin the same."""
    import torch

    from probkit.models.pfn import CurvePrior

    prior = CurvePrior()
    rows = [prior.sample_dataset(1, rng=SEED + 7919 * k)[1][1] for k in range(count)]
    return torch.cat(rows)


def entries(path: Path = STORE) -> list[dict[str, Any]]:
    """What is stored so far."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compute(curves: int, done: set[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """Yield the entries that are not done, curve by curve."""
    import torch

    from probkit.models.pfn import curve_posterior, sampled_scores

    y = common_curves(curves)
    t = torch.arange(1.0, 101.0)
    for k in range(curves):
        for cut in CUTS:
            if (k, cut) in done:
                continue
            begin = time.process_time()
            post = curve_posterior(
                t[:cut], y[k, :cut], rng=1000 * k + cut, dtype=torch.float32, **OPTIONS
            )
            by_step = sampled_scores(post, t[cut:], y[k, cut:]).double()
            pooled = torch.logsumexp(by_step, 0) - torch.tensor(float(len(by_step))).log()
            yield {
                "curve": k,
                "cut": cut,
                "runs": [round(v, 5) for v in by_step.mean(1).tolist()],
                "pooled": round(float(pooled.mean()), 5),
                "log_evidence": [round(v, 4) for v in post.log_evidence.value.tolist()],
                "seconds": round(time.process_time() - begin, 3),
            }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Sample curves of the prior, resumably.")
    parser.add_argument("out", type=Path, nargs="?", default=STORE)
    parser.add_argument("--curves", type=int, default=100)
    given = parser.parse_args()
    done = {(one["curve"], one["cut"]) for one in entries(given.out)}
    with given.out.open("a", encoding="utf-8") as file:
        for entry in compute(given.curves, done):
            file.write(json.dumps(entry) + "\n")
            file.flush()


if __name__ == "__main__":
    main()

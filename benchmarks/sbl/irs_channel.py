"""Channels through an intelligent reflecting surface: NMSE over the signal-to-noise ratio.

288 complex data, 5832 unknowns, 50 channels at each ratio, noise known. The reference figures are
means of published result files for the same simulator, on draws of their own.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

from benchmarks.harness.spec import Quality, Value

_RATIOS = (4, 8, 12, 16, 20)
_PUBLISHED = {  # mean NMSE at 4, 8, 12, 16, 20 dB
    "SVD": (0.609, 0.305, 0.194, 0.123, 0.105),
    "AM": (0.714, 0.321, 0.197, 0.139, 0.070),
    "PC-KroSBL, beta 0.8": (0.312, 0.132, 0.049, 0.0089, 0.0029),
}
_CHANNELS = 50


def _fit(data: Any, update: str) -> Any:
    from probkit import infer
    from probkit.models import KroneckerSBL

    model = KroneckerSBL(data.factors, noise_var=data.noise_var, update=update)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return infer(model, data.y, rng=0).analytic["weights"].mean


def _evaluate(quick: bool) -> list[Value]:
    from probkit.models.sbl.simulators import simulate_irs_channel

    values = []
    for place, ratio in enumerate(_RATIOS):
        if quick and ratio != 12:
            continue
        channel = simulate_irs_channel(5 if quick else _CHANNELS, snr_db=ratio, rng=0)
        for update in ("svd", "hybrid"):
            error = channel.channel_nmse(_fit(channel.data, update))
            known = min(figures[place] for figures in _PUBLISHED.values())
            own = update == "hybrid" and not quick
            values.append(
                Value(
                    f"{ratio} dB: {update}, mean NMSE",
                    float(error.mean()),
                    reference=known if own else None,
                    rule="at most",
                    note="best published mean" if own else "",
                )
            )
            values.append(Value(f"{ratio} dB: {update}, median NMSE", float(error.median())))
            print(f"  {values[-2]}\n  {values[-1]}", file=sys.stderr)
    return values


BENCHMARK = Quality(
    title="IRS channel estimation",
    question=(
        "What NMSE of the cascaded channel does the default (hybrid) reach, beside SVD and the "
        "best published means?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)

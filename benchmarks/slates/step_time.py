"""One gradient step against the number of items, 50,000 of them touched, one thread."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.spec import Quality, Value
from benchmarks.slates import _steps


def _evaluate(quick: bool) -> Sequence[Value]:
    import torch

    from probkit.models.slates import SlateGRU, SlateMeanField

    torch.set_num_threads(1)
    found: dict[int, float] = {}
    for items in (10_000, 100_000) if quick else (10_000, 100_000, 1_000_000):
        model = SlateGRU(items + 3, transition="gru", dim=_steps.DIM)
        guide = SlateMeanField(divergence="inclusion")
        found[items] = _steps.seconds(model, _steps.log(items), guide)
    values = [
        Value(f"I = {items:,}: seconds of CPU a step", seconds) for items, seconds in found.items()
    ]
    if 1_000_000 in found:
        last, before = found[1_000_000], found[100_000]
        values += [
            Value("I = 1,000,000 over I = 100,000", last / before, 2.0, rule="at most"),
            Value(
                "I = 1,000,000: seconds of CPU a step, goal",
                last,
                0.1,
                rule="at most",
                note=(
                    "profile: row-wise Adam 26 % (half of it writing 50,000 scattered rows of four "
                    "tables), backward pass 28 % (a third of it the items' law), drawing the items "
                    "22 %, finding and reading the rows 10 %"
                ),
            ),
        ]
    return values


BENCHMARK = Quality(
    title="Slates: a step against the number of items",
    question=(
        "How long does a gradient step of the GRU model (d = 25, 20 steps of 10 slots, 50,000 "
        "distinct items in the batch; 10,000 where there are no more) take as the catalogue grows?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)

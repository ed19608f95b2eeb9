"""Closed loop of strangers: every round brings new users, who see four slates and leave."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness.spec import Quality, Value
from benchmarks.slates.closed_loop import GROUPS, ITEMS, SIZE, USERS, above_greedy, learner


def _run(seed: int, rounds: int) -> dict[str, dict[str, float]]:
    """Clicks, click rate at the end and groups in a slate, by arm."""
    import dataclasses

    from probkit.models.slates import (
        Greedy,
        InSlateThompson,
        SlateMeanField,
        Thompson,
        draw_market_place,
        newcomer_loop,
    )

    place = draw_market_place(
        users=USERS * (rounds + 1), items=ITEMS, groups=GROUPS, bias=-1.0, rng=seed
    )
    first = dataclasses.replace(place, start=place.start[:USERS])
    start = first.log(4, SIZE, optimal=0.0, rng=seed)
    found = {}
    arms = {"greedy": Greedy(), "Thompson": Thompson(), "in-slate Thompson": InSlateThompson()}
    for name, policy in arms.items():
        result = newcomer_loop(
            place,
            policy,  # type: ignore[arg-type]
            learner("hier", start, 40, SlateMeanField()),
            rounds=rounds,
            size=SIZE,
            start=start,
            rng=seed,
        )
        found[name] = {
            "clicks": float(result.clicks.sum()),
            "rate": float(result.click_rate[-5:].mean()),
            "groups": float(result.groups.mean()),
        }
    return found


def _evaluate(quick: bool) -> Sequence[Value]:
    import torch

    torch.set_num_threads(1)
    seeds, rounds = (2, 3) if quick else (15, 21)
    runs = [_run(seed, rounds) for seed in range(seeds)]
    values = []
    for arm in runs[0]:
        mean = {key: sum(run[arm][key] for run in runs) / seeds for key in runs[0][arm]}
        values += [
            Value(f"{arm}: clicks in {rounds} rounds, mean of {seeds} seeds", mean["clicks"]),
            Value(f"{arm}: click rate in the last five rounds", mean["rate"]),
            Value(f"{arm}: groups in a slate", mean["groups"]),
        ]
    return [*values, *above_greedy(runs)]


BENCHMARK = Quality(
    title="Slates: closed loop of strangers",
    question=(
        "100 new users of a simulated market place (200 items) come in each of 21 rounds after 100 "
        "who saw random slates, see four slates of 5 and leave: does exploring pay?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
    timeout=5400.0,
)

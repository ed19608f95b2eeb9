"""Closed loop: what a policy learns from its own clicks, over rounds and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.spec import Quality, Value

USERS, ITEMS, GROUPS, SIZE = 100, 200, 20, 5
_LOGGED, _BIAS = 5, 0.0  # random steps before the first round; score of no click
_EARLY = 40  # items on offer at first; the others arrive until half of the rounds are over
_FIRST, _LATER = 250, 25  # gradient steps of the first fit, and of each later one


def _prior() -> Any:
    from probkit.models.slates import SlatePrior

    return SlatePrior(
        group_mean=3.0,
        log_group_scale=(-1.0, 1.0),
        item=3.0,
        user=2.5,
        no_click=3.0,
        logit_gamma=(0.0, 2.0),
    )


def learner(item_prior: str, log: Any, later: int = _LATER, guide: Any = None) -> Any:
    from probkit.inference import SVI
    from probkit.models.slates import Refit, SlateGRU, SlateMeanField

    model = SlateGRU(
        log.n_items,
        groups=log.groups,
        transition="linear",
        dim=2,
        item_prior=item_prior,
        prior=_prior(),
        length_bias=False,
    )

    def fit(steps: int, rate: float) -> Any:
        return SVI(steps=steps, lr=rate, decay=0.3, particles=1, evidence_draws=1)

    own = SlateMeanField(users="table") if guide is None else guide
    return Refit(model, fit(_FIRST, 0.05), fit(later, 0.04), own)


def _run(seed: int, rounds: int) -> dict[str, dict[str, float]]:
    """Clicks by arm, and the click rate on items that the first log never showed."""
    import torch

    from probkit.models.slates import (
        Greedy,
        InSlateThompson,
        Thompson,
        closed_loop,
        draw_market_place,
        recommend,
    )

    place = draw_market_place(users=USERS, items=ITEMS, groups=GROUPS, bias=_BIAS, rng=seed)
    # A tenth of the items never come on offer: of these only the group is known in the end.
    g = torch.Generator().manual_seed(seed)
    cold = torch.randperm(ITEMS, generator=g)[: ITEMS // 10] + 3
    arrived = place.arrivals(_EARLY, max(rounds // 2, 1), rng=seed)

    def offered(number: int) -> Any:
        pool = arrived(number)
        return pool[~torch.isin(pool, cold)]

    start = _random_log(place, offered(0), g)
    found: dict[str, dict[str, float]] = {}
    arms = {
        "greedy": ("hier", Greedy()),
        "Thompson": ("hier", Thompson()),
        "in-slate Thompson": ("hier", InSlateThompson()),
        "in-slate Thompson, flat prior": ("flat", InSlateThompson()),
    }
    for name, (item_prior, policy) in arms.items():
        result = closed_loop(
            place,
            policy,
            learner(item_prior, start),
            rounds=rounds,
            size=SIZE,
            start=start,
            candidates=offered,
            rng=seed,
        )
        users = torch.arange(USERS)
        shown = recommend(
            result.posterior,
            result.log.before(result.log.steps - 1),
            SIZE,
            Greedy(),
            candidates=cold,
            users=users,
            rng=0,
        ).ids
        state = place.states(result.log.click.long())[:, -2]
        found[name] = {
            "clicks": float(result.clicks.sum()),
            "rate": float(result.click_rate[-5:].mean()),
            "groups": float(result.groups.mean()),
            "cold": float(place.click_probability(state, shown).mean()),
        }
    return found


def _random_log(place: Any, pool: Any, g: Any) -> Any:
    """Random slates of the items in ``pool``."""
    import torch

    state, slates, slots = place.start, [], []
    for _ in range(_LOGGED):
        keys = torch.rand(place.users, len(pool), generator=g)
        slate = pool[keys.topk(SIZE, 1).indices]
        slot = place.respond(state, slate, rng=g)
        state = place.moved(state, slate, slot)
        slates.append(slate)
        slots.append(slot)
    return place.as_log(torch.stack(slates, 1), torch.stack(slots, 1))


def summary(name: str, numbers: Sequence[float]) -> list[Value]:
    """Mean and 95 % t interval over seeds."""
    from scipy.stats import t

    n = len(numbers)
    mean = sum(numbers) / n
    sd = math.sqrt(sum((x - mean) ** 2 for x in numbers) / max(n - 1, 1))
    reach = float(t.ppf(0.975, max(n - 1, 1))) * sd / math.sqrt(n)
    return [
        Value(name, mean),
        Value(f"{name}: lower end of the 95 % interval", mean - reach),
        Value(f"{name}: upper end", mean + reach),
    ]


def above_greedy(runs: Sequence[dict[str, dict[str, float]]]) -> list[Value]:
    """Clicks, in total and at the end, above those of greedy on the same place."""
    values = []
    for arm in ("Thompson", "in-slate Thompson"):
        for key, what in (("clicks", "clicks"), ("rate", "click rate in the last five rounds")):
            above = [run[arm][key] - run["greedy"][key] for run in runs]
            values += summary(f"{what} of {arm} above greedy", above)
    return values


def _evaluate(quick: bool) -> Sequence[Value]:
    import torch

    torch.set_num_threads(1)
    seeds, rounds = (2, 3) if quick else (5, 30)
    runs = [_run(seed, rounds) for seed in range(seeds)]
    values: list[Value] = []
    for arm in runs[0]:
        mean = {key: sum(run[arm][key] for run in runs) / seeds for key in runs[0][arm]}
        values += [
            Value(f"{arm}: clicks in {rounds} rounds, mean of {seeds} seeds", mean["clicks"]),
            Value(f"{arm}: click rate in the last five rounds", mean["rate"]),
            Value(f"{arm}: groups in a slate", mean["groups"]),
            Value(f"{arm}: click rate of slates of cold items", mean["cold"]),
        ]
    values += above_greedy(runs)
    cold = [
        run["in-slate Thompson"]["cold"] - run["in-slate Thompson, flat prior"]["cold"]
        for run in runs
    ]
    values += summary("click rate on cold items, hierarchical above flat", cold)
    return values


BENCHMARK = Quality(
    title="Slates: closed loop",
    question=(
        "100 users of a simulated market place see a slate of 5 in each of 30 rounds after 5 "
        "random ones; every policy learns from its own clicks. About 36 of 180 items are on offer "
        "at first, the others arrive until round 15, in all groups: does exploring pay?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
    timeout=5400.0,
)

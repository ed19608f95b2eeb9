"""In-slate Thompson sampling for many users over a million items, against drawing every vector."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.harness.spec import Quality, Value

_ITEMS, _DIM, _SIZE, _GROUPS, _STEPS = 1_000_000, 25, 20, 290, 10


def _posterior(items: int) -> Any:
    """A posterior of the shape of a fit: items around groups, rarely shown ones uncertain."""
    import math

    import torch

    from probkit.models.slates import SlateGRU, SlateLog, SlateMeanField
    from probkit.models.slates.item_law import UNKNOWN
    from probkit.posterior import Context, Posterior
    from probkit.sources import Fitted

    g = torch.Generator().manual_seed(0)
    log = SlateLog([[[1, 3, 4]]], [[3]], n_items=items + 3)
    group = torch.randint(_GROUPS, (items + 3,), generator=g)
    group[:_GROUPS] = torch.arange(_GROUPS)
    model = SlateGRU(items + 3, groups=group, transition="linear", dim=_DIM)
    guide = SlateMeanField(divergence="inclusion")
    params = dict(guide.init(model, log, rng=0))
    centre = torch.randn(_GROUPS, _DIM, generator=g)

    def around(loc: Any, sd: float) -> dict[str, Any]:
        return {"loc": loc, "log_scale": torch.full_like(loc, math.log(sd))}

    params["group_mean"] = around(centre, 0.02)
    params["group_scale"] = around(torch.full_like(centre, math.log(0.5)), 0.02)
    loc = centre[group] + 0.5 * torch.randn(items + 3, _DIM, generator=g)
    exposure = torch.rand(items + 3, 1, generator=g) ** 4 * 1000  # Few items are shown often.
    # Standard deviations given the group are 0.5 / sqrt(1 + exposure).
    log_scale = (0.5 / exposure.sqrt()).log().clamp_max(UNKNOWN).expand(-1, _DIM).contiguous()
    params["items"] = {"loc": loc, "log_scale": log_scale}
    params["gamma"] = around(torch.tensor(0.8), 0.02)
    return Posterior(Fitted(guide, [params]), model, Context(log))


def _naive(post: Any, history: Any, users: int) -> float:
    """Seconds a user: all vectors drawn for each slot, scored, and sorted down to a slate."""
    import torch

    from probkit.models.slates.item_law import conditional_moments

    model, params = post.model, post.source.params[0]
    items, group = params["items"], model.groups
    g = torch.Generator().manual_seed(0)

    def drawn(own: Any) -> Any:
        noise = torch.randn(own["loc"].shape, generator=g)
        return own["loc"] + own["log_scale"].exp() * noise

    begin = time.process_time()
    for user in range(users):
        chosen: list[int] = []
        for _ in range(_SIZE):
            mean, spread = drawn(params["group_mean"]), drawn(params["group_scale"]).exp()
            loc, scale = conditional_moments(
                items["loc"], items["log_scale"], mean[group], spread[group]
            )
            vectors = loc + scale * torch.randn(loc.shape, generator=g)
            state = torch.zeros(_DIM)
            for item in history[user]:
                state = 0.8 * state + 0.2 * vectors[item]
            score = -(vectors - state).square().sum(1).sqrt()
            score[:3] = -torch.inf
            score[chosen] = -torch.inf
            chosen.append(int(score.argmax()))
    assert model.dim == _DIM
    return (time.process_time() - begin) / users


def _evaluate(quick: bool) -> Sequence[Value]:
    import torch

    from probkit.models.slates import InSlateThompson, recommend

    torch.set_num_threads(1)
    items, users, slow = (20_000, 20, 2) if quick else (_ITEMS, 1000, 5)
    post = _posterior(items)
    g = torch.Generator().manual_seed(1)
    # A user's clicks are on items of one group, as those of a person with a taste are.
    loc = post.source.params[0]["items"]["loc"]
    near = [
        (loc[3:] - loc[3 + int(i)]).square().sum(1).topk(_STEPS, largest=False).indices + 3
        for i in torch.randint(items, (min(users, 50),), generator=g)
    ]
    history = torch.stack([near[u % len(near)] for u in range(users)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    begin, wall = time.process_time(), time.perf_counter()
    found = recommend(post, history, _SIZE, InSlateThompson(), propensity_draws=0, rng=0)
    ours = time.process_time() - begin
    wall = time.perf_counter() - wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    assert found.ids.shape == (users, _SIZE)
    each = _naive(post, history.tolist(), slow)
    return [
        Value(f"{users} users, {items:,} items, K = {_SIZE}: seconds of CPU", ours),
        Value("the same, wall seconds", wall),
        Value("memory used besides the tables, MiB", peak - before),
        Value(f"drawing every vector: seconds of CPU, {slow} users scaled to all", each * users),
        Value("times faster", each * users / ours),
    ]


BENCHMARK = Quality(
    title="Slates: recommending from a million items",
    question=(
        "How long does in-slate Thompson sampling of 20 items for 1,000 users over 1,000,000 items "
        "(d = 25, one thread) take, and how much memory, against drawing every vector?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)

"""Seconds of one gradient step of a slate fit."""

from __future__ import annotations

import time
from typing import Any

TOUCHED, SLOTS, STEPS, DIM = 50_000, 10, 20, 25


def log(items: int, touched: int = TOUCHED) -> Any:
    """A log whose slates show ``touched`` different items, each once, out of ``items``."""
    import torch

    from probkit.models.slates import SlateLog

    g = torch.Generator().manual_seed(0)
    touched = min(touched, items)
    ids = torch.randperm(items, generator=g)[:touched] + 3
    users = touched // (SLOTS * STEPS)
    shown = ids[: users * SLOTS * STEPS].reshape(users, STEPS, SLOTS)
    slate = torch.cat([torch.ones_like(shown[..., :1]), shown], -1)
    slot = torch.randint(0, SLOTS + 1, (users, STEPS), generator=g)
    click = slate.gather(-1, slot[..., None])[..., 0]
    return SlateLog(slate, click, slot, n_items=items + 3, check=False)


def seconds(model: Any, data: Any, guide: Any, few: int = 2, many: int = 12) -> float:
    """CPU seconds of a step: long chunks less short ones, the median of three after a first."""
    from statistics import median

    from probkit.inference import SVI
    from probkit.rng import stream
    from probkit.sampler import Problem

    problem, rngs = Problem(model, data, guide), [stream(0, "chain")]
    samplers = [
        SVI(steps=1000, particles=1, batch_size=len(data), chunk=steps) for steps in (few, many)
    ]
    state = samplers[0].init(problem, rngs=rngs)
    found = []
    for _ in range(4):
        spent = []
        for sampler in samplers:
            begin = time.process_time()
            sampler.step(problem, state, rngs=rngs)
            spent.append(time.process_time() - begin)
        found.append((spent[1] - spent[0]) / (many - few))
    return median(found[1:])

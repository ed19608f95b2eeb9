"""Small slate logs."""

from __future__ import annotations

import torch

from probkit.models.slates import SlateLog


def random_log(users, steps, slots, items, *, seed, n_groups=1, held=0, types=False):
    """A log of random slates of ``slots`` items and random clicks.

    The last ``held`` users keep two training steps; they are validation users.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(users, steps, items, generator=generator)
    shown = noise.argsort(-1)[..., :slots] + 3
    slate = torch.cat([torch.ones(users, steps, 1, dtype=torch.int64), shown], -1)
    slot = torch.randint(slots + 1, (users, steps), generator=generator)
    click = slate.gather(-1, slot[..., None])[..., 0]
    train = torch.ones(users, steps, dtype=torch.bool)
    part = torch.zeros(users, dtype=torch.int64)
    if held:
        train[-held:, 2:] = False
        part[-held:] = 1
    kind = torch.randint(1, 3, (users, steps), generator=generator) if types else None
    return SlateLog(
        slate,
        click,
        interaction_type=kind,
        groups=torch.arange(items + 3) % n_groups,
        train=train,
        part=part,
        n_items=items + 3,
    )

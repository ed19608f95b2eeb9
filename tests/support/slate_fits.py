"""Posteriors of slate models that are set by hand, for tests of what is done with them."""

from __future__ import annotations

import torch

from probkit.models.slates import SlateGRU, SlateLog, SlateMeanField, SlatePrior
from probkit.posterior import Context, Posterior
from probkit.sources import Fitted


def normal(loc, scale):
    """Parameters of a site."""
    loc = torch.as_tensor(loc, dtype=torch.float32)
    scale = torch.as_tensor(scale, dtype=torch.float32).expand(loc.shape)
    return {"loc": loc, "log_scale": scale.log()}


def factor(mean, sd, prior_sd):
    """The factor that turns the flat prior N(0, prior_sd^2) of an item into N(mean, sd^2)."""
    mean, sd = (torch.as_tensor(x, dtype=torch.float64) for x in (mean, sd))
    told = (sd**-2 - prior_sd**-2).clamp_min(1e-12)
    found = {"loc": mean / sd**2 / told, "log_scale": -0.5 * told.log()}
    return {name: value.float() for name, value in found.items()}


def bandit(means, sds, users):
    """Scores of items that are independent normals: dot scores, one dim, all states at one."""
    items = len(means) + 3
    slate = torch.tensor([1, 3, 4]).expand(users, 1, 3)
    log = SlateLog(slate, slate[..., 1], n_items=items, check=False)
    params = {
        "items": factor([[0.0]] * 3 + [[m] for m in means], [[1.0]] * 3 + [[s] for s in sds], 30.0),
        "gamma": normal(0.5, 1e-9),
        "no_click": normal([0.0] * 4, 1e-9),
        "user_init": normal([[1.0]] * users, 1e-9),
    }
    prior = SlatePrior(item=30.0)
    model = SlateGRU(items, transition="linear", score="dot", dim=1, item_prior="flat", prior=prior)
    return Posterior(Fitted(SlateMeanField(users="table"), [params]), model, Context(log))


def walk(*, items=40, dim=2, transition="linear", score="l2", users="amortised", seed=0, sd=0.4):
    """A random fit with states that move; returns the posterior and its log of 6 users."""
    g = torch.Generator().manual_seed(seed)
    ids = items + 3
    slate = torch.stack([torch.randperm(items, generator=g)[:4] + 3 for _ in range(30)])
    slate = torch.cat([torch.ones(30, 1).long(), slate], 1).reshape(6, 5, 5)
    slot = torch.randint(0, 5, (6, 5), generator=g)
    log = SlateLog(
        slate,
        slate.gather(-1, slot[..., None])[..., 0],
        slot,
        n_items=ids,
        groups=torch.arange(ids) % 7,
    )
    model = SlateGRU(ids, groups=log.groups, transition=transition, score=score, dim=dim)
    guide = SlateMeanField(users=users)
    params = guide.init(model, log, rng=seed)
    noise = torch.randn(ids, dim, generator=g)
    params["items"] = normal(noise, sd * (0.3 + torch.rand(ids, dim, generator=g)))
    return Posterior(Fitted(guide, [params]), model, Context(log)), log

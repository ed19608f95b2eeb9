"""Demo view: a simulated market place; learning by click, diversity, and calibrated clicks."""

from __future__ import annotations

from typing import Any

import pandas as pd

from probkit.demo import DemoContext, DemoView, register_view

__all__: list[str] = []


def study(*, users: int, items: int, steps: int, seed: int) -> dict[str, Any]:
    """Simulate a market place, hold out the later steps of a fifth of the users, and fit.

    Returns:
        ``place``, ``log``, ``posterior``.
    """
    import torch

    import probkit as pk
    from probkit.inference import SVI
    from probkit.models.slates import SlateMeanField, draw_market_place

    place = draw_market_place(users=users, items=items, groups=15, rng=seed)
    held = users // 5
    order = torch.cat([torch.arange(users - held, users), torch.arange(users - held)])
    log = place.log(20, 5, rng=seed).hold_out(valid=0.0, test=0.2, keep=5, order=order)
    posterior = pk.infer(
        model_for(log),
        log,
        SVI(steps=steps, lr=0.05, decay=0.3, particles=1, evidence_draws=10),
        guide=SlateMeanField(users="table"),
        rng=seed,
    )
    return {"place": place, "log": log, "posterior": posterior}


def model_for(log: Any) -> Any:
    """Return the slate model with a linear transition in the plane, items in groups."""
    from probkit.models.slates import SlateGRU, SlatePrior

    prior = SlatePrior(
        group_mean=3.0,
        log_group_scale=(-1.0, 1.0),
        user=2.5,
        no_click=3.0,
        logit_gamma=(0.0, 2.0),
    )
    return SlateGRU(
        log.n_items,
        groups=log.groups,
        transition="linear",
        dim=2,
        prior=prior,
        length_bias=False,
    )


def run(ctx: DemoContext) -> None:
    """Write the view."""
    found = study(users=120, items=150, steps=1000 if ctx.full else 250, seed=ctx.rng_seed)
    _decisions(ctx, found)
    _learning(ctx)


def _decisions(ctx: DemoContext, found: dict[str, Any]) -> None:
    """Calibration of held-out clicks, and what each policy would show next."""
    import torch

    from probkit import plots
    from probkit.models.slates import (
        Greedy,
        InSlateThompson,
        Popularity,
        Random,
        Thompson,
        click_log_probs,
        click_probs,
        recommend,
    )
    from probkit.models.slates.metrics import click_calibration, distinct_groups

    place, log, post = found["place"], found["log"], found["posterior"]
    held = log.mask("test").any(1).nonzero()[:, 0]
    step = 12
    history = log[held].before(step)
    state = place.states(log.click)[held, step]
    policies: dict[str, Any] = {
        "greedy": Greedy(),
        "Thompson": Thompson(),
        "in-slate Thompson": InSlateThompson(),
        "popularity": Popularity(),
        "random": Random(),
    }
    rows = {}
    for name, policy in policies.items():
        shown = recommend(
            post, history, 5, policy, users=held, propensity_draws=0, rng=ctx.rng_seed
        ).ids
        rows[name] = {
            "expected click rate": float(place.click_probability(state, shown).mean()),
            "groups in a slate": float(distinct_groups(shown, place.groups).double().mean()),
        }
    best = place.best(state, 5)
    rows["best possible"] = {
        "expected click rate": float(place.click_probability(state, best).mean()),
        "groups in a slate": float(distinct_groups(best, place.groups).double().mean()),
    }
    probs = [
        click_probs(
            post, log[held].before(t), log.slate[held, t], users=held, draws=60, rng=ctx.rng_seed
        )
        for t in range(6, 20, 3)
    ]
    chosen = torch.cat([log.click_idx[held, t] for t in range(6, 20, 3)])
    calibration = click_calibration(torch.cat(probs), chosen, bins=8, rng=ctx.rng_seed)
    mask = log.mask("test")
    loss = {
        "averaged over the posterior": click_log_probs(post, log, draws=60, rng=ctx.rng_seed),
        "plugged in": click_log_probs(post, log, draws=None),
    }
    nll = {name: -float(value[mask].mean()) for name, value in loss.items()}
    ctx.text(
        f"""
        ## A market place of slates

        {place.users} users see slates of five out of {place.n_items - 3} items and click on one or
        on none; their taste moves with their clicks. The model is fitted to the first steps and
        predicts the others of {len(held)} held-out users: a click costs
        {nll["averaged over the posterior"]:.3f} nats averaged over the posterior and
        {nll["plugged in"]:.3f} with the posterior mean plugged in. The expected calibration error
        of click probabilities is {calibration.ece:.3f}. The likelihood is not tempered
        (temperature {post.model.temperature:g}).
        """
    )
    ctx.table(pd.DataFrame(rows).T.round(3), "The next slate of the held-out users, by policy")
    fig, axes = plots.figure(1, 2, size=(11.0, 3.6))
    with plots.style():
        loc = post.marginals["items"].mean[3:]
        axes[0, 0].scatter(loc[:, 0], loc[:, 1], c=place.groups[3:], cmap="tab20", s=12)
        axes[0, 0].set(xlabel="first coordinate", ylabel="second coordinate")
        low, high = calibration.happened - calibration.low, calibration.high - calibration.happened
        axes[0, 1].errorbar(
            calibration.predicted,
            calibration.happened,
            yerr=torch.stack([low.clamp_min(0), high.clamp_min(0)]),
            fmt="o",
            capsize=3,
            color=plots.PALETTE[0],
        )
        top = float(calibration.predicted.max()) * 1.1
        axes[0, 1].plot([0, top], [0, top], color="0.6", linewidth=0.8)
        axes[0, 1].set(xlabel="predicted probability of a click", ylabel="share clicked")
    ctx.figure(
        fig,
        "market",
        "Left: posterior means of the items, coloured by group. Right: click probabilities on "
        "held-out slates against what happened, with 95 % intervals",
    )


def _learning(ctx: DemoContext) -> None:
    """Learning curves: every policy trains on its own clicks."""
    from probkit import plots
    from probkit.inference import SVI
    from probkit.models.slates import (
        Greedy,
        InSlateThompson,
        Refit,
        Thompson,
        closed_loop,
        draw_market_place,
    )

    rounds = 30 if ctx.full else 10
    place = draw_market_place(users=60, items=100, groups=12, bias=0.0, rng=ctx.rng_seed)
    start = place.log(4, 5, optimal=0.0, rng=ctx.rng_seed)

    def fit(steps: int) -> Any:
        return SVI(steps=steps, lr=0.05, decay=0.3, particles=1, evidence_draws=1)

    curves = {}
    policies: dict[str, Any] = {
        "greedy": Greedy(),
        "Thompson": Thompson(),
        "in-slate Thompson": InSlateThompson(),
    }
    for name, policy in policies.items():
        curves[name] = closed_loop(
            place,
            policy,
            Refit(model_for(start), fit(100), fit(15)),
            rounds=rounds,
            size=5,
            start=start,
            rng=ctx.rng_seed,
        )
    ctx.text(
        f"""
        ## Learning from one's own clicks

        In a closed loop each policy sees the clicks on its own slates alone, {rounds} rounds of
        {place.users} users. One seed tells little of which policy wins in the long run; the
        benchmarks hold five, with intervals.
        """
    )
    fig, axes = plots.figure(1, 2, size=(11.0, 3.4))
    with plots.style():
        for color, (name, result) in zip(plots.PALETTE, curves.items(), strict=False):
            axes[0, 0].plot(range(1, rounds + 1), result.click_rate, color=color, label=name)
        best = sum(result.best_rate for result in curves.values()) / len(curves)
        axes[0, 0].plot(range(1, rounds + 1), best, color="0.6", linestyle=":", label="best")
        axes[0, 0].set(xlabel="round", ylabel="expected click rate")
        axes[0, 0].legend()
        shown = [float(result.groups.mean()) for result in curves.values()]
        axes[0, 1].bar(range(len(shown)), shown, color=plots.PALETTE[: len(shown)])
        axes[0, 1].set_xticks(range(len(shown)), list(curves))
        axes[0, 1].set(ylabel="groups in a slate")
    ctx.figure(fig, "learning", "Learning curves of click rate by policy, and diversity of slates")


register_view(DemoView("slates", "Slates by in-slate Thompson sampling", run, order=75))

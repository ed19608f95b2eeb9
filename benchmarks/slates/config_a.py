"""Policies on a simulated market place, beside GRU4Rec (RecBole) and LinTS (mabwiser)."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import envs
from benchmarks.harness.spec import Quality, Unavailable, Value

_SIZE, _STEPS = 5, (5, 8, 11, 14, 17)
_PEERS = {"GRU4Rec (RecBole)": "recbole", "LinTS (mabwiser)": "mabwiser"}
# Click rates that the model's authors' simulator gives such fits, by arm: lower and upper.
_RANGES = {
    "random": (0.18, 0.22),
    "best": (0.59, 0.61),
    "hier greedy": (0.38, 0.41),
    "flat greedy": (0.29, 0.32),
    "hier Thompson": (0.36, 0.38),
    "hier in-slate": (0.36, 0.39),
}


def _prior() -> Any:
    from probkit.models.slates import SlatePrior

    return SlatePrior(
        group_mean=5.0,
        log_group_scale=(-1.0, 1.0),
        item=5.0,
        user=2.5,
        no_click=3.0,
        logit_gamma=(0.0, 2.0),
    )


def _run(seed: int, steps: int) -> dict[str, float]:
    """Click rate, groups, log loss and seconds of every arm on one market place."""
    import torch

    import probkit as pk
    from probkit.inference import SVI
    from probkit.models.slates import (
        Greedy,
        InSlateThompson,
        Random,
        SlateGRU,
        SlateMeanField,
        Thompson,
        click_log_probs,
        draw_market_place,
        recommend,
    )
    from probkit.models.slates.metrics import distinct_groups

    place = draw_market_place(rng=seed)
    order = torch.cat([torch.arange(240, 300), torch.arange(240)])
    log = place.log(20, _SIZE, rng=seed).hold_out(valid=0.0, test=0.2, keep=5, order=order)
    states, users = place.states(log.click), torch.arange(240, 300)
    found: dict[str, float] = {}

    def judge(name: str, slates: Sequence[Any]) -> None:
        rates = [
            place.click_probability(states[users, t], s)
            for t, s in zip(_STEPS, slates, strict=True)
        ]
        kinds = [distinct_groups(s, place.groups).double() for s in slates]
        found[f"{name}: click rate"] = float(torch.cat(rates).mean())
        found[f"{name}: groups in a slate"] = float(torch.cat(kinds).mean())

    judge("best", [place.best(states[users, t], _SIZE) for t in _STEPS])
    for item_prior in ("hier", "flat"):
        model = SlateGRU(
            log.n_items,
            groups=log.groups,
            transition="linear",
            dim=2,
            item_prior=item_prior,  # type: ignore[arg-type]
            prior=_prior(),
            length_bias=False,
        )
        sampler = SVI(steps=steps, lr=0.03, decay=1.0, particles=1, evidence_draws=10)
        begin = time.process_time()
        post = pk.infer(model, log, sampler, guide=SlateMeanField(users="table"), rng=seed)
        found[f"{item_prior}: seconds of CPU to fit"] = time.process_time() - begin
        policies = {
            "greedy": Greedy(),
            "Thompson": Thompson(),
            "in-slate": InSlateThompson(),
            "random": Random(),
        }
        for name, policy in policies.items():
            if name == "random" and item_prior == "flat":
                continue
            slates = [
                recommend(
                    post,
                    log[users].before(t),
                    _SIZE,
                    policy,
                    users=users,
                    propensity_draws=0,
                    rng=1000 * seed + t,
                ).ids
                for t in _STEPS
            ]
            judge(name if name == "random" else f"{item_prior} {name}", slates)
        mask = log.mask("test")
        for name, draws in (("averaged", 100), ("plugged in", None)):
            terms = click_log_probs(post, log, draws=draws, rng=0)[mask]
            found[f"{item_prior}: nats a choice, {name}"] = -float(terms.mean())
        sd = post.marginals["items"].stddev.log().mean(1)[3:]  # type: ignore[union-attr]
        seen = (1.0 + log.exposure()[3:]).log()
        pair = torch.stack([sd, seen.to(sd)])
        if item_prior == "hier":  # Groups differ in their spread: compare within them.
            one = torch.nn.functional.one_hot(log.groups[3:]).to(pair)
            pair = pair - (one @ (one.T @ pair.T / one.sum(0)[:, None].clamp_min(1))).T
        found[f"{item_prior}: correlation of log sd and log exposure"] = float(
            torch.corrcoef(pair)[0, 1]
        )
    for name, env in _PEERS.items():
        slates = _peer(env, log, users, found, name)
        if slates is not None:
            judge(name, slates)
    return found


def _peer(env: str, log: Any, users: Any, found: dict[str, float], name: str) -> Any:
    """Slates of a peer, or None where its environment is missing."""
    import numpy as np
    import torch

    try:
        python = envs.python_of(env)
    except Unavailable:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "log.npz", Path(folder) / "answer.npz"
        np.savez(
            source,
            slate=log.slate.numpy(),
            click=log.click.numpy(),
            train=log.train.numpy(),
            groups=log.groups.numpy(),
            held=users.numpy(),
            steps=np.array(_STEPS),
            size=_SIZE,
        )
        begin = time.perf_counter()
        command = [python, "-m", f"benchmarks.slates._{env}", str(source), str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
            return None
        found[f"{name}: wall seconds in all"] = time.perf_counter() - begin
        ids = torch.from_numpy(np.load(target)["ids"])
    return list(ids.unbind(1))


def _evaluate(quick: bool) -> Sequence[Value]:
    import torch

    torch.set_num_threads(1)
    seeds, steps = (1, 20) if quick else (3, 700)
    runs = [_run(seed, steps) for seed in range(seeds)]
    values = []
    for name in runs[0]:
        numbers = [run[name] for run in runs if name in run]
        mean = sum(numbers) / len(numbers)
        arm, _, what = name.partition(": ")
        if what == "click rate" and arm in _RANGES:
            low, high = _RANGES[arm]
            values.append(
                Value(
                    name,
                    mean,
                    (low + high) / 2,
                    (high - low) / 2 + 0.03,
                    note="figures of an independent fit; places differ by about 0.03",
                )
            )
        else:
            values.append(Value(name, mean))
    return values


BENCHMARK = Quality(
    title="Slates: policies on a simulated market place",
    question=(
        "300 users, 300 items in 20 groups, slates of 5, 20 steps: how often would the slates of "
        "each policy be clicked by held-out users (means over three places)?"
    ),
    evaluate=_evaluate,
    packages=("probkit", "torch"),
    timeout=5400.0,
)

"""Open Bandit data: the value of the uniform policy from the log of Bernoulli Thompson sampling."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness.spec import Quality, Unavailable, Value

_REFERENCES = {"all": (80, 0.002360, 0.002334, 340), "men": (34, 0.003009, 0.003189, 656)}


def _evaluate(quick: bool) -> Sequence[Value]:
    import torch

    from probkit.models.slates import SlateLog
    from probkit.models.slates.metrics import click_rate
    from probkit.models.slates.off_policy import importance_weights, ips, snips

    root = os.environ.get("PROBKIT_DATA")
    folder = Path(root or "") / "slates" / "obd_small"
    if not root or not folder.is_dir():
        raise Unavailable("PROBKIT_DATA does not name the folder that holds slates/obd_small")
    values = []
    note = "figures of obp's estimators on the same rows"
    for campaign, (items, plain, normalised, ess) in _REFERENCES.items():
        log = SlateLog.from_open_bandit(folder, policy="bts", campaign=campaign)
        logging = log.propensity[:, 0, 1]
        weight = importance_weights(torch.full_like(logging, 1 / items), logging)
        reward = (log.click[:, 0] > 2).double()
        by_ips, by_snips = ips(reward, weight), snips(reward, weight)
        random = SlateLog.from_open_bandit(folder, policy="random", campaign=campaign)
        values += [
            Value(f"{campaign}: IPS", by_ips.value, plain, 1e-6, note=note),
            Value(f"{campaign}: SNIPS", by_snips.value, normalised, 1e-6, note=note),
            Value(f"{campaign}: effective rows of 10,000", by_ips.ess, ess, 0.5),
            Value(f"{campaign}: IPS, lower end of the 95 % interval", by_ips.low),
            Value(f"{campaign}: IPS, upper end", by_ips.high),
            Value(f"{campaign}: click rate that the uniform policy had", click_rate(random)),
        ]
    return values


BENCHMARK = Quality(
    title="Slates: off-policy values on Open Bandit data",
    question="What is the uniform policy worth, judged from the log of another policy?",
    evaluate=_evaluate,
    packages=("probkit", "torch"),
)

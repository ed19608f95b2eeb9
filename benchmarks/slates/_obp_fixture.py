"""Write the fixture of the slate estimators: a simulated log of obp and obp's values of it.

Run it in the environment ``benchmarks/envs/obp`` (its requirements file tells how it is made)::

    benchmarks/envs/obp/bin/python benchmarks/slates/_obp_fixture.py tests/data/slates

2,000 slates of 3 out of 6 items, two context variables, cascade clicks; the target policy draws
slates uniformly without replacement. The log holds propensities of the logging policy only up to
what the others give: those of the first slot are the same in all forms.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROUNDS, ITEMS, SLOTS = 2000, 6, 3


def main(folder: Path) -> None:
    """Write ``obp_slates.npz`` and ``obp_slates.json``."""
    import numpy as np
    import obp
    from obp.dataset import (
        SyntheticSlateBanditDataset,
        linear_behavior_policy_logit,
        logistic_reward_function,
    )
    from obp.ope import (
        SelfNormalizedSlateIndependentIPS,
        SelfNormalizedSlateRewardInteractionIPS,
        SelfNormalizedSlateStandardIPS,
        SlateCascadeDoublyRobust,
        SlateIndependentIPS,
        SlateRewardInteractionIPS,
        SlateStandardIPS,
    )

    data = SyntheticSlateBanditDataset(
        n_unique_action=ITEMS,
        len_list=SLOTS,
        dim_context=2,
        reward_type="binary",
        reward_structure="cascade_additive",
        click_model="cascade",
        random_state=12345,
        behavior_policy_function=linear_behavior_policy_logit,
        base_reward_function=logistic_reward_function,
    )
    log = data.obtain_batch_bandit_feedback(n_rounds=ROUNDS, return_pscore_item_position=True)
    logits = np.zeros((ROUNDS, ITEMS))
    whole, own, cascade = data.obtain_pscore_given_evaluation_policy_logit(
        action=log["action"], evaluation_policy_logit_=logits, return_pscore_item_position=True
    )
    common = {
        "slate_id": log["slate_id"],
        "reward": log["reward"],
        "position": log["position"],
    }
    forms = {
        "sips": (SlateStandardIPS, SelfNormalizedSlateStandardIPS, "pscore", whole),
        "iips": (
            SlateIndependentIPS,
            SelfNormalizedSlateIndependentIPS,
            "pscore_item_position",
            own,
        ),
        "rips": (
            SlateRewardInteractionIPS,
            SelfNormalizedSlateRewardInteractionIPS,
            "pscore_cascade",
            cascade,
        ),
    }
    values = {}
    for name, (plain, normalised, key, target) in forms.items():
        given = {**common, key: log[key], f"evaluation_policy_{key}": target}
        values[name] = plain(len_list=SLOTS).estimate_policy_value(**given)
        values[f"{name}_self_normalised"] = normalised(len_list=SLOTS).estimate_policy_value(
            **given
        )

    action = log["action"].reshape(ROUNDS, SLOTS)
    reward = log["reward"].reshape(ROUNDS, SLOTS)
    # A rough model of the reward still to come, by slot and item, for the doubly robust form.
    later = reward[:, ::-1].cumsum(1)[:, ::-1]
    table = np.zeros((SLOTS, ITEMS))
    for slot in range(SLOTS):
        for item in range(ITEMS):
            table[slot, item] = later[action[:, slot] == item, slot].mean()
    q_hat = np.tile(table, (ROUNDS, 1, 1))
    choice = np.full((ROUNDS, SLOTS, ITEMS), 0.0)
    for slot in range(SLOTS):
        left = np.ones((ROUNDS, ITEMS))
        for above in range(slot):
            left[np.arange(ROUNDS), action[:, above]] = 0
        choice[:, slot] = left / left.sum(1, keepdims=True)
    values["cascade_dr"] = SlateCascadeDoublyRobust(
        len_list=SLOTS, n_unique_action=ITEMS
    ).estimate_policy_value(
        **common,
        action=log["action"],
        pscore_cascade=log["pscore_cascade"],
        evaluation_policy_pscore_cascade=cascade,
        q_hat=q_hat.flatten(),
        evaluation_policy_action_dist=choice.flatten(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "obp_slates.npz",
        action=action.astype(np.int8),
        reward=reward.astype(np.int8),
        cascade=log["pscore_cascade"].reshape(ROUNDS, SLOTS).astype(np.float32),
        own=log["pscore_item_position"].reshape(ROUNDS, SLOTS)[:, 1:].astype(np.float32),
    )
    rounded = {name: round(float(value), 9) for name, value in values.items()}
    meta = {"source": f"obp {obp.__version__} (sb-obp), Apache-2.0", "values": rounded}
    (folder / "obp_slates.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

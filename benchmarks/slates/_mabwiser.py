"""LinTS of mabwiser on a slate log; runs in the environment ``mabwiser``.

    python -m benchmarks.slates._mabwiser log.npz answer.npz

Every item is an arm, every item shown a decision with reward 1 if it was clicked; the context is
the share of each group among the user's clicks so far, and a constant.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(source: Path, target: Path) -> None:
    """Fit on the training steps; write the arms with the best sampled values [user, step, rank]."""
    import numpy as np
    from mabwiser.mab import MAB, LearningPolicy

    log = np.load(source)
    slate, click, train, groups = log["slate"], log["click"], log["train"], log["groups"]
    held, steps, size = log["held"], log["steps"], int(log["size"])
    names = int(groups.max()) + 1

    def context(user: int, step: int) -> np.ndarray:
        found = np.zeros(names + 1)
        found[-1] = 1.0
        past = [c for c in click[user, :step] if c >= 3]
        for item in past:
            found[groups[item]] += 1 / len(past)
        return found

    decisions, rewards, contexts = [], [], []
    for user, step in zip(*np.nonzero((click > 0) & train), strict=True):
        now = context(user, step)
        for item in slate[user, step, 1:]:
            decisions.append(int(item))
            rewards.append(int(item == click[user, step]))
            contexts.append(now)
    arms = sorted(set(range(3, len(groups))))
    bandit = MAB(arms, LearningPolicy.LinTS(alpha=0.3, l2_lambda=1.0), seed=0)
    bandit.fit(decisions, rewards, np.array(contexts))
    wanted = np.array([context(user, step) for user in held for step in steps])
    values = bandit.predict_expectations(wanted)
    order = [sorted(one, key=one.get, reverse=True)[:size] for one in values]
    np.savez(target, ids=np.array(order).reshape(len(held), len(steps), size))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

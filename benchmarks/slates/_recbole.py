"""GRU4Rec of RecBole on the clicks of a slate log; runs in the environment ``recbole``.

python -m benchmarks.slates._recbole log.npz answer.npz
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path


def main(source: Path, target: Path) -> None:
    """Train on the clicks of training steps; write the best items [user, step, rank]."""
    import numpy as np
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.data.interaction import Interaction
    from recbole.model.sequential_recommender import GRU4Rec
    from recbole.trainer import Trainer

    torch.set_num_threads(1)
    log = np.load(source)
    click, train, held, steps = log["click"], log["train"], log["held"], log["steps"]
    size = int(log["size"])
    # RecBole leaves logs in the folder where it is called.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        path = Path(folder) / "slates"
        path.mkdir()
        lines = ["user_id:token\titem_id:token\ttimestamp:float"]
        for user, step in zip(*np.nonzero((click >= 3) & train), strict=True):
            lines.append(f"u{user}\ti{click[user, step]}\t{step}")
        (path / "slates.inter").write_text("\n".join(lines), encoding="utf-8")
        config = Config(
            model="GRU4Rec",
            dataset="slates",
            config_dict={
                "data_path": folder,
                "checkpoint_dir": folder,
                "USER_ID_FIELD": "user_id",
                "ITEM_ID_FIELD": "item_id",
                "TIME_FIELD": "timestamp",
                "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
                "MAX_ITEM_LIST_LENGTH": 20,
                "train_neg_sample_args": None,
                "loss_type": "CE",
                "epochs": 20,
                "embedding_size": 32,
                "hidden_size": 64,
                "learning_rate": 3e-3,
                "train_batch_size": 256,
                "use_gpu": False,
                "show_progress": False,
                "state": "ERROR",
                "eval_args": {
                    "split": {"RS": [1.0, 0.0, 0.0]},
                    "order": "TO",
                    "group_by": None,
                    "mode": "full",
                },
            },
        )
        data = create_dataset(config)
        batches, _, _ = data_preparation(config, data)
        model = GRU4Rec(config, batches.dataset)
        Trainer(config, model).fit(batches, valid_data=None, saved=False, show_progress=False)
    model.eval()
    token = data.field2token_id["item_id"]
    real = {int(name[1:]): number for name, number in token.items() if name != "[PAD]"}
    back = np.array([0] * len(token))
    for item, number in real.items():
        back[number] = item
    answer = np.zeros((len(held), len(steps), size), dtype=np.int64)
    for j, step in enumerate(steps):
        for i, user in enumerate(held):
            past = [real[c] for c in click[user, :step].tolist() if c in real][-20:]
            past = past or [0]
            row = Interaction(
                {
                    "item_id_list": torch.tensor([past + [0] * (20 - len(past))]),
                    "item_length": torch.tensor([len(past)]),
                }
            )
            with torch.no_grad():
                score = model.full_sort_predict(row).reshape(-1)
            score[0] = -torch.inf
            answer[i, j] = back[score.topk(size).indices.numpy()]
    np.savez(target, ids=answer)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())

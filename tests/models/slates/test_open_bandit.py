"""Open Bandit data: its reader, and the published values of the uniform policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from probkit.errors import DataError
from probkit.models.slates import SlateLog
from probkit.models.slates.off_policy import importance_weights, ips, snips

DATA = Path(__file__).parents[2] / "data" / "slates"
pytestmark = pytest.mark.usefixtures("unchanged_global_state")


@pytest.mark.parametrize(
    ("campaign", "items", "plain", "normalised", "ess"),
    [("all", 80, 0.002360, 0.002334, 340), ("men", 34, 0.003009, 0.003189, 656)],
)
def test_the_value_of_the_uniform_policy(campaign, items, plain, normalised, ess):
    """Figures that obp gives for the log of Bernoulli Thompson sampling."""
    found = np.load(DATA / f"obd_bts_{campaign}.npz")
    reward = np.unpackbits(found["click"])[: len(found["propensity"])].astype(np.float64)
    logging = found["propensity"] / 1e6
    weight = importance_weights(np.full(len(logging), 1 / items), logging)
    assert ips(reward, weight).value == pytest.approx(plain, abs=1e-6)
    value = snips(reward, weight)
    assert value.value == pytest.approx(normalised, abs=1e-6)
    assert value.ess == pytest.approx(ess, abs=0.5)
    assert value.low < 0.0046 < value.high * 1.2  # Few effective rows: the interval is wide.


def write(folder, rows):
    header = ",timestamp,item_id,position,click,propensity_score"
    text = "\n".join([header, *(",".join(map(str, (k, "t", *row))) for k, row in enumerate(rows))])
    (folder / "random_all.csv").write_text(text, encoding="utf-8")
    context = ",item_id,item_feature_0,item_feature_1\n0,1,0.5,x\n1,0,0.5,y\n2,2,0.1,x\n"
    (folder / "item_context_all.csv").write_text(context, encoding="utf-8")
    return folder


def test_impressions_become_slates_of_one_item(tmp_path):
    write(tmp_path, [(2, 1, 0, 0.25), (0, 3, 1, 0.5)])
    log = SlateLog.from_open_bandit(tmp_path, group_by="item_feature_1")
    assert log.slate.tolist() == [[[1, 5]], [[1, 3]]]
    assert log.click.tolist() == [[1], [3]]
    assert log.propensity[:, 0].tolist() == [[1.0, 0.25], [1.0, 0.5]]
    assert log.extra["position"].tolist() == [0, 2]
    assert log.groups.tolist() == [0, 1, 2, 4, 3, 3]
    assert torch.equal(SlateLog.from_open_bandit(tmp_path).groups, torch.zeros(6).long())


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"expected bts_all.csv or bts_all.csv.gz"):
        SlateLog.from_open_bandit(tmp_path, policy="bts")
    write(tmp_path, [(2, 4, 0, 0.25)])
    with pytest.raises(DataError, match="position 1, 2 or 3"):
        SlateLog.from_open_bandit(tmp_path)
    write(tmp_path, [(2, 1, 0, 0.0)])
    with pytest.raises(DataError, match=r"propensity in \(0, 1\], got 0"):
        SlateLog.from_open_bandit(tmp_path)
    write(tmp_path, [(2, 1, 0, 0.5)])
    with pytest.raises(DataError, match="group_by to be one of"):
        SlateLog.from_open_bandit(tmp_path, group_by="colour")
    (tmp_path / "random_all.csv").write_text(",item_id\n0,1\n", encoding="utf-8")
    with pytest.raises(DataError, match="missing: position, click, propensity_score"):
        SlateLog.from_open_bandit(tmp_path)

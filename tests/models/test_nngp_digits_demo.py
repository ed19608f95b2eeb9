"""The pieces of the view of corrupted digits that its pictures do not show to be right."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn.datasets  # noqa: F401 (its first import draws from Python's random stream)

from probkit.models import nngp_digits_demo as demo


def test_calibration_error_of_a_calibrated_and_of_a_sure_predictor():
    generator = np.random.default_rng(0)
    probs = generator.dirichlet([1.0, 1.0, 1.0], 40_000)
    labels = (probs.cumsum(1) > generator.random((40_000, 1))).argmax(1)
    # |mean| of ten averages over about 4000 rows each: E|error| is 0.8 sqrt(p q / n).
    assert demo._calibration_error(probs, labels) < 0.01
    sure = np.eye(3)[probs.argmax(1)] * 0.97 + 0.01
    right = (probs.argmax(1) == labels).mean()
    assert demo._calibration_error(sure, labels) == pytest.approx(0.98 - right)


def test_scores_by_hand():
    probs = np.array([[0.9, 0.1], [0.4, 0.6]])
    scores = demo._scores(probs, np.array([0, 0]))
    assert scores["NLL"] == pytest.approx(-np.log([0.9, 0.4]).mean())
    assert scores["accuracy"] == 0.5
    assert scores["ECE"] == pytest.approx(0.5 * 0.1 + 0.5 * 0.6)


def test_corruption_grows_and_starts_at_nothing():
    _, test = demo._digits(300, 0)
    images = test.images[:20]
    assert images.shape == (20, 8, 8) and 0 <= images.min() and images.max() == 1
    for kind, severities in demo._SEVERITIES.items():
        assert severities[0] == 0
        sizes = [np.abs(demo._corrupt(images, kind, s, 0) - images).mean() for s in severities]
        assert sizes[0] == 0 and sizes == sorted(sizes), kind
        once, again = (demo._corrupt(images, kind, severities[2], 0) for _ in range(2))
        assert np.array_equal(once, again) and once.shape == images.shape


def test_the_split_has_no_row_twice():
    train, test = demo._digits(300, 3)
    assert len(train.labels) == 300 and len(test.labels) == 1797 - 300
    rows = np.concatenate([train.images, test.images]).reshape(1797, -1)
    assert rows.sum() == pytest.approx(
        demo._digits(900, 1)[0].images.sum() + demo._digits(900, 1)[1].images.sum()
    )


def test_the_verdict_reads_its_numbers():
    rows = [
        {"model": m, "corruption": "noise", "severity": s, "NLL": n, "accuracy": 0.5, "ECE": 0.1,
         "confidence": 0.4}
        for s in (0.0, 1.0)
        for m, n in (("NNGP, scale 1", 2.0 - s), ("NNGP, scale 9", 1.25), ("mixture", 1.5))
    ]  # fmt: skip
    text = demo._verdict(pd.DataFrame(rows))
    assert "On clean digits the NLL is 2.00 (ECE 0.10) for NNGP, scale 1" in text
    assert "better NLL than the mixture at: noise 1.0." in text
    assert "-0.10, -0.10, -0.10" in text

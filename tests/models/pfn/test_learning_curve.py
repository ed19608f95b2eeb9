"""The predictor of learning curves as a model: ragged batches, files, warnings, errors."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import Direct
from probkit.models.pfn.bars import BarDistribution
from probkit.models.pfn.curve_prior import CurvePrior
from probkit.models.pfn.curves import Curves
from probkit.models.pfn.learning_curve import LearningCurvePFN
from probkit.models.pfn.network import PFNNetwork, PFNSize
from probkit.models.pfn.normalizer import CurveNormalizer
from probkit.models.pfn.surprise import OutOfPriorWarning, falling
from probkit.models.pfn.weight_files import WeightFile, save_weights
from probkit.testing import ModelConformance

ACC = CurveNormalizer.accuracy()
SEEN = [0.31, 0.42, 0.49, 0.54, 0.57, 0.60, 0.615, 0.63]


def drawn(n, *, rng=0):
    """Noisy curves [n, 100] of the prior."""
    return CurvePrior().sample_dataset(n, rng=rng)[1][1]


class TestConformance(ModelConformance):
    def problem(self):
        model = LearningCurvePFN.load()
        return model, Curves(None, [SEEN, SEEN[:5]], ACC, horizon=50), torch.tensor([20.0, 50.0])


def test_infer_and_the_direct_call_agree(lc):
    post = pk.infer(lc, Curves(None, SEEN, ACC, horizon=50), rng=0)
    ahead = torch.tensor([9.0, 30.0, 50.0])
    two_step = post.predict(ahead)
    direct = lc.predict(SEEN, ahead, normalizer=ACC, horizon=50)
    assert torch.equal(two_step.quantile([0.1, 0.5]), direct.quantile([0.1, 0.5]))
    assert pk.infer(lc, Curves(None, SEEN, ACC), Direct(), rng=0).chains == 1
    assert lc.predict(np.array(SEEN), normalizer=ACC, horizon=50).mean.shape == (42,)


def test_a_rising_curve_is_extrapolated_sensibly(lc):
    law = lc.predict(SEEN, torch.tensor([9.0, 100.0]), normalizer=ACC)
    low, high = law.quantile([0.05, 0.95])
    assert 0.6 < float(law.median[0]) < 0.68 and 0.6 < float(law.median[1]) < 0.85
    assert float(high[1] - low[1]) > float(high[0] - low[0])  # further ahead is less certain


def test_an_error_is_an_accuracy_upside_down(lc):
    up = lc.predict(SEEN, normalizer=ACC)
    down = lc.predict(1 - np.array(SEEN), normalizer=CurveNormalizer.error())
    assert torch.allclose(down.quantile(0.9), 1 - up.quantile(0.1), atol=1e-5)
    assert torch.allclose(down.mean, 1 - up.mean, atol=1e-5)
    assert torch.allclose(down.ei(0.35), up.ei(0.65), atol=1e-5)


def test_ragged_batches_equal_a_loop(lc):
    y = drawn(40)
    lengths = [1, 3, 10, 33, 77] * 8
    many = Curves(None, [row[:n] for row, n in zip(y, lengths, strict=True)], allow_outside=True)
    steps = torch.stack([torch.arange(n + 1, n + 6) for n in lengths]).double()
    together = lc.law(many, steps).logits
    for k in range(0, 40, 7):
        alone = lc.law(many[k], steps[[k]]).logits[0]
        assert float((together[k] - alone).abs().max()) < 1e-4


def test_observations_are_a_set_and_queries_do_not_interact(lc):
    order = torch.tensor([4, 0, 2, 1, 3])
    t, y = torch.arange(1.0, 6.0), torch.tensor(SEEN[:5])
    ahead = torch.tensor([10.0, 60.0])
    law = lc.predict(y, ahead, t=t, normalizer=ACC)
    shuffled = lc.predict(y[order], ahead, t=t[order], normalizer=ACC)
    assert torch.allclose(law.quantile(0.3), shuffled.quantile(0.3), atol=1e-6)
    more = lc.predict(y, torch.cat([ahead, torch.tensor([7.0])]), t=t, normalizer=ACC)
    assert torch.allclose(law.median, more.median[:2], atol=1e-6)


def test_the_empty_curve_gives_the_prior_predictive(lc):
    law = lc.predict(torch.zeros(0), torch.tensor([30.0, 100.0]))
    sample = drawn(4000)[:, [29, 99]].double()  # standard errors 0.004
    assert float((law.mean - sample.mean(0)).abs().max()) < 0.05
    assert float((law.variance.sqrt() - sample.std(0)).abs().max()) < 0.05


def test_every_kth_point(lc):
    thin = lc.predict(
        torch.linspace(0.3, 0.7, 90).double(), normalizer=ACC, horizon=300, every=3,
        x=torch.tensor([93.0, 300.0]),
    )  # fmt: skip
    plain = lc.predict(
        torch.linspace(0.3, 0.7, 90)[2::3].double(), torch.tensor([31.0, 100.0]), normalizer=ACC
    )
    assert torch.allclose(thin.median, plain.median, atol=1e-6)


def test_files(lc, tmp_path):
    post = pk.infer(lc, Curves(None, SEEN, ACC, horizon=50), rng=0)
    post.save(tmp_path / "post")
    back = pk.load(tmp_path / "post")
    ahead = torch.tensor([20.0])
    assert torch.equal(back.predict(ahead).median, post.predict(ahead).median)
    assert back.model.mark == lc.mark and back.attrs["weights"] == lc.mark


def test_weights_of_another_prior_are_refused(tmp_path):
    size = PFNSize(16, 1, 2, 10, 2)
    network = PFNNetwork(size, generator=torch.Generator().manual_seed(0))
    options = {"width": 16, "layers": 1, "heads": 2, "bars": 10, "features": 2, "targets": 1}
    file = WeightFile("other/1", options, network.state_dict(), torch.linspace(0, 1, 11))
    save_weights(tmp_path / "other.safetensors", file)
    with pytest.raises(DataError, match="was trained on the prior 'other/1', expected 'learning"):
        LearningCurvePFN.load(tmp_path / "other.safetensors")
    with pytest.raises(DataError, match="expected a weight file"):
        LearningCurvePFN.load(tmp_path / "none.safetensors")
    older = replace(file, prior=CurvePrior().version)
    save_weights(tmp_path / "older.safetensors", older)
    with pytest.raises(DataError, match="encodes an epoch by 2 numbers and a value by 1, expected"):
        LearningCurvePFN.load(tmp_path / "older.safetensors")


# ------------------------------------------------------------------ curves outside the prior


def test_prior_curves_are_rarely_surprising(lc):
    curves = Curves(None, drawn(200, rng=5)[:, :30], allow_outside=True)
    check = lc.check_prior(curves)
    # at most one in a thousand where the laws are exact; 200 curves, and an approximation
    assert int(check.surprising.sum()) <= 4
    assert check.log_score.shape == (200,) and bool(check.log_score.isfinite().all())
    # p-values are conservative: the share below 0.1 is at most 0.1, give or take 3 sd
    assert float((check.p_value < 0.1).double().mean()) < 0.1 + 3 * (0.09 / 200) ** 0.5


@pytest.mark.parametrize(
    "late",
    [
        [0.61, 0.61, 0.60, 0.61, 0.10, 0.11, 0.10, 0.11],  # divergence
        [0.63, 0.64] * 6 + [0.98, 0.98, 0.98],  # a jump
    ],
)
def test_jumps_are_surprising(lc, late):
    with pytest.warns(OutOfPriorWarning, match="the curve (is not what the prior|falls)"):
        lc.predict([*SEEN, *late], normalizer=ACC)


def test_one_of_many_is_named(lc):
    odd = [0.50, 0.51] * 10 + [0.95, 0.95]
    curves = Curves(None, [SEEN, odd, SEEN], ACC)
    with pytest.warns(OutOfPriorWarning, match="curve 1 is not what the prior"):
        pk.infer(lc, curves, rng=0)


def test_a_falling_curve_asks_for_its_direction(lc):
    loss = 1 - np.array(SEEN)
    with pytest.warns(OutOfPriorWarning, match=r"the curve falls while larger values .*\.error\("):
        lc.predict(loss, normalizer=ACC)
    curves = Curves(None, torch.tensor([SEEN, SEEN[::-1]]), ACC)
    assert falling(curves).tolist() == [False, True]
    assert not falling(Curves(None, SEEN[:4][::-1], ACC)).any()  # too short to tell


def test_warnings_can_be_switched_off(lc):
    quiet = LearningCurvePFN(lc.network, lc.borders, lc.card, out_of_prior="ignore")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet.predict(SEEN[::-1], normalizer=ACC)
    with pytest.raises(DataError, match="out_of_prior 'warn' or 'ignore', got 'raise'"):
        LearningCurvePFN(lc.network, lc.borders, lc.card, out_of_prior="raise")


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda lc: lc.predict([0.5, 1.2]), "lies above the upper bound 1; pass normalizer"),
        (lambda lc: lc.predict(SEEN, torch.tensor([8.0])), r"after the last observed one \(8\)"),
        (lambda lc: lc.predict(SEEN, torch.tensor([101.0])), "lies beyond horizon=100"),
        (lambda lc: lc.predict(SEEN, torch.tensor([0.0])), "finite future steps >= 1"),
        (lambda lc: lc.predict(SEEN, horizon=8), "nothing lies between the last observed step 8"),
        (lambda lc: lc.predict(SEEN, horizon=5), "step 6 lies beyond horizon=5"),
        (lambda lc: pk.infer(lc, (SEEN, SEEN), rng=0), r"expected Curves\(t, y, normalizer="),
        (
            lambda lc: lc.predict([SEEN, SEEN[:3]], torch.tensor([5.0])),
            r"after the last observed one of curve 0 \(8\), got 5; for curves of several",
        ),
    ],
)
def test_bad_values(lc, call, message):
    with pytest.raises(DataError, match=message):
        call(lc)


def test_bad_shapes_and_capabilities(lc):
    with pytest.raises(ShapeError, match=r"future steps \[step\] or \[curve=2, step\]"):
        lc.predict([SEEN, SEEN], torch.full((3, 1), 20.0), normalizer=ACC)
    post = pk.infer(lc, Curves(None, SEEN, ACC), rng=0)
    for options in ({"joint": True}, {"site": "f"}, {"groups": {"plate": [1]}}):
        with pytest.raises(CapabilityError, match="step by step: expected joint=False"):
            post.predict(torch.tensor([20.0]), **options)
    with pytest.raises(CapabilityError, match="has no hyper-parameters, got scale"):
        pk.infer(lc, Curves(None, SEEN, ACC), Direct(hyper={"scale": 1.0}), rng=0)


def test_laws_that_cannot_fit_are_refused(lc, monkeypatch):
    import probkit.numerics

    monkeypatch.setattr(probkit.numerics, "available_memory", lambda device="cpu": 1000)
    with pytest.raises(DataError, match=r"laws \[curve=40, step=92, bar="):
        lc.predict([SEEN] * 40)


def test_laws_are_bars(lc):
    law = lc.law(Curves(None, SEEN), torch.tensor([[10.0]]).double())
    assert isinstance(law, BarDistribution) and law.batch_shape == (1, 1)

"""Networks run by onnxruntime give the numbers of torch, for sizes the export has not seen."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from probkit.errors import CapabilityError, DataError
from probkit.models.pfn import GPPrior, LearningCurvePFN, PFNNetwork, PFNSize, amortize, export_onnx
from probkit.models.pfn.curve_task import METRIC_FEATURES, encode_epochs, encode_metric

SIZES = ((1, 1, 1), (7, 11, 4), (3, 40, 60))


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    """The exporter and its packages warn of their own insides while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("onnxscript")
        yield


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_a_predictor_of_rows(tmp_path):
    net = amortize(GPPrior(rows=12, features=2), PFNSize(32, 2, 4), steps=20, bars=20, rng=0)
    path = tmp_path / "rows.onnx"
    export_onnx(net, path)
    runner = session(path)
    generator = torch.Generator().manual_seed(0)
    for batch, seen, asked in SIZES:
        x = torch.rand(batch, seen, 2, generator=generator)
        y = torch.randn(batch, seen, generator=generator)
        query = torch.rand(batch, asked, 2, generator=generator)
        got = runner.run(None, {"x": x.numpy(), "y": y.numpy(), "query": query.numpy()})[0]
        law = net.predict_sets(x, y, query)
        assert np.abs(got - law.logits.numpy()).max() < 1e-4
    told = runner.get_modelmeta().custom_metadata_map
    assert torch.allclose(torch.tensor(json.loads(told["borders"])), law.borders)
    assert told["prior"] == net.prior


@pytest.mark.slow
def test_a_learning_curve_network(tmp_path):
    size = PFNSize(32, 2, 4, 30, 2, METRIC_FEATURES)
    network = PFNNetwork(size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    lc = LearningCurvePFN(network.eval(), torch.linspace(-0.1, 1.1, 31), {})
    path = tmp_path / "curves.onnx"
    export_onnx(lc, path, opset=20)
    runner = session(path)
    for batch, seen, asked in SIZES:
        t = torch.arange(1.0, seen + 1).expand(batch, seen).contiguous()
        y = torch.rand(batch, seen, generator=torch.Generator().manual_seed(2))
        query = torch.arange(seen + 1.0, seen + asked + 1).expand(batch, asked).contiguous()
        got = runner.run(None, {"t": t.numpy(), "y": y.numpy(), "query": query.numpy()})[0]
        with torch.no_grad():
            ours = network(encode_epochs(t), encode_metric(y), encode_epochs(query))
        assert np.abs(got - ours.numpy()).max() < 1e-4


def test_bad_input(tmp_path):
    with pytest.raises(DataError, match="opset: expected at least 17, got 16"):
        export_onnx(object(), tmp_path / "a", opset=16)
    with pytest.raises(CapabilityError, match="expected a PFN or LearningCurvePFN, got object"):
        export_onnx(object(), tmp_path / "a")

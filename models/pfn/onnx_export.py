"""Trained networks as ONNX files, for programs without PyTorch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probkit.errors import CapabilityError, DataError
from probkit.extras import require
from probkit.files import write_atomic
from probkit.models.pfn.curve_task import encode_epochs, encode_metric
from probkit.models.pfn.learning_curve import LearningCurvePFN
from probkit.models.pfn.predictor import PFN

__all__ = ["export_onnx"]

_LOWEST_OPSET = 17


class _RowGraph(nn.Module):
    """x, y, query -> logits of a predictor of rows."""

    def __init__(self, net: PFN) -> None:
        super().__init__()
        self.network = net.network
        self._net = net

    def forward(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        """Return logits [data set, query, bar]."""
        return self._net.predict_sets(x, y, query).logits


class _CurveGraph(nn.Module):
    """t, y, query -> logits of a learning-curve network."""

    def __init__(self, net: LearningCurvePFN) -> None:
        super().__init__()
        self.network = net.network

    def forward(self, t: Tensor, y: Tensor, query: Tensor) -> Tensor:
        """Return logits [curve, query, bar]."""
        return self.network(encode_epochs(t), encode_metric(y), encode_epochs(query))


def export_onnx(net: PFN | LearningCurvePFN, path: str | Path, *, opset: int = 18) -> None:
    """Write a network as an ONNX file whose batch, observed and query dims are free.

    Inputs, all float32: of a :class:`PFN` x [data set, row, feature], y [data set, row] and query
    [data set, query, feature]; of a :class:`LearningCurvePFN` t [curve, step], y [curve, step] on
    the scale [0, 1] and query [curve, query] steps from 1 to 100. Output: ``logits`` [*, query,
    bar]. The borders that turn them into a law stand in the file's metadata under ``borders``, on
    the scale of y, the prior under ``prior``. At least one row must be observed.

    Args:
        net: The network.
        path: The file.
        opset: Version of the ONNX operators, at least 17.

    Raises:
        MissingExtraError: The packages of the extra ``onnx`` are absent.
        CapabilityError: ``net`` is no such network.
        DataError: ``opset`` is too low.

    Example:
        >>> from probkit.models.pfn import GPPrior, amortize
        >>> net = amortize(GPPrior(rows=12), "tiny", steps=2, bars=20, rng=0)
        >>> export_onnx(net, "gp.onnx")  # doctest: +SKIP
    """
    if opset < _LOWEST_OPSET:
        raise DataError(f"opset: expected at least {_LOWEST_OPSET}, got {opset}")
    onnx = require("onnx", extra="onnx")
    require("onnxscript", extra="onnx")
    graph: nn.Module
    if isinstance(net, PFN):
        features = net.features
        borders = net.borders * net.scaling.y_scale + net.scaling.y_shift
        graph, prior = _RowGraph(net), net.prior
        example = tuple(torch.full(s, 0.5) for s in ((2, 5, features), (2, 5), (2, 3, features)))
        names = ["x", "y", "query"]
    elif isinstance(net, LearningCurvePFN):
        from probkit.models.pfn.curve_prior import CurvePrior

        borders, prior = net.borders, CurvePrior().version
        graph = _CurveGraph(net)
        steps = torch.arange(1.0, 9.0).expand(2, 8)
        example = (steps[:, :5], torch.full((2, 5), 0.5), steps[:, 5:])
        names = ["t", "y", "query"]
    else:
        raise CapabilityError(
            f"export_onnx: expected a PFN or LearningCurvePFN, got {type(net).__name__}"
        )
    model = _traced(graph.eval(), example, names, opset)
    for key, value in (("borders", json.dumps(borders.tolist())), ("prior", prior)):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model)
    write_atomic(Path(path), model.SerializeToString())


def _traced(graph: nn.Module, example: tuple[Any, ...], names: list[str], opset: int) -> Any:
    """Trace the graph with free batch, observed and query dims."""
    batch, seen, asked = (torch.export.Dim(name, min=1) for name in ("batch", "seen", "asked"))
    counts = (seen, seen, asked)
    shapes = tuple({0: batch, 1: count} for count in counts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own insides
        program = torch.onnx.export(
            graph,
            example,
            input_names=names,
            output_names=["logits"],
            dynamic_shapes=shapes,
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    return program.model_proto

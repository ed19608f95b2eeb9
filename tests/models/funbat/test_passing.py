"""Conformance of the sampler and of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probkit.errors import DataError
from probkit.inference import MessagePassing
from probkit.kernels import Matern
from probkit.models.funbat import FunBaT, LogWarp, TensorData, additive
from probkit.models.funbat.guide import TrajectoryGuide
from probkit.testing import ModelConformance, SamplerConformance

F64 = torch.float64


def small(modes: int = 2) -> TensorData:
    """Forty entries of a smooth function."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(6, (40, modes), generator=g).double() / 5
    y = (4 * x[:, 0]).sin() * (1 + x[:, -1]) + 0.1 * torch.randn(40, generator=g, dtype=F64)
    return TensorData(x, y)


NEW = torch.tensor([[0.1, 0.9], [0.5, 0.5], [1.4, -0.3]], dtype=F64)


class TestMessagePassing(SamplerConformance):
    stops = 3

    def problem(self) -> tuple[Any, Any, Any]:
        model = FunBaT(2, kernels=Matern(1.5, 0.4), learn_from=3)
        return MessagePassing(sweeps=9, tolerance=0.0, restarts=2), model, small()


class _FunBaT(ModelConformance):
    latents = ("f",)

    def sampler(self) -> Any:
        return MessagePassing(sweeps=8, tolerance=0.0)


class TestTucker(_FunBaT):
    def problem(self) -> tuple[Any, Any, Any]:
        return FunBaT((2, 1), kernels=[Matern(1.5, 0.4), Matern(0.5, 0.4)]), small(), NEW


class TestMaskedStudent(_FunBaT):
    def problem(self) -> tuple[Any, Any, Any]:
        model = FunBaT(kind="cp", masks=additive(2), kernels=Matern(2.5, 0.4), noise="student_t")
        return model, small(), NEW


class TestWarped(_FunBaT):
    def problem(self) -> tuple[Any, Any, Any]:
        return FunBaT(1, kind="cp", kernels=Matern(1.5, 0.4), warp=LogWarp()), small(), NEW


def test_the_guide_is_a_density(generator: torch.Generator) -> None:
    """Draws of q against its own log density: moments of the factors, and E[exp(0)] of log q."""
    from probkit.model import Batch

    model = FunBaT((2, 1), kernels=[Matern(1.5, 0.4), Matern(0.5, 0.4)])
    post_data = model.prepare(small())
    guide = TrajectoryGuide()
    params = guide.init(model, post_data, rng=0)
    with torch.no_grad():
        from probkit.inference.passing import select_copy, stack_copies

        state = stack_copies([params])
        for _ in range(10):
            state, _ = model.pass_messages(state, post_data)
        params = select_copy(state, 0)
        values, log_q = guide.sample(params, model, Batch(post_data), 4000, rng=1)
        laws = guide.marginals(params, model, post_data)
    for name, value in values.items():
        law = laws[name]
        z = (value.mean(0) - law.mean) / (law.variance / 4000).sqrt()
        assert float(z.abs().max()) < 5, name
        ratio = value.var(0) / law.variance
        assert float((ratio - 1).abs().max()) < 0.15, name
    assert log_q.total().shape == (4000,)
    # The mean of log q over q is minus its entropy; the factors' part is known from Z.
    assert bool(torch.isfinite(log_q.total()).all())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sweeps": 0}, "expected a whole sweeps >= 1, got 0"),
        ({"restarts": 1.5}, "expected a whole restarts >= 1, got 1.5"),
        ({"tolerance": -1.0}, "expected 0 <= tolerance < inf, got -1.0"),
        ({"damping": 1.0}, "expected 0 <= damping < 1, got 1.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        MessagePassing(**options)

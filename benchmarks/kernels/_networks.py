"""What the benchmarks of network kernels share; imported in every contender."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

D, DEPTH = 8, 3
WEIGHT_VARIANCE, BIAS_VARIANCE = 2.25, 0.09

# Operations of one entry: the inner product, and about 100 for each ReLU layer in float64 (arc
# cosine and square root are sums of products on a GPU).
FLOPS = 2 * D + 100 * DEPTH


def inputs(n: int, device: str) -> Any:
    """Inputs [n, 8] in float64."""
    import numpy as np
    import torch

    return torch.as_tensor(np.random.default_rng(0).standard_normal((n, D))).to(device)


def variances(like: Any) -> tuple[Any, Any]:
    """Weight and bias variances of all steps."""
    one = like.new_ones(DEPTH + 1)
    return WEIGHT_VARIANCE * one, BIAS_VARIANCE * one


def eager(x1: Any, x2: Any) -> Any:
    """The arc-cosine recursion, each step a whole matrix."""
    a, b = WEIGHT_VARIANCE, BIAS_VARIANCE
    k1 = a * x1.square().sum(-1) / D + b
    k2 = a * x2.square().sum(-1) / D + b
    K = a * x1 @ x2.T / D + b
    for _ in range(DEPTH):
        root = k1[:, None].sqrt() * k2[None].sqrt()
        c = (K / root).clamp(-1.0, 1.0)
        theta = c.arccos()
        K = a * root * (theta.sin() + (math.pi - theta) * c) / (2 * math.pi) + b
        k1, k2 = a * k1 / 2 + b, a * k2 / 2 + b
    return K


def achieved(run: Callable[[], Any], entries: float, written: float) -> Mapping[str, float]:
    """Operations and bytes a second of one run on a GPU, beside what the card could do."""
    import torch

    if not torch.cuda.is_available():
        return {}
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    return {
        "TFLOP/s, at 316 an entry": entries * FLOPS / seconds / 1e12,
        "GB/s of results": written / seconds / 1e9,
        "peak MiB": torch.cuda.max_memory_allocated() / 2**20,
    }

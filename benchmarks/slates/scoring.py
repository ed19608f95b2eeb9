"""The log probability of choices among slates, with its gradient: fused beside written out."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.spec import (
    Agreement,
    Benchmark,
    Comparison,
    Contender,
    Fingerprint,
    Goal,
    Task,
    Workload,
)


def _inputs(workload: Workload, device: str) -> tuple[Any, ...]:
    """States, items, slots, offsets, logits of no click and choices."""
    import torch

    g = torch.Generator().manual_seed(0)
    choices, slots, items, dim = (int(workload[k]) for k in ("choices", "slots", "items", "dim"))
    state = torch.randn(choices, dim, generator=g)
    table = torch.randn(items, dim, generator=g)
    rows = torch.randint(items, (choices, slots), generator=g)
    offset, no_click = torch.zeros(choices, slots), torch.zeros(choices)
    chosen = torch.randint(slots + 1, (choices,), generator=g)
    return tuple(t.to(device) for t in (state, table, rows, offset, no_click, chosen))


def _numbers(found: Any) -> Fingerprint:
    value, to_state, to_items = found
    return {"sums": [float(value.sum()), float(to_state.abs().sum()), float(to_items.abs().sum())]}


def _with_gradient(function: Any, state: Any, items: Any) -> Any:
    import torch

    state, items = state.clone().requires_grad_(), items.clone().requires_grad_()
    value = function(state, items)
    return value.detach(), *torch.autograd.grad(value.sum(), (state, items))


def _fused(workload: Workload, device: str) -> Task:
    from probkit.models.slates.scoring import choice_log_prob

    state, items, rows, offset, no_click, chosen = _inputs(workload, device)

    def value(state: Any, items: Any) -> Any:
        return choice_log_prob("l2", state, items, rows, offset, no_click, chosen)

    return Task(lambda: _with_gradient(value, state, items), _numbers)


def _written_out(workload: Workload, device: str) -> Task:
    import torch

    state, items, rows, offset, no_click, chosen = _inputs(workload, device)

    def value(state: Any, items: Any) -> Any:
        distance = (items[rows] - state[:, None]).square().sum(-1).clamp_min(1e-10).sqrt()
        logits = torch.cat([no_click[:, None], offset - distance], 1)
        return torch.log_softmax(logits, 1).gather(1, chosen[:, None])[:, 0]

    return Task(lambda: _with_gradient(value, state, items), _numbers)


BENCHMARK = Benchmark(
    title="Choices among slates, with gradient",
    question="How long do the log probabilities of many choices take, and how much memory?",
    workloads=({"choices": 20_000, "slots": 25, "items": 100_000, "dim": 25},),
    gpu_workloads=({"choices": 600_000, "slots": 25, "items": 1_000_000, "dim": 25},),
    contenders=(
        Contender("fused", _fused, ("probkit", "torch"), devices=("cpu", "cuda")),
        Contender("written out", _written_out, ("torch",), devices=("cpu", "cuda")),
    ),
    comparisons=(
        Comparison(
            "fused",
            "written out",
            Agreement(("sums",), rtol=1e-4),
            goal=Goal("no slower than autograd", 1.0),
        ),
    ),
    repeats=5,
)

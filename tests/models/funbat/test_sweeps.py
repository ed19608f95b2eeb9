"""Message passing: the bound, exact special cases, damping, masks, noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from probkit.kernels import Matern
from probkit.models.funbat import (
    FunBaT,
    GaussianNoise,
    StudentTNoise,
    TensorData,
    additive,
    full_terms,
)
from probkit.models.funbat.sweeps import HOLD
from probkit.rng import stream
from probkit.tree import Tree

F64 = torch.float64


@dataclass(frozen=True)
class KnownNoise(GaussianNoise):
    """Gaussian noise of a precision that is not learned."""

    precision: float = 100.0

    def start(self, y: Tensor, copies: int) -> Tree:
        """The precision itself."""
        return {"shape": y.new_full((copies,), self.precision), "rate": y.new_ones(copies)}

    def absorb(
        self, state: Tree, y: Tensor, mean: Tensor, second: Tensor, *, hold: bool
    ) -> tuple[Tree, Tensor]:
        """Nothing to learn; the bound is the expected log likelihood."""
        residual = ((y - mean).square() + second - mean.square()).sum(-1)
        constant = len(y) * math.log(self.precision / (2 * math.pi)) / 2
        return state, constant - self.precision * residual / 2


def surface(n: int, seed: int, modes: int = 3) -> TensorData:
    """A smooth function of rank 2, with noise, at gridded and repeated points."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(9, (n, modes), generator=g).double() / 8
    f = (4 * x[:, 0]).sin() * (3 * x[:, 1]).cos() + x[:, 0] * (1 - x[:, -1])
    return TensorData(x, f + 0.1 * torch.randn(n, generator=g, dtype=F64))


def bounds(
    model: FunBaT, data: TensorData, sweeps: int, damping: float = 0.0, seed: int = 0
) -> Any:
    """State and bounds [sweep, copy] of two fits side by side."""
    data = model.prepare(data)
    rngs = [stream(0, k) for k in range(2)]
    with torch.no_grad():
        state = model.start_messages(data, rngs=rngs)
        trace = []
        for _ in range(sweeps):
            state, bound = model.pass_messages(state, data, damping=damping)
            trace.append(bound)
    return state, torch.stack(trace)


def falls(trace: Tensor) -> Tensor:
    """Largest relative fall of each copy, after the warm-up."""
    free = trace[HOLD + 1 :]
    return (-free.diff(dim=0) / free[:-1].abs().clamp_min(1)).amax(0)


MODELS: dict[str, dict[str, Any]] = {
    "cp": {"ranks": 2, "kind": "cp"},
    "tucker": {"ranks": (2, 3, 2)},
    "masked": {"kind": "cp", "masks": additive(3)},
    "tucker with constants": {"masks": [[False, True, True], [True, False], [True, True, False]]},
    "student": {"ranks": 2, "kind": "cp", "noise": "student_t"},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("learn", [False, True])
def test_the_bound_never_falls(name: str, learn: bool) -> None:
    model = FunBaT(
        **MODELS[name],
        kernels=[Matern(0.5, 0.4), Matern(1.5, 0.3), Matern(2.5, 0.3)],
        learn_hyperparameters=learn,
        learn_from=8,
    )
    _, trace = bounds(model, surface(150, 0), 30)
    assert bool((falls(trace) <= 1e-8).all()), falls(trace)
    assert bool((trace[-1] > trace[HOLD + 1]).all())


def test_a_wrong_second_moment_makes_the_bound_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant: messages from means alone, as if the other modes were known."""
    from probkit.models.funbat import sweeps
    from probkit.models.funbat.contraction import table

    original = sweeps.mode_messages

    def careless(tables: Any, *args: Any) -> Any:
        ranks = args[3]
        means = [t[..., :r].transpose(0, 1) for t, r in zip(tables, ranks, strict=True)]
        pairs = [t.shape[-1] - r for t, r in zip(tables, ranks, strict=True)]
        bare = [table(m, m.new_zeros(*m.shape[:2], p)) for m, p in zip(means, pairs, strict=True)]
        return original(bare, *args)

    model = FunBaT(2, kind="cp", kernels=Matern(1.5, 0.3), learn_hyperparameters=False)
    data = model.prepare(surface(60, 0))
    state, trace = bounds(model, data, 40)
    monkeypatch.setattr(sweeps, "mode_messages", careless)
    with torch.no_grad():
        _, after = model.pass_messages(state, data)
    assert bool((after < trace[-1] - 0.1).all()), (after, trace[-1])


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
def test_one_mode_of_rank_one_is_gaussian_process_regression(
    nu: float, generator: torch.Generator
) -> None:
    """Mean, variance and evidence, exactly: with one factor nothing is approximated."""
    x = torch.rand(40, 1, generator=generator, dtype=F64)
    x[5] = x[7]
    y = (5 * x[:, 0]).sin() + 0.1 * torch.randn(40, generator=generator, dtype=F64)
    kernel = Matern(nu, 0.3, 1.3)
    model = FunBaT(
        1,
        kind="cp",
        kernels=kernel,
        noise=KnownNoise(),
        learn_hyperparameters=False,
        standardise=False,
        scale_index=False,
    )
    data = TensorData(x, y)
    state, trace = bounds(model, data, 2)
    K = kernel(x).to_dense().detach()
    C = K + torch.eye(40, dtype=F64) / 100
    evidence = torch.distributions.MultivariateNormal(torch.zeros(40, dtype=F64), C).log_prob(y)
    torch.testing.assert_close(trace[-1], evidence.expand(2), rtol=1e-8, atol=0)
    new = torch.tensor([[-0.4], [0.111], [0.5], [3.0]], dtype=F64)
    cross = kernel(new, x).to_dense().detach()
    mean = cross @ torch.linalg.solve(C, y)
    variance = 1.3 - (cross @ torch.linalg.solve(C, cross.T)).diagonal()
    from probkit.models.funbat.prediction import latent_moments

    found_mean, found_variance = latent_moments(model.layout(data, state), state, new)
    torch.testing.assert_close(found_mean[0], mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found_variance[0], variance, rtol=0, atol=1e-8)


def test_a_constant_component_of_a_tucker_core_is_regression_on_it() -> None:
    """One mode with a constant component only next to one that varies: f = w_0 + w_1 u."""
    model = FunBaT(masks=[[False, True]], kernels=Matern(1.5, 0.3), standardise="scale")
    g = torch.Generator().manual_seed(1)
    x = torch.rand(200, 1, generator=g, dtype=F64)
    y = 3 + 0.2 * (6 * x[:, 0]).sin() + 0.02 * torch.randn(200, generator=g, dtype=F64)
    state, _ = bounds(model, TensorData(x, y), 40)
    fit = state["frame"]["scale"] * state["core"]["mean"][:, 0]
    assert bool(((fit - 3).abs() < 0.3).all())


def test_damping_reaches_the_same_point() -> None:
    model = FunBaT(2, kind="cp", kernels=Matern(1.5, 0.4), learn_hyperparameters=False)
    data = surface(150, 1)
    _, free = bounds(model, data, 80)
    _, damped = bounds(model, data, 160, damping=0.5)
    assert float(damped[3, 0]) != float(free[3, 0])
    torch.testing.assert_close(damped[-1], free[-1], rtol=1e-3, atol=0.1)


def test_a_full_mask_is_no_mask() -> None:
    data = surface(100, 2)
    plain = FunBaT(2, kind="cp", kernels=Matern(1.5, 0.4))
    masked = FunBaT(kind="cp", masks=full_terms(3, 2), kernels=Matern(1.5, 0.4))
    torch.testing.assert_close(bounds(plain, data, 5)[1], bounds(masked, data, 5)[1])


def test_copies_do_not_see_each_other() -> None:
    model = FunBaT((2, 1, 2), kernels=Matern(1.5, 0.4), learn_from=3)
    data = model.prepare(surface(80, 3))
    rngs = lambda keys: [stream(0, k) for k in keys]  # noqa: E731
    with torch.no_grad():
        both = model.start_messages(data, rngs=rngs([0, 1]))
        alone = model.start_messages(data, rngs=rngs([1]))
        for _ in range(8):
            both, bound = model.pass_messages(both, data)
            alone, only = model.pass_messages(alone, data)
    torch.testing.assert_close(bound[1:], only, rtol=1e-9, atol=0)


def test_superfluous_components_die_out() -> None:
    """Learned variances switch off what rank 2 does not need."""
    model = FunBaT(5, kind="cp", kernels=Matern(1.5, 0.4), standardise="scale")
    g = torch.Generator().manual_seed(5)
    x = torch.randint(12, (500, 3), generator=g).double() / 11
    f = (5 * x[:, 0]).sin() * (3 * x[:, 1]).cos() * (1 + x[:, 2])
    f = f + (x[:, 0] - 0.5) * (6 * x[:, 1]).sin() * (4 * x[:, 2]).cos()
    data = TensorData(x, f + 0.05 * torch.randn(500, generator=g, dtype=F64))
    state, trace = bounds(model, data, 120)
    best = int(trace[-1].argmax())
    index = [grid.index for grid in data.grids]
    parts = [m["mean"][best][i] for m, i in zip(state["modes"], index, strict=True)]
    power = (parts[0] * parts[1] * parts[2]).square().mean(0)
    share = power / power.sum()
    assert int((share > 1e-3).sum()) == 2, share.tolist()


def heavy(seed: int) -> tuple[TensorData, Tensor]:
    """A surface with five per cent of gross outliers."""
    data = surface(300, seed)
    clean = data.y.clone()
    g = torch.Generator().manual_seed(seed + 1)
    bad = torch.rand(300, generator=g) < 0.05
    y = torch.where(bad, data.y + 5 * torch.randn(300, generator=g, dtype=F64), data.y)
    return TensorData(data.index, y), clean


def test_heavy_tails_shrug_off_outliers() -> None:
    data, clean = heavy(7)
    errors = {}
    for noise in ("gaussian", "student_t"):
        model = FunBaT(2, kind="cp", kernels=Matern(1.5, 0.4), noise=noise, standardise="scale")
        state, _ = bounds(model, data, 40)
        from probkit.models.funbat.prediction import latent_moments

        mean, _ = latent_moments(model.layout(data, state), state, data.index)
        errors[noise] = (state["frame"]["scale"] * mean - clean).square().mean().sqrt().min()
    assert errors["student_t"] < 0.75 * errors["gaussian"], errors


def test_degrees_of_freedom_are_learned() -> None:
    noise = StudentTNoise(df=4.0)
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(4000, generator=g, dtype=F64)
    state = noise.start(normal, 1)
    zero = torch.zeros(1, 4000, dtype=F64)
    last = -math.inf
    for step in range(60):
        state, bound = noise.absorb(state, normal, zero, zero, hold=step < 2)
        if step >= 3:
            assert float(bound) >= last - 1e-8 * abs(last)
            last = float(bound)
    assert float(state["df"]) > 20
    assert float(state["shape"] / state["rate"]) == pytest.approx(1.0, rel=0.1)


def test_the_core_needs_no_message_per_entry() -> None:
    """Rank 7 at 13,572 entries: the sums for the core stay within a few chunks of memory."""
    from probkit.models.funbat import contraction
    from probkit.models.funbat.pairs import pairs_of

    widest = contraction._width((7, 7, 7), 2, True)
    assert widest == pairs_of(7).count ** 2
    chunk = next(contraction._chunks(13_572, widest))
    # means, pairs and their products: three temporaries of a chunk in float64
    assert 3 * 8 * (chunk.stop - chunk.start) * widest < 64 * 2**20

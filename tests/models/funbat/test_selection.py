"""Structure chosen by withheld entries: the right one wins, and the data decide nothing else."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from probkit.driver import infer
from probkit.errors import DataError
from probkit.inference.passing import MessagePassing
from probkit.kernels.state_space import Matern
from probkit.models.funbat import FunBaT, TensorData, additive, main_effects
from probkit.models.funbat.selection import choose_structure, score_predictions
from probkit.predictive import Analytic

F64 = torch.float64
KERNEL = Matern(1.5, lengthscale=0.3)
QUICK = MessagePassing(sweeps=15)


def grid_data(interaction: float, generator: torch.Generator) -> TensorData:
    """Entries on a 25 x 25 grid of a sum of two functions, plus some of their product."""
    index = torch.randint(25, (400, 2), generator=generator).double() / 24
    a, b = (6 * index[:, 0]).sin(), (4 * index[:, 1]).cos()
    noise = 0.1 * torch.randn(400, generator=generator, dtype=F64)
    return TensorData(index, a + b + interaction * a * b + noise)


def candidates() -> dict[str, FunBaT]:
    return {
        "sum": FunBaT(
            kind="cp", masks=main_effects(2), kernels=KERNEL, learn_hyperparameters=False
        ),
        "interaction": FunBaT(
            kind="cp", masks=additive(2), kernels=KERNEL, learn_hyperparameters=False
        ),
        "one product": FunBaT(1, kind="cp", kernels=KERNEL, learn_hyperparameters=False),
    }


def test_the_structure_that_made_the_data_wins(generator: torch.Generator) -> None:
    simple = choose_structure(
        grid_data(0.0, generator), candidates(), rng=0, sampler=QUICK, seeds=1, folds=2
    )
    assert list(simple.scores.index)[-1] == "one product"
    rich = choose_structure(grid_data(1.5, generator), candidates(), rng=0, sampler=QUICK, seeds=1)
    assert rich.name == "interaction"
    assert rich.model.ranks == 3
    # twice the noise at most, where the sum alone leaves the product unexplained
    assert rich.scores.loc["interaction", "rmse"] < 0.2 < rich.scores.loc["sum", "rmse"]
    assert rich.posterior is not None
    assert rich.posterior.context.data.y.shape == (400,)


def test_same_seed_same_choice(generator: torch.Generator) -> None:
    data = grid_data(1.0, generator)
    few = {name: candidates()[name] for name in ("sum", "one product")}
    first, second = (
        choose_structure(data, few, rng=3, sampler=MessagePassing(sweeps=6), seeds=2, refit=False)
        for _ in range(2)
    )
    assert first.scores.equals(second.scores)
    assert first.posterior is None


def test_blocks_are_withheld_along_a_mode(generator: torch.Generator) -> None:
    """A process whose length is a tenth of a block cannot be told inside of it."""
    index = torch.arange(600).double().unsqueeze(1).expand(-1, 2).clone() / 599
    index[:, 1] = torch.randint(3, (600,), generator=generator).double()
    y = (150 * index[:, 0]).sin() + index[:, 1]
    one = {"sum": FunBaT(kind="cp", masks=main_effects(2), kernels=Matern(1.5, 0.02))}
    options: dict[str, Any] = {"rng": 0, "sampler": QUICK, "seeds": 1, "refit": False}
    data = TensorData(index, y, ("time", "place"))
    scattered = choose_structure(data, one, **options).scores
    blocks = choose_structure(data, one, withhold="time", block=0.1, **options).scores
    assert scattered.loc["sum", "rmse"] < 0.2 < 0.5 < blocks.loc["sum", "rmse"]


def test_scores_are_those_of_the_medians() -> None:
    law = torch.distributions.Normal(torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64))
    y = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=F64)
    scores = score_predictions(Analytic(law), y)
    assert scores["rmse"] == pytest.approx(math.sqrt(6 / 4))
    assert scores["mae"] == pytest.approx(1.0)
    assert scores["nlpd"] == pytest.approx(0.5 * math.log(2 * math.pi) + 6 / 8)
    assert scores["coverage"] == 0.75


@pytest.mark.parametrize("smooth", [True, False])
def test_the_bound_finds_the_smoothness(smooth: bool, generator: torch.Generator) -> None:
    index = torch.randint(50, (500, 2), generator=generator)
    grid = torch.arange(50, dtype=F64) / 49
    if smooth:
        factors = torch.stack([(5 * grid).sin(), (4 * grid).cos()])
    else:  # random walks, whose steps are rough at any scale
        factors = 1 + 0.3 * torch.randn(2, 50, generator=generator, dtype=F64).cumsum(1)
    y = factors[0, index[:, 0]] * factors[1, index[:, 1]]
    y = y + 0.05 * torch.randn(500, generator=generator, dtype=F64)
    models = {
        f"nu {nu}": FunBaT(1, kind="cp", kernels=Matern(nu, 0.3), standardise="scale")
        for nu in (0.5, 2.5)
    }
    data = (grid[index], y)
    choice = choose_structure(data, models, rng=0, seeds=1, sampler=QUICK, criterion="bound")
    assert choice.name == ("nu 2.5" if smooth else "nu 0.5")
    # a factor of e^5 of evidence, at least
    assert float(choice.scores["bound"].diff().iloc[1]) < -5
    assert choice.posterior is not None and choice.scores.index[0] == choice.name


def test_superfluous_components_are_switched_off(generator: torch.Generator) -> None:
    x = torch.rand(400, 2, generator=generator, dtype=F64)
    y = (5 * x[:, 0]).sin() * (4 * x[:, 1]).cos()
    y = y + 0.05 * torch.randn(400, generator=generator, dtype=F64)
    model = FunBaT(3, kind="cp", kernels=Matern(1.5, 0.3), standardise="scale")
    post = infer(model, TensorData(x, y), MessagePassing(sweeps=60, tolerance=0.0), rng=0)
    products = torch.ones(3, dtype=F64)
    for mode in model.hyperparameters(post):
        products = products * mode["variance"].reshape(3)
    largest = products.sort(descending=True).values
    # the variance of a component is the product of its factors'; noise alone leaves 1e-3 of it
    assert float(largest[1] / largest[0]) < 0.01


def test_bad_input(generator: torch.Generator) -> None:
    data = grid_data(0.0, generator)
    one = {"sum": candidates()["sum"]}

    def fails(text: str, given: Any = one, x: Any = data, **options: Any) -> None:
        with pytest.raises(DataError, match=text):
            choose_structure(x, given, rng=0, sampler=QUICK, **options)

    fails("at least one", {})
    fails("candidate 'a' is a int", {"a": 3})
    fails("expected criterion 'nlpd', 'rmse', 'mae' or 'bound', got 'aic'", criterion="aic")
    fails("expected a whole folds >= 1", folds=0)
    fails("expected a whole seeds >= 1", seeds=0)
    fails(r"expected holdout in \(0, 1\), got 1.0", holdout=1.0)
    fails("one of mode_1, mode_2, got 'time'", withhold="time")
    fails(r"expected block in \(0, 1\)", withhold=0, block=2.0)
    flat = torch.cat((data.index[:, :1] * 0, data.index[:, 1:]), 1)
    fails("one block of length", x=TensorData(flat, data.y), withhold=0)


def test_withheld_entries_do_not_reach_the_fit(generator: torch.Generator) -> None:
    """Whatever stands in y where it is withheld, the predictions there stay the same."""
    data = grid_data(0.5, generator)
    seen: list[Tensor] = []

    class Spy(FunBaT):
        def predict(self, post: Any, x: Any, **options: Any) -> Any:
            seen.append(post.context.data.y)
            return super().predict(post, x, **options)

    spy = Spy(1, kind="cp", kernels=KERNEL)
    choose_structure(data, {"one": spy}, rng=0, sampler=QUICK, seeds=1, refit=False, folds=2)
    assert [len(y) for y in seen] == [320, 320]
    assert not torch.equal(seen[0], seen[1])

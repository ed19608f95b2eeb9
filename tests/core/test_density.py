"""Batched log joints, and the checks before a run."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from support.fits import LineModel, RateModel, line_data
from torch.distributions import Normal, constraints

from probkit.density import check_log_joint, initial_values, log_joint_of, site_dtype
from probkit.errors import DataError, ShapeError
from probkit.model import Model, Site

Y = torch.tensor([0.3, 1.2, 0.1], dtype=torch.float64)


def points(n, generator):
    return {"w": torch.randn(n, 2, generator=generator, dtype=torch.float64)}


class OnePoint(LineModel):
    batched: ClassVar[bool] = False


def test_one_point_models_are_mapped(generator):
    values = points(5, generator)
    expected = [LineModel().log_joint({"w": w}, line_data(), scale=2.0) for w in values["w"]]
    for model in (LineModel(), OnePoint()):
        found = log_joint_of(model, values, line_data(), scale=2.0)
        torch.testing.assert_close(found, torch.stack(expected))


class Validating(Model):
    """Branches on data through the argument validation of a distribution."""

    def sites(self, data):
        return {"m": Site((), constraints.real)}

    def log_joint(self, values, data, *, scale=1.0):
        return Normal(values["m"], 1.0, validate_args=None).log_prob(data).sum()


def test_validation_is_off_inside_the_map():
    values = {"m": torch.zeros(3, dtype=torch.float64)}
    assert log_joint_of(Validating(), values, Y).shape == (3,)


class Given(Model):
    """A log joint that returns what it is told."""

    batched: ClassVar[bool] = False

    def __init__(self, function, batched=False):
        self.function = function
        self.batched = batched

    def sites(self, data):
        return {"m": Site((), constraints.real)}

    def log_joint(self, values, data, *, scale=1.0):
        return self.function(values["m"])


VALUES = {"m": torch.tensor([0.5, 1.0], dtype=torch.float64)}


def test_a_log_joint_must_be_a_scalar():
    with pytest.raises(
        ShapeError, match=r"log_joint of Given: expected a scalar .* got shape \(1,\)"
    ):
        check_log_joint(Given(lambda m: m[None]), VALUES, Y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_log_joint_must_be_a_number(value):
    with pytest.raises(DataError, match=f"is {value} at the starting point.*sites m"):
        check_log_joint(Given(lambda m: m * 0 + value), VALUES, Y)


def test_minus_infinity_is_a_density():
    check_log_joint(Given(lambda m: m * 0 - float("inf")), VALUES, Y)


def test_a_wrong_declaration_of_batches_is_caught():
    check_log_joint(Given(lambda m: -m.square(), batched=True), VALUES, Y)
    with pytest.raises(ShapeError, match=r"expected log_joint \[2\] for two points, got \(\)"):
        check_log_joint(Given(lambda m: -m.square().sum(), batched=True), VALUES, Y)
    with pytest.raises(ShapeError, match=r"depends on its neighbours"):
        check_log_joint(Given(lambda m: -m.square() + m.sum(), batched=True), VALUES, Y)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (torch.ones(1), torch.float32),
        ((torch.ones(1), torch.ones(1).double()), torch.float64),
        ((torch.ones(1).half(), torch.ones(1)), torch.float32),
        (torch.ones(1, dtype=torch.complex64), torch.float32),
        (torch.ones(1, dtype=torch.complex128), torch.float64),
        (torch.ones(1, dtype=torch.int64), torch.float64),
        ("text", torch.float64),
    ],
)
def test_sites_have_the_precision_of_the_data(data, expected):
    assert site_dtype(data) == expected


def test_initial_values_are_inside_and_differ(generator):
    model = RateModel()
    start = initial_values(model, Y, model.sites(Y), 50, rng=generator)["rate"]
    assert start.shape == (50,) and start.dtype == torch.float64
    assert bool((start.log().abs() <= 2).all()) and len(start.unique()) == 50
    single = initial_values(model, Y.float(), model.sites(Y), 2, rng=generator)["rate"]
    assert single.dtype == torch.float32


def test_a_model_may_choose_its_own_start(generator):
    class Own(RateModel):
        def initial_values(self, data, n, *, rng):
            return {"rate": torch.full((n,), 7.0)}

    assert initial_values(Own(), Y, {}, 2, rng=generator)["rate"].tolist() == [7.0, 7.0]

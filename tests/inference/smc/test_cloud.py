"""The pieces: spawn, extend, reweight, resample, move, on particles of any kind."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.inference.smc import (
    Cloud,
    ExtinctionError,
    move,
    resample,
    reweight,
    spawn,
)
from probkit.inference.smc.cloud import uniform
from probkit.inference.smc.particles import count, join, put_last, stack, take

POPULATIONS = [
    torch.arange(8.0).reshape(4, 2),
    {"x": torch.arange(4.0), "words": ["a", "b", "c", "d"]},
    (torch.arange(4), {"y": torch.ones(4, 1)}),
    ["a", ("b", 1), None, {"tree": [1, 2]}],
]


@pytest.mark.parametrize("particles", POPULATIONS)
def test_take_works_on_every_kind_of_population(particles):
    index = torch.tensor([3, 3, 0])
    taken = take(particles, index)
    assert count(taken) == 3
    assert str(take(taken, torch.tensor([0]))) == str(take(particles, torch.tensor([3])))
    assert str(take(join([taken, particles]), torch.tensor([3]))) == str(
        take(particles, torch.tensor([0]))
    )


def test_put_last_and_stack():
    x = torch.arange(3.0)
    assert put_last(x, torch.tensor([9.0])).tolist() == [0.0, 1.0, 9.0]
    assert put_last(["a", "b"], ["z"]) == ["a", "z"]
    assert stack([{"x": x}, {"x": x + 1}])["x"].shape == (3, 2)


def test_unequal_or_foreign_populations():
    with pytest.raises(ShapeError, match=r"common leading dim \[particle\]"):
        count({"x": torch.zeros(3), "y": torch.zeros(2)})
    with pytest.raises(ShapeError, match="list of objects, got str"):
        count("abc")


def test_reweight_normalises_and_books_the_evidence():
    cloud = uniform(torch.arange(4), (4,), "cpu")
    first = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    second = torch.tensor([2.0, 0.0, 1.0, 3.0], dtype=torch.float64)
    cloud = reweight(reweight(cloud, first.log()), second.log())
    product = first * second
    assert torch.allclose(cloud.weights, product / product.sum())
    assert float(cloud.log_evidence) == pytest.approx(math.log(product.mean()))
    assert float(cloud.ess) == pytest.approx(float(product.sum() ** 2 / (product**2).sum()))


def test_reweight_survives_huge_and_tiny_weights():
    cloud = uniform(torch.arange(3), (3,), "cpu")
    cloud = reweight(cloud, torch.tensor([-2000.0, -2000.0, -math.inf]).double())
    assert cloud.weights.tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-15)
    assert float(cloud.log_evidence) == pytest.approx(-2000 + math.log(2 / 3))


def test_extinction_names_the_step():
    cloud = uniform(torch.arange(2), (2,), "cpu")
    with pytest.raises(ExtinctionError, match="weight zero after step 5") as caught:
        reweight(cloud, torch.full((2,), -math.inf).double(), step=5)
    assert caught.value.step == 5
    assert isinstance(caught.value, DataError)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_weights_are_errors(bad):
    cloud = uniform(torch.arange(2), (2,), "cpu")
    with pytest.raises(DataError, match="particle 1 at step 3 is NaN or"):
        reweight(cloud, torch.tensor([0.0, bad]), step=3)
    with pytest.raises(ShapeError, match=r"expected \[2\]"):
        reweight(cloud, torch.zeros(3))


def test_resampling_follows_the_threshold():
    cloud = reweight(uniform(["a", "b"], (2,), "cpu"), torch.tensor([0.0, -1.0]).double())
    g = torch.Generator().manual_seed(0)
    same, ancestors = resample(cloud, "systematic", rng=g, threshold=0.0)
    assert same is cloud and ancestors is None
    drawn, ancestors = resample(cloud, "systematic", rng=g, threshold=1.0)
    assert drawn.particles == ["ab"[i] for i in ancestors.tolist()]
    assert drawn.weights.tolist() == pytest.approx([0.5, 0.5])
    assert drawn.log_evidence == cloud.log_evidence


def test_groups_resample_on_their_own():
    particles = torch.arange(6.0).reshape(2, 3, 1)
    cloud = uniform(particles, (2, 3), "cpu")
    cloud = reweight(cloud, torch.tensor([[0.0, 0.0, 0.0], [0.0, -9.0, -9.0]]).double())
    streams = [torch.Generator().manual_seed(k) for k in range(2)]
    drawn, ancestors = resample(cloud, "systematic", rng=streams, threshold=0.9)
    assert ancestors[0].tolist() == [0, 1, 2]
    assert torch.equal(drawn.particles[0], particles[0])
    assert drawn.particles[1].flatten().tolist() == [3.0, 3.0, 3.0]


def test_move_keeps_the_weights():
    cloud = reweight(uniform(torch.arange(2), (2,), "cpu"), torch.tensor([0.0, -1.0]).double())
    moved = move(cloud, lambda x: x + 1)
    assert isinstance(moved, Cloud)
    assert moved.particles.tolist() == [1, 2]
    assert torch.equal(moved.log_weights, cloud.log_weights)


def test_spawn_counts_the_particles():
    class Wrong:
        def start(self, n, data, *, rng):
            return ["x"] * (n + 1)

    with pytest.raises(ShapeError, match="expected 3 particles, got 4"):
        spawn(Wrong(), 3, None, rng=torch.Generator())

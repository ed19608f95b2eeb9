"""Checkpoints: what is saved, when, and which runs may resume them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace

import gpytorch
import numpy as np
import pytest
import torch
from support.fits import LineModel, Metropolis, line_data, same
from torch.distributions import MultivariateNormal

import probkit as pk
from probkit.checkpoint import Checkpoint
from probkit.errors import DataError
from probkit.fingerprint import digest
from probkit.inference import SVI, FullRank, MeanField


def run(folder, *, model=None, data=None, sampler=None, guide=None, rng=0, chains=1, **options):
    return pk.infer(
        model or LineModel(),
        data or line_data(),
        sampler or Metropolis(20),
        guide=guide,
        rng=rng,
        chains=chains,
        checkpoint=folder,
        **options,
    )


# ------------------------------------------------------------------------------- other runs


def test_the_own_checkpoint_is_resumed(tmp_path):
    assert same(run(tmp_path), run(tmp_path))


def shifted():
    x, y = line_data()
    return x, y + 1e-12


@pytest.mark.parametrize(
    ("what", "changes"),
    [
        ("model", {"model": LineModel(noise=0.51)}),
        ("data", {"data": shifted()}),
        ("seed", {"rng": 1}),
        ("chains", {"chains": 2}),
        ("sampler", {"sampler": Metropolis(21)}),
        ("sampler", {"sampler": SVI(steps=2)}),
    ],
)
def test_another_run_is_refused_by_what_differs(what, changes, tmp_path):
    run(tmp_path)
    with pytest.raises(DataError) as caught:
        run(tmp_path, **changes)
    text = str(caught.value)
    assert "belongs to another run" in text and f"{what}: expected " in text
    assert text.endswith("choose another folder or delete it") and "\n" not in text


def test_another_guide_is_refused(tmp_path):
    run(tmp_path, sampler=SVI(steps=2, evidence_draws=2), guide=MeanField())
    with pytest.raises(DataError, match=r"guide: expected FullRank \w+, found MeanField \w+"):
        run(tmp_path, sampler=SVI(steps=2, evidence_draws=2), guide=FullRank())


def manifest(folder):
    return folder / "block-0000" / "manifest.json"


def edit(folder, **changes):
    path = manifest(folder)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_another_version_is_refused(tmp_path):
    run(tmp_path)
    marks = json.loads(manifest(tmp_path).read_text())["fingerprint"]
    edit(tmp_path, fingerprint={**marks, "probkit": "0.0.1"})
    with pytest.raises(DataError, match=r"probkit: expected .*, found 0\.0\.1"):
        run(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    run(tmp_path)
    edit(tmp_path, format=99, state=None)
    with pytest.raises(DataError, match=r"has format 99, expected 1; resume it with the probkit"):
        run(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "null", "\x00\x01"])
def test_a_damaged_manifest_is_named(content, tmp_path):
    run(tmp_path)
    manifest(tmp_path).write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json' is damaged; delete it to start anew"):
        run(tmp_path)


def test_a_damaged_state_is_named(tmp_path):
    run(tmp_path)
    next((tmp_path / "block-0000").glob("state-*")).write_bytes(b"\x08")
    with pytest.raises(DataError, match=r"state-.*missing or damaged"):
        run(tmp_path)


# ------------------------------------------------------------------------------- what is saved


def saves(folder):
    return json.loads(manifest(folder).read_text())["draws"]


def test_steps_between_saves(tmp_path):
    run(Checkpoint(tmp_path, steps=2))  # Four steps of five draws.
    assert saves(tmp_path) == ["draws-000000.safetensors", "draws-000001.safetensors"]


def test_seconds_between_saves(tmp_path):
    run(Checkpoint(tmp_path, seconds=0))
    assert len(saves(tmp_path)) == 4
    run(Checkpoint(tmp_path / "rare", seconds=1e6))
    assert len(saves(tmp_path / "rare")) == 1


def test_a_stop_by_a_callback_is_saved(tmp_path):
    run(tmp_path, callbacks=[lambda info: info.step == 2])
    seen = []
    post = run(tmp_path, callbacks=[seen.append])
    assert seen[0].step == 3 and same(post, run(None))


@dataclass(frozen=True)
class Uneven(Metropolis):
    """Chains that end after different numbers of steps."""

    def init(self, problem, *, rngs):
        ahead = 5 * int(3 * torch.rand((), generator=rngs[0]))
        return {**super().init(problem, rngs=rngs), "drawn": ahead}

    def finish(self, problem, state, kept, *, rngs):
        last = {"values": {name: value[:, -5:] for name, value in kept["values"].items()}}
        return super().finish(problem, state, last, rngs=rngs)


def test_a_finished_block_is_written_once(tmp_path):
    """What an early block saved stays untouched while the others go on."""
    written = {}

    def watch(info):
        for path in tmp_path.glob("block-*/manifest.json"):
            if "-done" in path.read_text():
                written.setdefault(path.parent.name, set()).add(path.stat().st_mtime_ns)

    plan = Checkpoint(tmp_path, steps=1)
    arguments = {"sampler": Uneven(30), "chains": 4, "rng": 2}
    post = run(plan, callbacks=[watch], **arguments)
    assert 1 <= len(written) < 4 and all(len(times) == 1 for times in written.values())
    assert same(run(plan, **arguments), post)


@pytest.mark.parametrize("wrong", [{"seconds": -1.0}, {"steps": 0}])
def test_options_are_checked(wrong):
    with pytest.raises(DataError, match=r"seconds >= 0 and steps >= 1"):
        Checkpoint("anywhere", **wrong)


# ------------------------------------------------------------------------------- fingerprints


class Plain:
    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Cached(Plain):
    @functools.cached_property
    def twice(self):
        return 2 * self.value


def enclosing(value):
    def function(x):
        return x + value

    return function


def with_default(value):
    def function(x, y=value):
        return x + y

    return function


def module(value):
    layer = torch.nn.utils.skip_init(torch.nn.Linear, 1, 1)  # Would draw from the global stream.
    layer.exponent = value
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(1.0)
    return layer


def nested(value):
    return {"a": [Plain(1), Plain(2), Plain(value)]}


MAKERS = {
    "plain": Plain,
    "slots": Slots,
    "partial": lambda value: functools.partial(max, value),
    "closure": enclosing,
    "default": with_default,
    "method": lambda value: Plain(value).__eq__,
    "module attribute": module,
    "matern": lambda value: gpytorch.kernels.MaternKernel(nu=0.5 if value == 1 else 2.5),
    "many small objects": nested,
    "array": lambda value: np.array([1.0, value]),
    "objects in an array": lambda value: np.array([Plain(value), "text"], dtype=object),
    "law": lambda value: MultivariateNormal(torch.zeros(2), value * torch.eye(2)),
    "complex": lambda value: torch.tensor([1 + 1j * value]).conj(),
    "expanded": lambda value: torch.tensor(float(value)).expand(3),
    "sparse": lambda value: torch.eye(3).mul(value).to_sparse(),
    "half": lambda value: torch.tensor([value], dtype=torch.bfloat16),
    "set": lambda value: {f"name {value}", "other", "third"},
    "dataclass": lambda value: replace(LineModel(), noise=float(value)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_digest_depends_on_the_content_alone(name):
    make = MAKERS[name]
    assert digest(make(1)) == digest(make(1))
    assert digest(make(1)) != digest(make(2))


def test_caches_do_not_count():
    fresh, used = Cached(3), Cached(3)
    assert used.twice == 6
    assert digest(used) == digest(fresh)
    law, used_law = (MultivariateNormal(torch.zeros(2), torch.eye(2)) for _ in range(2))
    assert used_law.precision_matrix.shape == (2, 2)
    assert digest(used_law) == digest(law)


def test_circles_end():
    circle = [1]
    circle.append(circle)
    assert digest(circle) == digest(circle)
    assert digest(circle) != digest([1, [1]])

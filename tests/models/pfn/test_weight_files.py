"""Weight files: what they carry, and which files are refused."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from probkit.errors import DataError
from probkit.models.pfn import PFNNetwork, PFNSize
from probkit.models.pfn.weight_files import WeightFile, load_weights, save_weights

SIZE = {"width": 16, "layers": 1, "heads": 2, "bars": 5, "features": 1, "targets": 1}


def network(seed=0):
    return PFNNetwork(PFNSize(**SIZE), generator=torch.Generator().manual_seed(seed))


def content(**changes):
    parts = {
        "prior": "toy-1",
        "network": SIZE,
        "weights": network().state_dict(),
        "borders": torch.linspace(0, 1, 6),
        "constants": {"horizon": 100},
        "card": {"curves": 12, "license": "Apache-2.0"},
    }
    return WeightFile(**{**parts, **changes})


def test_everything_survives(tmp_path):
    path = tmp_path / "net.safetensors"
    save_weights(path, content())
    back = load_weights(path, prior="toy-1")
    assert (back.prior, back.network, back.constants) == ("toy-1", SIZE, {"horizon": 100})
    assert back.card == {"curves": 12, "license": "Apache-2.0"}
    assert torch.equal(back.borders, torch.linspace(0, 1, 6))
    target = network(seed=9)
    back.fill(target)
    for name, weight in network().state_dict().items():
        assert torch.allclose(target.state_dict()[name], weight, rtol=2**-10, atol=1e-6)


def test_weights_are_stored_in_half_precision(tmp_path):
    path = tmp_path / "net.safetensors"
    save_weights(path, content())
    stored = load_file(path)
    assert stored["weights.head.weight"].dtype == torch.float16
    assert stored["borders"].dtype == torch.float32
    save_weights(path, content(), half=False)
    for name, weight in network().state_dict().items():
        assert torch.equal(load_weights(path).weights[name], weight)


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        save_weights(tmp_path / name, content())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_another_prior_or_version_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_weights(path, content())
    with pytest.raises(DataError, match="trained on the prior 'toy-1', expected 'toy-2'"):
        load_weights(path, prior="toy-2")


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "net.pt"
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="weights in pickles are not read, for they may hold code"):
        load_weights(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="found none at .*absent"):
        load_weights(tmp_path / "absent.safetensors")


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"weights.a": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="is no probkit prior-data fitted network"):
        load_weights(path)


def header(**changes):
    told = {"kind": "probkit prior-data fitted network", "format": 1, "prior": "toy-1"}
    told |= {"network": SIZE, "constants": {}, "card": {}}
    return {"content": json.dumps({**told, **changes})}


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata=header(format=2))
    with pytest.raises(DataError, match="format 2, this probkit reads up to 1"):
        load_weights(path)


def test_damage_is_told(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"content": "{"})
    with pytest.raises(DataError, match="is damaged"):
        load_weights(path)
    told = {"kind": "probkit prior-data fitted network", "format": 1}
    save_file({"a": torch.zeros(1)}, path, metadata={"content": json.dumps(told)})
    with pytest.raises(DataError, match=r"is damaged \(no card, constants, network, prior\)"):
        load_weights(path)
    save_file({"weights.a": torch.tensor([math.nan])}, path, metadata=header())
    with pytest.raises(DataError, match="the weights 'a' are not finite"):
        load_weights(path)
    save_weights(path, content())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="no readable safetensors file"):
        load_weights(path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    save_weights(path, content())
    wide = PFNNetwork(PFNSize(**{**SIZE, "width": 32}), generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="do not fit the network it describes"):
        load_weights(path).fill(wide)

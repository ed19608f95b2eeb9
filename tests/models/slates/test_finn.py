"""The FINN.no format: mapped, unpacked, streamed; what is refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.models.slates import SlateLog
from probkit.models.slates.finn import stream_finn
from probkit.models.slates.npz import load_member, members

pytestmark = pytest.mark.usefixtures("unchanged_global_state")

USERS, STEPS, SLOTS, ITEMS = 40, 7, 5, 12


def arrays(seed=0):
    """A valid log as arrays, in the published layout."""
    rng = np.random.default_rng(seed)
    slate = np.zeros((USERS, STEPS, SLOTS), np.int32)
    click = np.zeros((USERS, STEPS), np.int32)
    slot = np.zeros((USERS, STEPS), np.int32)
    length = np.zeros((USERS, STEPS), np.int32)
    for u in range(USERS):
        for t in range(rng.integers(6, STEPS + 1)):
            count = rng.integers(2, SLOTS)
            slate[u, t, 0] = 1
            slate[u, t, 1 : count + 1] = rng.permutation(np.arange(3, ITEMS))[:count]
            length[u, t] = count + 1
            slot[u, t] = rng.integers(0, count + 1)
            click[u, t] = slate[u, t, slot[u, t]]
    return {
        "userId": np.arange(USERS, dtype=np.int32),
        "slate": slate,
        "click": click,
        "click_idx": slot,
        "slate_lengths": length,
        "interaction_type": np.where(click > 0, 1 + rng.integers(0, 2, click.shape), 0).astype(
            np.int32
        ),
    }


def write(folder, found, *, compressed=True, category=None):
    save = np.savez_compressed if compressed else np.savez
    save(folder / "data.npz", **found)
    group = np.arange(ITEMS, dtype=np.float64) % 5 if category is None else category
    np.savez(folder / "itemattr.npz", category=group)
    names = {"category": {str(k): f"g{k}" for k in range(5)}, "interaction_type": {"1": "search"}}
    (folder / "ind2val.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_all_ways_of_reading_agree(tmp_path, compressed, cached):
    found = arrays()
    folder = write(tmp_path, found, compressed=compressed)
    log = SlateLog.from_finn(folder, cache=tmp_path / "cache" if cached else None)
    for name in ("slate", "click", "click_idx", "slate_lengths", "interaction_type"):
        assert np.array_equal(getattr(log, name).numpy(), found[name]), name
    assert log.slate.dtype == torch.int32  # Not copied into a wider type.
    assert log.n_items == ITEMS
    assert log.labels["group"] == ["g0", "g1", "g2", "g3", "g4"]
    assert (log.part > 0).sum() == 2 * int(0.05 * USERS)
    assert log.take([3]).slate.dtype == torch.int64
    unpacked = (tmp_path / "cache").exists()
    assert unpacked == (compressed and cached)


def test_maps_read_nothing_and_change_nothing(tmp_path):
    found = arrays()
    folder = write(tmp_path, found, compressed=False)
    before = (folder / "data.npz").read_bytes()
    member = members(folder / "data.npz")["slate"]
    mapped = load_member(member)
    assert isinstance(mapped, np.memmap)
    assert member.offset is not None
    log = SlateLog.from_finn(folder)
    assert log.slate.untyped_storage().data_ptr() != 0
    log.slate[0, 0, 1] = 5  # Copy on write: the file keeps its value.
    assert (folder / "data.npz").read_bytes() == before


def test_the_cache_is_written_once_and_renewed_with_the_archive(tmp_path):
    cache = tmp_path / "cache"
    write(tmp_path, arrays(0))
    first = SlateLog.from_finn(tmp_path, cache=cache)
    names = sorted(path.name for path in cache.iterdir())
    stamps = [path.stat().st_mtime_ns for path in sorted(cache.iterdir())]
    SlateLog.from_finn(tmp_path, cache=cache)
    assert [path.stat().st_mtime_ns for path in sorted(cache.iterdir())] == stamps
    write(tmp_path, arrays(1))
    second = SlateLog.from_finn(tmp_path, cache=cache)
    assert not torch.equal(first.slate, second.slate)
    assert len(list(cache.iterdir())) > len(names)


def test_streamed_batches_are_the_log(tmp_path):
    write(tmp_path, arrays())
    whole = SlateLog.from_finn(tmp_path)
    batches = list(stream_finn(tmp_path, 16).factory(0, torch.Generator()))
    assert [len(batch.index) for batch in batches] == [16, 16, 8]
    for name in ("slate", "click", "click_idx", "train", "part"):
        joined = torch.cat([getattr(batch.data, name) for batch in batches])
        assert torch.equal(joined.long(), getattr(whole, name).long()), name
    assert batches[2].scale == pytest.approx(USERS / 8)
    assert all(batch.data.n_items == ITEMS for batch in batches)


def test_the_old_name_of_the_slates_is_read(tmp_path):
    found = arrays()
    found["action"] = found.pop("slate")
    log = SlateLog.from_finn(write(tmp_path, found))
    assert np.array_equal(log.slate.numpy(), found["action"])


def test_users_out_of_order_keep_their_names(tmp_path):
    found = arrays() | {"userId": np.arange(USERS, dtype=np.int32)[::-1].copy()}
    log = SlateLog.from_finn(write(tmp_path, found))
    assert log.labels["user"][:2] == [39, 38]


class Trap:
    """Raises where it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise RuntimeError('a pickle was run')",))


def test_pickles_are_refused(tmp_path):
    found = arrays()
    write(tmp_path, found)
    np.savez(tmp_path / "data.npz", **(found | {"slate": np.array([Trap()], dtype=object)}))
    with pytest.raises(DataError, match=r"\['slate'\]: expected numbers, got pickled"):
        SlateLog.from_finn(tmp_path)
    with (tmp_path / "data.npz").open("wb") as file:
        pickle.dump(Trap(), file)
    with pytest.raises(DataError, match=r"expected an .npz archive"):
        SlateLog.from_finn(tmp_path)
    torch.save({"slate": torch.zeros(2)}, tmp_path / "data.npz")
    with pytest.raises(DataError, match=r"expected arrays \(.npy\) alone"):
        SlateLog.from_finn(tmp_path)
    (tmp_path / "data.npz").unlink()
    torch.save({}, tmp_path / "data.pt")
    with pytest.raises(DataError, match=r"there is none; data.pt: pickled formats are refused"):
        SlateLog.from_finn(tmp_path)


def test_wrong_folders(tmp_path):
    with pytest.raises(DataError, match="there is no nowhere"):
        SlateLog.from_finn(tmp_path / "nowhere")
    found = arrays()
    del found["click_idx"]
    with pytest.raises(DataError, match="missing: click_idx, found: click, interaction_type"):
        SlateLog.from_finn(write(tmp_path, found))
    found = arrays() | {"click": arrays()["click"].astype(np.float32)}
    with pytest.raises(DataError, match="expected whole numbers, got dtype float32"):
        SlateLog.from_finn(write(tmp_path, found))
    found = arrays() | {"slate": arrays()["slate"][:, :3]}
    with pytest.raises(
        ShapeError, match=r"\[user, step\] = \(40, 7\) as in click, got \(40, 3, 5\)"
    ):
        SlateLog.from_finn(write(tmp_path, found))
    found = arrays() | {"userId": np.zeros(USERS, np.int32)}
    with pytest.raises(DataError, match="expected each user once"):
        SlateLog.from_finn(write(tmp_path, found))
    category = np.arange(ITEMS) % 5 + 0.0
    category[4] = np.nan
    with pytest.raises(DataError, match="whole group numbers, got nan for id 4"):
        SlateLog.from_finn(write(tmp_path, arrays(), category=category))
    found = arrays() | {"slate": np.asfortranarray(arrays()["slate"])}
    with pytest.raises(DataError, match="Fortran order"):
        SlateLog.from_finn(write(tmp_path, found))


def test_contradictions_are_found_unless_told_not_to_look(tmp_path):
    found = arrays()
    found["click"][5, 0] = 11 if found["click"][5, 0] != 11 else 10
    found["slate"][5, 0, 1:] = [3, 4, 0, 0]
    write(tmp_path, found)
    with pytest.raises(DataError, match="at user 5, step 0"):
        SlateLog.from_finn(tmp_path)
    assert len(SlateLog.from_finn(tmp_path, check=False)) == USERS
    with pytest.raises(DataError, match="at user 5, step 0"):
        list(stream_finn(tmp_path, 40).factory(0, torch.Generator()))


def test_a_streamed_log_trains_like_the_whole(tmp_path):
    """SVI takes the batches of a stream; one step moves the parameters."""
    import probkit as pk
    from probkit.inference import SVI
    from probkit.models.slates import SlateGRU

    write(tmp_path, arrays())
    model = SlateGRU(ITEMS, groups=np.arange(ITEMS) % 5, transition="linear", dim=2)
    post = pk.infer(model, stream_finn(tmp_path, 16), SVI(steps=4, particles=1), rng=0)
    assert torch.isfinite(post.source.params[0]["items"]["loc"]).all()

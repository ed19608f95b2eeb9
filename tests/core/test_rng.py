"""Seeds, streams and the locked scope."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch
from torch.distributions import Distribution, Normal

from probkit.errors import DataError
from probkit.rng import randn, require_rng, scope, seed_of, stream


def first(generator):
    return torch.rand(4, generator=generator)


def test_an_integer_is_its_own_seed():
    assert seed_of(7) == 7 and seed_of(np.int64(7)) == 7 and seed_of(2**63 - 1) == 2**63 - 1


@pytest.mark.parametrize("wrong", [-1, 2**63, 1.0, True, "0", None])
def test_other_things_are_no_seed(wrong):
    with pytest.raises(DataError, match=r"integer in \[0, 2\*\*63\) or a torch\.Generator"):
        seed_of(wrong)


def test_a_generator_gives_a_fresh_seed_each_time():
    a, b = (torch.Generator().manual_seed(1) for _ in range(2))
    seeds = [seed_of(a), seed_of(a)]
    assert seeds == [seed_of(b), seed_of(b)] and seeds[0] != seeds[1]


def test_require_rng_names_the_reader():
    with pytest.raises(DataError, match=r"^sampling draws random numbers: expected rng="):
        require_rng(None, "sampling")
    assert require_rng(3, "sampling") == 3


def test_streams_depend_on_their_key_alone():
    late = stream(0, "chain", 2)
    others = [stream(0, "chain", k) for k in range(5)]
    assert torch.equal(first(late), first(others[2]))
    draws = [tuple(first(stream(0, *key)).tolist()) for key in KEYS]
    assert len(set(draws)) == len(KEYS)


KEYS = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), ("a",), ("b",), ("a", 0), (0, "a"), ("chain", 0)]


def test_streams_of_neighbours_are_not_related():
    """Correlations of 50 streams with neighbouring keys stay within Monte Carlo error."""
    rows = torch.stack([torch.randn(2000, generator=stream(0, k)) for k in range(50)])
    correlations = rows.corrcoef() - torch.eye(50)
    assert float(correlations.abs().max()) * 2000**0.5 < 4.5  # 1225 pairs: 4.5 sd has p < 0.01.


def test_randn_gives_each_chain_its_own_numbers():
    together = randn([stream(0, k) for k in range(3)], (2, 4))
    assert together.shape == (3, 2, 4) and together.dtype == torch.float64
    assert torch.equal(together[1:2], randn([stream(0, 1)], (2, 4)))
    assert randn([stream(0, 0)]).shape == (1,)


def test_scope_continues_the_generator():
    generator = torch.Generator().manual_seed(3)
    with scope(rng=generator):
        inside = torch.rand(4)
    outside = first(generator)
    plain = torch.Generator().manual_seed(3)
    assert torch.equal(inside, first(plain)) and torch.equal(outside, first(plain))


def test_scope_by_seed_repeats_itself():
    with scope(rng=5):
        a = torch.rand(3)
    with scope(rng=5):
        b = torch.rand(3)
    assert torch.equal(a, b)


def test_scope_restores_everything_after_an_error():
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
    flag = Distribution._validate_args
    with pytest.raises(ZeroDivisionError), scope(rng=0, validate=not flag, foreign=True):
        torch.rand(1), np.random.rand(), random.random()
        assert Distribution._validate_args is not flag
        raise ZeroDivisionError
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all() and random.getstate() == before[2]
    assert Distribution._validate_args is flag


def test_foreign_streams_follow_the_seed():
    drawn = []
    for seed in (1, 1, 2):
        with scope(rng=seed, foreign=True):
            drawn.append((np.random.rand(), random.random()))
    assert drawn[0] == drawn[1] != drawn[2]


def test_scopes_nest():
    with scope(rng=1):
        a = torch.rand(2)
        with scope(rng=2, validate=False):
            torch.rand(5)
        b = torch.rand(2)
    with scope(rng=1):
        assert torch.equal(torch.rand(4), torch.cat([a, b]))


def test_scopes_of_threads_exclude_each_other():
    """Each thread draws, waits for the others to try, and draws again from its own stream."""
    results = {}

    def work(seed):
        with scope(rng=seed):
            parts = []
            for _ in range(50):
                parts.append(Normal(0.0, 1.0).sample((3,)))
                threading.Event().wait(0.0005)
            results[seed] = torch.cat(parts)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        with scope(rng=seed):
            alone = torch.cat([Normal(0.0, 1.0).sample((3,)) for _ in range(50)])
        assert torch.equal(results[seed], alone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_seed_governs_the_gpu_as_well():
    torch.cuda.init()
    before = torch.cuda.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for rng in (generator, generator, torch.Generator().manual_seed(0)):
        with scope(rng=rng):
            drawn.append(torch.rand(3, device="cuda"))
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.cuda.get_rng_state(), before)

"""Own indexes, loaders, Pyro programs: what the chains are fed with."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.fits import GroupModel, LineModel, RateModel, line_data, same

import probkit as pk
from probkit.checkpoint import Checkpoint
from probkit.errors import CapabilityError, DataError
from probkit.inference import SGHMC, SGLD
from probkit.loader import Loader
from probkit.model import Batch
from probkit.testing import batch_means, z_bound

Y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0, -0.5], dtype=torch.float64)
SHORT = {"warmup": 4, "chunk": 3}


def batches(epoch, generator):
    for index in torch.randperm(len(Y), generator=generator).split(2):
        yield Batch(Y[index].numpy(), index, scale=3.0)


def loader(factory=batches, **changes):
    return Loader(factory, **{"units": len(Y), "example": Y[:2].numpy(), **changes})


@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_chain_meets_every_unit_once_in_a_pass_in_its_own_order(size):
    met = []

    class Watched(GroupModel):
        def minibatch(self, data, index):
            met.append(index)
            return super().minibatch(data, index)

    passes = -(-len(Y) // size)
    pk.infer(Watched(), Y, SGLD(2 * passes - 1, warmup=0, batch_size=size), rng=0, chains=2)
    orders = [torch.cat(met[chain::2]) for chain in (0, 1)]
    for order in orders:
        first, second = order[: len(Y)].tolist(), order[len(Y) :].tolist()
        assert sorted(first) == sorted(second) == list(range(len(Y)))
        assert first != second, "each pass has its own order"
    assert not torch.equal(*orders)


@pytest.mark.parametrize("kind", [SGLD, SGHMC])
def test_a_loader_gives_what_own_indexes_give(kind):
    """The law of draws is the same where the loader's passes are: means to Monte Carlo error."""
    options = {"warmup": 40, "step_size": 0.2, "precondition": False}
    results = []
    for data, size in ((loader(), None), (Y, 2)):
        sampler = kind(225, batch_size=size, **options)
        post = pk.infer(GroupModel(), data, sampler, rng=0, chains=24)
        assert post.draws["z"].shape == (24, 225, len(Y))
        blocks = batch_means(torch.cat([post.draws["mu"][..., None], post.draws["z"]], -1))
        results.append((blocks.mean(0), blocks.std(0) / len(blocks) ** 0.5))
    (a, error_a), (b, error_b) = results
    assert float(((a - b).abs() / torch.hypot(error_a, error_b)).max()) < z_bound(7)


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_a_loader_resumes_to_the_same_bits(stop, tmp_path):
    sampler = SGHMC(12, **SHORT)
    whole = pk.infer(GroupModel(), loader(), sampler, rng=0, chains=2)
    options = {"rng": 0, "chains": 2, "checkpoint": Checkpoint(tmp_path, seconds=1e9)}
    try:
        pk.infer(GroupModel(), loader(), sampler, callbacks=[lambda i: i.step == stop], **options)
    except DataError as error:
        assert "before there was a draw" in str(error)
    again = pk.infer(GroupModel(), loader(), sampler, **options)
    assert same(again, whole)


def test_a_loader_without_local_sites():
    x, y = line_data()

    def rows(epoch, generator):
        for index in torch.randperm(len(y), generator=generator).split(4):
            yield Batch((x[index], y[index]), index, len(y) / 4)

    post = pk.infer(LineModel(), Loader(rows, example=(x[:4], y[:4])), SGLD(6, **SHORT), rng=0)
    assert post.draws["w"].shape == (1, 6, 2)


def test_locals_need_the_number_of_units():
    with pytest.raises(DataError, match=r"site 'z' is local to the plate 'unit'.*units="):
        pk.infer(GroupModel(), loader(units=None), SGLD(6, **SHORT), rng=0)


def test_batches_need_a_plate():
    with pytest.raises(CapabilityError) as caught:
        pk.infer(RateModel(), Y.abs(), SGHMC(batch_size=2), rng=0)
    assert str(caught.value) == (
        "SGHMC(batch_size=) needs plate_size and minibatch; RateModel lacks plate_size, minibatch. "
        "Leave it out"
    )
    with pytest.raises(DataError, match="leave out batch_size="):
        pk.infer(GroupModel(), loader(), SGLD(batch_size=2), rng=0)


# ------------------------------------------------------------------------------- Pyro programs


def plates(y=None, n=6):
    """GroupModel as a program."""
    one = torch.ones((), dtype=torch.float64)
    mu = pyro.sample("mu", dist.Normal(0 * one, one))
    with pyro.plate("unit", n) as index:
        z = pyro.sample("z", dist.Normal(mu, one))
        pyro.sample("y", dist.Normal(z, one), obs=None if y is None else y[index])


def subsampled(y=None, n=6):
    """The same, the plate subsampled by the program's own size; the batch's index takes over."""
    one = torch.ones((), dtype=torch.float64)
    mu = pyro.sample("mu", dist.Normal(0 * one, one))
    with pyro.plate("unit", n, subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(mu, one))
        pyro.sample("y", dist.Normal(z, one), obs=None if y is None else y[index])


@pytest.mark.parametrize("kind", [SGLD, SGHMC])
@pytest.mark.parametrize("size", [None, 2])
def test_a_pyro_program_walks_as_its_native_twin(kind, size):
    """Same streams, same density, same path: plates and subsampling included."""
    program = pk.FromPyro(plates, minibatch_plate="unit")
    sampler = kind(15, warmup=5, batch_size=size)
    native = pk.infer(GroupModel(), Y, sampler, rng=0, chains=2)
    found = pk.infer(program, {"y": Y}, sampler, rng=0, chains=2)
    for name in ("mu", "z"):
        torch.testing.assert_close(found.draws[name], native.draws[name], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(
        found.sample_stats["lp"], native.sample_stats["lp"], rtol=1e-8, atol=1e-10
    )


def test_a_program_that_subsamples_on_its_own_is_refused():
    program = pk.FromPyro(subsampled, minibatch_plate="unit")
    with pytest.raises(DataError, match="subsample"):
        pk.infer(program, {"y": Y}, SGLD(15, warmup=5, batch_size=2), rng=0)

"""The set transformer: what may not matter does not."""

from __future__ import annotations

import pytest
import torch

from probkit.errors import DataError
from probkit.models.pfn import PFNNetwork, PFNSize

TOLERANCE = 1e-4  # on logits, in float32


@pytest.fixture(scope="module")
def network():
    """A network with all its weights drawn, so that every layer acts."""
    generator = torch.Generator().manual_seed(0)
    net = PFNNetwork(PFNSize(32, 3, 4, 21, features=2), generator=generator)
    with torch.no_grad():
        for weight in net.parameters():
            weight.normal_(0, 0.3, generator=generator)
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 9, 2, generator=generator)
    y = torch.randn(4, 9, 1, generator=generator)
    return x, y, torch.randn(4, 5, 2, generator=generator)


def test_the_order_of_observations_has_no_effect(network, sets):
    x, y, query = sets
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    moved = network(x[:, order], y[:, order], query)
    assert (moved - network(x, y, query)).abs().max() < TOLERANCE


def test_queries_do_not_see_one_another(network, sets):
    x, y, query = sets
    alone = network(x, y, query[:, 2:3])
    assert (alone[:, 0] - network(x, y, query)[:, 2]).abs().max() < TOLERANCE


def test_a_batch_equals_a_loop(network, sets):
    together = network(*sets)
    for k in range(4):
        alone = network(*(part[k : k + 1] for part in sets))
        assert (alone[0] - together[k]).abs().max() < TOLERANCE


def test_padding_has_no_effect(network, sets):
    x, y, query = sets
    lengths = torch.tensor([0, 3, 9, 6])
    ragged = network(x, y, query, lengths)
    for k, length in enumerate(lengths.tolist()):
        alone = network(x[k : k + 1, :length], y[k : k + 1, :length], query[k : k + 1])
        assert (alone[0] - ragged[k]).abs().max() < TOLERANCE
    changed = x.clone()
    changed[1, 3:] = 99.0
    assert torch.equal(network(changed, y, query, lengths)[1], ragged[1])


def test_observations_do_matter(network, sets):
    """The mutant of the tests above: a network that ignores its data would pass them."""
    x, y, query = sets
    assert (network(x, y + 1, query) - network(x, y, query)).abs().max() > 0.1
    assert (network(x[:, :0], y[:, :0], query) - network(x, y, query)).abs().max() > 0.1


def test_layers_start_as_the_identity():
    """Untrained, predictions depend on the query alone."""
    net = PFNNetwork(PFNSize(32, 2, 4, 9), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)

    def some(rows):
        return torch.rand(1, rows, 1, generator=generator)

    query = some(3)
    with torch.no_grad():
        one = net(some(4), some(4), query)
        other = net(some(6), some(6), query)
    assert torch.equal(one, other)


def test_training_and_prediction_are_one_function(network, sets):
    """Prediction leaves out what only training works out: the last tokens of observations."""
    x, y, query = sets
    lengths = torch.tensor([2, 9, 0, 5])
    for ragged in (None, lengths):
        predicted = network(x, y, query, ragged)
        try:
            trained = network.train()(x, y, query, ragged)
        finally:
            network.eval()
        assert (predicted - trained).abs().max() < TOLERANCE


def test_seeds_decide_the_weights_and_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    nets = [
        PFNNetwork(PFNSize(16, 1, 2, 5), generator=torch.Generator().manual_seed(k))
        for k in (0, 0, 1)
    ]
    first, again, other = (torch.cat([w.flatten() for w in net.parameters()]) for net in nets)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_sizes():
    with pytest.raises(DataError, match="width: expected a multiple of heads=4, got 30"):
        PFNSize(30)
    with pytest.raises(DataError, match="layers: expected a whole number >= 1, got 0"):
        PFNSize(layers=0)

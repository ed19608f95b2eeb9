"""Discrete sites of Pyro programs: summed out exactly, under samplers, and drawn afterwards."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch.distributions import Beta, Dirichlet, Normal

from probkit import FromPyro, infer
from probkit.density import log_joint_of
from probkit.errors import CapabilityError, DataError, NumericsWarning
from probkit.guide import LogQ
from probkit.inference import HMC, MAP, NUTS, SVI, ImportanceSampling, MeanField
from probkit.inference.message_passing import hmm_log_evidence, hmm_smoother
from probkit.testing import worst_z, z_bound

pytestmark = pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")

F64 = torch.float64
PARALLEL = {"enumerate": "parallel"}
Y = torch.tensor([-1.2, 2.8, 3.1, -0.4, 0.9], dtype=F64)
TWO = torch.tensor(2.0, dtype=F64)


def mixture(y):
    share = pyro.sample("share", dist.Beta(TWO, TWO))
    centre = pyro.sample("centre", dist.Normal(torch.zeros(2, dtype=F64), 3.0).to_event(1))
    with pyro.plate("row", len(y)) as rows:
        probs = torch.stack([1 - share, share], -1)
        which = pyro.sample("which", dist.Categorical(probs), infer=PARALLEL)
        pyro.sample("obs", dist.Normal(Vindex(centre)[which], 1.0), obs=y[rows])


def mixture_terms(values, y):
    """Prior [n], and log densities of each row under each component [n, row, component]."""
    share, centre = values["share"], values["centre"]
    prior = Beta(TWO, TWO).log_prob(share) + Normal(0.0, 1.5 * TWO).log_prob(centre).sum(-1)
    log_share = torch.stack([torch.log1p(-share), share.log()], -1)
    terms = log_share[..., None, :] + Normal(centre[..., None, :], 1.0).log_prob(y[:, None])
    return prior, terms


def mixture_values(n, generator):
    return {
        "share": 0.1 + 0.8 * torch.rand(n, generator=generator, dtype=F64),
        "centre": 2.0 * torch.randn(n, 2, generator=generator, dtype=F64),
    }


def test_a_mixture_equals_the_sum_written_out(generator):
    model, data = FromPyro(mixture), {"y": Y}
    assert list(model.sites(data)) == ["share", "centre"]
    values = mixture_values(6, generator)
    prior, terms = mixture_terms(values, Y)
    exact = prior + terms.logsumexp(-1).sum(-1)
    found = log_joint_of(model, values, data)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    one = model.log_joint({k: v[2] for k, v in values.items()}, data)
    torch.testing.assert_close(one, exact[2], rtol=0, atol=1e-10)
    mapped = torch.func.vmap(torch.func.grad(lambda v: model.log_joint(v, data)))(values)
    leaves = {k: v.clone().requires_grad_() for k, v in values.items()}
    prior, terms = mixture_terms(leaves, Y)
    by_hand = torch.autograd.grad(
        (prior + terms.logsumexp(-1).sum(-1)).sum(), list(leaves.values())
    )
    for name, gradient in zip(leaves, by_hand, strict=True):
        torch.testing.assert_close(mapped[name], gradient, rtol=1e-9, atol=1e-9)


def test_components_far_away_have_no_weight_and_no_nan():
    values = {"share": torch.tensor([0.5], dtype=F64), "centre": torch.tensor([[0.0, 400.0]])}
    values["centre"] = values["centre"].double()
    model, data = FromPyro(mixture), {"y": Y}
    gradient = torch.func.vmap(torch.func.grad(lambda v: model.log_joint(v, data)))(values)
    prior, terms = mixture_terms(values, Y)
    torch.testing.assert_close(
        log_joint_of(model, values, data), prior + terms.logsumexp(-1).sum(-1)
    )
    assert all(bool(torch.isfinite(g).all()) for g in gradient.values())


def test_the_weight_of_a_batch_stands_outside_of_the_sum(generator):
    """scale log sum_z p(z) p(y | z), not log sum_z (p(z) p(y | z))^scale."""
    model, data = FromPyro(mixture, minibatch_plate="row"), {"y": Y}
    values = {k: v[0] for k, v in mixture_values(1, generator).items()}
    prior, terms = mixture_terms(values, Y)
    for rows in ([0, 3], [4]):
        batch = model.minibatch(data, torch.tensor(rows))
        found = model.log_joint(values, batch.data, scale=batch.scale)
        exact = prior + 5 / len(rows) * terms.logsumexp(-1)[rows].sum()
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


def markov(y):
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3, 3, dtype=F64)).to_event(1))
    centre = pyro.sample("centre", dist.Normal(torch.zeros(3, dtype=F64), 3.0).to_event(1))
    state = None
    for t in pyro.markov(range(len(y))):
        probs = torch.full((3,), 1 / 3, dtype=F64) if t == 0 else Vindex(transition)[..., state, :]
        state = pyro.sample(f"state_{t}", dist.Categorical(probs), infer=PARALLEL)
        pyro.sample(f"y_{t}", dist.Normal(Vindex(centre)[..., state], 1.0), obs=y[t])


def markov_values(n, generator):
    rows = torch.randn(n, 3, 3, generator=generator, dtype=F64).softmax(-1)
    return {"transition": rows, "centre": 2 * torch.randn(n, 3, generator=generator, dtype=F64)}


def markov_chain(values):
    emission = Normal(values["centre"][..., None, :], 1.0).log_prob(Y[:, None])
    return torch.full((3,), 1 / 3, dtype=F64).log(), values["transition"].log(), emission


def test_a_markov_chain_equals_message_passing_and_all_paths(generator):
    model, data = FromPyro(markov), {"y": Y}
    assert list(model.sites(data)) == ["transition", "centre"]
    values = markov_values(4, generator)
    prior = Dirichlet(torch.ones(3, dtype=F64)).log_prob(values["transition"]).sum(-1)
    prior = prior + Normal(0.0, 1.5 * TWO).log_prob(values["centre"]).sum(-1)
    found = log_joint_of(model, values, data)
    exact = prior + hmm_log_evidence(*markov_chain(values))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    start, step, emission = (
        part[..., 0, :, :] if part.ndim > 2 else part
        for part in markov_chain({k: v[:1] for k, v in values.items()})
    )
    paths = [
        start[p[0]]
        + emission[0, p[0]]
        + sum(step[a, b] for a, b in itertools.pairwise(p))
        + sum(emission[t, p[t]] for t in range(1, 5))
        for p in itertools.product(range(3), repeat=5)
    ]
    torch.testing.assert_close(
        found[0] - prior[0], torch.stack(paths).logsumexp(0), rtol=0, atol=1e-10
    )


def share_z(draws, probs):
    """Largest |z| of the shares of 0-1 draws [draw, *] against their probabilities [*]."""
    error = (probs * (1 - probs) / len(draws)).sqrt()
    return float(((draws.double().mean(0) - probs).abs() / error).max())


def test_summed_sites_are_drawn_from_their_exact_law():
    n = 200
    point = {
        "share": torch.tensor(0.4, dtype=F64),
        "centre": torch.tensor([0.0, 1.5], dtype=F64),
    }
    values = {k: v.expand(2, n // 2, *v.shape) for k, v in point.items()}
    drawn = FromPyro(mixture).sample_discrete(values, {"y": Y}, rng=0)["which"]
    assert drawn.shape == (2, n // 2, 5)
    _, terms = mixture_terms(point, Y)
    probs = terms.softmax(-1)[:, 1]
    assert share_z(drawn.flatten(0, 1), probs) < z_bound(5)
    assert share_z(drawn.flatten(0, 1), 1 - probs) > z_bound(5)


@pytest.mark.slow
def test_paths_of_a_markov_chain_are_drawn_jointly():
    n = 300
    point = {
        "transition": 0.2 + 0.4 * torch.eye(3, dtype=F64),
        "centre": torch.tensor([0.0, 1.0, 2.0], dtype=F64),
    }
    values = {k: v.expand(n, *v.shape) for k, v in point.items()}
    drawn = FromPyro(markov).sample_discrete(values, {"y": Y}, rng=1)
    path = torch.stack([drawn[f"state_{t}"] for t in range(5)], -1)
    smoother = hmm_smoother(*markov_chain(point), pairs=True)
    share = torch.nn.functional.one_hot(path, 3).double()
    assert share_z(share, smoother.smoothed) < z_bound(15)
    # Neighbours depend on each other, which marginals do not show.
    pairs = (share[:, :-1, :, None] * share[:, 1:, None, :]).sum(1)
    z = (pairs.mean(0) - smoother.pair_sum).abs() / (pairs.std(0) / n**0.5)
    assert float(z.max()) < z_bound(9)


def exact_share():
    """Posterior mean and sd of a share with both centres known, on a grid."""
    grid = torch.linspace(1e-6, 1 - 1e-6, 20_001, dtype=F64)
    log_p = Beta(TWO, TWO).log_prob(grid)
    centre = torch.tensor([0.0, 3.0], dtype=F64)
    _, terms = mixture_terms({"share": grid, "centre": centre.expand(len(grid), 2)}, Y)
    weight = (log_p + terms.logsumexp(-1).sum(-1)).softmax(0)
    mean = float(weight @ grid)
    return mean, float(weight @ (grid - mean).square()), float(grid[weight.argmax()])


def known_centres(y):
    share = pyro.sample("share", dist.Beta(TWO, TWO))
    with pyro.plate("row", len(y)):
        which = pyro.sample("which", dist.Bernoulli(share), infer=PARALLEL)
        pyro.sample("obs", dist.Normal(3.0 * which, 1.0), obs=y)


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(NUTS(100, warmup=60), marks=pytest.mark.slow), HMC(100, warmup=60)],
    ids=["nuts", "hmc"],
)
def test_gradient_based_samplers_sum_out(sampler):
    post = infer(FromPyro(known_centres), {"y": Y}, sampler, rng=0, chains=16)
    mean, variance, _ = exact_share()
    share = post.draws["share"]
    assert worst_z(share.mean(1), mean) < z_bound(2)
    assert worst_z((share - mean).square().mean(1), variance) < z_bound(2)
    # Nothing else breaks where there is no pointwise likelihood.
    assert post.log_likelihood == {}
    assert "share" in post.summary().index
    assert "log_likelihood" not in post.to_datatree().children


def test_other_samplers_sum_out_too():
    model, data = FromPyro(known_centres), {"y": Y}
    mean, variance, mode = exact_share()
    found = infer(model, data, MAP(restarts=2), rng=0)
    assert float(found.draws["share"][0, 0]) == pytest.approx(mode, abs=1e-3)
    fitted = infer(model, data, SVI(steps=250), guide=MeanField(), rng=0)
    draws = fitted.sample(2000, rng=1)["share"]
    assert float(draws.mean()) == pytest.approx(mean, abs=0.05)
    weighted = infer(model, data, ImportanceSampling(1000), guide=Wide(), rng=0)
    weights = weighted.log_weights.flatten().softmax(0)
    share = weighted.draws["share"].flatten()
    error = float((weights.square() * (share - mean).square()).sum().sqrt())
    assert abs(float(weights @ share) - mean) < 4 * error


class Wide:
    """Uniform draws of the share: a proposal with bounded weights."""

    def init(self, model, data, *, rng):
        return {}

    def sample(self, params, model, batch, n, *, rng):
        zero = torch.zeros(n, dtype=F64)
        return {"share": torch.rand(n, generator=rng, dtype=F64)}, LogQ(zero, zero)


# ----------------------------------------------------------------------------------- the options


def test_false_keeps_the_sites_and_true_takes_unmarked_ones():
    kept = FromPyro(mixture, enumerate_discrete=False)
    assert kept.sites({"y": Y})["which"].discrete
    with pytest.raises(DataError, match="missing: 'which'"):
        kept.log_joint({"share": TWO / 4, "centre": torch.zeros(2).double()}, {"y": Y})
    with pytest.raises(CapabilityError, match="discrete: which. .*enumerate_discrete=True"):
        infer(kept, {"y": Y}, NUTS(5, warmup=5), rng=0)

    def unmarked(y):
        with pyro.plate("row", len(y)):
            which = pyro.sample("which", dist.Bernoulli(0.5))
            mu = pyro.sample("mu", dist.Normal(which.double(), 1.0))
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)

    assert set(FromPyro(unmarked).sites({"y": Y})) == {"which", "mu"}
    assert set(FromPyro(unmarked, enumerate_discrete=True).sites({"y": Y})) == {"mu"}


def test_sites_without_a_finite_support_are_refused_by_name():
    def counts(y):
        k = pyro.sample("k", dist.Poisson(TWO), infer=PARALLEL)
        pyro.sample("obs", dist.Normal(k, 1.0), obs=y[0])

    with pytest.raises(CapabilityError, match="site 'k': Poisson has no finite support to sum"):
        FromPyro(counts).sites({"y": Y})
    assert FromPyro(counts, enumerate_discrete=False).sites({"y": Y})["k"].discrete


def test_what_needs_values_of_summed_sites_is_refused():
    model, data = FromPyro(mixture), {"y": Y}
    with pytest.raises(CapabilityError, match="needs values of 'which', which are summed out"):
        model.pointwise_log_likelihood(mixture_values(2, torch.Generator()), data)

    def plain(y):
        mu = pyro.sample("mu", dist.Normal(TWO, 1.0))
        pyro.sample("obs", dist.Normal(mu, 1.0).expand([len(y)]).to_event(1), obs=y)

    with pytest.raises(CapabilityError, match="plain has no site that is summed out; mark"):
        FromPyro(plain).sample_discrete({"mu": TWO[None]}, data, rng=0)


# --------------------------------------------------------------------- what vmap cannot map


def test_programs_that_vmap_refuses_run_point_by_point(generator):
    """Pyro's DiscreteHMM holds an autograd function without a vmap rule."""

    def marginal(y):
        transition = pyro.sample(
            "transition", dist.Dirichlet(torch.ones(3, 3, dtype=F64)).to_event(1)
        )
        centre = pyro.sample("centre", dist.Normal(torch.zeros(3, dtype=F64), 3.0).to_event(1))
        law = dist.DiscreteHMM(
            torch.zeros(3, dtype=F64), transition.log(), dist.Normal(centre, 1.0), duration=len(y)
        )
        pyro.sample("y", law, obs=y)

    model, data = FromPyro(marginal), {"y": Y}
    values = markov_values(3, generator)
    with pytest.warns(NumericsWarning, match="cannot be mapped over points.*one after another"):
        found = log_joint_of(model, values, data)
    # DiscreteHMM moves before the first observation: from a uniform law, by the transition.
    start = values["transition"].mean(-2).log()
    _, step, emission = markov_chain(values)
    prior = Dirichlet(torch.ones(3, dtype=F64)).log_prob(values["transition"]).sum(-1)
    prior = prior + Normal(0.0, 1.5 * TWO).log_prob(values["centre"]).sum(-1)
    exact = prior + hmm_log_evidence(start, step, emission)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)
    # From now on without another attempt or warning, and under samplers.
    torch.testing.assert_close(log_joint_of(model, values, data), found)
    post = infer(model, data, NUTS(5, warmup=5, max_depth=3), rng=0, chains=2)
    assert post.draws["centre"].shape == (2, 5, 3)

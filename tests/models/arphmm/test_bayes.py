"""The Bayesian model: densities of the prior, Gibbs, NUTS, relabelling, storage."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from probkit import infer
from probkit.errors import CapabilityError, DataError
from probkit.inference import NUTS, Gibbs
from probkit.models.arphmm import ARPHMM, Sequences, SwitchingPrior, plausibility
from probkit.models.arphmm.prior import log_dirichlet, log_regimes
from probkit.models.arphmm.relabel import permute_states, relabel
from probkit.models.arphmm.simulation import simulate_sequences
from probkit.models.arphmm.updates import draw_regimes
from probkit.sources import Draws
from probkit.unconstrained import Unconstrained


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


class TestPrior:
    def test_regimes_have_the_density_of_scipy(self):
        rng = torch.Generator().manual_seed(0)
        prior = SwitchingPrior(ridge=0.5, dof=6.0, scale=tensor([[1.0, 0.2], [0.2, 0.7]]))
        weights = torch.randn(2, 2, 3, generator=rng, dtype=torch.float64)
        noise = torch.randn(2, 2, 4, generator=rng, dtype=torch.float64)
        covariance = noise @ noise.mT
        expected = 0.0
        for w, s in zip(weights.numpy(), covariance.numpy(), strict=True):
            expected += stats.invwishart(6.0, prior.scale.numpy()).logpdf(s)
            expected += stats.matrix_normal(np.zeros((2, 3)), s, np.eye(3) / 0.5).logpdf(w)
        assert abs(float(log_regimes(prior, weights, covariance, "full")) - expected) < 1e-10

    def test_diagonal_entries_have_the_marginal_of_the_wishart(self):
        prior = SwitchingPrior(dof=7.0, scale=2.0)
        variance = tensor([0.5, 1.5, 0.8])
        weights = torch.zeros(1, 3, 1, dtype=torch.float64)
        found = log_regimes(prior, weights, torch.diag(variance)[None], "diag")
        expected = sum(
            stats.invgamma((7.0 - 3 + 1) / 2, scale=1.0).logpdf(v)
            + stats.norm(0, math.sqrt(v / prior.ridge)).logpdf(0.0)
            for v in variance.tolist()
        )
        assert abs(float(found) - expected) < 1e-10
        draws = stats.invwishart(7.0, 2.0 * np.eye(3)).rvs(4000, random_state=0)[:, 0, 0]
        law = stats.invgamma((7.0 - 3 + 1) / 2, scale=1.0)
        assert stats.kstest(draws, law.cdf).pvalue > 1e-3

    def test_rows_skip_forbidden_entries(self):
        found = log_dirichlet(tensor([0.3, 0.0, 0.7]), tensor([2.0, 0.0, 1.5]))
        assert abs(float(found) - stats.dirichlet([2.0, 1.5]).logpdf([0.3, 0.7])) < 1e-12

    @pytest.mark.parametrize("cov", ["full", "diag", "shared"])
    def test_draws_given_states_follow_their_density(self, cov):
        """Weights and covariances drawn for a summary score zero on average (first moments)."""
        rng = torch.Generator().manual_seed(1)
        rows = torch.randn(60, 4, generator=rng, dtype=torch.float64)
        rows[:, 0] = 1.0
        moments = torch.stack([rows[:30].mT @ rows[:30], rows[30:].mT @ rows[30:]])
        prior = SwitchingPrior(ridge=0.3, dof=5.0, scale=0.4)
        n = 4000
        draws = [draw_regimes(moments, 2, prior, cov, rng=rng) for _ in range(n)]
        weights = torch.stack([w for w, _ in draws])
        covariance = torch.stack([s for _, s in draws])
        free = weights.clone().requires_grad_()
        residual = rows[:, 2:] - (free[:, :, None] @ rows[:, :2, None])[..., 0]
        solved = torch.linalg.solve(covariance[:, :, None], residual[..., None])[..., 0]
        half = torch.arange(60) < 30
        density = -0.5 * (residual * solved).sum(-1)
        likelihood = density[:, 0, half].sum(-1) + density[:, 1, ~half].sum(-1)
        total = likelihood + log_regimes(prior, free, covariance, cov)
        (score,) = torch.autograd.grad(total.sum(), free)
        z = score.mean(0) / (score.std(0) / math.sqrt(n))
        assert float(z.abs().max()) < 4.5

    def test_transition_masks_have_the_right_jacobian(self):
        model = ARPHMM(3, 0, transition="left_right", cov="shared", features=2)
        values = model.sample_prior(1, rng=0)
        data = model.simulate({n: v[0] for n, v in values.items()}, 9, rng=0)
        free = Unconstrained({"transition": model.sites(data)["transition"]})
        flat = free.flatten(values)[0]
        assert free.size == 2
        rows = model.mask.nonzero()

        def entries(x):
            matrix = free.values(x)["transition"]
            return matrix[rows[:, 0], rows[:, 1]][[0, 2]]  # staying in the first two states

        jacobian = torch.autograd.functional.jacobian(entries, flat)
        _, log_det = free.constrain(flat)
        assert abs(float(torch.linalg.slogdet(jacobian).logabsdet - log_det)) < 1e-12


def labelled(seed, steps=40):
    """A sequence of two well separated regimes with labels, so that numbers cannot switch."""
    values = {
        "initial": tensor([0.5, 0.5]),
        "transition": tensor([[0.9, 0.1], [0.2, 0.8]]),
        "weights": tensor([[[-1.0, 0.3]], [[1.5, 0.2]]]),
        "covariance": tensor([[[0.3]], [[0.5]]]),
    }
    data, states = simulate_sequences(values, [steps + 1], order=1, rng=seed)
    z = torch.full((steps + 1,), -1)
    z[1::2] = states[0][::2]
    return Sequences(data.y, [plausibility.from_labels(z, 2, nonspecificity=0.01)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::probkit.errors.ConvergenceWarning")
def test_gibbs_and_nuts_draw_from_the_same_law():
    model = ARPHMM(2, 1, prior=SwitchingPrior(sticky=2.0, scale=0.5))
    data = labelled(0, steps=14)
    gibbs = infer(model, data, Gibbs(draws=1500, warmup=100), rng=0, chains=2)
    nuts = infer(model, data, NUTS(60, warmup=120), rng=1, chains=16)
    one, two = gibbs.summary(), nuts.summary()
    free = [name for name in one.index if float(one.loc[name, "sd"]) > 1e-12]
    for name in free:
        a, b = one.loc[name], two.loc[name]
        se = math.hypot(a["sd"] / math.sqrt(a["ess_bulk"]), b["sd"] / math.sqrt(b["ess_bulk"]))
        assert abs(a["mean"] - b["mean"]) < 4.5 * se, name
        assert a["r_hat"] < 1.02 and b["r_hat"] < 1.1, name


def test_relabelling_undoes_a_permutation():
    model = ARPHMM(2, 1, prior=SwitchingPrior(scale=0.5))
    data = labelled(1).without_labels()
    post = infer(model, data, Gibbs(draws=60, warmup=100), rng=0)
    values = {name: value[0] for name, value in post.draws.items()}
    order = torch.stack(
        [torch.tensor([1, 0]) if k % 2 else torch.tensor([0, 1]) for k in range(60)]
    )
    mixed = permute_states(values, order)
    joint = model.log_joint(values, data)
    torch.testing.assert_close(model.log_joint(mixed, data), joint)
    shuffled = replace(post, source=Draws({n: v[None] for n, v in mixed.items()}))
    reference = {name: value[3] for name, value in values.items()}
    undone, plain = (relabel(p, reference=reference).draws for p in (shuffled, post))
    for name, value in plain.items():
        torch.testing.assert_close(undone[name], value)


def test_relabelling_needs_exchangeable_states():
    model = ARPHMM(2, 1, transition="left_right")
    post = infer(model, labelled(0).without_labels(), Gibbs(draws=2, warmup=1), rng=0)
    with pytest.raises(DataError, match="told apart already"):
        relabel(post)


def test_without_a_prior_there_is_no_posterior():
    model = ARPHMM(2, 1, prior=None)
    with pytest.raises(CapabilityError, match="has no prior"):
        infer(model, torch.arange(20.0), Gibbs(draws=1), rng=0)
    with pytest.raises(CapabilityError, match="has no prior"):
        infer(model, torch.randn(20, generator=torch.Generator().manual_seed(0)), NUTS(1), rng=0)


@pytest.mark.slow
@pytest.mark.parametrize("cov", ["full", "shared"])
def test_simulation_based_calibration(cov):
    """Ranks of prior draws among Gibbs draws are uniform (states told apart by labels)."""
    prior = SwitchingPrior(initial=2.0, transition=2.0, sticky=1.0, ridge=1.0, dof=6.0, scale=2.0)
    model = ARPHMM(2, 1, cov=cov, prior=prior, features=1)
    runs, kept = 100, 19
    truth = model.sample_prior(runs, rng=0)
    ranks: dict[str, list[int]] = {}
    for run in range(runs):
        values = {name: value[run] for name, value in truth.items()}
        history = torch.zeros(1, 1, dtype=torch.float64)
        data, states = simulate_sequences(values, [16], order=1, history=history, rng=run)
        # A label is drawn with the plausibility it then has: right with weight 1, else 0.2.
        rng = torch.Generator().manual_seed(10_000 + run)
        wrong = torch.rand(15, generator=rng) < 0.2 / 1.2
        seen = torch.where(wrong, 1 - states[0], states[0])
        z = torch.cat([torch.tensor([-1]), seen])
        labels = plausibility.from_labels(z, 2, nonspecificity=0.2)
        post = infer(
            model,
            Sequences(data.y, [labels]),
            Gibbs(draws=kept, warmup=30, thin=4),
            rng=run,
        )
        quantities = {
            "initial": (values["initial"][0], post.draws["initial"][0, :, 0]),
            "stay": (values["transition"][0, 0], post.draws["transition"][0, :, 0, 0]),
            "intercept": (values["weights"][1, 0, 0], post.draws["weights"][0, :, 1, 0, 0]),
            "slope": (values["weights"][0, 0, 1], post.draws["weights"][0, :, 0, 0, 1]),
            "variance": (values["covariance"][0, 0, 0], post.draws["covariance"][0, :, 0, 0, 0]),
        }
        for name, (true, draws) in quantities.items():
            ranks.setdefault(name, []).append(int((draws < true).sum()))
    for name, found in ranks.items():
        counts = np.bincount(np.array(found) // 4, minlength=5)
        assert stats.chisquare(counts).pvalue > 1e-3, (name, counts)

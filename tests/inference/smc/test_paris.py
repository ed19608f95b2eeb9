"""PaRIS and the Parisian particle Gibbs sampler against exact smoothing."""

from __future__ import annotations

import pytest
import torch

from probkit import infer
from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.inference.smc import PPG, PaRIS, paris, parisian_sweep, smooth
from probkit.models.state_space import DiscreteHMM


def products(t, old, new, data):
    """h = sum of x_(t-1) x_t."""
    return torch.zeros(len(new)).double() if t == 0 else (old * new)[:, 0]


def exact_products(exact, model, y):
    truth = exact.gaussian(model, y)
    T = range(len(y) - 1)
    cross = truth.covariance[:, 0, :, 0]
    mean = truth.mean[:, 0]
    return sum(cross[t, t + 1] + mean[t] * mean[t + 1] for t in T), truth.log_evidence


def transitions(t, old, new, data):
    """Counts of transitions 0 -> 1 and of state 2, [n, 2]."""
    moved = (old == 0) & (new == 1) if t > 0 else torch.zeros_like(new, dtype=torch.bool)
    return torch.stack([moved, new == 2], dim=1)


def exact_transitions(exact, model, y):
    truth = exact.hmm(model, y)
    return torch.stack([truth.pairs[:, 0, 1].sum(), truth.marginals[:, 2].sum()])


def check_transitions(truth, model, y, reference=None, **options):
    """The weighted estimate Zhat * value is unbiased for Z * truth, so that any n will do."""
    expected = exact_transitions(truth, reference or model, y)
    evidence = truth.hmm(reference or model, y).log_evidence
    g = torch.Generator().manual_seed(0)
    runs = [smooth(model, y, transitions, 20, rng=g, **options) for _ in range(250)]
    values = torch.stack([(r.log_evidence - evidence).exp() * r.value for r in runs])
    for column, answer in zip(values.mT, expected, strict=True):
        assert abs(truth.z(column, float(answer))) < 4


@pytest.mark.parametrize("bare", [False, True])
def test_discrete_chain(exact, hmm, bare):
    check_transitions(exact, *hmm, exact=bare)


def test_weighted_paris_is_unbiased_with_every_threshold(exact, hmm):
    for threshold in (0.0, 1.0):
        check_transitions(exact, *hmm, ess_threshold=threshold, resampler="multinomial")


class BackwardsInTime(DiscreteHMM):
    """A mutant: the transition density with its arguments exchanged."""

    def log_transition(self, t, old, new, data):
        return super().log_transition(t, new, old, data)


def test_the_check_catches_an_exchanged_transition(exact, hmm):
    model, y = hmm
    mutant = BackwardsInTime(model.initial, model.transition, model.emission)
    with pytest.raises(AssertionError):
        check_transitions(exact, mutant, y, reference=model)


def test_the_check_catches_late_weights(exact, hmm, monkeypatch):
    original = paris.backward_draws

    def by_new_weights(model, t, cloud, new, draws, data, **options):
        # Off by one: the weights after the step in place of those before it.
        late = model.log_weight(t, None, cloud.particles, data).log_softmax(0)
        cloud = paris.Cloud(cloud.particles, late, cloud.log_evidence)
        return original(model, t, cloud, new, draws, data, **options)

    monkeypatch.setattr(paris, "backward_draws", by_new_weights)
    with pytest.raises(AssertionError):
        check_transitions(exact, *hmm)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "repeats"), [(25, 60), (100, 40)])
def test_linear_gaussian_figures(exact, lgssm, n, repeats):
    """T = 100, two backward draws: mean(Zhat) = Z, a bias of order 1 / n, sd near 0.67 and 0.34."""
    y = lgssm.simulate_path(100, rng=0)[1][0]
    truth, log_evidence = exact_products(exact, lgssm, y)
    g = torch.Generator().manual_seed(0)
    options = {"resampler": "multinomial", "ess_threshold": 1.0}
    runs = [smooth(lgssm, y, products, n, rng=g, **options) for _ in range(repeats)]
    values = torch.stack([run.value for run in runs])
    ratios = torch.stack([(run.log_evidence - log_evidence).exp() for run in runs])
    assert abs(exact.z(ratios, 1.0)) < 4
    error = float(values.std()) / repeats**0.5
    assert abs(float(values.mean() - truth)) < 4 / n + 4 * error
    reference = {25: 0.67, 100: 0.34}[n]
    assert 0.5 * reference < float(values.std()) < 2 * reference


def bias_by_sweep(truth, model, y, n, sweeps, chains):
    """Mean error of the estimates of each sweep [sweep, out], and its standard error."""
    answer = exact_transitions(truth, model, y)
    g = torch.Generator().manual_seed(0)
    errors = torch.zeros(chains, sweeps, 2).double()
    for chain in range(chains):
        reference = None
        for sweep in range(sweeps):
            found = parisian_sweep(model, y, n, transitions, reference, rng=g)
            reference = found.path
            errors[chain, sweep] = found.value - answer
    return errors.mean(0), errors.std(0) / chains**0.5


def check_bias_falls(truth, hmm):
    bias, error = bias_by_sweep(truth, *hmm, n=2, sweeps=7, chains=110)
    # The first sweep is plain PaRIS, whose bias with two particles is plain to see.
    assert float((bias[0] / error[0]).abs().max()) > 4
    late, late_error = bias[4:].mean(0), error[4:].mean(0)
    assert bool((late.abs() < 3.5 * late_error).all())
    assert float(late.abs().max()) < 0.5 * float(bias[0].abs().max())


def test_bias_falls_with_the_sweeps(exact, hmm):
    check_bias_falls(exact, hmm)


@pytest.mark.slow
def test_the_bias_check_catches_a_lost_reference(exact, hmm, monkeypatch):
    monkeypatch.setattr(paris, "_overwrite", lambda particles, slot, one: particles)
    with pytest.raises(AssertionError):
        check_bias_falls(exact, hmm)


def reference_law(exact, hmm, repeats, n=3):
    """Start from exact posterior paths: a sweep must keep their law. Returns z-scores."""
    model, y = hmm
    truth = exact.hmm(model, y)
    g = torch.Generator().manual_seed(2)
    start = truth.paths[torch.multinomial(truth.weights, repeats, True, generator=g)]
    runs = [parisian_sweep(model, y, n, transitions, path, rng=g) for path in start]
    paths = torch.stack([run.path for run in runs])
    one_hot = torch.nn.functional.one_hot(paths, 3).double()
    error = (one_hot.mean(0) - truth.marginals).abs()
    scores = error / (truth.marginals * (1 - truth.marginals) / repeats).sqrt()
    pairs = torch.einsum("ptk,ptl->tkl", one_hot[:, :-1], one_hot[:, 1:]) / repeats
    pair_scores = (pairs - truth.pairs).abs() / (truth.pairs * (1 - truth.pairs) / repeats).sqrt()
    values = torch.stack([run.value for run in runs])
    answers = exact_transitions(exact, model, y)
    value_scores = (values.mean(0) - answers).abs() / (values.std(0) / repeats**0.5)
    return torch.cat([scores.flatten(), pair_scores.flatten(), value_scores])


def test_a_parisian_sweep_keeps_the_posterior_and_is_unbiased(exact, hmm):
    """Started from the posterior, both the next path and the estimate are exact on average."""
    assert float(reference_law(exact, hmm, 400).max()) < 4.2


@pytest.mark.slow
@pytest.mark.parametrize("mutant", ["overwrite", "trace"])
def test_the_parisian_check_catches_mutants(exact, hmm, monkeypatch, mutant):
    if mutant == "overwrite":  # the reference is forgotten
        monkeypatch.setattr(paris, "_overwrite", lambda particles, slot, one: particles)
    else:  # off by one: parents looked up in the wrong generation
        original = paris._trace
        monkeypatch.setattr(paris, "_trace", lambda v, p, i: original(v, [p[0], *p[:-1]], i))
    with pytest.raises(AssertionError):
        assert float(reference_law(exact, hmm, 400).max()) < 4.2


def test_sampler_results(lgssm):
    y = lgssm.simulate_path(12, rng=0)[1][0]
    post = infer(lgssm, y, PaRIS(300, products), rng=0, chains=2)
    stats = post.sample_stats
    assert stats["smoothed"].shape == (2,)
    assert stats["smoothed_trace"].shape == (2, 12)
    assert torch.equal(stats["smoothed"], stats["smoothed_trace"][:, -1])
    assert post.log_evidence.value.shape == (2,)
    evaluations = stats["backward_evaluations"][:, 1:].double()
    assert float(evaluations.mean()) < 0.2 * 300**2
    post = infer(lgssm, y, PPG(10, products, sweeps=4, warmup=2), rng=0, chains=2)
    assert post.draws["path"].shape == (2, 4, 12, 1)
    assert torch.allclose(
        post.sample_stats["smoothed"], post.sample_stats["smoothed_trace"].mean(1)
    )


def test_guided_paris(exact, lgssm):
    y = lgssm.simulate_path(12, rng=0)[1][0]
    truth, _ = exact_products(exact, lgssm, y)
    post = infer(lgssm, y, PaRIS(300, products, guided=True), rng=0, chains=10)
    values = post.sample_stats["smoothed"]
    assert abs(float(values.mean() - truth)) < 4 * float(values.std()) / 10**0.5 + 0.01


class NoTransition(DiscreteHMM):
    log_transition = None


class Unknown(DiscreteHMM):
    local_weights = False


def test_what_paris_needs(hmm):
    model, y = hmm
    parts = (model.initial, model.transition, model.emission)
    with pytest.raises(CapabilityError, match="NoTransition lacks log_transition"):
        infer(NoTransition(*parts), y, PaRIS(10, transitions), rng=0)
    with pytest.raises(CapabilityError, match="needs the transition density"):
        smooth(NoTransition(*parts), y, transitions, 5, rng=torch.Generator())
    with pytest.raises(CapabilityError, match="does not declare local_weights"):
        infer(Unknown(*parts), y, PPG(10, transitions), rng=0)
    with pytest.raises(DataError, match="DiscreteHMM has no method additive"):
        infer(model, y, PaRIS(10), rng=0)
    with pytest.raises(ShapeError, match=r"expected values \[n=10, \*out\]"):
        infer(model, y, PaRIS(10, lambda t, old, new, data: torch.zeros(3)), rng=0)
    with pytest.warns(NumericsWarning, match="degenerates like traced ancestries"):
        infer(model, y, PaRIS(10, transitions, draws=1), rng=0)
    with pytest.raises(DataError, match="whole n >= 2"):
        PPG(1)
    with pytest.raises(DataError, match="whole draws >= 1"):
        PaRIS(draws=0)


def test_models_can_bring_the_functional(hmm):
    model, y = hmm

    class WithFunctional(DiscreteHMM):
        def additive(self, t, old, new, data):
            return transitions(t, old, new, data)

    own = infer(
        WithFunctional(model.initial, model.transition, model.emission), y, PaRIS(20), rng=0
    )
    given = infer(model, y, PaRIS(20, transitions), rng=0)
    assert torch.equal(own.sample_stats["smoothed"], given.sample_stats["smoothed"])


def test_resumes_bit_for_bit(hmm, tmp_path):
    model, y = hmm
    options = PaRIS(20, transitions)
    whole = infer(model, y, options, rng=1)
    stop = [lambda info: info.step == 3]
    infer(model, y, options, rng=1, checkpoint=tmp_path, callbacks=stop)
    resumed = infer(model, y, options, rng=1, checkpoint=tmp_path)
    assert torch.equal(whole.sample_stats["smoothed"], resumed.sample_stats["smoothed"])

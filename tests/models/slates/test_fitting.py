"""Fits of the slate model: row-wise Adam, phases, updates, files, conformance, bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from support.slates import random_log
from torch.distributions import Normal

import probkit as pk
from probkit.errors import CapabilityError, ConvergenceWarning, DataError, ShapeError
from probkit.inference import SVI, MeanField
from probkit.inference.ranks import Ranks
from probkit.inference.row_adam import RowAdam
from probkit.model import Batch
from probkit.models.slates import (
    SlateGRU,
    SlateLog,
    SlateMeanField,
    SlatePrior,
    TwoPhase,
    carried_model,
    click_log_probs,
    click_probs,
    draw_parameters,
    fit_bytes,
    plug_in_parameters,
    update_posterior,
)
from probkit.testing import GuideConformance, ModelConformance

F64 = torch.float64
QUICK = SVI(steps=4, batch_size=6, particles=1, evidence_draws=5)


def small_log(seed=0, **options):
    return random_log(users=10, steps=4, slots=3, items=9, seed=seed, n_groups=2, **options)


def small_model(log, **options):
    defaults = {"transition": "linear", "dim": 2, "dtype": F64}
    return SlateGRU(log.n_items, groups=log.groups, **(defaults | options))


@pytest.fixture(scope="module")
def fitted():
    log = small_log(held=4)
    return log, pk.infer(small_model(log), log, QUICK, rng=0)


# ---------------------------------------------------------------- row-wise Adam


def test_rows_that_are_all_touched_follow_adam():
    generator = torch.Generator().manual_seed(0)
    table = {
        "loc": torch.randn(6, 3, generator=generator, dtype=F64),
        "scale": torch.randn(6, generator=generator, dtype=F64),
    }
    dense = {name: value.clone().requires_grad_() for name, value in table.items()}
    adam = torch.optim.Adam(dense.values(), lr=0.05)
    rows = RowAdam(table, None, Ranks())
    for step in range(5):
        order = torch.randperm(6, generator=generator)
        fetched = rows.fetch(order)
        target = step + torch.arange(6, dtype=F64)
        loss = (fetched.parts["loc"].sum(1) * target[order] + fetched.parts["scale"].sin()).sum()
        loss.backward()
        rows.step(fetched, 0.05)
        adam.zero_grad()
        (dense["loc"].sum(1) * target + dense["scale"].sin()).sum().backward()
        adam.step()
    for name, value in rows.table().items():
        torch.testing.assert_close(value, dense[name].detach())


def test_rows_that_are_not_touched_stay_and_begin_unbiased():
    """A row's first step is lr * sign(gradient), however late it comes."""
    rows = RowAdam({"x": torch.zeros(4, 2, dtype=F64)}, None, Ranks())
    for k in range(40):
        fetched = rows.fetch(torch.tensor([0, 3]) if k < 39 else torch.tensor([2]))
        (fetched.parts["x"] * torch.tensor([1.0, -2.0])).sum().backward()
        rows.step(fetched, 0.1)
    found = rows.table()["x"]
    assert not found[1].any()
    torch.testing.assert_close(found[2], torch.tensor([-0.1, 0.1], dtype=F64))
    assert rows.moments()["count"].tolist() == [39, 0, 1, 39]


def test_runs_resume_to_the_last_bit(tmp_path):
    log = small_log()
    model, guide = small_model(log), SlateMeanField(users="table", divergence="uniform", subset=4)
    sampler = SVI(steps=6, batch_size=4, particles=1, chunk=2)
    whole = pk.infer(model, log, sampler, guide=guide, rng=0)
    with pytest.raises(RuntimeError, match="stop"):
        pk.infer(
            model, log, sampler, guide=guide, rng=0, callbacks=[_stop_at(2)], checkpoint=tmp_path
        )
    again = pk.infer(model, log, sampler, guide=guide, rng=0, checkpoint=tmp_path)
    for name, own in whole.source.params[0].items():
        for key, value in own.items():
            assert torch.equal(again.source.params[0][name][key], value), (name, key)
            assert value.is_contiguous()


def _stop_at(step):
    def callback(info):
        if info.step == step:
            raise RuntimeError("stop")

    return callback


# ---------------------------------------------------------------- guides and what is reported


@pytest.mark.parametrize("user_init", ["zero", "normal"])
def test_items_outside_the_first_batch_of_a_loader_are_learned(user_init):
    log = random_log(users=12, steps=4, slots=3, items=40, seed=1, n_groups=2)
    model = small_model(log, user_init=user_init)
    first = log.take(torch.arange(2))
    loader = replace(log.loader(4), example=first)
    post = pk.infer(model, loader, SVI(steps=60, lr=0.05, particles=1), rng=0)
    table = post.source.params[0]["items"]
    seen_first = torch.cat([first.slate.flatten(), first.click.flatten()]).unique()
    others = torch.cat([log.slate.flatten(), log.click.flatten()]).unique()
    others = others[(others > 2) & ~torch.isin(others, seen_first)]
    assert len(others) > 10
    # What is learned of an item is a factor narrower than the one that items join with.
    assert (table["log_scale"][others].mean(1) < 0.5).all()
    whole = pk.infer(model, log, SVI(steps=60, lr=0.05, batch_size=4, particles=1), rng=0)
    same = whole.source.params[0]["items"]
    gap = (table["loc"][others] - same["loc"][others]).abs().mean()
    assert gap < 0.5 * same["loc"][others].abs().mean()


def test_mean_field_becomes_the_models_own_and_the_temperature_is_reported():
    log = small_log()
    post = pk.infer(small_model(log, temperature=0.25), log, QUICK, guide=MeanField(0.2), rng=0)
    assert isinstance(post.source.guide, SlateMeanField) and post.source.guide.init_scale == 0.2
    assert post.attrs["temperature"] == 0.25
    assert post.attrs["likelihood"] == ["slate"] * 3


def test_a_temperature_divides_the_log_likelihood_alone():
    log = small_log()
    values = small_model(log).initial_values(log, 1, rng=torch.Generator().manual_seed(0))
    hot, cold = small_model(log), small_model(log, temperature=0.5)
    likelihood = hot.log_likelihood(values, log)
    difference = cold.log_joint(values, log) - hot.log_joint(values, log)
    torch.testing.assert_close(difference, likelihood)


# ---------------------------------------------------------------- predictions


def test_click_probabilities_are_averages_over_draws(fitted):
    log, post = fitted
    slate = log.slate[:, -1]
    found = click_probs(post, log, slate, draws=7, rng=3)
    torch.testing.assert_close(found.sum(1), torch.ones(10, dtype=F64))
    drawn = draw_parameters(post, 7, rng=3)
    each = drawn.log_probs(drawn.states(log).read[:, :, -1], slate).exp()
    torch.testing.assert_close(found, each.mean(0))
    plain = click_probs(post, log, slate, draws=None)
    assert not torch.allclose(plain, found, atol=1e-4)


def test_draws_of_items_do_not_depend_on_the_block(fitted):
    _, post = fitted
    drawn = draw_parameters(post, 3, rng=1)
    ids = torch.arange(12)
    whole = drawn.items(ids)
    parts = torch.cat([drawn.items(part) for part in ids.flip(0).split(5)], 1)
    assert torch.equal(parts.flip(1), whole)
    many = draw_parameters(post, 1500, rng=1).items(ids[3:5])
    law = post.marginals["items"]
    z = (many.mean(0) - law.mean[3:5]) / law.stddev[3:5] * 1500**0.5
    assert float(z.abs().max()) < 4.5
    assert torch.equal(plug_in_parameters(post).items(ids)[0], law.mean)


def test_log_probabilities_of_logged_clicks(fitted):
    """One draw: equal to the model's own likelihood at that draw, held-out steps included."""
    log, post = fitted
    drawn = draw_parameters(post, 1, rng=5)
    values = {
        **drawn.values,
        "items": drawn.items(torch.arange(log.n_items)),
        "user_init": drawn.first_states(log),
    }
    everything = replace(log, train=torch.ones_like(log.train))
    expected = post.model.pointwise_log_likelihood(values, everything)["click"][0]
    torch.testing.assert_close(click_log_probs(post, log, draws=1, rng=5), expected)


def test_predictions_average_and_know_clicks_before_them_alone(fitted):
    log, post = fitted
    prediction = post.predict(log, rng=0)
    assert prediction.probs.shape == (10, 4, 4)
    torch.testing.assert_close(prediction.probs.sum(-1), torch.ones(10, 4, dtype=F64))
    later = log.click.clone()
    later[:, 3] = log.slate[:, 3, 1]
    changed = replace(log, click=later, click_idx=None, train=log.train & (torch.arange(4) < 3))
    same = replace(log, train=changed.train)
    a, b = (post.predict(x, rng=0).probs for x in (changed, same))
    torch.testing.assert_close(a, b)
    assert post.predict(log, site="state", rng=0).mean.shape == (10, 5, 2)


def test_users_of_a_table_are_matched_by_label():
    log = replace(small_log(), labels={"user": [f"u{k}" for k in range(10)]})
    model = small_model(log)
    post = pk.infer(model, log, QUICK, guide=SlateMeanField(users="table"), rng=0)
    some = log.take([7, 2])
    drawn = plug_in_parameters(post)
    mean = post.marginals["user_init"].mean
    assert torch.equal(drawn.first_states(some)[0], mean[[7, 2]])
    assert torch.equal(drawn.first_states(some, users=torch.tensor([1, 0]))[0], mean[[1, 0]])
    found = post.predict(replace(some, labels={}), groups={"user": ["u7", "u2"]}, rng=0)
    assert found.probs.shape == (2, 4, 4)
    with pytest.raises(DataError, match="user 'x' was not in the fit"):
        drawn.first_states(replace(some, labels={"user": ["x", "u1"]}))
    with pytest.raises(DataError, match=r"expected users=<numbers in the fit>"):
        drawn.first_states(replace(some, labels={}))
    with pytest.raises(DataError, match="user 11 was not in the fit of 10 users"):
        drawn.first_states(some, users=torch.tensor([1, 11]))


def test_posteriors_of_other_samplers_predict_too():
    log = random_log(users=2, steps=2, slots=2, items=3, seed=1)
    model = small_model(log, dim=1)
    from probkit.inference import MAP

    with pytest.warns(ConvergenceWarning, match="MAP ended before"):
        post = pk.infer(model, log, MAP(restarts=1, max_iter=2), rng=0)
    assert click_probs(post, log, log.slate[:, 0], draws=3, rng=0).shape == (2, 3)
    assert click_log_probs(post, log, draws=None).shape == (2, 2)


# ---------------------------------------------------------------- two phases


def test_the_second_phase_keeps_the_items_of_the_first():
    log = small_log(held=4)
    model = small_model(log, transition="gru")
    short = SVI(steps=9, batch_size=5, particles=1, chunk=3)
    post = pk.infer(model, log, TwoPhase(short, short, patience=3), rng=0)
    assert post.model.transition == "gru" and "W_ir" in post.marginals
    assert post.attrs["phase_steps"] == [9, 9] and len(post.attrs["valid_loss"]) == 2
    assert all(math.isfinite(loss) for loss in post.attrs["valid_loss"])
    params = post.source.params[0]
    assert post.source.guide.start is None and set(post.source.guide.freeze) >= {"items"}
    assert float(params["W_ir"]["loc"].abs().sum()) > 0


def test_phases_end_early_and_give_their_best():
    """A learning rate that ruins the fit: the first chunk stays the best."""
    log = small_log(held=4)
    wild = SVI(steps=200, batch_size=5, particles=1, chunk=2, lr=3.0)
    post = pk.infer(small_model(log), log, TwoPhase(wild, wild, patience=2), rng=0)
    assert max(post.attrs["phase_steps"]) < 200


def test_the_loss_is_that_of_held_out_clicks():
    log = small_log(held=4)
    model, guide = small_model(log), SlateMeanField()
    params = guide.init(model, log, rng=0)
    from probkit.models.slates.two_phase import held_out_loss
    from probkit.posterior import Context, Posterior
    from probkit.sources import Fitted

    post = Posterior(Fitted(guide, [params]), model, Context(log))
    each = click_log_probs(post, log, draws=None)
    expected = -float(each[log.mask("valid")].mean())
    assert held_out_loss(model, guide, params, log) == pytest.approx(expected)
    assert held_out_loss(model, guide, params, log, "test") == -math.inf


# ---------------------------------------------------------------- updates


def test_a_carried_prior_with_no_new_word_leaves_the_fit_where_it_is():
    """At the optimum of the first fit the bound of an empty log has slope zero in the items."""
    log = small_log()
    guide = SlateMeanField(divergence="all")
    post = pk.infer(small_model(log), log, QUICK, guide=guide, rng=0)
    model, params = carried_model(post), post.source.params[0]
    spread = params["group_scale"]["log_scale"]
    params = {**params, "group_scale": {**params["group_scale"], "log_scale": spread - 20}}
    post = replace(post, source=replace(post.source, params=[params]))
    params["group_mean"]["log_scale"] = params["group_mean"]["log_scale"] - 20
    model = carried_model(post)
    moved = {
        name: {k: v.clone().requires_grad_() for k, v in own.items()} if name != "exposure" else own
        for name, own in params.items()
    }
    empty = replace(log, train=torch.zeros_like(log.train), check=False)
    terms = guide.terms(
        moved, model, Batch(empty), guide.plan(params, model, Batch(empty), rng=0), 0
    )
    (terms.items + terms.globals).backward()
    told = model.carried.precision > 0
    assert bool(told.any())
    for key in ("loc", "log_scale"):
        slope = moved["items"][key].grad
        assert float(slope[told].abs().max()) < 1e-4, key
    for name in ("no_click", "gamma"):
        for value in moved[name].values():
            assert float(value.grad.abs().max()) < 1e-8


@pytest.mark.slow
def test_updates_carry_what_was_learned():
    """One item is always clicked: after the old log and a new one it is better known and liked."""
    slate = torch.tensor([[[1, 3, 4]] * 6] * 12)
    log = SlateLog(slate, torch.full((12, 6), 3), n_items=6)
    model = small_model(log, score="dot", dim=1, prior=SlatePrior(user=0.01, item=1.0))
    model = replace(model, groups=None, user_init="zero", item_prior="flat", length_bias=False)
    sampler = SVI(steps=100, lr=0.08, particles=1, evidence_draws=2)
    first = pk.infer(model, log, sampler, rng=0)
    second = first.update(log, rng=1)
    third = update_posterior(second, log, sampler, rng=2)
    assert (second.attrs["updates"], third.attrs["updates"]) == (1, 2)
    # h_0 = 0 and the linear state moves to v: the no-click score falls with every log.
    bias = [float(p.marginals["no_click"].mean) for p in (first, second, third)]
    width = [float(p.marginals["no_click"].stddev) for p in (first, second, third)]
    assert bias[0] > bias[1] > bias[2] and width[0] > width[1] > width[2]
    together = pk.infer(model, log.joined(log), sampler, rng=0)
    gap = abs(bias[1] - float(together.marginals["no_click"].mean))
    assert gap < 0.5 * width[0]
    assert second.source.guide.start is None


def test_known_users_of_a_table_begin_with_their_law():
    labels = {"user": list("abcdefghij")}
    log = replace(small_log(), labels=labels)
    guide = SlateMeanField(users="table")
    post = pk.infer(small_model(log), log, QUICK, guide=guide, rng=0)
    new = replace(small_log(seed=3).take([0, 1, 2]), labels={"user": ["z", "c", "a"]})
    again = update_posterior(post, new, SVI(steps=1, lr=1e-9, particles=1), rng=0)
    law, old = again.marginals["user_init"], post.marginals["user_init"]
    torch.testing.assert_close(law.mean[[1, 2]], old.mean[[2, 0]], atol=1e-7, rtol=0)
    torch.testing.assert_close(law.stddev[0], torch.full((2,), 0.5, dtype=F64))
    prior = again.model.user_law(again.context.data)
    torch.testing.assert_close(prior.loc[1], old.mean[2])


def test_only_mean_field_fits_can_be_updated():
    log = random_log(users=2, steps=2, slots=2, items=3, seed=1)
    from probkit.inference import MAP

    with pytest.warns(ConvergenceWarning, match="MAP ended before"):
        post = pk.infer(small_model(log, dim=1), log, MAP(restarts=1, max_iter=2), rng=0)
    with pytest.raises(CapabilityError, match="expected a fit with SlateMeanField"):
        post.update(log, rng=0)


# ---------------------------------------------------------------- files, memory


def test_posteriors_are_stored(fitted, tmp_path):
    log, post = fitted
    post.save(tmp_path / "fit")
    again = pk.load(tmp_path / "fit")
    slate = log.slate[:, 0]
    expected = click_probs(post, log, slate, draws=4, rng=0)
    assert torch.equal(click_probs(again, log, slate, draws=4, rng=0), expected)
    assert again.attrs["temperature"] == 1.0


def test_memory_at_the_size_of_the_finn_data():
    """1,311,775 items, 2,277,645 users, 25 numbers each: six tables of 131 MB and of 228 MB."""
    model = SlateGRU(1_311_775, dim=25)
    amortised = fit_bytes(model, users=2_277_645, rows=50_000)
    assert amortised["items"] == 1_311_775 * (25 * 6 * 4 + 4) and amortised["users"] == 0
    table = fit_bytes(model, SlateMeanField(users="table"), users=2_277_645, rows=50_000, world=4)
    assert table["users"] == -(-2_277_645 * 604 // 4) and table["items"] < 200e6


# ---------------------------------------------------------------- conformance


class SlateConformance(ModelConformance):
    def test_joint_prediction_has_the_same_margins(self):
        pytest.skip("slots are no numbers: they have no quantiles")


class TestLinear(SlateConformance):
    def problem(self):
        log = small_log(held=3)
        return small_model(log, prior=SlatePrior(multiplier=0.2)), log, log

    def sampler(self):
        return QUICK


class TestMixed(SlateConformance):
    def problem(self):
        log = small_log(types=True)
        model = small_model(log, transition="gru", hidden=3, item_prior="flat")
        return replace(model, likelihood={"search": "full"}), log, log

    def sampler(self):
        return QUICK


class TestAmortised(GuideConformance):
    draws = 1500

    def problem(self):
        log = random_log(users=4, steps=3, slots=2, items=3, seed=2)
        return SlateMeanField(init_scale=0.3), small_model(log, dim=1), log


class TestTable(GuideConformance):
    draws = 1500

    def problem(self):
        log = random_log(users=4, steps=3, slots=2, items=3, seed=2)
        model = small_model(log, dim=1, prior=SlatePrior(logit_gamma=(0.0, 1.0)))
        return SlateMeanField(users="table", divergence="inclusion", init_scale=0.3), model, log


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"transition": "rnn"}, "expected transition one of linear, markov, gru, lstm, lingru"),
        ({"score": "cosine"}, "expected score one of l2, dot, got 'cosine'"),
        ({"n_items": 3}, "expected n_items >= 4"),
        ({"dim": 0}, "expected a whole number dim >= 1"),
        ({"hidden": 5}, "expected hidden = dim = 2, got hidden=5; leave hidden out"),
        ({"transition": "lingru", "hidden": 5}, "the lingru transition keeps item vectors"),
        ({"temperature": 0.0}, "expected temperature > 0, got 0.0"),
        ({"temperature": math.nan}, "expected temperature > 0, got nan"),
        ({"likelihood": "all"}, "expected 'slate', 'sampled' or 'full', got 'all'"),
        ({"likelihood": {"email": "full"}}, "expected the interaction types"),
        ({"dtype": torch.int64}, "expected dtype torch.float32 or torch.float64"),
        ({"groups": torch.full((12,), 0.5)}, "expected whole group numbers, got 0.5 for id 0"),
        ({"groups": torch.full((12,), math.nan)}, "expected whole group numbers, got nan for id 0"),
        ({"groups": torch.full((12,), -1)}, "expected group numbers >= 0, got -1 for id 0"),
    ],
)
def test_bad_options_are_named(options, text):
    given = {"n_items": 12, "transition": "linear", "dim": 2} | options
    with pytest.raises(DataError) as caught:
        SlateGRU(**given)
    assert text in str(caught.value)


def test_groups_of_another_length_are_refused():
    with pytest.raises(ShapeError, match=r"expected groups \[item=12\], one for each id"):
        SlateGRU(12, groups=torch.zeros(9))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: SlatePrior(user=0.0), "expected a standard deviation user > 0, got 0.0"),
        (lambda: SlatePrior(gamma=(0.5, -1.0)), "expected a standard deviation gamma > 0"),
        (lambda: SlatePrior(logit_gamma=(math.nan, 1.0)), r"expected logit_gamma=(mean, sd)"),
        (lambda: SlateMeanField(users="net"), "expected users 'amortised' or 'table'"),
        (lambda: SlateMeanField(divergence="some"), "expected divergence 'all'"),
        (lambda: SlateMeanField(subset=0), "expected subset >= 1, got 0"),
        (lambda: SlateMeanField(init_scale=0.0), "expected init_scale > 0"),
        (lambda: TwoPhase(patience=0), "expected patience >= 1 or None"),
        (lambda: TwoPhase(first=None), r"expected first=SVI(...)"),
    ],
)
def test_bad_priors_and_guides_are_named(make, text):
    with pytest.raises(DataError) as caught:
        make()
    assert text in str(caught.value)


def test_data_that_does_not_fit_the_model_is_refused():
    log = small_log()
    with pytest.raises(DataError, match="expected a SlateLog, got tuple"):
        pk.infer(small_model(log), (log.slate, log.click), QUICK, rng=0)
    with pytest.raises(DataError, match="the log has ids below 12, expected n_items=8 at most"):
        pk.infer(SlateGRU(8, transition="linear", dim=2), log, QUICK, rng=0)
    start = SlateMeanField(start={"items": {"loc": torch.zeros(3, 2), "log_scale": torch.zeros(1)}})
    with pytest.raises(DataError, match=r"expected start\['items'\]\['loc'\] of shape \(12, 2\)"):
        pk.infer(small_model(log), log, QUICK, guide=start, rng=0)
    with pytest.raises(CapabilityError, match="TwoPhase needs the guide SlateMeanField"):
        pk.infer(small_model(log), log, TwoPhase(), guide=pk.inference.LowRank(), rng=0)


def test_bad_slates_are_refused_when_predicting(fitted):
    log, post = fitted
    slate = log.slate[:, 0]
    cases = [
        (slate[:3], ShapeError, r"expected slate [user=10, slot]"),
        (slate.clone().index_fill_(1, torch.tensor([1]), 99), DataError, "expected ids in [0, n_i"),
        (slate.flip(1), DataError, "expected 1 (no click) in slot 0 alone"),
        (slate[:, [0, 1, 1]], DataError, "has an item twice in the slate"),
        (torch.cat([slate, slate[:, 1:] * 0 + 2], 1), DataError, "at most 4 slots in use"),
    ]
    for bad, error, text in cases:
        with pytest.raises(error) as caught:
            click_probs(post, log, bad, draws=2, rng=0)
        assert text in str(caught.value)
    with pytest.raises(DataError, match="draws random numbers: expected rng="):
        click_probs(post, log, slate)
    with pytest.raises(CapabilityError, match="predicts site=None"):
        post.predict(log, site="items", rng=0)
    with pytest.raises(DataError, match=r"groups: expected \{'user'"):
        post.predict(log, groups={"user": ["a"]}, rng=0)


def test_normal_laws_of_sites_are_stated(fitted):
    _, post = fitted
    assert isinstance(post.marginals["gamma"], Normal)
    assert post.marginals["group_scale"].mean.min() > 0

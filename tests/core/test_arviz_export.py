"""Export to ArviZ and xarray: groups, dims, coords, sampling and resampling."""

from __future__ import annotations

import json
import warnings

import arviz
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import xarray as xr
from support.models import ConjugateNormal, TinyProcess, normal_data, process_data
from torch.distributions import Normal, constraints

from probkit.arviz_export import export_groups, wrap_groups
from probkit.errors import CapabilityError, DataError
from probkit.inference import MeanField
from probkit.model import Model, Site
from probkit.posterior import Context, Evidence, Posterior
from probkit.sources import Closed, Draws, Fitted, Population


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(chains=2, draws=50, **options):
    data = normal_data(5)
    return Posterior(
        Draws({"mu": normal(chains, draws)}),
        ConjugateNormal(),
        Context(data, {"observation": list("abcde")}, {"mu": ()}),
        sample_stats={"lp": normal(chains, draws), "step_size": normal(chains)},
        attrs={"algorithm": "NUTS", "seed": 3, "complete": True, "options": {"steps": 5}},
        **options,
    )


# ------------------------------------------------------------------------------ groups and dims


def test_draws_are_exported_as_they_are():
    post = drawn()
    data = post.to_arviz()
    assert isinstance(data, arviz.InferenceData)
    assert set(data.groups()) == {"posterior", "sample_stats", "log_likelihood", "observed_data"}
    assert data.posterior["mu"].dims == ("chain", "draw")
    np.testing.assert_array_equal(data.posterior["mu"], post.draws["mu"])
    assert data.sample_stats["lp"].dims == ("chain", "draw")
    assert data.sample_stats["step_size"].dims == ("chain",)
    assert data.log_likelihood["y"].dims == ("chain", "draw", "observation")
    assert data.log_likelihood["y"].coords["observation"].values.tolist() == list("abcde")
    np.testing.assert_allclose(data.log_likelihood["y"], post.log_likelihood["y"])
    assert data.observed_data["y"].dims == ("observation",)
    assert arviz.summary(data).loc["mu", "mean"] == pytest.approx(
        post.draws["mu"].mean().item(), abs=1e-3
    )


def test_attributes_say_what_was_run():
    post = drawn(log_evidence=Evidence(torch.tensor([-1.0, -2.0]), "bound"))
    attrs = post.to_arviz().posterior.attrs
    assert attrs["algorithm"] == "NUTS"
    assert attrs["seed"] == 3
    assert attrs["complete"] == 1
    assert json.loads(attrs["options"]) == {"steps": 5}
    assert attrs["point_estimate"] == 0
    assert attrs["log_evidence"] == [-1.0, -2.0]
    assert attrs["log_evidence_kind"] == "bound"
    assert attrs["inference_library"] == "probkit"


def test_point_estimates_are_marked():
    post = Posterior(Draws({"w": torch.ones(1, 1)}), None, attrs={"point_estimate": True})
    assert post.to_arviz().posterior.attrs["point_estimate"] == 1
    assert post.to_datatree().attrs["point_estimate"] == 1


def test_both_generations_hold_the_same_groups():
    post = drawn()
    groups = export_groups(post)
    old, new = wrap_groups(groups, "0.23.4"), wrap_groups(groups, "1.2.0")
    assert isinstance(new, xr.DataTree)
    assert set(new.children) == set(old.groups())
    for group in old.groups():
        xr.testing.assert_identical(new[group].to_dataset(), old[group])
    xr.testing.assert_identical(new, post.to_datatree())


def test_files_survive_a_round_trip(tmp_path):
    post = drawn()
    with warnings.catch_warnings():  # xarray leaves filters behind when it first opens a file
        post.to_arviz().to_netcdf(str(tmp_path / "old.nc"))
        back = arviz.from_netcdf(str(tmp_path / "old.nc"))
        xr.testing.assert_equal(back.posterior.load(), post.to_arviz().posterior)
        back.close()
        tree = post.to_datatree()
        tree.to_netcdf(tmp_path / "new.nc", engine="h5netcdf")
        with xr.open_datatree(tmp_path / "new.nc", engine="h5netcdf") as opened:
            xr.testing.assert_equal(opened.posterior.to_dataset(), tree.posterior.to_dataset())


def test_labels_of_frames_become_coords():
    index = pd.Index(["x", "y", "z"])
    post = Posterior(
        Draws({"w": normal(1, 4, 3)}), None, Context(None, {"column": index}, {"w": ("column",)})
    )
    assert post.to_arviz().posterior["w"].coords["column"].values.tolist() == ["x", "y", "z"]


def test_dim_names_are_unique_and_agree_in_length():
    values = {
        "transition": normal(1, 4, 3, 3),  # one name twice
        "state": normal(1, 4, 3),  # the site has the name of its dim
        "short": normal(1, 4, 2),  # the name with another length
        "chain_effect": normal(1, 4, 2),  # the name of a reserved dim
        "unnamed": normal(1, 4, 2, 5),
    }
    dims = {
        "transition": ("state", "state"),
        "state": ("state",),
        "short": ("level",),
        "chain_effect": ("chain",),
    }
    context = Context(None, {"state": ["lo", "mid", "hi"], "level": [1, 2, 3]}, dims)
    data = Posterior(Draws(values), None, context).to_arviz().posterior
    for name, value in values.items():
        assert len(set(data[name].dims)) == value.ndim
        np.testing.assert_array_equal(data[name], value)
    assert data["transition"].dims == ("chain", "draw", "state_2", "state_3")
    assert data["state_3"].values.tolist() == ["lo", "mid", "hi"]
    assert data["level"].values.tolist() == [0, 1]  # three labels do not fit
    assert data["chain_effect"].dims == ("chain", "draw", "chain_2")
    assert data["unnamed"].dims == ("chain", "draw", "unnamed_dim_0", "unnamed_dim_1")


def test_one_name_with_two_lengths():
    values = {"a": normal(1, 4, 3), "b": normal(1, 4, 2), "c": normal(1, 4, 3)}
    dims = dict.fromkeys(values, ("k",))
    data = Posterior(Draws(values), None, Context(None, {"k": [7, 8]}, dims)).to_arviz().posterior
    assert data["a"].dims[2] == data["c"].dims[2] == "k"
    assert data["b"].dims[2] == "k_2"
    assert data["k_2"].values.tolist() == [7, 8]


def test_complex_discrete_and_half_precision_sites(tmp_path):
    values = {
        "z": torch.complex(normal(1, 8, 2), normal(1, 8, 2, seed=1)),
        "k": torch.arange(8).reshape(1, 8),
        "flag": torch.arange(8).reshape(1, 8) > 3,
        "half": normal(1, 8).to(torch.bfloat16),
        "net/weight": normal(1, 8),
    }
    data = Posterior(Draws(values), None, Context(None, {}, {"z": ("w",)})).to_arviz()
    assert "z" not in data.posterior
    np.testing.assert_array_equal(data.posterior["z_imag"], values["z"].imag)
    assert data.posterior["z_real"].dims == ("chain", "draw", "w")
    assert data.posterior["k"].dtype.kind == "i"
    assert data.posterior["flag"].dtype.kind == "b"
    assert "net.weight" in data.posterior
    data.to_netcdf(str(tmp_path / "all.nc"))


# ------------------------------------------------------------------------------ data groups


def test_inputs_and_observations_of_a_pair():
    class Named(TinyProcess):
        def data_dims(self, data):
            return (("row", "feature"), ("row",))

    x, y = process_data(6)
    context = Context((x, y), {"row": list("abcdef")}, {})
    post = Posterior(Draws({"s": normal(1, 4)}), Named(), context)
    data = post.to_arviz()
    assert data.constant_data["X"].dims == ("row", "feature")
    assert data.observed_data["y"].coords["row"].values.tolist() == list("abcdef")
    np.testing.assert_array_equal(data.constant_data["X"], x)


def test_mappings_name_their_leaves_and_the_model_says_what_is_observed():
    class Program:
        observed = ("rating",)

    data = {
        "rating": torch.ones(3),
        "sigma": torch.ones(3),
        "nested": {"t": torch.zeros(2)},
        "n": 3,
    }
    groups = export_groups(Posterior(Draws({"s": normal(1, 4)}), Program(), Context(data)))
    assert set(groups["observed_data"].data_vars) == {"rating"}
    assert set(groups["constant_data"].data_vars) == {"sigma", "nested.t"}


def test_data_containers_have_no_group():
    post = Posterior(Draws({"s": normal(1, 4)}), None, Context(object()))
    assert set(export_groups(post)) == {"posterior"}


# ------------------------------------------------------------------------------ sampling


def test_closed_forms_are_sampled():
    data = normal_data()
    model = ConjugateNormal()
    post = model.condition(data)
    tree = post.to_datatree(draws=4000, rng=1)
    x = tree.posterior["mu"]
    assert x.shape == (1, 4000)
    mean, sd = (float(m) for m in model.moments(data))
    assert scipy.stats.kstest(x.values[0], scipy.stats.norm(mean, sd).cdf).pvalue > 1e-3
    assert "Closed" in tree.attrs["sampled"]
    # The log likelihood belongs to the same draws.
    expected = Normal(torch.tensor(x.values)[..., None], 1.0).log_prob(data)
    np.testing.assert_allclose(tree.log_likelihood["y"], expected)
    with pytest.raises(DataError, match="exporting a posterior without stored draws draws random"):
        post.to_arviz()


def test_fits_become_chains():
    class One(Model):
        def sites(self, data):
            return {"a": Site((), constraints.real)}

    one = torch.ones((), dtype=torch.float64)
    params = [{"a": {"loc": k * one, "log_scale": -5 * one}} for k in (0.0, 3.0)]
    post = Posterior(
        Fitted(MeanField(), params), One(), Context(None), sample_stats={"elbo": normal(2, 7)}
    )
    data = post.to_arviz(draws=100, rng=0)
    np.testing.assert_allclose(data.posterior["a"].mean("draw"), [0.0, 3.0], atol=0.01)
    assert data.sample_stats["elbo"].dims == ("chain", "elbo_dim_0")


def test_weighted_draws_are_resampled_systematically():
    """A draw of weight w appears floor(n w) or ceil(n w) times, with its own statistics."""
    values = torch.tensor([[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0]])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.0, 0.75, 0.0]])
    post = Posterior(
        Draws({"a": values}, weights.log()), None, sample_stats={"lp": 2 * values, "z": normal(2)}
    )
    data = post.to_arviz(draws=100, rng=0)
    a = data.posterior["a"].values
    assert a.shape == (2, 100)
    for chain in range(2):
        counts = [(a[chain] == v).sum() for v in values[chain].tolist()]
        assert np.abs(counts - 100 * weights[chain].numpy()).max() <= 1
    np.testing.assert_array_equal(data.sample_stats["lp"], 2 * a)
    assert data.sample_stats["z"].shape == (2,)
    np.testing.assert_allclose(data.posterior.attrs["kish_ess"], [1 / 0.3, 1 / 0.625], rtol=1e-6)
    assert "resampled" in data.posterior.attrs
    # In random order: sorted draws would look like one slow chain.
    assert abs(np.corrcoef(a[0, 1:], a[0, :-1])[0, 1]) < 0.4
    with pytest.raises(DataError, match=r"exporting weighted draws \(ArviZ has no weights\)"):
        post.to_arviz()


def test_systematic_resampling_is_unbiased():
    weights = torch.tensor([[0.07, 0.23, 0.33, 0.37]], dtype=torch.float64)
    post = Posterior(Draws({"k": torch.arange(4)[None]}, weights.log()), None)
    counts = sum(
        np.bincount(post.to_datatree(draws=3, rng=seed).posterior["k"].values[0], minlength=4)
        for seed in range(600)
    )
    # Counts of one comb vary less than a multinomial's, so the chi-square is conservative.
    assert scipy.stats.chisquare(counts, 1800 * weights[0].numpy()).pvalue > 1e-3


def test_populations():
    tensors = Population([torch.arange(3.0)], torch.zeros(1, 3))
    assert Posterior(tensors, None).to_arviz(draws=6, rng=0).posterior["particle"].shape == (1, 6)
    objects = Population([["a", "b"]], torch.zeros(1, 2))
    with pytest.raises(CapabilityError, match="ArviZ holds arrays.*post.particles.best"):
        Posterior(objects, None).to_arviz(rng=0)


def test_posterior_without_sites_and_bad_options():
    post = Posterior(Closed(), TinyProcess(), Context(process_data()))
    assert "observed_data" in post.to_arviz(rng=0).groups()
    with pytest.raises(DataError, match="expected draws >= 1, got 0"):
        post.to_arviz(draws=0, rng=0)


def test_the_same_seed_gives_the_same_export():
    post = ConjugateNormal().condition(normal_data())
    xr.testing.assert_identical(post.to_datatree(rng=4), post.to_datatree(rng=4))

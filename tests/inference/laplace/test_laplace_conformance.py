"""Laplace passes the conformance suite of samplers, and names what it cannot do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.fits import LineModel, line_data
from torch.distributions import constraints

import probkit as pk
from probkit.errors import CapabilityError, ConvergenceWarning, DataError, ShapeError
from probkit.files import storable
from probkit.inference import HMC, MAP, SVI, DeepEnsemble, FullRank, Laplace, LowRank, MeanField
from probkit.model import Model, Site
from probkit.models import BNN, LogNormal
from probkit.testing import ModelConformance, SamplerConformance

GENERATOR = torch.Generator().manual_seed(3)
X = torch.rand(12, 2, generator=GENERATOR).double() * 2 - 1
Y = (2 * X[:, 0]).sin() + X[:, 1] ** 2
NEW = torch.rand(4, 2, generator=GENERATOR).double()
ADAM = DeepEnsemble(members=1, steps=60, chunk=20, lr=0.05, fraction=1.0)


class TestGeneralModel(SamplerConformance):
    def problem(self):
        return Laplace(mode=MAP(jacobian=True, tolerance=1e-9)), LineModel(), line_data()

    def moments(self):
        mean, covariance, _ = LineModel().exact(line_data())
        return {"w": (mean, covariance.diagonal().sqrt())}


class TestNetwork(SamplerConformance):
    def problem(self):
        model = BNN(hidden=(4,), noise_var=LogNormal(-3.0, 0.5))
        return Laplace("kron", ADAM, tune=("layers", "noise")), model, (X, Y)


class _NetworkPredictions(ModelConformance):
    """What predictions of a Laplace posterior must hold."""

    structure = "kron"
    latents = ("f",)
    prior_draws = 10

    def problem(self):
        return BNN(hidden=(4,), noise_var=LogNormal(-3.0, 0.5), inputs=X), (X, Y), NEW

    def sampler(self):
        return Laplace(self.structure, ADAM, tune=("layers",))

    test_prior_draws_follow_the_density = None
    test_simulated_pairs_follow_the_log_joint = None
    test_minibatches_average_to_the_whole = None
    test_gradient_is_that_of_differences = None


class TestKronPredictions(_NetworkPredictions):
    pass


class TestFullPredictions(_NetworkPredictions):
    structure = "full"


class TestDiagPredictionsOfSeveralOutputs(_NetworkPredictions):
    structure = "diag"

    def problem(self):
        y = torch.stack([Y, 1 - Y], 1)
        return BNN(hidden=(4,), noise_var=0.1, outputs=2, inputs=X, standardize=True), (X, y), NEW

    test_prior_draws_have_the_shape_of_the_sites = None
    test_simulate_gives_one_data_set_for_each_value = None


@storable
@dataclass(frozen=True)
class Saddle(Model):
    """A density that rises along ``up`` and falls along ``down``; bounded by a box far away."""

    def sites(self, data):
        return {"down": Site((), constraints.real), "up": Site((2,), constraints.real, ("k",))}

    def log_joint(self, values, data, *, scale=1.0):
        return -values["down"].square() + 0.5 * values["up"][..., 1].square()


@storable
@dataclass(frozen=True)
class Kink(Model):
    """A finite density and gradient whose second derivative is infinite at zero."""

    def sites(self, data):
        return {"x": Site((), constraints.real), "y": Site((), constraints.real)}

    def log_joint(self, values, data, *, scale=1.0):
        return -values["x"].square() - values["y"].abs().pow(1.5)


def _fit(sampler, model=None, data=(X, Y), **options):
    return pk.infer(model or BNN(hidden=(4,), noise_var=0.1), data, sampler, rng=0, **options)


def test_a_point_that_is_no_maximum_is_refused_by_its_site():
    mode = {"down": torch.zeros(()).double(), "up": torch.zeros(2).double()}
    with pytest.raises(DataError, match=r"not positive definite .* -1, mostly along site 'up'"):
        _fit(Laplace(mode=mode), Saddle(), None)
    mode = {"x": torch.zeros(()).double(), "y": torch.zeros(()).double()}
    with pytest.raises(DataError, match="second derivatives of log_joint of Kink are not finite"):
        _fit(Laplace(mode=mode), Kink(), None)


def test_a_matrix_too_large_is_refused_before_any_work():
    model = BNN(hidden=(3000, 3000), noise_var=0.1)
    size = 3000 * 3 + 3000 * 3001 + 3001
    with pytest.raises(DataError, match=rf"{size} parameters \({32 * size**2} bytes; .*'kron'"):
        _fit(Laplace("full"), model)


def test_a_point_off_the_mode_warns():
    values = {"w": torch.tensor([3.0, 3.0]).double()}
    with pytest.warns(ConvergenceWarning, match="not the mode, a Newton step would gain"):
        post = _fit(Laplace(mode=values), LineModel(), line_data())
    mean, covariance, evidence = LineModel().exact(line_data())
    lost = values["w"] - mean
    gap = 0.5 * lost @ torch.linalg.inv(covariance) @ lost
    torch.testing.assert_close(post.sample_stats["gap"][0], gap)
    # The density is quadratic, so the evidence falls short by exactly that.
    torch.testing.assert_close(post.log_evidence.value[0] + gap, evidence)


def test_a_mode_may_come_from_a_posterior():
    ensemble = _fit(DeepEnsemble(members=4, steps=200, lr=0.05))
    best = int(ensemble.sample_stats["lp"].argmax())
    post = _fit(Laplace("kron", ensemble, tune=("prior",)))
    params = post.source.params[0]
    expected = torch.cat([ensemble.draws[n][0, best].flatten() for n in params["sites"]])
    assert torch.equal(params["loc"], expected)
    with pytest.raises(CapabilityError, match="expects a posterior of draws or a point estimate"):
        Laplace(mode=post)


def test_modes_are_checked():
    good = {"w": torch.zeros(2).double()}
    with pytest.raises(ShapeError, match=r"mode: expected site 'w' of shape \(2,\), got \(3,\)"):
        _fit(Laplace(mode={"w": torch.zeros(3).double()}), LineModel(), line_data())
    with pytest.raises(ShapeError, match="mode: expected site 'w' .* got nothing"):
        _fit(Laplace(mode={"v": good["w"]}), LineModel(), line_data())
    with pytest.raises(DataError, match="site 'w': a value lies outside its support"):
        _fit(Laplace(mode={"w": good["w"] / 0}), LineModel(), line_data())
    with pytest.raises(CapabilityError, match="one point .MAP, DeepEnsemble., got HMC"):
        _fit(Laplace(mode=HMC(draws=5, warmup=5)), LineModel(), line_data())


def test_structures_that_need_layers_say_so():
    for structure in ("kron", "last_layer"):
        with pytest.raises(CapabilityError, match="LineModel lacks layer_names, .* 'full' or"):
            _fit(Laplace(structure), LineModel(), line_data())
    with pytest.raises(CapabilityError, match="curvature='ggn'. needs a network with layers"):
        _fit(Laplace(curvature="ggn"), LineModel(), line_data())
    with pytest.raises(CapabilityError, match="needs the Gauss-Newton matrix of a network"):
        _fit(Laplace(tune=("prior",)), LineModel(), line_data())
    with pytest.raises(CapabilityError, match="cannot tune the noise of BNN: .* a site"):
        _fit(Laplace("kron", ADAM, tune=("noise",)))


def test_options_are_checked():
    with pytest.raises(DataError, match="structure: expected one of 'full', .* got 'block'"):
        Laplace("block")
    with pytest.raises(DataError, match="curvature: expected 'ggn' or 'auto' with struct"):
        Laplace("kron", curvature="hessian")
    with pytest.raises(DataError, match="tune: expected one of .*'noise', got 'x'"):
        Laplace(tune=("x",))
    with pytest.raises(DataError, match="expected 'layers' or 'prior', got both"):
        Laplace(tune=("layers", "prior"))
    with pytest.raises(DataError, match="tune_steps: expected a whole number >= 1, got 0"):
        Laplace(tune_steps=0)


def test_guides_name_the_structure():
    assert _fit(Laplace(mode=ADAM, tune=("prior",)), guide=MeanField()).attrs["structure"] == "diag"
    assert _fit(Laplace(mode=ADAM, tune=("prior",)), guide=FullRank()).attrs["structure"] == "full"
    with pytest.raises(CapabilityError, match="expected guide=MeanField.. or FullRank.., got LowR"):
        _fit(Laplace(mode=ADAM), guide=LowRank())


def test_its_guide_cannot_be_trained():
    post = _fit(Laplace("kron", ADAM, tune=("prior",)))
    with pytest.raises(CapabilityError, match="LaplaceNormal has no starting parameters"):
        _fit(SVI(steps=2), guide=post.source.guide)


def test_joint_predictions_of_many_rows_are_refused_before_they_are_tried():
    post = _fit(Laplace("kron", ADAM, tune=("prior",)), BNN(hidden=(400, 400), noise_var=0.1))
    rows = torch.zeros(10_000_000, 2).double()
    with pytest.raises(DataError, match="joint prediction of 10000000 rows"):
        post.predict(rows, joint=True)

"""Networks trained on models whose posteriors are known."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from support.amortised import Line

import probkit as pk
from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.inference import Direct, ImportanceSampling
from probkit.model import Batch
from probkit.models.pfn import PFN, GPPrior, PFNGuide, PFNSize, amortize
from probkit.models.pfn.data_sets import as_sets, one_set, waves
from probkit.testing import GuideConformance, ModelConformance


@pytest.fixture(scope="module")
def briefly(normal_mean):
    """A network trained for a second: its shapes are right, its numbers rough."""
    return amortize(normal_mean, "tiny", steps=40, bars=40, rng=0)


@pytest.fixture(scope="module")
def brief_guide(line):
    return amortize(line, "tiny", target="latents", steps=20, bars=30, rng=0)


# ------------------------------------------------------------------------- what training achieves


@pytest.mark.slow
def test_predictions_of_a_conjugate_model_are_exact_up_to_a_fiftieth(normal_mean):
    net = amortize(normal_mean, "tiny", steps=2500, bars=120, batch=64, rng=0)
    _, y = normal_mean.sample_dataset(2000, rng=99)
    x = torch.arange(10.0)[None, :, None].expand(2000, 10, 1)
    generator = torch.Generator().manual_seed(1)
    gaps = []
    for n in (0, 1, 3, 6, 9):
        law = net.predict_sets(x[:, :n], y[:, :n], x[:, 9:])
        mean, sd = normal_mean.posterior(y[:, :n]) if n else (torch.zeros(2000), 1.0)
        exact = torch.distributions.Normal(mean, math.sqrt(sd**2 + 0.25**2))
        draws = mean + exact.stddev * torch.randn(200, 2000, generator=generator)
        gaps.append((exact.log_prob(draws) - law.log_prob(draws[..., None])[..., 0]).mean().item())
    assert sum(gaps) / len(gaps) < 0.02
    assert min(gaps) > -0.002  # a KL divergence; 400 000 draws know it to a thousandth


@pytest.mark.slow
def test_a_latent_guide_finds_the_posterior(line):
    guide = amortize(line, "tiny", target="latents", steps=2000, bars=80, batch=48, rng=0)
    _, (x, y) = line.sample_dataset(4, rng=5)
    shifts, widths = [], []
    for k in range(4):
        data = (x[k], y[k])
        post = pk.infer(line, data, Direct(), guide=guide, rng=0)
        drawn = post.sample(2000, rng=1)
        exact = pk.infer(line, data, ImportanceSampling(20_000), guide=guide, rng=2)
        truth = exact.sample(4000, rng=3)
        weights = exact.log_weights.flatten().softmax(0)
        assert 1 / weights.square().sum() > 0.1 * len(weights)  # a usable proposal
        for values in (drawn, truth):
            values["noise_var"] = values["noise_var"].log()[:, None]
        for name in ("coef", "noise_var"):
            a, b = drawn[name], truth[name]
            shifts.append(((a.mean(0) - b.mean(0)).abs() / b.std(0)).mean())
            widths.append((a.std(0) / b.std(0)).log().abs().mean())
        # level and slope of a line on [0, 1.5] depend on one another
        corr = [torch.corrcoef(values["coef"].T)[0, 1] for values in (drawn, truth)]
        assert corr[1] < -0.6
        assert corr[0] < -0.3  # a product of margins would stay within 0.1 of zero
    # the prior is five to ten times as wide; a short training leaves the law too wide yet
    assert sum(shifts) / len(shifts) < 0.75
    assert sum(widths) / len(widths) < 0.75


# ------------------------------------------------------------------------------------- predictions


def test_a_network_is_a_model_of_its_own(briefly, normal_mean):
    _, y = normal_mean.sample_dataset(1, rng=1)
    x = torch.arange(10.0)[:, None]
    post = pk.infer(briefly, (x[:6], y[0, :6]), rng=0)
    law = post.predict(x[6:])
    assert law.mean.shape == (4,)
    assert law.quantile([0.1, 0.5, 0.9]).shape == (3, 4)
    assert law.log_prob(y[0, 6:]).shape == (4,)
    assert law.sample(5, rng=0).shape == (5, 4)
    batched = post.predict(x[6:].expand(2, 3, 4, 1))
    assert batched.mean.shape == (2, 3, 4)
    assert torch.allclose(batched.mean[1, 2], law.mean, atol=1e-5)


def test_the_order_of_rows_has_no_effect(briefly, normal_mean):
    _, y = normal_mean.sample_dataset(1, rng=1)
    x = torch.arange(10.0)[:, None]
    order = torch.tensor([3, 0, 2, 1])
    one = pk.infer(briefly, (x[:4], y[0, :4]), rng=0).predict(x[4:])
    other = pk.infer(briefly, (x[:4][order], y[0, :4][order]), rng=0).predict(x[4:])
    assert torch.allclose(one.mean, other.mean, atol=1e-5)


def test_joint_draws_agree_with_the_margin_of_the_first_row(briefly, normal_mean):
    _, y = normal_mean.sample_dataset(1, rng=1)
    x = torch.arange(10.0)[:, None]
    post = pk.infer(briefly, (x[:2], y[0, :2]), rng=0)
    drawn = briefly.sample_jointly(post, x[2:5], 4000, rng=torch.Generator().manual_seed(0))
    assert drawn.shape == (4000, 3)
    u = post.predict(x[2:5]).cdf(drawn)[:, 0]
    assert abs(u.mean() - 0.5) < 4 / math.sqrt(12 * 4000)  # four standard errors


def test_training_is_reproducible(normal_mean):
    one, other = (amortize(normal_mean, "tiny", steps=5, bars=20, rng=3) for _ in range(2))
    for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_network_survives_its_file(briefly, tmp_path):
    path = tmp_path / "net.safetensors"
    briefly.save(path)
    back = PFN.load(path, prior="normal mean")
    x, y = torch.arange(8.0)[:, None], torch.linspace(-1, 1, 8)
    one = pk.infer(briefly, (x[:5], y[:5]), rng=0).predict(x[5:])
    other = pk.infer(back, (x[:5], y[:5]), rng=0).predict(x[5:])
    assert torch.allclose(one.log_prob(y[5:]), other.log_prob(y[5:]), atol=1e-2)
    assert back.card["training"] == dict(briefly.card["training"])
    with pytest.raises(DataError, match="trained on the prior 'normal mean', expected 'other'"):
        PFN.load(path, prior="other")
    with pytest.raises(DataError, match="holds no guide"):
        PFNGuide.load(path)


@functools.cache
def small_process():
    return amortize(GPPrior(rows=10), "tiny", steps=30, bars=60, rng=0)


class TestPredictorConformance(ModelConformance):
    def problem(self):
        x = torch.linspace(0, 1, 6)[:, None]
        return small_process(), (x, (3 * x[:, 0]).sin()), torch.tensor([[0.15], [0.5], [0.9]])


# ------------------------------------------------------------------------------------------ guides


def test_the_density_of_a_guide_is_that_of_its_draws(brief_guide, line):
    _, (x, y) = line.sample_dataset(1, rng=4)
    data = (x[0], y[0])
    values, log_q = brief_guide.sample({}, line, Batch(data), 50, rng=0)
    assert torch.allclose(log_q.total(), brief_guide.log_prob(line, data, values), atol=2e-3)
    # and it integrates to one: importance weights of a law whose integral is known
    mean = values["coef"].mean(0)
    wide = torch.distributions.Normal(mean, 3.0)
    scale = torch.distributions.LogNormal(-2.0, 2.0)
    with pk.scope(rng=1):
        other = {"coef": wide.sample((5_000,)), "noise_var": scale.sample((5_000,))}
    log_p = wide.log_prob(other["coef"]).sum(-1) + scale.log_prob(other["noise_var"])
    weights = (brief_guide.log_prob(line, data, other) - log_p).exp()
    error = weights.std() / math.sqrt(len(weights))
    assert error < 0.1
    assert abs(weights.mean() - 1) < 4 * error


@functools.cache
def hardly_trained():
    return amortize(Line(), "tiny", target="latents", steps=5, bars=30, rng=0)


class TestGuideConformance(GuideConformance):
    def problem(self):
        model = Line()
        _, (x, y) = model.sample_dataset(1, rng=4)
        return hardly_trained(), model, (x[0], y[0])


def test_a_guide_gives_posteriors_and_proposals(brief_guide, line, tmp_path):
    _, (x, y) = line.sample_dataset(1, rng=4)
    post = pk.infer(line, (x[0], y[0]), Direct(), guide=brief_guide, rng=0)
    drawn = post.sample(7, rng=0)
    assert drawn["coef"].shape == (7, 2)
    assert (drawn["noise_var"] > 0).all()
    with pytest.warns(NumericsWarning, match="effective draws of 500"):  # hardly trained
        weighted = pk.infer(line, (x[0], y[0]), ImportanceSampling(500), guide=brief_guide, rng=0)
    assert weighted.log_evidence.value.isfinite().all()
    assert brief_guide.coordinate_laws((x[0], y[0])).batch_shape == (3,)


def test_a_pyro_program_is_compiled_as_well():
    import pyro
    import pyro.distributions as dist

    def program(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(x)):
            pyro.sample("obs", dist.Normal(slope * x, 0.3), obs=y)

    x = torch.linspace(-1, 1, 8)
    model = pk.FromPyro(program, observed={"y": "obs"}, inputs={"x": x})

    def rows(data):
        return data["x"], data["y"]

    guide = amortize(
        model, "tiny", target="latents", steps=150, bars=40, batch=32, encode=rows, rng=0
    )
    post = pk.infer(model, {"x": x, "y": 0.8 * x}, Direct(), guide=guide, rng=0)
    assert abs(post.sample(500, rng=0)["slope"].mean() - 0.8) < 0.4  # the prior's mean is 0
    net = amortize(model, "tiny", steps=20, bars=30, encode=rows, rng=0)
    law = pk.infer(net, {"x": x[:5], "y": x[:5]}, rng=0).predict(x[5:, None])
    assert law.mean.shape == (3,)


def test_a_guide_survives_its_file(brief_guide, line, tmp_path):
    path = tmp_path / "guide.safetensors"
    brief_guide.save(path)
    back = PFNGuide.load(path, prior="noisy line")
    values, (x, y) = line.sample_dataset(1, rng=4)
    one, other = (g.log_prob(line, (x[0], y[0]), values) for g in (brief_guide, back))
    assert torch.allclose(one, other, atol=0.05)
    with pytest.raises(DataError, match="holds no predictor of rows"):
        PFN.load(path)


def test_a_guide_of_another_model_is_refused(brief_guide, normal_mean):
    with pytest.raises(CapabilityError, match=r"trained for sites \['coef', 'noise_var'\]"):
        pk.infer(normal_mean, torch.zeros(10), Direct(), guide=brief_guide, rng=0)


# --------------------------------------------------------------------------------------- bad input


def test_bad_options(normal_mean):
    with pytest.raises(DataError, match="target: expected 'predictions' or 'latents'"):
        amortize(normal_mean, target="both", rng=0)
    with pytest.raises(DataError, match="network: expected a PFNSize or one of 'tiny'"):
        amortize(normal_mean, "huge", rng=0)
    with pytest.raises(CapabilityError, match="object lacks sample_dataset, sites"):
        amortize(object(), rng=0)
    with pytest.raises(DataError, match="fewest: expected 0 to 10 rows, got 11"):
        amortize(normal_mean, "tiny", target="latents", fewest=11, rng=0)
    size = PFNSize(16, 1, 2)
    net = amortize(normal_mean, size, steps=1, bars=10, rng=0)
    assert net.network.size.width == 16


def test_bad_data(briefly):
    x, y = torch.arange(4.0)[:, None], torch.zeros(4)
    with pytest.raises(DataError, match="y must be finite, got nan at row 1"):
        pk.infer(briefly, (x, torch.tensor([0.0, math.nan, 0, 0])), rng=0)
    with pytest.raises(ShapeError, match=r"expected x \[row, feature=1\], got \(4, 2\)"):
        pk.infer(briefly, (x.expand(4, 2), y), rng=0)
    with pytest.raises(ShapeError, match=r"expected y \[row=4\]"):
        pk.infer(briefly, (x, y[:3]), rng=0)
    post = pk.infer(briefly, (x, y), rng=0)
    with pytest.raises(CapabilityError, match="a PFN predicts new observations only"):
        post.predict(x, site="f")
    with pytest.raises(CapabilityError, match="have no closed form|has no closed form"):
        post.predict(x, joint=True)
    with pytest.warns(NumericsWarning, match="12 rows, but the network has seen at most 9"):
        pk.infer(briefly, (torch.arange(12.0)[:, None], torch.zeros(12)), rng=0)
    with pytest.raises(CapabilityError, match="integrates its hyper-parameters out"):
        briefly.condition((x, y), {"scale": torch.ones(())})


def test_forms_of_data():
    y = torch.zeros(5, 3)
    assert as_sets(y, 5)[0].shape == (5, 3, 1)
    assert as_sets((torch.zeros(3, 2), y), 5)[0].shape == (5, 3, 2)
    assert as_sets((torch.zeros(5, 3, 2), y), 5)[0].shape == (5, 3, 2)
    pair = as_sets({"a": y}, 5, lambda data: (torch.zeros(3), data["a"]))
    assert pair[0].shape == (5, 3, 1)
    with pytest.raises(CapabilityError, match="pass encode="):
        as_sets({"a": y}, 5)
    with pytest.raises(ShapeError, match=r"expected y \[data set=4, row\]"):
        as_sets(y, 4)
    with pytest.raises(ShapeError, match=r"expected x \[row, feature\]"):
        as_sets((torch.zeros(4, 2), y), 5)
    with pytest.raises(DataError, match="expected one data set as a pair"):
        one_set("data", 1)


def test_waves():
    z = torch.tensor([[0.5, -1.0]])
    assert waves(z, 0).equal(z)
    features = waves(z, 2)
    assert features.shape == (1, 10)
    assert features[0, 2].item() == pytest.approx(math.sin(math.pi / 4))
    assert features[0, 3].item() == pytest.approx(math.sin(math.pi / 2))

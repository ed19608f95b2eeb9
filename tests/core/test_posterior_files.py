"""Files of posteriors: round trips, fresh processes, all registered classes, errors, old files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributions as td
from support.models import ConjugateNormal, TinyProcess, normal_data, process_data
from torch import Tensor
from torch.distributions import constraints, transform_to

import probkit as pk
from probkit import files
from probkit.errors import DataError
from probkit.files import pack, read_folder, register, storable, unpack, write_folder
from probkit.inference import MAP, MeanField
from probkit.inference.laplace.covariance import (
    DiagonalCovariance,
    FullCovariance,
    KroneckerCovariance,
)
from probkit.inference.laplace.curvature import (
    DiagonalCurvature,
    FullCurvature,
    KroneckerCurvature,
)
from probkit.inference.sgmcmc.schedules import Constant, Cyclical, PolynomialDecay
from probkit.kernels import NNGPKernel
from probkit.models import (
    DeepKernelMachine,
    KroneckerSBL,
    ScaleMixtureClassifier,
    ScaleMixtureNetwork,
    SparseRegression,
)
from probkit.models.arphmm import ARPHMM, Sequences
from probkit.models.arphmm.rul import (
    ConformalLife,
    Failure,
    HealthIndicator,
    LifeRegression,
    TrailingFeatures,
)
from probkit.models.sbl import ComplexNormal
from probkit.posterior import Context, Evidence, Posterior
from probkit.sources import Closed, Draws, Fitted, Population

TESTS = Path(__file__).parents[1]
DATA = TESTS / "data" / "posterior-v1"


def equal(a, b):
    """Compare two trees, tensors bit for bit and with their dtypes."""
    if isinstance(a, Tensor):
        same = isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float) and math.isnan(a):
        return isinstance(b, float) and math.isnan(b)
    packer = files._BY_CLASS.get(type(a))
    if packer is not None:
        return type(a) is type(b) and equal(packer.to_tree(a), packer.to_tree(b))
    return type(a) is type(b) and a == b


# ------------------------------------------------------------------------------ trees


TREE = {
    "tensors": [
        torch.zeros(0, 3),
        torch.tensor(1.5),
        torch.arange(6).reshape(2, 3).T,
        torch.tensor([True, False]),
        torch.tensor([1 + 2j], dtype=torch.complex128),
        torch.tensor([1 - 2j], dtype=torch.complex64),
        torch.ones(2, dtype=torch.bfloat16),
        torch.tensor([math.nan, math.inf, -math.inf]),
    ],
    "numbers": (1, 2.5, math.inf, -math.inf, math.nan, True, None, "text"),
    "a.b": torch.tensor(1.0),
    "a": {"b": torch.tensor(2.0)},
    "keys": {1: torch.tensor(1.0), "1": torch.tensor(2.0), (2, 3): "tuple", "__probkit__": "tag"},
    "torch": (torch.float64, torch.device("cpu"), torch.Size([2, 3])),
    "empty": ({}, [], ()),
}


def test_trees_survive(tmp_path):
    write_folder(tmp_path / "x", "posterior", TREE)
    assert equal(read_folder(tmp_path / "x", "posterior"), TREE)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"posterior.json", "tensors.safetensors"}


def test_the_header_is_strict_json_and_holds_no_code(tmp_path):
    write_folder(tmp_path, "posterior", TREE)
    text = (tmp_path / "posterior.json").read_text()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    header = json.loads(text, parse_constant=refuse)
    assert header["format"] == files.FORMAT
    assert "pickle" not in text


def test_aliased_and_strided_tensors_are_stored_apart(tmp_path):
    base = torch.arange(10.0)
    write_folder(tmp_path, "posterior", {"a": base[::2], "b": base[1:4], "c": base})
    back = read_folder(tmp_path, "posterior")
    back["a"][0] = 99
    assert back["c"][0] == 0
    assert torch.equal(back["b"], base[1:4])


# ------------------------------------------------------------------------------ sources


def stated(source, model=None):
    return Posterior(
        source,
        model or ConjugateNormal(prior_sd=3.0),
        Context(normal_data(4), {"observation": list("abcd")}, {"mu": ()}),
        marginals={"mu": td.Normal(torch.tensor(1.0), torch.tensor(2.0))},
        log_evidence=Evidence(torch.tensor([-3.25]), "exact"),
        sample_stats={"lp": torch.zeros(1, 2)},
        attrs={"seed": 5, "seconds": 1.5, "complete": True, "options": {"steps": "3"}},
    )


SOURCES = {
    "draws": Draws({"mu": torch.tensor([[1.0, 2.0]])}),
    "weighted draws": Draws({"mu": torch.tensor([[1.0, 2.0]])}, torch.tensor([[0.0, -1.0]])),
    "closed": Closed(
        {"mu": td.Normal(torch.tensor(0.0), torch.tensor(1.0))}, state={"L": torch.eye(2)}
    ),
    "mixed closed": Closed(
        {"mu": td.Normal(torch.zeros(2, 3), torch.ones(2, 3))},
        {"h": torch.arange(6.0).reshape(2, 3)},
        None,
        torch.zeros(2, 3),
    ),
    "fitted": Fitted(
        MeanField(0.2), [{"mu": {"loc": torch.tensor(1.0), "log_scale": torch.tensor(0.0)}}]
    ),
    "tensor particles": Population([torch.arange(3.0)], torch.tensor([[0.0, -1.0, -2.0]])),
    "object particles": Population([["a b", "c"], ["d", ""]], torch.zeros(2, 2)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_survives(name, tmp_path):
    post = stated(SOURCES[name])
    post.save(tmp_path)
    back = pk.load(tmp_path)
    assert type(back.source) is type(post.source)
    for field in ("source", "model", "context", "log_evidence", "sample_stats", "attrs"):
        assert equal(getattr(back, field), getattr(post, field)), field
    assert equal(back.marginals["mu"], post.marginals["mu"])
    one, other = post.sample(5, rng=1), back.sample(5, rng=1)
    assert equal(dict(one), dict(other))


def test_saving_again_replaces(tmp_path):
    stated(SOURCES["draws"]).save(tmp_path)
    stated(SOURCES["closed"]).save(tmp_path)
    assert isinstance(pk.load(tmp_path).source, Closed)


def test_ragged_marginals(tmp_path):
    laws = (td.Normal(torch.zeros(2), 1.0), td.Normal(torch.zeros(3), 2.0))
    Posterior(Closed(), ConjugateNormal(), marginals={"state": laws}).save(tmp_path)
    back = pk.load(tmp_path).marginals["state"]
    assert [law.batch_shape for law in back] == [(2,), (3,)]


# ------------------------------------------------------------------------------ fresh process


FRESH = """
import json, sys, torch
import probkit as pk

def predictions(folder, d):
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None].expand(5, d)
    law = pk.load(folder).predict(x)
    return [law.mean.tolist(), law.variance.tolist()]

family = predictions(sys.argv[2], 1)  # needs no import: probkit knows its own classes
sys.path.append(sys.argv[1])
import support.models
print(json.dumps([family, predictions(sys.argv[3], 2)]))
"""


def family_posterior(**options):
    from probkit.inference import Direct
    from probkit.kernels import NNGPKernel
    from probkit.models import ScaleMixtureNNGP

    x = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    y = x[:, 0].sin() + 0.1 * torch.cos(9 * x[:, 0])
    return pk.infer(ScaleMixtureNNGP(NNGPKernel(), **options), (x, y), Direct(), rng=0)


def test_a_fresh_process_predicts_the_same(tmp_path):
    posts = {"family": family_posterior(), "own": TinyProcess("student").condition(process_data())}
    expected = []
    for (name, post), d in zip(posts.items(), (1, 2), strict=True):
        post.save(tmp_path / name)
        x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None].expand(5, d)
        law = post.predict(x)
        expected.append([law.mean.tolist(), law.variance.tolist()])
    run = subprocess.run(
        [sys.executable, "-c", FRESH, str(TESTS), *(str(tmp_path / name) for name in posts)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(run.stdout) == expected


# ------------------------------------------------------------------------------ registered classes


def sample_law(cls):
    """Build any distribution from its constraints, with batch shape [2] (or event shape [2])."""
    if issubclass(cls, td.Independent):
        return cls(td.Normal(torch.zeros(2, 3).double(), 1.0), 1)
    if issubclass(cls, td.Uniform):
        return cls(torch.zeros(2), torch.tensor([1.0, 3.0]))
    if issubclass(cls, td.LowRankMultivariateNormal):
        return cls(torch.zeros(3), torch.ones(3, 1), torch.ones(3))
    if issubclass(cls, td.MultivariateNormal):
        return cls(torch.ones(2), scale_tril=torch.tensor([[1.0, 0.0], [0.5, 2.0]]))
    arguments = {}
    for name, constraint in cls.arg_constraints.items():
        if name == "probs" and "logits" in cls.arg_constraints:
            continue
        size = (2,) * max(1, constraint.event_dim)
        if name == "output_scale":
            continue
        if name in ("df", "amplitude") and cls.__name__.startswith("Multi"):
            size = ()
        arguments[name] = transform_to(constraint)(torch.full(size, 0.3).double())
    return cls(**arguments)


def laws():
    from probkit.distributions import register_storables

    register_storables()
    return {
        packer.name: cls
        for cls, packer in files._BY_CLASS.items()
        if issubclass(cls, td.Distribution) and not packer.name.startswith("Scale")
        if not packer.name.startswith("scale.")
        if packer.name not in ("WeightLaw", "ComplexNormal")  # in examples()
    }


@pytest.mark.parametrize("name", laws())
def test_every_law_survives(name):
    law = sample_law(laws()[name])
    back = unpack(*pack(law))
    assert type(back) is type(law)
    with pk.scope(rng=3):
        value = law.sample()
    assert torch.equal(back.log_prob(value), law.log_prob(value))
    assert back.batch_shape == law.batch_shape


def examples():
    """Objects that together hold every registered class that is no plain distribution."""
    import gpytorch

    from probkit.distributions import ScaledMultivariateNormal
    from probkit.inference import Fixed
    from probkit.inference.hmc import Start
    from probkit.kernels import NNGPKernel
    from probkit.models import (
        BurrXII,
        DiscreteHMM,
        Gamma,
        HalfCauchy,
        InverseGamma,
        LinearGaussian,
        LogNormal,
        PointMass,
    )
    from probkit.models.nngp_data import Groups
    from probkit.models.scale_mixture import PaddedStats, spectral_stats
    from probkit.models.standardise import Scaling

    for name, source in SOURCES.items():
        yield name, stated(source).source
    yield "context", Context(torch.ones(2), {"a": ["x", "y"]}, {"s": ("a",)})
    yield "evidence", Evidence(torch.zeros(2), "bound")
    yield "fixed", Fixed(MeanField(), {"mu": {}})
    yield "marginal", pk.Marginal(family_posterior().model)
    yield "kernel", gpytorch.kernels.ScaleKernel(NNGPKernel(depth=2))
    laws = (InverseGamma(2.0, 3.0), Gamma(2.0, 3.0), LogNormal(0.0, 1.0), BurrXII(2.0, 1.0))
    yield "scale laws", [*laws, HalfCauchy(1.5), PointMass()]
    yield "family", vars(family_posterior())
    yield "standardised", vars(family_posterior(standardize=True))
    yield "quadrature", vars(family_posterior(scale=BurrXII(2.0, 1.0)))
    yield "noise outside", vars(family_posterior(noise_in="outside", scale=BurrXII(2.0, 1.0)))
    stats = spectral_stats(torch.eye(2).double(), torch.ones(2, 1).double(), 0.1)
    yield "groups of rows", (Groups.of(["a", 3, "a"]), PaddedStats(stats, torch.ones(()).double()))
    one = torch.ones(2)
    yield "scaling", Scaling(one, one, torch.tensor(0.5), torch.tensor(2.0))
    yield "scaled", ScaledMultivariateNormal(one, torch.eye(2), torch.tensor([1.0, 2.0]))
    yield "other law", vars(family_posterior(scale=td.Weibull(2.0, 1.5)))
    yield "warm start", Start({"mu": torch.zeros(3, dtype=torch.float64)})
    yield "linear Gaussian", LinearGaussian(0.7, 0.04, 1.0, 1.0)
    rows = [[0.9, 0.1], [0.2, 0.8]]
    yield "chain of symbols", DiscreteHMM([0.5, 0.5], rows, rows)
    yield from switching_examples()
    yield from sparse_examples()
    yield from network_examples()
    yield from fitted_network_examples()
    yield from slate_examples()
    yield from tensor_examples()
    yield from language_examples()
    yield from rating_examples()


def slate_examples():
    """Slate models, their logs, and what an earlier posterior says."""
    from probkit.models.slates import SlateGRU, SlateLog
    from probkit.models.slates.model import Carried

    log = SlateLog([[[1, 3, 4], [1, 4, 5]]], [[4, 1]], labels={"user": ["ann"]})
    one = torch.ones(log.n_items, 2)
    yield "slates", log
    yield "slate model", SlateGRU(log.n_items, groups=log.groups, dim=2)
    yield "carried", Carried({"gamma": {"loc": one[0, 0], "scale": one[0, 0]}}, one, one)


def fitted_network_examples():
    """Prior-data fitted networks, untrained: they are stored all the same."""
    from probkit.models.pfn import (
        PFN,
        CurveNormalizer,
        CurvePrior,
        Curves,
        DistributionTransformer,
        GPPrior,
        LearningCurvePFN,
        MixturePriors,
        NormalMixture,
        PFNGuide,
        PFNNetwork,
        PFNSize,
    )
    from probkit.models.pfn.data_sets import SetScaling
    from probkit.models.pfn.distribution_transformer import TransformerShape, _Decoder

    generator = torch.Generator().manual_seed(0)
    network = PFNNetwork(PFNSize(8, 1, 2, 3), generator=generator)
    one, borders = torch.ones(1), torch.arange(4.0)
    scaling = SetScaling(one, one, one[0], one[0])
    yield "predictor", PFN(network, borders, scaling, "toy", 5)
    yield "amortised guide", PFNGuide(network, borders, scaling, one, one, ("mu",), "toy")
    yield "priors", [CurvePrior(), GPPrior(), MixturePriors().draw(2, rng=generator)]
    yield "mixture", NormalMixture.univariate([1.0], [0.0], [1.0])
    decoder = _Decoder(TransformerShape(8, 1, 2), generator=generator)
    yield "distribution transformer", DistributionTransformer(decoder)
    yield "curves", Curves(None, [0.1, 0.2], CurveNormalizer.accuracy())
    yield "learning curves", LearningCurvePFN(network, borders, {})


def switching_examples():
    """Switching autoregressions, their data, and what is fitted for remaining lives."""
    y = torch.arange(12.0, dtype=torch.float64).reshape(6, 2).sin()
    model = ARPHMM(2, 1, features=2, failure=Failure(state=1))
    yield "rows of lags", model.prepare(Sequences([y], labels=[torch.ones(6, 2)]))
    values = model.sample_prior(1, rng=0)
    yield (
        "life by state",
        LifeRegression(model, values, TrailingFeatures(), torch.ones(2, 3), torch.ones(2), 9.0),
    )
    yield "health", HealthIndicator(torch.zeros(2), torch.ones(2), torch.ones(3))
    yield "calibration", ConformalLife(torch.linspace(0, 1, 5))


def sparse_examples():
    """Sparse models, and the laws of their weights."""
    eye = torch.eye(3, dtype=torch.float64)
    y = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    real = SparseRegression(eye, noise_var=0.1)
    post = pk.infer(real, y, rng=0)
    yield "sparse", real
    yield "weights", post.source.joint["weights"]
    yield "complex weights", ComplexNormal(torch.ones(2) + 1j, torch.ones(2))
    yield "Kronecker", KroneckerSBL([eye, eye], noise_var=0.1)


def network_examples():
    """Networks: curvatures, covariances, schedules, classifiers."""
    one, eye = torch.ones(2), torch.eye(2)
    yield "diagonal covariance", DiagonalCovariance(one)
    yield "full covariance", FullCovariance(eye, torch.tensor(0.0))
    yield "Kronecker covariance", KroneckerCovariance([eye], [eye], [one], torch.tensor(0.0))
    yield "diagonal curvature", DiagonalCurvature([one], [one])
    yield "Kronecker curvature", KroneckerCurvature([one], [eye], [one], [eye], [one])
    yield "full curvature", FullCurvature(eye, (2,), one)
    yield "constant steps", Constant(0.1)
    yield "smaller steps", PolynomialDecay(0.1)
    yield "cycles", Cyclical(0.1)
    kernel = NNGPKernel(depth=1)
    yield "kernel machine", DeepKernelMachine(kernel)
    yield "network", ScaleMixtureNetwork(kernel)
    classifier = ScaleMixtureClassifier(kernel, inducing=2)
    yield "classifier", classifier
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    yield "labelled", classifier.prepare((x, torch.tensor([0, 0, 0, 1, 1, 1])))


def tensor_examples():
    """Functional tensors: data, kernels in state-space form, models."""
    from probkit.kernels import Matern
    from probkit.models.funbat import (
        BernoulliNoise,
        FunBaT,
        LogWarp,
        PoissonNoise,
        StudentTNoise,
        TensorData,
        additive,
    )

    space = Matern(1.5, lengthscale=0.3).state_space()
    yield "state space", space
    yield "part of it", space.parts[0]
    yield "tensor", TensorData([[0.0, 0.5], [1.0, 0.5]], [1.0, 2.0], ("time", "place"))
    noisy = FunBaT(kind="cp", masks=additive(2), noise=StudentTNoise(), warp=LogWarp(0.0, 1.0))
    yield "masked tensor", noisy
    yield "counted tensor", FunBaT((2, 3), noise=PoissonNoise(level=3.0))
    yield "labelled tensor", FunBaT(2, noise=BernoulliNoise(offset=0.5))


def language_examples():
    """Language models that are whole in a file, and what they generate from."""
    from probkit.models.language import GuidedGeneration, Law, MarkovLM, Partial, Prefix, Steps
    from probkit.models.language.potentials import RegexPotential

    lm = MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], end=[0.0, 0.1], symbols=["a", "\n"])
    steps = Steps(stop=(), max_tokens=2, max_steps=3, final="\n")
    hot = Law(temperature=2.0)
    yield "guided", GuidedGeneration(lm, RegexPotential("a+"), steps=steps, proposal=hot)
    dead = {"log_potential": -math.inf, "log_increment": -math.inf}
    yield "partial", [Partial(lm.start("go")), Partial(lm.start("go"), **dead, reason="failed")]
    yield "chain of letters", lm
    yield "server", server_example()
    yield "prefix", [lm.start("go"), Prefix((("user", "hi"),), (1, 2), 1, "b")]


def server_example():
    """A language model behind HTTP, probed; nothing is sent to store it."""
    from probkit.models.language import Budget, Endpoint, OpenAILM, Prices, Retries, ServerProfile

    raw = Endpoint("completions", prefill="raw", logprobs=True, law_of_logprobs="raw", seed=True)
    return OpenAILM(
        "http://127.0.0.1:8000/v1",
        "a-model",
        budget=Budget(money=1.0),
        prices=Prices(0.5, 2.0, cached=0.1),
        retries=Retries(most=2),
        extra_body={"reasoning_effort": "none"},
        profile=ServerProfile("OpenAI-compatible", "a-model", 4096, raw, notes=("seen",)),
    )


def rating_examples():
    """What rates texts, and what is read from them."""
    from probkit.models.arphmm import ARPHMM
    from probkit.models.language import MarkovLM
    from probkit.models.language.answers import JsonField, RegexGroup, calibrate_confidence, vote
    from probkit.models.language.potentials import (
        All,
        AsSteps,
        GrammarPotential,
        JudgePotential,
        LikelihoodPotential,
        ModelLikelihood,
        Power,
        RegexPotential,
        RewardPotential,
        VerifierPotential,
    )

    number = JsonField("n", {"type": "integer", "minimum": 0})
    yield "parsers", [number, RegexGroup("(a)b")]
    yield "votes", [vote(["a", 1, None]), vote(["a", "b"], torch.zeros(2, 1))]
    stated = torch.linspace(0, 1, 20)
    right = stated > 0.4
    yield (
        "confidence",
        [calibrate_confidence(stated, right, method=m) for m in ("isotonic", "platt")],
    )
    form, grammar = RegexPotential("a*"), GrammarPotential({"type": "object"}, "json")
    likelihood = ModelLikelihood(ARPHMM(states=2), torch.zeros(2, 1), "weights")
    verifier = VerifierPotential(number, kind="value", low=0.1)
    judge = JudgePotential(MarkovLM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]]), "Be brief.")
    yield (
        "ratings",
        [
            All([Power(form, 0.5), grammar, verifier, judge]),
            AsSteps(LikelihoodPotential(likelihood, number), final="."),
            RewardPotential(number, "min", batched=True),
        ],
    )


def names_in(structure):
    """Names of the registered classes inside a packed structure."""
    if isinstance(structure, list):
        return set().union(*map(names_in, structure))
    if not isinstance(structure, dict):
        return set()
    own = {structure["name"]} if structure.get("__probkit__") == "object" else set()
    return own.union(*map(names_in, structure.values()))


def test_every_registered_class_survives():
    """Examples and default instances; a class that is in neither fails here: add an example."""
    seen = set(laws())
    for label, value in examples():
        structure, tensors = pack(value)
        structure = json.loads(json.dumps(structure, allow_nan=False))
        again, same = pack(unpack(structure, tensors))
        assert again == structure, label
        assert equal(same, tensors), label
        seen |= names_in(structure)
    left = []
    for cls, packer in list(files._BY_CLASS.items()):
        if packer.name in seen or not cls.__module__.startswith(("probkit.", "gpytorch.")):
            continue
        try:
            default = cls()
        except TypeError:
            left.append(packer.name)
            continue
        structure, tensors = pack(default)
        again, same = pack(unpack(structure, tensors))
        assert again == structure
        assert equal(same, tensors)
    assert not left, f"add an example of {left} to examples() in this file"


# ------------------------------------------------------------------------------ errors


@dataclass(frozen=True)
class Private:
    """A model of a class that nobody registered."""

    x: float = 1.0

    def sites(self, data):
        return {"mu": None}


class Other(Private):
    """Another such class."""


def test_an_unregistered_model_is_passed_to_load(tmp_path):
    post = Posterior(SOURCES["draws"], Private(2.0))
    post.save(tmp_path)
    with pytest.raises(
        DataError, match=r"the model of this file, a .*Private, is not stored.*model="
    ):
        pk.load(tmp_path)
    with pytest.raises(DataError, match=r"was written with model .*Private, got .*Other"):
        pk.load(tmp_path, model=Other())
    model = Private(2.0)
    assert pk.load(tmp_path, model=model).model is model


def test_an_unregistered_guide_is_passed_to_load(tmp_path):
    post = Posterior(Fitted(Private(), [{"a": torch.ones(1)}]), ConjugateNormal())
    post.save(tmp_path)
    with pytest.raises(DataError, match="the guide of this file.*pass guide= to load"):
        pk.load(tmp_path)
    guide = Private()
    assert pk.load(tmp_path, guide=guide).source.guide is guide


def test_other_unregistered_objects_are_named_by_their_place(tmp_path):
    post = Posterior(SOURCES["draws"], ConjugateNormal(), Context({"a": [Private()]}))
    with pytest.raises(
        DataError, match=r"cannot store context.data.a.0: .*Private is not registered"
    ):
        post.save(tmp_path)


def edit(folder, change):
    path = folder / "posterior.json"
    header = json.loads(path.read_text())
    change(header)
    path.write_text(json.dumps(header))


@pytest.fixture
def saved(tmp_path):
    stated(SOURCES["draws"]).save(tmp_path)
    return tmp_path


def test_a_newer_format(saved):
    edit(saved, lambda header: header.update(format=files.FORMAT + 1))
    with pytest.raises(
        DataError, match=f"has file format {files.FORMAT + 1}, .* reads up to .*newer"
    ):
        pk.load(saved)
    edit(saved, lambda header: header.pop("content"))  # whatever else it may hold
    with pytest.raises(DataError, match="has file format"):
        pk.load(saved)


def test_an_unknown_class(saved):
    edit(saved, lambda header: header["content"]["model"].update(name="FutureModel"))
    with pytest.raises(DataError, match="unknown class 'FutureModel' in the file"):
        pk.load(saved)


def test_an_unknown_entry(saved):
    edit(saved, lambda header: header["content"].update(attrs={"__probkit__": "quantum"}))
    with pytest.raises(DataError, match="unknown entry 'quantum'.*newer probkit"):
        pk.load(saved)


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="expected a folder with posterior.json, found none"):
        pk.load(tmp_path / "nothing")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"format": 1}'])
def test_a_damaged_header(saved, text):
    (saved / "posterior.json").write_text(text)
    with pytest.raises(DataError, match="posterior.json' is damaged"):
        pk.load(saved)


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "other"])
def test_damaged_tensors(saved, damage, tmp_path_factory):
    path = saved / "tensors.safetensors"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(content[:-3])
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:  # of a later save that was interrupted before its header
        later = tmp_path_factory.mktemp("later")
        stated(Draws({"mu": torch.tensor([[5.0, 6.0]])})).save(later)
        path.write_bytes((later / "tensors.safetensors").read_bytes())
    with pytest.raises(DataError, match="tensors.safetensors is damaged"):
        pk.load(saved)


def test_an_interrupted_save_leaves_the_old_one(saved, monkeypatch):
    def fail(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        stated(SOURCES["closed"]).save(saved)
    monkeypatch.undo()
    assert isinstance(pk.load(saved).source, Draws)
    assert len(list(saved.iterdir())) == 2


def test_names_are_taken_once():
    @storable
    @dataclass(frozen=True)
    class OnlyOnce:
        x: int = 0

    with pytest.raises(DataError, match="the name 'OnlyOnce' is taken by another class"):
        register(Other, "OnlyOnce", vars, lambda tree: Other(**tree))
    del files._BY_CLASS[OnlyOnce], files._BY_NAME["OnlyOnce"]


# ------------------------------------------------------------------------------ old files


def version_1():
    """The posterior in ``tests/data/posterior-v1``; written once, never again."""
    values = {
        "mu": torch.tensor([[0.5, 1.5, 2.5]], dtype=torch.float64),
        "weights": torch.tensor([[[1 + 2j], [0j], [-1j]]], dtype=torch.complex64),
        "state": torch.tensor([[0, 2, 1]]),
    }
    return Posterior(
        Draws(values, torch.tensor([[0.0, -1.0, -torch.inf]], dtype=torch.float64)),
        ConjugateNormal(prior_sd=3.0, noise_sd=0.5),
        Context(
            {"y": torch.tensor([1.0, 2.0], dtype=torch.float64), "n": 2},
            {"observation": ["first", "second"], "year": [1999, 2000]},
            {"mu": (), "weights": ("year",)},
        ),
        marginals={
            "mu": td.Normal(torch.tensor(1.0), torch.tensor(0.25)),
            "path": (
                td.Gamma(torch.ones(2), torch.ones(2)),
                td.Gamma(torch.ones(3), torch.ones(3)),
            ),
        },
        log_evidence=Evidence(torch.tensor([-3.25]), "estimate"),
        sample_stats={"ess": torch.tensor([1.6])},
        attrs={"seed": 5, "best": math.inf, "complete": True, "shape": torch.Size([2, 3])},
    )


def test_a_file_of_version_1_always_loads():
    back = pk.load(DATA)
    expected = version_1()
    for field in ("source", "model", "context", "log_evidence", "sample_stats", "attrs"):
        assert equal(getattr(back, field), getattr(expected, field)), field
    assert back.marginals["mu"].scale == 0.25
    assert [law.batch_shape for law in back.marginals["path"]] == [(2,), (3,)]
    assert back.sample(50, rng=0)["mu"].max() == 1.5  # the third draw has no weight


def test_the_constraint_of_every_site_is_free_of_files():
    """Sites are rebuilt by the model; nothing of them is stored."""
    assert "support" not in (DATA / "posterior.json").read_text()
    assert constraints.real is ConjugateNormal().sites(None)["mu"].support


def test_another_program_is_refused(tmp_path):
    def program(site):
        def run(y=None):
            import pyro
            import pyro.distributions as dist

            mu = pyro.sample(site, dist.Normal(0.0, 1.0))
            pyro.sample("obs", dist.Normal(mu, 1.0), obs=y)

        return pk.FromPyro(run)

    data = {"y": torch.tensor(0.4)}
    pk.infer(program("mu"), data, MAP(restarts=1), rng=0).save(tmp_path)
    assert pk.load(tmp_path, model=program("mu")).draws.keys() == {"mu"}
    with pytest.raises(DataError, match="the file holds the sites mu, the model given has nu"):
        pk.load(tmp_path, model=program("nu"))

"""The Distribution Transformer: amortised inference whose prior is an input, chosen at inference.

A prior enters as a mixture of normals: each component becomes a token. Decoder layers let the
components attend to each other and to the observations, and one un-embedding, the same before and
after the layers, turns tokens into components again. Layers start as the identity, so an untrained
network returns the prior as the posterior. The loss on (prior phi, latent x, data z) is

    -log q_prior(x | phi) - log q_posterior(x | z, phi);

its first term keeps the un-embedding faithful, so that a posterior can serve as the next prior.

Source: Whittle, Ziomek, Rawling and Osborne (2025), "Distribution transformers: fast approximate
Bayesian inference with on-the-fly prior adaptation", section 3. Pre-norm layers and zero
initialisation are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn import functional

from probkit._version import __version__
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import register
from probkit.model import Model, Site, Values
from probkit.models.pfn.data_sets import inputs, waves
from probkit.models.pfn.normal_mixture import NormalMixture
from probkit.models.pfn.training import TrainingPlan, train
from probkit.models.pfn.weight_files import WeightFile, load_weights, save_weights
from probkit.posterior import Context, Posterior
from probkit.predictive import Predictive
from probkit.rng import Rng, seed_of, stream
from probkit.sampler import Info
from probkit.sources import Closed

__all__ = [
    "DistributionTransformer",
    "MixturePriors",
    "NormalVariance",
    "TransformerShape",
    "train_distribution_transformer",
]

_JITTER = 1e-6
_SPREAD = 12.0  # bound on the log of a scale, against overflow early in training


@dataclass(frozen=True)
class TransformerShape:
    """Shape of a Distribution Transformer.

    Attributes:
        width: Length of a token, a multiple of ``heads``.
        layers: Decoder layers.
        heads: Attention heads.
        components: Components of priors and posteriors.
        coordinates: Dimension d of the latent.
        features: Numbers in one observation.
        octaves: Waves that describe an observation beside its values.
    """

    width: int = 64
    layers: int = 3
    heads: int = 4
    components: int = 5
    coordinates: int = 1
    features: int = 1
    octaves: int = 3

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "components", "coordinates", "features"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(f"{name}: expected a whole number >= 1, got {value!r}")
        if self.width % self.heads or self.octaves < 0:
            raise DataError(
                f"expected width a multiple of heads={self.heads} and octaves >= 0, got "
                f"{self.width} and {self.octaves}"
            )


class Likelihood(Protocol):
    """What links latents to observations.

    Attributes:
        version: Its name, for weight files.
        coordinates: Dimension of the latent, a vector of real numbers.
        features: Numbers in one observation.
    """

    @property
    def version(self) -> str:
        """Name, for weight files."""
        ...

    coordinates: int
    features: int

    def simulate(self, latent: Tensor, rows: int, *, rng: torch.Generator) -> Tensor:
        """Draw observations [*batch, row, feature] given latents [*batch, coordinate]."""
        ...


@dataclass(frozen=True)
class NormalVariance:
    """Observations Normal(0, exp(latent)): the latent is the logarithm of the variance.

    With an inverse-gamma prior of the variance the posterior is known, which makes it the standard
    test.
    """

    coordinates: int = 1
    features: int = 1
    version: str = "normal variance"

    def simulate(self, latent: Tensor, rows: int, *, rng: torch.Generator) -> Tensor:
        """Draw y [*batch, row, 1]."""
        shape = (*latent.shape[:-1], rows, 1)
        noise = torch.randn(shape, generator=rng, dtype=latent.dtype, device=rng.device)
        return noise * (0.5 * latent).exp().unsqueeze(-2)


@dataclass(frozen=True)
class MixturePriors:
    """A law of priors: random mixtures of normals, which training runs over.

    Means of components are Normal(centre_of_prior, spread), centres Uniform(-range, range); the
    logarithms of scales are uniform between two bounds.

    Attributes:
        components: Components of each prior.
        coordinates: Dimension of the latent.
        centre: Half-width of the range of a prior's centre.
        spread: Largest standard deviation of the means within a prior; each prior draws its own.
        scale: Smallest and largest scale of a component.
    """

    components: int = 5
    coordinates: int = 1
    centre: float = 2.0
    spread: float = 1.0
    scale: tuple[float, float] = (0.1, 1.5)

    @property
    def version(self) -> str:
        """Name, for weight files."""
        return (
            f"mixtures of {self.components} in {self.coordinates}: centre {self.centre}, spread "
            f"{self.spread}, scale {self.scale[0]}-{self.scale[1]}"
        )

    def draw(self, n: int, *, rng: torch.Generator) -> NormalMixture:
        """Draw ``n`` priors."""
        k, d = self.components, self.coordinates

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=rng, device=rng.device)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=rng, device=rng.device)

        centre = self.centre * (2 * uniform(n, 1, d) - 1)
        loc = centre + self.spread * uniform(n, 1, 1) * normal(n, k, d)
        low, high = (math.log(bound) for bound in self.scale)
        shared = low + (high - low) * uniform(n, 1, 1)
        own = (shared + 0.3 * normal(n, k, d)).clamp(low, high).exp()
        lower = (0.5 * normal(n, k, d, d)).tril(-1) * own.unsqueeze(-1)
        root = lower + torch.diag_embed(own)
        return NormalMixture(normal(n, k), loc, root, validate_args=False)


class _Attention(nn.Module):
    """Multi-head attention in one scaled-dot-product call; its last map starts at zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor, others: Tensor, mask: Tensor | None) -> Tensor:
        batch, count, width = tokens.shape
        split = (self.heads, width // self.heads)
        query = self.query(tokens).unflatten(-1, split).transpose(1, 2)
        key, value = (
            part.unflatten(-1, split).transpose(1, 2)
            for part in self.key_value(others).chunk(2, -1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, count, width))


class _DecoderLayer(nn.Module):
    """Self-attention over components, cross-attention to observations, perceptron; pre-norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(width)
        self.self_attention = _Attention(width, heads)
        self.norm_cross = nn.LayerNorm(width)
        self.cross_attention = _Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, observed: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.norm_self(tokens)
        tokens = tokens + self.self_attention(normed, normed, None)
        tokens = tokens + self.cross_attention(self.norm_cross(tokens), observed, mask)
        return tokens + self.down(functional.gelu(self.up(self.norm_mlp(tokens))))

    def last_maps(self) -> list[nn.Linear]:
        """The maps that end the residual branches."""
        return [self.self_attention.out, self.cross_attention.out, self.down]


class _Decoder(nn.Module):
    """The network: components in, components out."""

    def __init__(self, shape: TransformerShape, *, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = shape
        width, d = shape.width, shape.coordinates
        numbers = 1 + 2 * d + d * (d - 1) // 2
        with torch.device("meta"):
            self.embed_up = nn.Linear(numbers, 2 * width)
            self.embed_down = nn.Linear(2 * width, width)
            self.observe_up = nn.Linear(shape.features * (1 + 2 * shape.octaves), 2 * width)
            self.observe_down = nn.Linear(2 * width, width)
            self.nothing = nn.Parameter(torch.empty(width))
            self.layers = nn.ModuleList(
                _DecoderLayer(width, shape.heads) for _ in range(shape.layers)
            )
            self.norm = nn.LayerNorm(width)
            self.unembed_up = nn.Linear(width, 2 * width)
            self.unembed_down = nn.Linear(2 * width, numbers)
        self.to_empty(device="cpu")
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.LayerNorm):
                    module.weight.fill_(1.0)
                    module.bias.zero_()
                elif isinstance(module, nn.Linear):
                    bound = 1 / math.sqrt(module.in_features)
                    module.weight.uniform_(-bound, bound, generator=generator)
                    module.bias.uniform_(-bound, bound, generator=generator)
            for layer in self.layers:
                assert isinstance(layer, _DecoderLayer)
                for last in layer.last_maps():
                    last.weight.zero_()
                    last.bias.zero_()
            self.nothing.normal_(generator=generator)

    def embed(self, prior: NormalMixture) -> Tensor:
        """Return tokens [batch, component, width]."""
        diagonal = prior.scale_tril.diagonal(dim1=-2, dim2=-1)
        d = self.shape.coordinates
        below = torch.tril_indices(d, d, -1)
        # the factor without its diagonal, relative to it
        unit = prior.scale_tril / diagonal.unsqueeze(-1)
        lower = unit[..., below[0], below[1]]
        numbers = torch.cat([prior.log_weights.unsqueeze(-1), prior.loc, diagonal.log(), lower], -1)
        return self.embed_down(functional.gelu(self.embed_up(numbers)))

    def unembed(self, tokens: Tensor) -> NormalMixture:
        """Return the mixture that tokens stand for."""
        numbers = self.unembed_down(functional.gelu(self.unembed_up(self.norm(tokens)))).float()
        d = self.shape.coordinates
        logit, loc, log_scale, lower = numbers.split([1, d, d, d * (d - 1) // 2], -1)
        diagonal = log_scale.clamp(-_SPREAD, _SPREAD).exp() + _JITTER
        below = torch.tril_indices(d, d, -1)
        root = torch.diag_embed(torch.ones_like(diagonal))
        if d > 1:
            root = root.clone()
            root[..., below[0], below[1]] = lower
        root = root * diagonal.unsqueeze(-1)
        return NormalMixture(logit.squeeze(-1), loc, root, validate_args=False)

    def forward(
        self, prior: NormalMixture, observed: Tensor, lengths: Tensor | None = None
    ) -> tuple[NormalMixture, NormalMixture]:
        """Return the prior as the network reads it, and the posterior.

        Args:
            prior: Mixtures [batch].
            observed: [batch, row, feature].
            lengths: [batch] rows that count; None counts all.
        """
        tokens = self.embed(prior)
        rows = waves(observed, self.shape.octaves)
        seen = self.observe_down(functional.gelu(self.observe_up(rows)))
        seen = torch.cat([self.nothing.expand(len(seen), 1, -1), seen], 1)
        mask = None
        if lengths is not None:
            mask = torch.arange(seen.shape[1], device=seen.device) <= lengths.unsqueeze(-1)
            mask = mask[:, None, None, :]
        read = self.unembed(tokens)
        for layer in self.layers:
            tokens = layer(tokens, seen, mask)
        return read, self.unembed(tokens)


@dataclass(frozen=True)
class _PriorTask:
    """Draw a prior, a latent from it and data from the latent; score both readings."""

    priors: MixturePriors
    likelihood: Likelihood
    rows: int
    scale: float

    @property
    def version(self) -> str:
        return f"{self.likelihood.version}, {self.priors.version}, {self.rows} rows"

    def block(self, n: int, *, rng: torch.Generator) -> tuple[Tensor, ...]:
        prior = self.priors.draw(n, rng=rng)
        k, d = prior.loc.shape[-2:]
        pick = torch.multinomial(prior.weights, 1, generator=rng)[..., None]
        loc = prior.loc.gather(1, pick.expand(n, 1, d)).squeeze(1)
        root = prior.scale_tril.gather(1, pick[..., None].expand(n, 1, d, d)).squeeze(1)
        noise = torch.randn(n, d, 1, generator=rng, device=rng.device)
        latent = loc + (root @ noise).squeeze(-1)
        y = self.likelihood.simulate(latent, self.rows, rng=rng) / self.scale
        return prior.logits, prior.loc, prior.scale_tril, latent, y

    def loss(
        self, network: Callable[..., Any], rows: tuple[Tensor, ...], *, rng: torch.Generator
    ) -> Tensor:
        logits, loc, root, latent, y = rows
        prior = NormalMixture(logits, loc, root, validate_args=False)
        lengths = torch.randint(self.rows + 1, (len(y),), generator=rng).to(y.device)
        read, posterior = network(prior, y, lengths)
        return -(read.log_prob(latent) + posterior.log_prob(latent)).mean()


@dataclass(frozen=True, eq=False, repr=False)
class DistributionTransformer(Model):
    """Inference in one forward pass under a prior that is chosen when the data are there.

    ``infer(net.with_prior(prior), y, rng=0)`` gives the posterior of one latent vector as a mixture
    of normals; ``post.update(more, rng=0)`` takes it as the prior of the next data. Made by
    :func:`train_distribution_transformer`.

    Attributes:
        network: The decoder.
        prior: The prior in use; None until :meth:`with_prior`.
        scale: Divisor of observations.
        most: Largest number of rows that training has shown.
        trained_on: Name of likelihood and priors.
        name: Name of the latent site.
        card: Training recipe.

    Example:
        >>> net = train_distribution_transformer(
        ...     NormalVariance(), MixturePriors(), TransformerShape(16, 1, 2), steps=2, rng=0
        ... )
        >>> prior = NormalMixture.univariate([1.0], [0.0], [0.5])
        >>> from probkit import infer
        >>> post = infer(net.with_prior(prior), torch.randn(6, 1), rng=0)
        >>> post.sample(4, rng=0)["latent"].shape
        torch.Size([4, 1])
    """

    network: _Decoder
    prior: NormalMixture | None = None
    scale: float = 1.0
    most: int = 0
    trained_on: str = ""
    name: str = "latent"
    card: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Name what it was trained on."""
        return f"DistributionTransformer({self.trained_on!r})"

    def with_prior(self, prior: NormalMixture) -> DistributionTransformer:
        """Return the same network under ``prior``, a mixture without batch dims.

        Fewer components than the network's are filled up by splitting the heaviest ones.

        Raises:
            ShapeError: The prior has another dimension, batch dims, or too many components.
        """
        shape = self.network.shape
        k, d = prior.loc.shape[-2:]
        if prior.batch_shape or d != shape.coordinates or k > shape.components:
            raise ShapeError(
                f"prior: expected a mixture of at most {shape.components} components in "
                f"{shape.coordinates} coordinates without batch dims, got {k} in {d} with batch "
                f"{tuple(prior.batch_shape)}"
            )
        return replace(self, prior=_filled(prior, shape.components))

    def sites(self, data: Any = None) -> Mapping[str, Site]:
        """Return the one latent vector."""
        return {self.name: Site((self.network.shape.coordinates,), constraints.real, ("coord",))}

    def prepare(self, data: Any) -> Tensor:
        """Check observations y [row, feature], or [row] where there is one feature."""
        return inputs(data, self.network.shape.features)

    def condition(self, data: Any, hyper: Values | None = None) -> Posterior:
        """Return the posterior given observations.

        Raises:
            CapabilityError: No prior was chosen, or hyper-parameters are given.
        """
        if self.prior is None:
            raise CapabilityError(
                "DistributionTransformer: expected a prior; call with_prior(NormalMixture(...))"
            )
        if hyper:
            raise CapabilityError(f"expected no hyper-parameters, got {', '.join(hyper)}")
        y = self.prepare(data)
        law = self.posteriors(_with_batch(self.prior), y.unsqueeze(0))
        single = NormalMixture(law.logits[0], law.loc[0], law.scale_tril[0], validate_args=False)
        dims = {self.name: ("coord",)}
        marginals = {self.name: single}
        return Posterior(Closed(joint=marginals), self, Context(y, {}, dims), marginals=marginals)

    def update(self, posterior: Posterior, data: Any, *, rng: Rng | None = None) -> Posterior:
        """Return the posterior given more data: the old posterior is the new prior."""
        law = posterior.marginals[self.name]
        assert isinstance(law, NormalMixture)
        return self.with_prior(law).condition(data)

    @torch.no_grad()
    def posteriors(
        self, prior: NormalMixture, y: Tensor, lengths: Tensor | None = None
    ) -> NormalMixture:
        """Return posteriors [batch] of many data sets, each under its own prior.

        Args:
            prior: Mixtures [batch].
            y: [batch, row, feature].
            lengths: [batch] rows that count, in a padded batch.
        """
        return self.network(prior, y.float() / self.scale, lengths)[1]

    def predict(
        self,
        post: Posterior,
        x: Any = None,
        *,
        site: str | None = None,
        joint: bool = False,
        groups: Mapping[str, Sequence[Any]] | None = None,
        rng: Rng | None = None,
    ) -> Predictive:
        """Return the law of the latent; observations are not predicted.

        Raises:
            CapabilityError: Anything but ``site=<name of the latent>`` is asked for.
        """
        from probkit.predictive import Analytic

        if site != self.name or groups:
            raise CapabilityError(
                f"DistributionTransformer predicts its latent only: pass site={self.name!r}"
            )
        law = post.marginals[self.name]
        assert isinstance(law, NormalMixture)
        return Analytic(law)

    def save(self, path: str | Path) -> None:
        """Write a weight file (.safetensors, float16); the prior in use is not part of it."""
        constants = {"scale": self.scale, "most": self.most, "name": self.name}
        state, shape = self.network.state_dict(), asdict(self.network.shape)
        save_weights(path, WeightFile(self.trained_on, shape, state, None, constants, self.card))

    @classmethod
    def load(cls, path: str | Path, *, trained_on: str | None = None) -> DistributionTransformer:
        """Read a weight file.

        Raises:
            DataError: It is no file of :meth:`save`, or of another likelihood or law of priors.
        """
        file = load_weights(path, prior=trained_on)
        if "components" not in file.network:
            raise DataError(f"{str(path)!r} holds no Distribution Transformer")
        network = _Decoder(TransformerShape(**file.network), generator=torch.Generator())
        file.fill(network)
        network.eval().requires_grad_(False)
        return cls(network, None, trained_on=file.prior, card=file.card, **file.constants)


def _with_batch(law: NormalMixture) -> NormalMixture:
    return law.expand(torch.Size([1]))


def _filled(prior: NormalMixture, components: int) -> NormalMixture:
    """Split components, the heaviest first, until there are ``components``: the law is the same."""
    logits, loc, root = prior.log_weights, prior.loc, prior.scale_tril
    while len(logits) < components:
        k = int(logits.argmax())
        half = logits[k] - math.log(2.0)
        logits = torch.cat([logits[:k], half[None], logits[k + 1 :], half[None]])
        loc = torch.cat([loc, loc[k : k + 1]])
        root = torch.cat([root, root[k : k + 1]])
    return NormalMixture(logits.float(), loc.float(), root.float(), validate_args=False)


def train_distribution_transformer(
    likelihood: Likelihood,
    priors: MixturePriors,
    shape: TransformerShape | None = None,
    *,
    steps: int = 2000,
    rows: int = 20,
    batch: int = 128,
    lr: float = 1e-3,
    name: str = "latent",
    rng: Rng,
    plan: TrainingPlan | None = None,
    checkpoint: str | Path | None = None,
    callbacks: Sequence[Callable[[Info], Any]] = (),
) -> DistributionTransformer:
    """Train a network for one likelihood and a whole law of priors.

    Args:
        likelihood: What links latents to observations; see :class:`NormalVariance`.
        priors: Law of the priors that the network shall know.
        shape: Shape of the network; components, coordinates and features follow the other two.
        steps: Gradient steps.
        rows: Largest number of observations.
        batch: Priors and data sets in each step.
        lr: Highest learning rate.
        name: Name of the latent site.
        rng: Seed.
        plan: Everything about the training; replaces ``steps``, ``batch`` and ``lr``.
        checkpoint: File (.safetensors) to save to and to resume from.
        callbacks: Called with an ``Info`` after each block of steps.

    Returns:
        The trained network, without a prior.

    Raises:
        DataError: Likelihood and priors differ in dimension.
    """
    if likelihood.coordinates != priors.coordinates:
        raise DataError(
            f"expected priors of {likelihood.coordinates} coordinates, as the likelihood has, got "
            f"{priors.coordinates}"
        )
    seed = seed_of(rng)
    shape = replace(
        shape or TransformerShape(),
        components=priors.components,
        coordinates=priors.coordinates,
        features=likelihood.features,
    )
    pilot = _PriorTask(priors, likelihood, rows, 1.0).block(2000, rng=stream(seed, "pilot"))[-1]
    scale = float(pilot.abs().flatten().median()) / 0.6745
    task = _PriorTask(priors, likelihood, rows, scale)
    plan = plan or TrainingPlan(steps=steps, batch=batch, lr=lr)
    network = _Decoder(shape, generator=stream(seed, "weights"))
    run = train(network, task, plan, rng=seed, checkpoint=checkpoint, callbacks=callbacks)
    network.cpu().requires_grad_(False)
    card = {
        "training": {**asdict(plan), "seed": seed, "task": task.version},
        "losses": [round(loss, 4) for loss in run.losses[-5:]],
        "probkit": __version__,
        "torch": str(torch.__version__),
    }
    return DistributionTransformer(network, None, scale, rows, task.version, name, card)


def _to_tree(net: DistributionTransformer) -> dict[str, Any]:
    return {
        "shape": asdict(net.network.shape),
        "weights": dict(net.network.state_dict()),
        "prior": net.prior,
        "scale": net.scale,
        "most": net.most,
        "trained_on": net.trained_on,
        "name": net.name,
        "card": dict(net.card),
    }


def _from_tree(tree: dict[str, Any]) -> DistributionTransformer:
    network = _Decoder(TransformerShape(**tree["shape"]), generator=torch.Generator())
    network.load_state_dict(tree["weights"])
    network.eval().requires_grad_(False)
    rest = {key: tree[key] for key in ("prior", "scale", "most", "trained_on", "name", "card")}
    return DistributionTransformer(network, **rest)


register(DistributionTransformer, "DistributionTransformer", _to_tree, _from_tree)

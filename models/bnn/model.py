"""Fully-connected Bayesian neural networks for regression and classification."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference.laplace import LaplaceNormal, OutputCurvature, linearise
from probkit.model import Batch, Model, Site, Values
from probkit.models.bnn import network
from probkit.models.bnn.data import Rows, as_inputs, as_labels, as_pair, as_targets
from probkit.models.bnn.network import Dense, Layer
from probkit.models.bnn.predictive import (
    add_noise,
    gaussian,
    mixture_of_categoricals,
    mixture_of_functions,
    mixture_of_normals,
    sample_gaussian,
)
from probkit.models.bnn.prior import layer_sizes, log_normal_sum, weight_names
from probkit.models.scale_laws import LogNormal, ScaleLaw, as_scale_law
from probkit.posterior import Posterior
from probkit.predictive import Predictive
from probkit.rng import Rng, require_rng, scope, stream
from probkit.sources import Draws, Fitted

__all__ = ["BNN"]

_NOISE = "noise_var"
_GAINS = ("gain_first", "gain_later")
_CHUNK_BYTES = 2**26


@storable
@dataclass(frozen=True, eq=False)
class BNN(Model):
    """A fully-connected network with a prior on every weight and bias.

    f(x) = W_L a(... a(W_0 x + b_0) ...) + b_L, and y = f(x) + noise, or labels with probabilities
    softmax(f(x)). Any sampler of a log joint fits: NUTS, HMC, SVI, MAP, DeepEnsemble, Laplace.
    Sites are ``weight_0`` [in, out], ``bias_0`` [out], and so on; leading dims of their values are
    carried by one broadcast product a layer, so many chains cost little more than one.

    Two priors. "iid": every weight and bias is N(0, prior_std^2), whatever the width. "fan_in": the
    weights that act are ``gain / sqrt(fan_in) * weight_k`` with entries of ``weight_k`` N(0, 1) and
    biases N(0, prior_std^2), so that functions keep their size as layers widen and tend to a
    Gaussian process (Neal 1996; Lee et al. 2018), the one of
    :class:`~probkit.kernels.NNGPKernel` with ``w_std`` the gains and ``b_std`` the ``prior_std``.

    Args:
        hidden: Widths of the hidden layers; ``()`` is Bayesian linear regression.
        activation: One of ``ACTIVATIONS``: "tanh", "relu", "erf", "gelu", "silu", "sin".
        prior: "iid" or "fan_in".
        prior_std: Standard deviation of every weight and bias ("iid"), of the biases ("fan_in").
        gains: Of the first and of all later layers ("fan_in" only).
        learn_gains: Standard deviation of the logarithms of ``gain_first`` and ``gain_later``
            around those of ``gains``; they become sites. None keeps them fixed.
        noise_var: Noise variance: a number, or its prior, any law on the positive reals; then
            ``noise_var`` is a site, with one entry for each output of a target [row, output].
        likelihood: "normal" or "categorical".
        standardize: Scale inputs and targets by the statistics of the training data. Priors and
            ``noise_var`` are then in these units; densities and predictions are on the original
            scale.
        outputs: Number of outputs, or classes; None takes that of the data (regression).
        inputs: X [row, feature] of the data sets that :meth:`sample_dataset` makes, needed there
            and by :meth:`sample_prior`, which see no data.

    Data is a pair (X [row, feature], y), y [row] or [row, output], or labels [row].

    Raises:
        DataError: A value outside its range; the message names it.

    Example:
        >>> import probkit as pk
        >>> from probkit.inference import MAP
        >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
        >>> model = BNN(hidden=(8,), noise_var=0.01)
        >>> post = pk.infer(model, (x, x[:, 0].sin()), MAP(max_iter=500), rng=0)
        >>> post.predict(x).mean.shape, post.draws["weight_0"].shape
        (torch.Size([20]), torch.Size([1, 1, 1, 8]))
    """

    hidden: tuple[int, ...] = (50, 50)
    activation: str = "tanh"
    prior: Literal["iid", "fan_in"] = "iid"
    prior_std: float = 1.0
    gains: tuple[float, float] = (1.0, 1.0)
    learn_gains: float | None = None
    noise_var: float | Distribution = field(default_factory=lambda: LogNormal(-4.0, 1.5))
    likelihood: Literal["normal", "categorical"] = "normal"
    standardize: bool = False
    outputs: int | None = None
    inputs: Tensor | None = field(default=None, repr=False)

    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given: Any = self.hidden
        whole = isinstance(given, Sequence) and all(_is_count(width) for width in given)
        if not whole or isinstance(given, str):
            raise DataError(f"hidden: expected widths >= 1 such as (50, 50), got {given!r}")
        object.__setattr__(self, "hidden", tuple(int(width) for width in given))
        network.activation_of(self.activation)
        if self.prior not in ("iid", "fan_in"):
            raise DataError(f"prior: expected 'iid' or 'fan_in', got {self.prior!r}")
        if self.likelihood not in ("normal", "categorical"):
            raise DataError(
                f"likelihood: expected 'normal' or 'categorical', got {self.likelihood!r}"
            )
        _check_positive("prior_std", self.prior_std)
        if not isinstance(self.gains, Sequence) or len(self.gains) != 2:
            raise DataError(f"gains: expected (first, later), got {self.gains!r}")
        object.__setattr__(self, "gains", tuple(self.gains))
        for gain in self.gains:
            _check_positive("gains", gain)
        if self.learn_gains is not None:
            _check_positive("learn_gains", self.learn_gains)
            if self.prior == "iid":
                raise DataError("learn_gains: expected None with prior='iid', which has no gains")
        if isinstance(self.noise_var, Distribution):
            law = as_scale_law(self.noise_var)
            if law.batch_shape:
                raise DataError(
                    f"noise_var: expected one law for all outputs, got batch shape "
                    f"{tuple(law.batch_shape)}"
                )
            object.__setattr__(self, "noise_var", law)
        else:
            _check_positive("noise_var", self.noise_var)
        if self.outputs is not None and not _is_count(self.outputs):
            raise DataError(f"outputs: expected a whole number >= 1, got {self.outputs!r}")
        if self.likelihood == "categorical":
            if self.outputs is None or self.outputs < 2:
                raise DataError(
                    f"outputs: expected the number of classes >= 2 with likelihood='categorical', "
                    f"got {self.outputs!r}"
                )
            if self.standardize:
                raise DataError("standardize: expected False with labels; scale X beforehand")
        if self.inputs is not None:
            object.__setattr__(self, "inputs", as_inputs(self.inputs, "inputs"))

    # ------------------------------------------------------------------------------ the data

    def prepare(self, data: Any) -> Any:
        """Check (X, y) and return them on one device; the dtype of X decides that of the weights.

        Raises:
            DataError: Not a pair, no rows, or a value that is not finite (row and column named).
            ShapeError: Shapes that do not fit.
        """
        if isinstance(data, Rows):
            return data
        first, second = as_pair(data)
        x = as_inputs(first, "X")
        if self.likelihood == "categorical":
            return x, as_labels(second, x, self._classes())
        y = as_targets(second, x, self.outputs)
        if self.standardize:
            Rows.of((x, y), standardize=True)  # Refuses a constant target.
        return x, y

    def data_dims(self, data: Any) -> Any:
        """Rows, features and outputs."""
        return (("row", "feature"), ("row", "output"))

    def plate_size(self, data: Any) -> int:
        """Return the number of rows."""
        return len(data[0])

    def minibatch(self, data: Any, index: Tensor) -> Batch:
        """Return the rows ``index`` [unit], scaled as all of them are."""
        rows = Rows.of(data, standardize=self.standardize)
        index = index.to(rows.x.device)
        part = Rows(rows.x[index], rows.y[index], rows.scaling)
        return Batch(part, index, len(rows.x) / index.shape[0])

    def _classes(self) -> int:
        assert self.outputs is not None
        return self.outputs

    def _output_count(self, data: Any) -> int:
        if self.likelihood == "categorical":
            return self._classes()
        y = data[1]
        return int(y.shape[1]) if y.ndim == 2 else 1

    # ------------------------------------------------------------------------------- the sites

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return weights and biases of every layer, then gains and noise variance if learned."""
        return self._sites(data[0].shape[1], self._output_count(data), self._noise_shape(data))

    def _noise_shape(self, data: Any) -> tuple[int, ...] | None:
        """Shape of the noise site; None where the noise is fixed or there is none."""
        if self.likelihood == "categorical" or not isinstance(self.noise_var, Distribution):
            return None
        return tuple(data[1].shape[1:])

    def _sites(self, features: int, outputs: int, noise: tuple[int, ...] | None) -> dict[str, Site]:
        sizes = layer_sizes(features, self.hidden, outputs)
        dims = ["feature", *(f"unit_{k}" for k in range(len(self.hidden))), "output"]
        sites: dict[str, Site] = {}
        for k, (weight, bias) in enumerate(weight_names(len(sizes))):
            sites[weight] = Site(sizes[k], constraints.real, (dims[k], dims[k + 1]))
            sites[bias] = Site(sizes[k][1:], constraints.real, (dims[k + 1],))
        for name in self._gain_names():
            sites[name] = Site((), constraints.positive)
        if noise is not None:
            sites[_NOISE] = Site(noise, constraints.positive, ("output",) * len(noise))
        return sites

    def _gain_names(self) -> tuple[str, ...]:
        if self.learn_gains is None:
            return ()
        return _GAINS if self.hidden else _GAINS[:1]

    def _noise_law(self) -> ScaleLaw:
        assert isinstance(self.noise_var, ScaleLaw)
        return self.noise_var

    # ------------------------------------------------------------------------------- densities

    def _event(self) -> dict[str, int]:
        """Number of dims of every weight and bias."""
        return {
            name: dims
            for pair in self.layer_names()
            for name, dims in zip(pair, (2, 1), strict=True)
        }

    def weight_sd(self) -> dict[str, float]:
        """Return the prior standard deviation of the entries of every weight and bias."""
        weight = self.prior_std if self.prior == "iid" else 1.0
        return {name: (weight, self.prior_std)[dims == 1] for name, dims in self._event().items()}

    def log_prior(self, values: Values) -> Tensor:
        """Return the log prior density [*batch] of all sites."""
        total = log_normal_sum(values, self._event(), self.weight_sd())
        for name, gain in zip(self._gain_names(), self.gains, strict=False):
            assert self.learn_gains is not None
            law = LogNormal(math.log(gain), self.learn_gains, validate_args=False)
            total = total + law.log_prob(values[name]).to(total.dtype)
        if _NOISE in values:
            term = self._noise_law().log_prob(values[_NOISE]).to(total.dtype)
            extra = term.ndim - total.ndim
            total = total + (term.sum(tuple(range(-extra, 0))) if extra else term)
        return total

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return log p(values) + scale * log p(y | X, values), leading dims carried through."""
        return self.log_prior(values) + scale * self.log_likelihood(values, data)

    def log_likelihood(self, values: Values, data: Any) -> Tensor:
        """Return log p(y | X, values) [*batch]."""
        term = self._pointwise(values, data)
        return term.sum(-1) if data[1].ndim == 1 else term.sum((-2, -1))

    def pointwise_log_likelihood(self, values: Values, data: Any) -> Mapping[str, Tensor]:
        """Return {"y": [*batch, row] or [*batch, row, output]}."""
        return {"y": self._pointwise(values, data)}

    def _pointwise(self, values: Values, data: Any) -> Tensor:
        rows = Rows.of(data, standardize=self.standardize)
        f = self.network(values, rows.inputs())
        if self.likelihood == "categorical":
            logits = torch.log_softmax(f, -1)
            labels = rows.y.expand(logits.shape[:-1])
            return logits.gather(-1, labels[..., None]).squeeze(-1)
        y = rows.y if rows.scaling is None else rows.scaling.y(rows.y)
        if y.ndim == 1:
            f = f.squeeze(-1)
        variance = self._noise(values, f)
        if isinstance(variance, Tensor):
            term = -0.5 * ((f - y).square() / variance + torch.log(2 * math.pi * variance))
        else:
            term = (-0.5 / variance) * (f - y).square() - 0.5 * math.log(2 * math.pi * variance)
        return term if rows.scaling is None else term - rows.scaling.y_sd.log()

    def _noise(self, values: Values, f: Tensor) -> Tensor | float:
        """Noise variance, broadcast against f [*batch, *lead, row] or [..., row, output]."""
        if not isinstance(self.noise_var, Distribution):
            return float(self.noise_var)
        value = values[_NOISE]
        batch = _batch_dims(values)
        between = (1,) * (f.ndim - value.ndim)
        return value.reshape(value.shape[:batch] + between + value.shape[batch:])

    def network(self, values: Values, x: Tensor) -> Tensor:
        """Evaluate the network in its own units at inputs [*lead, row, feature].

        Returns:
            [*batch, *lead, row, output].
        """
        return network.forward(x, self._dense(values), network.activation_of(self.activation))

    def layers(self, values: Values, x: Tensor) -> list[Layer]:
        """Return the inputs and pre-activations of every layer at inputs [*lead, row, feature].

        ``outputs = inputs @ weight + bias`` for each layer: the scale of a fan-in prior is part of
        the inputs.
        """
        return network.run_layers(x, self._dense(values), network.activation_of(self.activation))

    def layer_names(self) -> list[tuple[str, str]]:
        """Return the sites (weight, bias) of every layer."""
        return weight_names(len(self.hidden) + 1)

    def network_inputs(self, data: Any) -> Tensor:
        """Return the inputs [row, feature] of ``data`` in the network's units."""
        return Rows.of(data, standardize=self.standardize).inputs()

    def output_curvature(self, values: Values, data: Any) -> OutputCurvature:
        """Return the curvature of the likelihood in the network's outputs, in its units."""
        rows = Rows.of(data, standardize=self.standardize)
        f = self.network(values, rows.inputs())
        if self.likelihood == "categorical":
            p = torch.softmax(f, -1)
            # root root' = diag(p) - p p', since the entries of p sum to one.
            return OutputCurvature(torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None])
        y = rows.y if rows.scaling is None else rows.scaling.y(rows.y)
        y = y.reshape(f.shape)
        variance = self._noise(values, f if rows.y.ndim == 2 else f.squeeze(-1))
        sd = torch.as_tensor(variance, dtype=f.dtype, device=f.device).sqrt()
        root = (1 / sd).expand(f.shape) if rows.y.ndim == 2 else (1 / sd).expand(len(f))[:, None]
        noise = _NOISE if isinstance(self.noise_var, Distribution) else None
        return OutputCurvature(torch.diag_embed(root), root * (y - f), noise)

    def _dense(self, values: Values) -> list[Dense]:
        dense = []
        for k, (weight, bias) in enumerate(self.layer_names()):
            dense.append(Dense(values[weight], values[bias], self._scale(values, weight, k)))
        return dense

    def _scale(self, values: Values, weight: str, k: int) -> float | Tensor:
        if self.prior == "iid":
            return 1.0
        later = int(k > 0)
        gain = values[_GAINS[later]] if self.learn_gains is not None else self.gains[later]
        return gain / math.sqrt(values[weight].shape[-2])

    # ------------------------------------------------------------------------------ simulation

    def sample_prior(self, n: int, *, rng: Rng) -> Values:
        """Draw ``n`` values [n, *site] of all sites; needs ``inputs``.

        Raises:
            CapabilityError: The model was made without ``inputs``.
        """
        x = self._design("sample_prior")
        learned = isinstance(self.noise_var, Distribution) and self.likelihood == "normal"
        noise = (() if self.outputs is None else (self.outputs,)) if learned else None
        sites = self._sites(x.shape[1], self.outputs or 1, noise)
        generator = stream(rng, "prior", device=x.device)
        sd = self.weight_sd()
        return {
            name: _normal((n, *site.shape), generator, x) * sd[name]
            if name in sd
            else self._draw_positive(name, (n, *site.shape), generator, x)
            for name, site in sites.items()
        }

    def _draw_positive(
        self, name: str, shape: tuple[int, ...], generator: torch.Generator, like: Tensor
    ) -> Tensor:
        """Draw gains or noise variances from their prior."""
        if name == _NOISE:
            with scope(rng=generator):
                return self._noise_law().sample(torch.Size(shape)).to(like)
        assert self.learn_gains is not None
        noise = _normal(shape, generator, like)
        return self.gains[_GAINS.index(name)] * (self.learn_gains * noise).exp()

    def _design(self, what: str) -> Tensor:
        if self.inputs is None:
            raise CapabilityError(
                f"{what} sees no data: give the model its inputs, BNN(..., inputs=X), X [row, "
                "feature]"
            )
        return self.inputs

    def simulate(self, values: Values, x: Any, *, rng: Rng) -> Tensor:
        """Draw targets [*batch, row], [*batch, row, output] or labels [*batch, row] at ``x``.

        Raises:
            CapabilityError: The model standardises, so its scale is that of data not yet seen.
        """
        if self.standardize:
            raise CapabilityError(
                "simulate: the scale of BNN(standardize=True) is that of its training data; use "
                "post.predict(x).sample(n, rng=0), or standardize=False"
            )
        some = values["weight_0"]
        x = as_inputs(x, "X", columns=some.shape[-2]).to(some)
        with torch.no_grad():
            f = self.network(values, x)
        generator = stream(rng, "simulate", device=f.device)
        if self.likelihood == "categorical":
            probs = torch.softmax(f, -1).reshape(-1, f.shape[-1])
            return torch.multinomial(probs, 1, generator=generator).reshape(f.shape[:-1])
        learned = _NOISE in values and values[_NOISE].ndim > _batch_dims(values)
        if f.shape[-1] == 1 and self.outputs is None and not learned:
            f = f.squeeze(-1)
        sd = torch.as_tensor(self._noise(values, f), dtype=f.dtype, device=f.device).sqrt()
        return f + sd * _normal(tuple(f.shape), generator, f)

    def sample_dataset(self, n: int, *, rng: Rng) -> tuple[Values, Any]:
        """Draw ``n`` pairs of values and data at ``inputs``: X [n, row, feature] and y [n, ...]."""
        x = self._design("sample_dataset")
        seed = stream(rng, "dataset")
        values = self.sample_prior(n, rng=stream(seed, "values"))
        y = self.simulate(values, x, rng=stream(seed, "data"))
        return values, (x.expand(n, *x.shape), y)

    def initial_values(self, data: Any, n: int, *, rng: torch.Generator) -> dict[str, Tensor]:
        """Choose ``n`` starting points as networks are initialised, [n, *site].

        The weights that act have standard deviation 1 / sqrt(fan_in), or that of the prior where
        it is smaller; biases likewise. Gains and noise are drawn from their priors.
        """
        like = data[0]
        sd = self.weight_sd()
        values = {}
        for name, site in self.sites(data).items():
            shape = (n, *site.shape)
            if name not in sd:
                values[name] = self._draw_positive(name, shape, rng, like)
                continue
            fan_in = site.shape[0] if len(site.shape) == 2 else _fan_in(self.sites(data), name)
            target = 1.0 / math.sqrt(fan_in)
            if self.prior == "fan_in" and len(site.shape) == 2:
                target *= math.sqrt(fan_in) / self.gains[int(name != "weight_0")]
            values[name] = min(target, sd[name]) * _normal(shape, rng, like)
        return values

    # -------------------------------------------------------------------------------- predicting

    def predict(
        self,
        post: Posterior,
        x: Any,
        *,
        site: str | None = None,
        joint: bool = False,
        groups: Mapping[str, Sequence[Any]] | None = None,
        rng: Rng | None = None,
        draws: int = 1000,
    ) -> Predictive:
        """Predict at ``x`` [*lead, row, feature].

        Args:
            post: A posterior of this model.
            x: Inputs.
            site: None for new observations (or labels), "f" for the network's output.
            joint: Keep the dependence between rows (and outputs): one network for each draw.
            groups: Not used by this model.
            rng: Needed only for a posterior that stores no draws, and for labels by Laplace.
            draws: How many to take from such a posterior.

        Returns:
            For new observations a mixture of normals (or of categorical laws) over the draws, of
            shape [*lead, row] or [*lead, row, output]; for "f" the draws themselves. From a
            :class:`~probkit.inference.Laplace` posterior a normal law in closed form, with
            outputs linearised in the weights.
        """
        if groups is not None:
            raise CapabilityError("BNN has no plates; leave groups= out")
        if site not in (None, "f"):
            raise DataError(f"site: expected None (new observations) or 'f', got {site!r}")
        x_train = post.context.data[0]
        x = as_inputs(x, "x", columns=x_train.shape[1]).to(x_train)
        source = post.source
        if isinstance(source, Fitted) and isinstance(source.guide, LaplaceNormal):
            if source.guide.linearised:
                return self._linearised(source, post.context.data, x, site, joint, rng, draws)
        values, log_weights = _draws_of(post, rng, draws)
        return self._mixture(post.context.data, values, log_weights, x, site=site, joint=joint)

    def _mixture(
        self,
        data: Any,
        values: Values,
        log_weights: Tensor | None,
        x: Tensor,
        *,
        site: str | None,
        joint: bool,
    ) -> Predictive:
        """Mix over draws: values [draw, *site], inputs [*lead, row, feature]."""
        rows = Rows.of(data, standardize=self.standardize)
        scaling = rows.affine() if self.likelihood == "normal" else None
        f = self._outputs_at(values, x if scaling is None else scaling.x(x))
        if scaling is None:
            if site == "f":
                return mixture_of_functions(f, log_weights)
            return mixture_of_categoricals(f, log_weights, joint=int(joint))
        if rows.y.ndim == 1:
            f = f.squeeze(-1)
        sd = torch.as_tensor(self._noise(values, f), dtype=f.dtype, device=f.device).sqrt()
        f = f * scaling.y_sd + scaling.y_mean
        if site == "f":
            return mixture_of_functions(f, log_weights)
        trailing = rows.y.ndim if joint else 0
        return mixture_of_normals(f, sd * scaling.y_sd, log_weights, joint=trailing)

    def _linearised(
        self,
        source: Fitted,
        data: Any,
        x: Tensor,
        site: str | None,
        joint: bool,
        rng: Rng | None,
        draws: int,
    ) -> Predictive:
        """Predict around the modes of a Laplace approximation, one component for each."""
        rows = Rows.of(data, standardize=self.standardize)
        scaling = rows.affine() if self.likelihood == "normal" else None
        inputs = x if scaling is None else scaling.x(x)
        guide = source.guide
        assert isinstance(guide, LaplaceNormal)
        parts, noises = [], []
        for params in source.params:
            parts.append(linearise(guide, params, self, data, inputs, joint=joint))
            noises.append(guide.centre(params, self, data).get(_NOISE))
        mean = torch.stack([part.mean for part in parts])
        covariance = torch.stack([part.covariance for part in parts])
        if scaling is None:
            if site == "f":
                return gaussian(mean, covariance, joint=joint, squeeze=False)
            source_rng = stream(require_rng(rng, "a prediction of labels"), "logits")
            logits = sample_gaussian(mean, covariance, draws, joint=joint, rng=source_rng)
            return mixture_of_categoricals(logits, None, joint=int(joint))
        sd = scaling.y_sd.expand(mean.shape[-1])
        if site is None:
            covariance = add_noise(covariance, self._noise_variances(noises, mean), joint=joint)
        mean = mean * sd + scaling.y_mean
        factor = sd.repeat(x.shape[-2]) if joint else sd
        covariance = covariance * factor * factor[:, None]
        return gaussian(mean, covariance, joint=joint, squeeze=rows.y.ndim == 1)

    def _noise_variances(self, noises: Sequence[Tensor | None], like: Tensor) -> Tensor:
        """Noise variance [component, output]."""
        shape = (len(noises), like.shape[-1])
        learned = [noise for noise in noises if noise is not None]
        if not learned:
            assert isinstance(self.noise_var, Real)
            return like.new_full(shape, float(self.noise_var))
        return torch.stack(learned).reshape(len(noises), -1).expand(shape)

    def _outputs_at(self, values: Values, x: Tensor) -> Tensor:
        """Evaluate the networks [draw] in parts whose hidden layers stay small."""
        rows = x.shape[:-1].numel()
        widest = max((*self.hidden, x.shape[-1], 1))
        total = len(values["bias_0"])
        part = max(1, _CHUNK_BYTES // max(1, rows * widest * x.element_size()))
        outputs = [
            self.network({name: value[i : i + part] for name, value in values.items()}, x)
            for i in range(0, total, part)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check_positive(name: str, value: Any) -> None:
    number = float(value) if isinstance(value, Real) else math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise DataError(f"{name}: expected a finite number > 0, got {value!r}")


def _batch_dims(values: Values) -> int:
    """Number of leading dims that values carry."""
    return values["bias_0"].ndim - 1


def _fan_in(sites: Mapping[str, Site], bias: str) -> int:
    return sites[bias.replace("bias", "weight")].shape[0]


def _normal(shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device)
    return noise.to(like.device)


def _draws_of(post: Posterior, rng: Rng | None, draws: int) -> tuple[Values, Tensor | None]:
    """Return values [draw, *site] and their log weights; of a fitted guide, fresh ones."""
    source = post.source
    if isinstance(source, Draws):
        weights = source.log_weights
        values = {name: value.flatten(0, 1) for name, value in source.values.items()}
        return values, None if weights is None else weights.flatten()
    rng = require_rng(rng, "a prediction from a fitted guide")
    return post.sample(draws, rng=stream(rng, "predict")), None

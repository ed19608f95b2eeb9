"""Ensembles of wide networks, each with a scale of its own, trained by gradient descent.

A network whose last layer starts with standard deviation sigma ~ H tends, as it widens, to a scale
mixture of Gaussian processes; so does the network after training. With the last layer trained
alone the limit given sigma is the noise-free process posterior of the NNGP kernel K,

    f | sigma ~ GP(K_*X K_XX^-1 y, sigma^2 (K_** - K_*X K_XX^-1 K_X*)),

and with all layers trained that of the tangent kernel; under an inverse gamma law of sigma^2 the
first is a Student-t process. The law of sigma is that before the data: descent from a start does
not weigh the starts (Lee, Yun, Yang and Lee, "Scale Mixtures of Neural Network Gaussian Processes",
ICLR 2022, theorems on gradient descent).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, constraints

from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import register, storable
from probkit.kernels import NNGPKernel
from probkit.kernels.storing import kernel_config, kernel_from_config
from probkit.model import Model, Site, Values
from probkit.models.bnn.network import Dense, activation_of, run_layers
from probkit.models.nngp_classification.labels import LabelLaw, mean_log_softmax
from probkit.models.scale_laws import InverseGamma, PointMass, ScaleLaw, as_scale_law
from probkit.numerics import check_allocation, check_finite
from probkit.posterior import Posterior, make_posterior
from probkit.predictive import Analytic, Empirical, Mixture, Predictive
from probkit.rng import Rng, scope, stream
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws
from probkit.tree import Tree, map_tensors

__all__ = ["ScaleMixtureNetwork", "WideEnsemble"]

_SCALE = "scale_var"
_OPTIONS = ("width", "scale", "loss", "noise_var", "classes")


@dataclass(frozen=True, eq=False)
class ScaleMixtureNetwork(Model):
    """A finite network whose wide limit is a scale mixture of the process of an NNGP kernel.

    Every weight is w_std / sqrt(fan_in) times a standard normal number, and every bias b_std times
    one, but the weights of the last layer are last_w_std / sqrt(width) times numbers of variance
    sigma^2 ~ ``scale``, one sigma^2 for all outputs of a network. Weights are kept without their
    factors, so that gradient descent at one rate has a limit as the width grows.

    Args:
        kernel: The limit: an :class:`~probkit.kernels.NNGPKernel` of architecture "mlp".
        width: Units of every hidden layer.
        scale: Law of the VARIANCE sigma^2 (``HalfCauchy``: of sigma).
        loss: "squared" for targets, or "cross_entropy" for labels.
        noise_var: Noise variance of new observations, and of the log density; at 0 predictions are
            those of the networks, and there is no density.
        classes: Number of classes; None for the largest label plus one.

    Data is a pair (X [row, feature], y [row] or [row, output]), or (X, labels [row]). The networks
    have the dtype of X.

    Raises:
        DataError: A value outside its range; the message names it.

    Example:
        >>> import probkit as pk
        >>> x = torch.linspace(-2, 2, 5)[:, None]
        >>> model = ScaleMixtureNetwork(NNGPKernel(depth=1, activation="erf"), width=64)
        >>> post = pk.infer(model, (x, x[:, 0].sin()), WideEnsemble(members=8, steps=20), rng=0)
        >>> post.predict(x).mean.shape, post.draws["scale_var"].shape
        (torch.Size([5]), torch.Size([1, 8]))
    """

    kernel: NNGPKernel
    width: int = 512
    scale: Distribution = field(default_factory=lambda: InverseGamma(2.0, 2.0))
    loss: Literal["squared", "cross_entropy"] = "squared"
    noise_var: float = 0.0
    classes: int | None = None

    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, NNGPKernel) or self.kernel.arch != "mlp":
            given = getattr(self.kernel, "arch", type(self.kernel).__name__)
            raise DataError(f"kernel: expected an NNGPKernel with arch='mlp', got {given!r}")
        if self.kernel.batch_shape or self.kernel.depth < 1:
            raise DataError(
                f"kernel: expected one network with depth >= 1, got batch shape "
                f"{tuple(self.kernel.batch_shape)} and depth={self.kernel.depth}"
            )
        activation_of(self.kernel.activation)
        object.__setattr__(self, "scale", as_scale_law(self.scale))
        if self.scale.batch_shape:
            raise DataError(
                f"scale: expected one law, got batch shape {tuple(self.scale.batch_shape)}"
            )
        if not isinstance(self.width, int) or self.width < 1:
            raise DataError(f"width: expected a whole number >= 1, got {self.width!r}")
        if self.loss not in ("squared", "cross_entropy"):
            raise DataError(f"loss: expected 'squared' or 'cross_entropy', got {self.loss!r}")
        if not 0 <= self.noise_var < math.inf:
            raise DataError(f"noise_var: expected a finite number >= 0, got {self.noise_var!r}")
        if self.classes is not None and self.classes < 2:
            raise DataError(f"classes: expected a whole number >= 2, got {self.classes!r}")

    # ------------------------------------------------------------------------------ the data

    def prepare(self, data: Any) -> tuple[Tensor, Tensor]:
        """Check (X, y); labels become one-hot rows [row, class].

        Raises:
            DataError: Not a pair, no rows, values that are not finite, labels that are not whole
                numbers from 0 to C - 1.
            ShapeError: Shapes that do not fit.
        """
        if not (isinstance(data, tuple | list) and len(data) == 2):
            raise DataError(f"expected data (X [row, feature], y), got {type(data).__name__}")
        x = _inputs(data[0], "X")
        y = as_tensor(data[1], name="y")
        if x.ndim != 2 or y.ndim not in (1, 2) or len(x) != len(y):
            raise ShapeError(
                f"expected X [row, feature] and y [row] or [row, output] with equally many rows, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if len(x) == 0 or y.shape[-1] == 0:
            raise DataError("expected at least one row and one output, got none")
        check_finite(y, "y", ("row", "output")[: y.ndim])
        if self.loss == "cross_entropy" and not (y.ndim == 2 and y.dtype == x.dtype):
            from probkit.models.nngp_classification.data import labelled

            y = labelled((x, y), classes=self.classes).one_hot()
        return x, y.to(x)

    def data_dims(self, data: Any) -> Any:
        """Rows, features and outputs."""
        return (("row", "feature"), ("row", "output"))

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return sigma^2, and weights and biases without their factors."""
        x, y = data
        outputs = 1 if y.ndim == 1 else int(y.shape[1])
        sizes = [int(x.shape[1]), *[self.width] * self.kernel.depth, outputs]
        dims = ["feature", *(f"unit_{k}" for k in range(self.kernel.depth)), "output"]
        sites: dict[str, Site] = {}
        if not isinstance(self.scale, PointMass):
            sites[_SCALE] = Site((), constraints.positive)
        for k in range(len(sizes) - 1):
            shape = (sizes[k], sizes[k + 1])
            sites[f"weight_{k}"] = Site(shape, constraints.real, (dims[k], dims[k + 1]))
            sites[f"bias_{k}"] = Site(shape[1:], constraints.real, (dims[k + 1],))
        return sites

    def sampler(self) -> Sampler:
        """Return an ensemble of 100 networks, their last layers trained by Adam."""
        return WideEnsemble()

    # -------------------------------------------------------------------------- the networks

    def initial_values(self, data: Any, n: int, *, rng: Rng) -> Values:
        """Draw ``n`` networks from the prior: where members start."""
        x, _ = data
        generator = stream(rng, "networks", device=x.device)
        law: ScaleLaw = self.scale  # type: ignore[assignment]
        with scope(rng=stream(rng, "scales")):
            variance = law.sample(torch.Size([n])).to(x)
        sites = self.sites(data)
        check_allocation(
            4 * n * x.element_size() * sum(math.prod(site.shape) for site in sites.values()),
            f"{n} networks of width {self.width}",
            device=x.device,
        )
        values = {
            name: torch.randn(n, *site.shape, generator=generator, dtype=x.dtype, device=x.device)
            for name, site in sites.items()
            if name != _SCALE
        }
        last = f"weight_{self.kernel.depth}"
        values[last] = values[last] * variance.sqrt()[:, None, None]
        return values if isinstance(law, PointMass) else {_SCALE: variance, **values}

    def features(self, values: Values, x: Tensor) -> Tensor:
        """Return what the last weights multiply, [*batch, row, unit], all factors included."""
        layers = run_layers(x, self._dense(values), activation_of(self.kernel.activation))
        return layers[-1].inputs

    def read_out(self, values: Values, features: Tensor) -> Tensor:
        """Return outputs [*batch, row, output] from :meth:`features` and the last layer."""
        weight, bias = (values[f"{kind}_{self.kernel.depth}"] for kind in ("weight", "bias"))
        return features @ weight + self._std("last_b_std") * bias[..., None, :]

    def network(self, values: Values, x: Tensor) -> Tensor:
        """Evaluate the networks at ``x`` [row, feature]: [*batch, row, output]."""
        return self.read_out(values, self.features(values, x))

    def _std(self, name: str) -> float:
        return float(getattr(self.kernel, name).detach())

    def _dense(self, values: Values) -> list[Dense]:
        dense = []
        for k in range(self.kernel.depth + 1):
            weight, bias = values[f"weight_{k}"], values[f"bias_{k}"]
            last = "last_" if k == self.kernel.depth else ""
            factor = self._std(f"{last}w_std") / math.sqrt(weight.shape[-2])
            dense.append(Dense(weight, self._std(f"{last}b_std") * bias, factor))
        return dense

    def losses(self, values: Values, data: Any) -> Tensor:
        """Return the loss [*batch] of each network; see :meth:`loss_of`."""
        return self.loss_of(self.network(values, data[0]), data[1])

    def loss_of(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the mean over rows of |f - y|^2 / 2, or of the cross-entropy, [*batch].

        Outputs are summed: an average over classes too would be smaller by their number.

        Args:
            f: Outputs [*batch, row, output].
            y: Targets [row] or [row, output], or one-hot labels [row, class].
        """
        if self.loss == "cross_entropy":
            return -(torch.log_softmax(f, -1) * y).sum(-1).mean(-1)
        target = y[:, None] if y.ndim == 1 else y
        return 0.5 * (f - target).square().sum(-1).mean(-1)

    # ------------------------------------------------------------------------------- densities

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return log p(sigma^2, weights) + scale * log p(y | X, weights) [*batch].

        Raises:
            CapabilityError: Squared loss without noise has no density.
        """
        law: ScaleLaw = self.scale  # type: ignore[assignment]
        last = f"weight_{self.kernel.depth}"
        variance = law.mean if isinstance(law, PointMass) else values[_SCALE]
        total = torch.zeros((), dtype=torch.float64)
        if not isinstance(law, PointMass):
            total = law.log_prob(variance)
        for name, site in self.sites(data).items():
            if name == _SCALE:
                continue
            dims = tuple(range(-len(site.shape), 0))
            term = -0.5 * values[name].square().sum(dims)
            if name == last:
                size = math.prod(site.shape)
                term = term / variance - 0.5 * size * variance.log()
            total = total + term - 0.5 * math.prod(site.shape) * math.log(2 * math.pi)
        return total + scale * self.log_likelihood(values, data)

    def log_likelihood(self, values: Values, data: Any) -> Tensor:
        """Return log p(y | X, weights) [*batch]."""
        x, y = data
        fit = -len(x) * self.losses(values, data)
        if self.loss == "cross_entropy":
            return fit
        if not self.noise_var:
            raise CapabilityError(
                "noise_var=0 leaves no density of the targets; give ScaleMixtureNetwork a noise_var"
            )
        return fit / self.noise_var - 0.5 * y.numel() * math.log(2 * math.pi * self.noise_var)

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
    ) -> Predictive:
        """Average the networks at ``x`` [row, feature].

        Args:
            post: A posterior of draws, such as that of :class:`WideEnsemble`.
            x: Inputs.
            site: None for new observations or labels, "f" for the outputs.
            joint: The outputs of a network belong together anyway; labels are predicted row by row.
            groups: Not used by this model.
            rng: Not needed.

        Returns:
            The networks' outputs as equally likely draws; a mixture of normal laws where there is
            noise; a categorical law of labels, probabilities averaged.
        """
        if groups is not None:
            raise CapabilityError(f"{type(self).__name__} has no plates; leave groups= out")
        if site not in (None, "f"):
            raise DataError(f"site: expected None (new observations) or 'f', got {site!r}")
        if not isinstance(post.source, Draws):
            raise CapabilityError("predict needs draws; run infer with WideEnsemble() or SGHMC()")
        trained, y = post.context.data
        x = _inputs(x, "x", columns=trained.shape[1]).to(trained)
        values = {name: value.flatten(0, 1) for name, value in post.source.values.items()}
        weights = post.source.log_weights
        weights = None if weights is None else weights.flatten()
        with torch.no_grad():
            f = self.network(values, x)
        if self.loss == "cross_entropy" and site is None:
            if joint:
                raise CapabilityError(
                    f"{type(self).__name__} predicts labels row by row; leave joint= out"
                )
            logits = _weighted_log_softmax(f, weights)
            return Analytic(LabelLaw(logits=logits, validate_args=False))
        if y.ndim == 1:
            f = f.squeeze(-1)
        if site == "f" or not self.noise_var:
            return Empirical(f, weights)
        equal = torch.zeros(len(f), dtype=f.dtype, device=f.device) if weights is None else weights
        noise = torch.full_like(f, math.sqrt(self.noise_var))
        return Mixture(Normal(f, noise, validate_args=False), equal)


@storable
@dataclass(frozen=True)
class WideEnsemble(Sampler):
    """Train many networks from draws of their prior, all in one tensor program.

    Members do not see each other. Full-batch descent on the mean loss of the rows: "gd" is plain
    gradient descent, whose limit as networks widen is known, "adam" is faster.

    Args:
        members: Networks.
        steps: Steps of each.
        lr: Learning rate. For "gd" on a squared loss below 2 n / (largest eigenvalue of the n x n
            kernel); for "adam" the size of the first steps of weights that start near one.
        optimizer: "gd" or "adam".
        train: "last" trains the last layer alone, "all" every layer.
        chunk: Steps between reports.

    Returns (through ``infer``):
        Draws [chain, member, *site], equally weighted, and ``sample_stats["loss"]`` [chain,
        member].

    Example:
        >>> WideEnsemble(members=50, optimizer="gd", lr=0.5).train
        'last'
    """

    members: int = 100
    steps: int = 2000
    lr: float = 0.05
    optimizer: Literal["gd", "adam"] = "adam"
    train: Literal["last", "all"] = "last"
    chunk: int = 100

    needs = ("sites", "initial_values", "losses", "features", "read_out", "loss_of")

    def __post_init__(self) -> None:
        counts = (self.members, self.steps, self.chunk)
        if not all(isinstance(count, int) and count >= 1 for count in counts):
            raise DataError(
                f"WideEnsemble: expected whole members, steps and chunk >= 1, got {self.members}, "
                f"{self.steps}, {self.chunk}"
            )
        if not 0 < self.lr < math.inf:
            raise DataError(f"WideEnsemble: expected 0 < lr < inf, got {self.lr}")
        if self.optimizer not in ("gd", "adam") or self.train not in ("last", "all"):
            raise DataError(
                "WideEnsemble: expected optimizer 'gd' or 'adam' and train 'last' or 'all', got "
                f"{self.optimizer!r}, {self.train!r}"
            )

    def total(self) -> int:
        """Number of chunks."""
        return -(-self.steps // self.chunk)

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Draw the members."""
        values = problem.model.initial_values(problem.data, self.members, rng=rngs[0])
        return {"values": dict(values), "optimizer": None, "taken": 0}

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Take ``chunk`` steps with every member."""
        model, (x, y) = problem.model, problem.data
        values = {name: value.detach().clone() for name, value in state["values"].items()}
        features = None
        if self.train == "last":
            with torch.no_grad():
                features = model.features(values, x)
        trained = [values[name] for name in _trained(values, self.train)]
        for tensor in trained:
            tensor.requires_grad_()
        optimizer = _OPTIMIZERS[self.optimizer](trained, lr=self.lr)
        if state["optimizer"] is not None:
            # Optimizers work in place; the old state must stay as it is.
            optimizer.load_state_dict(map_tensors(Tensor.clone, state["optimizer"]))
        taken = state["taken"]
        for _ in range(min(self.chunk, self.steps - taken)):
            optimizer.zero_grad()
            with torch.enable_grad():
                if features is None:
                    loss = model.losses(values, problem.data)
                else:
                    loss = model.loss_of(model.read_out(values, features), y)
                loss.sum().backward()
            optimizer.step()
            taken += 1
        values = {name: value.detach() for name, value in values.items()}
        loss = loss.detach()
        if not bool(torch.isfinite(loss).all()):
            raise DataError(
                f"WideEnsemble: the loss of member {int((~torch.isfinite(loss)).nonzero()[0])} is "
                f"no longer finite at step {taken}; lower lr={self.lr:g}"
            )
        new = {"values": values, "optimizer": optimizer.state_dict(), "taken": taken}
        return Step(new, taken >= self.steps, info={"loss": float(loss.mean())})

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """Any state is an ensemble."""
        return True

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the members as equally weighted draws."""
        with torch.no_grad():
            loss = problem.model.losses(state["values"], problem.data)
        attrs: dict[str, Any] = {"ensemble": True}
        if self.members == 1:
            attrs["point_estimate"] = True
        return make_posterior(
            problem,
            Draws({name: value[None] for name, value in state["values"].items()}),
            sample_stats={"loss": loss[None]},
            attrs=attrs,
        )


_OPTIMIZERS: Mapping[str, Any] = {"gd": torch.optim.SGD, "adam": torch.optim.Adam}


def _trained(values: Values, train: str) -> list[str]:
    """Names of the values that are trained; sigma^2 is drawn, never trained."""
    names = [name for name in values if name != _SCALE]
    return names if train == "all" else names[-2:]


def _weighted_log_softmax(f: Tensor, log_weights: Tensor | None) -> Tensor:
    if log_weights is None:
        return mean_log_softmax([f])
    weighted = torch.log_softmax(f, -1) + torch.log_softmax(log_weights, 0)[:, None, None]
    return weighted.logsumexp(0)


def _inputs(value: Any, name: str, *, columns: int | None = None) -> Tensor:
    """Check inputs [row, feature], their precision kept."""
    x = as_tensor(value, name=name)
    if not x.is_floating_point():
        x = x.to(torch.get_default_dtype())
    if x.dtype in (torch.float16, torch.bfloat16):
        raise DataError(f"{name}: expected float64 or float32, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ShapeError(
            f"{name}: expected [row, feature], got {tuple(x.shape)}; use {name}[:, None]"
        )
    if columns is not None and x.shape[1] != columns:
        raise ShapeError(
            f"{name}: expected {columns} feature columns as in training, got {x.shape[1]}"
        )
    check_finite(x, name, ("row", "column"))
    return x


# --------------------------------------------------------------------------------------- files


def _to_tree(model: ScaleMixtureNetwork) -> dict[str, Any]:
    config, tensors = kernel_config(model.kernel)
    options = {name: getattr(model, name) for name in _OPTIONS}
    return {"kernel": {"config": config, "tensors": tensors}, **options}


def _from_tree(tree: dict[str, Any]) -> ScaleMixtureNetwork:
    kernel = kernel_from_config(tree["kernel"]["config"], tree["kernel"]["tensors"])
    return ScaleMixtureNetwork(kernel, **{k: v for k, v in tree.items() if k != "kernel"})


register(ScaleMixtureNetwork, "ScaleMixtureNetwork", _to_tree, _from_tree)

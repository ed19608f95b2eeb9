"""Deep kernel machines: NNGPs whose hidden Gram matrices are learned.

In an NNGP the Gram matrix of layer l is a fixed function of that before, G_l = K(G_(l-1)). A deep
kernel machine lets it move away at a price: it maximises

    L = log N(Y; 0, K(G_L) + noise I) - sum_l nu_l KL(N(0, G_l) || N(0, K(G_(l-1)))),

G_0 = X X' / d (whose K is linear, as the first layer of a network is), which is the limit of a
Bayesian deep Gaussian process as its layers and its outputs widen together (Yang, Robeyns, Milsom,
Anson, Schoots and Aitchison, "A theory of representation learning gives a deep generalisation of
kernel methods", ICML 2023). As nu grows the NNGP comes back; it is where the search starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pyro.distributions import Normal
from torch import Tensor

from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.files import register
from probkit.kernels import NNGPKernel
from probkit.kernels.backends.activations import activation_of
from probkit.kernels.storing import kernel_config, kernel_from_config
from probkit.model import Model, Site, Values
from probkit.numerics import check_allocation, check_finite, safe_cholesky
from probkit.posterior import Context, Evidence, Posterior
from probkit.predictive import Analytic, Predictive
from probkit.rng import Rng
from probkit.sampler import Sampler
from probkit.sources import Closed

__all__ = ["DeepKernelMachine", "gram_divergence"]

_JITTER = 1e-8


@dataclass(frozen=True, eq=False)
class DeepKernelMachine(Model):
    """Regression with learned Gram matrices of the hidden layers.

    ``infer(model, (X, y), rng=0)`` maximises the objective by L-BFGS, in coordinates in which the
    NNGP is zero: G_l = T_l A_l A_l' T_l' with T_l T_l' = K(G_(l-1)) and A_l lower triangular with a
    positive diagonal. New rows join by the exact conditional of each layer given the training rows,
    of which all are inducing points.

    Args:
        kernel: The NNGP of infinite nu: an :class:`~probkit.kernels.NNGPKernel` of architecture
            "mlp". Its depth L is the number of Gram matrices; its hyper-parameters stay fixed.
        nu: Price of a layer's divergence, one number a layer or one for all; ``math.inf`` is the
            NNGP.
        noise_var: Noise variance.
        steps: L-BFGS iterations at most.

    Data is a pair (X [row, feature], y [row] or [row, output]); memory is O(L n^2).

    Raises:
        DataError: A value outside its range; the message names it.

    Example:
        >>> import probkit as pk
        >>> x = torch.linspace(-2, 2, 12, dtype=torch.float64)[:, None]
        >>> model = DeepKernelMachine(NNGPKernel(depth=2), steps=10)
        >>> post = pk.infer(model, (x, x[:, 0].sin()), rng=0)
        >>> post.predict(x).mean.shape, post.log_evidence.kind
        (torch.Size([12]), 'estimate')
    """

    kernel: NNGPKernel
    nu: float | tuple[float, ...] = 1.0
    noise_var: float = 0.1
    steps: int = 200

    batched: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, NNGPKernel) or self.kernel.arch != "mlp":
            given = getattr(self.kernel, "arch", type(self.kernel).__name__)
            raise DataError(f"kernel: expected an NNGPKernel with arch='mlp', got {given!r}")
        if self.kernel.batch_shape or self.kernel.depth < 1:
            raise DataError(
                f"kernel: expected one network with depth >= 1, got batch shape "
                f"{tuple(self.kernel.batch_shape)} and depth={self.kernel.depth}"
            )
        if not isinstance(self.steps, int) or self.steps < 1:
            raise DataError(f"steps: expected a whole number >= 1, got {self.steps!r}")
        if not 0 < self.noise_var < math.inf:
            raise DataError(f"noise_var: expected a finite number > 0, got {self.noise_var!r}")
        if len(self.prices) != self.depth or not all(value > 0 for value in self.prices):
            raise DataError(
                f"nu: expected a number > 0, or one for each of {self.depth} layers, got "
                f"{self.nu!r}"
            )

    @property
    def depth(self) -> int:
        """Number of hidden layers."""
        return int(self.kernel.depth)

    @property
    def prices(self) -> tuple[float, ...]:
        """Price of every layer."""
        return self.nu if isinstance(self.nu, tuple) else (self.nu,) * self.depth

    # ------------------------------------------------------------------------------ the data

    def prepare(self, data: Any) -> tuple[Tensor, Tensor]:
        """Check (X, y) and return them in float64 on one device.

        Raises:
            DataError: Not a pair, no rows, or a value that is not finite (row and column named).
            ShapeError: Shapes that do not fit.
        """
        if not (isinstance(data, tuple | list) and len(data) == 2):
            raise DataError(f"expected data (X [row, feature], y), got {type(data).__name__}")
        x = _inputs(data[0], "X")
        y = as_tensor(data[1], name="y").double()
        if y.ndim not in (1, 2) or len(x) != len(y):
            raise ShapeError(
                f"expected X [row, feature] and y [row] or [row, output] with equally many rows, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if len(x) == 0 or y.shape[-1] == 0:
            raise DataError("expected at least one row and one output, got none")
        check_finite(y, "y", ("row", "output")[: y.ndim])
        return x, y.to(x.device)

    def data_dims(self, data: Any) -> Any:
        """Rows, features and outputs."""
        return (("row", "feature"), ("row", "output"))

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return none: Gram matrices are learned, not drawn."""
        return {}

    def sampler(self) -> Sampler:
        """Return Direct, which maximises the objective."""
        from probkit.inference import Direct

        return Direct()

    # ------------------------------------------------------------------------- the objective

    def _variances(self, layer: int) -> tuple[float, float]:
        """Weight and bias variance of the dense map after ``layer`` activations."""
        last = "last_" if layer == self.depth else ""
        w, b = (getattr(self.kernel, f"{last}{name}").detach() for name in ("w_std", "b_std"))
        return float(w) ** 2, float(b) ** 2

    def layer(self, k: int, gram: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Map covariances through activation ``k`` (none for 0) and the dense layer after it.

        Args:
            k: Number of the layer, 0 to L.
            gram: Covariances [row, column].
            left: Variances of the rows.
            right: Variances of the columns.
        """
        w, b = self._variances(k)
        if k:
            activation = activation_of(self.kernel.activation)
            gram = activation.covariance(gram, left[:, None], right[None, :])
        return w * gram + b

    def square(self, k: int, gram: Tensor) -> Tensor:
        """Map a Gram matrix [row, row] through layer ``k``; see :meth:`layer`."""
        diagonal = gram.diagonal()
        return self.layer(k, gram, diagonal, diagonal)

    def _diagonal(self, k: int, variance: Tensor) -> Tensor:
        w, b = self._variances(k)
        if k:
            variance = activation_of(self.kernel.activation).variance(variance)
        return w * variance + b

    def grams(self, factors: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """Return G_1, ..., G_L [row, row] for lower factors A_l in the coordinates of the NNGP."""
        gram = x @ x.mT / x.shape[-1]
        found = []
        for k, factor in enumerate(factors):
            root = self._root(self.square(k, gram)) @ factor
            gram = root @ root.mT
            found.append(gram)
        return found

    def _root(self, gram: Tensor) -> Tensor:
        """Factorise a Gram matrix; a little is added to its diagonal, everywhere the same share."""
        unit = _JITTER * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        return safe_cholesky(gram + unit * torch.eye(len(gram), dtype=gram.dtype).to(gram))[0]

    def objective(self, factors: Sequence[Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        """Return the objective L for lower factors A_l [row, row]; ones are the NNGP.

        Args:
            factors: One a layer, with a positive diagonal.
            data: (X, y), prepared.
        """
        x, y = data
        price = sum(
            nu * gram_divergence(factor)
            for nu, factor in zip(self.prices, factors, strict=True)
            if math.isfinite(nu)
        )
        gram = self.grams(factors, x)[-1]
        return self._log_likelihood(self.square(self.depth, gram), y) - price

    def _log_likelihood(self, gram: Tensor, y: Tensor) -> Tensor:
        """Return log N(y; 0, gram + noise I), outputs added."""
        target = y[:, None] if y.ndim == 1 else y
        noise = self.noise_var * torch.eye(len(gram), dtype=gram.dtype).to(gram)
        factor, _ = safe_cholesky(gram + noise)
        white = torch.linalg.solve_triangular(factor, target, upper=False)
        log_det = factor.diagonal().log().sum()
        count = target.shape[1]
        return (
            -0.5 * white.square().sum() - count * log_det - 0.5 * y.numel() * math.log(2 * math.pi)
        )

    # ----------------------------------------------------------------------------- the search

    def condition(self, data: tuple[Tensor, Tensor], hyper: Values | None) -> Posterior:
        """Maximise the objective and condition on it; ``log_evidence`` is the objective.

        It is an estimate: the log evidence of y given the learned Gram matrices, less their price.
        """
        if hyper:
            raise DataError(f"hyper: expected none, got {', '.join(hyper)}")
        x, y = data
        n = len(x)
        check_allocation(
            8 * 12 * self.depth * n * n, f"{self.depth} Gram matrices of {n} rows", device=x.device
        )
        factors = self._search(data)
        with torch.no_grad():
            value = self.objective(factors, data)
        return Posterior(
            source=Closed(joint={}, state={"factors": [f.contiguous() for f in factors]}),
            model=self,
            context=Context(data, {}, {}),
            log_evidence=Evidence(value.reshape(1), "estimate"),
        )

    def _search(self, data: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Climb from the NNGP, of which every layer with a finite price may depart."""
        x, _ = data
        n = len(x)
        free = [k for k, nu in enumerate(self.prices) if math.isfinite(nu)]
        raw = torch.zeros(len(free), n, n, dtype=x.dtype, device=x.device, requires_grad=True)
        if not free:
            return self._factors(raw, free, n)
        optimizer = torch.optim.LBFGS(
            [raw], max_iter=self.steps, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=1e-7, tolerance_change=1e-11,
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                loss = -self.objective(self._factors(raw, free, n), data)
                loss.backward()
            return loss

        optimizer.step(closure)
        return self._factors(raw.detach(), free, n)

    def _factors(self, raw: Tensor, free: Sequence[int], n: int) -> list[Tensor]:
        """Read lower factors from the reals: the identity is zero."""
        one = torch.eye(n, dtype=raw.dtype, device=raw.device)
        learned = [torch.tril(part, -1) + torch.diag(part.diagonal().exp()) for part in raw]
        return [learned[free.index(k)] if k in free else one for k in range(self.depth)]

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
        """Predict at ``x`` [row, feature].

        Given the training rows a new row has in each layer the covariances g = G_l K^-1 k and the
        variance k_** - k' K^-1 k + k' K^-1 G_l K^-1 k, with K, k, k_** of the layer before: the
        conditional that costs no divergence.

        Args:
            post: A posterior of this model.
            x: Inputs.
            site: None for new observations, "f" for the function.
            joint: Not offered.
            groups: Not used by this model.
            rng: Not needed.

        Returns:
            Normal laws [row] or [row, output].
        """
        if groups is not None or joint:
            what = "joint=" if joint else "groups="
            raise CapabilityError(
                f"{type(self).__name__} predicts rows one by one; leave {what} out"
            )
        if site not in (None, "f"):
            raise DataError(f"site: expected None (new observations) or 'f', got {site!r}")
        trained, y = post.context.data
        x = _inputs(x, "x", columns=trained.shape[1]).to(trained)
        source = post.source
        assert isinstance(source, Closed)
        with torch.no_grad():
            mean, variance = self._predicted(source.state["factors"], trained, y, x)
        if site is None:
            variance = variance + self.noise_var
        sd = variance.sqrt()
        if y.ndim == 1:
            return Analytic(Normal(mean[:, 0], sd, validate_args=False))
        return Analytic(Normal(mean, sd[:, None].expand_as(mean), validate_args=False))

    def _predicted(
        self, factors: Sequence[Tensor], trained: Tensor, y: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return mean [row, output] and variance [row] of the function at ``x``."""
        d = trained.shape[1]
        gram, cross = trained @ trained.mT / d, trained @ x.mT / d
        own = x.square().sum(-1) / d
        for k, factor in enumerate(factors):
            root = self._root(self.square(k, gram))
            k_cross, k_own = self.layer(k, cross, gram.diagonal(), own), self._diagonal(k, own)
            white = torch.linalg.solve_triangular(root, k_cross, upper=False)
            learned = root @ factor
            gram = learned @ learned.mT
            moved = factor.mT @ white  # A' L^-1 k
            cross = learned @ moved
            own = (k_own - white.square().sum(0)).clamp_min(0) + moved.square().sum(0)
        noise = self.noise_var * torch.eye(len(gram), dtype=gram.dtype).to(gram)
        root, _ = safe_cholesky(self.square(self.depth, gram) + noise)
        k_cross = self.layer(self.depth, cross, gram.diagonal(), own)
        k_own = self._diagonal(self.depth, own)
        white = torch.linalg.solve_triangular(root, k_cross, upper=False)
        target = y[:, None] if y.ndim == 1 else y
        mean = white.mT @ torch.linalg.solve_triangular(root, target, upper=False)
        variance = k_own - white.square().sum(0)
        return mean, torch.maximum(variance, torch.finfo(variance.dtype).eps * k_own)


def gram_divergence(factor: Tensor) -> Tensor:
    """Return KL(N(0, G) || N(0, K)) for G = T A A' T', K = T T': (|A|^2 - ln|A A'| - n) / 2.

    Args:
        factor: A [*batch, n, n], lower triangular with a positive diagonal.

    Example:
        >>> gram_divergence(torch.eye(3)).item()
        0.0
    """
    diagonal = factor.diagonal(dim1=-2, dim2=-1)
    log_det = 2 * diagonal.log().sum(-1)
    return 0.5 * (factor.square().sum((-2, -1)) - log_det - factor.shape[-1])


def _inputs(value: Any, name: str, *, columns: int | None = None) -> Tensor:
    x = as_tensor(value, name=name)
    if x.dtype in (torch.float16, torch.bfloat16) or x.is_complex():
        raise DataError(f"{name}: expected float64 or float32, got {x.dtype}")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ShapeError(
            f"{name}: expected [row, feature], got {tuple(x.shape)}; use {name}[:, None]"
        )
    if columns is not None and x.shape[1] != columns:
        raise ShapeError(
            f"{name}: expected {columns} feature columns as in training, got {x.shape[1]}"
        )
    x = x.double().contiguous()
    check_finite(x, name, ("row", "column"))
    return x


# --------------------------------------------------------------------------------------- files


def _to_tree(model: DeepKernelMachine) -> dict[str, Any]:
    config, tensors = kernel_config(model.kernel)
    options = {name: getattr(model, name) for name in ("nu", "noise_var", "steps")}
    return {"kernel": {"config": config, "tensors": tensors}, **options}


def _from_tree(tree: dict[str, Any]) -> DeepKernelMachine:
    kernel = kernel_from_config(tree["kernel"]["config"], tree["kernel"]["tensors"])
    return DeepKernelMachine(kernel, **{k: v for k, v in tree.items() if k != "kernel"})


register(DeepKernelMachine, "DeepKernelMachine", _to_tree, _from_tree)

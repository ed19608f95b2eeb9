"""Neural network Gaussian process kernels, as GPyTorch kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import Kernel as _Kernel
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.kernels.backends import NAMES, backend
from probkit.kernels.backends.activations import activation_of
from probkit.kernels.inputs import check_inputs, one_input

__all__ = ["ARCHITECTURES", "NNGPKernel"]

ARCHITECTURES = ("mlp",)
"""Every architecture that :class:`NNGPKernel` accepts."""

_STDS = ("w_std", "b_std", "last_w_std", "last_b_std")
_MAY_BE_ZERO = ("b_std", "last_b_std")


class NNGPKernel(_Kernel):
    r"""Covariance of an infinitely wide fully-connected network with normal weights and biases.

    The input layer gives :math:`K_0 = \sigma_w^2 X X'^T / d + \sigma_b^2`; each of the ``depth``
    hidden activations is followed by a dense layer,
    :math:`K_l = a_l F(K_{l-1}) + b_l` (Lee et al., 2018, eq. 4-5), where
    :math:`a_l = \sigma_w^2, b_l = \sigma_b^2` but for the last layer, which has
    ``last_w_std`` and ``last_b_std``. F is the arc-cosine kernel for ReLU and the arcsine kernel
    for erf. ``depth=0`` is the linear model of the last layer alone,
    :math:`K = \sigma_{last,w}^2 X X'^T / d + \sigma_{last,b}^2`.

    All four hyper-parameters are standard deviations [*batch_shape, 1, 1], kept in float64 and cast
    to the dtype and device of the data. Those that are learned are parameters ``raw_w_std`` etc.
    under a positive constraint; those that are not are buffers ``fixed_w_std`` etc., which may hold
    an exact zero for a bias. Either kind is read and set as ``kernel.w_std``.

    Args:
        depth: Number of hidden layers (activations), at least 0.
        activation: "relu" or "erf".
        w_std: Standard deviation of weights times the root of fan-in; a number, or a tensor
            [*batch_shape] or [*batch_shape, 1, 1].
        b_std: Standard deviation of biases; 0 for none.
        last_w_std: The same as ``w_std`` for the last layer.
        last_b_std: The same as ``b_std`` for the last layer.
        arch: "mlp".
        batch_shape: One kernel for each element.
        active_dims: Columns of the data that the kernel sees; all by default.
        learn: Names of the hyper-parameters to learn. By default ``w_std``, ``b_std`` and
            ``last_b_std``, without those that are 0 and without those that ``depth=0`` ignores.
            ``last_w_std`` is a mere scale of the kernel (if ``last_b_std=0``): learn it only where
            nothing else, such as a ``ScaleKernel`` or a scale mixture, takes that part.
        backend: Name for :func:`probkit.kernels.backend`; by default chosen by the data's device.

    Raises:
        DataError: An option outside its range; the message names what is accepted.
        ShapeError: A hyper-parameter that does not fit ``batch_shape``, or inputs that do not fit.

    Example:
        >>> x = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.7]], dtype=torch.float64)
        >>> kernel = NNGPKernel(depth=3, w_std=1.5, b_std=0.3, last_w_std=1.2)
        >>> kernel(x, diag=True)
        tensor([1.1355, 1.2654], dtype=torch.float64, grad_fn=...)
        >>> kernel.ntk(x).shape
        torch.Size([2, 2])
    """

    has_lengthscale = False

    def __init__(
        self,
        depth: int = 3,
        activation: str = "relu",
        w_std: float | Tensor = 1.5,
        b_std: float | Tensor = 0.3,
        last_w_std: float | Tensor = 1.2,
        last_b_std: float | Tensor = 0.0,
        arch: str = "mlp",
        *,
        batch_shape: Sequence[int] = (),
        active_dims: Sequence[int] | Tensor | None = None,
        learn: Sequence[str] | None = None,
        backend: str | None = None,
    ) -> None:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise DataError(f"depth: expected a whole number of hidden layers >= 0, got {depth!r}")
        if arch not in ARCHITECTURES:
            accepted = ", ".join(map(repr, ARCHITECTURES))
            raise DataError(f"arch: expected one of {accepted}, got {arch!r}")
        if backend is not None and backend not in NAMES:
            accepted = ", ".join(map(repr, NAMES))
            raise DataError(f"backend: expected one of {accepted} or None, got {backend!r}")
        activation_of(activation)
        super().__init__(
            batch_shape=torch.Size(batch_shape),
            active_dims=active_dims if active_dims is None else torch.as_tensor(active_dims),
        )
        self.depth, self.activation, self.arch, self.backend = depth, activation, arch, backend
        given = dict(zip(_STDS, (w_std, b_std, last_w_std, last_b_std), strict=True))
        values = {name: self._as_std(name, value) for name, value in given.items()}
        self.learn = _learned(learn, values, depth)
        for name, value in values.items():
            if name in self.learn:
                constraint = Positive()
                raw = torch.nn.Parameter(constraint.inverse_transform(value))
                self.register_parameter(f"raw_{name}", raw)
                self.register_constraint(f"raw_{name}", constraint)
            else:
                self.register_buffer(f"fixed_{name}", value)

    # ----------------------------------------------------------------------- hyper-parameters

    @property
    def w_std(self) -> Tensor:
        """Standard deviation of weights [*batch_shape, 1, 1]."""
        return self._std("w_std")

    @w_std.setter
    def w_std(self, value: float | Tensor) -> None:
        self._set_std("w_std", value)

    @property
    def b_std(self) -> Tensor:
        """Standard deviation of biases [*batch_shape, 1, 1]."""
        return self._std("b_std")

    @b_std.setter
    def b_std(self, value: float | Tensor) -> None:
        self._set_std("b_std", value)

    @property
    def last_w_std(self) -> Tensor:
        """Standard deviation of the weights of the last layer [*batch_shape, 1, 1]."""
        return self._std("last_w_std")

    @last_w_std.setter
    def last_w_std(self, value: float | Tensor) -> None:
        self._set_std("last_w_std", value)

    @property
    def last_b_std(self) -> Tensor:
        """Standard deviation of the biases of the last layer [*batch_shape, 1, 1]."""
        return self._std("last_b_std")

    @last_b_std.setter
    def last_b_std(self, value: float | Tensor) -> None:
        self._set_std("last_b_std", value)

    def _std(self, name: str) -> Tensor:
        if name not in self.learn:
            return getattr(self, f"fixed_{name}")
        constraint = self.constraint_for_parameter_name(f"raw_{name}")
        return constraint.transform(getattr(self, f"raw_{name}"))

    def _set_std(self, name: str, value: float | Tensor) -> None:
        new = self._as_std(name, value)
        if name not in self.learn:
            old = getattr(self, f"fixed_{name}")
            setattr(self, f"fixed_{name}", new.to(old))
            return
        if not bool((new > 0).all()):
            raise DataError(f"{name}: expected > 0 where it is learned, got {_short(value)}")
        raw = getattr(self, f"raw_{name}")
        constraint = self.constraint_for_parameter_name(f"raw_{name}")
        self.initialize(**{f"raw_{name}": constraint.inverse_transform(new.to(raw))})

    def _as_std(self, name: str, value: float | Tensor) -> Tensor:
        """A checked copy [*batch_shape, 1, 1] in float64."""
        std = torch.as_tensor(value, dtype=torch.float64).detach().clone()
        bound = ">= 0" if name in _MAY_BE_ZERO else "> 0"
        fits = (std >= 0) if name in _MAY_BE_ZERO else (std > 0)
        if not bool((fits & std.isfinite()).all()):
            raise DataError(f"{name}: expected finite and {bound}, got {_short(value)}")
        batch = self._batch_shape
        if len(batch) and std.shape == batch:
            std = std[..., None, None]
        try:
            return std.expand(*batch, 1, 1).clone()
        except RuntimeError:
            raise ShapeError(
                f"{name}: expected a number or a tensor [*batch_shape] = {list(batch)}, "
                f"got {list(std.shape)}"
            ) from None

    def _step_variances(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias variances of every step [*batch_shape, steps], last layer last."""
        stds = (self._std(name).to(dtype=like.dtype, device=like.device) for name in _STDS)
        # a functional call may give batch dims to some of them only
        w, b, last_w, last_b = torch.broadcast_tensors(*(std[..., 0] for std in stds))
        weight_std = torch.cat([w] * self.depth + [last_w], dim=-1)
        bias_std = torch.cat([b] * self.depth + [last_b], dim=-1)
        return weight_std**2, bias_std**2

    # ----------------------------------------------------------------------- evaluation

    def __call__(self, x1: Tensor, x2: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate lazily, as every GPyTorch kernel; inputs that do not fit are refused at once."""
        if x1.ndim >= 2 and (x2 is None or x2.ndim >= 2):
            check_inputs(x1, x1 if x2 is None else x2)
        return super().__call__(x1, x2, *args, **kwargs)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Tensor:
        """Kernel matrix [*batch, n, m], or its diagonal [*batch, n].

        Args:
            x1: Inputs [*batch, n, d].
            x2: Inputs [*batch, m, d].
            diag: Only pairs of equal rows (n = m).
            last_dim_is_batch: One kernel for each column: [*batch, d, n, m].
            **params: Ignored, as GPyTorch kernels do.
        """
        return self._evaluate("nngp", x1, x2, diag, last_dim_is_batch)

    def expand_batch(self, *sizes: Any) -> NNGPKernel:
        """Return the kernel with every hyper-parameter expanded to a batch shape."""
        return self._without_columns(lambda kernel: _Kernel.expand_batch(kernel, *sizes))

    def __getitem__(self, index: Any) -> NNGPKernel:
        if not self.batch_shape:
            return self
        return self._without_columns(lambda kernel: _Kernel.__getitem__(kernel, index))

    def _without_columns(self, change: Callable[[NNGPKernel], NNGPKernel]) -> NNGPKernel:
        """Apply ``change`` without ``active_dims``: GPyTorch expands and indexes every buffer."""
        if self.active_dims is None:
            return change(self)
        bare = copy.deepcopy(self)
        bare.active_dims = None
        changed = change(bare)
        changed.active_dims = self.active_dims
        return changed

    def ntk(self, x1: Tensor, x2: Tensor | None = None, *, diag: bool = False) -> Tensor:
        """Neural tangent kernel [*batch, n, m], or its diagonal [*batch, n]; all layers trained.

        Example:
            >>> kernel = NNGPKernel(depth=1, w_std=1.0, b_std=0.0, last_w_std=1.0)
            >>> kernel.ntk(torch.ones(1, 1, dtype=torch.float64))
            tensor([[1.]], dtype=torch.float64, grad_fn=...)
        """
        inputs = [x if x.ndim > 1 else x.unsqueeze(-1) for x in (x1, x2) if x is not None]
        if self.active_dims is not None:
            inputs = [x.index_select(-1, self.active_dims) for x in inputs]
        return self._evaluate("ntk", inputs[0], inputs[-1], diag, False)

    def _evaluate(
        self, which: str, x1: Tensor, x2: Tensor, diag: bool, last_dim_is_batch: bool
    ) -> Tensor:
        check_inputs(x1, x2)
        same = one_input(x1, x2)
        weight_var, bias_var = self._step_variances(x1)
        if last_dim_is_batch:
            x1, x2 = (x.mT.unsqueeze(-1) for x in (x1, x2))
            weight_var, bias_var = weight_var.unsqueeze(-2), bias_var.unsqueeze(-2)
        if diag and x1.shape[-2] != x2.shape[-2]:
            raise ShapeError(
                f"diag=True: expected x1 [*batch, n, d] and x2 [*batch, n, d] with as many rows, "
                f"got {x1.shape[-2]} and {x2.shape[-2]}"
            )
        function = getattr(backend(self.backend, x1.device), which)
        return function(
            x1,
            None if same else x2,
            weight_var,
            bias_var,
            activation=self.activation,
            diag=diag,
        )

    def extra_repr(self) -> str:
        """Options in the printed form."""
        return f"depth={self.depth}, activation={self.activation!r}, arch={self.arch!r}"


def _learned(learn: Sequence[str] | None, values: dict[str, Tensor], depth: int) -> tuple[str, ...]:
    """Names of the hyper-parameters to learn, in the order of the signature."""
    used = _STDS if depth > 0 else _STDS[2:]
    if learn is None:
        return tuple(
            name for name in used if name != "last_w_std" and bool((values[name] > 0).all())
        )
    if isinstance(learn, str):
        learn = (learn,)
    for name in learn:
        if name not in used:
            raise DataError(f"learn: expected names out of {', '.join(used)}, got {name!r}")
        if not bool((values[name] > 0).all()):
            raise DataError(
                f"learn: {name} = 0 cannot be learned; start it at a positive value or leave it out"
            )
    return tuple(name for name in used if name in learn)


def _short(value: float | Tensor) -> str:
    if isinstance(value, Tensor) and value.numel() > 1:
        low, high = value.min().item(), value.max().item()
        return f"values from {low:g} to {high:g}" if math.isfinite(low + high) else "NaN or inf"
    return f"{float(torch.as_tensor(value).detach()):g}"

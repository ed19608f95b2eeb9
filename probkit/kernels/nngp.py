"""Neural network Gaussian process kernels, as GPyTorch kernels."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import Kernel as _Kernel
from torch import Tensor

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.kernels.backends import NAMES, backend
from probkit.kernels.backends.activations import activation_of
from probkit.kernels.backends.conv_tiled import POOLINGS
from probkit.kernels.inputs import check_inputs, one_input
from probkit.numerics import check_finite

__all__ = ["ARCHITECTURES", "NNGPKernel"]

ARCHITECTURES = ("mlp", "resnet", "conv")
"""Every architecture that :class:`NNGPKernel` accepts."""

_STDS = ("w_std", "b_std", "last_w_std", "last_b_std")
_MAY_BE_ZERO = ("b_std", "last_b_std")
_PER_LAYER = ("w_std", "b_std")

_Value = float | Sequence[float] | Tensor


class NNGPKernel(_Kernel):
    r"""Covariance of an infinitely wide network with normal weights and biases.

    Architectures, with F the expectation that the activation stands for:

    - ``"mlp"``: the input layer gives :math:`K_0 = \sigma_w^2 X X'^T / d + \sigma_b^2`; each of the
      ``depth`` hidden activations is followed by a dense layer, :math:`K_l = a_l F(K_{l-1}) + b_l`
      (Lee et al., 2018, eq. 4-5), where :math:`a_l = \sigma_w^2, b_l = \sigma_b^2` but for the last
      layer, which has ``last_w_std`` and ``last_b_std``. ``depth=0`` is the linear model of the
      last layer alone, :math:`K = \sigma_{last,w}^2 X X'^T / d + \sigma_{last,b}^2`.
    - ``"resnet"``: the input layer, then ``depth`` residual blocks
      :math:`K \leftarrow K + \sigma_w^2 F(K) + \sigma_b^2`, then an activation and the last layer.
    - ``"conv"``: ``depth`` convolutions of 3 x 3 pixels, stride one, zero outside of the image,
      each followed by the activation; then a head and the last layer, fully connected. The head
      flattens all pixels, or averages over them (Novak et al., 2019). Each row of the inputs is an
      image [H, W, C], flattened in this order (``images.flatten(-3)``); the kernel itself and
      :meth:`ntk` also take images [*batch, n, H, W, C]. Time per pair of images and layer grows
      with the number of pixels H W for ``"flatten"``, with its square for ``"gap"``; memory beyond
      the matrix does not grow with the number of pairs.

    F is the arc-cosine kernel for ReLU and the arcsine kernel for erf. Tanh has no closed form: a
    sum of error functions within 1.4e-9 of it takes its place, whose kernel is within 3e-9 times
    the weight variances of the layer that follows
    (:class:`~probkit.kernels.backends.activations.Tanh`).

    All four hyper-parameters are standard deviations [*batch_shape, 1, 1], kept in float64 and cast
    to the dtype and device of the data; ``w_std`` and ``b_std`` may have one value for each layer
    below the last, [*batch_shape, 1, layers]. Those that are learned are parameters ``raw_w_std``
    etc. under a positive constraint; those that are not are buffers ``fixed_w_std`` etc., which may
    hold an exact zero for a bias. Either kind is read and set as ``kernel.w_std``.

    Args:
        depth: Number of hidden layers, of residual blocks, or of convolutions; at least 1, and 0
            only for "mlp".
        activation: "relu", "erf" or "tanh".
        w_std: Standard deviation of weights times the root of fan-in: a number, a tensor
            [*batch_shape] or [*batch_shape, 1, 1]; or, for one value a layer, a sequence of
            numbers, or a tensor [*batch_shape, layers]. There are ``depth`` layers below the last,
            in a residual network ``depth + 1``.
        b_std: Standard deviation of biases, in the same forms; 0 for none.
        last_w_std: Standard deviation of the weights of the last layer; one value.
        last_b_std: Standard deviation of its biases; one value.
        arch: "mlp", "resnet" or "conv".
        image_shape: Height, width and channels (H, W, C) of an image; for "conv" only.
        pooling: Head of "conv": "flatten" or "gap" (global average pooling).
        batch_shape: One kernel for each element.
        active_dims: Columns of the data that the kernel sees; all by default.
        learn: Names of the hyper-parameters to learn. By default ``w_std``, ``b_std`` and
            ``last_b_std``, without those that hold a 0 and without those that ``depth=0`` ignores.
            ``last_w_std`` is a mere scale of the kernel (if ``last_b_std=0``): learn it only where
            nothing else, such as a ``ScaleKernel`` or a scale mixture, takes that part.
        backend: Name for :func:`probkit.kernels.backend`; by default chosen by the data's device.

    Raises:
        DataError: An option outside its range; the message names what is accepted.
        ShapeError: A hyper-parameter that does not fit ``batch_shape`` or the number of layers, or
            inputs that do not fit.
        CapabilityError: ``last_dim_is_batch=True`` for images, whose columns are no inputs.

    Example:
        >>> x = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.7]], dtype=torch.float64)
        >>> kernel = NNGPKernel(depth=3, w_std=1.5, b_std=0.3, last_w_std=1.2)
        >>> kernel(x, diag=True)
        tensor([1.1355, 1.2654], dtype=torch.float64, grad_fn=...)
        >>> kernel.ntk(x).shape
        torch.Size([2, 2])
        >>> images = torch.ones(2, 4, 4, 3, dtype=torch.float64)
        >>> NNGPKernel(2, arch="conv", image_shape=(4, 4, 3), pooling="gap")(images).shape
        torch.Size([2, 2])
    """

    has_lengthscale = False

    def __init__(
        self,
        depth: int = 3,
        activation: str = "relu",
        w_std: float | Sequence[float] | Tensor = 1.5,
        b_std: float | Sequence[float] | Tensor = 0.3,
        last_w_std: float | Tensor = 1.2,
        last_b_std: float | Tensor = 0.0,
        arch: str = "mlp",
        *,
        image_shape: Sequence[int] | None = None,
        pooling: str | None = None,
        batch_shape: Sequence[int] = (),
        active_dims: Sequence[int] | Tensor | None = None,
        learn: Sequence[str] | None = None,
        backend: str | None = None,
    ) -> None:
        _check_depth(depth, arch)
        if backend is not None and backend not in NAMES:
            accepted = ", ".join(map(repr, NAMES))
            raise DataError(f"backend: expected one of {accepted} or None, got {backend!r}")
        activation_of(activation)
        super().__init__(
            batch_shape=torch.Size(batch_shape),
            active_dims=active_dims if active_dims is None else torch.as_tensor(active_dims),
        )
        self.depth, self.activation, self.arch, self.backend = depth, activation, arch, backend
        self.image_shape, self.pooling = _head(arch, image_shape, pooling)
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
        """Standard deviation of weights [*batch_shape, 1, 1 or layers]."""
        return self._std("w_std")

    @w_std.setter
    def w_std(self, value: _Value) -> None:
        self._set_std("w_std", value)

    @property
    def b_std(self) -> Tensor:
        """Standard deviation of biases [*batch_shape, 1, 1 or layers]."""
        return self._std("b_std")

    @b_std.setter
    def b_std(self, value: _Value) -> None:
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

    def _set_std(self, name: str, value: _Value) -> None:
        columns = self._std(name).shape[-1]
        new = self._as_std(name, value)
        if new.shape[-1] > columns:
            raise ShapeError(
                f"{name}: expected one value for all layers, got {new.shape[-1]}; make the kernel "
                "with one value for each layer"
            )
        new = new.expand(*new.shape[:-1], columns).clone()
        if name not in self.learn:
            old = getattr(self, f"fixed_{name}")
            setattr(self, f"fixed_{name}", new.to(old))
            return
        if not bool((new > 0).all()):
            raise DataError(f"{name}: expected > 0 where it is learned, got {_short(value)}")
        raw = getattr(self, f"raw_{name}")
        constraint = self.constraint_for_parameter_name(f"raw_{name}")
        self.initialize(**{f"raw_{name}": constraint.inverse_transform(new.to(raw))})

    @property
    def layers(self) -> int:
        """Number of layers with weights below the last one."""
        return self.depth + (self.arch == "resnet")

    def _as_std(self, name: str, value: _Value) -> Tensor:
        """A checked copy [*batch_shape, 1, 1] in float64, or [*batch_shape, 1, layers]."""
        std = torch.as_tensor(value, dtype=torch.float64).detach().clone()
        bound = ">= 0" if name in _MAY_BE_ZERO else "> 0"
        fits = (std >= 0) if name in _MAY_BE_ZERO else (std > 0)
        if not bool((fits & std.isfinite()).all()):
            raise DataError(f"{name}: expected finite and {bound}, got {_short(value)}")
        batch, layers = tuple(self._batch_shape), self.layers
        per_layer = name in _PER_LAYER and layers > 0
        sequence = not isinstance(value, Tensor) and std.ndim == 1
        if batch and std.shape == batch and not (sequence and per_layer):
            std = std[..., None, None]
        elif per_layer and std.shape in ((layers,), (*batch, layers)):
            std = std.unsqueeze(-2)
        columns = layers if per_layer and std.ndim > 0 and std.shape[-1] == layers else 1
        try:
            return std.expand(*batch, 1, columns).clone()
        except RuntimeError:
            forms = f"a number or a tensor [*batch_shape] = {list(batch)}"
            if per_layer:
                forms += f", or one value for each of {layers} layers"
            raise ShapeError(f"{name}: expected {forms}, got {list(std.shape)}") from None

    def _step_variances(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias variances of every step [*batch_shape, steps], last layer last."""
        stds = (self._std(name).to(dtype=like.dtype, device=like.device) for name in _STDS)
        w, b, last_w, last_b = (std[..., 0, :] for std in stds)
        # a functional call may give batch dims to some of them only
        batch = np.broadcast_shapes(*(std.shape[:-1] for std in (w, b, last_w, last_b)))
        lower, last = (*batch, self.layers), (*batch, 1)
        weight_std = torch.cat([w.expand(lower), last_w.expand(last)], dim=-1)
        bias_std = torch.cat([b.expand(lower), last_b.expand(last)], dim=-1)
        return weight_std**2, bias_std**2

    # ----------------------------------------------------------------------- evaluation

    def __call__(
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Any:
        """Evaluate lazily, as every GPyTorch kernel; inputs that do not fit are refused at once."""
        x1, x2 = self._as_rows(x1), None if x2 is None else self._as_rows(x2)
        if self.active_dims is None:
            self._check(x1, x1 if x2 is None else x2)
        elif x1.ndim >= 2 and (x2 is None or x2.ndim >= 2):
            check_inputs(x1, x1 if x2 is None else x2)
        if diag and not last_dim_is_batch:
            # GPyTorch takes a diagonal [batch, n] for a matrix [n, n] where both sizes are equal
            x1, x2 = self._selected(x1), None if x2 is None else self._selected(x2)
            return self.forward(x1, x1 if x2 is None else x2, diag=True, **params)
        return super().__call__(x1, x2, diag, last_dim_is_batch, **params)

    def _selected(self, x: Tensor) -> Tensor:
        """Active columns [*batch, n, d]."""
        x = x if self.active_dims is None else x.index_select(-1, self.active_dims)
        return x if x.ndim > 1 else x.unsqueeze(-1)

    def _as_rows(self, x: Tensor) -> Tensor:
        """Images [*batch, n, H, W, C] as rows [*batch, n, H W C]; rows as they are."""
        if self.active_dims is None and x.ndim == 1:
            return x.unsqueeze(-1)
        if self.image_shape is None or self.active_dims is not None or x.ndim < 4:
            return x
        if x.shape[-1] != math.prod(self.image_shape) and x.shape[-3:] == self.image_shape:
            return x.flatten(-3)
        return x

    def _check(self, x1: Tensor, x2: Tensor) -> None:
        """Refuse what no matrix can be computed from, once ``active_dims`` are chosen."""
        columns = None if self.image_shape is None else math.prod(self.image_shape)
        for x in (x1, x2):
            if columns in (None, x.shape[-1]):
                continue
            raise ShapeError(
                f"expected images [*batch, n, H, W, C] with (H, W, C) = {self.image_shape}, or "
                f"flattened rows [*batch, n, {columns}], got {list(x.shape)}"
            )
        check_inputs(x1, x2)
        for x in (x1,) if x1 is x2 else (x1, x2):
            check_finite(x, "x")

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
        return self._evaluate(x1, x2, diag, last_dim_is_batch, tangent=False)

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
        inputs = [self._selected(self._as_rows(x)) for x in (x1, x2) if x is not None]
        return self._evaluate(inputs[0], inputs[-1], diag, False, tangent=True)

    def product(self, x1: Tensor, x2: Tensor | None, vectors: Tensor) -> Tensor:
        """Kernel matrix times vectors; the matrix is never stored.

        Args:
            x1: Inputs [*batch, n, d].
            x2: Inputs [*batch, m, d], or None for ``x1``.
            vectors: Vectors [*batch, m, r].

        Returns:
            K @ vectors [*batch, n, r].

        Raises:
            CapabilityError: A convolutional network.

        Example:
            >>> x = torch.ones(2, 1, dtype=torch.float64)
            >>> kernel = NNGPKernel(depth=1, w_std=1.0, b_std=0.0, last_w_std=1.0)
            >>> kernel.product(x, None, x).flatten().tolist()
            [1.0, 1.0]
        """
        if self.image_shape is not None:
            raise CapabilityError(
                "product: expected arch 'mlp' or 'resnet', got 'conv'; compute the matrix in "
                "blocks of rows, as probkit.kernels.product does"
            )
        self._check(x1, x1 if x2 is None else x2)
        weight_var, bias_var = self._step_variances(x1)
        return backend(self.backend, x1.device).nngp_product(
            x1,
            x2,
            vectors,
            weight_var,
            bias_var,
            activation=self.activation,
            residual=self.arch == "resnet",
        )

    def _evaluate(
        self, x1: Tensor, x2: Tensor, diag: bool, last_dim_is_batch: bool, *, tangent: bool
    ) -> Tensor:
        if last_dim_is_batch and self.image_shape is not None:
            raise CapabilityError(
                "last_dim_is_batch=True: expected arch 'mlp' or 'resnet', got 'conv', whose "
                "columns are the pixels of one image; use active_dims for blocks of columns"
            )
        self._check(x1, x2)
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
        other = None if same else x2
        functions = backend(self.backend, x1.device)
        if self.image_shape is None:
            function = functions.ntk if tangent else functions.nngp
            return function(
                x1,
                other,
                weight_var,
                bias_var,
                activation=self.activation,
                residual=self.arch == "resnet",
                diag=diag,
            )
        assert self.pooling is not None
        convolutional = functions.conv_ntk if tangent else functions.conv_nngp
        return convolutional(
            x1.unflatten(-1, self.image_shape),
            None if other is None else other.unflatten(-1, self.image_shape),
            weight_var,
            bias_var,
            pooling=self.pooling,
            activation=self.activation,
            diag=diag,
        )

    def extra_repr(self) -> str:
        """Options in the printed form."""
        text = f"depth={self.depth}, activation={self.activation!r}, arch={self.arch!r}"
        if self.image_shape is None:
            return text
        return f"{text}, image_shape={self.image_shape}, pooling={self.pooling!r}"


def _check_depth(depth: int, arch: str) -> None:
    if arch not in ARCHITECTURES:
        accepted = ", ".join(map(repr, ARCHITECTURES))
        raise DataError(f"arch: expected one of {accepted}, got {arch!r}")
    least, what = {
        "mlp": (0, "hidden layers"),
        "resnet": (1, "residual blocks"),
        "conv": (1, "convolutions"),
    }[arch]
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < least:
        raise DataError(f"depth: expected a whole number of {what} >= {least}, got {depth!r}")


def _head(
    arch: str, image_shape: Sequence[int] | None, pooling: str | None
) -> tuple[tuple[int, int, int] | None, str | None]:
    """Checked image shape and pooling of a convolutional network; None for the others."""
    if arch != "conv":
        for name, value in (("image_shape", image_shape), ("pooling", pooling)):
            if value is not None:
                raise DataError(f"{name}: expected None for arch {arch!r}, got {value!r}")
        return None, None
    sizes = () if image_shape is None else tuple(image_shape)
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if len(sizes) != 3 or not whole or min(sizes) < 1:
        raise DataError(
            "image_shape: expected height, width and channels (H, W, C), each >= 1, for arch "
            f"'conv', got {image_shape!r}"
        )
    pooling = "flatten" if pooling is None else pooling
    if pooling not in POOLINGS:
        accepted = ", ".join(map(repr, POOLINGS))
        raise DataError(f"pooling: expected one of {accepted}, got {pooling!r}")
    height, width, channels = sizes
    return (height, width, channels), pooling


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


def _short(given: _Value) -> str:
    value = torch.as_tensor(given, dtype=torch.float64).detach()
    if value.numel() > 1:
        low, high = value.min().item(), value.max().item()
        return f"values from {low:g} to {high:g}" if math.isfinite(low + high) else "NaN or inf"
    return f"{value.item():g}"

"""A network trained to predict: conditioning is storing the data, prediction one forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.files import register
from probkit.model import Model, Site, Values
from probkit.models.pfn.bars import BarDistribution, check_borders
from probkit.models.pfn.data_sets import Encode, SetScaling, inputs, one_set, waves
from probkit.models.pfn.network import PFNNetwork, PFNSize
from probkit.models.pfn.weight_files import WeightFile, load_weights, save_weights
from probkit.posterior import Context, Posterior
from probkit.predictive import Analytic, Predictive
from probkit.rng import Rng
from probkit.sources import Closed

if TYPE_CHECKING:
    from probkit.models.pfn.botorch_model import PFNBotorchModel

__all__ = ["PFN"]


@dataclass(frozen=True, eq=False, repr=False)
class PFN(Model):
    """A prior-data fitted network: a prior compiled into a predictor.

    Data are pairs (x [row, feature], y [row]). ``infer(net, data, rng=0)`` stores them, and
    ``post.predict(x)`` is one forward pass; its law at each row is a histogram with half-normal
    tails. Rows are exchangeable: their order has no effect. Made by
    :func:`~probkit.models.pfn.amortize`.

    Attributes:
        network: The transformer.
        borders: [bar + 1] borders for scaled outputs.
        scaling: Shifts and scales of inputs and outputs.
        prior: Name of the prior it was trained on.
        most: Largest number of rows that training has shown it.
        card: Training recipe and measured quality.
        encode: How to read data that are no pairs; not stored in files.

    Example:
        >>> from probkit import infer
        >>> from probkit.models.pfn import PFN, GPPrior, amortize
        >>> net = amortize(GPPrior(rows=12), "tiny", steps=2, bars=20, rng=0)
        >>> post = infer(net, (torch.rand(5, 1), torch.randn(5)), rng=0)
        >>> post.predict(torch.rand(3, 1)).quantile([0.05, 0.5, 0.95]).shape
        torch.Size([3, 3])
    """

    network: PFNNetwork
    borders: Tensor
    scaling: SetScaling
    prior: str = ""
    most: int = 0
    card: Mapping[str, Any] = field(default_factory=dict)
    encode: Encode | None = None

    def __post_init__(self) -> None:
        check_borders(self.borders)
        if self.network.size.bars != len(self.borders) - 1:
            raise ShapeError(
                f"borders: expected {self.network.size.bars + 1} for the network's bars, "
                f"got {len(self.borders)}"
            )

    def __repr__(self) -> str:
        """Name prior and size."""
        size = self.network.size
        return f"PFN(prior={self.prior!r}, width={size.width}, layers={size.layers})"

    @property
    def features(self) -> int:
        """Number of columns of x."""
        return len(self.scaling.x_shift)

    # ------------------------------------------------------------------------ the model contract

    def sites(self, data: Any = None) -> Mapping[str, Site]:
        """Return no sites: the latents are integrated out by the network."""
        return {}

    def prepare(self, data: Any) -> tuple[Tensor, Tensor]:
        """Check one data set (x [row, feature], y [row])."""
        return one_set(data, self.features, self.encode)

    def _prepared(self, data: Any) -> bool:
        """Whether ``prepare`` has made the data what they are, so that ``encode`` is done."""
        if not isinstance(data, tuple) or len(data) != 2:
            return False
        x, y = data
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return False
        return x.shape == (*y.shape, self.features) and x.dtype == y.dtype == torch.float32

    def condition(self, data: Any, hyper: Values | None = None) -> Posterior:
        """Return the posterior given ``data``; nothing is computed before a prediction.

        Raises:
            CapabilityError: Hyper-parameters are given, of which a network has none.
        """
        if hyper:
            raise CapabilityError(
                f"a PFN integrates its hyper-parameters out; got {', '.join(hyper)}"
            )
        x, y = data if self._prepared(data) else self.prepare(data)
        if len(y) > self.most > 0:
            warnings.warn(
                f"{len(y)} rows, but the network has seen at most {self.most} in training; "
                "predictions may be off",
                NumericsWarning,
                stacklevel=2,
            )
        return Posterior(Closed(state={"x": x, "y": y}), self, Context((x, y)))

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
        """Predict new observations at x [*batch, row, feature], each row by itself.

        Args:
            post: The posterior.
            x: New inputs.
            site: None: observations, noise included, are all that the network was trained on.
            joint: True is refused: the rows' dependence has no closed form; see
                :meth:`sample_jointly`.
            groups: Not for networks.
            rng: Not needed.

        Returns:
            Laws [*batch, row].

        Raises:
            CapabilityError: ``site``, ``joint`` or ``groups`` is given.
        """
        if site is not None or groups:
            raise CapabilityError(
                f"a PFN predicts new observations only, got site={site!r} and groups={groups}"
            )
        if joint:
            raise CapabilityError(
                "a PFN's rows are marginal: their joint law has no closed form; use joint=False, "
                "sample_jointly to draw from it, or net.to_botorch(x, y) for BoTorch"
            )
        state = _state_of(post)
        new = inputs(x, self.features)
        lead = new.shape[:-2]
        count = int(torch.Size(lead).numel())
        law = self.predict_sets(
            state["x"].expand(count, *state["x"].shape),
            state["y"].expand(count, *state["y"].shape),
            new.reshape(count, *new.shape[-2:]),
        )
        return Analytic(law.reshaped((*lead, new.shape[-2])))

    # ------------------------------------------------------------------------------ many at once

    def predict_sets(
        self, x: Tensor, y: Tensor, query: Tensor, lengths: Tensor | None = None
    ) -> BarDistribution:
        """Predict for many data sets in one forward pass, differentiable in x, y and query.

        Args:
            x: [data set, row, feature] inputs.
            y: [data set, row] outputs.
            query: [data set, query, feature] inputs asked for.
            lengths: [data set] rows that count, in a padded batch.

        Returns:
            Laws [data set, query], in the units of y.
        """
        features = self.features
        if x.dim() != 3 or x.shape[-1] != features or y.shape != x.shape[:2]:
            raise ShapeError(
                f"expected x [data set, row, feature={features}] and y [data set, row], "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if query.dim() != 3 or query.shape[0] != x.shape[0] or query.shape[-1] != features:
            raise ShapeError(
                f"expected query [data set={x.shape[0]}, query, feature={features}], "
                f"got {tuple(query.shape)}"
            )
        size = self.network.size
        of_x, of_y = (size.features // features - 1) // 2, (size.targets - 1) // 2
        logits = self.network(
            waves(self.scaling.x(x), of_x),
            waves(self.scaling.y(y).unsqueeze(-1), of_y),
            waves(self.scaling.x(query), of_x),
            lengths,
        )
        borders = self.borders * self.scaling.y_scale + self.scaling.y_shift
        return BarDistribution(borders, logits, validate_args=False)

    def sample_jointly(self, post: Posterior, x: Any, n: int, *, rng: torch.Generator) -> Tensor:
        """Draw y [n, row] at all rows of x jointly, feeding each draw back as an observation.

        The chain rule turns marginal laws into a joint one, at one forward pass a row. The network
        is only approximately consistent, so the order of rows has some effect.

        Args:
            post: The posterior.
            x: [row, feature] new inputs.
            n: Number of draws.
            rng: Stream.
        """
        state = _state_of(post)
        new = inputs(x, self.features)
        unit = torch.rand(n, len(new), generator=rng)
        rows = state["x"].expand(n, *state["x"].shape), state["y"].expand(n, -1)
        with torch.no_grad():
            return self.chain(*rows, new.expand(n, *new.shape), unit)

    def chain(self, x: Tensor, y: Tensor, query: Tensor, unit: Tensor) -> Tensor:
        """Turn uniforms [data set, query] into joint draws, one query after the other.

        Args:
            x: [data set, row, feature].
            y: [data set, row].
            query: [data set, query, feature].
            unit: [data set, query] in (0, 1).
        """
        drawn = []
        for k in range(query.shape[1]):
            law = self.predict_sets(x, y, query[:, k : k + 1])
            drawn.append(law.icdf(unit[:, k : k + 1]))
            x, y = torch.cat([x, query[:, k : k + 1]], 1), torch.cat([y, drawn[-1]], 1)
        return torch.cat(drawn, 1)

    def to_botorch(self, x: Tensor, y: Tensor) -> PFNBotorchModel:
        """Return a ``botorch.models.model.Model`` conditioned on x [row, feature] and y [row]."""
        from probkit.models.pfn.botorch_model import PFNBotorchModel

        return PFNBotorchModel(self, x, y)

    # ------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write a weight file (.safetensors, float16) with borders, scaling, prior and card."""
        save_weights(path, self._as_file())

    @classmethod
    def load(cls, path: str | Path, *, prior: str | None = None) -> PFN:
        """Read a weight file.

        Args:
            path: What :meth:`save` wrote.
            prior: The prior that it must belong to; None takes any.

        Raises:
            DataError: It is no such file, or of another prior or format.
        """
        return cls._from_file(load_weights(path, prior=prior), str(path))

    def _as_file(self) -> WeightFile:
        scaling = self.scaling
        return WeightFile(
            prior=self.prior,
            network=asdict(self.network.size),
            weights=self.network.state_dict(),
            borders=self.borders,
            constants={
                "x_shift": scaling.x_shift.tolist(),
                "x_scale": scaling.x_scale.tolist(),
                "y_shift": float(scaling.y_shift),
                "y_scale": float(scaling.y_scale),
                "most": self.most,
            },
            card=self.card,
        )

    @classmethod
    def _from_file(cls, file: WeightFile, name: str) -> PFN:
        constants = file.constants
        try:
            network = network_of(file)
            scaling = SetScaling(*(torch.tensor(constants[part]) for part in _SCALING))
            most = int(constants["most"])
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{name!r} holds no predictor of rows ({error} is missing); load it with the "
                "class that wrote it"
            ) from None
        if file.borders is None:
            raise DataError(f"{name!r} holds no borders; load it with the class that wrote it")
        return cls(network, file.borders, scaling, file.prior, most, file.card)


_SCALING = ("x_shift", "x_scale", "y_shift", "y_scale")


def network_of(file: WeightFile) -> PFNNetwork:
    """Rebuild the network of a weight file, ready to predict."""
    network = PFNNetwork(PFNSize(**file.network), generator=torch.Generator().manual_seed(0))
    file.fill(network)
    return network.eval().requires_grad_(False)


def _state_of(post: Posterior) -> dict[str, Tensor]:
    source = post.source
    if not isinstance(source, Closed) or not isinstance(source.state, dict):
        raise CapabilityError("expected the posterior of a PFN: infer(net, (x, y), rng=0)")
    return source.state


def _to_tree(net: PFN) -> dict[str, Any]:
    if net.encode is not None:
        raise DataError(
            "this PFN reads data through a function of yours (encode=), which files do not hold; "
            "pass it to load as model="
        )
    return {
        "size": asdict(net.network.size),
        "weights": dict(net.network.state_dict()),
        "borders": net.borders,
        "scaling": net.scaling,
        "prior": net.prior,
        "most": net.most,
        "card": dict(net.card),
    }


def _from_tree(tree: dict[str, Any]) -> PFN:
    network = PFNNetwork(PFNSize(**tree["size"]), generator=torch.Generator().manual_seed(0))
    network.load_state_dict(tree["weights"])
    network.eval().requires_grad_(False)
    rest = (tree["borders"], tree["scaling"], tree["prior"], tree["most"], tree["card"])
    return PFN(network, *rest)


register(PFN, "PFN", _to_tree, _from_tree)


def with_card(net: PFN, **entries: Any) -> PFN:
    """Return ``net`` with more entries in its model card."""
    return replace(net, card={**net.card, **entries})

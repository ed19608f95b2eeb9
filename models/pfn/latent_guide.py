"""A network trained for latents: the amortised guide of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probkit.errors import CapabilityError, DataError
from probkit.files import register
from probkit.guide import LogQ, Params
from probkit.model import Batch, Site, Values
from probkit.models.pfn.bars import BarDistribution
from probkit.models.pfn.data_sets import Encode, SetScaling, one_set, waves
from probkit.models.pfn.network import PFNNetwork, PFNSize
from probkit.models.pfn.predictor import network_of
from probkit.models.pfn.set_tasks import latent_tokens
from probkit.models.pfn.weight_files import WeightFile, load_weights, save_weights
from probkit.rng import Rng, stream
from probkit.unconstrained import Unconstrained

__all__ = ["PFNGuide", "continuous_sites"]


@dataclass(frozen=True, eq=False, repr=False)
class PFNGuide:
    """The posterior of a model's latents as a network sees it: q(z | data), no fitting.

    Coordinates of the unconstrained latents are drawn one after the other, each from a histogram
    given the data and the coordinates before it, so dependence, skewness and several modes are
    kept, and the density of a draw is known. Use it as
    ``infer(model, data, Direct(), guide=net, rng=0)``, or as the proposal of an importance sampler
    to correct what the network gets wrong. Made by
    ``amortize(model, network, target="latents", ...)``.

    Attributes:
        network: The transformer; its features are those of a row of data and one for each
            coordinate.
        borders: [bar + 1] borders for scaled coordinates.
        scaling: Shifts and scales of the data.
        shift: [coordinate] shift of the unconstrained latents.
        scale: [coordinate] their scale.
        names: Site names in the order of the coordinates.
        prior: Name of the model it was trained on.
        card: Training recipe and measured quality.
        encode: How to read the data; not stored in files.
    """

    network: PFNNetwork
    borders: Tensor
    scaling: SetScaling
    shift: Tensor
    scale: Tensor
    names: tuple[str, ...]
    prior: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)
    encode: Encode | None = None

    def __repr__(self) -> str:
        """Name the sites."""
        return f"PFNGuide(prior={self.prior!r}, sites={list(self.names)})"

    # ------------------------------------------------------------------------ the guide contract

    def init(self, model: Any, data: Any, *, rng: Rng) -> Params:
        """Return no parameters: the network is trained.

        Raises:
            CapabilityError: The model has other sites than the one it was trained on.
        """
        self._transform(model, data)
        return {}

    def sample(
        self, params: Params, model: Any, batch: Batch, n: int, *, rng: Rng
    ) -> tuple[Values, LogQ]:
        """Draw ``n`` values [n, *site] and their log density."""
        transform = self._transform(model, batch.data)
        x, y = self._rows(batch.data)
        dtype = _dtype_of(batch.data)
        generator = rng if isinstance(rng, torch.Generator) else stream(rng, "guide")
        unit = torch.rand(n, len(self.shift), generator=generator).clamp(1e-6, 1 - 1e-6)
        x, y = x.expand(n, *x.shape), y.expand(n, *y.shape)
        known = torch.zeros(n, 0)
        log_q = torch.zeros(n, dtype=torch.float64)
        for j in range(len(self.shift)):
            law = self._next(x, y, known)
            drawn = law.icdf(unit[:, j])
            log_q = log_q + law.log_prob(drawn).double()
            known = torch.cat([known, drawn.unsqueeze(-1)], 1)
        flat = (known * self.scale + self.shift).to(dtype)
        values, log_det = transform.constrain(flat)
        log_q = log_q.to(dtype) - self.scale.log().sum().to(dtype) - log_det
        return values, LogQ(log_q, torch.zeros_like(log_q))

    def log_prob(self, model: Any, data: Any, values: Values) -> Tensor:
        """Return [n] the log density of values [n, *site] given ``data``."""
        transform = self._transform(model, data)
        x, y = self._rows(data)
        flat = transform.flatten(values)
        known = (flat.float() - self.shift) / self.scale
        n = len(known)
        x, y = x.expand(n, *x.shape), y.expand(n, *y.shape)
        log_q = torch.zeros(n, dtype=torch.float64)
        for j in range(known.shape[1]):
            log_q = log_q + self._next(x, y, known[:, :j]).log_prob(known[:, j]).double()
        _, log_det = transform.constrain(flat)
        return log_q.to(flat) - self.scale.log().sum().to(flat) - log_det

    def coordinate_laws(self, data: Any) -> BarDistribution:
        """Return the marginal laws [coordinate] of the scaled, unconstrained latents."""
        x, y = self._rows(data)
        tokens = latent_tokens(x[None], y[None], torch.zeros(1, 0), len(self.shift))
        with torch.no_grad():
            logits = self._logits(*tokens)[0]
        return BarDistribution(self.borders, logits, validate_args=False)

    def _next(self, x: Tensor, y: Tensor, known: Tensor) -> BarDistribution:
        """Law [data set] of the first coordinate that is not known."""
        tokens = latent_tokens(x, y, known, len(self.shift))
        logits = self._logits(tokens[0], tokens[1], tokens[2][:, :1])[:, 0]
        return BarDistribution(self.borders, logits, validate_args=False)

    def _logits(self, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
        octaves = (self.network.size.targets - 1) // 2
        return self.network(x, waves(y.unsqueeze(-1), octaves), query)

    def _rows(self, data: Any) -> tuple[Tensor, Tensor]:
        x, y = one_set(data, len(self.scaling.x_shift), self.encode)
        raw, wide = x.shape[-1], self.network.size.features - len(self.shift)
        return waves(self.scaling.x(x), (wide // raw - 1) // 2), self.scaling.y(y)

    def _transform(self, model: Any, data: Any) -> Unconstrained:
        sites = continuous_sites(model, data)
        transform = Unconstrained(sites)
        if tuple(sites) != self.names or transform.size != len(self.shift):
            raise CapabilityError(
                f"the guide was trained for sites {list(self.names)} of {len(self.shift)} "
                f"coordinates, got a model with {list(sites)} of {transform.size}; "
                "amortize that model"
            )
        return transform

    # ------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write a weight file (.safetensors, float16)."""
        scaling = self.scaling
        constants = {
            "x_shift": scaling.x_shift.tolist(),
            "x_scale": scaling.x_scale.tolist(),
            "y_shift": float(scaling.y_shift),
            "y_scale": float(scaling.y_scale),
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
            "names": list(self.names),
        }
        network, weights = asdict(self.network.size), self.network.state_dict()
        save_weights(
            path, WeightFile(self.prior, network, weights, self.borders, constants, self.card)
        )

    @classmethod
    def load(cls, path: str | Path, *, prior: str | None = None) -> PFNGuide:
        """Read a weight file.

        Raises:
            DataError: It is no file of :meth:`save`, or of another prior.
        """
        file = load_weights(path, prior=prior)
        constants = file.constants
        if file.borders is None or "names" not in constants:
            raise DataError(f"{str(path)!r} holds no guide; load it with the class that wrote it")
        scaling = SetScaling(
            *(torch.tensor(constants[k]) for k in ("x_shift", "x_scale", "y_shift", "y_scale"))
        )
        return cls(
            network_of(file),
            file.borders,
            scaling,
            torch.tensor(constants["shift"]),
            torch.tensor(constants["scale"]),
            tuple(constants["names"]),
            file.prior,
            file.card,
        )


def continuous_sites(model: Any, data: Any) -> dict[str, Site]:
    """Return the sites of a model, all of them global and continuous.

    Raises:
        CapabilityError: A site is discrete or local to a plate.
    """
    sites = dict(model.sites(data))
    if not sites:
        raise CapabilityError(f"{type(model).__name__} has no sites to amortize")
    for name, site in sites.items():
        if site.discrete or site.plate is not None:
            kind = "discrete" if site.discrete else f"local to plate {site.plate!r}"
            raise CapabilityError(
                f"site {name!r} is {kind}; a PFN guide takes global continuous sites only"
            )
    return sites


def _dtype_of(data: Any) -> torch.dtype:
    from probkit.tree import leaves

    kinds = {d.dtype for d in leaves(data) if isinstance(d, Tensor) and d.is_floating_point()}
    return torch.float64 if torch.float64 in kinds else torch.float32


def _to_tree(guide: PFNGuide) -> dict[str, Any]:
    if guide.encode is not None:
        raise DataError(
            "this guide reads data through a function of yours (encode=), which files do not "
            "hold; pass it to load as guide="
        )
    return {
        "size": asdict(guide.network.size),
        "weights": dict(guide.network.state_dict()),
        "borders": guide.borders,
        "scaling": guide.scaling,
        "shift": guide.shift,
        "scale": guide.scale,
        "names": list(guide.names),
        "prior": guide.prior,
        "card": dict(guide.card),
    }


def _from_tree(tree: dict[str, Any]) -> PFNGuide:
    network = PFNNetwork(PFNSize(**tree["size"]), generator=torch.Generator().manual_seed(0))
    network.load_state_dict(tree["weights"])
    network.eval().requires_grad_(False)
    return PFNGuide(
        network,
        tree["borders"],
        tree["scaling"],
        tree["shift"],
        tree["scale"],
        tuple(tree["names"]),
        tree["prior"],
        tree["card"],
    )


register(PFNGuide, "PFNGuide", _to_tree, _from_tree)

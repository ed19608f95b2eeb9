"""Functional Bayesian tensor decompositions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from gpytorch.kernels import Kernel
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal, constraints

from probkit.data import as_tensor
from probkit.distributions import select
from probkit.errors import CapabilityError, DataError
from probkit.files import storable
from probkit.inference.message_passing import GaussianObservations, kalman_log_evidence
from probkit.inference.passing import MessagePassing, select_copy, stack_copies
from probkit.kernels.state_space import Matern, StateSpace, state_space
from probkit.model import Model, Site
from probkit.models.funbat.data import TensorData, as_index
from probkit.models.funbat.grids import Grid
from probkit.models.funbat.guide import TrajectoryGuide
from probkit.models.funbat.hyper import HyperPrior
from probkit.models.funbat.likelihoods import BernoulliNoise, PoissonNoise
from probkit.models.funbat.masks import read_mask
from probkit.models.funbat.noise import GaussianNoise, Noise, StudentTNoise
from probkit.models.funbat.pairs import pairs_of
from probkit.models.funbat.prediction import latent_moments, smooth_at
from probkit.models.funbat.smoothing import make_chain
from probkit.models.funbat.streaming import extend, sweep_order
from probkit.models.funbat.surface import joint_law, joint_moments
from probkit.models.funbat.sweeps import Layout, start, sweep
from probkit.models.funbat.warps import LogWarp, warped
from probkit.posterior import Evidence, Posterior
from probkit.predictive import Analytic, Mixture, Predictive
from probkit.rng import Rng
from probkit.sampler import Sampler
from probkit.sources import Fitted
from probkit.tree import Tree

__all__ = ["Factor", "FunBaT"]

CORE_LIMIT = 4096
"""Largest number of entries of a Tucker core; its covariance has the square of that."""

_NOISES: Mapping[str, Any] = {
    "gaussian": GaussianNoise,
    "student_t": StudentTNoise,
    "bernoulli": BernoulliNoise,
    "poisson": PoissonNoise,
}


@dataclass(frozen=True)
class Factor:
    """One mode's trajectories along a grid.

    Attributes:
        points: Coordinates [point], in the units of the data.
        mean: E[u] [chain, point, component].
        variance: Var[u] [chain, point, component].
        derivative: E[du/dx] [chain, point, component], x in the units of the data; None where
            trajectories have no derivative (Matern 1/2).
        derivative_variance: Var[du/dx], likewise.
    """

    points: Tensor
    mean: Tensor
    variance: Tensor
    derivative: Tensor | None
    derivative_variance: Tensor | None


@storable
@dataclass(frozen=True)
class FunBaT(Model):
    """A tensor with continuous indexes as a product of Gaussian processes along its modes.

    y_n = f(x_n) + noise at index x_n in R^K, with one vector of independent Gaussian processes
    u^k(x) in R^(r_k) for each mode and

    - ``kind="tucker"``: f(x) = w' [u^1(x_1) (x) ... (x) u^K(x_K)], core w ~ N(0, I);
    - ``kind="cp"``: f(x) = sum_r prod_k u^k_r(x_k).

    After "Functional Bayesian Tucker Decomposition for Continuous-indexed Tensor Data" (Fang, Yu,
    Wang, Li, Kirby & Zhe, ICLR 2024). Processes are Markov chains along the sorted coordinates, so
    a sweep of inference is linear in the number of entries and of distinct coordinates.

    Coordinates are scaled to [0, 1] by the range of the data, mode by mode, and y to mean 0 and
    variance 1: length scales, periods and variances of the kernels are in those units. Signs,
    scales and rotations of factors are not identified; compare predictions, never factors.

    Args:
        ranks: r_1, ..., r_K, or one number for all modes. CP needs equal ones.
        kind: "tucker" or "cp".
        kernels: One kernel for all modes, or one for each: :class:`~probkit.kernels.Matern`,
            :class:`~probkit.kernels.Periodic`, sums of them.
        masks: For CP, a boolean table [component, mode]: False where a component is constant along
            a mode (see :mod:`probkit.models.funbat.masks`); ``ranks`` is then its number of rows.
            For Tucker, one row of booleans [r_k] for each mode: a False makes that component the
            constant one, so that the core holds effects of fewer modes too.
        noise: "gaussian", "student_t", "bernoulli", "poisson", or a likelihood with options, such
            as :class:`~probkit.models.funbat.StudentTNoise`.
        warp: A monotone map of y, for example :class:`~probkit.models.funbat.LogWarp`.
        learn_hyperparameters: Learn length scales and variances of every component by the evidence
            bound. Variances that shrink switch components off.
        learn_from: Sweep at which learning begins.
        hyper_prior: Prior around the kernels' values.
        scale_index: Whether coordinates are scaled to [0, 1], for all modes or one by one.
        standardise: Whether y is shifted and scaled to mean 0 and variance 1; "scale" scales only.
            A shift by the mean costs a component where f is a product around zero.

    Raises:
        DataError: An option outside its range.

    Example:
        >>> import probkit as pk
        >>> rng = torch.Generator().manual_seed(0)
        >>> x = torch.rand(300, 2, generator=rng, dtype=torch.float64)
        >>> y = (6 * x[:, 0]).sin() * (3 * x[:, 1]).cos()
        >>> post = pk.infer(FunBaT(2, kind="cp"), TensorData(x, y), rng=0)
        >>> error = post.predict([[0.3, 0.7]]).mean - math.sin(1.8) * math.cos(2.1)
        >>> bool(error.abs() < 0.02)
        True
    """

    ranks: int | Sequence[int] = 3
    kind: Literal["tucker", "cp"] = "tucker"
    kernels: Kernel | Sequence[Kernel] = field(default_factory=lambda: Matern(1.5, lengthscale=0.1))
    masks: Any = None
    noise: Any = "gaussian"
    warp: LogWarp | None = None
    learn_hyperparameters: bool = True
    learn_from: int = 10
    hyper_prior: HyperPrior = HyperPrior()
    scale_index: bool | Sequence[bool] = True
    standardise: bool | Literal["scale"] = True

    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.kind not in ("tucker", "cp"):
            raise DataError(f"FunBaT: expected kind 'tucker' or 'cp', got {self.kind!r}")
        given: Any = self.ranks
        ranks = (given,) if isinstance(given, int) else tuple(given)
        if not ranks or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in ranks):
            raise DataError(f"FunBaT: expected whole ranks >= 1, got {given!r}")
        if self.kind == "cp" and len(set(ranks)) > 1:
            raise DataError(f"FunBaT: CP needs equal ranks, got {ranks}; use kind='tucker'")
        if self.kind == "cp" and self.masks is not None:
            table = read_mask(self.masks, None)
            object.__setattr__(self, "masks", table)
            ranks = (len(table),)
        elif self.masks is not None:
            rows = tuple(torch.as_tensor(row) != 0 for row in self.masks)
            object.__setattr__(self, "masks", rows)
            for k, row in enumerate(rows):
                if row.ndim != 1 or not bool(row.any()):
                    raise DataError(
                        f"masks: for Tucker expected one row of booleans for each mode with a "
                        f"component that varies, got {row.tolist()} for mode {k}"
                    )
            ranks = tuple(len(row) for row in rows)
        if not isinstance(given, int) or self.masks is not None:
            object.__setattr__(self, "ranks", ranks if len(ranks) > 1 else ranks[0])
        if isinstance(self.noise, str):
            if self.noise not in _NOISES:
                raise DataError(
                    f"FunBaT: expected noise {', '.join(map(repr, _NOISES))} or a likelihood such "
                    f"as StudentTNoise(), got {self.noise!r}"
                )
            object.__setattr__(self, "noise", _NOISES[self.noise]())
        if not isinstance(self.learn_from, int) or self.learn_from < 1:
            raise DataError(f"FunBaT: expected a whole learn_from >= 1, got {self.learn_from!r}")
        if self.standardise not in (True, False, "scale"):
            raise DataError(
                f"FunBaT: expected standardise True, False or 'scale', got {self.standardise!r}"
            )
        if self.warp is not None and not self.noise.standardise:
            raise DataError(f"FunBaT: {type(self.noise).__name__} takes no warp; leave it out")
        for kernel in self._given_kernels():
            state_space(kernel)

    def _given_kernels(self) -> list[Kernel]:
        given: Any = self.kernels
        return [given] if isinstance(given, Kernel) else list(given)

    @property
    def noise_model(self) -> Noise:
        """The likelihood."""
        model: Noise = self.noise
        return model

    # ------------------------------------------------------------------ data

    def prepare(self, data: Any) -> TensorData:
        """Check data: :class:`TensorData`, or a pair (index, y).

        Raises:
            DataError: Not such data, or a core that is too large.
            ShapeError: Another number of modes than the model has.
        """
        if isinstance(data, tuple) and len(data) == 2:
            data = TensorData(*data)
        if not isinstance(data, TensorData):
            raise DataError(
                f"FunBaT: expected TensorData(index, y) or a pair (index, y), got "
                f"{type(data).__name__}"
            )
        self.shape_of(data)
        self.spaces(len(data.names))
        self._scaled_flags(len(data.names))
        self.noise_model.check(data.y)
        return data

    def data_dims(self, data: Any) -> Any:
        """Name the dims of index and y."""
        return (("entry", "mode"), ("entry",))

    def data_coords(self, data: TensorData) -> dict[str, list[Any]]:
        """Names of the modes, and the coordinates of the points of each."""
        points = {f"point_{k + 1}": grid.points.tolist() for k, grid in enumerate(data.grids)}
        return {"mode": list(data.names), **points}

    def shape_of(self, data: TensorData) -> tuple[int, ...]:
        """r_1, ..., r_K for the data's modes.

        Raises:
            DataError: The model has another number of modes, or the core is too large.
        """
        modes = len(data.names)
        given: Any = self.ranks
        ranks = (given,) * modes if isinstance(given, int) else tuple(given)
        if len(ranks) == 1:
            ranks = ranks * modes
        if len(ranks) != modes:
            raise DataError(
                f"FunBaT: expected one rank for each of {modes} modes ({', '.join(data.names)}), "
                f"got {len(ranks)}"
            )
        if self.masks is not None:
            width = self.masks.shape[1] if isinstance(self.masks, Tensor) else len(self.masks)
            if width != modes:
                raise DataError(f"masks: expected {modes} modes, got {width}")
        if self.kind == "tucker" and math.prod(ranks) > CORE_LIMIT:
            entries = math.prod(ranks)
            raise DataError(
                f"FunBaT: a core of {' x '.join(map(str, ranks))} = {entries} entries has a "
                f"covariance of {8 * entries**2 / 2**30:.3g} GiB; the limit is {CORE_LIMIT} "
                "entries: take smaller ranks, or kind='cp'"
            )
        return ranks

    def free(self, data: TensorData) -> tuple[Tensor, ...]:
        """Which components of each mode vary, [r_k] each."""
        if self.masks is None:
            return tuple(torch.ones(r, dtype=torch.bool) for r in self.shape_of(data))
        if isinstance(self.masks, Tensor):
            return tuple(self.masks.unbind(1))
        return tuple(self.masks)

    def spaces(self, modes: int) -> tuple[StateSpace, ...]:
        """The prior of each mode's components.

        Raises:
            DataError: Another number of kernels than modes.
        """
        kernels = self._given_kernels()
        if len(kernels) == 1:
            kernels = kernels * modes
        if len(kernels) != modes:
            raise DataError(
                f"FunBaT: expected one kernel, or one for each of {modes} modes, got {len(kernels)}"
            )
        return tuple(state_space(kernel) for kernel in kernels)

    def _scaled_flags(self, modes: int) -> tuple[bool, ...]:
        given: Any = self.scale_index
        flags = (given,) * modes if isinstance(given, bool) else tuple(given)
        if len(flags) != modes or not all(isinstance(flag, bool) for flag in flags):
            raise DataError(
                f"FunBaT: expected scale_index True, False or one for each of {modes} modes, got "
                f"{given!r}"
            )
        return flags

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Factors at the distinct coordinates, [point, component] each; the core; the noise."""
        found: dict[str, Site] = {}
        for k, (size, free) in enumerate(zip(data.sizes, self.free(data), strict=True)):
            shape = (size, int(free.sum()))
            names = (f"point_{k + 1}", f"component_{k + 1}")
            found[f"factor_{k + 1}"] = Site(shape, constraints.real, names)
        if self.kind == "tucker":
            ranks = self.shape_of(data)
            dims = tuple(f"core_{k + 1}" for k in range(len(ranks)))
            found["core"] = Site(ranks, constraints.real, dims)
        return {**found, **self.noise_model.sites(data.y)}

    # ------------------------------------------------------------------ message passing

    def sampler(self) -> Sampler:
        """Message passing."""
        return MessagePassing()

    def start_messages(self, data: TensorData, *, rngs: list[torch.Generator]) -> Tree:
        """Return starting points, one for each stream."""
        frame = self._frame(data)
        state = start(self._layout(data, frame), rngs)
        return {**state, "frame": frame}

    def pass_messages(
        self, state: Tree, data: TensorData, *, damping: float = 0.0
    ) -> tuple[Tree, Tensor]:
        """Sweep once; return the new state and the evidence bound [copy]."""
        return sweep(self._layout(data, state["frame"]), state, damping=damping)

    def messages_guide(self, data: TensorData) -> TrajectoryGuide:
        """The guide whose parameters a fit is."""
        return TrajectoryGuide()

    def _frame(self, data: TensorData) -> dict[str, Any]:
        """Units of the fit: plain numbers, kept as they are when data is added."""
        warp = None if self.warp is None else self.warp.fitted(data.y)
        y = data.y if warp is None else warp.forward(data.y)
        offset, spread = 0.0, 1.0
        if self.standardise and self.noise_model.standardise:
            offset = 0.0 if self.standardise == "scale" else float(y.mean())
            spread = float((y - offset).square().mean().sqrt())
        lower, width = [], []
        for k, flag in enumerate(self._scaled_flags(len(data.names))):
            points = data.grids[k].points
            extent = float(points[-1] - points[0])
            lower.append(float(points[0]) if flag else 0.0)
            width.append(extent if flag and extent > 0 else 1.0)
        return {
            "warp": warp,
            "offset": offset,
            "scale": spread if spread > 0 else 1.0,
            "lower": lower,
            "width": width,
        }

    def layout(self, data: TensorData, fit: Tree) -> Layout:
        """What a fit needs of the data, in its units."""
        return self._layout(data, fit["frame"])

    def _layout(self, data: TensorData, frame: Mapping[str, Any]) -> Layout:
        y = data.y if frame["warp"] is None else frame["warp"].forward(data.y)
        grids = tuple(
            Grid((g.points - lower) / width, g.index, g.gaps / width, g.gap_index)
            for g, lower, width in zip(data.grids, frame["lower"], frame["width"], strict=True)
        )
        return Layout(
            ranks=self.shape_of(data),
            has_core=self.kind == "tucker",
            free=self.free(data),
            spaces=self.spaces(len(data.names)),
            grids=grids,
            y=(y - frame["offset"]) / frame["scale"],
            noise=self.noise_model,
            learn=self.learn_hyperparameters,
            learn_from=self.learn_from,
            hyper_prior=self.hyper_prior,
        )

    # ------------------------------------------------------------------ results

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
        """Predict y, or the latent surface (``site="f"``), at any index [entry, mode].

        Several chains give a mixture with equal weights: the bound does not tell which of several
        fits predicts best, and their average is better than most of them.
        """
        if groups is not None:
            raise CapabilityError("FunBaT.predict has no groups=; leave it out")
        if site not in (None, "f"):
            raise CapabilityError(f"FunBaT predicts site None (a new y) or 'f', got {site!r}")
        if joint:
            return self._predict_jointly(post, x, new=site is None)
        data = post.context.data
        state, layout = self._fits(post)
        points = self._scaled(as_index(x, data.names), state["frame"])
        mean, variance = latent_moments(layout, state, points.to(layout.y))
        if site == "f":
            law: Distribution = Normal(mean, variance.sqrt(), validate_args=False)
        else:
            law = self.noise_model.law(state["noise"], mean, variance)
        return self._predictive(law, state["frame"])

    def _predict_jointly(self, post: Posterior, x: Any, *, new: bool) -> Predictive:
        """The normal law of f (or y) at index [*batch, q, mode] with its joint moments under q."""
        if self.warp is not None:
            raise CapabilityError("a warped surface is not normal; take warp=None, or joint=False")
        data = post.context.data
        state, layout = self._fits(post)
        x = as_tensor(x, name="index") if not isinstance(x, TensorData | pd.DataFrame) else x
        lead = x.shape[:-1] if isinstance(x, Tensor) else (len(x),)
        flat = x.reshape(-1, x.shape[-1]) if isinstance(x, Tensor) else x
        points = self._scaled(as_index(flat, data.names), state["frame"]).to(layout.y)
        mean, cov = joint_moments(layout, state, points.reshape(*lead, -1))
        offset, scale = state["frame"]["offset"], state["frame"]["scale"]
        law = joint_law(self.noise_model, state["noise"], mean, cov, new=new)
        law = MultivariateNormal(
            offset + scale * law.loc, scale_tril=scale * law.scale_tril, validate_args=False
        )
        dims = ("entry",) if len(lead) == 1 else ()
        if len(law.loc) == 1:
            return Analytic(select(law, 0), dims)
        return Mixture(law, torch.zeros(len(law.loc), dtype=law.loc.dtype), dims)

    def _predictive(self, law: Distribution, frame: Mapping[str, Any]) -> Predictive:
        """Map a law [copy, entry] to the units of y and average over copies."""
        law = _affine(law, frame["offset"], frame["scale"])
        copies = law.batch_shape[0]
        base: Analytic | Mixture
        if copies == 1:
            base = Analytic(select(law, 0), ("entry",))
        else:
            base = Mixture(law, torch.zeros(copies, dtype=torch.float64), ("entry",))
        return warped(base, frame["warp"])

    def update(
        self, posterior: Posterior, data: Any, *, rng: Rng | None = None, sweeps: int = 3
    ) -> Posterior:
        """Return the posterior given the old entries and more, at old or new coordinates.

        The fit goes on from where it was: new points are smoothed in, then a few sweeps over all
        entries follow. Units (scaling of coordinates and y) stay those of the first fit. Nothing
        is random; ``rng`` is not used.

        Args:
            posterior: A fit of this model.
            data: Further entries, :class:`TensorData` or a pair (index, y).
            rng: Not needed.
            sweeps: Number of sweeps.

        Raises:
            ShapeError: Another number of modes.
            DataError: Modes of other names, or values that cannot be used.
        """
        more = self.prepare(TensorData(*data) if isinstance(data, tuple) else data)
        old_data = posterior.context.data
        state, old = self._fits(posterior)
        whole = old_data.join(more)
        layout = self.layout(whole, state)
        order = sweep_order(old, layout)
        with torch.no_grad():
            state = extend(state, old, layout)
            for _ in range(sweeps):
                state, bound = sweep(layout, state, damping=0.0, order=order)
        params = [select_copy(state, chain) for chain in range(len(bound))]
        source = Fitted(self.messages_guide(whole), params)
        return replace(
            posterior,
            source=source,
            context=replace(
                posterior.context,
                data=whole,
                coords={**posterior.context.coords, **self.data_coords(whole)},
            ),
            marginals=source.marginals(self, whole),
            log_evidence=Evidence(bound, "bound"),
            sample_stats={},
            attrs={**posterior.attrs, "updates": int(posterior.attrs.get("updates", 0)) + 1},
        )

    def factor(self, post: Posterior, mode: int | str, grid: Any = None) -> Factor:
        """Trajectories of one mode along ``grid`` [point] (by default where there is data).

        Raises:
            DataError: No such mode.
        """
        data = post.context.data
        k = self._mode_number(data, mode)
        state, layout = self._fits(post)
        frame = state["frame"]
        raw = data.grids[k].points if grid is None else torch.as_tensor(grid).double().flatten()
        points = (raw - frame["lower"][k]) / frame["width"][k]
        own = state["modes"][k]
        result, joint = smooth_at(layout, own, k, points)
        pairs = pairs_of(result.mean.shape[-1])
        variance = result.cov[..., pairs.first == pairs.second]
        slope = slope_variance = None
        try:
            row = layout.spaces[k].derivative(own["hyper"]) / frame["width"][k]
        except CapabilityError:
            pass
        else:
            copies, r, s = row.shape
            D = (torch.eye(r, dtype=row.dtype).unsqueeze(-1) * row.unsqueeze(1)).reshape(
                copies, 1, r, r * s
            )
            slope = (D @ result.state_mean.unsqueeze(-1)).squeeze(-1)[:, joint.index]
            spread = (D @ result.state_cov @ D.mT).diagonal(dim1=-2, dim2=-1)
            slope_variance = spread[:, joint.index]
        return Factor(
            raw,
            result.mean[:, joint.index],
            variance[:, joint.index],
            slope,
            slope_variance,
        )

    def core(self, post: Posterior) -> Normal:
        """The core's marginals [chain, r_1, ..., r_K].

        Raises:
            CapabilityError: CP has no core.
        """
        if self.kind == "cp":
            raise CapabilityError("CP has no core; use kind='tucker'")
        state, layout = self._fits(post)
        mean = state["core"]["mean"].reshape(-1, *layout.ranks)
        variance = state["core"]["cov"].diagonal(dim1=-2, dim2=-1).reshape(mean.shape)
        return Normal(mean, variance.sqrt(), validate_args=False)

    def hyperparameters(self, post: Posterior) -> list[dict[str, Tensor]]:
        """Length scales and variances of each mode, [chain, component, part] each.

        A part is one kernel of a sum. Length scales are in the units of the scaled index.
        """
        state, _ = self._fits(post)
        return [
            {"lengthscale": m["hyper"][..., 0].exp(), "variance": m["hyper"][..., 1].exp()}
            for m in state["modes"]
        ]

    def _mode_number(self, data: TensorData, mode: int | str) -> int:
        names = data.names
        if isinstance(mode, str) and mode in names:
            return names.index(mode)
        if isinstance(mode, int) and 0 <= mode < len(names):
            return mode
        raise DataError(
            f"expected a mode 0..{len(names) - 1} or one of {', '.join(names)}, got {mode!r}"
        )

    def _fits(self, post: Posterior) -> tuple[Tree, Layout]:
        """All chains of a posterior side by side, and their layout."""
        source = post.source
        if not isinstance(source, Fitted) or not isinstance(source.guide, TrajectoryGuide):
            raise CapabilityError(
                f"FunBaT predicts from MessagePassing, this posterior has {type(source).__name__}"
            )
        data = post.context.data
        state = stack_copies(source.params)
        return state, self.layout(data, state)

    def _scaled(self, index: Tensor, frame: Mapping[str, Any]) -> Tensor:
        lower = index.new_tensor(frame["lower"])
        return (index - lower) / index.new_tensor(frame["width"])

    # ------------------------------------------------------------------ densities

    def log_factor_prior(self, u: Tensor, layout: Layout, k: int, log_hyper: Tensor) -> Tensor:
        """Log density [*batch] of trajectories u [*batch, point, component] of mode k."""
        batch = u.shape[:-2]
        flat = u.reshape(-1, *u.shape[-2:])
        chain = make_chain(layout.spaces[k], layout.grids[k], log_hyper.unsqueeze(0))
        n = len(flat)
        exact = flat.new_zeros(n, u.shape[-1], u.shape[-1])
        result = kalman_log_evidence(
            chain.initial_cov.new_zeros(n, chain.initial_cov.shape[-1]),
            chain.initial_cov.expand(n, *chain.initial_cov.shape[1:]),
            chain.transition.expand(n, *chain.transition.shape[1:]),
            chain.noise.expand(n, *chain.noise.shape[1:]),
            GaussianObservations(flat, exact),
            observation=chain.observation,
        )
        return result.reshape(batch)


def _affine(law: Distribution, offset: float, scale: float) -> Distribution:
    """The law of offset + scale * value, for location-scale families; others pass unchanged."""
    if offset == 0.0 and scale == 1.0:
        return law
    if isinstance(law, Normal):
        return Normal(offset + scale * law.loc, scale * law.scale, validate_args=False)
    if isinstance(law, torch.distributions.StudentT):
        moved = offset + scale * law.loc
        return torch.distributions.StudentT(law.df, moved, scale * law.scale, validate_args=False)
    return law

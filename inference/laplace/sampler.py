"""Laplace's method: find a mode, and put a Gaussian there."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from probkit.density import check_log_joint, log_joint_of
from probkit.errors import CapabilityError, ConvergenceWarning, DataError, ShapeError
from probkit.files import storable
from probkit.inference.guides import FullRank, MeanField
from probkit.inference.laplace.covariance import (
    Covariance,
    DiagonalCovariance,
    FullCovariance,
)
from probkit.inference.laplace.curvature import Curvature, check_full, gauss_newton
from probkit.inference.laplace.evidence import NetworkEvidence, maximise
from probkit.inference.laplace.guide import LaplaceNormal
from probkit.inference.laplace.hessian import gradient_and_hessian, positive_root
from probkit.inference.laplace.layers import LAYER_METHODS
from probkit.inference.map import MAP
from probkit.model import Site, Values, lacks
from probkit.posterior import Evidence, Posterior, make_posterior
from probkit.rng import scope
from probkit.sampler import Problem, Sampler, Step
from probkit.sources import Draws, Fitted
from probkit.tree import Tree
from probkit.unconstrained import Unconstrained

__all__ = ["Laplace"]

_STRUCTURES = ("full", "diag", "kron", "last_layer")
_CURVATURES = ("auto", "hessian", "ggn")
_TUNE = ("layers", "prior", "noise")


@storable
@dataclass(frozen=True)
class Laplace(Sampler):
    """Approximate the posterior by a Gaussian around its mode, in the unconstrained space.

    For any model with a log joint: the precision is minus the Hessian of the log density ("full"),
    or its diagonal ("diag"). For networks that show their layers (``HasLayers``, such as
    :class:`~probkit.models.BNN`): the generalised Gauss-Newton matrix, whole ("full"), its diagonal
    ("diag"), one Kronecker product a layer ("kron"), or that of the last layer with the others held
    fixed ("last_layer"). Sites other than weights and biases (noise, gains) are then held at their
    mode, and the evidence is that given their values.

    Networks predict by linearisation in the weights, in closed form; ``linearised=False`` makes
    draws instead. Several chains are several modes, and predict as an equally weighted mixture.

    Args:
        structure: "full", "diag", "kron" or "last_layer".
        mode: How to find the mode: a sampler that returns a point (by default
            ``MAP(jacobian=True)``), for example ``DeepEnsemble(members=1, fraction=1.0)`` for
            Adam; or values of all sites, or a posterior, whose best draw is taken.
        curvature: "hessian", "ggn" (networks only), or "auto": the latter where it can be had.
        tune: What to set by maximising the evidence at the mode, networks only: "prior" (one
            factor on the prior precision of all weights), "layers" (one for each layer), "noise"
            (a factor on the noise variance, which must be a site). The mode stays where it is.
        tune_steps: Most iterations of that.
        linearised: Whether networks predict in closed form.

    Returns (through ``infer``):
        A posterior with a fitted guide (:class:`LaplaceNormal`) for each chain, its evidence, and
        ``sample_stats``: ``gap`` [chain], half the squared Newton decrement, which is what the log
        density would still gain; ``prior_factor`` [chain, layer] and ``noise_factor`` [chain].

    Raises:
        DataError: An option out of range; a mode where the Hessian is not negative definite.
        CapabilityError: A structure that needs layers, on a model that shows none.

    Example:
        >>> import probkit as pk
        >>> from probkit.models import BNN
        >>> x = torch.linspace(-1, 1, 20, dtype=torch.float64)[:, None]
        >>> model = BNN(hidden=(8,), noise_var=0.01)
        >>> post = pk.infer(model, (x, x[:, 0].sin()), Laplace("kron"), rng=0)
        >>> post.predict(x, joint=True).dist.covariance_matrix.shape
        torch.Size([20, 20])
    """

    structure: Literal["full", "diag", "kron", "last_layer"] = "full"
    mode: Sampler | Mapping[str, Tensor] | Posterior = field(
        default_factory=lambda: MAP(jacobian=True), repr=False
    )
    curvature: Literal["auto", "hessian", "ggn"] = "auto"
    tune: tuple[str, ...] = ()
    tune_steps: int = 50
    linearised: bool = True

    needs = ("sites", "log_joint")
    accepts_guide = True

    def __post_init__(self) -> None:
        _one_of("structure", self.structure, _STRUCTURES)
        _one_of("curvature", self.curvature, _CURVATURES)
        if self.curvature == "hessian" and self.structure in ("kron", "last_layer"):
            raise DataError(
                f"curvature: expected 'ggn' or 'auto' with structure={self.structure!r}, got "
                "'hessian'"
            )
        object.__setattr__(self, "tune", tuple(self.tune))
        for name in self.tune:
            _one_of("tune", name, _TUNE)
        if "layers" in self.tune and "prior" in self.tune:
            raise DataError("tune: expected 'layers' or 'prior', got both")
        if not isinstance(self.tune_steps, int) or self.tune_steps < 1:
            raise DataError(f"tune_steps: expected a whole number >= 1, got {self.tune_steps!r}")
        if isinstance(self.mode, Posterior):
            object.__setattr__(self, "mode", _best_of(self.mode))

    # ---------------------------------------------------------------- driver methods

    def init(self, problem: Problem, *, rngs: Any) -> Tree:
        """Check that everything fits, and begin the search for the mode."""
        model, data = problem.model, problem.data
        sites = model.sites(data)
        if not sites:
            raise CapabilityError(f"Laplace: {type(model).__name__} has no sites")
        structure = self._structure(problem)
        layered = self._uses_layers(model, structure)
        if self.tune and not layered:
            raise CapabilityError(
                "Laplace(tune=) needs the Gauss-Newton matrix of a network with layers; leave it "
                "out, or make hyper-parameters sites of the model"
            )
        if structure == "full":
            check_full(Unconstrained(sites).size, rngs[0].device)
        state: dict[str, Any] = {"mode": None, "inner": None, "kept": None, "result": None}
        if isinstance(self.mode, Mapping):
            return {**state, "mode": _checked(self.mode, sites, problem)}
        assert not isinstance(self.mode, Posterior)  # Replaced by its best draw when made.
        lacking = lacks(model, self.mode.needs)
        if lacking:
            raise CapabilityError(
                f"Laplace: mode={type(self.mode).__name__} needs {', '.join(self.mode.needs)}; "
                f"{type(model).__name__} lacks {', '.join(lacking)}"
            )
        inner = self.mode.init(self._inner_problem(problem), rngs=rngs)
        return {**state, "inner": inner}

    def _inner_problem(self, problem: Problem) -> Problem:
        return replace(problem, guide=None)

    def step(self, problem: Problem, state: Tree, *, rngs: Any) -> Step:
        """Search on; once the mode is found, put the Gaussian there."""
        if state["mode"] is not None:
            result = self._approximate(problem, state["mode"])
            with torch.no_grad():
                log_joint = problem.model.log_joint(state["mode"], problem.data)
            return Step({**state, "result": result}, True, info={"log_joint": float(log_joint)})
        assert not isinstance(self.mode, Mapping | Posterior)
        inner = self._inner_problem(problem)
        step = self.mode.step(inner, state["inner"], rngs=rngs)
        if step.keep is not None:
            raise CapabilityError(
                f"Laplace: mode= expects a sampler that returns one point (MAP, DeepEnsemble), got "
                f"{type(self.mode).__name__}; pass its posterior to take its best draw"
            )
        new = {**state, "inner": step.state}
        if step.done:
            found = self.mode.finish(inner, step.state, None, rngs=rngs)
            new.update(mode=_best_of(found), inner=None)
        # The same names at every step: chains find their modes after different numbers of them.
        return Step(new, False, info={"log_joint": (step.info or {}).get("log_joint", math.nan)})

    def can_finish(self, state: Tree, kept: Tree) -> bool:
        """A mode alone is no approximation."""
        return state["result"] is not None

    def finish(self, problem: Problem, state: Tree, kept: Tree, *, rngs: Any) -> Posterior:
        """Return the Gaussian as a fitted guide."""
        result = state["result"]
        source = Fitted(LaplaceNormal(self.linearised), [result["params"]])
        stats = {name: value[None] for name, value in result["stats"].items()}
        return make_posterior(
            problem,
            source,
            marginals=source.marginals(problem.model, problem.data),
            log_evidence=Evidence(result["log_evidence"].reshape(1), "estimate"),
            sample_stats=stats,
            stat_dims={"prior_factor": ("layer",)} if "prior_factor" in stats else None,
            attrs={"structure": self._structure(problem), "tuned": list(self.tune)},
        )

    def conclude(self, problem: Problem, posterior: Posterior) -> Posterior:
        """Warn where a chain did not stand at a mode, unless tuning moved the mode away."""
        gap = float(posterior.sample_stats["gap"].max())
        if gap > 0.5 and not self.tune:
            warnings.warn(
                f"Laplace: the point is not the mode, a Newton step would gain {gap:.3g} in log "
                "density; give mode= more steps or iterations",
                ConvergenceWarning,
                stacklevel=4,
            )
        return posterior

    # ---------------------------------------------------------------- the approximation

    def _structure(self, problem: Problem) -> str:
        """The structure asked for, by name or by a guide."""
        guide = problem.guide
        if guide is None:
            return self.structure
        if isinstance(guide, MeanField):
            return "diag"
        if isinstance(guide, FullRank):
            return "full"
        raise CapabilityError(
            f"Laplace: expected guide=MeanField() or FullRank(), got {type(guide).__name__}; or "
            f"structure= out of {', '.join(_STRUCTURES)}"
        )

    def _uses_layers(self, model: Any, structure: str) -> bool:
        """Whether the curvature is the Gauss-Newton matrix of a network."""
        missing = lacks(model, LAYER_METHODS)
        wanted = self.curvature == "ggn" or structure in ("kron", "last_layer")
        if wanted and missing:
            raise CapabilityError(
                f"Laplace(structure={structure!r}, curvature={self.curvature!r}) needs a network "
                f"with layers; {type(model).__name__} lacks {', '.join(missing)}. Use 'full' or "
                "'diag' with curvature='auto'"
            )
        return not missing and self.curvature != "hessian"

    def _approximate(self, problem: Problem, values: Values) -> dict[str, Any]:
        structure = self._structure(problem)
        with scope(quiet=True), torch.no_grad():
            if self._uses_layers(problem.model, structure):
                return _of_network(problem, values, structure, self.tune, self.tune_steps)
            return _of_density(problem, values, structure)


def _of_density(problem: Problem, values: Values, structure: str) -> dict[str, Any]:
    """Use the exact Hessian of the log density of the unconstrained vector."""
    model, data = problem.model, problem.data
    free = Unconstrained(_ordered(model, data))

    def log_density(flat: Tensor) -> Tensor:
        constrained, log_det = free.constrain(flat)
        return log_joint_of(model, constrained, data) + log_det

    loc = free.flatten(values)
    gradient, hessian = gradient_and_hessian(log_density, loc)
    precision = -hessian
    if structure == "diag":
        precision = torch.diag(precision.diagonal())
    factor = positive_root(precision, _owners(free), type(model).__name__)
    half = torch.linalg.solve_triangular(factor, gradient[:, None], upper=False)
    log_det_root = -factor.diagonal().log().sum()
    covariance: Covariance
    if structure == "diag":
        covariance = DiagonalCovariance(1 / factor.diagonal())
    else:
        identity = torch.eye(len(loc), dtype=loc.dtype, device=loc.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
        covariance = FullCovariance(inverse.mT.contiguous(), log_det_root)
    log_evidence = log_density(loc[None])[0] + 0.5 * len(loc) * math.log(2 * math.pi) + log_det_root
    return {
        "params": _params(loc, covariance, list(free.sites), {}),
        "log_evidence": log_evidence,
        "stats": {"gap": 0.5 * half.square().sum()},
    }


def _of_network(
    problem: Problem, values: Values, structure: str, tune: tuple[str, ...], steps: int
) -> dict[str, Any]:
    """Use the Gauss-Newton matrix, the prior and the noise tuned where asked for."""
    model, data = problem.model, problem.data
    curvature = gauss_newton(model, values, data, structure)
    names = model.layer_names()
    if structure == "last_layer":
        names = names[-1:]
    evidence = _network_evidence(problem, values, curvature, names, tune)
    tuned = maximise(evidence, tune, steps)
    covariance = curvature.covariance(tuned.precision, tuned.noise)
    chosen = [name for pair in names for name in pair]
    sites = model.sites(data)
    loc = Unconstrained({name: sites[name] for name in chosen}).flatten(values)
    held = {name: values[name] for name in sites if name not in chosen}
    if "noise" in tune:
        site = model.output_curvature(values, data).noise_site
        held[site] = held[site] * tuned.noise.to(held[site])
    return {
        "params": _params(loc, covariance.to(loc.dtype), chosen, held),
        "log_evidence": tuned.log_evidence,
        "stats": {
            "gap": _gap(problem, values, curvature, names),
            "prior_factor": tuned.precision,
            "noise_factor": tuned.noise,
        },
    }


def _network_evidence(
    problem: Problem,
    values: Values,
    curvature: Curvature,
    names: Sequence[tuple[str, str]],
    tune: tuple[str, ...],
) -> NetworkEvidence:
    model, data = problem.model, problem.data
    output = model.output_curvature(values, data)
    residual = None
    if "noise" in tune:
        if output.noise_site is None or output.residual is None:
            raise CapabilityError(
                f"Laplace(tune=) cannot tune the noise of {type(model).__name__}: expected a "
                "normal likelihood whose noise variance is a site, such as "
                "BNN(noise_var=LogNormal(-4.0, 1.5)); leave 'noise' out"
            )
        residual = output.residual.double()
    sd = model.weight_sd()
    squares = [sum((values[n] / sd[n]).double().square().sum() for n in pair) for pair in names]
    sizes = [sum(values[n].numel() for n in pair) for pair in names]
    log_likelihood = model.log_likelihood(values, data).double()
    return NetworkEvidence(
        curvature=curvature,
        log_likelihood=log_likelihood,
        squares=torch.stack([torch.as_tensor(s).to(log_likelihood) for s in squares]),
        sizes=torch.tensor(sizes, dtype=torch.float64, device=log_likelihood.device),
        residual=None if residual is None else residual.square().sum(),
        observations=0 if residual is None else residual.numel(),
    )


def _gap(
    problem: Problem, values: Values, curvature: Curvature, names: Sequence[tuple[str, str]]
) -> Tensor:
    """Half the squared Newton decrement of the model's own log density in the layers ``names``."""
    model, sd = problem.model, problem.model.weight_sd()
    chosen = [name for pair in names for name in pair]
    with torch.enable_grad():
        own = {k: v.detach().requires_grad_(k in chosen) for k, v in values.items()}
        density = model.log_likelihood(own, problem.data)
        density = density - sum((own[n] / sd[n]).square().sum() for n in chosen) / 2
        gradient = torch.autograd.grad(density, [own[n] for n in chosen])
    flat = torch.cat([g.flatten() for g in gradient]).double()
    ones = flat.new_ones(len(model.layer_names()))
    covariance = curvature.covariance(ones, flat.new_ones(()))
    return 0.5 * covariance.whiten(flat).square().sum()


def _params(
    loc: Tensor, covariance: Covariance, sites: list[str], held: Mapping[str, Tensor]
) -> dict[str, Any]:
    return {"loc": loc, "covariance": covariance, "sites": sites, "held": dict(held)}


def _ordered(model: Any, data: Any) -> dict[str, Site]:
    """The sites of a model, the layers of a network before all others."""
    sites = dict(model.sites(data))
    if lacks(model, LAYER_METHODS):
        return sites
    first = [name for pair in model.layer_names() for name in pair]
    return {name: sites[name] for name in [*first, *(n for n in sites if n not in first)]}


def _owners(free: Unconstrained) -> list[str]:
    """Name the site of each entry of the flat vector."""
    return [n for n, site in free.sites.items() for _ in range(Unconstrained({n: site}).size)]


def _best_of(posterior: Posterior) -> dict[str, Tensor]:
    """Return the draw of highest density, or the only one."""
    source = posterior.source
    if not isinstance(source, Draws):
        raise CapabilityError(
            f"Laplace: mode= expects a posterior of draws or a point estimate, got "
            f"{type(source).__name__}"
        )
    best = 0
    if source.shape != (1, 1):
        density = posterior.sample_stats.get("lp")
        if density is None:
            raise CapabilityError(
                "Laplace: mode= expects one point or draws with sample_stats['lp'], got "
                f"{source.shape} draws without it; pass the values of one draw"
            )
        best = int(density.flatten().argmax())
    return {name: value.flatten(0, 1)[best].clone() for name, value in source.values.items()}


def _checked(values: Values, sites: Mapping[str, Site], problem: Problem) -> dict[str, Tensor]:
    """Check the values of a given mode."""
    for name, site in sites.items():
        found = values.get(name)
        if found is None or tuple(found.shape) != site.shape:
            got = "nothing" if found is None else str(tuple(found.shape))
            raise ShapeError(f"mode: expected site {name!r} of shape {site.shape}, got {got}")
    chosen = {name: values[name] for name in sites}
    Unconstrained(sites).flatten(chosen)  # Names a value outside its support.
    check_log_joint(problem.model, {k: v[None] for k, v in chosen.items()}, problem.data)
    return chosen


def _one_of(name: str, value: Any, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise DataError(f"{name}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")

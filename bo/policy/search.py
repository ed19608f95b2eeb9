"""Where an acquisition function is largest: in boxes, over categories, and in each branch.

Points all over the box and perturbations of the best points seen are valued together; the best of
them start L-BFGS (and, where there are whole numbers or categories, BoTorch's alternating search).
Perturbations over several orders of magnitude matter late in a search, when the region worth
looking at is smaller than any space-filling design resolves.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from botorch.acquisition import AcquisitionFunction
from botorch.acquisition.acquisition import OneShotAcquisitionFunction
from botorch.optim import optimize_acqf, optimize_acqf_mixed, optimize_acqf_mixed_alternating
from torch import Tensor

from probkit.bo.domain import Domain, as_domain
from probkit.bo.policy.compiled import without_compiler
from probkit.errors import CapabilityError, DataError
from probkit.rng import Rng, scope, seed_of, stream

__all__ = ["maximise"]

_SCALES = (0.2, 0.05, 0.01, 2e-3, 4e-4)
_COPIES = 8
_CENTRES = 3
_FLIP = 0.15
_FEW = 12  # Combinations of categories up to which each gets its own search.
_CHUNK = 2**14
_SAME = 1e-9


def maximise(
    acquisition: AcquisitionFunction,
    bounds: Domain | Tensor | None,
    *,
    q: int = 1,
    incumbents: Tensor | None = None,
    avoid: Tensor | None = None,
    restarts: int = 6,
    raw_samples: int = 256,
    iterations: int = 80,
    rng: Rng,
) -> Tensor:
    """Find the points that an acquisition function values most.

    Several points are found one after another, each pending for the next; look-ahead acquisition
    functions find them together.

    Args:
        acquisition: What :func:`acquisition_for` returned, or any BoTorch acquisition function.
        bounds: The box: a :class:`~probkit.bo.Domain` with categories, whole numbers and branches,
            or bounds [2, feature].
        q: Number of points.
        incumbents: Good points seen [point, feature], best first, to search around.
        avoid: Points not to propose again [point, feature].
        restarts: Local searches.
        raw_samples: Points valued before.
        iterations: Most iterations of a local search.
        rng: Seed or generator.

    Returns:
        Points [q, feature] inside the box, pairwise distinct where the box has room, with whole
        numbers where they belong.

    Raises:
        CapabilityError: Several points are wanted of a function of one.
        DataError: Every point of a finite box is to be avoided.

    Example:
        >>> from probkit.bo.policy import acquisition_for
        >>> from probkit.bo.surrogates import make_surrogate
        >>> X = torch.rand(8, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> Y = -(X - 0.3).square()
        >>> model = make_surrogate("gp-exact", X, Y, rng=0)
        >>> candidate = maximise(acquisition_for(model, X=X, Y=Y, rng=0), None, rng=0)
        >>> candidate.shape
        torch.Size([1, 1])
    """
    features = _features(acquisition, bounds, incumbents, avoid)
    domain = as_domain(bounds, features)
    seed = seed_of(rng)
    search = _Search(acquisition, domain, incumbents, restarts, raw_samples, iterations, seed)
    with scope(rng=stream(seed, "maximise")), without_compiler(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(acquisition, OneShotAcquisitionFunction):
            return search.together(q)
        return _one_by_one(search, q, avoid)


def _features(
    acquisition: AcquisitionFunction,
    bounds: Domain | Tensor | None,
    incumbents: Tensor | None,
    avoid: Tensor | None,
) -> int:
    if bounds is not None:
        return 0  # The box says so itself.
    for points in (incumbents, avoid):
        if points is not None:
            return int(points.shape[-1])
    inputs = getattr(acquisition.model, "train_inputs", None)
    if inputs:
        return int(inputs[0].shape[-1])
    raise DataError("bounds: expected a Domain or bounds [2, feature], got None")


def _one_by_one(search: _Search, q: int, avoid: Tensor | None) -> Tensor:
    """Find points one after another, each pending for the next."""
    acquisition = search.acquisition
    pending = getattr(acquisition, "X_pending", None)
    if q > 1:
        _check_pending(acquisition)
    chosen: list[Tensor] = []
    taken = search.domain.bounds.new_zeros(0, search.domain.size)
    taken = taken if avoid is None else torch.cat([taken, avoid.to(taken)])
    if pending is not None:
        taken = torch.cat([taken, pending.reshape(-1, search.domain.size).to(taken)])
    try:
        for number in range(q):
            point = search.one(taken, number)
            chosen.append(point)
            taken = torch.cat([taken, point])
            if number + 1 < q:
                new = torch.cat(chosen)
                acquisition.set_X_pending(new if pending is None else torch.cat([pending, new]))
    finally:
        if q > 1:
            acquisition.set_X_pending(pending)
    return torch.cat(chosen)


def _check_pending(acquisition: AcquisitionFunction) -> None:
    from botorch.acquisition.analytic import AnalyticAcquisitionFunction

    if isinstance(acquisition, AnalyticAcquisitionFunction) or not hasattr(
        acquisition, "set_X_pending"
    ):
        raise CapabilityError(
            f"{type(acquisition).__name__} values one point at a time; for several take a Monte "
            "Carlo form such as q_log_ei: acquisition_for(..., q=q)"
        )


class _Search:
    """One acquisition function in one box."""

    def __init__(
        self,
        acquisition: AcquisitionFunction,
        domain: Domain,
        incumbents: Tensor | None,
        restarts: int,
        raw_samples: int,
        iterations: int,
        seed: int,
    ) -> None:
        self.acquisition, self.domain = acquisition, domain
        self.incumbents = None if incumbents is None else incumbents[:_CENTRES].to(domain.bounds)
        self.restarts, self.raw_samples, self.iterations = restarts, raw_samples, iterations
        self.seed = seed

    # --------------------------------------------------------------------------- one point

    def one(self, taken: Tensor, number: int) -> Tensor:
        """Return the best point [1, feature] that is not taken."""
        found = [self._in_branch(fixed, number) for fixed in self._branches()]
        points = self.domain.rounded(torch.cat(found))
        order = self._values(points).argsort(descending=True)
        for point in points[order]:
            if not _contains(taken, point):
                return point[None]
        return self._another(taken, number)

    def _branches(self) -> list[dict[int, float]]:
        target: dict[int, float] = {}
        fidelity = self.domain.fidelity
        if fidelity is not None and not _chooses_fidelity(self.acquisition):
            target = {fidelity: float(self.domain.bounds[1, fidelity])}
        branches = self.domain.branches or ({},)
        return [{**{int(k): float(v) for k, v in b.items()}, **target} for b in branches]

    def _in_branch(self, fixed: Mapping[int, float], number: int) -> Tensor:
        """Return good points [point, feature] with some columns fixed, the best first."""
        far, near = self._raw(fixed, number)
        # Half of the local searches start away from the incumbents, whatever those promise.
        best_far, best_near = (
            points[_top(points, self._values(points), count)]
            for points, count in ((far, -(-self.restarts // 2)), (near, self.restarts // 2))
        )
        start = torch.cat([best_far, best_near])
        start = start[_top(start, self._values(start), self.restarts)]
        free = [k for k in range(self.domain.size) if k not in fixed]
        if not free:
            return start[:1]
        discrete = {k: list(self.domain.choices(k)) for k in self._whole() if k not in fixed}
        best = start[:1]
        try:
            found = self._local(start, dict(fixed), discrete)
        except (RuntimeError, ValueError, DataError):
            # The surface may be flat, or a factor fail: the points valued already stand.
            found = best
        second = start[1:2] if len(start) > 1 else best
        return torch.cat([found.reshape(-1, self.domain.size), best, second])

    def _whole(self) -> tuple[int, ...]:
        return (*self.domain.categorical, *self.domain.integer)

    def _local(
        self, start: Tensor, fixed: dict[int, float], discrete: dict[int, list[float]]
    ) -> Tensor:
        """Improve starting points [start, feature]; return the best found [1, feature]."""
        bounds = self.domain.bounds
        options: dict[str, Any] = {"maxiter": self.iterations}
        free = [k for k in range(self.domain.size) if k not in fixed and k not in discrete]
        if not discrete:
            point, _ = optimize_acqf(
                self.acquisition,
                bounds,
                q=1,
                num_restarts=len(start),
                batch_initial_conditions=start[:, None],
                fixed_features=fixed or None,
                options=options,
                retry_on_optimization_warning=False,
            )
            return point.detach()
        count = math.prod(len(values) for values in discrete.values())
        if count <= _FEW and free:
            point, _ = optimize_acqf_mixed(
                self.acquisition,
                bounds,
                q=1,
                num_restarts=2,
                raw_samples=32,
                fixed_features_list=[{**fixed, **choice} for choice in _combinations(discrete)],
                options=options,
            )
            return point.detach()
        climbed = self._climb(start[:2], fixed, discrete)
        if not free:
            return climbed[:1]
        point, _ = optimize_acqf_mixed_alternating(
            self.acquisition,
            bounds,
            discrete_dims={k: v for k, v in discrete.items() if k in self.domain.integer},
            cat_dims={k: v for k, v in discrete.items() if k in self.domain.categorical},
            q=1,
            raw_samples=32,
            num_restarts=2,
            fixed_features=fixed or None,
            options={"maxiter_alternating": 8, "maxiter_continuous": self.iterations // 4},
        )
        # Continuous columns of the climbed points are polished with the rest as it is.
        whole = {k: float(climbed[0, k]) for k in discrete}
        polished, _ = optimize_acqf(
            self.acquisition,
            bounds,
            q=1,
            num_restarts=1,
            batch_initial_conditions=climbed[:1, None],
            fixed_features={**fixed, **whole},
            options=options,
            retry_on_optimization_warning=False,
        )
        return torch.cat([point, polished]).detach()

    def _climb(
        self, start: Tensor, fixed: Mapping[int, float], discrete: Mapping[int, list[float]]
    ) -> Tensor:
        """Change one whole number or category at a time while that helps."""
        points, values = start.clone(), self._values(start)
        for row in range(len(points)):
            for _ in range(8 * len(discrete)):
                near = _neighbours(points[row], discrete, self.domain.categorical)
                heights = self._values(near)
                best = int(heights.argmax())
                if not float(heights[best]) > float(values[row]):
                    break
                points[row], values[row] = near[best], heights[best]
        return points[values.argsort(descending=True)]

    # ------------------------------------------------------------------------ raw points

    def _raw(self, fixed: Mapping[int, float], number: int) -> tuple[Tensor, Tensor]:
        """Return points all over the box, and around the incumbents, [point, feature] each."""
        seed = seed_of(stream(self.seed, "raw", number)) % 2**31
        far = self.domain.sample(self.raw_samples, seed=seed)
        near = far
        if self.incumbents is not None and len(self.incumbents):
            generator = stream(self.seed, "near", number)
            near = torch.cat([self._near(scale, generator) for scale in _SCALES])
        return self.domain.rounded(_put(far, fixed)), self.domain.rounded(_put(near, fixed))

    def _near(self, scale: float, generator: torch.Generator) -> Tensor:
        """Perturb the incumbents: ordinal columns by normal noise, categories by chance."""
        assert self.incumbents is not None
        low, high = self.domain.bounds
        centres = self.incumbents.repeat(_COPIES, 1)
        noise = torch.randn(centres.shape, generator=generator, dtype=centres.dtype)
        points = centres + scale * (high - low) * noise
        # Half of the points move along few columns only.
        still = torch.rand(centres.shape, generator=generator, dtype=centres.dtype) < 0.5
        still[::2] = False
        points = torch.where(still, centres, points)
        for k in self.domain.categorical:
            count = high[k] - low[k] + 1
            chance, other = torch.rand(2, len(points), generator=generator, dtype=centres.dtype)
            fresh = low[k] + (other * count).floor()
            points[:, k] = torch.where(chance < _FLIP, fresh, centres[:, k])
        # Reflected at the bounds, so that they do not collect points.
        points = torch.where(points < low, 2 * low - points, points)
        return torch.where(points > high, 2 * high - points, points)

    def _values(self, points: Tensor) -> Tensor:
        """Value points [point, feature] one by one, [point]; NaN counts as the worst."""
        with torch.no_grad():
            parts = [self.acquisition(part[:, None]) for part in points.split(_CHUNK)]
        return torch.cat(parts).nan_to_num(-torch.inf, torch.inf, -torch.inf)

    def _another(self, taken: Tensor, number: int) -> Tensor:
        """Return the best point of many that is not taken.

        Raises:
            DataError: There is none: the box is finite and used up.
        """
        seed = seed_of(stream(self.seed, "another", number)) % 2**31
        parts = [self.domain.sample(2048, seed=seed)]
        discrete = {k: list(self.domain.choices(k)) for k in self._whole()}
        if discrete:
            parts += [_neighbours(p, discrete, self.domain.categorical) for p in taken[-64:]]
        fixed = self._branches()
        points = torch.cat(parts)
        if self.domain.branches:
            points = torch.cat([_put(points, branch) for branch in fixed])
        elif fixed[0]:
            points = _put(points, fixed[0])
        points = self.domain.rounded(points)
        left = [p for p in points.unique(dim=0) if not _contains(taken, p)]
        if not left:
            raise DataError(
                f"all points of the space have been proposed ({len(taken)} of them): there is "
                "nothing left to ask for"
            )
        rest = torch.stack(left)
        return rest[self._values(rest).argmax()][None]

    # --------------------------------------------------------------------------- together

    def together(self, q: int) -> Tensor:
        """Return q points that a look-ahead function finds jointly."""
        if self.domain.categorical or self.domain.branches:
            raise CapabilityError(
                f"{type(self.acquisition).__name__} looks ahead in continuous boxes only; take "
                "q_log_ei or q_log_nei for categories and conditions"
            )
        fixed = self._branches()[0]
        points, _ = optimize_acqf(
            self.acquisition,
            self.domain.bounds,
            q=q,
            num_restarts=self.restarts,
            raw_samples=self.raw_samples,
            fixed_features=fixed or None,
            options={"maxiter": self.iterations},
        )
        return self.domain.rounded(points.detach())


def _chooses_fidelity(acquisition: AcquisitionFunction) -> bool:
    return getattr(acquisition, "cost_aware_utility", None) is not None


def _contains(points: Tensor, point: Tensor) -> bool:
    return len(points) > 0 and bool(((points - point).abs() <= _SAME).all(-1).any())


def _put(points: Tensor, fixed: Mapping[int, float]) -> Tensor:
    points = points.clone()
    for column, value in fixed.items():
        points[:, column] = value
    return points


def _top(points: Tensor, values: Tensor, count: int) -> Tensor:
    """Return the indexes of the best points, no two of them the same point."""
    chosen: list[int] = []
    for index in values.argsort(descending=True).tolist():
        if not any(bool(((points[index] - points[k]).abs() <= _SAME).all()) for k in chosen):
            chosen.append(index)
        if len(chosen) == count:
            break
    return torch.tensor(chosen)


def _combinations(discrete: Mapping[int, list[float]]) -> list[dict[int, float]]:
    found: list[dict[int, float]] = [{}]
    for column, values in discrete.items():
        found = [{**part, column: value} for part in found for value in values]
    return found


def _neighbours(
    point: Tensor, discrete: Mapping[int, list[float]], categorical: tuple[int, ...]
) -> Tensor:
    """Return the points [point, feature] that differ in one category, or by one step."""
    near = []
    for column, values in discrete.items():
        own = float(point[column])
        others = [v for v in values if v != own and (column in categorical or abs(v - own) <= 1)]
        for value in others:
            moved = point.clone()
            moved[column] = value
            near.append(moved)
    return torch.stack(near) if near else point[None]

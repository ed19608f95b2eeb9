"""The next points of a study, as a function of its trials: initial design, surrogate, acquisition.

Nothing is kept between calls but the warm state that the caller passes in and gets back; random
numbers come from streams keyed by the seed and the number of trials. So a study that was killed and
opened again asks for what it would have asked for anyway.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probkit.bo.observations import Observations, observe
from probkit.bo.outcomes import Outcomes
from probkit.bo.space import Space
from probkit.bo.trials import Trial
from probkit.errors import CapabilityError, DataError
from probkit.files import class_name, pack, unpack
from probkit.rng import seed_of, stream

if TYPE_CHECKING:
    from botorch.models.model import Model

    from probkit.bo.policy import Goal

__all__ = ["NextPoints", "StudySettings", "evidence_of", "fit_surrogate", "next_points"]

#: Codes of two points that are closer than this are the same point.
_SAME = 1e-9
#: Outcome transforms with all that a study needs: variances in, means and variances out.
_OUTCOMES = ("standardize", "winsorize")


@dataclass(frozen=True)
class StudySettings:
    """How a study searches.

    Attributes:
        surrogate: A name, an object that :func:`~probkit.bo.make_surrogate` takes, or a function.
        acquisition: ``"auto"``, or the name of an acquisition function.
        seed: Seed of everything random.
        noise: ``"auto"``, or ``"none"`` where outcomes are exact, which is told to surrogates that
            can pass through every point (:attr:`Surrogate.interpolates`).
        initial: Number of points before the first surrogate.
        failures: ``"worst"`` or ``"ignore"``.
        outcome: Name of the outcome transform.
        options: Options of the surrogate.
    """

    surrogate: Any = "auto"
    acquisition: str = "auto"
    seed: int = 0
    noise: str = "auto"
    initial: int = 10
    failures: str = "worst"
    outcome: str = "standardize"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what can be checked without data."""
        if self.noise not in ("auto", "none"):
            raise DataError(f"noise: expected 'auto' or 'none', got {self.noise!r}")
        if self.failures not in ("worst", "ignore"):
            raise DataError(f"failures: expected 'worst' or 'ignore', got {self.failures!r}")
        if isinstance(self.initial, bool) or not isinstance(self.initial, int) or self.initial < 2:
            raise DataError(
                f"initial: expected a whole number of points >= 2, got {self.initial!r}: a "
                "surrogate needs two"
            )
        from probkit.bo.policy.abilities import ACQUISITIONS

        if self.acquisition != "auto" and self.acquisition not in ACQUISITIONS:
            names = ", ".join(map(repr, ACQUISITIONS))
            raise DataError(f"acq: expected 'auto' or one of {names}, got {self.acquisition!r}")
        if self.outcome not in _OUTCOMES:
            names = ", ".join(map(repr, _OUTCOMES))
            raise DataError(f"outcome: expected one of {names}, got {self.outcome!r}")
        if self.outcome != "standardize" and _is_function(self.surrogate):
            raise DataError(
                f"outcome={self.outcome!r}: a surrogate that is a function transforms outcomes "
                "itself; leave it out"
            )
        if not _is_function(self.surrogate):
            from probkit.bo.surrogates.registry import surrogate_of

            surrogate_of(self.surrogate, self.options)  # an unknown name or option is an error now

    def surrogate_for(self, space: Space, outcomes: Outcomes) -> Any:
        """Return the surrogate with what it needs to know of a study.

        Raises:
            CapabilityError: It cannot serve such a study.
        """
        if _is_function(self.surrogate):
            return self.surrogate
        from probkit.bo.surrogates.registry import surrogate_of

        spec: Any = surrogate_of(self.surrogate, self.options)
        if hasattr(spec, "in_study"):
            spec = spec.in_study(space, outcomes)
        learns = getattr(spec, "noise", None) == "learned"
        if self.noise == "none" and learns and spec.interpolates:
            spec = surrogate_of(spec, {"noise": "none"})
        return spec

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values; a function is stored by name only."""
        return {
            "surrogate": _write_surrogate(self.surrogate),
            "acq": self.acquisition,
            "rng": self.seed,
            "noise": self.noise,
            "initial": self.initial,
            "failures": self.failures,
            "outcome": self.outcome,
            "options": {name: _write_option(value) for name, value in self.options.items()},
        }

    @classmethod
    def from_json(
        cls,
        tree: Mapping[str, Any],
        surrogate: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> StudySettings:
        """Rebuild settings; files of version 1 lack some.

        Args:
            tree: What :meth:`to_json` returned.
            surrogate: Put in place of the stored one; the stored options are then dropped.
            options: Put in place of stored options of the same names.

        Raises:
            DataError: The stored surrogate or an option is not stored in full, and none was passed.
        """
        given = dict(options or {})
        stored = tree.get("options", {}) if surrogate is None else {}
        kept = {n: _read_option(n, v) for n, v in stored.items() if n not in given}
        return cls(
            surrogate=_read_surrogate(tree["surrogate"]) if surrogate is None else surrogate,
            acquisition=tree["acq"],
            seed=tree["rng"],
            noise=tree.get("noise", "auto"),
            initial=tree["initial"],
            failures=tree.get("failures", "worst"),
            outcome=tree.get("outcome", "standardize"),
            options={**kept, **given},
        )


def _is_function(surrogate: Any) -> bool:
    """Whether a surrogate is a plain function of the data, rather than a name or options."""
    import inspect

    return inspect.isroutine(surrogate)


def _write_surrogate(surrogate: Any) -> Any:
    if isinstance(surrogate, str):
        return surrogate
    if _is_function(surrogate):
        return {"function": f"{surrogate.__module__}.{surrogate.__qualname__}"}
    try:
        structure, tensors = pack(surrogate)
    except DataError:
        return {"function": class_name(surrogate)}
    return {"object": structure} if not tensors else {"function": class_name(surrogate)}


def _read_surrogate(tree: Any) -> Any:
    if isinstance(tree, str):
        return tree
    if "object" in tree:
        return unpack(tree["object"], {})
    raise DataError(
        f"the surrogate of this study, {tree['function']}, is not stored in it; pass surrogate= to "
        "Study.load"
    )


_STORED = "__stored__"


def _write_option(value: Any) -> Any:
    """An option as JSON: what is no JSON is packed; language models only leave their names."""
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        pass
    if hasattr(value, "generate") and hasattr(value, "usage"):  # they may know keys
        model = getattr(value, "model", None)
        name = {"name": model} if isinstance(model, str) else {}
        return {_STORED: {"language model": class_name(value), **name}}
    try:
        structure, tensors = pack(value)
    except DataError:
        return {_STORED: {"class": class_name(value)}}
    return {_STORED: {"class": class_name(value)} if tensors else {"object": structure}}


def _read_option(name: str, tree: Any) -> Any:
    if not isinstance(tree, Mapping) or _STORED not in tree:
        return tree
    stored = tree[_STORED]
    if "object" in stored:
        return unpack(stored["object"], {})
    what = " ".join(stored.values())
    raise DataError(
        f"the option {name!r} of this study, {what}, is not stored in it; pass "
        f"options={{{name!r}: ...}} or surrogate= to Study.load"
    )


@dataclass(frozen=True, eq=False)
class NextPoints:
    """Points to evaluate next.

    Attributes:
        params: The points.
        origins: Where each came from.
        state: What the surrogate hands on to the next one; None where none was fitted.
    """

    params: list[dict[str, Any]]
    origins: list[str]
    state: Any = None


def next_points(
    space: Space,
    outcomes: Outcomes,
    trials: Iterable[Trial],
    n: int,
    *,
    settings: StudySettings,
    state: Any = None,
    number: int | None = None,
) -> NextPoints:
    """Choose the next ``n`` points.

    Args:
        space: What is searched.
        outcomes: What is measured.
        trials: All trials so far, pending ones included.
        n: Number of points.
        settings: How to search.
        state: What the last surrogate handed on.
        number: Number of the first new trial, which the random streams are keyed by; by default
            the number of trials so far.

    Raises:
        DataError: No point is left.
    """
    trials = list(trials)
    number = len(trials) if number is None else number
    seen = observe(trials, space, outcomes, noise=settings.noise, failures=settings.failures)
    missing = min(n, max(0, settings.initial - len(trials)))
    if seen.complete < 2:
        missing = n
    first = _initial(space, number, missing, settings.seed)
    advised, state_after = _advised(space, outcomes, number, missing, settings, state)
    picked = _Picked(space, seen)
    for k, point in enumerate(first):
        told = advised.get(number + k)
        picked.add(
            point if told is None else told,
            "initial" if told is None else "llm",
            rng=stream(settings.seed, "fill", number),
        )
    if missing < n:
        state = state if state_after is None else state_after
        model = fit_surrogate(seen, space, settings, state, outcomes=outcomes, key=("fit", number))
        rng = stream(settings.seed, "candidates", number)
        points = _room(space, seen, picked, n - missing)
        if points:
            best, origins = _candidates(
                model, space, outcomes, seen, picked.running, points, settings, rng=rng
            )
            for k, (point, origin) in enumerate(zip(best, origins, strict=True)):
                picked.add(point, origin, rng=stream(settings.seed, "fill", number, k))
        for k in range(points, n - missing):  # the space is used up: evaluate again
            picked.add(seen.X[seen.told][0], "model", rng=stream(settings.seed, "fill", number, k))
        state = _state_of(model, settings)  # the choice of points may have added to it
    else:
        state = state_after
    return NextPoints(space.from_codes(picked.new), picked.origins, state)


def _room(space: Space, seen: Observations, picked: _Picked, n: int) -> int:
    """How many of ``n`` points can be new: all of them, unless the space is small."""
    if space.size == float("inf"):
        return n
    tried = torch.cat([seen.visited, picked.new])
    return min(n, max(0, int(space.size) - len(tried.unique(dim=0))))


def _initial(space: Space, start: int, n: int, seed: int) -> Tensor:
    """Points of the Sobol sequence, as codes ``[point, parameter]``."""
    return space.codes(space.sobol(n, rng=seed, start=start) if n else [])


def _advised(
    space: Space, outcomes: Outcomes, start: int, n: int, settings: StudySettings, state: Any
) -> tuple[dict[int, Tensor], Any]:
    """Initial points that the surrogate itself recommends, by trial number, and the state after."""
    spec = settings.surrogate_for(space, outcomes)
    if not n or not hasattr(spec, "start"):
        return {}, None
    found = spec.start(
        settings.initial,
        start,
        n,
        state=_warm(state, settings),
        rng=stream(settings.seed, "warm start"),
    )
    if found.state is None:
        return found.points, None
    return found.points, {"surrogate": _name(settings), "warm": found.state}


class _Picked:
    """Points picked so far for one request, kept apart from each other and from what was tried."""

    def __init__(self, space: Space, seen: Observations) -> None:
        self.space, self.seen = space, seen
        self.new = torch.empty(0, len(space), dtype=torch.float64)
        self.origins: list[str] = []

    @property
    def running(self) -> Tensor:
        """Codes of all points without outcome ``[point, parameter]``."""
        return torch.cat([self.seen.pending, self.new])

    def add(self, code: Tensor, origin: str, *, rng: torch.Generator) -> None:
        """Add one point ``[parameter]``, or another where it is taken."""
        snapped = self.space.codes(self.space.from_codes(code[None]))[0]
        if _is_among(snapped, torch.cat([self.seen.visited, self.new])):
            snapped, origin = self._free_point(snapped, rng), "random"
        self.new = torch.cat([self.new, snapped[None]])
        self.origins.append(origin)

    def _free_point(self, wanted: Tensor, rng: torch.Generator) -> Tensor:
        """A point that was not tried, near the wanted one; in a space that is used up, a repeat.

        Raises:
            DataError: Every point of the space is pending.
        """
        for width in (0.02, 0.1, 0.5, None):
            pool = _around(self.space, wanted, width, rng)
            free = ~_rows_among(pool, torch.cat([self.seen.visited, self.new]))
            if bool(free.any()):
                return pool[free][0]
        every = _all_points(self.space)
        if every is None:
            return wanted
        tried = torch.cat([self.seen.visited, self.new])
        for taken in (tried, self.running):  # repeat an evaluation before a point that runs
            free = ~_rows_among(every, taken)
            if bool(free.any()):
                choices = every[free]
                near = (choices - wanted).abs().sum(-1).argmin()
                return choices[near]
        raise DataError(
            f"ask: all {int(self.space.size)} points of the space are pending; tell some first"
        )


def _is_among(point: Tensor, others: Tensor) -> bool:
    return bool(_rows_among(point[None], others)[0])


def _rows_among(points: Tensor, others: Tensor) -> Tensor:
    """Whether each row equals one of others, ``[point]``."""
    if not len(others):
        return torch.zeros(len(points), dtype=torch.bool)
    gap = (points[:, None, :] - others[None, :, :]).abs().amax(-1)
    return (gap < _SAME).any(-1)


def _around(space: Space, centre: Tensor, width: float | None, rng: torch.Generator) -> Tensor:
    """Points near a centre ``[256, parameter]``: some levels drawn anew, floats moved."""
    drawn = space.random_codes(256, rng=rng)
    if width is not None:
        keep = torch.rand(drawn.shape, generator=rng, dtype=torch.float64) > max(
            width, 1 / len(space)
        )
        move = width * torch.randn(drawn.shape, generator=rng, dtype=torch.float64)
        smooth = torch.tensor([not p.stepped for p in space.parameters.values()])
        low, high = space.code_bounds
        near = torch.minimum(torch.maximum(centre + move, low), high)
        drawn = torch.where(smooth, near, torch.where(keep, centre.expand_as(drawn), drawn))
    return space.codes(space.from_codes(drawn))


def _all_points(space: Space, most: int = 20_000) -> Tensor | None:
    """Codes of every point ``[point, parameter]``; None where there are too many."""
    counts = [p.levels for p in space.parameters.values()]
    if any(c is None for c in counts):
        return None
    total = 1
    for c in counts:
        total *= c or 1
    if total > most:
        return None
    columns = [
        torch.tensor([p.to_code(v) for v in _values(p)], dtype=torch.float64)
        for p in space.parameters.values()
    ]
    grid = torch.cartesian_prod(*columns).reshape(-1, len(columns))
    return space.canonical(grid).unique(dim=0)


def _values(parameter: Any) -> Sequence[Any]:
    if hasattr(parameter, "choices"):
        return list(parameter.choices)
    return range(parameter.low, parameter.high + 1)


# ---------------------------------------------------------------------- surrogate, acquisition


def fit_surrogate(
    seen: Observations,
    space: Space,
    settings: StudySettings,
    state: Any = None,
    *,
    outcomes: Outcomes,
    key: Sequence[int | str],
) -> Model:
    """Fit the surrogate of a study to its observations.

    Args:
        seen: The observations.
        space: The space of their codes.
        settings: Which surrogate, and its options.
        state: What the last one handed on; ignored where another surrogate wrote it.
        outcomes: What is measured.
        key: Names the random stream, below the seed.

    Raises:
        DataError: Fewer than two trials are complete.
    """
    from probkit.bo.surrogates.registry import make_surrogate

    if seen.complete < 2:
        raise DataError(
            f"a surrogate needs at least 2 complete trials, got {seen.complete}; tell more"
        )
    previous = _warm(state, settings)
    rng = stream(settings.seed, *key)
    if _is_function(settings.surrogate):
        make: Callable[..., Model] = settings.surrogate
        return make(
            seen.X, seen.Y, seen.Yvar, bounds=space.domain, previous=previous, rng=rng,
            **settings.options,
        )  # fmt: skip
    spec = settings.surrogate_for(space, outcomes)
    # A surrogate with an option for its noise has been told; variances of zero would overrule it.
    told = settings.noise == "none" and getattr(spec, "noise", None) in ("none", "learned")
    variances = None if told else seen.Yvar
    return make_surrogate(
        spec, seen.X, seen.Y, variances, bounds=space.domain, outcome=settings.outcome,
        previous=previous, rng=rng,
    )  # fmt: skip


def _warm(state: Any, settings: StudySettings) -> Any:
    """What the last surrogate handed on; None where another kind wrote it."""
    same = isinstance(state, Mapping) and state.get("surrogate") == _name(settings)
    return state["warm"] if same else None


def evidence_of(state: Any) -> Any:
    """The part of a state that is evidence rather than a starting point: what was said of points.

    Args:
        state: What the last surrogate handed on.
    """
    warm = state.get("warm") if isinstance(state, Mapping) else None
    if not isinstance(warm, Mapping) or "said" not in warm:
        return None
    return {**state, "warm": {"said": warm["said"]}}


def _name(settings: StudySettings) -> str:
    return json.dumps(_write_surrogate(settings.surrogate), sort_keys=True)


def _state_of(model: Model, settings: StudySettings) -> Any:
    from probkit.bo.surrogates.registry import warm_state

    warm = warm_state(model)
    return None if warm is None else {"surrogate": _name(settings), "warm": warm}


def _candidates(
    model: Model,
    space: Space,
    outcomes: Outcomes,
    seen: Observations,
    running: Tensor,
    n: int,
    settings: StudySettings,
    *,
    rng: torch.Generator,
) -> tuple[Tensor, list[str]]:
    """Points ``[n, parameter]`` where the acquisition function is largest, and their origins."""
    from probkit.bo.policy import Goal, acquisition_for, maximise

    seed = seed_of(rng)
    goal = Goal(range(len(outcomes.objectives)), outcomes.bounds)
    incumbents = _incumbents(seen, goal)
    avoid = torch.cat([seen.visited, running])

    def acquisition(of: Model, pending: Tensor, q: int, name: str) -> Any:
        return acquisition_for(
            of,
            goal,
            X=seen.X,
            Y=seen.Y,
            acquisition=name,
            X_pending=pending if len(pending) else None,
            q=q,
            bounds=space.domain,
            exact=settings.noise == "none",
            rng=seed,
        )

    def best(of: Model, **effort: int) -> Tensor:
        return maximise(
            chosen(of, running, n), space.domain, q=n, incumbents=incumbents, avoid=avoid,
            rng=seed, **effort,
        )  # fmt: skip

    def chosen(of: Model, pending: Tensor, q: int) -> Any:
        try:
            return acquisition(of, pending, q, settings.acquisition)
        except CapabilityError:
            if adviser is None or of is adviser.hybrid.base:
                raise
            return acquisition(of, pending, q, "auto")  # what fits a mixture

    adviser = getattr(model, "adviser", None)
    if adviser is None:
        return best(model), ["model"] * n
    points, origins = adviser.choose(
        n,
        maximise=best,
        value=lambda of, pending: chosen(of, torch.cat([running, pending]), 1),
        incumbents=incumbents,
        taken=avoid,
    )
    return points, origins


def _incumbents(seen: Observations, goal: Goal, most: int = 3) -> Tensor:
    """Points measured to be good ``[point, parameter]``, the best first; feasible ones first."""
    X, Y = seen.X[seen.told], seen.Y[seen.told]
    values, feasible = goal.values(Y), goal.feasible(Y)
    ranks = values.argsort(0).argsort(0).double().mean(1) + len(Y) * feasible.double()
    return X[ranks.argsort(descending=True)[:most]]

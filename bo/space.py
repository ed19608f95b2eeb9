"""Search spaces: named parameters, some of them active only for certain values of others.

Three forms of a point: *params*, a mapping of names to values; *codes* ``[parameter]``, what an
optimiser moves and a surrogate of a study sees, by way of a :class:`~probkit.bo.Domain`; and
*features* ``[column]`` in [0, 1] with one column for each choice, for models of your own. Codes and
features of a parameter that is not active are constant: points that differ only there are one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from probkit.bo.parameters import Categorical, Float, Int, Parameter
from probkit.errors import DataError, ShapeError
from probkit.rng import Rng, seed_of, stream

if TYPE_CHECKING:
    from probkit.bo.domain import Domain

__all__ = ["Space"]

Params = Mapping[str, Any]

#: More branches of conditions than this are refused.
_MOST_BRANCHES = 1000

_KINDS: dict[str, type] = {"float": Float, "int": Int, "categorical": Categorical}


class Space:
    """Named parameters in a fixed order.

    A parameter with ``when={"parent": value}`` (or several values in a list) exists only where its
    parent, a :class:`Categorical` or an :class:`Int`, takes one of these values; elsewhere its name
    is absent from the params.

    Args:
        parameters: A mapping of names to parameters, for names that are no identifiers.
        **named: The same, by keyword.

    Raises:
        DataError: No parameter, a condition on an unknown parent or impossible value, or a circle.

    Example:
        >>> space = Space(lr=Float(1e-5, 1, log=True), layers=Int(1, 3),
        ...               act=Categorical(["relu", "leaky"]),
        ...               slope=Float(0, 1, when={"act": "leaky"}))
        >>> space.dim, list(space.decode(torch.full((1, 5), 0.5))[0])
        (5, ['lr', 'layers', 'act'])
    """

    def __init__(
        self, parameters: Mapping[str, Parameter] | None = None, /, **named: Parameter
    ) -> None:
        together = {**(parameters or {}), **named}
        if not together:
            raise DataError("a space needs a parameter, for example Space(x=Float(0, 1))")
        for name, parameter in together.items():
            if not isinstance(name, str) or not name:
                raise DataError(f"expected names that are strings, got {name!r}")
            if not isinstance(parameter, Parameter):
                raise DataError(
                    f"parameter {name!r}: expected Float, Int or Categorical, got {parameter!r}"
                )
        self._parameters = together
        self._parents = {n: _parent(n, p, together) for n, p in together.items() if p.when}
        self._order = _parents_first(self._parents, together)
        start, slices = 0, {}
        for name, parameter in together.items():
            slices[name] = slice(start, start + parameter.columns)
            start += parameter.columns
        self._slices = slices
        self._dim = start

    # ------------------------------------------------------------------ what it is

    @property
    def parameters(self) -> Mapping[str, Parameter]:
        """The parameters by name, in order."""
        return dict(self._parameters)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters, in order."""
        return tuple(self._parameters)

    @property
    def dim(self) -> int:
        """Number of feature columns."""
        return self._dim

    @property
    def columns(self) -> Mapping[str, slice]:
        """Feature columns of each parameter."""
        return dict(self._slices)

    @property
    def categorical(self) -> tuple[slice, ...]:
        """Feature columns of each unordered categorical: blocks of indicators."""
        return tuple(
            self._slices[name]
            for name, p in self._parameters.items()
            if isinstance(p, Categorical) and not p.ordered
        )

    @property
    def integers(self) -> tuple[int, ...]:
        """Feature columns that take a few values in order: whole numbers, ordered choices."""
        return tuple(
            self._slices[name].start
            for name, p in self._parameters.items()
            if p.levels is not None and p.columns == 1
        )

    @property
    def continuous(self) -> bool:
        """Whether every parameter is a Float that is always active."""
        return all(p.levels is None and not p.when for p in self._parameters.values())

    @property
    def size(self) -> float:
        """Number of different points; infinite with a Float."""
        if any(p.levels is None for p in self._parameters.values()):
            return math.inf
        if not self._parents:
            return float(math.prod(p.levels or 1 for p in self._parameters.values()))
        return self._count()

    @property
    def bounds(self) -> Tensor:
        """Bounds of the features, ``[2, column]``: zeros and ones."""
        return torch.stack([torch.zeros(self.dim), torch.ones(self.dim)]).to(torch.float64)

    @property
    def code_bounds(self) -> Tensor:
        """Bounds of the codes, ``[2, parameter]``."""
        upper = torch.tensor([p.top for p in self._parameters.values()], dtype=torch.float64)
        return torch.stack([torch.zeros_like(upper), upper])

    @property
    def domain(self) -> Domain:
        """The codes' bounds, kinds and branches, as surrogates and acquisition functions take them.

        Raises:
            DataError: More than 1000 branches.
        """
        from probkit.bo.domain import Domain

        kinds = list(enumerate(self._parameters.values()))
        unordered = tuple(k for k, p in kinds if isinstance(p, Categorical) and not p.ordered)
        return Domain(
            self.code_bounds,
            categorical=unordered,
            integer=tuple(k for k, p in kinds if p.stepped and k not in unordered),
            branches=self._all_branches(),
        )

    def _all_branches(self) -> tuple[dict[int, float], ...]:
        """For each combination of parents' values: their codes, and those of what is inactive."""
        parents = {parent for parent, _ in self._parents.values()}
        if not parents:
            return ()
        column = {name: k for k, name in enumerate(self.names)}
        found: list[dict[str, float | None]] = [{}]  # None: active, and free
        for name in self._order:
            parameter = self._parameters[name]
            grown: list[dict[str, float | None]] = []
            for branch in found:
                if not self._active_in(name, branch):
                    grown.append({**branch, name: parameter.inactive_code})
                elif name in parents:
                    grown += [{**branch, name: float(k)} for k in range(_levels(parameter))]
                else:
                    grown.append({**branch, name: None})
            if len(grown) > _MOST_BRANCHES:
                raise DataError(
                    f"the conditions make more than {_MOST_BRANCHES} branches; let parents have "
                    "fewer values, or split the study"
                )
            found = grown
        return tuple(
            {column[name]: code for name, code in branch.items() if code is not None}
            for branch in found
        )

    def _active_in(self, name: str, branch: Mapping[str, float | None]) -> bool:
        if name not in self._parents:
            return True
        parent, codes = self._parents[name]
        return self._active_in(parent, branch) and branch[parent] in codes

    def _count(self) -> float:
        """Points of a discrete space with conditions: a sum over the values of the parents."""
        free = [n for n in self._order if n not in self._parents]
        return float(math.prod(self._branches(name) for name in free))

    def _branches(self, name: str) -> int:
        """Points of a parameter together with all that hang on it."""
        parameter = self._parameters[name]
        total = 0
        for code in range(_levels(parameter)):
            below = [
                child
                for child, (parent, codes) in self._parents.items()
                if parent == name and code in codes
            ]
            total += math.prod(self._branches(child) for child in below)
        return total

    # ------------------------------------------------------------------ params

    def check(self, params: Params) -> dict[str, Any]:
        """Return params in plain form and in order.

        Raises:
            DataError: A name is missing, unknown or not active, or a value is out of its bounds.
        """
        if not isinstance(params, Mapping):
            raise DataError(f"expected params as a mapping of names to values, got {params!r}")
        unknown = [str(name) for name in params if name not in self._parameters]
        if unknown:
            raise DataError(
                f"unknown parameters: {', '.join(unknown)}; the space has {', '.join(self.names)}"
            )
        found: dict[str, Any] = {}
        for name in self._order:
            active = self._is_active(name, found)
            if active and name not in params:
                raise DataError(f"parameter {name!r} is missing")
            if not active and name in params:
                parent = self._parents[name][0]
                raise DataError(
                    f"parameter {name!r} is not active for {parent}={params.get(parent)!r}; "
                    "leave it out"
                )
            if active:
                try:
                    found[name] = self._parameters[name].check(params[name])
                except DataError as error:
                    raise DataError(f"parameter {name!r}: {error}") from None
        return {name: found[name] for name in self.names if name in found}

    def _is_active(self, name: str, found: Params) -> bool:
        if name not in self._parents:
            return True
        parent, codes = self._parents[name]
        return parent in found and self._parameters[parent].to_code(found[parent]) in codes

    def encode(self, params: Params | Iterable[Params]) -> Tensor:
        """Map params to features.

        Args:
            params: One mapping, or several.

        Returns:
            ``[point, column]``, float64.

        Raises:
            DataError: Params that :meth:`check` refuses.
        """
        return self.features(self.codes(params))

    def decode(self, features: Tensor) -> list[dict[str, Any]]:
        """Map features to the nearest params.

        Args:
            features: ``[point, column]``.

        Raises:
            ShapeError: Another number of columns.
        """
        if features.ndim != 2 or features.shape[-1] != self.dim:
            raise ShapeError(
                f"expected features [point, {self.dim} columns], got {tuple(features.shape)}"
            )
        codes = [
            [p.code_of_features(row[self._slices[n]]) for n, p in self._parameters.items()]
            for row in features.detach().cpu()
        ]
        return self.from_codes(torch.tensor(codes, dtype=torch.float64).reshape(len(codes), -1))

    # ------------------------------------------------------------------ codes

    def codes(self, params: Params | Iterable[Params]) -> Tensor:
        """Map params to codes ``[point, parameter]``; constants stand for what is not active."""
        points = [params] if isinstance(params, Mapping) else list(params)
        rows = []
        for point in points:
            known = self.check(point)
            rows.append(
                [
                    p.to_code(known[name]) if name in known else p.inactive_code
                    for name, p in self._parameters.items()
                ]
            )
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(self.names))

    def from_codes(self, codes: Tensor) -> list[dict[str, Any]]:
        """Map codes ``[point, parameter]`` to the nearest params."""
        if codes.ndim != 2 or codes.shape[-1] != len(self.names):
            raise ShapeError(
                f"expected codes [point, {len(self.names)} parameters], got {tuple(codes.shape)}"
            )
        points = []
        for row in codes.detach().cpu().tolist():
            code = dict(zip(self.names, row, strict=True))
            found: dict[str, Any] = {}
            for name in self._order:
                if self._is_active(name, found):
                    found[name] = self._parameters[name].from_code(code[name])
            points.append({name: found[name] for name in self.names if name in found})
        return points

    def canonical(self, codes: Tensor) -> Tensor:
        """Set the codes ``[..., parameter]`` of what is not active to their constants.

        Levels are rounded; positions between bounds stay as they are.
        """
        code = dict(zip(self.names, codes.unbind(-1), strict=True))
        active = self._activity(code)
        parts = []
        for name, parameter in self._parameters.items():
            column = code[name].round() if parameter.stepped else code[name]
            if name in active:
                rest = torch.full_like(column, parameter.inactive_code)
                column = torch.where(active[name], column, rest)
            parts.append(column)
        return torch.stack(parts, -1)

    def _activity(self, code: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whether each parameter with a condition is active, ``[...]``."""
        active: dict[str, Tensor] = {}
        for name in self._order:
            if name not in self._parents:
                continue
            parent, allowed = self._parents[name]
            levels = torch.tensor(sorted(allowed)).to(code[parent])
            here = (code[parent].round()[..., None] == levels).any(-1)
            active[name] = here & active[parent] if parent in active else here
        return active

    def features(self, codes: Tensor) -> Tensor:
        """Map codes ``[..., parameter]`` to features ``[..., column]``.

        Gradients pass through floats that are active.
        """
        code = dict(zip(self.names, codes.unbind(-1), strict=True))
        active = self._activity(code)
        parts = []
        for name, parameter in self._parameters.items():
            columns = parameter.features(code[name])
            if name in active:
                rest = torch.full_like(columns, parameter.inactive)
                columns = torch.where(active[name][..., None], columns, rest)
            parts.append(columns)
        return torch.cat(parts, -1)

    def sobol(self, n: int, *, rng: Rng, start: int = 0) -> list[dict[str, Any]]:
        """Return points of a scrambled Sobol sequence, evenly over values.

        Args:
            n: Number of points.
            rng: Seed of the scrambling; the same seed gives the same sequence.
            start: Index of the first point.
        """
        return self.from_codes(self._spread(self._sobol_unit(n, rng, start)))

    def _sobol_unit(self, n: int, rng: Rng, start: int) -> Tensor:
        if len(self.names) > SobolEngine.MAXDIM:  # beyond the direction numbers: plain uniforms
            seed = seed_of(rng)
            rows = [
                torch.rand(
                    len(self.names), generator=stream(seed, "uniform", k), dtype=torch.float64
                )
                for k in range(start, start + n)
            ]
            return torch.stack(rows)
        engine = SobolEngine(len(self.names), scramble=True, seed=seed_of(rng) % 2**31)
        if start:
            engine.fast_forward(start)
        return engine.draw(n, dtype=torch.float64)

    def random_codes(self, n: int, *, rng: torch.Generator) -> Tensor:
        """Return codes ``[n, parameter]`` of points drawn evenly over values."""
        unit = torch.rand(n, len(self.names), generator=rng, dtype=torch.float64)
        return self._spread(unit)

    def _spread(self, unit: Tensor) -> Tensor:
        """Map the unit cube onto codes, every level with the same measure."""
        columns = [
            _level(p, u) if p.stepped else u
            for u, p in zip(unit.unbind(-1), self._parameters.values(), strict=True)
        ]
        return torch.stack(columns, -1)

    # ------------------------------------------------------------------ files

    def to_json(self) -> list[dict[str, Any]]:
        """Return the space as JSON values."""
        rows = []
        for name, parameter in self._parameters.items():
            row = {"name": name, **parameter.to_json()}
            if name in self._parents:
                parent, codes = self._parents[name]
                values = [self._parameters[parent].from_code(c) for c in sorted(codes)]
                row["when"] = {"parent": parent, "values": values}
            rows.append(row)
        return rows

    @classmethod
    def from_json(cls, rows: Sequence[Mapping[str, Any]]) -> Space:
        """Rebuild a space from what :meth:`to_json` returned."""
        made = {}
        for row in rows:
            options = {k: v for k, v in row.items() if k not in ("name", "kind", "when")}
            if row.get("when"):
                options["when"] = {row["when"]["parent"]: row["when"]["values"]}
            if row["kind"] not in _KINDS:
                raise DataError(f"unknown kind of parameter in the file: {row['kind']!r}")
            made[row["name"]] = _KINDS[row["kind"]](**options)
        return cls(made)

    def __eq__(self, other: object) -> bool:
        """Whether the other space has the same parameters in the same order."""
        return isinstance(other, Space) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        """Hash of the names."""
        return hash(self.names)

    def __len__(self) -> int:
        """Number of parameters."""
        return len(self._parameters)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._parameters)

    def __repr__(self) -> str:
        """The parameters, as one would write them."""
        inside = ", ".join(f"{name}={parameter}" for name, parameter in self._parameters.items())
        return f"Space({inside})"


def _levels(parameter: Parameter) -> int:
    """Number of values of a parameter that has levels."""
    return int(parameter.top) + 1


def _level(parameter: Parameter, unit: Tensor) -> Tensor:
    """Codes of a parameter with levels, in equal shares."""
    return (unit * _levels(parameter)).floor().clamp(0, parameter.top)


def _parent(
    name: str, parameter: Parameter, space: Mapping[str, Parameter]
) -> tuple[str, frozenset[float]]:
    """Read a condition: the parent's name and the codes of the values that activate."""
    if len(parameter.when) != 1:
        raise DataError(f"parameter {name!r}: expected one parent in when=, got {parameter.when!r}")
    parent, values = next(iter(parameter.when.items()))
    if parent not in space or parent == name:
        raise DataError(f"parameter {name!r}: its parent {parent!r} is not in the space")
    if not space[parent].stepped:
        raise DataError(
            f"parameter {name!r}: its parent {parent!r} must be a Categorical, or an Int that is "
            "not on a log scale"
        )
    several = values if isinstance(values, list | tuple | set | frozenset) else [values]
    if not several:
        raise DataError(f"parameter {name!r}: when= names no value of {parent!r}")
    try:
        checked = [space[parent].check(value) for value in several]
    except DataError as error:
        raise DataError(f"parameter {name!r}, when {parent!r}: {error}") from None
    return parent, frozenset(space[parent].to_code(value) for value in checked)


def _parents_first(
    parents: Mapping[str, tuple[str, frozenset[float]]], space: Mapping[str, Parameter]
) -> tuple[str, ...]:
    """Order names so that each comes after its parent."""
    order: list[str] = []
    for name in space:
        chain = [name]
        while chain[-1] in parents:
            above = parents[chain[-1]][0]
            if above in chain:
                raise DataError(f"conditions form a circle: {' -> '.join([*chain, above])}")
            chain.append(above)
        order += [n for n in reversed(chain) if n not in order]
    return tuple(order)

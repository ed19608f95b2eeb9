"""What sparse linear models share: data, sites, densities, posterior and predictions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from probkit.data import as_tensor
from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.model import Model, Site, Values
from probkit.models.sbl.evidence_maximization import EvidenceMaximization
from probkit.models.sbl.laws import WeightLaw, complex_number, elementwise_law, weight_law
from probkit.models.sbl.mode_products import mode_products, outer
from probkit.models.sbl.moments import abs_square
from probkit.models.sbl.noise import noise_floor
from probkit.models.sbl.predicting import predictive_of
from probkit.models.sbl.problem import SparseProblem, moments_of
from probkit.models.scale_laws import as_scale_law
from probkit.numerics import check_finite
from probkit.posterior import Context, Evidence, Posterior
from probkit.predictive import Predictive
from probkit.rng import Rng, scope, stream
from probkit.sampler import Sampler
from probkit.sources import Closed

__all__ = ["SparseModel", "checked_matrix"]


class SparseModel(Model):
    """Base of :class:`SparseRegression` and :class:`KroneckerSBL`; not used on its own.

    y = (H_1 kron ... kron H_I) x + n, x_j ~ (C)N(0, g_j), g = g_1 kron ... kron g_I.
    """

    batched: ClassVar[bool] = True

    # Subclasses are dataclasses with these fields.
    noise_var: Any
    update: str
    shared_support: bool
    noise_floor: Any
    variance_law: Distribution
    noise_law: Distribution

    # ------------------------------------------------------------------------ options

    @property
    def dictionaries(self) -> tuple[Tensor, ...]:
        """H_1, ..., H_I."""
        raise CapabilityError(f"{type(self).__name__} gives no dictionaries")

    def _check_options(self, updates: Sequence[str]) -> None:
        name = type(self).__name__
        if self.update not in updates:
            raise DataError(f"update: expected one of {', '.join(updates)}, got {self.update!r}")
        if self.noise_var is not None:
            value = as_tensor(self.noise_var, name="noise_var")
            if not bool(((value > 0) & torch.isfinite(value)).all()):
                raise DataError(
                    f"noise_var: expected finite numbers > 0, or None to learn it, got "
                    f"{self.noise_var!r}"
                )
        floor = self.noise_floor
        if not isinstance(floor, Real) or not 0 < float(floor) < 1:
            raise DataError(f"noise_floor: expected a share of mean |y|^2 in (0, 1), got {floor!r}")
        for law in ("variance_law", "noise_law"):
            object.__setattr__(self, law, as_scale_law(getattr(self, law)))
        if not isinstance(self.shared_support, bool):
            raise DataError(f"{name}: expected shared_support True or False")

    @property
    def _is_complex(self) -> bool:
        return any(matrix.is_complex() for matrix in self.dictionaries)

    @property
    def sizes(self) -> tuple[int, ...]:
        """N_1, ..., N_I."""
        return tuple(int(matrix.shape[-1]) for matrix in self.dictionaries)

    @property
    def data_sizes(self) -> tuple[int, ...]:
        """M_1, ..., M_I."""
        return tuple(int(matrix.shape[-2]) for matrix in self.dictionaries)

    def sampler(self) -> Sampler:
        """Maximise the evidence."""
        return EvidenceMaximization()

    # ------------------------------------------------------------------------ data

    def prepare(self, data: Any) -> Any:
        """Check y and bring it to [*problem, M_1, ..., M_I] (and [snapshot] at the end).

        A pair (y, observed), with a boolean mask of y's shape (without snapshots), becomes a pair;
        values that are not observed are ignored, NaN included.

        Raises:
            DataError: A value that is not finite, all zeros, or no problem at all.
            ShapeError: A size that does not match the dictionary.
            CapabilityError: A mask for a plain problem: leave its rows out instead.
        """
        if not isinstance(data, tuple):
            return self._checked(as_tensor(data, name="y"))
        if len(data) != 2:
            raise DataError(f"expected y, or a pair (y, observed), got {len(data)} parts")
        if len(self.sizes) == 1:
            raise CapabilityError(
                f"{type(self).__name__} takes no mask: leave the rows that were not seen out of H "
                "and y"
            )
        y, mask = as_tensor(data[0], name="y"), as_tensor(data[1], name="observed")
        if mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all()):
            raise DataError("observed: expected True where y was seen and False elsewhere")
        shown = mask.unsqueeze(-1) if self.shared_support else mask
        if tuple(mask.shape) != tuple(y.shape[: mask.ndim]) or shown.ndim != y.ndim:
            raise ShapeError(
                f"observed: expected the shape of y without snapshots, got {tuple(mask.shape)} for "
                f"y {tuple(y.shape)}"
            )
        y = self._checked(torch.where(shown.to(y.device) > 0, y, 0.0))
        measured = y.shape[: y.ndim - 1] if self.shared_support else y.shape
        return y, mask.to(y.device).double().expand(mask.shape).reshape(measured).contiguous()

    def _checked(self, y: Tensor) -> Tensor:
        if y.dtype in (torch.float16, torch.bfloat16):
            raise DataError(f"y: expected float64 or float32, got {y.dtype}")
        is_complex = y.is_complex() or self._is_complex
        y = y.to(torch.complex128 if is_complex else torch.float64)
        y = self._shaped(y)
        check_finite(y, "y", self._data_dim_names(y.ndim))
        if y.numel() == 0:
            raise DataError(f"y: expected at least one value, got shape {tuple(y.shape)}")
        modes = len(self.sizes) + self.shared_support
        if bool((abs_square(y).sum(tuple(range(-modes, 0))) == 0).any()):
            raise DataError("y: all zero in a problem, which leaves nothing to explain")
        return y.contiguous()

    def _shaped(self, y: Tensor) -> Tensor:
        """Read y in either form: modes apart, or one dim of M = prod M_i."""
        sizes, extra = self.data_sizes, int(self.shared_support)
        tail = y.shape[y.ndim - extra :]
        body = y.shape[: y.ndim - extra]
        total = math.prod(sizes)
        if len(body) >= len(sizes) and tuple(body[len(body) - len(sizes) :]) == sizes:
            shaped = y
        elif len(body) >= 1 and body[-1] == total:
            shaped = y.reshape(*body[:-1], *sizes, *tail)
        else:
            snapshot = ", snapshot" if extra else ""
            modes = " x ".join(map(str, sizes))
            raise ShapeError(
                f"y: expected [*problem, M{snapshot}] with M = {modes}"
                + (f" = {total}" if len(sizes) > 1 else "")
                + f" as the dictionary has rows, got {tuple(y.shape)}"
            )
        lead = self._lead(shaped)
        for matrix in self.dictionaries:
            batch = matrix.shape[:-2]
            if batch and torch.broadcast_shapes(batch, lead) != lead:
                raise ShapeError(
                    f"y: expected problems {tuple(batch)} as the dictionary has, got {tuple(lead)}"
                )
        return shaped

    def _lead(self, y: Tensor) -> torch.Size:
        return y.shape[: y.ndim - len(self.sizes) - int(self.shared_support)]

    def _mode_names(self, stem: str) -> tuple[str, ...]:
        if len(self.sizes) == 1:
            return (stem,)
        return tuple(f"{stem}_{i + 1}" for i in range(len(self.sizes)))

    def _data_dim_names(self, ndim: int) -> tuple[str, ...]:
        tail = (*self._mode_names("measurement"), *(("snapshot",) * self.shared_support))
        return tuple(f"problem_{i}" for i in range(ndim - len(tail))) + tail

    def data_dims(self, data: Any) -> Any:
        """Problems, measurements and snapshots."""
        y, observed = _parts(data)
        names = self._data_dim_names(y.ndim)
        if observed is None:
            return names
        return names, self._data_dim_names(y.ndim)[: observed.ndim]

    def problem_shape(self, data: Any) -> torch.Size:
        """Leading dims [*problem] of prepared data."""
        return self._lead(_parts(data)[0])

    def _internal(self, data: Tensor) -> Tensor:
        """[*problem, M..., snapshot?] -> [*problem, snapshot, M...]."""
        modes = len(self.sizes)
        return data.movedim(-1, -modes - 1) if self.shared_support else data.unsqueeze(-modes - 1)

    def _factors(self, data: Tensor) -> list[Tensor]:
        return [matrix.to(data) for matrix in self.dictionaries]

    def sparse_problem(self, data: Any) -> SparseProblem:
        """Data and dictionary with all problems along one dim."""
        data, observed = _parts(data)
        lead = self._lead(data)
        y = self._internal(data)
        y = y.reshape(lead.numel(), *y.shape[len(lead) :])
        factors = []
        for matrix in self._factors(data):
            if matrix.ndim > 2:
                matrix = matrix.expand(*lead, *matrix.shape[-2:]).flatten(0, len(lead) - 1)
            factors.append(matrix)
        return SparseProblem(
            factors=factors,
            y=y,
            noise_var=None if self.noise_var is None else self._known_noise(data).reshape(-1),
            floor=noise_floor(y, len(factors), float(self.noise_floor)),
            update=self.update,
            coupling=tuple(getattr(self, "coupling", None) or ()),
            observed=None if observed is None else observed.reshape(-1, *self.data_sizes),
        )

    def _known_noise(self, data: Tensor) -> Tensor:
        value = as_tensor(self.noise_var, name="noise_var")
        lead = self._lead(data)
        value = value.to(device=data.device, dtype=torch.float64)
        try:
            return value.expand(lead)
        except RuntimeError:
            raise ShapeError(
                f"noise_var: expected a number or one for each problem {tuple(lead)}, got "
                f"{tuple(value.shape)}"
            ) from None

    # ------------------------------------------------------------------------ sites

    def _weight_site(self, data: Tensor) -> Site:
        lead = self._lead(data)
        snapshots = (int(data.shape[-1]),) if self.shared_support else ()
        dims = tuple(f"problem_{i}" for i in range(len(lead))) + self._mode_names("weight")
        support = complex_number if data.is_complex() else constraints.real
        return Site(
            (*lead, *self.sizes, *snapshots), support, (*dims, *(("snapshot",) * len(snapshots)))
        )

    def hyper_sites(self, data: Any) -> Mapping[str, Site]:
        """Return the prior variances, and the noise variance where it is learned."""
        lead = self.problem_shape(data)
        dims = tuple(f"problem_{i}" for i in range(len(lead)))
        names = zip(self._mode_names("weight_var"), self._mode_names("weight"), strict=True)
        sites = {
            name: Site((*lead, size), constraints.nonnegative, (*dims, dim))
            for (name, dim), size in zip(names, self.sizes, strict=True)
        }
        if self.noise_var is None:
            sites["noise_var"] = Site(tuple(lead), constraints.positive, dims)
        return sites

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return the weights and the hyper-parameters."""
        return {"weights": self._weight_site(_parts(data)[0]), **self.hyper_sites(data)}

    def hyper_of(self, variances: Sequence[Tensor], noise: Tensor, data: Any) -> Values:
        """Name variances [..., problem, N_i] and noise [..., problem]; problems get their dims."""
        lead = self.problem_shape(data)
        values = {
            name: part.reshape(*part.shape[:-2], *lead, part.shape[-1])
            for name, part in zip(self._mode_names("weight_var"), variances, strict=True)
        }
        if self.noise_var is None:
            values["noise_var"] = noise.reshape(*noise.shape[:-1], *lead)
        return values

    def _split(self, hyper: Values, data: Tensor) -> tuple[list[Tensor], Tensor]:
        """Variances [*batch, *problem, N_i] and noise [*batch, *problem]."""
        variances = [hyper[name].to(data.device) for name in self._mode_names("weight_var")]
        if self.noise_var is None:
            return variances, hyper["noise_var"].to(data.device)
        noise = self._known_noise(data)
        return variances, noise.expand(torch.broadcast_shapes(noise.shape, variances[0].shape[:-1]))

    # ------------------------------------------------------------------------ densities

    def log_hyperprior(self, hyper: Values) -> Tensor:
        """Return log p(variances, noise) [*batch] of ONE problem: independent draws of the laws."""
        return self._log_hyperprior(hyper, 0)

    def _log_hyperprior(self, hyper: Values, problem_dims: int) -> Tensor:
        terms = [
            _summed(self.variance_law.log_prob(hyper[name]), problem_dims + 1)
            for name in self._mode_names("weight_var")
        ]
        if self.noise_var is None:
            terms.append(_summed(self.noise_law.log_prob(hyper["noise_var"]), problem_dims))
        return torch.stack(torch.broadcast_tensors(*terms)).sum(0)

    def log_evidence(self, hyper: Values, data: Any) -> Tensor:
        """Return log p(y | variances, noise) [*batch], the weights summed out; differentiable.

        Raises:
            CapabilityError: ``data`` holds several problems.
        """
        y, observed = _parts(data)
        if self._lead(y) or observed is not None:
            raise CapabilityError(
                "the full posterior of the variances takes one problem without missing entries; "
                f"got {tuple(self._lead(y))} problems"
                + (" and a mask" if observed is not None else "")
            )
        variances, noise = self._split(hyper, y)
        return self._log_evidence(variances, noise, y)

    def _log_evidence(self, variances: list[Tensor], noise: Tensor, data: Tensor) -> Tensor:
        return moments_of(self._factors(data), variances, noise, self._internal(data)).log_evidence

    def log_likelihood(self, values: Values, data: Any) -> Tensor:
        """Return log p(y | weights, noise) [*batch]."""
        return _summed(self.pointwise_log_likelihood(values, data)["y"], _parts(data)[0].ndim)

    def pointwise_log_likelihood(self, values: Values, data: Any) -> Mapping[str, Tensor]:
        """Return {"y": log density of every measurement} [*batch, *y]; zero where not observed.

        Empty for values without weights (the variances of a fit, which the weights were summed
        out for).
        """
        if "weights" not in values:
            return {}
        y, observed = _parts(data)
        noise = self._noise_of(values, y)
        law = elementwise_law(
            self._field(values["weights"], self._factors(y)),
            noise.reshape(noise.shape + (1,) * (y.ndim - len(self._lead(y)))),
        )
        density = law.log_prob(y)
        if observed is not None:
            density = density * (observed.unsqueeze(-1) if self.shared_support else observed)
        return {"y": density}

    def _noise_of(self, values: Values, data: Tensor) -> Tensor:
        if self.noise_var is None:
            return values["noise_var"]
        return self._known_noise(data)

    def _field(self, weights: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """H x for weights [*batch, *problem, N..., snapshot?]."""
        weights = weights.to(torch.promote_types(weights.dtype, factors[0].dtype))
        if not self.shared_support:
            return mode_products(weights, [f.to(weights) for f in factors])
        moved = weights.movedim(-1, -len(factors) - 1)
        field = mode_products(moved, [f.to(weights).unsqueeze(-3) for f in factors])
        return field.movedim(-len(factors) - 1, -1)

    def log_joint(self, values: Values, data: Any, *, scale: float = 1.0) -> Tensor:
        """Return log p(y, weights, variances, noise) [*batch]."""
        y = _parts(data)[0]
        lead = len(self._lead(y))
        prior = outer([values[name] for name in self._mode_names("weight_var")])
        if self.shared_support:
            prior = prior.unsqueeze(-1)
        weights = values["weights"]
        law = elementwise_law(torch.zeros_like(weights), prior)
        total = _summed(law.log_prob(weights), y.ndim) + self._log_hyperprior(values, lead)
        return total + scale * self.log_likelihood(values, data)

    # ------------------------------------------------------------------------ simulation

    def sample_prior(self, n: int, *, rng: Rng) -> Values:
        """Draw ``n`` values of one problem (one snapshot where the support is shared)."""
        values: dict[str, Tensor] = {}
        with scope(rng=stream(rng, "prior")):
            for name, size in zip(self._mode_names("weight_var"), self.sizes, strict=True):
                values[name] = self.variance_law.sample(torch.Size([n, size]))
            if self.noise_var is None:
                values["noise_var"] = self.noise_law.sample(torch.Size([n]))
            prior = outer([values[name] for name in self._mode_names("weight_var")])
            if self.shared_support:
                prior = prior.unsqueeze(-1)
            dtype = torch.complex128 if self._is_complex else torch.float64
            noise = torch.randn(prior.shape, dtype=dtype)
        return {"weights": prior.sqrt() * noise, **values}

    def simulate(self, values: Values, x: Any = None, *, rng: Rng) -> Tensor:
        """Draw y for each leading element of ``values``.

        Args:
            values: Weights [*batch, N_1, ..., N_I], and the noise variance where it is learned.
            x: Another dictionary with as many columns: a matrix, or a list of factors; None for
                the model's own.
            rng: Seed or generator.
        """
        weights = values["weights"]
        factors = self.new_factors(x, weights)
        field = self._field(weights, factors)
        generator = stream(rng, "simulate", device=field.device)
        white = torch.randn(
            field.shape, generator=generator, dtype=field.dtype, device=field.device
        )
        if self.noise_var is None:
            noise = values["noise_var"]
        else:
            noise = as_tensor(self.noise_var, name="noise_var").to(weights.device).double()
        return field + noise.sqrt().reshape(noise.shape + (1,) * (field.ndim - noise.ndim)) * white

    def sample_dataset(self, n: int, *, rng: Rng) -> tuple[Values, Tensor]:
        """Draw ``n`` pairs of values and data."""
        values = self.sample_prior(n, rng=stream(rng, "values"))
        return values, self.simulate(values, None, rng=stream(rng, "data"))

    # ------------------------------------------------------------------------ posterior

    def condition(self, data: Any, hyper: Values | None) -> Posterior:
        """Return the exact posterior of the weights given prior variances and noise.

        Args:
            data: Prepared data.
            hyper: ``weight_var`` (``weight_var_1``, ... with several modes) and ``noise_var`` where
                it is learned; leading dims [*batch] carry through.

        Raises:
            CapabilityError: ``hyper`` is None: there are no variances to condition on.
        """
        if hyper is None:
            raise CapabilityError(
                f"{type(self).__name__} holds no prior variances: infer(model, y, rng=0) fits "
                "them; else use Direct(hyper=NUTS()), or Direct(hyper={'weight_var': ...})"
            )
        y, observed = _parts(data)
        variances, noise = self._split(hyper, y)
        with torch.no_grad():
            law = weight_law(
                self._factors(y), variances, noise, self._internal(y), observed, self.shared_support
            )
        batch = law.batch_shape
        evidence = law.log_evidence.reshape(*batch, -1).sum(-1)
        dims = {name: tuple(site.dims) for name, site in self.sites(data).items()}
        single = {name: value[None, None] for name, value in hyper.items()}
        given = dict(hyper) if batch else single
        return Posterior(
            source=Closed(joint={"weights": law}, hyper=given),
            model=self,
            context=Context(data, {}, dims),
            marginals={} if batch.numel() > 1 else {"weights": law.marginal()},
            log_evidence=Evidence(
                evidence.reshape(-1), "exact" if observed is None else "estimate"
            ),
        )

    def latents(self, values: Values, data: Any) -> Mapping[str, Distribution]:
        """Return the marginals of the weights given variances and noise."""
        law = self.condition(data, {k: v for k, v in values.items() if k != "weights"})
        source = law.source
        assert isinstance(source, Closed)
        joint = source.joint["weights"]
        assert isinstance(joint, WeightLaw)
        return {"weights": joint.marginal()}

    # ------------------------------------------------------------------------ predictions

    def new_factors(self, x: Any, like: Tensor) -> list[Tensor]:
        """Read a new dictionary: None, a matrix [row, N], or a list of factors [row_i, N_i].

        Raises:
            ShapeError: Columns that do not match the dictionary.
            DataError: Values that are not finite.
        """
        if x is None:
            return [matrix.to(like.device) for matrix in self.dictionaries]
        given = list(x) if isinstance(x, list | tuple) else [x]
        matrices = [
            checked_matrix(m, f"x[{i}]" if len(given) > 1 else "x", warn=False)
            for i, m in enumerate(given)
        ]
        found = tuple(int(m.shape[-1]) for m in matrices)
        total = math.prod(self.sizes)
        if found not in (self.sizes, (total,)):
            factors = f" or factors with {self.sizes} columns" if len(self.sizes) > 1 else ""
            raise ShapeError(
                f"x: expected [row, {total}]{factors} as the dictionary has columns, got "
                f"{[tuple(m.shape) for m in matrices]}"
            )
        return [matrix.to(like.device) for matrix in matrices]

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
        """Predict H_new x (+ noise) at a new dictionary.

        Args:
            post: A posterior of this model.
            x: H_new [row, N], or a list of factors [row_i, N_i]; None for the model's own.
            site: None for new measurements, noise included; "f" for H_new x.
            joint: Keep the dependence between rows (real data, one problem).
            groups: Not used by this model.
            rng: Not needed.

        Returns:
            Normal (real data) or circular complex normal laws of shape [*problem, row], or
            [*problem, row_1, ..., row_I] for factors, with [snapshot] at the end where the support
            is shared; a mixture where the posterior holds several draws of the variances.
        """
        if groups is not None:
            raise CapabilityError(f"{type(self).__name__} has no plates; leave groups= out")
        if site not in (None, "f"):
            raise DataError(f"site: expected None (new measurements) or 'f', got {site!r}")
        source = post.source
        law = source.joint.get("weights") if isinstance(source, Closed) else None
        if not isinstance(source, Closed) or not isinstance(law, WeightLaw):
            raise CapabilityError(
                f"predict needs the closed-form posterior of infer(model, y, rng=0); "
                f"{type(post.source).__name__} holds none"
            )
        new = self.new_factors(x, law.y)
        return predictive_of(
            law, new, observation=site is None, joint=joint, log_weights=source.log_weights
        )


def _parts(data: Any) -> tuple[Tensor, Tensor | None]:
    """Prepared data as y and the mask of what was observed (None: everything)."""
    return data if isinstance(data, tuple) else (data, None)


def _summed(value: Tensor, dims: int) -> Tensor:
    """Sum over the last ``dims`` dims."""
    return value.sum(tuple(range(-dims, 0))) if dims else value


def checked_matrix(value: Any, name: str, *, warn: bool = True) -> Tensor:
    """Read a dictionary [*problem, row, column] in double precision.

    Raises:
        ShapeError: Not a matrix, or an empty one.
        DataError: Values that are not finite.

    Warns:
        NumericsWarning: A column is zero; its weight cannot be learned and stays zero.
    """
    matrix = as_tensor(value, name=name)
    if matrix.dtype in (torch.float16, torch.bfloat16):
        raise DataError(f"{name}: expected float64 or float32, got {matrix.dtype}")
    if matrix.ndim < 2 or matrix.numel() == 0:
        raise ShapeError(f"{name}: expected a matrix [row, column], got {tuple(matrix.shape)}")
    matrix = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64).contiguous()
    check_finite(matrix, name, ("row", "column"))
    if warn:
        zero = (matrix.abs().amax(-2) == 0).reshape(-1, matrix.shape[-1]).any(0)
        if bool(zero.any()):
            places = ", ".join(map(str, zero.nonzero().flatten().tolist()[:5]))
            warnings.warn(
                f"{name}: column {places} is zero; its weight stays zero",
                NumericsWarning,
                stacklevel=4,
            )
    return matrix

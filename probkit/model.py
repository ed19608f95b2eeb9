"""What a model states about itself: its sites, and its capabilities.

A model is any object with ``sites``; everything else is a *capability*, a protocol of one to three
methods. A sampler names the methods it needs, and :func:`probkit.infer` checks that the model has
them before any work is done. Subclassing :class:`Model` brings the defaults; it is not required.

Data is always an argument, never part of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from probkit.errors import CapabilityError, DataError
from probkit.rng import Rng

if TYPE_CHECKING:
    from probkit.guide import Guide
    from probkit.posterior import Posterior
    from probkit.predictive import Predictive
    from probkit.sampler import Sampler

__all__ = [
    "Batch",
    "Conditionable",
    "Generative",
    "HasEM",
    "HasEvidence",
    "HasFactors",
    "HasLatents",
    "HasLogJoint",
    "HasMinibatches",
    "HasPointwise",
    "Model",
    "Sequential",
    "Site",
    "Updatable",
    "Values",
    "lacks",
    "prepare",
]

Values = Mapping[str, Tensor]
D = TypeVar("D")
D_contra = TypeVar("D_contra", contravariant=True)


@dataclass(frozen=True)
class Site:
    """One latent variable.

    Attributes:
        shape: Shape of one value, without chains and draws.
        support: Constraint that every value satisfies.
        dims: A name for each dimension of ``shape``.
        plate: Name of the minibatched plate that the site is local to; None for a global site.
            The plate is the leading dimension of a local site.
        discrete: Whether the support is countable.
    """

    shape: tuple[int, ...]
    support: Constraint
    dims: tuple[str, ...] = ()
    plate: str | None = None
    discrete: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if len(self.dims) != len(self.shape):
            raise DataError(
                f"Site: expected one dim name for each dimension of shape {self.shape}, "
                f"got dims={self.dims}"
            )


@dataclass(frozen=True)
class Batch:
    """Part of the data, or all of it, as guides and variational bounds see it.

    Attributes:
        data: The batch itself; local sites are already batch-sized.
        index: [unit] numbers of the units in the batch; None when the data is whole.
        scale: Number of units over batch size: the weight of local terms in an unbiased bound.
    """

    data: Any
    index: Tensor | None = None
    scale: float = 1.0


class Model(Protocol):
    """The mandatory part of a model, with defaults for everything but ``sites``.

    Attributes:
        coords: Names of the entries along dims, for export and for matching groups.
    """

    @property
    def coords(self) -> Mapping[str, Sequence[Any]]:
        """Labels along named dims; empty where positions suffice."""
        return {}

    def sites(self, data: Any) -> Mapping[str, Site]:
        """Return the latent sites by name; may be empty."""
        ...

    def data_dims(self, data: Any) -> Any:
        """Name the dims of each data leaf (same nesting, tuples of names); None for unnamed.

        Labels that pandas objects carry along these dims become coords.
        """
        return None

    def prepare(self, data: Any) -> Any:
        """Check ``data`` and bring it to the form that the other methods expect."""
        return data

    def sampler(self) -> Sampler:
        """Return the sampler that ``infer`` uses when none is given."""
        from probkit.sampler import default_sampler

        return default_sampler(self)

    def guide(self) -> Guide | None:
        """Return the guide that samplers use when none is given."""
        return None

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
        """Predict at ``x`` by simulating every draw of ``post``; see :meth:`Posterior.predict`."""
        from probkit.predictive import predict_by_simulation

        return predict_by_simulation(self, post, x, site=site, groups=groups, rng=rng)


@runtime_checkable
class HasLogJoint(Protocol[D_contra]):
    """A log joint density of all sites and the data.

    Values are constrained and the density is with respect to them; samplers add Jacobians.
    """

    batched: ClassVar[bool] = False

    def log_joint(self, values: Values, data: D_contra, *, scale: float = 1.0) -> Tensor:
        """Return log p(values, data), a scalar for ONE point.

        Args:
            values: Site name -> tensor of the site's shape. A model that declares
                ``batched = True`` takes leading dims here and returns them.
            data: The data, or one batch of it.
            scale: Weight of the terms that belong to the minibatched plate.
        """
        ...


@runtime_checkable
class Generative(Protocol):
    """A model that can be simulated: values from the prior, data from values."""

    def sample_prior(self, n: int, *, rng: Rng) -> Values:
        """Draw ``n`` values [n, *site] of all sites."""
        ...

    def simulate(self, values: Values, x: Any, *, rng: Rng) -> Any:
        """Draw one data set at inputs ``x`` for each leading element of ``values``."""
        ...

    def sample_dataset(self, n: int, *, rng: Rng) -> tuple[Values, Any]:
        """Draw ``n`` pairs of values and data."""
        ...


@runtime_checkable
class HasEM(Protocol[D_contra]):
    """Expectation and maximisation steps."""

    def em_init(self, data: D_contra, *, rng: Rng) -> Any:
        """Return parameters to start from."""
        ...

    def e_step(self, params: Any, data: D_contra) -> tuple[Any, Tensor]:
        """Return expected statistics and the log likelihood at ``params``."""
        ...

    def m_step(self, stats: Any, data: D_contra) -> Any:
        """Return the parameters that maximise the expected log joint."""
        ...


@runtime_checkable
class HasLatents(Protocol[D_contra]):
    """Exact marginals of variables that the model sums out."""

    def latents(self, values: Values, data: D_contra) -> Mapping[str, Distribution]:
        """Return the marginals given ``values`` (leading dims allowed)."""
        ...


@runtime_checkable
class HasEvidence(Protocol[D_contra]):
    """A closed-form evidence that depends on hyper-parameters."""

    def hyper_sites(self, data: D_contra) -> Mapping[str, Site]:
        """Return the hyper-parameters as sites."""
        ...

    def log_hyperprior(self, hyper: Values) -> Tensor:
        """Return log p(hyper), leading dims carried through."""
        ...

    def log_evidence(self, hyper: Values, data: D_contra) -> Tensor:
        """Return log p(data | hyper), leading dims carried through."""
        ...


@runtime_checkable
class Conditionable(Protocol[D_contra]):
    """A posterior in closed form, or by one forward pass."""

    def condition(self, data: D_contra, hyper: Values | None) -> Posterior:
        """Return the posterior given data and hyper-parameters.

        Args:
            data: The data.
            hyper: Hyper-parameter values; leading dims [*batch] carry through. None takes the
                values that the model holds.
        """
        ...


@runtime_checkable
class HasFactors(Protocol[D_contra]):
    """Likelihood factors with tilted moments, for message passing."""

    def factors(self, data: D_contra) -> Sequence[Any]:
        """Return the factors."""
        ...

    def tilted_moments(self, factor: Any, cavity: Any) -> Any:
        """Return the moments of factor times cavity."""
        ...


@runtime_checkable
class Sequential(Protocol[D_contra]):
    """A model that grows step by step, for particle methods. Particles may be any objects."""

    def steps(self, data: D_contra) -> int:
        """Return the number of steps."""
        ...

    def start(self, n: int, data: D_contra, *, rng: Rng) -> Any:
        """Return ``n`` particles before the first step."""
        ...

    def extend(self, t: int, particles: Any, data: D_contra, *, rng: Rng) -> Any:
        """Return the particles after step ``t``."""
        ...

    def log_weight(self, t: int, old: Any, new: Any, data: D_contra) -> Tensor:
        """Return the log weight increments [n] of step ``t``."""
        ...


@runtime_checkable
class Updatable(Protocol[D_contra]):
    """A posterior that can absorb more data without refitting."""

    def update(self, posterior: Posterior, data: D_contra, *, rng: Rng) -> Posterior:
        """Return the posterior given the old data and ``data``."""
        ...


@runtime_checkable
class HasPointwise(Protocol[D_contra]):
    """The likelihood alone, in total and for each observation."""

    def log_likelihood(self, values: Values, data: D_contra) -> Tensor:
        """Return log p(data | values), [*batch]."""
        ...

    def pointwise_log_likelihood(self, values: Values, data: D_contra) -> Mapping[str, Tensor]:
        """Return {observed name: [*batch, *observation]}."""
        ...


@runtime_checkable
class HasMinibatches(Protocol[D_contra]):
    """A plate of units that may be subsampled."""

    def plate_size(self, data: D_contra) -> int:
        """Return the number of units."""
        ...

    def minibatch(self, data: D_contra, index: Tensor) -> Batch:
        """Return the batch of the units ``index`` [unit]; see :func:`probkit.data.take`."""
        ...


def lacks(model: Any, needs: Sequence[str]) -> list[str]:
    """List the methods among ``needs`` that ``model`` does not have."""
    return [name for name in needs if not callable(getattr(model, name, None))]


def prepare(model: Any, data: Any) -> Any:
    """Run the model's own check of its data, where it has one."""
    if not callable(getattr(model, "sites", None)):
        raise CapabilityError(
            f"expected a model (an object with sites(data)), got {type(model).__name__}; "
            "wrap a Pyro program as FromPyro(program)"
        )
    check = getattr(model, "prepare", None)
    return check(data) if callable(check) else data

"""A posterior as a BoTorch model, and the translation of predictives into BoTorch posteriors."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributions as td
from botorch.acquisition.analytic import AnalyticAcquisitionFunction
from botorch.acquisition.objective import PosteriorTransform, ScalarizedPosteriorTransform
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior as BotorchPosterior
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from linear_operator.operators import RootLinearOperator
from torch import Tensor
from torch.distributions import Distribution

from probkit import distributions as D
from probkit._botorch_ensemble import MemberPosterior
from probkit._botorch_posterior import PredictivePosterior
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.posterior import Posterior
from probkit.predictive import Analytic, Empirical, Mixture, Predictive
from probkit.rng import seed_of, stream
from probkit.sources import Closed
from probkit.tree import leaves

__all__ = ["PosteriorModel", "to_botorch_posterior"]


class PosteriorModel(Model):
    """A ``botorch.models.model.Model`` that predicts with a probkit posterior.

    Args:
        post: The posterior.
        outputs: Positions of the outputs to keep; None keeps all.

    Attributes:
        source: The posterior.
    """

    def __init__(self, post: Posterior, outputs: Sequence[int] | None = None) -> None:
        super().__init__()
        self.source = post
        self._outputs = None if outputs is None else [int(k) for k in outputs]
        self._total: int | None = None
        # One fixed stream: acquisition optimisers need the same surface at every call.
        seed = int(post.attrs.get("seed", 0))
        self._seed = seed_of(stream(seed, "botorch"))

    @property
    def batch_shape(self) -> torch.Size:
        """Empty: several hyper-parameter draws are mixed inside the predictive."""
        return torch.Size()

    @property
    def num_outputs(self) -> int:
        """Number of outputs kept.

        Raises:
            CapabilityError: It is not known yet (see the message).
        """
        if self._outputs is not None:
            return len(self._outputs)
        if self._total is None:
            example = _first_input(self.source.context.data)
            if example is None:
                raise CapabilityError(
                    "the number of outputs is not known before the first prediction, because the "
                    "data is no pair (X [n, d], y); call model.posterior(X) once, or pass outputs="
                )
            with torch.no_grad():
                self._predict(example, observation_noise=False)
        assert self._total is not None
        return self._total

    def posterior(
        self,
        X: Tensor,
        output_indices: Sequence[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **_: Any,
    ) -> BotorchPosterior:
        """Predict jointly at the q points of each t-batch.

        Args:
            X: Inputs [*batch, q, d].
            output_indices: Outputs to predict, counted among those kept.
            observation_noise: True predicts new observations, False the latent function.
            posterior_transform: Applied to the result; non-Gaussian posteriors take scalarisations.

        Returns:
            A posterior of shape [*batch, q, m].

        Raises:
            ShapeError: ``X`` is not [*batch, q, d], or the model's predictive has another shape.
            DataError: ``X`` has another dtype than the data, or an output does not exist.
            CapabilityError: The predictive, or the caller, does not fit BoTorch's form.
        """
        self._check_inputs(X)
        if isinstance(observation_noise, Tensor):
            raise CapabilityError(
                "observation_noise: expected True or False, got a tensor; the model has a noise "
                "of its own"
            )
        predictive = self._predict(X, observation_noise=observation_noise)
        assert self._total is not None
        kept = self._kept(self._total, output_indices)
        result = to_botorch_posterior(predictive, X.shape[:-1], kept)
        if not isinstance(result, GPyTorchPosterior):
            _refuse_analytic_caller(sys._getframe(1), type(result).__name__)
        return result if posterior_transform is None else _transform(result, posterior_transform)

    def subset_output(self, idcs: Sequence[int]) -> PosteriorModel:
        """Return the model of some outputs, counted among those kept."""
        model = PosteriorModel(self.source, _compose(self._outputs, list(idcs)))
        model._total = self._total
        return model

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> PosteriorModel:
        """Return the model given more data, where that is exact.

        Exact are models with ``update``, and closed forms with one set of hyper-parameters, which
        stay as they are.

        Args:
            X: Inputs [new, d].
            Y: Observations [new, m].
            **kwargs: None are supported.

        Raises:
            CapabilityError: Conditioning would not be exact, or ``X`` has batch dims.
        """
        if kwargs or X.ndim != 2 or Y.ndim != 2:
            raise CapabilityError(
                "condition_on_observations: expected X [new, d], Y [new, m] and nothing else, got "
                f"{tuple(X.shape)}, {tuple(Y.shape)}, {sorted(kwargs)}; for pending points use "
                "X_pending with a Monte Carlo acquisition function"
            )
        if self._outputs is not None:
            raise CapabilityError(
                "condition_on_observations: expected a model of all outputs, got "
                f"outputs={self._outputs}; condition first, then subset_output"
            )
        return PosteriorModel(_condition(self.source, X, Y))

    def fantasize(self, X: Tensor, sampler: Any, **kwargs: Any) -> PosteriorModel:
        """Refuse: fantasies need a posterior for each sampled outcome.

        Raises:
            CapabilityError: Always; the message names acquisition functions that do without.
        """
        raise CapabilityError(
            "fantasies (qKnowledgeGradient, multi-step look-ahead) need batched conditioning, "
            "which PosteriorModel lacks; use qLogExpectedImprovement, "
            "qLogNoisyExpectedImprovement, qUpperConfidenceBound or a BoTorch GP"
        )

    def _predict(self, X: Tensor, *, observation_noise: bool) -> Predictive:
        site = None if observation_noise else "f"
        predictive = self.source.predict(X, site=site, joint=True, rng=self._seed)
        shape = _shape(predictive)
        points = tuple(X.shape[:-1])
        if shape != points and shape[:-1] != points:
            raise ShapeError(
                f"{type(self.source.model).__name__}.predict at X {tuple(X.shape)}: expected "
                f"[*batch, q] = {points} (and [output]), got {shape}"
            )
        self._total = 1 if shape == points else shape[-1]
        return predictive

    def _check_inputs(self, X: Tensor) -> None:
        if X.ndim < 2:
            raise ShapeError(f"posterior: expected X [*batch, q, d], got {tuple(X.shape)}")
        dtype = _data_dtype(self.source.context.data)
        if dtype is not None and X.dtype != dtype:
            raise DataError(
                f"posterior: expected X of the data's dtype {dtype}, got {X.dtype}; "
                f"call X.to({dtype})"
            )

    def _kept(self, total: int, output_indices: Sequence[int] | None) -> list[int]:
        outputs = list(range(total)) if self._outputs is None else self._outputs
        if any(not -total <= k < total for k in outputs):
            raise DataError(f"outputs: expected positions among {total} outputs, got {outputs}")
        chosen = outputs if output_indices is None else _compose(outputs, list(output_indices))
        return [k % total for k in chosen]


def _compose(outputs: Sequence[int] | None, chosen: Sequence[int]) -> list[int]:
    if outputs is None:
        return list(chosen)
    if any(not -len(outputs) <= k < len(outputs) for k in chosen):
        raise DataError(
            f"output_indices: expected positions among {len(outputs)} outputs, got {chosen}"
        )
    return [outputs[k] for k in chosen]


def _first_input(data: Any) -> Tensor | None:
    """One row [1, d] of the inputs, where the data is a pair (X [n, d], y) or has such an index."""
    index = getattr(data, "index", None)
    if isinstance(index, Tensor) and index.ndim == 2 and len(index):
        return index[:1]
    if isinstance(data, list | tuple) and len(data) == 2 and isinstance(data[0], Tensor):
        return data[0][:1] if data[0].ndim == 2 and len(data[0]) else None
    return None


def _data_dtype(data: Any) -> torch.dtype | None:
    """Widest floating dtype among the data's tensors; None where there is no tensor."""
    found = {x.dtype for x in leaves(data) if isinstance(x, Tensor) and x.is_floating_point()}
    return max(found, key=lambda dtype: torch.finfo(dtype).bits, default=None)


def _condition(post: Posterior, X: Tensor, Y: Tensor) -> Posterior:
    data = post.context.data
    if not (isinstance(data, list | tuple) and len(data) == 2):
        raise CapabilityError(
            "condition_on_observations: expected data (X, y); run infer on old and new data "
            "together"
        )
    new_y = Y[:, 0] if data[1].ndim == 1 else Y
    name = type(post.model).__name__
    if callable(getattr(post.model, "update", None)):
        return post.update(
            (X, new_y), rng=seed_of(stream(int(post.attrs.get("seed", 0)), "update"))
        )
    source = post.source
    condition: Callable[..., Posterior] | None = getattr(post.model, "condition", None)
    if condition is None or not isinstance(source, Closed) or source.is_mixture:
        raise CapabilityError(
            "condition_on_observations is exact for closed forms with one set of hyper-parameters "
            f"and for models with update; {name} with {type(source).__name__} is neither: run "
            "infer on old and new data together"
        )
    joined = (torch.cat([data[0], X]), torch.cat([data[1], new_y]))
    hyper = None if source.hyper is None else {k: v[0, 0] for k, v in source.hyper.items()}
    updated = condition(joined, hyper)
    if isinstance(updated.source, Closed):
        updated = replace(updated, source=replace(updated.source, hyper=source.hyper))
    context = replace(updated.context, coords=post.context.coords)
    return replace(updated, context=context, attrs={**post.attrs, **updated.attrs})


def _refuse_analytic_caller(frame: Any, form: str) -> None:
    """Refuse acquisition functions that would treat this posterior as a Gaussian.

    Analytic ones read mean and variance only, so a wrong answer would look right; and nothing in
    BoTorch's interface tells a model who asks. Hence this look at the calling frame.
    """
    caller = frame.f_locals.get("self")
    if not isinstance(caller, AnalyticAcquisitionFunction):
        return
    if frame.f_locals.get("compute_sigma", True):
        raise CapabilityError(
            f"{type(caller).__name__} assumes a Gaussian posterior, got {form}; use its Monte "
            "Carlo form, for example qLogExpectedImprovement"
        )


def _transform(posterior: BotorchPosterior, transform: PosteriorTransform) -> BotorchPosterior:
    if isinstance(posterior, GPyTorchPosterior):
        return transform(posterior)
    if isinstance(transform, ScalarizedPosteriorTransform):
        weights, offset = transform.weights, float(transform.offset)
        if isinstance(posterior, PredictivePosterior):
            return posterior.scalarize(weights, offset)
        if isinstance(posterior, MemberPosterior):
            values = offset + posterior.values @ weights.to(posterior.values)
            return MemberPosterior(values.unsqueeze(-1), posterior._weights)
    raise CapabilityError(
        f"{type(transform).__name__} needs a Gaussian posterior, got {type(posterior).__name__}; "
        "use an MCAcquisitionObjective (objective=GenericMCObjective(...)) in its place"
    )


# --------------------------------------------------------------------------- predictives


def _shape(predictive: Predictive) -> tuple[int, ...]:
    """Shape [*obs] of a predictive."""
    if isinstance(predictive, Analytic):
        return tuple(predictive.dist.batch_shape + predictive.dist.event_shape)
    if isinstance(predictive, Mixture):
        return tuple(predictive.dist.batch_shape[1:] + predictive.dist.event_shape)
    if isinstance(predictive, Empirical) and isinstance(predictive.values, Tensor):
        return tuple(predictive.values.shape[1:])
    raise CapabilityError(
        f"BoTorch needs numeric predictions, got {type(predictive).__name__} of objects"
    )


def to_botorch_posterior(
    predictive: Predictive, points: torch.Size, outputs: Sequence[int]
) -> BotorchPosterior:
    """Translate a predictive of shape [*batch, q] or [*batch, q, output].

    Args:
        predictive: An Analytic, Mixture or Empirical predictive, joint over q (and outputs).
        points: [*batch, q].
        outputs: Outputs to keep.

    Returns:
        GPyTorchPosterior for a Gaussian, MemberPosterior (an EnsemblePosterior) for draws, else
        PredictivePosterior.

    Raises:
        CapabilityError: The law is not a (mixture of) joint normal or Student-t.
    """
    rank = len(points)
    predictive, outputs = _one_of_blocks(predictive, outputs)
    if isinstance(predictive, Empirical):
        assert isinstance(predictive.values, Tensor)
        values = predictive.values
        values = values.unsqueeze(-1) if values.ndim == rank + 1 else values
        weights = None if predictive.log_weights is None else predictive.weights
        return MemberPosterior(values[..., list(outputs)].movedim(0, -3), weights)
    if isinstance(predictive, Mixture):
        law = _joint_law(predictive.dist, rank + 1, outputs)
        return PredictivePosterior(law.loc, law.root, predictive.log_weights, law.df, law.amplitude)
    assert isinstance(predictive, Analytic)
    law = _joint_law(_with_component(predictive.dist), rank + 1, outputs)
    if law.df is not None:
        one_weight = torch.zeros(1, dtype=law.loc.dtype, device=law.loc.device)
        return PredictivePosterior(law.loc, law.root, one_weight, law.df, law.amplitude)
    loc = law.loc.squeeze(0)
    root = law.root if law.amplitude is None else law.amplitude[..., None, None] * law.root
    covariance = RootLinearOperator(root.squeeze(0))
    if loc.shape[-1] == 1:
        return GPyTorchPosterior(MultivariateNormal(loc.squeeze(-1), covariance))
    return GPyTorchPosterior(MultitaskMultivariateNormal(loc, covariance))


def _one_of_blocks(
    predictive: Predictive, outputs: Sequence[int]
) -> tuple[Predictive, Sequence[int]]:
    """Take the one output that is kept out of outputs with scales of their own.

    Raises:
        CapabilityError: Several are kept: their joint law has no BoTorch form.
    """
    if not isinstance(predictive, Analytic | Mixture):
        return predictive, outputs
    whole = predictive.dist
    if not isinstance(whole, D.IndependentBlocks):
        return predictive, outputs
    if not whole.stacked or len(outputs) != 1:
        raise CapabilityError(
            "outputs or groups with scales of their own have no joint BoTorch posterior; they are "
            "independent, so use to_botorch([k]) for each output (ModelList joins them)"
        )
    part = whole.part_at(outputs[0])
    mixed = isinstance(predictive, Mixture)
    weights = predictive.log_weights if isinstance(predictive, Mixture) else None
    if not isinstance(part, D.FiniteMixture):
        return (Analytic(part) if weights is None else Mixture(part, weights)), [0]
    lead = 2 if mixed else 1  # [node, hyper] or [node]
    nodes = part.log_weights.reshape(*part.log_weights.shape[:lead], -1)[..., 0]
    if weights is None:
        return Mixture(part.components, nodes), [0]
    return Mixture(D.flatten_batch(part.components, 2), (nodes + weights).flatten()), [0]


def _with_component(dist: Distribution) -> Distribution:
    """Prepend a batch dim of size 1."""
    return dist.expand(torch.Size([1]) + dist.batch_shape)


@dataclass(frozen=True)
class _JointLaw:
    """Parameters with a leading component dim, of size 1 where they do not vary along it.

    Attributes:
        loc: [component, *batch, q, m].
        root: [component, *batch, q m, q m], points before outputs.
        df: [component, *batch]; None for normals.
        amplitude: [component, *batch]; None for ones.
    """

    loc: Tensor
    root: Tensor
    df: Tensor | None = None
    amplitude: Tensor | None = None


def _joint_law(dist: Distribution, rank: int, outputs: Sequence[int]) -> _JointLaw:
    """Read the parameters of a law over [component, *batch, q] or [component, *batch, q, output].

    ``rank`` counts the dims before the output dim.
    """
    while isinstance(dist, td.Independent):
        dist = dist.base_dist
    shape = dist.batch_shape + dist.event_shape
    chosen = list(outputs)
    if isinstance(dist, D.MultiOutputNormal | D.MultiOutputStudentT):
        return _shared_factor(dist, chosen)
    if isinstance(dist, D.MultivariateStudentT | D.ScaledMultivariateNormal) and len(shape) == rank:
        return _shared_factor(dist._one, [0])
    if isinstance(dist, td.MultivariateNormal) and len(shape) == rank:
        return _JointLaw(dist.loc.unsqueeze(-1), dist.scale_tril)
    if isinstance(dist, D.JointNormal) and len(shape) == rank + 1:
        return _chosen_outputs(dist, chosen)
    if isinstance(dist, td.Normal):  # independent entries
        loc, scale = (
            value.expand(shape).reshape(*shape[:rank], -1)[..., chosen]
            for value in (dist.loc, dist.scale)
        )
        return _JointLaw(loc, torch.diag_embed(scale.flatten(-2)))
    if isinstance(dist, td.StudentT) and len(shape) == rank and shape[-1] == 1:
        df, loc, scale = (v.expand(shape) for v in (dist.df, dist.loc, dist.scale))
        return _JointLaw(loc.unsqueeze(-1), scale.unsqueeze(-1), df.squeeze(-1))
    raise CapabilityError(
        "BoTorch needs a law that is joint over the q points: expected a (mixture of) multivariate "
        f"normal or Student-t from predict(joint=True), got {type(dist).__name__} with batch shape "
        f"{tuple(dist.batch_shape)} and event shape {tuple(dist.event_shape)}"
    )


def _chosen_outputs(dist: D.JointNormal, outputs: list[int]) -> _JointLaw:
    """Read a law with any covariance between points and outputs."""
    points, total = dist.event_shape
    root = dist.scale_tril
    if outputs != list(range(total)):
        rows = torch.arange(points * total, device=root.device).reshape(points, total)
        some = root[..., rows[:, outputs].flatten(), :]
        root = torch.linalg.qr(some.mT, mode="r").R.mT  # Square again: R' R = some some'.
    return _JointLaw(dist.loc[..., outputs], root)


def _shared_factor(dist: Any, outputs: list[int]) -> _JointLaw:
    """Read a law whose outputs share one row factor up to scale; a constant one is not copied."""
    stored = dist.stored_arguments()
    batch = dist.batch_shape[1:]
    loc = stored["loc"].expand(-1, *batch, -1, -1)[..., outputs]
    root = stored["scale_tril"].expand(-1, *batch, -1, -1)
    scale = stored["output_scale"].expand(-1, *batch, dist.event_shape[-1])[..., outputs]
    if len(outputs) == 1:
        root = root * scale.unsqueeze(-1)
    else:  # points before outputs: L kron diag(scale)
        diagonal = torch.diag_embed(scale)
        root = torch.einsum("...ij,...ab->...iajb", root, diagonal).flatten(-2).flatten(-3, -2)
    return _JointLaw(loc, root, stored.get("df"), stored["amplitude"])

"""Surrogates by name, and the one function that fits any of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from botorch.models import ModelListGP
from botorch.models.gpytorch import GPyTorchModel
from botorch.models.model import Model as BotorchModel
from botorch.models.model import ModelList

from probkit.bo.surrogates.base import Surrogate
from probkit.bo.surrogates.data import TrainingData, training_data
from probkit.errors import CapabilityError, DataError
from probkit.posterior import Posterior
from probkit.rng import Rng, seed_of, stream

__all__ = ["SURROGATES", "make_surrogate", "surrogate_of", "warm_state"]

_Home = tuple[str, str, Mapping[str, Any]]

SURROGATES: Mapping[str, _Home] = {
    "gp": ("gp", "GPSurrogate", {}),
    "gp-paper": ("gp", "GPSurrogate", {"preset": "paper"}),
    "gp-exact": ("gp", "GPSurrogate", {"noise": "none"}),
    "ibnn": ("ibnn", "IBNNSurrogate", {}),
    "ibnn-erf": ("ibnn", "IBNNSurrogate", {"activation": "erf"}),
    "hmc": ("hmc", "HMCSurrogate", {}),
    "sghmc": ("sghmc", "SGHMCSurrogate", {}),
    "ensemble": ("deep_ensemble", "EnsembleSurrogate", {}),
    "laplace": ("laplace", "LaplaceSurrogate", {}),
    "dkl": ("dkl", "DKLSurrogate", {}),
    "pfn": ("pfn", "PFNSurrogate", {}),
    "nngp": ("scale_mixture", "NNGPSurrogate", {}),
    "llm": ("probkit.bo.llm.tuning", "LLMHybrid", {}),
    "auto": ("auto", "AutoSurrogate", {}),
}
"""Name -> (module, class, options) of every surrogate that :func:`make_surrogate` knows."""


def surrogate_of(surrogate: Any, options: Mapping[str, Any] | None = None) -> Surrogate:
    """Read a surrogate: a name, options of one, or a probkit model.

    Args:
        surrogate: A name out of ``SURROGATES``; a :class:`Surrogate`; or any probkit model of data
            (X, y), which is then inferred by its own sampler.
        options: Fields to change.

    Raises:
        DataError: An unknown name or option; the message lists the known ones.
        CapabilityError: Something else.
    """
    chosen = dict(options or {})
    if isinstance(surrogate, str):
        if surrogate not in SURROGATES:
            names = ", ".join(map(repr, SURROGATES))
            raise DataError(f"surrogate: expected one of {names}, got {surrogate!r}")
        module, name, fixed = SURROGATES[surrogate]
        path = module if "." in module else f"probkit.bo.surrogates.{module}"
        kind = getattr(importlib.import_module(path), name)
        return _made(kind, {**fixed, **chosen})
    if isinstance(surrogate, Surrogate):
        return _made(lambda **new: replace(surrogate, **new), chosen)  # type: ignore[type-var]
    if hasattr(surrogate, "sites") and hasattr(surrogate, "predict"):
        from probkit.bo.surrogates.any_model import ModelSurrogate

        return _made(ModelSurrogate, {"model": surrogate, **chosen})
    raise CapabilityError(
        "surrogate: expected a name, a Surrogate such as GPSurrogate(), or a probkit model, got "
        f"{type(surrogate).__name__}; a fitted BoTorch model needs no making"
    )


def _made(kind: Callable[..., Any], options: Mapping[str, Any]) -> Surrogate:
    try:
        made: Surrogate = kind(**options)
    except CapabilityError:  # a TypeError, too
        raise
    except TypeError as error:
        raise DataError(f"surrogate options: {error}") from None
    return made


def make_surrogate(
    surrogate: Any,
    X: Any,
    Y: Any,
    Yvar: Any = None,
    *,
    bounds: Any = None,
    outcome: Any = "standardize",
    options: Mapping[str, Any] | None = None,
    previous: Mapping[str, Any] | BotorchModel | None = None,
    rng: Rng,
) -> BotorchModel:
    """Fit a surrogate to observations; what comes back is a BoTorch model.

    Inputs and outcomes are as the user has them: the model maps them to the unit cube and to
    standard units, and predicts on their scale. It takes points [*batch, q, feature].

    Args:
        surrogate: A name ("gp", "gp-paper", "gp-exact", "ibnn", "hmc", "sghmc", "ensemble",
            "laplace", "dkl", "pfn", "nngp", "llm", "auto", ...), a :class:`Surrogate`, a probkit
            model of data (X, y), or a probkit posterior, which is wrapped as it is.
        X: Inputs [row, feature].
        Y: Outcomes [row, output] or [row]. Larger is better, for the transforms that care.
        Yvar: Known variances of the outcomes; None where they are not known.
        bounds: A :class:`~probkit.bo.Domain` (bounds, categorical and integer columns), or bounds
            [2, feature]; None for the unit cube.
        outcome: "standardize", "winsorize", "bilog", "rank", "none", or a BoTorch
            ``OutcomeTransform`` (for one output, or for surrogates of all outputs at once).
        options: Fields of the surrogate to change, such as ``{"noise": "none"}``.
        previous: The model of the last round, or its :func:`warm_state`: samplers and optimisers
            start from there.
        rng: Seed or generator.

    Returns:
        A BoTorch model in eval mode; for several outputs that are modelled one by one a
        ``ModelListGP`` or ``ModelList``.

    Raises:
        DataError: Observations or options that cannot be used; the message names them.
        ShapeError: Shapes that do not match.

    Example:
        >>> import torch
        >>> x = torch.rand(8, 2, generator=torch.Generator().manual_seed(0)).double()
        >>> model = make_surrogate("gp", x, x.sum(1), rng=0)
        >>> model.posterior(x[:, None]).mean.shape
        torch.Size([8, 1, 1])
    """
    if isinstance(surrogate, Posterior):
        return surrogate.to_botorch()
    spec = surrogate_of(surrogate, options)
    data = training_data(X, Y, Yvar, bounds=bounds, outcome=outcome)
    state = warm_state(previous) if isinstance(previous, BotorchModel) else previous
    seed = seed_of(rng)
    if spec.joint or data.outputs == 1:
        return _with_state(spec.fit(data, previous=state, rng=stream(seed, "surrogate", 0)))
    states = _states(state, data)
    models = [
        spec.fit(data.output(k), previous=states[k], rng=stream(seed, "surrogate", k))
        for k in range(data.outputs)
    ]
    return _listed(models)


def _with_state(model: BotorchModel) -> BotorchModel:
    if not hasattr(model, "warm_state"):
        model.warm_state = None
    return model


def _states(
    state: Mapping[str, Any] | None, data: TrainingData
) -> Sequence[Mapping[str, Any] | None]:
    """Return the warm state of each output; none where their number has changed."""
    parts = None if state is None else state.get("outputs")
    if parts is None or len(parts) != data.outputs:
        return [None] * data.outputs
    return list(parts)


def _listed(models: Sequence[BotorchModel]) -> BotorchModel:
    """Join models of one output each."""
    kind = ModelListGP if all(isinstance(m, GPyTorchModel) for m in models) else ModelList
    joined = kind(*models)
    joined.eval()
    return joined


def warm_state(model: BotorchModel) -> dict[str, Any] | None:
    """Return what the next fit can start from: a tree of tensors, numbers and strings.

    Args:
        model: A model that :func:`make_surrogate` returned.
    """
    if isinstance(model, ModelList):
        return {"outputs": [warm_state(part) for part in model.models]}
    state: dict[str, Any] | None = getattr(model, "warm_state", None)
    return state

"""Surrogates inside Ax, through its modular BoTorch generator.

``ax`` is imported on first use; the extra ``ax`` brings it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import Model
from botorch.models.transforms.input import InputTransform
from botorch.posteriors.posterior import Posterior
from botorch.utils.datasets import SupervisedDataset
from torch import Tensor

from probkit.bo.surrogates.registry import make_surrogate
from probkit.errors import CapabilityError
from probkit.extras import require
from probkit.rng import Rng, seed_of

__all__ = ["AxModel", "ax_strategy", "ax_surrogate_spec"]


class AxModel(Model):
    """A surrogate as Ax makes and uses one: fitted when it is made.

    Args:
        train_X: Inputs ``[row, feature]``.
        train_Y: Outcomes ``[row, output]``.
        train_Yvar: Variances of their noise; None where not known.
        surrogate: As for :func:`~probkit.bo.surrogates.make_surrogate`.
        options: Options of the surrogate.
        seed: Seed of everything random.
        input_transform: What Ax makes of its search space: it maps inputs to the unit cube.
    """

    def __init__(
        self,
        train_X: Tensor,
        train_Y: Tensor,
        train_Yvar: Tensor | None = None,
        surrogate: Any = "auto",
        options: Mapping[str, Any] | None = None,
        seed: int = 0,
        input_transform: InputTransform | None = None,
    ) -> None:
        super().__init__()
        if input_transform is not None:
            self.input_transform = input_transform.eval()
        self.train_inputs = (train_X,)
        self.train_targets = train_Y
        self.inner = make_surrogate(
            surrogate,
            self.transform_inputs(train_X),
            train_Y,
            train_Yvar,
            options=options,
            rng=seed,
        )

    @classmethod
    def construct_inputs(cls, training_data: SupervisedDataset, **options: Any) -> dict[str, Any]:
        """Return the arguments of the constructor for a data set of Ax."""
        options.pop("categorical_features", None)  # indices, as Ax has encoded them
        return {
            "train_X": training_data.X,
            "train_Y": training_data.Y,
            "train_Yvar": training_data.Yvar,
            **options,
        }

    @property
    def num_outputs(self) -> int:
        """Number of outcomes."""
        return int(self.inner.num_outputs)

    @property
    def batch_shape(self) -> torch.Size:
        """Batch dims of the model: none."""
        return torch.Size(self.inner.batch_shape)

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Predict at points ``[*batch, q, feature]``."""
        return self.inner.posterior(
            self.transform_inputs(X),
            output_indices=output_indices,
            observation_noise=observation_noise,
            posterior_transform=posterior_transform,
            **kwargs,
        )

    def subset_output(self, idcs: list[int]) -> Model:
        """Return the model of some outcomes."""
        return self._around(self.inner.subset_output(idcs))

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Model:
        """Return the model given more data, where the surrogate can."""
        return self._around(
            self.inner.condition_on_observations(self.transform_inputs(X), Y, **kwargs)
        )

    def _around(self, inner: Model) -> AxModel:
        """Return this model with another one inside."""
        other = copy.copy(self)
        other._modules = {**self._modules, "inner": inner}
        return other

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Keep what was fitted: the state of a model of other data says nothing about this one."""
        return torch.nn.modules.module._IncompatibleKeys([], [])


def ax_surrogate_spec(
    surrogate: Any = "auto", *, options: Mapping[str, Any] | None = None, rng: Rng
) -> Any:
    """Return a ``SurrogateSpec`` of Ax that fits a surrogate of probkit.

    Args:
        surrogate: As for :func:`~probkit.bo.surrogates.make_surrogate`.
        options: Options of the surrogate.
        rng: Seed of everything random.

    Returns:
        What ``BoTorchGenerator`` takes as ``surrogate_spec``.

    Raises:
        CapabilityError: ``surrogate`` is no name: Ax stores its settings.
    """
    if not isinstance(surrogate, str):
        raise CapabilityError(
            f"surrogate: expected a name, as Ax stores its settings, got {surrogate!r}; pass "
            "options= to change one"
        )
    module = require("ax.generators.torch.botorch_modular.surrogate", extra="ax")
    _teach_ax()
    config = module.ModelConfig(
        botorch_model_class=AxModel,
        model_options={
            "surrogate": surrogate, "options": dict(options or {}), "seed": seed_of(rng)
        },
        outcome_transform_classes=None,
        name=f"probkit {surrogate}",
    )  # fmt: skip
    return module.SurrogateSpec(model_configs=[config], allow_batched_models=False)


def ax_strategy(
    surrogate: Any = "auto",
    *,
    initial: int = 5,
    options: Mapping[str, Any] | None = None,
    rng: Rng,
) -> Any:
    """Return a ``GenerationStrategy`` of Ax: a Sobol sequence, then a surrogate of probkit.

    Args:
        surrogate: As for :func:`ax_surrogate_spec`.
        initial: Points of the sequence.
        options: Options of the surrogate.
        rng: Seed of everything random.

    Returns:
        What ``Client.set_generation_strategy`` takes.

    Example:
        >>> ax_strategy("gp", rng=0).name  # doctest: +SKIP
        'Sobol+probkit gp'
    """
    seed = seed_of(rng)
    strategy = require("ax.generation_strategy.generation_strategy", extra="ax")
    spec = require("ax.generation_strategy.generator_spec", extra="ax").GeneratorSpec
    criteria = require("ax.generation_strategy.transition_criterion", extra="ax")
    generators = require("ax.adapter.registry", extra="ax").Generators
    first = strategy.GenerationNode(
        name="Sobol",
        generator_specs=[
            spec(generator_enum=generators.SOBOL, generator_kwargs={"seed": seed % 2**31})
        ],
        transition_criteria=[
            criteria.MinTrials(
                threshold=initial,
                transition_to="probkit",
                use_all_trials_in_exp=True,
            )
        ],
    )
    then = strategy.GenerationNode(
        name="probkit",
        generator_specs=[
            spec(
                generator_enum=generators.BOTORCH_MODULAR,
                generator_kwargs={
                    "surrogate_spec": ax_surrogate_spec(surrogate, options=options, rng=seed)
                },
            )
        ],
    )
    return strategy.GenerationStrategy(name=f"Sobol+probkit {surrogate}", nodes=[first, then])


def _teach_ax() -> None:
    """Tell Ax that our models come fitted."""
    utils = require("ax.generators.torch.botorch_modular.utils", extra="ax")
    if AxModel not in utils.fit_botorch_model.funcs:

        @utils.fit_botorch_model.register(AxModel)
        def _fitted(model: Model, mll_class: Any, mll_options: Any = None) -> None:
            """Do nothing: the model was fitted when it was made."""

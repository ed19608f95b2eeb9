"""The common data and parameters of the timing benchmarks."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.spec import Workload


def sizes(features: int) -> tuple[Workload, ...]:
    """The workloads of one number of features."""
    return tuple(
        {"N": 100, "T": 200, "D": features, "K": states, "L": order, "dtype": dtype}
        for dtype in ("float64", "float32")
        for states, order in ((3, 1), (8, 2))
    )


def sequences(workload: Workload) -> Any:
    """Random walks plus noise [N, T, D] as a NumPy array of the workload's dtype."""
    import numpy as np

    n, steps, features = (int(workload[key]) for key in ("N", "T", "D"))
    shape = (n, steps, features)
    walk = np.cumsum(np.random.default_rng(0).standard_normal(shape), axis=1)
    noise = np.random.default_rng(1).standard_normal(shape)
    return (0.1 * walk + 0.3 * noise).astype(str(workload["dtype"]))


def parameters(workload: Workload) -> dict[str, Any]:
    """Initial parameters near a random walk in every state, as NumPy arrays.

    Regressors are 1, then the lags, newest first.
    """
    import numpy as np

    states, features, order = (int(workload[key]) for key in ("K", "D", "L"))
    rng = np.random.default_rng(2)
    weights = 0.01 * rng.standard_normal((states, features, 1 + features * order))
    weights[:, :, 0] = 0.5 * rng.standard_normal((states, features))
    weights[:, :, 1 : 1 + features] += 0.9 * np.eye(features)
    transition = 0.9 * np.eye(states) + 0.1 / states
    values = {
        "initial": np.full(states, 1 / states),
        "transition": transition,
        "weights": weights,
        "covariance": np.tile(0.2 * np.eye(features), (states, 1, 1)),
    }
    return {name: value.astype(str(workload["dtype"])) for name, value in values.items()}


def dynamax_model(workload: Workload) -> tuple[Any, Any, Any, Any, Any]:
    """The peer's model, parameters, properties, sequences and lagged inputs."""
    import jax

    if workload["dtype"] == "float64":
        jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import LinearAutoregressiveHMM

    values = {name: jnp.asarray(value) for name, value in parameters(workload).items()}
    model = LinearAutoregressiveHMM(int(workload["K"]), int(workload["D"]), int(workload["L"]))
    params, props = model.initialize(
        jax.random.PRNGKey(0),
        initial_probs=values["initial"],
        transition_matrix=values["transition"],
        emission_weights=values["weights"][:, :, 1:],
        emission_biases=values["weights"][:, :, 0],
        emission_covariances=values["covariance"],
    )
    y = jnp.asarray(sequences(workload))
    return model, params, props, y, jax.vmap(model.compute_inputs)(y)

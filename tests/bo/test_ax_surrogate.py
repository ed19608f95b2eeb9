"""Surrogates inside Ax, run for real, in a process of their own: Ax sets up logging on import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from probkit.errors import CapabilityError
from probkit.extras import available

pytestmark = pytest.mark.skipif(not available("ax"), reason="ax-platform is not installed")

PROGRAM = """
import json, logging, warnings
warnings.simplefilter("ignore")
import torch
from ax.api.client import Client
from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig
from probkit.bo.ax_surrogate import AxModel, ax_strategy
from support.study_objectives import branin

logging.disable(logging.CRITICAL)
torch.set_num_threads(1)
client = Client(random_seed=0)
client.configure_experiment(
    name="branin",
    parameters=[
        RangeParameterConfig(name="x", parameter_type="float", bounds=(-5.0, 10.0)),
        RangeParameterConfig(name="y", parameter_type="float", bounds=(0.0, 15.0)),
        ChoiceParameterConfig(name="c", parameter_type="str", values=["a", "b"], is_ordered=False),
    ],
)
client.configure_optimization(objective="-loss")
client.set_generation_strategy(ax_strategy({surrogate!r}, initial=6, rng=0))
told, nodes = [], []
for _ in range({trials}):
    for index, params in client.get_next_trials(max_trials=1).items():
        told.append(branin(params) + 5 * (params["c"] == "b"))
        client.complete_trial(trial_index=index, raw_data={{"loss": told[-1]}})
strategy = client._generation_strategy
model = strategy.adapter.generator.surrogate.model
runs = strategy._generator_runs
print(json.dumps({{
    "told": told,
    "nodes": [run._generation_node_name for run in runs],
    "model": type(model).__name__,
    "inner": type(model.inner).__name__,
    "best": client.get_best_parameterization(use_model_predictions=False)[0],
}}))
"""


def run(surrogate, trials):
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(tests), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(surrogate=surrogate, trials=trials)],
        env=env, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("surrogate", ["gp", "ibnn"])
def test_ax_asks_a_surrogate_of_ours(surrogate):
    seen = run(surrogate, 12)
    assert seen["nodes"] == ["Sobol"] * 6 + ["probkit"] * 6
    assert seen["model"] == "AxModel"
    assert min(seen["told"][6:]) < min(seen["told"][:6])


def test_only_names_are_taken():
    import botorch  # noqa: F401  (loaded by the next import; its settings are not ours)

    from probkit.bo.ax_surrogate import ax_surrogate_spec

    with pytest.raises(CapabilityError, match=r"surrogate: expected a name, as Ax stores its sett"):
        ax_surrogate_spec(object(), rng=0)

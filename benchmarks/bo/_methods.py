"""The methods, each with the same initial points: ask for params, be told what they gave."""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from benchmarks.bo._cells import INITIAL, Cell, Plan
from benchmarks.bo._problems import Task, task

__all__ = ["run_cell"]

Params = Mapping[str, Any]
Values = Mapping[str, float]

#: Surrogates that this process has warmed up.
_warm: set[str] = set()


class Method(Protocol):
    """What a method must do."""

    def attach(self, params: Params, values: Values) -> None: ...
    def ask(self) -> Params: ...
    def tell(self, values: Values) -> None: ...
    def calibration(self) -> dict[str, float]: ...


class _Study:
    """A study of ours with some surrogate."""

    def __init__(self, problem: Task, surrogate: str, seed: int) -> None:
        from probkit.bo import Study

        self.study = Study(
            problem.space, problem.objectives, surrogate=surrogate, noise="none", rng=seed,
            initial=INITIAL,
        )  # fmt: skip

    def attach(self, params: Params, values: Values) -> None:
        self.study.attach(params, dict(values))

    def ask(self) -> Params:
        self.trial = self.study.ask()
        return self.trial.params

    def tell(self, values: Values) -> None:
        self.study.tell(self.trial, dict(values))

    def calibration(self) -> dict[str, float]:
        table = self.study.calibration(folds=5).summary(levels=(0.5, 0.95)).iloc[0]
        return {
            "50 %": float(table["50% coverage"]),
            "95 %": float(table["95% coverage"]),
            "NLL": float(table["NLL"]),
        }


class _Random:
    """Points drawn evenly."""

    def __init__(self, problem: Task, seed: int) -> None:
        from probkit.rng import stream

        self.space, self.rng = problem.space, stream(seed, "random search")

    def attach(self, params: Params, values: Values) -> None: ...

    def ask(self) -> Params:
        return self.space.from_codes(self.space.random_codes(1, rng=self.rng))[0]

    def tell(self, values: Values) -> None: ...

    def calibration(self) -> dict[str, float]:
        return {}


class _Optuna:
    """A sampler of Optuna."""

    def __init__(self, problem: Task, kind: str, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.problem = problem
        self.distributions = {n: _optuna(p) for n, p in problem.space.parameters.items()}
        sampler: Any = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=INITIAL)
            if kind == "tpe"
            else optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=INITIAL, deterministic_objective=True
            )
        )
        names = {"min": "minimize", "max": "maximize"}
        directions = [names[d] for d in problem.objectives.values()]
        self.study = optuna.create_study(sampler=sampler, directions=directions)

    def _values(self, values: Values) -> list[float]:
        return [values[name] for name in self.problem.objectives]

    def attach(self, params: Params, values: Values) -> None:
        import optuna

        self.study.add_trial(
            optuna.trial.create_trial(
                params=dict(params), distributions=self.distributions, values=self._values(values)
            )
        )

    def ask(self) -> Params:
        self.trial = self.study.ask(self.distributions)
        return self.trial.params

    def tell(self, values: Values) -> None:
        self.study.tell(self.trial, self._values(values))

    def calibration(self) -> dict[str, float]:
        return {}


def _optuna(parameter: Any) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    from probkit.bo import Categorical, Int

    if isinstance(parameter, Categorical):
        return CategoricalDistribution(parameter.choices)
    kind = IntDistribution if isinstance(parameter, Int) else FloatDistribution
    return kind(parameter.low, parameter.high, log=parameter.log)


class _BoTorch:
    """What BoTorch does when told nothing: SingleTaskGP, qLogEI or qLogNEHVI, its tutorial's sizes.

    Categories are indicators, moved as numbers and rounded to the largest.
    """

    def __init__(self, problem: Task, seed: int) -> None:
        import torch

        self.problem, self.seed, self.asked = problem, seed, 0
        self.X = torch.empty(0, problem.space.dim, dtype=torch.float64)
        self.Y = torch.empty(0, len(problem.objectives), dtype=torch.float64)

    def attach(self, params: Params, values: Values) -> None:
        import torch

        signs = {"min": -1.0, "max": 1.0}
        row = [signs[d] * values[name] for name, d in self.problem.objectives.items()]
        self.X = torch.cat([self.X, self.problem.space.encode(params)])
        self.Y = torch.cat([self.Y, torch.tensor([row], dtype=torch.float64)])

    def ask(self) -> Params:
        import torch
        from botorch.acquisition.logei import qLogExpectedImprovement
        from botorch.acquisition.multi_objective.logei import (
            qLogNoisyExpectedHypervolumeImprovement,
        )
        from botorch.fit import fit_gpytorch_mll
        from botorch.models import SingleTaskGP
        from botorch.optim import optimize_acqf
        from gpytorch.mlls import ExactMarginalLogLikelihood

        from probkit.rng import scope, stream

        self.asked += 1
        with scope(rng=stream(self.seed, "botorch", self.asked)):
            model = SingleTaskGP(self.X, self.Y)
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            acquisition: Any
            if self.Y.shape[1] == 1:
                acquisition = qLogExpectedImprovement(model, best_f=self.Y.max())
            else:
                worst = self.Y.amin(0)
                point = (worst - 0.1 * (self.Y.amax(0) - worst)).tolist()
                acquisition = qLogNoisyExpectedHypervolumeImprovement(
                    model, ref_point=point, X_baseline=self.X, prune_baseline=True
                )
            bounds = torch.stack([torch.zeros_like(self.X[0]), torch.ones_like(self.X[0])])
            X, _ = optimize_acqf(acquisition, bounds, q=1, num_restarts=4, raw_samples=128)
        self.params = self.problem.space.decode(X)[0]
        return self.params

    def tell(self, values: Values) -> None:
        self.attach(self.params, values)

    def calibration(self) -> dict[str, float]:
        return {}


def _method(problem: Task, name: str, seed: int) -> Method:
    if name == "random":
        return _Random(problem, seed)
    if name in ("tpe", "gpsampler"):
        return _Optuna(problem, name, seed)
    if name == "botorch":
        return _BoTorch(problem, seed)
    return _Study(problem, name, seed)


def _versions(method: str) -> dict[str, str]:
    packages = {"tpe": ["optuna"], "gpsampler": ["optuna", "torch"], "random": []}
    names = packages.get(method, ["botorch", "gpytorch", "torch"])
    return {name: importlib.metadata.version(name) for name in names}


def run_cell(plan: Plan) -> Cell:
    """Run one cell; CPU times leave out what a process does once, such as imports."""
    problem = task(plan.problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if plan.method not in _warm:
            _run(problem, plan, evaluations=2)
            _warm.add(plan.method)
        return _run(problem, plan, evaluations=plan.evaluations)


def _run(problem: Task, plan: Plan, evaluations: int) -> Cell:
    method = _method(problem, plan.method, plan.seed)
    seen: list[Values] = []
    quality: list[float] = []
    for params in problem.space.sobol(INITIAL, rng=plan.seed):
        values = problem.evaluate(params)
        method.attach(params, values)
        _note(problem, seen, quality, values)
    seconds = []
    for _ in range(evaluations):
        begin = time.process_time()
        params = method.ask()
        seconds.append(time.process_time() - begin)
        values = problem.evaluate(params)
        method.tell(values)
        _note(problem, seen, quality, values)
    whole = evaluations == plan.evaluations
    return Cell(
        problem=plan.problem,
        method=plan.method,
        seed=plan.seed,
        initial=INITIAL,
        quality=quality,
        ask_cpu_s=seconds,
        calibration=method.calibration() if whole else {},
        versions=_versions(plan.method),
    )


def _note(
    problem: Task, seen: list[Values], quality: list[float], values: Values
) -> Sequence[float]:
    seen.append(values)
    quality.append(float(problem.quality(seen)))
    return quality

"""The benchmark of one model: effective draws per CPU second, ours beside three peers.

Warm-up and compilation are done while a contender prepares, and reported apart. A run then takes
more draws from where the last one ended, and its time is divided by their smallest bulk ESS.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.harness.spec import (
    Agreement,
    Benchmark,
    Comparison,
    Contender,
    Fingerprint,
    Goal,
    Task,
    Workload,
)

__all__ = ["benchmark_of"]

_WARMUP = 500
_PYRO_WARMUP = 100
_PYRO_SECONDS = 30.0
_ENOUGH, _WHOLE = 400, "400 effective draws in all, CPU s"
_R_HAT, _PYRO_R_HAT, _FUNCTION_R_HAT = 1.01, 1.05, 1.1
_OURS, _PEERS = ("probkit", "torch"), ("numpyro", "blackjax", "jax", "jaxlib")


class _Run(NamedTuple):
    """Draws [chain, draw, entry] of a run, and the CPU seconds that it took."""

    draws: Any
    seconds: float


def _task(
    name: str, sample: Callable[[int], Any], facts: dict[str, float], limit: float = _R_HAT
) -> Task:
    """Make the task of a contender that is warm.

    Beside its speed it tells what 400 effective draws cost with all that preparing them did.

    Args:
        name: Model.
        sample: Takes the number of the run, returns draws [chain, draw, entry].
        facts: What preparing cost, in CPU seconds.
        limit: Largest R-hat at which a speed may be quoted.
    """
    from benchmarks.hmc._data import CHECK
    from benchmarks.hmc._ess import bulk_ess, r_hat

    numbers = itertools.count()

    def run() -> _Run:
        begin = _cpu()
        draws = sample(next(numbers))
        return _Run(draws, _cpu() - begin)

    def fingerprint(result: _Run) -> Fingerprint:
        found = r_hat(result.draws)
        if not found <= limit:
            raise RuntimeError(f"R-hat is {found:.4f}, above {limit}: no speed is quoted")
        origin, unit = CHECK[name]
        flat = result.draws.reshape(-1, result.draws.shape[-1])
        return {"mean in posterior sds": [
            (mean - o) / u for mean, o, u in zip(flat.mean(0).tolist(), origin, unit, strict=False)
        ]}  # fmt: skip

    def tell(result: _Run) -> dict[str, float]:
        ess = bulk_ess(result.draws)
        whole = sum(facts.values()) + _ENOUGH * result.seconds / ess
        return {**facts, _WHOLE: whole, "ESS of a run": ess, "R-hat": r_hat(result.draws)}

    return Task(run, fingerprint, lambda result: bulk_ess(result.draws), tell)


def _entries(name: str, values: dict[str, Any]) -> Any:
    """Lay named draws [chain, draw, *site] side by side; a network by its function on a grid."""
    import numpy as np

    arrays = {key: np.asarray(value, dtype=float) for key, value in values.items()}
    if name == "BNN 2x50":
        from benchmarks.hmc._data import BNN_GRID, network

        return network(arrays, BNN_GRID)
    order = sorted(arrays)
    return np.concatenate([arrays[k].reshape(*arrays[k].shape[:2], -1) for k in order], axis=2)


def _depth(workload: Workload) -> int:
    """Doublings of a NUTS path at most; 10 is every side's default."""
    return int(workload.get("depth", 10))


def _limit(name: str) -> float:
    return _FUNCTION_R_HAT if name == "BNN 2x50" else _R_HAT


def _probkit(kind: str, compiled: bool) -> Callable[[str, Workload, str], Task]:
    def prepare(name: str, workload: Workload, device: str) -> Task:
        import torch

        from benchmarks.hmc._native import NATIVE, data_of
        from probkit.inference import hmc
        from probkit.model import prepare as prepare_data
        from probkit.rng import stream
        from probkit.sampler import Problem

        torch.set_num_threads(1)
        model = NATIVE[name]
        problem = Problem(model, prepare_data(model, data_of(name)))
        draws, chains = int(workload["draws"]), int(workload["chains"])
        accept = float(workload["accept"]) if kind == "NUTS" else 0.8
        # Far more draws than are taken, so that the run never ends.
        options: dict[str, Any] = {"accept": accept, "chunk": 50, "compile": compiled}
        if kind == "NUTS":
            options["max_depth"] = _depth(workload)
        sampler = getattr(hmc, kind)(10**9, warmup=_WARMUP, **options)
        rngs = [stream(0, "chain", k) for k in range(chains)]
        state = sampler.init(problem, rngs=rngs)
        seconds = []
        while len(seconds) < _WARMUP // 50 + compiled:
            begin = _cpu()
            state = sampler.step(problem, state, rngs=rngs).state
            seconds.append(_cpu() - begin)
        first = sum(seconds[: 1 + compiled])
        warmup = sum(seconds[1 + compiled :])
        compiling = max(0.0, first - seconds[1 + compiled]) if compiled else 0.0
        if compiled and state["engine"] != "compiled":
            raise RuntimeError("the transitions could not be compiled here")
        facts = {"compile, CPU s": compiling, "warm-up, CPU s": warmup + first - compiling}

        def sample(number: int) -> Any:
            nonlocal state
            kept = []
            for _ in range(-(-draws // 50)):
                step = sampler.step(problem, state, rngs=rngs)
                state = step.state
                kept.append(step.keep["flat"])
            values = hmc_values(problem, torch.cat(kept, dim=1))
            return _entries(name, {k: v.numpy() for k, v in values.items()})

        return _task(name, sample, facts, _limit(name))

    return prepare


def hmc_values(problem: Any, flat: Any) -> Any:
    """Map unconstrained draws to the values of the sites."""
    from probkit.unconstrained import Unconstrained

    return Unconstrained(problem.model.sites(problem.data)).values(flat)


def _cpu() -> float:
    """CPU seconds of this process and of finished children (compilers)."""
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _numpyro(name: str, workload: Workload, device: str) -> Task:
    import jax

    jax.config.update("jax_enable_x64", True)
    from numpyro.infer import MCMC, NUTS

    from benchmarks.hmc._jax import arguments, program

    chains, draws = int(workload["chains"]), int(workload["draws"])
    kernel = NUTS(
        program(name),
        target_accept_prob=float(workload["accept"]),
        max_tree_depth=_depth(workload),
    )
    mcmc = MCMC(
        kernel,
        num_warmup=_WARMUP,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    data = arguments(name)
    begin = _cpu()
    mcmc.warmup(jax.random.PRNGKey(0), **data)
    jax.block_until_ready(mcmc.post_warmup_state)
    facts = {"warm-up, CPU s": _cpu() - begin}

    # MCMC.run would compile anew at every call; this is its loop, compiled once.
    state = mcmc.post_warmup_state

    @jax.jit
    def take(state: Any) -> Any:
        def step(state: Any, _: None) -> Any:
            state = kernel.sample(state, (), data)
            return state, state.z

        return jax.lax.scan(step, state, None, length=draws)

    values = jax.jit(jax.vmap(jax.vmap(kernel.postprocess_fn((), data))))

    def sample(number: int) -> Any:
        nonlocal state
        state, found = take(state)
        # [draw, chain, *site] -> [chain, draw, *site]
        found = jax.tree.map(lambda part: part.swapaxes(0, 1), found)
        return _entries(name, jax.block_until_ready(values(found)))

    begin = _cpu()
    sample(-1)
    first = _cpu() - begin
    begin = _cpu()
    sample(-1)
    facts["compile, CPU s"] = max(0.0, first - (_cpu() - begin))
    return _task(name, sample, facts, _limit(name))


def _blackjax(name: str, workload: Workload, device: str) -> Task:
    import blackjax
    import jax

    jax.config.update("jax_enable_x64", True)
    from numpyro.infer.util import initialize_model

    from benchmarks.hmc._jax import arguments, program

    chains, draws = int(workload["chains"]), int(workload["draws"])
    data = arguments(name)
    keys = jax.random.split(jax.random.PRNGKey(0), chains)
    start, potential, constrain, _ = initialize_model(
        keys[0], program(name), model_kwargs=data, dynamic_args=False
    )

    def log_density(z: Any) -> Any:
        return -potential(z)

    def first_point(key: Any) -> Any:
        found = initialize_model(key, program(name), model_kwargs=data, dynamic_args=False)
        return found.param_info.z

    starts = [first_point(key) for key in keys]
    start = jax.tree.map(lambda *parts: jax.numpy.stack(parts), *starts)
    adapt = blackjax.window_adaptation(
        blackjax.nuts,
        log_density,
        target_acceptance_rate=float(workload["accept"]),
        max_num_doublings=_depth(workload),
    )
    begin = _cpu()
    (states, parameters), _ = jax.jit(jax.vmap(lambda k, z: adapt.run(k, z, _WARMUP)))(keys, start)
    jax.block_until_ready(states)
    facts = {"warm-up, CPU s": _cpu() - begin}

    def one_chain(key: Any, state: Any, options: Any) -> Any:
        kernel = blackjax.nuts(log_density, **{**options, "max_num_doublings": _depth(workload)})

        def step(state: Any, key: Any) -> Any:
            state, _ = kernel.step(key, state)
            return state, state.position

        return jax.lax.scan(step, state, jax.random.split(key, draws))

    run_all = jax.jit(jax.vmap(one_chain))
    values = jax.jit(jax.vmap(jax.vmap(constrain)))

    def sample(number: int) -> Any:
        nonlocal states
        fresh = jax.random.split(jax.random.PRNGKey(1 + number), chains)
        states, found = run_all(fresh, states, parameters)
        return _entries(name, jax.block_until_ready(values(found)))

    begin = _cpu()
    sample(10_000)
    first = _cpu() - begin
    begin = _cpu()
    sample(10_001)
    facts["compile, CPU s"] = max(0.0, first - (_cpu() - begin))
    return _task(name, sample, facts, _limit(name))


def _pyro(name: str, workload: Workload, device: str) -> Task:
    """Four chains one after another; CPU seconds per effective draw do not depend on how many."""
    import numpy as np
    import pyro
    import torch
    from pyro.infer.mcmc import NUTS

    from benchmarks.hmc._native import data_of
    from benchmarks.hmc._pyro import PROGRAMS

    torch.set_num_threads(1)
    data = data_of(name)
    kernels = []
    begin = _cpu()
    for chain in range(4):
        pyro.set_rng_seed(chain)
        kernel = NUTS(
            PROGRAMS[name],
            target_accept_prob=float(workload["accept"]),
            max_tree_depth=_depth(workload),
        )
        kernel.setup(_PYRO_WARMUP, **data)
        point = kernel.initial_params
        for _ in range(_PYRO_WARMUP):
            point = kernel.sample(point)
        kernel.end_warmup()
        kernels.append([kernel, point])
    facts = {"warm-up, CPU s": _cpu() - begin}
    cap = time.process_time() + _PYRO_SECONDS

    def sample(number: int) -> Any:
        chains: list[list[Any]] = [[] for _ in kernels]
        for _ in range(150):
            for place, pair in enumerate(kernels):
                pair[1] = pair[0].sample(pair[1])
                chains[place].append(pair[1])
            if time.process_time() > cap and len(chains[0]) >= 60:
                break
        values = {}
        for site in chains[0][0]:
            back = kernels[0][0].transforms[site].inv if site in kernels[0][0].transforms else None
            stacked = torch.stack([torch.stack([p[site] for p in chain]) for chain in chains])
            values[site] = np.asarray(stacked if back is None else back(stacked))
        return _entries(name, values)

    return _task(name, sample, facts, max(_PYRO_R_HAT, _limit(name)))


_CONDITIONS = (
    "float64, one thread; 500 warm-up transitions (Pyro 100), not timed; R-hat at most 1.01 in the "
    "first run (Pyro 1.05, a network's function 1.1), else no speed is quoted.",
    "NUTS of all sides aims at the workload's acceptance, probkit's HMC at 0.8. NumPyro's and "
    "BlackJAX's chains are vectorised.",
    "Pyro runs four chains one after another, 60 to 150 draws a run (fewer after 30 CPU seconds);"
    " its seconds per effective "
    "draw are taken for 64 chains as well.",
)


def _share_of_pyro(workload: Workload) -> Goal:
    """A fifth of Pyro's time with few chains, a fiftieth with many, where batching pays."""
    if int(workload["chains"]) < 64:
        return Goal("at most a fifth of Pyro's CPU time per effective draw", 1 / 5)
    return Goal("at most a fiftieth of Pyro's CPU time per effective draw", 1 / 50)


def benchmark_of(
    name: str,
    accept: float,
    draws: Sequence[int] = (1000, 500),
    notes: Sequence[str] = (),
    depth: int | None = None,
) -> Benchmark:
    """Declare the benchmark of a model.

    Args:
        name: Model.
        accept: Acceptance that NUTS aims at, ours and theirs.
        draws: Draws a chain in a run, with 4 chains and with 64.
        notes: Further sentences for the report.
        depth: Doublings of a NUTS path at most, ours and theirs; None for the default, 10.
    """
    fixed: dict[str, int] = {} if depth is None else {"depth": depth}
    workloads = tuple(
        {"model": name, "chains": chains, "accept": accept, "draws": count, **fixed}
        for chains, count in zip((4, 64), draws, strict=True)
    )

    def bound(prepare: Callable[[str, Workload, str], Task]) -> Callable[[Workload, str], Task]:
        return functools.partial(prepare, name)

    # In posterior sds; each side's Monte Carlo error is below 0.05 by R-hat (Pyro's below 0.15).
    agree = Agreement(("mean in posterior sds",), atol=0.25)
    level = Goal("at most NumPyro's CPU time per effective draw", 1.0)
    return Benchmark(
        title=f"Effective draws: {name}",
        question=(
            "How many CPU seconds does an effective draw (smallest bulk ESS) take after warm-up, "
            "with 4 and with 64 chains?"
        ),
        workloads=workloads,
        contenders=(
            Contender("probkit NUTS", bound(_probkit("NUTS", True)), _OURS),
            Contender("probkit HMC", bound(_probkit("HMC", True)), _OURS),
            Contender("NumPyro NUTS", bound(_numpyro), _PEERS, env="numpyro"),
            Contender("BlackJAX NUTS", bound(_blackjax), _PEERS, env="numpyro"),
            Contender("Pyro NUTS", bound(_pyro), ("pyro-ppl", "torch")),
        ),
        comparisons=(
            Comparison("probkit NUTS", "NumPyro NUTS", agree, goal=level),
            Comparison("probkit HMC", "NumPyro NUTS", agree, goal=level),
            Comparison("probkit NUTS", "BlackJAX NUTS", agree),
            Comparison("probkit NUTS", "Pyro NUTS", agree, goal=_share_of_pyro),
            Comparison("probkit HMC", "Pyro NUTS", agree, goal=_share_of_pyro),
        ),
        repeats=2,
        min_seconds=0.0,
        timeout=36000.0,  # the network's warm-up with 64 chains takes half an hour
        unit="effective draw",
        notes=(*_CONDITIONS, *notes),
    )

"""The gradient that HMC needs of 16 networks at once, beside Pyro's of one after another."""

from __future__ import annotations

import math
from typing import Any

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

CHAINS, ROWS, FEATURES = 16, 50, 6
PRIOR_SD, NOISE_SD = 10.0**0.5, 0.1


def _data() -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(ROWS, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.sin(x.sum(1))


def _values(widths: list[int]) -> dict[str, Any]:
    """Weights [chain, *site] of all chains, by site."""
    import torch

    generator = torch.Generator().manual_seed(1)
    sizes = [FEATURES, *widths, 1]
    values: dict[str, Any] = {}
    for k, (wide, narrow) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        for name, shape in ((f"weight_{k}", (wide, narrow)), (f"bias_{k}", (narrow,))):
            values[name] = 0.3 * torch.randn(
                CHAINS, *shape, generator=generator, dtype=torch.float64
            )
    return values


def _fingerprint(energies: Any, gradients: Any) -> Fingerprint:
    """Energy and the gradient of the first bias, of the first and the last chain."""
    return {
        "energy": [float(energies[0]), float(energies[-1])],
        "gradient": [*gradients[0][:3].tolist(), *gradients[-1][:3].tolist()],
    }


def _ours(workload: Workload, device: str) -> Task:
    from probkit.inference.hmc.potential import Potential
    from probkit.models import BNN

    widths = [int(width) for width in str(workload["hidden"]).split("x")]
    model = BNN(hidden=tuple(widths), prior_std=PRIOR_SD, noise_var=NOISE_SD**2)
    potential = Potential(model, _data())
    position = potential.free.flatten(_values(widths))
    sites = list(potential.free.sites)

    def fingerprint(result: tuple[Any, Any]) -> Fingerprint:
        energy, gradient = result
        before = sites[: sites.index("bias_0")]
        begin = sum(math.prod(potential.free.sites[name].shape) for name in before)
        return _fingerprint(energy, gradient[:, begin : begin + 3])

    return Task(lambda: potential(position), fingerprint)


def _pyro(workload: Workload, device: str) -> Task:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer.mcmc.util import initialize_model
    from pyro.ops.integrator import potential_grad

    x, y = _data()
    widths = [int(width) for width in str(workload["hidden"]).split("x")]
    sizes = [FEATURES, *widths, 1]

    def program() -> None:
        hidden = x
        for k, (wide, narrow) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            hidden = torch.tanh(hidden) if k else hidden
            weight, bias = (
                pyro.sample(
                    name,
                    dist.Normal(x.new_zeros(shape), x.new_full(shape, PRIOR_SD)).to_event(
                        len(shape)
                    ),
                )
                for name, shape in ((f"weight_{k}", (wide, narrow)), (f"bias_{k}", (narrow,)))
            )
            hidden = hidden @ weight + bias
        law = dist.Normal(hidden.squeeze(-1), x.new_tensor(NOISE_SD))
        pyro.sample("y", law.to_event(1), obs=y)

    _, potential, _, _ = initialize_model(program, model_args=())
    values = _values(widths)
    chains = [{name: value[k] for name, value in values.items()} for k in range(CHAINS)]

    def run() -> list[tuple[dict[str, Any], Any]]:
        return [potential_grad(potential, dict(chain)) for chain in chains]

    def fingerprint(result: list[tuple[dict[str, Any], Any]]) -> Fingerprint:
        energies = [energy for _, energy in result]
        return _fingerprint(energies, [gradient["bias_0"] for gradient, _ in result])

    return Task(run, fingerprint)


BENCHMARK = Benchmark(
    title="Gradients of Bayesian networks",
    question="What does the gradient of 16 chains cost together, beside Pyro's one by one?",
    workloads=({"hidden": "50"}, {"hidden": "50x50"}),
    contenders=(
        Contender("probkit, 16 chains", _ours, ("probkit", "torch")),
        Contender("Pyro, 16 chains", _pyro, ("pyro-ppl", "torch")),
    ),
    comparisons=(
        Comparison(
            ours="probkit, 16 chains",
            peer="Pyro, 16 chains",
            agreement=Agreement(("energy", "gradient"), rtol=1e-8, atol=1e-8),
            goal=Goal("at most a tenth of Pyro's CPU time", 0.1),
        ),
    ),
    notes=(
        "50 rows of 6 features, tanh, double precision, one thread. Pyro's figure is the gradient "
        "of its own potential as its HMC kernel calls it, one chain after another, as its sampler "
        "runs chains in one process.",
    ),
)

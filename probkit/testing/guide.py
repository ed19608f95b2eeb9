"""What every guide must hold."""

# ruff: noqa: D102 (the names of tests say what they check)

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from probkit.data import convert
from probkit.files import can_pack, pack, unpack
from probkit.fingerprint import digest
from probkit.guide import HasMarginals, LogQ
from probkit.model import Batch, Values, lacks, prepare
from probkit.rng import scope, stream
from probkit.testing.state import unchanged_globals
from probkit.testing.statistics import assert_mean, z_bound
from probkit.tree import Tree, leaves, map_tensors
from probkit.unconstrained import Unconstrained

__all__ = ["GuideConformance"]


class GuideConformance:
    """Tests of a guide; subclasses name themselves ``Test...`` and supply :meth:`problem`.

    Attributes:
        seed: Root of all random numbers.
        draws: Draws of the statistical tests.
        idle: Whether a parameter may have gradient zero throughout.

    Example:
        >>> from probkit.testing import GuideConformance
        >>> class TestMyGuide(GuideConformance):
        ...     def problem(self):
        ...         return MyGuide(), MyModel(), data
    """

    seed: int = 0
    draws: int = 4000
    idle: bool = False

    def problem(self) -> tuple[Any, Any, Any]:
        """Return (guide, model, small data set)."""
        raise TypeError(f"{type(self).__name__} must supply problem() -> (guide, model, data)")

    def params(self, guide: Any, model: Any, data: Any) -> Tree:
        """Return the parameters that are tested: those of ``init``, moved a little at random."""
        generator = stream(self.seed, "move")

        def move(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            return tensor + 0.1 * noise.to(tensor.device)

        return map_tensors(move, guide.init(model, data, rng=self.seed))

    # ---------------------------------------------------------------- shared steps

    def ready(self) -> tuple[Any, Any, Any, Tree]:
        """Return guide, model, prepared data and parameters."""
        guide, model, data = self.problem()
        data = prepare(model, convert(data).data)
        params = map_tensors(Tensor.detach, self.params(guide, model, data))
        return guide, model, data, params

    def sample(self, n: int, *, rng: Any = None) -> tuple[Values, LogQ]:
        """Draw without gradients."""
        guide, model, data, params = self.ready()
        source = stream(self.seed, "sample") if rng is None else rng
        with torch.no_grad():
            result: tuple[Values, LogQ] = guide.sample(params, model, Batch(data), n, rng=source)
        return result

    def flat(self, values: Values) -> tuple[Unconstrained, Tensor]:
        """Return the map to the reals and the flat draws [n, size]; skips discrete sites."""
        _, model, data, _ = self.ready()
        sites = {name: site for name, site in model.sites(data).items() if name in values}
        if any(site.discrete for site in sites.values()):
            pytest.skip("discrete sites have no flat form")
        free = Unconstrained(sites)
        return free, free.flatten(values)

    # ---------------------------------------------------------------- parameters and draws

    def test_parameters_are_a_storable_tree(self) -> None:
        guide, model, data, _ = self.ready()
        params = guide.init(model, data, rng=self.seed)
        assert all(bool(torch.isfinite(t).all()) for t in leaves(params) if isinstance(t, Tensor))
        assert digest(guide.init(model, data, rng=self.seed)) == digest(params)
        assert digest(unpack(*pack(params))) == digest(params)

    def test_options_are_storable(self) -> None:
        guide = self.problem()[0]
        if not can_pack(guide):
            pytest.skip("the guide is passed to load again")
        assert digest(unpack(*pack(guide))) == digest(guide)

    def test_draws_have_the_shape_of_the_sites(self) -> None:
        _, model, data, _ = self.ready()
        values, log_q = self.sample(5)
        for name, site in model.sites(data).items():
            assert values[name].shape == (5, *site.shape), name
            assert bool(site.support.check(values[name]).all()), name
        assert log_q.global_.shape == log_q.local.shape == (5,)
        assert bool(torch.isfinite(log_q.total()).all())

    def test_the_seed_decides_the_draws(self) -> None:
        first, second = self.sample(3, rng=7), self.sample(3, rng=8)
        assert digest(self.sample(3, rng=7)) == digest(first)
        assert digest(second) != digest(first)

    def test_a_generator_moves_on(self) -> None:
        generator = stream(self.seed, "twice")
        first = self.sample(3, rng=generator)
        assert digest(self.sample(3, rng=generator)) != digest(first)

    def test_nothing_but_the_result_is_left(self) -> None:
        guide, model, data, params = self.ready()
        before = digest([guide, model, data, params])
        self.sample(2)
        with unchanged_globals():
            guide.init(model, data, rng=self.seed)
            guide.sample(params, model, Batch(data), 2, rng=1)
        assert digest([guide, model, data, params]) == before

    # ---------------------------------------------------------------- densities

    def test_log_q_is_the_density_of_the_draws(self) -> None:
        """E_q[f p / q] = E_p[f] for a normal p fitted to other draws and narrowed by a tenth.

        The functions f are 1, and the standardised entries and their squares.
        """
        values, log_q = self.sample(self.draws)
        free, flat = self.flat(values)
        if not free.size:
            pytest.skip("no sites")
        _, pilot = self.flat(self.sample(self.draws, rng=stream(self.seed, "pilot"))[0])
        covariance = torch.atleast_2d(pilot.double().T.cov())
        law = MultivariateNormal(pilot.double().mean(0), 0.81 * covariance)
        _, log_det = free.constrain(flat)
        log_ratio = law.log_prob(flat.double()) - log_det - log_q.total()
        ratio = log_ratio.exp()
        ess = ratio.sum().square() / ratio.square().sum()
        assert ess > 0.05 * self.draws, "the fitted normal is too far from the guide to compare"
        standard = (flat - law.mean) / law.variance.sqrt()
        terms = torch.cat([ratio[:, None] - 1, ratio[:, None] * standard], 1)
        terms = torch.cat([terms, ratio[:, None] * (standard.square() - 1)], 1)
        assert_mean(terms, 0.0, "E_q[f p / q] - E_p[f]")

    def test_gradients_reach_every_parameter(self) -> None:
        guide, model, data, params = self.ready()
        params = map_tensors(lambda t: t.clone().requires_grad_(t.is_floating_point()), params)
        wanted = [t for t in leaves(params) if isinstance(t, Tensor) and t.requires_grad]
        if not wanted:
            pytest.skip("nothing to fit")
        values, log_q = guide.sample(params, model, Batch(data), 3, rng=1)
        total = log_q.total().sum() + sum(v.square().sum() for v in values.values())
        for tensor, gradient in zip(
            wanted, torch.autograd.grad(total, wanted, allow_unused=True), strict=True
        ):
            assert gradient is not None, f"no gradient for a parameter {tuple(tensor.shape)}"
            assert bool(torch.isfinite(gradient).all())
            assert self.idle or not tensor.numel() or bool((gradient != 0).any())

    def test_marginals_agree_with_draws(self) -> None:
        guide, model, data, params = self.ready()
        if not isinstance(guide, HasMarginals):
            pytest.skip("the guide states no marginals")
        laws = guide.marginals(params, model, data)
        with torch.no_grad(), scope(rng=stream(self.seed, "laws")):
            direct = {name: law.sample(torch.Size([self.draws])) for name, law in laws.items()}
        values, _ = self.sample(self.draws)
        _, ours = self.flat({name: values[name] for name in laws})
        _, theirs = self.flat(direct)
        for power in (1, 2):  # Mean and spread of the flat entries.
            a, b = ((x - ours.mean(0)) ** power for x in (ours.double(), theirs.double()))
            error = ((a.var(0) + b.var(0)) / self.draws).sqrt()
            z = float(((a.mean(0) - b.mean(0)).abs() / error).max())
            assert z <= z_bound(ours.shape[1]), f"moment {power} of a marginal: |z| = {z:.1f}"

    def test_minibatches_scale_local_terms_without_bias(self) -> None:
        guide, model, data, params = self.ready()
        if lacks(model, ("plate_size", "minibatch")):
            pytest.skip("the model has no plate of units")
        local = [name for name, site in model.sites(data).items() if site.plate is not None]
        size = model.plate_size(data)
        n = max(50, self.draws // size)
        with torch.no_grad():
            whole = guide.sample(params, model, Batch(data), n, rng=1)[1].total()
            parts = []
            for unit in range(size):
                batch = model.minibatch(data, torch.tensor([unit]))
                values, log_q = guide.sample(params, model, batch, n, rng=stream(2, unit))
                assert all(values[name].shape[:2] == (n, 1) for name in local)
                parts.append(log_q.total(batch.scale))
        # One term per unit, each an average over its own draws, together the whole in the mean.
        mean = torch.stack(parts).mean()
        error = (torch.stack(parts).var(1).sum() / size**2 / n + whole.var() / n).sqrt()
        gap = (mean - whole.mean()).abs()
        assert float(gap) <= z_bound() * float(error) + 1e-9

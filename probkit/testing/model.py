"""What every model must hold."""

# ruff: noqa: D102 (the names of tests say what they check)

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.distributions.constraints import Constraint

from probkit.data import convert
from probkit.density import initial_values, log_joint_of
from probkit.driver import infer
from probkit.errors import CapabilityError, DataError
from probkit.files import can_pack
from probkit.fingerprint import digest
from probkit.model import Model, Site, Values, lacks, prepare
from probkit.posterior import Posterior, load
from probkit.predictive import Empirical, Predictive
from probkit.rng import stream
from probkit.testing.state import unchanged_globals
from probkit.testing.statistics import assert_mean, z_bound
from probkit.tree import leaves, map_tensors
from probkit.unconstrained import Unconstrained

__all__ = ["ModelConformance"]

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


class ModelConformance:
    """Tests of a model; subclasses name themselves ``Test...`` and supply :meth:`problem`.

    Attributes:
        seed: Root of all random numbers.
        latents: Names that ``predict(site=)`` knows.
        allows_missing: Whether NaN in the data means "not observed".
        prior_draws: Data sets that are simulated to test the log joint; ten times as many draws
            test the prior.

    Example:
        >>> from probkit.testing import ModelConformance
        >>> class TestLine(ModelConformance):
        ...     def problem(self):
        ...         return Line(), (x, y), x[:3]
    """

    seed: int = 0
    latents: tuple[str, ...] = ()
    allows_missing: bool = False
    prior_draws: int = 400

    # ---------------------------------------------------------------- what a subclass supplies

    def problem(self) -> tuple[Any, Any, Any]:
        """Return (model, small data set, new inputs for predict and simulate)."""
        raise TypeError(f"{type(self).__name__} must supply problem() -> (model, data, x_new)")

    def sampler(self) -> Any:
        """Return the sampler of the posterior that predictions are tested on; None: the default."""
        return None

    def guide(self) -> Any:
        """Return the guide for it, where it takes one."""
        return None

    def dataset(self, values: Values, data: Any, index: int) -> tuple[Values, Any]:
        """Return pair ``index`` of what ``sample_dataset`` gave, in the form that the model takes.

        By default the leading dim of every tensor counts the data sets.
        """
        return map_tensors(lambda t: t[index], (dict(values), data))

    # ---------------------------------------------------------------- shared steps

    def ready(self) -> tuple[Any, Any]:
        """Return the model and its data, converted and prepared."""
        model, data, _ = self.problem()
        return model, prepare(model, convert(data).data)

    def values(self, n: int) -> dict[str, Tensor]:
        """Return ``n`` different values [n, *site]: starting points, or draws of the prior."""
        model, data = self.ready()
        generator = stream(self.seed, "values")
        sites = model.sites(data)
        if any(site.discrete for site in sites.values()):
            self.need(model, "sample_prior")
            return dict(model.sample_prior(n, rng=generator))
        return initial_values(model, data, sites, n, rng=generator)

    def need(self, model: Any, *methods: str) -> None:
        """Skip the test unless the model has the methods."""
        missing = lacks(model, methods)
        if missing:
            pytest.skip(f"{type(model).__name__} has no {', '.join(missing)}")

    def continuous(self) -> tuple[Any, Any, Mapping[str, Site]]:
        """Return model, data and sites, skipping models without continuous sites."""
        model, data = self.ready()
        sites = model.sites(data)
        if not sites or any(site.discrete for site in sites.values()):
            pytest.skip("needs sites, all of them continuous")
        return model, data, sites

    def posterior(self) -> Posterior:
        """Return the posterior, fitted once for each class."""
        cls: Any = type(self)
        return _fitted(cls)

    def fit(self) -> Posterior:
        """Run ``infer`` once."""
        model, data, _ = self.problem()
        return infer(model, data, self.sampler(), guide=self.guide(), rng=self.seed)

    def predictive(self, post: Posterior | None = None, **options: Any) -> Predictive:
        """Predict at the new inputs, skipping models that cannot."""
        post = post or self.posterior()
        try:
            return post.predict(self.problem()[2], rng=self.seed, **options)
        except CapabilityError as error:
            pytest.skip(str(error))

    # ---------------------------------------------------------------- sites and data

    def test_sites_are_well_formed(self) -> None:
        model, data = self.ready()
        sites = model.sites(data)
        assert isinstance(sites, Mapping)
        plates: dict[str, int] = {}
        for name, site in sites.items():
            assert isinstance(name, str) and isinstance(site, Site), name
            assert isinstance(site.support, Constraint), name
            assert site.discrete == bool(getattr(site.support, "is_discrete", False)), name
            if site.plate is not None:
                assert site.shape, f"{name}: a local site has its plate as leading dim"
                assert plates.setdefault(site.plate, site.shape[0]) == site.shape[0], name
        assert {k: (v.shape, v.dims) for k, v in model.sites(data).items()} == {
            k: (v.shape, v.dims) for k, v in sites.items()
        }

    def test_coords_match_the_sites(self) -> None:
        model, data = self.ready()
        coords = getattr(model, "coords", {})
        for name, site in model.sites(data).items():
            for dim, size in zip(site.dims, site.shape, strict=True):
                if dim in coords:
                    assert len(coords[dim]) == size, f"{name}: coords of {dim!r}"

    def test_values_lie_in_the_supports(self) -> None:
        model, data = self.ready()
        sites = model.sites(data)
        if not sites:
            pytest.skip("no sites")
        for name, value in self.values(4).items():
            assert value.shape == (4, *sites[name].shape), name
            assert bool(sites[name].support.check(value).all()), name

    def test_arrays_and_frames_count_as_tensors(self) -> None:
        model, data, _ = self.problem()
        if not any(isinstance(leaf, Tensor) for leaf in leaves(data)):
            pytest.skip("the data holds no tensors in the open")
        expected = digest(prepare(model, convert(data).data))
        for turn in (lambda t: t.numpy(), _frame):
            assert digest(prepare(model, convert(map_tensors(turn, data)).data)) == expected

    def test_nan_is_refused_by_its_place(self) -> None:
        model, data, _ = self.problem()
        if self.allows_missing:
            pytest.skip("NaN means missing here")
        if getattr(type(model), "prepare", Model.prepare) is Model.prepare:
            pytest.skip("the model checks nothing")
        places = [i for i, leaf in enumerate(leaves(data)) if _is_float(leaf)]
        if not places:
            pytest.skip("the data holds no floating tensors in the open")
        for place in places:
            broken, where = _with_nan(data, place)
            with pytest.raises(DataError) as caught:
                prepare(model, convert(broken).data)
            text = str(caught.value)
            assert re.search("nan|finite", text, re.IGNORECASE), text
            named = set(re.findall(r"\d+", text)) & {str(i) for i in where}
            assert named or not where, f"names no place of {where}: {text}"

    # ---------------------------------------------------------------- densities

    def test_log_joint_of_one_point_is_a_scalar(self) -> None:
        model, data = self.ready()
        self.need(model, "log_joint")
        point = {name: value[0] for name, value in self.values(2).items()}
        assert model.log_joint(point, data).shape == ()

    def test_log_joint_of_many_points_is_that_of_each(self) -> None:
        model, data = self.ready()
        self.need(model, "log_joint")
        values = self.values(6)
        if not values:
            pytest.skip("no sites")
        each = [model.log_joint({k: v[i] for k, v in values.items()}, data) for i in range(6)]
        torch.testing.assert_close(log_joint_of(model, values, data), torch.stack(each))
        if getattr(model, "batched", False):
            grid = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in values.items()}
            result = model.log_joint(grid, data)
            torch.testing.assert_close(result, torch.stack(each).reshape(2, 3))

    def test_gradient_is_that_of_differences(self) -> None:
        model, data, sites = self.continuous()
        self.need(model, "log_joint")
        free = Unconstrained(sites)
        flat = free.flatten({k: v[:1] for k, v in self.values(2).items()})
        if flat.dtype != torch.float64:
            pytest.skip("central differences need float64")

        def function(x: Tensor) -> Tensor:
            return log_joint_of(model, free.values(x), data)

        point = flat.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(point).sum(), point)
        assert bool(torch.isfinite(gradient).all())
        chosen = torch.randperm(free.size, generator=stream(self.seed, "entries"))[:12]
        width = 1e-5
        steps = width * torch.eye(free.size, dtype=flat.dtype)[chosen]
        with torch.no_grad():
            rise = function(flat + steps) - function(flat - steps)
            size = function(flat).abs()
        # Rounding of both values over 2 h, and a curvature term of order h^2.
        atol = float(1e-14 * (1 + size) / width) + 1e-7
        torch.testing.assert_close(gradient[0, chosen], rise / (2 * width), rtol=1e-5, atol=atol)

    def test_pointwise_likelihood_adds_up(self) -> None:
        model, data = self.ready()
        self.need(model, "log_likelihood", "pointwise_log_likelihood")
        values = self.values(3)
        total = model.log_likelihood(values, data)
        assert total.shape == (3,)
        parts = model.pointwise_log_likelihood(values, data)
        summed = sum(part.reshape(3, -1).sum(1) for part in parts.values())
        torch.testing.assert_close(summed, total)

    def test_minibatches_average_to_the_whole(self) -> None:
        model, data = self.ready()
        self.need(model, "log_joint", "plate_size", "minibatch")
        size = model.plate_size(data)
        sites = model.sites(data)
        values = {k: v[0] for k, v in self.values(2).items()}
        terms = []
        for unit in range(size):
            batch = model.minibatch(data, torch.tensor([unit]))
            assert batch.scale == pytest.approx(size)
            own = {k: v[[unit]] if sites[k].plate is not None else v for k, v in values.items()}
            terms.append(model.log_joint(own, batch.data, scale=batch.scale))
        torch.testing.assert_close(torch.stack(terms).mean(), model.log_joint(values, data))

    def test_prior_draws_follow_the_density(self) -> None:
        """Draws of the prior against log joint minus log likelihood."""
        model, data, sites = self.continuous()
        self.need(model, "log_joint", "sample_prior", "log_likelihood")
        free = Unconstrained(sites)
        draws = model.sample_prior(10 * self.prior_draws, rng=stream(self.seed, "prior"))

        def log_prior(flat: Tensor) -> Tensor:
            values, log_det = free.constrain(flat)
            joint = log_joint_of(model, values, data)
            return joint - model.log_likelihood(values, data) + log_det

        _assert_draws_of(log_prior, free.flatten(draws), "draws of the prior")

    def test_simulated_pairs_follow_the_log_joint(self) -> None:
        """Values and data drawn together against the log joint."""
        model, _, _ = self.continuous()
        self.need(model, "log_joint", "sample_dataset")
        values, sets = model.sample_dataset(self.prior_draws, rng=stream(self.seed, "joint"))
        terms = []
        for i in range(self.prior_draws):
            point, data = self.dataset(values, sets, i)
            free = Unconstrained(model.sites(data))

            def log_p(flat: Tensor, free: Unconstrained = free, data: Any = data) -> Tensor:
                constrained, log_det = free.constrain(flat)
                return log_joint_of(model, constrained, data) + log_det

            terms.append(_identities(log_p, free.flatten(point)[None]))
        assert_mean(torch.cat(terms), 0.0, "values and data drawn together")

    # ---------------------------------------------------------------- simulation

    def test_prior_draws_have_the_shape_of_the_sites(self) -> None:
        model, data = self.ready()
        self.need(model, "sample_prior")
        draws = model.sample_prior(5, rng=1)
        sites = model.sites(data)
        assert set(draws) == set(sites)
        for name, value in draws.items():
            assert value.shape == (5, *sites[name].shape), name
            assert bool(sites[name].support.check(value).all()), name
        assert digest(model.sample_prior(5, rng=1)) == digest(draws)
        assert not draws or digest(model.sample_prior(5, rng=2)) != digest(draws)

    def test_simulate_gives_one_data_set_for_each_value(self) -> None:
        model, _ = self.ready()
        self.need(model, "simulate")
        x = self.problem()[2]
        values = self.values(3)
        with unchanged_globals():
            simulated = model.simulate(values, x, rng=1)
        assert all(len(leaf) == 3 for leaf in leaves(simulated) if isinstance(leaf, Tensor))
        assert digest(model.simulate(values, x, rng=1)) == digest(simulated)
        assert digest(model.simulate(values, x, rng=2)) != digest(simulated)

    # ---------------------------------------------------------------- posterior and predictions

    def test_nothing_but_the_result_is_left(self) -> None:
        model, data, x = self.problem()
        before = digest([model, data, x])
        post = self.posterior()  # Loads what is loaded on first use.
        with unchanged_globals():
            again = infer(model, data, self.sampler(), guide=self.guide(), rng=self.seed)
            if not lacks(model, ("predict",)):
                self.predictive(again)
        assert digest([model, data, x]) == before, "model, data or inputs were changed"
        assert digest(again.source) == digest(post.source), "the same seed gave another result"

    def test_mean_variance_and_sample_have_one_shape(self) -> None:
        prediction = self.predictive()
        draws = prediction.sample(7, rng=1)
        if not isinstance(draws, Tensor):
            pytest.skip("the predicted quantity is not numeric")
        assert draws.shape[0] == 7
        assert prediction.mean.shape == prediction.variance.shape == draws.shape[1:]
        assert bool((prediction.variance >= 0).all())
        assert digest(prediction.sample(7, rng=1)) == digest(draws)

    def test_quantile_inverts_the_cdf(self) -> None:
        prediction = self.predictive()
        try:
            quantiles = prediction.quantile(LEVELS)
        except CapabilityError as error:
            pytest.skip(str(error))
        shape = quantiles.shape[1:]
        assert quantiles.shape[0] == len(LEVELS)
        assert bool((quantiles.diff(dim=0) >= 0).all())
        assert prediction.quantile(0.5).shape == shape
        draws = prediction.sample(4, rng=1)
        if not draws.is_floating_point():
            pytest.skip("a discrete quantile is no inverse")
        reached = torch.stack([prediction.cdf(q) for q in quantiles])
        levels = torch.tensor(LEVELS, dtype=reached.dtype).reshape(-1, *[1] * len(shape))
        coarse = isinstance(prediction, Empirical)
        atol = 2 / len(prediction.values) if coarse else 1e-5  # type: ignore[attr-defined]
        torch.testing.assert_close(reached, levels.expand_as(reached), rtol=0, atol=atol)

    def test_draws_fall_below_quantiles_as_often_as_stated(self) -> None:
        prediction = self.predictive()
        try:
            quantiles = prediction.quantile(LEVELS)
        except CapabilityError as error:
            pytest.skip(str(error))
        n = 2000
        draws = prediction.sample(n, rng=3)
        if not draws.is_floating_point():
            pytest.skip("discrete")
        below = torch.stack([(draws <= q).double().mean(0) for q in quantiles])
        levels = torch.tensor(LEVELS, dtype=torch.float64).reshape(-1, *[1] * (below.ndim - 1))
        # Quantiles of draws lie between two of them.
        slack = 1 / len(prediction.values) if isinstance(prediction, Empirical) else 0.0
        gap = ((below - levels).abs() - slack).clamp_min(0)
        z = gap / (levels * (1 - levels) / n).sqrt()
        assert float(z.max()) <= z_bound(z.numel())

    def test_log_prob_of_draws_is_finite(self) -> None:
        prediction = self.predictive()
        try:
            density = prediction.log_prob(prediction.sample(3, rng=1)[0])
        except CapabilityError as error:
            pytest.skip(str(error))
        assert bool(torch.isfinite(density).all())

    def test_joint_prediction_has_the_same_margins(self) -> None:
        separate, joint = self.predictive(), self.predictive(joint=True)
        if isinstance(separate, Empirical):
            pytest.skip("draws are joint already")
        torch.testing.assert_close(joint.mean, separate.mean)
        torch.testing.assert_close(joint.variance, separate.variance)
        torch.testing.assert_close(
            joint.quantile(LEVELS), separate.quantile(LEVELS), rtol=1e-5, atol=1e-6
        )

    def test_latents_can_be_predicted(self) -> None:
        if not self.latents:
            pytest.skip("no latents are named")
        for site in self.latents:
            prediction = self.predictive(site=site)
            assert prediction.sample(3, rng=1).shape[1:] == prediction.mean.shape, site

    def test_a_saved_posterior_is_the_same(self, tmp_path: Path) -> None:
        post = self.posterior()
        post.save(tmp_path)
        back = load(tmp_path, None if can_pack(post.model) else post.model, self.guide())
        assert digest(back.source) == digest(post.source)
        assert digest(back.log_evidence) == digest(post.log_evidence)
        if not lacks(post.model, ("predict",)):
            expected, found = self.predictive(post), self.predictive(back)
            assert digest(found.sample(3, rng=1)) == digest(expected.sample(3, rng=1))


@functools.cache
def _fitted(cls: Any) -> Posterior:
    post: Posterior = cls().fit()
    return post


def _identities(log_p: Callable[[Tensor], Tensor], flat: Tensor) -> Tensor:
    """Terms [draw, *] that average to zero for draws x of a smooth density.

    They are s, x s + 1 (Stein) and s^2 + ds/dx (Bartlett) for the score s = d log p / dx of every
    entry; the last by central differences of the score.
    """

    def score(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(log_p(x).sum(), x)
        return gradient

    n, size = flat.shape
    width = 1e-4
    steps = width * torch.eye(size, dtype=flat.dtype, device=flat.device)
    moved = torch.stack([flat + sign * step for step in steps for sign in (1, -1)])
    all_scores = score(torch.cat([flat, moved.reshape(-1, size)]))
    own = all_scores[:n]
    around = all_scores[n:].reshape(size, 2, n, size)
    rise = (around[:, 0] - around[:, 1]).diagonal(dim1=0, dim2=2) / (2 * width)
    return torch.cat([own, flat * own + 1, own.square() + rise], 1).detach()


def _assert_draws_of(log_p: Callable[[Tensor], Tensor], flat: Tensor, what: str) -> None:
    assert_mean(_identities(log_p, flat), 0.0, what)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def _frame(tensor: Tensor) -> Any:
    """A table as a frame, a vector as a series, anything else as an array."""
    if tensor.ndim == 2:
        return pd.DataFrame(tensor.numpy())
    if tensor.ndim == 1:
        return pd.Series(tensor.numpy())
    return np.asarray(tensor)


def _with_nan(data: Any, place: int) -> tuple[Any, tuple[int, ...]]:
    """Copy ``data`` with the last entry of leaf number ``place`` NaN; returns where it lies."""
    target = leaves(data)[place]
    where = tuple(size - 1 for size in target.shape)

    def spoil(tensor: Tensor) -> Tensor:
        if tensor is not target:
            return tensor
        broken = tensor.clone()
        broken[where] = torch.nan
        return broken

    return map_tensors(spoil, data), where

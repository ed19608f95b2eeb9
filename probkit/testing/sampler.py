"""What every sampler must hold."""

# ruff: noqa: D102 (the names of tests say what they check)

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from probkit.checkpoint import Checkpoint
from probkit.data import convert, device_of
from probkit.driver import infer
from probkit.errors import CapabilityError, DataError
from probkit.files import can_pack, pack, unpack
from probkit.fingerprint import digest
from probkit.model import prepare
from probkit.posterior import Posterior, load
from probkit.rng import stream
from probkit.sampler import Info, Problem, check_fit
from probkit.sources import Closed, Draws, Fitted, Population
from probkit.testing.state import unchanged_globals
from probkit.testing.statistics import batch_means, z_bound

__all__ = ["SamplerConformance"]

Moments = Mapping[str, tuple[Any, Any]]


class SamplerConformance:
    """Tests of a sampler; subclasses name themselves ``Test...`` and supply :meth:`problem`.

    Attributes:
        seed: Root of all random numbers.
        stops: Most positions at which a run is stopped and resumed; all, where there are fewer.
        bias: Deviation of means and standard deviations that is no error of the sampler, in
            posterior standard deviations (an optimiser's distance from its optimum, say).
        moment_chains: Chains of the test of moments.

    Example:
        >>> from probkit.testing import SamplerConformance
        >>> class TestMySampler(SamplerConformance):
        ...     def problem(self):
        ...         return MySampler(steps=200), MyModel(), data
        ...     def moments(self):
        ...         return {"mu": (exact_mean, exact_sd)}
    """

    seed: int = 0
    stops: int = 12
    bias: float = 0.0
    moment_chains: int = 4

    # ---------------------------------------------------------------- what a subclass supplies

    def problem(self) -> tuple[Any, Any, Any]:
        """Return (sampler, model, small data set); a run should take well under a second."""
        raise TypeError(f"{type(self).__name__} must supply problem() -> (sampler, model, data)")

    def guide(self) -> Any:
        """Return the guide for the run, where it takes one."""
        return None

    def moments(self) -> Moments | None:
        """Return {site: (mean, standard deviation)} of the exact posterior; None if unknown."""
        return None

    def precise(self) -> Any:
        """Return the sampler of the test of moments; by default the one of :meth:`problem`."""
        return self.problem()[0]

    # ---------------------------------------------------------------- shared steps

    def run(self, **options: Any) -> Posterior:
        """Call ``infer`` on the problem."""
        sampler, model, data = self.problem()
        return infer(model, data, sampler, guide=self.guide(), **{"rng": self.seed, **options})

    def reference(self) -> tuple[Posterior, list[Info]]:
        """Return the uninterrupted run of two chains and what its callback saw."""
        cls: Any = type(self)
        return _reference(cls)

    def is_random(self) -> bool:
        """Whether different streams are expected to give different results."""
        post, _ = self.reference()
        closed = isinstance(post.source, Closed) and not post.source.hyper
        return not (closed or post.is_point_estimate or isinstance(post.source, Closed))

    # ---------------------------------------------------------------- options and fit

    def test_options_are_frozen_and_storable(self) -> None:
        sampler = self.problem()[0]
        assert dataclasses.is_dataclass(sampler)
        name = dataclasses.fields(sampler)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(sampler, name, getattr(sampler, name))
        assert digest(unpack(*pack(sampler))) == digest(sampler)

    def test_needs_name_methods_and_are_checked(self) -> None:
        sampler, model, data = self.problem()
        assert sampler.needs and all(isinstance(name, str) for name in sampler.needs)
        check_fit(model, sampler, None)
        for name in set(sampler.needs) - {"sites"}:
            with pytest.raises(CapabilityError, match=f"{name}.*Samplers that fit"):
                infer(_Without(model, name), data, sampler, guide=self.guide(), rng=0)

    def test_a_guide_is_refused_where_it_has_no_use(self) -> None:
        sampler, model, data = self.problem()
        if getattr(sampler, "accepts_guide", False):
            pytest.skip("takes a guide")
        from probkit.inference import MeanField

        with pytest.raises(CapabilityError, match="no use for guide=MeanField"):
            infer(model, data, sampler, guide=MeanField(), rng=0)

    def test_a_step_leaves_the_old_state_alone(self) -> None:
        sampler, model, data = self.problem()
        data = prepare(model, convert(data).data)
        problem = Problem(model, data, self.guide())
        width = getattr(sampler, "block", 1) or 2
        rngs = [stream(self.seed, k, device=device_of(data)) for k in range(width)]
        state = sampler.init(problem, rngs=rngs)
        for _ in range(4):
            before, places = digest(state), [g.get_state() for g in rngs]
            first = sampler.step(problem, state, rngs=rngs)
            assert digest(state) == before, "step changed the state it was given"
            kept = digest([first.state, first.keep])
            after = [g.get_state() for g in rngs]
            for generator, place in zip(rngs, places, strict=True):
                generator.set_state(place)
            second = sampler.step(problem, state, rngs=rngs)
            assert digest([second.state, second.keep]) == kept, "a step depends on hidden state"
            for generator, place in zip(rngs, after, strict=True):
                generator.set_state(place)
            if first.done:
                break
            state = first.state

    # ---------------------------------------------------------------- chains and seeds

    def test_the_seed_decides_the_result(self) -> None:
        post, _ = self.reference()
        assert _content(self.run(chains=2)) == _content(post)
        if self.is_random():
            assert _content(self.run(chains=2, rng=self.seed + 1)) != _content(post)

    def test_a_chain_is_the_same_alone_and_among_others(self) -> None:
        post, _ = self.reference()
        if post.chains != 2:
            pytest.skip("the source counts no chains")
        if getattr(self.problem()[0], "block", 1) is None:
            pytest.skip("one state carries all chains")
        alone = self.run(chains=1)
        if alone.chains != 1 or not _has_chains(post):
            pytest.skip("chains end in one closed form")
        assert digest(_chain(alone, 0)) == digest(_chain(post, 0))
        if self.is_random():
            assert digest(_chain(post, 1)) != digest(_chain(post, 0)), "chains are copies"

    def test_an_executor_changes_nothing(self) -> None:
        post, _ = self.reference()
        with ThreadPoolExecutor(2) as executor:
            assert _content(self.run(chains=2, executor=executor)) == _content(post)

    # ---------------------------------------------------------------- steps

    def test_callbacks_are_told_sane_things(self) -> None:
        _, seen = self.reference()
        assert [info.step for info in seen] == list(range(1, len(seen) + 1))
        assert len({info.total for info in seen}) == 1
        assert all(info.total is None or info.step <= info.total for info in seen)
        assert [info.done for info in seen] == [False] * (len(seen) - 1) + [True]
        assert all(b.kept >= a.kept >= 0 for a, b in zip(seen, seen[1:], strict=False))
        assert all(b.seconds >= a.seconds for a, b in zip(seen, seen[1:], strict=False))
        assert all(isinstance(v, float) for info in seen for v in info.stats.values())

    def test_a_stopped_run_resumes_to_the_same_bits(self, tmp_path: Path) -> None:
        post, seen = self.reference()
        steps = range(1, len(seen))
        chosen = steps if len(steps) <= self.stops else steps[:: -(-len(steps) // self.stops)]
        for stop in chosen:
            plan = Checkpoint(tmp_path / str(stop), seconds=1e9)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Few draws, no convergence: so early, yes.
                    part = self.run(chains=2, checkpoint=plan, callbacks=[_stop_at(stop)])
            except DataError as error:
                assert "before there was a draw" in str(error)
            else:
                assert part.attrs["complete"] is False
                assert part.attrs["stopped_by"] == "callback"
            again: list[Info] = []
            whole = self.run(chains=2, checkpoint=plan, callbacks=[again.append])
            assert again[0].step == stop + 1, "the run began anew"
            assert _content(whole) == _content(post), f"resumed at step {stop}"

    def test_a_finished_run_is_not_run_again(self, tmp_path: Path) -> None:
        post, _ = self.reference()
        assert _content(self.run(chains=2, checkpoint=tmp_path)) == _content(post)
        seen: list[Info] = []
        again = self.run(chains=2, checkpoint=tmp_path, callbacks=[seen.append])
        assert not seen and _content(again) == _content(post)

    # ---------------------------------------------------------------- results

    def test_the_run_is_on_record(self) -> None:
        sampler, model, _ = self.problem()
        attrs = self.reference()[0].attrs
        assert attrs["algorithm"] == type(sampler).__name__
        assert attrs["model"] == type(model).__name__
        assert (attrs["seed"], attrs["chains"]) == (self.seed, 2)
        assert attrs["complete"] is True and attrs["seconds"] > 0
        assert set(attrs["options"]) == {f.name for f in dataclasses.fields(sampler)}
        assert {"probkit", "torch"} <= set(attrs["versions"])

    def test_draws_are_named_by_chain_and_draw(self) -> None:
        post, _ = self.reference()
        sampler, model, data = self.problem()
        sites = model.sites(prepare(model, convert(data).data))
        for name, value in post.draws.items():
            assert value.shape[0] == post.chains, name
            if name in sites:
                assert value.shape[2:] == sites[name].shape, name
                assert bool(sites[name].support.check(value).all()), name
        if post.log_evidence is not None and post.chains == 2:
            assert post.log_evidence.value.shape == (2,)
        for name, stat in post.sample_stats.items():
            assert stat.shape[0] == post.chains, name

    def test_nothing_but_the_result_is_left(self) -> None:
        sampler, model, data = self.problem()
        self.reference()
        before = digest([sampler, model, data])
        with unchanged_globals():
            infer(model, data, sampler, guide=self.guide(), rng=self.seed)
        assert digest([sampler, model, data]) == before

    def test_a_saved_posterior_is_the_same(self, tmp_path: Path) -> None:
        post, _ = self.reference()
        post.save(tmp_path)
        back = load(tmp_path, None if can_pack(post.model) else post.model, self.guide())
        assert _content(back) == _content(post)

    def test_moments_are_exact(self) -> None:
        exact = self.moments()
        if exact is None:
            pytest.skip("no exact moments are given")
        _, model, data = self.problem()
        post = infer(
            model,
            data,
            self.precise(),
            guide=self.guide(),
            rng=self.seed,
            chains=self.moment_chains,
        )
        if post.is_point_estimate:
            pytest.skip("an optimum has no moments")
        for name, (mean, sd) in exact.items():
            _check_moments(name, post, torch.as_tensor(mean), torch.as_tensor(sd), self.bias)


@functools.cache
def _reference(cls: Any) -> tuple[Posterior, list[Info]]:
    seen: list[Info] = []
    return cls().run(chains=2, callbacks=[seen.append]), seen


class _Without:
    """A model without one of its methods."""

    def __init__(self, model: Any, name: str) -> None:
        self._model, self._name = model, name

    def __getattr__(self, name: str) -> Any:
        if name in ("_model", self._name):
            raise AttributeError(name)
        return getattr(self._model, name)


def _stop_at(step: int) -> Any:
    return lambda info: info.step >= step


def _content(post: Posterior) -> str:
    """A hash of everything that was computed."""
    return digest([post.source, post.log_evidence, dict(post.sample_stats)])


def _has_chains(post: Posterior) -> bool:
    return isinstance(post.source, Draws | Fitted | Population) or bool(post.draws)


def _chain(post: Posterior, k: int) -> Any:
    """What chain ``k`` found."""
    source = post.source
    if isinstance(source, Fitted):
        return source.params[k]
    if isinstance(source, Population):
        return [source.particles[k], source.log_weights[k]]
    weights = post.log_weights
    values = {name: value[k] for name, value in post.draws.items()}
    return [values, None if weights is None else weights[k]]


def _check_moments(name: str, post: Posterior, mean: Tensor, sd: Tensor, bias: float) -> None:
    """Compare mean and variance of a site with the exact ones, entry by entry."""
    if name in post.draws:
        value, weights = post.draws[name].double(), post.log_weights
    else:
        value, weights = post.sample(20_000, rng=1)[name].double()[None], None
    for what, series, exact, allowed in (
        ("mean", value, mean.double(), bias * sd.double()),
        ("variance", (value - mean).square(), sd.double().square(), bias * 2 * sd.double() ** 2),
    ):
        if weights is None:
            blocks = batch_means(series)
            estimate, error = blocks.mean(0), blocks.std(0) / len(blocks) ** 0.5
        else:  # Self-normalised estimate and its delta-method error.
            share = torch.softmax(weights.double().flatten(), 0)
            flat = series.flatten(0, 1)
            estimate = torch.tensordot(share, flat, dims=1)
            error = torch.tensordot(share.square(), (flat - estimate).square(), dims=1).sqrt()
        gap = (estimate - exact).abs() - allowed
        worst = float((gap / error).max())
        assert worst <= z_bound(2 * exact.numel()), (
            f"{what} of {name}: |z| = {worst:.1f} (estimate {estimate}, exact {exact})"
        )

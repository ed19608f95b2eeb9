"""The driver: fit, chains, threads, executors, callbacks and interruption."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.fits import GroupModel, LineModel, Metropolis, RateModel, line_data, same
from support.models import ConjugateNormal, normal_data

import probkit as pk
from probkit.errors import CapabilityError, DataError
from probkit.inference import MAP, SVI, Direct, ImportanceSampling, MeanField

TESTS = Path(__file__).resolve().parents[1]
Y = torch.tensor([0.3, 1.2, 0.1, 0.8, 2.0], dtype=torch.float64)


# ------------------------------------------------------------------------------- fit and options


def test_a_sampler_that_does_not_fit_names_those_that_do():
    with pytest.raises(CapabilityError) as caught:
        pk.infer(GroupModel(), Y, Direct(), rng=0)
    text = str(caught.value)
    assert text.startswith(
        "Direct needs condition; GroupModel lacks condition. Samplers that fit: "
    )
    assert {"MAP", "SVI", "ImportanceSampling"} <= set(text.split("fit: ")[1].split(", "))
    assert "Direct" not in text.split("fit: ")[1]


def test_something_else_than_a_sampler_or_model():
    with pytest.raises(CapabilityError, match=r"expected a sampler .* for example"):
        pk.infer(GroupModel(), Y, "svi", rng=0)
    with pytest.raises(CapabilityError, match=r"wrap a Pyro program as FromPyro"):
        pk.infer(lambda y: y, Y, SVI(), rng=0)


def test_rng_is_required_and_checked():
    with pytest.raises(TypeError, match="rng"):
        pk.infer(GroupModel(), Y, SVI())
    for wrong in (None, -1, 0.5, True):
        with pytest.raises(DataError, match=r"rng must be an integer"):
            pk.infer(GroupModel(), Y, SVI(), rng=wrong)


@pytest.mark.parametrize("chains", [0, -1, 1.5])
def test_chains_are_checked(chains):
    with pytest.raises(DataError, match=r"chains: expected a whole number"):
        pk.infer(GroupModel(), Y, SVI(), rng=0, chains=chains)


def test_default_sampler_is_exact_where_the_model_is():
    assert pk.infer(ConjugateNormal(), normal_data(), rng=0).attrs["algorithm"] == "Direct"


def test_a_generator_is_a_seed_and_moves_on():
    generator = torch.Generator().manual_seed(5)
    first = pk.infer(LineModel(), line_data(), Metropolis(), rng=generator)
    second = pk.infer(LineModel(), line_data(), Metropolis(), rng=generator)
    assert not same(first, second)
    again = pk.infer(LineModel(), line_data(), Metropolis(), rng=torch.Generator().manual_seed(5))
    assert same(first, again)
    assert same(first, pk.infer(LineModel(), line_data(), Metropolis(), rng=first.attrs["seed"]))


def test_labels_of_frames_become_coords():
    y = normal_data(3)
    frame = pd.Series(y.numpy(), index=["a", "b", "c"])
    post = pk.infer(ConjugateNormal(), frame, Direct(), rng=0)
    assert post.context.coords["observation"] == ["a", "b", "c"]
    assert torch.equal(post.context.data, y)
    assert "observation" not in pk.infer(ConjugateNormal(), y, Direct(), rng=0).context.coords


# ------------------------------------------------------------------------------- chains


@pytest.mark.parametrize("chains", [1, 3, 4, 6])
def test_padding_changes_no_chain(chains):
    """Blocks of four: chain k is bit-equal whatever the number of chains."""
    whole = pk.infer(LineModel(), line_data(), Metropolis(20, width=4), rng=0, chains=8)
    part = pk.infer(LineModel(), line_data(), Metropolis(20, width=4), rng=0, chains=chains)
    assert part.draws["w"].shape == (chains, 20, 2)
    assert torch.equal(part.draws["w"], whole.draws["w"][:chains])


def test_one_state_may_carry_all_chains():
    post = pk.infer(LineModel(), line_data(), Metropolis(20, width=None), rng=0, chains=3)
    blocks = pk.infer(LineModel(), line_data(), Metropolis(20, width=1), rng=0, chains=3)
    torch.testing.assert_close(post.draws["w"], blocks.draws["w"])


def test_every_chain_has_its_evidence():
    sampler = ImportanceSampling(200, proposal="prior")
    post = pk.infer(LineModel(1.0), line_data(4), sampler, rng=0, chains=3)
    assert post.log_evidence.value.shape == (3,)
    assert len(set(post.log_evidence.value.tolist())) == 3


# ------------------------------------------------------------------------------- executors

SAMPLERS = {
    "svi": (SVI(steps=20, chunk=5, batch_size=3), LineModel(), line_data()),
    "importance": (ImportanceSampling(300, 50, "prior"), LineModel(1.0), line_data(4)),
    "map": (MAP(chunk=3), RateModel(), Y),
    "metropolis": (Metropolis(20, width=2), LineModel(), line_data()),
}


@pytest.fixture(scope="module")
def processes():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        yield executor


@pytest.mark.parametrize("name", SAMPLERS)
def test_executors_give_the_serial_result(name, processes, tmp_path):
    sampler, model, data = SAMPLERS[name]
    options = {"rng": 3, "chains": 3}
    serial = pk.infer(model, data, sampler, **options)
    with ThreadPoolExecutor(2) as threads:
        assert same(pk.infer(model, data, sampler, **options, executor=threads), serial)
    apart = pk.infer(model, data, sampler, **options, executor=processes, checkpoint=tmp_path)
    assert same(apart, serial)
    # Its checkpoint is that of a finished run.
    seen = []
    again = pk.infer(model, data, sampler, **options, checkpoint=tmp_path, callbacks=[seen.append])
    assert same(again, serial) and not seen


def test_an_executor_continues_a_half_finished_checkpoint(tmp_path):
    """Draws from before and after the change of place, in order and only once."""
    arguments = (LineModel(), line_data(), Metropolis(40, width=2))
    serial = pk.infer(*arguments, rng=1, chains=4)
    part = pk.infer(*arguments, rng=1, chains=4, checkpoint=tmp_path, callbacks=[stop_at(3)])
    assert part.draws["w"].shape[1] == 15
    with ThreadPoolExecutor(2) as threads:
        whole = pk.infer(*arguments, rng=1, chains=4, checkpoint=tmp_path, executor=threads)
    assert same(whole, serial)
    assert same(pk.infer(*arguments, rng=1, chains=4, checkpoint=tmp_path), serial)


def test_an_executor_stopped_by_a_callback_returns_whole_chains():
    arguments = (LineModel(), line_data(), Metropolis(20))
    serial = pk.infer(*arguments, rng=1, chains=4)
    with ThreadPoolExecutor(1) as threads:
        post = pk.infer(*arguments, rng=1, chains=4, executor=threads, callbacks=[lambda i: True])
    assert post.attrs["complete"] is False and post.attrs["stopped_by"] == "callback"
    assert 1 <= post.chains < 4
    assert torch.equal(post.draws["w"], serial.draws["w"][: post.chains])


def test_callbacks_on_an_executor_see_the_end_once():
    seen = []
    with ThreadPoolExecutor(2) as threads:
        pk.infer(
            *(LineModel(), line_data(), Metropolis(20)),
            rng=1,
            chains=3,
            executor=threads,
            callbacks=[seen.append],
        )
    assert [info.done for info in seen] == [False, False, True]


def test_an_error_on_an_executor_is_raised():
    with ThreadPoolExecutor(2) as threads, pytest.raises(CapabilityError, match="plate_size"):
        pk.infer(RateModel(), Y, SVI(batch_size=2), rng=0, chains=2, executor=threads)


# ------------------------------------------------------------------------------- threads


def test_two_runs_in_two_threads_are_the_serial_ones():
    jobs = [
        (LineModel(), line_data(), SVI(steps=60, chunk=5, evidence_draws=50)),
        (RateModel(), Y, SVI(steps=60, chunk=5, evidence_draws=50)),
    ]
    serial = [pk.infer(*job, guide=MeanField(), rng=k) for k, job in enumerate(jobs)]
    results = [None, None]
    handler = signal.getsignal(signal.SIGINT)
    seen = []

    def work(k):
        results[k] = pk.infer(
            *jobs[k],
            guide=MeanField(),
            rng=k,
            callbacks=[lambda info: seen.append(signal.getsignal(signal.SIGINT))],
        )

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(results, serial, strict=True))
    assert set(seen) == {handler}, "a thread installed a signal handler"


# ------------------------------------------------------------------------------- callbacks


def stop_at(step):
    return lambda info: info.step >= step


def test_a_callback_stops_the_run():
    post = pk.infer(LineModel(), line_data(), Metropolis(50), rng=0, callbacks=[stop_at(4)])
    whole = pk.infer(LineModel(), line_data(), Metropolis(50), rng=0)
    assert post.attrs["complete"] is False and post.attrs["stopped_by"] == "callback"
    assert torch.equal(post.draws["w"], whole.draws["w"][:, :20])
    assert whole.attrs["complete"] is True and "stopped_by" not in whole.attrs


def test_a_stop_in_the_last_step_is_no_stop():
    post = pk.infer(LineModel(), line_data(), Metropolis(50), rng=0, callbacks=[stop_at(10)])
    assert post.attrs["complete"] is True


@dataclass(frozen=True)
class Slow(Metropolis):
    """Keeps nothing in its first steps."""

    def step(self, problem, state, *, rngs):
        step = super().step(problem, state, rngs=rngs)
        return step if step.state["drawn"] > 20 else pk.Step(step.state, step.done)


def test_a_stop_before_the_first_draw_says_so():
    with pytest.raises(
        DataError, match=r"callback stopped Slow at step 2, before there was a draw"
    ):
        pk.infer(LineModel(), line_data(), Slow(50), rng=0, callbacks=[stop_at(2)])
    post = pk.infer(LineModel(), line_data(), Slow(50), rng=0, callbacks=[stop_at(6)])
    assert post.draws["w"].shape == (1, 10, 2)


def test_an_error_in_a_callback_is_raised_and_bars_are_closed():
    closed = []

    class Broken:
        def __call__(self, info):
            raise ZeroDivisionError

        def close(self):
            closed.append(True)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        pk.infer(LineModel(), line_data(), Metropolis(50), rng=0, callbacks=[Broken()])
    assert closed and signal.getsignal(signal.SIGINT) is handler


# ------------------------------------------------------------------------------- interruption


def interrupt_at(*steps):
    """A callback that sends this process a real SIGINT at the given steps."""

    def callback(info):
        if info.step in steps:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


def test_ctrl_c_returns_the_draws_so_far(caplog):
    handler = signal.getsignal(signal.SIGINT)
    post = pk.infer(
        LineModel(), line_data(), Metropolis(50), rng=0, chains=2, callbacks=[interrupt_at(3)]
    )
    whole = pk.infer(LineModel(), line_data(), Metropolis(50), rng=0, chains=2)
    assert post.attrs["complete"] is False and post.attrs["stopped_by"] == "interrupt"
    assert torch.equal(post.draws["w"], whole.draws["w"][:, :15])
    assert signal.getsignal(signal.SIGINT) is handler
    assert "finishing the current step" in caplog.text


def test_ctrl_c_before_the_first_draw_saves_and_raises(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    arguments = (LineModel(), line_data(), Slow(50))
    with pytest.raises(KeyboardInterrupt):
        pk.infer(*arguments, rng=0, checkpoint=tmp_path, callbacks=[interrupt_at(2)])
    assert signal.getsignal(signal.SIGINT) is handler
    seen = []
    post = pk.infer(*arguments, rng=0, checkpoint=tmp_path, callbacks=[seen.append])
    assert seen[0].step == 3
    assert same(post, pk.infer(*arguments, rng=0))


@dataclass(frozen=True)
class TwiceInterrupted(Metropolis):
    def step(self, problem, state, *, rngs):
        if state["drawn"] == 10:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(problem, state, rngs=rngs)


def test_a_second_ctrl_c_stops_at_once():
    handler = signal.getsignal(signal.SIGINT)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        pk.infer(LineModel(), line_data(), TwiceInterrupted(50), rng=0, callbacks=[seen.append])
    assert [info.step for info in seen] == [1, 2]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_program_that_handles_ctrl_c_keeps_its_handler():
    caught = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    try:
        post = pk.infer(
            LineModel(), line_data(), Metropolis(50), rng=0, callbacks=[interrupt_at(3)]
        )
    finally:
        signal.signal(signal.SIGINT, previous)
    assert caught == [signal.SIGINT] and post.attrs["complete"] is True


def test_a_real_sigint_from_outside(tmp_path):
    """Another process interrupts a long run; the draws so far come back."""
    code = textwrap.dedent(
        """
        import sys
        import probkit as pk
        from support.fits import LineModel, Metropolis, line_data

        def tell(info):
            if info.step == 2:
                print("running", flush=True)

        post = pk.infer(
            LineModel(), line_data(), Metropolis(10**7), rng=0, callbacks=[tell]
        )
        print(post.attrs["complete"], post.attrs["stopped_by"], post.draws["w"].shape[1] >= 10)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            assert run.stdout.readline() == "running\n"
            run.send_signal(signal.SIGINT)
            rest, _ = run.communicate(timeout=60)
        finally:
            run.kill()
    assert rest == "False interrupt True\n" and run.returncode == 0


def test_a_class_is_no_sampler():
    with pytest.raises(CapabilityError, match=r"got the class MAP; make one: MAP\(\)"):
        pk.infer(ConjugateNormal(), normal_data(), MAP, rng=0)


def test_a_posterior_shows_itself_in_one_line():
    post = pk.infer(ConjugateNormal(), normal_data(), rng=0)
    assert repr(post) == "Posterior(Closed, model=ConjugateNormal, chains=1, marginals=(mu))"


def test_a_model_without_predict_says_so():
    class Plain:
        def sites(self, data):
            return ConjugateNormal().sites(data)

        def log_joint(self, values, data, *, scale=1.0):
            return ConjugateNormal().log_joint(values, data, scale=scale)

    post = pk.infer(Plain(), normal_data(), MAP(restarts=1), rng=0)
    with pytest.raises(CapabilityError, match="Plain lacks predict; subclass probkit.Model"):
        post.predict(normal_data())

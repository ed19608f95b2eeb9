"""A run killed half-way by a real SIGKILL resumes to the same bits."""

from __future__ import annotations

import json
import os
import signal
import time
from multiprocessing import get_context

import pytest
from support.fits import same
from support.runs import RUNS, run, run_slowly

from probkit.errors import DataError

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture(scope="module")
def processes():
    context = get_context("forkserver")  # It imports once; every process is a fork of it.
    context.set_forkserver_preload(["probkit.inference", "probkit.kernels", "probkit.models"])
    return context


def saved_step(folder):
    """Number of the step that the last save of the first block holds; 0 before there is one."""
    try:
        manifest = json.loads((folder / "block-0000" / "manifest.json").read_text())
    except FileNotFoundError:
        return 0
    return int(manifest["state"].removeprefix("state-").split("-")[0].split(".")[0])


def kill_after(processes, name, folder, step):
    """Start a run and kill it when it has saved ``step`` steps; returns what it had saved."""
    process = processes.Process(target=run_slowly, args=(name, folder))
    process.start()
    deadline = time.monotonic() + 120
    while saved_step(folder) < step:
        assert process.is_alive(), "the run ended before it was killed"
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return saved_step(folder)


QUICK = ("SVI", "Metropolis")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]
)
def test_a_killed_run_resumes_to_the_same_bits(name, processes, tmp_path):
    saved = kill_after(processes, name, tmp_path, 2)
    if name == "Metropolis":  # Once more, after resuming.
        saved = kill_after(processes, name, tmp_path, saved + 2)
    seen = []
    resumed = run(name, tmp_path, callbacks=[seen.append])
    # The second block may have been killed before it saved the same step.
    assert seen[0].step >= saved >= 2, "the run began anew"
    assert same(resumed, run(name))
    assert resumed.attrs["complete"] is True


def test_leftovers_of_a_kill_do_no_harm(processes, tmp_path):
    """A draws file that no manifest counts, half a state, and a temporary file."""
    name = "Metropolis"
    kill_after(processes, name, tmp_path, 3)
    block = tmp_path / "block-0000"
    chunks = json.loads((block / "manifest.json").read_text())["draws"]
    (block / f"draws-{len(chunks):06d}.safetensors").write_bytes(b"half a file")
    (block / "state-000099999.safetensors").write_bytes(b"half a file")
    (block / ".manifest.json-abc").write_bytes(b"{")
    assert same(run(name, tmp_path), run(name))


def test_a_lost_draws_file_is_an_error(processes, tmp_path):
    kill_after(processes, "Metropolis", tmp_path, 3)
    next((tmp_path / "block-0000").glob("draws-*")).unlink()
    with pytest.raises(DataError, match="missing or damaged"):
        run("Metropolis", tmp_path)

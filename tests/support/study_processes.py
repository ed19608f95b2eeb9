"""Programs of their own for the slow tests of studies: ``python -m support.study_processes NAME``.

They fork from one process that has imported and run everything once, so that a child costs
milliseconds, and print one JSON line with what they saw.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import warnings

from support.study_objectives import HangsOnce, branin, wave

warnings.simplefilter("ignore")


def line_study(storage=None):
    from probkit.bo import Float, Space, Study

    return Study(
        Space(x=Float(0, 1)), {"y": "min"}, surrogate="gp", noise="none", initial=3, rng=5,
        storage=storage,
    )  # fmt: skip


def warm_up():
    """Import and run everything once, before the forks."""
    import torch

    torch.set_num_threads(1)
    line_study().optimize(wave, 5)


def child_of(work):
    """Run ``work`` in a forked child; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(f"child: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)


def kill_many(path, kills):
    """Kill a child at a random moment, many times; each goes on where the last one was."""
    from probkit.bo import Study

    warm_up()
    line_study(path)
    clock = random.Random(11)
    acknowledged, lost, broken = {}, [], 0
    pace = 0.3  # seconds; follows how long an evaluation takes, so that kills meet every stage
    for _ in range(kills):
        reader, writer = os.pipe()

        def work(writer=writer):
            study = Study.load(path)
            while True:
                for trial in study.pending or [study.ask()]:
                    told = study.tell(trial, wave(trial.params))
                    line = json.dumps([told.number, dict(told.params), told.value])
                    os.write(writer, line.encode() + b"\n")

        pid = child_of(work)
        os.close(writer)
        time.sleep(clock.uniform(0, 2 * pace))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(reader) as pipe:
            lines = [line for line in pipe.read().split("\n") if line.endswith("]")]
        for number, params, value in map(json.loads, lines):
            acknowledged[number] = (params, value)
        pace = min(1.0, max(0.02, pace * (0.8 if len(lines) > 1 else 1.1)))
        with sqlite3.connect(path) as connection:
            broken += connection.execute("PRAGMA integrity_check").fetchone() != ("ok",)
        stored = {t.number: t for t in Study.load(path).trials}
        for number, (params, value) in acknowledged.items():
            found = stored.get(number)
            if found is None or found.status != "complete" or found.value != value:
                lost.append([number, params, value])
    final = Study.load(path)
    for trial in final.pending:
        final.tell(trial, wave(trial.params))
    final.ask()
    whole = line_study()
    whole.optimize(wave, len(final) - 1)
    whole.ask()
    return {
        "acknowledged": len(acknowledged),
        "lost": lost,
        "broken": broken,
        "trials": len(final),
        "same": [dict(t.params) for t in final.trials] == [dict(t.params) for t in whole.trials],
    }


def share(storage, processes, trials):
    """Several processes ask and tell one study until it has some number of trials."""
    from probkit.bo import Study

    warm_up()
    line_study(storage)

    def work():
        study = Study.load(storage)
        while len(study) < trials:
            trial = study.ask()
            study.tell(trial, wave(trial.params))

    statuses = [os.waitpid(pid, 0)[1] for pid in [child_of(work) for _ in range(processes)]]
    found = Study.load(storage).trials
    return {
        "exits": statuses,
        "numbers": [t.number for t in found],
        "statuses": sorted({t.status for t in found}),
        "right": all(t.value == wave(t.params) for t in found),
        "distinct": len({t["x"] for t in found}),
        "summary": Study.load(storage).summary()["trials"],
    }


def resume(storage, trials):
    """Ask and tell, opening the study anew each time; compare with one that was never closed."""
    from probkit.bo import Study

    warm_up()
    line_study(storage)
    for _ in range(trials):
        study = Study.load(storage)
        trial = study.ask()
        Study.load(storage).tell(trial.number, wave(trial.params))
    whole = line_study()
    whole.optimize(wave, trials)
    found = Study.load(storage).trials
    return {"same": [dict(t.params) for t in found] == [dict(t.params) for t in whole.trials]}


def turmoil(path, workers):
    """Workers ask in bunches, tell in reverse, fail now and then; one is killed, another resumes.

    Every told outcome is acknowledged through a pipe, so that what the file holds can be checked.
    """
    from probkit.bo import Study

    warm_up()
    line_study(path)

    def work(number, writer, hangs):
        study = Study.load(path)
        for bunch in range(2):
            for place, trial in enumerate(reversed(study.ask(2))):
                if hangs and bunch == 1:
                    os.write(writer, json.dumps(["hangs", trial.number]).encode() + b"\n")
                    time.sleep(600)  # killed here, with two trials pending
                if (number + place) % 3 == 0:
                    told = study.tell(trial, status="failed")
                else:
                    told = study.tell(trial, wave(trial.params))
                line = json.dumps([told.number, told.status, told.value])
                os.write(writer, line.encode() + b"\n")

    reader, writer = os.pipe()
    children = [
        child_of(lambda k=k: work(k, writer, hangs=k == workers - 1)) for k in range(workers)
    ]
    os.close(writer)
    acknowledged, victim = {}, children[-1]
    with os.fdopen(reader) as pipe:
        for line in pipe:
            first, *rest = json.loads(line)
            if first == "hangs":
                os.kill(victim, signal.SIGKILL)
            else:
                acknowledged[first] = rest
    for child in children:
        os.waitpid(child, 0)
    resumed = Study.load(path)
    left = [t.number for t in resumed.pending]
    for trial in reversed(resumed.pending):
        resumed.tell(trial, wave(trial.params))
    stored = {t.number: t for t in resumed.trials}
    first, again = (dict(Study.load(path).ask().params) for _ in range(2))
    return {
        "lost": [
            n for n, (status, value) in acknowledged.items()
            if (stored[n].status, stored[n].value) != (status, value)
        ],
        "acknowledged": len(acknowledged),
        "left": len(left),
        "failed": sum(t.status == "failed" for t in stored.values()),
        "complete": sum(t.status == "complete" for t in stored.values()),
        "right": all(t.value == wave(t.params) for t in stored.values() if t.status == "complete"),
        "distinct": len({t["x"] for t in stored.values()}) == len(stored),
        "best": resumed.best().value == min(wave(t.params) for t in stored.values()
                                             if t.status == "complete"),
        "next differs from pending": first != again,
    }  # fmt: skip


def dask(path, marker, trials):
    """Evaluate on a local Dask cluster of processes, one of which is killed in mid-trial."""
    import dask as settings
    from dask.distributed import Client, LocalCluster

    from probkit.bo import Float, Space, Study

    study = Study(
        Space(x=Float(-5, 10), y=Float(0, 15)), {"loss": "min"}, surrogate="gp", noise="none",
        initial=6, rng=0, storage=path,
    )  # fmt: skip
    killed = []

    def kill():
        while not os.path.exists(marker) or not open(marker).read().endswith("\n"):
            time.sleep(0.05)
        killed.append(int(open(marker).read()))
        time.sleep(0.5)  # other trials are told meanwhile
        os.kill(killed[0], signal.SIGKILL)

    patience = {
        "distributed.comm.timeouts.connect": "300s",
        "distributed.comm.timeouts.tcp": "300s",
    }
    with (
        settings.config.set(patience),  # a busy machine takes long to start a worker
        LocalCluster(2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(2, timeout=600)
        workers = client.run(os.getpid)
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        study.optimize(HangsOnce(marker), trials, executor=client.get_executor(), workers=2)
        killer.join(60)
        after = client.run(os.getpid)
    found = study.trials
    return {
        "was a worker": killed[0] in workers.values(),
        "is gone": killed[0] not in after.values(),
        "numbers": [t.number for t in found],
        "statuses": sorted({t.status for t in found}),
        "right": all(t.value == branin(t.params) for t in found),
        "workers": len(workers),
    }


PROGRAMS = {
    "kill_many": kill_many,
    "share": share,
    "resume": resume,
    "dask": dask,
    "turmoil": turmoil,
}

if __name__ == "__main__":
    program, *arguments = sys.argv[1:]
    words = [int(a) if a.isdigit() else a for a in arguments]
    print(json.dumps(PROGRAMS[program](*words)), flush=True)

"""Studies under fire: killed processes, processes that share, clusters, servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import postgres

TESTS = Path(__file__).parents[1]

# generous where the machine is busy: each starts several processes that import everything
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def run(program, *arguments):
    """Run a program of ``support.study_processes``; return what it saw."""
    env = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "support.study_processes", program, *map(str, arguments)],
        env=env, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def database():
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed")
    try:
        with postgres.server() as url:
            yield url
    except postgres.Missing as reason:
        pytest.skip(str(reason))


def test_a_hundred_kills_lose_nothing_and_change_nothing(tmp_path):
    seen = run("kill_many", tmp_path / "run.db", 100)
    assert seen["lost"] == [] and seen["broken"] == 0
    assert seen["acknowledged"] >= 10  # the children got somewhere
    assert seen["same"]  # every ask after a kill was the one of a study never killed


def test_four_workers_out_of_order_failures_a_kill_and_a_resumption_at_once(tmp_path):
    seen = run("turmoil", tmp_path / "run.db", 4)
    assert seen["lost"] == []
    # three workers told two bunches of two, the killed one its first; its second is pending
    assert (seen["acknowledged"], seen["left"]) == (14, 2)
    assert (seen["failed"], seen["complete"]) == (5, 11)
    assert seen["right"] and seen["distinct"] and seen["best"] and seen["next differs from pending"]


def test_four_processes_share_one_file(tmp_path):
    seen = run("share", tmp_path / "run.db", 4, 24)
    check_shared(seen)


def check_shared(seen):
    assert seen["exits"] == [0, 0, 0, 0]
    assert seen["numbers"] == list(range(len(seen["numbers"]))) and len(seen["numbers"]) >= 24
    assert seen["statuses"] == ["complete"] and seen["right"]
    assert seen["distinct"] == len(seen["numbers"])


def test_trials_run_on_a_cluster_and_survive_the_death_of_a_worker(tmp_path):
    pytest.importorskip("distributed")
    seen = run("dask", tmp_path / "run.db", tmp_path / "marker", 8)
    assert seen["workers"] == 2 and seen["was a worker"] and seen["is gone"]
    assert seen["numbers"] == list(range(8))
    assert seen["statuses"] == ["complete"] and seen["right"]


def test_processes_share_a_study_on_a_server(database):
    check_shared(run("share", database, 4, 24))


def test_a_study_on_a_server_is_resumed_exactly(database):
    import psycopg

    with psycopg.connect(database, autocommit=True) as connection:
        for table in ("states", "trials", "studies", "format"):
            connection.execute(f"DROP TABLE IF EXISTS probkit_{table}")
    assert run("resume", database, 7)["same"]


def test_old_tables_on_a_server_are_migrated(database):
    import psycopg

    from probkit.bo.storage import SCHEMA, Storage

    with psycopg.connect(database, autocommit=True) as connection:
        for table in ("states", "trials", "studies", "format"):
            connection.execute(f"DROP TABLE IF EXISTS probkit_{table}")
        connection.execute("CREATE TABLE probkit_format (version INTEGER NOT NULL)")
        connection.execute("INSERT INTO probkit_format VALUES (1)")
        connection.execute(
            "CREATE TABLE probkit_studies (id SERIAL PRIMARY KEY, name VARCHAR(200) NOT NULL "
            "UNIQUE, settings TEXT NOT NULL)"
        )
        connection.execute(
            "CREATE TABLE probkit_trials (study INTEGER NOT NULL REFERENCES probkit_studies(id), "
            "number INTEGER NOT NULL, params TEXT NOT NULL, status VARCHAR(20) NOT NULL, "
            "outcomes TEXT, variances TEXT, error TEXT, PRIMARY KEY (study, number))"
        )
        connection.execute("INSERT INTO probkit_studies (name, settings) VALUES ('s', '{}')")
        connection.execute(
            "INSERT INTO probkit_trials VALUES (1, 0, '{\"x\": 0.5}', 'complete', '{\"y\": 1.0}', "
            "NULL, NULL)"
        )
    storage = Storage(database, "s")
    assert storage.settings() == {}
    assert storage.trials()[0].values == {"y": 1.0} and storage.trials()[0].origin is None
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT version FROM probkit_format").fetchone() == (SCHEMA,)

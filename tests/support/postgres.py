"""A PostgreSQL server of the tests' own, on the loopback interface."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


class Missing(Exception):
    """There is no server to be started here; the message is the reason."""


def _binary(name):
    found = shutil.which(name)
    if found:
        return found
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    if not installed:
        raise Missing(f"PostgreSQL is not installed: there is no {name}")
    return str(installed[-1])


def _user():
    """Options of a process of an unprivileged user: the server refuses to run as root."""
    if os.geteuid() != 0:
        return {}, None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise Missing("PostgreSQL refuses to run as root, and there is no user nobody") from None
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}, entry


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def server():
    """Start a server on an empty database; yield its URL.

    Raises:
        Missing: It cannot be started here.
    """
    initdb, postgres = _binary("initdb"), _binary("postgres")
    who, entry = _user()
    folder = tempfile.mkdtemp(prefix="probkit-postgres-")
    process = None
    try:
        if entry is not None:
            os.chown(folder, entry.pw_uid, entry.pw_gid)
        data, port = f"{folder}/data", _free_port()
        made = subprocess.run(
            [initdb, "-D", data, "-U", "probkit", "-A", "trust", "-E", "UTF8", "--no-sync",
             "--locale=C"],
            cwd=folder, capture_output=True, text=True, check=False, **who,
        )  # fmt: skip
        if made.returncode:
            raise Missing(f"initdb failed: {made.stderr.strip().splitlines()[-1]}")
        log = open(f"{folder}/log", "w")
        process = subprocess.Popen(
            [postgres, "-D", data, "-p", str(port), "-h", "127.0.0.1", "-k", "",
             "-c", "fsync=off", "-c", "shared_buffers=16MB"],
            cwd=folder, stdout=log, stderr=log, **who,
        )  # fmt: skip
        _wait(process, port, f"{folder}/log")
        yield f"postgresql://probkit@127.0.0.1:{port}/postgres"
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # a fast shutdown
            process.wait(timeout=60)
            log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(process, port, log):
    import psycopg

    end = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(f"host=127.0.0.1 port={port} user=probkit dbname=postgres").close()
            return
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > end:
                raise Missing(f"PostgreSQL did not start: {Path(log).read_text()[-300:]}") from None
            time.sleep(0.1)

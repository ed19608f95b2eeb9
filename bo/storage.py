"""Studies in a database: SQLite by default, or any that SQLAlchemy speaks.

Every change is one transaction, so a process may be killed at any moment and loses nothing that was
told. Writers exclude each other (SQLite: ``BEGIN IMMEDIATE``; elsewhere: the row of the study is
locked), and each operation uses a connection of its own, so that processes, also forked ones, may
share one database.

The schema, version 2, which docs/study_files.md describes: ``probkit_format`` holds the version;
``probkit_studies`` one row for each study, its settings as JSON; ``probkit_trials`` one row for
each trial, params and outcomes as JSON; ``probkit_states`` what the last surrogate hands to the
next one (chains, step sizes), as JSON and safetensors. Version 1 had neither states nor the columns
``origin``, ``started`` and ``finished``; it is brought to version 2 when it is opened.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import NullPool, StaticPool

from probkit.bo.trials import Trial
from probkit.errors import DataError
from probkit.files import pack, unpack

__all__ = ["SCHEMA", "Storage"]

SCHEMA = 2
"""Version of the schema; databases of this and every earlier version can be opened."""

#: Key of the lock under which tables and studies are created on a server.
_LOCK = 0x70726F626B6974

_metadata = sa.MetaData()

_format = sa.Table(
    "probkit_format",
    _metadata,
    sa.Column("version", sa.Integer, nullable=False),
)

_studies = sa.Table(
    "probkit_studies",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("settings", sa.Text, nullable=False),
)

_trials = sa.Table(
    "probkit_trials",
    _metadata,
    sa.Column("study", sa.ForeignKey("probkit_studies.id"), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("params", sa.Text, nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("outcomes", sa.Text),
    sa.Column("variances", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("origin", sa.String(20)),
    sa.Column("started", sa.String(40)),
    sa.Column("finished", sa.String(40)),
)

_states = sa.Table(
    "probkit_states",
    _metadata,
    sa.Column("study", sa.ForeignKey("probkit_studies.id"), primary_key=True),
    sa.Column("trials", sa.Integer, nullable=False),
    sa.Column("structure", sa.Text, nullable=False),
    sa.Column("tensors", sa.LargeBinary, nullable=False),
)


def _from_1(connection: Connection) -> None:
    for column in ("origin VARCHAR(20)", "started VARCHAR(40)", "finished VARCHAR(40)"):
        connection.exec_driver_sql(f"ALTER TABLE probkit_trials ADD COLUMN {column}")
    _states.create(connection)


#: What brings a database of some version to the next one.
_MIGRATIONS: dict[int, Callable[[Connection], None]] = {1: _from_1}


class Busy(Exception):
    """Somebody else has added trials since the ones that a request rests on were read."""


def _url(target: str | Path | None) -> sa.URL:
    if target is None:
        return sa.make_url("sqlite://")
    text = str(target)
    if "://" not in text:
        return sa.URL.create("sqlite", database=text)
    try:
        url = sa.make_url(text)
    except sa.exc.ArgumentError as error:
        raise DataError(f"storage: expected a file or a SQLAlchemy URL, got {text!r}") from error
    if url.drivername == "postgresql":  # the driver that the extra brings
        from probkit.extras import require

        require("psycopg", extra="postgres")
        url = url.set(drivername="postgresql+psycopg")
    return url


def _engine(url: sa.URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, poolclass=NullPool)
    in_memory = url.database in (None, "", ":memory:")
    options: dict[str, Any] = {"connect_args": {"timeout": 120}}
    if in_memory:
        options = {"connect_args": {"check_same_thread": False}}
    engine = sa.create_engine(url, poolclass=StaticPool if in_memory else NullPool, **options)

    @sa.event.listens_for(engine, "connect")
    def _prepare(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not where the driver likes
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("probkit_writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


class Storage:
    """One study in a database.

    Args:
        target: Path of a SQLite file, a SQLAlchemy URL, or None for memory.
        name: Name of the study, of which a database may hold several.

    Raises:
        DataError: The target is no database, or was written by a newer probkit.
    """

    def __init__(self, target: str | Path | None, name: str) -> None:
        self.url = _url(target)
        self.name = name
        self._engine = _engine(self.url)
        self._lock = threading.RLock()  # the one connection of a database in memory
        self._id: int | None = None
        weakref.finalize(self, self._engine.dispose)
        try:
            self._prepare()
        except sa.exc.DBAPIError as error:
            raise DataError(f"storage: cannot open {self}: {error.orig}") from error

    def __str__(self) -> str:
        """The database, without passwords."""
        if self.url.get_backend_name() == "sqlite":
            return self.url.database or "memory"
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        with self._lock, self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Open a transaction that excludes all others that write."""
        with self._lock, self._engine.connect() as connection:
            writer = connection.execution_options(probkit_writing=True)
            with writer.begin():
                self._exclude_others(writer)
                yield writer

    def _exclude_others(self, writer: Connection) -> None:
        """Wait for the lock of the study, or of all while it is unknown; SQLite has its own."""
        if self._id is not None:
            own = sa.select(_studies.c.id).where(_studies.c.id == self._id)
            writer.execute(own.with_for_update())
        elif self.url.get_backend_name() == "postgresql":
            writer.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))

    def _prepare(self) -> None:
        """Create the tables, or bring them to the present version."""
        if self._version() == SCHEMA:
            return  # without waiting for others who write
        with self._writing() as connection:
            if not sa.inspect(connection).has_table(_format.name):
                _metadata.create_all(connection)
                connection.execute(_format.insert().values(version=SCHEMA))
            version = connection.execute(sa.select(_format.c.version)).scalar_one()
            if version > SCHEMA:
                raise DataError(
                    f"storage: {self} has schema {version}, this probkit knows up to {SCHEMA}; "
                    "use a newer probkit"
                )
            for old in range(version, SCHEMA):
                _MIGRATIONS[old](connection)
            if version < SCHEMA:
                connection.execute(_format.update().values(version=SCHEMA))

    def _version(self) -> int | None:
        with self._reading() as connection:
            if not sa.inspect(connection).has_table(_format.name):
                return None
            return int(connection.execute(sa.select(_format.c.version)).scalar_one())

    # ------------------------------------------------------------------ the study

    def settings(self) -> dict[str, Any] | None:
        """Return the settings of the study; None where there is none of this name."""
        with self._reading() as connection:
            row = connection.execute(
                sa.select(_studies.c.id, _studies.c.settings).where(_studies.c.name == self.name)
            ).first()
        if row is None:
            return None
        self._id = row.id
        found: dict[str, Any] = json.loads(row.settings)
        return found

    def create(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Store the settings of a new study; return those stored if there is one already."""
        text = json.dumps(settings, allow_nan=False)
        with self._writing() as connection:
            known = connection.execute(
                sa.select(_studies.c.id).where(_studies.c.name == self.name)
            ).first()
            if known is None:
                connection.execute(_studies.insert().values(name=self.name, settings=text))
        found = self.settings()
        assert found is not None
        return found

    def names(self) -> list[str]:
        """Return the names of all studies in the database."""
        with self._reading() as connection:
            return list(connection.execute(sa.select(_studies.c.name).order_by("id")).scalars())

    # ------------------------------------------------------------------ trials

    def trials(self) -> list[Trial]:
        """Return all trials, by number."""
        query = sa.select(_trials).where(_trials.c.study == self._id).order_by(_trials.c.number)
        with self._reading() as connection:
            return [_trial(row) for row in connection.execute(query)]

    def add(
        self, trials: Sequence[Trial], *, after: int | None = None, state: Any = None
    ) -> list[Trial]:
        """Add trials, and give them the next numbers.

        Args:
            trials: The trials; their numbers are ignored.
            after: How many trials there must be; None for any number.
            state: Tree to keep in place of the last one, in the same transaction; None keeps that.

        Raises:
            Busy: There are more than ``after``.
        """
        with self._writing() as connection:
            count = self._count(connection)
            if after is not None and count != after:
                raise Busy
            rows = [
                {**_row(trial), "study": self._id, "number": count + k}
                for k, trial in enumerate(trials)
            ]
            connection.execute(_trials.insert(), rows)
            if state is not None:
                self._put_state(connection, count, state)
        return [_renumbered(trial, count + k) for k, trial in enumerate(trials)]

    def _put_state(self, connection: Connection, trials: int, state: Any) -> None:
        structure, tensors = pack(state)
        connection.execute(_states.delete().where(_states.c.study == self._id))
        connection.execute(
            _states.insert().values(
                study=self._id,
                trials=trials,
                structure=json.dumps(structure, allow_nan=False),
                tensors=_tensor_bytes(tensors),
            )
        )

    def state(self) -> Any:
        """Return the tree kept last; None where there is none."""
        from safetensors.torch import load

        with self._reading() as connection:
            row = connection.execute(sa.select(_states).where(_states.c.study == self._id)).first()
        if row is None:
            return None
        return unpack(json.loads(row.structure), load(bytes(row.tensors)))

    def finish(self, trial: Trial) -> None:
        """Store the outcome of a running trial.

        Raises:
            DataError: There is no such trial, or it has been told already.
        """
        own = sa.and_(_trials.c.study == self._id, _trials.c.number == trial.number)
        with self._writing() as connection:
            status = connection.execute(sa.select(_trials.c.status).where(own)).scalar()
            if status is None:
                count = self._count(connection)
                raise DataError(
                    f"trial {trial.number} is unknown: the study has {count} trials, from 0; "
                    "attach(params, value) adds one from elsewhere"
                )
            if status != "running":
                raise DataError(f"trial {trial.number} was told already: it is {status}")
            connection.execute(_trials.update().where(own).values(**_row(trial)))

    def _count(self, connection: Connection) -> int:
        query = sa.select(sa.func.count()).where(_trials.c.study == self._id)
        return int(connection.execute(query).scalar_one())


def _row(trial: Trial) -> dict[str, Any]:
    def text(value: Mapping[str, Any] | None) -> str | None:
        return None if value is None else json.dumps(dict(value), allow_nan=False)

    return {
        "params": text(trial.params),
        "status": trial.status,
        "outcomes": text(trial.values),
        "variances": text(trial.variances),
        "error": trial.error,
        "origin": trial.origin,
        "started": trial.started,
        "finished": trial.finished,
    }


def _trial(row: Any) -> Trial:
    def tree(text: str | None) -> Any:
        return None if text is None else json.loads(text)

    return Trial(
        number=row.number,
        params=tree(row.params),
        status=row.status,
        values=tree(row.outcomes),
        variances=tree(row.variances),
        error=row.error,
        origin=row.origin,
        started=row.started,
        finished=row.finished,
    )


def _tensor_bytes(tensors: Mapping[str, Any]) -> bytes:
    from safetensors.torch import save

    return save({key: tensor.cpu() for key, tensor in tensors.items()})


def _renumbered(trial: Trial, number: int) -> Trial:
    return replace(trial, number=number)

"""A study: ask for points, tell what they gave, stop and go on at any moment."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from probkit.bo.asking import StudySettings, evidence_of, fit_surrogate, next_points
from probkit.bo.evaluation import Evaluated, Objective, evaluations
from probkit.bo.observations import Observations, observe
from probkit.bo.outcomes import Constraint, Outcomes
from probkit.bo.space import Params, Space
from probkit.bo.storage import Busy, Storage
from probkit.bo.trials import STATUSES, Status, Trial
from probkit.errors import DataError, ShapeError
from probkit.rng import Rng, seed_of, stream

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from botorch.models.model import Model

    from probkit.bo.calibration import Calibration
    from probkit.models.language.protocol import Usage

__all__ = ["Study"]

_log = logging.getLogger("probkit.bo")


class Study:
    """Search for the best point of a space, by evaluations that cost something.

    A study lives in its storage: every ask and every tell is one transaction there, and an object
    of this class only reads and writes it. So a study may be killed at any moment and opened again,
    and several processes may work on one. What is asked next depends on the seed, the trials and
    what the last surrogate handed on, all of it stored; the order of tells does not matter.

    A storage that holds a study of this name already is opened: its trials count, and the settings
    must be those stored.

    Args:
        space: What is searched.
        objectives: Each outcome that is to be good, with ``"min"`` or ``"max"``.
        constraints: Outcomes that must keep bounds: ``"memory <= 4"``, or :class:`Constraint`.
        surrogate: ``"auto"``, the name of a surrogate, options of one such as
            ``LLMSurrogate(...)``, or a function ``(X, Y, Yvar, *, bounds, previous, rng)`` that
            returns a BoTorch model. ``"llm"`` is a Gaussian process that a language model advises:
            ``options={"lm": lm}``.
        acq: ``"auto"``, or the name of an acquisition function.
        rng: Seed of everything random.
        storage: File of a SQLite database, a SQLAlchemy URL, or None for memory only.
        name: Name of the study within the storage.
        noise: ``"auto"`` learns how noisy outcomes are, unless variances are told; ``"none"`` says
            that they are exact (networks sampled by HMC learn all the same how far they miss them).
        initial: Points of a Sobol sequence before the first surrogate; by default twice the number
            of parameters, at least 5 and at most 20.
        failures: ``"worst"`` lets failed and pruned trials stand in the data with bad values;
            ``"ignore"`` leaves them out.
        outcome: How outcomes are transformed for the surrogate: ``"standardize"``, or
            ``"winsorize"``, which clips bad outliers first, for outcomes with heavy tails.
        options: Further options of the surrogate, such as ``{"hidden": [50, 50]}``.

    Raises:
        DataError: Options that do not exist, or a storage that holds another study of this name.

    Example:
        >>> from probkit.bo import Float, Space, Study
        >>> study = Study(Space(x=Float(-2, 2)), {"loss": "min"}, surrogate="gp", rng=0)
        >>> for trial in study.ask(5):
        ...     told = study.tell(trial, trial["x"] ** 2)
        >>> len(study.trials), study.pending
        (5, [])
    """

    def __init__(
        self,
        space: Space,
        objectives: Mapping[str, str] | None = None,
        *,
        constraints: Iterable[Constraint | str] = (),
        surrogate: Any = "auto",
        acq: str = "auto",
        rng: Rng,
        storage: str | Path | None = None,
        name: str = "study",
        noise: Literal["auto", "none"] = "auto",
        initial: int | None = None,
        failures: Literal["worst", "ignore"] = "worst",
        outcome: Literal["standardize", "winsorize"] = "standardize",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(space, Space):
            raise DataError(f"expected a Space, got {space!r}; write Space(x=Float(0, 1))")
        outcomes = Outcomes({"value": "min"} if objectives is None else objectives, constraints)
        settings = StudySettings(
            surrogate=surrogate,
            acquisition=acq,
            seed=seed_of(rng),
            noise=noise,
            initial=min(max(5, 2 * len(space)), 20) if initial is None else initial,
            failures=failures,
            outcome=outcome,
            options=dict(options or {}),
        )
        store = Storage(storage, name)
        wanted = {
            "space": space.to_json(), "outcomes": outcomes.to_json(), **settings.to_json()
        }  # fmt: skip
        found = store.create(wanted)
        differing = [key for key in wanted if found.get(key, wanted[key]) != wanted[key]]
        if differing:
            raise DataError(
                f"{store} holds another study called {name!r}: its {', '.join(differing)} "
                f"{'differs' if len(differing) == 1 else 'differ'}; choose another name= or "
                "storage=, or open it as it is with Study.load"
            )
        self._adopt(store, space, outcomes, settings)

    def _adopt(
        self, storage: Storage, space: Space, outcomes: Outcomes, settings: StudySettings
    ) -> None:
        self._storage, self._space, self._outcomes = storage, space, outcomes
        self._settings = settings

    @classmethod
    def load(
        cls,
        storage: str | Path,
        name: str | None = None,
        *,
        surrogate: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> Study:
        """Open a stored study.

        Args:
            storage: File of a SQLite database, or a SQLAlchemy URL.
            name: Name of the study; not needed where there is one only.
            surrogate: Surrogate from now on; needed where the stored one was a function.
            options: Options of the surrogate in place of stored ones; needed for those that are
                not stored, such as a language model: ``options={"lm": lm}``.

        Raises:
            DataError: There is no such study, or several and no name.
        """
        if "://" not in str(storage) and not Path(storage).exists():
            raise DataError(f"storage: there is no file {str(storage)!r}")
        if name is None:
            names = Storage(storage, "").names()
            if len(names) != 1:
                known = ", ".join(map(repr, names)) or "none"
                raise DataError(f"storage: expected one study, or name=, got {known}")
            name = names[0]
        store = Storage(storage, name)
        found = store.settings()
        if found is None:
            known = ", ".join(map(repr, store.names())) or "none"
            raise DataError(f"storage: there is no study called {name!r}; there are: {known}")
        study = cls.__new__(cls)
        study._adopt(
            store,
            Space.from_json(found["space"]),
            Outcomes.from_json(found["outcomes"]),
            StudySettings.from_json(found, surrogate, options),
        )
        return study

    # ------------------------------------------------------------------ what it is

    @property
    def space(self) -> Space:
        """What is searched."""
        return self._space

    @property
    def outcomes(self) -> Outcomes:
        """Objectives and constraints."""
        return self._outcomes

    @property
    def settings(self) -> StudySettings:
        """Surrogate, acquisition function, seed and the like."""
        return self._settings

    @property
    def trials(self) -> list[Trial]:
        """All trials, by number."""
        return self._storage.trials()

    @property
    def pending(self) -> list[Trial]:
        """Trials that were asked for and not told."""
        return [t for t in self.trials if t.status == "running"]

    # ------------------------------------------------------------------ ask and tell

    @overload
    def ask(self, n: None = None) -> Trial: ...

    @overload
    def ask(self, n: int) -> list[Trial]: ...

    def ask(self, n: int | None = None) -> Trial | list[Trial]:
        """Return the next trial, or ``n``, different from each other and from pending ones.

        Args:
            n: Number of trials; None for one trial, not in a list.

        Raises:
            DataError: ``n`` below 1, or no point is left that is not pending.
        """
        count = 1 if n is None else n
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise DataError(f"ask: expected a whole number of trials n >= 1, got {n!r}")
        while True:
            trials, state = self._storage.trials(), self._storage.state()
            proposal = next_points(
                self._space,
                self._outcomes,
                trials,
                count,
                settings=self._settings,
                state=state,
            )
            now = _now()
            asked = [
                Trial(-1, params, origin=origin, started=now)
                for params, origin in zip(proposal.params, proposal.origins, strict=True)
            ]
            try:
                added = self._storage.add(asked, after=len(trials), state=proposal.state)
            except Busy:  # another process has asked meanwhile: its trials are pending for us
                continue
            return added[0] if n is None else added

    def tell(
        self,
        trial: Trial | int,
        value: Any = None,
        var: Any = None,
        *,
        status: Status = "complete",
        error: str | None = None,
    ) -> Trial:
        """Store what came of a trial.

        Args:
            trial: The trial, or its number.
            value: The outcome, outcomes by name, or a sequence in the order of
                ``study.outcomes.names``. None for failed and cancelled trials; optional for pruned
                ones.
            var: Variances of their noise, in the same form; None where not known.
            status: ``"complete"``; ``"failed"`` where there is no result because of the point;
                ``"pruned"`` where it was stopped early; ``"cancelled"`` where it was never
                evaluated, which leaves the point as if it had not been asked for.
            error: Why it failed.

        Returns:
            The trial as it is stored now.

        Raises:
            DataError: A trial that is unknown or was told already, or numbers that are not finite.
            ShapeError: A wrong number of outcomes.
        """
        number = trial.number if isinstance(trial, Trial) else trial
        if isinstance(number, bool) or not isinstance(number, int):
            raise DataError(f"tell: expected a Trial or its number, got {trial!r}")
        known = {t.number: t for t in self._storage.trials()}
        values, variances = self._measured(value, var, status, known.values())
        base = known.get(number, Trial(number, {}))
        told = replace(
            base, status=status, values=values, variances=variances, error=error, finished=_now()
        )
        self._storage.finish(told)
        return told

    def attach(
        self,
        params: Params,
        value: Any = None,
        var: Any = None,
        *,
        status: Status = "complete",
        error: str | None = None,
    ) -> Trial:
        """Add a trial from elsewhere, told already.

        Args:
            params: Its point.
            value: As for :meth:`tell`.
            var: As for :meth:`tell`.
            status: As for :meth:`tell`; ``"running"`` adds a pending trial.
            error: Why it failed.

        Raises:
            DataError: Params outside the space, and as for :meth:`tell`.
        """
        point = self._space.check(params)
        if status == "running":
            made = Trial(-1, point, origin="attached", started=_now())
        else:
            values, variances = self._measured(value, var, status, self._storage.trials())
            made = Trial(-1, point, status, values, variances, error, "attached", None, _now())
        return self._storage.add([made])[0]

    def _measured(
        self, value: Any, var: Any, status: str, others: Iterable[Trial]
    ) -> tuple[dict[str, float] | None, dict[str, float] | None]:
        """Check what was measured."""
        if status not in STATUSES or status == "running":
            ends = ", ".join(repr(s) for s in STATUSES if s != "running")
            raise DataError(f"status: expected one of {ends}, got {status!r}")
        if status in ("failed", "cancelled"):
            if value is not None:
                raise DataError(f"a {status} trial has no value, got {value!r}; leave it out")
            return None, None
        if value is None:
            if status == "pruned":
                return None, None
            raise DataError("tell: a value is missing; for none: tell(trial, status='failed')")
        values = self._outcomes.read(value)
        if var is None:
            variances = None
        else:
            variances = self._outcomes.read(var, "var")
            negative = [name for name, number in variances.items() if number < 0]
            if negative:
                raise DataError(
                    f"var of {negative[0]!r}: expected a variance >= 0, got "
                    f"{variances[negative[0]]!r}"
                )
        if status == "complete":
            self._check_noise(variances, others)
        return values, variances

    def _check_noise(self, variances: Any, others: Iterable[Trial]) -> None:
        if self._settings.noise == "none" and variances is not None:
            raise DataError('var was told, but the study says noise="none"; leave one of them out')
        for other in others:
            if other.status == "complete" and (other.variances is None) != (variances is None):
                raise DataError(
                    "var is told for all trials or for none: trial "
                    f"{other.number} came {'without' if other.variances is None else 'with'} it"
                )

    def optimize(
        self,
        objective: Objective,
        n: int,
        *,
        executor: Executor | None = None,
        workers: int | None = None,
        catch: type[BaseException] | tuple[type[BaseException], ...] = (),
        retries: int = 2,
        pending: Literal["leave", "rerun"] = "leave",
        callback: Callable[[Study, Trial], bool | None] | None = None,
    ) -> Study:
        """Ask, evaluate and tell ``n`` times.

        Args:
            objective: Called with the params of a trial; returns outcomes as :meth:`tell` takes
                them, or a :class:`Measurement`; raises :class:`Pruned` to stop early.
            n: Number of evaluations.
            executor: Any ``concurrent.futures.Executor`` for parallel evaluations: of threads or
                processes, ``Client.get_executor()`` of Dask, and others. The objective must be
                picklable for those of processes.
            workers: Evaluations in flight at once; by default the executor's number of workers.
            catch: Exceptions of the objective after which the search goes on. Whatever it raises,
                the trial is told as failed first.
            retries: How often an evaluation that was lost with its worker is tried again.
            pending: ``"rerun"`` begins with the trials that are pending now, such as those of a
                process that was killed; only where no other process works on them.
            callback: Called after each tell; True ends the search, when what runs is done.

        Returns:
            The study itself.

        Raises:
            DataError: ``n`` below 0, or values that cannot be told, such as NaN, unless caught.
            Exception: What the objective raised, unless caught.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise DataError(f"optimize: expected a whole number of evaluations n >= 0, got {n!r}")
        if pending not in ("leave", "rerun"):
            raise DataError(f"pending: expected 'leave' or 'rerun', got {pending!r}")
        waiting = self.pending if pending == "rerun" else []
        stopped = False

        def next_trials() -> Iterator[Trial]:
            for k in range(n):
                if stopped:
                    return
                yield waiting[k] if k < len(waiting) else self.ask()

        failure: Evaluated | None = None
        for trial, found in evaluations(
            objective, next_trials(), executor=executor, workers=workers, retries=retries
        ):
            told, found = self._tell_evaluated(trial, found)
            if found.status == "failed" and not _is_caught(found, catch):
                failure, stopped = failure or found, True  # what runs is still told
            if callback is not None and callback(self, told):
                stopped = True
        if failure is not None:
            raise failure.exception or RuntimeError(f"the objective failed: {failure.error}")
        return self

    def _tell_evaluated(self, trial: Trial, found: Evaluated) -> tuple[Trial, Evaluated]:
        """Tell what an objective gave; values that cannot be told, such as NaN, are a failure."""
        if found.status != "failed":
            status: Status = "pruned" if found.status == "pruned" else "complete"
            try:
                return self.tell(trial, found.value, found.var, status=status), found
            except (DataError, ShapeError) as error:
                found = Evaluated("failed", error=str(error), exception=error)
        _log.warning("trial %d failed: %s", trial.number, found.error)
        return self.tell(trial, status="failed", error=found.error), found

    # ------------------------------------------------------------------ results

    def _feasible(self) -> list[Trial]:
        return [
            t
            for t in self.trials
            if t.status == "complete" and t.values and self._outcomes.is_feasible(t.values)
        ]

    @overload
    def best(self, n: None = None) -> Trial: ...

    @overload
    def best(self, n: int) -> list[Trial]: ...

    def best(self, n: int | None = None) -> Trial | list[Trial]:
        """Return the trial with the best told value that keeps all constraints, or the best ``n``.

        Raises:
            DataError: Several objectives, or no complete trial that keeps the constraints.
        """
        name = self._outcomes.only
        sign = 1 if self._outcomes.objectives[name] == "min" else -1
        found = self._feasible()
        if not found:
            kept = " that keeps the constraints" if self._outcomes.constraints else ""
            raise DataError(f"best: there is no complete trial{kept} yet")
        ranked = sorted(found, key=lambda t: (sign * (t.values or {})[name], t.number))
        return ranked[0] if n is None else ranked[:n]

    def pareto(self) -> list[Trial]:
        """Return the feasible trials that no other beats in all objectives."""
        names = list(self._outcomes.objectives)
        signs = [1 if self._outcomes.objectives[name] == "min" else -1 for name in names]
        found = self._feasible()
        points = [
            tuple(s * (t.values or {})[name] for s, name in zip(signs, names, strict=True))
            for t in found
        ]
        return [t for t, p in zip(found, points, strict=True) if not _is_dominated(p, points)]

    def trace(self) -> pd.Series:
        """Return the best value told so far, by trial; NaN before the first feasible one."""
        import pandas as pd

        name = self._outcomes.only
        best, rows = float("nan"), {}
        better = min if self._outcomes.objectives[name] == "min" else max
        for trial in self.trials:
            if trial.status == "running":
                continue
            complete = trial.status == "complete" and trial.values is not None
            if complete and self._outcomes.is_feasible(trial.values or {}):
                value = (trial.values or {})[name]
                best = value if best != best else better(best, value)
            rows[trial.number] = best
        return pd.Series(rows, name=name, dtype=float).rename_axis("trial")

    def to_pandas(self) -> pd.DataFrame:
        """Return one row for each trial: status, params, outcomes, variances and times."""
        import pandas as pd

        rows = []
        for t in self.trials:
            row: dict[str, Any] = {"trial": t.number, "status": t.status, "origin": t.origin}
            row |= {name: t.params.get(name) for name in self._space.names}
            row |= {n: (t.values or {}).get(n, float("nan")) for n in self._outcomes.names}
            if any(other.variances for other in self.trials):
                row |= {
                    f"{n}_var": (t.variances or {}).get(n, float("nan"))
                    for n in self._outcomes.names
                }
            row["feasible"] = t.values is not None and self._outcomes.is_feasible(t.values)
            row |= {"error": t.error, "started": t.started, "finished": t.finished}
            rows.append(row)
        frame = pd.DataFrame(rows)
        for column in ("started", "finished"):
            if column in frame:
                frame[column] = pd.to_datetime(frame[column], utc=True, format="ISO8601")
        return frame.set_index("trial") if rows else frame

    def summary(self) -> pd.Series:
        """Return how many trials there are of each status, and the best of them."""
        import pandas as pd

        trials = self.trials
        rows: dict[str, Any] = {"trials": len(trials)}
        rows |= {s: sum(t.status == s for t in trials) for s in STATUSES}
        feasible = self._feasible()
        if self._outcomes.constraints:
            rows["feasible"] = len(feasible)
        if feasible and len(self._outcomes.objectives) == 1:
            best = self.best()
            rows |= {"best trial": best.number, **dict(best.values or {}), **dict(best.params)}
        elif feasible:
            rows["pareto trials"] = [t.number for t in self.pareto()]
        return pd.Series(rows, name=self._storage.name, dtype=object)

    def __len__(self) -> int:
        """Number of trials."""
        return len(self.trials)

    def __repr__(self) -> str:
        """Name, storage and number of trials."""
        return f"<Study {self._storage.name!r} in {self._storage}, {len(self.trials)} trials>"

    # ------------------------------------------------------------------ its surrogate

    def observations(self) -> Observations:
        """Return the trials as tensors, as a surrogate gets them."""
        return observe(
            self.trials,
            self._space,
            self._outcomes,
            noise=self._settings.noise,
            failures=self._settings.failures,
        )

    def model(self) -> Model:
        """Fit the surrogate to what was told, and return it; the study stays as it is.

        Its inputs are codes of the space, its outputs the outcomes, objectives to be maximised.

        Raises:
            DataError: Fewer than two trials are complete.
        """
        seen = self.observations()
        return fit_surrogate(
            seen,
            self._space,
            self._settings,
            self._storage.state(),
            outcomes=self._outcomes,
            key=("model", len(self)),
        )

    def _evidence(self) -> Any:
        """What a language model has said of points before their outcomes were told, or None."""
        return evidence_of(self._storage.state())

    def _kept(self) -> Mapping[str, Any]:
        state = self._storage.state()
        warm = state.get("warm") if isinstance(state, Mapping) else None
        return warm if isinstance(warm, Mapping) else {}

    @property
    def usage(self) -> Usage:
        """What the asks of this study have spent on a language model, over all its processes."""
        from probkit.models.language.protocol import Usage

        return Usage(**self._kept().get("usage", {}))

    @property
    def advice(self) -> dict[str, Any]:
        """What became of the language model's answers, as of the last ask that it was part of.

        Counts of answers ``asked`` and ``accepted``, ``reasons`` of those that were not,
        ``weights`` of the members of the hybrid, whether it is ``trusted``, and a ``note`` that
        says why it was not asked or heard, such as a budget that is spent. Empty without one.
        """
        return dict(self._kept().get("report", {}))

    def predict(self, params: Params | Sequence[Params]) -> pd.DataFrame:
        """Predict the outcomes at points: mean and standard deviation, without noise.

        Args:
            params: One point, or several.

        Raises:
            DataError: Params outside the space, or fewer than two complete trials.
        """
        import pandas as pd
        import torch

        points = [params] if isinstance(params, Mapping) else list(params)
        with torch.no_grad():
            posterior = self.model().posterior(self._space.codes(points)[:, None, :])
            mean = posterior.mean[:, 0] * self._outcomes.signs
            sd = posterior.variance[:, 0].sqrt()
        columns = {}
        for k, name in enumerate(self._outcomes.names):
            columns[name], columns[f"{name}_sd"] = mean[:, k].numpy(), sd[:, k].numpy()
        return pd.DataFrame(columns)

    def calibration(self, *, folds: int | None = None) -> Calibration:
        """Predict each complete trial by a surrogate that has not seen it.

        Args:
            folds: Groups of trials left out together; None leaves out one at a time.
        """
        from probkit.bo.calibration import cross_validate

        return cross_validate(self, folds=folds)

    def importance(self, n: int = 1024) -> pd.DataFrame:
        """Return the share of the surrogate's variation that each parameter explains.

        Args:
            n: Points of each of the samples that :func:`~probkit.bo.importance.sobol_indices`
                compares.
        """
        from probkit.bo.importance import sobol_indices

        return sobol_indices(self, n)

    def _generator(self, *key: int | str) -> torch.Generator:
        return stream(self._settings.seed, *key)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()


def _is_caught(found: Evaluated, catch: Any) -> bool:
    """Whether the search goes on; what could not be sent back is caught by any ``catch``."""
    if found.exception is None:
        return bool(catch)
    return isinstance(found.exception, catch)


def _is_dominated(point: Sequence[float], others: Iterable[Sequence[float]]) -> bool:
    """Whether another point is at least as good everywhere and better somewhere; all minimised."""
    return any(
        all(o <= p for o, p in zip(other, point, strict=True)) and tuple(other) != tuple(point)
        for other in others
    )

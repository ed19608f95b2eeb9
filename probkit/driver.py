"""The one driver of all samplers: chains, streams, callbacks, checkpoints and interruption."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from probkit.checkpoint import BlockFile, BlockRun, Checkpoint
from probkit.data import Labels, convert, device_of
from probkit.errors import CapabilityError, DataError
from probkit.fingerprint import fingerprint
from probkit.guide import Guide
from probkit.loader import Loader
from probkit.model import prepare
from probkit.posterior import Posterior, first_chains, join_chains
from probkit.rng import Rng, draw_count, seed_of, stream
from probkit.sampler import Callback, Info, Problem, Sampler, check_fit, default_sampler
from probkit.tree import Tree, leaves

__all__ = ["infer"]

_LOG = logging.getLogger("probkit")


def infer(
    model: Any,
    data: Any,
    sampler: Sampler | None = None,
    *,
    guide: Any = None,
    rng: Rng,
    chains: int = 1,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | Checkpoint | None = None,
    executor: Executor | None = None,
) -> Posterior:
    """Turn model, guide, sampler and data into a posterior.

    Args:
        model: A probkit model, or ``FromPyro(program)``.
        data: What the model asks for; NumPy arrays and pandas frames are accepted where tensors
            are, and their labels become coords. SVI, SGLD and SGHMC also take a
            :class:`~probkit.loader.Loader` of minibatches.
        sampler: Options of the algorithm; None takes the model's own choice.
        guide: Variational family (SVI, Laplace), proposal (importance and particle samplers) or
            amortised network (Direct); other samplers refuse it. Pyro guides and AutoGuides, as
            classes, functions or objects, are accepted.
        rng: Seed or generator. Chain ``k`` has its own stream, whatever the number of chains.
        chains: Independent repeats.
        callbacks: Called with an :class:`~probkit.sampler.Info` after each step; one that returns
            True stops the run. In a terminal or notebook a progress bar is added.
        checkpoint: Folder (or :class:`~probkit.checkpoint.Checkpoint`) to save to; a run found
            there is resumed, with results equal to the last bit.
        executor: Any ``concurrent.futures.Executor``; blocks of chains run on it. Callbacks are
            then called as blocks end, and an early stop returns the chains that have ended.

    Returns:
        The posterior. After Ctrl-C it holds the draws so far and ``attrs["complete"]`` is False.

    Raises:
        CapabilityError: Model and sampler do not fit.
        DataError: The data or the options cannot be used, or the checkpoint is another run's.
        KeyboardInterrupt: Interrupted before there was anything to return.

    Example:
        >>> import torch
        >>> from probkit.inference import Direct
        >>> from probkit.kernels import NNGPKernel
        >>> from probkit.models import ScaleMixtureNNGP
        >>> x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        >>> post = infer(ScaleMixtureNNGP(NNGPKernel()), (x, x[:, 0].sin()), Direct(), rng=0)
        >>> post.predict(x).mean.shape
        torch.Size([8])
    """
    chains = draw_count(chains, "chains")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise DataError(f"callbacks: expected a list of functions, got {callbacks!r}")
    checkpoint = _as_checkpoint(checkpoint)
    converted = convert(data)
    is_loader = isinstance(data, Loader)
    prepared = data.prepared(model) if is_loader else prepare(model, converted.data)
    if sampler is None:
        choose = getattr(model, "sampler", None)
        sampler = choose() if callable(choose) else default_sampler(model)
    guide = _as_guide(guide)
    check_fit(model, sampler, guide)
    if is_loader and not getattr(sampler, "accepts_loader", False):
        raise CapabilityError(
            f"{type(sampler).__name__} needs all data at once; a Loader feeds SVI, SGLD and SGHMC"
        )
    coords = {**_label_coords(model, converted.data, converted.labels), **_coords_of(model)}
    problem = Problem(model, prepared, guide, coords)
    seed = seed_of(rng)
    plan = _Plan(seed, chains, getattr(sampler, "block", 1), device_of(prepared))
    marks = {} if checkpoint is None else fingerprint(model, sampler, guide, prepared, seed, chains)
    started = time.perf_counter()
    if executor is None:
        outcome = _run_here(problem, sampler, plan, callbacks, checkpoint, marks)
    else:
        outcome = _run_on(executor, problem, sampler, plan, callbacks, checkpoint, marks)
    posterior = _assemble(problem, sampler, plan, outcome)
    attrs = {
        "algorithm": type(sampler).__name__,
        "model": type(model).__name__,
        "options": _options(sampler),
        "seed": seed,
        "chains": chains,
        "versions": _versions(),
        "seconds": time.perf_counter() - started,
        "complete": outcome.reason is None,
        **({} if outcome.reason is None else {"stopped_by": outcome.reason}),
        **_reported(model),
    }
    return replace(posterior, attrs={**attrs, **posterior.attrs})


def _as_checkpoint(checkpoint: str | Path | Checkpoint | None) -> Checkpoint | None:
    """Read a path as a checkpoint, and see that it can be a folder before any work is done."""
    if checkpoint is None:
        return None
    plan = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)
    path = Path(plan.path)
    if path.exists() and not path.is_dir():
        raise DataError(f"checkpoint: expected a folder, {str(path)!r} is a file; choose another")
    return plan


def _as_guide(guide: Any) -> Guide | None:
    """Wrap a Pyro guide; leave probkit's own as they are."""
    if guide is None or isinstance(guide, Guide):
        return guide
    from probkit.pyro_adapter import as_guide

    wrapped: Guide = as_guide(guide)
    return wrapped


@dataclass(frozen=True)
class _Plan:
    """How chains are cut into blocks, and which streams they get."""

    seed: int
    chains: int
    width: int | None
    device: torch.device

    @property
    def blocks(self) -> list[range]:
        width = self.width or self.chains
        return [range(first, first + width) for first in range(0, self.chains, width)]

    def rngs(self, block: range) -> list[torch.Generator]:
        return [stream(self.seed, "chain", k, device=self.device) for k in block]


@dataclass(frozen=True)
class _Outcome:
    """The blocks after the run, and why it ended early (None when it did not)."""

    runs: list[BlockRun]
    reason: str | None = None


class _Interrupt:
    """The first Ctrl-C asks the run to stop after its step; the second stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def handle(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        _LOG.warning("interrupted: finishing the current step; interrupt again to stop at once")


@contextmanager
def _interrupt() -> Iterator[_Interrupt]:
    """Watch SIGINT while in the main thread, unless the program ignores or handles it itself."""
    interrupt = _Interrupt()
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield interrupt
        return
    signal.signal(signal.SIGINT, interrupt.handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _run_here(
    problem: Problem,
    sampler: Sampler,
    plan: _Plan,
    callbacks: Sequence[Callback],
    checkpoint: Checkpoint | None,
    marks: Mapping[str, str],
) -> _Outcome:
    """Step all blocks in turn, so that an interruption leaves all chains equally long."""
    runs = [BlockRun(plan.rngs(block)) for block in plan.blocks]
    files = _open_files(runs, checkpoint, marks, plan.device)
    reporter = _Reporter(problem, sampler, callbacks)
    with ExitStack() as stack:
        interrupt = stack.enter_context(_interrupt())
        stack.callback(reporter.close)
        for run in runs:
            if run.state is None and not run.done:
                run.state = sampler.init(problem, rngs=run.rngs)
        while not all(run.done for run in runs):
            # A kill between two saves leaves some blocks behind; they catch up first.
            behind = min(run.step for run in runs if not run.done)
            stats: list[Mapping[str, float]] = []
            for run in runs:
                if not run.done and run.step == behind:
                    stats.append(advance(problem, sampler, run))
            finished = all(run.done for run in runs)
            wants_stop = reporter.report(runs, stats, done=finished)
            # Read once: a signal that comes while saving is seen after the next step.
            interrupted = interrupt.requested
            for run, file in zip(runs, files, strict=False):
                if run.done or interrupted or wants_stop or file.due(run):
                    file.save(run)
            if finished:
                break
            if interrupted:
                if not all(_can_finish(sampler, run) for run in runs):
                    raise KeyboardInterrupt
                return _Outcome(runs, "interrupt")
            if wants_stop:
                if not all(_can_finish(sampler, run) for run in runs):
                    raise DataError(
                        f"a callback stopped {type(sampler).__name__} at step {runs[0].step}, "
                        "before there was a draw to return; stop later"
                    )
                return _Outcome(runs, "callback")
    return _Outcome(runs)


def advance(problem: Problem, sampler: Sampler, run: BlockRun) -> Mapping[str, float]:
    """Take one step of one block; returns its statistics."""
    step = sampler.step(problem, run.state, rngs=run.rngs)
    run.state, run.done = step.state, step.done
    run.step += 1
    if step.keep is not None:
        run.kept.append(step.keep)
    return step.info or {}


def _can_finish(sampler: Sampler, run: BlockRun) -> bool:
    check = getattr(sampler, "can_finish", None)
    kept = run.kept[0] if run.kept else None
    return kept is not None if check is None else bool(check(run.state, kept))


def _open_files(
    runs: Sequence[BlockRun],
    checkpoint: Checkpoint | None,
    marks: Mapping[str, str],
    device: torch.device,
) -> list[BlockFile]:
    if checkpoint is None:
        return []
    files = []
    for number, run in enumerate(runs):
        file = BlockFile(Path(checkpoint.path) / f"block-{number:04d}", checkpoint, marks)
        file.resume(run, device)
        files.append(file)
    return files


@dataclass(frozen=True)
class _Parcel:
    """A block on its way to a worker and back: generators do not pickle, their states do."""

    run: BlockRun
    rngs: list[torch.Tensor]

    @staticmethod
    def close(run: BlockRun) -> _Parcel:
        """Pack ``run`` for the way."""
        return _Parcel(replace(run, rngs=[]), [generator.get_state() for generator in run.rngs])

    def open(self, rngs: list[torch.Generator]) -> BlockRun:
        """Unpack the block, its stream positions put into ``rngs``."""
        for generator, state in zip(rngs, self.rngs, strict=True):
            generator.set_state(state)
        return replace(self.run, rngs=rngs)


def _run_to_end(
    problem: Problem, sampler: Sampler, device: torch.device, parcel: _Parcel
) -> _Parcel:
    """Run one block from where it is to its end; what an executor's worker does.

    The parcel comes back with what was kept on this way only.
    """
    run = parcel.open([torch.Generator(device) for _ in parcel.rngs])
    if run.state is None:
        run.state = sampler.init(problem, rngs=run.rngs)
    while not run.done:
        advance(problem, sampler, run)
    run.joined()
    return _Parcel.close(run)


def _run_on(
    executor: Executor,
    problem: Problem,
    sampler: Sampler,
    plan: _Plan,
    callbacks: Sequence[Callback],
    checkpoint: Checkpoint | None,
    marks: Mapping[str, str],
) -> _Outcome:
    """Run every block on the executor; a checkpoint holds the blocks that have finished.

    Callbacks are called when a block ends. An early stop keeps the finished blocks, lets those
    that run on the executor end unseen, and cancels the others.
    """
    runs = [BlockRun(plan.rngs(block)) for block in plan.blocks]
    files = _open_files(runs, checkpoint, marks, plan.device)
    reporter = _Reporter(problem, sampler, callbacks)
    reason = None
    with ExitStack() as stack:
        stack.callback(reporter.close)
        places: dict[Future[_Parcel], int] = {}
        stack.callback(_cancel, places)
        for number, run in enumerate(runs):
            if not run.done:
                parcel = _Parcel.close(replace(run, kept=[]))
                task = executor.submit(_run_to_end, problem, sampler, plan.device, parcel)
                places[task] = number
        try:
            for task in as_completed(places):
                number = places[task]
                ended = task.result().open(runs[number].rngs)
                runs[number] = replace(ended, kept=[*runs[number].kept, *ended.kept])
                if files:
                    files[number].save(runs[number])
                done = all(run.done for run in runs)
                if reporter.report([r for r in runs if r.done], [], done=done) and not done:
                    reason = "callback"
                    break
        except KeyboardInterrupt:
            if not any(run.done for run in runs):
                raise
            reason = "interrupt"
    return _Outcome(runs if reason is None else [run for run in runs if run.done], reason)


def _cancel(tasks: Iterable[Future[Any]]) -> None:
    for task in tasks:
        task.cancel()


class _Reporter:
    """Tells the callbacks; adds a progress bar where somebody is looking."""

    def __init__(self, problem: Problem, sampler: Sampler, callbacks: Sequence[Callback]) -> None:
        from probkit.progress import Progress

        self.callbacks = list(callbacks)
        if not any(isinstance(callback, Progress) for callback in callbacks):
            self.callbacks.append(Progress())
        total = getattr(sampler, "total", None)
        self.total = total() if callable(total) else None
        self.label = f"{type(sampler).__name__} on {type(problem.model).__name__}"
        self.started = time.perf_counter()
        self.kept = 0
        self.counted = 0

    def report(
        self, runs: Sequence[BlockRun], stats: Sequence[Mapping[str, float]], *, done: bool
    ) -> bool:
        """Call every callback; returns whether one asked to stop."""
        first = runs[0]
        for tree in first.kept[self.counted :]:
            self.kept += _draws_in(tree)
        self.counted = len(first.kept)
        info = Info(
            # Blocks may end after different numbers of steps.
            step=min((r.step for r in runs if not r.done), default=max(r.step for r in runs)),
            total=self.total,
            kept=self.kept,
            seconds=time.perf_counter() - self.started,
            stats=_mean_stats(stats),
            done=done,
            label=self.label,
        )
        return any([callback(info) is True for callback in self.callbacks])

    def close(self) -> None:
        """Let callbacks clean up."""
        for callback in self.callbacks:
            close = getattr(callback, "close", None)
            if callable(close):
                close()


def _draws_in(tree: Tree) -> int:
    return next((int(leaf.shape[1]) for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)), 0)


def _mean_stats(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = stats[0] if stats else {}
    return {n: sum(float(s[n]) for s in stats) / len(stats) for n in names}


def _assemble(problem: Problem, sampler: Sampler, plan: _Plan, outcome: _Outcome) -> Posterior:
    """Finish every block, join their chains, drop the padding."""
    kept = [run.joined() for run in outcome.runs]
    if outcome.reason is not None and all(tree is not None for tree in kept):
        shortest = min(_draws_in(tree) for tree in kept)
        kept = [_shorten(tree, shortest) for tree in kept]
    parts = [
        sampler.finish(problem, run.state, tree, rngs=run.rngs)
        for run, tree in zip(outcome.runs, kept, strict=True)
    ]
    posterior = join_chains(parts)
    if plan.width is not None and posterior.chains > plan.chains:
        posterior = first_chains(posterior, plan.chains)
    conclude = getattr(sampler, "conclude", None)
    return conclude(problem, posterior) if callable(conclude) else posterior


def _shorten(tree: Tree, draws: int) -> Tree:
    from probkit.tree import map_tensors

    return map_tensors(lambda t: t[:, :draws], tree)


def _coords_of(model: Any) -> dict[str, Sequence[Any]]:
    return dict(getattr(model, "coords", None) or {})


def _label_coords(
    model: Any, data: Any, labels: Mapping[tuple[str | int, ...], Labels]
) -> dict[str, Sequence[Any]]:
    """Match the labels of pandas data with the dims that the model gives its data leaves."""
    name_dims = getattr(model, "data_dims", None)
    if not labels or not callable(name_dims):
        return {}
    named = name_dims(data)
    coords: dict[str, Sequence[Any]] = {}
    for path, axes in labels.items():
        dims = named
        for part in path:
            dims = None if dims is None else dims[part]
        for dim, axis in zip(dims or (), axes, strict=False):
            if axis is not None and list(coords.setdefault(dim, axis)) != list(axis):
                raise DataError(
                    f"data: the labels along {dim!r} differ between parts of the data: align them "
                    "(frame.loc[other.index]), or pass arrays"
                )
    return coords


def _reported(model: Any) -> dict[str, Any]:
    """Choices of the model that it wants on record with every result, such as a temperature."""
    own = getattr(model, "reported", None)
    return dict(own()) if callable(own) else {}


def _options(sampler: Any) -> dict[str, str]:
    """The sampler's options as text, for the record."""
    if not is_dataclass(sampler):
        return {}
    return {f.name: repr(getattr(sampler, f.name)) for f in fields(sampler)}


def _versions() -> dict[str, str]:
    import probkit

    return {"probkit": probkit.__version__, "torch": str(torch.__version__)}

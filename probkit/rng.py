"""Explicit randomness: seeds, streams spawned by purpose, and the locked scope.

Every public function that uses randomness takes ``rng``, an integer seed or a
:class:`torch.Generator`. Child streams are spawned from it by a key (a chain number, a purpose), so
chain ``k`` receives the same random numbers alone or among others.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from probkit.errors import DataError, NumericsWarning

__all__ = ["Rng", "draw_count", "randn", "require_rng", "scope", "seed_of", "stream"]

Rng = int | torch.Generator

_LOCK = threading.RLock()


def seed_of(rng: Rng) -> int:
    """Return the root seed that ``rng`` stands for.

    Args:
        rng: An integer is its own seed. A generator gives a fresh one and so advances: two calls
            with the same generator object differ, two runs of the same script agree.

    Returns:
        A non-negative integer below 2**63.

    Raises:
        DataError: ``rng`` is neither a non-negative integer nor a generator.

    Example:
        >>> seed_of(7)
        7
    """
    if isinstance(rng, torch.Generator):
        draw = torch.randint(2**63 - 1, (), generator=rng, device=rng.device, dtype=torch.int64)
        return int(draw)
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool) and 0 <= int(rng) < 2**63:
        return int(rng)
    raise DataError(
        f"rng must be an integer in [0, 2**63) or a torch.Generator, got {rng!r}; pass rng=0"
    )


def require_rng(rng: Rng | None, what: str) -> Rng:
    """Return ``rng``, or explain that ``what`` draws random numbers and needs one.

    Raises:
        DataError: ``rng`` is None.
    """
    if rng is None:
        raise DataError(f"{what} draws random numbers: expected rng=<int or generator>, got none")
    return rng


def draw_count(n: int, what: str = "sample") -> int:
    """Return the number of draws asked for.

    Raises:
        DataError: ``n`` is not a whole number of at least 1.
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise DataError(f"{what}: expected a whole number of draws n >= 1, got {n!r}")
    return int(n)


def _key_word(part: int | str) -> int:
    if isinstance(part, str):
        return int.from_bytes(hashlib.blake2b(part.encode(), digest_size=4).digest(), "little")
    return int(part)


def stream(rng: Rng, *key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Spawn the child stream of ``rng`` that belongs to ``key``.

    The child's seed is a hash of the root seed and the key (:class:`numpy.random.SeedSequence`), so
    it depends on nothing else: not on the order of the calls, nor on which other streams exist.

    Args:
        rng: Root seed or generator (see :func:`seed_of`).
        *key: Integers and strings, for example a chain number and a purpose.
        device: Device on which the generator lives.

    Returns:
        A new generator.

    Example:
        >>> a, b = stream(0, 3, "init"), stream(0, 3, "init")
        >>> bool(torch.rand((), generator=a) == torch.rand((), generator=b))
        True
    """
    words = tuple(_key_word(part) for part in key)
    sequence = np.random.SeedSequence(entropy=seed_of(rng), spawn_key=words)
    seed = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device=device).manual_seed(seed)


def randn(
    rngs: Sequence[torch.Generator],
    shape: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw standard normals of shape [chain, *shape], each chain from its own stream."""
    size = tuple(shape)
    rows = [torch.randn(size, generator=g, dtype=dtype, device=g.device) for g in rngs]
    return torch.stack(rows).to(device)


@contextlib.contextmanager
def scope(
    *,
    rng: Rng | None = None,
    validate: bool | None = None,
    foreign: bool = False,
    quiet: bool = False,
) -> Iterator[None]:
    """Run code that ignores generators (Pyro, torch distributions, ``optimize_acqf``) on ``rng``.

    Inside, torch's global stream continues ``rng``; on leaving, ``rng`` (when it is a generator)
    has advanced by what was drawn, and the global streams and the validation flag of torch
    distributions are what they were. One lock guards the swap, so scopes of several threads
    exclude each other; code outside any scope is not protected from seeing the swap.

    Args:
        rng: Seed or generator for the global stream; None leaves the stream alone.
        validate: Argument validation of distributions inside; None leaves it as it is.
        foreign: Swap the global streams of NumPy and Python as well, for programs by others.
        quiet: Drop numerical warnings of probkit inside, for trial points that nobody keeps.

    Example:
        >>> before = torch.get_rng_state()
        >>> with scope(rng=0):
        ...     _ = torch.rand(3)
        >>> bool((torch.get_rng_state() == before).all())
        True
    """
    with _LOCK, contextlib.ExitStack() as stack:
        if validate is not None:
            stack.callback(Distribution.set_default_validate_args, Distribution._validate_args)
            Distribution.set_default_validate_args(validate)
        if quiet:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", NumericsWarning)
        if rng is not None:
            generator = rng if isinstance(rng, torch.Generator) else stream(rng, "scope")
            if foreign:
                stack.enter_context(_foreign_streams(generator))
            stack.enter_context(_torch_stream(generator))
        yield


@contextlib.contextmanager
def _torch_stream(generator: torch.Generator) -> Iterator[None]:
    """Put ``generator`` in the place of torch's global stream."""
    if generator.device.type == "cuda":
        with _cpu_stream(stream(generator, "cpu")), _cuda_stream(generator):
            yield
    elif torch.cuda.is_initialized():
        with _cpu_stream(generator), _derived_cuda_streams(generator):
            yield
    else:
        with _cpu_stream(generator):
            yield


@contextlib.contextmanager
def _cpu_stream(generator: torch.Generator) -> Iterator[None]:
    saved = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(saved)


@contextlib.contextmanager
def _cuda_stream(generator: torch.Generator) -> Iterator[None]:
    saved = torch.cuda.get_rng_state(generator.device)
    torch.cuda.set_rng_state(generator.get_state(), generator.device)
    try:
        yield
    finally:
        generator.set_state(torch.cuda.get_rng_state(generator.device))
        torch.cuda.set_rng_state(saved, generator.device)


@contextlib.contextmanager
def _derived_cuda_streams(generator: torch.Generator) -> Iterator[None]:
    """Derive the streams of all GPUs from the state of a CPU generator, without advancing it.

    So what is drawn on the CPU is the same with and without a GPU. Where a GPU has drawn, the
    CPU stream is moved on by one number, lest the next scope repeat what the GPU drew.
    """
    saved = torch.cuda.get_rng_state_all()
    twin = torch.Generator()
    twin.set_state(generator.get_state())
    torch.cuda.manual_seed_all(seed_of(twin))
    seeded = torch.cuda.get_rng_state_all()
    try:
        yield
    finally:
        reached = torch.cuda.get_rng_state_all()
        if not all(map(torch.equal, seeded, reached)):
            torch.rand(())  # The global stream is the generator's while this scope is open.
        torch.cuda.set_rng_state_all(saved)


@contextlib.contextmanager
def _foreign_streams(generator: torch.Generator) -> Iterator[None]:
    """Seed the global streams of NumPy and Python from ``generator``; restore them afterwards."""
    saved_numpy, saved_python = np.random.get_state(), random.getstate()
    seed = seed_of(generator)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(saved_numpy)
        random.setstate(saved_python)

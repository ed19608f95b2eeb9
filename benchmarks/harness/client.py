"""The harness's end of a worker process."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.harness.spec import Unavailable

__all__ = ["ContenderFailed", "WorkerProcess", "one_line"]

_ROOT = Path(__file__).resolve().parents[2]
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
# glibc otherwise gives freed memory back or keeps it by rules that depend on the past of the heap,
# and clearing the pages anew can cost more than the work. Equal for all sides: it keeps everything.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0"}


class ContenderFailed(RuntimeError):
    """A contender raised, died or did not answer in time."""


def one_line(text: str) -> str:
    r"""Return the first line of a message, free of this machine's folders.

    Example:
        >>> one_line("cannot open x\nmore")
        'cannot open x'
    """
    line = (text.strip().splitlines() or [""])[0]
    for folder in (str(_ROOT), str(Path.home())):
        if len(folder) > 1:
            line = line.replace(folder, "...")
    return line


def _environment(threads: int) -> dict[str, str]:
    """The parent's environment, with the same threads and the same allocator for every side."""
    env = {**os.environ, **_KEEP_MEMORY}
    env.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    xla = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}"
    env["XLA_FLAGS"] = f"{xla} intra_op_parallelism_threads={threads}"
    env["PYTHONPATH"] = str(_ROOT)
    return env


class WorkerProcess:
    """A running worker; use as a context manager.

    Args:
        python: The interpreter, that of the contender's environment.
        module: Import name of the benchmark file.
        contender: Name of the contender; None for a quality entry.
        threads: Threads its numeric libraries may use.
        timeout: Seconds after which an unanswered request kills the process.
    """

    def __init__(
        self,
        python: str,
        module: str,
        contender: str | None = None,
        *,
        threads: int = 1,
        timeout: float = 1800.0,
    ) -> None:
        self.timeout = timeout
        program = [python, "-m", "benchmarks.harness.worker"]
        self._process = subprocess.Popen(
            [*program, str(threads), module, *([contender] if contender else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            env=_environment(threads),
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises:
            Unavailable: The contender cannot run here.
            ContenderFailed: It raised, died, or did not answer within the time limit.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        alarm = threading.Timer(self.timeout, give_up)
        alarm.start()
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            alarm.cancel()
        if late.is_set():
            raise ContenderFailed(f"no answer to {request['do']!r} within {self.timeout:g} s")
        if not line:
            code = self._process.wait()
            raise ContenderFailed(f"the process ended (exit status {code}) at {request['do']!r}")
        reply: dict[str, Any] = json.loads(line)
        if "unavailable" in reply:
            raise Unavailable(one_line(reply["unavailable"]))
        if "error" in reply:
            raise ContenderFailed(one_line(reply["error"]))
        return reply

    def __enter__(self) -> WorkerProcess:
        """Return the running worker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close its input, which ends it; kill it where it does not end."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

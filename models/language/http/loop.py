"""An event loop on a thread of its own, for code that runs inside notebooks and other loops too."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from probkit.errors import CapabilityError

__all__ = ["BackgroundLoop"]

_T = TypeVar("_T")
_GRACE = 5.0  # seconds that cancelled work has to clean up


class BackgroundLoop:
    """Runs coroutines on one background thread and waits for them.

    The thread starts with the first coroutine. A KeyboardInterrupt while waiting cancels the
    coroutine before it is raised again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def run(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """Run the coroutine that ``work`` makes to its end.

        Raises:
            CapabilityError: In a forked child, which has the loop but not its thread.
        """
        loop = self._started()
        over = threading.Event()

        async def guarded() -> _T:
            try:
                return await work()
            finally:
                over.set()

        future = asyncio.run_coroutine_threadsafe(guarded(), loop)
        try:
            return future.result()
        except BaseException:
            # Nothing is left behind that still talks to the server, or still holds a reservation.
            if not future.done():
                future.cancel()
                over.wait(_GRACE)
            raise

    def stop(self) -> None:
        """Cancel what runs, and end the thread; does nothing in a forked child."""
        with self._lock:
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is None or thread is None or os.getpid() != self._process:
            return
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(_GRACE)

    def _started(self) -> asyncio.AbstractEventLoop:
        if os.getpid() != self._process:
            raise CapabilityError(
                "OpenAILM: expected a call from the process that opened the connections, got one "
                "from a forked child, where their thread does not exist; make a new OpenAILM "
                "there, or start processes by spawn"
            )
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=_serve, args=(self._loop,), name="probkit-http", daemon=True
                )
                self._thread.start()
            return self._loop


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        asyncio.set_event_loop(None)
        loop.close()

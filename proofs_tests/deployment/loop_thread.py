"""What serves on an event loop in a thread of the test: real sockets, no start-up time."""

from __future__ import annotations

import asyncio
import threading
from typing import Self


class LoopThread:
    """A context: it serves inside it. `_start` is done once it serves, and `_stop` ends it in good order."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.fault: BaseException | None = None

    async def _start(self) -> None:
        raise NotImplementedError

    async def _stop(self) -> None:
        raise NotImplementedError

    async def _serve(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        try:
            await self._start()
        except BaseException as fault:  # noqa: BLE001 - raised again by the test that waits
            self.fault = fault
            return
        finally:
            self._ready.set()
        await self._end.wait()
        await self._stop()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(60)
        if self.fault is not None:
            raise self.fault
        return self

    def __exit__(self, *fault: object) -> None:
        self.end()

    def end(self) -> None:
        """End in good order."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._end.set)
            self._thread.join(30)
            assert not self._thread.is_alive()

"""A SuperLink in a thread of the test, with nodes in threads: real sockets, no start-up time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from privfed.context import Context
from privfed.grid import Grid
from privfed.runtime.control import ControlClient, RunRow, Submission
from privfed.runtime.credentials import Credentials
from privfed.runtime.federation import open_app
from privfed.runtime.fleet_service import FleetLimits
from privfed.runtime.launcher import InlineLauncher
from privfed.runtime.run_folder import ENDED, RunFolder
from privfed.runtime.superlink import SuperLink, SuperLinkOptions
from proofs_tests.deployment.small_node import SmallNode, fresh
from proofs_tests.deployment.waiting import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"


class FreshLauncher(InlineLauncher):
    """Runs server apps in this process, each copy anew."""

    def serve(self, app_dir: Path, grid: Grid, context: Context, log: Path) -> object:
        del log
        return fresh(app_dir)[0](grid, context)


class LocalLink:
    """A context: the SuperLink runs inside it."""

    def __init__(
        self,
        home: Path,
        credentials: Credentials | None = None,
        fleet: str = "127.0.0.1:0",
        control: str = "127.0.0.1:0",
        limits: FleetLimits | None = None,
    ) -> None:
        self.options = SuperLinkOptions(
            home=home,
            fleet=fleet,
            control=control,
            monitor="127.0.0.1:0",
            credentials=credentials,
            limits=limits or FleetLimits(nodes=100),
        )
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.fault: BaseException | None = None

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        try:
            self.link = SuperLink(self.options, FreshLauncher())
            await self.link.start()
        except BaseException as fault:  # noqa: BLE001 - raised again by the test that waits
            self.fault = fault
            return
        finally:
            self._ready.set()
        await self._end.wait()
        await self.link.stop()

    def __enter__(self) -> LocalLink:
        self._thread.start()
        assert self._ready.wait(20)
        if self.fault is not None:
            raise self.fault
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """End in good order."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._end.set)
            self._thread.join(20)
            assert not self._thread.is_alive()

    @property
    def fleet(self) -> str:
        return self.link.addresses["fleet"]

    @property
    def control(self) -> str:
        return self.link.addresses["control"]

    def submit(self, app: Path, nodes: int, seed: int | None = 1, **settings: object) -> str:
        with ControlClient(self.control) as control:
            texts = {name.replace("_", "-"): str(value) for name, value in settings.items()}
            return control.submit(Submission(open_app(app), texts, seed=seed, nodes=nodes)).name

    def wait(self, name: str, seconds: float = 30.0) -> RunRow:
        """Wait until a run has ended."""
        with ControlClient(self.control) as control:
            eventually(lambda: control.show(name).state in ENDED, seconds)
            return control.show(name)

    def folder(self, name: str) -> RunFolder:
        return RunFolder.open(self.options.home / "runs" / name)


@contextmanager
def nodes_at(address: str, count: int) -> Iterator[list[SmallNode]]:
    """Run nodes 1 to count in threads."""
    nodes = [SmallNode(address, node, count) for node in range(1, count + 1)]
    going = threading.Event()
    going.set()
    threads = [threading.Thread(target=node.run, args=(going.is_set,), daemon=True) for node in nodes]
    for thread in threads:
        thread.start()
    try:
        yield nodes
    finally:
        going.clear()
        for node, thread in zip(nodes, threads, strict=True):
            node.client.close()
            thread.join(10)
            node.close()

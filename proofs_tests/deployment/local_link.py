"""A SuperLink in a thread of the test, with nodes in threads: real sockets, no start-up time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from privfed.context import Context
from privfed.grid import Grid
from privfed.runtime.control import ControlClient, RunRow, Submission
from privfed.runtime.credentials import Credentials
from privfed.runtime.federation import open_app
from privfed.runtime.fleet_service import FleetLimits
from privfed.runtime.launcher import InlineLauncher
from privfed.runtime.run_folder import ENDED, RunFolder
from privfed.runtime.superlink import SuperLink, SuperLinkOptions
from proofs_tests.deployment.loop_thread import LoopThread
from proofs_tests.deployment.small_node import SmallNode, fresh
from proofs_tests.deployment.waiting import eventually

EXAMPLES = Path(__file__).parents[2] / "examples"


class FreshLauncher(InlineLauncher):
    """Runs server apps in this process, each copy anew."""

    def serve(self, app_dir: Path, grid: Grid, context: Context, log: Path) -> object:
        del log
        return fresh(app_dir)[0](grid, context)


class LocalLink(LoopThread):
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
        super().__init__()

    async def _start(self) -> None:
        self.link = SuperLink(self.options, FreshLauncher())
        await self.link.start()

    async def _stop(self) -> None:
        await self.link.stop()

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
